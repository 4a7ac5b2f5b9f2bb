"""What is wrong with the input is told early, by a typed error that names it and says what to do."""

from __future__ import annotations

import datetime as dt
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import rasterio
import shapely
import xarray as xr
from distributed import Client

import rasteret_dask as rd

CELL_KM = 0.96
SIDE_M = 3840
WEST, NORTH = 499200.0, 5184000.0
ASSET = pa.struct([("href", pa.string()), ("band_index", pa.int32())])


@contextmanager
def refused(kind: type[rd.RasteretDaskError], *words: str) -> Iterator[None]:
    """Expect an error of exactly this type, with these words, whole fields, and whole after a pickle."""
    with pytest.raises(rd.RasteretDaskError) as caught:
        yield
    error = caught.value
    assert type(error) is kind, repr(error)
    for word in words:
        assert word in str(error), f"{word!r} not in: {error}"
    assert error.subject
    assert error.found
    assert error.expected or error.remedy, f"says neither what was expected nor what to do: {error}"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.args == error.args


def write(path: Path, pixel: float, fill: int | None = None, epsg: int = 32633, dtype: str = "uint16") -> str:
    """Write a tiled GeoTIFF of ``SIDE_M`` a side whose values come from its own place."""
    n = round(SIDE_M / pixel)
    rows, cols = np.mgrid[:n, :n]
    values = (1000 + rows * 7 % 97 + cols * 5 % 89) if fill is None else np.full((n, n), fill)
    with rasterio.open(
        path, "w", driver="GTiff", width=n, height=n, count=1, dtype=dtype, crs=f"EPSG:{epsg}", nodata=0,
        transform=rasterio.Affine(pixel, 0, WEST, 0, -pixel, NORTH),
        tiled=True, blockxsize=64, blockysize=64, compress="deflate",
    ) as file:  # fmt: skip
        file.write(values.astype(dtype), 1)
    return str(path)


def table_of(records: dict[str, tuple[str, dict[str, str]]], **columns: Any) -> pa.Table:
    """Return a table of {id: (datetime, {band: href})}."""
    whens = [dt.datetime.fromisoformat(when).replace(tzinfo=dt.UTC) for when, _ in records.values()]
    assets = [
        [(band, {"href": href, "band_index": 0}) for band, href in bands.items()]
        for _, bands in records.values()
    ]
    return pa.table(
        {
            "id": list(records),
            "datetime": pa.array(whens, pa.timestamp("us", "UTC")),
            "geometry": pa.nulls(len(records), pa.binary()),
            "assets": pa.array(assets, pa.map_(pa.string(), ASSET)),
            **columns,
        }
    )


