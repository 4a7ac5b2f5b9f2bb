"""Labels: polygons become masks, as rasterio burns them; columns and label rasters travel with their chips."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Any

import geopandas as gpd
import hypothesis
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import rasterio
import shapely
import xarray as xr
from hypothesis import strategies as st
from numpy.typing import NDArray
from pyproj import Transformer
from rasterio.features import rasterize
from rasterio.transform import from_bounds, from_origin
from small_stores import small, written

import rasteret_dask as rd
from rasteret_dask.chipping.labels import Labels
from rasteret_dask.demo.world import World
from rasteret_dask.storeset import open_chips
from rasteret_dask.streams.datasets import as_xarray
from rasteret_dask.streams.planned import planned
from rasteret_dask.streams.stream import Batching
from rasteret_dask.tasks.batches import Arrays
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.jobfile import open_job, write_job

CROPS = ("beet", "maize", "wheat")
SIZE = 32


@pytest.fixture(scope="module")
def optical(s2: rd.Collection) -> rd.Collection:
    return s2.harmonize(bands=["red", "nir"], time="1MS", mask="clouds")


@pytest.fixture(scope="module")
def fields(optical: rd.Collection) -> gpd.GeoDataFrame:
    """Return 60 fields that overlap each other, some far larger than a chip, one with a hole and many vertices."""
    ground = optical.chips(SIZE, cell_km=0.64).to_geopandas().to_crs(32633).total_bounds
    rng = np.random.default_rng(5)
    x, y = rng.uniform(ground[0], ground[2], 60), rng.uniform(ground[1], ground[3], 60)
    radius = np.append(rng.uniform(15, 400, 59), 900)
    shapes = [
        shapely.Point(*at).buffer(r, quad_segs=q)
        for at, r, q in zip(zip(x, y, strict=True), radius, [1, 2, 8, 300] * 15, strict=True)
    ]
    shapes[-1] = shapely.difference(shapes[-1], shapely.Point(x[-1], y[-1]).buffer(300))
    shapes[7] = shapely.MultiPolygon([shapes[7], shapely.box(*(ground[:2] + 100), *(ground[:2] + 420))])
    return gpd.GeoDataFrame(
        {
            "crop": rng.choice(CROPS, 60),
            "number": rng.integers(1, 9, 60),
            "yield": rng.uniform(1, 9, 60).astype(np.float32),
            "organic": rng.random(60) < 0.5,
        },
        geometry=shapes,
        crs=32633,
    )


def oracle(
    chips: pa.Table, fields: gpd.GeoDataFrame, values: Any, dtype: str, fill: float = 0
) -> NDArray[Any]:
    """Return what rasterio burns into each chip, by way of the CRS that fields travel in."""
    masks = []
    travelled = fields.to_crs(4326)
    for row in chips.select(["epsg", "xmin", "ymin", "xmax", "ymax"]).to_pylist():
        shapes = travelled.to_crs(row["epsg"]).geometry
        grid = from_bounds(row["xmin"], row["ymin"], row["xmax"], row["ymax"], SIZE, SIZE)
        pairs = zip(shapes, np.asarray(values).tolist(), strict=True)
        masks.append(
            rasterize(
                pairs, (SIZE, SIZE), fill=fill, transform=grid, dtype=dtype, all_touched=False
            )
        )  # fmt: skip
    return np.stack(masks)


def numbered(fields: gpd.GeoDataFrame) -> NDArray[np.int64]:
    return np.array([1 + CROPS.index(c) for c in fields["crop"]])


@pytest.fixture(scope="module")
def chips(optical: rd.Collection, fields: gpd.GeoDataFrame) -> rd.Chips:
    return optical.chips(SIZE, cell_km=0.64, labels=fields, rasterize="crop").split(0.5, 0.25, 0.25, seed=1)


@pytest.fixture(scope="module")
def store(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> str:
    place = str(tmp_path_factory.mktemp("labels") / "chips.zarr")
    chips.select("train").to_zarr(place, progress=False)
    return place


def masks_of(parts: Sequence[Mapping[str, Any]]) -> dict[str, NDArray[Any]]:
    return {i: m for p in parts for i, m in zip(p["chip_id"], p["s2/mask"], strict=True)}


def test_every_exit_gives_the_masks_that_rasterio_burns(
    chips: rd.Chips, store: str, fields: gpd.GeoDataFrame
) -> None:
    train = chips.select("train")
    wanted = oracle(train.table, fields, numbered(fields), "uint8")
    assert {0, 1, 2, 3} == set(np.unique(wanted))
    loaded, lazy = train.load(), train.to_xarray()
    assert isinstance(loaded, xr.Dataset)
    for found in (loaded, lazy, xr.open_zarr(store), open_chips(store).load(), open_chips(store).to_xarray()):
        assert isinstance(found, xr.Dataset)
        assert found["mask"].dims == ("chip", "y", "x")
        assert found["mask"].dtype == np.uint8
        assert found["mask"].attrs == {"long_name": "crop", "classes": ["", *CROPS]}
        np.testing.assert_array_equal(found["mask"].values, wanted)
    ids = train.table.column("chip_id").to_pylist()
    for given in (train.stream(7), open_chips(store).stream(7)):
        assert given.classes == {"s2": ("", *CROPS)}
    streamed = masks_of(list(train.stream(7, shuffle=3)))
    from_store = masks_of(list(open_chips(store).stream(7, shuffle=3)))
    for found_by_id in (streamed, from_store, masks_of([open_chips(store).take(ids[::-1])])):
        np.testing.assert_array_equal(np.stack([found_by_id[i] for i in ids]), wanted)


@pytest.mark.parametrize(
    ("column", "dtype", "fill"),
    [("number", "uint8", 0), ("yield", "float32", np.nan), ("organic", "uint8", 0)],
)
def test_numbers_stay_what_they_are(
    optical: rd.Collection, fields: gpd.GeoDataFrame, column: str, dtype: str, fill: float
) -> None:
    chips = optical.chips(SIZE, cell_km=0.64, labels=fields, rasterize=column).sample(20)
    found = chips.load()["mask"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.values, oracle(chips.table, fields, fields[column], dtype, fill))


@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        ([1, 255], "uint8"),
        ([-1, 255], "int16"),
        ([1, 65535], "uint16"),
        ([-1, 65535], "int32"),
        ([2**32 - 1], "uint32"),
    ],
)
def test_whole_numbers_take_the_smallest_dtype(values: list[int], dtype: str) -> None:
    frame = gpd.GeoDataFrame({"v": values}, geometry=[shapely.box(15, 50, 16, 51)] * len(values), crs=4326)
    table = pa.table({"geometry": shapely.to_wkb(frame.geometry.to_numpy()), "v": values})
    labels = Labels.of(table, "v")
    box = np.array([[500000.0, 5550000.0, 500040.0, 5550040.0]])
    burned = labels.burned(box, np.array([32633]), 4)
    assert burned.dtype == dtype
    assert (burned == values[-1]).all()  # the last row wins


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    st.permutations(["a", "b", "c", "d", "e"]), st.lists(st.sampled_from("abc"), min_size=1, max_size=6)
)
def test_classes_settle_numbers_and_dtype_whichever_are_there(classes: list[str], values: list[str]) -> None:
    square = shapely.to_wkb(shapely.box(15, 50, 16, 51))

    def made(values: Sequence[Any], classes: Sequence[Any]) -> Labels:
        table = pa.table({"geometry": [square] * len(values), "v": list(values)})
        return Labels.of(table, "v", classes=classes)

    text = made(values, classes)
    assert text.table["value"].to_pylist() == [1 + classes.index(value) for value in values]
    assert text.attrs["classes"] == ["", *classes]
    codes = [ord(value) for value in values]
    whole = made(codes, [*map(ord, classes), 60_000])
    assert whole.table["value"].to_pylist() == codes
    assert whole.dtype == "uint16"  # as in a region that has class 60,000
    with pytest.raises(rd.PlanError, match=r"class 'z' in 1 rows.*isin\(classes\)"):
        made([*values, "z"], classes)


def test_polygons_at_the_antimeridian_and_beyond_a_zone_are_burned() -> None:
    across = {"split": (179.0, 181.0), "west of it": (-181.0, -179.0), "the world": (-180.0, 180.0)}
    chips = {32601: (-179.995, -0.01), 32660: (179.99, -0.01)}
    for west, east in across.values():
        table = pa.table({"geometry": shapely.to_wkb([shapely.box(west, -1, east, 1)]), "v": ["x"]})
        for epsg, (lon, lat) in chips.items():
            zone = gpd.GeoSeries([shapely.Point(lon, lat)], crs=4326).to_crs(epsg).iloc[0]
            box = np.array([[zone.x, zone.y, zone.x + 80, zone.y + 80]])
            assert Labels.of(table, "v").burned(box, np.array([epsg]), 8).all(), (west, east, epsg)
    far = pa.table({"geometry": shapely.to_wkb([shapely.box(-60, -1, -50, 1)]), "v": ["x"]})
    assert not Labels.of(far, "v").burned(box, np.array([32660]), 8).any()


def labels_of(*shapes: Any) -> Labels:
    return Labels.of(pa.table({"geometry": shapely.to_wkb(shapes), "v": [1] * len(shapes)}), "v")


def centres(box: Sequence[float], size: int, epsg: int) -> NDArray[np.float64]:
    """Return lon/lat of a chip's pixel centres, shape (y, x, 2)."""
    xmin, ymin, xmax, ymax = box
    step = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(xmin + step * (xmax - xmin), ymax - step * (ymax - ymin))
    return np.stack(Transformer.from_crs(epsg, 4326, always_xy=True).transform(x, y), -1)


