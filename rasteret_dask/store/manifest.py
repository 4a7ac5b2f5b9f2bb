# SPDX-License-Identifier: Apache-2.0
"""The manifest of a store: what the reports of its shards say."""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pyarrow as pa

from rasteret_dask.errors import UnreadableTilesWarning
from rasteret_dask.lists import first_of
from rasteret_dask.net.clusters import worker_name
from rasteret_dask.tasks.filtering import tally

__all__ = ["MANIFEST_SCHEMA", "losses", "report_row", "stamp", "table_of", "timing", "warn_of_masked"]

MAX_NAMED = 3
"""Tiles that the warning names."""


_OBJECT = pa.struct([("path", pa.string()), ("size", pa.int64()), ("crc32", pa.int64())])
MANIFEST_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("split", pa.string()),
        ("number", pa.int64()),
        ("chips", pa.int64()),
        ("kept", pa.int64()),
        ("dropped_chips", pa.string()),
        ("attempts", pa.int64()),
        ("process", pa.string()),
        ("host", pa.string()),
        ("worker", pa.string()),
        ("started", pa.timestamp("us", "UTC")),
        ("seconds", pa.float64()),
        ("stages", pa.map_(pa.string(), pa.float64())),
        ("bytes", pa.int64()),
        ("objects", pa.list_(_OBJECT)),
        ("requests", pa.int64()),
        ("bytes_fetched", pa.int64()),
        ("tiles_read", pa.int64()),
        ("gdal_fallback", pa.int64()),
        ("masked", pa.map_(pa.string(), pa.float64())),
        ("clipped", pa.string()),
        ("unreadable", pa.int64()),
        ("unreadable_tiles", pa.string()),
        ("key", pa.string()),
    ]
)


def table_of(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return rows of a manifest, one a shard, as a table."""
    return pa.Table.from_pylist(list(rows), MANIFEST_SCHEMA)


def report_row(name: str, split: str | None, number: int, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the report of a shard says, as a row without its tries and its key."""
    counts: Counter[str] = Counter()
    for own in _of(report, "counts").values():
        counts.update(own)
    clipped = {
        f"{name}/{band}": n for name, own in _of(report, "clipped").items() for band, n in own.items() if n
    }
    unreadable = [tile for own in _of(report, "unreadable").values() for tile in own]
    return {
        "shard": name,
        "split": split,
        "number": number,
        "chips": report["chips"],
        "kept": report["chips"] - len(report["dropped"]),
        "dropped_chips": json.dumps(report["dropped"]),
        **timing(report),
        "bytes": sum(o["size"] for o in report["objects"]),
        "objects": [{k: o[k] for k in ("path", "size", "crc32")} for o in report["objects"]],
        "requests": counts["requests"],
        "bytes_fetched": counts["bytes_fetched"],
        "tiles_read": counts["tiles_read"],
        "gdal_fallback": counts["gdal_fallback"],
        "masked": list(_of(report, "masked").items()),
        "clipped": json.dumps(clipped),
        "unreadable": len(unreadable),
        "unreadable_tiles": json.dumps(unreadable),
    }


def stamp(seconds: float, stages: Mapping[str, float]) -> dict[str, Any]:
    """Return what a shard's report says of where, when and how long it was written, by whoever ends it just now."""
    begin = datetime.now(UTC) - timedelta(seconds=seconds)
    return {
        "process": f"{platform.node()}:{os.getpid()}",
        "host": platform.node(),
        "worker": worker_name(),
        "started": begin.isoformat(timespec="milliseconds"),
        "elapsed": round(seconds, 3),
        "seconds": {stage: round(value, 3) for stage, value in stages.items()},
    }


def timing(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the manifest's columns of what :func:`stamp` says; only the process of an earlier version's report."""
    if "started" not in report:
        return {"process": report["process"]}
    return {
        "process": report["process"],
        "host": report["host"],
        "worker": report["worker"],
        "started": datetime.fromisoformat(report["started"]),
        "seconds": report["elapsed"],
        "stages": list(report["seconds"].items()),
    }


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
        warnings.warn(
            f"store {url}: {len(tiles)} tiles of {sum(map(bool, lists))} of {len(lists)} shards could not be read; "
            "their pixels are invalid. All are listed in manifest.parquet, column unreadable_tiles:\n"
            + first_of(tiles, MAX_NAMED, "\n"),
            UnreadableTilesWarning,
            stacklevel=2,
        )  # fmt: skip
