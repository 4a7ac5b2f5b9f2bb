# SPDX-License-Identifier: Apache-2.0
"""Chips of a finished store, read again from their scenes and compared with what is stored, bit for bit."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import bounds_of
from rasteret_dask.errors import BandError, CredentialsError, PlanError, ReadError, StoreError
from rasteret_dask.net import remote
from rasteret_dask.planning.plan import Function
from rasteret_dask.planning.sampling import sample_rows
from rasteret_dask.store.layout import JOB, OF_SHARDS
from rasteret_dask.store.ledger import TO_ZARR
from rasteret_dask.store.onthreads import threads_that_fit
from rasteret_dask.store.storemap import StoreMap, open_store
from rasteret_dask.store.storeread import read_rows
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.job import Hierarchy, Job
from rasteret_dask.tasks.jobfile import JOB_FILE, open_job
from rasteret_dask.tasks.shards import read_chips

__all__ = ["Difference", "Rereading", "check_sample", "differing", "rereading"]

COORDINATES = ("chip_id", "split", "epsg", "bounds")
"""What the plan knew of a chip, as arrays of its own."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What a chip's scenes give today, where that is not what is stored."""

    chip: str
    """Its id."""
    source: str
    """The joined source."""
    variable: str
    """``pixels``, ``valid``, ``datetime``, ... ; ``kept``: a rule on pixels decides otherwise; empty: see ``error``."""
    pixels: int
    """How many pixels (y, x) differ in any slot or band; of variables without pixels, how many values."""
    largest: float
    """Largest absolute difference; NaN where values cannot be subtracted, or only one of two is a number."""
    changed: tuple[str, ...]
    """Files of its records that are not the ones that were indexed, as size and ETag tell: ``"rec (B04): gone"``."""
    error: str = ""
    """Why it could not be read again; empty where it was."""

    def __str__(self) -> str:
        what = self.error
        if not what and self.variable == "kept":
            what = "a rule on its pixels decides otherwise"
        elif not what:
            by = "" if np.isnan(self.largest) else f", by at most {self.largest:g}"
            what = f"{self.pixels:,} of {self.variable} differ{by}"
        files = f"; changed since: {', '.join(self.changed)}" if self.changed else ""
        return f"chip {self.chip}, source {self.source}: {what}{files}"


