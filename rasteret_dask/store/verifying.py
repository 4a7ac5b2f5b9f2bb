# SPDX-License-Identifier: Apache-2.0
"""Every object of a store, finished or not, compared with what was written."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from rasteret_dask.activity import Tally
from rasteret_dask.display.card import Card, Fact, counted
from rasteret_dask.errors import CredentialsError, StoreError
from rasteret_dask.formats import STORE
from rasteret_dask.lists import first_of
from rasteret_dask.net import remote
from rasteret_dask.net.limits import host_of, pool
from rasteret_dask.net.places import Place
from rasteret_dask.net.sums import Fault, Sums, Whole, document_of, fault_of, is_closed
from rasteret_dask.progress import Progress
from rasteret_dask.store import ledger, shardreports
from rasteret_dask.store.addedtables import table_path, versions
from rasteret_dask.store.ledger import PARTED, part_path
from rasteret_dask.store.rereading import Difference, check_sample, rereading
from rasteret_dask.store.storetables import open_manifest
from rasteret_dask.tasks.filtering import KEPT

__all__ = ["Verification", "verify"]

SHOWN = 10
"""Paths that a report's text names of each kind."""

DIFFERENCES = 5
"""Differences that it names."""

_Wanted: TypeAlias = "dict[str, Sums | Whole]"

_PASSING = (
    f"{shardreports.JOB}/stats/",  # kept beside a store by whoever measures it, each with a version of its own
    f"{ledger.CLIENTS}/",  # traces of those who write it at this moment
)


@dataclass(frozen=True, slots=True)
class Verification:
    """What :func:`verify` found; its text is a report.

    Examples
    --------
    >>> found = rd.verify("train.zarr")
    >>> found.ok
    True
    """

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
    compared: int = 0
    """Chips that were read again from their scenes."""
    differences: tuple[Difference, ...] = ()
    """What of these chips is not what is stored: one a chip, source and variable."""

    @property
    def ok(self) -> bool:
        """Whether the store is finished, every object is what was written, and no chip differs from its scenes.

        Examples
        --------
        >>> import os
        >>> os.remove("train.zarr/zarr.json")
        >>> rd.verify("train.zarr").ok
        False
        """
        return self.finished and not self.missing and not self.damaged and not self.differences

    def __bool__(self) -> bool:
        return self.ok

    @property
    def verdict(self) -> str:
        """``"ok"``, ``"damaged"``, ``"unfinished"``, or ``"differs from its scenes"``.

        Examples
        --------
        >>> rd.verify("train.zarr").verdict
        'ok'
        """
        if self.missing or self.damaged:
            return "damaged"
        if not self.finished:
            return "unfinished"
        return "differs from its scenes" if self.differences else "ok"

    @property
    def _card(self) -> Card:
        rows = [
            Fact("store", self.store),
            Fact("as written", f"{counted(self.objects, 'object')}, {self.nbytes:,} bytes"),
        ]
        if not self.finished:
            rows.append(Fact("not finished", "to_zarr or compact does what is missing"))
        kinds = {"missing": self.missing, "damaged": self.damaged, "unexpected": self.unexpected}
        for kind, paths in kinds.items():
            if paths:
                rows.append(Fact(kind, f"{len(paths)}: {first_of(paths, SHOWN)}"))
        if self.compared:
            rows.append(Fact("read again", f"{counted(self.compared, 'chip')}, {self._differing}"))
        names = ("differs", *[""] * (DIFFERENCES - 1))
        rows += [Fact(name, str(one)) for name, one in zip(names, self.differences, strict=False)]
        return Card(f"Verification: {self.verdict}", rows, ok=self.ok)

    @property
    def _differing(self) -> str:
        chips = len({difference.chip for difference in self.differences})
        more = f"; the first {DIFFERENCES} differences" if len(self.differences) > DIFFERENCES else ""
        return f"{chips} of which differ from what is stored{more}" if chips else "as they are stored"

    def __repr__(self) -> str:
        return self._card.text

    def _repr_html_(self) -> str:
        return self._card.html


