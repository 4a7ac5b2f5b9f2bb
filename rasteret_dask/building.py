# SPDX-License-Identifier: Apache-2.0
"""Scenes of a catalog's datasets, of STAC APIs and of STAC items become collections."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads

from rasteret_dask.catalogs.catalog import Entry, find, known_dataset
from rasteret_dask.catalogs.signing import expired, lacking
from rasteret_dask.collection import Collection
from rasteret_dask.crs import number, wkt2
from rasteret_dask.errors import PlanError, SourceError
from rasteret_dask.formats import TABLE as FORMAT
from rasteret_dask.geometries.areas import bbox_of
from rasteret_dask.ingest.order import BuildOrder, check_names, order_of_json
from rasteret_dask.ingest.pages import BuildReport, EarlierTable, ingest
from rasteret_dask.ingest.search import fits
from rasteret_dask.ingest.sources import Item, read_items
from rasteret_dask.ingest.stac import LeftOut, items_to_table
from rasteret_dask.ingest.tablecache import (
    SEARCH_FILE,
    TABLE,
    TableShelf,
    cache_root,
    key_of,
    shelf,
    shelf_of,
)
from rasteret_dask.net.remote import is_local
from rasteret_dask.net.trust import resolve
from rasteret_dask.openers import as_collection, warn_signed
from rasteret_dask.planning.origins import BuildCall
from rasteret_dask.planning.plan import Predicate, Source
from rasteret_dask.progress import Progress
from rasteret_dask.rules.kinds import KindName, checked_kinds
from rasteret_dask.table.barehrefs import hosts_of, hrefs_of
from rasteret_dask.table.leftassets import LeftAssets
from rasteret_dask.table.rowgroups import hrefs
from rasteret_dask.table.terms import Terms
from rasteret_dask.table.timing import half_open
from rasteret_dask.words import OnBroken

__all__ = ["build", "build_from_stac", "refresh"]

_log = logging.getLogger(__name__)

_TO_USER = 4  # frames from a warning to who called build


def build(
    dataset: str,
    *,
    name: str | None = None,
    bbox: Sequence[float] | None = None,
    date_range: Sequence[str | None] | str | None = None,
    bands: Sequence[str] | None = None,
    query: Mapping[str, Any] | None = None,
    filter: str | Mapping[str, Any] | None = None,  # noqa: A002  # STAC's own word
    max_items: int | None = None,
    stac_api: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    force: bool = False,
    headers: bool = True,
    on_error: OnBroken = "skip",
    progress: bool = True,
    kinds: Mapping[str, KindName] | None = None,
    static: bool | None = None,
    crs: Any = None,
) -> Collection:
    """Build a collection from a dataset of the catalog, or open it where the same was built before.

    Items are searched for page by page, the headers of their files are read while further pages arrive, and rows
    go to a table on disk, which the collection reads lazily. The same call again opens that table: it is
    cached under a hash of every argument that affects its content (entry, place, dates, query, ...). Static catalogs
    on this machine are read anew each time, into memory: their files may have changed.

    Parameters
    ----------
    dataset
        As ``earthsearch/sentinel-2-l2a``; :func:`datasets` lists them.
    name
        What the collection is called; None: the dataset's last part.
    bbox
        (west, south, east, north) in degrees; west of its east it crosses the antimeridian.
    date_range
        (start, end) as ISO 8601, the last day (month, year) included; either may be None. ``"2024-01-01/.."`` too.
    bands
        Keep only these, by code, common name or asset key; None: all the dataset has.
    query
        Conditions on properties: ``{"eo:cloud_cover": {"lt": 20}}``. Where the API cannot, they are applied here.
    filter
        CQL2, as text or JSON, where the API can.
    max_items
        Records, at most: the first that the API gives.
    stac_api
        Root of another API that has the collection.
    cache_dir
        A local folder for built tables; None: RASTERET_DASK_CACHE, else the user's cache folder.
    force
        Build again; nothing of an older table stays.
    headers
        False leaves headers unread: planning works from the items' ``proj:`` fields, as far as they go.
    on_error
        ``"skip"`` leaves broken items out, with one warning that counts and names them; ``"raise"`` stops at the
        first. A file without a readable header breaks no item: its bands keep the reason, and cannot be used.
    progress
        Whether to show how far it is, on stderr.
    kinds
        What bands are, where nothing tells, or something else does: ``{"map": "class"}``; see
        :meth:`Collection.harmonize`. Else the catalog, the items or the files tell, the first of them that does.
    static
        Whether scenes hold at any time, whatever time their items have: elevation, soil. They are searched for without
        ``date_range``, are in every range, and join with anything. None: as the catalog's entry says.
    crs
        The CRS of files that have none, where their items state none either: a code, WKT, PROJJSON or a CRS object.
        What files and items state is never replaced.

    Raises
    ------
    SourceError
        When the dataset is not known, the API cannot be asked, or nothing is found.
    BandError
        When there is no such band.
    PlanError
        When bbox, dates or another argument make no sense.

    Examples
    --------
    >>> s2 = rd.build("demo/sentinel-2-l2a", date_range=("2024-04-01", "2024-06-30"))
    >>> len(s2), s2.bands
    (8, ('B02', 'B03', 'B04', 'B08', 'SCL'))
    """
    origin = BuildCall.of(build, locals())
    entry = find(dataset)
    named = checked_kinds(kinds, "build(kinds=)")
    check_names(entry.dataset, bands)
    check_names(entry.dataset, [band for band, _ in named] or None)
    order = BuildOrder(
        name=_named(name, entry.id.rsplit("/", 1)[-1]),
        entry=entry.id,
        dataset=entry.dataset,
        stac_api=stac_api or entry.stac_api,
        collection=entry.stac_collection or entry.id.rsplit("/", 1)[-1],
        catalog=None if stac_api else entry.catalog,
        index=None if stac_api else entry.index,
        columns=entry.columns,
        corners=_corners(bbox),
        span=half_open(date_range),
        bands=_texts(bands),
        query=_condition("query", query),
        filter=_condition("filter", filter),
        max_items=_count(max_items),
        headers=headers,
        skip_broken=_skips(on_error),
        kinds=named,
        static=entry.static if static is None else static,
        crs=None if crs is None else wkt2(number(crs)),
    )
    if order.catalog is not None and is_local(order.catalog):
        # files of this machine change: they are read again, not remembered
        return _with_terms(_from_items(order, _catalog_items(order)), entry, origin)
    return _with_terms(_built(order, cache_dir, force, progress), entry, origin)


def _with_terms(made: Collection, entry: Entry, origin: BuildCall) -> Collection:
    """Return a collection that keeps the licence and attribution of its catalog, and how it was built.

    Its table's token stays.
    """
    terms = Terms(entry.id, entry.licence or "", entry.licence_url or "", entry.attribution or "")
    tables = {token: terms.marked(table) for token, table in made.query.tables.items()}
    return Collection(replace(made.query, tables=tables).made_by(origin))


def build_from_stac(
    source: Any = None,
    *,
    name: str,
    stac_api: str | None = None,
    collection: str | None = None,
    dataset: str | None = None,
    data_source: str | None = None,
    bands: Sequence[str] | None = None,
    bbox: Sequence[float] | None = None,
    date_range: Sequence[str | None] | str | None = None,
    query: Mapping[str, Any] | None = None,
    filter: str | Mapping[str, Any] | None = None,  # noqa: A002  # STAC's own word
    max_items: int | None = None,
    headers: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    workspace_dir: str | os.PathLike[str] | None = None,
    force: bool = False,
    on_error: OnBroken | None = None,
    progress: bool = True,
    kinds: Mapping[str, KindName] | None = None,
    static: bool = False,
    crs: Any = None,
) -> Collection:
    """Build a collection from STAC items; COG headers are read once, concurrently, and kept in the rows.

    Parameters
    ----------
    source
        pystac items or dicts, an ItemCollection (object, path or URL), a static catalog (path or URL), or STAC
        GeoParquet (path or table). None: search ``stac_api``.
    name
        What the collection is called.
    stac_api, collection
        Root of a STAC API, and the collection to search there; needs a ``bbox``, ``date_range`` or ``max_items``.
        The table is kept, as that of :func:`build` is.
    dataset, data_source
        A known dataset where the items' collection does not say it: its name, or an id of the catalog.
    bands
        Keep only these; None: all raster bands.
    bbox, date_range
        Keep only items that touch them; the last day is included.
    query, filter, max_items, cache_dir, force, progress
        Of a search: see :func:`build`.
    on_error
        ``"skip"`` leaves broken items out, with one warning that counts and names them; ``"raise"`` stops at the
        first. None: ``"skip"`` for a search, whose items are others', and ``"raise"`` for a ``source``.
    headers
        False leaves headers unread: planning works from the items' own ``proj:`` fields, as far as they go. A file
        that is opened later must lie where its item says, else a ReadError names both places.
    workspace_dir
        Another name of ``cache_dir``.
    kinds, crs
        What bands are, and where files without a CRS lie: see :func:`build`.
    static
        Whether items hold at any time, whatever time they have, if any: see :func:`build`.

    Raises
    ------
    SourceError, TrustError, BandError, SchemaError
        When items are broken, name places they must not, or lack a band.

    Notes
    -----
    A pixel is valid where it is neither nodata nor NaN, where the file's mask says so (inside the file, or a local
    ``.msk`` beside it), and where the file's alpha channel is more than 0: partly transparent pixels are valid. The
    alpha channel is no default band. A band that the item names after what it measures (``NIR``) is none, whatever
    the file calls it.

    Nodata is the file's, else the item's, else the dataset's, as a number of the pixel's own dtype; in a file of
    several bands the item's comes first, as a TIFF has one for all. All spellings of FLT_MAX are the same number.
    One warning tells where files and items contradict each other (nodata, scale), or nodata is no number of the
    dtype; each asset keeps it as ``note``.

    Examples
    --------
    >>> s2 = rd.build_from_stac("demo/world/sentinel-2-l2a/collection.json", name="s2", bands=["B04", "B08"])
    >>> len(s2), s2.bands
    (8, ('B04', 'B08'))
    """
    origin = BuildCall.of(build_from_stac, locals())
    order = BuildOrder(
        name=_named(name, ""),
        dataset=known_dataset(dataset or data_source) if dataset or data_source else None,
        stac_api=stac_api,
        collection=collection or "",
        corners=_corners(bbox),
        span=half_open(date_range),
        bands=_texts(bands),
        query=_condition("query", query),
        filter=_condition("filter", filter),
        max_items=_count(max_items),
        headers=headers,
        skip_broken=_skips(("raise" if stac_api is None else "skip") if on_error is None else on_error),
        kinds=checked_kinds(kinds, "build_from_stac(kinds=)"),
        static=static,
        crs=None if crs is None else wkt2(number(crs)),
    )
    if stac_api is None and source is None:
        raise SourceError(f"collection {name!r}", "neither a source nor a stac_api", "one of them")
    if stac_api is None:
        items = read_items(source, keep_broken=order.skip_broken)
        return Collection(_from_items(order, items).query.made_by(origin))
    if collection is None:
        raise SourceError(
            f"search of {order.where}", "no collection", "the id of one of the API's collections"
        )
    made = _built(order, cache_dir or workspace_dir, force, progress)
    return Collection(made.query.made_by(origin))


def refresh(collection: Collection, *, stac_api: str | None = None, progress: bool = True) -> Collection:
    """Search again for what a built collection was made of, and add what is new.

    Headers are read of new items, of items that were replaced by newer ones, and of files that could not be read
    before; all other rows stay as they are, also those whose items are gone.

    Parameters
    ----------
    collection
        As :func:`build` returned it. It stays as it is, too.
    stac_api
        Root of the API, where another one is to be asked, or where its URL held a key (keys are not kept).
    progress
        Whether to show how far it is, on stderr.

    Raises
    ------
    PlanError
        When the collection was not built from a search, or steps were added to it.
    SourceError
        When the API cannot be asked.

    Examples
    --------
    >>> s2 = rd.build(
    ...     "earthsearch/sentinel-2-l2a", date_range=("2024-01-01", "2024-12-31"),
    ...     stac_api=stac_api, headers=False, progress=False,
    ... )
    >>> s2 = rd.refresh(s2, progress=False)  # tomorrow: with what is new since
    """
    if not isinstance(collection, Collection):
        raise PlanError("refresh", f"a {type(collection).__name__}", "a collection that build() made")
    plan = collection.plan
    held = collection.query.tables.get(plan.token) if isinstance(plan, Source) else None
    files = held.files if isinstance(held, pads.FileSystemDataset) else []
    at = shelf_of(files[0]) if len(files) == 1 else None
    if at is None or not isinstance(plan, Source):
        raise PlanError(
            f"refresh of {collection.name!r}",
            "a collection that is not just as build() made it",
            "a collection that build() made",
            "Refresh that one, then take the further steps again.",
        )
    place, folder, said = at
    folder = place.newest() or folder  # somebody may have refreshed it meanwhile
    order = order_of_json(said, plan.name)
    if stac_api is not None:
        order = replace(order, stac_api=stac_api)
    folder = _fill(order, place, folder, False, progress, EarlierTable.of(folder / TABLE))
    new = _opened(folder, replace(order, name=plan.name))
    return Collection(new.query.made_by(collection.query.origins.get(plan)))


def _built(
    order: BuildOrder, cache_dir: str | os.PathLike[str] | None, force: bool, progress: bool
) -> Collection:
    order.check()
    place = shelf(cache_root(cache_dir), order.entry or order.collection, key_of(order.decides()))
    folder = place.newest()
    if folder is None or force:
        folder = _fill(order, place, folder, force, progress, None)
    elif _needs_signing(folder):  # the items are asked for anew, as they bring signatures; no header is
        folder = _fill(order, place, folder, False, progress, EarlierTable.of(folder / TABLE))
    else:
        _remind(folder, order)
    return _opened(folder, order)


def _fill(
    order: BuildOrder,
    place: TableShelf,
    before: Path | None,
    replaces: bool,
    progress: bool,
    earlier: EarlierTable | None,
) -> Path:
    """Return the folder of a new table; of the old one, where a refresh finds nothing new."""
    begun = time.monotonic()
    _log.info("build %s: reading items", order.name)
    with place.filling() as folder:
        with Progress("items", progress) as shown:
            report = ingest(order.batches(), order.table_spec(), folder / TABLE, shown, earlier)
        _log.info(
            "build %s: %d rows, %d of them new, %d items broken; headers of %d files read, %d failed; %.1f s",
            order.name, report.rows, report.added, len(report.broken.items), report.files, report.failed,
            time.monotonic() - begun,
        )  # fmt: skip
        if report.left.counts:
            _log.info("build %s: %s", order.name, report.left.note())
        if earlier is not None and before is not None and not report.added:
            return before
        (folder / SEARCH_FILE).write_text(json.dumps(_search_note(order, report), indent=1))
        made = place.commit(folder, after=before, replace=replaces, keep=0 if replaces else 1)
    for note in report.notes(order.name):
        warnings.warn(note, UserWarning, stacklevel=_TO_USER - 1 if earlier is not None else _TO_USER)
    return made


def _search_note(order: BuildOrder, report: BuildReport) -> dict[str, Any]:
    counts = {
        "rows": report.rows,
        "broken": len(report.broken.items),
        "files": report.files,
        "failed": report.failed,
    }
    return {**FORMAT.note, **order.as_json(), "made": counts}


def _remind(folder: Path, order: BuildOrder) -> None:
    made = json.loads((folder / SEARCH_FILE).read_text()).get("made", {})
    if made.get("failed"):
        warnings.warn(
            f"{order.name}: the headers of {made['failed']} of {made['files']} files could not be read when this "
            "table was built. rd.refresh(collection) tries them again",
            UserWarning,
            stacklevel=_TO_USER,
        )


def _needs_signing(folder: Path) -> bool:
    """Return whether a table's items arrived signed, and this process has no signature that holds."""
    data = pads.dataset(folder / TABLE, format="parquet")
    hosts = hosts_of(data.schema)
    if not hosts:
        return False
    found = list(hrefs_of(pa.table({"assets": hrefs(data)})))
    return bool(lacking(found, hosts)) or any(expired(href) for href in found)


