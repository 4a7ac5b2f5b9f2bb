# SPDX-License-Identifier: Apache-2.0
"""Assets of items that became no band, counted by their reasons; a table's schema metadata keep them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import pyarrow as pa

from rasteret_dask.table.rasters import LeftAsset

__all__ = ["LeftAssets", "without_left_assets"]

_KEY = b"left_assets"
_MOST = 1000  # kinds that are kept: some catalogs give the files of every item keys of their own
_SHOWN = 8
_COLUMNS = pa.schema(
    [
        pa.field("member", pa.string()),
        pa.field("asset", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("records", pa.int64()),
        pa.field("example", pa.string()),  # id of one of them
    ]
)


class _Draft(Protocol):
    @property
    def row(self) -> dict[str, object]: ...
    @property
    def left(self) -> tuple[LeftAsset, ...]: ...


@dataclass(slots=True)
class LeftAssets:
    """How many items have an asset that is left out, by key and reason."""

    counts: dict[LeftAsset, tuple[int, str]] = field(default_factory=dict)
    """{(asset key, reason): (items, id of the first)}; items with further kinds are counted under ``("", ...)``."""

    @classmethod
    def of(cls, schema: pa.Schema) -> LeftAssets:
        """Return what a table's schema keeps."""
        text = (schema.metadata or {}).get(_KEY)
        rows = [] if text is None else json.loads(text)
        return cls({(str(key), str(why)): (int(n), str(first)) for key, why, n, first in rows})

    def add(self, drafts: Iterable[_Draft]) -> None:
        """Count the assets that rows leave out."""
        for draft in drafts:
            for kind in draft.left:
                if kind not in self.counts and len(self.counts) >= _MOST:
                    kind = ("", f"further kinds than the {_MOST} that are listed")
                count, first = self.counts.get(kind, (0, str(draft.row["id"])))
                self.counts[kind] = count + 1, first

    def metadata(self) -> dict[bytes, bytes]:
        """Return the key-value of a schema that :meth:`of` reads; empty where nothing is left out."""
        rows = [[*kind, *count] for kind, count in self.counts.items()]
        return {_KEY: json.dumps(rows).encode()} if rows else {}

    def marked(self, table: pa.Table) -> pa.Table:
        """Return a table whose schema keeps them."""
        own = self.metadata()
        return table.replace_schema_metadata({**(table.schema.metadata or {}), **own}) if own else table

    def table(self, member: str) -> pa.Table:
        """Return a row for each asset key and reason."""
        rows = [(member, *kind, *count) for kind, count in sorted(self.counts.items())]
        columns = [list(column) for column in zip(*rows, strict=True)] or [[] for _ in _COLUMNS]
        return pa.table(
            [pa.array(c, f.type) for c, f in zip(columns, _COLUMNS, strict=True)], schema=_COLUMNS
        )

    def note(self) -> str:
        """Return a sentence with the first of them."""
        shown = [f"{key} ({why})" for key, why in list(self.counts)[:_SHOWN]]
        more = len(self.counts) - len(shown)
        return f"assets left out: {'; '.join(shown)}{f'; and {more} more' if more else ''}: see left_out()"


def without_left_assets(schema: pa.Schema) -> pa.Schema:
    """Return a schema that does not tell: what was left out is no part of what a table is known by."""
    metadata = schema.metadata or {}
    return (
        schema.with_metadata({k: v for k, v in metadata.items() if k != _KEY}) if _KEY in metadata else schema
    )