class Rereading:
    """A sample of a store's chips, with the plan that the store keeps.

    Parameters
    ----------
    store
        What is stored.
    job
        The plan.
    functions
        The user's functions that it names.
    rows
        The chips, by their rows among all of the store.
    """

    def __init__(
        self,
        store: StoreMap,
        job: Job,
        functions: Mapping[Function, Callable[..., Any]],
        rows: NDArray[np.int64],
    ) -> None:
        self._store, self._context, self._rows = store, ReadContext(functions), rows
        ids = store.chips.table.column("chip_id").take(pa.array(rows))
        places = pc.index_in(ids, value_set=job.chips.column("chip_id").combine_chunks())
        if places.null_count:
            raise StoreError(
                f"store {remote.redact(store.url)}", "chips that its plan does not have", "those of its plan"
            )
        self._ids: list[str] = ids.to_pylist()
        table = job.chips.take(places)
        splits = table.column("split").to_pylist()
        # each chip is a shard of its own: no pixel depends on the chips beside it
        parts = [
            Hierarchy(split if any(h.split for h in job.hierarchies) else None, at, at, at + 1, 1)
            for at, split in enumerate(splits)
        ]
        self._job = replace(job, chips=table, hierarchies=tuple(parts), others=())

    def __len__(self) -> int:
        return len(self._rows)

    def differences(self) -> Iterator[tuple[Difference, ...]]:
        """Read chip by chip, several at a time; yield what differs in each."""
        with ThreadPoolExecutor(threads_that_fit(), thread_name_prefix="rasteret-reread") as threads:
            yield from threads.map(self._compared, range(len(self)))

    def _compared(self, at: int) -> tuple[Difference, ...]:
        names = [plan.name for plan in self._job.sources]
        try:
            made = read_chips(self._job, self._job.shard(at, 0), self._context, warns=False)
            stored = self._stored(at)
        except CredentialsError:
            raise
        except (ReadError, StoreError) as error:
            others = [self._changed(at, number) for number in range(len(names))]
            hit = next((number for number, changed in enumerate(others) if changed), 0)
            return (Difference(self._ids[at], names[hit], "", 0, np.nan, others[hit], str(error)),)
        dropped = any(dataset.attrs.get("dropped") for dataset in made.values())
        if dropped or not self._store.kept[self._rows[at]]:
            if dropped != bool(self._store.kept[self._rows[at]]):
                return ()
            files = tuple(name for n in range(len(names)) for name in self._changed(at, n))
            return (Difference(self._ids[at], names[0], "kept", 0, np.nan, files),)
        found = []
        for number, name in enumerate(names):
            for variable, values in stored[name].items():
                mine = (
                    self._planned(at, variable) if variable in COORDINATES else made[name][variable].values[0]
                )
                count, largest = differing(mine, values)
                if count:
                    found.append((number, variable, count, largest))
        changed = {number: self._changed(at, number) for number in {number for number, *_ in found}}
        return tuple(
            Difference(self._ids[at], names[number], variable, count, largest, changed[number])
            for number, variable, count, largest in found
        )

    def _stored(self, at: int) -> dict[str, dict[str, NDArray[Any]]]:
        """Return source -> variable -> what the store has of a chip, coordinates too."""
        row = int(self._rows[at])
        shard = self._store.shards[int(np.searchsorted(self._store.starts, row, side="right")) - 1]
        groups = self._store.groups_of(shard)
        names = {
            group.source: [*(n for n in OF_SHARDS if n in group.arrays), *group.masks] for group in groups
        }
        read = read_rows(self._store, self._rows[at : at + 1], names)
        inside = row - next(one.start for one in self._store.shards if one.split == shard.split)
        result: dict[str, dict[str, NDArray[Any]]] = {}
        for group in groups:
            of_plan = {
                n: self._store.values(group.arrays[n])[inside] for n in COORDINATES if n in group.arrays
            }
            result[group.source] = {n: read[group.source, n][0] for n in names[group.source]} | {
                name: np.asarray(value) for name, value in of_plan.items()
            }
        return result

    def _planned(self, at: int, name: str) -> NDArray[Any]:
        """Return a coordinate as the plan has it."""
        row = self._job.chips.slice(at, 1)
        if name == "bounds":
            return np.asarray(bounds_of(row)[0])
        return np.asarray(row.column(name).to_pylist()[0] or "")

    def _changed(self, at: int, source: int) -> tuple[str, ...]:
        """Return the files of a chip's records that are others by now."""
        feeds, records = self._job.feeds, self._job.records[source]
        own = (feeds.chip == at) & (feeds.source == source)
        changed = []
        for row in np.unique(feeds.row[own]).tolist():
            for band in self._job.sources[source].members[self._job.members[source][row]].reads:
                try:
                    asset = records.asset(row, band)
                except (BandError, ReadError):  # it has none
                    continue
                difference = _other_file(asset.href, asset.size, asset.etag)
                if difference:
                    changed.append(f"{records.ids[row]} ({band}): {difference}")
        return tuple(changed)


def rereading(url: str, count: int, seed: int) -> Rereading:
    """Return a sample of the chips of a finished store, drawn by hash of their ids.

    Parameters
    ----------
    url
        The store.
    count
        How many chips; all where there are fewer.
    seed
        Another seed draws others.

    Raises
    ------
    StoreError
        When it is not finished, or does not keep its plan.
    PlanError
        When its plan names functions that this process has not imported, or that say something else by now.
    """
    store = open_store(url)
    subject = f"verify({remote.redact(url)}, sources=)"
    place = remote.join(url, JOB)
    if store.note["writer"] != TO_ZARR:
        raise StoreError(
            subject, "a compacted store, without a plan", "a store that keeps its plan",
            "Verify the store that it was compacted from.",
        )  # fmt: skip
    if not remote.exists(remote.join(place, JOB_FILE)):
        raise StoreError(
            subject, "chips that were planned by blocks, whose plan lies elsewhere", "a store that keeps its plan",
            "Leave sources out, or verify a store that plan.to_chips().to_zarr() has written.",
        )  # fmt: skip
    job = open_job(place, store.note["digest"])
    job.check_signatures()
    rows = sample_rows(store.chips.table.select(["chip_id"]), "chip_id", count, seed, None)
    return Rereading(store, job, _imported(job, subject), rows)


