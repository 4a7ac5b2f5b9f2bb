# SPDX-License-Identifier: Apache-2.0
"""Record tables without credentials, whose schema names the hosts that want a signature."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rasteret_dask.catalogs.credentials import bare, cleaned, without_credentials
from rasteret_dask.catalogs.signing import host_of, keep_apart, signed_hosts, signs_for
from rasteret_dask.table.schema import RECORD_SCHEMA

__all__ = ["holds_credentials", "hosts_of", "hrefs_of", "marked", "marks", "signed_in", "stripped"]

_KEY = b"signed_hosts"
_SUSPECT = r"://[^\s]*[?@#]"  # few hrefs have one of these, so few are looked at in Python
_OURS = frozenset(RECORD_SCHEMA.names) - {"properties"}


def hosts_of(schema: pa.Schema) -> tuple[str, ...] | None:
    """Return the hosts whose hrefs arrived signed; None where the table was never looked through."""
    text = (schema.metadata or {}).get(_KEY)
    return None if text is None else tuple(map(str, json.loads(text)))


def marks(hosts: Sequence[str]) -> dict[bytes, bytes]:
    """Return the key-value of a schema that :func:`hosts_of` reads."""
    return {_KEY: json.dumps(sorted(set(hosts))).encode()}


def marked(table: pa.Table, hosts: Sequence[str]) -> pa.Table:
    """Return a table whose schema names the hosts, beside those that it names; as it is, where there are none."""
    every = {*hosts, *(hosts_of(table.schema) or ())}
    if not every:
        return table
    return table.replace_schema_metadata({**(table.schema.metadata or {}), **marks(tuple(every))})


def stripped(table: pa.Table) -> pa.Table:
    """Return a record table without credentials, its hosts marked; this process keeps them for reading.

    Parameters
    ----------
    table
        Of RECORD_SCHEMA; in further columns, and in ``properties``, URLs lose their credentials too.
    """
    hrefs: set[str] = set()

    def kept(href: str) -> str:
        plain = keep_apart(href)
        if plain != href:
            hrefs.add(plain)
        return plain

    for at, name in enumerate(table.column_names):
        if name == "assets":
            column = _over_chunks(table.column(name), lambda chunk: _with_hrefs(chunk, kept))
        elif name in _OURS:
            continue
        else:
            column = _over_chunks(table.column(name), _without)
        if column is not table.column(name):
            table = table.set_column(at, table.schema.field(at), column)
    hosts = {host for href in hrefs if (host := host_of(href))}
    return marked(table, [*hosts, *signed_in(table)])


def holds_credentials(assets: pa.ChunkedArray) -> bool:
    """Return whether an href among ``assets`` holds a credential."""
    return any(
        bare(href) != href
        for chunk in assets.chunks
        for href in _suspects(pc.struct_field(chunk.items, "href"))
    )


def signed_in(table: pa.Table) -> tuple[str, ...]:
    """Return the hosts of a record table for which this process has signatures or signers."""
    places: set[str] = set()
    for chunk in table.column("assets").chunks:
        hrefs = pc.struct_field(chunk.items, "href")
        hosts = pc.replace_substring_regex(hrefs, r"(?s)^(\w+://[^/?#]*).*", r"\1")  # few, of very many hrefs
        places.update(hosts.unique().drop_null().to_pylist())
    return signed_hosts(hrefs_of(table)) if any(signs_for(host_of(place)) for place in places) else ()


def hrefs_of(table: pa.Table) -> Iterator[str]:
    """Yield the distinct hrefs of a record table."""
    for chunk in table.column("assets").chunks:
        first, last = chunk.offsets[0].as_py(), chunk.offsets[-1].as_py()
        items = chunk.items.slice(first, last - first)
        yield from pc.unique(pc.struct_field(items, "href")).drop_null().to_pylist()


def _over_chunks(column: pa.ChunkedArray, change: Callable[[pa.Array], pa.Array]) -> pa.ChunkedArray:
    chunks = [change(chunk) for chunk in column.chunks]
    same = all(new is old for new, old in zip(chunks, column.chunks, strict=True))
    return column if same else pa.chunked_array(chunks, type=column.type)


def _with_hrefs(assets: pa.MapArray, change: Callable[[str], str]) -> pa.MapArray:
    """Return assets whose hrefs went through a function."""
    items = assets.items
    at = items.type.get_field_index("href")
    hrefs = pc.struct_field(items, "href")
    new = _mapped(hrefs, change)
    if new is hrefs:
        return assets
    fields = [new if i == at else pc.struct_field(items, i) for i in range(items.type.num_fields)]
    whole = pa.StructArray.from_arrays(fields, fields=list(items.type), mask=items.is_null())
    return pa.MapArray.from_arrays(
        assets.offsets, assets.keys, whole, assets.type, mask=assets.is_null() if assets.null_count else None
    )


def _without(array: Any) -> Any:
    """Return an array of any type whose texts hold no credentials in URLs; the same one where none did."""
    kind = array.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return _mapped(array, without_credentials)
    if isinstance(array, pa.ExtensionArray):
        inner = _without(array.storage)
        return array if inner is array.storage else pa.ExtensionArray.from_storage(kind, inner)
    if pa.types.is_dictionary(kind):
        inner = _without(array.dictionary)
        return array if inner is array.dictionary else pa.DictionaryArray.from_arrays(array.indices, inner)
    if not pa.types.is_nested(kind) or not _has_text(kind):
        return array
    values = array.to_pylist()
    changed = [cleaned(value) for value in values]
    return array if changed == values else pa.array(changed, kind)


def _has_text(kind: pa.DataType) -> bool:
    inner = [kind.field(i).type for i in range(kind.num_fields)]
    text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(is_text(kind) for is_text in text) or any(map(_has_text, inner))


def _suspects(texts: pa.Array) -> list[str]:
    found = texts.filter(pc.fill_null(pc.match_substring_regex(texts, _SUSPECT), False))
    return list(found.unique().to_pylist())


def _mapped(texts: pa.Array, change: Callable[[str], str]) -> pa.Array:
    """Return texts with those that may hold a credential sent through a function; the same array where none changed."""
    if pa.types.is_string_view(texts.type):  # no kernel searches in it
        values = texts.to_pylist()
        changed = [None if v is None else change(v) for v in values]
        return texts if changed == values else pa.array(changed, texts.type)
    new = {text: change(text) for text in _suspects(texts)}
    new = {text: plain for text, plain in new.items() if plain != text}
    if not new:
        return texts
    return pa.array([new.get(text, text) for text in texts.to_pylist()], texts.type)
