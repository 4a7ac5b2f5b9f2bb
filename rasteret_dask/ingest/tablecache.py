# SPDX-License-Identifier: Apache-2.0
"""Built tables on disk: each whole or not at all, cached under a hash of every argument that affects its content."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import psutil

from rasteret_dask.errors import PlanError, SourceError
from rasteret_dask.formats import TABLE as FORMAT
from rasteret_dask.net.remote import is_local
from rasteret_dask.table.records import RECORD_SCHEMA

__all__ = ["SEARCH_FILE", "TABLE", "VERSION", "TableShelf", "cache_root", "key_of", "shelf", "shelf_of"]

TABLE = "records.parquet"
SEARCH_FILE = "search.json"
VARIABLE = "RASTERET_DASK_CACHE"

VERSION = 2
"""Of how rows are made of items: a new one where the same items give other rows."""

_LABEL = 60  # characters of a dataset's name in a folder's, for people
_STALE_S = 7 * 86400.0  # of another host's unfinished tables


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of built tables: the one given, else RASTERET_DASK_CACHE, else the user's cache folder.

    Raises
    ------
    PlanError
        When it is no local path.
    """
    told = os.fspath(cache_dir) if cache_dir is not None else os.environ.get(VARIABLE)
    if not told:
        return Path(platformdirs.user_cache_dir("rasteret_dask")) / "tables"
    if not is_local(told) or "\0" in told:
        where = "cache_dir" if cache_dir is not None else VARIABLE
        raise PlanError(where, repr(told), "a folder of this machine", "Export the table to other places.")
    return Path(os.path.expanduser(told)).absolute()


def key_of(fields: Mapping[str, Any]) -> str:
    """Return the digest of everything that decides what a table holds, floats to the last digit."""
    whole = {**fields, "version": VERSION, "schema": str(RECORD_SCHEMA)}
    text = json.dumps(whole, sort_keys=True, default=_plain, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class TableShelf:
    """The place of one search's table; each rebuild or refresh is a folder of its own, the highest number counts."""

    folder: Path

    def newest(self) -> Path | None:
        """Return the newest whole table's folder, None where there is none."""
        numbers = self._numbers()
        return self._place(numbers[-1]) if numbers else None

    @contextmanager
    def filling(self) -> Iterator[Path]:
        """Give a temporary folder; it is removed at the end, whatever was not taken by :meth:`commit`."""
        # the process's name is in it, so that others see whether it still works there
        temporary = self.folder / f".{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}.tmp"
        try:
            temporary.mkdir(parents=True)
        except OSError as error:
            raise PlanError(
                f"cache folder {self.folder.parent}",
                error.strerror or str(error),
                "a folder that can be written",
                f"Name another one: cache_dir=, or {VARIABLE}.",
            ) from error
        self._sweep()
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def commit(self, filled: Path, *, after: Path | None, replace: bool, keep: int = 0) -> Path:
        """Make a filled folder the newest table, at once, and return its place.

        Parameters
        ----------
        filled
            A folder of :meth:`filling` with its table and what was searched for.
        after
            The table that was the newest when the work began, or None.
        replace
            Whether a table that somebody else made meanwhile gives way; else theirs is returned, as good as ours.
        keep
            How many older tables stay, for collections that still read them.
        """
        number = int(after.name) + 1 if after is not None else 1
        while True:
            place = self._place(number)
            try:
                os.rename(filled, place)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                if not replace and _is_whole(place):
                    return place
                number += 1
                continue
            self._drop_before(number - keep)
            return place

    def _numbers(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        names = [p.name for p in self.folder.iterdir() if re.fullmatch(r"\d{6}", p.name)]
        return sorted(int(name) for name in names if _is_whole(self.folder / name))

    def _place(self, number: int) -> Path:
        return self.folder / f"{number:06d}"

    def _drop_before(self, number: int) -> None:
        for old in self._numbers():
            if old < number:
                shutil.rmtree(self._place(old), ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what stopped processes left unfinished: of this host at once, of others when it is old."""
        for path in self.folder.glob(".*.tmp"):
            host, _, pid = path.name[1:].removesuffix(".tmp").rpartition(".")[0].rpartition(".")
            own = host == socket.gethostname() and pid.isdigit()
            try:
                stale = not psutil.pid_exists(int(pid)) if own else time.time() - _touched(path) > _STALE_S
            except FileNotFoundError:
                continue  # its process has just finished
            if stale:
                shutil.rmtree(path, ignore_errors=True)


def shelf(root: Path, label: str, key: str) -> TableShelf:
    """Return the shelf of a key; the label is for people, whatever it holds."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", label).strip("_")[:_LABEL] or "table"
    return TableShelf(root / f"{plain}-{key[:32]}")


def shelf_of(file: str) -> tuple[TableShelf, Path, dict[str, Any]] | None:
    """Return the shelf and folder of a table's file, and what was searched for; None where it was not built here."""
    path = Path(file)
    said = path.with_name(SEARCH_FILE)
    if path.name != TABLE or not said.is_file():
        return None
    try:
        found = json.loads(said.read_text())
    except ValueError as error:
        raise SourceError(f"reading {said}", f"no JSON: {error}", "what was searched for") from error
    if "format" in found:
        FORMAT.check(f"reading {said}", found)
    return TableShelf(path.parents[1]), path.parent, dict(found)


def _is_whole(place: Path) -> bool:
    return (place / TABLE).is_file() and (place / SEARCH_FILE).is_file()


def _touched(path: Path) -> float:
    return max(p.stat().st_mtime for p in (path, *path.rglob("*")))


def _plain(value: Any) -> Any:
    if isinstance(value, frozenset | set):
        return sorted(value)
    return str(value)
