# SPDX-License-Identifier: Apache-2.0
"""Picks: which of the acquisitions that compete for a slot its pixels come from."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.rules.values import RuleValue, one_of

__all__ = [
    "FEW", "PICKS", "Candidates", "Clearest", "Closest", "Composed", "Composition", "First", "Last", "LeastCloudy",
    "Majority", "Mean", "Median", "Nearest", "Newest", "Pick", "PickName", "Ranked", "Scored", "pick_named",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Candidates:
    """Acquisitions that compete for slots; every array has one entry per (chip, slot, acquisition).

    Examples
    --------
    >>> import numpy as np
    >>> from rasteret_dask.rules.picks import Candidates, LeastCloudy
    >>> when = np.array([0, 1])
    >>> two = Candidates(start=when, end=when, cloud=np.array([40.0, 5.0]), distance=when)
    >>> int(LeastCloudy().order(two).argmin())  # the second has fewer clouds
    1
    """

    start: NDArray[np.int64]
    """Nanoseconds since 1970, UTC."""
    end: NDArray[np.int64]
    """The same as ``start`` where it is no interval."""
    cloud: NDArray[np.float64]
    """Mean of the records' own figures, percent; inf where none is known."""
    distance: NDArray[np.int64]
    """From the middle of the slot to that of the acquisition, nanoseconds; 0 where there is no time axis."""


class Pick(RuleValue, ABC):
    """How the pixels of a slot are chosen among its acquisitions. Subclass one of the three below.

    Examples
    --------
    >>> from rasteret_dask.rules.picks import Pick, pick_named
    >>> isinstance(pick_named("median"), Pick)
    True
    """

    __slots__ = ()

    @property
    def name(self) -> str:
        """What ``explain()`` and outputs call it.

        Examples
        --------
        >>> from rasteret_dask.rules.picks import LeastCloudy, Median
        >>> Median().name, LeastCloudy().name
        ('median', 'least_cloudy')
        """
        return type(self).__name__.lower()

    def __str__(self) -> str:
        return self.name

    @property
    def fills(self) -> bool:
        """Whether what is invalid in the chosen acquisition comes from the next one.

        Examples
        --------
        >>> from rasteret_dask.rules.picks import Closest, Median
        >>> Closest(fill=True).fills, Median().fills
        (True, False)
        """
        return False

    @abstractmethod
    def bytes_held(self, candidates: int, bands: int, itemsize: int) -> int:
        """Return the bytes a pixel that a slot needs beside its output, all bands together.

        Examples
        --------
        >>> from rasteret_dask.rules.picks import Closest, Median
        >>> Closest().bytes_held(5, 3, 4), Median().bytes_held(5, 3, 4)
        (0, 75)
        """


class Ranked(Pick):
    """The first by an order that the plan knows: no pixel is read to decide.

    An acquisition that covers the chip comes before one that does not, whatever the order; ties go to the nearest
    to the slot's middle, then to the smaller id.

    Examples
    --------
    >>> import dataclasses
    >>> from rasteret_dask.rules.picks import Ranked
    >>> @dataclasses.dataclass(frozen=True)
    ... class Longest(Ranked):
    ...     fill: bool = False
    ...
    ...     def order(self, candidates):
    ...         return candidates.start - candidates.end
    """

    __slots__ = ()
    fill: bool
    """Whether what is invalid in the first comes from the next in order."""
    coverage_first: ClassVar[bool] = True
    """Whether an acquisition that covers the chip comes before one that does not, whatever the order."""

    @property
    def fills(self) -> bool:
        """See ``fill``."""
        return self.fill

    @abstractmethod
    def order(self, candidates: Candidates) -> NDArray[Any]:
        """Return a number an acquisition; the smallest comes first. Shape (candidate,).

        Examples
        --------
        >>> import numpy as np
        >>> from rasteret_dask.rules.picks import Candidates, Last
        >>> when = np.array([10, 30, 20])
        >>> int(Last().order(Candidates(when, when, when * 0.0, when)).argmin())
        1
        """

    def bytes_held(self, candidates: int, bands: int, itemsize: int) -> int:
        """Return 0: pixels go to their places."""
        return 0


