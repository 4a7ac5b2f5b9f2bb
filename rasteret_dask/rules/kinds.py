# SPDX-License-Identifier: Apache-2.0
"""Kinds of band: what its numbers are, and with that how they may be resampled, summed up and normalized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Literal, get_args

from rasteret_dask.errors import PlanError

__all__ = [
    "AMPLITUDE",
    "BACKSCATTER",
    "CLASS",
    "EMBEDDING",
    "KINDS",
    "REFLECTANCE",
    "TEMPERATURE",
    "UNKNOWN",
    "Blend",
    "Kind",
    "KindName",
    "Statistics",
    "checked_kinds",
    "kind_of",
    "quality_kind",
]

KindName = Literal[
    "reflectance",
    "temperature",
    "backscatter",
    "amplitude",
    "continuous",
    "class",
    "bitfield",
    "angle",
    "embedding",
    "vector",
]
"""What a user, a catalog or a table calls a kind."""

Blend = Literal["average", "majority", "closest"]
"""What becomes of several pixels where ``pick`` is ``"median"`` or ``"mean"``: that number of their values, the value
that most of them have, or the pixel that is nearest in time."""

Statistics = Literal["moments", "counts"]
"""Mean, standard deviation and quantiles; or how often each value occurs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What the numbers of a band are. No field has a default: a kind says all that a kind decides."""

    name: KindName | None
    """None: unknown."""
    coarser: str
    """GDAL's name of the kernel on a grid coarser than the image, where the user names none."""
    finer: str
    """The kernel on a grid as fine as the image or finer, where the user names none."""
    kernels: frozenset[str] | None
    """Kernels that give values which the image holds; None: any kernel makes sense."""
    averaged_overviews: bool
    """Whether overviews may be read: most of them hold averages. ``nearest`` reads the image itself in any case."""
    unit: str
    """Name of the unit that ``units="physical"`` gives: ``"raw"`` (as stored), ``"scaled"`` (stored x scale + offset),
    ``"reflectance"``, ``"kelvin"`` or ``"embedding"``."""
    blend: Blend
    """What a median or mean of several acquisitions is."""
    statistics: Statistics
    """Which statistics have a meaning."""
    normalized: bool
    """Whether ``normalize=`` changes it."""
    ignored: bool
    """Whether invalid pixels become ``ignore_index`` in batches that have one."""

    def __post_init__(self) -> None:
        if self.kernels is not None and not {self.coarser, self.finer} <= self.kernels:
            raise PlanError(
                f"kind {self.name!r}",
                f"kernels {self.coarser} and {self.finer}",
                f"one of {sorted(self.kernels)}",
            )

    @property
    def is_coded(self) -> bool:
        """Whether its numbers are codes, which are counted and have no scale."""
        return self.statistics == "counts"

    def kernel(self, wanted: str | None, scale: float) -> str:
        """Return the kernel that a band of this kind is resampled with.

        Parameters
        ----------
        wanted
            The kernel that the user named for all bands, or None.
        scale
            Pixels of the grid per pixel of the image, along the axis where there are fewer: below 1 on a coarser grid.

        Returns
        -------
        str
            ``wanted`` where it makes sense for this kind, else the kind's own kernel.
        """
        if wanted is not None and (self.kernels is None or wanted in self.kernels):
            return wanted
        return self.coarser if scale < COARSER else self.finer


COARSER = 0.99
"""Pixels of a grid per pixel of an image: below this, the grid is coarser."""

_CODES = frozenset({"nearest", "mode"})


def _measured(
    name: Literal["reflectance", "temperature", "backscatter", "amplitude", "continuous"], unit: str
) -> Kind:
    """Return a kind whose numbers can be averaged."""
    return Kind(
        name=name, coarser="average", finer="bilinear", kernels=None, averaged_overviews=True, unit=unit,
        blend="average", statistics="moments", normalized=True, ignored=False,
    )  # fmt: skip


