# SPDX-License-Identifier: Apache-2.0
"""The main job on a made-up world: three collections become train chips in a Zarr store."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import xarray as xr

import rasteret_dask as rd
from rasteret_dask.demo.checks import (
    MOST_CLOUD_PCT,
    Check,
    check_emptiest,
    check_objects,
    check_pixels,
    check_splits,
    check_store,
)
from rasteret_dask.demo.world import World, WorldSize, make_world
from rasteret_dask.errors import StoreError
from rasteret_dask.extras import how_to_install
from rasteret_dask.show import plot
from rasteret_dask.store.ledger import BEGUN
from rasteret_dask.store.write import is_committed

__all__ = ["SMALL", "DemoSize", "demo_chips", "run_demo"]

WORLD, STORE, PICTURE = "world", "train.zarr", "demo.png"
"""What the demo leaves in its folder."""

Say = Callable[[str], None]
_SAY: Say = partial(print, flush=True)


@dataclass(frozen=True, slots=True)
class DemoSize:
    """How large the demo is; the default is what ``make demo`` runs."""

    world: WorldSize = field(default_factory=WorldSize)
    chip_px: int = 128
    """Side of a chip, pixels of 10 m."""
    cell_km: float = 5.12
    """Side of a split cell; small, because the world is."""
    least_chips: int = 100
    """Train chips there must be."""


SMALL = DemoSize(WorldSize(300, 360, 198, 128), chip_px=64, cell_km=0.64, least_chips=20)
"""A demo of seconds: 5.0 x 3.6 km."""


def run_demo(
    folder: Path, size: DemoSize | None = None, *, fresh: bool = False, say: Say = _SAY
) -> tuple[Check, ...]:
    """Make a small world, write its train chips to a Zarr store, draw them, and check the result.

    Parameters
    ----------
    folder
        Holds the world, the store and the picture. What is there and finished is used again.
    size
        How large everything is.
    fresh
        Remove what an earlier run left, first.
    say
        Gets each line of the report.

    Returns
    -------
    tuple of Check
        What was checked at the end; the demo is good when every ``ok`` is True.

    Raises
    ------
    StoreError
        When ``folder`` holds something else under the demo's names.
    """
    size = size or DemoSize()
    if fresh:
        _remove(folder, WORLD, STORE)
    started = time.monotonic()
    world, made = _world(folder / WORLD, size.world, say)
    if made:
        _remove(folder, STORE)  # chips of another world
    chips = demo_chips(world, size)
    train = chips.select("train")
    audit = chips.audit()
    _tell(say, "Three collections become chips", _story(chips, size))
    _tell(say, "The splits, dealt by ground", str(audit))
    _tell(say, "What writing the train chips will take", str(train.explain()))
    written = _write(train, folder / STORE, say)
    tree = xr.open_datatree(folder / STORE, engine="zarr")
    _draw(chips, tree, folder / PICTURE, written, say)
    checks = [*check_splits(audit, size.least_chips), check_objects(folder / STORE)]
    if checks[-1].ok:  # a damaged object may not even decode
        ids = train.table.column("chip_id").to_pylist()
        checks += [*check_store(tree, ids), *check_pixels(tree, world)]
        if "filled_fraction" in tree["optical"].to_dataset():
            checks.append(check_emptiest(tree, world))
    tree.close()
    _tell(say, "Checks", "\n".join(map(str, checks)))
    failed = [check for check in checks if not check.ok]
    say(f"\n{len(checks)} checks, {len(failed) or 'none'} failed; {time.monotonic() - started:.0f} s in all.")
    return tuple(checks)


def demo_chips(world: World, size: DemoSize) -> rd.Chips:
    """Return the demo's chips, split: the main job up to the point where something is written."""
    dates = ("2024-04-01", "2024-06-30")
    s2 = rd.build_from_stac(world.sentinel2, name="s2", date_range=dates)
    l8 = rd.build_from_stac(world.landsat, name="l8", date_range=dates)
    aef = rd.build_from_stac(world.embeddings, name="aef", date_range=dates)

    optical = (
        rd.merge(s2, l8)
        .subset(cloud_cover_lt=MOST_CLOUD_PCT)
        .harmonize(
            bands=["red", "green", "blue", "nir"],
            resolution=10,
            time="1MS",
            mask="clouds",
            pick="least_cloudy",
            fill=True,
        )
    )
    return (
        rd.join(optical=optical, embeddings=aef)
        .chips(size=size.chip_px, cell_km=size.cell_km)
        .split(train=0.7, val=0.15, test=0.15, seed=42)
    )


