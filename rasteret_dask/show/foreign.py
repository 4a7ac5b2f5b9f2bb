# SPDX-License-Identifier: Apache-2.0
"""Splits that others made: whether their ground overlaps, how much of it leaks, how far they lie apart."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from rasteret_dask.display.card import counted
from rasteret_dask.display.html import card, markup, shares, table, verdict
from rasteret_dask.errors import PlanError
from rasteret_dask.geometries.areas import as_labels
from rasteret_dask.grid import transformer
from rasteret_dask.planning.names import in_order
from rasteret_dask.planning.plan import is_number
from rasteret_dask.show.audit import Ground, between
from rasteret_dask.zones import UTM

__all__ = ["Leak", "audit"]

EQUAL_AREA = 6933
"""EPSG code of the map on which areas are measured: EASE-Grid 2.0, which shows every area as it is."""

DENSE_DEG = 0.01
"""Edges longer than this get vertices before they are projected."""


@dataclass(frozen=True)
class Leak:
    """What :func:`rasteret_dask.audit` found.

    Examples
    --------
    >>> leak = rd.audit(chips.table.select(["geometry", "split"]), resolution=10)
    >>> leak.ok, leak.overlaps
    (True, {'train-val': 0, 'train-test': 0, 'val-test': 0})
    """

    samples: dict[str, int]
    """Samples per split."""
    overlaps: dict[str, int]
    """Pairs of samples of two splits that share ground; must be 0."""
    shared_m2: dict[str, float]
    """Ground that two splits share, each place counted once, square metres."""
    shared_px: dict[str, int]
    """Pixels of ``resolution`` that this ground has."""
    shared_share: dict[str, float]
    """The same as a share of the ground of the second split."""
    distance_m: dict[str, float]
    """Smallest distance between samples of two splits, metres."""
    resolution: float
    """Metres a pixel."""
    lost: dict[str, int]
    """Samples without a split."""

    @property
    def ok(self) -> bool:
        """No two splits share ground.

        Examples
        --------
        >>> rd.audit(chips.table.select(["geometry", "split"])).ok
        True
        """
        return not any(self.overlaps.values())

    @property
    def verdict(self) -> str:
        """What was found, in a sentence.

        Examples
        --------
        >>> rd.audit(chips.table.select(["geometry", "split"])).verdict
        'no two splits share ground'
        """
        if self.ok:
            return "no two splits share ground"
        pairs = counted(sum(self.overlaps.values()), "pair")
        pixels = counted(sum(self.shared_px.values()), "pixel")
        return f"{pairs} of samples share ground: {pixels} of {self.resolution:g} m leak"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values.

        Examples
        --------
        >>> rd.audit(chips.table.select(["geometry", "split"])).to_dict()["ok"]
        True
        """
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        lines = [f"{'ok' if self.ok else 'NOT ok'}: {self.verdict}"]
        lines += [f"{name}: {count:,} samples" for name, count in self.samples.items()]
        for pair, count in self.overlaps.items():
            if count:
                lines.append(
                    f"{pair}: {count:,} overlaps, {self.shared_m2[pair]:,.0f} m2 = {self.shared_px[pair]:,} pixels, "
                    f"{self.shared_share[pair]:.1%} of {pair.rpartition('-')[2]}"
                )
            else:
                lines.append(f"{pair}: 0 overlaps, at least {self.distance_m[pair]:,.0f} m apart")
        lines += [f"{why}: {count:,}" for why, count in self.lost.items()]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        pairs = [
            [pair, n, self.shared_px[pair], f"{self.shared_share[pair]:.1%}", f"{self.distance_m[pair]:,.0f}"]
            for pair, n in self.overlaps.items()
        ]
        head = ["splits", "pairs that share ground", "pixels", "share of the second", "at least apart, m"]
        rows = [("splits", shares(self.samples)), ("pairs", table(head, pairs))]
        rows.append(("pixels", markup(f"of {self.resolution:g} m")))
        return card(verdict(self.ok, f"Audit: {self.verdict}"), rows)


