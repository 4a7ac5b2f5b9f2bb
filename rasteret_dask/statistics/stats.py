"""What the pixels of some chips look like, of all sources: shown, saved, and used to normalize."""

from __future__ import annotations

import base64
import functools
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError, SchemaError
from rasteret_dask.net import remote
from rasteret_dask.statistics.sketch import SourceStats, added, measured
from rasteret_dask.tasks.batches import Arrays

__all__ = ["Stats", "measure", "merged"]


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

        Parameters
        ----------
        arrays
            Chips as arrays, a batch say; what is not pixels stays as it is.
        fill
            What invalid pixels become: NaN, or 0 for the band's mean.

        Raises
        ------
        PlanError
            When there are pixels of a source that was not measured, or with other bands.
        """
        result = dict(arrays)
        for name, values in arrays.items():
            if values.ndim != 5:
                continue
            own = self[name]
            if values.shape[2] != len(own.bands):
                raise PlanError(
                    f"normalizing source {name!r}",
                    f"{values.shape[2]} bands",
                    f"the {len(own.bands)} that were measured",
                )
            spread = np.where(own.std > 0, own.std, 1.0).astype(np.float32)[:, None, None]
            scaled = np.subtract(values, own.mean.astype(np.float32)[:, None, None], dtype=np.float32)
            scaled /= spread
            if values.dtype.kind != "f":
                scaled[np.broadcast_to(~arrays[f"{name}/valid"][:, :, None], scaled.shape)] = fill
            elif not np.isnan(fill):
                scaled[np.isnan(scaled)] = fill
            result[name] = scaled
        return result

    @property
    def table(self) -> pa.Table:
        """One row a source and band."""
        rows: list[dict[str, Any]] = []
        for name, own in self.sources.items():
            columns = {
                "count": own.count, "valid_fraction": own.valid_fraction, "mean": own.mean, "std": own.std,
                "min": own.min, "p2": own.percentile(2), "p50": own.percentile(50), "p98": own.percentile(98),
                "max": own.max,
            }  # fmt: skip
            rows += [
                {"source": name, "band": band, **{k: v[i].item() for k, v in columns.items()}}
                for i, band in enumerate(own.bands)
            ]
        return pa.Table.from_pylist(rows)

    def __repr__(self) -> str:
        rows = self.table.to_pylist()
        head = list(rows[0]) if rows else []
        texts = [head, *([v if isinstance(v, str) else f"{v:.6g}" for v in row.values()] for row in rows)]
        width = [max(len(line[i]) for line in texts) for i in range(len(head))]
        lines = ["  ".join(t.rjust(w) for t, w in zip(line, width, strict=True)) for line in texts]
        return "\n".join([f"<Stats of {self.chips} chips>", *lines])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as JSON, to a local path or a URL."""
        remote.put(_place(path), self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Stats:
        """Read what :meth:`save` wrote.

        Raises
        ------
        SchemaError
            When it is something else.
        """
        return cls.from_json(remote.get(_place(path)).decode(), os.fspath(path))

    def to_json(self) -> str:
        """Return them as JSON text."""
        return json.dumps({"chips": self.chips, "sources": {k: _said(v) for k, v in self.sources.items()}})

    @classmethod
    def from_json(cls, text: str, subject: str = "statistics") -> Stats:
        """Return what :meth:`to_json` made."""
        try:
            said = json.loads(text)
            return cls({k: _of(v) for k, v in said["sources"].items()}, int(said["chips"]))
        except (ValueError, KeyError, TypeError, zlib.error) as error:
            raise SchemaError(f"reading {subject}", f"{error}", "what Stats.save wrote") from error


def measure(arrays: Arrays, bands: Mapping[str, Sequence[str]]) -> Stats:
    """Measure some chips.

    Parameters
    ----------
    arrays
        The chips.
    bands
        Source -> names of its bands.
    """
    sources = {
        name: measured(arrays[name], arrays[f"{name}/valid"], tuple(own)) for name, own in bands.items()
    }
    return Stats(sources, len(arrays["chip_id"]))


def merged(parts: Iterable[Stats]) -> Stats:
    """Return the statistics of all chips of some parts, of the same sources and bands."""
    return functools.reduce(_both, parts)


def _both(a: Stats, b: Stats) -> Stats:
    return Stats({k: added(v, b.sources[k]) for k, v in a.sources.items()}, a.chips + b.chips)


def _place(path: str | os.PathLike[str]) -> str:
    place = os.fspath(path)
    return place if "://" in place else os.path.abspath(place)


_ARRAYS = ("mean", "square", "min", "max")


def _said(own: SourceStats) -> dict[str, Any]:
    packed = [[_packed(numbers), _packed(counts)] for numbers, counts in own.buckets]
    numbers = {
        k: [None if np.isnan(v) else v for v in getattr(own, k).tolist()] for k in _ARRAYS
    }  # fmt: skip
    head = {"bands": list(own.bands), "dtype": own.dtype, "total": own.total, "count": own.count.tolist()}
    return {**head, **numbers, "buckets": packed}


def _of(said: Mapping[str, Any]) -> SourceStats:
    arrays = {k: np.array([np.nan if v is None else v for v in said[k]], dtype=np.float64) for k in _ARRAYS}
    return SourceStats(
        bands=tuple(said["bands"]),
        dtype=str(said["dtype"]),
        total=int(said["total"]),
        count=np.array(said["count"], dtype=np.int64),
        buckets=tuple((_unpacked(a), _unpacked(b)) for a, b in said["buckets"]),
        **arrays,
    )


def _packed(values: NDArray[np.int64]) -> str:
    return base64.b64encode(zlib.compress(values.astype("<i8").tobytes())).decode()


def _unpacked(text: str) -> NDArray[np.int64]:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i8").astype(np.int64)
