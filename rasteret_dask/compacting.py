# SPDX-License-Identifier: Apache-2.0
"""A store rewritten with its kept chips only, as if written at once: bytes of whole chips are copied, not decoded."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask import activity
from rasteret_dask.errors import JobError, PlanError, StoreError
from rasteret_dask.formats import STORE
from rasteret_dask.net import clusters, remote, signatures
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.net.places import Place
from rasteret_dask.planning.plan import digest
from rasteret_dask.store import ledger, shardreports
from rasteret_dask.store.atonce import AtOnce, pieces_of
from rasteret_dask.store.datacard import card_objects
from rasteret_dask.store.encode import crc32
from rasteret_dask.store.jobreport import JobReport, job_report
from rasteret_dask.store.manifest import stamp, table_of, timing
from rasteret_dask.store.paging import Paging
from rasteret_dask.store.presence import forget_clients, present
from rasteret_dask.store.provenance import provenance_of_parts
from rasteret_dask.store.runtasks import Shards, Work
from rasteret_dask.store.shardruns import Exit, runner, write_shards
from rasteret_dask.store.union import Parts, grown_store, open_parts, open_union
from rasteret_dask.table import geoparquet
from rasteret_dask.tasks.filtering import tally
from rasteret_dask.tasks.runs import Cuts

__all__ = ["compact"]

_log = logging.getLogger(__name__)

_COUNTS = ("requests", "bytes_fetched", "tiles_read", "gdal_fallback")
"""Columns of the manifest that say what reading cost."""


def compact(
    store: str | os.PathLike[str],
    target: str | os.PathLike[str],
    client: ClientLike = None,
    progress: bool = True,
) -> JobReport:
    """Write the kept chips of a store to another place, as a store of its own.

    Chips keep their order; shards are filled up. A split of which nothing is kept is left out. A store that has grown
    becomes what it would be, had it been written at once: each chip with the slots of all parts, in the order of the
    ground. Pixels of chips that lie in one part are copied as they are stored, those of others are decoded and put
    together. Columns that were added beside the store are not taken along.

    Called again after it was stopped, it does what is missing; once it is finished, nothing. In the new manifest, what
    reading cost and clipped stands once, at the shard that has the first kept chip of an old one; tiles that could not
    be read stand at every shard that has chips of theirs.

    Parameters
    ----------
    store
        A finished store.
    target
        A local path or a URL: an empty place, or one where this was begun.
    client
        A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
    progress
        Show how far it is.

    Returns
    -------
    JobReport
        What was written and what it took.

    Raises
    ------
    StoreError
        When the store is not finished or was changed, or something else lies at the target.
    PlanError
        When no chip is kept.
    JobError
        When shards could not be copied; the others are, and a rerun does only those.

    Examples
    --------
    >>> clear = chips.select("train").filter_pixels(min_valid=0.6)
    >>> report = clear.to_zarr("all.zarr", progress=False)
    >>> report = rd.compact("all.zarr", "kept.zarr")
    >>> len(rd.open_chips("kept.zarr")) == len(rd.open_chips("all.zarr")) < len(clear)
    True
    """
    clusters.check(client, "compact(client=)")
    start = time.monotonic()
    url, place = Place.of(store).url, Place.of(target).url
    grown = grown_store(url)
    grown.check_sizes()
    parts = open_parts([grown], version=0)
    opened = open_union(parts)
    if not opened.kept.any():
        reasons = [reason for shard in opened.shards for reason in shard.dropped.values()]
        raise PlanError(
            f"compact({remote.redact(url)})", f"0 of {len(reasons):,} chips kept ({tally(reasons)})", "at least one",
            "Write the store again with a filter_pixels() that asks for less.",
        )  # fmt: skip
    whole = AtOnce(opened)
    chips = _Kept(whole, _shards(whole))
    if _is_finished(place, chips.owner):
        if progress:
            sys.stderr.write(f"store {remote.redact(place)} is finished: nothing to do\n")
        return job_report(place)
    done = _reports(place, ledger.begin(place, chips), chips)
    subject = f"compact {remote.redact(place)}"
    with present(place) as presence:
        paging = Paging(presence, chips.keys)
        there = done.keys() | paging.since({shard: report.place for shard, report in done.items()})
        missing = [shard for shard in chips.shards if shard.name not in there]
        if missing:
            with clusters.using(client) as cluster:
                shards = _missing(parts, place, chips, missing)
                count = sum(len(shard.rows) for shard in chips.shards)
                caller = Exit("compact", remote.redact(place), len(chips.shards), count, progress)
                sign = partial(signatures.send_place, cluster, url, place)
                write_shards(runner(cluster), shards, caller, sign, paging.settle)
        _log.info("%s: %d shards written; committing", subject, len(chips.shards))
        found = ledger.restored(place, chips)
        reports = _reports(place, found, chips)
        lost = [shard.name for shard in chips.shards if shard.name not in reports]
        if lost:
            raise JobError(
                f"store {remote.redact(place)}",
                f"{len(lost)} shards missing: {', '.join(lost[:10])}",
                "all shards",
                "They were deleted or damaged meanwhile: call compact again, which does these.",
            )
        places = {shard: report.place for shard, report in reports.items()}
        manifest = _manifest(whole, chips.shards, reports, shardreports.tries(found))
        ledger.commit(place, found, manifest, places, card_objects(place, manifest))
        forget_clients(place)
    return JobReport.of_manifest(
        remote.redact(place), manifest, written=len(missing), seconds=round(time.monotonic() - start, 3)
    )


def _reports(place: str, objects: Mapping[str, int], chips: _Kept) -> dict[str, shardreports.Report]:
    """Return the valid reports of all shards."""
    return {
        shard: report
        for some in shardreports.reports(place, objects, chips.keys)
        for shard, report in some.items()
    }


def _missing(parts: Parts, place: str, chips: _Kept, missing: Sequence[_NewShard]) -> Shards:
    """Return the shards that are not there, as they are to be written."""
    return Shards(
        Work(partial(_copied, parts, place), chips.owner.digest, {}),
        [shard.name for shard in missing],
        missing,
        [shard.key for shard in missing],
        range(len(missing)),
        Cuts.free(len(missing)),
        digest(chips.owner.digest, place)[:16],
        "compact",
        [len(shard.rows) for shard in missing],
    )


def _is_finished(place: str, owner: ledger.Owner) -> bool:
    try:
        note = ledger.root_of(place).note
    except (remote.MissingError, StoreError):  # unfinished, damaged, or something else: begin() tells
        return False
    ledger.check_owner(place, note, owner)
    return True


@dataclass(frozen=True)
class _Kept:
    """The kept chips of a store, as the ledger asks for what is to be written."""

    whole: AtOnce
    shards: Sequence[_NewShard]

    @property
    def owner(self) -> ledger.Owner:
        """Who writes them."""
        old = self.whole.union
        return ledger.Owner(digest("compact", old.digest), old.note["compression"], ledger.COMPACT)

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """For each shard's name, the key of its valid report: what it is made of."""
        return {shard.name: shard.key for shard in self.shards}

    def objects(self) -> dict[str, ledger.Maker]:
        """Return what makes the arrays' metadata, the chunks that the plan knew, and the chip table."""
        old = self.whole.union
        documents, attrs, chunks = self.whole.documents()
        objects = dict(chunks)
        note = {k: v for k, v in old.note.items() if k not in ("checksum", ledger.SUPERSEDES)}
        owner = {"writer": ledger.COMPACT, "digest": self.owner.digest, "compacted_from": old.digest}
        first = old.parts[0].root
        root = {
            **first,
            "attributes": {**attrs, "rasteret_dask": {**note, **STORE.note, **owner}},
            "consolidated_metadata": {**first["consolidated_metadata"], "metadata": documents},
        }
        texts = {f"{path}/zarr.json": json.dumps(node) for path, node in documents.items()} | {
            "zarr.json": json.dumps(root)
        }
        groups = {p: text for p, text in texts.items() if json.loads(text)["node_type"] == "group"}
        objects |= {path: text.encode() for path, text in texts.items() if path not in groups}
        objects[ledger.GROUPS] = json.dumps(groups).encode()
        for path in (ledger.PROVENANCE, ledger.RECIPE, ledger.LAW):  # where they are kept
            if path in old.parts[0].others:
                objects[path] = remote.get(remote.join(old.url, path))
        if len(old.parts) > 1:
            objects[ledger.PROVENANCE] = (
                provenance_of_parts([part.url for part in old.parts]).by_member().to_bytes()
            )
        table = self.whole.chip_table(np.concatenate([s.rows for s in self.shards]))
        objects[ledger.CHIPS] = geoparquet.to_bytes(table)
        return {path: ledger.whole(data) for path, data in objects.items()}

    def places(self) -> dict[str, str]:
        """Return the path of every object that shards may have -> the shard's name."""
        return {
            array.object(shard.number): shard.name
            for shard in self.shards
            for _, _, array in self.whole.arrays(shard.split, shard.splits)
        }