def square(lon: float, lat: float, epsg: int, metres: float) -> list[float]:
    x, y = Transformer.from_crs(4326, epsg, always_xy=True).transform(lon, lat)
    return [x - metres / 2, y - metres / 2, x + metres / 2, y + metres / 2]


WORLD = shapely.box(-180, -90, 180, 90)


@pytest.mark.parametrize(
    ("shape", "lon", "lat"),
    [
        (shapely.box(11, 50, 13, 51), 12.0, 50.0),  # an edge along a parallel bends by 480 m in UTM
        (shapely.box(8, 50, 16, 54), 12.0, 54.0),
        (shapely.Polygon([(11, 49), (13, 51), (11, 51)]), 12.2, 50.2),
        (WORLD, 12.0, 50.0),
        (WORLD, 12.0, -70.0),
        (shapely.box(-180, -90, 180, 60), 12.0, 60.0),
    ],
)
@pytest.mark.parametrize("epsg", [32632, 32633, 3857])
def test_edges_of_lonlat_polygons_stay_in_lonlat(
    shape: shapely.Geometry, lon: float, lat: float, epsg: int
) -> None:
    size, box = 64, square(lon, lat, epsg, 2560)
    burned = labels_of(shape).burned(np.array([box]), np.array([epsg]), size)[0]
    ground = centres(box, size, epsg)
    inside = shapely.contains_xy(shape, ground[..., 0], ground[..., 1])
    differ = ground[burned.astype(bool) != inside]
    assert shapely.distance(shapely.boundary(shape), shapely.points(differ)).max(initial=0) < 1e-6
    assert inside.any()


