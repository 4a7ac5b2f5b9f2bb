from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from waiting import PATIENCE_S

from rasteret_dask import __version__
from rasteret_dask.cli import main

SCRIPT = "import sys; from rasteret_dask.cli import main; sys.exit(main())"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, warnings as errors of ours shown on stderr."""
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)


def test_version_ends_well() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"rasteret-dask {__version__}\n", "")


def test_python_m_is_the_same_command() -> None:
    command = [sys.executable, "-m", "rasteret_dask"]
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"rasteret-dask {__version__}\n", "")
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: rasteret-dask ")


@pytest.mark.slow
def test_demo_in_a_process_of_its_own(tmp_path: Path) -> None:
    first = run("demo", "--small", "--folder", tmp_path / "demo")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "none failed" in first.stdout
    assert "Traceback" not in first.stderr
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["demo.png", "train.zarr", "world"]

    shard = max((tmp_path / "demo" / "train.zarr" / "optical").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    second = run("demo", "--small", "--folder", tmp_path / "demo")
    assert second.returncode == 1
    assert "nothing is written" in second.stdout
    (line,) = second.stderr.splitlines()
    assert line.startswith("rasteret-dask: the demo's result is wrong: the store's objects")

    third = run("demo", "--small", "--fresh", "--folder", tmp_path / "demo")
    assert third.returncode == 0, third.stdout + third.stderr


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / "world" / "sentinel-2-l2a"
    mine.mkdir(parents=True)
    assert main(["demo", "--small", "--folder", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rasteret-dask: making the made-up world")
    assert mine.is_dir()


def test_no_command_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 2
    assert "command" in capsys.readouterr().err
