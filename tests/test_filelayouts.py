"""Files are told apart by their layouts, column by column: what is read of a layout is looked at once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_records import record, table
from test_tilecount import job_of

from rasteret_dask.errors import BandError, GridError
from rasteret_dask.reader import kernels
from rasteret_dask.reader.kernels import Places, grids_alike
from rasteret_dask.reader.pixelgrid import Grid
from rasteret_dask.reader.readplan import choose
from rasteret_dask.table.filelayouts import FileLayouts
from rasteret_dask.table.records import Asset, Records
from rasteret_dask.tasks.jobkernels import job_readings

pytestmark = [
    pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning"),
    pytest.mark.filterwarnings("ignore::rasteret_dask.errors.UnknownKindWarning"),
]


def laid_out(asset: Asset) -> Any:
    """Return all that decides where pixels of a file lie and which are read."""
    levels = [
        (
            x.kind,
            x.transform,
            x.width,
            x.height,
            x.tile_width,
            x.tile_height,
            x.planar,
            x.samples,
            len(x.tile_offsets),
        )
        for x in asset.levels
    ]
    return (
        asset.epsg,
        asset.kind,
        asset.alpha,
        asset.placement,
        asset.size is None and asset.etag is None,
        levels,
    )


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "px": st.sampled_from([(64, 64), (64, 65)]), "tile_px": st.sampled_from([16, 32]),
                "epsg": st.sampled_from([32633, 32634]), "west": st.sampled_from([500_000.0, 500_010.0]),
                "bands": st.sampled_from([("B04",), ("B04", "B08"), ("B08", "B04")]),
            },
        ),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_numbers_are_equal_where_layouts_are(drawn: list[dict[str, Any]]) -> None:
    records = Records(table(*(record(f"r{n}", **more) for n, more in enumerate(drawn))))
    layouts = FileLayouts(records)
    seen: dict[int, Any] = {}
    for band in ("B08", "B04"):
        numbers = layouts.of(band).tolist()
        layouts.look_up(layouts.of(band))
        for row, number in enumerate(numbers):
            try:
                asset = records.asset(row, band)
            except BandError:
                with pytest.raises(BandError):
                    layouts.asset(number)
                continue
            assert (
                laid_out(layouts.asset(number)) == laid_out(asset) == seen.setdefault(number, laid_out(asset))
            )
    assert len({str(facts) for facts in seen.values()}) == len(seen)


HOWS: list[dict[str, Any]] = [
    {"resolution": 10.0}, {"resolution": 20.0, "time": "1MS"}, {"resolution": 7.5, "resampling": "cubic"},
    {"resolution": 30.0, "units": "reflectance"}, {"resolution": 40.0, "kinds": {"red": "class"}},
]  # fmt: skip


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(HOWS), st.booleans(), st.booleans())
def test_kernels_are_those_of_every_chip(how: dict[str, Any], joined: bool, split: bool) -> None:
    job = job_of(how=how, size=16, dates=2, shard_bytes=10**6, joined=joined, split=split)
    told = job_readings(job)
    for number, plan in enumerate(job.sources):
        for at, band in enumerate(plan.bands):
            unit, names, overviews = plan.rules.units[at], set(), False
            pairs = {
                (int(job.feeds.row[entry]), chip)
                for chip in range(job.chips.num_rows)
                for entry in range(int(job.feeds.offsets[chip]), int(job.feeds.offsets[chip + 1]))
                if job.feeds.source[entry] == number
            }
            for row, chip in sorted(pairs)[::7]:
                asset = job.records[number].asset(row, plan.members[int(job.members[number][row])].bands[at])
                west, _, _, north = job.bounds[chip].tolist()
                grid = Grid(int(job.epsg[chip]), west, north, plan.resolution, plan.resolution)
                read = choose(asset, grid, plan.resampling, unit if unit.kernel_on == "decoded" else None)
                names.add("copied" if read.corner is not None and read.level == 0 else read.kernel)
                overviews |= read.level > 0
                assert asset.dtype == told[plan.name][band].dtype
            assert (tuple(sorted(names)), overviews) == (
                told[plan.name][band].kernels,
                told[plan.name][band].overviews,
            )


def test_kernels_are_looked_at_once_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the dates and bands that have it: a header is one of thousands."""

    def calls(dates: int) -> Counter[str]:
        counted: Counter[str] = Counter()
        plain = choose

        def counting(asset: Asset, *more: Any) -> Any:
            counted["choose"] += 1
            return plain(asset, *more)

        def single(records: Records, row: int, band: str) -> Asset:
            counted["headers read one by one"] += 1
            return one(records, row, band)

        one = Records._asset
        job = job_of(how={"resolution": 20.0, "time": "1MS"}, size=16, dates=dates, shard_bytes=10**7,
                     joined=False, split=False)  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "choose", counting)
            patch.setattr(Records, "_asset", single)
            job_readings(job)
        return counted

    few = calls(1)
    assert few["headers read one by one"] == 0
    assert 0 < few["choose"] <= 2 * 5  # places, one of them in both zones
    assert few == calls(4)


edges = st.one_of(
    st.sampled_from([0.0, -0.0, -1e-12, 1e-12, 9.999999999, 10.0, 5_400_000.0, -4_990.0, 15.0]),
    st.integers(-(10**6), 10**6).map(float), st.floats(-1e7, 1e7),
)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([32633, 32634]), edges, edges), max_size=8))
def test_grids_are_alike_where_pixel_edges_meet(drawn: list[tuple[int, float, float]]) -> None:
    epsg = np.array([code for code, _, _ in drawn], dtype=np.int64)
    corner = np.array([place for _, *place in drawn], dtype=np.float64).reshape(-1, 2)
    numbers = grids_alike(epsg, corner, (10.0, 20.0)).tolist()
    phase = (np.round(corner / (10.0, 20.0) % 1.0, 6) % 1.0).tolist()
    plain = [(int(code), *edge) for code, edge in zip(epsg, phase, strict=True)]
    assert len(set(zip(numbers, plain, strict=True))) == len(set(numbers)) == len(set(plain))


def test_places_are_of_one_length() -> None:
    one = np.zeros(1, dtype=np.int64)
    with pytest.raises(GridError, match=r"arrays of shapes \(1,\), \(1,\), \(2,\), \(1, 2\)"):
        Places(one, one, np.zeros(2, dtype=np.int64), np.zeros((1, 2)), (10.0, 10.0))
