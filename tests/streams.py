"""Shards whose pixels say which chip they are, and which note each time that they are read."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from dask._task_spec import Task
from numpy.typing import NDArray
from test_write import layout_of
from waiting import until as until

import rasteret_dask as rd
from rasteret_dask.errors import ReadError
from rasteret_dask.streams.chipshards import ChipShards
from rasteret_dask.streams.planned import planned
from rasteret_dask.streams.stream import Batching, Stream
from rasteret_dask.tasks.batches import Arrays, InMemory, SourcePixels, take
from rasteret_dask.tasks.context import ReadContext


@dataclass(frozen=True)
class Shards:
    """Made-up shards of chips."""

    log: Path
    """A folder: a file is put there each time a shard is read."""
    sizes: tuple[int, ...] = (6,) * 12
    pixels: int = 4
    """Side of a chip."""
    delay_s: float = 0.0
    broken: tuple[int, ...] = ()
    """Shards that cannot be read while there is no file ``mended``."""
    error: type[Exception] = ReadError
    """What reading them ends with."""
    waits: bool = False
    """Whether reading goes on only once there is a file ``go``."""

    def read(self, shard: int) -> Arrays:
        """Return one shard."""
        self.log.mkdir(exist_ok=True)
        (self.log / f"{shard}-{uuid4().hex}").touch()
        time.sleep(self.delay_s)
        while self.waits and not (self.log / "go").exists():
            time.sleep(0.02)
        if shard in self.broken and not (self.log / "mended").exists():
            raise self.error(f"shard {shard}", "nothing")
        n = self.sizes[shard]
        number = (1000 * shard + np.arange(n)).astype(np.float32)
        shape = (n, 1, 2, self.pixels, self.pixels)
        return {
            "s2": np.broadcast_to(number[:, None, None, None, None], shape).copy(),
            "s2/valid": np.ones((n, 1, self.pixels, self.pixels), dtype=bool),
            "s2/datetime": np.full((n, 1), np.datetime64("2024-05-01", "us")),
            "chip_id": np.array([f"{shard}/{row}" for row in range(n)], dtype=object),
            "bbox": np.zeros((n, 4)),
            "epsg": np.full(n, 32633, dtype=np.int32),
            "split": np.array(["train"] * n, dtype=object),
        }

    @property
    def reading(self) -> ChipShards:
        """Return what streams take."""
        tasks = [
            (f"read-{n}-{self.log.name}", Task(f"read-{n}-{self.log.name}", self.read, n))
            for n in self.places
        ]
        return ChipShards(
            self.sizes,
            f"made {self.sizes}",
            {"s2": SourcePixels(("red", "nir"), "float32")},
            lambda shard, _: InMemory(self.read(shard)),
            lambda: ({}, tasks),
            take,
        )

    @property
    def places(self) -> range:
        """The shards."""
        return range(len(self.sizes))

    @property
    def reads(self) -> Counter[int]:
        """How often each shard was read so far."""
        return Counter(int(p.name.partition("-")[0]) for p in self.log.glob("*-*"))

    def stream(self, batch_size: int, shuffle: int | None = None, **more: Any) -> Stream:
        """Return a stream of them."""
        return Batching(batch_size, shuffle, **more).stream(self.reading)

    def ids(self) -> list[str]:
        """Return all chips."""
        return [f"{shard}/{row}" for shard in self.places for row in range(self.sizes[shard])]


def ids_of(batch: Arrays) -> list[str]:
    """Return a batch's chips, once its pixels say the same."""
    found: list[str] = batch["chip_id"].tolist()
    said = batch["s2"][:, 0, 0, 0, 0]
    assert [f"{int(n) // 1000}/{int(n) % 1000}" for n in said] == found
    return found


def flat(found: Any) -> list[str]:
    """Return the chips of batches."""
    return [chip for batch in found for chip in ids_of(batch)]


def assert_same(found: Arrays, wanted: Arrays) -> None:
    """Compare two batches bit for bit."""
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values)


def concat(parts: Sequence[Arrays]) -> Arrays:
    """Return the chips of all parts, one part behind the other."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def rows_of(arrays: Arrays, ids: list[str]) -> NDArray[np.int64]:
    """Return where chips lie."""
    place = {chip: row for row, chip in enumerate(arrays["chip_id"].tolist())}
    return np.array([place[chip] for chip in ids], dtype=np.int64)


def train_chips(s2: rd.Collection, aef: rd.Collection) -> rd.Chips:
    """Return real chips of two sources of different dtype, in one shard."""
    sources = {
        "optical": s2.harmonize(bands=["red", "nir"], time="1MS", mask="clouds", dtype="uint16"),
        "embeddings": aef.harmonize(bands=["A00", "A63"], units="embedding"),
    }
    chips = rd.join(**sources).chips(size=32, cell_km=0.96).split(train=0.6, val=0.2, test=0.2, seed=42)  # type: ignore[arg-type]
    return chips.select("train")


def in_small_shards(chips: rd.Chips) -> ChipShards:
    """Return the same chips in several shards."""
    layout = layout_of(chips, 150_000)
    found = planned(layout.job, layout.outputs, ReadContext())
    assert len(found.sizes) > 8
    return found
