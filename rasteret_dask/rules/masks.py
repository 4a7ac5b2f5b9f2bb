# SPDX-License-Identifier: Apache-2.0
"""Masks: which pixels a record's quality bands hide."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.rules.values import RuleValue

__all__ = [
    "ANY_QUALITY", "MASKS", "QUALITY", "AnyOf", "BitValues", "Bits", "Classes", "Mask", "MaskName", "Named",
    "QualityBand", "clouds_of", "mask_named", "quality_among", "settled", "words_of",
]  # fmt: skip


class Mask(RuleValue, ABC):
    """Which pixels of a record are hidden, by its quality bands as they stand in the files.

    A quality band's invalid pixels hide nothing: there the bands say themselves whether they are valid.

    Examples
    --------
    A mask of one's own, for a band of probabilities:

    >>> import dataclasses
    >>> from rasteret_dask.rules.masks import Mask
    >>> @dataclasses.dataclass(frozen=True)
    ... class Likely(Mask):
    ...     percent: float = 40.0
    ...
    ...     @property
    ...     def needs(self):
    ...         return ("cloud_probability",)
    ...
    ...     def hidden(self, *stored):
    ...         return stored[0] > self.percent
    """

    __slots__ = ()

    @property
    @abstractmethod
    def needs(self) -> tuple[str, ...]:
        """The bands to read, by any of their names: code, common name, asset key.

        Examples
        --------
        >>> from rasteret_dask.rules.masks import AnyOf, Bits, Classes
        >>> AnyOf((Classes("SCL", (3,)), Bits("qa_pixel", (3,)))).needs
        ('SCL', 'qa_pixel')
        """

    @abstractmethod
    def hidden(self, *stored: NDArray[Any]) -> NDArray[np.bool_]:
        """Return True where a pixel is hidden; the bands of :attr:`needs`, all of one shape, in their order.

        Examples
        --------
        >>> import numpy as np
        >>> from rasteret_dask.rules.masks import Classes
        >>> Classes("SCL", (3,)).hidden(np.array([3, 4])).tolist()
        [True, False]
        """


@dataclass(frozen=True, slots=True)
class Classes(Mask):
    """Pixels of some classes of a class band.

    Examples
    --------
    >>> import numpy as np
    >>> from rasteret_dask.rules.masks import Classes
    >>> Classes("SCL", (3, 8, 9)).hidden(np.array([[4, 8], [9, 5]], np.uint8)).tolist()
    [[False, True], [True, False]]
    >>> hidden = collection.harmonize(["red"], time="1MS", mask=Classes("SCL", (8, 9)))
    """

    band: str
    classes: tuple[int, ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """The class band."""
        return (self.band,)

    def hidden(self, *stored: NDArray[Any]) -> NDArray[np.bool_]:
        """Return where the class is one of these."""
        (codes,) = stored
        if codes.dtype == np.uint8:
            table = np.zeros(256, dtype=bool)
            table[[c for c in self.classes if 0 <= c < 256]] = True
            return np.asarray(table[codes])
        return np.isin(codes, self.classes)


@dataclass(frozen=True, slots=True)
class Bits(Mask):
    """Pixels that have one of some bits set in a bit field.

    Examples
    --------
    >>> import numpy as np
    >>> from rasteret_dask.rules.masks import Bits
    >>> Bits("qa_pixel", (3, 4)).hidden(np.array([0, 8, 16, 32], np.uint16)).tolist()  # clouds and their shadows
    [False, True, True, False]
    """

    band: str
    bits: tuple[int, ...]
    """From 0, the least significant."""

    def __post_init__(self) -> None:
        if any(bit < 0 for bit in self.bits):
            raise PlanError(f"Bits({self.band!r}, ...)", repr(self.bits), "numbers of bits, from 0 on")

    @property
    def needs(self) -> tuple[str, ...]:
        """The bit field."""
        return (self.band,)

    def hidden(self, *stored: NDArray[Any]) -> NDArray[np.bool_]:
        """Return where any of these bits is set."""
        (field,) = stored
        if field.dtype.kind not in "iu":
            field = field.astype(np.int64)
        bits = {b for b in self.bits if b < 8 * field.dtype.itemsize}
        any_of = np.array(sum(1 << b for b in bits), dtype=np.uint64).astype(field.dtype)
        return np.asarray((field & any_of) != 0)


@dataclass(frozen=True, slots=True)
class BitValues(Mask):
    """Pixels whose bit field holds one of some numbers in neighbouring bits.

    Examples
    --------
    The cloud state of MODIS's ``sur_refl_state_500m``, bits 0 and 1: 1 is cloudy, 2 mixed, 3 not set.

    >>> import numpy as np
    >>> from rasteret_dask.rules.masks import BitValues
    >>> BitValues("sur_refl_state_500m", 0, 2, (1, 2)).hidden(np.array([0, 1, 2, 3], np.uint16)).tolist()
    [False, True, True, False]
    """

    band: str
    first: int
    """The least significant of the bits, from 0."""
    length: int
    """How many bits."""
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.first < 0 or self.length < 1 or any(not 0 <= v < 2**self.length for v in self.values):
            raise PlanError(
                f"BitValues({self.band!r}, ...)", f"values {self.values} of {self.length} bits from bit {self.first}",
                "bits counted from 0, at least one, and numbers that they hold",
            )  # fmt: skip

    @property
    def needs(self) -> tuple[str, ...]:
        """The bit field."""
        return (self.band,)

    def hidden(self, *stored: NDArray[Any]) -> NDArray[np.bool_]:
        """Return where these bits hold one of the numbers."""
        (field,) = stored
        bits = field.astype(np.int64) >> self.first & (2**self.length - 1)
        return np.isin(bits, self.values)


@dataclass(frozen=True, slots=True)
class AnyOf(Mask):
    """Pixels that any of several masks hides.

    Examples
    --------
    >>> import numpy as np
    >>> from rasteret_dask.rules.masks import AnyOf, Bits, Classes
    >>> AnyOf((Classes("SCL", (3, 8)), Classes("SCL", (9,)))).hidden(np.array([3, 5, 9])).tolist()
    [True, False, True]
    """

    masks: tuple[Mask, ...]

    @property
    def needs(self) -> tuple[str, ...]:
        """The bands of all masks, each once."""
        return tuple(dict.fromkeys(band for mask in self.masks for band in mask.needs))

    def hidden(self, *stored: NDArray[Any]) -> NDArray[np.bool_]:
        """Return where any mask hides."""
        by_name = dict(zip(self.needs, stored, strict=True))
        parts = [mask.hidden(*(by_name[band] for band in mask.needs)) for mask in self.masks]
        return np.asarray(np.logical_or.reduce(parts))


@dataclass(frozen=True, slots=True)
class QualityBand:
    """What a sensor's quality band tells.

    Examples
    --------
    >>> from rasteret_dask.rules.masks import Classes, QualityBand
    >>> mine = QualityBand("flags", (("clouds", (Classes("flags", (2, 3)),)),))
    >>> mine.mask(["clouds"])
    Classes(band='flags', classes=(2, 3))
    """

    band: str
    """Its code, in any case of letters."""
    tells: tuple[tuple[str, tuple[Classes | Bits | BitValues, ...]], ...]
    """(word, masks of this band any of which hides it)."""

    def mask(self, words: Sequence[str]) -> Mask:
        """Return the mask of some words.

        Examples
        --------
        >>> from rasteret_dask.rules.masks import quality_among
        >>> quality_among(["red", "qa_pixel"]).mask(["clouds", "snow"])
        Bits(band='qa_pixel', bits=(1, 3, 4, 5))
        """
        tells = dict(self.tells)
        missing = [word for word in words if word not in tells]
        if missing:
            raise PlanError(
                f"mask={missing[0]!r} by band {self.band}", "nothing that it tells",
                f"one of {', '.join(map(repr, tells))}",
                "Give a mask of your own: Classes, Bits or BitValues of rasteret_dask.rules.masks.",
            )  # fmt: skip
        masks = tuple(dict.fromkeys(mask for word in words for mask in tells[word]))
        classes = [mask.classes for mask in masks if isinstance(mask, Classes)]
        bits = [mask.bits for mask in masks if isinstance(mask, Bits)]
        parts: list[Mask] = [replace(m, band=self.band) for m in masks if isinstance(m, BitValues)]
        if bits:
            parts.insert(0, Bits(self.band, tuple(dict.fromkeys(n for some in bits for n in some))))
        if classes:
            parts.insert(0, Classes(self.band, tuple(dict.fromkeys(n for some in classes for n in some))))
        return parts[0] if len(parts) == 1 else AnyOf(tuple(parts))


def _classes(band: str, **words: tuple[int, ...]) -> QualityBand:
    return QualityBand(band, tuple((word, (Classes(band, numbers),)) for word, numbers in words.items()))


def _bits(band: str, **words: tuple[int, ...]) -> QualityBand:
    return QualityBand(band, tuple((word, (Bits(band, numbers),)) for word, numbers in words.items()))


def _modis_state(band: str) -> QualityBand:
    """Return what the state band of MOD09 tells: MODIS Surface Reflectance user's guide, collection 6, table 14."""
    clouds = (BitValues(band, 0, 2, (1, 2)), BitValues(band, 8, 2, (2, 3)), Bits(band, (2, 10, 13)))
    return QualityBand(
        band,
        (
            ("clouds", clouds),
            ("snow", (Bits(band, (12, 15)),)),
            ("water", (BitValues(band, 3, 3, (0, 3, 5, 6, 7)),)),
        ),
    )


