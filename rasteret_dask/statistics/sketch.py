# SPDX-License-Identifier: Apache-2.0
"""Counts, moments, extremes, percentiles and classes of one source's pixels, which add up over shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.planning.bandkinds import BandKind
from rasteret_dask.rules.kinds import kind_of

__all__ = ["SourceStats", "added", "measured", "valid_pixels"]

_BUCKETS = 2**16
"""Buckets of floats, and the most distinct values of a band of integers that are counted one by one."""

_UNSIGNED = {"bool": np.uint8, "int8": np.uint8, "uint8": np.uint8, "int16": np.uint16, "uint16": np.uint16}
"""The types that have no more values than buckets, and what their bits are counted as."""

MAX_CLASSES = 256
"""An integer band of at most so many distinct values has them counted as classes."""

_Moments: TypeAlias = tuple[int, float, float, float, float]
"""Count, mean, sum of squared distances from it, smallest and largest."""

_Counts: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Values or numbers of buckets, rising, and how many pixels each has."""

_Band: TypeAlias = tuple[_Moments, _Counts, bool]
"""What is known of a band; last, whether its counts are of values."""

_NONE: _Moments = (0, np.nan, 0.0, np.nan, np.nan)
_EMPTY: _Counts = (np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64))
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class SourceStats:
    """The valid pixels of one source, in the numbers that are stored. Arrays have shape (band,).

    Which pixels are valid :func:`valid_pixels` says. Values of integers are counted one by one, while a band has at
    most 65,536 distinct ones; all others in as many buckets, by sign, exponent and the first 7 bits of the mantissa of
    a float32: either way counts of shards add up, whatever their order. All arithmetic is that of float64, in which
    integers beyond 2**53 are rounded.
    """

    bands: tuple[str, ...]
    dtype: str
    """NumPy name of the pixels' type."""
    units: str
    """Such as ``"reflectance"``; "" where nobody knows, as after a user's function."""
    total: int
    """Pixels of one band, valid or not, where the source is present."""
    count: NDArray[np.int64]
    """Valid pixels."""
    mean: NDArray[np.float64]
    square: NDArray[np.float64]
    """Sum of squared distances from the mean."""
    min: NDArray[np.float64]
    max: NDArray[np.float64]
    buckets: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...] = field(repr=False)
    """Per band: values, or numbers of the buckets that are not empty, rising, and how many pixels each has."""
    by_value: tuple[bool, ...]
    """Per band: whether values are counted one by one."""
    kinds: tuple[BandKind, ...] = ()
    """Per band: what its numbers are; () where nobody knows."""

    @property
    def coded(self) -> NDArray[np.bool_]:
        """Where a band holds codes (classes, bit fields): these have counts, but no mean, deviation or percentiles."""
        return np.array([kind_of(kind.kind).is_coded for kind in self._kinds], dtype=bool)

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Where :meth:`Stats.normalize` leaves a band as it is."""
        return np.array([not kind_of(kind.kind).normalized for kind in self._kinds], dtype=bool)

    @property
    def kind_names(self) -> tuple[str, ...]:
        """What each band is, ``"unknown"`` where nobody knows."""
        return tuple(kind.kind or "unknown" for kind in self._kinds)

    @property
    def _kinds(self) -> tuple[BandKind, ...]:
        return self.kinds or (BandKind(),) * len(self.bands)

    @property
    def exact(self) -> bool:
        """Whether percentiles of all bands are exact; else they are at most 0.4 % (2**-8) of their value off.

        That holds from 1.2e-38 to 3.4e38, the range of a float32; what is smaller counts as 0, what is larger as that.
        """
        return all(self.by_value)

    @property
    def std(self) -> NDArray[np.float64]:
        """Standard deviation of the valid pixels (``ddof=0``); NaN where there is none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.sqrt(self.square / self.count))

    @property
    def constant(self) -> NDArray[np.bool_]:
        """Where a band never varies, but for the rounding of float64."""
        return np.asarray((self.min == self.max) | (self.std <= np.finfo(np.float64).eps * np.abs(self.mean)))

    @property
    def valid_fraction(self) -> NDArray[np.float64]:
        """Share of pixels that are valid."""
        return np.asarray(self.count / max(self.total, 1))

    @property
    def classes(self) -> dict[str, dict[int, int]]:
        """Band -> value -> pixels, for bands of codes, and for other integer bands of at most 256 distinct values."""
        return {
            band: dict(zip(values.tolist(), counts.tolist(), strict=True))
            for band, coded, known, (values, counts) in zip(
                self.bands, self.coded, self.by_value, self.buckets, strict=True
            )
            if known and (coded or len(values) <= MAX_CLASSES)
        }

    @property
    def shares(self) -> dict[str, dict[int, float]]:
        """Band -> value -> share of the band's valid pixels; of the bands of :attr:`classes`."""
        return {
            band: {value: pixels / sum(counts.values()) for value, pixels in counts.items()}
            for band, counts in self.classes.items()
        }

    @property
    def names(self) -> dict[str, dict[int, str]]:
        """Band -> value -> name of that class, of bands whose classes have names."""
        return {
            band: dict(kind.classes)
            for band, kind in zip(self.bands, self._kinds, strict=True)
            if kind.classes
        }

    def percentile(self, q: float) -> NDArray[np.float64]:
        """Return the value below which ``q`` percent of each band's valid pixels lie; NaN where there are none.

        Bands of codes have none.

        It is NumPy's ``method="inverted_cdf"``, exactly or to 0.4 %: see :attr:`exact`.

        Raises
        ------
        PlanError
            When ``q`` is not from 0 to 100.
        """
        if not 0 <= q <= 100:
            raise PlanError("percentile(q=)", repr(q), "0 to 100")
        found = [
            _quantile(own, known, q / 100) for own, known in zip(self.buckets, self.by_value, strict=True)
        ]
        return np.where(self.coded, np.nan, np.clip(np.array(found), self.min, self.max))

    def histogram(self, bins: int = 24, ends: NDArray[np.float64] | None = None) -> NDArray[np.int64]:
        """Return how many valid pixels lie in each of some equal parts of a range; what lies beyond is left out.

        Parameters
        ----------
        bins
            How many parts.
        ends
            Shape (band, 2): where the range of each band begins and ends, NaN for bands without one. None: from
            percentile 0.5 to 99.5.

        Returns
        -------
        numpy.ndarray
            Shape (band, bin). All 0 for bands of codes, and for those without a valid pixel.
        """
        result = np.zeros((len(self.bands), bins), dtype=np.int64)
        if ends is None:
            ends = np.stack([self.percentile(0.5), self.percentile(99.5)], axis=-1)
        for band, (low, high) in enumerate(ends.tolist()):
            numbers, counts = self.buckets[band]
            if np.isfinite([low, high]).all() and len(numbers):
                values = numbers.astype(np.float64) if self.by_value[band] else _middles(numbers)
                values = np.clip(values, self.min[band], self.max[band])  # as percentiles are
                result[band] = np.histogram(values, bins, (low, high), weights=counts)[0]
        return result