def verify(
    store: str | os.PathLike[str], progress: bool = False, *, sources: int | None = None, seed: int = 0
) -> Verification:
    """Read every object of a store and compare it with the size and the checksum that its writer noted.

    Objects are read by several threads, one at a time each, in parts of 16 MiB at most. Nothing is changed.

    With ``sources`` a sample of chips is read again from the scenes too, by the plan that the store keeps, and compared
    with what is stored: pixels, validity, masks, times and coordinates, bit for bit.

    Of a store that grew, all parts and added columns are read, and ``sources`` chips of each part. A part that is not
    finished, which readers do not see, makes the store unfinished here.

    Parameters
    ----------
    store
        What ``to_zarr`` or :func:`compact` wrote: a local path, or a URL (http too, where extra objects are not seen).
    progress
        Show how far it is.
    sources
        How many chips to read again, drawn by hash of their ids; None: none. A plan's functions must be imported:
        nothing is because a store names it.
    seed
        Another seed draws other chips.

    Returns
    -------
    Verification
        Which objects are missing, damaged, or not of this store. It is true where nothing is wrong. Of an unfinished
        store it covers what is written so far.

    Raises
    ------
    StoreError
        When no store lies there; with ``sources``, when it is not finished or keeps no plan.
    PlanError
        When ``sources`` is no number of chips, or the plan names functions that this process has not imported.
    FormatError
        When it was written in a format that this version does not read.

    Examples
    --------
    >>> report = rd.verify("train.zarr")
    >>> report.ok
    True
    >>> import os
    >>> os.remove("train.zarr/manifest.parquet")
    >>> rd.verify("train.zarr").verdict
    'damaged'
    """
    check_sample(sources)
    url = Place.of(store).folder("a folder that to_zarr wrote", "Give the store's folder.")
    found = None if url.startswith(("http://", "https://")) else remote.listing(url)
    first = None if found is None else {path: n for path, n in found.items() if not PARTED.fullmatch(path)}
    checks = [_Check(url, first, "")]
    while (inside := _inside(url, number := len(checks), found)) is not None:
        checks.append(_Check(remote.join(url, part_path(number)), inside, f"{part_path(number)}/"))
    with Progress("objects", progress, sum(len(one.wanted) for one in checks)) as shown:
        for one in checks:
            one.compare(shown)
    faults = {f"{one.prefix}{path}": fault for one in checks for path, fault in one.faults.items()}
    tables = _tables(url, found)
    faults |= {path: fault for path, (fault, _) in tables.items() if fault is not None}
    whole = [nbytes for fault, nbytes in tables.values() if fault is None]
    compared, differences = 0, list[Difference]()
    if sources is not None:
        for one in checks:
            again = rereading(one.url, sources, seed)
            compared += len(again)
            with Progress("chips read again", progress, len(again)) as shown:
                for some in again.differences():
                    shown.step(1)
                    differences += some
    extra = {f"{one.prefix}{path}" for one in checks for path in one.extra}
    return Verification(
        remote.redact(url),
        all(one.finished for one in checks),
        sum(one.good for one in checks) + len(whole),
        sum(one.nbytes for one in checks) + sum(whole),
        tuple(sorted(path for path, fault in faults.items() if fault == "missing")),
        tuple(sorted(path for path, fault in faults.items() if fault == "damaged")),
        tuple(sorted(extra | _strangers(found, len(checks), tables))),
        compared,
        tuple(differences),
    )


class _Check:
    """A store, or a part that was appended to one, compared with what was written.

    Parameters
    ----------
    url
        Where it lies.
    objects
        Path -> bytes of what lies there; None where the server does not list.
    prefix
        What its paths begin with below the store.
    """

    def __init__(self, url: str, objects: Mapping[str, int] | None, prefix: str) -> None:
        self.url, self.prefix = url, prefix
        self.good, self.nbytes = 0, 0
        self.wanted, self.faults, self.finished = _written(url, objects)
        extra = (
            set()
            if objects is None
            else objects.keys() - self.wanted.keys() - self.faults.keys() - {"zarr.json"}
        )
        if ledger.MANIFEST not in self.wanted:  # which alone knows these
            extra -= {path for path in extra if f"/{path}".endswith(f"/{KEPT}/c/0")}
            extra -= {ledger.CARD, ledger.CROISSANT}
        self.extra = {path for path in extra if not path.startswith(_PASSING)}

    def compare(self, shown: Progress) -> None:
        """Read every object."""
        for (path, sums), fault in zip(self.wanted.items(), _faults(self.url, self.wanted), strict=True):
            shown.step(1, tally=Tally(bytes_read=sums.size))
            if fault is None:
                self.good, self.nbytes = self.good + 1, self.nbytes + sums.size
            else:
                self.faults[path] = fault
                shown.failed += 1


