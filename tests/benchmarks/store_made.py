"""A store of the made-up world's chips, for those who read it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import rasteret_dask as rd
from rasteret_dask.demo.world import WorldSize, make_world

HOW: dict[str, Any] = {"bands": ["red", "green", "blue", "nir"], "time": "1MS", "mask": "clouds"}


def scenes(folder: Path) -> rd.Collection:
    """Return the scenes, made where they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    world = make_world(folder / "world", size=WorldSize(2400, 2880, 1584))
    return rd.build_from_stac(world.sentinel2, name="s2", date_range=("2024-04-01", "2024-06-30"))


def planned_chips(s2: rd.Collection, size: int) -> rd.Chips:
    """Return chips of so many pixels a side."""
    return s2.harmonize(**HOW, dtype="uint16").chips(size, cell_km=size / 100)


def made_store(folder: Path, size: int, compression: Any = "auto", chips: int | None = None) -> Path:
    """Return a store of them, or of a sample, written where it is not there yet."""
    name = compression if isinstance(compression, str) else "codec"
    store = folder / f"chips-{size}-{name}{'' if chips is None else f'-{chips}'}.zarr"
    if not (store / "zarr.json").is_file():
        shutil.rmtree(store, ignore_errors=True)
        planned = planned_chips(scenes(folder), size)
        planned = planned if chips is None else planned.sample(chips)
        planned.to_zarr(store, progress=False, compression=compression)
    return store