def _quantile(counted: _Counts, by_value: bool, share: float) -> float:
    numbers, counts = counted
    if not len(numbers):
        return np.nan
    upto = np.cumsum(counts)
    at = numbers[np.searchsorted(upto, max(share * int(upto[-1]), 1.0))]
    return float(at) if by_value else float(_middles(np.array([at]))[0])


def valid_pixels(pixels: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which pixels are valid, in all bands or none: here and nowhere else in this package's statistics.

    Parameters
    ----------
    pixels
        Shape (..., time, band, y, x).
    valid
        Shape (..., time, y, x): what the source says, as ``<source>/valid``.

    Returns
    -------
    numpy.ndarray
        Shape (..., time, y, x). True where the source says so and, in floats, no band is NaN or infinite.
    """
    if pixels.dtype.kind != "f":
        return valid
    return np.asarray(valid & np.isfinite(pixels).all(axis=-3))


def measured(
    pixels: NDArray[Any],
    valid: NDArray[np.bool_],
    bands: tuple[str, ...],
    units: str = "",
    kinds: tuple[BandKind, ...] = (),
    present: NDArray[np.bool_] | None = None,
) -> SourceStats:
    """Measure pixels chip by chip, so that temporaries stay in the processor's cache.

    Parameters
    ----------
    pixels
        Shape (chip, time, band, y, x).
    valid
        Shape (chip, time, y, x): as in :func:`valid_pixels`.
    bands
        Names of the bands.
    units
        What they are measured in; "" where nobody knows.
    kinds
        What the numbers of each band are; () where nobody knows.
    present
        Shape (chip, time). Where a slot has a record: only those slots count. None: all.
    """
    coded = [kind_of(kind.kind).is_coded for kind in kinds] or [False] * len(bands)
    seen = [valid_pixels(*one) for one in zip(pixels, valid, strict=True)]
    found: list[_Band] = []
    for band in range(len(bands)):
        chips = (chip[:, band][ok] for chip, ok in zip(pixels, seen, strict=True) if ok.any())
        if coded[band] and pixels.dtype.kind == "f":  # codes beside measured bands
            chips = (values.astype(np.int64) for values in chips)
        narrow = pixels.dtype.name in _UNSIGNED
        whole = coded[band] or pixels.dtype.kind in "iu"
        one = _narrow(chips, pixels.dtype) if narrow else _wide(chips, whole)
        found.append(_without_moments(one) if coded[band] else one)
    slots = pixels.shape[0] * pixels.shape[1] if present is None else np.count_nonzero(present)
    total = int(slots) * pixels.shape[3] * pixels.shape[4]
    return replace(_put_together(bands, pixels.dtype.name, units, total, found), kinds=kinds)


def _without_moments(band: _Band) -> _Band:
    """Return a band whose values have no mean."""
    (count, _, _, low, high), counts, by_value = band
    return (count, np.nan, np.nan, low, high), counts, by_value


def _put_together(
    bands: tuple[str, ...], dtype: str, units: str, total: int, measures: Sequence[_Band]
) -> SourceStats:
    moments, counts, by_value = zip(*measures, strict=True)
    count, mean, square, low, high = (np.array(column) for column in zip(*moments, strict=True))
    return SourceStats(
        bands, dtype, units, total, count.astype(np.int64), mean, square, low, high, counts, by_value
    )


def _narrow(chips: Iterable[NDArray[Any]], dtype: np.dtype[Any]) -> _Band:
    """Count values of a type that has no more than there are buckets."""
    bits = _UNSIGNED[dtype.name]
    dense = np.zeros(_BUCKETS, dtype=np.int64)
    for values in chips:
        dense += np.bincount(values.view(bits), minlength=_BUCKETS)
    places, pixels = _sparse(dense)
    values = places.astype(bits).view(dtype).astype(np.int64)
    rising = np.argsort(values)  # the bits of negative values follow those of positive ones
    counts = values[rising], pixels[rising]
    return _moments_of(counts), counts, True


def _wide(chips: Iterable[NDArray[Any]], integers: bool) -> _Band:
    """Count values of any other type: integers one by one while they are few enough, all else in buckets."""
    counts, left = _EMPTY, iter(chips)
    if integers:
        for values in left:
            more = _counted(values)
            both = None if more is None else _both(counts, more)
            if both is None or len(both[0]) > _BUCKETS:
                left = chain([values], left)
                break
            counts = both
        else:
            return _moments_of(counts), counts, True
    moments, dense = _moments_of(counts), _dense(counts)
    for values in left:
        moments = _add(moments, _moments(values.astype(np.float64)))
        dense += np.bincount(_bucket(values), minlength=_BUCKETS)
    return moments, _sparse(dense[_BY_VALUE]), False


def _counted(values: NDArray[Any]) -> _Counts | None:
    """Count integers one by one; None where there are too many distinct ones, or one is beyond int64."""
    low, high = int(values.min()), int(values.max())
    if high > np.iinfo(np.int64).max:
        return None
    if high - low < _BUCKETS:
        places, counts = _sparse(np.bincount((values - values.dtype.type(low)).astype(np.int64)))
        return places + low, counts
    distinct, counts = np.unique(values, return_counts=True)
    return None if len(distinct) > _BUCKETS else (distinct.astype(np.int64), counts.astype(np.int64))


def _sparse(dense: NDArray[np.int64]) -> _Counts:
    places = np.flatnonzero(dense)
    return places, dense[places]


def _both(a: _Counts, b: _Counts) -> _Counts:
    """Add counts of two parts."""
    if not len(a[0]) or not len(b[0]):
        return a if len(a[0]) else b
    numbers, place = np.unique(np.concatenate([a[0], b[0]]), return_inverse=True)
    counts = np.zeros(len(numbers), dtype=np.int64)
    np.add.at(counts, place, np.concatenate([a[1], b[1]]))
    return numbers, counts


def _dense(counts: _Counts) -> NDArray[np.int64]:
    """Return counts of values as those of all buckets, not yet by value."""
    dense = np.zeros(_BUCKETS, dtype=np.int64)
    np.add.at(dense, _bucket(counts[0]), counts[1])
    return dense


def _moments_of(counts: _Counts) -> _Moments:
    """Return the moments of values that were counted."""
    return _moments(counts[0].astype(np.float64), counts[1]) if len(counts[0]) else _NONE


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
    found = [_added(one, two) for one, two in zip(_bands(a), _bands(b), strict=True)]
    return replace(_put_together(a.bands, a.dtype, a.units, a.total + b.total, found), kinds=a.kinds)


def _bands(stats: SourceStats) -> list[_Band]:
    columns = (stats.count, stats.mean, stats.square, stats.min, stats.max)
    moments = zip(*(column.tolist() for column in columns), strict=True)
    return list(zip(moments, stats.buckets, stats.by_value, strict=True))


def _added(a: _Band, b: _Band) -> _Band:
    moments = _add(a[0], b[0])
    if a[2] and b[2]:
        counts = _both(a[1], b[1])
        few = len(counts[0]) <= _BUCKETS
        return moments, counts if few else _sparse(_dense(counts)[_BY_VALUE]), few
    one, two = (_sparse(_dense(own)[_BY_VALUE]) if by_value else own for _, own, by_value in (a, b))
    return moments, _both(one, two), False


def _bucket(values: NDArray[Any]) -> NDArray[np.int64]:
    """Return each value's bucket: the upper half of its float32's bits (not yet by value)."""
    if values.dtype == np.float64:
        values = np.clip(values, -_LARGEST, _LARGEST)
    return (values.astype(np.float32, copy=False).view(np.uint32) >> 16).astype(np.int64)


def _by_value() -> NDArray[np.int64]:
    """Return the upper halves of float32s by rising value: negative ones backwards, then positive ones."""
    half = _BUCKETS // 2
    return np.concatenate([np.arange(_BUCKETS - 1, half - 1, -1), np.arange(half)])


_BY_VALUE = _by_value()


def _middles(numbers: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the middles of buckets of float32s, in float64; 0 for the smallest ones, whose exponent is 0."""
    upper = _BY_VALUE[numbers].astype(np.uint32) << np.uint32(16)
    ends = np.stack([upper, upper | np.uint32(0xFFFF)]).view(np.float32)
    return np.where(upper & np.uint32(0x7F800000), ends.astype(np.float64).mean(axis=0), 0.0)
