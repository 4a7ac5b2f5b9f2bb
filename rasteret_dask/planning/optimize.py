# SPDX-License-Identifier: Apache-2.0
"""Rewrites a plan to touch fewer rows and bands; the result is the same, and a second pass changes nothing."""

from __future__ import annotations

import dataclasses

from rasteret_dask.planning.plan import (
    CutChips,
    Filter,
    FilterChips,
    FilterPixels,
    Harmonize,
    Join,
    Map,
    Merge,
    Node,
    Predicate,
    Sample,
    Select,
    Source,
    children,
    is_filtered,
    near_area,
    with_children,
)
from rasteret_dask.planning.scan import named_in
from rasteret_dask.rules.masks import ANY_QUALITY
from rasteret_dask.rules.picks import Scored

__all__ = ["named_bands", "optimize"]


def optimize(plan: Node) -> Node:
    """Return an equal plan whose sources scan only what the result needs.

    Notes
    -----
    Rules, applied until nothing changes: filters move below ``merge``, ``join``, ``harmonize`` and ``map`` into
    the scan; neighbouring filters and selections melt together; the records that ``plan.near_area`` leaves are
    chosen in the scan too; bands that nothing asks for are not read.
    """
    while True:
        better = _area(named_bands(_push(plan)))
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
        case Filter(Join(_, below) as join, where):
            return dataclasses.replace(join, children=tuple(_push(Filter(child, where)) for child in below))
        case Filter(Harmonize(child, spec), where):
            return Harmonize(_push(Filter(child, where)), spec)
        case Filter(Map(child, function, source), where):
            return Map(_push(Filter(child, where)), function, source)
        case Merge(below) if any(isinstance(child, Merge) for child in below):
            flat: list[Node] = []
            for child in below:
                flat.extend(child.children if isinstance(child, Merge) else (child,))
            return Merge(tuple(flat))
        case FilterChips(FilterChips(child, inner), outer):
            return FilterChips(child, _both(inner, outer))
        case Select(Select(child, inner), outer):
            return Select(child, tuple(s for s in inner if s in outer))
        case Sample(Sample(child, small, seed, None), n, outer_seed, None) if seed == outer_seed:
            return Sample(child, min(small, n), seed, None)
    return node


def _both(inner: tuple[Predicate, ...], outer: tuple[Predicate, ...]) -> tuple[Predicate, ...]:
    return inner + tuple(p for p in outer if p not in inner)


def named_bands(node: Node) -> Node:
    """Return a plan whose sources name the bands they need; what ``readable`` means depends on them."""
    return _bands(node, None)


def _bands(
    node: Node, wanted: tuple[str, ...] | None, rules: tuple[str, ...] = (), clouds: tuple[str, ...] = ()
) -> Node:
    """Carry the bands that harmonize asks for down to the sources; None: all are needed.

    ``rules`` are those that its mask and pick need beside them, ``clouds`` those of rules on pixels.
    """
    if isinstance(node, Source | Filter) and wanted is not None:
        wanted = tuple(dict.fromkeys((*wanted, *named_in(node.where))))
    if isinstance(node, Source):
        if node.bands is not None or wanted is None:
            return node
        return dataclasses.replace(node, bands=tuple(dict.fromkeys((*wanted, *rules, *clouds))))
    if isinstance(node, Harmonize):
        rules += () if node.spec.mask is None else node.spec.mask.needs
        rules += (ANY_QUALITY,) if isinstance(node.spec.pick, Scored) else ()
        wanted = node.spec.bands if wanted is None else wanted
    if isinstance(node, FilterPixels):
        clouds += () if node.spec.max_cloud is None else (ANY_QUALITY,)
    if isinstance(node, Join):  # each source names its own bands
        wanted, rules = None, ()
    return with_children(node, tuple(_bands(child, wanted, rules, clouds) for child in children(node)))


def _area(node: Node) -> Node:
    match node:
        case CutChips(child, spec) if (near := near_area(spec)) is not None and not is_filtered(child, near):
            return CutChips(_push(Filter(child, (near,))), spec)
    return with_children(node, tuple(_area(child) for child in children(node)))
