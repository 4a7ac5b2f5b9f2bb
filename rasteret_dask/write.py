"""Chips leave to a sharded Zarr store: metadata first, one put a shard, the commit last."""

from __future__ import annotations

import json
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from rasteret_dask import geoparquet, remote
from rasteret_dask._version import __version__
from rasteret_dask.chiptable import label_columns
from rasteret_dask.errors import JobError, StoreError
from rasteret_dask.job import Hierarchy, Job, Output, Shard, open_job, write_job

T = TypeVar("T")

__all__ = ["Layout", "commit", "is_committed", "prepare", "write_shard"]

JOB = "_job"
GROUPS = "groups.json"  # the groups' own metadata, put in place by the commit
REQUESTS = 16
EPOCH = "microseconds since 1970-01-01"
NAT = np.iinfo(np.int64).min


@dataclass(frozen=True)
class Layout:
    """Where everything of a job goes inside its store."""

    job: Job
    outputs: tuple[Output, ...]
    attrs: Mapping[str, Mapping[str, Any]]
    """Per source: attributes of its group (units, scales, offsets and rules)."""

    def group(self, hierarchy: Hierarchy, source: int) -> str:
        """Return the path of one source's group: ``train/optical``, or less where there is one split or source."""
        split = hierarchy.split if len(self.job.hierarchies) > 1 and hierarchy.split else ""
        name = self.job.sources[source].name if len(self.job.sources) > 1 else ""
        return "/".join(part for part in (split, name) if part)

    def build(self) -> dict[str, bytes]:
        """Return every metadata document and every plan-known coordinate chunk: path -> bytes."""
        store = MemoryStore()
        root = zarr.create_group(store, attributes=self._root_attrs())
        for hierarchy in self.job.hierarchies:
            for source, output in enumerate(self.outputs):
                path = self.group(hierarchy, source)
                group = root if not path else root.require_group(path)
                self._arrays(group, hierarchy, source, output)
        _consolidate(store)
        return {k: v.to_bytes() for k, v in store._store_dict.items()}

    def _root_attrs(self) -> dict[str, Any]:
        return {"rasteret_dask": {"version": __version__, "digest": self.job.digest}}

    def _arrays(self, group: zarr.Group, h: Hierarchy, source: int, out: Output) -> None:
        n, per = h.chips, h.per_shard
        dims = ("chip", "time", "band", "y", "x")
        shape = (n, out.times, len(out.bands), out.height, out.width)
        pixels = _array(group, "pixels", shape, out.dtype, dims, (1, *shape[1:]), (per, *shape[1:]), out.fill)
        pixels.update_attributes(out.pixel_attrs)
        if out.valid:
            flat = (out.times, out.height, out.width)
            dims_valid = ("chip", "time", "y", "x")
            _array(group, "valid", (n, *flat), "bool", dims_valid, (1, *flat), (per, *flat), False)
        two = (n, out.times)
        _array(group, "valid_fraction", two, "float32", ("chip", "time"), (per, out.times), None, np.nan)
        _array(group, "source", two, str, ("chip", "time"), (per, out.times), None, "")
        when = _array(group, "datetime", two, "int64", ("chip", "time"), (per, out.times), None, NAT)
        when.update_attributes({"units": EPOCH, "calendar": "proleptic_gregorian", "_FillValue": NAT})
        self._known(group, h, out)
        group.update_attributes(
            {
                "coordinates": " ".join((_COORDINATES, *label_columns(self.job.chips))),
                **self.attrs.get(self.job.sources[source].name, {}),
            }
        )

    def _known(self, group: zarr.Group, h: Hierarchy, out: Output) -> None:
        rows = self.job.chips.slice(h.start, h.chips)
        for name in ("chip_id", "split"):
            values = np.array([v or "" for v in rows.column(name).to_pylist()], dtype=object)
            _array(group, name, (h.chips,), str, ("chip",), (h.chips,), None, "")[:] = values
        epsg = self.job.epsg[h.start : h.stop].astype(np.int32)
        _array(group, "epsg", (h.chips,), "int32", ("chip",), (h.chips,), None, 0)[:] = epsg
        bounds = self.job.bounds[h.start : h.stop]
        box = _array(group, "bounds", (h.chips, 4), "float64", ("chip", "corner"), (h.chips, 4), None, 0.0)
        box[:] = bounds
        for name, values in label_columns(rows).items():
            dtype, fill = (str, "") if values.dtype == object else (values.dtype.name, values.dtype.type(0))
            _array(group, name, (h.chips,), dtype, ("chip",), (h.chips,), None, fill)[:] = values
        bands = np.array(out.bands, dtype=object)
        _array(group, "band", (len(bands),), str, ("band",), (len(bands),), None, "")[:] = bands
        if out.slots is not None:
            stamps = np.array(out.slots, dtype=np.int64) // 1000
            time = _array(group, "time", (len(stamps),), "int64", ("time",), (len(stamps),), None, 0)
            time[:] = stamps
            time.update_attributes({"units": EPOCH, "calendar": "proleptic_gregorian"})


