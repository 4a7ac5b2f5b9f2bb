# SPDX-License-Identifier: Apache-2.0
"""STAC items, from wherever they are: memory, JSON files, static catalogs, STAC GeoParquet."""

from __future__ import annotations

import datetime as dt
import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from pyproj.exceptions import CRSError, ProjError
from shapely.errors import ShapelyError
from shapely.geometry import mapping

from rasteret_dask.errors import ReadError, SchemaError, SourceError
from rasteret_dask.net.places import Place
from rasteret_dask.net.remote import MAX_HREF, MissingError, get, is_local, redact
from rasteret_dask.net.trust import checked, resolve

if TYPE_CHECKING:
    import pystac

__all__ = [
    "BROKEN",
    "Item",
    "check_href",
    "is_from_afar",
    "read_items",
    "read_table",
    "reason_of",
    "remote_item",
    "rename_columns",
    "short",
]

BROKEN = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, ShapelyError, CRSError,
    ProjError, pa.ArrowException,
)  # fmt: skip
"""What malformed JSON leads to, on its way to a row."""

_WORKERS = 16
_ORIGINS = ("self", "root", "parent", "collection")
_TOP_LEVEL = ("type", "stac_version", "stac_extensions", "id", "collection", "geometry", "bbox", "links")


@dataclass(frozen=True, slots=True)
class Item:
    """A STAC item as plain JSON values, with where it came from."""

    data: Mapping[str, Any]
    """The item."""
    base: str | None
    """URL or path that its relative hrefs start from, or None."""
    local: bool
    """True where it came from a local file, or from memory and no link of it is remote; only then it may name local
    paths."""
    error: SourceError | None = None
    """Why there is no item, raised where its row would be made."""

    @property
    def id(self) -> str:
        """The item's id, as messages show it, or "?" where it has none."""
        return short(str(self.data.get("id") or "?"))

    @classmethod
    def broken(cls, error: SourceError) -> Item:
        """Return what stands for an item that cannot be read."""
        return cls({"id": error.subject}, None, False, error)


def short(text: str) -> str:
    """Return text as messages show it."""
    return text if len(text) <= 100 else f"{text[:100]}..."


def reason_of(error: Exception) -> str:
    """Return what an error of a library says, as messages show it."""
    text = str(error) or type(error).__name__
    if isinstance(error, LookupError):
        text = f"{type(error).__name__}: {text}"
    return redact(text)[:200].encode("ascii", "backslashreplace").decode()


def check_href(href: str, subject: str) -> None:
    """Refuse an href that is no path or URL at all.

    Parameters
    ----------
    href
        As an item or a table gives it.
    subject
        Who names it, for the message: ``item 'a', asset 'red'``.

    Raises
    ------
    SourceError
        When it is too long, or no URL can be written so.
    """
    expected = f"a path or URL of at most {MAX_HREF:,} characters"
    if len(href) > MAX_HREF:
        raise SourceError(subject, f"an href of {len(href):,} characters", expected)
    try:
        href.encode()
        if not is_local(href) or href.lower().startswith("file:"):
            urlsplit(href).port  # noqa: B018  # which says whether there is a host and a port in it
    except ValueError as error:
        raise SourceError(
            subject, f"href {redact(ascii(href))[:120]} ({reason_of(error)})", expected
        ) from None


def read_items(source: Any, *, remote: bool = False, keep_broken: bool = False) -> list[Item]:
    """Read STAC items from any place.

    Parameters
    ----------
    source
        A ``pystac`` Item, ItemCollection or Catalog; a dict of an Item or FeatureCollection; an iterable of
        those; the path or URL of a JSON file with an Item, a FeatureCollection, a list of items, or a static
        Catalog or Collection (its child and item links are followed); a path, URL or Arrow table of STAC
        GeoParquet.
    remote
        True for items in memory that a remote service sent: they may not name local paths.
    keep_broken
        Keep a place for each item of a list that cannot be read, with its ``error``; else the first is raised.

    Raises
    ------
    SourceError
        When nothing of that kind is there.
    """
    if isinstance(source, str | os.PathLike):
        items = _from_place(os.fspath(source))
    else:
        items = [replace(i, local=False) if remote else i for i in _from_memory(source)]
    error = next((i.error for i in items if i.error is not None), None)
    if error is not None and not keep_broken:
        raise error
    return items


