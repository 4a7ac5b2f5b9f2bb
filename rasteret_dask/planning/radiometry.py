# SPDX-License-Identifier: Apache-2.0
"""Which scale, offset and rule are applied to the records of a source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.planning.resolve import SourceRecords
from rasteret_dask.rules.radiometry import Radiometry
from rasteret_dask.table.records import Records

__all__ = ["radiometry_of"]


def radiometry_of(source: SourceRecords, rows: NDArray[Any]) -> list[dict[str, Any]]:
    """Return each distinct (member, band, scale, offset, rule) of some records, and how many of them it applies to."""
    counted: Counter[tuple[Any, ...]] = Counter()
    for number, member in enumerate(source.plan.members):
        own = rows[source.member[rows] == number]
        for name, unit, band in zip(source.plan.bands, source.plan.rules.units, member.bands, strict=True):
            for scale, offset, rule, count in _alike(source.records, band, own):
                applied = unit.scales
                known = (scale, offset) if applied else (None, None)
                words = unit.describe(Radiometry(scale or 1.0, offset or 0.0, rule or "identity"))
                counted[(member.name, name, band, unit.name, *known, words)] += count
    return [
        {
            "member": member, "band": name, "code": code, "unit": unit, "scale": scale, "offset": offset,
            "rule": rule, "records": count,
        }
        for (member, name, code, unit, scale, offset, rule), count in counted.items()
    ]  # fmt: skip


def _alike(records: Records, band: str, rows: NDArray[Any]) -> Iterator[tuple[Any, ...]]:
    """Yield (scale, offset, rule, how many of some records have them) of one band."""
    names = ("scale", "offset", "rule")
    every = [records.distinct(band, name) for name in names]
    if len(rows) and all(len(values) == 1 for values in every):  # most bands: nothing has to be counted
        yield (*(value for (value,) in every), len(rows))
        return
    told = pa.table({name: records.asset_field(band, name) for name in names}).take(pa.array(rows))
    alike = told.group_by(list(names), use_threads=False).aggregate([([], "count_all")])
    yield from zip(*(column.to_pylist() for column in alike.columns), strict=True)
