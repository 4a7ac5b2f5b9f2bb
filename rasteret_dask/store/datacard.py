# SPDX-License-Identifier: Apache-2.0
"""The card of a store: what it holds and where that comes from, as Markdown for people and as Croissant for tools."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely

from rasteret_dask.chipping.chiptable import bounds_of, label_fields
from rasteret_dask.chipping.splits import touch_area
from rasteret_dask.lists import first_of
from rasteret_dask.net import remote
from rasteret_dask.store import ledger
from rasteret_dask.store.law import Law, read_law
from rasteret_dask.store.ledger import CARD, CHIPS, CROISSANT, RECIPE
from rasteret_dask.store.provenance import MemberOrigin, Provenance, read_provenance
from rasteret_dask.store.storetables import open_table

__all__ = ["card_objects"]

MOST_IDS = 200
"""Records of a member that the Markdown names; all are in ``_job/provenance.json``."""

MOST_SHAPES = 200_000
"""Chips up to which ground that splits share is looked for, and the bounds in degrees are told."""

MOST_VALUES = 20
"""Values of a label up to which they are counted."""

_CONFORMS = "http://mlcommons.org/croissant/1.0"

_CONTEXT: Mapping[str, Any] = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileProperty": "cr:fileProperty",
    "fileObject": "cr:fileObject",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}
"""The context of Croissant 1.0, as its reference library wants it."""


def card_objects(url: str, manifest: pa.Table) -> dict[str, bytes]:
    """Return the card of a store that is about to be committed, path -> bytes: the same of any run of its plan.

    Parameters
    ----------
    url
        The store: its tables and all that the plan knew are there.
    manifest
        A row a shard.
    """
    sums = (ledger.stated(url) or {})[CHIPS]
    with open_table(url, CHIPS, sums) as file:
        schema = file.schema_arrow
        own = [one.name for one in label_fields(schema)]
        names = ["chip_id", "split", "cell", "epsg", "xmin", "ymin", "xmax", "ymax", *own]
        small = file.metadata.num_rows <= MOST_SHAPES
        table = file.read([*names, *(["geometry"] if small else [])])
    card = _Card(
        url, manifest, table, schema, ledger.begun(url) or {}, read_provenance(url), read_law(url) or Law()
    )
    return {CARD: card.markdown().encode(), CROISSANT: card.croissant().encode()}


@dataclass(frozen=True)
class _Card:
    """What the card of one store says."""

    url: str
    manifest: pa.Table
    chips: pa.Table
    schema: pa.Schema
    mark: Mapping[str, Any]
    provenance: Provenance
    law: Law

    @property
    def name(self) -> str:
        """What the chips are called: equal stores have equal cards, wherever they lie."""
        return f"chips-{str(self.mark.get('digest'))[:12]}"

    @property
    def _title(self) -> str:
        sources = dict.fromkeys(one.source for one in self.provenance.origins)
        return f"Chips of {', '.join(sources)}" if sources else self.name

    @cached_property
    def kept(self) -> pa.Table:
        """The chips that no rule on pixels dropped."""
        gone = [
            chip for text in self.manifest["dropped_chips"].to_pylist() for chip in json.loads(text or "{}")
        ]
        return self.chips.filter(
            pc.invert(pc.is_in(self.chips["chip_id"], value_set=pa.array(gone, pa.string())))
        )

    @cached_property
    def splits(self) -> dict[str, pa.Table]:
        """Split -> its chips; "" where there are none."""
        column = pc.fill_null(self.kept["split"], "")
        return {name: self.kept.filter(pc.equal(column, name)) for name in column.unique().to_pylist()}

    @cached_property
    def shared(self) -> int | None:
        """Pairs of chips of two splits that share ground; None: there are too many to look at."""
        if self.kept.num_rows > MOST_SHAPES:
            return None
        pairs, epsg = 0, self.kept["epsg"].to_numpy()
        number = pc.fill_null(self.kept["split"], "").combine_chunks().dictionary_encode().indices.to_numpy()
        for code in np.unique(epsg).tolist():
            own = np.flatnonzero(epsg == code)
            boxes = shapely.box(*bounds_of(self.kept.take(pa.array(own))).T)
            first, second = shapely.STRtree(boxes).query(boxes, predicate="intersects")
            unlike = (first < second) & (number[own[first]] != number[own[second]])
            ground = shapely.area(shapely.intersection(boxes[first[unlike]], boxes[second[unlike]]))
            pairs += int(np.count_nonzero(ground > touch_area(code)))
        return pairs

    @property
    def masked(self) -> dict[str, float]:
        """Source -> share of invalid pixels of kept chips."""
        total, weight = dict[str, float](), dict[str, int]()
        for shares, kept in zip(
            self.manifest["masked"].to_pylist(), self.manifest["kept"].to_pylist(), strict=True
        ):
            for source, share in shares or ():
                total[source] = total.get(source, 0.0) + share * (kept or 0)
                weight[source] = weight.get(source, 0) + (kept or 0)
        return {source: round(total[source] / count, 4) for source, count in weight.items() if count}

    @property
    def bounds(self) -> list[float] | None:
        """West, south, east, north in degrees."""
        if "geometry" not in self.kept.column_names or not self.kept.num_rows:
            return None
        shapes = shapely.from_wkb(self.kept["geometry"].to_numpy(zero_copy_only=False))
        return [round(float(edge), 6) for edge in shapely.total_bounds(shapes)]

    @property
    def dates(self) -> list[str]:
        """First and last day of the records; none where nobody knows."""
        days = [str(day)[:10] for one in self.provenance.origins for day in (one.start, one.end) if day]
        return [min(days), max(days)] if days else []

    @property
    def licences(self) -> list[str]:
        """Licences of the records, each once."""
        own = (one.terms.licence_url or one.terms.licence for one in self.provenance.origins)
        return list(dict.fromkeys(filter(None, own)))

    @property
    def attributions(self) -> list[str]:
        """Sentences that licences ask for, each once."""
        return list(dict.fromkeys(filter(None, (one.terms.attribution for one in self.provenance.origins))))

    def labels(self) -> dict[str, list[tuple[str, str, int]]]:
        """Return for each label of few values: value, split, chips."""
        found = {}
        for one in label_fields(self.schema):
            counts = self.kept.group_by([one.name, "split"]).aggregate([("chip_id", "count")])
            if counts.num_rows and len(counts[one.name].unique()) <= MOST_VALUES:
                rows = counts.to_pylist()
                found[one.name] = sorted(
                    (str(row[one.name]), row["split"] or "", row["chip_id_count"]) for row in rows
                )
        return found

    # Markdown

    def markdown(self) -> str:
        """Return the card for people."""
        parts = [f"# {self._title}", self._summary(), "## Splits and statistics", self._splits()]
        parts += ["## Records", *map(_origin_text, self.provenance.origins)]
        if self.attributions:
            parts += ["## Attribution", "\n".join(f"- {text}" for text in self.attributions)]
        parts += ["## Plan", _fenced("python", "\n".join(self.provenance.steps)), self._facts()]
        recipe = _text(self.url, RECIPE)
        if recipe:
            parts += ["## Recipe", _fenced("toml", recipe)]
        parts += ["## Versions", self._versions()]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _summary(self) -> str:
        where = "" if self.bounds is None else f" Bounds (degrees): {', '.join(map(str, self.bounds))}."
        when = f" Scenes of {' to '.join(self.dates)}." if self.dates else ""
        licences = f" Licences of the scenes: {', '.join(self.licences)}." if self.licences else ""
        return (
            f"{self.kept.num_rows:,} chips of {len(self.splits)} splits, cut and written by rasteret_dask as Zarr v3."
            f"{where}{when}{licences} Open it with `rasteret_dask.open_chips(store)` or plain xarray."
        )

    def _splits(self) -> str:
        total = max(self.kept.num_rows, 1)
        rows = [
            [
                name or "none",
                f"{own.num_rows:,}",
                f"{own.num_rows / total:.1%}",
                len(own["cell"].drop_null().unique()),
            ]
            for name, own in self.splits.items()
        ]
        lines = [_table(["split", "chips", "share", "split cells"], rows)]
        dropped = self.chips.num_rows - self.kept.num_rows
        if dropped:
            lines.append(f"`filter_pixels` dropped {dropped:,} chips more.")
        lines += [f"Planning left out {count:,}: {why}." for why, count in self.provenance.dropped.items()]
        if self.shared is not None and len(self.splits) > 1:
            lines.append(f"Audit: {self.shared:,} pairs of chips of two splits share ground.")
        lines += [
            f"{share:.2%} of the pixels of `{name}` are invalid." for name, share in self.masked.items()
        ]
        unreadable = sum(count or 0 for count in self.manifest["unreadable"].to_pylist())
        if unreadable:
            lines.append(f"{unreadable:,} tiles could not be read; their pixels are invalid.")
        for name, counts in self.labels().items():
            lines.append(_table([name, "split", "chips"], [[v, s or "none", f"{n:,}"] for v, s, n in counts]))
        return "\n\n".join(lines)

    def _facts(self) -> str:
        """Return what sources are like; what steps were given stands in the plan."""
        rows = [[name, value] for name, value in self.law.facts.items() if "(" not in name]
        return _table(["", ""], rows) if rows else ""

    def _versions(self) -> str:
        rows: list[Sequence[Any]] = [
            ["written by", f"rasteret_dask {self.mark.get('version')} ({self.mark.get('writer')})"],
            ["format", self.mark.get("format")],
            ["meaning", self.mark.get("meaning")],
            ["plan", self.mark.get("digest")],
            ["compression", self.mark.get("compression")],
        ]
        return _table(["", ""], rows)

    # Croissant

    def croissant(self) -> str:
        """Return the card for tools: JSON-LD of Croissant 1.0."""
        document: dict[str, Any] = {
            "@context": _CONTEXT,
            "@type": "sc:Dataset",
            "name": self.name,
            "description": self._summary(),
            "conformsTo": _CONFORMS,
            "version": "1.0.0",
            "identifier": self.mark.get("digest"),
            "citeAs": " ".join(self.attributions) or f"{self.name}, written by rasteret_dask",
            "license": self.licences or ["not stated"],
            "isBasedOn": [_origin_json(one) for one in self.provenance.origins],
            "temporalCoverage": "/".join(self.dates),
            "distribution": self._files(),
            "recordSet": [self._records()],
        }
        if self.bounds is not None:
            west, south, east, north = self.bounds
            box = {"@type": "sc:GeoShape", "box": f"{south} {west} {north} {east}"}
            document["spatialCoverage"] = {"@type": "sc:Place", "geo": box}
        return json.dumps(document, indent=2, sort_keys=False) + "\n"

    def _files(self) -> list[dict[str, Any]]:
        data = remote.get(remote.join(self.url, CHIPS))
        return [
            {
                "@type": "cr:FileObject",
                "@id": CHIPS,
                "name": CHIPS,
                "description": "A row for each chip: place, split, the records that fed it, labels.",
                "contentUrl": CHIPS,
                "encodingFormat": "application/x-parquet",
                "sha256": hashlib.sha256(data).hexdigest(),
            },
            {
                "@type": "cr:FileSet",
                "@id": "arrays",
                "name": "arrays",
                "description": "Pixels, validity, masks and times of chips: Zarr v3 arrays, an object a shard.",
                "encodingFormat": "application/vnd.zarr",
                "includes": "**/c/**",
            },
        ]

    def _records(self) -> dict[str, Any]:
        names = ["chip_id", "split", "epsg", "xmin", "ymin", "xmax", "ymax"]
        fields = [self.schema.field(name) for name in names] + label_fields(self.schema)
        return {
            "@type": "cr:RecordSet",
            "@id": "chips",
            "name": "chips",
            "description": "The chip table.",
            "key": {"@id": "chips/chip_id"},
            "field": [
                {
                    "@type": "cr:Field",
                    "@id": f"chips/{one.name}",
                    "name": one.name,
                    "description": _MEANINGS.get(one.name, "A label of the chips."),
                    "dataType": _kind(one.type),
                    "source": {"fileObject": {"@id": CHIPS}, "extract": {"column": one.name}},
                }
                for one in fields
            ],
        }


_MEANINGS = {
    "chip_id": "Names the chip.",
    "split": "train, val or test, by ground.",
    "epsg": "CRS of the bounds.",
    **dict.fromkeys(("xmin", "ymin", "xmax", "ymax"), "An edge of the chip in its CRS."),
}


def _kind(kind: pa.DataType) -> str:
    of = pa.types
    if of.is_boolean(kind):
        return "sc:Boolean"
    if of.is_integer(kind):
        return "sc:Integer"
    if of.is_floating(kind) or of.is_decimal(kind):
        return "sc:Float"
    return "sc:Date" if of.is_date(kind) or of.is_timestamp(kind) else "sc:Text"


def _origin_text(one: MemberOrigin) -> str:
    licence = (
        f" Licence: {one.terms.licence} {one.terms.licence_url}".rstrip() + "." if one.terms.licence else ""
    )
    ids = first_of(one.ids, MOST_IDS) if one.ids else "not kept"
    return (
        f"**{one.source} / {one.member}**: {one.records:,} records of {', '.join(one.collections) or 'no collection'}, "
        f"{one.start[:10]} to {one.end[:10]}, from {', '.join(one.hosts)}.{licence}\n\n{ids}"
    )


def _origin_json(one: MemberOrigin) -> dict[str, Any]:
    return {
        "@type": "sc:CreativeWork",
        "name": f"{one.source} / {one.member}",
        "license": one.terms.licence_url or one.terms.licence or "not stated",
        "temporalCoverage": f"{one.start[:10]}/{one.end[:10]}",
        "identifier": list(one.ids),
    }


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines: list[Sequence[Any]] = [names, ["---"] * len(names), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def _fenced(language: str, text: str) -> str:
    fence = "```" if "```" not in text else "````"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}" if text else ""


def _text(url: str, path: str) -> str:
    try:
        return remote.get(remote.join(url, path)).decode("utf-8", "replace")
    except remote.MissingError:
        return ""
