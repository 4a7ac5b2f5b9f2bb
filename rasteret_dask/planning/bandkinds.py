# SPDX-License-Identifier: Apache-2.0
"""The kind of each output band of a source: one for all of its records, or an error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rasteret_dask.errors import PlanError
from rasteret_dask.planning.plan import HarmonizeSpec
from rasteret_dask.rules.kinds import CLASS, KindName, kind_of
from rasteret_dask.table.assetkinds import check_kind_names, with_kinds
from rasteret_dask.table.itemkinds import Classes
from rasteret_dask.table.records import Records

__all__ = ["BandKind", "band_kinds", "check_kernel", "user_kinds", "with_one_kind"]


LABELS = "mask"
"""A source of this name holds what a model learns, as TorchGeo calls it: whole numbers of unknown kind are classes."""


@dataclass(frozen=True, slots=True)
class BandKind:
    """What the numbers of one output band are."""

    kind: KindName | None = None
    """None: unknown."""
    classes: Classes = ()
    """(code, name) of each class, by code, as far as records tell."""


def user_kinds(tables: Sequence[pa.Table], spec: HarmonizeSpec) -> list[pa.Table]:
    """Return record tables with the kinds that ``harmonize(kinds=)`` names.

    Raises
    ------
    BandError
        When no record has a band of that name. With ``bands=`` the assets of all others were not read, so then a name
        may belong to one of these.
    """
    kinds = spec.kinds or ()
    if spec.bands is None:
        check_kind_names(tables, kinds, "harmonize(kinds=)")
    return [with_kinds(table, kinds) for table in tables]


def band_kinds(
    source: str, tables: Sequence[Records], codes: Sequence[Sequence[str]], bands: Sequence[str]
) -> tuple[BandKind, ...]:
    """Return the kind of each output band.

    Parameters
    ----------
    source
        Name of the source, for messages.
    tables
        The records of each member.
    codes
        Per member, its own code of each output band.
    bands
        Names of the output bands.

    Notes
    -----
    Whole numbers of unknown kind are classes in a source called ``mask``, TorchGeo's name of what a model learns.

    Raises
    ------
    PlanError
        When records differ in what decides how a band is resampled: a class here, measured there.
    """
    return tuple(
        _band_kind(source, band, [(t, own[at]) for t, own in zip(tables, codes, strict=True)])
        for at, band in enumerate(bands)
    )


def _band_kind(source: str, band: str, members: Sequence[tuple[Records, str]]) -> BandKind:
    kinds: dict[KindName, None] = {}
    classes: dict[int, str] = {}
    for records, code in members:
        for name in records.distinct(code, "kind"):
            if name is not None:
                kinds.setdefault(name)
        for pairs in _distinct_classes(records, code):
            for value, name in pairs:
                classes.setdefault(value, name)
    found = [kind_of(name) for name in kinds]
    if len({(kind.kernels, kind.blend) for kind in found}) > 1:
        raise PlanError(
            f"band {band!r} of source {source!r}",
            f"records of kinds {' and '.join(kinds)}",
            "records of one kind",
            f"Name it: harmonize(kinds={{{band!r}: {next(iter(kinds))!r}}}); or choose the records of one kind.",
        )
    if not kinds:
        return BandKind("class" if source == LABELS and _is_whole(members) else None)
    first = next(iter(kinds))
    return BandKind(first, tuple(sorted(classes.items())) if first == CLASS.name else ())


def _is_whole(members: Sequence[tuple[Records, str]]) -> bool:
    dtypes = {d for records, code in members for d in records.distinct(code, "dtype")}
    return all(np.dtype(d).kind in "iub" for d in dtypes if d is not None)


def _distinct_classes(records: Records, code: str) -> list[list[tuple[int, str]]]:
    """Return the tables of classes among the records, each once."""
    texts = records.asset_field(code, "classes")
    if texts.null_count == len(texts):
        return []
    seen = {tuple((c["value"], c["name"]) for c in one or ()) for one in texts.to_pylist()}
    return [list(one) for one in sorted(seen) if one]


def with_one_kind(
    tables: Sequence[pa.Table], codes: Sequence[Sequence[str]], kinds: Sequence[BandKind]
) -> list[pa.Table]:
    """Return the members' tables, where records that are silent have the kind of the others."""
    result = []
    for table, own in zip(tables, codes, strict=True):
        records = Records(table)
        silent = [
            (code, band.kind)
            for code, band in zip(own, kinds, strict=True)
            if band.kind is not None and records.asset_field(code, "kind").null_count
        ]
        result.append(with_kinds(table, silent))
    return result


def check_kernel(source: str, resampling: str | None, kinds: Sequence[BandKind]) -> None:
    """Raise PlanError where a kernel was named that makes no sense for any band of a source.

    Beside measured bands a kernel is theirs: classes then keep their own, as ``explain()`` tells.
    """
    allowed = [kind_of(band.kind).kernels for band in kinds]
    kernel = "nearest" if resampling == "overview" else resampling
    if kernel is None or any(kernels is None or kernel in kernels for kernels in allowed):
        return
    names = " and ".join(sorted({str(band.kind) for band in kinds}))
    both = sorted(frozenset.intersection(*(k for k in allowed if k is not None)))
    raise PlanError(
        f"harmonize(resampling={resampling!r}) of source {source!r}",
        f"bands of kind {names}, whose numbers must not be averaged",
        f"resampling {' or '.join(map(repr, both))}",
        "Leave resampling out; where the numbers are measured, say so: harmonize(kinds={'band': 'continuous'}).",
    )
