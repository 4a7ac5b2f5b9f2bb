"""How far a job is: never backwards, in a log, on a real terminal, in a real notebook, and left clean in each."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import dask
import nbformat
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nbclient import NotebookClient
from waiting import PATIENT

from rasteret_dask.activity import Tally
from rasteret_dask.progress import (
    InLog,
    Progress,
    Standing,
    bar_html,
    face,
    nbytes_text,
    seconds,
    seconds_text,
)

OFTEN = {"rasteret_dask.progress.refresh": "10ms", "rasteret_dask.progress.every": "20ms"}
LINE = re.compile(
    r"\d+/40 shards(, [\d,]+ of 1,024 chips)?(, [\d.]+ [kMG]?B read( \([\d.]+ [kMG]?B/s\))?)?"
    r"(, [\d.]+ [kMG]?B written)?, \d+ s(, about [\w ]+ left)?(, \d+ failed)?(, 2 running on 2 threads)?(, stopped)?"
)


def standing(**changes: object) -> Standing:
    """Return how a job stands in the middle."""
    usual = Standing("shards", 12, 40, "310 of 1,024 chips", Tally(90, 1_200_000_000, 400_000_000), 38e6, 95.2, 185.0,
                     1, "2 running on 2 threads", 0.31)  # fmt: skip
    fields = {name: getattr(usual, name) for name in Standing.__slots__}
    return Standing(**{**fields, **changes})


def test_a_line_says_all_there_is_to_say() -> None:
    assert standing().text == (
        "12/40 shards, 310 of 1,024 chips, 1.2 GB read (38.0 MB/s), 400 MB written, 95 s, about 3 min left, "
        "1 failed, 2 running on 2 threads"
    )
    assert standing(ended=True, failed=0).text == (
        "12/40 shards, 310 of 1,024 chips, 1.2 GB read (38.0 MB/s), 400 MB written, 95 s"
    )
    bare = Standing("items", 7, None, "", Tally(), 0.0, 3.0, None, 0, "", None, interrupted=True)
    assert bare.text == "7 items, 3 s, stopped"


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.integers(0, 10**9), st.integers(0, 10**9), st.floats(0, 4)),
        max_size=30,
    ),
    st.integers(0, 5),
)
def test_neither_bytes_nor_the_share_ever_fall(moves: list[tuple[int, int, int, float]], before: int) -> None:
    """Shards end, and what is under way grows, or is lost with its worker."""
    progress = Progress("shards", shown=False, total=100)
    progress.begin(before)
    last = progress.standing()
    for done, ended, live, share in moves:
        under_way = Tally(1, live, live // 2, share)
        progress.live = lambda tally=under_way: tally  # type: ignore[misc]
        progress.step(done, tally=Tally(1, ended, ended))
        now = progress.standing()
        assert now.tally.bytes_read >= last.tally.bytes_read
        assert now.tally.bytes_written >= last.tally.bytes_written
        assert now.share is not None
        assert last.share is not None
        assert last.share <= now.share <= 1.0
        assert now.tally.bytes_read >= live
        last = now
    end = progress.standing(ended=True)
    assert end.share == 1.0
    assert end.done == before + sum(move[0] for move in moves)
    assert end.tally.bytes_read >= sum(move[1] for move in moves)


def test_what_an_earlier_run_did_is_no_measure_of_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = Progress("shards", shown=False, total=100)
    progress.begin(80)
    for now[0] in (0.0, 600.0):  # it waits for workers
        assert progress.standing().left_s is None
    progress.step(1)
    assert progress.standing().left_s is None
    now[0] = 660.0
    progress.step(5)
    assert progress.standing().left_s == pytest.approx(60 / 5 * 14)


def test_in_a_log_there_is_a_line_at_the_beginning_every_so_often_and_at_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = InLog()
    with dask.config.set({"rasteret_dask.progress.every": "1h"}):
        for done in range(5):
            lines.draw(standing(done=done))
        lines.draw(standing(done=5, ended=True))
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("0/40")
    assert last.startswith("5/40")
    with dask.config.set({"rasteret_dask.progress.every": 0}):
        lines.draw(standing(done=6))
    assert capsys.readouterr().err.startswith("6/40")


def test_a_job_draws_itself_while_its_thread_is_busy(capsys: pytest.CaptureFixture[str]) -> None:
    written = ""
    with dask.config.set(OFTEN), Progress("shards", True, 40) as shown:
        shown.running = "2 running on 2 threads"
        shown.live = lambda: Tally(1, 5_000_000, 0, 0.5)
        while written.count("\n") < 3 or "5.0 MB read" not in written:  # nobody calls it meanwhile
            written += capsys.readouterr().err
        shown.step(1, "30 of 1,024 chips", Tally(1, 5_000_000, 1_000_000))
    lines = (written + capsys.readouterr().err).splitlines()
    assert all(LINE.fullmatch(line) for line in lines), lines
    assert lines[-1].startswith("1/40 shards, 30 of 1,024 chips, 5.0 MB read, 1.0 MB written, ")


def test_nothing_is_drawn_and_no_thread_begins_where_it_is_not_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with Progress("shards", False, 2) as shown:
        shown.step(1)
        assert shown._drawer is None
        shown.note("a worker is silent")
    assert capsys.readouterr().err == "a worker is silent\n"


class Closed(io.StringIO):
    """A stream whose reader is gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_job_goes_on_when_nobody_reads_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", Closed())
    with dask.config.set(OFTEN), Progress("shards", True, 2) as shown:
        shown._over.wait(60)  # it has tried
        shown.step(2)
    assert shown.done == 2


