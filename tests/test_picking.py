"""Chips are what a dull interpreter over rasterio makes of the records, for every pick, mask, unit and type."""

from __future__ import annotations

import datetime as dt
import functools
import statistics
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import rasterio
import xarray as xr
from affine import Affine
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from passing import BANDS, CELLS, SIDE, Asked, Passing, Scene, assert_interpreted, make

import rasteret_dask as rd
from rasteret_dask.rules.picks import PICKS, Composed, Scored
from rasteret_dask.tasks.freezing import freeze
from rasteret_dask.tasks.pixels import members_of, merged
from rasteret_dask.words import Dtype

Array = np.ndarray[Any, Any]

DTYPES = ("uint8", "int8", "uint16", "int16", "int32", "float32")


World = Callable[[str, bool], Passing]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return what makes the world of a type of numbers, once; of one scale, raw numbers can be mixed."""
    folder = tmp_path_factory.mktemp("passing")

    @functools.cache
    def world(dtype: str, one_scale: bool) -> Passing:
        return make(folder, DTYPES.index(dtype) + 10 * one_scale, dtype=dtype, one_scale=one_scale)

    return world


def cloud_of(own: Any) -> float:
    figures = [s.cloud for s in own if s.cloud is not None]
    return float(np.mean(figures)) if figures else np.inf


ORDERS: dict[str, Any] = {
    "closest": lambda own, distance: distance,
    "first": lambda own, distance: own[0].start,
    "last": lambda own, distance: -own[0].start.value,
    "newest": lambda own, distance: -own[0].start.value,
    "least_cloudy": lambda own, distance: cloud_of(own),
}


def commonest(values: list[float], ranks: list[int]) -> float:
    return min(Counter(values).items(), key=lambda one: (-one[1], one[0]))[0]


def middle(values: list[float], ranks: list[int]) -> float:
    return float(np.float32(statistics.median(values)))


def average(values: list[float], ranks: list[int]) -> float:
    return float(np.float32(sum(values) / len(values)))


BLENDS: dict[str, Any] = {"mean": average, "median": middle, "majority": commonest}
CLOUDS = (3, 8, 9, 10)


def unchanged(band: str, values: Array) -> tuple[Array, Array]:
    return values, np.zeros(values.shape, bool)


def whole(band: str, values: Array) -> tuple[Array, Array]:
    return np.rint(values), np.zeros(values.shape, bool)


def as_steps(low: int, high: int) -> Any:
    def encode(band: str, values: Array) -> tuple[Array, Array]:
        number = np.rint(np.nan_to_num(values.astype(np.float32).astype(np.float64)) * 1e4)
        return np.clip(number, low, high), ~np.isnan(values) & ((number < low) | (number > high))

    return encode


def scaled(band: str, stored: Array, scene: Scene) -> Array:
    if band == "cls":
        return stored
    scale, offset = scene.scaling
    return (stored.astype(np.float64) * scale + offset).astype(np.float32)


def decibels(values: Array) -> Array:
    power = np.where(values > 0, values, np.nan).astype(np.float32).astype(np.float64)
    return (10 * np.log10(power)).astype(np.float32)


STEPS = {"uint16": as_steps(0, 65534), "int16": as_steps(-32767, 32767)}


CASES = st.fixed_dictionaries(
    {
        "pick": st.sampled_from(sorted(PICKS)),
        "dtype": st.sampled_from(DTYPES),
        "masked": st.booleans(),
        "units": st.sampled_from(["physical", "raw", "reflectance", "decibel"]),
        "min_coverage": st.sampled_from([0.0, 0.4, 1.0]),
        "fill": st.sampled_from([None, True, False]),
        "bands": st.sampled_from([BANDS, ("cls",), ("b", "cls"), ("a",)]),
        "output": st.sampled_from([None, "uint16", "int16"]),
    }
)


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(CASES)
def test_chips_are_those_of_the_interpreter(worlds: World, case: dict[str, Any]) -> None:
    """All picks, filled or not, masked or not, in all units, of all types of numbers, into all types of output."""
    word, dtype, units = case["pick"], case["dtype"], case["units"]
    masked, min_coverage, output = case["masked"], case["min_coverage"], case["output"]
    pick, bands = PICKS[word], case["bands"]
    how: dict[str, Any] = {"pick": word, "time": "1MS", "units": units}
    if not isinstance(pick, Composed):
        how["fill"] = case["fill"]
    filled = pick.fills if how.get("fill") is None else bool(how["fill"])
    if units in ("reflectance", "decibel"):
        bands = ("a", "b")
    if units in ("physical", "raw", "decibel"):
        output = None
    world = worlds(dtype, units == "raw")
    fill: Any = np.nan
    encode: Any = unchanged
    stored = np.result_type(*(dtype if band != "cls" else "uint8" for band in bands))
    if units == "raw" or bands == ("cls",):
        fill, encode = (0, whole) if stored.kind in "iu" else (np.nan, encode)
    if output is not None:
        how["dtype"], fill, encode = output, {"uint16": 65535, "int16": -32768}[output], STEPS[output]
    own = BLENDS.get(word)
    asked = Asked(
        bands,
        order=ORDERS.get(word),
        score=(lambda clear: clear.sum()) if isinstance(pick, Scored) else None,
        blends={} if own is None else {b: commonest if b == "cls" else own for b in bands},
        fill=filled,
        hidden=(lambda read: np.isin(read["scl"], CLOUDS)) if masked else None,
        decode=(lambda band, stored, scene: stored) if units == "raw" else scaled,
        encode=encode,
        finish=decibels if units == "decibel" else (lambda values: values),
        min_coverage=min_coverage,
        coverage_first=word != "newest",
    )
    source = world.source.harmonize(bands, mask="clouds" if masked else None, **how)
    chips = source.chips(SIDE, min_coverage=min_coverage, **CELLS)
    assert assert_interpreted(world.scenes, chips, asked, fill) > 10 * SIDE * SIDE


@pytest.mark.parametrize("pick", ["least_cloudy", "first", "median"])
def test_memory_of_the_caller_shows_nothing_that_it_held(worlds: World, pick: Any) -> None:
    """Every pixel is written, and whether it is valid, where no record feeds a slot too."""
    source = worlds("uint16", True).source.harmonize(
        ("a", "b"), mask="clouds", pick=pick, time="1MS", units="raw"
    )
    job = freeze(source.chips(SIDE, min_coverage=0.0, **CELLS).planned)
    empty = 0
    for shard in job.shards():
        expected = merged(job, shard, 0, members_of(job, shard, 0))
        memory = (
            np.full(expected.pixels.shape, 77, expected.pixels.dtype),
            np.ones(expected.valid.shape, bool),
        )
        found = merged(job, shard, 0, members_of(job, shard, 0), into=memory)
        xr.testing.assert_identical(found.drop_attrs(deep=False), expected.drop_attrs(deep=False))
        assert np.shares_memory(found.valid.values, memory[1])
        empty += int((expected.member == "").sum())
    assert empty


# Units of bands, and records of several scales


@pytest.fixture(scope="module")
def thermal(tmp_path_factory: pytest.TempPathFactory) -> rd.Collection:
    """A scene of Landsat whose files all hold 9000: reflectance, temperature and bits."""
    folder = tmp_path_factory.mktemp("thermal")
    for band in ("B4", "B5", "B10", "qa_pixel"):
        with rasterio.open(
            folder / f"{band}.tif", "w", driver="GTiff", width=64, height=64, count=1, dtype="uint16",
            crs="EPSG:32630", transform=Affine(30, 0, 487005, 0, -30, 5929995),
        ) as file:  # fmt: skip
            file.write(np.full((64, 64), 9000, "u2"), 1)
    kind = pa.map_(pa.string(), pa.struct([("href", pa.string())]))
    hrefs = [(b, {"href": str(folder / f"{b}.tif")}) for b in ("B4", "B5", "B10", "qa_pixel")]
    table = pa.table(
        {
            "id": ["r"],
            "datetime": pa.array([dt.datetime(2020, 9, 27, tzinfo=dt.UTC)], pa.timestamp("us", "UTC")),
            "geometry": pa.nulls(1, pa.binary()),
            "assets": pa.array([hrefs], kind),
        }
    )
    return rd.build_from_table(table, name="l8", dataset="landsat-c2-l2")


ALONE = {
    "red": ("reflectance", 9000 * 2.75e-5 - 0.2),
    "nir": ("reflectance", 9000 * 2.75e-5 - 0.2),
    "B10": ("kelvin", 9000 * 0.00341802 + 149),
    "qa_pixel": ("raw", 9000.0),
}


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.permutations(sorted(ALONE)), st.integers(1, 4))
def test_a_band_s_unit_does_not_depend_on_its_neighbours(
    thermal: rd.Collection, order: list[str], number: int
) -> None:
    bands = order[:number]
    chips = thermal.harmonize(bands).chips(16, cell_km=0.96).sample(1)
    dataset = chips.load()
    assert isinstance(dataset, xr.Dataset)
    assert list(chips.job.sources[0].units) == [ALONE[band][0] for band in bands]
    for band in bands:
        np.testing.assert_allclose(dataset["pixels"].sel(band=band).values, ALONE[band][1], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["uint16", "int16"])
@pytest.mark.parametrize(
    "bands", [["red", "B10", "nir"], ["B10", "red"], ["red", "qa_pixel"], ["qa_pixel", "B10", "red"]]
)
def test_integers_take_one_unit_and_the_line_that_joins_them_works(
    thermal: rd.Collection, bands: list[str], dtype: Dtype
) -> None:
    with pytest.raises(rd.PlanError, match="bands of several units: ") as caught:
        _ = thermal.harmonize(bands, dtype=dtype).chips(16, cell_km=0.96).table
    line = str(caught.value).split("sources of their own: ")[1].rstrip(".")
    chips = eval(line, {"rd": rd, "source": thermal}).chips(16, cell_km=0.96).sample(1).load()
    steps = {"reflectance": 1e4, "kelvin": 100.0}
    seen = []
    for unit, node in chips.children.items():
        for band in node["band"].values.tolist():
            stored = node["pixels"].sel(band=band)
            assert unit == ALONE[band][0]
            expected = ALONE[band][1] if unit == "raw" else np.rint(np.float32(ALONE[band][1]) * steps[unit])
            assert stored.dtype == np.dtype("uint16" if unit == "raw" else dtype)
            assert (stored.values == min(expected, np.iinfo(stored.dtype).max)).all()
            seen.append(band)
    assert sorted(seen) == sorted(bands)


@pytest.mark.parametrize(
    ("how", "refused"),
    [
        ({"pick": "mean"}, True), ({"pick": "median"}, True), ({"fill": True}, True), ({"pick": "newest"}, True),
        ({"pick": "majority"}, True), ({"pick": "closest"}, False), ({"pick": "clearest"}, False),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("where", ["records", "members", "granules"])
def test_raw_numbers_of_several_scales_are_never_mixed(
    tmp_path: Path, how: dict[str, Any], refused: bool, where: str
) -> None:
    """One collection whose items have other offsets is no better than two, and one pass of two granules neither."""
    items = []
    for number, offset in enumerate((0.0, -0.1)):
        path = tmp_path / f"{number}.tif"
        with rasterio.open(
            path, "w", driver="GTiff", width=64, height=64, count=1, dtype="uint16", crs=32633, nodata=0,
            transform=Affine(10, 0, 500_000, 0, -10, 5_540_000),
        ) as file:  # fmt: skip
            file.write(np.full((64, 64), 2000 + 1000 * number, "u2"), 1)
        day = 1 if where == "granules" else number + 1
        asset = {"href": str(path), "type": "image/tiff", "raster:bands": [{"scale": 1e-4, "offset": offset}]}
        properties = {"datetime": f"2023-06-{day:02d}T10:00:00Z"}
        item = {"type": "Feature", "stac_version": "1.0.0", "id": f"i{number}", "collection": "things"}
        items.append({**item, "geometry": None, "properties": properties, "assets": {"x": asset}})
    if where == "members":
        source = rd.merge(*(rd.build_from_stac([item], name=str(item["id"])) for item in items))
    else:
        source = rd.build_from_stac(items, name="x")
    raw = source.harmonize(units="raw", time="1MS", **how).chips(16, cell_km=0.16)
    if refused or where != "records":
        with pytest.raises(
            rd.PlanError, match=r"different radiometry: 0.0001 x DN \+ -0.1.*units='physical'"
        ):
            _ = raw.table
    else:
        assert len(raw)
    chips = source.harmonize(time="1MS", **how).chips(16, cell_km=0.16).load()
    assert isinstance(chips, xr.Dataset)
    np.testing.assert_allclose(chips["pixels"].values, 0.2, rtol=1e-6)