_KINDS = (
    _measured("reflectance", "reflectance"),
    _measured("temperature", "kelvin"),
    _measured("backscatter", "scaled"),  # radar power: 10 log10 of it are decibels
    _measured("amplitude", "scaled"),  # its root, as radar detectors count it: 20 log10
    _measured("continuous", "scaled"),
    Kind(
        name="class", coarser="nearest", finer="nearest", kernels=_CODES, averaged_overviews=False, unit="raw",
        blend="majority", statistics="counts", normalized=False, ignored=True,
    ),
    # mode would be a whole pixel's bits, but which of two neighbours' flags hold there is not its to say
    Kind(
        name="bitfield", coarser="nearest", finer="nearest", kernels=_CODES, averaged_overviews=False, unit="raw",
        blend="closest", statistics="counts", normalized=False, ignored=False,
    ),
    # an azimuth is one that was measured: between 359 and 1 degrees lies 0, and their mean is 180
    Kind(
        name="angle", coarser="nearest", finer="nearest", kernels=frozenset({"nearest"}), averaged_overviews=False,
        unit="scaled",
        blend="closest", statistics="moments", normalized=True, ignored=False,
    ),
    # quantized numbers are no lengths: nearest, unless they are decoded first; overviews hold averages of them
    Kind(
        name="embedding", coarser="nearest", finer="nearest", kernels=None, averaged_overviews=True, unit="embedding",
        blend="average", statistics="moments", normalized=True, ignored=False,
    ),
    # a vector that is stored as it is: between two of them lies none that the model would give
    Kind(
        name="vector", coarser="nearest", finer="nearest", kernels=None, averaged_overviews=True, unit="scaled",
        blend="average", statistics="moments", normalized=True, ignored=False,
    ),
)  # fmt: skip

REFLECTANCE, TEMPERATURE, BACKSCATTER, AMPLITUDE, CLASS, EMBEDDING = (
    next(kind for kind in _KINDS if kind.name == name)
    for name in ("reflectance", "temperature", "backscatter", "amplitude", "class", "embedding")
)
"""Kinds that are told apart outside of this room: as files are read, by catalogs, in first recipes."""

KINDS: Mapping[str, Kind] = MappingProxyType({str(kind.name): kind for kind in _KINDS})
"""{name: kind}; :func:`kind_of` also takes None."""

UNKNOWN = Kind(
    name=None,
    **{
        field.name: getattr(KINDS["continuous"], field.name) for field in fields(Kind) if field.name != "name"
    },
)
"""What nothing tells: treated as continuous, with a warning where integers would be averaged."""


def kind_of(name: str | None) -> Kind:
    """Return a kind by its name; None: :data:`UNKNOWN`.

    Raises
    ------
    PlanError
        When there is no such kind.

    Examples
    --------
    >>> kind_of("class").kernel("bilinear", 0.5)
    'nearest'
    >>> kind_of(None).kernel(None, 0.5)
    'average'
    """
    if name is None:
        return UNKNOWN
    if name not in KINDS:
        raise PlanError("kind of a band", repr(name), f"one of {', '.join(KINDS)}")
    return KINDS[name]


def quality_kind(band: str) -> KindName:
    """Return what the numbers of a quality band are, where nothing but its name is known: most are bits."""
    return "class" if band.casefold() in _QUALITY_CLASSES else "bitfield"


_QUALITY_CLASSES = ("scl", "pixel_reliability")


def checked_kinds(kinds: Mapping[str, str] | None, where: str) -> tuple[tuple[str, KindName], ...]:
    """Return a user's ``{band: kind}`` as sorted pairs.

    Parameters
    ----------
    kinds
        ``{"map": "class"}``, by any name of a band; None: nothing.
    where
        The call, for the message: ``"harmonize(kinds=)"``.

    Raises
    ------
    PlanError
        When it is no mapping of text to kinds.
    """
    if kinds is None:
        return ()
    names: tuple[KindName, ...] = get_args(KindName)
    if not isinstance(kinds, Mapping):
        raise PlanError(where, repr(kinds), '{band: kind}, such as {"map": "class"}')
    wrong = {band: kind for band, kind in kinds.items() if not isinstance(band, str) or kind not in names}
    if wrong:
        raise PlanError(where, repr(wrong), f"bands by name, each one of {', '.join(names)}")
    return tuple(sorted((band, name) for band, kind in kinds.items() for name in names if name == kind))
