# SPDX-License-Identifier: Apache-2.0
"""Typed access to a record table: one Arrow row per scene, and the assets it describes."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from functools import cached_property
from itertools import product
from math import inf
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.crs import bring, travelling
from rasteret_dask.errors import BandError, ReadError
from rasteret_dask.headers.nodata import Number, number_of
from rasteret_dask.net.remote import redact
from rasteret_dask.table.meanings import meanings_of
from rasteret_dask.table.schema import ASSET_TYPE, LEVEL_TYPE, RECORD_SCHEMA, conform, luggage_of

__all__ = ["ASSET_TYPE", "LEVEL_TYPE", "RECORD_SCHEMA", "NS_RANGE", "Asset", "Level", "Records", "conform"]

NS_RANGE = (np.datetime64("1678-01-01", "us"), np.datetime64("2262-01-01", "us"))
"""What nanoseconds can hold, in whole years: an interval without an end is often written as one in the year 9999."""

KNOWN_ASSETS = 1024
"""Assets that a record table keeps as Python values: neighbouring shards ask for the same ones."""

KNOWN_VALUES = 2**16
"""Bands times records up to which a field of all bands is kept as an array."""


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
    """The CRS, as :func:`rasteret_dask.crs.number` counts it."""
    scale: float
    offset: float
    rule: str
    nodata: Number | None
    """What pixels hold that are nodata: a number of their dtype, an int for integers; None: no pixel is nodata."""
    dtype: str
    role: str
    kind: str | None
    """What its numbers are, ``kinds.KindName``; None: unknown."""
    size: int | None
    etag: str | None
    levels: tuple[Level, ...]
    """The image first, then its overviews from fine to coarse, then masks."""
    alpha: int | None = None
    """Position of the file's alpha channel, from 0: pixels are valid where it is more than 0. None: it has none, or
    this is it."""
    valid_range: tuple[float, float] | None = None
    """The least and the greatest number that is a measurement; what lies beyond is nodata. None: any."""
    placement: str | None = None
    """``"rotated"`` or ``"gcps"``: the file's rows and columns are no axes of its CRS, ``image`` is the north-up raster
    that it would be warped to, and GDAL warps each window from the file itself. None: they are."""

    @property
    def image(self) -> Level:
        """The full-resolution level."""
        return self.levels[0]

    @property
    def described(self) -> bool:
        """Whether the file was looked at when its record was made; else the item alone says what it holds."""
        return self.size is not None or self.etag is not None or bool(self.image.tile_offsets)

    @property
    def resolution(self) -> tuple[float, float]:
        """Pixel size (x, y), both positive, in units of the CRS."""
        a, b, _, d, e, _ = self.image.transform
        return float(np.hypot(a, d)), float(np.hypot(b, e))


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
        self._room = KNOWN_ASSETS
        self._columns: dict[tuple[str, str], pa.Array] = {}
        self._lists: dict[str, list[Any]] = {}

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
        """When each record starts, ISO 8601 in UTC: in ``NS_RANGE``; 1678 where unknown."""
        start = pc.coalesce(self.table.column("start_datetime"), self.table.column("datetime"))
        first, last = (edge.item().replace(tzinfo=dt.UTC) for edge in NS_RANGE)
        return [min(max(t or first, first), last).isoformat() for t in start.to_pylist()]

    @cached_property
    def epsg(self) -> NDArray[np.int32]:
        """Shape (record,). CRS of each record, as :func:`rasteret_dask.crs.number` counts it; 0 where unknown."""
        bring(luggage_of(self.table))
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

    @cached_property
    def _band_places(self) -> dict[str, int]:
        return {band: place for place, band in enumerate(self.bands)}

    def asset_field(self, band: str, field: str) -> pa.ChunkedArray:
        """Return one field of ``assets[band]`` for all records; null where a record lacks the band."""
        return self._of_band(self.asset_fields, band, field)

    def asset_fields(self, bands: Sequence[str], field: str) -> pa.ChunkedArray:
        """Return the same of several bands, one band after the other: many times the speed of asking for each."""
        parts = [
            (pc.struct_field(chunk.items, field).take(_places(chunk, bands)), len(chunk))
            for chunk in self.table.column("assets").chunks
        ]
        return _by_band(parts, len(bands), ASSET_TYPE.field(field).type)

    def asset_values(self, band: str, field: str) -> list[Any]:
        """Return the same as Python values; in small tables those of all bands are made at once."""
        rows, place = len(self), self._band_places.get(band)
        if place is None or not self._is_small:
            return list(self.asset_field(band, field).to_pylist())
        if field not in self._lists:
            self._lists[field] = self.asset_fields(self.bands, field).to_pylist()
        return self._lists[field][place * rows : (place + 1) * rows]

    def distinct(self, band: str, field: str) -> list[Any]:
        """Return the distinct values of one field of ``assets[band]``, in the order first met; None among them."""
        if self._is_small:
            return list(dict.fromkeys(self.asset_values(band, field)))
        return list(pc.unique(self.asset_field(band, field)).to_pylist())

    @cached_property
    def _is_small(self) -> bool:
        """Whether all bands are looked up at once, for those who ask next."""
        return 0 < len(self) * len(self.bands) <= KNOWN_VALUES

    def _of_band(
        self, fields: Callable[[Sequence[str], str], pa.ChunkedArray], band: str, field: str
    ) -> pa.ChunkedArray:
        """Return a field of one band; in small tables all bands are looked up at once, for those who ask next."""
        rows = len(self)
        place = self._band_places.get(band)
        if place is None or not self._is_small:
            return fields((band,), field)
        key = (fields.__name__, field)
        if key not in self._columns:
            self._columns[key] = fields(self.bands, field).combine_chunks()
        values = self._columns[key].slice(place * rows, rows)
        return pa.chunked_array([values])

    def nodata_of(self, band: str) -> set[Number | None]:
        """Return what nodata is in a band, over all records: each a number of its dtype; None where it has none."""
        columns = (self.asset_values(band, field) for field in ("nodata", "dtype", "href"))
        pairs = {(text, dtype) for text, dtype, href in zip(*columns, strict=True) if href is not None}
        return {number_of(text, dtype) if dtype else None for text, dtype in pairs}

    def level_field(self, band: str, field: str) -> pa.ChunkedArray:
        """Return one field of the full-resolution level of ``band`` for all records; null where unknown."""
        return self._of_band(self.level_fields, band, field)

    def level_fields(self, bands: Sequence[str], field: str) -> pa.ChunkedArray:
        """Return the same of several bands, one band after the other."""
        parts = [
            (
                pc.struct_field(chunk.items.values, field).take(
                    _first_levels(chunk.items, _places(chunk, bands))
                ),
                len(chunk),
            )
            for chunk in self.table.column("headers_metadata").chunks
        ]
        return _by_band(parts, len(bands), LEVEL_TYPE.field(field).type)

    @property
    def levels(self) -> pa.StructArray:
        """The levels of all files, those of one file together; see :meth:`level_places`."""
        return self.table.column("headers_metadata").chunk(0).items.values

    def level_places(self, band: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where the levels of each record's file begin among :attr:`levels`, and how many it has; 0: unknown."""
        headers = self.table.column("headers_metadata").chunk(0)
        places = _places(headers, (band,))
        first = pc.fill_null(headers.items.offsets.slice(0, len(headers.items)).take(places), 0)
        count = pc.fill_null(pc.list_value_length(headers.items).take(places), 0)
        return first.to_numpy().astype(np.int64), count.to_numpy().astype(np.int64)

    def band_names(self, wanted: str) -> dict[str, str]:
        """Return {dataset or "": band} for what a name means: a band itself, a common name, or an asset key."""
        found: dict[str, str] = {}
        several = meanings_of(self.table.schema).get(wanted, ())
        if several and wanted not in self.common_names:
            raise BandError(
                f"band {wanted!r}",
                f"a code that means {len(several)} bands in these records: {', '.join(several)}",
                "one band",
                f"Ask for {' or '.join(map(repr, several))}; where(has_bands=[...]) keeps the records that have it.",
            )
        if wanted in self.bands:
            found[""] = wanted
            return found
        for field in ("common_name", "asset"):
            hits = [b for b in self.bands if wanted in self.distinct(b, field)]
            if len(hits) == 1:
                found[""] = hits[0]
                return found
            if len(hits) > 1:
                raise BandError(
                    f"band {wanted!r}",
                    f"{len(hits)} bands of that name: {', '.join(hits)}",
                    "one band",
                    f"Ask for {' or '.join(map(repr, hits))}.",
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
            for value in self.distinct(band, "common_name"):
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
            if len(self._known) >= self._room:
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
        return self._described(row, band, item, tuple(_level(x) for x in levels))

    def look_up(self, rows: Sequence[int], bands: Iterable[str]) -> None:
        """Have these bands of these records at hand for :meth:`asset`, all looked up together; they stay."""
        names, known = tuple(dict.fromkeys(bands)), self._known
        wanted = [row for row in dict.fromkeys(rows) if any((row, band) not in known for band in names)]
        if not names or not wanted:
            return
        self._room = max(self._room, len(self._known) + len(names) * len(wanted))
        some = self.table.select(["assets", "headers_metadata"]).take(pa.array(wanted)).combine_chunks()
        assets, headers = (column.chunk(0) for column in some.columns)
        items = assets.items.take(_places(assets, names)).to_pylist()
        levels = _levels(headers.items.take(_places(headers, names)))
        for (band, row), item, listed in zip(product(names, wanted), items, levels, strict=True):
            if (row, band) not in self._known and item is not None and item["error"] is None and listed:
                self._known[row, band] = self._described(row, band, item, listed)

    def _described(self, row: int, band: str, item: Mapping[str, Any], levels: tuple[Level, ...]) -> Asset:
        span = _range(item["valid_min"], item["valid_max"])
        return Asset(
            record_id=self.ids[row],
            band=band,
            href=item["href"],
            band_index=item["band_index"] or 0,
            epsg=travelling(self.epsg[row]),
            scale=1.0 if item["scale"] is None else item["scale"],
            offset=0.0 if item["offset"] is None else item["offset"],
            rule=item["rule"] or "identity",
            nodata=_nodata(item["nodata"], item["dtype"], span),
            dtype=item["dtype"],
            role=item["role"] or "data",
            kind=item["kind"],
            size=item["size"],
            etag=item["etag"],
            levels=levels,
            alpha=item["alpha"],
            valid_range=span,
            placement=item["placement"],
        )

    def take(self, rows: Sequence[int] | NDArray[np.integer[Any]]) -> Records:
        """Return these rows, in this order."""
        return Records(self.table.take(pa.array(np.asarray(rows, dtype=np.int64))))


def _range(least: float | None, most: float | None) -> tuple[float, float] | None:
    if least is None and most is None:
        return None
    return -inf if least is None else least, inf if most is None else most


def _nodata(text: str | None, dtype: str | None, span: tuple[float, float] | None) -> Number | None:
    """Return what pixels hold that are nodata; where only a valid range tells, a number beyond it."""
    number = number_of(text, dtype) if dtype else None
    if number is not None or dtype is None or span is None:
        return number
    if np.dtype(dtype).kind not in "iu":
        return float("nan")
    limits = np.iinfo(dtype)
    return int(limits.min) if limits.min < span[0] else int(limits.max) if limits.max > span[1] else None


def _level(values: dict[str, Any]) -> Level:
    values = dict(values)
    for name in ("transform", "tile_offsets", "tile_byte_counts"):
        values[name] = tuple(values[name] or ())
    return Level(**values)


def _levels(lists: pa.ListArray) -> list[tuple[Level, ...]]:
    """Return the levels of several files, field by field, as they list every tile; none where they are unknown."""
    flat = lists.flatten()
    return _cut(list(map(Level, *(_values(flat.field(f.name)) for f in fields(Level)))), lists)


def _values(values: pa.Array) -> list[Any]:
    """Return a field of levels as Python values: lists become tuples, empty where they are null."""
    if pa.types.is_list(values.type) or pa.types.is_fixed_size_list(values.type):
        return _cut(values.flatten().to_numpy(zero_copy_only=False).tolist(), values)
    return list(values.to_pylist())


def _cut(flat: list[Any], lists: pa.Array) -> list[tuple[Any, ...]]:
    """Return what each of some lists holds, of their values one behind the other."""
    counts = pc.fill_null(pc.list_value_length(lists), 0).to_pylist()
    stops = np.cumsum(counts, dtype=np.int64).tolist()
    return [tuple(flat[stop - count : stop]) for count, stop in zip(counts, stops, strict=True)]


def _map_item(column: pa.MapArray, row: int, key: str) -> Any:
    start, stop = column.offsets[row].as_py(), column.offsets[row + 1].as_py()
    keys = column.keys.slice(start, stop - start)
    place = pc.index(keys, pa.scalar(key, keys.type)).as_py()
    return None if place < 0 else column.items[start + place].as_py()


def _places(column: pa.MapArray, keys: Sequence[str]) -> pa.Array:
    """Return where the items of some keys lie in ``column.items``, all rows of the first key first; null: nowhere.

    Arrow's ``map_lookup`` copies the items, with all tile tables in them: many times the price of one field.
    """
    offsets, rows = column.offsets.to_numpy(), len(column)
    held = column.keys.slice(offsets[0], offsets[-1] - offsets[0])
    number = pc.fill_null(pc.index_in(held, pa.array(keys, held.type)), -1).to_numpy()
    hits = np.flatnonzero(number >= 0)[::-1]
    row = np.searchsorted(offsets, hits + offsets[0], side="right") - 1
    place, missing = np.zeros((len(keys), rows), np.int64), np.ones((len(keys), rows), np.bool_)
    at = number[hits], row
    place[at], missing[at] = hits + offsets[0], False  # from the last, so that the first of a row stays
    if column.null_count:
        missing |= column.is_null().to_numpy(zero_copy_only=False)
    return pa.array(place.ravel(), mask=missing.ravel())


def _by_band(parts: Sequence[tuple[pa.Array, int]], bands: int, kind: pa.DataType) -> pa.ChunkedArray:
    """Put parts of some rows, each band after band, together, band after band; ``(values, rows)`` each."""
    chunks = [values.slice(band * rows, rows) for band in range(bands) for values, rows in parts]
    return pa.chunked_array(chunks, type=kind)


def _first_levels(levels: pa.ListArray, places: pa.Array) -> pa.Array:
    """Return where the first level of some items lies in ``levels.values``; null where there is none."""
    first = levels.offsets.slice(0, len(levels)).take(places)
    length = pc.fill_null(pc.list_value_length(levels).take(places), 0)
    return pc.if_else(pc.greater(length, 0), first, None)


def concat(tables: Iterable[pa.Table]) -> pa.Table:
    """Concatenate record tables of any sensors: their schema is the same, so nothing is promoted."""
    return pa.concat_tables(list(tables))
