# SPDX-License-Identifier: Apache-2.0
"""A filter_pixels step on planned chips: which sources a rule speaks of, and what it needs of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa

from rasteret_dask.chipping.chips import PlannedChips
from rasteret_dask.errors import PlanError
from rasteret_dask.planning.plan import Rule
from rasteret_dask.planning.resolve import Member, ResolvedSource, all_readable
from rasteret_dask.rules.masks import QUALITY, clouds_of
from rasteret_dask.rules.picks import Ranked
from rasteret_dask.table.records import Records

__all__ = ["with_rule"]


def with_rule(chips: PlannedChips, rule: Rule) -> PlannedChips:
    """Add a rule that the pixels of chips must fulfil.

    Raises
    ------
    PlanError
        When it names no source, or ``max_cloud`` speaks of one without a quality band, or whose slots are picked or
        composed by pixels; or ``min_labelled`` of one without a mask.
    UnreadableAssetsError
        When the header of a quality band is not known.
    """
    names = [s.plan.name for s in chips.sources]
    known = f"one of {', '.join(names)}"
    if rule.source is not None and rule.source not in names:
        raise PlanError("filter_pixels(source=)", repr(rule.source), known)
    if rule.function is not None and rule.source is None and len(names) > 1:
        raise PlanError("filter_pixels(source=)", "a function for several joined sources", known)
    if rule.min_labelled is not None:
        _check_mask(chips, rule.source, names)
    sources = chips.sources
    if rule.max_cloud is not None:
        sources = tuple(
            _with_quality(s, rule.source is not None) if rule.source in (None, s.plan.name) else s
            for s in sources
        )
        if not any(m.clouds for s in sources if rule.source in (None, s.plan.name) for m in s.plan.members):
            raise PlanError(
                "filter_pixels(max_cloud=)", f"no quality band in {', '.join(names)}",
                f"a band {', '.join(q.band for q in QUALITY)}",
                "Build the collection with its quality band, or filter records by eo:cloud_cover.",
            )  # fmt: skip
    return replace(chips, sources=sources, pixel_rules=(*chips.pixel_rules, rule))


def _check_mask(chips: PlannedChips, source: str | None, names: list[str]) -> None:
    """Raise PlanError where nothing is burned into the pixels of a source (None: of any)."""
    remedy = "Burn polygons: chips(labels=, rasterize=); of a source of classes ask for its valid pixels: min_valid=."
    if not chips.labels:
        raise PlanError("filter_pixels(min_labelled=)", "chips without a mask", "a mask of labels", remedy)
    masked = names[chips.labels[0].source]
    if source not in (None, masked):
        raise PlanError(
            f"filter_pixels(min_labelled=) of source {source!r}", "no mask", f"source={masked!r}, which has it", remedy
        )  # fmt: skip


def _with_quality(source: ResolvedSource, named: bool) -> ResolvedSource:
    """Return a source whose members know their quality band; unchanged where one has none and it is not named."""
    plan = source.plan
    members, tables = [], []
    for number, member in enumerate(plan.members):
        records = Records(source.records.table.take(pa.array(np.flatnonzero(source.member == number))))
        clouds = clouds_of(records.bands)
        if clouds is None and named:
            raise PlanError(
                f"filter_pixels(max_cloud=) of source {plan.name!r}", f"no quality band in {member.name!r}",
                f"a band {', '.join(q.band for q in QUALITY)}", "Build the collection with its quality band.",
            )  # fmt: skip
        if clouds is None:
            return source
        members.append(replace(member, clouds=clouds))
        tables.append(records)
    if source.has_slots and not isinstance(plan.pick, Ranked):
        raise PlanError(
            f"filter_pixels(max_cloud=) of source {plan.name!r}", f"pick={plan.pick.name!r}, which looks at pixels",
            "a pick that the plan decides",
            "Mask them instead: harmonize(mask='clouds') and filter_pixels(min_valid=).",
        )  # fmt: skip
    all_readable(tables, tuple(Member(m.name, (), clouds=m.clouds) for m in members))
    return replace(source, plan=replace(plan, members=tuple(members)))
