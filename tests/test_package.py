"""What is built from the git tree has every file that git has, and asks for all it imports."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from distributions import ROOT, Distributions, build, checkout, tracked_files

from rasteret_dask.extras import EXTRAS

PACKAGE = ROOT / "rasteret_dask"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Return wheel and sdist of a clean checkout."""
    folder = tmp_path_factory.mktemp("package")
    return build(checkout(folder / "tree"), folder / "dist")


def test_no_tracked_file_is_ignored() -> None:
    """A tracked file that .gitignore names is left out of wheel and sdist, and of ruff's checks."""
    command = ["git", "ls-files", "--cached", "--ignored", "--exclude-per-directory=.gitignore"]
    tracked_files()  # skips outside of a checkout
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == ""


def test_the_sdist_has_every_tracked_file(built: Distributions) -> None:
    assert built.sdist_files == {*tracked_files(), "PKG-INFO"}


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(built: Distributions) -> None:
    files = {name for name in built.wheel_files if ".dist-info/" not in name}
    assert files == {name for name in tracked_files() if name.startswith("rasteret_dask/")}
    assert {"rasteret_dask/py.typed", "rasteret_dask/catalogs/catalog.toml"} <= files


def test_the_sdist_builds_the_same_wheel(built: Distributions, tmp_path: Path) -> None:
    with tarfile.open(built.sdist) as archive:
        safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # from 3.11.4 on
        archive.extractall(tmp_path, **safe)
    again = build(tmp_path / built.sdist.name.removesuffix(".tar.gz"), tmp_path / "dist")
    assert again.wheel.read_bytes() == built.wheel.read_bytes()


def test_every_folder_of_modules_is_a_package() -> None:
    """Without ``__init__.py`` a folder is found by its path only: walks over the package's modules pass it by."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert not [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]


# -- what is asked for --------------------------------------------------------------------------------------------


def requirements() -> dict[str, list[str]]:
    """Return the requirements of each extra; those of the package itself under ""."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"": project["dependencies"], **project["optional-dependencies"]}


def names(lines: list[str]) -> set[str]:
    return {re.split(r"[\s\[<>=!~;]", line, maxsplit=1)[0].lower() for line in lines}


def imported() -> Iterator[tuple[str, str]]:
    """Yield (top-level module, file that imports it) of all that is neither Python's nor the package's."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            for module in modules:
                top = module.partition(".")[0]
                if top not in {*sys.stdlib_module_names, "rasteret_dask"}:
                    yield top, str(path.relative_to(ROOT))


def test_every_import_is_asked_for() -> None:
    """A package that only comes along with another one goes away with it."""
    asked = names([line for extra in ("", *EXTRAS) for line in requirements()[extra]])
    brought_by = packages_distributions()  # several, where distributions share a folder
    assert not {
        module: path
        for module, path in imported()
        if asked.isdisjoint({name.lower().replace("_", "-") for name in brought_by.get(module, [module])})
    }


def test_messages_name_the_extras_of_the_project() -> None:
    asked = requirements()
    assert {extra: list(packages.values()) for extra, packages in EXTRAS.items()} == {
        extra: asked[extra] for extra in EXTRAS
    }


def test_what_an_extra_holds_is_asked_for_alike_everywhere() -> None:
    """The lowest version is a promise: one for each package, whichever extra brings it."""
    bounds: dict[str, set[str]] = {}
    for line in (line for lines in requirements().values() for line in lines):
        (name,) = names([line])
        if line != name:
            bounds.setdefault(name, set()).add(line)
    assert not [sorted(lines) for lines in bounds.values() if len(lines) > 1]
