# SPDX-License-Identifier: Apache-2.0
"""STAC items become records."""

from __future__ import annotations

import datetime as dt
import json
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import shapely

from rasteret_dask.catalogs.bands import Dataset
from rasteret_dask.catalogs.catalog import dataset_of, known_dataset
from rasteret_dask.catalogs.credentials import cleaned
from rasteret_dask.catalogs.signing import keep_apart
from rasteret_dask.errors import EmptyError, SchemaError, SourceError, TrustError
from rasteret_dask.footprint import area_of, box_of, corners_of, outline_of
from rasteret_dask.headers.reader import Header, read_headers
from rasteret_dask.ingest.describe import contradictions, contradictions_note, describe
from rasteret_dask.ingest.sources import BROKEN, Item, check_href, read_items, reason_of, short
from rasteret_dask.lists import first_of
from rasteret_dask.net.remote import redact
from rasteret_dask.net.trust import checked, resolve
from rasteret_dask.rules.kinds import KindName
from rasteret_dask.table.assetkinds import with_kinds
from rasteret_dask.table.facts import ENDLESS, Range, facts_of, instant, range_of, version_of
from rasteret_dask.table.itemcrs import crs_columns
from rasteret_dask.table.layers import Layer, check_bands, check_kinds, offer_of, restrict
from rasteret_dask.table.leftassets import LeftAssets
from rasteret_dask.table.rasters import LeftAsset
from rasteret_dask.table.records import RECORD_SCHEMA, conform

__all__ = [
    "BROKEN",
    "Draft",
    "Item",
    "LeftOut",
    "Rules",
    "completed",
    "draft_of",
    "facts_of",
    "instant",
    "items_to_table",
    "known_dataset",
    "meets",
    "range_of",
    "read_items",
    "rows_to_table",
    "spare_hrefs",
    "version_of",
    "with_copies",
]

_LANDSATLOOK = "https://landsatlook.usgs.gov/data/"  # asks for a login; the same files lie in a public bucket
_IN_COLUMNS = (
    "datetime", "start_datetime", "end_datetime", "eo:cloud_cover", "platform", "eo:platform", "proj:epsg",
    "proj:code", "proj:wkt2", "created", "eo:bands",
)  # fmt: skip

_LISTED = 5


def items_to_table(
    items: Sequence[Item],
    *,
    name: str,
    bands: Sequence[str] | None = None,
    dataset: str | Dataset | None = None,
    headers: bool = True,
    workers: int = 16,
    bbox: tuple[float, float, float, float] | None = None,
    date_range: Any = None,
    most: int | None = None,
    broken: LeftOut | None = None,
    kinds: tuple[tuple[str, KindName], ...] = (),
    left: LeftAssets | None = None,
    static: bool = False,
    crs: int | None = None,
) -> pa.Table:
    """Turn STAC items into a record table.

    Parameters
    ----------
    items
        As :func:`read_items` returns them.
    name
        What the table is called in messages.
    bands
        Keep only these, by code, common name or asset key.
    dataset
        A known dataset or its name, where the items' collection does not say it.
    headers
        Read the files' headers. Without, levels come from the items' ``proj:`` fields, and have no tile tables.
    workers
        Requests in flight.
    bbox
        (xmin, ymin, xmax, ymax) in lon/lat; items whose geometry does not meet it are left out.
    date_range
        (start, end) or "start/end", UTC; items whose time does not meet it are left out. A date without time
        counts as the whole day (month, year); an end with a time of day is exclusive.
    most
        Keep the first so many rows.
    broken
        Takes the broken items, where they are to be left out; None: the first one is an error.
    kinds
        (band, kind) pairs: what the user says of bands.
    left
        Takes the assets that become no band.
    static
        Whether rows hold at any time, whatever time their items have, if any.
    crs
        The CRS of files that have none, of items that state none.

    Returns
    -------
    pyarrow.Table
        Of RECORD_SCHEMA, in the order of the items. An asset whose header cannot be read keeps the reason in
        its ``error``.

    Raises
    ------
    SourceError
        When an item is broken (see ``broken``), or none is left.
    TrustError
        When an item names a place that its origin must not name (see ``broken``).
    BandError
        When no item has a band that was asked for.
    """
    rules = Rules(
        None if bands is None else tuple(bands),
        None if dataset is None else known_dataset(dataset),
        () if bbox is None else (bbox,),
        range_of(date_range),
        kinds,
        static,
        crs,
    )
    broken = LeftOut(False) if broken is None else broken
    drafts = []
    for item in items:
        with broken.of(item.id):
            draft = draft_of(item, rules)
            drafts += [] if draft is None else [draft]
    if not drafts:
        raise _none_left(name, items, broken)
    drafts = _newest(drafts, name)[:most]
    check_bands([d.offered for d in drafts], bands)
    check_kinds([d.offered for d in drafts], kinds)
    found = None
    if headers:
        found = read_headers([layer.href for d in drafts for layer in d.layers], workers)
        found |= read_headers(spare_hrefs(drafts, found), workers)
        drafts = [with_copies(draft, found) for draft in drafts]
    rows = []
    for draft in drafts:
        with broken.of(draft.row["id"]):
            rows.append(completed(draft, found, rules.crs))
    counts = sum((contradictions(row["assets"]) for row in rows), Counter[str]())
    if counts:
        warnings.warn(contradictions_note(name, counts), UserWarning, stacklevel=4)
    if left is not None:
        left.add(drafts)
    table, _ = rows_to_table(rows, broken)
    if not table.num_rows:
        raise _none_left(name, items, broken)
    return with_kinds(conform(table, name), kinds)