class Scored(Pick):
    """The one with the highest score of its clear pixels, over the whole chip.

    Examples
    --------
    >>> import dataclasses
    >>> import numpy as np
    >>> from rasteret_dask.rules.picks import Scored
    >>> @dataclasses.dataclass(frozen=True)
    ... class ClearMiddle(Scored):
    ...     fill: bool = False
    ...
    ...     def score(self, clear):
    ...         return float(np.count_nonzero(clear[8:24, 8:24]))
    """

    __slots__ = ()
    fill: bool
    """Whether what is invalid in the best comes from the next best."""

    @property
    def fills(self) -> bool:
        """See ``fill``."""
        return self.fill

    @abstractmethod
    def score(self, clear: NDArray[np.bool_]) -> float:
        """Return the score of one acquisition over one chip; ``clear`` has shape (y, x).

        Examples
        --------
        >>> import numpy as np
        >>> from rasteret_dask.rules.picks import Clearest
        >>> Clearest().score(np.array([[True, False], [True, True]]))
        3.0
        """

    def bytes_held(self, candidates: int, bands: int, itemsize: int) -> int:
        """Return what the quality bands of all candidates take, with their validity."""
        return 4 * candidates


class Composition(Protocol):
    """What becomes of the acquisitions of one slot and chip, while they come.

    Examples
    --------
    >>> import numpy as np
    >>> from rasteret_dask.rules.picks import Mean
    >>> mean = Mean().begin()
    >>> for rank, value in enumerate((1.0, 3.0)):
    ...     mean.add(np.full((1, 2, 2), value), np.ones((1, 2, 2), bool), rank)
    >>> float(mean.result()[0][0, 0, 0])
    2.0
    """

    def add(self, values: NDArray[Any], valid: NDArray[np.bool_], rank: int) -> None:
        """Take an acquisition, in order of its start; shapes (band, y, x); rank 0 is the nearest to the middle.

        Examples
        --------
        >>> import numpy as np
        >>> from rasteret_dask.rules.picks import Mean
        >>> mean = Mean().begin()
        >>> mean.add(np.ones((1, 2, 2)), np.zeros((1, 2, 2), bool), 0)  # a cloudy one: it does not count
        """

    def result(self) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return values and validity, shapes (band, y, x).

        Examples
        --------
        >>> import numpy as np
        >>> from rasteret_dask.rules.picks import Mean
        >>> mean = Mean().begin()
        >>> mean.add(np.ones((1, 2, 2)), np.zeros((1, 2, 2), bool), 0)
        >>> bool(mean.result()[1].any())  # nothing is valid
        False
        """


class Composed(Pick):
    """Pixels made of all acquisitions.

    Examples
    --------
    >>> import dataclasses
    >>> import numpy as np
    >>> from rasteret_dask.rules.picks import Composed
    >>> @dataclasses.dataclass(frozen=True)
    ... class Greatest(Composed):
    ...     def blend(self, stack, valid):
    ...         return np.where(valid, stack, -np.inf).max(axis=0), valid.any(axis=0)
    """

    __slots__ = ()
    bandwise: ClassVar[bool] = False
    """Whether each band is made of itself alone, so that it can be computed without the others."""
    chooses: ClassVar[bool] = False
    """Whether each pixel becomes a number that one of the acquisitions has. Such numbers stay in their own type, so
    that integers of 64 bits are exact; others are calculated as floats."""

    @abstractmethod
    def blend(self, stack: NDArray[Any], valid: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return values and validity, shape (band, y, x), of acquisitions, shape (candidate, band, y, x).

        Invalid values mean nothing. All bands are measured ones, floats unless the pick ``chooses``; classes and bit
        fields go their own way.

        Examples
        --------
        >>> import numpy as np
        >>> from rasteret_dask.rules.picks import Median
        >>> stack = np.array([1.0, 2.0, 9.0]).reshape(3, 1, 1, 1)
        >>> values, valid = Median().blend(stack, np.ones(stack.shape, bool))
        >>> values.item(), valid.item()
        (2.0, True)
        """

    def begin(self) -> Composition:
        """Return where acquisitions go; by default they are held until all are there.

        Examples
        --------
        >>> from rasteret_dask.rules.picks import Median
        >>> acquisitions = Median().begin()
        """
        return _Stacked(self)

    def bytes_held(self, candidates: int, bands: int, itemsize: int) -> int:
        """Return what all candidates take, with their validity."""
        return (itemsize + 1) * candidates * bands


