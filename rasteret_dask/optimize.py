"""Rewrites a plan to touch fewer rows and bands; the result is the same, and a second pass changes nothing."""

from __future__ import annotations

import dataclasses
from functools import reduce

import shapely

from rasteret_dask.plan import (
    Chips,
    Filter,
    Harmonize,
    Join,
    Keep,
    Map,
    Merge,
    Node,
    Predicate,
    Sample,
    Select,
    Source,
    children,
    leaves,
    with_children,
)

__all__ = ["optimize"]

_AREA_MARGIN = 0.2
"""Degrees around an area of interest that may hold a chip reaching into it (a split cell is about 0.14)."""


def optimize(plan: Node) -> Node:
    """Return an equal plan whose sources scan only what the result needs.

    Notes
    -----
    Rules, applied until nothing changes: filters move below ``merge``, ``join``, ``harmonize`` and ``map`` into
    the scan; neighbouring filters and selections melt together; an area of interest becomes a filter on footprints
    (unless a time axis takes its range from all records); bands that nothing asks for are not read.
    """
    while True:
        better = _area(_bands(_push(plan), None))
        if better == plan:
            return plan
        plan = better


def _push(node: Node) -> Node:
    node = with_children(node, tuple(_push(child) for child in children(node)))
    match node:
        case Filter(child, ()):
            return child
        case Filter(Source() as source, where):
            return dataclasses.replace(source, where=_both(source.where, where))
        case Filter(Filter(child, inner), outer):
            return _push(Filter(child, _both(inner, outer)))
        case Filter(Merge(below), where):
            return Merge(tuple(_push(Filter(child, where)) for child in below))
        case Filter(Join(names, below), where):
            return Join(names, tuple(_push(Filter(child, where)) for child in below))
        case Filter(Harmonize(child, spec), where):
            return Harmonize(_push(Filter(child, where)), spec)
        case Filter(Map(child, function, source), where):
            return Map(_push(Filter(child, where)), function, source)
        case Merge(below) if any(isinstance(child, Merge) for child in below):
            flat: list[Node] = []
            for child in below:
                flat.extend(child.children if isinstance(child, Merge) else (child,))
            return Merge(tuple(flat))
        case Keep(Keep(child, inner), outer):
            return Keep(child, _both(inner, outer))
        case Select(Select(child, inner), outer):
            return Select(child, tuple(s for s in inner if s in outer))
        case Sample(Sample(child, small, seed, None), n, outer_seed, None) if seed == outer_seed:
            return Sample(child, min(small, n), seed, None)
    return node


def _both(inner: tuple[Predicate, ...], outer: tuple[Predicate, ...]) -> tuple[Predicate, ...]:
    return inner + tuple(p for p in outer if p not in inner)


def _bands(node: Node, wanted: tuple[str, ...] | None, quality: bool = False) -> Node:
    """Carry the bands that harmonize asks for down to the sources; None: all are needed."""
    if isinstance(node, Source):
        if node.bands is not None or wanted is None:
            return node
        return dataclasses.replace(node, bands=(*wanted, "@quality") if quality else wanted)
    if isinstance(node, Harmonize):
        quality = quality or bool(node.spec.mask) or node.spec.pick == "clearest"
        wanted = node.spec.bands if wanted is None else wanted
    if isinstance(node, Join):  # each source names its own bands
        wanted, quality = None, False
    return with_children(node, tuple(_bands(child, wanted, quality) for child in children(node)))


def _area(node: Node) -> Node:
    match node:
        case Chips(child, spec) if spec.aoi is not None and not _range_from_records(child):
            west, south, east, north = shapely.from_wkb(bytes.fromhex(spec.aoi)).bounds
            if abs(north) > 75 or abs(south) > 75 or west < -179 or east > 179:
                return node
            lon = _AREA_MARGIN * 4
            box = (west - lon, south - _AREA_MARGIN, east + lon, north + _AREA_MARGIN)
            return Chips(reduce(_push_filter, [("bbox", "intersects", box)], child), spec)
    return with_children(node, tuple(_area(child) for child in children(node)))


def _push_filter(node: Node, predicate: Predicate) -> Node:
    if all(predicate in source.where for source in leaves(node)):
        return node
    return _push(Filter(node, (predicate,)))


def _range_from_records(node: Node) -> bool:
    """Tell whether a time axis below takes its range from the first to the last record."""
    timed = isinstance(node, Harmonize) and node.spec.time is not None
    sampled = isinstance(node, Sample)
    ranged = all(
        any(p[1] == "overlaps" and isinstance(p[2], tuple) and None not in p[2] for p in source.where)
        for source in leaves(node)
    )
    return (timed and not ranged) or sampled or any(_range_from_records(child) for child in children(node))