def _none_left(name: str, items: Sequence[Item], broken: LeftOut) -> SourceError:
    if broken.items:
        return broken.all_of(name)
    return EmptyError(
        f"items of {name!r}",
        f"none of {len(items)} in the box and range asked for",
        "at least one item",
        _where_they_are(items),
    )


def _where_they_are(items: Iterable[Item]) -> str:
    """Return the dates and the bounds of items, as far as they can be read."""
    rows = []
    for item in items:
        with suppress(SourceError, *BROKEN):
            rows.append(_row(item, True))
    days = [
        row[key] for row in rows for key in ("datetime", "start_datetime", "end_datetime") if row.get(key)
    ]
    boxes = [row["scene_bbox"] for row in rows if row["scene_bbox"]]
    dates = [f"of {min(days):%Y-%m-%d} to {max(days):%Y-%m-%d}"] if days else []
    if boxes:
        west, south, east, north = zip(*boxes, strict=True)
        box = (min(west), min(south), max(east), max(north))
        dates.append(f"in {', '.join(f'{value:.4f}' for value in box)} (west, south, east, north)")
    return f"They are {', '.join(dates)}." if dates else ""


def rows_to_table(
    rows: Sequence[Mapping[str, Any]], broken: LeftOut, schema: pa.Schema = RECORD_SCHEMA
) -> tuple[pa.Table, list[int]]:
    """Return rows as a table, and their numbers; one that no column can hold (a number too large, say) is broken."""
    try:
        return pa.Table.from_pylist(list(rows), schema=schema), list(range(len(rows)))
    except BROKEN:
        tables, kept = [schema.empty_table()], []
    for number, row in enumerate(rows):
        with broken.of(str(row["id"])):
            try:
                tables.append(pa.Table.from_pylist([row], schema=schema))
            except BROKEN as error:
                raise SourceError(
                    f"record {short(str(row['id']))!r}",
                    f"what no column holds ({reason_of(error)})",
                    "numbers and text of a scene",
                ) from error
            kept.append(number)
    return pa.concat_tables(tables), kept


@dataclass(slots=True)
class LeftOut:
    """Items (or rows of a table) that are broken: left out and named, or an error."""

    skip: bool
    items: list[tuple[str, str]] = field(default_factory=list)
    """(id, reason) of each."""

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Note what is wrong with one item; raise it where none is to be left out."""
        try:
            yield
        except (SourceError, SchemaError) as error:
            if not self.skip:
                raise
            self.items.append((short(name), redact(error.found)[:200]))

    def note(self, name: str) -> str:
        """Return how many there are and the first of them, as a sentence."""
        first = first_of((f"{n!r} ({why})" for n, why in self.items), _LISTED, "; ")
        return f"{name}: {len(self.items)} broken items are left out: {first}"

    def all_of(self, name: str) -> SourceError:
        """Return the error that says that no others are left."""
        listed = "; ".join(f"{n!r}: {why}" for n, why in self.items[:_LISTED])
        return SourceError(
            f"items of {name!r}",
            f"all {len(self.items)} of them broken ({listed})",
            "STAC items",
            "on_error='raise' stops at the first, and tells more of it.",
        )


@dataclass(frozen=True, slots=True)
class Rules:
    """Which items become rows, and how."""

    bands: tuple[str, ...] | None = None
    """Kept by code, common name or asset key; None: all."""
    dataset: Dataset | None = None
    """What the items belong to; None: what their collection says."""
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    """Items that meet none of them are left out; none at all: everywhere."""
    within: Range = (None, None)
    """Half-open; items whose time does not meet it are left out."""
    kinds: tuple[tuple[str, KindName], ...] = ()
    """(band, kind) pairs: what the user says of bands, by any of their names."""
    static: bool = False
    """Whether rows hold at any time, whatever time their items have, if any."""
    crs: int | None = None
    """The CRS of files that have none, of items that state none."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A row without what its files' headers tell."""

    row: dict[str, Any]
    layers: tuple[Layer, ...]
    """The bands to keep, with absolute hrefs."""
    offered: Mapping[str, Layer]
    """All bands the item has."""
    properties: Mapping[str, Any]
    """Of the item."""
    left: tuple[LeftAsset, ...] = ()
    """Assets that become no band of the row."""


