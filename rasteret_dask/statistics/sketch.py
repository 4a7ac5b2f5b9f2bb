"""Counts, moments, extremes, percentiles and classes of one source's pixels, which add up over shards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError

__all__ = ["SourceStats", "added", "measured"]

_BUCKETS = 2**16
_LOWEST = {"int8": -128, "uint8": 0, "int16": -32768, "uint16": 0}
"""The types whose values are counted one by one, and the smallest of each."""

MAX_CLASSES = 256
"""An integer band of at most so many distinct values has them counted as classes."""


@dataclass(frozen=True)
class SourceStats:
    """The valid pixels of one source, in the numbers that are stored. Arrays have shape (band,).

    Floats are valid where they are finite, each band by itself; integers where the source says so.
    Values are counted in 65,536 buckets a band: integers of 8 and 16 bits one by one, everything else by sign,
    exponent and the first 7 bits of the mantissa of a float32, so that counts of shards add up whatever their order.
    """

    bands: tuple[str, ...]
    dtype: str
    """NumPy name of the pixels' type."""
    total: int
    """Pixels of one band, valid or not."""
    count: NDArray[np.int64]
    """Valid pixels."""
    mean: NDArray[np.float64]
    square: NDArray[np.float64]
    """Sum of squared distances from the mean."""
    min: NDArray[np.float64]
    max: NDArray[np.float64]
    buckets: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...] = field(repr=False)
    """Per band: numbers of the buckets that are not empty, rising by value, and how many pixels each holds."""

    @property
    def exact(self) -> bool:
        """Whether percentiles are exact; else they are at most 0.4 % (2**-8) of their value off."""
        return self.dtype in _LOWEST

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation of the valid pixels (``ddof=0``); NaN where there is none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.sqrt(self.square / self.count))

    @property
    def valid_fraction(self) -> NDArray[np.float64]:
        """Share of pixels that are valid."""
        return np.asarray(self.count / max(self.total, 1))

    @property
    def classes(self) -> dict[str, dict[int, int]]:
        """Band -> value -> pixels, for integer bands of at most 256 distinct values."""
        if not self.exact:
            return {}
        return {
            band: dict(zip((numbers + _LOWEST[self.dtype]).tolist(), counts.tolist(), strict=True))
            for band, (numbers, counts) in zip(self.bands, self.buckets, strict=True)
            if len(numbers) <= MAX_CLASSES
        }

    def percentile(self, q: float) -> NDArray[np.float64]:
        """Return the value below which ``q`` percent of each band's valid pixels lie; NaN where there is none.

        It is NumPy's ``method="inverted_cdf"``, exactly or to 0.4 %: see :attr:`exact`.

        Raises
        ------
        PlanError
            When ``q`` is not from 0 to 100.
        """
        if not 0 <= q <= 100:
            raise PlanError("percentile(q=)", repr(q), "0 to 100")
        found = [self._quantile(*own, q / 100) for own in self.buckets]
        return np.asarray(np.clip(np.array(found), self.min, self.max))

    def _quantile(self, numbers: NDArray[np.int64], counts: NDArray[np.int64], share: float) -> float:
        if not len(numbers):
            return np.nan
        upto = np.cumsum(counts)
        at = numbers[np.searchsorted(upto, max(share * int(upto[-1]), 1.0))]
        return float(at + _LOWEST[self.dtype]) if self.exact else _middle(int(at))


