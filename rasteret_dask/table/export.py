# SPDX-License-Identifier: Apache-2.0
"""Records become GeoParquet where a user wants it: one file, or a directory partitioned by time."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError, StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.table.geoparquet import Staged, replacing

__all__ = ["PERIODS", "export"]

PERIODS = ("year", "month", "day")
"""What a directory can be partitioned by."""

_UNKNOWN = "__HIVE_DEFAULT_PARTITION__"
_PART = re.compile(r"part-[0-9a-f]+\.parquet")


def export(
    tables: Iterable[pa.Table],
    place: str | os.PathLike[str],
    *,
    partition_by: Sequence[str] | None,
    metadata: Mapping[bytes, bytes],
) -> int:
    """Write tables of one schema as GeoParquet, neighbours near each other.

    Parameters
    ----------
    tables
        As :func:`geoparquet.write_ordered` takes them.
    place
        A local path, or a URL of an object store (s3, gs, az).
    partition_by
        Some of :data:`PERIODS`, from long to short: a directory of ``year=2024/month=4/part-....parquet``.
        None: one file.
    metadata
        Key-values of the files' schema.

    Returns
    -------
    int
        Rows written.

    Notes
    -----
    A local file or directory appears whole or not at all, and nothing of an older one stays. An object is put
    whole. A directory in an object store gets its new parts, then loses the old ones: who lists it in between
    sees both.

    Raises
    ------
    PlanError
        When ``partition_by`` names anything else.
    StoreError
        When there is something else at ``place``, or it cannot be written.
    """
    parts = _periods(partition_by)
    there = Place.of(place)
    if there.is_local:
        target = Path(there.url)
        _check(target, parts)
        write = _write_directory if parts else _write_file
        try:
            with Staged.of(tables, target.parent) as staged:
                return write(staged, target, parts, metadata)
        except OSError as error:
            raise StoreError(f"export to {target}", str(error), "a place that can be written") from error
    with TemporaryDirectory(prefix="rasteret-dask-export-") as folder:
        own = Path(folder)
        with Staged.of(tables, own) as staged:
            written = own / "export"
            rows = (_write_directory if parts else _write_file)(staged, written, parts, metadata)
        _send(written, there.url)
    return rows


def _periods(partition_by: Sequence[str] | None) -> tuple[str, ...]:
    parts = (partition_by,) if isinstance(partition_by, str) else tuple(partition_by or ())
    if list(parts) != [p for p in PERIODS if p in parts]:
        raise PlanError(
            "export(partition_by=)",
            repr(partition_by),
            f"None, or some of {', '.join(map(repr, PERIODS))} in this order",
            "Filter by other columns when you load: row groups that cannot match are skipped.",
        )
    return parts


def _check(target: Path, parts: Sequence[str]) -> None:
    """Refuse to replace what is no earlier export."""
    subject = f"export to {target}"
    if parts and target.is_dir():
        other = next((p for p in target.rglob("*") if p.is_file() and not _PART.fullmatch(p.name)), None)
        if other is not None:
            raise StoreError(
                subject,
                f"a directory with {other.name}, which no export wrote",
                "an earlier export, or nothing",
            )
    elif parts and target.exists():
        raise StoreError(
            subject, "a file", "a directory, as partition_by asks for one", "Choose another path."
        )
    elif target.is_dir():
        raise StoreError(
            subject, "a directory", "a file's path", "Add a name, or partition_by=('year', 'month')."
        )


def _write_file(staged: Staged, target: Path, _: Sequence[str], metadata: Mapping[bytes, bytes]) -> int:
    rows = staged.ordered
    with replacing(target) as temporary:
        staged.write(rows, [(temporary, len(rows))], metadata=metadata)
    return len(rows)


def _write_directory(
    staged: Staged, target: Path, parts: Sequence[str], metadata: Mapping[bytes, bytes]
) -> int:
    rows, files = _partitioned(staged, parts)
    fresh = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    old = fresh.with_suffix(".old")
    try:
        for name, _ in files:
            (fresh / name).parent.mkdir(parents=True, exist_ok=True)
        staged.write(rows, [(fresh / n, count) for n, count in files], metadata=metadata, without=PERIODS)
        if target.exists():
            os.rename(target, old)
        os.rename(fresh, target)
    finally:
        if old.exists() and not target.exists():
            os.rename(old, target)  # the older one stays where the new one could not take its place
        for folder in (fresh, old):
            shutil.rmtree(folder, ignore_errors=True)
    return len(rows)


def _partitioned(staged: Staged, parts: Sequence[str]) -> tuple[NDArray[np.int64], list[tuple[str, int]]]:
    """Return the rows partition by partition, and how many go to which file."""
    rows = staged.ordered
    days = staged.time[rows].astype("datetime64[D]")
    finest = {"year": "Y", "month": "M", "day": "D"}[parts[-1]]
    # months without their years, say, are sorted by their names
    names = np.array([_folder(day, parts) for day in np.unique(days.astype(f"datetime64[{finest}]"))])
    periods = np.unique(days.astype(f"datetime64[{finest}]"), return_inverse=True)[1]
    label = names[periods] if len(names) else np.empty(0, dtype=str)
    order = np.argsort(label, kind="stable")
    own = uuid.uuid4().hex[:12]
    found, counts = np.unique(label, return_counts=True)
    files = [(f"{n}/part-{own}.parquet", int(c)) for n, c in zip(found, counts, strict=True)]
    return rows[order], files or [(f"part-{own}.parquet", 0)]


def _folder(day: np.datetime64, parts: Sequence[str]) -> str:
    if np.isnat(day):
        return "/".join(f"{p}={_UNKNOWN}" for p in parts)
    year, month, date = (int(v) for v in str(day.astype("datetime64[D]")).split("-"))
    values = {"year": year, "month": month, "day": date}
    return "/".join(f"{p}={values[p]}" for p in parts)


def _send(written: Path, url: str) -> None:
    """Put a file, or all files of a directory, and take away what an earlier export left there."""
    if written.is_file():
        remote.put(url, written.read_bytes())
        return
    before = remote.listing(url)
    other = [name for name in before if not _PART.fullmatch(name.rpartition("/")[2])]
    if other:
        raise StoreError(
            f"export to {remote.redact(url)}",
            f"{len(other)} objects that no export wrote ({other[0]})",
            "an earlier export, or nothing",
        )
    for path in sorted(p for p in written.rglob("*") if p.is_file()):
        remote.put(remote.join(url, path.relative_to(written).as_posix()), path.read_bytes())
    for name in before:
        remote.delete(remote.join(url, name))