def test_edges_of_projected_polygons_stay_where_they_are(optical: rd.Collection) -> None:
    """A rectangle of 200 km in UTM is one in UTM still, though labels travel in lon/lat."""
    box = (
        optical.chips(SIZE, cell_km=0.64)
        .table.select(["xmin", "ymin", "xmax", "ymax"])
        .to_pylist()[0]
        .values()
    )
    xmin, ymin, xmax, _ = box
    edge = ymin + 10 * SIZE / 2
    wide = gpd.GeoDataFrame(
        {"v": [1]}, geometry=[shapely.box(xmin - 1e5, edge, xmax + 1e5, edge + 2e5)], crs=32633
    )
    chips = optical.chips(SIZE, cell_km=0.64, labels=wide, rasterize="v").sample(30)
    loaded = chips.load()
    assert isinstance(loaded, xr.Dataset)
    for row, mask in zip(chips.table.to_pylist(), loaded["mask"].values, strict=True):
        assert row["epsg"] == 32633
        y = row["ymax"] - 10 * (np.arange(SIZE) + 0.5)
        assert (mask == (y > edge)[:, None]).all()


def test_chips_of_several_zones_in_one_call() -> None:
    """The same ground in three CRSs, chips interleaved: each is burned in its own."""
    shape = shapely.Point(12.0, 50.0).buffer(0.004, quad_segs=3)
    codes = np.array([32632, 32633, 3035, 32633, 32632])
    size, boxes = 48, np.array([square(12.001, 50.001, int(c), 960) for c in codes])
    burned = labels_of(shape).burned(boxes, codes, size)
    for mask, box, code in zip(burned, boxes, codes.tolist(), strict=True):
        ground = centres(box, size, code)
        inside = shapely.contains_xy(shape, ground[..., 0], ground[..., 1])
        assert np.count_nonzero(mask != inside) <= 2
        assert 0 < inside.mean() < 1


def test_polygons_of_many_vertices_are_burned_as_they_are_even_where_invalid() -> None:
    rng = np.random.default_rng(0)
    box = (500000.0, 5500000.0, 500320.0, 5500320.0)
    invalid = 0
    for kind in ["star", "twice round", "large", "on a grid"] * 20:
        n = int(rng.integers(257, 600))
        at = np.array([500160, 5500160]) + rng.uniform(-400, 400, 2)
        turn, far = np.sort(rng.uniform(0, 2 * np.pi, n)), rng.uniform(20, 800)
        reach = np.full(n, far) if kind == "large" else far * (1 + 0.3 * rng.normal(size=n)).clip(0.2, 2)
        turn = turn * 2 if kind == "twice round" else turn
        points = at + np.stack([np.cos(turn), np.sin(turn)], -1) * reach[:, None]
        points = np.round(points / 10) * 10 if kind == "on a grid" else points
        shape = gpd.GeoSeries([shapely.Polygon(points)], crs=32633).to_crs(4326)
        invalid += not shape.is_valid.all()
        burned = labels_of(*shape).burned(np.array([box]), np.array([32633]), SIZE)[0]
        grid = from_bounds(*box, SIZE, SIZE)
        wanted = rasterize(shape.to_crs(32633), (SIZE, SIZE), transform=grid, dtype="uint8")
        np.testing.assert_array_equal(burned, wanted, err_msg=kind)
    assert invalid > 20


