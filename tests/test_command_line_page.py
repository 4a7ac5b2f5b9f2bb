"""The page about the command line, run from its first block to its last, with the answers that it shows."""

from __future__ import annotations

import doctest
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer
from waiting import PATIENCE_S

from rasteret_dask.cli.app import app, main
from rasteret_dask.cli.exitcodes import ExitCode
from rasteret_dask.demo.world import World

PAGE = (Path(__file__).parents[1] / "docs" / "command-line.md").read_text()

Run = Callable[[str], str]


def examples() -> Iterator[tuple[str, str]]:
    """Yield each command of the page with what it shows."""
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL):
        yield from re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", block, re.MULTILINE)


def follow(run: Run, folder: Path) -> None:
    """Run all commands in a folder and compare what each answers."""
    (recipe,) = re.findall(r"```toml\n((?!# \w+\.toml\n).*?)```", PAGE, re.DOTALL)
    (folder / "train.toml").write_text(recipe)
    for text, name in re.findall(r"```(?:toml|python)\n(# (\w+\.(?:toml|py))\n.*?)```", PAGE, re.DOTALL):
        (folder / name).write_text(text)
    checker, flags = doctest.OutputChecker(), doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    for command, answer in examples():
        shown = run(command)
        assert checker.check_output(answer, shown, flags), f"{command}\n{answer}\nbut it shows\n{shown}"


def test_every_command_has_an_example() -> None:
    called = {shlex.split(command)[1] for command, _ in examples()}
    assert called == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    listed = re.findall(r"^\| `([a-z]+)` \|", PAGE, re.MULTILINE)
    assert sorted(listed) == sorted(called)


def test_every_exit_code_is_listed() -> None:
    codes = re.findall(r"^\| (\d+) \| ", PAGE, re.MULTILINE)
    assert list(map(int, codes)) == [code.value for code in ExitCode]


def test_the_page_holds(
    small_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, on a copy of the world that the demo would make."""
    shutil.copytree(small_world.sentinel2.parents[0], tmp_path / "demo" / "world" / "sentinel-2-l2a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it in its workers

    def run(command: str) -> str:
        program, *arguments = shlex.split(command)
        assert program == "rasteret-dask"
        if arguments[0] == "demo":
            return "...\n12 checks, none failed; 1 s in all.\n"  # see the slow test
        capsys.readouterr()
        assert main(arguments) == ExitCode.DONE, command
        return capsys.readouterr().out

    follow(run, tmp_path)


@pytest.mark.slow
def test_the_page_holds_as_it_is_typed(tmp_path: Path) -> None:
    """In a shell, from the demo on."""
    here = f'rasteret-dask() {{ "{sys.executable}" -m rasteret_dask "$@"; }}\n'

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", here + command], cwd=tmp_path, capture_output=True, text=True, check=False,
            timeout=PATIENCE_S, env={name: value for name, value in os.environ.items() if name != "COLUMNS"},
        )  # fmt: skip
        assert done.returncode == ExitCode.DONE, done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout

    follow(run, tmp_path)
