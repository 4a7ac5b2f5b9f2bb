# SPDX-License-Identifier: Apache-2.0
"""The chips of a shard as a tar that WebDataset reads, the same bytes on each run."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.store.encode import Piece

__all__ = ["npy_pieces", "shard_index", "tar_pieces"]

_BLOCK = 512
"""Bytes that headers and contents of a tar are multiples of."""


def tar_pieces(members: Iterable[tuple[str, Sequence[Piece]]]) -> Iterator[Piece]:
    """Yield the bytes of a tar in pieces; contents are not copied.

    Parameters
    ----------
    members
        Name and pieces of each file.
    """
    size = 0
    for name, pieces in members:
        info = tarfile.TarInfo(name)
        info.size = sum(len(piece) for piece in pieces)
        info.mode = 0o644  # everything else is the same on each run: no time, no user
        header = info.tobuf(tarfile.PAX_FORMAT)
        yield header
        yield from pieces
        padding = -info.size % _BLOCK
        if padding:
            yield bytes(padding)
        size += len(header) + info.size + padding
    end = 2 * _BLOCK
    yield bytes(end + -(size + end) % tarfile.RECORDSIZE)


def npy_pieces(values: NDArray[Any]) -> list[Piece]:
    """Return an array as NumPy's own format writes it: its header, and its numbers as they lie."""
    whole = np.ascontiguousarray(values)
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(whole))
    return [header.getvalue(), whole.reshape(-1).view(np.uint8)]


def shard_index(
    split: str, tars: Iterable[tuple[str, int, int]], features: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the index of a split's tars, as WebDataset's ``wids`` reads it.

    Parameters
    ----------
    split
        The split.
    tars
        File, chips and bytes of each.
    features
        Member of a sample -> what it is.
    """
    shards = [{"url": url, "nsamples": count, "filesize": size} for url, count, size in tars]
    return {
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": split,
        "chips": sum(one["nsamples"] for one in shards),
        "shardlist": shards,
        "features": dict(features),
    }
