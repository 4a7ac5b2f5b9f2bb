# SPDX-License-Identifier: Apache-2.0
"""Where a store's chips come from: the steps of the plan, the records used and their terms, what planning left out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.net import remote
from rasteret_dask.net.sums import document_of, sealed
from rasteret_dask.planning.calls import calls, rows_in
from rasteret_dask.planning.plan import leaves
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.resolve import SourceRecords
from rasteret_dask.store.ledger import PROVENANCE
from rasteret_dask.table.terms import Terms

__all__ = ["MemberOrigin", "Provenance", "provenance_of", "provenance_of_parts", "read_provenance"]

LOCAL = "files of the machine that wrote the store"


@dataclass(frozen=True, slots=True)
class MemberOrigin:
    """The records of one member that feed some chip."""

    source: str
    member: str
    records: int
    start: str
    """Of the first record's time, ISO 8601."""
    end: str
    """Of the last record's."""
    collections: tuple[str, ...]
    """STAC collections."""
    hosts: tuple[str, ...]
    """Where the files lie."""
    terms: Terms = field(default_factory=Terms)
    ids: tuple[str, ...] = ()
    """Of the records; none where an earlier version wrote the store."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a store's chips come from."""

    steps: tuple[str, ...] = ()
    """The plan as the calls that a user would type, the first one first."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Reason -> windows that planning left out."""
    origins: tuple[MemberOrigin, ...] = ()

    def to_bytes(self) -> bytes:
        """Return it as a JSON document with its checksum."""
        return sealed(
            {"steps": self.steps, "dropped": self.dropped, "origins": [asdict(o) for o in self.origins]}
        )

    def after(self, step: str, used: Sequence[tuple[SourceRecords, NDArray[np.int64]]]) -> Provenance:
        """Return where some of the chips come from.

        Parameters
        ----------
        step
            The call that chooses them.
        used
            Each source, with the rows of its records that feed one of them.
        """
        terms = {origin.member: origin.terms for origin in self.origins}
        return replace(self, steps=(*self.steps, step), origins=tuple(_origins(used, terms)))

    def by_member(self) -> Provenance:
        """Return the same with one entry for each member of a source, of all records that its entries name."""
        members: dict[tuple[str, str], list[MemberOrigin]] = {}
        for one in self.origins:
            members.setdefault((one.source, one.member), []).append(one)
        return replace(self, origins=tuple(map(_as_one, members.values())))

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Provenance:
        """Return what :meth:`to_bytes` wrote."""
        origins = [
            MemberOrigin(
                one["source"], one["member"], int(one["records"]), one["start"], one["end"],
                tuple(one["collections"]), tuple(one["hosts"]), Terms(**one["terms"]), tuple(one.get("ids", ())),
            )
            for one in document["origins"]
        ]  # fmt: skip
        return cls(tuple(document["steps"]), dict(document["dropped"]), tuple(origins))


def _as_one(parts: Sequence[MemberOrigin]) -> MemberOrigin:
    ids = sorted({name for part in parts for name in part.ids})
    return replace(
        parts[0],
        records=len(ids) if all(part.ids for part in parts) else max(part.records for part in parts),
        start=min((part.start for part in parts if part.start), default=""),
        end=max(part.end for part in parts),
        collections=tuple(sorted({name for part in parts for name in part.collections})),
        hosts=tuple(sorted({name for part in parts for name in part.hosts})),
        ids=tuple(ids),
    )


def provenance_of(
    query: Query, used: Sequence[tuple[SourceRecords, NDArray[np.int64]]], dropped: Mapping[str, int]
) -> Provenance:
    """Return where chips come from.

    Parameters
    ----------
    query
        Their plan.
    used
        Each source, with the rows of its records that feed a chip.
    dropped
        Reason -> windows that planning left out.
    """
    terms: dict[str, Terms] = {}
    for leaf in leaves(query.plan):
        terms.setdefault(leaf.name, Terms.of(query.tables[leaf.token].schema))
    return Provenance(
        tuple(calls(query.plan, rows_in(query.tables))), dict(dropped), tuple(_origins(used, terms))
    )


def _origins(
    used: Sequence[tuple[SourceRecords, NDArray[np.int64]]], terms: Mapping[str, Terms]
) -> Iterator[MemberOrigin]:
    for source, rows in used:
        for number, member in enumerate(source.plan.members):
            own = pa.array(rows[source.member[rows] == number])
            if len(own):
                yield _origin(source, member.name, member.bands[0], own, terms.get(member.name, Terms()))


def _origin(source: SourceRecords, member: str, band: str, rows: pa.Array, terms: Terms) -> MemberOrigin:
    table = source.records.table
    times = pc.min_max(table.column("datetime").take(rows)).as_py()
    hrefs = source.records.asset_field(band, "href").take(rows).drop_null().to_pylist()
    hosts = {urlsplit(href).netloc if "://" in href else "" for href in hrefs}
    return MemberOrigin(
        source.plan.name,
        member,
        len(rows),
        "" if times["min"] is None else times["min"].isoformat(),
        "" if times["max"] is None else times["max"].isoformat(),
        tuple(sorted(table.column("collection").take(rows).drop_null().unique().to_pylist())),
        tuple(sorted(host or LOCAL for host in hosts)),
        terms,
        tuple(sorted(table.column("id").take(rows).to_pylist())),
    )


def read_provenance(url: str) -> Provenance:
    """Return where a store's chips come from; empty where an earlier version wrote it, or it is damaged.

    Parameters
    ----------
    url
        The store.
    """
    try:
        document = document_of(remote.get(remote.join(url, PROVENANCE)))
    except remote.MissingError:
        return Provenance()
    return Provenance() if document is None else Provenance.of(document)


def provenance_of_parts(urls: Sequence[str]) -> Provenance:
    """Return where the chips of several parts come from: the first one's steps, and the records of all.

    Parameters
    ----------
    urls
        The parts, in order.
    """
    parts = [read_provenance(url) for url in urls]
    dropped: dict[str, int] = {}
    for part in parts:
        for why, count in part.dropped.items():
            dropped[why] = max(dropped.get(why, 0), count)  # each plan looks at the ground of all
    return Provenance(parts[0].steps, dropped, tuple(origin for part in parts for origin in part.origins))
