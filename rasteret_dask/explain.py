"""What a job will do, before anything is read: records, chips, tasks, requests, bytes, memory, and why."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from rasteret_dask import pixels
from rasteret_dask.chips import ChipSet, used_rows
from rasteret_dask.chiptable import FeedTable, bounds_of
from rasteret_dask.grid import Lattice
from rasteret_dask.job import Job, Output, task_bytes
from rasteret_dask.lazy import radiometry_of
from rasteret_dask.reader import tiles_of

__all__ = ["Explanation", "explain"]

ALIGNED_PX = 1e-4
"""Pixel edges nearer than this are the same edge."""

UTM_SOUTH = 32700
"""EPSG codes above are UTM zones of the southern hemisphere, which are only translated."""

EXACT_SHARDS = 48
"""Requests of this many shards are counted one by one; beyond, they are extrapolated from as many, evenly taken."""


@dataclass(frozen=True)
class Explanation:
    """A report that prints as text, shows as HTML in a notebook, and gives its numbers as a dict."""

    facts: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as plain values."""
        return json.loads(json.dumps(self.facts))  # type: ignore[no-any-return]

    def __getitem__(self, name: str) -> Any:
        return self.facts[name]

    def __str__(self) -> str:
        return "\n".join(f"{name:<18}{value}" for name, value in _lines(self.facts))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left;vertical-align:top'>{html.escape(n)}</th>"
            f"<td style='text-align:left;white-space:pre-wrap'>{html.escape(v)}</td></tr>"
            for n, v in _lines(self.facts)
        )
        return f"<table>{rows}</table>"


def explain(chips: ChipSet, job: Job, outputs: tuple[Output, ...]) -> Explanation:
    """Report on a planned and frozen job."""
    shards = list(job.shards())
    reading = _reading(job)
    out = sum(o.chip_bytes for o in outputs)
    per_shard = max((h.per_shard for h in job.hierarchies), default=1)
    splits: dict[str, int] = {}
    for name in chips.table.column("split").to_pylist():
        splits[name or "none"] = splits.get(name or "none", 0) + 1
    used = [len(r) for r in job.records]
    facts = {
        "records": {
            s.plan.name: {"scanned": len(s.records), "used": n}
            for s, n in zip(chips.sources, used, strict=True)
        },
        "chips": sum(h.chips for h in job.hierarchies),
        "splits": splits,
        "shards": len(shards),
        "chips_per_shard": per_shard,
        "tasks": len(shards),
        "requests": reading["requests"],
        "read_bytes": reading["bytes"],
        "requests_counted_on_shards": reading["shards"],
        "write_bytes": out * sum(h.chips for h in job.hierarchies),
        "peak_task_bytes": task_bytes(job, outputs),
        "chip_shape": {
            s.name: [o.times, len(o.bands), o.height, o.width]
            for s, o in zip(job.sources, outputs, strict=True)
        },
        "dtype": {s.name: o.dtype for s, o in zip(job.sources, outputs, strict=True)},
        "bands": {s.name: list(o.bands) for s, o in zip(job.sources, outputs, strict=True)},
        "times": _times(chips),
        "tile_fit": reading["fit"],
        "pixels": _native_share(chips),
        "resolution": {s.plan.name: s.plan.resolution for s in chips.sources},
        "unused_strip_m": _strip(chips),
        "radiometry": {s.plan.name: radiometry_of(s, rows) for s, rows in used_rows(chips)},
        "mask": {s.plan.name: list(s.plan.mask) for s in chips.sources},
        "pick": {s.plan.name: s.plan.pick for s in chips.sources},
        "dropped": dict(chips.dropped),
    }
    return Explanation(facts)


def _strip(chips: ChipSet) -> float:
    if chips.spec.grid != "zone" or chips.spec.at is not None:
        return 0.0
    stride = chips.spec.stride * chips.resolution
    return Lattice(1, chips.spec.cell_km * 1000.0, chips.size_m, stride).unused_m


def _native_share(chips: ChipSet) -> dict[str, dict[str, int]]:
    """Return per source how many used records keep native pixels, are only translated, or are resampled."""
    result: dict[str, dict[str, int]] = {}
    feeds = FeedTable.of(chips.table)
    epsg = chips.table.column("epsg").to_numpy()[feeds.chip]
    corner = bounds_of(chips.table)[feeds.chip][:, [0, 3]]
    for number, (resolved, found) in enumerate(zip(chips.sources, chips.outlines, strict=True)):
        own = feeds.source == number
        record = feeds.row[own]
        transform = found.transform[found.of_record[record]]
        size = resolved.plan.resolution
        shift = (corner[own] - transform[:, [2, 5]]) / size
        same = np.abs(shift - np.round(shift)).max(1, initial=0.0) < ALIGNED_PX
        same &= epsg[own] == found.epsg[found.of_record[record]]
        same &= np.abs(np.abs(transform[:, 0]) - size) < 1e-9 * size
        resampled = np.unique(record[~same])
        moved = resolved.records.epsg > UTM_SOUTH
        native = np.setdiff1d(np.unique(record), resampled)
        result[resolved.plan.name] = {
            "native": int(np.sum(~moved[native])),
            "translated": int(np.sum(moved[native])),
            "resampled": len(resampled),
        }
    return result


