"""The line of progress: in a log, on a terminal, and beside lines of their own."""

from __future__ import annotations

import io
import re

import dask
import pytest

from rasteret_dask.progress import Progress, seconds


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_in_a_log_time_alone_is_a_line_every_so_often(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("shards", True, 3) as shown:
        shown.step(1)
        for _ in range(5):
            shown.tick(", 2 running on 1 workers")
        with dask.config.set({"rasteret_dask.progress.every": 0}):
            shown.tick(", 1 running on 1 workers")
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^\[.*\] ", "", line) for line in lines] == [
        "1/3 shards, 0 s", "1/3 shards, 0 s, 1 running on 1 workers", "1/3 shards, 0 s"
    ]  # fmt: skip


def test_on_a_terminal_a_note_does_not_stand_behind_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with Progress("shards", True, 2) as shown:
        shown.step(1, ", 1 failed")
        shown.note("a worker is silent")
        shown.tick(", 1 running")
        shown.step(1)
    lines = terminal.getvalue().split("\n")
    assert "a worker is silent" in lines
    assert lines[0].startswith("\r[")
    assert "1/2 shards, 0 s, 1 failed" in lines[0]
    assert lines[2].rpartition("\r")[2].startswith("[##############################] 2/2 shards")


def test_a_note_is_written_where_no_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("shards", False, 2) as shown:
        shown.step(1)
        shown.tick(", 1 running")
        shown.note("a worker is silent")
    assert capsys.readouterr().err == "a worker is silent\n"


@pytest.mark.parametrize(("text", "wanted"), [("2m", 120.0), (5, 5.0), ("250ms", 0.25)])
def test_times_come_from_dask_s_configuration(text: str | int, wanted: float) -> None:
    assert seconds("watch.look", "5s") == 5.0
    with dask.config.set({"rasteret_dask.watch.look": text}):
        assert seconds("watch.look", "5s") == wanted
