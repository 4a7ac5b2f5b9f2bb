# SPDX-License-Identifier: Apache-2.0
"""rasteret's own tables, a column of headers per band, in and out: docs/explanation/schema-contract.md there."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.table.records import Records

__all__ = ["header_columns", "level_of", "to_rasteret"]

_SUFFIX = "_metadata"
_BAND = pa.struct(  # scale and offset are ours: rasteret leaves them alone, and they come back by them
    [("href", pa.string()), ("band_index", pa.int64()), ("scale", pa.float64()), ("offset", pa.float64())]
)
_HEADER = pa.struct(
    [
        ("image_width", pa.int32()),
        ("image_height", pa.int32()),
        ("tile_width", pa.int32()),
        ("tile_height", pa.int32()),
        ("dtype", pa.string()),
        ("transform", pa.list_(pa.float64())),  # scale_x, trans_x, scale_y, trans_y
        ("predictor", pa.int32()),
        ("compression", pa.int32()),
        ("tile_offsets", pa.list_(pa.int64())),
        ("tile_byte_counts", pa.list_(pa.int64())),
        ("pixel_scale", pa.list_(pa.float64())),
        ("tiepoint", pa.list_(pa.float64())),
        ("nodata", pa.float64()),
        ("samples_per_pixel", pa.int32()),
        ("planar_configuration", pa.int32()),
        ("photometric", pa.int32()),
        ("extra_samples", pa.list_(pa.int32())),
    ]
)
_SAME = {
    "image_width": "width", "image_height": "height", "tile_width": "tile_width", "tile_height": "tile_height",
    "dtype": "dtype", "predictor": "predictor", "compression": "compression", "tile_offsets": "tile_offsets",
    "tile_byte_counts": "tile_byte_counts", "samples_per_pixel": "samples", "planar_configuration": "planar",
}  # fmt: skip
"""Fields of a header that a level has too."""


def header_columns(schema: pa.Schema) -> tuple[str, ...]:
    """Return the columns in which rasteret keeps the headers of a band; none: another layout."""
    return tuple(
        f.name
        for f in schema
        if f.name.endswith(_SUFFIX)
        and pa.types.is_struct(f.type)
        and all(f.type.get_field_index(n) >= 0 for n in ("tile_offsets", "tile_byte_counts", "transform"))
    )


def level_of(row: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any] | None:
    """Return the full-resolution level that rasteret's column of a band describes, or None.

    Parameters
    ----------
    row
        A record of rasteret's table.
    names
        What the band is called: its code, its asset's key.

    Notes
    -----
    The byte order is not in the table; rasteret takes little-endian for granted, and so does this.
    """
    header = next((h for n in names if (h := row.get(n + _SUFFIX)) is not None), None)
    if header is None or len(header["transform"] or ()) != 4:
        return None
    scale_x, west, scale_y, north = header["transform"]
    level = {ours: header.get(theirs) for theirs, ours in _SAME.items()}
    defaults = {"samples": 1, "planar": 1, "predictor": 1}
    return {
        **level,
        **{name: value for name, value in defaults.items() if level[name] is None},
        "kind": "image",
        "driver": "GTiff",
        "byteorder": "<",
        "transform": [scale_x, 0.0, west, 0.0, scale_y, north],
    }


def to_rasteret(tables: Iterable[pa.Table], bands: Sequence[str]) -> Iterator[pa.Table]:
    """Yield record tables in rasteret's layout, which has a header column for each of ``bands``.

    Bands that rasteret would read wrongly or not at all (no header, no tiles, big-endian, rotated) are null
    there, which it takes as absent; a warning counts them.
    """
    lost = 0
    for table in tables:
        records = Records(table)
        columns = _plain_columns(records.table)
        fits = {band: _fits(records, band) for band in bands}
        assets = [_band(records, band, fits[band]) for band in bands]
        columns["assets"] = pa.StructArray.from_arrays(assets, fields=[pa.field(b, _BAND) for b in bands])
        for band in bands:
            columns[band + _SUFFIX] = _header(records, band, fits[band])
            there = records.asset_field(band, "href").is_valid().to_numpy()
            lost += int((there & ~fits[band]).sum())
        yield pa.table(columns)
    if lost:
        warnings.warn(
            f"rasteret cannot read {lost} of the bands' files (no header, no tiles, big-endian or rotated): "
            "they are left out of its table",
            UserWarning,
            stacklevel=2,
        )


def _plain_columns(table: pa.Table) -> dict[str, Any]:
    """Return all columns but those of assets and headers, as rasteret has them."""
    gone = ("assets", "headers_metadata", "scene_bbox", "crs", "year", "month")
    columns = {n: table.column(n) for n in table.column_names if n not in gone}
    when = pc.coalesce(table.column("datetime"), table.column("start_datetime"))
    for name in ("datetime", "start_datetime", "end_datetime", "created"):
        columns[name] = (when if name == "datetime" else columns[name]).cast(pa.timestamp("us"))  # naive UTC
    epsg = table.column("proj:epsg")
    coded = pc.greater(epsg, 0)
    codes = pc.binary_join_element_wise("EPSG", epsg.cast(pa.string()), ":")
    columns["crs"] = pc.if_else(coded, codes, table.column("proj:wkt2"))
    columns["proj:epsg"] = pc.if_else(
        coded, epsg, pa.scalar(None, epsg.type)
    )  # ours below 0 say nothing there
    columns["year"], columns["month"] = pc.year(when), pc.month(when)
    return columns


def _fits(records: Records, band: str) -> NDArray[np.bool_]:
    """Shape (record,). True where rasteret reads the band, and rightly."""

    def same(field: str, value: str) -> NDArray[np.bool_]:
        found = pc.equal(records.level_field(band, field), value)
        return np.asarray(pc.fill_null(found, False).to_numpy(), dtype=bool)

    tiles = pc.fill_null(pc.list_value_length(records.level_field(band, "tile_offsets")), 0).to_numpy()
    upright = [
        t is not None and t[1] == 0 and t[3] == 0 for t in records.level_field(band, "transform").to_pylist()
    ]
    readable = records.asset_field(band, "error").is_null().to_numpy()
    found: NDArray[np.bool_] = same("driver", "GTiff") & same("byteorder", "<") & (tiles > 0) & readable
    found &= np.array(upright, dtype=bool)
    return found


def _band(records: Records, band: str, fits: NDArray[np.bool_]) -> pa.StructArray:
    arrays = [records.asset_field(band, f.name).combine_chunks().cast(f.type) for f in _BAND]
    return pa.StructArray.from_arrays(arrays, fields=list(_BAND), mask=pa.array(~fits))


def _header(records: Records, band: str, fits: NDArray[np.bool_]) -> pa.StructArray:
    values: dict[str, pa.Array] = {
        theirs: records.level_field(band, ours).combine_chunks() for theirs, ours in _SAME.items()
    }
    six = records.level_field(band, "transform").to_pylist()
    four = [None if t is None else [t[0], t[2], t[4], t[5]] for t in six]
    values["transform"] = pa.array(four, _HEADER.field("transform").type)
    values["nodata"] = records.asset_field(band, "nodata").combine_chunks()
    n = len(records)
    arrays = [values.get(f.name, pa.nulls(n, f.type)).cast(f.type) for f in _HEADER]
    return pa.StructArray.from_arrays(arrays, fields=list(_HEADER), mask=pa.array(~fits))
