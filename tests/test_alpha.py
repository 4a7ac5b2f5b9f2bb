"""Alpha channels and masks of files say which pixels are valid, in every path; rasterio is the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import xarray as xr
from numpy.typing import NDArray
from rasterio.enums import ColorInterp, Resampling
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds
from stackstac import stack

import rasteret_dask as rd
from rasteret_dask.headers.reader import Header, read_headers
from rasteret_dask.reader.cogreader import CogReader

X0, Y0, SIDE = 500_000.0, 5_540_000.0, 128
HERE = Affine(10, 0, X0, 0, -10, Y0)
RGBA = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)

Pixels = NDArray[Any]


def scene(bands: int, seed: int = 0, dtype: str = "uint8") -> Pixels:
    """Noise without zeros, so that a zero is never a pixel."""
    return np.random.default_rng(seed).integers(1, 200, (bands, SIDE, SIDE)).astype(dtype)


def holes(seed: int = 1) -> NDArray[np.bool_]:
    """True where something is to be seen: half of the image and some specks."""
    seen = np.random.default_rng(seed).random((SIDE, SIDE)) > 0.1
    seen[:, : SIDE // 2] = False
    return seen


def write(
    path: Path,
    pixels: Pixels,
    colours: tuple[ColorInterp, ...] = (),
    mask: NDArray[np.bool_] | None = None,
    inside: bool = True,
    overviews: tuple[int, ...] = (),
    **options: Any,
) -> Path:
    count, height, width = pixels.shape
    profile = {"crs": "EPSG:32633", "transform": HERE, "tiled": True, "blockxsize": 32, "blockysize": 32}
    profile |= {"compress": "deflate"} | options
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=inside):
        with rasterio.open(
            path, "w", "GTiff", width, height, count, dtype=pixels.dtype.name, **profile
        ) as to:
            if colours:
                to.colorinterp = colours
            to.write(pixels)
            if mask is not None:
                to.write_mask(mask)
        if overviews:
            with rasterio.open(path, "r+") as to:
                to.build_overviews(overviews, Resampling.average)
    return path


def item(
    path: Path, name: str = "a", named: tuple[str, ...] = (), asset: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    asset = dict(asset or {})
    with rasterio.open(path) as file:
        box = transform_bounds(file.crs, 4326, *file.bounds)
    w, s, e, n = box
    if named:
        asset["eo:bands"] = [{"name": band} for band in named]
    return {
        "type": "Feature", "stac_version": "1.1.0" if "bands" in asset else "1.0.0", "id": name,
        "collection": "photos", "bbox": list(box), "links": [],
        "geometry": {"type": "Polygon", "coordinates": [[[w, s], [e, s], [e, n], [w, n], [w, s]]]},
        "properties": {"datetime": "2023-06-01T10:00:00Z"},
        "assets": {"image": {"href": str(path), "type": "image/tiff", "roles": ["data"], **asset}},
    }  # fmt: skip


def photos(path: Path, named: tuple[str, ...] = (), asset: Mapping[str, Any] | None = None) -> rd.Collection:
    return rd.build_from_stac([item(path, "a", named, asset)], name="photos")


def chips_of(made: rd.Collection, size: int = 32) -> xr.Dataset:
    """Return all chips of a collection, with where they lie."""
    chips = made.chips(size, cell_km=size / 100).load()
    assert isinstance(chips, xr.Dataset)
    return chips


def alpha_of(path: Path) -> int | None:
    header = read_headers([str(path)])[str(path)]
    assert isinstance(header, Header)
    return header.alpha


def alpha_file(tmp_path: Path, kind: str) -> Path:
    """Write a file whose pixels are valid where :func:`holes` says, in one of the ways that there are."""
    seen, three = holes(), scene(3)
    four = np.concatenate([three * seen, (seen * np.where(seen, 7, 0))[np.newaxis].astype("uint8")])
    path = tmp_path / f"{kind}.tif"
    match kind:
        case "rgba" | "rgba planes" | "rgba lerc" | "rgba overviews":
            options: dict[str, Any] = {"photometric": "RGB"}
            if kind == "rgba planes":
                options["interleave"] = "band"
            if kind == "rgba lerc":
                options["compress"] = "lerc"
            overviews = (2, 4) if kind == "rgba overviews" else ()
            return write(path, four, RGBA, overviews=overviews, **options)
        case "five":
            fifth = np.concatenate([scene(4), four[3:]])
            return write(
                path, fifth, (*RGBA[:3], ColorInterp.undefined, ColorInterp.alpha), photometric="RGB"
            )
        case "sixteen bits":
            return write(path, four.astype("uint16") * 5, RGBA, photometric="RGB")
        case "grey":
            return write(path, four[[0, 3]], (ColorInterp.gray, ColorInterp.alpha))
        case "mask" | "sidecar":
            return write(path, three, mask=seen, inside=kind == "mask", photometric="RGB")
        case "mask overviews":
            return write(path, three, mask=seen, overviews=(2, 4), photometric="RGB")
    raise AssertionError(kind)


KINDS = (
    "rgba", "rgba planes", "rgba lerc", "rgba overviews", "five", "sixteen bits", "grey", "mask", "sidecar",
    "mask overviews",
)  # fmt: skip


@pytest.fixture(params=KINDS)
def masked(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return alpha_file(tmp_path, request.param)


def test_pixels_are_valid_where_the_file_says(masked: Path) -> None:
    """A little alpha is enough: 7 of 255 is valid."""
    source = photos(masked)
    cube = source.cube(bounds=(X0, Y0 - 1280, X0 + 1280, Y0)).compute()
    chips = chips_of(source)
    with rasterio.open(masked) as file:
        first = file.read(1)
    seen = holes()
    band = cube.isel(time=0, band=0).values
    assert np.array_equal(band[seen], first[seen])
    assert not (band[~seen] == first[~seen])[first[~seen] > 0].any()
    valid, pixels = chips["valid"].values[:, 0], chips["pixels"].values[:, 0, 0]
    for at, (xmin, _, _, ymax) in enumerate(chips["bounds"].values):
        rows = slice(int(Y0 - ymax) // 10, int(Y0 - ymax) // 10 + 32)
        cols = slice(int(xmin - X0) // 10, int(xmin - X0) // 10 + 32)
        assert np.array_equal(valid[at], seen[rows, cols])
        assert np.array_equal(pixels[at][valid[at]], first[rows, cols][seen[rows, cols]])


@pytest.mark.parametrize("size", [40.0, 10.0])
def test_kernels_leave_out_what_is_not_to_be_seen(masked: Path, size: float) -> None:
    """At 40 m pixels are averaged, here of the image itself; in another zone, they are interpolated."""
    source, zone = photos(masked), 32633 if size > 10 else 32632
    if size > 10:
        grid = Affine(size, 0, X0, 0, -size, Y0)
        width, height, kernel = int(1280 / size), int(1280 / size), Resampling.average
    else:
        xmin, _, _, ymax = transform_bounds(32633, zone, X0, Y0 - 1280, X0 + 1280, Y0)
        grid, width, height = Affine(size, 0, xmin // 10 * 10, 0, -size, ymax // 10 * 10), 120, 120
        kernel = Resampling.bilinear
    box = (grid.c, grid.f - height * size, grid.c + width * size, grid.f)
    even = source.harmonize(bands=[source.bands[0]], units="raw", resolution=size, resampling=kernel.name)
    cube = even.cube(bounds=box, crs=zone).isel(time=0, band=0).compute()
    with rasterio.open(masked) as file:
        profile = {**file.profile, "count": 1, "driver": "GTiff", "compress": "deflate", "interleave": "band"}
        profile.pop("photometric", None)
        levels = file.overviews(1)
        level = {"overview_level": 1} if levels and size > 10 else {}
    with rasterio.open(masked, **level) as file:
        values, seen = file.read(1), file.dataset_mask() != 0
        if "five" in masked.name:
            seen = file.read(5) != 0
        if not level:
            seen = holes()
        profile |= {"transform": file.transform, "width": file.width, "height": file.height}
    alone = masked.with_name("alone.tif")
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(alone, "w", **profile) as to:
        to.write(values, 1)
        to.write_mask(seen)
    with rasterio.open(alone) as file, WarpedVRT(
        file, crs=f"EPSG:{zone}", transform=grid, width=width, height=height, resampling=kernel, add_alpha=True,
        tolerance=1e-6, XSCALE=file.res[0] / size, YSCALE=file.res[1] / size,
    ) as warped:  # fmt: skip
        expected, valid = warped.read(1), warped.read(2) != 0
    assert np.array_equal(cube.values[valid], expected[valid])
    assert np.array_equal(cube["valid"].values, valid)
    assert len(np.unique(cube.values[~valid])) <= 1  # one number stands in all gaps


def test_what_is_transparent_shows_the_image_below(tmp_path: Path) -> None:
    above = alpha_file(tmp_path, "rgba")
    below = write(tmp_path / "below.tif", np.full((3, SIDE, SIDE), 250, "uint8"), photometric="RGB")
    made = rd.build_from_stac(
        [item(above, "a", ("R", "G", "B")), item(below, "b", ("R", "G", "B"))], name="photos"
    )
    cube = made.cube(bounds=(X0, Y0 - 1280, X0 + 1280, Y0)).isel(time=0).values
    assert (cube[:, ~holes()] == 250).all()
    assert (cube[:, holes()] < 250).all()


def test_alpha_is_no_default_band(tmp_path: Path) -> None:
    path = alpha_file(tmp_path, "rgba")
    assert photos(path).cube().band.values.tolist() == ["image_1", "image_2", "image_3"]
    alone = photos(alpha_file(tmp_path, "grey"))
    assert alone.cube().band.values.tolist() == ["image"]
    shown = photos(path).harmonize(bands=["image_4"], units="raw").cube().isel(time=0, band=0).values
    with rasterio.open(path) as file:
        assert np.array_equal(shown, file.read(4))  # itself, it is as it stands: 0 is a number


@pytest.mark.parametrize(
    ("asset", "alpha"),
    [
        ({"eo:bands": [{"name": n} for n in ("R", "G", "B", "NIR")]}, None),
        ({"eo:bands": [{"name": f"{n}", "common_name": c} for n, c in
                       enumerate(("red", "green", "blue", "nir"))]}, None),
        ({"bands": [{"name": n} for n in ("R", "G", "B", "nir")]}, None),
        ({"eo:bands": [{"name": n} for n in ("R", "G", "B", "A")]}, 3),
        ({"eo:bands": [{"name": n} for n in ("R", "G", "B")]}, 3),
        ({"eo:bands": [{"name": f"image_{n + 1}"} for n in range(4)]}, 3),
        ({}, 3),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wanted", [False, True])
def test_a_band_that_the_item_names_is_no_alpha(
    tmp_path: Path, asset: dict[str, Any], alpha: int | None, wanted: bool
) -> None:
    """GDAL calls the fourth band of any file of four 8-bit bands alpha: near infrared of most orthophotos."""
    path = write(tmp_path / "four.tif", scene(4))
    assert alpha_of(path) == 3
    named = asset.get("eo:bands") or asset.get("bands")
    bands = None if not (wanted and named) else [str(named[0].get("common_name") or named[0]["name"])]
    made = rd.build_from_stac([item(path, asset=asset)], name="photos", bands=bands)
    assets = dict(made.to_table().column("assets")[0].as_py())
    assert {one["alpha"] for one in assets.values() if one["band_index"] != 3} == {alpha}
    roles = {one["role"] for one in assets.values() if one["band_index"] == 3}
    assert roles <= {"data" if alpha is None else "quality"}


def test_a_table_s_own_names_make_no_alpha(tmp_path: Path) -> None:
    path = write(tmp_path / "four.tif", scene(4))
    whole = photos(path).to_table()
    table = whole.select(["id", "datetime", "geometry"]).append_column("url", [[str(path)]])
    for names, alpha in ((("r", "g", "b", "nir"), None), (("r", "g", "b", "alpha"), 3)):
        made = rd.build_from_files(table, name="x", column_map={"url": "href"}, bands=names)
        assets = dict(made.to_table().column("assets")[0].as_py())
        assert assets["r"]["alpha"] == alpha


def test_extra_samples_that_say_nothing_are_bands(tmp_path: Path) -> None:
    path = write(tmp_path / "four.tif", scene(4), photometric="RGB", ALPHA="NO")
    assert alpha_of(path) is None
    assert photos(path).cube().band.values.tolist() == [f"image_{n}" for n in (1, 2, 3, 4)]
    one = write(tmp_path / "one.tif", scene(2), (ColorInterp.alpha, ColorInterp.gray))
    assert alpha_of(one) == 0


def test_the_real_orthophotos(data: Path) -> None:
    """Their files call near infrared alpha; the items call it NIR."""
    files = sorted((data / "more_sensors" / "naip" / "rasters").glob("*.tif"))
    assert files
    for path in files:
        assert alpha_of(path) == 3
        made = photos(path, ("Red", "Green", "Blue", "NIR"))
        assets = dict(made.to_table().column("assets")[0].as_py())
        assert {a["alpha"] for a in assets.values()} == {None}


def test_stackstac_reads_alpha_as_validity(tmp_path: Path) -> None:
    path = alpha_file(tmp_path, "grey")
    cube = stack(
        [item(path)], assets=["image"], epsg=32633, resolution=10, bounds=(X0, Y0 - 1280, X0 + 1280, Y0),
        snap_bounds=False, rescale=False, dtype="float64", fill_value=np.nan, reader=CogReader,
    )  # fmt: skip
    assert np.array_equal(np.isnan(cube.values[0, 0]), ~holes())


def test_nodata_values_of_a_whole_pixel(tmp_path: Path) -> None:
    """GDAL's NODATA_VALUES: a pixel is invalid where every band has its number."""
    pixels = scene(3)
    pixels[:, ~holes()] = np.array([9, 8, 7], "uint8")[:, np.newaxis]
    path = write(tmp_path / "values.tif", pixels, photometric="RGB")
    with rasterio.open(path, "r+") as to:
        to.update_tags(NODATA_VALUES="9 8 7")
    with rasterio.open(path) as file:
        expected = file.dataset_mask() != 0
    chips = chips_of(photos(path))
    for valid, (xmin, _, _, ymax) in zip(chips["valid"].values[:, 0], chips["bounds"].values, strict=True):
        row, col = int(Y0 - ymax) // 10, int(xmin - X0) // 10
        assert np.array_equal(valid, expected[row : row + 32, col : col + 32])
