# SPDX-License-Identifier: Apache-2.0
"""Rows chosen by a hash of what they are called: the same everywhere, whatever other rows there are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError

__all__ = ["hash_unit", "salt_hash", "sample_rows", "sample_unit", "text_hash", "unit_of", "unit_sequence"]

BASIS, PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x00000100000001B3)
"""Of FNV-1a, http://www.isthe.com/chongo/tech/comp/fnv/."""

MIXING = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
"""Factors of ``fmix64`` of MurmurHash3."""


GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2**64 over the golden ratio: what SplitMix64 counts by."""


def hash_unit(values: Sequence[Any], *salt: Any) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each value: sha256 of salt and value, the same everywhere and always.

    For the few cells that splits are made of; ids, which are many, are drawn by :func:`sample_unit`.
    """
    prefix = "|".join(str(s) for s in salt).encode()
    digests = b"".join(hashlib.sha256(prefix + b"|" + str(v).encode()).digest()[:8] for v in values)
    return np.frombuffer(digests, dtype=">u8").astype(np.float64) / 2.0**64


def text_hash(
    texts: pa.Array | pa.ChunkedArray, before: NDArray[np.uint64] | np.uint64 = BASIS
) -> NDArray[np.uint64]:
    """Return the 64-bit FNV-1a hash of the UTF-8 bytes of each text.

    Parameters
    ----------
    texts
        Shape (text,).
    before
        The hash of what stands before each text, or before all of them: a byte changes the hash of those before it,
        so that what many texts begin with is hashed once.
    """
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    _, places, data = texts.cast(pa.string()).buffers()
    result = np.array(np.broadcast_to(before, len(texts)))
    if not len(texts) or data is None:
        return result
    stops = np.frombuffer(places, dtype=np.int32)[texts.offset : texts.offset + len(texts) + 1]
    begin, length = stops[:-1], np.diff(stops)
    least, codes = int(length.min()), np.frombuffer(data, dtype=np.uint8)
    for at in range(int(length.max())):
        some = slice(None) if at < least else np.flatnonzero(length > at)
        result[some] = (result[some] ^ codes[begin[some] + at]) * PRIME
    return result


def unit_of(hashes: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each hash: MurmurHash3's last step, without which alike texts lie near."""
    mixed = hashes
    for factor in MIXING:
        mixed = (mixed ^ (mixed >> np.uint64(33))) * factor
    mixed = mixed ^ (mixed >> np.uint64(33))
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def unit_sequence(text: str, places: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Return the numbers in [0, 1) at some places of the endless sequence that a text begins, the same everywhere.

    It is SplitMix64 (Steele, Lea and Flood, 2014), begun at the text's hash, with MurmurHash3's last step.
    """
    return unit_of(text_hash(pa.array([text])) + places * GOLDEN)


def salt_hash(seed: int) -> np.uint64:
    """Return the hash of what stands before an id where a sample is drawn by it: ``sample|<seed>|``."""
    return np.uint64(text_hash(pa.array([f"sample|{seed}|"]))[0])


def sample_unit(ids: pa.Array | pa.ChunkedArray, seed: int) -> NDArray[np.float64]:
    """Return the number in [0, 1) that each id is drawn by: of the text ``sample|<seed>|<id>``, the same everywhere."""
    return unit_of(text_hash(ids, salt_hash(seed)))


def sample_rows(table: pa.Table, id_column: str, n: int, seed: int, by: str | None) -> NDArray[np.int64]:
    """Return the rows of the ``n`` smallest seeded hashes of the id, per stratum of ``by``, in row order.

    A larger ``n`` of the same seed contains the smaller one's rows.
    """
    if n < 0:
        raise PlanError("sample(n=)", repr(n), "0 or more")
    if by is not None and by not in table.column_names:
        raise PlanError("sample(by=)", repr(by), f"one of {', '.join(table.column_names)}")
    rank = sample_unit(table.column(id_column), seed)
    strata = np.zeros(table.num_rows, dtype=np.int64)
    if by is not None:
        values = [str(v) for v in table.column(by).to_pylist()]
        strata = np.unique(values, return_inverse=True)[1].astype(np.int64)
    order = np.lexsort((rank, strata))
    place = np.arange(len(order)) - np.searchsorted(strata[order], strata[order])
    return np.sort(order[place < n])