_COORDINATES = "chip_id split epsg bounds valid_fraction datetime source"


def _array(
    group: zarr.Group,
    name: str,
    shape: tuple[int, ...],
    dtype: Any,
    dims: tuple[str, ...],
    chunks: tuple[int, ...],
    shards: tuple[int, ...] | None,
    fill: Any,
) -> Any:
    size = 1 if dtype is str else np.dtype(dtype).itemsize
    codec = BloscCodec(
        typesize=max(size, 1), cname="zstd", clevel=1, shuffle="bitshuffle" if size > 1 else "noshuffle"
    )
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        shards=shards,
        dimension_names=dims,
        fill_value=fill,
        compressors=[codec],
    )


def _consolidate(store: MemoryStore) -> None:
    with warnings.catch_warnings():
        # zarr-python warns that other implementations may not read consolidated metadata; they read the rest.
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(store)


def prepare(layout: Layout, url: str) -> set[str]:
    """Make a store ready for its shards and return the names of those that are already there.

    The plan's digest is written first: whatever stops later, a rerun knows the store for its own.

    Raises
    ------
    StoreError
        When the store holds something else, or another plan's leftovers.
    """
    job = layout.job
    found = remote.listing(url)
    if f"{JOB}/digest" not in found:
        if found:
            some = ", ".join(sorted(found)[:3])
            raise StoreError(
                f"store {url}", f"{len(found)} objects of something else ({some})", "an empty place"
            )
        remote.put(remote.join(url, JOB, "digest"), job.digest.encode())
    theirs = remote.get(remote.join(url, JOB, "digest")).decode()
    if theirs != job.digest:
        raise StoreError(
            f"store {url}",
            f"chips of another plan ({theirs[:12]})",
            f"this plan's ({job.digest[:12]}), or nothing",
            "Choose another store, or delete this one.",
        )
    if f"{JOB}/ready" in found:
        return _finished(url, found)
    built = layout.build()
    groups = {path: data.decode() for path, data in built.items() if _kind(path, data) == "group"}
    objects = {path: data for path, data in built.items() if path not in groups}
    objects["chips.parquet"] = geoparquet.to_bytes(job.chosen_chips())
    objects[f"{JOB}/{GROUPS}"] = json.dumps(groups).encode()
    _at_once(lambda path: remote.put(remote.join(url, path), objects[path]), objects)
    write_job(job, remote.join(url, JOB))
    remote.put(remote.join(url, JOB, "ready"), b"1")
    return _finished(url, found)


def is_committed(url: str, digest: str) -> bool:
    """Tell whether the store is finished, by a job of this digest."""
    if not remote.exists(remote.join(url, "zarr.json")):
        return False
    root = json.loads(remote.get(remote.join(url, "zarr.json")))
    return bool(root.get("attributes", {}).get("rasteret_dask", {}).get("digest") == digest)


def _finished(url: str, found: Mapping[str, int]) -> set[str]:
    """Return the shards whose objects are all there with the sizes their reports name."""
    reports = _reports(url, [path for path in found if path.startswith(f"{JOB}/done/")])
    return {r["shard"] for r in reports if all(found.get(o["path"]) == o["size"] for o in r["objects"])}


def _reports(url: str, paths: Iterable[str]) -> list[dict[str, Any]]:
    return _at_once(lambda path: json.loads(remote.get(remote.join(url, path))), paths)


def _at_once(function: Callable[[str], T], paths: Iterable[str]) -> list[T]:
    """Call a function for many small objects, several at the same time: a request waits, it does not work."""
    with ThreadPoolExecutor(REQUESTS, thread_name_prefix="rasteret-store") as pool:
        return list(pool.map(function, paths))


@lru_cache(maxsize=256)
def _metadata(url: str, path: str, digest: str) -> bytes:
    return remote.get(remote.join(url, path, "zarr.json"))


