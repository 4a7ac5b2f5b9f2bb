# SPDX-License-Identifier: Apache-2.0
"""What is to be built: where items are, which of them, and how they become rows."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rasteret_dask.catalogs.bands import Dataset
from rasteret_dask.catalogs.catalog import find, known_dataset
from rasteret_dask.crs import number
from rasteret_dask.errors import PlanError, SourceError
from rasteret_dask.ingest.fileindex import index_items
from rasteret_dask.ingest.pages import ItemBatch, TableSpec
from rasteret_dask.ingest.search import Box, Search, boxes_of, fits
from rasteret_dask.ingest.sources import read_items, remote_item
from rasteret_dask.ingest.stac import Rules, range_of
from rasteret_dask.net.remote import is_local, local_path, public
from rasteret_dask.rules.kinds import KindName, kind_of
from rasteret_dask.table.layers import Layer, check_bands

__all__ = ["BuildOrder", "check_names", "order_of_json"]


@dataclass(frozen=True, slots=True)
class BuildOrder:
    """A dataset, a place and a time; of ``stac_api``, ``catalog`` and ``index`` the last that is there counts."""

    name: str
    """What the table is called in messages."""
    entry: str | None = None
    """Id of the catalog's entry."""
    dataset: Dataset | None = None
    """Bands and rules; None: what the items' collection says."""
    stac_api: str | None = None
    """Root of a STAC API."""
    collection: str = ""
    """The collection to search there."""
    catalog: str | None = None
    """Path or URL of a static catalog."""
    index: str | None = None
    """Path or URL of a Parquet table of files."""
    columns: tuple[tuple[str, str], ...] = ()
    """(what, column of the index)."""
    corners: Box | None = None
    """(west, south, east, north) in degrees, west of its east across the antimeridian."""
    span: tuple[str | None, str | None] = (None, None)
    """Half-open, ISO 8601 UTC."""
    bands: tuple[str, ...] | None = None
    query: str | None = None
    """JSON of the query extension."""
    filter: str | None = None
    """CQL2, text or JSON."""
    max_items: int | None = None
    headers: bool = True
    skip_broken: bool = True
    kinds: tuple[tuple[str, KindName], ...] = ()
    """(band, kind) pairs: what the user says of bands, by any of their names."""
    static: bool = False
    """Whether records hold at any time, whatever time their items have."""
    crs: str | None = None
    """WKT2 of the CRS of files that have none, of items that state none."""

    @property
    def where(self) -> str:
        """Where the items are, without keys."""
        return public(self.index or self.catalog or self.stac_api or "?")

    @property
    def boxes(self) -> tuple[Box, ...]:
        """The corners as boxes that do not cross the antimeridian."""
        return () if self.corners is None else boxes_of(self.corners)

    @property
    def searched(self) -> tuple[str | None, str | None]:
        """The range that is searched: what holds at any time is in every range, whatever time its items have."""
        return (None, None) if self.static else self.span

    def check(self) -> None:
        """Raise SourceError where all of an archive would be searched, or there is nothing to search."""
        if self.index is None and self.catalog is None and self.stac_api is None:
            raise SourceError(
                f"dataset {self.entry!r}", "no STAC API, catalog or index", "one of them: stac_api="
            )
        whole = self.corners is None and self.searched == (None, None) and self.max_items is None
        if whole and self.catalog is None:
            raise SourceError(
                f"{self.name!r} from {self.where}",
                "no bbox, date_range or max_items: all of the archive",
                "at least one of them",
                "Say bbox=(west, south, east, north) and date_range=(start, end).",
            )
        if self.filter is not None and (self.index or self.catalog):
            raise SourceError(
                f"{self.name!r} from {self.where}",
                "a filter in CQL2, which only an API can apply",
                "query=, or no filter",
                "Choose records after the build, by subset(...) or where(...).",
            )

    def rules(self) -> Rules:
        """Return how items become rows."""
        within = range_of(None if self.searched == (None, None) else self.searched)
        crs = None if self.crs is None else number(self.crs)
        return Rules(self.bands, self.dataset, self.boxes, within, self.kinds, self.static, crs)

    def table_spec(self) -> TableSpec:
        """Return how items become a table."""
        return TableSpec(
            self.name, self.rules(), self.headers, self.max_items, self.skip_broken, len(self.boxes) > 1
        )

    def batches(self) -> Iterator[ItemBatch]:
        """Yield the items, as they arrive."""
        if self.index is not None:
            rules = self.rules()
            asset = self.dataset.bands[0].asset if self.dataset else "data"
            name = self.dataset.name if self.dataset else self.collection
            for items in index_items(
                self.index,
                dict(self.columns),
                collection=name,
                asset=asset,
                boxes=self.boxes,
                within=rules.within,
            ):
                yield ItemBatch([i for i in items if fits(i.data, self.query, self.name)])
        elif self.catalog is not None:
            found = read_items(self.catalog, keep_broken=True)
            yield ItemBatch([i for i in found if fits(i.data, self.query, self.name)], len(found))
        elif self.stac_api is not None:
            search = Search(
                self.stac_api, self.collection, self.boxes, self.searched, self.query, self.filter
            )
            from rasteret_dask.ingest.stacapi import pages  # it imports pystac_client

            for page in pages(search, self.max_items):
                yield ItemBatch([remote_item(data) for data in page.items], page.matched)

    def decides(self) -> dict[str, Any]:
        """Return everything that decides what the table holds: all but its name."""
        dataset = self.dataset or known_dataset(None, self.collection)
        said = {k: v for k, v in asdict(self).items() if k not in ("name", "dataset")}
        stamp = None
        if self.index is not None and is_local(self.index) and os.path.exists(local_path(self.index)):
            info = os.stat(local_path(self.index))
            stamp = [info.st_size, info.st_mtime_ns]
        return {**said, "dataset": None if dataset is None else asdict(dataset), "stamp": stamp}

    def as_json(self) -> dict[str, Any]:
        """Return what is kept beside a table, without keys: enough to search again."""
        said = {k: v for k, v in asdict(self).items() if k != "dataset"}
        for place in ("stac_api", "catalog", "index"):
            said[place] = None if said[place] is None else public(said[place])
        return {**said, "dataset": None if self.dataset is None else self.dataset.name}


