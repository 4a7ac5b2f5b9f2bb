# SPDX-License-Identifier: Apache-2.0
"""Units of bands: how stored numbers become values that can be compared."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.rules.kinds import AMPLITUDE, Kind
from rasteret_dask.rules.radiometry import Radiometry
from rasteret_dask.rules.values import RuleValue, one_of

__all__ = [
    "UNITS", "AmplitudeDecibel", "Decibel", "Degrees", "Embedding", "Kelvin", "OliReflectance", "Raw", "Reflectance",
    "Scaled", "Unit", "UnitName", "Units", "unit_length", "unit_named", "units_named",
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
        """Return values, float32, of stored numbers; a pure function of each number, same shape.

        Examples
        --------
        >>> import numpy as np
        >>> from rasteret_dask.rules.radiometry import Radiometry
        >>> from rasteret_dask.rules.units import Kelvin
        >>> Kelvin().decode(np.array([1000], np.uint16), Radiometry(0.1, 200.0, "")).tolist()
        [300.0]
        """

    def finish(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return values as they leave; shape (band, y, x), NaN where invalid; a pure function.

        Examples
        --------
        >>> import numpy as np
        >>> from rasteret_dask.rules.units import Decibel
        >>> Decibel().finish(np.array([10.0])).tolist()
        [10.0]
        """
        return values

    def fits(self, kind: Kind) -> bool:
        """Tell whether a band of a kind can be in this unit: codes cannot, and one physical unit is not another.

        Examples
        --------
        >>> from rasteret_dask.rules.kinds import kind_of
        >>> from rasteret_dask.rules.units import Kelvin, Raw
        >>> Kelvin().fits(kind_of("class")), Raw().fits(kind_of("class"))
        (False, True)
        """
        if kind.unit == Raw.name:
            return False
        return self.name not in _OF_KINDS or kind.unit == self.name or kind.name in (None, "continuous")

    def describe(self, scaling: Radiometry) -> str:
        """Return in words what was done to the numbers of a record.

        Examples
        --------
        >>> from rasteret_dask.rules.radiometry import Radiometry
        >>> from rasteret_dask.rules.units import Raw, Reflectance
        >>> Raw().describe(Radiometry(1e-4, 0.0, "scale of the catalog"))
        'raw: none applied'
        >>> Reflectance().describe(Radiometry(1e-4, 0.0, "scale of the catalog"))
        'scale of the catalog'
        """
        return scaling.rule


@dataclass(frozen=True, slots=True)
class Raw(Unit):
    """Numbers as they stand in the file, in its own type.

    Examples
    --------
    >>> import numpy as np
    >>> from rasteret_dask.rules.radiometry import Radiometry
    >>> from rasteret_dask.rules.units import Raw
    >>> Raw().decode(np.array([1200], np.uint16), Radiometry(1e-4, -0.1, "")).tolist()
    [1200]
    """

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
    """``float32(float64(DN) x scale + offset)``, with the scale and offset of each record.

    Examples
    --------
    >>> import numpy as np
    >>> from rasteret_dask.rules.radiometry import Radiometry
    >>> from rasteret_dask.rules.units import Scaled
    >>> Scaled().decode(np.array([7], np.int16), Radiometry(0.5, 1.0, "")).tolist()
    [4.5]
    """

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
    """Reflectance, 0 to 1.

    Examples
    --------
    >>> import numpy as np
    >>> from rasteret_dask.rules.radiometry import Radiometry
    >>> from rasteret_dask.rules.units import Reflectance
    >>> Reflectance().decode(np.array([1200], np.uint16), Radiometry(1e-4, -0.1, "")).round(4).tolist()
    [0.019999999552965164]
    """

    name = "reflectance"
    steps = 1e4


@dataclass(frozen=True, slots=True)
class OliReflectance(Reflectance):
    """Reflectance as Landsat's OLI would measure it, 0 to 1: Sentinel-2 through the linear fits of HLS.

    Each record's scale and offset become ``slope x scale`` and ``slope x offset + offset of the fit``, so nothing else
    of reading, resampling or storing differs. :mod:`rasteret_dask.planning.bandpass` has the numbers and their source,
    and refuses what they were not published for.

    Examples
    --------
    >>> alike = rd.merge(collection, landsat).harmonize(["red", "nir"], units="oli_reflectance", resolution=10)
    """

    name = "oli_reflectance"

    def fits(self, kind: Kind) -> bool:
        """Tell whether a band of a kind can be in this unit: any that can be reflectance."""
        return Reflectance().fits(kind)


@dataclass(frozen=True, slots=True)
class Kelvin(Scaled):
    """Temperature.

    Examples
    --------
    >>> from rasteret_dask.rules.units import Kelvin
    >>> Kelvin().name, Kelvin().steps
    ('kelvin', 100.0)
    """

    name = "kelvin"
    steps = 100.0