def _opened(folder: Path, order: BuildOrder) -> Collection:
    data = pads.dataset(folder / TABLE, format="parquet")
    warn_signed(order.name, hosts_of(data.schema) or ())
    return _ranged(as_collection(data, name=order.name), order)


def _catalog_items(order: BuildOrder) -> list[Item]:
    if order.filter is not None:
        raise SourceError(
            f"catalog of {order.entry!r}", "a filter in CQL2", "query=, or no filter",
            "Static catalogs cannot filter: choose records after the build, by subset(...) or where(...).",
        )  # fmt: skip
    assert order.catalog is not None
    place = resolve(order.catalog, None)
    if not os.path.exists(place):
        raise SourceError(
            f"dataset {order.entry!r}", f"nothing at {place}", "a STAC catalog", _how_to_have(order)
        )
    return read_items(place, keep_broken=order.skip_broken)


def _how_to_have(order: BuildOrder) -> str:
    """Return what to do about a catalog of this machine that is not there."""
    if str(order.entry).startswith("demo/"):
        return (
            "Make the demo's world in this folder: run `rasteret-dask demo` (a minute; with --small seconds), or in "
            'Python `from rasteret_dask.demo.world import make_world; make_world("demo/world")`.'
        )
    return f"Go to the folder that {order.catalog} is relative to, or register the dataset with a full path."


