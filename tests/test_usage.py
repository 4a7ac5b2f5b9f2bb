"""What a job uses and costs: hours, requests and bytes of plans and of finished jobs, at anybody's prices."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dask
import pytest
from hypothesis import given
from hypothesis import strategies as st

import rasteret_dask as rd
from rasteret_dask.cli.app import main
from rasteret_dask.errors import PlanError
from rasteret_dask.store.jobreport import JobReport
from rasteret_dask.store.manifest import table_of
from rasteret_dask.tasks.usage import GB, Usage, hours_text

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")

PRICES = ("worker_hour", "requests_1000", "puts_1000", "gb_egress")
amounts = st.builds(
    Usage, st.floats(0, 1e6), st.integers(0, 10**9), st.integers(0, 10**7), st.integers(0, 10**15)
)
prices = st.dictionaries(st.sampled_from(PRICES), st.floats(1e-6, 1e3), min_size=1)


# -- prices


@given(amounts, prices)
def test_a_cost_is_the_sum_of_amounts_times_prices(used: Usage, price: dict[str, float]) -> None:
    assert used.worker_hours is not None
    assert used.read_bytes is not None
    each = {
        "worker_hour": used.worker_hours, "requests_1000": used.requests / 1000, "puts_1000": used.puts / 1000,
        "gb_egress": used.read_bytes / GB,
    }  # fmt: skip
    cost = used.cost(**price)
    assert cost.total == pytest.approx(sum(each[name] * value for name, value in price.items()))
    assert min(cost.workers, cost.reading, cost.writing, cost.egress) >= 0
    apart = [used.cost(**{name: value}).total for name, value in price.items()]
    assert cost.total == pytest.approx(sum(apart))
    dearer = used.cost(**{name: 2 * value for name, value in price.items()})
    assert dearer.total == pytest.approx(2 * cost.total)
    assert f"{cost.total:.4g}" in repr(cost)
    assert f"{cost.total:.4g}" in cost._repr_html_()


@pytest.mark.parametrize("price", [-0.1, math.nan, math.inf, True, "0.1", None])
@pytest.mark.parametrize("name", PRICES)
def test_what_is_no_price(name: str, price: Any) -> None:
    with pytest.raises(PlanError, match=name):
        Usage(1.0, 1, 1, 1).cost(**{name: price})


def test_what_is_unknown_has_no_price() -> None:
    unknown = Usage(None, 10, 10, None)
    with pytest.raises(PlanError, match="no price"):
        unknown.cost()
    with pytest.raises(PlanError, match="probe=True"):
        unknown.cost(worker_hour=0.1)
    with pytest.raises(PlanError, match="sample"):
        unknown.cost(gb_egress=0.1)
    assert unknown.cost(requests_1000=1.0).total == 0.01
    assert repr(unknown).count("unknown") == 2


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_hours_are_text_that_keeps_their_order(some: float, more: float) -> None:
    few, many = sorted((some, more))
    values = [float(hours_text(h).replace(",", "").replace("under 0.01", "0.005")) for h in (few, many)]
    assert values == sorted(values)


# -- of a plan


@pytest.fixture(scope="module")
def chips(s2: rd.Collection) -> rd.Chips:
    """Return chips of three splits."""
    planned = s2.harmonize(["red", "nir"], mask="clouds", time="1MS").chips(32, cell_km=0.64)
    return planned.split(0.5, 0.25, 0.25, seed=3)


@pytest.fixture(scope="module")
def report(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> JobReport:
    """Return what writing them took, on one thread."""
    with dask.config.set(num_workers=1):
        return chips.to_zarr(tmp_path_factory.mktemp("usage") / "all.zarr", progress=False)


HOW: list[Callable[[JobReport], Any]] = [lambda _: "50 MB/s", lambda report: report]


@pytest.mark.parametrize("rate", HOW, ids=["rate", "report"])
def test_hours_go_with_the_chips_that_are_selected(
    chips: rd.Chips, report: JobReport, rate: Callable[[JobReport], Any]
) -> None:
    """No part takes longer than the whole, and parts take at least as long as the whole: they may share tiles."""
    how: dict[str, Any] = {"workers": 2, "threads": 2, "rate": rate(report)}
    whole = chips.explain(**how)["worker_hours"]
    parts = [chips.select(split).explain(**how)["worker_hours"] for split in ("train", "val", "test")]
    assert all(0 < part <= whole for part in parts)
    assert sum(parts) >= whole * (1 - 1e-9)
    few = chips.sample(len(chips) // 4).explain(**how)["worker_hours"]
    assert 0 < few < whole


def test_hours_go_with_speed_and_not_with_the_number_of_workers(chips: rd.Chips) -> None:
    plain = chips.explain(rate="50 MB/s")["worker_hours"]
    assert chips.explain(rate="100 MB/s")["worker_hours"] == pytest.approx(plain / 2)
    for workers in (1, 2, 8):
        told = chips.explain(workers=workers, threads=3, rate="50 MB/s")
        again = told["workers"]["read_bytes"] / told["read_bytes"]  # what two workers need is fetched twice
        assert told["worker_hours"] == pytest.approx(plain * again)
        assert told["worker_hours"] == pytest.approx(told["time"]["seconds"] * workers / 3600)


def test_hours_are_the_same_wherever_they_are_told(chips: rd.Chips, report: JobReport) -> None:
    told = chips.explain(workers=2, rate=report)
    assert (
        told.usage.worker_hours
        == told["worker_hours"]
        == json.loads(json.dumps(told.to_dict()))["worker_hours"]
    )
    text = hours_text(told["worker_hours"])
    assert any(line.split(None, 2) == ["worker", "hours", text] for line in str(told).splitlines())
    assert text in told._repr_html_()
    plain = chips.explain()
    assert plain["worker_hours"] is plain.usage.worker_hours is None
    assert "worker hours" not in str(plain)
    assert plain.usage.requests == plain["requests"]
    assert told.usage.requests == told["workers"]["requests"]


def test_of_blocks_as_of_chips(
    chips: rd.Chips, report: JobReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rasteret_dask import chipblocks

    blocks = chips.by_blocks(tmp_path / "plan", progress=False)
    how: dict[str, Any] = {"workers": 2, "threads": 2, "rate": report}
    whole = chips.explain(**how)
    assert blocks.explain(**how).to_dict() == whole.to_dict()
    monkeypatch.setattr(chipblocks, "EXPLAINED", len(chips) // 2)
    for told in (blocks.explain(**how), blocks.explain(rate="50 MB/s")):
        assert told["worker_hours"] == pytest.approx(
            told["time"]["processes"] * told["time"]["seconds"] / 3600
        )
    assert blocks.explain(**how)["worker_hours"] == pytest.approx(whole["worker_hours"], rel=0.7)
    assert blocks.explain()["worker_hours"] is None


# -- of a finished job


def clocked(report: JobReport, seconds: float, reading: float) -> JobReport:
    """Return it as if its shards had been one after another, each taking ``seconds``, of them ``reading`` of them."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    rows = [
        {
            **row,
            "started": start + timedelta(seconds=at * seconds),
            "seconds": seconds,
            "stages": {"read/s2": reading},
        }
        for at, row in enumerate(report.table.to_pylist())
    ]
    return JobReport.of_manifest(report.store, table_of(rows))


