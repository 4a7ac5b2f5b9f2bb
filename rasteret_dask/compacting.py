# SPDX-License-Identifier: Apache-2.0
"""A store rewritten with its kept chips only, as if written at once: bytes of whole chips are copied, not decoded."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.formats import STORE
from rasteret_dask.net import clusters, remote
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.net.places import Place
from rasteret_dask.planning.plan import digest
from rasteret_dask.store import ledger
from rasteret_dask.store.atonce import AtOnce, pieces_of
from rasteret_dask.store.datacard import card_objects
from rasteret_dask.store.jobreport import JobReport
from rasteret_dask.store.provenance import provenance_of_parts
from rasteret_dask.store.runtasks import Work
from rasteret_dask.store.union import Parts, grown_store, open_parts, open_union
from rasteret_dask.store.unitruns import LedgerJob, Making, UnitWork, write_job
from rasteret_dask.store.workunits import Commit, WorkUnit, row_of
from rasteret_dask.table import geoparquet
from rasteret_dask.tasks.filtering import tally

__all__ = ["compact"]

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
    units = _units(whole)
    chips = _Kept(whole, units)
    job = LedgerJob(
        chips,
        [replace(unit, item=unit) for unit in units],
        Work(UnitWork(place, partial(_copies, parts)), chips.owner.digest, {}),
        Commit(ledger.COMPACT, units, partial(card_objects, place), chips.row),
        digest(chips.owner.digest, place)[:16],
        ledger.COMPACT,
        stores=(url,),
    )
    return write_job(place, job, client, progress)


@dataclass(frozen=True)
class _Kept:
    """The kept chips of a store, as the ledger asks for what is to be written."""

    whole: AtOnce
    units: Sequence[WorkUnit]

    @property
    def owner(self) -> ledger.Owner:
        """Who writes them."""
        old = self.whole.union
        return ledger.Owner(digest("compact", old.digest), old.note["compression"], ledger.COMPACT)

    @cached_property
    def keys(self) -> Mapping[str, str]:
        """For each shard's name, the key of its valid report: what it is made of."""
        return {unit.name: unit.key for unit in self.units}

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
        table = self.whole.chip_table(np.concatenate([unit.item.rows for unit in self.units]))
        objects[ledger.CHIPS] = geoparquet.to_bytes(table)
        return {path: ledger.whole(data) for path, data in objects.items()}

    def places(self) -> dict[str, str]:
        """Return the path of every object that shards may have -> the shard's name."""
        return {
            array.object(unit.number): unit.name
            for unit in self.units
            for _, _, array in self.whole.arrays(unit.split, unit.item.splits)
        }

    def row(self, unit: WorkUnit, report: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what the manifest says of a new shard: how it was copied, and how its chips were read."""
        # an earlier version's report does not count chips
        return {**row_of(unit, {"chips": unit.chips, "dropped": {}, **report}), **self._reading[unit.name]}

    @cached_property
    def _reading(self) -> Mapping[str, Mapping[str, Any]]:
        """New shard -> columns of the old manifest that tell how its chips were read; what is counted, counts once."""
        names = [*_COUNTS, "clipped", "unreadable_tiles"]
        before = [row for part in self.whole.union.parts for row in part.manifest().select(names).to_pylist()]
        told: set[int] = set()
        result = {}
        for unit in self.units:
            parts = _old_shards(self.whole, unit.item.rows)
            clipped: Counter[str] = Counter()
            counts: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
            for number in set(parts) - told:
                clipped.update(json.loads(before[number]["clipped"]))
                counts.update({name: before[number][name] for name in _COUNTS})
            told.update(parts)
            lists = [json.loads(before[number]["unreadable_tiles"]) for number in parts]
            unreadable = list(dict.fromkeys(tile for own in lists for tile in own))
            result[unit.name] = {
                **counts,
                "clipped": json.dumps(clipped),
                "unreadable": len(unreadable),
                "unreadable_tiles": json.dumps(unreadable),
            }
        return result


@dataclass(frozen=True)
class _Rows:
    """Consecutive kept chips of one split: what becomes a shard."""

    split: str | None
    splits: int
    """How many splits there are in the new store."""
    number: int
    rows: NDArray[np.int64]
    """Rows among all chips of the old store: where each chip stands first."""


def _units(whole: AtOnce) -> list[WorkUnit]:
    """Return the new shards."""
    per, kept = whole.per_shard, whole.rows
    parts = [
        _Rows(split, len(kept), number, rows[number * per : (number + 1) * per])
        for split, rows in kept.items()
        for number in range(-(-len(rows) // per))
    ]
    return [
        WorkUnit(
            f"{part.split or 'all'}-{part.number:05d}", part, len(part.rows), _key(whole, part.rows), part.split,
            part.number,
        )
        for part in parts
    ]  # fmt: skip


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


def _copies(parts: Parts, shard: _Rows) -> Making:
    """Make the objects of a new shard."""
    start, old = time.perf_counter(), open_union(parts)
    for source, name, array in AtOnce(old).arrays(shard.split, shard.splits):
        pieces = pieces_of(old, source, name, array.encoding, shard.rows)
        if pieces:
            yield array.object(shard.number), pieces
        del pieces
    return {"seconds": {"copy": time.perf_counter() - start}}
