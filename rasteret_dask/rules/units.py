"""Units of bands: how stored numbers become values that can be compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.rules.kinds import Kind
from rasteret_dask.rules.radiometry import Radiometry
from rasteret_dask.rules.values import RuleValue, one_of

__all__ = [
    "UNITS", "Decibel", "Degrees", "Embedding", "Kelvin", "Raw", "Reflectance", "Scaled", "Unit", "UnitName", "Units",
    "unit_length", "unit_named", "units_named",
]  # fmt: skip


class Unit(RuleValue, ABC):
    """What the values of a band are.

    A stored number is decoded, then masked, filled, picked or composed, then finished. The kernel that brings
    pixels onto another grid sees stored numbers, or decoded ones (:attr:`kernel_on`); the result is the same
    where decoding is linear.

    Examples
    --------
    A unit of one's own, for heights that are stored in feet:

    >>> import dataclasses
    >>> import numpy as np
    >>> from rasteret_dask.rules.units import Unit
    >>> @dataclasses.dataclass(frozen=True)
    ... class Feet(Unit):
    ...     name = "metres"
    ...
    ...     def decode(self, stored, scaling):
    ...         return (stored.astype(np.float64) * 0.3048).astype(np.float32)
    """

    __slots__ = ()
    name: ClassVar[str]
    """What outputs call it."""
    kernel_on: ClassVar[Literal["stored", "decoded"]] = "stored"
    """Whether kernels resample stored numbers or decoded ones; of those overviews hold no averages."""
    elementwise: ClassVar[bool] = True
    """False where :meth:`finish` needs all bands of this unit at once: they are then valid together."""
    scales: ClassVar[bool] = False
    """Whether a record's scale and offset are applied."""
    steps: ClassVar[float | None] = None
    """Integers a unit where values are stored as integers (10,000 for reflectance); None: they cannot be."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Refuse a unit whose class has no name.

        Not when the class is made: a class of a notebook arrives at a worker empty, and is filled then.
        """
        if not isinstance(getattr(cls, "name", None), str):
            raise TypeError(f"{cls.__qualname__} has no name: write name = '...' in it")
        return super().__new__(cls)

    @abstractmethod
    def decode(self, stored: NDArray[Any], scaling: Radiometry) -> NDArray[Any]:
        """Return values, float32, of stored numbers; a pure function of each number, same shape."""

    def finish(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return values as they leave; shape (band, y, x), NaN where invalid; a pure function."""
        return values

    def fits(self, kind: Kind) -> bool:
        """Tell whether a band of a kind can be in this unit: codes cannot, and one physical unit is not another."""
        if kind.unit == Raw.name:
            return False
        return self.name not in _OF_KINDS or kind.unit == self.name or kind.name in (None, "continuous")

    def describe(self, scaling: Radiometry) -> str:
        """Return in words what was done to the numbers of a record."""
        return scaling.rule


@dataclass(frozen=True, slots=True)
class Raw(Unit):
    """Numbers as they stand in the file, in its own type."""

    name = "raw"

    def decode(self, stored: NDArray[Any], scaling: Radiometry) -> NDArray[Any]:
        """Return the stored numbers."""
        return stored

    def fits(self, kind: Kind) -> bool:
        """Return True: any number can stay as it is."""
        return True

    def describe(self, scaling: Radiometry) -> str:
        """Say that nothing was done."""
        return "raw: none applied"


@dataclass(frozen=True, slots=True)
class Scaled(Unit):
    """``float32(float64(DN) x scale + offset)``, with the scale and offset of each record."""

    name = "scaled"
    scales = True

    def decode(self, stored: NDArray[Any], scaling: Radiometry) -> NDArray[np.float32]:
        """Scale stored numbers."""
        values = stored.astype(np.float64)
        if scaling.scale != 1.0:
            values *= scaling.scale
        if scaling.offset != 0.0:
            values += scaling.offset
        return values.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Reflectance(Scaled):
    """Reflectance, 0 to 1."""

    name = "reflectance"
    steps = 1e4


@dataclass(frozen=True, slots=True)
class Kelvin(Scaled):
    """Temperature."""

    name = "kelvin"
    steps = 100.0


@dataclass(frozen=True, slots=True)
class Degrees(Scaled):
    """Angles."""

    name = "degrees"
    steps = 100.0


@dataclass(frozen=True, slots=True)
class Decibel(Scaled):
    """``10 log10`` of a power, which is what is resampled, filled and averaged."""

    name = "decibel"
    steps = 100.0

    def finish(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return decibels; NaN where the power is not positive."""
        power = np.where(values > 0, values, np.nan)
        return (10.0 * np.log10(power, dtype=np.float64)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Embedding(Unit):
    """AlphaEarth's embeddings: ``sign(v) x (|v| / 127.5)^2``, then unit length over the bands.

    Source: the Satellite Embedding dataset's own documentation.
    """

    name = "embedding"
    kernel_on = "decoded"
    elementwise = False

    def decode(self, stored: NDArray[Any], scaling: Radiometry) -> NDArray[np.float32]:
        """Dequantize stored numbers."""
        v = stored.astype(np.float64) / 127.5
        return (np.sign(v) * v * v).astype(np.float32)

    def finish(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return vectors of length 1."""
        return unit_length(values)

    def describe(self, scaling: Radiometry) -> str:
        """Say the formula."""
        return "embedding: sign(v) x (|v| / 127.5)^2, then unit length"


UnitName = Literal[
    "physical", "auto", "raw", "scaled", "reflectance", "kelvin", "degrees", "decibel", "embedding"
]
"""The words of :data:`UNITS`, and those for each band's own."""

UNITS = {u.name: u for u in (Raw(), Scaled(), Reflectance(), Kelvin(), Degrees(), Decibel(), Embedding())}
"""Unit by the word that users write."""


_OF_KINDS = frozenset({Reflectance.name, Kelvin.name, Embedding.name})
"""Units that only bands of a kind can have, or bands of which nothing more is known."""


def unit_named(unit: str | Unit) -> Unit:
    """Return a unit by its word; a unit stays what it is."""
    named: Unit = unit if isinstance(unit, Unit) else one_of(UNITS, "units", unit)
    return named


@dataclass(frozen=True, slots=True)
class Units(RuleValue):
    """Which unit each band of a source is brought to."""

    default: Unit | None = None
    """None: the physical one, by the band's kind."""
    bands: tuple[tuple[str, Unit], ...] = ()
    """(band, unit), by any name of a band: what differs from the default."""

    def of(self, names: Collection[str], kind: Kind, identity: bool) -> Unit:
        """Return the unit of a band.

        Parameters
        ----------
        names
            All names of the band.
        kind
            What it is.
        identity
            Whether scale and offset of all its records change nothing: then a scaled number is the stored one.
        """
        for name, unit in self.bands:
            if name in names:
                return unit
        if self.default is not None:
            return self.default
        unit = UNITS[kind.unit]
        return Raw() if type(unit) is Scaled and identity else unit

    def __str__(self) -> str:
        default = PHYSICAL if self.default is None else self.default.name
        if not self.bands:
            return default
        return f"{default}, {', '.join(f'{band}: {unit.name}' for band, unit in self.bands)}"


PHYSICAL = "physical"
"""The word for: each band in the unit of its kind. ``"auto"`` is its other name."""

_PHYSICAL = (PHYSICAL, "auto")


def units_named(units: str | Unit | Mapping[str, str | Unit]) -> Units:
    """Return the units that a word, a unit, or ``{band: word or unit}`` stands for.

    Raises
    ------
    PlanError
        When a word is none; the message lists them.
    """
    if isinstance(units, Mapping):
        apart = {str(band): unit for band, unit in units.items() if unit not in _PHYSICAL}
        return Units(None, tuple((band, unit_named(unit)) for band, unit in apart.items()))
    if isinstance(units, Unit):
        return Units(units)
    default: Unit | None = one_of({**dict.fromkeys(_PHYSICAL), **UNITS}, "units", units)
    return Units(default)


def unit_length(vectors: NDArray[Any]) -> NDArray[Any]:
    """Return vectors along the first axis scaled to length 1; NaN where any element is, or the length is 0.

    The squares are summed in the order of the axis, whatever the layout in memory, so that every caller gets the
    same last bit.
    """
    square = np.zeros(vectors.shape[1:], dtype=np.float64)
    for layer in vectors:
        square += np.square(layer, dtype=np.float64)
    length = np.where(square > 0, np.sqrt(square), np.nan)
    result = np.empty_like(vectors)
    for layer, out in zip(vectors, result, strict=True):
        out[...] = layer / length
    return result