def measured(pixels: NDArray[Any], valid: NDArray[np.bool_], bands: tuple[str, ...]) -> SourceStats:
    """Measure pixels chip by chip, so that temporaries stay in the processor's cache.

    Parameters
    ----------
    pixels
        Shape (chip, time, band, y, x).
    valid
        Shape (chip, time, y, x): where integers are valid. Floats are where they are finite, each band by itself.
    bands
        Names of the bands.
    """
    found = []
    lowest = _LOWEST.get(pixels.dtype.name)
    for band in range(len(bands)):
        counts = np.zeros(_BUCKETS, dtype=np.int64)
        moments = (0, 0.0, 0.0, np.inf, -np.inf)
        for chip, seen in zip(pixels, valid, strict=True):
            layer = chip[:, band]
            values = layer[np.isfinite(layer)] if layer.dtype.kind == "f" else layer[seen]
            if not len(values):
                continue
            counts += np.bincount(_bucket(values, lowest), minlength=_BUCKETS)
            if lowest is None:
                moments = _add(moments, _moments(values.astype(np.float64)))
        counts = counts[_BY_VALUE] if lowest is None else counts
        numbers = np.flatnonzero(counts)
        if lowest is not None and len(numbers):
            moments = _moments((numbers + lowest).astype(np.float64), counts[numbers])
        found.append((moments, (numbers, counts[numbers])))
    count, mean, square, low, high = zip(*(m for m, _ in found), strict=True)
    total = int(pixels[:, :, 0].size)
    return SourceStats(
        bands, pixels.dtype.name, total, np.array(count, dtype=np.int64), _known(mean, count), np.array(square),
        _known(low, count), _known(high, count), tuple(b for _, b in found),
    )  # fmt: skip


_Moments: TypeAlias = tuple[int, float, float, float, float]


def _moments(values: NDArray[np.float64], counts: NDArray[np.int64] | None = None) -> _Moments:
    """Return count, mean, sum of squared distances from it, smallest and largest."""
    n = len(values) if counts is None else int(counts.sum())
    mean = float(np.average(values, weights=counts))
    apart = np.square(values - mean)
    square = float(apart.sum() if counts is None else (apart * counts).sum())
    return n, mean, square, float(values.min()), float(values.max())


def _add(a: _Moments, b: _Moments) -> _Moments:
    """Add moments of two parts (Chan, Golub and LeVeque 1983, updating formulae, eq. 2.1)."""
    n = a[0] + b[0]
    if not a[0] or not b[0]:
        return a if a[0] else b
    apart = b[1] - a[1]
    mean = a[1] + apart * (b[0] / n)
    square = a[2] + b[2] + apart * apart * (a[0] * (b[0] / n))
    return n, mean, square, min(a[3], b[3]), max(a[4], b[4])


def added(a: SourceStats, b: SourceStats) -> SourceStats:
    """Return what two parts of a source's chips are together."""
    rows = [
        _add((int(n), m, s, lo, hi), (int(n2), m2, s2, lo2, hi2))
        for n, m, s, lo, hi, n2, m2, s2, lo2, hi2 in zip(
            a.count, a.mean, a.square, a.min, a.max, b.count, b.mean, b.square, b.min, b.max, strict=True
        )
    ]
    count, mean, square, low, high = (np.array(column) for column in zip(*rows, strict=True))
    buckets = []
    for one, two in zip(a.buckets, b.buckets, strict=True):
        numbers, place = np.unique(np.concatenate([one[0], two[0]]), return_inverse=True)
        counts = np.zeros(len(numbers), dtype=np.int64)
        np.add.at(counts, place, np.concatenate([one[1], two[1]]))
        buckets.append((numbers, counts))
    return SourceStats(
        a.bands, a.dtype, a.total + b.total, count.astype(np.int64), mean, square, low, high, tuple(buckets)
    )


def _known(values: Sequence[float], count: Sequence[int]) -> NDArray[np.float64]:
    return np.asarray(np.where(np.array(count) > 0, np.array(values, dtype=np.float64), np.nan))


def _bucket(values: NDArray[Any], lowest: int | None) -> NDArray[np.int64]:
    """Return each value's bucket: the value itself, or the upper half of its float32's bits (not yet by value)."""
    if lowest is not None:
        return values.astype(np.int64) - lowest
    return (values.astype(np.float32, copy=False).view(np.uint32) >> 16).astype(np.int64)


def _by_value() -> NDArray[np.int64]:
    """Return the upper halves of float32s by rising value: negative ones backwards, then positive ones."""
    half = _BUCKETS // 2
    return np.concatenate([np.arange(_BUCKETS - 1, half - 1, -1), np.arange(half)])


_BY_VALUE = _by_value()


def _middle(number: int) -> float:
    """Return the middle of a bucket of float32s, in float64."""
    upper = np.uint32(_BY_VALUE[number]) << np.uint32(16)
    ends = np.array([upper, upper | np.uint32(0xFFFF)], dtype=np.uint32).view(np.float32)
    return float(ends.astype(np.float64).mean())