class World:
    """Two sensors and a yearly product over one place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.s2_table = table_of(
            {
                f"s2-{day}": (f"2024-04-{day}T10:00:00", self._files(f"s2-{day}", 10, "B04", "B08", "SCL"))
                for day in ("02", "12")
            },
            **{
                "platform": ["sentinel-2a"] * 2,
                "s2:processing_baseline": ["02.14"] * 2,
                "eo:cloud_cover": [10.0, 60.0],
            },
        )
        self.l8_table = table_of(
            {"l8-05": ("2024-04-05T17:00:00", self._files("l8-05", 30, "B4", "B5"))},
            platform=["landsat-8"],
        )
        year = pa.array([dt.datetime(2024, 1, 1, tzinfo=dt.UTC)], pa.timestamp("us", "UTC"))
        after = pa.array([dt.datetime(2025, 1, 1, tzinfo=dt.UTC)], pa.timestamp("us", "UTC"))
        self.year_table = table_of(
            {"y-2024": ("2024-01-01T00:00:00", self._files("y-2024", 10, "data"))},
            start_datetime=year,
            end_datetime=after,
        )
        self.s2 = rd.build_from_table(self.s2_table, name="s2", dataset="sentinel-2-l2a")
        self.l8 = rd.build_from_table(self.l8_table, name="l8", dataset="landsat-c2-l2")
        self.year = rd.build_from_table(self.year_table, name="year")

    def _files(self, name: str, pixel: float, *bands: str) -> dict[str, str]:
        fill = {"SCL": 4}
        return {b: write(self.folder / f"{name}_{b}.tif", pixel, fill.get(b)) for b in bands}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on any opening of a file for its pixels: errors of a plan come before it."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("pixels were read")

    monkeypatch.setattr("rasteret_dask.reader.rasterfile.RasterFile.open", never)


def chips_of(world: World, size: int = 32, **options: Any) -> rd.Chips:
    return world.s2.harmonize(bands=["red", "nir"]).chips(size, **{"cell_km": CELL_KM, **options})


def laid(source: rd.Collection, size: int = 32) -> int:
    """Plan chips of any source: what cannot be known while the plan is written is told here."""
    return len(source.chips(size, cell_km=CELL_KM))


def doubled(pixels: xr.DataArray) -> xr.DataArray:
    return pixels * 2


def frame(crs: int | None, *index: int) -> Any:
    points = [shapely.Point(15, 46.8)] * max(len(index), 1)
    return geopandas.GeoDataFrame(
        {"label": ["a"] * len(points)}, geometry=points, crs=crs, index=index or [0]
    )


def test_the_world_is_right_where_nothing_is_wrong(world: World) -> None:
    assert len(chips_of(world)) > 200
    assert laid(rd.merge(world.s2, world.l8).harmonize(bands=["red"]), 96) > 10


# --- tables and items ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["id", "datetime", "geometry", "assets"])
def test_missing_column(world: World, column: str) -> None:
    table = world.s2_table.drop_columns([column])
    with refused(rd.SchemaError, "'s2'", f"no column {column}", "column_map"):
        rd.build_from_table(table, name="s2")
    with refused(rd.SchemaError, "'s2'", f"no column {column}", "build_from_table"):
        rd.as_collection(table, name="s2")


TABLES: dict[str, tuple[Callable[[World], Any], type[rd.RasteretDaskError], tuple[str, ...]]] = {
    "column_map": (
        lambda w: rd.build_from_table(w.s2_table, name="s2", column_map={"scene": "id"}),
        rd.SchemaError, ("'s2'", "no column scene"),
    ),
    "assets that are text": (
        lambda w: rd.build_from_table(
            w.s2_table.set_column(3, "assets", pa.array(["a.tif", "b.tif"])), name="s2"
        ),
        rd.SchemaError, ("'assets'", "'s2'", "type string", "href"),
    ),
    "an id twice": (
        lambda w: rd.build_from_table(pa.concat_tables([w.s2_table] * 2), name="s2"),
        rd.SchemaError, ("'s2-02'", "2 times", "unique"),
    ),
    "no table at all": (lambda w: rd.build_from_table(7, name="s2"), rd.SchemaError, ("'s2'", "int")),
    "no such file": (
        lambda w: rd.build_from_table(str(w.folder / "none.parquet"), name="s2"),
        rd.SourceError, ("none.parquet", "nothing there"),
    ),
    "a file of something else": (
        lambda w: rd.load(w.folder / "s2-02_B04.tif"), rd.SourceError, ("s2-02_B04.tif", "Parquet"),
    ),
    "unknown dataset": (
        lambda w: rd.build_from_table(w.s2_table, name="s2", dataset="sentinel-9"),
        rd.SourceError, ("'sentinel-9'", "sentinel-2-l2a"),
    ),
    "no items": (lambda w: rd.build_from_stac([], name="x"), rd.EmptyError, ("'x'", "none of 0")),
    "no source": (lambda w: rd.build_from_stac(name="x"), rd.SourceError, ("'x'", "stac_api")),
    "column of records": (
        lambda w: w.s2.to_table(["id", "orbits"]), rd.SchemaError, ("no column orbits", "'s2'", "orbit"),
    ),
}  # fmt: skip


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("case", TABLES)
def test_tables_and_items(world: World, case: str) -> None:
    attempt, kind, words = TABLES[case]
    with refused(kind, *words):
        attempt(world)


@pytest.mark.parametrize(
    ("href", "word"),
    [
        ("vrt://scene.tif?bands=1", "vrt:"),
        ("/vsicurl/http://example.com/scene.tif", "/vsicurl"),
        ("<VRTDataset/>", "<VRTDataset/>"),
        ("http://169.254.169.254/scene.tif", "link-local"),
        ("http://metadata.google.internal/scene.tif", "metadata"),
        ("ftp://example.com/scene.tif", "ftp"),
    ],
)
def test_untrusted_href(href: str, word: str) -> None:
    with refused(rd.TrustError, "'scene'", "'B04'", word):
        rd.build_from_table(table_of({"scene": ("2024-04-02T10:00:00", {"B04": href})}), name="x")


def test_credentials_in_an_untrusted_href_stay_secret() -> None:
    href = "ftp://user:hunter2@example.com/scene.tif?sig=hunter3"
    with pytest.raises(rd.TrustError) as caught:
        rd.build_from_table(table_of({"scene": ("2024-04-02T10:00:00", {"B04": href})}), name="x")
    assert "hunter" not in repr(caught.value)


# --- steps: told as soon as they are written -----------------------------------------------------------------

NO_GROUP: Any = {"a/b": 0.5}

STEPS: dict[str, tuple[Callable[[World], Any], type[rd.RasteretDaskError], tuple[str, ...]]] = {
    # areas and dates
    "bbox of three": (lambda w: w.s2.subset(bbox=(1, 2, 3)), rd.PlanError, ("bbox", "(1, 2, 3)", "west")),
    "bbox turned round": (
        lambda w: w.s2.subset(bbox=(15, 47, 16, 46)), rd.PlanError, ("(15, 47, 16, 46)", "south < north"),
    ),
    "bbox in metres": (
        lambda w: w.s2.subset(bbox=(5e5, 5e6, 6e5, 6e6)), rd.PlanError, ("500000.0", "degrees"),
    ),
    "bbox with NaN": (
        lambda w: w.s2.subset(bbox=(float("nan"), 46, 16, 47)), rd.PlanError, ("nan", "degrees"),
    ),
    "bbox of words": (lambda w: w.s2.subset(bbox="west"), rd.PlanError, ("'west'",)),  # type: ignore[arg-type]
    "area in metres": (
        lambda w: chips_of(w, aoi=shapely.box(5e5, 5e6, 6e5, 6e6)), rd.PlanError, ("500000", "EPSG:4326"),
    ),
    "area of words": (lambda w: chips_of(w, aoi="Carinthia"), rd.PlanError, ("'Carinthia'", "GeoJSON")),
    "area of no such type": (
        lambda w: chips_of(w, aoi={"type": "Polygom", "coordinates": []}), rd.PlanError, ("Polygom",),
    ),
    "area of bad WKB": (lambda w: chips_of(w, aoi=b"no WKB"), rd.PlanError, ("no WKB",)),
    "area of a plain dict": (lambda w: chips_of(w, aoi={"north": 1}), rd.PlanError, ("north",)),
    "area without CRS": (lambda w: chips_of(w, aoi=frame(None)), rd.PlanError, ("no CRS", "set_crs")),
    "points without CRS": (lambda w: chips_of(w, at=frame(None)), rd.PlanError, ("no CRS", "set_crs")),
    "points of one index": (
        lambda w: chips_of(w, at=frame(4326, 7, 7)), rd.PlanError, ("twice", "reset_index"),
    ),
    "source with a taken name": (
        lambda w: rd.join(bbox=w.s2), rd.PlanError, ("called 'bbox'", "chip_id"),
    ),
    "source that is a path": (
        lambda w: rd.join(**{"a/b": w.s2}), rd.PlanError, ("called 'a/b'", "without /"),  # type: ignore[arg-type]
    ),
    "no points": (lambda w: chips_of(w, at=[]), rd.PlanError, ("chips(at=)",)),
    "points without geometry": (
        lambda w: chips_of(w, at=pa.table({"x": [1]})), rd.PlanError, ("chips(at=)", "geometry"),
    ),
    "date that is none": (
        lambda w: w.s2.subset(date_range="yesterday"), rd.PlanError, ("'yesterday'", "ISO 8601"),
    ),
    "month 13": (
        lambda w: w.s2.subset(date_range=("2024-13-01", "2024-14-01")), rd.PlanError, ("'2024-13-01'",),
    ),
    "dates reversed": (
        lambda w: w.s2.subset(date_range=("2024-05-01", "2024-04-01")),
        rd.PlanError, ("2024-05-01 to 2024-04-01", "Swap"),
    ),
    "dates reversed in build": (
        lambda w: rd.build_from_stac([], name="x", date_range=("2024-05-01", "2024-04-01")),
        rd.PlanError, ("2024-05-01 to 2024-04-01", "Swap"),
    ),
    "one date in a tuple": (
        lambda w: w.s2.subset(date_range=("2024-05-01",)), rd.PlanError, ("'2024-05-01'", "(start, end)"),
    ),
    "a number for a date": (
        lambda w: w.s2.subset(date_range=2024), rd.PlanError, ("2024", "(start, end)"),  # type: ignore[arg-type]
    ),
    "cloud of 101 %": (lambda w: w.s2.subset(cloud_cover_lt=101), rd.PlanError, ("101", "percent")),
    "cloud of words": (
        lambda w: w.s2.subset(cloud_cover_lt="few"), rd.PlanError, ("'few'", "percent"),  # type: ignore[arg-type]
    ),
    # predicates
    "where with pyarrow": (
        lambda w: w.s2.where(pc.field("eo:cloud_cover") < 20),
        rd.PlanError, ("eo:cloud_cover", "triple", '("eo:cloud_cover", "<", 20)'),
    ),
    "filter with pyarrow": (
        lambda w: chips_of(w).filter(pc.field("coverage") > 0.9), rd.PlanError, ("coverage", "triple"),
    ),
    "no such operator": (
        lambda w: w.s2.where("eo:cloud_cover", "~", 3), rd.PlanError, ("'~'", "<=", "in"),
    ),
    "half a triple": (lambda w: w.s2.where("eo:cloud_cover", "<"), rd.PlanError, ("triple",)),
    # pixels
    "no such units": (lambda w: w.s2.harmonize(units="radiance"), rd.PlanError, ("'radiance'", "raw")),  # type: ignore[arg-type]
    "no such pick": (lambda w: w.s2.harmonize(pick="best"), rd.PlanError, ("'best'", "least_cloudy")),  # type: ignore[arg-type]
    "no such mask": (lambda w: w.s2.harmonize(mask="fog"), rd.PlanError, ("'fog'", "clouds")),  # type: ignore[arg-type]
    "no such dtype": (lambda w: w.s2.harmonize(dtype="float16"), rd.PlanError, ("'float16'", "uint16")),  # type: ignore[arg-type]
    "no such kernel": (lambda w: w.s2.harmonize(resampling="magic"), rd.PlanError, ("'magic'", "bilinear")),  # type: ignore[arg-type]
    "no resolution": (lambda w: w.s2.harmonize(resolution=0), rd.PlanError, ("resolution", "positive")),
    "resolution of words": (
        lambda w: w.s2.harmonize(resolution="10 m"), rd.PlanError, ("'10 m'",),  # type: ignore[arg-type]
    ),
    "a band twice": (lambda w: w.s2.harmonize(bands=["red", "red"]), rd.PlanError, ("red", "twice")),
    "no band": (lambda w: w.s2.harmonize(bands=[]), rd.PlanError, ("bands",)),
    "function over data": (
        lambda w: (lambda k: chips_of(w).map(lambda x: x * k))(3), rd.PlanError, ("closure over k", "version"),
    ),
    # merge and join
    "merge of nothing": (lambda w: rd.merge(), rd.PlanError, ("no collection",)),
    "merge of a join": (
        lambda w: rd.merge(rd.join(a=w.s2), w.l8), rd.PlanError, ("a join", "Merge before you join"),
    ),
    "join of nothing": (lambda w: rd.join(), rd.PlanError, ("no source",)),
    "join of a join": (lambda w: rd.join(a=rd.join(b=w.s2)), rd.PlanError, ("'a'", "one join")),
    "join with itself": (lambda w: w.s2 & w.s2, rd.PlanError, ("'s2'", "rd.join(")),
    "join of one name": (lambda w: w.s2.join(s2=w.l8), rd.PlanError, ("'s2'", "rd.join(")),
    "cube of a join": (lambda w: rd.join(a=w.s2, b=w.l8).cube(), rd.PlanError, ("join", "one of them")),
    # chips
    "size 0": (lambda w: chips_of(w, 0), rd.PlanError, ("size", "0", "positive")),
    "size below 0": (lambda w: chips_of(w, -32), rd.PlanError, ("size", "-32", "positive")),
    "size of half pixels": (
        lambda w: chips_of(w, 32.5), rd.PlanError, ("size", "32.5", "whole"),  # type: ignore[arg-type]
    ),
    "size NaN": (lambda w: chips_of(w, float("nan")), rd.PlanError, ("size", "nan")),  # type: ignore[arg-type]
    "size None": (lambda w: chips_of(w, None), rd.PlanError, ("size", "None")),  # type: ignore[arg-type]
    "size True": (lambda w: chips_of(w, True), rd.PlanError, ("size", "True")),
    "stride 0": (lambda w: chips_of(w, stride=0), rd.PlanError, ("stride", "0", "positive")),
    "stride of words": (lambda w: chips_of(w, stride="half"), rd.PlanError, ("stride", "'half'")),
    "coverage in percent": (lambda w: chips_of(w, min_coverage=90), rd.PlanError, ("90", "0 to 1")),
    "no split cell": (lambda w: chips_of(w, cell_km=0), rd.PlanError, ("cell_km", "above 0")),
    "slots below 0": (lambda w: chips_of(w, min_slots=-1), rd.PlanError, ("min_slots", "-1")),
    "no such grid": (lambda w: chips_of(w, grid="cells"), rd.PlanError, ("'cells'", "'tiles'")),
    "no grid": (lambda w: chips_of(w, grid=10), rd.PlanError, ("10", "GeoBox")),
    # splits
    "ratios above 1": (
        lambda w: chips_of(w).split(0.7, 0.2, 0.2), rd.PlanError, ("0.7", "0.2", "1.1", "sum to 1"),
    ),
    "ratios below 0": (lambda w: chips_of(w).split(1.2, -0.1, -0.1), rd.PlanError, ("-0.1", "sum to 1")),
    "ratios of NaN": (lambda w: chips_of(w).split(float("nan"), 0.5, 0.5), rd.PlanError, ("nan",)),
    "ratios of words": (
        lambda w: chips_of(w).split("most", 0.1, 0.1), rd.PlanError, ("'most'",),
    ),
    "shares that leave some": (
        lambda w: chips_of(w).split(0.7, 0.2), rd.PlanError, ("0.9", "sum to 1", "test=0.1"),
    ),
    "shares of a column": (
        lambda w: chips_of(w).split(0.7, 0.3, by="epsg"), rd.PlanError, ("train=0.7", "list of values"),
    ),
    "values of no column": (
        lambda w: chips_of(w).split(val=[1]), rd.PlanError, ("val=[1]", "without a column"),
    ),
    "a value of two splits": (
        lambda w: chips_of(w).split(by="fold", val=[1], test=[1]), rd.PlanError, ("1 in val", "test"),
    ),
    "a split called as an option": (
        lambda w: chips_of(w).split(train=0.5, seed=0.5),  # type: ignore[arg-type]
        rd.PlanError, ("seed", "0.5", "whole number"),
    ),
    "a split that is no group": (
        lambda w: chips_of(w).split(train=0.5, **NO_GROUP), rd.PlanError, ("'a/b'", "Zarr"),
    ),
    "a buffer without train": (
        lambda w: chips_of(w).split(a=0.5, b=0.5, buffer_m=10), rd.PlanError, ("a, b", "called train"),
    ),
    "one fold": (lambda w: chips_of(w).folds(1), rd.PlanError, ("1", "at least 2")),
    "buffer below 0": (lambda w: chips_of(w).split(buffer_m=-1), rd.PlanError, ("buffer_m", "-1")),
    "no such boundary": (lambda w: chips_of(w).split(boundary="left"), rd.PlanError, ("'left'", "'drop'")),  # type: ignore[arg-type]
    "select of nothing": (lambda w: chips_of(w).select(), rd.PlanError, ("no split",)),
}  # fmt: skip


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("case", STEPS)
def test_steps_are_refused_where_they_are_written(world: World, case: str) -> None:
    attempt, kind, words = STEPS[case]
    with refused(kind, *words):
        attempt(world)


# --- plans: told while planning, before any pixel --------------------------------------------------------------


WRONG_SPLIT: Any = ("trian",)


def split(chips: rd.Chips, *ratios: float, **options: Any) -> rd.Chips:
    return chips.split(*(ratios or (0.6, 0.2, 0.2)), **options)


PLANS: dict[str, tuple[Callable[[World], Any], type[rd.RasteretDaskError], tuple[str, ...]]] = {
    "unknown band": (
        lambda w: laid(w.s2.harmonize(bands=["red", "purple"])),
        rd.BandError, ("'purple'", "'s2'", "B04, B08, SCL", "red, nir"),
    ),
    "unknown band, nearly right": (
        lambda w: laid(w.s2.harmonize(bands=["B4"])), rd.BandError, ("'B4'", "'s2'", "Did you mean B04"),
    ),
    "unknown band in one member": (
        lambda w: laid(rd.merge(w.s2, w.l8).harmonize(bands=["B04"])), rd.BandError, ("'B04'", "'l8'"),
    ),
    "unknown band of a cube": (
        lambda w: w.s2.cube(bands=["purple"]), rd.BandError, ("'purple'", "B04, B08, SCL"),
    ),
    "unknown column": (lambda w: len(w.s2.subset(sun=3)), rd.PlanError, ("'sun'", "'s2'", "eo:cloud_cover")),
    "unknown column of chips": (
        lambda w: len(chips_of(w).filter(label="forest")), rd.PlanError, ("'label'", "coverage"),
    ),
    "value of another type": (
        lambda w: len(w.s2.where("eo:cloud_cover", "<", "few")), rd.PlanError, ("eo:cloud_cover", "double"),
    ),
    "values of another type": (
        lambda w: len(w.s2.where("eo:cloud_cover", "in", ("few",))), rd.PlanError, ("few", "double"),
    ),
    "one value for many": (
        lambda w: len(w.s2.where("eo:cloud_cover", "in", 5)), rd.PlanError, ("eo:cloud_cover", "5"),
    ),
    "a range that is none": (
        lambda w: len(w.s2.where("datetime", "overlaps", 5)), rd.PlanError, ("datetime", "5"),
    ),
    "an area that is none": (
        lambda w: len(w.s2.where("geometry", "intersects", "zz")), rd.PlanError, ("geometry", "WKB"),
    ),
    "unknown split": (
        lambda w: len(split(chips_of(w)).select(*WRONG_SPLIT)), rd.PlanError, ("'trian'", "train, val, test"),
    ),
    "select without split": (
        lambda w: len(chips_of(w).select("train")), rd.PlanError, ("'train'", "split step"),
    ),
    "split by no column": (
        lambda w: len(chips_of(w).split(by="label")), rd.PlanError, ("'label'", "'ground'"),
    ),
    "split by a column of other words": (
        lambda w: len(chips_of(w).split(by="epsg", test=[1])), rd.PlanError, ("test=[1]", "32633"),
    ),
    "no record with the id": (
        lambda w: laid(w.s2.where(id="s3")), rd.EmptyError, ("'s2'", '"s3"', "leaves none", "filters"),
    ),
    "no record in time": (
        lambda w: laid(w.s2.subset(date_range=("2030-01-01", "2030-01-31"))),
        rd.EmptyError, ("'s2'", "2030-01-01", "Change the area"),
    ),
    "no record that clear": (
        lambda w: laid(w.s2.subset(cloud_cover_lt=1)), rd.EmptyError, ("'s2'", "eo:cloud_cover", "Change the area"),
    ),
    "no record there": (
        lambda w: len(chips_of(w, aoi=(0, 0, 1, 1))), rd.EmptyError, ("'s2'", "Change the area"),
    ),
    "no chip at the point": (
        lambda w: len(chips_of(w, at=[(15.0, 15.0)])), rd.EmptyError, ("1 candidate", "area"),
    ),
    "no chip left": (
        lambda w: len(chips_of(w).filter("coverage", ">", 2)),
        rd.EmptyError, ("no chip left", "filter", "Ask for less"),
    ),
    "no chip in a split": (
        lambda w: len(split(chips_of(w), 1, 0, 0).select("val")), rd.EmptyError, ("select(val)", "Ask for less"),
    ),
    "size above a split cell": (
        lambda w: len(chips_of(w, 128)), rd.GridError, ("1280 m", "960 m", "cell_km"),
    ),
    "size that another sensor has not": (
        lambda w: len(rd.join(fine=w.s2, rough=w.l8).chips(256)),
        rd.GridError, ("'rough'", "2560 m", "30 m", "240, 264", "192, 384"),
    ),
    "unknown reference": (
        lambda w: len(chips_of(w, reference="l8")), rd.PlanError, ("reference", "'l8'", "s2"),
    ),
    "unknown reference of a join": (
        lambda w: len(rd.join(a=w.s2, b=w.l8).chips(96, reference="c", cell_km=CELL_KM)),
        rd.PlanError, ("'c'", "a, b"),
    ),
    "members of one name": (
        lambda w: laid(rd.merge(w.s2, w.s2)), rd.PlanError, ("s2, s2", "a name of its own"),
    ),
    "members harmonized apart": (
        lambda w: laid(rd.merge(w.s2.harmonize(bands=["red"]), w.l8)), rd.PlanError, ("harmonize", "merge"),
    ),
    "raw of two scales": (
        lambda w: laid(rd.merge(w.s2, w.l8).harmonize(bands=["red"], units="raw"), 96),
        rd.PlanError, ("2.75e-05", "0.0001", "units='physical'"),
    ),
    "mask without quality band": (
        lambda w: laid(w.l8.harmonize(bands=["red"], mask="clouds")),
        rd.PlanError, ("'l8'", "SCL, qa_pixel, Fmask", "leave mask out"),
    ),
    "reflectance of classes": (
        lambda w: laid(w.s2.harmonize(bands=["SCL"], units="reflectance")), rd.PlanError, ("class", "'s2'"),
    ),
    "time of words": (
        lambda w: laid(w.s2.harmonize(bands=["red"], time="monthly")), rd.PlanError, ("'monthly'", "'1MS'"),
    ),
    "time of a number": (
        lambda w: laid(w.s2.harmonize(bands=["red"], time=30)),  # type: ignore[arg-type]
        rd.PlanError, ("30", "'1MS'"),
    ),
    "time that stands": (
        lambda w: laid(w.s2.harmonize(bands=["red"], time="0D")), rd.PlanError, ("'0D'", "forward"),
    ),
    "time that goes back": (
        lambda w: laid(w.s2.harmonize(bands=["red"], time="-1D")), rd.PlanError, ("'-1D'", "forward"),
    ),
    "time of microseconds": (
        lambda w: laid(w.s2.harmonize(bands=["red"], time="1us")), rd.PlanError, ("'1us'", "100,000"),
    ),
    "instants without time beside slots": (
        lambda w: laid(rd.join(a=w.s2.harmonize(bands=["red"], time="1MS"), b=w.l8), 96),
        rd.PlanError, ("'b'", "harmonize(time=...)"),
    ),
    "sample below 0": (lambda w: len(chips_of(w).sample(-1)), rd.PlanError, ("-1", "0 or more")),
    "sample by no column": (
        lambda w: len(chips_of(w).sample(3, by="label")), rd.PlanError, ("'label'", "coverage"),
    ),
    "records sampled by no column": (
        lambda w: len(w.s2.sample(1, by="biome")), rd.PlanError, ("'biome'", "'s2'", "platform"),
    ),
    "function for no source": (
        lambda w: len(chips_of(w).map(doubled, source="l8")), rd.PlanError, ("'l8'", "s2"),
    ),
    "table of other chips": (
        lambda w: len(chips_of(w).with_table(pa.table({"chip_id": ["x"]}))), rd.SchemaError, ("'x'", "chip_id"),
    ),
    "table without chips": (
        lambda w: len(chips_of(w).with_table(pa.table({"x": [1]}))), rd.SchemaError, ("columns x", "chip_id"),
    ),
    "points in metres": (
        lambda w: len(chips_of(w, at=[(5e5, 5e6)])), rd.PlanError, ("chips(at=)", "EPSG:4326"),
    ),
    "point without geometry": (
        lambda w: len(chips_of(w, at=pa.table({"geometry": pa.array([None], pa.binary())}))),
        rd.PlanError, ("row 0", "no geometry"),
    ),
    "point on other ground": (
        lambda w: len(chips_of(w, at=[(15.0, 85.0)])), rd.EmptyError, ("no chip of 1 candidate", "not covered"),
    ),
    "cube upside down": (
        lambda w: w.s2.cube(bounds=(2, 2, 1, 1)), rd.GridError, ("(2, 2, 1, 1)", "ymin < ymax"),
    ),
    "cube of half pixels": (
        lambda w: w.s2.cube(bounds=(WEST, NORTH - 100, WEST + 105, NORTH)), rd.GridError, ("10.5", "whole"),
    ),
    "cube elsewhere": (
        lambda w: w.s2.cube(bounds=(0, 0, 100, 100)), rd.PlanError, ("'s2'", "no record in these bounds"),
    ),
}  # fmt: skip


@pytest.mark.usefixtures("unread")
@pytest.mark.filterwarnings("ignore:only .* split cell")
@pytest.mark.parametrize("case", PLANS)
def test_plans_are_refused_before_pixels_are_read(world: World, case: str) -> None:
    attempt, kind, words = PLANS[case]
    with refused(kind, *words):
        attempt(world)


def test_the_size_that_the_error_proposes_fits(world: World) -> None:
    joined = rd.join(fine=world.s2.harmonize(bands=["red"]), rough=world.l8.harmonize(bands=["red"]))
    with pytest.raises(rd.GridError) as caught:
        len(joined.chips(80, cell_km=CELL_KM))
    for size in (72, 96, 48):
        assert str(size) in caught.value.remedy
    assert len(joined.chips(96, cell_km=CELL_KM)) > 5


def test_and_of_three(world: World) -> None:
    both = world.s2.harmonize(bands=["red"]) & world.l8.harmonize(bands=["red"])
    for joined in (both & world.year, both.join(year=world.year), world.year & both):
        assert {s.plan.name for s in joined.chips(96, cell_km=CELL_KM).planned.sources} == {
            "s2",
            "l8",
            "year",
        }
    with refused(rd.PlanError, "'l8'", "rd.join("):
        both & world.l8


# --- assets that cannot be read --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gappy(world: World) -> rd.Collection:
    """Three scenes; the near infrared of two of them is not there."""
    red = [str(world.folder / f"s2-{day}_B04.tif") for day in ("02", "12", "02")]
    nir = [
        str(world.folder / "s2-02_B08.tif"),
        str(world.folder / "lost.tif"),
        str(world.folder / "gone.tif"),
    ]
    records = {
        name: (f"2024-04-0{n}T10:00:00", {"B04": red[n - 1], "B08": nir[n - 1]})
        for n, name in enumerate(("whole", "first", "second"), 1)
    }
    return rd.build_from_table(table_of(records), name="gappy", dataset="sentinel-2-l2a")


@pytest.mark.usefixtures("unread")
def test_unreadable_assets_are_all_listed_before_pixels_are_read(gappy: rd.Collection) -> None:
    plan = gappy.harmonize(bands=["red", "nir"])
    words = ("2 unreadable", "first/B08", "second/B08", "nothing there", "where(readable=True)")
    with refused(rd.UnreadableAssetsError, *words) as _:
        laid(plan)
    with refused(rd.UnreadableAssetsError, *words):
        plan.cube()
    assert laid(gappy.harmonize(bands=["red"])) > 300  # bands that are not asked for do no harm


@pytest.mark.usefixtures("unread")
def test_readable_only_helps_and_is_counted(gappy: rd.Collection) -> None:
    for plan in (
        gappy.where(readable=True).harmonize(bands=["red", "nir"]),
        gappy.harmonize(bands=["red", "nir"]).where(readable=True),
        gappy.sample(3).where(readable=True).harmonize(bands=["red", "nir"]),
    ):
        chips = plan.chips(32, cell_km=CELL_KM)
        used = {f["record"] for feeds in chips.table.column("feeds").to_pylist() for f in feeds}
        assert used == {"whole"}
        said = chips.explain()
        assert said["dropped"]["record that lacks a band or has an unreadable asset (gappy)"] == 2
        assert "2: record that lacks a band or has an unreadable asset" in str(said)
    assert len(gappy.where(readable=True).harmonize(bands=["red"]).chips(32, cell_km=CELL_KM)) > 300


def test_nothing_readable(gappy: rd.Collection) -> None:
    with refused(rd.EmptyError, "'gappy'", "readable", "Change the area"):
        laid(gappy.where("id", "!=", "whole").where(readable=True).harmonize(bands=["red", "nir"]))


# --- files that break while they are read ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with Client(
        processes=False, n_workers=1, threads_per_worker=2, dashboard_address=":0", silence_logs=60
    ) as client:
        yield client


def folded(chips: rd.Chips) -> rd.Chips:
    """Split so that only val reads the scene ``s2-12``: one shard of three."""
    feeds = chips.table.column("feeds").to_pylist()
    second = [any(f["record"] == "s2-12" for f in own) for own in feeds]
    fold = ["val" if late else ("train", "test")[n // 2 % 2] for n, late in enumerate(second)]
    table = chips.table.select(["chip_id"]).append_column("fold", pa.array(fold))
    return chips.with_table(table).split(by="fold")


def own_world(folder: Path) -> rd.Collection:
    records = {
        f"s2-{day}": (
            f"2024-04-{day}T10:00:00",
            {b: write(folder / f"s2-{day}_{b}.tif", 10) for b in ("B04", "B08")},
        )
        for day in ("02", "12")
    }
    return rd.build_from_table(table_of(records), name="s2", dataset="sentinel-2-l2a")


def objects(store: Path) -> dict[str, tuple[int, int]]:
    """Return {path: (time of change, size)} of a store's pixels."""
    found = (p for p in store.rglob("*") if p.is_file() and "/pixels/c/" in p.as_posix())
    return {str(p.relative_to(store)): (p.stat().st_mtime_ns, p.stat().st_size) for p in found}


