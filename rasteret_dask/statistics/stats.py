"""What the pixels of some chips look like, of all sources: shown, saved, and used to normalize."""

from __future__ import annotations

import base64
import functools
import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError, SchemaError
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.planning.bandkinds import BandKind
from rasteret_dask.rules.kinds import kind_of
from rasteret_dask.statistics.sketch import SourceStats, added, measured, valid_pixels
from rasteret_dask.tasks.batches import Arrays, SourcePixels

__all__ = ["Stats", "measure", "merged"]

VERSION = 3
"""Of the JSON text; what the numbers of version 1 mean depends on their dtype, version 2 knows no kinds."""


@dataclass(frozen=True)
class Stats:
    """What the pixels of some chips look like: ``stats["optical"].mean``, ``stats.normalize(batch)``."""

    sources: Mapping[str, SourceStats]
    chips: int
    """How many were measured."""

    def __getitem__(self, source: str) -> SourceStats:
        """Return one source's.

        Raises
        ------
        PlanError
            When there is no such source.
        """
        if source not in self.sources:
            raise PlanError(f"statistics of source {source!r}", "none", f"one of {', '.join(self.sources)}")
        return self.sources[source]

    def normalize(self, arrays: Arrays, fill: float = float("nan")) -> Arrays:
        """Return chips with (pixels - mean) / std per band, as float32; a band that never varies becomes 0.

        Classes and bit fields keep their numbers: a source of nothing else stays as it is, integers too; beside
        measured bands they become float32 with these.

        Parameters
        ----------
        arrays
            Chips as arrays, a batch say, of the sources, bands and units that were measured. What is not pixels stays
            as it is, but ``<source>/valid`` is False where floats are infinite, as it is where they are NaN.
        fill
            What invalid pixels become, in all bands: NaN, or 0 for the bands' mean.

        Raises
        ------
        PlanError
            When there are pixels of a source that was not measured, of another dtype, or with other bands.
        """
        result = dict(arrays)
        for name, values in arrays.items():
            if values.ndim == 5:
                own = self[name]
                _same(name, f"{values.shape[2]} bands", f"{len(own.bands)} bands")
                _same(name, f"{values.dtype.name} pixels", f"{own.dtype} pixels")
                if own.kept.all():
                    continue
                _keeps(name, own)
                valid = result[f"{name}/valid"] = _valid(name, arrays)
                result[name] = _scaled(values, valid, own, fill)
        return result

    def check(self, pixels: Mapping[str, SourcePixels]) -> None:
        """Raise an error unless chips can be normalized by these statistics; nothing is read.

        Parameters
        ----------
        pixels
            Source -> what its pixels are. Units "" are unknown, and fit any.

        Raises
        ------
        PlanError
            When a source was not measured, with other bands or another order of them, or in another dtype or units; or
            when codes beside measured bands are beyond what float32 holds.
        """
        for name, given in pixels.items():
            own = self[name]
            _same(name, f"bands {', '.join(given.bands)}", f"bands {', '.join(own.bands)}")
            _same(name, f"{given.dtype} pixels", f"{own.dtype} pixels")
            _keeps(name, own)
            if given.units and own.units:
                _same(name, f"units {given.units!r}", f"units {own.units!r}")
            if given.kinds and own.kinds:
                _same(
                    name, *(f"bands of kind {', '.join(str(k.kind) for k in b.kinds)}" for b in (given, own))
                )

    @property
    def table(self) -> pa.Table:
        """One row a source and band; NaN where numbers of that kind have no such statistic."""
        rows: list[dict[str, Any]] = []
        for name, own in self.sources.items():
            columns = {
                "count": own.count, "valid_fraction": own.valid_fraction, "mean": own.mean, "std": own.std,
                "min": own.min, "p2": own.percentile(2), "p50": own.percentile(50), "p98": own.percentile(98),
                "max": own.max,
            }  # fmt: skip
            rows += [
                {"source": name, "band": band, "kind": kind, **{k: v[i].item() for k, v in columns.items()}}
                for i, (band, kind) in enumerate(zip(own.bands, own.kind_names, strict=True))
            ]
        return pa.Table.from_pylist(rows)

    @property
    def class_table(self) -> pa.Table:
        """One row a value of each band of codes: source, band, value, name ("" where nothing tells), count, share."""
        rows = [
            (name, band, value, own.names.get(band, {}).get(value, ""), count, own.shares[band][value])
            for name, own in self.sources.items()
            for band, coded in zip(own.bands, own.coded, strict=True)
            for value, count in (own.classes.get(band, {}) if coded else {}).items()
        ]
        return pa.table([pa.array(column, field.type) for column, field in
                         zip(zip(*rows, strict=True) if rows else [()] * len(_CLASS_ROWS), _CLASS_ROWS, strict=True)],
                        schema=_CLASS_ROWS)  # fmt: skip

    def __repr__(self) -> str:
        lines = [line for table in (self.table, self.class_table) for line in _shown(table)]
        return "\n".join([f"<Stats of {self.chips} chips>", *lines])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as JSON, to a local path or a URL."""
        remote.put(Place.of(path).url, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Stats:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ReadError
            When nothing lies there, or it cannot be read.
        SchemaError
            When it is something else, is damaged, or was written by a version that measured otherwise.
        """
        return cls.from_json(remote.get(Place.of(path).url), os.fspath(path))

    def to_json(self) -> str:
        """Return them as JSON text."""
        sources = {name: _fields(own) for name, own in self.sources.items()}
        return json.dumps({"version": VERSION, "chips": self.chips, "sources": sources})

    @classmethod
    def from_json(cls, text: str | bytes, subject: str = "statistics") -> Stats:
        """Return what :meth:`to_json` made.

        Raises
        ------
        SchemaError
            As :meth:`load` does.
        """
        try:
            said = json.loads(text)
            if said["version"] != VERSION:
                raise ValueError(f"version {said['version']!r}")
            return cls({name: _of(own) for name, own in said["sources"].items()}, int(said["chips"]))
        except (ValueError, KeyError, TypeError, AttributeError, zlib.error) as error:
            raise SchemaError(
                f"reading {subject}", f"{type(error).__name__}: {error}", "what Stats.save of this version wrote",
                "Measure again, with stats().",
            ) from error  # fmt: skip