@dataclass(frozen=True)
class _NewShard:
    """Consecutive kept chips of one split."""

    name: str
    split: str | None
    splits: int
    """How many splits there are in the new store."""
    number: int
    rows: NDArray[np.int64]
    """Rows among all chips of the old store: where each chip stands first."""
    key: str
    """Digest of what it is made of."""


def _shards(whole: AtOnce) -> list[_NewShard]:
    per, kept = whole.per_shard, whole.rows
    parts = [
        (s, n, rows[n * per : (n + 1) * per]) for s, rows in kept.items() for n in range(-(-len(rows) // per))
    ]
    return [
        _NewShard(f"{split or 'all'}-{number:05d}", split, len(kept), number, rows, _key(whole, rows))
        for split, number, rows in parts
    ]


def _key(whole: AtOnce, rows: NDArray[np.int64]) -> str:
    """Digest chips, and the objects that hold them: a store that was written again may have other pixels."""
    old = whole.union
    objects = [sorted(old.shards[n].sizes.items()) for n in _old_shards(whole, rows)]
    return digest(old.digest, rows.tolist(), objects)


def _old_shards(whole: AtOnce, rows: NDArray[np.int64]) -> list[int]:
    """Return the shards that chips lie in with any slot, rising."""
    every, _ = whole.with_further(rows)
    found: list[int] = np.unique(np.searchsorted(whole.union.starts, every, side="right") - 1).tolist()
    return found


def _copied(parts: Parts, place: str, shard: _NewShard) -> None:
    """Write one new shard, then its report; nothing where that is done, whoever held its result."""
    start = time.perf_counter()
    if shardreports.valid_report(place, shard.name, shard.key) is not None:
        return
    old = open_union(parts)
    mark = shardreports.tried(place, shard.name, shard.key)
    written, shown = [], activity.current()
    for source, name, array in AtOnce(old).arrays(shard.split, shard.splits):
        pieces = pieces_of(old, source, name, array.encoding, shard.rows)
        if pieces:
            path = array.object(shard.number)
            remote.put(remote.join(place, path), pieces)
            if shown is not None:
                shown.written += sum(map(len, pieces))
            written.append({"path": path, "size": sum(map(len, pieces)), "crc32": crc32(pieces)})
    seconds = time.perf_counter() - start
    report = {"objects": written, **stamp(seconds, {"copy": seconds})}
    shardreports.done(place, shard.name, shard.key, mark, report)


def _manifest(
    whole: AtOnce,
    shards: Sequence[_NewShard],
    reports: Mapping[str, shardreports.Report],
    tries: Mapping[str, Sequence[str]],
) -> pa.Table:
    """Return one row a shard, with the columns of the old manifest."""
    names = [*_COUNTS, "clipped", "unreadable_tiles"]
    before = [row for part in whole.union.parts for row in part.manifest().select(names).to_pylist()]
    told: set[int] = set()
    rows = []
    for shard in shards:
        report, parts = reports[shard.name].values, _old_shards(whole, shard.rows)
        clipped: Counter[str] = Counter()
        counts: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
        for number in set(parts) - told:
            clipped.update(json.loads(before[number]["clipped"]))
            counts.update({name: before[number][name] for name in _COUNTS})
        told.update(parts)
        lists = [json.loads(before[number]["unreadable_tiles"]) for number in parts]
        unreadable = list(dict.fromkeys(tile for own in lists for tile in own))
        rows.append(
            {
                "shard": shard.name,
                "split": shard.split,
                "number": shard.number,
                "chips": len(shard.rows),
                "kept": len(shard.rows),
                "dropped_chips": "{}",
                "attempts": reports[shard.name].place.attempts(tries.get(shard.name, ())),
                **timing(report),
                "bytes": sum(o["size"] for o in report["objects"]),
                "objects": report["objects"],
                **counts,
                "clipped": json.dumps(clipped),
                "unreadable": len(unreadable),
                "unreadable_tiles": json.dumps(unreadable),
                "key": shard.key,
            }
        )
    return table_of(rows)