def order_of_json(document: Mapping[str, Any], name: str) -> BuildOrder:
    """Return the order that :meth:`BuildOrder.as_json` wrote, with the catalog's present rules.

    Raises
    ------
    SourceError
        When the catalog has lost its dataset, or it is something else.
    """
    try:
        fields = {k: {"crs": None, **document}[k] for k in BuildOrder.__slots__}
        fields["kinds"] = tuple((band, kind_of(kind).name) for band, kind in fields["kinds"])
        fields["dataset"] = known_dataset(fields["dataset"]) if fields["dataset"] is not None else None
        if fields["entry"] is not None:
            entry = find(fields["entry"])
            fields["dataset"] = entry.dataset
            for place in ("stac_api", "catalog", "index"):
                now = getattr(entry, place)  # the entry's own URL may hold what public() leaves out
                if now is not None and fields[place] == public(now):
                    fields[place] = now
        for field in ("corners", "span", "bands"):
            fields[field] = None if fields[field] is None else tuple(fields[field])
        fields["columns"] = tuple((str(a), str(b)) for a, b in fields["columns"])
        return BuildOrder(**{**fields, "name": name})
    except (KeyError, TypeError, PlanError) as error:
        raise SourceError(
            f"what {name!r} was searched for", f"another form ({error!r})", "search.json beside the table",
            "Build it again: force=True.",
        ) from error  # fmt: skip


def check_names(dataset: Dataset | None, bands: Sequence[str] | None) -> None:
    """Raise BandError when a dataset has no such band: before anything is searched for."""
    if dataset is None or bands is None:
        return
    known = {
        b.code: Layer(b.code, "", b.band_index, b.asset, dataset, b, b.common_name) for b in dataset.bands
    }
    check_bands([known], [bands] if isinstance(bands, str) else list(bands))
