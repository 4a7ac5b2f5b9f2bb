"""Tables become collections: of this package's own schema, any other of scenes, or files of either."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from rasteret_dask.collection import Collection
from rasteret_dask.errors import SourceError
from rasteret_dask.plan import Source
from rasteret_dask.records import RECORD_SCHEMA, conform
from rasteret_dask.scan import token_of
from rasteret_dask.sources import read_table
from rasteret_dask.tables import table_to_records

__all__ = ["as_collection", "build_from_table", "load"]


def build_from_table(
    table: Any,
    *,
    name: str,
    dataset: str | None = None,
    column_map: Mapping[str, str] | None = None,
    headers: bool = True,
) -> Collection:
    """Build a collection from any Arrow or Parquet table with ``id, datetime, geometry, assets``.

    Parameters
    ----------
    table
        An Arrow table, or the path or URL of a Parquet file.
    name
        What the collection is called.
    dataset
        Name of a known dataset where the ``collection`` column does not say it.
    column_map
        {your column: our column}.
    headers
        Read the headers of assets that have none in the table.
    """
    return as_collection(
        table_to_records(table, name=name, dataset=dataset, column_map=column_map, headers=headers), name=name
    )


def as_collection(table: pa.Table | pads.Dataset, *, name: str) -> Collection:
    """Wrap a record table or dataset; nothing is read again.

    Raises
    ------
    SchemaError
        When it does not have the columns of RECORD_SCHEMA.
    """
    lazy = isinstance(table, pads.Dataset)
    if lazy and not _has_schema(table.schema):
        lazy, table = False, table.to_table()
    records = table if lazy else conform(table, name)
    token = token_of(records)
    return Collection(Source(name, token), {token: records})


def _has_schema(schema: pa.Schema) -> bool:
    return all(f.name in schema.names and schema.field(f.name).type == f.type for f in RECORD_SCHEMA)


def load(path: str | os.PathLike[str], name: str | None = None) -> Collection:
    """Load records that :meth:`Collection.export` wrote, or any Parquet file in RECORD_SCHEMA.

    Filters of a local file go to its scan.
    """
    place = os.fspath(path)
    called = name or os.path.splitext(os.path.basename(place))[0]
    if os.path.exists(place):
        try:
            dataset = pads.dataset(place)
        except pa.ArrowInvalid as error:
            raise SourceError(f"table {place}", str(error), "a Parquet file") from error
        return as_collection(dataset, name=called)
    return as_collection(read_table(place), name=called)
