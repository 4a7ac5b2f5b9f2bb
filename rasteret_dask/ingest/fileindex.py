# SPDX-License-Identifier: Apache-2.0
"""A Parquet table of files, a row each, read as STAC items: only the rows and columns that are asked for."""

from __future__ import annotations

import datetime as dt
import functools
import operator
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import shapely
from shapely.geometry import mapping

from rasteret_dask.errors import ReadError, SchemaError, SourceError
from rasteret_dask.ingest.sources import BROKEN, Item, reason_of, short
from rasteret_dask.net.remote import MissingError, is_local, local_path, redact
from rasteret_dask.net.remotefs import filesystem

__all__ = ["index_items"]

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
_NEEDED = ("href",)
_ROWS = 1024

Box = tuple[float, float, float, float]


def index_items(
    place: str,
    columns: Mapping[str, str],
    *,
    collection: str,
    asset: str,
    boxes: Sequence[Box] = (),
    within: tuple[dt.datetime | None, dt.datetime | None] = (None, None),
) -> Iterator[list[Item]]:
    """Yield the items of an index, some at a time.

    Parameters
    ----------
    place
        Path or URL of the Parquet file.
    columns
        {what: its column}: href; geometry (WKB) or the box's xmin, ymin, xmax, ymax; year or datetime; id and
        proj:epsg where there are any.
    collection, asset
        What the items belong to, and the key of their file.
    boxes
        (west, south, east, north) in degrees: rows whose box meets none of them are not read.
    within
        Half-open; rows of other years are not read.

    Notes
    -----
    A row of a year stands for the interval from its first day to the next year's first. An id that is no text is
    put behind the collection's name: ``aef-v1-annual-17``.

    Raises
    ------
    SourceError
        When there is no such file, or it is no Parquet.
    SchemaError
        When it lacks a column.
    """
    subject = f"index {redact(place)}"
    try:
        data = _dataset(place)
        lacking = [c for what, c in columns.items() if c not in data.schema.names]
        if lacking or any(what not in columns for what in _NEEDED):
            raise SchemaError(
                subject,
                f"no column {', '.join(lacking) or 'of hrefs'} (columns: {', '.join(data.schema.names)})",
                "the columns that its catalog entry names",
            )
        wanted = list(dict.fromkeys(columns.values()))
        for batch in data.to_batches(
            columns=wanted, filter=_filter(columns, boxes, within), batch_size=_ROWS
        ):
            rows = batch.to_pylist()
            if rows:
                yield [_item_or_error(row, columns, collection, asset, place) for row in rows]
    except (FileNotFoundError, MissingError) as error:
        raise SourceError(subject, "nothing there", "a Parquet file") from error
    except ReadError as error:
        raise SourceError(subject, error.found, "a Parquet file that can be read", error.remedy) from error
    except (pa.ArrowException, OSError) as error:
        raise SourceError(subject, redact(str(error))[:300], "a Parquet file that can be read") from None


def _dataset(place: str) -> pads.Dataset:
    form = pads.ParquetFileFormat()
    if is_local(place):
        if not os.path.exists(local_path(place)):
            raise FileNotFoundError(place)
        return pads.dataset(local_path(place), format=form)
    fragment = form.make_fragment(place, filesystem=filesystem())
    return pads.FileSystemDataset([fragment], fragment.physical_schema, form)


def _filter(
    columns: Mapping[str, str], boxes: Sequence[Box], within: tuple[dt.datetime | None, dt.datetime | None]
) -> pc.Expression | None:
    parts = []
    if boxes and all(c in columns for c in _CORNERS):
        xmin, ymin, xmax, ymax = (pc.field(columns[c]) for c in _CORNERS)
        parts.append(
            functools.reduce(
                operator.or_, ((xmin <= e) & (xmax >= w) & (ymin <= n) & (ymax >= s) for w, s, e, n in boxes)
            )
        )
    start, end = within
    if "year" in columns:
        year = pc.field(columns["year"])
        if start is not None:
            parts.append(year >= start.year)
        if end is not None:
            parts.append(year <= end.year)
    return functools.reduce(operator.and_, parts) if parts else None


def _item_or_error(
    row: Mapping[str, Any], columns: Mapping[str, str], collection: str, asset: str, place: str
) -> Item:
    try:
        return _item(row, columns, collection, asset, place)
    except BROKEN as error:
        subject = f"index {redact(place)}, row of {short(str(row[columns['href']]))!r}"
        return Item.broken(SourceError(subject, reason_of(error), "a file, its outline and its time"))


def _item(
    row: Mapping[str, Any], columns: Mapping[str, str], collection: str, asset: str, place: str
) -> Item:
    said = {what: row[column] for what, column in columns.items()}
    properties: dict[str, Any] = {}
    if said.get("year") is not None:
        year = int(said["year"])
        properties["datetime"] = properties["start_datetime"] = f"{year:04d}-01-01T00:00:00Z"
        properties["end_datetime"] = f"{min(year + 1, dt.MAXYEAR):04d}-01-01T00:00:00Z"
    elif said.get("datetime") is not None:
        properties["datetime"] = said["datetime"]
    epsg = _epsg(said)
    if epsg is not None:
        properties["proj:epsg"] = epsg
    href = said["href"]
    name = said.get("id")
    if name is None:
        name = os.path.splitext(os.path.basename(str(href)))[0]
    data: dict[str, Any] = {
        "id": name if isinstance(name, str) else f"{collection}-{name}",
        "collection": collection,
        "geometry": mapping(shapely.from_wkb(said["geometry"])) if said.get("geometry") else None,
        "bbox": [said[c] for c in _CORNERS] if all(said.get(c) is not None for c in _CORNERS) else None,
        "properties": properties,
        "assets": {asset: {"href": href, "type": "image/tiff; application=geotiff"}},
    }
    return Item(data, place, is_local(place))


def _epsg(row: Mapping[str, Any]) -> int | None:
    """Return the EPSG code of a column that says 32610 or "EPSG:32610"."""
    text = str(row.get("proj:epsg") or "").upper().removeprefix("EPSG:")
    return int(text) if text.isdigit() else None
