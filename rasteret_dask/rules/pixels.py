# SPDX-License-Identifier: Apache-2.0
"""All rules of one source's pixels, and the steps that every exit takes them through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.rules.kinds import Kind, kind_of
from rasteret_dask.rules.picks import Composed, Composition, Majority, Nearest, Pick
from rasteret_dask.rules.radiometry import Radiometry
from rasteret_dask.rules.stored import StoredForm
from rasteret_dask.rules.tables import Turn
from rasteret_dask.rules.units import Raw, Unit
from rasteret_dask.rules.values import RuleValue

__all__ = ["PixelRules"]


@dataclass(frozen=True, slots=True)
class PixelRules(RuleValue):
    """What the pixels of one source mean.

    The stages are: decode, kernel, mask, fill, pick, finish, store (embeddings are decoded before their kernel,
    other bands after it). Chips and cubes take them from here.
    """

    units: tuple[Unit, ...]
    """Per band."""
    kinds: tuple[str | None, ...]
    """Per band, its kind's name; None: unknown."""
    pick: Pick
    store: StoredForm
    _groups: tuple[tuple[Unit, tuple[int, ...]], ...] = field(
        init=False, compare=False, repr=False, default=()
    )

    def __post_init__(self) -> None:
        by_unit: dict[Unit, list[int]] = {}
        for band, unit in enumerate(self.units):
            by_unit.setdefault(unit, []).append(band)
        object.__setattr__(self, "_groups", tuple((unit, tuple(bands)) for unit, bands in by_unit.items()))

    def kind(self, band: int) -> Kind:
        """Return what a band is."""
        return kind_of(self.kinds[band])

    @property
    def composes(self) -> bool:
        """Whether pixels are made of several acquisitions."""
        return isinstance(self.pick, Composed)

    @property
    def is_bandwise(self) -> bool:
        """Whether each band can be computed without the others."""
        return not self.joint_groups and (not isinstance(self.pick, Composed) or self.pick.bandwise)

    def turn(self, band: int, scaling: Radiometry) -> Turn | None:
        """Return what turns a record's stored numbers of a band into the output's; None: they stay as they are."""
        unit = self.units[band]
        return None if isinstance(unit, Raw) else Turn(unit, scaling, self.store)

    @property
    def joint_groups(self) -> tuple[tuple[Unit, tuple[int, ...]], ...]:
        """The units that need all of their bands at once, with these bands."""
        return tuple((unit, bands) for unit, bands in self._groups if not unit.elementwise)

    def decoded_dtype(self) -> np.dtype[Any]:
        """Return the type that holds the decoded values of all bands: the stored one where all are raw."""
        raw = all(isinstance(unit, Raw) for unit in self.units)
        return np.dtype(self.store.dtype) if raw else np.dtype(np.float32)

    def work_dtype(self) -> np.dtype[Any]:
        """Return the type that acquisitions are composed in: it holds 16-bit integers exactly, at least."""
        return np.result_type(self.decoded_dtype(), np.float32)

    def joint(self, valid: NDArray[np.bool_]) -> None:
        """Make bands invalid, in place, where another is that they only have a meaning with; shape (band, ...)."""
        for _, bands in self.joint_groups:
            at = list(bands)
            valid[at] = valid[at].all(axis=0)

    def finish(
        self, values: NDArray[Any], valid: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return values as they leave, and where they are valid; shapes (band, y, x), NaN where invalid.

        Parameters
        ----------
        values, valid
            Decoded, masked, filled, picked or composed.
        """
        for unit, bands in self._groups:
            if type(unit).finish is Unit.finish:
                continue
            at = list(bands)
            whole = at == list(range(len(values)))
            own = np.where(valid if whole else valid[at], values if whole else values[at], np.nan)
            made = unit.finish(own)
            if whole:
                values, valid = made, valid & ~np.isnan(made)
            else:
                values, valid = values.copy(), valid.copy()
                values[at] = made
                valid[at] &= ~np.isnan(made)
        self.joint(valid)
        return values, valid

    def encode(
        self, values: NDArray[Any], valid: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """Return values as they are stored, and which of them were clipped (None: none); shapes (band, y, x)."""
        stored = self.store.encode(values, valid)
        return stored, None if self.store.steps is None else self.store.clips(values) & valid

    def composite(self, band: int) -> Composed:
        """Return what a band is composed by: the pick where it is measured, else what its kind allows."""
        blend = self.kind(band).blend
        if blend != "average":
            return _BLENDS[blend]
        assert isinstance(self.pick, Composed)
        return self.pick

    def begin(self) -> Composition:
        """Return where the acquisitions of one slot and chip go, decoded: each band as its kind is composed."""
        ways: dict[Composed, list[int]] = {}
        for band in range(len(self.units)):
            ways.setdefault(self.composite(band), []).append(band)
        parts = [
            (bands, way.begin() if way.chooses else _Calculated(way.begin(), self))
            for way, bands in ways.items()
        ]
        return parts[0][1] if len(parts) == 1 else _Apart(parts)


_BLENDS: dict[str, Composed] = {"majority": Majority(), "closest": Nearest()}


class _Calculated:
    """Numbers that are calculated, in a type that holds what comes out; integers are rounded at the end."""

    def __init__(self, numbers: Composition, rules: PixelRules) -> None:
        self._numbers, self._rules = numbers, rules

    def add(self, values: NDArray[Any], valid: NDArray[np.bool_], rank: int) -> None:
        self._numbers.add(values.astype(self._rules.work_dtype(), copy=False), valid, rank)

    def result(self) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        values, valid = self._numbers.result()
        if self._rules.decoded_dtype().kind in "iu":
            values = self._rules.store.encode(values, valid)
        return values, valid


class _Apart:
    """Bands that are composed in several ways."""

    def __init__(self, parts: Sequence[tuple[list[int], Composition]]) -> None:
        self._parts = parts

    def add(self, values: NDArray[Any], valid: NDArray[np.bool_], rank: int) -> None:
        for bands, part in self._parts:
            part.add(values[bands], valid[bands], rank)

    def result(self) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        made = [(bands, *part.result()) for bands, part in self._parts]
        count = sum(len(bands) for bands, _, _ in made)
        values = np.empty(
            (count, *made[0][1].shape[1:]), dtype=np.result_type(*(v.dtype for _, v, _ in made))
        )
        valid = np.empty(values.shape, dtype=bool)
        for bands, own, known in made:
            values[bands], valid[bands] = own, known
        return values, valid