def _times(chips: ChipSet) -> dict[str, list[str]]:
    """Return the start of each slot, per source with a time axis."""
    return {
        s.plan.name: [pd.Timestamp(t).isoformat() for t in s.plan.slots]
        for s in chips.sources
        if s.plan.slots is not None
    }


def _reading(job: Job) -> dict[str, Any]:
    """Count the tiles that shards will ask for and their compressed bytes, from the cached tile tables."""
    shards = list(job.shards())
    step = max(len(shards) / EXACT_SHARDS, 1.0)
    chosen = [shards[int(i * step)] for i in range(min(len(shards), EXACT_SHARDS))]
    requests = nbytes = pixels_read = pixels_used = 0
    unknown = False
    for shard in chosen:
        for number, plan in enumerate(job.sources):
            members = [
                pixels.harmonized(pixels.cut(pixels.cubes(job, shard, number, m)), plan)
                for m in range(len(plan.members))
            ]
            tiles, used = pixels.requests_of(job, shard, number, members)
            for (_, level), (wanted, asset) in _by_file(tiles).items():
                known = asset.levels[level].tile_byte_counts
                unknown |= not known
                requests += len(wanted)
                nbytes += sum(known[t] for t in wanted) if known else 0
                pixels_read += len(wanted) * asset.levels[level].tile_width * asset.levels[level].tile_height
            pixels_used += used
    scale = len(shards) / max(len(chosen), 1)
    return {
        "requests": round(requests * scale),
        "bytes": None if unknown else round(nbytes * scale),
        "shards": len(chosen),
        "fit": round(pixels_used / pixels_read, 4) if pixels_read else None,
    }


def _by_file(requests: list[Any]) -> dict[tuple[Any, int], tuple[set[int], Any]]:
    """Group the tiles of requests by file, plane and level; a chunky file's bands share their tiles."""
    result: dict[tuple[Any, int], tuple[set[int], Any]] = {}
    for request in requests:
        level, tiles = tiles_of(request)
        asset = request.asset
        plane = asset.band_index if asset.image.planar == 2 else 0
        key = ((asset.href, plane), level)
        if key in result:
            result[key][0].update(tiles)
        else:
            result[key] = (set(tiles), asset)
    return result


def _size(nbytes: float | None) -> str:
    if nbytes is None:
        return "unknown (no tile tables)"
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.3g} {unit}"
    return f"{nbytes:.0f} B"


def _lines(f: Mapping[str, Any]) -> list[tuple[str, str]]:
    exact = "" if f["requests_counted_on_shards"] >= f["shards"] else " (estimated)"
    rows = [
        ("records", ", ".join(f"{n} {r['used']} of {r['scanned']}" for n, r in f["records"].items())),
        ("chips", f"{f['chips']:,} ({', '.join(f'{k} {v:,}' for k, v in f['splits'].items())})"),
        ("shards", f"{f['shards']:,} of up to {f['chips_per_shard']} chips, one task each"),
        ("to read", f"at most {f['requests']:,} tiles, {_size(f['read_bytes'])} compressed{exact}"),
        ("to write", f"{_size(f['write_bytes'])} before compression"),
        ("peak per task", _size(f["peak_task_bytes"])),
        (
            "tile fit",
            f"{f['tile_fit']:.0%} of the pixels in those tiles are used" if f["tile_fit"] else "unknown",
        ),
    ]
    for name, shape in f["chip_shape"].items():
        text = f"{shape} (time, band, y, x) {f['dtype'][name]}, {', '.join(f['bands'][name][:8])}"
        rows.append((name, text + (" ..." if len(f["bands"][name]) > 8 else "")))
        share = f["pixels"][name]
        kinds = ", ".join(f"{share[kind]} {kind}" for kind in ("native", "translated", "resampled"))
        mask = ", ".join(f["mask"][name]) or "none"
        rows.append(
            ("", f"records: {kinds} at {f['resolution'][name]:g} m; pick {f['pick'][name]}, mask {mask}")
        )
        if name in f["times"]:
            rows.append(
                ("", f"{len(f['times'][name])} slots from {f['times'][name][0]} to {f['times'][name][-1]}")
            )
        rows += [("", line) for line in _radiometry_lines(f["radiometry"][name])]
    if f["unused_strip_m"]:
        rows.append(("unused strip", f"{f['unused_strip_m']:g} m of each split cell"))
    rows += [("dropped", f"{count:,}: {why}") for why, count in f["dropped"].items()]
    return rows


def _radiometry_lines(rules: list[dict[str, Any]]) -> list[str]:
    """Return one line per distinct rule, bands together."""
    merged: dict[tuple[Any, ...], tuple[list[str], int]] = {}
    for rule in rules:
        key = (rule["member"], rule["scale"], rule["offset"], rule["rule"])
        bands, count = merged.setdefault(key, ([], rule["records"]))
        bands.append(rule["band"])
    lines = []
    for (member, scale, offset, text), (bands, count) in merged.items():
        formula = "as stored" if scale is None else f"DN x {scale:g} {offset:+g}"
        shown = ", ".join(bands[:6]) + (" ..." if len(bands) > 6 else "")
        lines.append(f"{member} {shown}: {formula} ({text}; {np.int64(count)} records)")
    return lines
