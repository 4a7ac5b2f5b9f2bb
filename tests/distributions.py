"""The package's wheel and sdist, built from what git tracks, and environments of their own to install them in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class Distributions:
    """What ``hatchling build`` makes of a tree."""

    wheel: Path
    sdist: Path

    @property
    def wheel_files(self) -> set[str]:
        """Paths in the wheel."""
        with zipfile.ZipFile(self.wheel) as archive:
            return set(archive.namelist())

    @property
    def sdist_files(self) -> set[str]:
        """Paths in the sdist, below its one folder."""
        with tarfile.open(self.sdist) as archive:
            return {name.partition("/")[2] for name in archive.getnames()}


def tracked_files() -> list[str]:
    """Return the paths of all tracked files that are there; skip where this is no git checkout."""
    done = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip("not a git checkout, so nothing is tracked")
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def checkout(folder: Path) -> Path:
    """Copy the tracked files, as a clean clone would have them, and return the folder."""
    for name in tracked_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    return folder


def build(tree: Path, folder: Path) -> Distributions:
    """Build a tree's wheel and sdist with the hatchling that is installed."""
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return Distributions(wheel, sdist)


def interpreter(version: str) -> str:
    """Return a Python of a version (``"3.12"``) that starts; skip where there is none.

    Looked for on the PATH, then beside the Python that runs the tests, as version managers install them. A name on
    the PATH may be a version manager's placeholder that does not start.
    """
    places = [Path(entry) for entry in os.get_exec_path()]
    places += sorted(Path(sys.base_prefix).parent.glob("*/bin"))
    for place in places:
        candidate = place / f"python{version}"
        if os.access(candidate, os.X_OK) and _version_of(candidate) == version:
            return str(candidate)
    pytest.skip(f"no python{version} that starts, neither on the PATH nor beside {sys.base_prefix}")


def _version_of(python: Path) -> str:
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


@dataclass(frozen=True, slots=True)
class Environment:
    """A fresh virtual environment; commands run in a folder without this source on the path."""

    prefix: Path
    folder: Path

    @classmethod
    def made(cls, version: str, folder: Path) -> Environment:
        """Make one for a version of Python."""
        made = cls(folder / "environment", folder / "work")
        made.folder.mkdir()
        _uv("venv", "--python", interpreter(version), str(made.prefix))
        return made

    def install(self, *arguments: str | Path) -> None:
        """Install packages, as ``pip install`` would."""
        _uv("pip", "install", "--python", str(self.prefix), *map(str, arguments))

    def run(self, command: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """Run a command of the environment in its folder."""
        path = os.pathsep.join([str(self.prefix / "bin"), os.environ["PATH"]])
        return subprocess.run(
            [self.prefix / "bin" / command, *arguments],
            cwd=self.folder, env=dict(_outside(), PATH=path), capture_output=True, text=True, check=False,
        )  # fmt: skip


def _outside() -> dict[str, str]:
    """Return this process's environment variables without those that lead to this source or environment."""
    return {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}


def _uv(*arguments: str) -> None:
    """Run uv, which keeps what it has downloaded once and links it into every environment."""
    pytest.importorskip("uv", reason="uv is not installed: it comes with the extra 'test'")
    variables = {"UV_HTTP_TIMEOUT": "600", "UV_HTTP_RETRIES": "8", **_outside()}
    for url in _pip_index():
        variables.setdefault("UV_DEFAULT_INDEX", url)
    command = [sys.executable, "-m", "uv", "--quiet", "--no-python-downloads", *arguments]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def _pip_index() -> Iterator[str]:
    """Yield the index that this machine's pip is configured for; uv does not look there."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        if name.endswith(".index-url"):
            yield value.strip("'\"")
