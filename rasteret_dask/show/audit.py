"""Whether splits hold: achieved ratios, chips lost and why, ground shared between splits, distances."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from rasteret_dask.chipping.chips import PlannedChips
from rasteret_dask.chipping.leftover import leftover
from rasteret_dask.chipping.splits import SHARED_M2
from rasteret_dask.errors import PlanError
from rasteret_dask.grid import transformer

__all__ = ["Audit", "audit"]


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found."""

    chips: dict[str, int]
    """Chips per split."""
    ratios: dict[str, float]
    """Achieved share per split."""
    targets: dict[str, float]
    """Share that split() was asked for."""
    cells: dict[str, int]
    """Split cells per split; empty where windows are laid out freely."""
    lost: dict[str, int]
    """Chips (or windows, or records) left out, by reason."""
    overlaps: dict[str, int]
    """Pairs of chips of two splits that share ground; must be 0."""
    distance_m: dict[str, float]
    """Smallest distance between chips of two splits, metres."""
    uncovered: str = ""
    """The share of the ground that no chip of the grid covers, and what would do better; empty where there is none."""

    @property
    def ok(self) -> bool:
        """No two splits share ground."""
        return not any(self.overlaps.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        lines = ["split      chips   share   asked   cells"]
        for name in self.targets:
            cells = self.cells.get(name, 0)
            lines.append(
                f"{name:<9}{self.chips.get(name, 0):>7}{self.ratios.get(name, 0):>8.1%}"
                f"{self.targets[name]:>8.1%}{cells:>8}"
            )
        for pair, count in self.overlaps.items():
            far = self.distance_m[pair]
            lines.append(f"{pair}: {count} overlaps, at least {far:,.0f} m apart")
        lines += [f"lost: {n} ({why})" for why, n in self.lost.items()]
        lines += [f"not covered: {self.uncovered}"] * bool(self.uncovered)
        return "\n".join(lines)

    __repr__ = __str__


def audit(chips: PlannedChips) -> Audit:
    """Check the splits of a planned set of chips.

    Raises
    ------
    PlanError
        When the plan has no split step.
    """
    if chips.split is None:
        raise PlanError("audit", "no split step", "split(...) before audit()")
    names = chips.split.names
    split = np.array([n or "" for n in chips.table.column("split").to_pylist()], dtype=object)
    count = {n: int(np.sum(split == n)) for n in names}
    total = max(sum(count.values()), 1)
    cell = np.array([c or "" for c in chips.table.column("cell").to_pylist()], dtype=object)
    cells = {n: len(set(cell[split == n]) - {""}) for n in names}
    overlaps, distance = {}, {}
    for a, b in combinations([n for n in names if count[n]], 2):
        overlaps[f"{a}-{b}"], distance[f"{a}-{b}"] = _between(chips, split == a, split == b)
    left = leftover(chips.spec, chips.resolution)
    return Audit(
        count,
        {n: c / total for n, c in count.items()},
        dict(chips.split.ratios),
        cells,
        dict(chips.dropped),
        overlaps,
        distance,
        "" if left is None else left.text,
    )


def _between(chips: PlannedChips, first: NDArray[np.bool_], second: NDArray[np.bool_]) -> tuple[int, float]:
    """Return how many pairs share ground, and the smallest distance in metres."""
    epsg = chips.table.column("epsg").to_numpy()
    bounds = np.stack([chips.table.column(n).to_numpy() for n in ("xmin", "ymin", "xmax", "ymax")], -1)
    overlaps, nearest = 0, np.inf
    for code in np.unique(epsg[first]):
        own = _shapes(bounds[first & (epsg == code)])
        other = _others(chips, int(code), second, epsg, bounds)
        if not len(other):
            continue
        tree = shapely.STRtree(other)
        pairs = tree.query(own, predicate="intersects")
        shared = shapely.area(shapely.intersection(own[pairs[0]], other[pairs[1]]))
        overlaps += int(np.sum(shared > SHARED_M2))
        _, distance = tree.query_nearest(own, return_distance=True, all_matches=False)
        nearest = min(nearest, float(distance.min()))
    return overlaps, nearest


def _shapes(bounds: NDArray[np.float64]) -> NDArray[Any]:
    return np.asarray(shapely.box(*bounds.T), dtype=object)


def _others(
    chips: PlannedChips, code: int, chosen: NDArray[np.bool_], epsg: NDArray[Any], bounds: NDArray[np.float64]
) -> NDArray[Any]:
    """Return the chosen chips as shapes of one CRS; chips of the next zones are projected."""
    here = _shapes(bounds[chosen & (epsg == code)])
    there = np.flatnonzero(chosen & (epsg != code))
    if not len(there):
        return here
    wkb = chips.table.column("geometry").to_numpy(zero_copy_only=False)[there]
    to = transformer(4326, code)
    moved = shapely.transform(shapely.from_wkb(wkb), lambda p: np.stack(to.transform(p[:, 0], p[:, 1]), -1))
    near = np.isfinite(shapely.bounds(moved)).all(axis=1)
    return np.concatenate([here, np.asarray(moved, dtype=object)[near]])
