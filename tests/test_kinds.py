"""Classes are never blended: kinds of band, where they come from, and what they decide."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import rasterio
import shapely
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.transform import from_origin
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform_bounds

import rasteret_dask as rd
from rasteret_dask.errors import BandError, PlanError, SchemaError, UnknownKindWarning
from rasteret_dask.planning.bandkinds import BandKind
from rasteret_dask.rules.kinds import KINDS, UNKNOWN, Kind, checked_kinds, kind_of, quality_kind
from rasteret_dask.statistics.sketch import measured
from rasteret_dask.statistics.stats import Stats
from rasteret_dask.table.records import ASSET_TYPE
from rasteret_dask.tasks.batches import SourcePixels
from rasteret_dask.words import Resampling as Kernel

X0, Y0, SIDE = 500_000.0, 5_200_000.0, 96
CODES = (10, 20, 40, 80, 95)
NAMES = {10: "trees", 20: "shrubs", 40: "crops", 80: "water", 95: "mangroves"}
STATED = [{"value": code, "name": name} for code, name in NAMES.items()]


def classes(dtype: str = "uint8", seed: int = 0) -> NDArray[Any]:
    """Return class codes of SIDE x SIDE pixels; 0, where there is no data, in a corner."""
    pixels = np.random.default_rng(seed).choice(np.array(CODES, dtype), (SIDE, SIDE))
    pixels[:16, :16] = 0
    return np.asarray(pixels)


def write(
    path: Path,
    pixels: NDArray[Any],
    *,
    x0: float = X0,
    averaged: bool = False,
    palette: bool = False,
    layer_type: str | None = None,
) -> Path:
    """Write one band of 10 m in UTM 33; ``averaged``: with overviews of averages."""
    profile = {
        "driver": "GTiff", "width": pixels.shape[1], "height": pixels.shape[0], "count": 1, "dtype": pixels.dtype.name,
        "crs": "EPSG:32633", "transform": from_origin(x0, Y0, 10, 10), "nodata": 0, "tiled": True, "blockxsize": 32,
        "blockysize": 32, "compress": "deflate",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as file:
        file.write(pixels, 1)
        if palette:
            file.write_colormap(1, {code: (code, code, code, 255) for code in CODES})
        if layer_type:
            file.update_tags(1, LAYER_TYPE=layer_type)
        if averaged:
            file.build_overviews([2, 4], Resampling.average)
    return path


def item(assets: dict[str, Any], name: str = "a", day: int = 1, **fields: Any) -> dict[str, Any]:
    """Return an item; assets by path, or as dicts."""
    whole = {k: v if isinstance(v, dict) else {"href": str(v)} for k, v in assets.items()}
    for asset in whole.values():
        asset.setdefault("type", "image/tiff")
    with rasterio.open(next(iter(whole.values()))["href"]) as file:
        box = transform_bounds(file.crs, 4326, *file.bounds)
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "bbox": list(box), "links": [],
        "geometry": json.loads(shapely.to_geojson(shapely.box(*box))),
        "properties": {"datetime": f"2024-05-{day:02d}T10:00:00Z"}, "assets": whole, **fields,
    }  # fmt: skip


def stated(path: Path) -> dict[str, Any]:
    """Return an asset whose item names its classes."""
    return {"href": str(path), "classification:classes": STATED}


def kinds_of(collection: rd.Collection) -> dict[str, str | None]:
    (record,) = collection.to_table().column("assets").to_pylist()
    return {band: fields["kind"] for band, fields in record}


def band_table(path: Path, **fields: Any) -> pa.Table:
    """Return a table of one scene with one band ``map``."""
    asset = pa.struct([("href", pa.string()), *((name, pa.string()) for name in fields)])
    with rasterio.open(path) as file:
        box = shapely.box(*transform_bounds(file.crs, 4326, *file.bounds))
    return pa.table(
        {
            "id": ["a"],
            "datetime": pa.array([1_714_550_400_000_000], pa.timestamp("us", "UTC")),
            "geometry": pa.array([box.wkb]),
            "assets": pa.array([[("map", {"href": str(path), **fields})]], pa.map_(pa.string(), asset)),
        }
    )


# --- the values ------------------------------------------------------------------------------------------------------


def test_a_kind_says_all_that_kinds_decide() -> None:
    fields = {f.name: getattr(UNKNOWN, f.name) for f in dataclasses.fields(Kind)}
    for name in fields:
        with pytest.raises(TypeError, match=name):
            Kind(**{k: v for k, v in fields.items() if k != name})
    with pytest.raises(PlanError, match="kernels average and bilinear"):
        dataclasses.replace(UNKNOWN, kernels=frozenset({"nearest"}))


@pytest.mark.parametrize("name", [*KINDS, None])
def test_kernels_of_kinds(name: str | None) -> None:
    kind = kind_of(name)
    for scale in (0.1, 0.98, 1.0, 3.0):
        for wanted in (None, "nearest", "bilinear", "cubic", "average", "mode"):
            kernel = kind.kernel(wanted, scale)
            if kind.kernels is None:
                assert kernel == wanted or wanted is None
            else:
                assert kernel in ("nearest", "mode")
                assert (kernel == "mode") == (wanted == "mode" and name != "angle")
    codes = name in ("class", "bitfield")
    assert codes == (not kind.normalized) == kind.is_coded
    assert (codes or name == "angle") == (not kind.averaged_overviews)
    blends = {"class": "majority", "bitfield": "closest", "angle": "closest"}
    assert kind.blend == blends.get(str(name), "average")
    assert kind.ignored == (name == "class")


def test_kinds_by_name() -> None:
    assert (kind_of(None).name, kind_of("class").name, quality_kind("scl"), quality_kind("QA_PIXEL")) == (
        None, "class", "class", "bitfield",
    )  # fmt: skip
    with pytest.raises(PlanError, match="one of reflectance"):
        kind_of("picture")
    assert checked_kinds({"b": "class", "a": "angle"}, "x") == (("a", "angle"), ("b", "class"))
    for wrong in ({"a": "picture"}, {3: "class"}, ["class"]):
        with pytest.raises(PlanError, match=r"^build\(kinds=\)"):
            checked_kinds(wrong, "build(kinds=)")  # type: ignore[arg-type]


# --- where they come from --------------------------------------------------------------------------------------------

BITS = [{"offset": 0, "length": 1, "classes": [{"value": 1, "name": "fill"}]}]
SAID: dict[str, tuple[dict[str, Any], str | None]] = {
    "nothing": ({}, None),
    "classes": ({"classification:classes": STATED}, "class"),
    "classes of the band, 1.0": ({"raster:bands": [{"classification:classes": STATED}]}, "class"),
    "classes of the band, 1.1": ({"bands": [{"name": "map", "classification:classes": STATED}]}, "class"),
    "bits": ({"classification:bitfields": BITS}, "bitfield"),
    "bits of the band": ({"raster:bands": [{"classification:bitfields": BITS}]}, "bitfield"),
    "values": ({"file:values": [{"values": [10], "summary": "trees"}]}, "class"),
    "only nodata is a class": ({"classification:classes": [{"value": 0, "nodata": True}]}, None),
    "values of a scaled band": (
        {"file:values": [{"values": [0]}], "raster:bands": [{"scale": 0.1}]},
        "continuous",
    ),
    "a common name": ({"eo:bands": [{"name": "map", "common_name": "red"}]}, "continuous"),
    "kelvin": ({"raster:bands": [{"unit": "kelvin"}]}, "temperature"),
    "an angle": ({"roles": ["data", "sun-azimuth"]}, "angle"),
    "a polarization of an 8-bit file": ({"sar:polarizations": ["VV"]}, "amplitude"),
}


@pytest.mark.parametrize("case", SAID)
def test_items_tell(tmp_path: Path, case: str) -> None:
    fields, kind = SAID[case]
    path = write(tmp_path / "a.tif", classes())
    built = rd.build_from_stac([item({"map": {"href": str(path), **fields}})], name="x")
    assert kinds_of(built) == {"map": kind}


@pytest.mark.parametrize("how", ["palette", "layer type", "category names", "attribute table"])
def test_files_tell(tmp_path: Path, how: str) -> None:
    layer_type = "thematic" if how == "layer type" else None
    path = write(tmp_path / "a.tif", classes(), palette=how == "palette", layer_type=layer_type)
    beside = {
        "category names": "<CategoryNames><Category/><Category>trees</Category></CategoryNames>",
        "attribute table": '<GDALRasterAttributeTable tableType="thematic"/>',
    }.get(how)
    if beside:
        path.with_name("a.tif.aux.xml").write_text(
            f'<PAMDataset><PAMRasterBand band="1">{beside}</PAMRasterBand></PAMDataset>'
        )
    built = rd.build_from_stac([item({"map": path})], name="x")
    assert kinds_of(built) == {"map": "class"}
    (record,) = built.to_table().column("assets").to_pylist()
    named = [{"value": 1, "name": "trees"}] if how == "category names" else None
    assert record[0][1]["classes"] == named


def test_a_sidecar_that_says_nothing_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", classes())
    for text in (
        "no xml",
        "<PAMDataset/>",
        '<PAMDataset><PAMRasterBand band="x"/></PAMDataset>',
        "<!DOCTYPE a>",
    ):
        path.with_name("a.tif.aux.xml").write_text(text)
        assert kinds_of(rd.build_from_stac([item({"map": path})], name="x")) == {"map": None}


def test_who_is_trusted_more(tmp_path: Path) -> None:
    """User, catalog, item, table, file: each in its turn."""
    path = write(tmp_path / "a.tif", classes(), palette=True)
    bits = {"href": str(path), "classification:bitfields": BITS}
    assert kinds_of(rd.build_from_stac([item({"map": path})], name="x")) == {"map": "class"}  # the file
    assert kinds_of(rd.build_from_table(band_table(path, kind="angle"), name="x")) == {"map": "angle"}
    assert kinds_of(rd.build_from_stac([item({"map": bits})], name="x")) == {"map": "bitfield"}
    of_catalog = rd.build_from_stac([item({"map": bits})], name="x", dataset="esa-worldcover")
    assert kinds_of(of_catalog) == {"MAP": "class"}
    by_user = rd.build_from_stac(
        [item({"map": bits})], name="x", dataset="esa-worldcover", kinds={"map": "continuous"}
    )
    assert kinds_of(by_user) == {"MAP": "continuous"}
    told = rd.build_from_table(band_table(path, kind="angle"), name="x", kinds={"map": "class"})
    assert kinds_of(told) == {"map": "class"}


@pytest.mark.parametrize(
    ("band", "role", "kind", "left"),
    [
        ("map", "class", "class", "data"),
        ("scl", "quality", "class", "quality"),
        ("qa", "quality", "bitfield", "quality"),
        ("red", "reflectance", "reflectance", "data"),
        ("x", "data", None, "data"),
        ("x", None, None, None),
    ],
)
def test_tables_with_older_roles_load(
    tmp_path: Path, band: str, role: str | None, kind: str | None, left: str
) -> None:
    path = write(tmp_path / "a.tif", classes())
    table = rd.build_from_stac([item({band: path})], name="x").to_table()
    older = [f for f in ASSET_TYPE if f.name not in ("kind", "classes")]
    (record,) = table.column("assets").to_pylist()
    assets = [[(band, {f.name: record[0][1][f.name] for f in older} | {"role": role})]]
    at = table.schema.get_field_index("assets")
    table = table.set_column(at, "assets", pa.array(assets, pa.map_(pa.string(), pa.struct(older))))
    place = tmp_path / "old.parquet"
    pa.parquet.write_table(table, place)
    path.unlink()  # its header is in the table
    (record,) = rd.load(place).to_table().column("assets").to_pylist()
    assert (record[0][1]["kind"], record[0][1]["role"], record[0][1]["error"]) == (kind, left, None)


def test_mistakes_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", classes())
    items = [item({"map": path})]
    with pytest.raises(BandError, match="no item with such a band"):
        rd.build_from_stac(items, name="x", kinds={"mpa": "class"})
    with pytest.raises(BandError, match=r"build_from_table\(kinds=\) of band 'mpa'"):
        rd.build_from_table(band_table(path), name="x", kinds={"mpa": "class"})
    with pytest.raises(BandError, match=r"harmonize\(kinds=\) of band 'mpa'.*one of map"):
        rd.build_from_stac(items, name="x").harmonize(kinds={"mpa": "class"}).cube()
    with pytest.raises(PlanError, match="one of reflectance"):
        rd.build_from_stac(items, name="x").harmonize(kinds={"map": "picture"})  # type: ignore[dict-item]
    with pytest.raises(SchemaError, match=r"kind of asset 'map'.*'picture'"):
        rd.build_from_table(band_table(path, kind="picture"), name="x")


def test_records_of_one_band_are_of_one_kind(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", classes())
    silent, other = (
        item({"map": path}, "b", 2),
        item({"map": {"href": str(path), "raster:bands": [{"unit": "m"}]}}, "c", 3),
    )
    named = item({"map": stated(path)})
    mixed = rd.build_from_stac([named, other], name="x")
    with pytest.raises(PlanError, match="records of kinds class and continuous") as told:
        mixed.cube()
    assert "harmonize(kinds={'map': 'class'})" in told.value.remedy
    mixed.harmonize(kinds={"map": "class"}).cube()
    lone = rd.build_from_stac([silent, named], name="x").cube(resolution=20)  # nobody is warned
    assert set(np.unique(lone)) <= {0, *CODES}


# --- pixels ----------------------------------------------------------------------------------------------------------

GRIDS: dict[str, tuple[int, float, float]] = {  # EPSG, pixel size, shift of the corner
    "aligned": (32633, 10, 0),
    "coarser": (32633, 40, 0),
    "coarser, shifted": (32633, 30, 7),
    "finer": (32633, 4, 0),
    "shifted": (32633, 10, 3),
    "warped": (32632, 25, 0),
}


def oracle(path: Path, kernel: str, grid: tuple[int, float, float], shape: tuple[int, int]) -> NDArray[Any]:
    """Return the image itself, warped by GDAL."""
    epsg, size, _ = grid
    x0, y0 = corner(grid)
    with (
        rasterio.open(path, overview_level="NONE") as file,
        WarpedVRT(
            file, crs=f"EPSG:{epsg}", transform=from_origin(x0, y0, size, size), width=shape[1], height=shape[0],
            resampling=Resampling[kernel], tolerance=1e-6, XSCALE=None, YSCALE=None,
        ) as warped,
    ):  # fmt: skip
        return np.asarray(warped.read(1))


def corner(grid: tuple[int, float, float]) -> tuple[float, float]:
    epsg, size, shift = grid
    if epsg == 32633:
        return X0 + shift, Y0 - shift
    west, _, _, north = transform_bounds("EPSG:32633", f"EPSG:{epsg}", X0, Y0 - SIDE * 10, X0 + SIDE * 10, Y0)
    return size * np.floor(west / size), size * np.ceil(north / size)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["class", "bitfield"]),
    dtype=st.sampled_from(["uint8", "int16", "uint16", "int32", "float32"]),
    kernel=st.sampled_from([None, "nearest", "mode"]),
    grid=st.sampled_from(list(GRIDS)),
    averaged=st.booleans(),
    seed=st.integers(0, 3),
)
def test_codes_are_those_of_the_file(
    tmp_path: Path, kind: Any, dtype: str, kernel: Kernel | None, grid: str, averaged: bool, seed: int
) -> None:
    path = tmp_path / f"{dtype}-{averaged}-{seed}.tif"
    if not path.exists():
        write(path, classes(dtype, seed), averaged=averaged)
    source = rd.build_from_stac([item({"map": path})], name="x", kinds={"map": kind})
    epsg, size, _ = GRIDS[grid]
    (x0, y0), side = corner(GRIDS[grid]), int(SIDE * 10 / size) - 2
    bounds = (x0, y0 - side * size, x0 + side * size, y0)
    cube = source.harmonize(resampling=kernel, resolution=size).cube(bounds=bounds, crs=epsg)
    values = cube.values[0, 0]
    wanted = oracle(path, kernel or "nearest", GRIDS[grid], (side, side))
    assert set(np.unique(values[np.isfinite(values)])) <= {0, *CODES}
    if grid != "warped" or kernel != "mode":  # a mode's tie is GDAL's to settle: it depends on the window
        np.testing.assert_array_equal(np.nan_to_num(values.astype(float)), wanted.astype(float))
    elif wanted.any():
        assert np.mean(np.nan_to_num(values) == wanted) > 0.95


def test_a_kernel_for_all_bands_leaves_classes_and_is_told(tmp_path: Path) -> None:
    """red is averaged, its classes are not; explain() says so. A source of classes alone refuses the kernel."""
    codes = classes()
    path = write(tmp_path / "m.tif", codes, averaged=True)
    red = write(
        tmp_path / "r.tif", (np.arange(SIDE * SIDE, dtype="uint16") + 1).reshape(SIDE, SIDE), averaged=True
    )
    asset = {"href": str(red), "eo:bands": [{"name": "red", "common_name": "red"}]}
    both = rd.build_from_stac([item({"red": asset, "map": stated(path)})], name="x")
    coarse = both.harmonize(["red", "map"], resolution=20, resampling="average", units="raw")
    cube = coarse.cube().values[0]
    assert set(np.unique(cube[1])) <= {0, *CODES}
    assert not set(np.unique(cube[0][cube[0] > 0])) <= set(np.arange(1, SIDE * SIDE, 1)[::7])
    facts = coarse.chips(16, cell_km=0.32).explain().facts
    assert facts["kernels"]["x"] == {
        "red": {"kernels": ["average"], "overviews": True},
        "map": {"kernels": ["nearest"], "overviews": False},
    }
    assert facts["kinds"]["x"] == ["continuous", "class"]
    text = str(coarse.chips(16, cell_km=0.32).explain())
    assert "class map: nearest, overviews not used" in text
    assert "continuous red: average, overviews used" in text
    with pytest.raises(PlanError, match="bands of kind class") as told:
        both.harmonize(["map"], resolution=20, resampling="average").cube()
    assert "harmonize(kinds=" in told.value.remedy
    measured_map = both.harmonize(["map"], resolution=20, resampling="average", kinds={"map": "continuous"})
    assert not set(np.unique(measured_map.cube())) <= {0, *CODES}


@pytest.mark.parametrize(
    ("resolution", "pick"), [(20, None), (5, None), (10, "median"), (10, "mean"), (40, None)]
)
def test_azimuths_are_never_averaged(tmp_path: Path, resolution: int, pick: Any) -> None:
    """Between 359.9 and 0.1 degrees lies 0, and the mean of the numbers is south."""
    drawn = np.random.default_rng(0).choice(np.array([10, 35990], "uint16"), (2, SIDE, SIDE))
    items = []
    for day, pixels in enumerate(drawn):
        href = str(write(tmp_path / f"{day}.tif", pixels, averaged=True))
        asset = {"href": href, "roles": ["azimuth"], "raster:bands": [{"scale": 0.01, "nodata": 0}]}
        items.append(item({"vaa": asset}, f"s{day}", day + 14))
    source = rd.build_from_stac(items, name="x")
    assert kinds_of(rd.build_from_stac(items[:1], name="x")) == {"vaa": "angle"}
    source = source.harmonize(resolution=resolution, time="1MS", pick=pick)
    chips = source.chips(16, cell_km=16 * resolution / 1000, min_coverage=0.1)
    assert resolution == 10 or "nearest" in str(chips.explain())
    here = chips.load()
    assert isinstance(here, xr.Dataset)
    for values in (here["pixels"].values, source.cube().values):
        assert set(np.unique(values[~np.isnan(values)])) == {np.float32(0.1), np.float32(359.9)}
    with pytest.raises(PlanError, match="angle, whose numbers must not be averaged"):
        source.harmonize(resampling="average").cube()
    zenith = source.harmonize(resampling="average", kinds={"vaa": "continuous"})
    assert float(zenith.cube().mean()) > 0  # the remedy


def test_integers_of_unknown_kind_are_told(tmp_path: Path) -> None:
    source = rd.build_from_stac([item({"map": write(tmp_path / "a.tif", classes())})], name="x")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.cube()  # its own pixels
        source.harmonize(resolution=20, resampling="average").cube()  # named by the user
        source.harmonize(resolution=20, kinds={"map": "continuous"}).cube()
        source.harmonize(resolution=20, kinds={"map": "class"}).chips(16, cell_km=0.32).explain()
    with pytest.warns(
        UnknownKindWarning, match=r"band 'map' of 'x' \(uint8, of unknown kind\).*average.*kinds="
    ) as said:
        source.cube(resolution=20)
    assert said[0].filename == __file__
    with pytest.warns(UnknownKindWarning, match="bilinear"):
        assert source.harmonize(resolution=5).chips(16, cell_km=0.32).job
    both = {key: write(tmp_path / f"{key}.tif", classes()) for key in ("first", "second")}
    several = rd.build_from_stac([item(both)], name="y")
    with pytest.warns(UnknownKindWarning, match="bands 'first', 'second' of 'y'") as said:
        several.cube(resolution=20)
    assert len(said) == 1
    floats = rd.build_from_stac([item({"map": write(tmp_path / "f.tif", classes("float32"))})], name="x")
    floats.cube(resolution=20)


# --- statistics, batches, stores -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> rd.Chips:
    """Chips of red and classes on the same ground."""
    folder = tmp_path_factory.mktemp("joined")
    pixels = (np.arange(SIDE * SIDE, dtype="uint16") + 1).reshape(SIDE, SIDE)
    red = {"href": str(write(folder / "r.tif", pixels)), "eo:bands": [{"name": "red", "common_name": "red"}]}
    optical = rd.build_from_stac([item({"red": red})], name="optical")
    lc = rd.build_from_stac([item({"map": stated(write(folder / "m.tif", classes()))})], name="lc")
    return rd.join(optical=optical.harmonize(units="raw"), lc=lc).chips(16, cell_km=0.32)


def lone(found: xr.Dataset | xr.DataTree, name: str) -> xr.Dataset:
    assert isinstance(found, xr.DataTree)
    return found[name].to_dataset()


def test_statistics_of_classes_are_counts(joined: rd.Chips, tmp_path: Path) -> None:
    stats = joined.stats()
    lc = lone(joined.load(), "lc")
    values, counts = np.unique(lc["pixels"].values[:, 0][lc["valid"].values], return_counts=True)
    expected = dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert stats["lc"].classes == {"map": expected}
    assert stats["lc"].names == {"map": NAMES}
    assert sum(stats["lc"].shares["map"].values()) == pytest.approx(1)
    for numbers in (stats["lc"].mean, stats["lc"].std, stats["lc"].percentile(50)):
        assert np.isnan(numbers).all()
    assert np.isfinite(stats["optical"].mean).all()
    rows = stats.class_table.to_pylist()
    assert [(r["source"], r["value"], r["name"], r["count"]) for r in rows] == [
        ("lc", value, NAMES[value], count) for value, count in expected.items()
    ]
    assert "mangroves" in repr(stats)
    stats.save(tmp_path / "s.json")
    again = Stats.load(tmp_path / "s.json")
    assert again.class_table == stats.class_table
    assert again["lc"].kinds == stats["lc"].kinds == (BandKind("class", tuple(NAMES.items())),)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int64", "float32"])
def test_codes_of_any_type_are_counted_one_by_one(dtype: str) -> None:
    """Also beside measured bands, where they are floats, and however many there are."""
    most = 255 if dtype == "uint8" else 5000
    codes = np.random.default_rng(0).integers(0, most, (2, 1, 1, 64, 64)).astype(dtype)
    seen = np.ones((2, 1, 64, 64), dtype=bool)
    own = measured(codes, seen, ("map",), kinds=(BandKind("class"),))
    values, counts = np.unique(codes, return_counts=True)
    assert own.classes == {"map": dict(zip(values.astype(int).tolist(), counts.tolist(), strict=True))}


def test_normalizing_leaves_classes(joined: rd.Chips) -> None:
    plain, scaled = next(joined.stream(100)), next(joined.stream(100, normalize=True))
    np.testing.assert_array_equal(plain["lc"], scaled["lc"])
    assert scaled["lc"].dtype == np.uint8
    assert abs(float(scaled["optical"][scaled["optical/valid"][:, :, None]].mean())) < 1e-5


def test_classes_beside_measured_bands_keep_their_numbers() -> None:
    """One array, two bands: only the measured one is normalized."""
    pixels = np.stack([np.arange(64.0).reshape(8, 8), np.full((8, 8), 40.0)])[None, None].astype("float32")
    seen = np.ones((1, 1, 8, 8), dtype=bool)
    seen[0, 0, 0, 0] = False
    own = measured(pixels, seen, ("red", "map"), kinds=(BandKind("continuous"), BandKind("class")))
    made = Stats({"a": own}, 1).normalize({"a": pixels, "a/valid": seen}, nan=-1)["a"][0, 0]
    assert made[:, 0, 0].tolist() == [-1, -1]
    assert set(made[1].ravel()[1:]) == {40.0}
    assert made[0].ravel()[1:].mean() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("code", [2**24, 2**24 + 1, 2**40])
def test_codes_that_float32_would_change_are_not_normalized_beside_measured_bands(code: int) -> None:
    kinds, seen = (BandKind("continuous"), BandKind("class")), np.ones((1, 1, 8, 8), dtype=bool)
    pixels = np.stack([np.arange(64).reshape(8, 8), np.full((8, 8), -code)])[None, None]
    stats = Stats({"a": measured(pixels, seen, ("red", "map"), kinds=kinds)}, 1)
    if code == 2**24:
        made = stats.normalize({"a": pixels, "a/valid": seen})["a"][0, 0, 1]
        assert set(made.astype(int).ravel().tolist()) == {-code}
        return
    with pytest.raises(PlanError, match=rf"'map' of codes up to {code}.*rd\.join"):
        stats.normalize({"a": pixels, "a/valid": seen})
    with pytest.raises(PlanError, match=rf"'map' of codes up to {code}.*rd\.join"):
        stats.check({"a": SourcePixels(("red", "map"), "int64")})
    alone = Stats({"a": measured(pixels[:, :, 1:], seen, ("map",), kinds=kinds[1:])}, 1)  # the remedy
    assert np.array_equal(alone.normalize({"a": pixels[:, :, 1:], "a/valid": seen})["a"], pixels[:, :, 1:])


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_big_codes_stay_what_they_are_in_statistics_and_batches(tmp_path: Path, dtype: str) -> None:
    """Codes that floats do not tell apart, beside the number that a loss ignores."""
    codes = 2**60 + np.random.default_rng(0).integers(0, 4, (SIDE, SIDE)).astype(dtype)
    codes[codes == 2**60] = 0
    stac = item({"map": write(tmp_path / "m.tif", codes)})
    chips = rd.build_from_stac([stac], name="lc").harmonize(kinds={"map": "class"}).chips(16, cell_km=0.16)
    here = chips.load()
    assert isinstance(here, xr.Dataset)
    seen, pixels = here["valid"].values[:, :, None], here["pixels"].values
    wanted = Counter(pixels[seen].tolist())
    stats = chips.stats()
    assert stats["lc"].classes == {"map": dict(wanted)}
    assert all(str(2**60 + n) in str(stats) for n in (1, 2, 3))
    index = -100
    if dtype == "uint64":
        with pytest.raises(PlanError, match=rf"classes of uint64.*Choose one that no class has: {2**64 - 1}"):
            chips.stream(4, ignore_index=index)
        index = 2**64 - 1
    batch = next(chips.stream(len(pixels), ignore_index=index))["lc"]
    assert batch.dtype == dtype
    known = np.broadcast_to(seen, pixels.shape)
    assert batch[known].tolist() == pixels[known].tolist()
    assert set(batch[~known].tolist()) == {index}


def test_a_source_called_mask_holds_classes(tmp_path: Path) -> None:
    """TorchGeo's name of what a model learns: whole numbers of unknown kind there are no measurements."""
    path = write(tmp_path / "m.tif", classes())
    source = rd.build_from_stac([item({"map": path})], name="x")
    optical = rd.build_from_stac([item({"map": path})], name="y").harmonize(kinds={"map": "continuous"})
    chips = rd.join(optical=optical, mask=source.harmonize(resolution=20)).chips(16, cell_km=0.32)
    batch = next(chips.stream(100, normalize=True))
    assert batch["mask"].dtype == np.uint8
    assert set(np.unique(batch["mask"])) <= {0, *CODES}


