# SPDX-License-Identifier: Apache-2.0
"""Pages of items become one table on disk, while they arrive."""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rasteret_dask.errors import EmptyError, SourceError
from rasteret_dask.formats import table_metadata
from rasteret_dask.headers.reader import Header, HeaderReader
from rasteret_dask.ingest.describe import contradictions, contradictions_note
from rasteret_dask.ingest.sources import Item
from rasteret_dask.ingest.stac import (
    Draft,
    LeftOut,
    Rules,
    completed,
    draft_of,
    meets,
    rows_to_table,
    spare_hrefs,
    version_of,
    with_copies,
)
from rasteret_dask.net.remote import public
from rasteret_dask.progress import Progress
from rasteret_dask.table import geoparquet
from rasteret_dask.table.assetkinds import with_kinds
from rasteret_dask.table.barehrefs import hosts_of, marks, signed_in
from rasteret_dask.table.layers import Layer, check_bands, check_kinds
from rasteret_dask.table.leftassets import LeftAssets
from rasteret_dask.table.records import RECORD_SCHEMA, Records, conform
from rasteret_dask.table.timing import acquisitions

__all__ = ["BuildReport", "EarlierTable", "ItemBatch", "TableSpec", "ahead", "ingest"]

T = TypeVar("T")

AHEAD = 2
"""Pages whose headers are on their way while the one before becomes rows."""
ROWS = 250
"""Items that become rows together, however large the pages are."""
BANDS = 1250
"""Bands of items that become rows together: files of 64 bands have 64 tile tables each."""
GIVE_UP_AFTER = 200
"""Headers that all failed: then the others will, too."""