def test_a_truncated_file_fails_its_shard_only(tmp_path: Path, client: Client) -> None:
    chips = folded(own_world(tmp_path).harmonize(bands=["red", "nir"]).chips(32, cell_km=CELL_KM))
    assert [s.name for s in chips.job.shards()] == ["train-00000", "val-00000", "test-00000"]
    chips.to_zarr(tmp_path / "right.zarr", client, progress=False)
    path = tmp_path / "s2-12_B08.tif"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])  # the header stands, half of the pixels are gone

    store = tmp_path / "chips.zarr"
    with refused(
        rd.JobError, str(store), "1 of 3 shards failed", "val-00000", "'B08'", "'s2-12'", str(path),
        "not committed", "to_zarr again",
    ):  # fmt: skip
        chips.to_zarr(store, client, progress=False)
    assert not (store / "zarr.json").exists()
    with pytest.raises(FileNotFoundError):
        xr.open_datatree(store, engine="zarr")
    written = objects(store)
    assert {p.partition("/")[0] for p in written} == {"train", "test"}

    with refused(rd.JobError, "1 of 3 shards failed", "val-00000"):  # as long as it is broken
        chips.to_zarr(store, client, progress=False)
    path.write_bytes(whole)
    chips.to_zarr(store, client, progress=False)
    after = objects(store)
    assert {p: after[p] for p in written} == written  # what was finished is not done again
    assert {p.partition("/")[0] for p in after} == {"train", "val", "test"}
    with (
        xr.open_datatree(store, engine="zarr") as found,
        xr.open_datatree(tmp_path / "right.zarr", engine="zarr") as right,
    ):
        found.load()
        right.load()
        assert found.identical(right)