@pytest.mark.parametrize(("index", "dtype"), [(255, "uint8"), (-100, "int16"), (-1, "int16")])
def test_invalid_pixels_of_classes_become_the_ignored_number(
    joined: rd.Chips, index: int, dtype: str
) -> None:
    plain, ignoring = next(joined.stream(100)), next(joined.stream(100, ignore_index=index, normalize=True))
    seen = plain["lc/valid"][:, :, None]
    assert not seen.all()
    assert ignoring["lc"].dtype == dtype
    np.testing.assert_array_equal(ignoring["lc"], np.where(seen, plain["lc"].astype(int), index))
    assert index not in np.unique(ignoring["optical"])


def test_a_saved_plan_and_a_store_ignore_as_the_chips_do(joined: rd.Chips, tmp_path: Path) -> None:
    wanted = next(joined.stream(100, ignore_index=-100))
    joined.save_plan(tmp_path / "plan")
    joined.to_zarr(tmp_path / "store", progress=False)
    for place in ("plan", "store"):
        batch = next(rd.stream_from(None, tmp_path / place, 100, ignore_index=-100))
        np.testing.assert_array_equal(batch["lc"], wanted["lc"])
        assert -100 in batch["lc"]


def test_only_classes_can_be_ignored(joined: rd.Chips) -> None:
    with pytest.raises(PlanError, match="a whole number"):
        joined.stream(4, ignore_index=0.5)  # type: ignore[arg-type]