_LISTED = 5
_UPDATED = re.compile(r'"updated": "([^"]*)"')  # in the JSON of a row's properties
_KEYS = (
    "id", "collection", "datetime", "start_datetime", "end_datetime", "platform", "datatake", "orbit", "tile",
    "baseline", "created", "eo:cloud_cover",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ItemBatch:
    """Items as they arrive."""

    items: Sequence[Item]
    total: int | None = None
    """Items of all batches, as far as anybody says."""


@dataclass(frozen=True, slots=True)
class TableSpec:
    """How items become a table."""

    name: str
    """What the table is called in messages."""
    rules: Rules
    headers: bool = True
    max_items: int | None = None
    """Rows, at most."""
    skip_broken: bool = True
    """Leave broken items out, and say which; else the first one ends it."""
    overlapping: bool = False
    """The same items are expected in several batches, so nobody needs to be told."""


@dataclass(frozen=True, slots=True)
class EarlierTable:
    """A table whose rows need not be made again."""

    path: Path
    age: Mapping[str, tuple[Any, ...]]
    """{id: its :func:`age_of`} of rows that are whole."""

    @classmethod
    def of(cls, path: Path) -> EarlierTable:
        """Return what a table holds; rows with an unreadable asset are not known, so that they are tried again."""
        file = pq.ParquetFile(path)
        found: dict[str, tuple[Any, ...]] = {}
        for batch in file.iter_batches(ROWS, columns=["id", "baseline", "created", "properties", "assets"]):
            failed = _failed(batch.column("assets"))
            rows = batch.select(["id", "baseline", "created", "properties"]).to_pylist()
            found |= {row["id"]: age_of(row) for row, bad in zip(rows, failed, strict=True) if not bad}
        return cls(path, found)

    def holds(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row is there already, in this version or a newer one."""
        known = self.age.get(row["id"])
        return known is not None and age_of(row) <= known

    def tables(self) -> Iterator[pa.Table]:
        """Yield the rows."""
        for batch in pq.ParquetFile(self.path).iter_batches(ROWS):
            table = pa.Table.from_batches([batch]).replace_schema_metadata(None)
            yield (
                table.cast(RECORD_SCHEMA)
                if table.column_names == RECORD_SCHEMA.names
                else conform(table, "earlier")
            )


@dataclass(slots=True)
class BuildReport:
    """What became of the items."""

    rows: int = 0
    """In the table."""
    added: int = 0
    """Made from the items; with a known table, the new and the replaced ones."""
    broken: LeftOut = field(default_factory=lambda: LeftOut(True))
    """Items left out."""
    left: LeftAssets = field(default_factory=LeftAssets)
    """Assets that became no band."""
    twice: int = 0
    """Items left out as another of the same id is as new or newer."""
    replaced: int = 0
    """Items left out as the same scene stands again with a newer baseline."""
    files: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)
    """{href: reason} of files without a readable header; only the first of them."""
    failed: int = 0
    """Files without a readable header."""
    contradictions: Counter[str] = field(default_factory=Counter)
    """What files and items say otherwise, and of how many records."""

    def notes(self, name: str) -> list[str]:
        """Return what a user should be told, a sentence or two each."""
        said = []
        if self.broken.items:
            said.append(self.broken.note(name))
        if self.twice:
            said.append(
                f"{name}: {self.twice} items repeat the id of another and are left out; of each id the one with "
                "the newest baseline and creation time is kept"
            )
        if self.replaced:
            said.append(
                f"{name}: {self.replaced} items are left out, as their scene stands again, reprocessed; of each "
                "datatake and tile the newest baseline is kept"
            )
        if self.failed:
            listed = "; ".join(f"{href}: {why}" for href, why in list(self.unreadable.items())[:_LISTED])
            said.append(
                f"{name}: the headers of {self.failed} of {self.files} files could not be read ({listed}). Their "
                "bands cannot be used; where(readable=True) leaves such records out, refresh() tries them again"
            )
        if self.contradictions:
            said.append(contradictions_note(name, self.contradictions))
        return said


def ingest(
    batches: Iterable[ItemBatch],
    spec: TableSpec,
    path: Path,
    progress: Progress,
    earlier: EarlierTable | None = None,
) -> BuildReport:
    """Write the table of all items, whole or not at all, in the order of the ground.

    Parameters
    ----------
    batches
        Items as they arrive; closed when enough of them are there.
    spec
        How they become rows.
    path
        The file.
    progress
        Counts items.
    earlier
        A table whose rows go into this one; headers of its items are read only where an item is newer.

    Raises
    ------
    SourceError
        When nothing is left, every item is broken, or no header can be read.
    BandError
        When no item has a band that was asked for.
    """
    report = BuildReport(broken=LeftOut(spec.skip_broken))
    before = None if earlier is None else pq.read_schema(earlier.path)
    signed: set[str] = set() if before is None else set(hosts_of(before) or ())
    if before is not None:
        report.left = LeftAssets.of(before)

    def tables() -> Iterator[pa.Table]:
        if earlier is not None:
            yield from earlier.tables()
        for table in _tables(batches, spec, report, progress, earlier):
            signed.update(signed_in(table))
            metadata.update(marks(tuple(signed)))
            metadata.update(report.left.metadata())
            yield table

    def choose(staged: pa.Table) -> NDArray[np.int64]:
        return _choose(staged.select(list(_KEYS)), spec, report, earlier is not None)

    metadata = table_metadata() | marks(
        tuple(signed)
    )  # of the file, which is written when all tables are there
    report.rows = geoparquet.write_ordered(tables(), path, choose=choose, metadata=metadata)
    return report


def ahead(source: Iterable[T], count: int = AHEAD) -> Generator[T]:
    """Yield what a source yields, taken from it on a thread of its own, so many in advance."""
    walk, end = iter(source), object()
    pool = ThreadPoolExecutor(1, "pages")
    try:
        coming: deque[Future[Any]] = deque(pool.submit(next, walk, end) for _ in range(count))
        while (one := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, walk, end))
            yield one
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after an error nobody waits for a page to come


def age_of(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what grows when an item is replaced: its baseline, creation, and last update."""
    created = row["created"]
    updated = _UPDATED.search(row["properties"] or "")
    return (
        version_of(row["baseline"] or ""),
        "" if created is None else created.isoformat(),
        updated[1] if updated else "",
    )


def _tables(
    batches: Iterable[ItemBatch],
    spec: TableSpec,
    report: BuildReport,
    progress: Progress,
    earlier: EarlierTable | None,
) -> Iterator[pa.Table]:
    """Yield the items' rows, a page after its headers are there."""
    coming: deque[tuple[list[Draft], dict[str, Future[Header | str]] | None]] = deque()
    with HeaderReader() as reader:
        for drafts in _drafts(batches, spec, report, progress, earlier):
            hrefs = dict.fromkeys(layer.href for draft in drafts for layer in draft.layers)
            coming.append((drafts, {h: reader.submit(h) for h in hrefs} if spec.headers else None))
            if len(coming) > AHEAD:
                yield _table(*coming.popleft(), reader, spec, report)
        while coming:
            yield _table(*coming.popleft(), reader, spec, report)
    if spec.headers and report.files and report.failed == report.files:
        raise _no_headers(spec, report)
    if not report.added and earlier is None:
        raise _nothing(spec, report)


def _drafts(
    batches: Iterable[ItemBatch],
    spec: TableSpec,
    report: BuildReport,
    progress: Progress,
    earlier: EarlierTable | None,
) -> Iterator[list[Draft]]:
    """Yield at most ROWS drafts at a time."""
    drafts: list[Draft] = []
    offered: dict[str, Layer] = {}
    count = 0
    with closing(ahead(batches)) as arriving:
        for batch in arriving:
            progress.total = batch.total if spec.max_items is None else spec.max_items
            for item in batch.items:
                draft = None
                with report.broken.of(item.id):
                    draft = draft_of(item, spec.rules)
                if draft is None:
                    continue
                offered |= draft.offered
                if earlier is not None and earlier.holds(draft.row):
                    continue
                drafts.append(draft)
                count += 1
                if count == spec.max_items:
                    break
                if len(drafts) >= ROWS or sum(len(one.layers) for one in drafts) >= BANDS:
                    if not any(one.layers for one in drafts):
                        check_bands([offered], spec.rules.bands)  # before the headers of all others are read
                    yield drafts
                    drafts = []
            progress.step(len(batch.items), f"{report.failed} headers failed" if report.failed else "")
            if count == spec.max_items:
                break
    if offered:
        check_bands([offered], spec.rules.bands)
        check_kinds([offered], spec.rules.kinds)
    if drafts:
        yield drafts


def _table(
    drafts: list[Draft],
    coming: Mapping[str, Future[Header | str]] | None,
    reader: HeaderReader,
    spec: TableSpec,
    report: BuildReport,
) -> pa.Table:
    found = None if coming is None else {href: future.result() for href, future in coming.items()}
    if found is not None:
        spare = {href: reader.submit(href) for href in dict.fromkeys(spare_hrefs(drafts, found))}
        found |= {href: future.result() for href, future in spare.items()}
        drafts = [with_copies(draft, found) for draft in drafts]
    report.left.add(drafts)
    needed = {layer.href for draft in drafts for layer in draft.layers}  # not those that a copy stands in for
    for href, header in (found or {}).items():
        report.files += 1
        if isinstance(header, str) and href in needed:
            report.failed += 1
            if len(report.unreadable) < _LISTED:
                report.unreadable[public(href)] = header
    if report.failed == report.files >= GIVE_UP_AFTER:
        raise _no_headers(spec, report)
    rows = []
    for draft in drafts:
        with report.broken.of(draft.row["id"]):
            row = completed(draft, found, spec.rules.crs)
            if row["geometry"] is None:
                raise SourceError(
                    f"item {row['id']!r}",
                    "neither geometry nor bbox, and no header that tells",
                    "a footprint",
                )
            if draft.row["geometry"] is not None or meets(row, spec.rules):
                rows.append(row)
    made, _ = rows_to_table(rows, report.broken)
    table = with_kinds(made, spec.rules.kinds)
    report.added += table.num_rows
    for row in rows:
        report.contradictions += contradictions(row["assets"])
    return table


def _choose(keys: pa.Table, spec: TableSpec, report: BuildReport, refreshed: bool) -> NDArray[np.int64]:
    """Return the rows to keep: of each id, then of each datatake and tile, the newest."""
    baseline = [version_of(text or "") for text in keys.column("baseline").to_pylist()]
    place = {version: n for n, version in enumerate(sorted(set(baseline)))}
    frame = pd.DataFrame(
        {
            "id": keys.column("id").to_pylist(),
            "version": [place[version] for version in baseline],
            "created": keys.column("created").cast(pa.int64()).fill_null(-(2**62)).to_numpy(),
        }
    )
    # the later of equals wins: a refresh brings what changed in other ways
    newest = frame.sort_values(["version", "created"], kind="stable").drop_duplicates("id", keep="last")
    rows = np.sort(newest.index.to_numpy())
    if not refreshed and not spec.overlapping:
        report.twice = len(frame) - len(rows)
    gone = acquisitions(Records(keys.take(pa.array(rows)))).of_record < 0
    report.replaced = int(gone.sum())
    return np.asarray(rows[~gone], dtype=np.int64)


def _failed(assets: pa.Array) -> NDArray[np.bool_]:
    """Shape (record,). True where an asset has an error."""
    first, last = assets.offsets[0].as_py(), assets.offsets[-1].as_py()
    items = assets.items.slice(first, last - first)
    bad = np.asarray(pc.is_valid(pc.struct_field(items, "error")))
    counted = np.concatenate([[0], np.cumsum(bad)])
    offsets = np.asarray(assets.offsets) - first
    return np.asarray(counted[offsets[1:]] > counted[offsets[:-1]])


def _nothing(spec: TableSpec, report: BuildReport) -> SourceError:
    if report.broken.items:
        return report.broken.all_of(spec.name)
    return EmptyError(
        f"items of {spec.name!r}",
        "none in the box and range asked for",
        "at least one item",
        "Widen bbox and date_range, or loosen query and filter.",
    )


def _no_headers(spec: TableSpec, report: BuildReport) -> SourceError:
    href, why = next(iter(report.unreadable.items()))
    return SourceError(
        f"headers of {spec.name!r}",
        f"none of {report.files} files readable ({href}: {why})",
        "files that can be read",
        "Are the network and credentials there? headers=False builds the table without them.",
    )