def test_a_truncated_file_in_xarray(tmp_path: Path) -> None:
    chips = own_world(tmp_path).harmonize(bands=["red", "nir"]).chips(32, cell_km=CELL_KM)
    path = tmp_path / "s2-12_B08.tif"
    path.write_bytes(path.read_bytes()[:20_000])
    dataset = chips.to_xarray()
    with refused(rd.ReadError, "'B08'", "'s2-12'", str(path), "reading tile"):
        dataset["pixels"].compute(scheduler="threads")


def test_a_file_that_changed(tmp_path: Path) -> None:
    chips = own_world(tmp_path).harmonize(bands=["red", "nir"]).chips(32, cell_km=CELL_KM)
    before = (tmp_path / "s2-12_B08.tif").stat().st_size
    write(tmp_path / "s2-12_B08.tif", 20)
    sizes = [f"a file of {(tmp_path / 's2-12_B08.tif').stat().st_size} bytes", f"a file of {before} bytes"]
    with refused(rd.ReadError, "'B08'", "'s2-12'", *sizes, "build its record anew"):
        chips.to_xarray()["pixels"].compute(scheduler="threads")


def test_a_file_that_went(tmp_path: Path) -> None:
    chips = own_world(tmp_path).harmonize(bands=["red", "nir"]).chips(32, cell_km=CELL_KM)
    (tmp_path / "s2-12_B08.tif").unlink()
    with refused(rd.ReadError, "'B08'", "'s2-12'", "nothing there", "Restore the file"):
        chips.to_xarray()["pixels"].compute(scheduler="threads")