BURNING = """
import sys, threading, warnings
import numpy as np, shapely
from rasteret_dask.chipping import labels

box = np.array([shapely.box(0, 0, 300, 300)])
polygons = labels._Projected(np.array([1], "uint8"), box, np.array([False]), shapely.STRtree(box))
mask = np.zeros((32, 32), "uint8")
labels._burn(mask, np.array([0.0, 0, 640, 640]), polygons, np.array([0]))
over = threading.Event()
sys.setswitchinterval(1e-5)

def others():  # what pyproj, xarray or anyone else does in a thread beside
    while not over.is_set():
        with warnings.catch_warnings():
            pass

thread = threading.Thread(target=others)
thread.start()
try:
    for _ in range(1200):
        labels._burn(mask, np.array([0.0, 0, 640, 640]), polygons, np.array([0]))
finally:
    over.set()
    thread.join()
"""


def test_no_warning_of_rasterio_s_own_comes_to_light_beside_threads_that_change_filters() -> None:
    done = subprocess.run([sys.executable, "-c", BURNING], capture_output=True, text=True, check=True)
    assert not done.stderr


def test_only_the_reference_has_masks(
    optical: rd.Collection, aef: rd.Collection, fields: gpd.GeoDataFrame
) -> None:
    joined = rd.join(optical=optical, embeddings=aef)
    chips = joined.chips(SIZE, cell_km=0.64, labels=fields, rasterize="crop").sample(9)
    tree = chips.load()
    assert "mask" not in tree["embeddings"]
    wanted = oracle(chips.table, fields, numbered(fields), "uint8")
    np.testing.assert_array_equal(tree["optical"]["mask"].values, wanted)
    swapped = joined.chips(
        SIZE, cell_km=0.64, reference="embeddings", labels=fields, rasterize="crop"
    ).sample(9)
    batch = next(swapped.stream(9))
    assert "optical/mask" not in batch
    assert batch["embeddings/mask"].shape == (9, SIZE, SIZE)


def test_windows_at_polygons_carry_their_columns_and_all_polygons(
    optical: rd.Collection, fields: gpd.GeoDataFrame
) -> None:
    small = fields.iloc[:20].assign(name=[f"field {n}" for n in range(20)])
    chips = optical.chips(SIZE, at=small, rasterize="crop", min_coverage=0.0)
    wanted = oracle(chips.table, small, numbered(small), "uint8")
    batches = list(chips.stream(6))
    found = masks_of(batches)
    np.testing.assert_array_equal(
        np.stack([found[i] for i in chips.table.column("chip_id").to_pylist()]), wanted
    )
    of = {f"field {n}": row for n, row in enumerate(small.to_dict("records"))}
    for batch in batches:
        for at, name in enumerate(batch["labels/name"]):
            for column in ("crop", "number", "yield", "organic"):
                assert batch[f"labels/{column}"][at] == of[name][column]


# Columns


def with_every_type(chips: rd.Chips) -> tuple[rd.Chips, dict[str, NDArray[Any]]]:
    """Return chips with a column of each type, nulls in some shards only, and what they are to be by chip id."""
    ids = chips.table.column("chip_id").to_pylist()
    n = len(ids)
    late = np.arange(n) >= 2 * n // 3  # nulls lie in the last chips only
    number = np.arange(n)
    when = np.datetime64("1969-12-30T23:59:59.000001", "us") + number * np.timedelta64(3_600_000_001, "us")
    text = np.array([f"t{i % 3}" for i in range(n)], dtype=object)
    day = when.astype("datetime64[D]")
    masked: dict[str, tuple[pa.Array, Any]] = {
        "int": (pa.array(number), number),
        "uint8": (pa.array((number % 200).astype(np.uint8)), (number % 200).astype(np.uint8)),
        "flag": (pa.array(number % 2 == 0), number % 2 == 0),
        "float16": (pa.array(number.astype(np.float16)), number.astype(np.float16)),
        "float32": (pa.array(number / 7, pa.float32()), (number / 7).astype(np.float32)),
        "decimal": (pa.array([Decimal(i) / 4 for i in range(n)], pa.decimal128(12, 2)), number / 4),
        "text": (pa.array(text), text),
        "large text": (pa.array(text, pa.large_string()), text),
        "category": (pa.array(text).dictionary_encode(), text),
        "class": (pa.array(number % 5).dictionary_encode(), number % 5),
        "utc": (pa.array(when, pa.timestamp("us", "UTC")), when),
        "ns": (pa.array(when.astype("datetime64[ns]") + 999, pa.timestamp("ns", "Europe/Vienna")), when),
        "s": (pa.array(day.astype("datetime64[s]"), pa.timestamp("s")), day.astype("datetime64[us]")),
        "day": (pa.array(day, pa.date32()), day.astype("datetime64[us]")),
    }
    columns, wanted = {}, {}
    for name, (column, values) in masked.items():
        columns[name], wanted[name] = column, values
        nulls = pc.if_else(pa.array(late), pa.scalar(None, column.type), column)
        blank: Any = {"O": "", "M": np.datetime64("NaT", "us")}.get(values.dtype.kind, np.nan)
        narrow = values.dtype.kind in "OMf"
        columns[f"{name}, nulls"] = nulls
        wanted[f"{name}, nulls"] = np.where(
            late, blank, values if narrow else values.astype(np.float64)
        ).astype(values.dtype if narrow else np.float64)
    columns["in the dictionary"] = pa.DictionaryArray.from_arrays(
        pa.array(late.astype(int)), pa.array([3, None])
    )
    wanted["in the dictionary"] = np.where(late, np.nan, 3.0)
    return chips.with_table(pa.table({"chip_id": ids, **columns})), {
        "chip_id": np.array(ids, object),
        **wanted,
    }