class _Stacked:
    """Acquisitions, held until all are there."""

    def __init__(self, pick: Composed) -> None:
        self._pick = pick
        self._values: list[NDArray[Any]] = []
        self._valid: list[NDArray[np.bool_]] = []

    def add(self, values: NDArray[Any], valid: NDArray[np.bool_], rank: int) -> None:
        self._values.append(values)
        self._valid.append(valid)

    def result(self) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        return self._pick.blend(np.stack(self._values), np.stack(self._valid))


@dataclass(frozen=True, slots=True)
class Closest(Ranked):
    """The nearest to the middle of the slot.

    Examples
    --------
    >>> from rasteret_dask.rules.picks import Closest
    >>> filled = collection.harmonize(["red"], time="1MS", mask="clouds", pick=Closest(fill=True))
    """

    fill: bool = False

    def order(self, candidates: Candidates) -> NDArray[Any]:
        """By distance."""
        return candidates.distance


@dataclass(frozen=True, slots=True)
class First(Ranked):
    """The earliest.

    Examples
    --------
    >>> earliest = collection.harmonize(["red"], time="1MS", pick="first")
    """

    fill: bool = False

    def order(self, candidates: Candidates) -> NDArray[Any]:
        """By start."""
        return candidates.start


@dataclass(frozen=True, slots=True)
class Last(Ranked):
    """The latest.

    Examples
    --------
    >>> latest = collection.harmonize(["red"], time="1MS", pick="last")
    """

    fill: bool = False

    def order(self, candidates: Candidates) -> NDArray[Any]:
        """By start, backwards."""
        return -candidates.start


@dataclass(frozen=True, slots=True)
class Newest(Ranked):
    """The newest valid pixel: the latest acquisition, filled by the ones before it, wherever each of them lies.

    As no acquisition comes first for covering a chip, a part of a chip has the pixels that the whole has there.

    Examples
    --------
    >>> mosaic = collection.harmonize(["red"], time="1MS", mask="clouds", pick="newest")
    """

    fill: bool = True
    coverage_first = False

    def order(self, candidates: Candidates) -> NDArray[Any]:
        """By start, backwards."""
        return -candidates.start


@dataclass(frozen=True, slots=True)
class LeastCloudy(Ranked):
    """The one whose records say the fewest clouds.

    Examples
    --------
    >>> from rasteret_dask.rules.picks import LeastCloudy
    >>> LeastCloudy().name
    'least_cloudy'
    """

    fill: bool = False

    @property
    def name(self) -> str:
        """The word that users write."""
        return "least_cloudy"

    def order(self, candidates: Candidates) -> NDArray[Any]:
        """By the records' own figure."""
        return candidates.cloud


@dataclass(frozen=True, slots=True)
class Clearest(Scored):
    """The one with the most pixels in the chip that are valid and not masked.

    Examples
    --------
    >>> clear = collection.harmonize(["red"], time="1MS", mask="clouds", pick="clearest")
    """

    fill: bool = False

    def score(self, clear: NDArray[np.bool_]) -> float:
        """Count clear pixels."""
        return float(np.count_nonzero(clear))


