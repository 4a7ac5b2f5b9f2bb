# SPDX-License-Identifier: Apache-2.0
"""What a job will do, before anything is read: records, chips, tasks, requests, bytes, memory, and why."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.chipping.chips import PlannedChips, used_rows
from rasteret_dask.chipping.chiptable import bounds_of
from rasteret_dask.chipping.covering import ground_share
from rasteret_dask.chipping.feeds import Feeds, enough
from rasteret_dask.chipping.frame import frame_of, grown
from rasteret_dask.chipping.leftover import leftover
from rasteret_dask.display.html import card
from rasteret_dask.ingest.describe import CRS_TAKEN
from rasteret_dask.lists import listed
from rasteret_dask.planning.radiometry import radiometry_of
from rasteret_dask.planning.resolve import ResolvedSource
from rasteret_dask.progress import nbytes_text
from rasteret_dask.reader.kernels import grids_alike
from rasteret_dask.show.fetching import fetching
from rasteret_dask.show.probing import Amounts, Speed, enlarged, estimated
from rasteret_dask.show.tilecount import tile_count
from rasteret_dask.tasks.freezing import task_bytes
from rasteret_dask.tasks.job import Job, Output
from rasteret_dask.tasks.jobkernels import job_readings
from rasteret_dask.tasks.keptbytes import MOST_KEPT_BYTES, kept_bytes
from rasteret_dask.tasks.runs import Workforce
from rasteret_dask.tasks.usage import NOTES, Usage, hours_text
from rasteret_dask.tasks.workermemory import limit_bytes

__all__ = ["Explanation", "explain", "radiometry_lines"]

Used: TypeAlias = "list[tuple[ResolvedSource, NDArray[np.int64]]]"
"""Each source with the rows of its records that feed a chip."""

ALIGNED_PX = 1e-4
"""Pixel edges nearer than this are the same edge."""


WHOLE = 1.0 - 1e-6
"""A slot covered to this share counts as covered whole: the chip table keeps shares as float32."""

WORKER_THREADS = 2
"""Of the worker whose memory is told, where nobody says how many it has."""

MOST_SHAPES = 3
"""Shapes of pixels that are named."""

_READ = ("requests", "requests_by_shard", "read_bytes")
_FETCHED = ("tasks", "requests", "read_bytes")

EXACT_SHARDS = 48
"""Tiles of this many shards are counted one by one; beyond, they are extrapolated from as many, evenly taken."""


@dataclass(frozen=True)
class Explanation:
    """A report that prints as text, shows as HTML in a notebook, and gives its numbers as a dict.

    Examples
    --------
    >>> told = chips.explain()
    >>> told["chips"], told["shards"]
    (154, 3)
    >>> print(told)
    records ...
    ...
    """

    facts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values.

        Examples
        --------
        >>> chips.explain().to_dict()["splits"]
        {'test': 21, 'train': 124, 'val': 9}
        """
        return json.loads(json.dumps(self.facts))  # type: ignore[no-any-return]

    def scaled(self, splits: Mapping[str, int], per_shard: int, used: Mapping[str, int]) -> Explanation:
        """Return the report of a larger plan that this one's chips are a part of.

        Parameters
        ----------
        splits
            Split -> chips of the larger plan, ``""`` for none.
        per_shard
            Chips of one of its shards.
        used
            Source -> records that feed its chips.

        Examples
        --------
        >>> told = chips.explain()
        >>> told.scaled({"train": 1_000_000}, per_shard=256, used={"s2": 4000})["shards"]
        3907
        """
        chips, part = sum(splits.values()), sum(self["splits"].values())
        ratio = chips / part
        placed = {
            name: count for name, count in splits.items() if name
        } or splits  # chips of no split are in no shard
        shards = sum(-(-count // per_shard) for count in placed.values())
        estimates: dict[str, Any] = {name: _enlarged(self[name], ratio) for name in _READ}
        if "workers" in self.facts:
            fetched = {name: _enlarged(self["workers"][name], ratio) for name in _FETCHED}
            estimates["workers"] = {**self["workers"], **fetched, "exact": False}
        if "time" in self.facts:
            estimates["time"] = enlarged(self["time"], ratio)
        present = {name: _enlarged(count, ratio) for name, count in self["present"].items()}
        counted = {
            "present": present,
            "records": {name: {**told, "used": used[name]} for name, told in self["records"].items()},
            "chips": sum(placed.values()),
            "splits": {name or "none": count for name, count in splits.items()},
            "shards": shards,
            "tasks": shards,
            "chips_per_shard": per_shard,
            "write_bytes": self["write_bytes"] // self["chips"] * sum(placed.values()),
            "puts": self["puts"] // self["shards"] * shards,
            "estimated_from_chips": part,
            "ground": None,
        }
        facts = {**self.facts, **estimates, **counted}
        return Explanation(facts | {"worker_hours": _worker_hours(facts)})

    @property
    def usage(self) -> Usage:
        """What the job uses of what is billed, at most; worker hours only with ``probe`` or ``rate``.

        Examples
        --------
        >>> used = chips.explain(workers=4, rate="50 MB/s").usage
        >>> used.cost(worker_hour=0.1, gb_egress=0.09).total > 0
        True
        """
        read = self.facts.get("workers", self.facts)
        return Usage(self["worker_hours"], read["requests"], self["puts"], read["read_bytes"])

    def worker_bytes(self, threads: int) -> int:
        """Return the memory limit to start a worker of so many threads with.

        What its tasks hold at their peak, what it keeps of tiles and what the process itself takes make at most 80% of
        it: beyond that, Dask lets a worker begin no further task.

        Examples
        --------
        >>> told = chips.explain()
        >>> told.worker_bytes(threads=1) <= told.worker_bytes(threads=4)
        True
        """
        return limit_bytes(threads, self["peak_task_bytes"], self["kept_bytes"])

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]

    def __str__(self) -> str:
        return "\n".join(f"{name:<18}{value}" for name, value in _lines(self.facts))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return card(f"What {self['chips']:,} chips cost", _lines(self.facts))


def explain(
    chips: PlannedChips,
    job: Job,
    outputs: tuple[Output, ...],
    force: Workforce | None = None,
    speed: Speed | None = None,
) -> Explanation:
    """Report on a planned and frozen job.

    Parameters
    ----------
    chips, job, outputs
        The job.
    force
        Its processes, where it is said how many there are.
    speed
        How fast processes are; None: no time is estimated.
    """
    reading = tile_count(job, EXACT_SHARDS)
    out = sum(o.chip_bytes for o in outputs)
    per_shard = max((h.per_shard for h in job.hierarchies), default=1)
    counted = pc.value_counts(chips.table.column("split")).to_pylist()
    splits = {entry["values"] or "none": int(entry["counts"]) for entry in counted}
    used = used_rows(chips)
    facts: dict[str, Any] = {
        "records": {
            s.plan.name: {"scanned": len(s.records), "used": n}
            for s, n in zip(chips.sources, map(len, job.records), strict=True)
        },
        "chips": sum(h.chips for h in job.hierarchies),
        "splits": splits,
        "filter_pixels": [rule.words for rule in job.pixel_rules],
        "shards": job.shard_count,
        "chips_per_shard": per_shard,
        "tasks": job.shard_count,
        "requests": reading.requests,
        "requests_by_shard": reading.by_shard,
        "read_bytes": reading.nbytes,
        "requests_counted_on_shards": reading.shards,
        "write_bytes": out * sum(h.chips for h in job.hierarchies),
        "puts": job.shard_count * _puts(outputs),
        "peak_task_bytes": task_bytes(job, outputs),
        "kept_bytes": kept_bytes(job),
        "worker_threads": WORKER_THREADS if force is None else force.threads,
        "chip_shape": {
            s.name: [o.times, len(o.bands), o.height, o.width]
            for s, o in zip(job.sources, outputs, strict=True)
        },
        "dtype": {s.name: o.dtype for s, o in zip(job.sources, outputs, strict=True)},
        "bands": {s.name: list(o.bands) for s, o in zip(job.sources, outputs, strict=True)},
        "left_bands": {s.plan.name: _left_bands(s) for s in chips.sources},
        "present": _present(chips),
        "times": _times(chips),
        "chip_slots": _chip_slots(chips),
        "static": [s.plan.name for s in chips.sources if s.is_static],
        "tolerance": {
            s.plan.name: str(pd.Timedelta(s.tolerance)) for s in chips.sources if s.tolerance is not None
        },
        "tile_fit": reading.fit,
        "pixels": _native_share(chips),
        "kinds": {s.plan.name: [b.kind or "unknown" for b in s.plan.kinds] for s in chips.sources},
        "kernels": _kernels(job),
        "pixel_shapes": _pixel_shapes(chips, used),
        "resolution": {s.plan.name: s.plan.resolution for s in chips.sources},
        "crs_taken": _crs_taken(used),
        "coverage": _coverage(chips),
        "ground": asdict(ground_share(chips)),
        "uncovered": _uncovered(chips),
        "radiometry": {s.plan.name: radiometry_of(s, rows) for s, rows in used},
        "mask": {s.plan.name: list(s.plan.masks) for s in chips.sources},
        "pick": {s.plan.name: s.plan.pick.name for s in chips.sources},
        "dropped": dict(chips.dropped),
    }
    if force is not None:
        facts["workers"] = _on_workers(job, force, reading.requests, reading.nbytes)
    if speed is not None:
        alone = {"requests": reading.requests, "read_bytes": reading.nbytes}
        whole: Mapping[str, Any] = alone if force is None else facts["workers"]
        amounts = Amounts(facts["chips"], whole["requests"], whole["read_bytes"])
        facts["time"] = estimated(amounts, force, speed)
    told = Explanation(facts)
    further = {
        "worker_bytes": told.worker_bytes(facts["worker_threads"]),
        "worker_hours": _worker_hours(facts),
    }
    return Explanation({**facts, **further})


def _enlarged(count: int | None, ratio: float) -> int | None:
    return None if count is None else round(count * ratio)


def _puts(outputs: tuple[Output, ...]) -> int:
    """Return how many objects are put for a shard: pixels, three small variables, and what only some sources have."""
    return NOTES + sum(
        4 + out.valid + len(out.masks) + out.filled + out.present + len(out.meta_arrays) for out in outputs
    )


def _worker_hours(facts: Mapping[str, Any]) -> float | None:
    """Return the hours of all processes together; None where no time is estimated."""
    return facts["time"]["processes"] * facts["time"]["seconds"] / 3600 if "time" in facts else None


def _on_workers(job: Job, force: Workforce, tiles: int, nbytes: int | None) -> dict[str, Any]:
    fetched = fetching(job, force, tiles, nbytes)
    return {"processes": force.processes, "threads": force.threads, **asdict(fetched)}


def _left_bands(source: ResolvedSource) -> dict[str, int]:
    """Return {band: records that have it} of measured bands that are in the records and not in the output."""
    records, left = source.records, {}
    used = {band for member in source.plan.members for band in member.bands}
    for band in records.bands:
        if band not in used and "quality" not in records.distinct(band, "role"):
            left[band] = len(records) - records.asset_field(band, "href").null_count
    return left


def _uncovered(chips: PlannedChips) -> dict[str, Any]:
    left = leftover(chips.spec, chips.resolution)
    return {} if left is None else {"share": left.share, "text": left.text, "cell_km": left.cell_km}


def _coverage(chips: PlannedChips) -> dict[str, dict[str, Any]]:
    """Return per source how many chips have a slot whose main acquisition leaves ground open, and how much at most.

    The main acquisition is the first of a slot's candidates; with ``fill`` others close what it leaves open.
    """
    feeds = chips.feeds
    frame = frame_of(chips.table)
    of_chip = feeds.chip
    result: dict[str, dict[str, Any]] = {}
    for number, (source, found) in enumerate(zip(chips.sources, chips.outlines, strict=True)):
        main = np.flatnonzero((feeds.source == number) & (feeds.order == 0))
        slots = int(feeds.slot[main].max(initial=0)) + 1
        main, whole = _less_whole(main, of_chip[main] * slots + feeds.slot[main], feeds.share[main])
        own = Feeds.of(of_chip[main], feeds.slot[main], feeds.order[main], feeds.row[main], feeds.share[main])
        wide = frame.grown(chips.spec.reach_m(chips.resolution, source.plan.name))
        _, key, share = enough(own, wide, found, 0.0)
        open_slot = share < WHOLE
        slots = int(own.slot.max(initial=0)) + 1
        result[source.plan.name] = {
            "chips": len(np.unique(key[open_slot] // slots)),
            "slots": int(open_slot.sum()),
            "of_slots": whole + len(key),
            "least": float(share.min(initial=1.0)),
        }
    return result


def _less_whole(
    entries: NDArray[np.int64], slot: NDArray[np.int64], share: NDArray[np.float32]
) -> tuple[NDArray[np.int64], int]:
    """Return the entries of slots that no record alone covers whole, and how many slots the others are.

    Parameters
    ----------
    entries
        Shape (entry,).
    slot
        Shape (entry,). A number for the slot of each.
    share
        Shape (entry,). How much of the chip its record covers.
    """
    whole = np.zeros(int(slot.max(initial=-1)) + 1, dtype=bool)
    whole[slot[share >= 1.0]] = True
    return entries[~whole[slot]], int(whole.sum())


def _pixel_shapes(chips: PlannedChips, used: Used) -> dict[str, list[list[float]]]:
    """Return per source the width and height of used pixels that are no squares, in units of their CRS."""
    result: dict[str, list[list[float]]] = {}
    for (source, rows), found in zip(used, chips.outlines, strict=True):
        sides = np.abs(found.transform[np.unique(found.of_record[rows])][:, [0, 4]])
        other = sides[np.abs(sides[:, 0] - sides[:, 1]) > 1e-9 * sides.max(axis=1, initial=0.0)]
        if len(other) and not source.plan.by_file:
            result[source.plan.name] = np.unique(other, axis=0)[:MOST_SHAPES].tolist()
    return result


def _crs_taken(used: Used) -> dict[str, dict[str, int]]:
    """Return per source what is told of files that have no CRS -> how many used records have such a file."""
    result: dict[str, dict[str, int]] = {}
    for source, rows in used:
        told: dict[str, set[int]] = {}
        for band in source.records.bands:
            notes = source.records.asset_field(band, "note").take(pa.array(rows)).to_pylist()
            for row, note in enumerate(notes):
                if (note or "").startswith(CRS_TAKEN):
                    told.setdefault(str(note).partition("; ")[0], set()).add(row)
        if told:
            result[source.plan.name] = {note: len(records) for note, records in told.items()}
    return result


def _native_share(chips: PlannedChips) -> dict[str, dict[str, int]]:
    """Return per source how many used records keep native pixels, are only translated, or are resampled."""
    result: dict[str, dict[str, int]] = {}
    epsg = chips.table.column("epsg").to_numpy()
    for number, (resolved, found) in enumerate(zip(chips.sources, chips.outlines, strict=True)):
        size = resolved.plan.resolution
        reach = chips.spec.reach_m(chips.resolution, resolved.plan.name)
        corner = bounds_of(chips.table)[:, [0, 3]] + np.array([-reach, reach])
        group = grids_alike(epsg, corner, (size, size))
        if resolved.plan.by_file:
            group = np.arange(len(epsg))
        record, chip = chips.feeds.wanted(number, group)
        transform = found.transform[found.of_record[record]]
        pixel = np.full((len(chip), 2), size)
        if resolved.plan.by_file:
            box = grown(bounds_of(chips.table), reach)[chip]
            pixel = (box[:, 2:] - box[:, :2]) / round((chips.size_m + 2 * reach) / size)
        shift = (corner[chip] - transform[:, [2, 5]]) / pixel
        same = np.abs(shift - np.round(shift)).max(1, initial=0.0) < ALIGNED_PX
        same &= ~_turned(resolved)[record]
        same &= epsg[chip] == found.epsg[found.of_record[record]]
        same &= (np.abs(np.abs(transform[:, [0, 4]]) - pixel) < 1e-9 * pixel).all(axis=1)
        resampled = np.unique(record[~same])
        moved = resolved.records.epsg != found.epsg[found.of_record]  # the southern twin of a zone
        native = np.setdiff1d(np.unique(record), resampled)
        result[resolved.plan.name] = {
            "native": int(np.sum(~moved[native])),
            "translated": int(np.sum(moved[native])),
            "resampled": len(resampled),
        }
    return result


def _turned(source: ResolvedSource) -> NDArray[np.bool_]:
    """Shape (record,). Whether the files' rows and columns are no axes of their CRS: none of their pixels is native."""
    result = np.zeros(len(source.records), dtype=bool)
    for number, member in enumerate(source.plan.members):
        at = source.member == number
        placement = source.records.asset_field(member.bands[0], "placement")
        result[at] = placement.is_valid().to_numpy()[at]
    return result


def _kernels(job: Job) -> dict[str, dict[str, dict[str, Any]]]:
    """Return source -> band -> its kernels (``"copied"``: pixels stay), and whether overviews are read."""
    return {
        source: {b: {"kernels": list(r.kernels), "overviews": r.overviews} for b, r in bands.items()}
        for source, bands in job_readings(job).items()
    }


def _present(chips: PlannedChips) -> dict[str, int]:
    """Return how many chips have each source; {} where all have all, as the join requires."""
    if not any(s.plan.optional for s in chips.sources):
        return {}
    feeds = chips.feeds
    count = (len(np.unique(feeds.chip[feeds.source == number])) for number in range(len(chips.sources)))
    return {s.plan.name: n for s, n in zip(chips.sources, count, strict=True)}


def _times(chips: PlannedChips) -> dict[str, list[str]]:
    """Return the start of each slot, per source with a time axis."""
    return {
        s.plan.name: [pd.Timestamp(t).isoformat() for t in s.plan.slots]
        for s in chips.sources
        if s.plan.slots is not None
    }


def _chip_slots(chips: PlannedChips) -> dict[str, dict[str, Any]]:
    """Return what is said of slots of chips' own, and how many of them have records, per source that has such."""
    result = {}
    for number, source in enumerate(chips.sources):
        if source.chip_times is not None:
            count = chips.feeds.present(number, source.plan.times).sum(axis=1)
            result[source.plan.name] = {
                "text": source.chip_times.words, "slots": source.plan.times, "average": round(float(count.mean()), 3),
                "slots_with_records": [int(count.min()), int(count.max())],
            }  # fmt: skip
    return result


def _size(nbytes: float | None) -> str:
    return "unknown (no tile tables)" if nbytes is None else nbytes_text(nbytes)


def _workers_line(w: Mapping[str, Any]) -> str:
    exact = "" if w["exact"] else " (estimated)"
    return (
        f"at most {w['requests']:,} tiles, {_size(w['read_bytes'])}{exact} by {w['processes']} processes of "
        f"{w['threads']} threads, in {w['tasks']:,} tasks of neighbouring shards"
    )


def _client_line(f: Mapping[str, int]) -> str:
    return (
        f"to_zarr takes some {_size(f['to_zarr_bytes'])} and {f['to_zarr_cpu_s']:,} s of CPU; "
        f"to_chips() would take {_size(f['to_chips_bytes'])}"
    )


def _ground_line(ground: Mapping[str, Any] | None) -> str:
    if ground is None:
        return "of the ground: not computed by blocks"
    share = "100%" if ground["share"] == 1.0 else _percent(ground["share"])
    text = f"{share} of the ground lies in a chip: of the {ground['ground_km2']:,.4g} km2 that records lie on"
    if ground["recorded"] is None:
        return text
    return f"{text}, which are {'100%' if ground['recorded'] == 1.0 else _percent(ground['recorded'])} of the area"


def _lines(f: Mapping[str, Any]) -> list[tuple[str, str]]:
    exact = "" if f["requests_counted_on_shards"] >= f["shards"] else " (estimated)"
    rows = [
        ("records", ", ".join(f"{n} {r['used']} of {r['scanned']}" for n, r in f["records"].items())),
        ("chips", f"{f['chips']:,} ({', '.join(f'{k} {v:,}' for k, v in f['splits'].items())})"),
        ("coverage", _ground_line(f["ground"])),
        *(
            [("chips with", ", ".join(f"{name} {n:,}" for name, n in f["present"].items()))]
            if f["present"]
            else []
        ),
        *(
            [("filter_pixels", f"{'; '.join(f['filter_pixels'])}: told by pixels, while they are read")]
            if f["filter_pixels"]
            else []
        ),
        ("shards", f"{f['shards']:,} of up to {f['chips_per_shard']} chips, one task each"),
        (
            "to read",
            f"at most {f['requests']:,} tiles, {_size(f['read_bytes'])} compressed{exact}; "
            + (
                "no two shards share one"
                if f["requests_by_shard"] == f["requests"]
                else f"{f['requests_by_shard']:,} if no two shards share one"
            ),
        ),
        *([("on workers", _workers_line(f["workers"]))] if "workers" in f else []),
        *(
            [("time", f["time"]["line"]), ("worker hours", hours_text(f["worker_hours"]))]
            if "time" in f
            else []
        ),
        *([("in this process", _client_line(f["client"]))] if "client" in f else []),
        ("to write", f"{_size(f['write_bytes'])} before compression"),
        (
            "peak per task",
            f"{_size(f['peak_task_bytes'])}; a process keeps at most {_size(f['kept_bytes'])} of tiles besides"
            + (", so some tiles are fetched again" if f["kept_bytes"] >= MOST_KEPT_BYTES else ""),
        ),
        (
            "worker",
            f"a memory limit of {_size(f['worker_bytes'])} for {f['worker_threads']} threads, each of which has a task",
        ),
        (
            "tile fit",
            f"{f['tile_fit']:.0%} of the pixels in those tiles are used" if f["tile_fit"] else "unknown",
        ),
    ]
    for name, shape in f["chip_shape"].items():
        text = f"{shape} (time, band, y, x) {f['dtype'][name]}, {listed(f['bands'][name], 'bands')}"
        rows.append((name, text))
        share = f["pixels"][name]
        kinds = ", ".join(f"{share[kind]} {kind}" for kind in ("native", "translated", "resampled"))
        mask = ", ".join(f["mask"][name]) or "none"
        rows.append(
            ("", f"records: {kinds} at {f['resolution'][name]:g} m; pick {f['pick'][name]}, mask {mask}")
        )
        rows += [("", f"{note} ({n} records)") for note, n in f["crs_taken"].get(name, {}).items()]
        if f["left_bands"][name]:
            total = f["records"][name]["scanned"]
            bands = [f"{band} ({count} of {total} records)" for band, count in f["left_bands"][name].items()]
            rows.append(("", f"bands left: {listed(bands, 'bands')}"))
        rows += [("", line) for line in _kernel_lines(f["kinds"][name], f["kernels"][name])]
        if name in f["pixel_shapes"]:
            shapes = ", ".join(f"{wide:.6g} x {high:.6g}" for wide, high in f["pixel_shapes"][name])
            rows.append(
                ("", f"pixels of {shapes} (width x height) are resampled: those of chips are squares")
            )
        cover = f["coverage"][name]
        if cover["slots"]:
            slots = f"{cover['slots']:,} of {cover['of_slots']:,} slots, the least {_percent(cover['least'])}"
            text = f"{cover['chips']:,} chips with a slot under 100% covered by its main acquisition"
            rows.append(("", f"{text} ({slots})"))
        if name in f["static"]:
            rows.append(("", "static: one slot that holds at any time"))
        elif name in f["tolerance"]:
            rows.append(
                ("", f"each slot: the interval that holds it, else the nearest in {f['tolerance'][name]}")
            )
        elif name in f["chip_slots"]:
            own = f["chip_slots"][name]
            rows.append(("", own["text"]))
            least, most = own["slots_with_records"]
            rows.append(
                ("", f"{own['average']:.1f} of {own['slots']} slots have records, {least} to {most} a chip")
            )
        elif name in f["times"]:
            rows.append(
                ("", f"{len(f['times'][name])} slots from {f['times'][name][0]} to {f['times'][name][-1]}")
            )
        rows += [("", line) for line in radiometry_lines(f["radiometry"][name])]
    if "estimated_from_chips" in f:
        text = f"tiles, bytes to read, coverage, kernels and sources from {f['estimated_from_chips']:,} of these chips"
        rows.append(("estimated", text))
    if f["uncovered"]:
        rows.append(("not covered", f["uncovered"]["text"]))
    rows += [("dropped", f"{count:,}: {why}") for why, count in f["dropped"].items()]
    return rows


def _kernel_lines(kinds: Sequence[str], kernels: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return one line per kind and kernel, bands together."""
    merged: dict[tuple[str, str], list[str]] = {}
    for kind, (band, read) in zip(kinds, kernels.items(), strict=True):
        resampled = [k for k in read["kernels"] if k != "copied"]
        text = " and ".join([*(["pixels copied"] if "copied" in read["kernels"] else []), *resampled])
        if resampled:
            text += f", overviews {'used' if read['overviews'] else 'not used'}"
        merged.setdefault((kind, text), []).append(band)
    return [f"{kind} {_some(bands)}: {text}" for (kind, text), bands in merged.items()]


def _some(bands: Sequence[str]) -> str:
    return listed(bands, "bands", 6)


def _percent(share: float) -> str:
    """Return a share of less than all, which is never rounded up to 100%."""
    return f"{np.floor(share * 1000) / 10:g}%"


def radiometry_lines(rules: list[dict[str, Any]]) -> list[str]:
    """Return one line per distinct rule, bands together."""
    merged: dict[tuple[Any, ...], tuple[list[str], int]] = {}
    for rule in rules:
        key = (rule["member"], rule["scale"], rule["offset"], rule["rule"])
        bands, count = merged.setdefault(key, ([], rule["records"]))
        bands.append(rule["band"])
    lines = []
    for (member, scale, offset, text), (bands, count) in merged.items():
        formula = "as stored" if scale is None else f"DN x {scale:g} {offset:+g}"
        lines.append(f"{member} {_some(bands)}: {formula} ({text}; {np.int64(count)} records)")
    return lines
