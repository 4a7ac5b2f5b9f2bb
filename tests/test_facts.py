"""Times as items write them, and as every step after that takes them."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from rasterio.transform import Affine
from rasterio.warp import transform_bounds

import rasteret_dask as rd
from rasteret_dask.table.facts import instant, range_of
from rasteret_dask.table.timing import half_open

times = st.datetimes(dt.datetime(1, 1, 2), dt.datetime(9999, 12, 30))


@given(
    times,
    st.sampled_from("Tt "),
    st.sampled_from(["Z", "z", "+00:00", "-00:00", ""]),
    st.integers(0, 9),
)
def test_spelling_does_not_change_a_time(moment: dt.datetime, between: str, zone: str, digits: int) -> None:
    text = moment.isoformat(between, "seconds")
    fraction = f"{moment.microsecond:06d}000"[:digits]
    found = instant(text + (f".{fraction}" if fraction else "") + zone)
    assert found is not None
    micro = int(fraction[:6].ljust(6, "0")) if fraction else 0
    assert found == moment.replace(microsecond=micro, tzinfo=dt.UTC)


@given(times, st.sampled_from("Tt "), st.sampled_from(["Z", "z", "+00:00"]), st.sampled_from(["", ".5"]))
def test_a_leap_second_stays_in_its_minute(moment: dt.datetime, between: str, zone: str, rest: str) -> None:
    text = f"{moment.isoformat(between, 'minutes')}:60{rest}{zone}"
    found = instant(text)
    assert found == moment.replace(second=59, microsecond=999_999, tzinfo=dt.UTC)
    assert half_open((text, None)) == (found.isoformat(), None)


@pytest.mark.parametrize(
    ("text", "year"), [("9999-12-31T23:59:59-05:00", 9999), ("0001-01-01T00:00:00+14:00", 1)]
)
def test_utc_moves_no_time_out_of_the_calendar(text: str, year: int) -> None:
    found = instant(text)
    assert found is not None
    assert found.year == year


@pytest.mark.parametrize("text", ["2024-06-01T10:00:61Z", "2024-06-01T10:60:00Z", "spring", ""])
def test_what_is_no_time_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        instant(text)


@pytest.mark.parametrize("span", ["1500-01-01/9999-12-31", "9999/9999", "9999-12/.."])
def test_ranges_reach_to_the_calendar_s_end(span: str) -> None:
    start, end = half_open(span)
    assert start is not None
    assert (end or "9999") >= "9999"
    first, last = range_of(span)
    assert first is not None
    assert first.isoformat() == start
    assert last is None or last.year == 9999


@pytest.fixture(scope="module")
def raster(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("times") / "a.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=64, height=64, count=1, dtype="uint16", crs="EPSG:32633",
        transform=Affine(10, 0, 500000, 0, -10, 5540000), tiled=True, blockxsize=32, blockysize=32,
    ) as to:  # fmt: skip
        to.write(np.arange(64 * 64, dtype="uint16").reshape(1, 64, 64))
    return path


def scene(raster: Path, **properties: Any) -> dict[str, Any]:
    with rasterio.open(raster) as source:
        box = transform_bounds(source.crs, 4326, *source.bounds)
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": "a", "links": [], "geometry": None, "bbox": list(box),
        "properties": {"datetime": None, **properties},
        "assets": {"x": {"href": str(raster), "type": "image/tiff"}},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("start", "end"),
    [
        ("2000-01-01T00:00:00Z", "9999-12-31T23:59:59Z"),
        ("1500-01-01t00:00:00z", "9999-12-31 23:59:59-08:00"),
        ("0001-01-01T00:00:00Z", "1600-01-01T00:00:00Z"),
        ("2016-12-31T23:59:60Z", "2017-06-30T23:59:60.9Z"),
    ],
)
def test_far_intervals_pass_every_exit(raster: Path, tmp_path: Path, start: str, end: str) -> None:
    """From the item to the table, the filters, the acquisitions, cube and store."""
    item = scene(raster, start_datetime=start, end_datetime=end)
    built = rd.build_from_stac([item], name="a")
    built.export(tmp_path / "a.parquet")
    with rasterio.open(raster) as source:
        expected = source.read(1)
    for c in (built, rd.load(tmp_path / "a.parquet", name="a")):
        assert len(c.subset(date_range=("1400", "9999-12-31"))) == 1
        assert len(c.subset(date_range=(start, end))) == 1
        assert len(c.where("end_datetime", "<=", "9999-12-31T23:59:59.999999Z")) == 1
        assert len(c.where("start_datetime", "<=", start)) == 1
        assert c.describe().records == 1
        assert len(c.to_geopandas()) == 1
        cube = c.cube().compute()
        assert cube.shape == (1, 1, 64, 64)
        np.testing.assert_array_equal(cube[0, 0], expected)
        for timed in (c, c.harmonize(time="1YS")):
            chips = timed.chips(16, cell_km=0.16)
            assert len(chips.table)
            assert str(chips.explain())
    chips = built.harmonize(time="1YS").chips(16, cell_km=0.16)
    chips.to_zarr(tmp_path / "a.zarr", progress=False)
    stored = rd.open_chips(tmp_path / "a.zarr").load()
    assert float(stored["valid_fraction"].min()) == 1.0
    assert stored.sizes["chip"] == len(chips.table)


def test_tables_of_far_years(raster: Path) -> None:
    years = pa.table({
        "id": ["a", "b"], "datetime": pa.array([9999, 800], pa.int32()), "href": [str(raster)] * 2,
        "geometry": pa.array([None, None], pa.binary()),
    })  # fmt: skip
    c = rd.build_from_files(years, name="years", bands={"x": 0})
    times = c.to_table(["start_datetime", "end_datetime"]).to_pylist()
    assert [t["start_datetime"].year for t in times] == [9999, 800]
    assert [t["end_datetime"].year for t in times] == [9999, 801]
    texts = years.set_column(1, "datetime", pa.array(["2016-12-31 23:59:60z", "1066-10-14t09:00:00z"]))
    c = rd.build_from_files(texts, name="texts", bands={"x": 0})
    assert [t.year for t in c.to_table(["datetime"]).column(0).to_pylist()] == [2016, 1066]
    assert len(c.chips(16, cell_km=0.16).table)


def test_slots_of_a_far_range_are_those_that_nanoseconds_hold(raster: Path) -> None:
    item = scene(raster, datetime="2024-06-01T10:00:00z")
    c = rd.build_from_stac([item], name="a", date_range=("1500-01-01", "9999-12-31"))
    slots = c.harmonize(time="100YS", pick="first").chips(16, cell_km=0.16).planned.sources[0].plan.slots
    assert slots is not None
    assert [pd.Timestamp(t).year for t in slots] == [1678, 1778, 1878, 1978, 2078, 2178]