@pytest.mark.filterwarnings("ignore::rasteret_dask.errors.UnknownKindWarning")
@pytest.mark.parametrize("name", ["gdal_byte_truncated.tif", "gdal_byte_zstd_corrupted.tif"])
def test_real_broken_files(data: Path, tmp_path: Path, client: Client, name: str) -> None:
    path = data / "edge_cases" / name
    table = table_of({"broken": ("2024-04-02T10:00:00", {"grey": str(path)})})
    source = rd.build_from_table(table, name="broken")
    chips = source.chips(4, cell_km=0.24)
    with refused(rd.JobError, "all-00000", "'grey'", "'broken'", name):
        chips.to_zarr(tmp_path / "chips.zarr", client, progress=False)
    assert not (tmp_path / "chips.zarr" / "zarr.json").exists()
    with refused(rd.ReadError, "'grey'", "'broken'", name):
        source.cube().compute(scheduler="threads")


# --- stores --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("compute", [True, False])
def test_a_store_of_something_else_is_left_alone(world: World, tmp_path: Path, compute: bool) -> None:
    (tmp_path / "thesis.txt").write_text("five years of work")
    with refused(rd.StoreError, str(tmp_path), "thesis.txt", "empty"):
        chips_of(world).to_zarr(tmp_path, progress=False, compute=compute)  # type: ignore[call-overload]
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "thesis.txt").read_text() == "five years of work"


