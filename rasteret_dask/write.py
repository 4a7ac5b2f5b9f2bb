"""Chips leave to a sharded Zarr store: metadata first, one put a shard, the commit last."""

from __future__ import annotations

import json
import os
import platform
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr
import zarr
from zarr.storage import MemoryStore

from rasteret_dask import geoparquet, remote
from rasteret_dask._version import __version__
from rasteret_dask.chiptable import label_columns
from rasteret_dask.encode import Compression, Encoding, Piece, codec_of, crc32c
from rasteret_dask.errors import JobError, StoreError, UnreadableTilesWarning
from rasteret_dask.job import Hierarchy, Job, Output, Shard, open_job, write_job

T = TypeVar("T")

__all__ = ["Layout", "commit", "is_committed", "prepare", "write_shard"]

JOB = "_job"
GROUPS = "groups.json"  # the groups' own metadata, put in place by the commit
REQUESTS = 16
MAX_NAMED = 3
AUTO = json.dumps("auto")
EPOCH = "microseconds since 1970-01-01"
NAT = np.iinfo(np.int64).min


@dataclass(frozen=True)
class Layout:
    """Where everything of a job goes inside its store."""

    job: Job
    outputs: tuple[Output, ...]
    attrs: Mapping[str, Mapping[str, Any]]
    """Per source: attributes of its group (units, scales, offsets and rules)."""
    compression: Compression = "auto"

    @property
    def said(self) -> str:
        """The compression as JSON text: part of what the store holds, though not of which chips it holds."""
        if self.compression is None or isinstance(self.compression, str):
            return json.dumps(self.compression)
        return json.dumps(self.compression.to_dict(), sort_keys=True)

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
        said = {"version": __version__, "digest": self.job.digest, "compression": self.said}
        return {"rasteret_dask": said}

    def _arrays(self, group: zarr.Group, h: Hierarchy, source: int, out: Output) -> None:
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
        two = (n, out.times)
        self._array(group, "valid_fraction", two, "float32", ("chip", "time"), (per, out.times), None, np.nan)
        self._array(group, "source", two, str, ("chip", "time"), (per, out.times), None, "")
        when = self._array(group, "datetime", two, "int64", ("chip", "time"), (per, out.times), None, NAT)
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
            self._array(group, name, (h.chips,), str, ("chip",), (h.chips,), None, "")[:] = values
        epsg = self.job.epsg[h.start : h.stop].astype(np.int32)
        self._array(group, "epsg", (h.chips,), "int32", ("chip",), (h.chips,), None, 0)[:] = epsg
        bounds = self.job.bounds[h.start : h.stop]
        box = self._array(
            group, "bounds", (h.chips, 4), "float64", ("chip", "corner"), (h.chips, 4), None, 0.0
        )
        box[:] = bounds
        for name, values in label_columns(rows).items():
            dtype, fill = (str, "") if values.dtype == object else (values.dtype.name, values.dtype.type(0))
            self._array(group, name, (h.chips,), dtype, ("chip",), (h.chips,), None, fill)[:] = values
        bands = np.array(out.bands, dtype=object)
        self._array(group, "band", (len(bands),), str, ("band",), (len(bands),), None, "")[:] = bands
        if out.slots is not None:
            stamps = np.array(out.slots, dtype=np.int64) // 1000
            time = self._array(group, "time", (len(stamps),), "int64", ("time",), (len(stamps),), None, 0)
            time[:] = stamps
            time.update_attributes({"units": EPOCH, "calendar": "proleptic_gregorian"})

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
            compressors=codec_of(self.compression, dtype),
        )


