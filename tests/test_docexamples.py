"""Every public name shows how it is used: an Examples section, which runs and prints what it says."""

from __future__ import annotations

import doctest
import inspect
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely
import xarray as xr
from stac_api import generated, serving_stac

import rasteret_dask as rd
from rasteret_dask.catalogs.catalog import VARIABLE
from rasteret_dask.demo.world import World

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


@dataclass(frozen=True)
class Documented:
    """A public function, class or method."""

    name: str
    thing: Any
    first: Any
    """Where it is first declared: an override does what that says."""


def declared(owner: type, name: str) -> Any:
    """Return the function behind a method or property, or None for anything else (a field, a value)."""
    attribute = inspect.getattr_static(owner, name)
    match attribute:
        case property():
            return attribute.fget
        case cached_property():
            return attribute.func
        case classmethod() | staticmethod():
            return attribute.__func__
    return attribute if inspect.isfunction(attribute) else None


def methods(owner: type, prefix: str) -> Iterator[Documented]:
    """Yield the public methods of a class that this package wrote."""
    for name in dir(owner):
        function = None if name.startswith("_") else declared(owner, name)
        if function is None or not function.__module__.startswith("rasteret_dask"):
            continue
        first = next(declared(base, name) for base in reversed(owner.__mro__) if name in vars(base))
        if first.__module__.startswith("rasteret_dask"):  # else another library calls it, and says when
            yield Documented(f"{prefix}.{name}", function, first)


def public_of(*rooms: tuple[str, ModuleType]) -> dict[str, Documented]:
    """Return name -> what it names, of everything that is public in some modules."""
    found: dict[str, Documented] = {}
    for prefix, room in rooms:
        for name in room.__all__:
            try:
                thing = getattr(room, name)
            except rd.MissingExtraError:
                continue  # installed nowhere but where it is used
            if inspect.isclass(thing):
                found |= {d.name: d for d in methods(thing, f"{prefix}.{name}")}
            if inspect.isclass(thing) or inspect.isfunction(thing):
                found[f"{prefix}.{name}"] = Documented(f"{prefix}.{name}", thing, thing)
    return found


def shown(documented: dict[str, Documented]) -> dict[str, Documented]:
    """Return where it is defined -> what is public, of that which has an example."""
    return {
        f"{d.thing.__module__}.{d.thing.__qualname__}": d
        for d in documented.values()
        if ">>>" in (d.thing.__doc__ or "")
    }


@cache
def of_torch() -> dict[str, Documented]:
    """Return what is public of torchdata: torch and lightning take seconds, which not every worker has to spend."""
    from rasteret_dask import torchdata

    return public_of(("torchdata", torchdata))


def public() -> dict[str, Documented]:
    """Return name -> what it names, of everything that is public."""
    return PUBLIC | of_torch()


PUBLIC = public_of(
    ("rd", rd),
    *((f"rd.{name}", room) for name in rd.__all__ if isinstance(room := getattr(rd, name), ModuleType)),
)
SHOWN = shown(PUBLIC)


def test_every_public_name_has_an_example() -> None:
    everything = public()
    without = sorted(name for name, d in everything.items() if ">>>" not in (d.first.__doc__ or ""))
    skipped = sorted(name for name, d in everything.items() if "+SKIP" in (d.first.__doc__ or ""))
    assert not skipped, f"examples that do not run: {skipped}"
    assert not without, f"{len(without)} public names without an Examples section: {without}"


RECIPE = """
[collections.s2]
dataset = "demo/sentinel-2-l2a"
date_range = ["2024-04-01", "2024-06-30"]
[collections.s2.harmonize]
bands = ["red", "nir"]
time = "1MS"
[chips]
size = 32
cell_km = 0.96
[split]
seed = 1
[[outputs]]
zarr = "out.zarr"
splits = ["val"]
"""


@dataclass(frozen=True)
class Ground:
    """What examples find."""

    names: dict[str, Any]
    store: Path
    world: Path


