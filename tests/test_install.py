"""The installed package does what README.md says: on every Python, with the lowest, tested and newest versions."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from distributions import ROOT, Distributions, Environment, build, checkout

from rasteret_dask.extras import how_to_install

pytestmark = pytest.mark.slow

CONSTRAINTS = ("--constraint", ROOT / "constraints.txt")
README = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)

IMPORTS = """
import importlib, json, pkgutil, sys, warnings
warnings.simplefilter("error")
import rasteret_dask as rd

outcome = {"rasteret_dask": rd.__file__}
for module in pkgutil.walk_packages(rd.__path__, "rasteret_dask."):
    try:
        outcome[module.name] = importlib.import_module(module.name).__file__
    except rd.MissingExtraError as error:
        outcome[module.name] = str(error)
print(json.dumps(outcome))
"""

LOWEST = """
import json, re, sys
from importlib.metadata import version
from packaging.version import Version

installed = {}
for line in sys.argv[1:]:
    name, bound = re.match(r"([\\w-]+)>=([\\w.]+)", line).groups()
    if Version(version(name)) != Version(bound):
        installed[line] = version(name)
print(json.dumps(installed))
"""
"""Prints what is installed in another version than its lower bound."""

TESTS = (
    "test_timing.py",
    "test_write.py",
    "test_build.py::test_a_dataset_by_its_name",
    "test_build.py::test_headers_are_read_once_per_file",
)
"""Tests at the doors of other libraries: pandas, NumPy; Dask, rasterio, Zarr; pystac-client, urllib3; obstore."""

TESTING = (
    "cql2",
    "hypothesis",
    "pytest",
    "stac-fastapi-api",
    "stac-fastapi-extensions",
    "stac-fastapi-types",
    "tifffile",
    "uvicorn",
)
"""What those import."""

NEED_TORCH = {
    "rasteret_dask.geometries.torchset",
    "rasteret_dask.torchdata",
    "rasteret_dask.training.chipbatch",
    "rasteret_dask.training.datamodule",
    "rasteret_dask.training.passes",
    "rasteret_dask.training.tensors",
}
"""Modules that are about torch from their first line; others import an extra where they use it."""

NEEDS_SLURM = "rasteret_dask.launching.slurmjobs"
"""The module whose class is one of dask-jobqueue's."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Distributions:
    """Return wheel and sdist of a clean checkout."""
    folder = tmp_path_factory.mktemp("package")
    return build(checkout(folder / "tree"), folder / "dist")


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Callable[[str], Environment]]:
    """Return a function: version of Python -> a new environment, which is removed when the test is over."""
    yield lambda python: Environment.made(python, tmp_path)
    shutil.rmtree(tmp_path / "environment", ignore_errors=True)


def done(ran: subprocess.CompletedProcess[str]) -> str:
    assert ran.returncode == 0, ran.stdout[-2000:] + ran.stderr[-4000:]
    return ran.stdout


def check(environment: Environment) -> None:
    """Import every module, run the demo in an empty folder, then README.md's blocks there."""
    modules = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")
        for path in (ROOT / "rasteret_dask").rglob("*.py")
    }
    outcome = json.loads(done(environment.run("python", "-c", IMPORTS)))
    assert outcome.keys() == modules
    missing = {name: text for name, text in outcome.items() if not text.startswith(str(environment.prefix))}
    assert missing.keys() == {*NEED_TORCH, NEEDS_SLURM}
    for name, text in missing.items():
        extra = "slurm" if name == NEEDS_SLURM else "torch"
        assert f"expected the extra '{extra}'. Install it: {how_to_install(extra)}" in text

    said = done(environment.run("rasteret-dask", "demo", "--small"))
    assert "12 checks, none failed" in said
    assert said.count("demo/demo.png") == 1
    (environment.folder / "readme.py").write_text("\n".join(README))
    done(environment.run("python", "-W", "error::DeprecationWarning", "readme.py"))
    assert (environment.folder / "train.zarr").is_dir()


def run_tests(environment: Environment, *options: str) -> None:
    """Run the tests of this checkout on the installed package; their configuration makes warnings errors."""
    environment.install(*TESTING)
    pytest_alone = (
        "-m",
        "pytest",
        "-q",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        "--override-ini",
        "addopts=",
    )
    done(environment.run("python", *pytest_alone, *options, *(f"{ROOT}/tests/{name}" for name in TESTS)))


def test_readme_has_blocks_to_run() -> None:
    assert [block.split("\n", 1)[0] for block in README] == [
        "import rasteret_dask as rd",
        "import xarray as xr",
        "for batch in train.stream(batch_size=32, shuffle=7):  # from the scenes: a dictionary of arrays",
        "def greenness(pixels):",
    ]


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_wheel_with_the_tested_versions(
    built: Distributions, fresh: Callable[[str], Environment], python: str
) -> None:
    environment = fresh(python)
    environment.install(*CONSTRAINTS, f"{built.wheel}[demo,geo]")
    check(environment)


def test_the_wheel_with_the_newest_versions(
    built: Distributions, fresh: Callable[[str], Environment]
) -> None:
    environment = fresh("3.13")
    environment.install(f"{built.wheel}[demo,geo]")
    check(environment)
    run_tests(environment)


def test_the_wheel_with_the_lowest_versions(
    built: Distributions, fresh: Callable[[str], Environment]
) -> None:
    """Of what the project asks for itself; what those ask for comes in its newest versions."""
    environment = fresh("3.11")
    lowest = ("--resolution", "lowest-direct", "--extra", "demo", "--extra", "geo")
    environment.install(*lowest, "-r", ROOT / "pyproject.toml")
    environment.install("--no-deps", built.wheel)
    check(environment)
    run_tests(environment, "-W", "ignore::DeprecationWarning")  # old versions warn of each other
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["geo"]]
    assert json.loads(done(environment.run("python", "-c", LOWEST, *requirements))) == {}


def test_a_missing_extra_is_installed_by_what_its_error_says(
    built: Distributions, fresh: Callable[[str], Environment]
) -> None:
    """The wheel alone: no matplotlib, no geopandas, and no world of the demo either."""
    environment = fresh("3.12")
    environment.install(*CONSTRAINTS, built.wheel)
    build_s2 = "import rasteret_dask as rd; s2 = rd.build('demo/sentinel-2-l2a'); "

    refused = environment.run("python", "-c", build_s2)
    assert refused.returncode == 1
    (call,) = re.findall(r"in Python `(.+?)`", refused.stderr)
    (command,) = re.findall(r"run `(.+?)`", refused.stderr)
    program, *arguments = command.split()
    assert "none: it needs matplotlib (pip install 'matplotlib>=" in done(
        environment.run(program, *arguments, "--small")
    )
    done(environment.run("python", "-c", build_s2))
    (environment.folder / "demo").rename(environment.folder / "small")
    done(environment.run("python", "-c", call))
    done(environment.run("python", "-c", build_s2))

    for use in ("s2.to_geopandas()", "s2.harmonize(resolution=10).chips(size=64).plot()"):
        refused = environment.run("python", "-c", build_s2 + use)
        assert refused.returncode == 1
        assert "MissingExtraError" in refused.stderr
        (requirement,) = re.findall(r"Install it: pip install '(.+?)'\.$", refused.stderr, re.MULTILINE)
        environment.install(*CONSTRAINTS, requirement)
        done(environment.run("python", "-W", "error", "-c", build_s2 + use))
