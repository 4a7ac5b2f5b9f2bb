"""README.md and the pages of docs/ as their readers type them: blocks in order, one folder and namespace a page.

Conventions of a page, all of them visible to its readers:

* A block that begins with ``# name.py`` (or ``.toml``, ``.csv``, ...) is the file of that name.
* A block of the language ``output`` is what the block before it prints; ``...`` stands for anything.
* A block that begins with ``# not run here: REASON`` is shown only. ``test_pages`` counts these.
* Of a console block with prompts, lines that begin with ``$`` are typed, and what follows one is what it shows; without
  prompts, all lines are typed.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import pytest
from waiting import PATIENCE_S

from rasteret_dask.catalogs import signing
from rasteret_dask.cli.app import main

__all__ = ["DOCS", "ELSEWHERE", "PAGES", "ROOT", "SHELLS", "Block", "blocks", "run_page"]

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
SHELLS = frozenset({"bash", "console", "sh", "shell"})
"""Languages of blocks that a shell runs."""

ELSEWHERE = {
    r"pip install .*": "tests/test_install.py",
    r"rasteret-dask demo( --small)?": "tests/test_install.py",
    r"make (demo|test|test-slow|docs)": "Makefile",
}
"""Commands that are too long to be repeated here, and what runs them: as they are, or what they consist of."""

_OURS = re.compile(r"rasteret-dask [^|&;<>$`]*")
"""Our own command and nothing for a shell to do."""

_FENCE = re.compile(
    r"^(?P<fence>`{3,})(?P<language>\S*)[^\n]*\n(?P<text>.*?)^(?P=fence)\s*$", re.MULTILINE | re.DOTALL
)
_FILE = re.compile(r"# (?P<name>[\w./-]+\.[a-z]+)\b")
_NOT_RUN = re.compile(r"# not run here: (?P<reason>\S.*)")
_OUTPUT = doctest.OutputChecker()
_LOOSE = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    """Of its first line of text, counted from 1."""
    language: str
    """As the fence has it; Sphinx's directives stand in braces."""
    text: str

    @property
    def file(self) -> str | None:
        """Name of the file that it is, if it is one."""
        match = _FILE.match(self.text)
        return match["name"] if match else None

    @property
    def reason(self) -> str | None:
        """Why it is shown only, if it is."""
        match = _NOT_RUN.match(self.text)
        return match["reason"] if match else None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in their order."""
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, match.start("text")) + 1, match["language"], match["text"])
        for match in _FENCE.finditer(text)
    ]


def run_page(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, having: str | None = None) -> str:
    """Run all blocks of a page in a folder.

    Parameters
    ----------
    page
        README.md or a page of docs.
    folder
        The working directory, with what the page expects to be there.
    monkeypatch
        Undoes at the end of the test what concerns the process.
    having
        What the test has besides: blocks that are not run because they need that are run too.

    Returns
    -------
    str
        All that its Python blocks print.
    """
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("RASTERET_DASK_CACHE", str(folder / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{folder}")
    names: dict[str, Any] = {"__name__": "__main__"}
    printed, latest = [], ""
    with _as_it_was(folder):
        for block in blocks(page):
            if block.reason and block.reason != f"needs {having}":
                continue
            if block.file:
                (folder / block.file).parent.mkdir(parents=True, exist_ok=True)
                (folder / block.file).write_text(block.text)
            elif block.language == "python":
                latest = _run_python(block, names)
                printed.append(latest)
            elif block.language in SHELLS:
                latest = _run_shell(block)
            elif block.language == "output":
                assert _OUTPUT.check_output(block.text, latest, _LOOSE), f"{block} says other than:\n{latest}"
    return "\n".join(printed)


def _run_python(block: Block, names: dict[str, Any]) -> str:
    code = "\n" * (block.line - 1) + block.text  # so that a traceback shows the page's lines
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(compile(code, str(block.page), "exec", dont_inherit=True), names)
    return shown.getvalue()


def typed(block: Block) -> list[tuple[str, str]]:
    """Return the commands of a console block, each with what it shows: "" where the block does not say."""
    text = block.text.replace("\\\n", " ")
    if re.search(r"^\$ ", text, re.MULTILINE):
        return re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", text, re.MULTILINE)
    return [(line.strip(), "") for line in text.splitlines() if line.strip() and not line.startswith("#")]


def _run_shell(block: Block) -> str:
    latest, pending = "", []
    for command, answer in typed(block):
        if any(re.fullmatch(rf"{known}( +#.*)?", command) for known in ELSEWHERE):
            continue
        if _OURS.fullmatch(command):
            latest = _run_ours(block, command)
        else:
            pending.append(command)  # what one line sets, such as a variable, the next ones see
            latest = _run_bash(block, pending) if answer else ""
        assert not answer or _OUTPUT.check_output(answer, latest, _LOOSE), (
            f"{block}: {command} shows\n{latest}"
        )
    return latest if not pending or latest else _run_bash(block, pending)


def _run_ours(block: Block, command: str) -> str:
    """Run our own command in this process, which costs a tenth of one of its own."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        code = main(shlex.split(command, comments=True)[1:])
    assert not code, f"{block}: {command} ended with {code}:\n{shown.getvalue()}"
    return shown.getvalue()


def _run_bash(block: Block, commands: list[str]) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(commands)],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, f"{block} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
    return done.stdout


@contextlib.contextmanager
def _as_it_was(folder: Path) -> Iterator[None]:
    """Undo at the end what a page may set for the whole process."""
    environment, grants = dict(os.environ), dict(signing._GRANTS)
    root, ours = logging.getLogger(), logging.getLogger("rasteret_dask")
    levels, handlers = (root.level, ours.level), list(root.handlers)
    modules = set(sys.modules)
    try:
        with dask.config.set({}):
            yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        signing._GRANTS.clear()
        signing._GRANTS.update(grants)
        root.handlers[:] = handlers
        root.setLevel(levels[0])
        ours.setLevel(levels[1])
        for name in set(sys.modules) - modules:
            path = getattr(sys.modules[name], "__file__", None)
            if path and Path(path).is_relative_to(folder):
                del sys.modules[name]
        if "matplotlib.pyplot" in sys.modules:
            sys.modules["matplotlib.pyplot"].close("all")
