"""The chips in a store of the README's job, for comparisons: those read pixel by pixel, and those resampled."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from jobs import Box, ReadmeJob
from numpy.typing import NDArray
from readme_plan import Source, sources


def bounds(layout: Path) -> list[Box]:
    """Return the bounds of a store's chips, in its order."""
    found = np.asarray(zarr.open_array(layout / "optical" / "bounds", mode="r")).tolist()
    return [(float(w), float(s), float(e), float(n)) for w, s, e, n in found]


def everything(store: Path) -> Iterator[NDArray[Any]]:
    """Yield each chip's pixels, whatever feeds them."""
    arrays = [zarr.open_array(store / name / "pixels", mode="r") for name in ("optical", "embeddings")]
    for number in range(arrays[0].shape[0]):
        yield from (np.asarray(array[number]) for array in arrays)


def aligned(job: ReadmeJob, store: Path) -> Iterator[NDArray[Any]]:
    """Yield the slots that Sentinel-2 alone feeds, then the embeddings and where they are valid."""
    pixels = zarr.open_array(store / "optical" / "pixels", mode="r")
    vectors = zarr.open_array(store / "embeddings" / "pixels", mode="r")
    valid = zarr.open_array(store / "embeddings" / "valid", mode="r")
    for chip, slots in _ordered(job, store):
        yield np.asarray(pixels[chip])[[all(s.sensor == "s2" for s in slot) for slot in slots]]
        yield np.asarray(vectors[chip])
        yield np.asarray(valid[chip])


def resampled(job: ReadmeJob, store: Path) -> Iterator[NDArray[Any]]:
    """Yield the slots that Landsat feeds, alone or among others."""
    pixels = zarr.open_array(store / "optical" / "pixels", mode="r")
    for chip, slots in _ordered(job, store):
        values = np.asarray(pixels[chip])
        yield from (values[t] for t, slot in enumerate(slots) if any(s.sensor == "l8" for s in slot))


def _ordered(job: ReadmeJob, store: Path) -> Iterator[tuple[int, tuple[tuple[Source, ...], ...]]]:
    """Yield each chip's number and what feeds its slots, from the north-west, whatever the store's order."""
    chips = bounds(store if (store / "optical" / "bounds" / "c").exists() else Path(job.layout))
    for number in sorted(range(len(chips)), key=lambda n: (-chips[n][3], chips[n][0])):
        yield number, _sources(job, chips[number])


@cache
def _sources(job: ReadmeJob, chip: Box) -> tuple[tuple[Source, ...], ...]:
    (found,) = sources(job, [chip])
    return found