def measure(arrays: Arrays, pixels: Mapping[str, SourcePixels]) -> Stats:
    """Measure some chips: the pixels of each source, and as ``"<source>/<mask>"`` its masks, NaN aside.

    Parameters
    ----------
    arrays
        The chips.
    pixels
        Source -> what its pixels are.
    """
    sources = {}
    for name, own in pixels.items():
        sources[name] = measured(arrays[name], arrays[f"{name}/valid"], own.bands, own.units, own.kinds)
        for mask, values in arrays.items():
            if values.ndim == 3 and mask.startswith(f"{name}/"):
                everywhere = np.ones((len(values), 1, *values.shape[1:]), dtype=bool)
                named = (BandKind("class", tuple(enumerate(own.classes))),) if own.classes else ()
                sources[mask] = measured(
                    values[:, None, None], everywhere, (mask.partition("/")[2],), kinds=named
                )
    return Stats(sources, len(arrays["chip_id"]))


_CLASS_ROWS = pa.schema(
    [("source", pa.string()), ("band", pa.string()), ("value", pa.int64()), ("name", pa.string()),
     ("count", pa.int64()), ("share", pa.float64())]
)  # fmt: skip


def _shown(table: pa.Table) -> list[str]:
    """Return a table as lines of text; none where it is empty."""
    rows = table.to_pylist()
    head = list(rows[0]) if rows else []
    texts = [head, *([f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows)]
    width = [max(len(line[i]) for line in texts) for i in range(len(head))]
    return ["  ".join(t.rjust(w) for t, w in zip(line, width, strict=True)) for line in texts if line]


def merged(parts: Iterable[Stats]) -> Stats:
    """Return the statistics of all chips of some parts, of the same sources and bands."""
    return functools.reduce(_both, parts)


def _both(a: Stats, b: Stats) -> Stats:
    return Stats({k: added(v, b.sources[k]) for k, v in a.sources.items()}, a.chips + b.chips)


def _same(name: str, value: str, wanted: str) -> None:
    if value != wanted:
        raise PlanError(
            f"normalizing source {name!r}", value, f"the {wanted} that were measured",
            "Give the statistics of these chips' train split, measured by stats().",
        )  # fmt: skip


def _keeps(name: str, stats: SourceStats) -> None:
    """Raise PlanError where float32, which measured bands become, would change the codes of bands beside them."""
    if stats.kept.all():
        return
    for band, kept, low, high in zip(stats.bands, stats.kept, stats.min, stats.max, strict=True):
        if kept and max(-low, high) > _EXACT:
            raise PlanError(
                f"normalizing source {name!r}", f"band {band!r} of codes up to {int(max(-low, high))}",
                "codes that float32 holds, as measured bands become (up to 2**24)",
                f"Join it as a source of its own: rd.join({name}=..., classes=source.harmonize([{band!r}])).",
            )  # fmt: skip


_EXACT = 2.0**24
"""Whole numbers up to this are exact in float32."""


def _valid(name: str, arrays: Arrays) -> NDArray[np.bool_]:
    values, said = arrays[name], arrays.get(f"{name}/valid")
    if said is None:
        if values.dtype.kind != "f":
            raise PlanError(
                f"normalizing source {name!r}", f"no {name}/valid", "where its integers are valid"
            )
        said = np.ones((*values.shape[:2], *values.shape[3:]), dtype=bool)
    result = np.empty_like(said)
    for chip, seen, out in zip(values, said, result, strict=True):
        out[...] = valid_pixels(chip, seen)
    return result


def _scaled(
    values: NDArray[Any], valid: NDArray[np.bool_], stats: SourceStats, fill: float
) -> NDArray[np.float32]:
    """Return normalized pixels, made chip by chip, so that temporaries stay in the processor's cache."""
    wide = np.result_type(values.dtype, np.float32)  # float64 but for types that float32 holds exactly
    mean = stats.mean.astype(wide)[:, None, None]
    spread = np.where(stats.constant, np.inf, stats.std).astype(wide)[:, None, None]
    kept = np.flatnonzero(stats.kept)
    result = np.empty(values.shape, dtype=np.float32)
    for chip, seen, out in zip(values, valid, result, strict=True):
        with np.errstate(
            invalid="ignore"
        ):  # an infinite pixel of a band that never varies: it is filled below
            apart = np.subtract(chip, mean, dtype=wide)
            apart /= spread
        out[...] = apart
        out[:, kept] = chip[:, kept]
        if not seen.all():
            np.copyto(out, np.float32(fill), where=~seen[:, None])
    return result


_ARRAYS = ("mean", "square", "min", "max")


def _fields(stats: SourceStats) -> dict[str, Any]:
    packed = [[_packed(numbers), _packed(counts)] for numbers, counts in stats.buckets]
    numbers = {k: [None if np.isnan(v) else v for v in getattr(stats, k).tolist()] for k in _ARRAYS}
    head = {
        "bands": list(stats.bands), "dtype": stats.dtype, "units": stats.units, "total": stats.total,
        "count": stats.count.tolist(), "by_value": list(stats.by_value),
        "kinds": [[kind.kind, list(kind.classes)] for kind in stats.kinds],
    }  # fmt: skip
    return {**head, **numbers, "buckets": packed}


def _of(fields: Mapping[str, Any]) -> SourceStats:
    arrays = {k: np.array([np.nan if v is None else v for v in fields[k]], dtype=np.float64) for k in _ARRAYS}
    buckets = tuple((_unpacked(a), _unpacked(b)) for a, b in fields["buckets"])
    if len({len(fields[k]) for k in (*_ARRAYS, "bands", "count", "buckets", "by_value")}) != 1:
        raise ValueError("columns of several lengths")
    if [int(counts.sum()) for _, counts in buckets] != fields["count"]:
        raise ValueError("buckets that do not add up to the count")
    return SourceStats(
        bands=tuple(fields["bands"]),
        dtype=str(fields["dtype"]),
        units=str(fields["units"]),
        total=int(fields["total"]),
        count=np.array(fields["count"], dtype=np.int64),
        buckets=buckets,
        by_value=tuple(bool(known) for known in fields["by_value"]),
        kinds=tuple(
            BandKind(kind_of(kind).name, tuple((int(value), str(name)) for value, name in classes))
            for kind, classes in fields["kinds"]
        ),
        **arrays,
    )


def _packed(values: NDArray[np.int64]) -> str:
    return base64.b64encode(zlib.compress(values.astype("<i8").tobytes())).decode()


def _unpacked(text: str) -> NDArray[np.int64]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i8").astype(np.int64)
