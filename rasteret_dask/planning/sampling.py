"""Rows chosen by a hash of what they are called: the same everywhere, whatever other rows there are."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError

__all__ = ["hash_unit", "salt_of", "sample_rows", "unit_of"]


def hash_unit(values: Sequence[Any], *salt: Any) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each value: sha256 of salt and value, the same everywhere and always."""
    prefix = "|".join(str(s) for s in salt).encode()
    digests = b"".join(hashlib.sha256(prefix + b"|" + str(v).encode()).digest()[:8] for v in values)
    return np.frombuffer(digests, dtype=">u8").astype(np.float64) / 2.0**64


def salt_of(seed: int) -> str:
    """Return what stands before an id, and a ``|``, where a sample is drawn by its hash."""
    return f"sample|{seed}"


def unit_of(texts: pa.Array) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each text, its salt included: what :func:`hash_unit` makes of them."""
    digests = b"".join([hashlib.sha256(text).digest() for text in texts.cast(pa.binary()).to_pylist()])
    return np.frombuffer(digests, dtype=">u8")[::4].astype(np.float64) / 2.0**64


def sample_rows(table: pa.Table, id_column: str, n: int, seed: int, by: str | None) -> NDArray[np.int64]:
    """Return the rows of the ``n`` smallest seeded hashes of the id, per stratum of ``by``, in row order.

    A larger ``n`` of the same seed contains the smaller one's rows.
    """
    if n < 0:
        raise PlanError("sample(n=)", repr(n), "0 or more")
    if by is not None and by not in table.column_names:
        raise PlanError("sample(by=)", repr(by), f"one of {', '.join(table.column_names)}")
    ids = table.column(id_column).combine_chunks()
    rank = unit_of(pc.binary_join_element_wise(salt_of(seed), ids, "|"))
    strata = np.zeros(table.num_rows, dtype=np.int64)
    if by is not None:
        values = [str(v) for v in table.column(by).to_pylist()]
        strata = np.unique(values, return_inverse=True)[1].astype(np.int64)
    order = np.lexsort((rank, strata))
    place = np.arange(len(order)) - np.searchsorted(strata[order], strata[order])
    return np.sort(order[place < n])
