# SPDX-License-Identifier: Apache-2.0
"""What writing a store took and what became of its chips: the sums of its manifest."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc

from rasteret_dask.display.card import Card, Fact, counted
from rasteret_dask.display.html import Markup, markup
from rasteret_dask.errors import StoreError
from rasteret_dask.lists import first_of
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.progress import nbytes_text, seconds_text
from rasteret_dask.store import ledger
from rasteret_dask.store.storetables import open_manifest
from rasteret_dask.tasks.usage import NOTES, Usage, hours_text

__all__ = ["JobReport", "SlowShard", "manifest_of_parts", "job_report", "report_of_stores", "slow_shards"]

SLOWEST = 10
"""Shards that :attr:`JobReport.slowest` names."""
SLOW = 5
"""Times the median, and a shard is slow."""
FEW = 5
"""Shards of which none is called slow: their median says little."""
SHOWN = 3
"""Shards, bands and stages that a line of the text names."""

MOST_STAGES = 8
"""Stages that the text names."""
LETTER_PX, BAR_PX, LINE_PX = 7.5, 180, 20
"""Of the picture of stages: width of a letter of their names and of the longest bar, height of a line."""

SlowShard: TypeAlias = "tuple[str, float, str]"
"""Shard, its seconds, and the process that wrote it."""


@dataclass(frozen=True, slots=True, repr=False)
class JobReport:
    """What ``to_zarr`` did; its text is a summary, and :attr:`JobReport.table` has a row a shard.

    Figures cover every shard of the store that is written, whichever run wrote it; only :attr:`shards_written` and
    :attr:`seconds` are those of one run.

    Examples
    --------
    >>> report = chips.to_zarr("watched.zarr", progress=False)
    >>> report.committed, report.shards == report.shards_written, report.kept == len(chips)
    (True, True, True)
    >>> sorted(stage.split("/")[0] for stage in report.stages)[-2:]
    ['put', 'read']
    """

    store: str
    """The store's address, without credentials."""
    committed: bool
    """Whether the store is finished, and opens."""
    shards: int
    """Shards of the whole job."""
    shards_written: int
    """Shards that this run wrote; 0 where the report was read back."""
    chips: int
    """Chips of the shards that are written, dropped ones among them."""
    kept: int
    """Chips that no rule on pixels dropped."""
    bytes_written: int
    """Bytes of the shards' objects, compressed."""
    bytes_fetched: int
    """Bytes that were read from the sources."""
    requests: int
    """Requests for tiles, as they were planned: neighbouring tiles of a file are one."""
    retries: int
    """Shards that were tried again, each try counted once."""
    seconds: float | None
    """How long this run took, by the clock; None where the report was read back."""
    worker_hours: float | None
    """Hours in which a process had at least one shard under way, summed over processes; of tries that failed, of
    waiting and of starting nothing is known. None where an earlier version wrote the store."""
    stages: Mapping[str, float]
    """Stage -> seconds, summed over shards, which ran side by side: ``"read/<source>"``, ``"compose/<source>"``,
    ``"encode"`` and ``"put"``."""
    slowest: tuple[SlowShard, ...]
    """The ten slowest shards, the slowest first: name, seconds, process."""
    processes: Mapping[str, int]
    """Process, as ``host:pid`` -> how many shards it wrote."""
    masked: Mapping[str, float]
    """Source -> share of the pixels of kept chips that are invalid: masked, nodata, or without a record."""
    clipped: Mapping[str, int]
    """``"<source>/<band>"`` -> values beyond what the stored dtype can hold."""
    unreadable: int
    """Tiles that could not be read and are invalid, as ``on_error="mask"`` allows."""
    table: pa.Table = field(repr=False, compare=False)
    """The manifest's rows: one a shard that is written."""

    @classmethod
    def of_manifest(
        cls,
        store: str,
        manifest: pa.Table,
        shards: int | None = None,
        written: int = 0,
        seconds: float | None = None,
    ) -> JobReport:
        """Sum up a manifest, one of an earlier version too: what that does not hold is 0 or empty.

        Parameters
        ----------
        store
            The store's address, without credentials.
        manifest
            A row a shard that is written.
        shards
            Shards of the whole job, of a store that is not committed; None: it is, and the manifest has them all.
        written, seconds
            As the fields ``shards_written`` and ``seconds``.

        Examples
        --------
        >>> manifest = rd.job_report("train.zarr").table.slice(0, 1)
        >>> report = rd.JobReport.of_manifest("train.zarr", manifest, shards=9)
        >>> report.committed, report.shards, sum(report.processes.values())
        (False, 9, 1)
        """
        stages, masked, clipped = Counter[str](), Counter[str](), Counter[str]()
        weights = Counter[str]()
        for one in _values(manifest, "stages"):
            stages.update(dict(one or ()))
        for one, chips in zip(_values(manifest, "masked"), _values(manifest, "kept"), strict=False):
            for source, share in one or ():
                masked[source] += share * chips
                weights[source] += chips
        for text in _values(manifest, "clipped"):
            clipped.update(json.loads(text))
        tries = _values(manifest, "attempts")
        return cls(
            store,
            shards is None,
            manifest.num_rows if shards is None else shards,
            written,
            _sum(manifest, "chips"),
            _sum(manifest, "kept"),
            _sum(manifest, "bytes"),
            _sum(manifest, "bytes_fetched"),
            _sum(manifest, "requests"),
            sum(max(count - 1, 0) for count in tries),
            seconds,
            _worker_hours(manifest),
            {stage: round(total, 3) for stage, total in stages.items()},
            _slowest(manifest),
            dict(sorted(Counter(_values(manifest, "process")).items())),
            {source: masked[source] / count for source, count in weights.items() if count},
            dict(clipped),
            _sum(manifest, "unreadable"),
            manifest,
        )

    @property
    def usage(self) -> Usage:
        """What the job used of what is billed.

        Examples
        --------
        >>> rd.job_report("train.zarr").usage.cost(worker_hour=0.1, puts_1000=0.005)
        <Cost: ...
        """
        objects = sum(map(len, _values(self.table, "objects")))
        puts = objects + NOTES * self.table.num_rows
        return Usage(self.worker_hours, self.requests, puts, self.bytes_fetched)

    @property
    def _card(self) -> Card:
        run, missing, dropped = "", self.shards - self.table.num_rows, self.chips - self.kept
        if self.seconds is not None:
            run = f", {self.shards_written:,} of them by this run in {seconds_text(self.seconds)}"
        stages = [f"{stage} {value:.1f}" for stage, value in self.stages.items()]
        every = (
            Fact("store", self.store),
            Fact("shards", f"{self.shards:,}{run}" + (f"; {missing:,} are missing" if missing else "")),
            Fact(
                "chips",
                f"{self.kept:,}" + (f"; {dropped:,} more dropped by filter_pixels" if dropped else ""),
            ),
            Fact("read", f"{nbytes_text(self.bytes_fetched)} in {counted(self.requests, 'request')}"),
            Fact("written", f"{nbytes_text(self.bytes_written)}, compressed"),
            Fact(
                "retries",
                f"{counted(self.retries, 'further try', 'further tries')} of shards" if self.retries else "",
            ),
            Fact(
                "stages, seconds",
                first_of(filter(None, stages), MOST_STAGES),
                partial(_stage_bars, self.stages),
            ),
            Fact(
                "slowest shards",
                "; ".join(f"{name} {value:.1f} s on {where}" for name, value, where in self.slowest[:SHOWN]),
            ),
            Fact("processes", self._processes),
            Fact("pixels", "; ".join(text for text in (self._pixels, self._clips, self._unread) if text)),
        )
        state = "committed" if self.committed else "not committed"
        return Card(f"JobReport: {state}", [row for row in every if row.text])

    @property
    def _processes(self) -> str:
        hours = "" if self.worker_hours is None else f"; {hours_text(self.worker_hours)} worker hours"
        return first_of((f"{name} wrote {count:,}" for name, count in self.processes.items()), SHOWN) + hours

    @property
    def _pixels(self) -> str:
        shares = [f"{100 * share:.1f}% of {source}" for source, share in self.masked.items()]
        return f"invalid: {first_of(shares, SHOWN)}" if shares else ""

    @property
    def _clips(self) -> str:
        most = sorted(self.clipped.items(), key=lambda pair: -pair[1])
        texts = (f"{count:,} of {name}" for name, count in most)
        return f"clipped values: {first_of(texts, SHOWN)}" if most else ""

    @property
    def _unread(self) -> str:
        return f"{self.unreadable:,} tiles could not be read" if self.unreadable else ""

    @property
    def lines(self) -> tuple[tuple[str, str], ...]:
        """What its text says, a name and a value a line; what there is nothing of is left out.

        Examples
        --------
        >>> [name for name, _ in rd.job_report("train.zarr").lines][:3]
        ['store', 'shards', 'chips']
        """
        return tuple((row.name, row.text) for row in self._card.rows if row.text)

    def __repr__(self) -> str:
        return self._card.text

    def _repr_html_(self) -> str:
        return self._card.html

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but :attr:`table` as what JSON can hold.

        Examples
        --------
        >>> import json
        >>> text = json.dumps(rd.job_report("train.zarr").to_dict())
        >>> json.loads(text)["committed"]
        True
        """
        names = [name for name in self.__slots__ if name != "table"]
        values = {name: getattr(self, name) for name in names}
        return {
            **values,
            "stages": dict(self.stages),
            "slowest": [
                {"shard": shard, "seconds": seconds, "process": process}
                for shard, seconds, process in self.slowest
            ],
            "processes": dict(self.processes),
            "masked": dict(self.masked),
            "clipped": dict(self.clipped),
        }


def job_report(store: str | os.PathLike[str]) -> JobReport:
    """Return the report of a finished store, as ``to_zarr`` returned it when it wrote the store.

    Parameters
    ----------
    store
        What ``to_zarr`` or :func:`compact` wrote: a local path, or a URL.

    Raises
    ------
    StoreError
        When there is no store, it is not finished, or it is damaged.
    FormatError
        When it was written in a format that this version does not read.

    Examples
    --------
    >>> report = rd.job_report("train.zarr")
    >>> slowest, seconds, process = report.slowest[0]
    >>> report.table.select(["shard", "host", "seconds"]).num_rows == report.shards
    True
    """
    return report_of_stores([store])


def report_of_stores(stores: Sequence[str | os.PathLike[str]]) -> JobReport:
    """Return the report of several finished stores together, and of all parts that were appended to them.

    Shards of further parts are named after them: ``part-0001/train-00000``. A chip counts in each part it stands in.

    Raises
    ------
    StoreError
        As :func:`job_report`.
    """
    manifests, urls = [], []
    for number, store in enumerate(stores):
        url = Place.of(store).folder("a folder that to_zarr wrote", "Give the store's folder.")
        try:
            ledger.root_of(url)
        except remote.MissingError as error:
            raise StoreError(
                f"report of store {remote.redact(url)}", "no finished store", "one that to_zarr or compact wrote",
                "Check the path; call to_zarr again with the same plan where it was stopped.",
            ) from error  # fmt: skip
        urls.append(remote.redact(url))
        manifests.append(manifest_of_parts(url, f"{urls[-1].rpartition('/')[2]}/" if number else ""))
    return JobReport.of_manifest(", ".join(urls), _joined(manifests))


def manifest_of_parts(url: str, prefix: str = "") -> pa.Table:
    """Read the manifest of what is finished, and of all parts that were appended; shards are named after their part.

    Parameters
    ----------
    url
        The store, or folder.
    prefix
        What the names of all its shards begin with.

    Raises
    ------
    StoreError
        When a manifest is missing, or damaged.
    """
    manifests = [_manifest(url, prefix)]
    while remote.exists(remote.join(url, part := ledger.part_path(len(manifests)), "zarr.json")):
        manifests.append(_manifest(remote.join(url, part), f"{prefix}{part}/"))
    return _joined(manifests)


def _joined(manifests: Sequence[pa.Table]) -> pa.Table:
    return manifests[0] if len(manifests) == 1 else pa.concat_tables(manifests, promote_options="default")


def _manifest(url: str, prefix: str) -> pa.Table:
    """Read the manifest of a part of a store; its shards are named after the part."""
    with open_manifest(url) as (file, _):
        table = file.read()
    if not prefix:
        return table
    names = pc.binary_join_element_wise(prefix, table.column("shard"), "")
    return table.set_column(table.column_names.index("shard"), "shard", names)


def slow_shards(manifest: pa.Table) -> str:
    """Name the shards that took over :data:`SLOW` times the median; nothing where none did, or there are few."""
    taken = sorted(value for value in _values(manifest, "seconds") if value is not None)
    if len(taken) < FEW:
        return ""
    median = taken[len(taken) // 2]
    slow = [(name, value, where) for name, value, where in _slowest(manifest) if value > SLOW * median]
    if not slow:
        return ""
    count = sum(value > SLOW * median for value in taken)
    names = first_of((f"{name} {value:.1f} s on {where}" for name, value, where in slow), SHOWN)
    return f"{count:,} of {len(taken):,} shards took over {SLOW} times the median of {median:.1f} s: {names}"


def _values(manifest: pa.Table, column: str) -> list[Any]:
    """Return a column's values; none where an earlier version wrote the manifest without it."""
    return manifest[column].to_pylist() if column in manifest.column_names else []