def test_a_zarr_store_of_something_else_is_left_alone(world: World, tmp_path: Path) -> None:
    xr.Dataset({"ndvi": ("x", np.arange(3.0))}).to_zarr(
        tmp_path / "own.zarr", zarr_format=3, consolidated=False
    )
    with refused(rd.StoreError, "own.zarr", "something else"):
        chips_of(world).to_zarr(tmp_path / "own.zarr", progress=False)
    with xr.open_zarr(tmp_path / "own.zarr", consolidated=False) as own:
        assert own["ndvi"].values.tolist() == [0, 1, 2]


def test_another_plans_store_is_left_alone(world: World, tmp_path: Path, client: Client) -> None:
    store = tmp_path / "chips.zarr"
    mine = chips_of(world).filter("row", "<", -16180)
    mine.to_zarr(store, client, progress=False)
    before = {p: p.stat().st_mtime_ns for p in store.rglob("*")}
    mine.to_zarr(store, client, progress=False)  # finished: nothing to do
    for other in (chips_of(world, 48), mine.sample(3), mine.filter(epsg=32633).sample(2)):
        with refused(rd.StoreError, str(store), "another plan", "Choose another store"):
            other.to_zarr(store, client, progress=False)
    assert {p: p.stat().st_mtime_ns for p in store.rglob("*")} == before


