# SPDX-License-Identifier: Apache-2.0
"""What stopped processes left in a store, removed when it is finished."""

from __future__ import annotations

import re
import time
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from rasteret_dask.net import remote
from rasteret_dask.store.shardreports import ReportPlace, is_dead, is_mark, is_page, tries
from rasteret_dask.store.smallobjects import at_once

__all__ = ["sweep"]

STALE_S = 600.0
"""After so long without a change, an unfinished local put is given up: its process would have ended it."""

_TEMPORARY = re.compile(r"(.+)#\d+")
"""obstore writes a local object beside its place, under its name and a number."""


def sweep(
    url: str,
    objects: Iterable[str],
    manifest: pa.Table,
    written: Mapping[str, ReportPlace],
    others: Collection[str],
) -> None:
    """Remove what tries that came to nothing left inside the store's own arrays, and beside its own objects.

    Objects: a shard that was begun, and then written without this object, as all of it is fill; pages all of whose
    shards have later reports. Temporary files of local puts that were killed (``name#1``): only beside a name that is
    the store's own, and never while the put may still be under way (see :func:`_is_given_up`).
    """
    names = _paths(manifest)  # in Arrow: there may be a million
    others = set(others)
    there = pa.array(objects, pa.string())
    unknown = there.filter(pc.invert(pc.is_in(there, value_set=names))).to_pylist()
    stale = [path for path in unknown if path not in others and (_is_chunk(path, others) or is_page(path))]
    at_once(lambda path: remote.delete(remote.join(url, path)), stale)
    if not remote.is_local(url):
        return
    base = Path(remote.local_path(url))
    left = {
        file: parts[1]
        for file in base.rglob("*#*")
        if (parts := _TEMPORARY.fullmatch(file.relative_to(base).as_posix())) is not None
    }
    if not left:
        return
    shard_of = _shards_of(manifest, pa.array(left.values(), pa.string()))
    # after the files were seen: whose put is under way has its mark by now
    marks = tries(remote.listing(url))
    for file, place in left.items():
        shard = shard_of.get(place)
        if shard is None and place not in others and not _may_be_left(place, others):
            continue
        unfinished = None
        if shard is not None:
            unfinished = [mark for mark in marks.get(shard, []) if mark != written[shard].mark]
        if _is_given_up(file, unfinished):
            file.unlink(missing_ok=True)


def _may_be_left(place: str, others: Collection[str]) -> bool:
    """Tell whether a path that the manifest does not have is one that only this package writes."""
    return _is_chunk(place, others) or is_mark(place) or is_page(place)


def _paths(manifest: pa.Table) -> pa.Array:
    """Return the paths of all objects that are in rows of the manifest."""
    lists = [manifest.column(name).combine_chunks().flatten().field("path") for name in ("objects", "notes")]
    return pa.concat_arrays(lists)


def _shards_of(manifest: pa.Table, paths: pa.Array) -> dict[str, str]:
    """Return path -> shard of those of some paths that are in rows of the manifest."""
    result: dict[str, str] = {}
    for name in ("objects", "notes"):
        lists = manifest.column(name).combine_chunks()
        path = lists.flatten().field("path")
        chosen = pc.is_in(path, value_set=paths)
        rows = pc.list_parent_indices(lists).filter(chosen)
        shards = manifest.column("shard").take(rows).to_pylist()
        result.update(zip(path.filter(chosen).to_pylist(), shards, strict=True))
    return result


def _is_chunk(path: str, names: Collection[str]) -> bool:
    """Tell whether a path is that of a chunk of one of the store's own arrays."""
    parts = re.fullmatch(r"(.+)/c(/\d+)+", path)
    return parts is not None and f"{parts[1]}/zarr.json" in names


def _is_given_up(file: Path, marks: Iterable[str] | None) -> bool:
    """Tell whether no put writes a temporary file any more.

    Parameters
    ----------
    file
        The file.
    marks
        Those of the shard's tries that have not finished; None: it is of no shard.
    """
    try:
        old = time.time() - file.stat().st_mtime > STALE_S
    except FileNotFoundError:
        return True
    return old or (marks is not None and all(is_dead(mark) for mark in marks))