def test_label_columns_are_equal_from_every_exit(s2: rd.Collection, tmp_path: Path) -> None:
    """Each batch of each exit has the dtype that the whole table settles, wherever its nulls lie."""
    plain = s2.harmonize(bands=["red"], time="1MS")
    whole = plain.chips(SIZE, cell_km=0.64).sample(75).split(0.6, 0.2, 0.2, seed=1)
    whole, wanted = with_every_type(whole)
    place_of = {chip: row for row, chip in enumerate(wanted["chip_id"])}
    late = set(wanted["chip_id"][2 * len(whole) // 3 :])

    def check(found: Mapping[str, Any] | xr.Dataset, *, exactly: bool = True) -> None:
        rows = [place_of[i] for i in np.asarray(found["chip_id"]).tolist()]
        for name in wanted.keys() - {"chip_id"}:
            values, own = np.asarray(found[name]), wanted[name][rows]
            if not exactly and own.dtype.kind in "OM":  # as zarr and xarray decode text and CF times
                values = values.astype(own.dtype)
            assert values.dtype == own.dtype, name
            np.testing.assert_array_equal(values, own, err_msg=name)

    def check_batches(batches_: Iterable[Arrays]) -> None:
        for batch in batches_:
            check(
                {"chip_id": batch["chip_id"], **{n: batch[f"labels/{n}"] for n in wanted if n != "chip_id"}}
            )
            check(as_xarray(batch)["s2"])

    for name, chips in {"all": whole, "train": whole.select("train")}.items():
        layout = small(chips, 60_000)
        reading = planned(layout.job, layout.outputs, ReadContext())
        ids = chips.table.column("chip_id").to_pylist()
        firsts = np.cumsum([0, *reading.sizes])
        nulls = [len(late & set(ids[a:b])) for a, b in pairwise(firsts)]
        assert 0 in nulls[:-1]  # shards without a null
        assert any(nulls)
        for shuffle in (None, 1):
            check_batches(Batching(16, shuffle).stream(reading))
        store = written(chips, tmp_path / name, 60_000)
        opened = open_chips(store)
        for shuffle in (None, 1):
            check_batches(opened.stream(16, shuffle=shuffle))
        check_batches([opened.take(ids[::-5])])
        for found in (chips.to_xarray(), chips.load(), opened.to_xarray(), opened.load()):
            assert isinstance(found, xr.Dataset)
            check(found)
        groups = ["train", "val", "test"] if name == "all" else [None]
        for group in groups:
            check(xr.open_zarr(store, group=group), exactly=False)
        few = opened.sample(20, seed=3)
        check_batches(chips.sample(20, seed=3).stream(7))
        check_batches(few.stream(7))


def test_pandas_columns_arrive(optical: rd.Collection, fields: gpd.GeoDataFrame) -> None:
    few = fields.iloc[:12]
    own = few.assign(
        kind=pd.Categorical(few["crop"]),
        sown=pd.date_range("2024-03-01", periods=12, tz="Europe/Vienna"),
        checked=pd.array([True, None] * 6, dtype="boolean"),
        farm=pd.array([None, *range(11)], dtype="Int16"),
    )
    chips = optical.chips(SIZE, at=own, min_coverage=0.0)
    utc = own["sown"].dt.tz_convert(None).to_numpy("datetime64[us]")
    seen = 0
    for batch in chips.stream(5):
        for name in ("checked", "farm"):
            assert batch[f"labels/{name}"].dtype == np.float64
        rows = utc.searchsorted(batch["labels/sown"])
        np.testing.assert_array_equal(utc[rows], batch["labels/sown"])
        assert batch["labels/kind"].tolist() == few["crop"].iloc[rows].to_list()
        np.testing.assert_array_equal(batch["labels/farm"], np.array([np.nan, *range(11)])[rows])
        np.testing.assert_array_equal(batch["labels/checked"], np.array([1.0, np.nan] * 6)[rows])
        seen += len(rows)
    assert seen == len(chips) >= 6


def test_columns_that_cannot_be_labels_are_named_once(optical: rd.Collection, tmp_path: Path) -> None:
    chips = optical.chips(SIZE, cell_km=0.64).sample(9)
    ids = chips.table.column("chip_id")
    taken = {
        name: np.arange(9) for name in ("time", "x", "corner", "kept", "padded", "mask", "member", "_job")
    }
    more = pa.table(
        {
            "chip_id": ids,
            "number": np.arange(9),
            **taken,
            "li": [[1]] * 9,
            "raw": [b"a"] * 9,
            "a/b": np.arange(9),
        }
    )
    more = chips.with_table(more)

    def exits() -> list[Arrays]:
        stored = open_chips(written(more, tmp_path / "chips", 60_000))
        return [next(c.stream(4)) for c in (more, stored, more.filter_pixels(min_valid=0.0))]

    with pytest.warns(UserWarning, match="no labels of batches") as told:
        found = exits()
    assert len(told) == 1
    text = str(told[0].message)
    for name in taken:
        assert f"{name} (its name is taken)" in text
    assert "li (of type list<item: int64>)" in text
    assert "raw (of type binary)" in text
    assert "a/b (no name of an array)" in text
    for batch in found:
        assert [name for name in batch if name.startswith("labels/")] == ["labels/number"]
        assert batch.keys() == found[0].keys()
    assert {*taken, "li", "raw", "a/b"} <= set(more.table.column_names)


def test_label_rasters_join_without_mixing_classes(
    s2: rd.Collection, small_world: World, tmp_path: Path
) -> None:
    """A raster of classes at 30 m, off the chips' grid, is a source like any other: its nearest pixels stay classes."""
    chips10 = s2.harmonize(bands=["red"], time="1MS").chips(SIZE, cell_km=0.64)
    box = chips10.to_geopandas().to_crs(32633).total_bounds
    west, north = np.floor(box[0] / 30) * 30 - 300 + 15, np.ceil(box[3] / 30) * 30 + 300 + 15
    classes = np.random.default_rng(0).choice([1, 7, 40, 200], (180, 220)).astype(np.uint8)
    path = str(tmp_path / "classes.tif")
    profile = {"driver": "GTiff", "tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate"}
    with rasterio.open(
        path, "w", width=220, height=180, count=1, dtype="uint8", crs="EPSG:32633", nodata=0,
        transform=from_origin(west, north, 30, 30), **profile,
    ) as file:  # fmt: skip
        file.write(classes, 1)
    ground = gpd.GeoSeries([shapely.box(west, north - 180 * 30, west + 220 * 30, north)], crs=32633).to_crs(
        4326
    )
    year = [pd.Timestamp("2024-01-01", tz="UTC"), pd.Timestamp("2025-01-01", tz="UTC")]
    table = pa.table(
        {
            "id": ["classes-2024"], "datetime": pa.array(year[:1]), "start_datetime": pa.array(year[:1]),
            "end_datetime": pa.array(year[1:]), "geometry": shapely.to_wkb(ground.to_numpy()), "href": [path],
        }
    )  # fmt: skip
    labels = rd.build_from_files(table, name="labels", bands=["class"])
    joined = rd.join(
        optical=s2.harmonize(bands=["red"], time="1MS"),
        classes=labels.harmonize(resolution=10, resampling="nearest", units="raw"),
    )
    chips = joined.chips(SIZE, cell_km=0.64).sample(12)
    batch = next(chips.stream(12))
    assert set(np.unique(batch["classes"])) == {1, 7, 40, 200}
    for at, (xmin, _, _, ymax) in enumerate(batch["bbox"]):
        cols = ((xmin + 10 * np.arange(SIZE) + 5 - west) // 30).astype(int)
        rows = ((north - (ymax - 10 * np.arange(SIZE) - 5)) // 30).astype(int)
        np.testing.assert_array_equal(batch["classes"][at, 0, 0], classes[np.ix_(rows, cols)])


def test_masks_belong_to_the_plan(
    optical: rd.Collection, chips: rd.Chips, fields: gpd.GeoDataFrame, store: str, tmp_path: Path
) -> None:
    train = chips.select("train")

    def other(**how: Any) -> rd.Chips:
        asked = {"labels": fields, "rasterize": "crop"} | how
        return optical.chips(SIZE, cell_km=0.64, **asked).split(0.5, 0.25, 0.25, seed=1).select("train")

    assert other().job.digest == train.job.digest
    assert other(labels=fields.to_crs(4326).reset_index(drop=True)).job.digest == train.job.digest
    changed = [other(labels=fields.iloc[::-1]), other(rasterize="number"), other(labels=None, rasterize=None),
               other(classes=[*CROPS[::-1], "oats"])]  # fmt: skip
    assert len({train.job.digest, *(c.job.digest for c in changed)}) == 5
    with pytest.raises(rd.StoreError, match="another plan"):
        changed[0].to_zarr(store, progress=False)
    write_job(train.job, str(tmp_path / "job"))
    again = open_job(str(tmp_path / "job"), train.job.digest)
    (mine,), (theirs,) = train.job.labels, again.labels
    assert theirs.table.equals(mine.table)
    assert theirs.note == mine.note


def test_dropped_chips_have_no_mask(chips: rd.Chips, tmp_path: Path) -> None:
    kept = chips.select("train").filter_pixels(min_valid=0.6)
    place = str(tmp_path / "kept.zarr")
    kept.to_zarr(place, progress=False)
    whole = xr.open_zarr(place)
    dropped = ~whole["kept"].values
    assert 0 < dropped.sum() < len(dropped)
    assert not whole["mask"].values[dropped].any()
    np.testing.assert_array_equal(open_chips(place).load()["mask"].values, whole["mask"].values[~dropped])
    assert whole["mask"].values[~dropped].any()


def halved(chips: xr.DataArray) -> xr.DataArray:
    return chips[..., ::2, ::2]


def doubled(chips: xr.DataArray) -> xr.DataArray:
    return chips * 2


def test_functions_that_change_the_grid_leave_no_mask(chips: rd.Chips, tmp_path: Path) -> None:
    few = chips.sample(6)
    assert "mask" in few.map(doubled).load()
    smaller = few.map(halved)
    assert "mask" not in smaller.load()
    smaller.select("train", "val", "test").to_zarr(str(tmp_path / "halved.zarr"), progress=False)
    assert "s2/mask" not in next(smaller.stream(2))


def test_mistakes_are_told_where_they_are_made(optical: rd.Collection, fields: gpd.GeoDataFrame) -> None:
    def refused(message: str, **how: Any) -> None:
        with pytest.raises(rd.PlanError, match=message):
            optical.chips(SIZE, cell_km=0.64, **how)

    refused(r"no such column; expected one of crop, number, yield, organic", labels=fields, rasterize="kind")
    refused(r"Add rasterize='<column>'", labels=fields)
    refused(r"Give labels=GeoDataFrame", rasterize="crop")
    refused(r"Point in row 0 \(60 such rows\)", labels=fields.set_geometry(fields.centroid), rasterize="crop")
    refused(r"Point in row 0", at=fields.set_geometry(fields.centroid), rasterize="crop")
    gone = fields.assign(crop=[None, *fields["crop"][1:]])
    refused(r"no value in row 0 \(1 such rows\).*dropna", labels=gone, rasterize="crop")
    refused(r"Add rasterize='<column>'", classes=["wheat"])
    crops = sorted(set(fields["crop"]))
    refused(rf"class '{crops[0]}' in \d+ rows", labels=fields, rasterize="crop", classes=crops[1:])
    refused(r"whole numbers", labels=fields, rasterize="number", classes=["wheat"])
    refused(r"each once", labels=fields, rasterize="crop", classes=[*crops, crops[0]])
    refused(r"burned as they are", labels=fields, rasterize="yield", classes=[1])
    refused(r"class 0 in 1 rows", labels=fields.assign(number=range(60)), rasterize="number")
    refused(
        r"values of type timestamp", labels=fields.assign(when=pd.Timestamp("2024-01-01")), rasterize="when"
    )
    refused(r"no CRS", labels=fields.set_crs(None, allow_override=True), rasterize="crop")
    refused(r"found str; expected a GeoDataFrame", labels="fields.gpkg", rasterize="crop")


# Several columns at once


def test_several_columns_are_burned_each_by_itself(
    optical: rd.Collection, fields: gpd.GeoDataFrame, tmp_path: Path
) -> None:
    wide = fields.assign(**{"yield": fields["yield"].where(np.arange(60) % 3 > 0)})
    columns = ["crop", "yield", "number", "organic"]
    chips = optical.chips(
        SIZE, cell_km=0.64, labels=wide, rasterize=columns, classes={"crop": [*CROPS[::-1], "oats"]}
    ).split(0.5, 0.25, 0.25, seed=1)
    train = chips.select("train")
    known = wide["yield"].notna()
    numbers = [1 + CROPS[::-1].index(crop) for crop in wide["crop"]]
    wanted = {
        "mask_crop": oracle(train.table, wide, numbers, "uint8"),
        "mask_yield": oracle(train.table, wide[known], wide["yield"][known], "float32", np.nan),
        "mask_number": oracle(train.table, wide, wide["number"], "uint8"),
        "mask_organic": oracle(train.table, wide, wide["organic"].astype(int), "uint8"),
    }
    place = str(tmp_path / "several.zarr")
    train.to_zarr(place, progress=False)
    stored = open_chips(place)
    classes = ["", *CROPS[::-1], "oats"]
    for found in (train.load(), train.to_xarray(), xr.open_zarr(place), stored.load(), stored.to_xarray()):
        assert isinstance(found, xr.Dataset)
        assert "mask" not in found
        for name, masks in wanted.items():
            assert found[name].dtype == masks.dtype
            np.testing.assert_array_equal(found[name].values, masks)
        assert found["mask_crop"].attrs == {"long_name": "crop", "classes": classes}
        assert found["mask_yield"].attrs == {"long_name": "yield"}
    place_of = {one: at for at, one in enumerate(train.table.column("chip_id").to_pylist())}
    for stream in (train.stream(7), stored.stream(7)):
        assert stream.classes == {"s2/mask_crop": tuple(classes)}
        for batch in stream:
            rows = [place_of[one] for one in batch["chip_id"].tolist()]
            for name, masks in wanted.items():
                np.testing.assert_array_equal(batch[f"s2/{name}"], masks[rows])
    assert rd.verify(place, sources=2).compared == 2
    write_job(train.job, str(tmp_path / "job"))
    again = open_job(str(tmp_path / "job"), train.job.digest)
    assert [one.note for one in again.labels] == [one.note for one in train.job.labels]
    for mine, theirs in zip(train.job.labels, again.labels, strict=True):
        assert mine.table.equals(theirs.table)
    # each mask is a target of its own, of those that read and of those that count
    for stats in (train.stats(progress=False), stored.stats(progress=False)):
        counts = {row["value"]: row["count"] for row in stats.classes("s2/mask_crop").to_pylist()}
        assert counts == {n: int((wanted["mask_crop"] == n).sum()) for n in range(5)}
        assert stats.sources["s2/mask_yield"].count[0] == np.isfinite(wanted["mask_yield"]).sum()
    shares = train.class_shares("s2/mask_number", progress=False)
    for name in shares.column_names[1:]:
        value = int(name.removeprefix("share_"))
        expected = [float((mask == value).mean()) for mask in wanted["mask_number"]]
        assert [
            dict(zip(shares["chip_id"].to_pylist(), shares[name].to_pylist(), strict=True))[one]
            for one in place_of
        ] == expected
    any_label = np.logical_or.reduce(
        [m != 0 if m.dtype.kind != "f" else ~np.isnan(m) for m in wanted.values()]
    )
    kept = train.filter_pixels(min_labelled=0.5).load()
    assert kept.sizes["chip"] == (any_label.mean(axis=(1, 2)) >= 0.5).sum()
    dealt = chips.split(0.5, 0.25, 0.25, seed=1, stratify="crop")
    assert set(dealt.audit().classes) == {"crop"}
    drawn = chips.random(12, seed=1, size=16, balance="crop")
    assert len(set(drawn.table.column("centre_class").to_pylist())) == 3


def test_one_column_in_a_list_is_one_of_several(optical: rd.Collection, fields: gpd.GeoDataFrame) -> None:
    alone = optical.chips(SIZE, cell_km=0.64, labels=fields, rasterize="crop").sample(4)
    listed = optical.chips(SIZE, cell_km=0.64, labels=fields, rasterize=["crop"]).sample(4)
    np.testing.assert_array_equal(listed.load()["mask_crop"].values, alone.load()["mask"].values)
    named = optical.chips(
        SIZE, cell_km=0.64, labels=fields, rasterize="crop", classes={"crop": [*CROPS]}
    ).sample(4)
    assert (
        named.plan
        == optical.chips(SIZE, cell_km=0.64, labels=fields, rasterize="crop", classes=CROPS).sample(4).plan
    )


def test_several_columns_that_cannot_be_are_refused(optical: rd.Collection, fields: gpd.GeoDataFrame) -> None:
    def chips(**asked: Any) -> rd.Chips:
        return optical.chips(SIZE, cell_km=0.64, **{"labels": fields} | asked)

    with pytest.raises(rd.PlanError, match="a mapping: column to its classes"):
        chips(rasterize=["crop", "number"], classes=[*CROPS])
    chips(rasterize=["crop", "number"], classes={"crop": [*CROPS]})
    with pytest.raises(rd.PlanError, match="classes of 'corp'"):
        chips(rasterize=["crop", "number"], classes={"corp": [*CROPS]})
    for columns, words in (
        (["crop", "crop"], "twice"),
        ([], "no column"),
        (["crop", "corp"], "no such column"),
    ):
        with pytest.raises(rd.PlanError, match=words):
            chips(rasterize=columns)
    with pytest.raises(rd.PlanError, match="class 'maize'"):
        chips(rasterize=["crop", "number"], classes={"crop": ["beet", "wheat"]})
    empty = fields.assign(**{"yield": np.nan})
    with pytest.raises(rd.PlanError, match="no value in any of 60 rows"):
        chips(labels=empty, rasterize=["crop", "yield"])
    named = chips(rasterize=["crop", "number"]).sample(3)
    table = pa.table({"chip_id": named.table.column("chip_id"), "mask_crop": [1, 2, 3]})
    with pytest.raises(rd.PlanError, match="a column 'mask_crop', as its mask is called"):
        named.with_table(table).load()
    assert len(named.with_table(table.rename_columns(["chip_id", "own_mask_crop"])).load()["chip"])