WATCHED = """
import sys, time, dask
from rasteret_dask import progress
from rasteret_dask.activity import Tally
from rasteret_dask.progress import Progress
dask.config.set({"rasteret_dask.progress.refresh": "20ms"})

def drawn_by(face):
    \"\"\"Return a function that waits until a face has drawn a standing of which something is true.\"\"\"
    seen, draw = [], face.draw

    def noted(self, standing):
        draw(self, standing)
        seen.append(standing)

    def until(what):
        while not any(map(what, seen)):
            time.sleep(0.01)

    face.draw = noted
    return until
"""

ON_TERMINAL = f"""
{WATCHED}
until = drawn_by(progress.OnTerminal)
with Progress("shards", True, 4) as shown:
    shown.live = lambda: Tally(5, 12_345_678, 0, 0.5)
    until(lambda standing: standing.share)
    shown.step(2, "20 of 40 chips", Tally(5, 150_000_000, 50_000_000))
    shown.failed = 1
    shown.note("worker tcp://x is silent")
    until(lambda standing: standing.done == 2 and standing.failed)
    if sys.argv[1] == "error":
        raise SystemExit("broken")
    if sys.argv[1] == "interrupt":
        raise KeyboardInterrupt
    shown.step(2, "40 of 40 chips")
print("prompt$")
"""


def on_terminal(code: str, *arguments: str, **variables: str) -> tuple[str, int]:
    """Run Python on a terminal of 100 columns; return all that the terminal was sent, and how it ended."""
    here, there = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", **variables}
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdin=there, stdout=there, stderr=there, env=environment
    ) as running:
        os.close(there)
        text = b"".join(_pieces(here)).decode()
    os.close(here)
    return text, running.returncode


def _pieces(terminal: int) -> Iterator[bytes]:
    while True:
        try:
            piece = os.read(terminal, 65536)
        except OSError:  # the other end is closed
            return
        if not piece:
            return
        yield piece


def plain(text: str) -> str:
    """Return what a terminal was sent, without colours and movements."""
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", text)


