"""The record table: one Arrow row per scene, its schema, and typed access to the assets it describes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.errors import BandError, ReadError, SchemaError
from rasteret_dask.remote import redact

__all__ = ["ASSET_TYPE", "LEVEL_TYPE", "RECORD_SCHEMA", "Asset", "Level", "Records", "conform"]

ASSET_TYPE = pa.struct(
    [
        pa.field("href", pa.string()),
        pa.field("band_index", pa.int32()),  # position in the file, from 0
        pa.field("asset", pa.string()),  # the provider's key
        pa.field("dataset", pa.string()),  # name in bands.DATASETS, or null
        pa.field("common_name", pa.string()),
        pa.field("scale", pa.float64()),
        pa.field("offset", pa.float64()),
        pa.field("rule", pa.string()),  # where scale and offset come from
        pa.field("nodata", pa.float64()),
        pa.field("dtype", pa.string()),  # NumPy name
        pa.field("role", pa.string()),  # bands.Role
        pa.field("size", pa.int64()),  # bytes of the file when its header was read
        pa.field("etag", pa.string()),
        pa.field("error", pa.string()),  # why the header could not be read, or null
    ]
)

LEVEL_TYPE = pa.struct(
    [
        pa.field("kind", pa.string()),  # "image", "overview", "mask", "overview_mask"
        pa.field("driver", pa.string()),  # GDAL's short name: "GTiff", "JP2OpenJPEG"
        pa.field("width", pa.int32()),
        pa.field("height", pa.int32()),
        pa.field("tile_width", pa.int32()),
        pa.field("tile_height", pa.int32()),
        pa.field("dtype", pa.string()),
        pa.field("byteorder", pa.string()),  # "<" or ">"
        pa.field("compression", pa.int32()),  # TIFF tag 259
        pa.field("predictor", pa.int32()),  # TIFF tag 317
        pa.field("planar", pa.int32()),  # TIFF tag 284: 1 chunky, 2 a plane a band
        pa.field("samples", pa.int32()),
        pa.field("transform", pa.list_(pa.float64(), 6)),  # a, b, c, d, e, f of this level: pixel -> CRS
        pa.field("tile_offsets", pa.list_(pa.int64())),  # of this band's tiles, row by row; empty: unknown
        pa.field("tile_byte_counts", pa.list_(pa.int64())),
    ]
)

RECORD_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("collection", pa.string()),
        pa.field("datetime", pa.timestamp("us", tz="UTC")),
        pa.field("start_datetime", pa.timestamp("us", tz="UTC")),
        pa.field("end_datetime", pa.timestamp("us", tz="UTC")),
        pa.field("geometry", pa.binary()),  # WKB, lon/lat
        pa.field("bbox", pa.struct([(n, pa.float64()) for n in ("xmin", "ymin", "xmax", "ymax")])),
        pa.field("scene_bbox", pa.list_(pa.float64())),
        pa.field("proj:epsg", pa.int32()),
        pa.field("eo:cloud_cover", pa.float64()),
        pa.field("platform", pa.string()),
        pa.field("datatake", pa.string()),  # without its processing baseline
        pa.field("orbit", pa.int32()),  # sat:relative_orbit, or the WRS path
        pa.field("tile", pa.string()),  # grid:code and its like
        pa.field("baseline", pa.string()),
        pa.field("created", pa.timestamp("us", tz="UTC")),
        pa.field("assets", pa.map_(pa.string(), ASSET_TYPE)),
        pa.field("headers_metadata", pa.map_(pa.string(), pa.list_(LEVEL_TYPE))),
        pa.field("properties", pa.string()),  # JSON of STAC properties without a column
    ]
)
"""What every record table has, whatever its source. Users' further columns come behind these."""

KNOWN_ASSETS = 1024
"""Assets that a record table keeps as Python values: neighbouring shards ask for the same ones."""