_COORDINATES = "chip_id split epsg bounds valid_fraction datetime source"


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
        When the store holds something else, another plan's leftovers, or these chips in another compression.
    """
    job = layout.job
    found = remote.listing(url)
    if f"{JOB}/digest" not in found:
        if found:
            some = ", ".join(sorted(found)[:3])
            raise StoreError(
                f"store {remote.redact(url)}",
                f"{len(found)} objects of something else ({some})",
                "an empty place",
            )
        remote.put(remote.join(url, JOB, "digest"), f"{job.digest}\n{layout.said}".encode())
    theirs, _, compression = remote.get(remote.join(url, JOB, "digest")).decode().partition("\n")
    if theirs != job.digest:
        raise StoreError(
            f"store {remote.redact(url)}",
            f"chips of another plan ({theirs[:12]})",
            f"this plan's ({job.digest[:12]}), or nothing",
            "Choose another store, or delete this one.",
        )
    _same_compression(url, compression, layout.said)
    if f"{JOB}/ready" in found:
        return set(_finished(url, found))
    built = layout.build()
    groups = {path: data.decode() for path, data in built.items() if _kind(path, data) == "group"}
    objects = {path: data for path, data in built.items() if path not in groups}
    objects["chips.parquet"] = geoparquet.to_bytes(job.chosen_chips())
    objects[f"{JOB}/{GROUPS}"] = json.dumps(groups).encode()
    _at_once(lambda path: remote.put(remote.join(url, path), objects[path]), objects)
    write_job(job, remote.join(url, JOB))
    remote.put(remote.join(url, JOB, "ready"), b"1")
    return set(_finished(url, found))


def is_committed(url: str, digest: str, compression: str = AUTO) -> bool:
    """Tell whether the store is finished, by a job of this digest.

    Parameters
    ----------
    url
        The store.
    digest
        The job's digest.
    compression
        What :attr:`Layout.said` says.

    Raises
    ------
    StoreError
        When it is, in another compression.
    """
    try:
        root = json.loads(remote.get(remote.join(url, "zarr.json")))
    except remote.MissingError:
        return False
    said = root.get("attributes", {}).get("rasteret_dask", {})
    if said.get("digest") != digest:
        return False
    _same_compression(url, said.get("compression", ""), compression)
    return True


def _same_compression(url: str, found: str, expected: str) -> None:
    if found != expected:
        raise StoreError(
            f"store {remote.redact(url)}",
            f"these chips with compression {found}",
            f"compression {expected}",
            "Give to_zarr the store's compression, choose another store, or delete this one.",
        )


def _finished(url: str, found: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return the reports of the shards whose objects are all there with the sizes their reports name."""
    paths = [path for path in found if path.startswith(f"{JOB}/done/")]
    reports = _at_once(lambda path: json.loads(remote.get(remote.join(url, path))), paths)
    return {r["shard"]: r for r in reports if all(found.get(o["path"]) == o["size"] for o in r["objects"])}


def _at_once(function: Callable[[str], T], paths: Iterable[str]) -> list[T]:
    """Call a function for many small objects, several at the same time: a request waits, it does not work."""
    return list(_requests(os.getpid()).map(function, paths))


@lru_cache(maxsize=1)
def _requests(process: int) -> ThreadPoolExecutor:
    """Return the threads that wait for the store; a fork has its own."""
    return ThreadPoolExecutor(REQUESTS, thread_name_prefix="rasteret-store")


@lru_cache(maxsize=256)
def _encoding(url: str, path: str, mark: str) -> Encoding:
    """Return how an array is encoded; ``mark`` tells stores apart that were at the same place in turn."""
    return Encoding.of(remote.get(remote.join(url, path, "zarr.json")))


def write_shard(
    job: Any, block: tuple[int, int], url: str, joined: dict[str, xr.Dataset], mark: str = ""
) -> dict[str, Any]:
    """Encode a shard's chips and put each object once, then the report; return the report.

    Parameters
    ----------
    job
        The job, or where it was written.
    block
        Number of the split, and of the shard in it.
    url
        Where the job was written.
    joined
        Source -> its chips.
    mark
        Tells stores apart that were at the same place in turn: workers remember how arrays are encoded.
    """
    opened = job if isinstance(job, Job) else open_job(job.url, job.digest)
    base, shard = url.removesuffix(f"/{JOB}"), opened.shard(*block)
    requests = _requests(os.getpid())
    tried: Future[Any] = requests.submit(
        remote.put, remote.join(url, "tried", shard.name, uuid.uuid4().hex), b"1"
    )
    # an object is on its way while the next one is encoded
    objects: list[Future[Any]] = [
        requests.submit(_put, base, path, pieces)
        for path, pieces in _encoded(base, opened, shard, joined, mark)
    ]
    wait([tried, *objects])  # nothing of this attempt is on its way when the next one begins
    tried.result()
    report: dict[str, Any] = {
        "process": f"{platform.node()}:{os.getpid()}",
        "shard": shard.name,
        "chips": shard.stop - shard.start,
        "objects": [put.result() for put in objects],
    }
    for name, dataset in joined.items():
        report[f"counts/{name}"] = dataset.attrs.get("counts", {})
        report[f"clipped/{name}"] = dataset.attrs.get("clipped", {})
        report[f"unreadable/{name}"] = dataset.attrs.get("unreadable", [])
    remote.put(remote.join(url, "done", f"{shard.name}.json"), json.dumps(report).encode())
    return report