def write_shard(job: Any, block: tuple[int, int], url: str, joined: dict[str, xr.Dataset]) -> dict[str, Any]:
    """Encode a shard's chips, put each object once, then the report; return the report."""
    opened = job if isinstance(job, Job) else open_job(job.url, job.digest)
    base = url.removesuffix(f"/{JOB}")
    shard = opened.shard(*block)
    remote.put(remote.join(url, "tried", shard.name, uuid.uuid4().hex), b"1")
    hierarchy = next(h for h in opened.hierarchies if h.number == shard.hierarchy)
    layout = Layout(opened, (), {})
    objects: list[dict[str, Any]] = []
    report: dict[str, Any] = {"shard": shard.name, "chips": shard.stop - shard.start, "objects": objects}
    for source, dataset in enumerate(joined.values()):
        group = layout.group(hierarchy, source)
        for path, data in _encoded(base, group, opened, hierarchy, shard, dataset).items():
            remote.put(remote.join(base, path), data)
            objects.append({"path": path, "size": len(data), "crc32c": int(google_crc32c.value(data))})
        name = opened.sources[source].name
        report[f"counts/{name}"] = dataset.attrs.get("counts", {})
        report[f"clipped/{name}"] = dataset.attrs.get("clipped", {})
    report["attempts"] = len(remote.listing(remote.join(url, "tried", shard.name)))
    remote.put(remote.join(url, "done", f"{shard.name}.json"), json.dumps(report).encode())
    return report


def _encoded(
    base: str, group: str, job: Job, h: Hierarchy, shard: Shard, dataset: xr.Dataset
) -> dict[str, bytes]:
    """Return the Zarr objects of one source of one shard: path -> bytes."""
    first, last = shard.start - h.start, shard.stop - h.start
    result: dict[str, bytes] = {}
    for name in ("pixels", "valid", "valid_fraction", "datetime", "source"):
        if name not in dataset.variables:
            continue
        values = dataset[name].values
        if name == "datetime":
            values = values.astype("datetime64[us]").astype(np.int64)
        path = f"{group}/{name}" if group else name
        for key, data in _encode(_metadata(base, path, job.digest), first, last, values).items():
            result[f"{path}/{key}"] = data
    return result


def _encode(metadata: bytes, first: int, last: int, values: NDArray[Any]) -> dict[str, bytes]:
    store = MemoryStore({"zarr.json": default_buffer_prototype().buffer.from_bytes(metadata)})
    array = zarr.open_array(store, mode="r+")
    array[first:last] = values
    if not any(k != "zarr.json" for k in store._store_dict):  # all fill: zarr leaves such chunks out
        return {}
    return {k: v.to_bytes() for k, v in store._store_dict.items() if k != "zarr.json"}


def commit(url: str, job: Job) -> None:
    """Write the manifest, then the groups' metadata; the root comes last.

    Raises
    ------
    JobError
        When a shard has no report.
    """
    found = remote.listing(url)
    done = _finished(url, found)
    missing = [s.name for s in job.shards() if s.name not in done]
    if missing:
        raise JobError(
            f"store {url}", f"{len(missing)} shards missing: {', '.join(missing[:10])}", "all shards"
        )
    reports = _reports(url, [f"{JOB}/done/{s.name}.json" for s in job.shards()])
    remote.put(remote.join(url, "manifest.parquet"), _parquet(_manifest(job, reports)))
    groups = json.loads(remote.get(remote.join(url, JOB, GROUPS)))
    for path in sorted(groups, key=lambda p: -p.count("/")):  # deepest first, "zarr.json" last
        remote.put(remote.join(url, path), groups[path].encode())


def _kind(path: str, data: bytes) -> str:
    return str(json.loads(data)["node_type"]) if path.endswith("zarr.json") else "chunk"


def _manifest(job: Job, reports: list[dict[str, Any]]) -> pa.Table:
    rows = []
    for shard, report in zip(job.shards(), reports, strict=True):
        clipped = {
            f"{k[8:]}/{b}": n
            for k, v in report.items()
            if k.startswith("clipped/")
            for b, n in v.items()
            if n
        }
        fallback = sum(v.get("gdal_fallback", 0) for k, v in report.items() if k.startswith("counts/"))
        tiles = sum(v.get("tiles_read", 0) for k, v in report.items() if k.startswith("counts/"))
        rows.append(
            {
                "shard": shard.name,
                "split": shard.split,
                "number": shard.number,
                "chips": report["chips"],
                "attempts": report["attempts"],
                "bytes": sum(o["size"] for o in report["objects"]),
                "objects": [{k: o[k] for k in ("path", "size", "crc32c")} for o in report["objects"]],
                "tiles_read": tiles,
                "gdal_fallback": fallback,
                "clipped": json.dumps(clipped),
                "key": job.keys[shard.name],
            }
        )
    return pa.Table.from_pylist(rows)


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())