_REQUIRED = ("id", "datetime", "geometry", "assets")


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of a file: the image itself, an overview, or a mask of either."""

    kind: str
    driver: str
    width: int
    height: int
    tile_width: int
    tile_height: int
    dtype: str
    byteorder: str
    compression: int
    predictor: int
    planar: int
    samples: int
    transform: tuple[float, float, float, float, float, float]
    """(a, b, c, d, e, f): x = a col + b row + c, y = d col + e row + f."""
    tile_offsets: tuple[int, ...]
    """Byte offset of each tile of this band, row by row; empty where unknown; 0 with count 0 is a sparse tile."""
    tile_byte_counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Asset:
    """One band of one record: all that is needed to read it without asking for its header."""

    record_id: str
    band: str
    href: str
    band_index: int
    """Position in the file, from 0."""
    epsg: int
    scale: float
    offset: float
    rule: str
    nodata: float | None
    dtype: str
    role: str
    size: int | None
    etag: str | None
    levels: tuple[Level, ...]
    """The image first, then its overviews from fine to coarse, then masks."""

    @property
    def image(self) -> Level:
        """The full-resolution level."""
        return self.levels[0]

    @property
    def resolution(self) -> tuple[float, float]:
        """Pixel size (x, y), both positive, in units of the CRS."""
        a, b, _, d, e, _ = self.image.transform
        return float(np.hypot(a, d)), float(np.hypot(b, e))


def conform(table: pa.Table, name: str) -> pa.Table:
    """Bring any table with ``id, datetime, geometry, assets`` to RECORD_SCHEMA; further columns stay behind it.

    Parameters
    ----------
    table
        An Arrow table. Columns of RECORD_SCHEMA are cast to its types; missing optional ones become null.
    name
        What the table is called in messages.

    Raises
    ------
    SchemaError
        When a required column is missing, has another type, an id is null, or an id stands twice.
    """
    missing = [c for c in _REQUIRED if c not in table.column_names]
    if missing:
        raise SchemaError(
            f"records of {name!r}",
            f"no column {', '.join(missing)} (columns: {', '.join(table.column_names)})",
            f"at least {', '.join(_REQUIRED)}",
            "Rename your columns, or build the table with build_from_table(column_map=...).",
        )
    columns: list[pa.ChunkedArray] = []
    for field in RECORD_SCHEMA:
        if field.name not in table.column_names:
            columns.append(pa.chunked_array([pa.nulls(table.num_rows, field.type)]))
            continue
        try:
            columns.append(table.column(field.name).cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise SchemaError(
                f"column {field.name!r} of the records of {name!r}",
                f"type {table.schema.field(field.name).type} ({error})",
                f"type {field.type}",
                "Cast the column, or build the table with build_from_table.",
            ) from error
    extra = [c for c in table.column_names if c not in RECORD_SCHEMA.names]
    result = pa.Table.from_arrays(
        [*columns, *(table.column(c) for c in extra)],
        schema=pa.schema([*RECORD_SCHEMA, *(table.schema.field(c) for c in extra)]),
    )
    ids = result.column("id")
    if ids.null_count:
        raise SchemaError(f"records of {name!r}", f"{ids.null_count} rows without id", "an id in every row")
    counts = pc.value_counts(ids)
    twice = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(twice):
        first = twice[0].as_py()
        raise SchemaError(
            f"records of {name!r}",
            f"id {first['values']!r} {first['counts']} times ({len(twice)} ids stand more than once)",
            "unique ids within one collection",
            "Drop the repeated rows, or merge two collections with rd.merge, which keeps them apart.",
        )
    return result


class Records:
    """A record table with typed, cached access to its columns; rows are counted from 0.

    Parameters
    ----------
    table
        A table that :func:`conform` has brought to RECORD_SCHEMA.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table.combine_chunks()
        self._known: dict[tuple[int, str], Asset] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Records, (self.table,)  # not what was cached on the way

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def column(self, name: str) -> list[Any]:
        """Return one column as Python values."""
        return list(self.table.column(name).to_pylist())

    @cached_property
    def ids(self) -> list[str]:
        """The record ids, in row order."""
        return self.column("id")

    @cached_property
    def starts(self) -> list[str]:
        """When each record starts, ISO 8601 in UTC: its datetime, or the beginning of its interval."""
        start = pc.coalesce(self.table.column("start_datetime"), self.table.column("datetime"))
        return [t.isoformat() for t in start.to_pylist()]

    @cached_property
    def epsg(self) -> NDArray[np.int32]:
        """Shape (record,). EPSG code of each record, 0 where unknown."""
        return np.asarray(pc.fill_null(self.table.column("proj:epsg"), 0).to_numpy(), dtype=np.int32)

    @cached_property
    def bands(self) -> tuple[str, ...]:
        """Every band that at least one record has, in the order first met."""
        seen: dict[str, None] = {}
        for chunk in self.table.column("assets").chunks:
            first, last = (chunk.offsets[i].as_py() for i in (0, -1))  # keys are those of the whole buffer
            for key in chunk.keys.slice(first, last - first).unique().to_pylist():
                seen[key] = None
        return tuple(seen)

    def asset_field(self, band: str, field: str) -> pa.ChunkedArray:
        """Return one field of ``assets[band]`` for all records; null where a record lacks the band."""
        return pc.struct_field(pc.map_lookup(self.table.column("assets"), pa.scalar(band), "first"), field)

    def level_field(self, band: str, field: str) -> pa.ChunkedArray:
        """Return one field of the full-resolution level of ``band`` for all records; null where unknown."""
        levels = pc.map_lookup(self.table.column("headers_metadata"), pa.scalar(band), "first")
        return _first_element(levels, field)

    def band_names(self, wanted: str) -> dict[str, str]:
        """Return {dataset or "": band} for what a name means: a band itself, a common name, or an asset key."""
        found: dict[str, str] = {}
        if wanted in self.bands:
            found[""] = wanted
            return found
        for field in ("common_name", "asset"):
            hits = [b for b in self.bands if wanted in pc.unique(self.asset_field(b, field)).to_pylist()]
            if len(hits) == 1:
                found[""] = hits[0]
                return found
            if len(hits) > 1:
                raise BandError(
                    f"band {wanted!r}",
                    f"{len(hits)} bands of that name: {', '.join(hits)}",
                    "one band",
                    "Ask for one of them by its own code.",
                )
        near = get_close_matches(wanted, [*self.bands, *self.common_names], n=3)
        raise BandError(
            f"band {wanted!r}",
            f"no such band (bands: {', '.join(self.bands)}; common names: {', '.join(self.common_names)})",
            "a band code, a common name or an asset key",
            f"Did you mean {', '.join(near)}?" if near else "",
        )

    @cached_property
    def common_names(self) -> tuple[str, ...]:
        """The common names among the bands."""
        names: dict[str, None] = {}
        for band in self.bands:
            for value in pc.unique(self.asset_field(band, "common_name")).to_pylist():
                if value is not None:
                    names[value] = None
        return tuple(names)

    def asset(self, row: int, band: str) -> Asset:
        """Return one band of one record.

        Raises
        ------
        BandError
            When the record has no such band.
        ReadError
            When its header could not be read while the table was built.
        """
        if (row, band) not in self._known:
            if len(self._known) >= KNOWN_ASSETS:
                self._known.clear()
            self._known[row, band] = self._asset(row, band)
        return self._known[row, band]

    def _asset(self, row: int, band: str) -> Asset:
        record = self.ids[row]
        assets = self.table.column("assets").chunk(0)
        item = _map_item(assets, row, band)
        if item is None:
            raise BandError(f"band {band!r} of record {record!r}", "no such asset", "an asset of that band")
        levels = _map_item(self.table.column("headers_metadata").chunk(0), row, band)
        if item["error"] is not None or not levels:
            raise ReadError(
                f"asset {band!r} of record {record!r} ({redact(item['href'])})",
                item["error"] or "no cached header",
                "a header read while the table was built",
                "Leave such records out with where(readable=True).",
            )
        return Asset(
            record_id=record,
            band=band,
            href=item["href"],
            band_index=item["band_index"] or 0,
            epsg=int(self.epsg[row]),
            scale=1.0 if item["scale"] is None else item["scale"],
            offset=0.0 if item["offset"] is None else item["offset"],
            rule=item["rule"] or "identity",
            nodata=item["nodata"],
            dtype=item["dtype"],
            role=item["role"] or "data",
            size=item["size"],
            etag=item["etag"],
            levels=tuple(_level(x) for x in levels),
        )

    def take(self, rows: Sequence[int] | NDArray[np.integer[Any]]) -> Records:
        """Return these rows, in this order."""
        return Records(self.table.take(pa.array(np.asarray(rows, dtype=np.int64))))


def _level(values: dict[str, Any]) -> Level:
    values = dict(values)
    for name in ("transform", "tile_offsets", "tile_byte_counts"):
        values[name] = tuple(values[name] or ())
    return Level(**values)


def _map_item(column: pa.MapArray, row: int, key: str) -> Any:
    start, stop = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    for i in range(start, stop):
        if column.keys[i].as_py() == key:
            return column.items[i].as_py()
    return None


def _first_element(levels: pa.ChunkedArray, field: str) -> pa.ChunkedArray:
    chunks = []
    for chunk in levels.chunks:
        length = pc.fill_null(pc.list_value_length(chunk), 0).to_numpy(zero_copy_only=False)
        at = np.cumsum(length) - length
        index = pa.array(at, mask=length == 0)
        chunks.append(pc.struct_field(chunk.flatten(), field).take(index))
    return pa.chunked_array(chunks, type=LEVEL_TYPE.field(field).type)


def concat(tables: Iterable[pa.Table]) -> pa.Table:
    """Concatenate record tables of any sensors: their schema is the same, so nothing is promoted."""
    return pa.concat_tables(list(tables))