QUALITY = (
    # Sentinel-2 scene classes: 3 cloud shadow, 8 and 9 cloud, 10 thin cirrus, 11 snow, 6 water (L2A definition)
    _classes("SCL", clouds=(3, 8, 9, 10), snow=(11,), water=(6,)),
    # Landsat Collection 2: 1 dilated cloud, 3 cloud, 4 cloud shadow, 5 snow, 7 water (LSDS-1619)
    _bits("qa_pixel", clouds=(1, 3, 4), snow=(5,), water=(7,)),
    # HLS v2: 1 cloud, 2 adjacent to cloud or shadow, 3 cloud shadow, 4 snow, 5 water (user guide, table 9)
    _bits("Fmask", clouds=(1, 2, 3), snow=(4,), water=(5,)),
    # MODIS surface reflectance: clouds with their shadows and neighbours, average and high cirrus
    _modis_state("sur_refl_state_500m"),
    _modis_state("sur_refl_state_250m"),
    # MODIS vegetation indices: 2 snow or ice, 3 cloudy (MOD13 user's guide, collection 6.1, table 4)
    _classes("pixel_reliability", clouds=(3,), snow=(2,)),
)
"""Quality bands that a collection may have; the first one that it has is asked."""

ANY_QUALITY = "@quality"
"""Stands for the quality bands of a collection, whatever they are called."""