def draft_of(item: Item, rules: Rules) -> Draft | None:
    """Return an item's row as far as the item settles it, None where the rules leave it out.

    Raises
    ------
    SourceError
        When the item is broken.
    TrustError
        When it names a place that its origin must not name.
    """
    row = _row(item, rules.static)
    try:
        if not meets(row, rules):
            return None
        if rules.static:
            row["start_datetime"], row["end_datetime"] = ENDLESS
        offer = offer_of(item.data, rules.dataset or dataset_of(row["collection"]))
        layers = restrict(offer.layers, rules.bands)
        for layer in layers.values():
            check_href(layer.href, f"item {item.id!r}, asset {short(layer.asset)!r}")
        left = (*offer.left, *_unasked(offer.layers, layers))
        return Draft(row, tuple(_placed(item, layers)), offer.layers, item.data["properties"], left)
    except SourceError:
        raise
    except BROKEN as error:
        raise SourceError(
            f"item {item.id!r}", f"assets that cannot be read ({reason_of(error)})", "a STAC item"
        ) from error


def _unasked(offered: Mapping[str, Layer], kept: Mapping[str, Layer]) -> list[LeftAsset]:
    """Return the assets of bands that were not asked for."""
    assets = {layer.asset for layer in kept.values()}
    unasked = {layer.asset: layer for layer in offered.values() if layer.asset not in assets}
    return [
        (key, f"band {layer.band!r} is kept only where bands= names it" if layer.definition is not None
        and layer.definition.optional else f"band {layer.band!r} is not among bands=")
        for key, layer in unasked.items()
    ]  # fmt: skip


def spare_hrefs(drafts: Iterable[Draft], headers: Mapping[str, Header | str]) -> list[str]:
    """Return the files to look at as well: copies of bands whose files have no readable header."""
    layers = (layer for draft in drafts for layer in draft.layers if isinstance(headers.get(layer.href), str))
    return [copy.href for layer in layers for copy in layer.copies if copy.href not in headers]


def with_copies(draft: Draft, headers: Mapping[str, Header | str]) -> Draft:
    """Return a draft that takes each band from the first of its files that has a readable header."""
    layers, left = [], dict(draft.left)
    for layer in draft.layers:
        readable = [one for one in (layer, *layer.copies) if isinstance(headers.get(one.href), Header)]
        best = readable[0] if readable else layer
        if best is not layer:
            left.pop(best.asset, None)
            left[layer.asset] = f"its header cannot be read: band {layer.band!r} is taken from a copy"
        layers.append(best)
    return replace(draft, layers=tuple(layers), left=tuple(left.items()))


def completed(
    draft: Draft, headers: Mapping[str, Header | str] | None, crs: int | None = None
) -> dict[str, Any]:
    """Return a draft's row with what its files' headers tell.

    Parameters
    ----------
    draft
        The row.
    headers
        {href: header or why it is unreadable}; None: no header was read.
    crs
        As :class:`Rules` has it.

    Raises
    ------
    SourceError
        When the item's properties do not settle how its values are meant.
    """
    row = dict(draft.row)
    try:
        described = describe(draft.layers, draft.properties, headers, crs)
        row["assets"], row["headers_metadata"] = list(described.assets), list(described.levels)
        row |= crs_columns(described.epsg or row["proj:epsg"])
        row["geometry"] = row["geometry"] or described.footprint
        _fill_bbox(row)
    except BROKEN as error:
        raise SourceError(
            f"item {short(row['id'])!r}", reason_of(error), "properties that fit its collection"
        ) from error
    return row


