# SPDX-License-Identifier: Apache-2.0
"""Where everything of a job goes inside its store, as metadata documents of sharded Zarr."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import FILLED, META, PRESENT, bounds_of, label_columns, label_fields
from rasteret_dask.crs import unpack
from rasteret_dask.formats import MEANING, STORE
from rasteret_dask.planning.meta import TEXT, VALID, meta_attrs
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.radiometry import radiometry_of
from rasteret_dask.planning.resolve import SourceRecords
from rasteret_dask.store.encode import CHIPS_PER_SHARD, Compression, compressors
from rasteret_dask.store.law import Law, law_of
from rasteret_dask.store.ledger import GROUPS, LAW, PROVENANCE, SUPERSEDES, TO_ZARR, Maker, whole
from rasteret_dask.store.provenance import Provenance, provenance_of
from rasteret_dask.store.shardreports import JOB
from rasteret_dask.table.itemkinds import CLASSES
from rasteret_dask.tasks.filtering import KEPT
from rasteret_dask.tasks.job import Hierarchy, Job, Output
from rasteret_dask.tasks.mapping import outputs_of

if TYPE_CHECKING:
    import zarr
    from zarr.storage import MemoryStore

__all__ = ["JOB", "Layout", "layout_of", "of_shards", "source_attrs"]

OF_SHARDS = {
    "pixels": 5,
    "valid": 4,
    "valid_fraction": 2,
    FILLED: 2,
    PRESENT: 2,
    "datetime": 2,
    "member": 2,
}
"""Arrays that shards' tasks write of any source, beside masks, and how many dimensions they have."""

COORDINATE_CHIPS = 1_048_576
"""Chips of a chunk of a coordinate, at most: opening a smaller store costs one request a coordinate."""

_TIMES = {"units": "microseconds since 1970-01-01", "calendar": "proleptic_gregorian"}
_NAT = np.iinfo(np.int64).min
_COORDINATES = "chip_id split epsg bounds valid_fraction datetime member band_kind"


def of_shards(job: Job, source: int) -> dict[str, int]:
    """Return the arrays that shards' tasks write of a source, and how many dimensions they have."""
    masks = dict.fromkeys((labels.name for labels in job.labels), 3)
    return OF_SHARDS | masks | {name: 2 for name, _ in job.sources[source].meta}