def remote_item(data: Any) -> Item:
    """Return an item that a remote service sent: it may name remote places only."""
    if not isinstance(data, Mapping):
        return Item({}, None, False)  # whose missing id is told where rows are made
    base = _self_href(data)
    return Item(data, None if base is None or is_local(base) else base, False)


def read_table(place: str) -> pa.Table:
    """Read a Parquet table from a path (file or directory) or URL.

    Raises
    ------
    SourceError
        When it is not there or not Parquet.
    """
    try:
        if is_local(place):
            return pq.read_table(resolve(place, None))
        return pq.read_table(pa.BufferReader(get(place)))
    except ReadError as error:
        raise SourceError(f"table {redact(place)}", error.found, "a Parquet file") from error
    except FileNotFoundError as error:
        raise SourceError(f"table {redact(place)}", "nothing there", "a Parquet file") from error
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"table {redact(place)}", redact(str(error)), "a Parquet file") from None


def rename_columns(table: pa.Table, column_map: Mapping[str, str] | None, name: str) -> pa.Table:
    """Call a user's columns as they are called here.

    Parameters
    ----------
    table
        The user's table.
    column_map
        {name in the table: name here}; None: as they are.
    name
        What the collection is called in messages.

    Raises
    ------
    SchemaError
        When the table has no such column.
    """
    names = dict(column_map or {})
    unknown = [c for c in names if c not in table.column_names]
    if unknown:
        raise SchemaError(
            f"column_map of {name!r}",
            f"no column {', '.join(unknown)} (columns: {', '.join(table.column_names)})",
            "{name in the table: name here}",
        )
    return table.rename_columns([names.get(c, c) for c in table.column_names])


def _from_memory(source: Any) -> Iterator[Item]:
    match source:
        case Item():
            yield source
        case pa.Table():
            yield from _from_table(source, None)
        case _ if _is_a(source, "pystac", "Item"):
            data = source.to_dict(transform_hrefs=False)
            place = source.get_self_href() or _self_href(data)
            yield Item(data, place, (place is None or is_local(place)) and not is_from_afar(data))
        case _ if _is_a(source, "pystac_client", "Client", "CollectionClient"):
            raise SourceError(
                f"STAC API {source.id!r}", "its client", "items",
                "Give build_from_stac its address (stac_api=..., collection=...), or items of a search.",
            )  # fmt: skip
        case _ if _is_a(source, "pystac", "Catalog"):
            yield from _from_links(source)
        case Mapping():
            if source.get("type") in ("Catalog", "Collection"):
                raise SourceError(
                    f"catalog {source.get('id')!r}", "a dict", "a path or URL, to follow its links from"
                )
            yield from _from_json(source, None, str(source.get("id", "a dict")))
        case str() | os.PathLike():
            yield from _from_place(os.fspath(source))
        case Iterable():
            for one in source:
                try:
                    yield from list(_from_memory(one))
                except SourceError as error:
                    yield Item.broken(error)
        case _:
            raise SourceError("STAC items", f"a {type(source).__name__}", "items, a path, a URL or a table")