@dataclass(frozen=True, slots=True)
class Degrees(Scaled):
    """Angles.

    Examples
    --------
    >>> angles = collection.harmonize(["red"], units={"sun_azimuth": "degrees"})  # the others stay physical
    """

    name = "degrees"
    steps = 100.0


@dataclass(frozen=True, slots=True)
class Decibel(Scaled):
    """``10 log10`` of a power, which is what is resampled, filled and averaged.

    Examples
    --------
    >>> import numpy as np
    >>> from rasteret_dask.rules.units import Decibel
    >>> Decibel().finish(np.array([1.0, 0.1, 0.0])).tolist()
    [0.0, -10.0, nan]
    """

    name = "decibel"
    steps = 100.0

    def finish(self, values: NDArray[Any]) -> NDArray[Any]:
        """Return decibels; NaN where the power is not positive."""
        power = np.where(values > 0, values, np.nan)
        return (10.0 * np.log10(power, dtype=np.float64)).astype(np.float32)


@dataclass(frozen=True, slots=True)
class AmplitudeDecibel(Decibel):
    """``20 log10`` of an amplitude; its square, a power, is what is resampled, filled and averaged.

    ``"decibel"`` gives it to bands of kind ``"amplitude"``.

    Examples
    --------
    >>> import numpy as np
    >>> from rasteret_dask.rules.radiometry import Radiometry
    >>> from rasteret_dask.rules.units import AmplitudeDecibel
    >>> unit = AmplitudeDecibel()
    >>> float(unit.finish(unit.decode(np.array([100], np.uint16), Radiometry(1.0, 0.0, ""))).item())
    40.0
    """

    kernel_on = "decoded"

    def decode(self, stored: NDArray[Any], scaling: Radiometry) -> NDArray[np.float32]:
        """Return powers of stored amplitudes."""
        return np.square(Scaled.decode(self, stored, scaling))


@dataclass(frozen=True, slots=True)
class Embedding(Unit):
    """AlphaEarth's embeddings: ``sign(v) x (|v| / 127.5)^2``, then unit length over the bands.

    Source: the Satellite Embedding dataset's own documentation.

    Examples
    --------
    >>> vectors = embeddings.harmonize(units="embedding").chips(32, cell_km=0.96).sample(1).load()
    >>> length = (vectors["pixels"] ** 2).sum("band") ** 0.5
    >>> round(float(length.mean()), 3)
    1.0
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
    "physical",
    "auto",
    "raw",
    "scaled",
    "reflectance",
    "oli_reflectance",
    "kelvin",
    "degrees",
    "decibel",
    "embedding",
]
"""The words of :data:`UNITS`, and those for each band's own."""

UNITS: dict[str, Unit] = {
    unit.name: unit
    for unit in (
        Raw(), Scaled(), Reflectance(), OliReflectance(), Kelvin(), Degrees(), Decibel(), Embedding(),
    )
}  # fmt: skip
"""Unit by the word that users write."""


_OF_KINDS = frozenset({Reflectance.name, Kelvin.name, Embedding.name})
"""Units that only bands of a kind can have, or bands of which nothing more is known."""


def unit_named(unit: str | Unit) -> Unit:
    """Return a unit by its word; a unit stays what it is.

    Examples
    --------
    >>> from rasteret_dask.rules.units import unit_named
    >>> unit_named("kelvin")
    Kelvin()
    """
    named: Unit = unit if isinstance(unit, Unit) else one_of(UNITS, "units", unit)
    return named


@dataclass(frozen=True, slots=True)
class Units(RuleValue):
    """Which unit each band of a source is brought to.

    Examples
    --------
    >>> from rasteret_dask.rules.units import units_named
    >>> str(units_named({"vv": "decibel"}))
    'physical, vv: decibel'
    """

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

        Examples
        --------
        >>> from rasteret_dask.rules.kinds import kind_of
        >>> from rasteret_dask.rules.units import Units
        >>> Units().of({"B04", "red"}, kind_of("reflectance"), identity=False).name
        'reflectance'
        """
        chosen = next((unit for name, unit in self.bands if name in names), self.default)
        if chosen is not None:
            return AmplitudeDecibel() if kind == AMPLITUDE and type(chosen) is Decibel else chosen
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

    Examples
    --------
    >>> from rasteret_dask.rules.units import units_named
    >>> str(units_named("physical"))
    'physical'
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

    Examples
    --------
    >>> import numpy as np
    >>> from rasteret_dask.rules.units import unit_length
    >>> unit_length(np.array([[3.0], [4.0]])).ravel().tolist()
    [0.6, 0.8]
    """
    square = np.zeros(vectors.shape[1:], dtype=np.float64)
    for layer in vectors:
        square += np.square(layer, dtype=np.float64)
    length = np.where(square > 0, np.sqrt(square), np.nan)
    result = np.empty_like(vectors)
    for layer, out in zip(vectors, result, strict=True):
        out[...] = layer / length
    return result