def _imported(job: Job, subject: str) -> dict[Function, Callable[..., Any]]:
    """Return a plan's functions, as far as this process has them: nothing is imported because a store says so."""
    calls: dict[Function, Callable[..., Any]] = {}
    for function in job.all_functions:
        name = f"{function.module}.{function.name}"
        call: Any = sys.modules.get(function.module)
        for part in function.name.split("."):
            call = getattr(call, part, None)
        if call is None:
            raise PlanError(
                subject, f"chips of the function {name}, which this process does not have",
                "every function of the plan, imported",
                f"Import its module first (import {function.module}; on the command line --import "
                f"{function.module}), where it stands at the top level of one.",
            )  # fmt: skip
        if not function.source.startswith("version ") and Function.of(call) != function:
            raise PlanError(
                subject, f"a function {name} that says something else by now",
                "the one that the store was written with", "Verify with the same version of your code.",
            )  # fmt: skip
        calls[function] = call
    return calls


def differing(mine: NDArray[Any], stored: NDArray[Any]) -> tuple[int, float]:
    """Compare two arrays bit for bit; whatever is no number (NaN) is equal to what is none.

    Parameters
    ----------
    mine, stored
        Shape (..., y, x), or any other where they are no pixels.

    Returns
    -------
    tuple
        How many pixels differ, over all that stands before the last two axes; of others, how many values. And the
        largest absolute difference among numbers.
    """
    mine, stored = np.asarray(mine), np.asarray(stored)
    if mine.dtype.kind == "M":  # not a time is equal to itself
        mine, stored = (one.astype("datetime64[us]").astype(np.int64) for one in (mine, stored))
    if mine.shape != stored.shape:
        return max(mine.size, stored.size), np.nan
    if mine.dtype.kind == "f" and mine.dtype == stored.dtype:  # -0 is not 0, and a NaN is a NaN
        bits = f"u{mine.dtype.itemsize}"
        unequal = np.ascontiguousarray(mine).view(bits) != np.ascontiguousarray(stored).view(bits)
        unequal &= ~(np.isnan(mine) & np.isnan(stored))
    else:
        unequal = mine != stored
    if not unequal.any():
        return 0, 0.0
    places = unequal.any(axis=tuple(range(unequal.ndim - 2))) if unequal.ndim > 2 else unequal
    largest = np.nan
    if mine.dtype.kind in "biuf":
        apart = np.abs(mine[unequal].astype(np.float64) - stored[unequal].astype(np.float64))
        apart = apart[np.isfinite(apart)]
        largest = float(apart.max()) if apart.size else np.nan
    return int(places.sum()), largest


def _other_file(href: str, size: int | None, etag: str | None) -> str:
    """Say how a file differs from the one that was indexed; empty: it is the same, as far as its server tells."""
    try:
        head = remote.head(href)
    except remote.MissingError:
        return "gone"
    except ReadError as error:
        return f"not to be asked ({error.found})"
    if size is not None and head.size != size:
        return f"{head.size:,} bytes instead of {size:,}"
    if etag is not None and head.etag is not None and head.etag != etag and not remote.is_local(href):
        return "another ETag"
    return ""


def check_sample(sources: Any) -> None:
    """Raise PlanError where this is no number of chips."""
    if sources is not None and (type(sources) is not int or sources < 1):
        raise PlanError(
            "verify(sources=)", repr(sources), "how many chips to read again, at least 1, or None"
        )