def ground_of(
    world: World, s2: rd.Collection, l8: rd.Collection, aef: rd.Collection, api: str, folder: Path
) -> Ground:
    """Return the names that the package's docstring introduces, and a store of the chips."""
    chips = s2.harmonize(["red", "nir"], mask="clouds", time="1MS").chips(32, cell_km=0.96).split(seed=1)
    chips.to_zarr(folder / "train.zarr", progress=False)
    names = {"rd": rd, "collection": s2, "landsat": l8, "embeddings": aef, "chips": chips, "stac_api": api}
    return Ground(names, folder / "train.zarr", world.sentinel2.parent.parent)


@pytest.fixture(scope="module")
def ground(
    small_world: World,
    s2: rd.Collection,
    l8: rd.Collection,
    aef: rd.Collection,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Ground]:
    with serving_stac(generated(40, assets=["red", "nir"])) as api:
        yield ground_of(small_world, s2, l8, aef, api.url, tmp_path_factory.mktemp("examples"))


def evaluation_of(chips: rd.Chips) -> rd.Evaluation:
    """Return what chips say of a map whose west is forest and whose east is water; labels part them elsewhere."""
    west, south, east, north = chips.to_geopandas().total_bounds
    line = west + 0.4 * (east - west)
    shapes = [shapely.box(west, south, line, north), shapely.box(line, south, east, north)]
    cover = pa.table({"geometry": shapely.to_wkb(shapes), "cover": ["forest", "water"]})
    table = chips.table
    x = np.arange(min(table["xmin"].to_pylist()), max(table["xmax"].to_pylist()), 10.0) + 5
    y = np.arange(max(table["ymax"].to_pylist()), min(table["ymin"].to_pylist()), -10.0) - 5
    values = np.broadcast_to(
        np.where(np.arange(len(x)) < len(x) // 2, 1, 2).astype(np.uint8), (len(y), len(x))
    )
    attrs = {"crs": 32633, "flag_values": [1, 2], "flag_meanings": "forest water"}
    return chips.evaluate(
        xr.DataArray(values, {"y": y, "x": x}, ("y", "x"), attrs=attrs), cover, splits=chips
    )


def settle(ground: Ground, text: str, folder: Path) -> dict[str, Any]:
    """Lay out what an example mentions in its folder; return the names it may use."""
    names = dict(ground.names)
    if "train.zarr" in text and 'train.zarr", progress' not in text:
        shutil.copytree(ground.store, folder / "train.zarr")
    if "stored" in text:
        names["stored"] = rd.open_chips(ground.store)
    if "evaluation." in text:
        names["evaluation"] = evaluation_of(names["chips"])
    if "train.toml" in text:
        (folder / "train.toml").write_text(RECIPE)
    if "demo/" in text or "train.toml" in text:
        shutil.copytree(ground.world, folder / "demo" / "world")
    return names


@pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")
@pytest.mark.parametrize("name", sorted(SHOWN))
def test_examples_run(
    name: str, ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run_example(name, SHOWN[name].thing, ground, tmp_path, monkeypatch, capsys)


@pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")
def test_examples_of_torch_run(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    examples = shown(of_torch())
    assert examples
    for number, (name, documented) in enumerate(sorted(examples.items())):
        (folder := tmp_path / str(number)).mkdir()
        run_example(name, documented.thing, ground, folder, monkeypatch, capsys)


def run_example(
    name: str, thing: Any, ground: Ground, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Run an example in a folder of its own; what it prints is what it says."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv(VARIABLE, str(folder / "catalog.toml"))
    monkeypatch.setenv("RASTERET_DASK_CACHE", str(folder / "cache"))
    names = settle(ground, thing.__doc__, folder)
    example = doctest.DocTestParser().get_doctest(thing.__doc__, names, name, None, None)
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    runner.run(example, clear_globs=False)
    assert runner.summarize(verbose=False).failed == 0, capsys.readouterr().out