def test_a_plan_s_estimate_from_a_job_is_what_the_job_took(chips: rd.Chips, report: JobReport) -> None:
    """Of the same chips: only its bytes differ, as a request for neighbours fetches the gaps between them."""
    job = clocked(report, seconds=8.0, reading=2.0)
    assert job.worker_hours == pytest.approx(8.0 * job.shards / 3600)
    told = chips.explain(workers=1, threads=1, rate=job)
    again = told["workers"]["read_bytes"] / job.bytes_fetched
    assert told["worker_hours"] == pytest.approx((6.0 + 2.0 * again) * job.shards / 3600)
    assert again == pytest.approx(1.0, rel=0.2)
    assert told.usage.requests >= report.usage.requests > 0
    assert told.usage.puts >= report.usage.puts
    assert told["write_bytes"] >= report.bytes_written


def test_requests_that_write_are_the_objects_of_the_shards(report: JobReport) -> None:
    """The arrays of each, its report, and the mark of its try."""
    there = [path for path in Path(report.store).rglob("*") if path.is_file()]
    arrays = {str(path.relative_to(report.store)) for path in there}
    named = {o["path"] for row in report.table["objects"].to_pylist() for o in row}
    assert named <= arrays
    assert report.usage.puts == len(named) + 2 * report.shards


