"""Which scale, offset and rule are applied to the records of a source."""

from __future__ import annotations

from collections import Counter
from typing import Any

from numpy.typing import NDArray

from rasteret_dask.planning.resolve import ResolvedSource

__all__ = ["radiometry_of"]

_RULES = {"raw": "raw: none applied", "embedding": "embedding: sign(v) x (|v| / 127.5)^2, then unit length"}


def radiometry_of(source: ResolvedSource, rows: NDArray[Any]) -> list[dict[str, Any]]:
    """Return each distinct (member, band, scale, offset, rule) of some records, and how many of them it applies to."""
    counted: Counter[tuple[Any, ...]] = Counter()
    for number, member in enumerate(source.plan.members):
        own = rows[source.member[rows] == number]
        for name, band in zip(source.plan.bands, member.bands, strict=True):
            fields = [source.records.asset_field(band, f).to_pylist() for f in ("scale", "offset", "rule")]
            for row in own.tolist():
                counted[(member.name, name, band, *(f[row] for f in fields))] += 1
    applied = source.plan.units == "reflectance"
    return [
        {
            "member": m, "band": n, "code": b, "scale": s if applied else None, "offset": o if applied else None,
            "rule": r if applied else _RULES[source.plan.units], "records": count,
        }
        for (m, n, b, s, o, r), count in counted.items()
    ]  # fmt: skip