def audit(
    samples: Any, split: str = "split", *, resolution: float = 10.0, window_m: float | None = None
) -> Leak:
    """Check splits that somebody else made: any table of geometries with a split each.

    Parameters
    ----------
    samples
        A GeoDataFrame, an Arrow table with WKB ``geometry`` in lon/lat, or the path of a GeoParquet file.
    split
        The column that says which split a sample is in; rows without one are counted as lost.
    resolution
        Metres a pixel, to say how many pixels leak.
    window_m
        Metres: points become windows of this side around them, as models are given them. None: points have no area.

    Returns
    -------
    Leak
        How many pairs of samples of two splits share ground, how much ground that is, and how near splits come.

    Raises
    ------
    PlanError
        When there is no such column, no geometry, or a number is not above 0.

    Notes
    -----
    Areas are measured on EPSG:6933, which shows every area as it is; distances on the UTM zone of each sample, within a
    thousandth of the ground's. Samples that only touch share no ground.

    Examples
    --------
    >>> import geopandas, shapely
    >>> frame = geopandas.GeoDataFrame(
    ...     {"split": ["train", "test"]}, geometry=[shapely.Point(15.0, 50.0), shapely.Point(15.002, 50.0)], crs=4326
    ... )
    >>> rd.audit(frame).ok, rd.audit(frame, window_m=320).ok
    (True, False)
    """
    for name, value in (("resolution", resolution), ("window_m", 1.0 if window_m is None else window_m)):
        if not (is_number(value) and value > 0):
            raise PlanError(f"audit({name}=)", repr(value), "a number of metres above 0")
    rows = _rows(samples)
    if split not in rows.column_names:
        own = [name for name in rows.column_names if name != "geometry"]
        raise PlanError(
            f"audit(split={split!r})",
            "no such column",
            f"one of {', '.join(own) or 'none: there are no columns'}",
        )
    texts = rows.column(split).cast(pa.string())
    names = list(in_order(pc.unique(texts.drop_null()).to_pylist()))
    place = pc.index_in(texts, value_set=pa.array(names, pa.string()))
    number = np.asarray(pc.fill_null(place, -1).to_numpy(), dtype=np.int64)
    wkb = rows.column("geometry").to_numpy(zero_copy_only=False)
    shapes, epsg = _on_zones(shapely.from_wkb(wkb), window_m)
    ground = Ground.of_shapes(epsg, shapes)
    samples_of = {name: int(np.sum(number == at)) for at, name in enumerate(names)}
    pairs = list(combinations(range(len(names)), 2))
    flat = ground.on(EQUAL_AREA)
    overlaps, distance, shared, share = {}, {}, {}, {}
    for one, other in pairs:
        pair = f"{names[one]}-{names[other]}"
        a, b = np.flatnonzero(number == one), np.flatnonzero(number == other)
        overlaps[pair], distance[pair] = between(ground, a, b)
        shared[pair] = _shared(flat[a], flat[b]) if overlaps[pair] else 0.0
        whole = float(shapely.area(shapely.union_all(flat[b]))) if overlaps[pair] else 0.0
        share[pair] = shared[pair] / whole if whole else 0.0
    lost = {f"sample without a {split}": int(np.sum(number < 0))} if np.any(number < 0) else {}
    pixels = {pair: round(area / resolution**2) for pair, area in shared.items()}
    return Leak(samples_of, overlaps, shared, pixels, share, distance, float(resolution), lost)


def _rows(samples: Any) -> pa.Table:
    if isinstance(samples, str | os.PathLike):
        import geopandas

        if not Path(samples).exists():
            raise PlanError(f"audit({os.fspath(samples)!r})", "no such file", "a GeoParquet file")
        samples = geopandas.read_parquet(samples)
    if isinstance(samples, pa.Table) and "geometry" in samples.column_names:
        samples = samples.filter(pc.is_valid(samples.column("geometry")))
    return as_labels(samples)


def _on_zones(shapes: NDArray[Any], window_m: float | None) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return shapes in the UTM zone of each, and the zones."""
    centre = shapely.centroid(shapes)
    lon, lat = shapely.get_x(centre), shapely.get_y(centre)
    epsg = UTM.codes((lon + 180.0) % 360.0 - 180.0, lat)
    result = np.empty(len(shapes), dtype=object)
    for code in np.unique(epsg).tolist():
        here = epsg == code
        dense = shapely.segmentize(shapes[here], DENSE_DEG)
        result[here] = shapely.transform(dense, _mover(4326, code))
    points = shapely.get_type_id(result) == shapely.GeometryType.POINT.value
    if window_m is not None and points.any():
        x, y = shapely.get_x(result[points]), shapely.get_y(result[points])
        half = window_m / 2
        result[points] = shapely.box(x - half, y - half, x + half, y + half)
    return result, epsg


def _mover(source: int, target: int) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    to = transformer(source, target)
    return lambda p: np.stack(to.transform(p[:, 0], p[:, 1]), -1)


def _shared(first: NDArray[Any], second: NDArray[Any]) -> float:
    """Return the ground that two sets of shapes share, each place once, square metres."""
    one, other = shapely.STRtree(second).query(first, predicate="intersects")
    parts = shapely.intersection(first[one], second[other])
    return float(shapely.area(shapely.union_all(parts)))
