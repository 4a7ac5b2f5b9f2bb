"""Every object of a store, finished or not, compared with what was written."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from rasteret_dask.errors import StoreError
from rasteret_dask.formats import STORE
from rasteret_dask.net import remote
from rasteret_dask.net.limits import host_of, pool
from rasteret_dask.net.places import place_of
from rasteret_dask.net.sums import Fault, Sums, Whole, document_of, fault_of
from rasteret_dask.progress import Progress
from rasteret_dask.store import ledger
from rasteret_dask.store.storetables import open_manifest
from rasteret_dask.tasks.filtering import KEPT

__all__ = ["Verification", "verify"]

SHOWN = 10
"""Paths that a report's text names of each kind."""

_Wanted: TypeAlias = "dict[str, Sums | Whole]"

_PASSING = (
    f"{ledger.JOB}/stats/",  # kept beside a store by whoever measures it, each with a version of its own
    f"{ledger.CLIENTS}/",  # traces of those who write it at this moment
)


@dataclass(frozen=True, slots=True)
class Verification:
    """What :func:`verify` found; its text is a report."""

    store: str
    """The store's address, without signatures."""
    finished: bool
    """Whether the store is committed: others do not open."""
    objects: int
    """Objects that were read and are what was written."""
    nbytes: int
    """Bytes of them."""
    missing: tuple[str, ...]
    """Paths below the store, sorted, as in the others: objects that were written and are not there."""
    damaged: tuple[str, ...]
    """Objects that hold other bytes than were written."""
    unexpected: tuple[str, ...]
    """Objects that the store does not know. Readers do not see them; plain HTTP servers do not tell of them."""

    @property
    def ok(self) -> bool:
        """Whether the store is finished, and every object of it is what was written."""
        return self.finished and not self.missing and not self.damaged

    def __bool__(self) -> bool:
        return self.ok

    def __repr__(self) -> str:
        state = "ok" if self.ok else "damaged" if self.missing or self.damaged else "unfinished"
        head = f"<Verification of {self.store}: {state}; {self.objects} objects, {self.nbytes:,} bytes as written>"
        kinds = {"missing": self.missing, "damaged": self.damaged, "unexpected": self.unexpected}
        lines = [
            head,
            *([] if self.finished else ["  not finished: to_zarr or compact does what is missing"]),
        ]
        for kind, paths in kinds.items():
            if paths:
                more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
                lines.append(f"  {len(paths)} {kind}: {', '.join(paths[:SHOWN])}{more}")
        return "\n".join(lines)


def verify(store: str | os.PathLike[str], progress: bool = False) -> Verification:
    """Read every object of a store and compare it with the size and the checksum that its writer noted.

    Objects are read by several threads, one at a time each, in parts of 16 MiB at most. Nothing is changed.

    Parameters
    ----------
    store
        What ``to_zarr`` or :func:`compact` wrote: a local path, or a URL (http too, where extra objects are not seen).
    progress
        Show how far it is.

    Returns
    -------
    Verification
        Which objects are missing, damaged, or not of this store. It is true where nothing is wrong. Of an unfinished
        store it covers what is written so far.

    Raises
    ------
    StoreError
        When no store lies there.
    FormatError
        When it was written in a format that this version does not read.

    Examples
    --------
    >>> report = rd.verify("train.zarr")  # doctest: +SKIP
    >>> report  # doctest: +SKIP
    <Verification of train.zarr: damaged; 41 objects, 1,204,331 bytes as written>
      1 damaged: pixels/c/3/0/0/0/0
    >>> report.ok  # doctest: +SKIP
    False
    """
    url = place_of(store)
    if remote.is_local(url) and os.path.isfile(remote.local_path(url)):
        raise StoreError(f"store {url}", "a file", "a folder that to_zarr wrote", "Give the store's folder.")
    found = None if url.startswith(("http://", "https://")) else remote.listing(url)
    wanted, faults, finished = _written(url, found)
    good, nbytes = 0, 0
    with Progress("objects", progress, len(wanted)) as shown:
        for (path, sums), fault in zip(wanted.items(), _faults(url, wanted), strict=True):
            shown.step(1)
            if fault is None:
                good, nbytes = good + 1, nbytes + sums.size
            else:
                faults[path] = fault
    extra = set() if found is None else found.keys() - wanted.keys() - faults.keys() - {"zarr.json"}
    if ledger.MANIFEST not in wanted:  # which alone knows these
        extra -= {path for path in extra if f"/{path}".endswith(f"/{KEPT}/c/0")}
    return Verification(
        remote.redact(url),
        finished,
        good,
        nbytes,
        tuple(sorted(path for path, fault in faults.items() if fault == "missing")),
        tuple(sorted(path for path, fault in faults.items() if fault == "damaged")),
        tuple(sorted(path for path in extra if not path.startswith(_PASSING))),
    )


