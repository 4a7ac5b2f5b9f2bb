# SPDX-License-Identifier: Apache-2.0
"""Kinds of bands in the ``assets`` of a record table: derived from an older ``role``, or set by a user."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rasteret_dask.errors import BandError, SchemaError
from rasteret_dask.rules.kinds import CLASS, KINDS, quality_kind

__all__ = ["check_kind_names", "derived", "with_fields", "with_kinds"]


def derived(assets: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
    """Return assets with the kind that an older ``role`` tells: it held both.

    Parameters
    ----------
    assets
        Maps of {band: ``schema.ASSET_TYPE``}.
    name
        What the table is called in messages.

    Raises
    ------
    SchemaError
        When an asset has a kind that does not exist.
    """
    return pa.chunked_array([_derived(chunk, name) for chunk in assets.chunks], type=assets.type)


def with_kinds(table: pa.Table, kinds: Sequence[tuple[str, str]]) -> pa.Table:
    """Return records whose bands have the kinds that a user names.

    Parameters
    ----------
    table
        A record table.
    kinds
        (band, kind) pairs; a band by its code, its common name or its asset key.
    """
    if not kinds or "assets" not in table.column_names:
        return table
    column = table.column("assets")
    chunks = [_set(chunk, kinds) for chunk in column.chunks]
    at = table.schema.get_field_index("assets")
    return table.set_column(at, table.schema.field("assets"), pa.chunked_array(chunks, type=column.type))


def with_fields(table: pa.Table, band: str, fields: Mapping[str, pa.Array]) -> pa.Table:
    """Return records where some fields of one band's asset have other values.

    Parameters
    ----------
    table
        A record table.
    band
        The code of the band.
    fields
        New values by field, one a record; of records without the band they are not used.
    """
    column = table.column("assets")
    chunks, first = [], 0
    for chunk in column.chunks:
        items = np.arange(len(chunk.items))  # of the whole buffer, of which the chunk may be a slice
        row = np.searchsorted(np.asarray(chunk.offsets), items, side="right") - 1
        inside = (row >= 0) & (row < len(chunk))
        hit = pc.and_(pc.equal(chunk.keys, band), pa.array(inside))
        place = pa.array(first + row, mask=~inside)
        new = {
            name: pc.if_else(hit, values.take(place), chunk.items.field(name))
            for name, values in fields.items()
        }
        chunks.append(_replaced(chunk, new))
        first += len(chunk)
    at = table.schema.get_field_index("assets")
    return table.set_column(at, table.schema.field("assets"), pa.chunked_array(chunks, type=column.type))


def check_kind_names(tables: Iterable[pa.Table], kinds: Sequence[tuple[str, str]], where: str) -> None:
    """Raise BandError where a user names the kind of a band that no record of any table has.

    Parameters
    ----------
    tables
        Record tables.
    kinds
        As in :func:`with_kinds`.
    where
        The call, for the message: ``"harmonize(kinds=)"``.
    """
    if not kinds:
        return
    codes: dict[str, None] = {}
    names: set[str] = set()
    for table in tables:
        for chunk in table.column("assets").chunks:
            codes |= dict.fromkeys(pc.unique(chunk.keys).to_pylist())
            for field in ("common_name", "asset"):
                names.update(v for v in pc.unique(pc.struct_field(chunk.items, field)).to_pylist() if v)
    unknown = [band for band, _ in kinds if band not in names | set(codes)]
    if unknown:
        raise BandError(
            f"{where} of band {unknown[0]!r}",
            "no record with such a band",
            f"one of {', '.join(codes)}",
            "Name it by code, common name or asset key.",
        )


def _set(assets: pa.MapArray, kinds: Sequence[tuple[str, str]]) -> pa.MapArray:
    kind = pc.struct_field(assets.items, "kind")
    texts = [assets.keys, *(pc.struct_field(assets.items, field) for field in ("common_name", "asset"))]
    for band, name in kinds:
        hit = pa.array(np.zeros(len(kind), dtype=bool))
        for text in texts:
            hit = pc.or_(hit, pc.fill_null(pc.equal(text, band), False))
        kind = pc.if_else(hit, name, kind)
    return _replaced(assets, {"kind": kind})


def _derived(assets: pa.MapArray, name: str) -> pa.MapArray:
    role, kind = (pc.struct_field(assets.items, field) for field in ("role", "kind"))
    others = [v for v in pc.unique(kind).to_pylist() if v is not None and v not in KINDS]
    if others:
        raise SchemaError(
            f"assets of the records of {name!r}", f"kind {others[0]!r}", f"one of {', '.join(KINDS)}, or null"
        )
    quality = pc.fill_null(pc.equal(role, "quality"), False)
    older = pc.is_in(role, value_set=pa.array(list(KINDS)))
    unknown = pc.and_(pc.is_null(kind), pc.or_(quality, older))
    if not (pc.any(unknown).as_py() or pc.any(older).as_py()):
        return assets
    scenes = [band for band in pc.unique(assets.keys).to_pylist() if quality_kind(band) == CLASS.name]
    by_name = pc.if_else(pc.is_in(assets.keys, value_set=pa.array(scenes, pa.string())), "class", "bitfield")
    return _replaced(
        assets,
        {
            "role": pc.if_else(quality, "quality", "data"),
            "kind": pc.if_else(unknown, pc.if_else(quality, by_name, role), kind),
        },
    )


def _replaced(assets: pa.MapArray, fields: Mapping[str, Any]) -> pa.MapArray:
    """Return maps whose items have other values of some fields."""
    own = assets.type.item_type
    items = pa.StructArray.from_arrays(
        [fields[f.name] if f.name in fields else assets.items.field(f.name) for f in own],
        fields=list(own),
        mask=assets.items.is_null(),
    )
    offsets = pa.array(np.array(assets.offsets))  # of the whole buffer, as keys and items are
    mask = assets.is_null() if assets.null_count else None
    return pa.MapArray.from_arrays(offsets, assets.keys, items, assets.type, mask=mask)
