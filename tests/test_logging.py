"""What is logged: a line a phase, a line a shard, no secret, and nothing at all unless somebody asks."""

from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_write import layout_of

import rasteret_dask as rd
from rasteret_dask.compacting import compact
from rasteret_dask.demo.world import World
from rasteret_dask.store.run import run_zarr
from rasteret_dask.tasks.context import ReadContext

PACKAGE = Path(rd.__file__).parent
DATES = ("2024-04-01", "2024-06-30")


class Kept(logging.Handler):
    """Keeps records. pytest's own handler is silenced with Dask's while a local cluster runs."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    def lines(self, level: int) -> list[str]:
        return [record.getMessage() for record in self.records if record.levelno == level]


@pytest.fixture
def kept() -> Iterator[Kept]:
    """Return a handler that keeps all that the package logs."""
    handler, logger = Kept(), logging.getLogger("rasteret_dask")
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_each_phase_is_a_line_and_each_shard_one_more(small_world: World, tmp_path: Path, kept: Kept) -> None:
    s2 = rd.build_from_stac(small_world.sentinel2, name="s2", date_range=DATES)
    chips = s2.harmonize(bands=["red"], time="1MS", dtype="uint16").chips(32, cell_km=0.96).sample(40)
    layout, store = layout_of(chips, 40_000), str(tmp_path / "store")
    shards = [shard.name for shard in layout.job.shards()]
    assert len(shards) > 2
    run_zarr(layout, store, ReadContext(), None, False)
    stored = rd.open_chips(store)
    assert sum(len(batch["chip_id"]) for batch in stored.stream(4)) == 40
    stored.stats()
    compact(store, tmp_path / "compact")
    found = "\n".join(kept.lines(logging.INFO))
    for phase in (
        rf"build s2: {len(s2)} rows of \d+ items",
        r"plan: \d+ chips of 1 sources",
        rf"plan: 40 chips in {len(shards)} shards",
        rf"to_zarr {store}: prepared; 0 of {len(shards)} shards are written",
        rf"to_zarr {store}: {len(shards)} shards to write",
        rf"to_zarr {store}: committed",
        r"<Stream of 40 chips.*next: epoch 0, batch 0>: reading begins",
        r"<Stream of 40 chips.*ended",
        r"stats: \d+ tasks begin",
        r"stats: done in",
        rf"compact {tmp_path / 'compact'}: \d+ shards written",
    ):
        assert len(re.findall(phase, found)) == 1, f"{phase} in {found}"
    every = "\n".join(kept.lines(logging.DEBUG))
    for name in shards:
        assert len(re.findall(rf"^shard {name}: read \d+ chips of s2 in", every, re.MULTILINE)) == 1
        assert len(re.findall(rf"^shard {name}: \d+ chips in [\d.]+ s, seconds", every, re.MULTILINE)) == 1
    assert not kept.lines(logging.WARNING)


def test_a_shard_s_report_says_how_long_each_stage_took(s2: rd.Collection, tmp_path: Path) -> None:
    chips = s2.harmonize(bands=["red"], time="1MS", dtype="uint16").chips(32, cell_km=0.96).sample(10)
    chips.to_zarr(tmp_path / "store", progress=False)
    (report,) = (
        json.loads(path.read_text()) for path in (tmp_path / "store" / "_job" / "done").glob("*.json")
    )
    assert set(report["seconds"]) == {"read/s2", "compose/s2", "encode", "put"}
    assert all(0 <= value < 3600 for value in report["seconds"].values())
    assert report["seconds"]["read/s2"] > 0


SILENT = """
import sys
import rasteret_dask as rd
from rasteret_dask.tasks.context import ReadContext
s2 = rd.build_from_stac(sys.argv[1], name="s2", date_range=("2024-04-01", "2024-06-30"))
chips = s2.harmonize(bands=["red"], time="1MS", dtype="uint16").chips(32, cell_km=0.96).sample(10)
chips.to_zarr(sys.argv[2])
list(chips.stream(4))
chips.stats()
"""


def test_nothing_is_shown_beyond_the_line_of_progress(small_world: World, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SILENT, str(small_world.sentinel2), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    for line in done.stderr.splitlines():
        assert re.match(r"[01]/1 shards, ", line), done.stderr
    assert "1/1 shards" in done.stderr


def test_every_logger_hangs_below_the_package_and_is_silent_by_default() -> None:
    made = []
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text()
        if path not in (PACKAGE / "__init__.py", PACKAGE / "cli" / "options.py"):  # -v, while a command runs
            assert "addHandler" not in text, f"{path}: only the package's own file has a handler"
        assert "basicConfig" not in text or path == PACKAGE / "__init__.py"
        made += re.findall(r"getLogger\(([^)]*)\)", text)
    assert len(made) > 5
    # whose lines are filtered while they work for us: urllib3, and torch's by name
    others = {'"urllib3.connectionpool"', "name"}
    assert set(made) <= {"__name__", '"rasteret_dask"'} | others
    (handler,) = logging.getLogger("rasteret_dask").handlers
    assert isinstance(handler, logging.NullHandler)
    assert logging.getLogger("rasteret_dask").level == logging.NOTSET