def _world(folder: Path, size: WorldSize, say: Say) -> tuple[World, bool]:
    """Return the world and whether it had to be made."""
    say("A made-up world of two sensors and embeddings, made once")
    started, steps = time.monotonic(), []

    def progress(share: float, what: str) -> None:
        steps.append(what)
        if sys.stderr.isatty():
            sys.stderr.write(f"\r  {share:4.0%}  {what:<60}")

    world = make_world(folder, size=size, progress=progress)
    if steps and sys.stderr.isatty():
        sys.stderr.write("\r" + " " * 70 + "\r")
    west, south, east, north = world.bounds
    how = f"made in {time.monotonic() - started:.0f} s" if steps else "there already, used again"
    say(f"  {folder}: {(east - west) / 1000:.1f} x {(north - south) / 1000:.1f} km, {how}")
    return world, bool(steps)


def _story(chips: rd.Chips, size: DemoSize) -> str:
    side = size.chip_px / 100
    return (
        "s2 | l8 -> optical: red, green, blue, nir in reflectance at 10 m, a slot a month, clouds masked\n"
        "aef     -> embeddings: 64 bands, as stored, once a year\n"
        f"optical & embeddings -> {len(chips)} chips of {size.chip_px} x {size.chip_px} pixels ({side:g} km),\n"
        f"                        laid out in split cells of {size.cell_km:g} km"
    )


def _write(train: rd.Chips, store: Path, say: Say) -> bool:
    """Write the train chips and tell; return False where they were all there."""
    say("\nWriting the train chips")
    if is_committed(str(store.absolute()), train.job.digest):
        say(f"  {store} is complete already, nothing is written")
        return False
    started = time.monotonic()
    try:
        train.to_zarr(store)
    except StoreError as error:
        remedy = "Start anew: rasteret-dask demo --fresh."
        raise StoreError(error.subject, error.found, error.expected, remedy) from error
    taken = time.monotonic() - started
    nbytes = sum(path.stat().st_size for path in store.rglob("*") if path.is_file())
    shards = train.job.shard_count
    many = "shard" if shards == 1 else "shards"
    say(f"  {store}: {len(train)} chips in {shards} {many}, {nbytes / 1e6:.0f} MB, {taken:.0f} s")
    return True


def _draw(chips: rd.Chips, tree: xr.DataTree, path: Path, written: bool, say: Say) -> None:
    say("\nPicture")
    if find_spec("matplotlib") is None:
        say(f"  none: it needs matplotlib ({how_to_install('plot')})")
        return
    if not written and path.exists():
        say(f"  {path}: there already")
        return
    from matplotlib.pyplot import close

    figure = plot.plot_demo(chips.table, tree)
    figure.savefig(path, dpi=130)
    close(figure)
    say(f"  {path}: the map of chips by split, and some of them")


def _tell(say: Say, title: str, text: str) -> None:
    say(f"\n{title}")
    for line in text.splitlines():
        say(f"  {line}")


def _remove(folder: Path, *names: str) -> None:
    """Remove what the demo made and the picture of it: a world by its marker, a store by its job's."""
    markers = {WORLD: "world.json", STORE: BEGUN}
    for name in names:
        if (folder / name).exists() and not (folder / name / markers[name]).exists():
            raise StoreError(
                f"starting the demo afresh in {folder}", f"{name} without {markers[name]}",
                "what a demo left there", "Choose another folder.",
            )  # fmt: skip
    for name in names:
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / PICTURE).unlink(missing_ok=True)
