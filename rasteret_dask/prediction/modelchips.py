# SPDX-License-Identifier: Apache-2.0
"""Chips as models take them: a frozen plan, with what a map or a table of answers asks of it beside."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from rasteret_dask.chipping.chips import PlannedChips
from rasteret_dask.chipping.covering import extents_of, map_extents
from rasteret_dask.grid import Bounds
from rasteret_dask.store.provenance import Provenance
from rasteret_dask.tasks.context import Functions
from rasteret_dask.tasks.job import Job

__all__ = ["ChipGround", "ModelChips", "ground_of"]


@dataclass(frozen=True)
class ChipGround:
    """What of a plan its job does not say: on which maps chips lie, and when their slots begin and end."""

    size: int
    """Side of a chip, pixels of the reference source."""
    size_m: float
    """Side of a chip, in the unit of the CRS."""
    zones: tuple[tuple[int, str, Bounds], ...]
    """For each CRS of the chips: its number, its name, and the edges of a map."""
    dated: tuple[str, ...]
    """Sources that do not hold at any time."""
    span: tuple[np.datetime64, np.datetime64] | None
    """Begin and end of the slots that all chips share; None: there are none, and records say when chips were taken."""

    def around(self, chips: pa.Table) -> ChipGround:
        """Return the same of some of the chips, which are those of splits: such chips do not cover an area."""
        extents = extents_of(chips)
        zones = tuple((code, name, extents[code]) for code, name, _ in self.zones if code in extents)
        return replace(self, zones=zones)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "size": self.size,
            "size_m": self.size_m,
            "zones": [[code, name, list(edges)] for code, name, edges in self.zones],
            "dated": list(self.dated),
            "span": None if self.span is None else [str(edge.astype("datetime64[us]")) for edge in self.span],
        }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> ChipGround:
        """Return what :meth:`to_json` returned."""
        span = values["span"]
        zones = tuple((int(code), str(name), tuple(edges)) for code, name, edges in values["zones"])
        moments = None if span is None else (np.datetime64(span[0], "us"), np.datetime64(span[1], "us"))
        return cls(values["size"], values["size_m"], zones, tuple(values["dated"]), moments)


@dataclass(frozen=True)
class ModelChips:
    """Chips as models take them."""

    job: Job
    functions: Functions
    ground: ChipGround
    provenance: Provenance

    @property
    def chips(self) -> int:
        """How many they are."""
        return sum(h.chips for h in self.job.hierarchies)


def ground_of(planned: PlannedChips) -> ChipGround:
    """Return what of a plan its job does not say."""
    extents = map_extents(planned)
    zones = tuple((code, _zone_name(planned, code), extents[code]) for code in sorted(extents))
    dated = [own for own in planned.sources if not own.is_static]
    shared = [own.axis for own in dated if own.axis is not None and own.chip_times is None]
    span = None
    if shared and len(shared) == len(dated):
        span = min(axis.start.min() for axis in shared), max(axis.end.max() for axis in shared)
    names = tuple(own.plan.name for own in dated)
    return ChipGround(planned.spec.size, planned.size_m, zones, names, span)


def _zone_name(chips: PlannedChips, code: int) -> str:
    """Return what ids of a zone's chips begin with; of windows laid otherwise the CRS's number."""
    zones = getattr(chips.spec.grid, "zones", None)
    name = zones.name(code) if zones is not None and zones.has(code) else str(abs(code))
    return name.replace("/", "-")