def _encoded(
    base: str, job: Job, shard: Shard, joined: Mapping[str, xr.Dataset], mark: str
) -> Iterator[tuple[str, list[Piece]]]:
    """Yield the Zarr objects of a shard: path and pieces; what is fill throughout is left out."""
    hierarchy = next(h for h in job.hierarchies if h.number == shard.hierarchy)
    layout, number = Layout(job, (), {}), f"c/{shard.number}"
    for source, dataset in enumerate(joined.values()):
        group = layout.group(hierarchy, source)
        for name in ("pixels", "valid", "valid_fraction", "datetime", "source"):
            if name not in dataset.variables:
                continue
            values = dataset[name].values
            if name == "datetime":
                values = values.astype("datetime64[us]").astype(np.int64)
            path = f"{group}/{name}" if group else name
            pieces = _encoding(base, path, f"{job.digest} {mark}").encode(values)
            if pieces:
                yield "/".join((path, number, *["0"] * (values.ndim - 1))), pieces


def _put(base: str, path: str, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Put an object without joining its pieces; return what the report says of it."""
    remote.put(remote.join(base, path), pieces)
    return {"path": path, "size": sum(map(len, pieces)), "crc32c": crc32c(pieces)}


def commit(url: str, job: Job) -> None:
    """Write the manifest, then the groups' metadata; the root comes last.

    Raises
    ------
    JobError
        When a shard has no report.

    Warns
    -----
    UnreadableTilesWarning
        When tiles could not be read and their pixels are invalid, as ``on_error="mask"`` allows.
    """
    found = remote.listing(url)
    reports = _finished(url, found)
    missing = [s.name for s in job.shards() if s.name not in reports]
    if missing:
        raise JobError(
            f"store {remote.redact(url)}",
            f"{len(missing)} shards missing: {', '.join(missing[:10])}",
            "all shards",
        )
    tries = Counter(path.split("/")[2] for path in found if path.startswith(f"{JOB}/tried/"))
    manifest = _manifest(job, reports, tries)
    remote.put(remote.join(url, "manifest.parquet"), _parquet(manifest))
    groups = json.loads(remote.get(remote.join(url, JOB, GROUPS)))
    for path in sorted(groups, key=lambda p: -p.count("/")):  # deepest first, "zarr.json" last
        remote.put(remote.join(url, path), groups[path].encode())
    _warn_of_masked(url, manifest)


def _warn_of_masked(url: str, manifest: pa.Table) -> None:
    lists = [json.loads(text) for text in manifest["unreadable_tiles"].to_pylist()]
    tiles = [tile for own in lists for tile in own]
    if tiles:
        more = f"\nand {len(tiles) - MAX_NAMED} more" if len(tiles) > MAX_NAMED else ""
        warnings.warn(
            f"store {url}: {len(tiles)} tiles of {sum(map(bool, lists))} of {len(lists)} shards could not be read; "
            "their pixels are invalid. All are listed in manifest.parquet, column unreadable_tiles:\n"
            + "\n".join(tiles[:MAX_NAMED]) + more,
            UnreadableTilesWarning,
            stacklevel=2,
        )  # fmt: skip


def _kind(path: str, data: bytes) -> str:
    return str(json.loads(data)["node_type"]) if path.endswith("zarr.json") else "chunk"


def _manifest(job: Job, reports: Mapping[str, dict[str, Any]], tries: Mapping[str, int]) -> pa.Table:
    """Return one row a shard; counts are sums over its sources."""
    rows = []
    for shard in job.shards():
        report = reports[shard.name]
        counts: Counter[str] = Counter()
        for own in _of(report, "counts").values():
            counts.update(own)
        clipped = {
            f"{name}/{band}": n
            for name, own in _of(report, "clipped").items()
            for band, n in own.items()
            if n
        }
        unreadable = [tile for own in _of(report, "unreadable").values() for tile in own]
        rows.append(
            {
                "shard": shard.name,
                "split": shard.split,
                "number": shard.number,
                "chips": report["chips"],
                "attempts": tries[shard.name],
                "process": report["process"],
                "bytes": sum(o["size"] for o in report["objects"]),
                "objects": [{k: o[k] for k in ("path", "size", "crc32c")} for o in report["objects"]],
                "requests": counts["requests"],
                "bytes_fetched": counts["bytes_fetched"],
                "tiles_read": counts["tiles_read"],
                "gdal_fallback": counts["gdal_fallback"],
                "clipped": json.dumps(clipped),
                "unreadable": len(unreadable),
                "unreadable_tiles": json.dumps(unreadable),
                "key": job.keys[shard.name],
            }
        )
    return pa.Table.from_pylist(rows)


def _of(report: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return what a report says of each source: source -> value."""
    return {
        key.removeprefix(f"{kind}/"): value for key, value in report.items() if key.startswith(f"{kind}/")
    }


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return bytes(sink.getvalue())
