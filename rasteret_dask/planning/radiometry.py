"""Which scale, offset and rule are applied to the records of a source."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.planning.resolve import ResolvedSource
from rasteret_dask.rules.radiometry import Radiometry

__all__ = ["radiometry_of"]


def radiometry_of(source: ResolvedSource, rows: NDArray[Any]) -> list[dict[str, Any]]:
    """Return each distinct (member, band, scale, offset, rule) of some records, and how many of them it applies to."""
    counted: Counter[tuple[Any, ...]] = Counter()
    for number, member in enumerate(source.plan.members):
        own = rows[source.member[rows] == number]
        for name, unit, band in zip(source.plan.bands, source.plan.rules.units, member.bands, strict=True):
            fields = [source.records.asset_field(band, f) for f in ("scale", "offset", "rule")]
            told = pa.table(dict(zip(("scale", "offset", "rule"), fields, strict=True))).take(pa.array(own))
            alike = told.group_by(["scale", "offset", "rule"], use_threads=False).aggregate(
                [([], "count_all")]
            )
            for scale, offset, rule, count in zip(*(c.to_pylist() for c in alike.columns), strict=True):
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
