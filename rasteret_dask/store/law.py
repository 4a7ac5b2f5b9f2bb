# SPDX-License-Identifier: Apache-2.0
"""What the parts of a store share: a plan without its area, its dates and the values of its labels."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from rasteret_dask.chipping.chiptable import MASK
from rasteret_dask.net import remote
from rasteret_dask.net.sums import document_of, sealed
from rasteret_dask.planning.meta import TEXT
from rasteret_dask.planning.plan import (
    ChipSpec,
    CutChips,
    Filter,
    FilterPixels,
    Harmonize,
    HarmonizeSpec,
    Join,
    Map,
    Merge,
    Node,
    Random,
    Sample,
    Source,
    Split,
    SplitSpec,
    changes,
    children,
    from_json,
    leaves,
    to_json,
)
from rasteret_dask.store.ledger import LAW
from rasteret_dask.tasks.job import Job, Output

__all__ = ["Law", "law_of", "read_law"]

MAY_DIFFER = frozenset(
    {"datetime", "start_datetime", "end_datetime", "bbox", "geometry", "proj:bbox", "proj:geometry"}
)
"""Columns of records that say when and where: what is asked of these is area and dates."""

_AREA = ("aoi", "at", "labels")


@dataclass(frozen=True, slots=True)
class Law:
    """What every part of a store has in common with the others."""

    facts: Mapping[str, str] = field(default_factory=dict)
    """What it is called -> its value, both for messages: ``"chips(size=)"`` -> ``"64"``."""
    spec: ChipSpec | None = None
    """Which windows become chips, without their area."""
    split: SplitSpec | None = None
    """How the ground is shared out."""
    resolution: float | None = None
    """Pixel size of the reference source, metres."""

    def to_bytes(self) -> bytes:
        """Return it as a JSON document with its checksum."""
        values = {
            "facts": dict(self.facts),
            "spec": None if self.spec is None else to_json(self.spec),
            "split": None if self.split is None else to_json(self.split),
            "resolution": self.resolution,
        }
        return sealed(values)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> Law:
        """Return what :meth:`to_bytes` wrote."""
        spec, split = (
            None if document[name] is None else from_json(document[name]) for name in ("spec", "split")
        )
        return cls(document["facts"], spec, split, document["resolution"])

    def differences(self, other: Law) -> Iterator[tuple[str, str, str]]:
        """Yield what differs: its name, the value here, and the other's."""
        for name in dict.fromkeys([*self.facts, *other.facts]):
            mine, theirs = self.facts.get(name, "none"), other.facts.get(name, "none")
            if mine.replace("null", "none") != theirs.replace(
                "null", "none"
            ):  # what an earlier version did not know
                yield name, mine, theirs


def read_law(url: str) -> Law | None:
    """Return what the parts of a store share; None where an earlier version wrote it, or it is damaged."""
    try:
        document = document_of(remote.get(remote.join(url, LAW)))
    except remote.MissingError:
        return None
    return None if document is None else Law.of(document)


def law_of(plan: Node, job: Job, outputs: Sequence[Output]) -> Law:
    """Return what every part that is appended to the store of a plan must share with it.

    Parameters
    ----------
    plan
        All steps.
    job
        What they became.
    outputs
        For each source, what its pixels look like.
    """
    facts: dict[str, str] = {}
    split: SplitSpec | None = None
    sizes: list[int | None] = []
    node = plan
    while not isinstance(node, CutChips):  # of steps on chips, those that only choose some count as area
        match node:
            case Split(_, split_spec):
                # the last one decides; cells that keep their split, or are dealt later, are looked at one by one
                split = split or replace(split_spec, cells=None, raster=None)
            case FilterPixels(_, rule):
                facts[f"filter_pixels() no. {1 + sum(one.startswith('filter_pixels') for one in facts)}"] = (
                    _text(rule)
                )
            case Map(_, function, source):
                facts[f"map({function.name}) of {source or 'all sources'}"] = _text(function)
            case Random(size=size):
                sizes.append(size)
        (node,) = children(node)
    spec = replace(node.spec, aoi=None, at=None, labels=None)
    if sizes:  # the last step decides; how many windows, and where, counts as area
        size = next((size for size in sizes if size is not None), spec.size)
        spec = replace(spec, size=size, stride=size, drawn=True)
    facts |= {
        f"chips({one.name}=)": _text(getattr(spec, one.name))
        for one in fields(spec)
        if one.name not in _AREA and (getattr(spec, one.name) or one.name not in ("drawn", "context_m"))
    }
    facts["chips(at=)"] = "none" if node.spec.at is None else "places of a table"
    facts["chips(labels=)"] = "none" if node.spec.labels is None else "polygons of a table"
    if split is None:
        facts["split"] = "none"
    else:
        facts |= {f"split({one.name}=)": _text(getattr(split, one.name)) for one in fields(split)}
    for name, value in _record_facts(node.child, ""):
        facts[name] = f"{facts[name]}; {value}" if name in facts else value
    names = [source.name for source in job.sources]
    reference = job.sources[names.index(spec.reference) if spec.reference in names else 0]
    return Law(facts | _output_facts(job, outputs), spec, split, reference.resolution)


