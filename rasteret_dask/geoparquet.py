"""An Arrow table as a GeoParquet 1.1 file, and back."""

from __future__ import annotations

import io
import json
import os
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from rasteret_dask.errors import SchemaError

__all__ = ["read", "to_bytes", "write"]

_CORNERS = ("xmin", "ymin", "xmax", "ymax")


def write(table: pa.Table, path: str | os.PathLike[str]) -> None:
    """Write a table whole or not at all: a reader never sees half a file.

    Parameters
    ----------
    table
        Any Arrow table with a ``geometry`` column of WKB in lon/lat (OGC:CRS84). A ``bbox`` column that is a
        struct of xmin, ymin, xmax, ymax becomes the geometry's covering.
    path
        A local path; its directory is made as needed.

    Raises
    ------
    SchemaError
        When there is no such geometry column.
    """
    data = to_bytes(table)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def to_bytes(table: pa.Table) -> bytes:
    """Return a table as the bytes of a GeoParquet file; see :func:`write`."""
    if "geometry" not in table.column_names:
        raise SchemaError("writing GeoParquet", f"no column geometry (columns: {table.column_names})", "WKB")
    kind = table.schema.field("geometry").type
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise SchemaError("writing GeoParquet", f"geometry of type {kind}", "binary WKB")
    metadata = {**(table.schema.metadata or {}), b"geo": json.dumps(_geo(table)).encode()}
    sink = io.BytesIO()
    pq.write_table(table.replace_schema_metadata(metadata), sink, compression="zstd")
    return sink.getvalue()


def read(path: str | os.PathLike[str]) -> pa.Table:
    """Read a table that :func:`write` wrote, with the very schema it had.

    Raises
    ------
    SchemaError
        When the file is not Parquet.
    """
    try:
        return pq.ParquetFile(os.fspath(path)).read()
    except pa.ArrowInvalid as error:
        raise SchemaError(f"reading {os.fspath(path)}", str(error), "a GeoParquet file") from error


def _geo(table: pa.Table) -> dict[str, Any]:
    """Return the ``geo`` metadata (GeoParquet 1.1, "File metadata"); without ``crs`` it is OGC:CRS84."""
    shapes = shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False))
    present = shapes[~shapely.is_missing(shapes)]
    column: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": sorted({g.geom_type + (" Z" if g.has_z else "") for g in present}),
    }
    bounds = shapely.total_bounds(present) if len(present) else np.full(4, np.nan)
    if np.all(np.isfinite(bounds)):
        column["bbox"] = [float(v) for v in bounds]
    if "bbox" in table.column_names:
        kind = table.schema.field("bbox").type
        if pa.types.is_struct(kind) and all(kind.get_field_index(c) >= 0 for c in _CORNERS):
            column["covering"] = {"bbox": {c: ["bbox", c] for c in _CORNERS}}
    return {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": column}}
