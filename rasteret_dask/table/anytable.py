# SPDX-License-Identifier: Apache-2.0
"""Whatever holds a table becomes an Arrow table, or stays a lazy dataset."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import shapely

from rasteret_dask.errors import SchemaError
from rasteret_dask.table.schema import RECORD_SCHEMA

__all__ = ["as_arrow"]


def as_arrow(value: Any, name: str) -> pa.Table | pads.Dataset:
    """Return a table as Arrow's.

    Parameters
    ----------
    value
        An Arrow table, batch, reader or dataset; a DataFrame or GeoDataFrame of pandas; or anything with
        ``__arrow_c_stream__`` (Polars, DuckDB, GeoArrow, a Collection).
    name
        What the table is called in messages.

    Returns
    -------
    pyarrow.Table or pyarrow.dataset.Dataset
        A dataset of files stays one, unless it is filtered: then its rows are read, as a filtered dataset can be
        neither sent to other processes nor told from an unfiltered one.

    Raises
    ------
    SchemaError
        When it is nothing of that kind.
    """
    match value:
        case pa.Table():
            return value
        case pads.FileSystemDataset() if not _is_filtered(value):
            return value
        case pads.Dataset():
            return value.to_table()
        case pa.RecordBatch():
            return pa.Table.from_batches([value])
        case pa.RecordBatchReader():
            return value.read_all()
    if hasattr(value, "columns") and hasattr(value, "iloc"):
        return _from_frame(value, name)
    if hasattr(value, "__arrow_c_stream__") or hasattr(value, "__arrow_c_array__"):
        return pa.table(value)
    raise SchemaError(
        f"records of {name!r}",
        f"a {type(value).__name__}",
        "an Arrow table or dataset, a GeoDataFrame, or what has __arrow_c_stream__",
        "Files are opened by rd.load(path).",
    )


def _is_filtered(dataset: pads.Dataset) -> bool:
    try:
        dataset.get_fragments()
    except ValueError:  # how pyarrow says it; there is no property to ask
        return True
    return False


def _from_frame(frame: Any, name: str) -> pa.Table:
    """Return a DataFrame with the columns of RECORD_SCHEMA in their types, which pandas cannot say."""
    geometry = getattr(frame, "active_geometry_name", None)
    if geometry is not None:
        if frame.crs is None:
            raise SchemaError(f"records of {name!r}", "no CRS", "one", "Set it: frame.set_crs(4326).")
        frame = frame.to_crs(4326).rename(columns={geometry: "geometry"})
    columns = {}
    for column in frame.columns:
        if column == "geometry" and geometry is not None:
            wkb = shapely.to_wkb(np.asarray(frame["geometry"].to_numpy()))
            columns[column] = pa.array(wkb, pa.binary())
            continue
        kind = RECORD_SCHEMA.field(column).type if column in RECORD_SCHEMA.names else None
        years = kind is not None and pa.types.is_timestamp(kind) and frame[column].dtype.kind in "iu"
        if years or column == "geometry":
            kind = None  # a cast would take years for microseconds, and WKT for WKB
        try:
            columns[column] = pa.array(frame[column], kind, from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            columns[column] = pa.array(frame[column], from_pandas=True)  # of another layout
    return pa.table(columns)