@pytest.mark.parametrize("how", ["well", "error", "interrupt"])
def test_on_a_real_terminal_a_bar_is_drawn_and_ends_clean(how: str) -> None:
    text, code = on_terminal(ON_TERMINAL, how)
    assert (code == 0) == (how == "well"), text
    seen = plain(text)
    assert re.search("[━╸╺]{30} 12% 0/4 shards", seen), seen
    assert "2/4 shards" in seen
    assert "20 of 40 chips, 162 MB read" in seen
    assert "1 failed" in seen
    assert seen.count("worker tcp://x is silent") == 1
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, (
        "the cursor is hidden once, and shown again"
    )
    end = text[text.index("\x1b[?25h") :]
    assert not re.search(r"\x1b\[\d*[AK]", end), "nothing is drawn once it has ended"
    before = plain(text[: text.index("\x1b[?25h")])
    assert before.endswith("\r\n"), "what follows stands on a line of its own"
    last = before.rstrip().splitlines()[-1]
    assert last.endswith("stopped") == (how != "well"), last
    assert ("prompt$" in end) == (how == "well")


NOT_A_BAR = """
import sys, dask
from rasteret_dask.progress import Progress
dask.config.set({"rasteret_dask.progress.refresh": "10ms"})
with Progress("shards", True, 4) as shown:
    while shown._face is None:
        pass
    shown.step(4)
print("rich" in sys.modules, "IPython" in sys.modules)
"""


def test_a_terminal_that_cannot_move_its_cursor_gets_lines_and_rich_is_not_imported() -> None:
    text, code = on_terminal(NOT_A_BAR, TERM="dumb")
    assert code == 0
    lines = text.splitlines()
    assert lines[-1] == "False False"
    assert lines[-2].startswith("4/4 shards, ")
    assert "\x1b" not in text


IN_NOTEBOOK = f"""
{WATCHED}
until = drawn_by(progress.InNotebook)
with Progress("shards", True, 4) as shown:
    until(lambda standing: standing.done == 0)
    shown.step(2, "20 of 40 chips")
    until(lambda standing: standing.done == 2)
    shown.step(2, "40 of 40 <chips>")
"""


def test_in_a_real_notebook_one_bar_is_updated_in_place() -> None:
    make: Any = nbformat.v4
    notebook = make.new_notebook(cells=[make.new_code_cell(code) for code in (IN_NOTEBOOK, "print('next')")])
    updates: list[str] = []

    class Kernel(NotebookClient):
        def process_message(self, msg, cell, cell_index):  # type: ignore[no-untyped-def]
            if msg["msg_type"] in ("display_data", "update_display_data"):
                updates.append(msg["msg_type"])
            return super().process_message(msg, cell, cell_index)

    Kernel(notebook, **PATIENT, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert output.output_type == "display_data"
    html = output.data["text/html"]
    assert "4/4 shards" in html
    assert "40 of 40 &lt;chips&gt;" in html
    assert "width:100.0%" in html
    assert updates[0] == "display_data"
    assert updates.count("display_data") == 1
    assert len(updates) > 2
    assert [out.output_type for out in notebook.cells[1].outputs] == ["stream"]


def test_a_bar_of_html_escapes_and_takes_the_page_s_colours() -> None:
    html = bar_html(standing(detail="<b>5</b>"))
    assert "<b>5</b>" not in html
    assert "&lt;b&gt;5&lt;/b&gt;" in html
    assert "width:31.0%" in html
    assert "currentColor" in html
    assert "width" not in bar_html(standing(share=None, total=None))


def test_without_a_terminal_and_a_notebook_there_are_lines() -> None:
    assert isinstance(face(), InLog)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1_234, "1.2 kB"), (38e6, "38.0 MB"), (400e6, "400 MB"), (1.2e9, "1.2 GB")],
)  # fmt: skip
def test_bytes(value: float, text: str) -> None:
    assert nbytes_text(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.4, "0 s"), (89, "89 s"), (185, "3 min"), (7_800, "2 h 10 min")]
)
def test_durations(value: float, text: str) -> None:
    assert seconds_text(value) == text


@pytest.mark.parametrize(("text", "wanted"), [("2m", 120.0), (5, 5.0), ("250ms", 0.25)])
def test_times_come_from_dask_s_configuration(text: str | int, wanted: float) -> None:
    assert seconds("watch.look", "5s") == 5.0
    with dask.config.set({"rasteret_dask.watch.look": text}):
        assert seconds("watch.look", "5s") == wanted