@dataclass(frozen=True, slots=True)
class Mean(Composed):
    """The mean of valid values, summed up in order of start.

    Examples
    --------
    >>> monthly = collection.harmonize(["red"], time="1MS", mask="clouds", pick="mean")
    >>> monthly.chips(32, cell_km=0.96).sample(2).load()["pixels"].shape
    (2, 3, 1, 32, 32)
    """

    bandwise = True

    def blend(self, stack: NDArray[Any], valid: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return means."""
        total = self.begin()
        for rank, (values, known) in enumerate(zip(stack, valid, strict=True)):
            total.add(values, known, rank)
        return total.result()

    def begin(self) -> Composition:
        """Return a running sum."""
        return _Sum()

    def bytes_held(self, candidates: int, bands: int, itemsize: int) -> int:
        """Return what a sum, a count and one candidate take."""
        return (8 + 4 + itemsize) * bands


class _Sum:
    """A running mean."""

    def __init__(self) -> None:
        self._total: NDArray[Any] | None = None
        self._count: Any = None
        self._dtype: Any = None

    def add(self, values: NDArray[Any], valid: NDArray[np.bool_], rank: int) -> None:
        if self._total is None:
            self._total, self._dtype = (
                np.zeros(values.shape, np.result_type(values, np.float64)),
                values.dtype,
            )
            self._count = np.zeros(values.shape, dtype=np.int32)
        np.add(self._total, values, out=self._total, where=valid)
        self._count += valid

    def result(self) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        known = self._count > 0
        mean = np.asarray(self._total) / np.where(known, self._count, np.nan)
        return mean.astype(self._dtype), known


@dataclass(frozen=True, slots=True)
class Median(Composed):
    """The median of valid values; of an even number the mean of the two in the middle.

    Examples
    --------
    >>> monthly = collection.harmonize(["red"], time="1MS", mask="clouds", pick="median")
    >>> monthly.chips(32, cell_km=0.96).sample(2).load()["pixels"].shape
    (2, 3, 1, 32, 32)
    """

    bandwise = True

    def blend(self, stack: NDArray[Any], valid: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return medians."""
        middle, count = np.empty(stack.shape[1:], dtype=stack.dtype), valid.sum(axis=0)
        for band, numbers in enumerate(count):  # band by band, as far as it stays in the processor's cache
            ordered = _ordered(np.where(valid[:, band], stack[:, band], np.inf))
            low = np.take_along_axis(ordered, np.maximum(numbers - 1, 0)[None] // 2, axis=0)[0]
            high = np.take_along_axis(ordered, np.minimum(numbers // 2, len(stack) - 1)[None], axis=0)[0]
            middle[band] = (low.astype(np.float64) + high) / 2
        return middle, count > 0


FEW = 16
"""Layers up to which exchanging neighbours is faster than NumPy's sort, which copies each pixel's numbers together."""


def _ordered(layers: NDArray[Any]) -> NDArray[Any]:
    """Return layers sorted along the first axis, by exchanges of whole neighbours where they are few; no NaN."""
    if len(layers) > FEW:
        return np.asarray(np.sort(layers, axis=0))
    rows, spare = list(layers), np.empty_like(layers[0])
    for turn in range(len(rows)):
        for at in range(turn % 2, len(rows) - 1, 2):
            upper, lower = rows[at], rows[at + 1]
            np.minimum(upper, lower, out=spare)
            np.maximum(upper, lower, out=lower)
            rows[at], spare = spare, upper
    return np.stack(rows)


@dataclass(frozen=True, slots=True)
class Majority(Composed):
    """The value that most acquisitions have, the smallest of equals: what classes become under any composite.

    Examples
    --------
    >>> import numpy as np
    >>> from rasteret_dask.rules.picks import Majority
    >>> stack = np.array([4, 5, 5]).reshape(3, 1, 1, 1)
    >>> Majority().blend(stack, np.ones(stack.shape, bool))[0].item()
    5
    """

    bandwise = True
    chooses = True

    def blend(self, stack: NDArray[Any], valid: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return the commonest values."""
        best, votes = stack[0].copy(), np.zeros(stack.shape[1:], dtype=np.int64)
        for values, known in zip(stack, valid, strict=True):
            same = np.count_nonzero((stack == values) & valid, axis=0) * known
            better = (same > votes) | ((same == votes) & known & (values < best))
            np.copyto(best, values, where=better)
            np.copyto(votes, same, where=better)
        return best, votes > 0


@dataclass(frozen=True, slots=True)
class Nearest(Composed):
    """The valid value nearest to the slot's middle: what bit fields become under any composite.

    Examples
    --------
    >>> import numpy as np
    >>> from rasteret_dask.rules.picks import Nearest
    >>> stack = np.array([7, 8]).reshape(2, 1, 1, 1)
    >>> Nearest().blend(stack, np.array([False, True]).reshape(stack.shape))[0].item()
    8
    """

    bandwise = True
    chooses = True

    def blend(self, stack: NDArray[Any], valid: NDArray[np.bool_]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return the first valid values."""
        first = np.expand_dims(valid.argmax(axis=0), 0)
        return np.take_along_axis(stack, first, axis=0)[0], np.asarray(valid.any(axis=0))

    def begin(self) -> Composition:
        """Return what keeps the nearest."""
        return _ByRank()


class _ByRank:
    """The valid value of the least rank."""

    def __init__(self) -> None:
        self._values: Any = None
        self._rank: Any = None

    def add(self, values: NDArray[Any], valid: NDArray[np.bool_], rank: int) -> None:
        if self._values is None:
            self._values = values.copy()
            self._rank = np.full(values.shape, np.iinfo(np.int64).max)
        nearer = valid & (rank < self._rank)
        np.copyto(self._values, values, where=nearer)
        np.copyto(self._rank, rank, where=nearer)

    def result(self) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        return self._values, np.asarray(self._rank < np.iinfo(np.int64).max)


PickName = Literal[
    "closest", "first", "last", "newest", "least_cloudy", "clearest", "mean", "median", "majority"
]
"""The words of :data:`PICKS`."""

PICKS: dict[str, Pick] = {
    "closest": Closest(),
    "first": First(),
    "last": Last(),
    "newest": Newest(),
    "least_cloudy": LeastCloudy(),
    "clearest": Clearest(),
    "mean": Mean(),
    "median": Median(),
    "majority": Majority(),
}
"""Pick by the word that users write."""


def pick_named(pick: str | Pick, fill: bool | None = None) -> Pick:
    """Return a pick by its word; a pick stays what it is.

    Raises
    ------
    PlanError
        When there is no such pick, or one that composes is to be filled.

    Examples
    --------
    >>> from rasteret_dask.rules.picks import pick_named
    >>> pick_named("closest", fill=True)
    Closest(fill=True)
    """
    named: Pick = pick if isinstance(pick, Pick) else one_of(PICKS, "pick", pick)
    if isinstance(named, Ranked | Scored) and not hasattr(named, "fill"):
        raise PlanError(
            f"pick={type(named).__qualname__}", "no field fill", "a frozen dataclass that has one",
            "Write fill: bool = False in it.",
        )  # fmt: skip
    if fill is None:
        return named
    if isinstance(named, Ranked | Scored):
        return dataclasses.replace(named, fill=fill)  # type: ignore[type-var]
    if fill:
        raise PlanError(
            f"harmonize(fill=True, pick={named.name!r})", "a composite, which takes every acquisition's pixels",
            f"a pick of one acquisition: {', '.join(w for w, p in PICKS.items() if not isinstance(p, Composed))}",
            "Leave fill out.",
        )  # fmt: skip
    return named