def _from_items(order: BuildOrder, items: Sequence[Item]) -> Collection:
    broken, left = LeftOut(order.skip_broken), LeftAssets()
    if order.query is not None:
        items = [i for i in items if fits(i.data, order.query, f"items of {order.name!r}")]
    table = items_to_table(
        items,
        name=order.name,
        bands=order.bands,
        dataset=order.dataset,
        headers=order.headers,
        bbox=order.corners,
        date_range=None if order.searched == (None, None) else order.searched,
        most=order.max_items,
        broken=broken,
        kinds=order.kinds,
        left=left,
        static=order.static,
        crs=order.rules().crs,
    )
    _log.info("build %s: %d rows of %d items", order.name, table.num_rows, len(items))
    if left.counts:
        _log.info("build %s: %s", order.name, left.note())
    if broken.items:
        warnings.warn(broken.note(order.name), UserWarning, stacklevel=_TO_USER - 1)
    return _ranged(as_collection(left.marked(table), name=order.name), order)


def _ranged(made: Collection, order: BuildOrder) -> Collection:
    """Return a collection that knows its range: regular slots of time span it."""
    where: tuple[Predicate, ...] = ()
    if order.span != (None, None):
        where = (("datetime", "overlaps", order.span),)
    assert isinstance(made.plan, Source)
    return Collection(made.query.then(replace(made.plan, where=where)))