@pytest.mark.usefixtures("unread")
def test_another_plans_leftovers_are_refused(world: World, tmp_path: Path) -> None:
    store = tmp_path / "chips.zarr"
    chips_of(world).to_zarr(store, compute=False)  # prepared, never computed
    assert (store / "_job").is_dir()
    assert not (store / "zarr.json").exists()
    with refused(rd.StoreError, str(store), "another plan", "delete"):
        chips_of(world, 48).to_zarr(store, progress=False)


@pytest.mark.usefixtures("unread")
def test_places_that_are_no_store(world: World, tmp_path: Path) -> None:
    chips = chips_of(world)
    file = tmp_path / "notes.txt"
    file.write_text("mine")
    with refused_any("notes.txt"):
        chips.to_zarr(file, progress=False)
    assert file.read_text() == "mine"
    with refused_any("gopher", "s3://"):
        chips.to_zarr("gopher://example/chips.zarr", progress=False)
    with refused(rd.PlanError, "client", "5", "Dask client"):
        chips.to_zarr(tmp_path / "chips.zarr", 5, progress=False)  # type: ignore[call-overload]
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@contextmanager
def refused_any(*words: str) -> Iterator[None]:
    """Expect any of the package's errors with these words, whole after a pickle."""
    with pytest.raises(rd.RasteretDaskError) as caught:
        yield
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_every_error_is_of_one_tree_and_pickles() -> None:
    exported = [getattr(rd, name) for name in rd.__all__]  # attributes are loaded when they are asked for
    kinds = [v for v in exported if isinstance(v, type) and issubclass(v, Exception)]
    kinds = [kind for kind in kinds if not issubclass(kind, Warning)]
    assert len(kinds) == 19
    for kind in kinds:
        assert issubclass(kind, rd.RasteretDaskError)
        error = kind("subject", "found", "expected", "Remedy.")
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), again.args) == (kind, error.args)
        assert str(again) == str(error)
        if kind is not rd.RecipeError:  # which names a line beside
            assert str(error) == "subject: found found; expected expected. Remedy."