def _sum(manifest: pa.Table, column: str) -> int:
    return sum(value or 0 for value in _values(manifest, column))


def _worker_hours(manifest: pa.Table) -> float | None:
    """Return the hours in which processes had a shard under way: the union of its shards' times for each."""
    if "started" not in manifest.column_names:
        return None
    rows = manifest.select(["process", "started", "seconds"]).drop_null().sort_by("started").to_pylist()
    if not rows:
        return None
    total, until = 0.0, dict[str, float]()
    for row in rows:
        begin = row["started"].timestamp()
        end = begin + row["seconds"]
        busy = until.get(row["process"], begin)
        total += max(end - max(begin, busy), 0.0)
        until[row["process"]] = max(end, busy)
    return total / 3600


def _stage_bars(stages: Mapping[str, float]) -> Markup:
    """Return a picture of seconds by stage: a line each, the longest as wide as can be."""
    longest = max(stages.values()) or 1.0
    left = LETTER_PX * max(map(len, stages))
    lines = []
    for at, (stage, value) in enumerate(stages.items()):
        y, length = at * LINE_PX, BAR_PX * value / longest
        lines.append(
            f"<text x='0' y='{y + 13}' font-size='12' fill='currentColor'>{markup(stage)}</text>"
            f"<rect x='{left:.1f}' y='{y + 4}' width='{max(length, 1):.1f}' height='10' fill='#4878a8'/>"
            f"<text x='{left + length + 6:.1f}' y='{y + 13}' font-size='12' "
            f"fill='currentColor'>{value:.1f} s</text>"
        )
    wide, high = left + BAR_PX + 70, LINE_PX * len(stages) + 2
    title = "<title>Seconds by stage, summed over shards that ran side by side</title>"
    box = f"width='{wide:.0f}' height='{high}' viewBox='0 0 {wide:.0f} {high}'"
    return Markup(f"<svg {box} role=img>{title}{''.join(lines)}</svg>")


def _slowest(manifest: pa.Table) -> tuple[SlowShard, ...]:
    if "seconds" not in manifest.column_names:
        return ()
    some = manifest.select(["shard", "seconds", "process"]).filter(pc.field("seconds").is_valid())
    some = some.take(pc.select_k_unstable(some, SLOWEST, sort_keys=[("seconds", "descending")]))
    return tuple((row["shard"], row["seconds"], row["process"]) for row in some.to_pylist())
