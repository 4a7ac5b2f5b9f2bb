"""The weekly job: each week that has ended gets a store, once, whatever happens in between."""

from __future__ import annotations

import datetime as dt
import importlib.util
import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from conftest import digests
from hypothesis import given
from hypothesis import strategies as st

import rasteret_dask as rd
from rasteret_dask.demo.world import World

SCRIPT = Path(__file__).parents[1] / "deploy" / "kubernetes" / "base" / "weekly" / "weekly.py"

RECIPE = """
[collections.s2]
dataset = "demo/sentinel-2-l2a"
date_range = ["2024-04-01", "2024-06-30"]
harmonize = { bands = ["red"], time = "7D", mask = "clouds" }

[chips]
size = 64
cell_km = 0.64

[split]
train = 0.7

[[outputs]]
zarr = "out/chips.zarr"
splits = ["train", "val"]
"""


def _module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("weekly", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WEEKLY = _module()


@pytest.fixture
def place(tmp_path: Path, small_world: World, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder where ``demo/world`` is the small world, with a recipe."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "world").symlink_to(small_world.sentinel2.parent.parent)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RASTERET_DASK_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    def weekly(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["weekly.py", "recipe.toml", *arguments])
        code = WEEKLY.main()
        told = capsys.readouterr()
        return code, told.out, told.err

    return weekly


DAYS = st.dates(dt.date(2000, 1, 1), dt.date(2100, 1, 1))


@given(DAYS, st.integers(1, 60))
def test_weeks_are_whole_neighbours_and_the_latest(until: dt.date, count: int) -> None:
    mondays = list(WEEKLY.mondays(until, count))
    assert len(mondays) == count
    assert all(monday.isoweekday() == 1 for monday in mondays)
    assert all(b - a == dt.timedelta(7) for a, b in itertools.pairwise(mondays))
    last_sunday = mondays[-1] + dt.timedelta(6)
    assert last_sunday <= until < last_sunday + dt.timedelta(7)


@given(DAYS)
def test_a_week_s_name_is_that_of_its_days(day: dt.date) -> None:
    (monday,) = WEEKLY.mondays(day + dt.timedelta(6 - day.weekday()), 1)
    assert WEEKLY.name_of(monday) == day.strftime("%G-W%V")


WEEKS = ("--today", "2024-05-01", "--lag-days", "2", "--weeks", "3")
"""Of which the second has no scene."""


def test_a_week_is_done_once(place: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    code, out, err = run(*WEEKS)
    assert code == 0, err
    assert [line.partition(".")[0] for line in out.splitlines()] == [
        "2024-W15: begins", "2024-W16: begins", "2024-W16: nothing", "2024-W17: begins",
    ]  # fmt: skip
    stores = sorted(path.name for path in (place / "out").iterdir())
    assert stores == ["chips-2024-W15.zarr", "chips-2024-W17.zarr"]
    before = digests(place / "out")
    code, out, err = run(*WEEKS)
    assert code == 0, err
    assert out.startswith("2024-W15: finished\n2024-W16: begins\n2024-W16: nothing. ")
    assert out.endswith("2024-W17: finished\n")
    assert digests(place / "out") == before
    # splits belong to the ground: the same in each week
    first, second = (
        {row["chip_id"]: row["split"] for row in rd.open_chips(place / "out" / name).table.to_pylist()}
        for name in stores
    )
    assert first.keys() & second.keys()
    assert all(first[chip] == second[chip] for chip in first.keys() & second.keys())


@pytest.mark.parametrize(
    "line", ["subset = { cloud_cover_lt = 0 }", "subset = { bbox = [-60.0, 0.0, -59.9, 0.1] }"]
)
def test_a_week_whose_filters_leave_nothing_is_no_failure(
    place: Path, run: Callable[..., tuple[int, str, str]], line: str
) -> None:
    (place / "recipe.toml").write_text(RECIPE.replace("harmonize", f"{line}\nharmonize"))
    code, out, err = run("--today", "2024-04-17", "--lag-days", "2", "--weeks", "1")
    assert (code, err) == (0, "")
    assert "2024-W15: nothing. recipe" in out


def test_a_week_that_was_stopped_is_finished(place: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    week = ("--today", "2024-04-17", "--lag-days", "2", "--weeks", "1")
    assert run(*week)[0] == 0
    whole = digests(place / "out")
    (place / "out" / "chips-2024-W15.zarr" / "zarr.json").unlink()  # it is written last
    code, out, err = run(*week)
    assert (code, out) == (0, "2024-W15: begins\n"), err
    assert digests(place / "out").keys() == whole.keys()
    assert run(*week)[1] == "2024-W15: finished\n"


def test_another_week_goes_on_where_one_fails(place: Path, run: Callable[..., tuple[int, str, str]]) -> None:
    (place / "out").mkdir()
    (place / "out" / "chips-2024-W15.zarr").write_text("a file, no folder")
    code, _, err = run(*WEEKS)
    assert code == 1
    assert "2024-W15: " in err
    assert rd.open_chips(place / "out" / "chips-2024-W17.zarr").table.num_rows


def test_a_recipe_that_makes_no_sense_is_not_tried_again(place: Path) -> None:
    def code(text: str) -> tuple[int, str]:
        (place / "recipe.toml").write_text(text)
        done = subprocess.run(
            [sys.executable, SCRIPT, "recipe.toml"], capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr

    # the code that the CronJob's podFailurePolicy ends the job for
    assert code(RECIPE.replace("size", "syze"))[0] == 2
    table = RECIPE.replace("out/chips.zarr", "out/chips.parquet").replace("zarr =", "table =")
    returned, message = code(table)
    assert returned == 2
    assert "found no store; expected an [[outputs]] with zarr" in message