MaskName = Literal["clouds", "snow", "water"]

MASKS = get_args(MaskName)
"""Words that users write; clouds with their shadows."""


@dataclass(frozen=True, slots=True)
class Named(Mask):
    """What a word asks of whatever quality band a collection has; settled into that band's mask in the plan.

    Examples
    --------
    >>> from rasteret_dask.rules.masks import Named
    >>> str(Named(("clouds", "snow")))
    'clouds, snow'
    """

    words: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(self.words)

    @property
    def needs(self) -> tuple[str, ...]:
        """Whatever quality band there is; see :meth:`of`."""
        return (ANY_QUALITY,)

    def hidden(self, *stored: NDArray[Any]) -> NDArray[np.bool_]:
        """Raise: no band is known yet."""
        raise NotImplementedError("a mask by name is settled when the plan is made")

    def of(self, bands: Sequence[str]) -> Mask | None:
        """Return the mask by the quality band among a collection's bands; None where there is none.

        Examples
        --------
        >>> from rasteret_dask.rules.masks import Named
        >>> Named(("clouds",)).of(["B04", "SCL"])
        Classes(band='SCL', classes=(3, 8, 9, 10))
        """
        quality = quality_among(bands)
        return None if quality is None else quality.mask(self.words)


def quality_among(bands: Sequence[str]) -> QualityBand | None:
    """Return the quality band among the bands of a collection, with its code there; None where there is none.

    Examples
    --------
    >>> from rasteret_dask.rules.masks import quality_among
    >>> quality_among(["B04", "scl"]).band
    'scl'
    """
    for quality in QUALITY:
        for band in bands:
            if band.casefold() == quality.band.casefold():
                return replace(quality, band=band)
    return None


def clouds_of(bands: Sequence[str]) -> Mask | None:
    """Return the mask of clouds and their shadows of a collection; None where it has no quality band.

    Examples
    --------
    >>> from rasteret_dask.rules.masks import clouds_of
    >>> clouds_of(["B04", "SCL"])
    Classes(band='SCL', classes=(3, 8, 9, 10))
    >>> clouds_of(["B04"]) is None
    True
    """
    return Named(("clouds",)).of(bands)


def mask_named(mask: str | Mask | Sequence[str | Mask] | None) -> Mask | None:
    """Return a mask by words, or of masks, or of both; None where there is nothing to mask.

    Examples
    --------
    >>> from rasteret_dask.rules.masks import Bits, mask_named
    >>> mask_named(["clouds", Bits("flags", (0,))]).needs
    ('@quality', 'flags')
    """
    given = () if mask is None else (mask,) if isinstance(mask, str | Mask) else tuple(mask)
    words = tuple(dict.fromkeys(m for m in given if not isinstance(m, Mask)))
    for word in words:
        if word not in MASKS:
            raise PlanError("mask=", repr(word), f"one of {', '.join(map(repr, MASKS))}, or a Mask")
    masks: list[Mask] = [Named(words)] if words else []
    masks += [m for m in given if isinstance(m, Mask)]
    return None if not masks else masks[0] if len(masks) == 1 else AnyOf(tuple(masks))


def settled(mask: Mask | None, bands: Sequence[str]) -> Mask | None:
    """Return a mask with its words settled by the bands of a collection; None where no band tells.

    Examples
    --------
    >>> from rasteret_dask.rules.masks import mask_named, settled
    >>> settled(mask_named("water"), ["B04", "SCL"])
    Classes(band='SCL', classes=(6,))
    """
    if isinstance(mask, AnyOf):
        parts = [settled(one, bands) for one in mask.masks]
        return None if None in parts else AnyOf(tuple(one for one in parts if one is not None))
    return mask.of(bands) if isinstance(mask, Named) else mask


def words_of(mask: Mask | None) -> tuple[str, ...]:
    """Return what a mask hides, in words.

    Examples
    --------
    >>> from rasteret_dask.rules.masks import mask_named, words_of
    >>> words_of(mask_named(["clouds", "snow"]))
    ('clouds', 'snow')
    """
    if isinstance(mask, AnyOf):
        return tuple(word for one in mask.masks for word in words_of(one))
    return () if mask is None else mask.words if isinstance(mask, Named) else (str(mask),)
