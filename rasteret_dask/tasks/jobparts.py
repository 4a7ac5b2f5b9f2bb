"""A plan's shards, numbered over all, in parts of neighbours: each part is a job of its own, with chips of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["PartSpan", "parts_of"]


@dataclass(frozen=True, slots=True)
class PartSpan:
    """The shards of one split in one part."""

    split: str | None
    first: int
    """Number of the first shard."""
    start: int
    """First chip, counted within the split."""
    stop: int


def parts_of(counts: Mapping[str | None, int], per_shard: int, chips: int) -> Sequence[tuple[PartSpan, ...]]:
    """Cut the shards of all splits into parts, each over the same ground as far as splits are spread evenly.

    Parameters
    ----------
    counts
        Split -> its chips, in the order of splits.
    per_shard
        Chips of a shard.
    chips
        About how many chips a part has.

    Returns
    -------
    sequence
        For each part, a span of every split; it may be empty.
    """
    number = max(1, round(sum(counts.values()) / chips))
    parts: list[list[PartSpan]] = [[] for _ in range(number)]
    for split, count in counts.items():
        edges = np.round(np.arange(number + 1) * (-(-count // per_shard) / number)).astype(int).tolist()
        for part, first, last in zip(parts, edges[:-1], edges[1:], strict=True):
            part.append(PartSpan(split, first, min(first * per_shard, count), min(last * per_shard, count)))
    return [tuple(part) for part in parts if any(span.stop > span.start for span in part)]