def _named(name: str | None, otherwise: str) -> str:
    if name is None:
        return otherwise
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise PlanError("name", repr(name), "a text that is not empty")
    return name


def _corners(bbox: Sequence[float] | None) -> tuple[float, float, float, float] | None:
    return None if bbox is None else bbox_of(bbox)


def _texts(bands: Sequence[str] | None) -> tuple[str, ...] | None:
    if bands is None:
        return None
    found = (bands,) if isinstance(bands, str) else tuple(bands)
    if not found:
        raise PlanError("bands", "an empty list", "at least one band, or None for all")
    return found


def _condition(what: str, value: Any) -> str | None:
    """Return a query or filter as text that says the same for the same."""
    if value is None or value == {} or value == "":
        return None
    if what == "filter" and isinstance(value, str):
        return value
    if not isinstance(value, Mapping):
        wanted = {"query": '{"eo:cloud_cover": {"lt": 20}}', "filter": "CQL2 as text or as JSON"}[what]
        raise PlanError(what, repr(value)[:100], wanted)
    try:
        return json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise PlanError(what, str(error), "values of JSON: numbers, text, lists") from error


def _count(value: int | None) -> int | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise PlanError("max_items", repr(value), "a whole number from 1")
    return value


def _skips(on_error: str) -> bool:
    if on_error not in ("skip", "raise"):
        raise PlanError("on_error", repr(on_error), "'skip' or 'raise'")
    return on_error == "skip"