def test_stores_know_kinds_and_names(joined: rd.Chips, tmp_path: Path) -> None:
    place = tmp_path / "store"
    joined.to_zarr(place, progress=False)
    chips = rd.open_chips(place)
    for found in (joined.load(), joined.to_xarray(), chips.load(), chips.to_xarray()):
        node = lone(found, "lc")
        assert node["band_kind"].dims == ("band",)
        assert node["band_kind"].values.tolist() == ["class"]
        assert node.attrs["classification:classes"] == {"map": STATED}
        assert lone(found, "optical")["band_kind"].values.tolist() == ["continuous"]
        assert "classification:classes" not in lone(found, "optical").attrs
    with xr.open_zarr(place, group="lc", consolidated=False) as plain:
        assert plain["band_kind"].values.tolist() == ["class"]
    assert chips.stats().class_table == joined.stats().class_table
    batch = next(chips.stream(100, ignore_index=-100, normalize=True))
    assert set(np.unique(batch["lc"])) == {-100, *CODES}


def test_a_function_that_renumbers_classes_leaves_them_classes(joined: rd.Chips) -> None:
    def halved(pixels: xr.DataArray) -> xr.DataArray:
        return pixels // 10

    def share(pixels: xr.DataArray) -> xr.DataArray:
        return (pixels / 100.0).astype("float32")

    for function, kind in ((halved, "class"), (share, "unknown")):
        node = lone(joined.map(function, source="lc", version=kind).to_xarray(), "lc")
        assert node["band_kind"].values.tolist() == [kind]


# --- real files ------------------------------------------------------------------------------------------------------


def test_cropland_at_60_m_has_no_invented_crops(data: Path) -> None:
    """USDA CDL: 30 m, 133 classes; only the colour table of the file tells here."""
    path = data / "more_sensors" / "usda_cdl" / "2021_30m_cdls_-106095_1807575_15000.tif"
    if not path.exists():
        pytest.skip("no such file in the real data")
    source = rd.build_from_stac([item({"cropland": path})], name="cdl")
    with rasterio.open(path) as file:
        crops = set(np.unique(file.read(1)))
    for kernel in (None, "mode"):
        found = set(np.unique(source.harmonize(resolution=60, resampling=kernel).cube().values))
        assert found <= crops | {0}