def _faults(url: str, wanted: _Wanted) -> Iterator[Fault]:
    return pool(host_of(url)).map(lambda path: fault_of(remote.join(url, path), wanted[path]), wanted)


def _written(url: str, found: Mapping[str, int] | None) -> tuple[_Wanted, dict[str, Fault], bool]:
    """Return what was written, what is wrong with that which tells it, and whether the store is finished.

    The manifest tells; without it, the ledger and the reports do.
    """
    subject, mark = f"store {remote.redact(url)}", ledger.begun(url)
    wanted: _Wanted = {}
    faults: dict[str, Fault] = {}
    finished = False
    try:
        digest = ledger.root_of(url).note["digest"]
        finished, wanted["zarr.json"] = True, Sums.of(remote.get(remote.join(url, "zarr.json")))
    except remote.MissingError as error:
        if mark is None:
            raise StoreError(
                subject, "no store", "one that to_zarr or compact wrote", "Check the path."
            ) from error
        STORE.check(subject, mark)
        digest, faults["zarr.json"] = mark["digest"], "missing"
    except StoreError:
        if mark is None:
            raise
        digest, faults["zarr.json"] = mark["digest"], "damaged"
    try:
        with open_manifest(url) as (file, _):
            manifest = file.read(["objects", "notes"])
            metadata = manifest.schema.metadata
        if metadata[ledger.DIGEST].decode() != digest:
            raise StoreError(subject, "a manifest of other chips", "that of the store")
    except StoreError as error:
        if not isinstance(error.__cause__, remote.MissingError):
            faults[ledger.MANIFEST] = "damaged"
        elif finished:
            faults[ledger.MANIFEST] = "missing"
        else:
            faults.pop("zarr.json", None)  # nothing was ever committed
        return wanted | _under_way(url, found, faults), faults, finished
    wanted[ledger.MANIFEST] = Sums.of(remote.get(remote.join(url, ledger.MANIFEST)))
    wanted |= {path: Sums.again(value) for path, value in json.loads(metadata[ledger.OBJECTS]).items()}
    for row in manifest.to_pylist():
        wanted |= _of_shard((*row["objects"], *row["notes"]))
    return wanted, faults, finished


def _under_way(url: str, found: Mapping[str, int] | None, faults: dict[str, Fault]) -> _Wanted:
    """Return what is written so far, as the ledger and the reports say; note what is wrong with these."""
    wanted: _Wanted = {}
    reports = [path for path in found or () if path.startswith(f"{ledger.JOB}/done/")]
    for path in (ledger.BEGUN, ledger.LEDGER, *reports):
        try:
            data = remote.get(remote.join(url, path))
        except remote.MissingError:
            if path == ledger.BEGUN or faults:  # else it was stopped before
                faults[path] = "missing"
            continue
        document = document_of(data)
        if document is None:
            faults[path] = "damaged"
            continue
        wanted[path] = Sums.of(data)
        wanted |= _of_shard(document["objects"]) if path in reports else {}
    wanted |= ledger.stated(url) or {}
    wanted |= {p: Sums(0, ()) for p in found or () if p.startswith(f"{ledger.JOB}/tried/")}
    if ledger.GROUPS in wanted and fault_of(remote.join(url, ledger.GROUPS), wanted[ledger.GROUPS]) is None:
        documents = json.loads(remote.get(remote.join(url, ledger.GROUPS)))
        here = {
            path: text for path, text in documents.items() if path in (found or ()) and path != "zarr.json"
        }
        wanted |= {path: Sums.of(text.encode()) for path, text in here.items()}
    return wanted


def _of_shard(objects: Iterable[Mapping[str, Any]]) -> _Wanted:
    return {o["path"]: Whole(o["size"], o["crc32"]) for o in objects}