def _row(item: Item, static: bool) -> dict[str, Any]:
    """Return one row without what headers tell."""
    if item.error is not None:
        raise item.error
    data = item.data
    if not isinstance(data.get("id"), str) or not data["id"]:
        raise SourceError(
            f"an item of {redact(item.base or 'memory')}", f"id {data.get('id')!r}", "a text id"
        )
    properties = data.get("properties")
    if not isinstance(properties, Mapping):
        raise SourceError(f"item {item.id!r}", "no properties", "a STAC item")
    if not isinstance(data.get("assets"), Mapping) or not data["assets"]:
        raise SourceError(f"item {item.id!r}", "no assets", "at least one asset")
    collection = data.get("collection")
    try:
        row = {key: instant(properties.get(key)) for key in ("datetime", "start_datetime", "end_datetime")}
        facts = facts_of(properties)
        corners = corners_of(data.get("bbox"))
        geometry = outline_of(data.get("geometry"), data.get("bbox"), facts["proj:epsg"])
        rest = {k: v for k, v in properties.items() if k not in _IN_COLUMNS}
        text = json.dumps(cleaned(rest), default=str, sort_keys=True)
    except BROKEN as error:
        raise SourceError(
            f"item {item.id!r}", reason_of(error), "valid times, numbers and geometry"
        ) from error
    row["datetime"] = row["datetime"] or row["start_datetime"]
    if row["datetime"] is None and not static:
        raise SourceError(
            f"item {item.id!r}", "neither datetime nor start_datetime", "one of them",
            "static=True builds what holds at any time: elevation, soil.",
        )  # fmt: skip
    return {
        **row,
        **facts,
        "id": data["id"],
        "collection": collection if isinstance(collection, str) else None,
        "geometry": geometry,
        "scene_bbox": None if corners is None else list(corners),
        "properties": text,
    }


def _fill_bbox(row: dict[str, Any]) -> None:
    row["scene_bbox"] = box = box_of(row["geometry"], row["scene_bbox"])
    row["bbox"] = None if box is None else dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))


def meets(row: Mapping[str, Any], rules: Rules) -> bool:
    """Return whether a row lies in the boxes and the range of the rules, as far as it is known where it lies."""
    start, end = rules.within
    if row["datetime"] is None:  # it holds at any time
        start = end = None
    first = row["start_datetime"] or row["datetime"]
    last = row["end_datetime"] or row["datetime"]
    if start is not None and (last < start or first < last == start):  # an interval's end is not part of it
        return False
    if end is not None and first >= end:
        return False
    if not rules.boxes or row["geometry"] is None:
        return True
    return bool(shapely.from_wkb(row["geometry"]).intersects(area_of(rules.boxes)))


def _newest(drafts: Iterable[Draft], name: str) -> list[Draft]:
    """Keep one draft an id, of the newest baseline, then creation."""

    def age(draft: Draft) -> tuple[Any, dt.datetime]:
        made = draft.row["created"] or dt.datetime.min.replace(tzinfo=dt.UTC)
        return version_of(draft.row["baseline"] or ""), made

    kept: dict[str, Draft] = {}
    twice = 0
    for draft in drafts:
        before = kept.get(draft.row["id"])
        twice += before is not None
        if before is None or age(draft) > age(before):
            kept[draft.row["id"]] = draft
    if twice:
        warnings.warn(
            f"{name}: {twice} items repeat the id of another and are left out; of each id the one with the "
            "newest baseline and creation time is kept. Build them as two collections to keep both.",
            UserWarning,
            stacklevel=3,
        )
    return list(kept.values())


def _placed(item: Item, layers: Mapping[str, Layer]) -> list[Layer]:
    """Return the layers with absolute hrefs that their origin may name."""
    placed = []
    for layer in layers.values():
        copies = []
        for copy in layer.copies:
            with suppress(TrustError, SourceError):  # one that must not be opened is none
                check_href(copy.href, f"item {item.id!r}, asset {short(copy.asset)!r}")
                copies.append(replace(copy, href=_place(item, copy)))
        placed.append(replace(layer, href=_place(item, layer), copies=tuple(copies)))
    return placed


def _place(item: Item, layer: Layer) -> str:
    href = resolve(layer.href, item.base)
    subject = f"item {item.id!r}, asset {layer.asset!r}"
    # what is written counts too: joined to a base, VRT text or /vsi would look like a plain path
    checked(layer.href if layer.href.lstrip().startswith("<") else href, local=item.local, subject=subject)
    if href.startswith(_LANDSATLOOK):
        href = "s3://usgs-landsat/" + href.removeprefix(_LANDSATLOOK)
    return keep_apart(href)