@dataclass(frozen=True)
class Layout:
    """Where everything of a job goes inside its store."""

    job: Job
    outputs: tuple[Output, ...]
    attrs: Mapping[str, Mapping[str, Any]]
    """Per source: attributes of its group (units, scales, offsets and rules)."""
    compression: Compression = "auto"
    provenance: Provenance = field(default_factory=Provenance)
    law: Law = field(default_factory=Law)
    """What every part that is appended must share."""
    recipe: str | None = None
    """The text of the recipe that was run, where one was: kept beside the job."""
    supersedes: bool = False
    """Of a part: whether its chips stand in place of the same chips in earlier parts."""

    @property
    def codec_text(self) -> str:
        """The compression as JSON text: part of what the store holds, though not of which chips it holds."""
        if self.compression is None or isinstance(self.compression, str):
            return json.dumps(self.compression)
        return json.dumps(self.compression.to_dict(), sort_keys=True)

    def group(self, hierarchy: Hierarchy, source: int) -> str:
        """Return the path of one source's group: ``train/optical``, or less where there is one split or source."""
        split = hierarchy.split if len(self.job.hierarchies) > 1 and hierarchy.split else ""
        name = self.job.sources[source].name if len(self.job.sources) > 1 else ""
        return "/".join(part for part in (split, name) if part)

    def places(self) -> dict[str, str]:
        """Return the path of every object that shards' tasks may put -> the shard's name.

        What is known when all shards are written (which chips are kept) counts to the first shard of its split.
        """
        result = {}
        for hierarchy in self.job.hierarchies:
            for source in range(len(self.job.sources)):
                group = self.group(hierarchy, source)
                inside = f"{group}/" if group else ""
                for number in range(hierarchy.shards):
                    shard = self.job.shard(hierarchy.number, number).name
                    for name, dims in of_shards(self.job, source).items():
                        result["/".join((f"{inside}{name}/c/{number}", *["0"] * (dims - 1)))] = shard
                result[f"{inside}{KEPT}/c/0"] = self.job.shard(hierarchy.number, 0).name
        return result

    def objects(self) -> dict[str, Maker]:
        """Return every metadata document and every chunk that the plan knows: path -> what makes it.

        Chunks of coordinates are made when they are put, those of the same chips one after another.
        """
        import zarr
        from zarr.storage import MemoryStore

        store = MemoryStore()
        root = zarr.create_group(store, attributes=self._root_attrs())
        chunks: list[_Chunk] = []
        for hierarchy in self.job.hierarchies:
            for source, output in enumerate(self.outputs):
                path = self.group(hierarchy, source)
                group = root if not path else root.require_group(path)
                chunks += self._arrays(group, hierarchy, source, output)
        _consolidate(store)
        data = {path: buffer.to_bytes() for path, buffer in store._store_dict.items()}
        groups = {path: text.decode() for path, text in data.items() if _is_group(path, text)}
        made = {path: whole(text) for path, text in data.items() if path not in groups}
        made[GROUPS] = whole(json.dumps(groups).encode())
        made[PROVENANCE] = whole(self.provenance.to_bytes())
        made[LAW] = whole(self.law.to_bytes())
        chunks.sort(key=lambda chunk: (chunk.hierarchy.number, chunk.start))
        return made | {chunk.path: chunk.maker(self.job, store) for chunk in chunks}

    def _root_attrs(self) -> dict[str, Any]:
        note = {
            **STORE.note,
            "meaning": MEANING,
            "writer": TO_ZARR,
            "digest": self.job.digest,
            "compression": self.codec_text,
            "sources": [plan.name for plan in self.job.sources],
        }
        return {"rasteret_dask": note | ({SUPERSEDES: True} if self.supersedes else {})}

    def _arrays(self, group: zarr.Group, h: Hierarchy, source: int, out: Output) -> list[_Chunk]:
        """Create the arrays of one source of one split; return the chunks that are made later."""
        n, per = h.chips, h.per_shard
        dims = ("chip", "time", "band", "y", "x")
        shape = (n, out.times, len(out.bands), out.height, out.width)
        chunk, shard = (1, *shape[1:]), (per, *shape[1:])
        pixels = self._array(group, "pixels", shape, out.dtype, dims, chunk, shard, out.fill)
        pixels.update_attributes(out.pixel_attrs)
        if out.valid:
            flat = (out.times, out.height, out.width)
            dims_valid = ("chip", "time", "y", "x")
            self._array(group, "valid", (n, *flat), "bool", dims_valid, (1, *flat), (per, *flat), False)
        side = (out.height, out.width)
        for labels in self.job.labels_on(source):
            if labels.name in dict(out.masks):
                mask = self._array(
                    group, labels.name, (n, *side), labels.dtype.name, ("chip", "y", "x"), (1, *side),
                    (per, *side), labels.fill,
                )  # fmt: skip
                mask.update_attributes(labels.attrs)
        two = (n, out.times)
        share = self._array(group, VALID, two, "float32", ("chip", "time"), (per, out.times), None, np.nan)
        if VALID in out.meta_names:
            share.update_attributes(meta_attrs(VALID))
        for name, kind in out.meta_arrays:
            blank: Any = "" if kind == TEXT else np.nan
            dtype = str if kind == TEXT else kind
            told = self._array(group, name, two, dtype, ("chip", "time"), (per, out.times), None, blank)
            told.update_attributes(meta_attrs(name))
        if out.filled:
            self._array(group, FILLED, two, "float32", ("chip", "time"), (per, out.times), None, np.nan)
        if out.present:
            self._array(group, PRESENT, two, "bool", ("chip", "time"), (per, out.times), None, False)
        self._array(group, "member", two, str, ("chip", "time"), (per, out.times), None, "")
        when = self._array(group, "datetime", two, "int64", ("chip", "time"), (per, out.times), None, _NAT)
        when.update_attributes(_TIMES | {"_FillValue": _NAT})
        chunks = self._coordinates(group, h)
        self._planned_arrays(group, h, out)
        kept: tuple[str, ...] = ()
        kept += (FILLED,) if out.filled else ()
        kept += (PRESENT,) if out.present else ()
        kept += tuple(name for name, _ in out.meta_arrays)
        kept += ("units",) if out.units else ()
        if self.job.pixel_rules:  # what it says is known when all shards are written
            self._array(group, KEPT, (n,), "bool", ("chip",), (n,), None, False)
            kept += (KEPT,)
        own = [field.name for field in label_fields(self.job.chips.schema)]
        group.update_attributes(
            {
                "coordinates": " ".join((_COORDINATES, *kept, *own)),
                **self.attrs.get(self.job.sources[source].name, {}),
                CHIPS_PER_SHARD: per,
                "kinds": list(out.kind_names),  # as the array: what opens a store needs no request more
                **({CLASSES: out.classes} if out.classes else {}),
                **({META: list(out.meta_names)} if out.meta else {}),
            }
        )
        return chunks

    def _coordinates(self, group: zarr.Group, h: Hierarchy) -> list[_Chunk]:
        few = (min(h.chips, COORDINATE_CHIPS),)
        arrays = [
            self._array(group, name, (h.chips,), dtype, ("chip",), few, None, fill)
            for name, dtype, fill in (("chip_id", str, ""), ("split", str, ""), ("epsg", "int32", 0))
        ]
        if wkts := unpack(self.job.chips.schema.metadata):  # numbers below 0 are of CRSs without an EPSG code
            arrays[-1].update_attributes({"crs_wkt": wkts})
        box = self._array(group, "bounds", (h.chips, 4), "float64", ("chip", "corner"), (*few, 4), None, 0.0)
        if h.split is None:  # all of it is fill
            del arrays[1]
        return [
            _Chunk(array, h, start)
            for start in range(0, h.chips, COORDINATE_CHIPS)
            for array in (*arrays, box)
        ]

    def _planned_arrays(self, group: zarr.Group, h: Hierarchy, out: Output) -> None:
        rows = self.job.chips.slice(h.start, h.chips)
        for name, values in label_columns(rows).items():
            self._label(group, name, values)
        bands = np.array(out.bands, dtype=object)
        self._array(group, "band", (len(bands),), str, ("band",), (len(bands),), None, "")[:] = bands
        kinds = np.array(out.kind_names, dtype=object)
        self._array(group, "band_kind", (len(bands),), str, ("band",), (len(bands),), None, "")[:] = kinds
        if out.units:
            names = np.array(out.units, dtype=object)
            self._array(group, "units", (len(names),), str, ("band",), (len(names),), None, "")[:] = names
        if out.slots is not None:
            stamps = np.array(out.slots, dtype=np.int64) // 1000
            time = self._array(group, "time", (len(stamps),), "int64", ("time",), (len(stamps),), None, 0)
            time[:] = stamps
            time.update_attributes(_TIMES)

    def _label(self, group: zarr.Group, name: str, values: NDArray[Any]) -> None:
        n = len(values)
        if values.dtype.kind == "M":
            when = self._array(group, name, (n,), "int64", ("chip",), (n,), None, _NAT)
            when[:] = values.view(np.int64)
            when.update_attributes(_TIMES | {"_FillValue": _NAT})
            return
        dtype, fill = (str, "") if values.dtype == object else (values.dtype.name, values.dtype.type(0))
        self._array(group, name, (n,), dtype, ("chip",), (n,), None, fill)[:] = values

    def _array(
        self,
        group: zarr.Group,
        name: str,
        shape: tuple[int, ...],
        dtype: Any,
        dims: tuple[str, ...],
        chunks: tuple[int, ...],
        shards: tuple[int, ...] | None,
        fill: Any,
    ) -> Any:
        return group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=chunks,
            shards=shards,
            dimension_names=dims,
            fill_value=fill,
            compressors=compressors(self.compression, dtype),
        )