def _record_facts(node: Node, label: str) -> Iterator[tuple[str, str]]:
    """Yield what steps on records say but area and dates; ``label`` is the source that they belong to."""
    name = label or leaf_label(node)
    match node:
        case Source(_, _, where) | Filter(_, where):
            rest = [one for one in where if one[0] not in MAY_DIFFER]
            if rest:
                yield f"filter of {name}", _text(sorted(map(_text, rest)))
        case Sample(_, n, seed, by):
            yield f"sample of {name}", _text([n, seed, by])
        case Harmonize(_, spec):
            for field_name, value in changes(spec, HarmonizeSpec()).items():
                yield f"harmonize({field_name}=) of {name}", _text(value)
        case Map(_, function, source):
            yield f"map({function.name}) of {source or name}", _text(function)
        case Join(names, below):
            yield "sources", ", ".join(names)
            for one, child in zip(names, below, strict=True):
                yield from _record_facts(child, one)
            return
        case Merge(below):
            yield f"merge of {name}", ", ".join(leaf_label(child) for child in below)
            for child in below:
                yield from _record_facts(child, leaf_label(child))
            return
    for child in children(node):
        yield from _record_facts(child, label)


def leaf_label(node: Node) -> str:
    """Return the names of the collections below a step."""
    return "+".join(leaf.name for leaf in leaves(node))


def _output_facts(job: Job, outputs: Sequence[Output]) -> dict[str, str]:
    """Return what pixels look like, in the words of :func:`rasteret_dask.store.union.likeness`."""
    found: dict[str, str] = {}
    for plan, out in zip(job.sources, outputs, strict=True):
        name = f"source {plan.name!r}"
        found |= {
            f"bands of {name}": ", ".join(out.bands),
            f"dtype of {name}": out.dtype,
            f"size of {name}": f"{out.height} x {out.width} pixels",
            f"pixel size of {name}": f"{plan.resolution:.10g} m",
            f"units of {name}": ", ".join(out.units) or "none",
            f"kinds of {name}": ", ".join(out.kind_names),
            f"scale of {name}": str(1 if out.scale is None else out.scale),
            f"time axis of {name}": "none" if out.slots is None else "slots",
            f"burned labels of {name}": _mask_text(out),
        }
        if out.meta:
            kinds = ("text" if kind == TEXT else kind for _, kind in out.meta)
            told = [f"{one} ({kind})" for one, kind in zip(out.meta_names, kinds, strict=True)]
            found[f"meta of {name}"] = ", ".join(told)
    if job.labels:
        attrs = [labels.attrs for labels in job.labels]
        found["classes of labels"] = _text(attrs[0] if len(attrs) == 1 else attrs)
    return found


def _mask_text(out: Output) -> str:
    """Return the dtype of the mask, or of several with their names."""
    if len(out.masks) == 1 and out.masks[0][0] == MASK:
        return out.masks[0][1]
    return ", ".join(f"{name} ({dtype})" for name, dtype in out.masks) or "none"


def _text(value: Any) -> str:
    """Return a value of a plan as short text: what JSON says of it."""
    plain = to_json(value)
    return plain if isinstance(plain, str) else json.dumps(plain, sort_keys=True)
