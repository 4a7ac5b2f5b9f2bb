"""A second environment with Python 3.12 or newer for the peers that need it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    "rasteret[xarray]==0.4.1",
    "lazycogs==0.7.0",
    "rustac==0.9.17",
    *(f"duckdb-extension-{name}==1.5.5" for name in ("icu", "json", "parquet", "spatial")),
)
"""rustac decides DuckDB's version, and so that of the extensions, which it would otherwise download elsewhere."""


def environment(folder: Path, given: str | None) -> tuple[Path | None, str]:
    """Return the interpreter of the second environment, made where it is missing, and what is to say about it.

    Parameters
    ----------
    folder
        Where it is kept.
    given
        An interpreter to make it with; None: look for one.
    """
    python = folder / "bin" / "python"
    mark = folder / "packages.txt"
    if mark.exists() and mark.read_text() == "\n".join(PACKAGES):
        return python, ""
    found = next(_interpreters(given), None)
    if found is None:
        return None, f"{given or 'no Python 3.12 or newer'} could not be started"
    shutil.rmtree(folder, ignore_errors=True)
    print(f"making an environment with {found} for rasteret and lazycogs", file=sys.stderr)
    for command in (
        [found, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check", *PACKAGES],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            *_, last = ["", *done.stderr.strip().splitlines()]
            return None, f"{' '.join(command[1:4])} failed: {last}"
    mark.write_text("\n".join(PACKAGES))
    return python, ""


def _interpreters(given: str | None) -> Iterator[str]:
    """Yield interpreters that start; pyenv's shims start only where a version is chosen."""
    names = [given] if given else ["python3.12", "python3.13", "python3.14"]
    for name in names:
        for version in (None, *_pyenv_versions(name)):
            env = {**os.environ, **({"PYENV_VERSION": version} if version else {})}
            code = "import sys; print(sys.executable if sys.version_info >= (3, 12) else '')"
            try:
                done = subprocess.run([name, "-c", code], env=env, capture_output=True, text=True, timeout=30)
            except OSError:
                break
            if done.returncode == 0 and done.stdout.strip():
                yield done.stdout.strip()


def _pyenv_versions(name: str) -> list[str]:
    if shutil.which("pyenv") is None:
        return []
    said = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True).stdout.split()
    return [v for v in said if re.match(rf"{re.escape(name.removeprefix('python'))}\.\d+$", v)]