@dataclass(frozen=True)
class _Chunk:
    """A chunk of a coordinate, made of the chip table when it is put."""

    array: zarr.Array[Any]
    hierarchy: Hierarchy
    start: int
    """First chip, counted within the split."""

    @property
    def path(self) -> str:
        """Where it goes."""
        number = self.start // COORDINATE_CHIPS
        return f"{self.array.path}/c/{number}{'/0' * (self.array.ndim - 1)}"

    def maker(self, job: Job, store: MemoryStore) -> Maker:
        """Return what makes it: zarr-python, in memory."""

        def make() -> Iterator[bytes]:
            stop = min(self.start + COORDINATE_CHIPS, self.hierarchy.chips)
            rows = job.coordinates(self.hierarchy, self.start, stop)
            self.array[self.start : stop] = _values(rows, self.array.basename)
            yield store._store_dict.pop(self.path).to_bytes()

        return make


def _values(rows: pa.Table, name: str) -> NDArray[Any]:
    """Return a coordinate of some rows of the chip table."""
    if name == "bounds":
        return bounds_of(rows)
    if name == "epsg":
        return np.asarray(rows.column(name).to_numpy(), dtype=np.int32)
    return np.array([value or "" for value in rows.column(name).to_pylist()], dtype=object)


def _is_group(path: str, text: bytes) -> bool:
    return path.endswith("zarr.json") and json.loads(text)["node_type"] == "group"


def _consolidate(store: MemoryStore) -> None:
    import zarr

    with warnings.catch_warnings():
        # zarr-python warns that other implementations may not read consolidated metadata; they read the rest.
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(store)


def layout_of(
    job: Job,
    used: Sequence[tuple[SourceRecords, NDArray[np.int64]]],
    query: Query,
    dropped: Mapping[str, int],
) -> Layout:
    """Return where everything of a job goes inside a store.

    Parameters
    ----------
    job
        The job.
    used
        Each source, with the rows of its records that feed a chip.
    query
        The plan, with the user's functions.
    dropped
        Reason -> windows that planning left out.
    """
    provenance, outputs = provenance_of(query, used, dropped), outputs_of(job, query.functions)
    return Layout(
        job, outputs, source_attrs(job, used), provenance=provenance, law=law_of(query.plan, job, outputs)
    )


def source_attrs(
    job: Job, used: Sequence[tuple[SourceRecords, NDArray[np.int64]]]
) -> dict[str, dict[str, Any]]:
    """Return the attributes of each source's group; parameters as of :func:`layout_of`."""
    attrs = {}
    wide = {
        plan.name: size * plan.resolution
        for number, (plan, size) in enumerate(zip(job.sources, job.size_px, strict=True))
        if job.reach_m(number)
    }
    for source, rows in used:
        attrs[source.plan.name] = {
            "units": source.plan.unit or dict(zip(source.plan.bands, source.plan.units, strict=True)),
            "radiometry": radiometry_of(source, rows),
            "mask": list(source.plan.masks),
            "pick": source.plan.pick.name,
            "resolution": source.plan.resolution,
            **({"context_m": wide[source.plan.name]} if source.plan.name in wide else {}),
        }
    return attrs
