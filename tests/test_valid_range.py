"""Numbers beyond a band's valid range are nodata, whatever they are, on every path to pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.enums import Resampling
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform, transform_bounds
from test_alpha import HERE, SIDE, X0, Y0, chips_of, item, write

import rasteret_dask as rd
from rasteret_dask.table.records import Records

BOX = (X0, Y0 - 10 * SIDE, X0 + 10 * SIDE, Y0)


def made_of(path: Path, least: float | None, most: float | None, nodata: float | None) -> rd.Collection:
    """Return a collection of one file whose dataset knows the valid range of its band."""
    fields = {"kind": "continuous", "valid_min": least, "valid_max": most, "nodata": nodata}
    place = path.with_name("catalog.toml")
    rd.register("me/ranged", catalog="catalog.json", bands=[{"code": "image", **fields}], path=place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RASTERET_DASK_CATALOG", str(place))
        return rd.build_from_stac([item(path)], name="ranged", dataset="me/ranged")


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_only_the_range_is_valid(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Pixels, coarser pixels and pixels of another CRS are those of a file whose other numbers are its nodata."""
    dtype = np.dtype(data.draw(st.sampled_from(["int16", "uint8", "uint16", "float32"])))
    seed = data.draw(st.integers(0, 2**16))
    tag = data.draw(st.sampled_from([None, 0]))
    strips: dict[str, Any] = data.draw(
        st.sampled_from([{}, {"tiled": False, "blockxsize": None, "blockysize": None}])
    )
    least, most = sorted(data.draw(st.lists(st.integers(5, 200), min_size=2, max_size=2, unique=True)))
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 255, (SIDE, SIDE)).astype(dtype)
    pixels[:40, :50] = 3  # a hole
    if dtype.kind == "f":
        pixels[rng.random(pixels.shape) < 0.02] = np.nan
    folder = tmp_path_factory.mktemp("range")
    path = write(folder / "a.tif", pixels[np.newaxis], nodata=tag, **strips)
    valid = (pixels >= least) & (pixels <= most)
    plain = write(folder / "plain.tif", np.where(valid, pixels, 0)[np.newaxis], nodata=0)
    made = made_of(path, least, most, None)

    cube = made.harmonize(units="raw").cube(bounds=BOX)
    assert np.array_equal(cube["valid"].isel(time=0).values if "valid" in cube.coords else
                          ~np.isnan(cube.isel(time=0, band=0).values), valid)  # fmt: skip
    assert np.array_equal(cube.isel(time=0, band=0).values[valid], pixels[valid])
    for size, epsg, kernel in ((40, 32633, Resampling.average), (10, 32632, Resampling.bilinear)):
        xmin, _, _, ymax = BOX if epsg == 32633 else transform_bounds(32633, epsg, *BOX)
        grid = Affine(size, 0, xmin // size * size, 0, -size, ymax // size * size)
        n = 10 * SIDE // size
        box = (grid.c, grid.f - n * size, grid.c + n * size, grid.f)
        even = made.harmonize(units="raw", resolution=size, resampling=kernel.name).cube(bounds=box, crs=epsg)
        with rasterio.open(plain) as file, WarpedVRT(
            file, crs=f"EPSG:{epsg}", transform=grid, width=n, height=n, resampling=kernel, tolerance=1e-6,
            XSCALE=10 / size, YSCALE=10 / size,
        ) as warped:  # fmt: skip
            expected = warped.read(1, masked=True)
        values = even.isel(time=0, band=0).values
        seen = even["valid"].isel(time=0).values if "valid" in even.coords else ~np.isnan(values)
        assert np.array_equal(seen, ~expected.mask)
        assert np.abs(values[seen].astype("f8") - expected.compressed().astype("f8")).max(initial=0) <= 1e-6


def test_every_path_keeps_the_range(tmp_path: Path) -> None:
    """Chips and points say of each pixel what the cube says; two fill values of one file are both nodata."""
    pixels = np.random.default_rng(1).integers(0, 900, (SIDE, SIDE)).astype("int16")
    pixels[:30], pixels[30:50] = -28672, -1000
    made = made_of(write(tmp_path / "a.tif", pixels[np.newaxis]), -100, 500, -28672)
    asset = Records(made.to_table()).asset(0, "image")
    assert (asset.nodata, asset.valid_range) == (-28672, (-100, 500))
    valid = (pixels >= -100) & (pixels <= 500)
    chips = chips_of(made)
    for seen, (xmin, _, _, ymax) in zip(chips["valid"].values[:, 0], chips["bounds"].values, strict=True):
        row, col = int(Y0 - ymax) // 10, int(xmin - X0) // 10
        assert np.array_equal(seen, valid[row : row + 32, col : col + 32])
    at = np.random.default_rng(3).integers(0, SIDE, (60, 2))
    xs, ys = transform(32633, 4326, *(HERE @ (at.T[::-1] + 0.5)))
    points = made.sample_points([shapely.Point(x, y) for x, y in zip(xs, ys, strict=True)])
    due = [int(pixels[r, c]) if valid[r, c] else None for r, c in at]
    assert points.column("value").to_pylist() == due


def test_a_range_changes_what_a_shard_is_known_by(tmp_path: Path) -> None:
    """A store that was written with another range is not gone on with."""
    path = write(tmp_path / "a.tif", np.full((1, SIDE, SIDE), 7, "int16"))
    first, other = (made_of(path, least, 500, -1) for least in (0, 1))
    first.chips(32, cell_km=0.32).to_zarr(str(tmp_path / "store"))
    with pytest.raises(rd.StoreError):
        other.chips(32, cell_km=0.32).to_zarr(str(tmp_path / "store"))


def test_a_range_that_holds_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(rd.SourceError, match=r"valid_min and valid_max .* 9 > 1"):
        rd.register(
            "me/x", index="x.parquet", bands=[{"code": "a", "valid_min": 9, "valid_max": 1}],
            path=tmp_path / "catalog.toml",
        )  # fmt: skip


def test_overviews_hold_averages_of_other_fill_values(tmp_path: Path) -> None:
    """On a coarse grid too, a fill value that is not the file's nodata is no measurement: the image itself is read."""
    pixels = np.random.default_rng(5).integers(0, 500, (SIDE, SIDE)).astype("int16")
    pixels[np.random.default_rng(6).random(pixels.shape) < 0.3] = -1000
    path = write(tmp_path / "a.tif", pixels[np.newaxis], nodata=-28672, overviews=(2, 4))
    made = made_of(path, -100, 500, -28672).harmonize(units="raw", dtype=None, resolution=40)
    cube = made.cube(bounds=BOX).isel(time=0, band=0).values.astype("f8")
    cells = np.where(pixels == -1000, np.nan, pixels.astype("f8")).reshape(SIDE // 4, 4, SIDE // 4, 4)
    assert np.abs(cube - np.nanmean(cells, axis=(1, 3))).max() <= 0.5 + 1e-6
    chips = made.chips(8, cell_km=0.32)
    assert chips.explain().facts["kernels"]["ranged"]["image"]["overviews"] is False
    loaded: Any = chips.load()
    for values, bounds in zip(loaded["pixels"].values, loaded["bounds"].values, strict=True):
        own = made.cube(bounds=tuple(bounds.tolist())).isel(time=0, band=0).values
        assert np.array_equal(values[0, 0], own)
