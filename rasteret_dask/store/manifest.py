"""The manifest of a store: what the reports of its shards say."""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from rasteret_dask.errors import UnreadableTilesWarning
from rasteret_dask.tasks.filtering import tally
from rasteret_dask.tasks.job import Job

__all__ = ["losses", "manifest_of", "warn_of_masked"]

MAX_NAMED = 3
"""Tiles that the warning names."""


def manifest_of(job: Job, reports: Mapping[str, Mapping[str, Any]], tries: Mapping[str, int]) -> pa.Table:
    """Return one row a shard; counts are sums over its sources.

    Parameters
    ----------
    job
        The job.
    reports
        Shard -> what its task reports.
    tries
        Shard -> how often it was begun.
    """
    rows = []
    for shard in job.shards():
        report = reports[shard.name]
        counts: Counter[str] = Counter()
        for own in _of(report, "counts").values():
            counts.update(own)
        clipped = {
            f"{name}/{band}": n
            for name, own in _of(report, "clipped").items()
            for band, n in own.items()
            if n
        }
        unreadable = [tile for own in _of(report, "unreadable").values() for tile in own]
        rows.append(
            {
                "shard": shard.name,
                "split": shard.split,
                "number": shard.number,
                "chips": report["chips"],
                "kept": report["chips"] - len(report["dropped"]),
                "dropped_chips": json.dumps(report["dropped"]),
                "attempts": max(1, tries.get(shard.name, 0)),
                "process": report["process"],
                "bytes": sum(o["size"] for o in report["objects"]),
                "objects": [{k: o[k] for k in ("path", "size", "crc32")} for o in report["objects"]],
                "requests": counts["requests"],
                "bytes_fetched": counts["bytes_fetched"],
                "tiles_read": counts["tiles_read"],
                "gdal_fallback": counts["gdal_fallback"],
                "clipped": json.dumps(clipped),
                "unreadable": len(unreadable),
                "unreadable_tiles": json.dumps(unreadable),
                "key": job.keys[shard.name],
            }
        )
    return pa.Table.from_pylist(rows)


def losses(manifest: pa.Table) -> str:
    """Say how many chips rules on pixels dropped; nothing where none was."""
    dropped = sum(manifest["chips"].to_pylist()) - sum(manifest["kept"].to_pylist())
    if not dropped:
        return ""
    reasons = [r for text in manifest["dropped_chips"].to_pylist() for r in json.loads(text).values()]
    planned = sum(manifest["chips"].to_pylist())
    return (
        f"{dropped} of {planned} chips dropped by filter_pixels ({tally(reasons)}; each in manifest.parquet)"
    )


def _of(report: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return what a report says of each source: source -> value."""
    return {
        key.removeprefix(f"{kind}/"): value for key, value in report.items() if key.startswith(f"{kind}/")
    }


def warn_of_masked(url: str, manifest: pa.Table) -> None:
    """Warn of the tiles that could not be read and whose pixels are invalid.

    Warns
    -----
    UnreadableTilesWarning
        When there are any.
    """
    lists = [json.loads(text) for text in manifest["unreadable_tiles"].to_pylist()]
    tiles = [tile for own in lists for tile in own]
    if tiles:
        more = f"\nand {len(tiles) - MAX_NAMED} more" if len(tiles) > MAX_NAMED else ""
        warnings.warn(
            f"store {url}: {len(tiles)} tiles of {sum(map(bool, lists))} of {len(lists)} shards could not be read; "
            "their pixels are invalid. All are listed in manifest.parquet, column unreadable_tiles:\n"
            + "\n".join(tiles[:MAX_NAMED]) + more,
            UnreadableTilesWarning,
            stacklevel=2,
        )  # fmt: skip
