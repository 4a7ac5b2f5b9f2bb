"""Which records feed which slot of which chip of the README's job: worked out from its items by plain rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import shapely
from jobs import Box, ReadmeJob
from pyproj import Transformer

MONTHS = ("2024-04", "2024-05", "2024-06")
MIDDLES = tuple(np.datetime64(f"{month}-16T00:00:00") for month in MONTHS)


@dataclass(frozen=True)
class Source:
    """A record that feeds a slot of a chip."""

    sensor: str
    """``"s2"`` or ``"l8"``."""
    number: int
    """Of its item."""


@dataclass(frozen=True)
class _Footprint:
    source: Source
    acquisition: str
    shape: Any
    """Polygon in the job's CRS."""
    when: np.datetime64
    cloud_pct: float
    id: str

    @property
    def centre(self) -> tuple[float, float]:
        west, south, east, north = self.shape.bounds
        return (west + east) / 2, (south + north) / 2


def sources(job: ReadmeJob, chips: Sequence[Box]) -> list[tuple[tuple[Source, ...], ...]]:
    """Return for each chip and month the records that feed it, each filling what those before leave invalid.

    The acquisition with the least cloud on the mean of its records that touch the chip comes first, its records by
    the distance of their middles from the chip's. With ``job.fill`` the others follow: those that cover the chip
    before those that do not, then by cloud.
    """
    footprints = list(_footprints(job))
    return [tuple(_slot(job, footprints, shapely.box(*chip), month) for month in range(3)) for chip in chips]


def _footprints(job: ReadmeJob) -> Any:
    to = Transformer.from_crs(4326, job.epsg, always_xy=True).transform
    for sensor in ("s2", "l8"):
        for number, item in enumerate(job.load_items()[sensor]):
            properties: Mapping[str, Any] = item["properties"]
            if properties["eo:cloud_cover"] >= job.cloud_cover_lt:
                continue
            ring = np.array(item["geometry"]["coordinates"][0])
            yield _Footprint(
                Source(sensor, number),
                properties.get("s2:datatake_id", item["id"]),
                shapely.Polygon(np.stack(to(ring[:, 0], ring[:, 1]), -1)),
                np.datetime64(properties["datetime"].removesuffix("Z")),
                properties["eo:cloud_cover"],
                item["id"],
            )


def _slot(job: ReadmeJob, footprints: list[_Footprint], chip: Any, month: int) -> tuple[Source, ...]:
    acquisitions: dict[str, list[_Footprint]] = {}
    for one in footprints:
        if str(one.when).startswith(MONTHS[month]) and one.shape.intersection(chip).area > 1:
            acquisitions.setdefault(one.acquisition, []).append(one)

    def rank(records: list[_Footprint]) -> tuple[Any, ...]:
        covered = shapely.union_all([r.shape for r in records]).intersection(chip).area / chip.area
        cloud = sum(r.cloud_pct for r in records) / len(records)
        return job.fill and covered < 0.999, cloud, abs(min(r.when for r in records) - MIDDLES[month])

    def nearness(record: _Footprint) -> tuple[float, str]:
        x, y = record.centre
        return round(float(np.hypot(x - chip.centroid.x, y - chip.centroid.y)), 2), record.id

    ordered = sorted(acquisitions.values(), key=rank)
    return tuple(r.source for a in (ordered if job.fill else ordered[:1]) for r in sorted(a, key=nearness))