def _inside(url: str, number: int, objects: Mapping[str, int] | None) -> dict[str, int] | None:
    """Return what lies in a part, path -> bytes; None where there is no such part."""
    folder = f"{part_path(number)}/"
    if objects is None:
        return {} if remote.exists(remote.join(url, folder, "zarr.json")) else None
    return {path.removeprefix(folder): n for path, n in objects.items() if path.startswith(folder)} or None


def _tables(url: str, objects: Mapping[str, int] | None) -> dict[str, tuple[Fault | None, int]]:
    """Return path -> what is wrong, and its bytes, of each version of added columns."""
    result: dict[str, tuple[Fault | None, int]] = {}
    last = max(versions(objects), default=0) if objects is not None else 0
    number = 0
    while number < last or (objects is None and remote.exists(remote.join(url, table_path(number + 1)))):
        number += 1
        try:
            data = remote.get(remote.join(url, table_path(number)))
        except remote.MissingError:
            result[table_path(number)] = ("missing", 0)
            continue
        result[table_path(number)] = (None if is_closed(data) else "damaged", len(data))
    return result


def _strangers(objects: Mapping[str, int] | None, parts: int, tables: Collection[str]) -> set[str]:
    """Return what lies where parts and added columns do, and is none that is in use."""
    own = tuple(f"{part_path(number)}/" for number in range(1, parts))
    return {
        path
        for path in objects or ()
        if PARTED.fullmatch(path) and path not in tables and not path.startswith(own)
    }


def _faults(url: str, wanted: _Wanted) -> Iterator[Fault]:
    return pool(host_of(url)).map(lambda path: fault_of(remote.join(url, path), wanted[path]), wanted)


def _written(url: str, objects: Mapping[str, int] | None) -> tuple[_Wanted, dict[str, Fault], bool]:
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
    except CredentialsError:
        raise
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
    except CredentialsError:
        raise
    except StoreError as error:
        if not isinstance(error.__cause__, remote.MissingError):
            faults[ledger.MANIFEST] = "damaged"
        elif finished:
            faults[ledger.MANIFEST] = "missing"
        else:
            faults.pop("zarr.json", None)  # nothing was ever committed
        return wanted | _under_way(url, objects, faults), faults, finished
    wanted[ledger.MANIFEST] = Sums.of(remote.get(remote.join(url, ledger.MANIFEST)))
    wanted |= {path: Sums.again(value) for path, value in json.loads(metadata[ledger.OBJECTS]).items()}
    for row in manifest.to_pylist():
        wanted |= _of_shard((*row["objects"], *row["notes"]))
    return wanted, faults, finished


def _under_way(url: str, objects: Mapping[str, int] | None, faults: dict[str, Fault]) -> _Wanted:
    """Return what is written so far, as the ledger and the reports say; note what is wrong with these."""
    wanted: _Wanted = {}
    reports = [path for path in objects or () if path.startswith(f"{shardreports.JOB}/done/")]
    pages = [path for path in objects or () if path.startswith(f"{shardreports.PAGES}/")]
    for path in (ledger.BEGUN, ledger.LEDGER, *pages, *reports):
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
        shards = [document] if path in reports else document["reports"].values() if path in pages else ()
        for shard in shards:
            wanted |= _of_shard(shard["objects"])
    wanted |= ledger.stated(url) or {}
    wanted |= {p: Sums(0, ()) for p in objects or () if p.startswith(f"{shardreports.JOB}/tried/")}
    if ledger.GROUPS in wanted and fault_of(remote.join(url, ledger.GROUPS), wanted[ledger.GROUPS]) is None:
        documents = json.loads(remote.get(remote.join(url, ledger.GROUPS)))
        here = {
            path: text for path, text in documents.items() if path in (objects or ()) and path != "zarr.json"
        }
        wanted |= {path: Sums.of(text.encode()) for path, text in here.items()}
    return wanted


def _of_shard(objects: Iterable[Mapping[str, Any]]) -> _Wanted:
    return {o["path"]: Whole(o["size"], o["crc32"]) for o in objects}