def _is_a(source: Any, module: str, *names: str) -> bool:
    """Tell whether a source is of a class of a module, without importing it: who has one has imported it."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(source, tuple(getattr(loaded, name) for name in names))


def _from_place(href: str) -> list[Item]:
    place = Place.at(resolve(href, None))
    url = place.url
    bare = url if place.is_local else url.partition("?")[0]
    if bare.endswith((".parquet", ".geoparquet", ".pq")) or (place.is_local and os.path.isdir(url)):
        return list(_from_table(read_table(url), place))
    document = _json(url)
    if isinstance(document, Mapping) and document.get("type") in ("Catalog", "Collection"):
        return _from_catalog(url, document)
    if isinstance(document, Mapping) and "links" in document and not {"features", "assets"} & set(document):
        return _from_catalog(url, document)  # catalogs before STAC 1.0 say no type
    return list(_from_json(document, place, redact(url)))


def _json(place: str) -> Any:
    try:
        return json.loads(get(place))
    except MissingError as error:
        raise SourceError(
            f"STAC source {redact(place)}", "nothing there", "a JSON or Parquet file"
        ) from error
    except ReadError as error:
        raise SourceError(f"STAC source {redact(place)}", error.found, "a readable JSON file") from error
    except (ValueError, RecursionError) as error:
        raise SourceError(
            f"STAC source {redact(place)}", f"no JSON: {reason_of(error)}", "STAC JSON"
        ) from error


def _from_json(document: Any, place: Place | None, name: str) -> Iterator[Item]:
    features = document
    if isinstance(document, Mapping):
        features = document.get("features", [document])
    if not isinstance(features, list | tuple):
        subject, kind = f"STAC source {name}", type(features).__name__
        yield Item.broken(SourceError(subject, f"a {kind}", "an Item or a list of Items"))
        return
    whole = isinstance(document, Mapping) and "features" not in document
    afar = place is None and isinstance(document, Mapping) and is_from_afar(document)
    for n, feature in enumerate(features):
        if not isinstance(feature, Mapping):
            yield Item.broken(
                SourceError(f"STAC source {name}", f"a {type(feature).__name__} at {n}", "an Item")
            )
            continue
        # an item's own file is where it is read from; items in a collection say where theirs is
        if place is None:
            yield _of_memory(feature, afar)
        else:
            base = place.url if whole else _self_href(feature) or place.url
            yield Item(feature, base, place.is_local)


def is_from_afar(data: Mapping[str, Any]) -> bool:
    """Return whether a link of an item or a collection of items tells that it came from a remote catalog."""
    links = data.get("links")
    return any(
        isinstance(link, Mapping)
        and link.get("rel") in _ORIGINS
        and isinstance(link.get("href"), str)
        and not is_local(link["href"])
        for link in (links if isinstance(links, list | tuple) else ())
    )


def _of_memory(data: Mapping[str, Any], afar: bool) -> Item:
    """Return an item whose origin only its links tell; ``afar``: as those of what held it do."""
    return remote_item(data) if afar or is_from_afar(data) else Item(data, _self_href(data), True)


def _self_href(feature: Mapping[str, Any]) -> str | None:
    links = feature.get("links")
    for link in links if isinstance(links, list | tuple) else ():
        if isinstance(link, Mapping) and link.get("rel") == "self" and isinstance(link.get("href"), str):
            href = link["href"]
            return href if not is_local(href) or os.path.isabs(href) else None
    return None


def _from_catalog(place: str, document: Mapping[str, Any]) -> list[Item]:
    """Follow child and item links level by level; each document once."""
    items: list[Item] = []
    missing: list[str] = []
    seen = {place}
    level = [(place, document)]
    while level:
        links = [link for at, one in level for link in _links(at, one) if link[1] not in seen]
        links = list(dict.fromkeys(links))
        seen.update(href for _, href in links)
        with ThreadPoolExecutor(_WORKERS) as pool:
            documents = list(pool.map(_linked, (href for _, href in links)))
        level = []
        for (rel, href), found in zip(links, documents, strict=True):
            if found is None:
                missing.append(href)
            elif isinstance(found, SourceError):
                items.append(Item.broken(found))
            elif rel == "item":
                items += _from_json(found, Place.at(href), redact(href))
            elif isinstance(found, Mapping):
                level.append((href, found))
            else:
                subject, kind = f"STAC source {redact(href)}", type(found).__name__
                items.append(Item.broken(SourceError(subject, f"a {kind}", "a Catalog or Collection")))
    if not items:
        what = f"{len(missing)} links to files that are not there" if missing else "no item links below it"
        raise SourceError(
            f"catalog {redact(place)}",
            what,
            "a static catalog with items",
            "For an API, use build_from_stac.",
        )
    if missing:
        warnings.warn(
            f"catalog {redact(place)}: {len(missing)} of its links lead to files that are not there and are "
            f"left out (first: {redact(missing[0])})",
            UserWarning,
            stacklevel=4,
        )
    return items


def _from_links(catalog: pystac.Catalog) -> Iterator[Item]:
    """Return the items below a catalog in memory: those that it holds, and those that it links to."""
    for link in catalog.links:
        if link.rel not in ("item", "child"):
            continue
        if link.is_resolved():
            yield from _from_memory(link.target)
            continue
        here = catalog.get_self_href()
        href = resolve(str(link.href), here)
        subject = f"a link of catalog {catalog.id!r}"
        yield from _from_place(checked(href, local=here is None or is_local(here), subject=subject))


def _links(place: str, document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    links, subject = document.get("links"), f"a link of {redact(place)}"
    for link in links if isinstance(links, list) else ():
        if isinstance(link, Mapping) and link.get("rel") in ("item", "child"):
            check_href(str(link.get("href")), subject)
            href = resolve(str(link.get("href")), place)
            yield link["rel"], checked(href, local=is_local(place), subject=subject)


def _linked(href: str) -> Any:
    """Return a document, the error that says why there is none, or None where nothing is there."""
    try:
        return _json(href)
    except SourceError as error:
        return None if isinstance(error.__cause__, MissingError) else error


def _from_table(table: pa.Table, place: Place | None) -> Iterator[Item]:
    """Return the items of a STAC GeoParquet table: a row each, properties as columns."""
    missing = [c for c in ("id", "assets") if c not in table.column_names]
    if missing:
        raise SchemaError(
            f"STAC GeoParquet {'table' if place is None else redact(place.url)}",
            f"no column {', '.join(missing)}",
            "id and assets",
            "Other tables are read by build_from_table.",
        )
    for row in table.to_pylist():
        try:
            data = _item_of_row(row)
        except BROKEN as error:
            subject = f"item {short(str(row['id']))!r}"
            yield Item.broken(SourceError(subject, reason_of(error), "a row of STAC GeoParquet"))
        else:
            if place is None:
                yield _of_memory(data, False)
            else:
                yield Item(data, _self_href(data) or place.url, place.is_local)


def _item_of_row(row: Mapping[str, Any]) -> dict[str, Any]:
    data = {key: _plain(row[key]) for key in _TOP_LEVEL if row.get(key) is not None}
    if isinstance(row.get("geometry"), bytes):
        data["geometry"] = mapping(shapely.from_wkb(row["geometry"]))
    if isinstance(row.get("bbox"), Mapping):
        data["bbox"] = [row["bbox"][k] for k in ("xmin", "ymin", "xmax", "ymax")]
    assets = row["assets"]
    data["assets"] = _plain(dict(assets) if isinstance(assets, list) else assets)
    rest = {k: v for k, v in row.items() if k not in (*_TOP_LEVEL, "assets") and v is not None}
    data["properties"] = _plain(rest)
    return data


def _plain(value: Any) -> Any:
    """Return JSON values: no nulls inside structs (Arrow adds them), times as text."""
    match value:
        case Mapping():
            return {k: _plain(v) for k, v in value.items() if v is not None}
        case list() | tuple():
            return [_plain(v) for v in value]
        case dt.datetime() | dt.date():
            return value.isoformat()
        case _:
            return value
