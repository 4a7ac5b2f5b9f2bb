# SPDX-License-Identifier: Apache-2.0
"""What is written in units on a ledger: which units are there, what the manifest says of each, and the commit."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from rasteret_dask.errors import JobError
from rasteret_dask.net import remote
from rasteret_dask.net.sums import root_checksum
from rasteret_dask.store import ledger, shardreports
from rasteret_dask.store.manifest import MANIFEST_SCHEMA, report_row, table_of
from rasteret_dask.store.smallobjects import data_of

__all__ = ["ROOT", "Commit", "WorkUnit", "begin", "is_finished", "row_of"]

ROOT = "zarr.json"
"""The document that makes a Zarr store visible."""


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """One part of what is written: a task of its own, or a place in the run of one."""

    name: str
    """As of a shard: ``train-00003``."""
    item: Any
    """What the job's work is called with; small, as it travels with the task."""
    chips: int
    key: str
    """What its valid report has: digest of what it will hold, or of the job that it is a shard of."""
    split: str | None = None
    number: int = 0
    """Counts within the split."""
    pixels: str = ""
    """Digest of what it will hold, where :attr:`key` is the whole job's; empty: that is the key."""

    @property
    def content(self) -> str:
        """Digest of what it will hold."""
        return self.pixels or self.key


Row: TypeAlias = Callable[[WorkUnit, Mapping[str, Any]], Mapping[str, Any]]
"""Returns what the manifest says of a unit, from its report."""


def row_of(unit: WorkUnit, report: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what the manifest says of a unit: what its report does."""
    return report_row(unit.name, unit.split, unit.number, report)


def begin(
    url: str, content: ledger.Content, units: Iterable[str] | None = None
) -> dict[str, shardreports.ReportPlace]:
    """Make a place ready for its units, and return those that are already there, with their reports' places.

    Parameters
    ----------
    url
        The store, or folder.
    content
        What is to lie there. What a rerun finds is compared with the ledger; what is missing or damaged is put again.
    units
        Names of those that are asked for; None: all.

    Raises
    ------
    StoreError
        When something else lies there, another plan's leftovers, or the same with other options.
    FormatError
        When a newer version of the package writes it.
    """
    found = ledger.begin(url, content)
    keys = content.keys if units is None else {name: content.keys[name] for name in units}
    some = shardreports.reports(url, found, keys)
    return {unit: report.place for part in some for unit, report in part.items()}


def is_finished(url: str, owner: ledger.Owner, root: str = ROOT) -> bool:
    """Tell whether a place holds all that somebody writes: its root is there, as it was put.

    Parameters
    ----------
    url
        The store, or folder.
    owner
        Who writes it.
    root
        Path of the document that makes everything visible.

    Raises
    ------
    StoreError
        When it is finished, with other options.
    FormatError
        When a newer version of the package wrote it.
    """
    text = data_of(url, root)
    try:
        document = {} if text is None else json.loads(text)
        note = document.get("attributes", document).get("rasteret_dask")
        if note is None or note.get("checksum") != root_checksum(document):
            return False
    except (ValueError, RecursionError, AttributeError):  # something else: begin() tells
        return False
    if note.get("digest") != owner.digest:
        return False
    ledger.check_owner(url, note, owner)
    return True


@dataclass(frozen=True)
class Commit:
    """How what was written in units becomes visible."""

    writer: str
    """What the user calls: ``to_zarr``."""
    units: Sequence[WorkUnit]
    """All of them, in the order of the manifest's rows."""
    more: Callable[[pa.Table], Mapping[str, bytes]]
    """Returns what is known when all units are written, from the manifest: path -> bytes."""
    row: Row = row_of
    root: str = ROOT
    """Path of the document that comes last."""

    @property
    def keys(self) -> dict[str, str]:
        """For each unit's name, the key that its valid report has."""
        return {unit.name: unit.key for unit in self.units}

    def is_due(self, url: str) -> bool:
        """Tell whether all units have reports: whoever of several processes sees it may commit."""
        return not shardreports.unreported(url, remote.listing(url), self.keys)

    def rows(self, url: str, names: Collection[str]) -> pa.Table:
        """Return the rows that the manifest will have for some units, as far as these are written."""
        return self._manifest(url, remote.listing(url), [u for u in self.units if u.name in names])[0]

    def put(self, url: str, content: ledger.Content | None) -> pa.Table:
        """Hold all that was written against the ledger, and put what makes it visible; return the manifest.

        Parameters
        ----------
        url
            The store, or folder.
        content
            From which is put again what is missing or damaged meanwhile. None: that is an error.

        Raises
        ------
        JobError
            When a unit has no report.
        StoreError
            When something else is missing or damaged, and there is no content.
        """
        found = ledger.restored(url, content)
        manifest, places = self._manifest(url, found, self.units)
        missing = [unit.name for unit in self.units if unit.name not in places]
        if missing:
            raise JobError(
                f"store {remote.redact(url)}",
                f"{len(missing)} shards missing: {', '.join(missing[:10])}",
                "all shards",
                "They are not written yet, or were deleted or damaged meanwhile: let the parts that write them end, or "
                f"call {self.writer} again, which does only these.",
            )
        return ledger.commit(url, found, manifest, places, self.more(manifest), self.root)

    def _manifest(
        self, url: str, objects: Mapping[str, int], units: Sequence[WorkUnit]
    ) -> tuple[pa.Table, dict[str, shardreports.ReportPlace]]:
        """Return the rows of units that are written, in their order, and how their reports are stored.

        Reports are read some at a time; of those that were read, rows of a table are held.
        """
        tries, places = shardreports.tries(objects), dict[str, shardreports.ReportPlace]()
        number = {unit.name: at for at, unit in enumerate(units)}
        numbers, tables = list[int](), [MANIFEST_SCHEMA.empty_table()]
        for some in shardreports.reports(url, objects, {unit.name: unit.key for unit in units}):
            rows = []
            for name, report in some.items():
                unit, attempts = units[number[name]], report.place.attempts(tries.get(name, ()))
                rows.append({**self.row(unit, report.values), "attempts": attempts, "key": unit.content})
                numbers.append(number[name])
                places[name] = report.place
            tables.append(table_of(rows))
        order = np.argsort(np.array(numbers, dtype=np.int64))
        return pa.concat_tables(tables).take(pa.array(order)).combine_chunks(), places
