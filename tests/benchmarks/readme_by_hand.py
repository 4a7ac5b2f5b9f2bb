"""What the README's job needs beside a reader, written by hand: masks, units, filling, cutting, joining, writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import readme_store
import zarr
from bare import copy_metadata, reflectance
from jobs import Box, ReadmeJob
from numpy.typing import NDArray
from readme_plan import Source

ASSETS = {"s2": ("red", "green", "blue", "nir", "scl"), "l8": ("red", "green", "blue", "nir08", "qa_pixel")}
"""Asset keys: bands in the output's order, then the quality band."""

ARRAYS = tuple(f"{source}/{array}" for source in ("optical", "embeddings") for array in ("pixels", "valid"))


@dataclass(frozen=True)
class Ground:
    """What is read whole: the box around all chips."""

    bounds: Box
    resolution: float

    @classmethod
    def around(cls, chips: Sequence[Box], resolution: float) -> Ground:
        """Return the box around some chips."""
        west, south, east, north = zip(*chips, strict=True)
        return cls((min(west), min(south), max(east), max(north)), resolution)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        west, south, east, north = self.bounds
        return round((north - south) / self.resolution), round((east - west) / self.resolution)

    def window(self, chip: Box) -> tuple[slice, slice]:
        """Return a chip's rows and columns."""
        row = round((self.bounds[3] - chip[3]) / self.resolution)
        col = round((chip[0] - self.bounds[0]) / self.resolution)
        size = round((chip[2] - chip[0]) / self.resolution)
        return slice(row, row + size), slice(col, col + size)


def write(
    job: ReadmeJob,
    plan: Sequence[tuple[tuple[Source, ...], ...]],
    items: Mapping[str, Sequence[dict[str, Any]]],
    layers: Mapping[Source, Sequence[NDArray[Any]]],
    vectors: Sequence[NDArray[Any]],
    ground: Ground,
) -> None:
    """Write the chips of ``job.layout`` as its shards.

    Parameters
    ----------
    plan
        Per chip and month the records that feed it, each filling what those before leave invalid.
    items
        Of each sensor, for their scales and offsets.
    layers
        Per record its bands and its quality band, shape (y, x) of the ground.
    vectors
        Bands of the embeddings, shape (y, x) of the ground.
    """
    chips = readme_store.bounds(Path(job.layout))
    copy_metadata(Path(job.layout), Path(job.store))
    group = zarr.open_group(job.store, mode="r+")
    arrays: dict[str, Any] = {name: group[name] for name in ARRAYS if name in group}
    pixels, embedded = arrays["optical/pixels"], arrays["embeddings/pixels"]
    tables = {
        source: _tables(items[source.sensor][source.number], source.sensor, job.dtype) for source in layers
    }
    hidden = {source: _hidden(source.sensor)[bands[-1]] for source, bands in layers.items()}
    missing = np.nan if job.dtype == "float32" else 65535

    def optical(chip: int) -> NDArray[Any]:
        window = ground.window(chips[chip])
        out = np.full(pixels.shape[1:], missing, job.dtype)
        for slot, feeding in enumerate(plan[chip]):
            for rank, source in enumerate(feeding):
                clouds = hidden[source][window]
                for band, table in enumerate(tables[source]):
                    values = table[layers[source][band][window]]
                    values[clouds] = missing
                    own = out[slot, band]
                    if rank == 0:
                        own[...] = values
                    else:
                        np.copyto(
                            own, values, where=np.isnan(own) if job.dtype == "float32" else own == missing
                        )
        return out

    def put(first: int) -> None:
        numbers = range(first, min(first + pixels.shards[0], len(chips)))
        block = np.stack([optical(chip) for chip in numbers])
        pixels[first : numbers.stop] = block
        if "optical/valid" in arrays:  # floats have NaN instead
            arrays["optical/valid"][first : numbers.stop] = (block != missing).all(2)

    def put_vectors(first: int) -> None:
        numbers = range(first, min(first + embedded.shards[0], len(chips)))
        windows = [ground.window(chips[chip]) for chip in numbers]
        block = np.stack([np.stack([band[window] for band in vectors])[None] for window in windows])
        embedded[first : numbers.stop] = block
        arrays["embeddings/valid"][first : numbers.stop] = (block != -128).all(2)

    with ThreadPoolExecutor(job.threads) as pool:
        list(pool.map(put, range(0, len(chips), pixels.shards[0])))
        list(pool.map(put_vectors, range(0, len(chips), embedded.shards[0])))


def _tables(item: dict[str, Any], sensor: str, dtype: str) -> list[NDArray[Any]]:
    """Return per band what each stored number becomes; with ``boa_offset_applied`` the offset is in the pixels."""
    found = []
    for key in ASSETS[sensor][:-1]:
        band = item["assets"][key]["raster:bands"][0]
        offset = 0.0 if item["properties"].get("earthsearch:boa_offset_applied") else band["offset"]
        found.append(reflectance(band["scale"], offset, dtype))
    return found


def _hidden(sensor: str) -> NDArray[np.bool_]:
    """Return for each number of the quality band whether it hides the ground: shadow, cloud, cirrus."""
    values = np.arange(2**16)
    return np.isin(values, (3, 8, 9, 10)) if sensor == "s2" else values & 0b11010 != 0