def test_a_report_that_was_read_back_says_the_same(report: JobReport) -> None:
    again = rd.job_report(report.store)
    assert again.usage == report.usage
    assert again.to_dict()["worker_hours"] == report.worker_hours
    assert f"{hours_text(report.worker_hours or 0)} worker hours" in repr(report)


shards = st.lists(
    st.tuples(st.sampled_from(["a:1", "a:2", "b:1"]), st.integers(0, 40), st.integers(0, 15)), max_size=20
)


@given(shards)
def test_worker_hours_are_the_seconds_in_which_a_process_has_a_shard(
    drawn: list[tuple[str, int, int]],
) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    rows = [
        {
            "shard": str(at),
            "process": name,
            "started": start + timedelta(seconds=begin),
            "seconds": float(length),
            "clipped": "{}",
            "attempts": 1,
        }
        for at, (name, begin, length) in enumerate(drawn)
    ]
    report = JobReport.of_manifest("x", table_of(rows))
    busy = {(name, begin + at) for name, begin, length in drawn for at in range(length)}
    if not drawn:
        assert report.worker_hours is None
    else:
        assert report.worker_hours is not None
        assert report.worker_hours * 3600 == pytest.approx(len(busy), abs=1e-3)
        assert report.worker_hours * 3600 <= sum(length for _, _, length in drawn) + 1e-3


def test_a_report_without_times_says_no_rate(chips: rd.Chips, report: JobReport) -> None:
    old = JobReport.of_manifest(
        "old.zarr", report.table.drop_columns(["host", "worker", "started", "seconds", "stages"])
    )
    assert old.worker_hours is None
    with pytest.raises(PlanError, match="holds no times"):
        chips.explain(rate=old)
    with pytest.raises(PlanError, match="job_report"):
        chips.explain(rate=[1])  # type: ignore[arg-type]


# -- on the command line


def test_the_command_line_says_what_python_does(
    small_world: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "job.toml"
    recipe.write_text(
        f'[collections.s2]\nstac = "{small_world.sentinel2}"\nharmonize = {{ bands = ["red"], time = "1MS" }}\n'
        '[chips]\nsize = 32\ncell_km = 0.64\n[[outputs]]\nzarr = "job.zarr"\n'
    )
    written = rd.load_recipe(recipe)

    def told(*more: str) -> dict[str, Any]:
        assert not main(["explain", str(recipe), "--json", *more])
        answers = json.loads(capsys.readouterr().out)
        (answer,) = answers.values()
        assert isinstance(answer, dict)
        return answer

    def python(**how: Any) -> dict[str, Any]:
        (one,) = written.explain(**how).values()
        return one.to_dict()

    assert told() == python()
    assert told("--workers", "4", "--threads", "2", "--rate", "50 MB/s") == python(
        workers=4, threads=2, rate="50 MB/s"
    )
    assert told("--probe")["worker_hours"] > 0
    assert not main(["run", str(recipe), "--quiet"])
    capsys.readouterr()
    store = tmp_path / "job.zarr"
    assert told("--rate", str(store)) == python(rate=rd.job_report(store))
    assert main(["explain", str(recipe), "--rate", "fast"])
    assert "fast" in capsys.readouterr().err
