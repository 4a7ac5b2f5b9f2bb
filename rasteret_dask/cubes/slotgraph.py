# SPDX-License-Identifier: Apache-2.0
"""The Dask graph of a cube's slots: one task a slot, block and band, or all bands that only make sense together."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from operator import itemgetter
from typing import Any, TypeAlias

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph, Layer
from numpy.typing import NDArray

from rasteret_dask.cubes.cube import CubePlace, Read
from rasteret_dask.cubes.storedpixels import BandPixels, Prefixes, stored_pixels
from rasteret_dask.planning.resolve import Member, ResolvedSource
from rasteret_dask.reader.cogreader import Kernel
from rasteret_dask.rules import composing
from rasteret_dask.rules.masks import Mask
from rasteret_dask.rules.picks import Scored
from rasteret_dask.rules.pixels import PixelRules
from rasteret_dask.rules.radiometry import Radiometry

__all__ = ["SlotGraph", "SlotRecords"]

SlotRecords: TypeAlias = tuple[tuple[int, ...], ...]
"""Record rows of each acquisition that competes for a slot, the best first, the nearest record first."""

Tasks: TypeAlias = dict[Any, Any]
"""Key -> task."""

_Pixels: TypeAlias = "tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.bool_] | None]"
"""Pixels of some bands, shape (1, band, y, x); where they are valid; where another acquisition than the best gave them,
None: nowhere."""


@dataclass(frozen=True, slots=True)
class _Band:
    """One band of one record."""

    pixels: BandPixels
    scaling: Radiometry
    is_decoded: bool


@dataclass(frozen=True, slots=True)
class _Record:
    """One record, among the arrays that a task gets."""

    bands: tuple[_Band | None, ...]
    """None: nothing of it is there."""
    hidden: int | None
    """Array of what its mask hides; None: nothing."""

    def layer(
        self, rules: PixelRules, arrays: Sequence[NDArray[Any]], shape: tuple[int, int]
    ) -> composing.DecodedLayer:
        """Return its decoded pixels."""
        stored = [
            None if band is None else composing.StoredBand(
                *band.pixels.of(arrays), band.scaling, band.is_decoded
            )
            for band in self.bands
        ]  # fmt: skip
        return composing.decoded(rules, stored, shape, None if self.hidden is None else arrays[self.hidden])


@dataclass(frozen=True, slots=True)
class _Acquisition:
    """The records of one acquisition, nearest first."""

    records: tuple[_Record, ...]
    rank: int
    start: int
    """Its number in order of starts."""


@dataclass(frozen=True, slots=True)
class _Slot:
    """What some bands of a slot are made of."""

    rules: PixelRules
    acquisitions: tuple[_Acquisition, ...]

    def pixels(
        self, shape: tuple[int, int], arrays: Sequence[NDArray[Any]], order: Sequence[int] | None
    ) -> _Pixels:
        """Return one block as it is stored, and what is told of its pixels.

        Parameters
        ----------
        shape
            (y, x).
        arrays
            Chunks of stacks, and of masks.
        order
            Numbers of acquisitions, the best first; None: as they stand.
        """
        rules = self.rules

        def layers(acquisitions: Iterable[_Acquisition]) -> Iterator[composing.DecodedLayer]:
            return (one.layer(rules, arrays, shape) for each in acquisitions for one in each.records)

        if rules.composes:
            by_start = sorted(self.acquisitions, key=lambda one: one.start)
            made = composing.composed(rules, ((one.rank, layers([one])) for one in by_start))
        else:
            ranked = self.acquisitions if order is None else [self.acquisitions[n] for n in order]
            made = composing.picked(rules, layers(ranked[:1]), layers(ranked[1:] if rules.pick.fills else ()))
        if made is None:
            empty = (1, len(rules.units), *shape)
            return np.full(empty, rules.store.fill_value), np.zeros(empty, dtype=bool), None
        filled = None if made.filled is None else made.filled[None]
        return rules.store.encode(made.values, made.valid)[None], made.valid[None], filled

    def values(
        self, shape: tuple[int, int], arrays: Sequence[NDArray[Any]], order: Sequence[int] | None
    ) -> NDArray[Any]:
        """Return one block as it is stored, shape (1, band, y, x)."""
        return self.pixels(shape, arrays, order)[0]


@dataclass(frozen=True, slots=True)
class _Quality:
    """The bands of one record by which it is masked or scored, among the arrays that a task gets."""

    mask: Mask | None
    bands: tuple[BandPixels, ...]

    def hidden(self, arrays: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
        """Return where the mask hides, shape (y, x)."""
        assert self.mask is not None
        return composing.hidden(self.mask, *self._stored(arrays))

    def clear(self, arrays: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
        """Return where the record is valid and not hidden, shape (y, x)."""
        return composing.clear(self.mask, *self._stored(arrays))

    def _stored(self, arrays: Sequence[NDArray[Any]]) -> tuple[list[NDArray[Any]], list[NDArray[np.bool_]]]:
        read = [band.of(arrays) for band in self.bands]
        return [values for values, _ in read], [valid for _, valid in read]


class SlotGraph:
    """Makes the lazy pixels of a source's slots.

    Bands are chunks of their own, so that one of them is computed alone; those that only make sense together, such
    as embeddings of unit length or the bands of a medoid, are one chunk. Quality bands are read apart, so that
    acquisitions are scored before any other pixel is read.

    Parameters
    ----------
    source
        Its records and rules.
    place
        Where the cube lies.
    slots
        Per time step.
    """

    def __init__(self, source: ResolvedSource, place: CubePlace, slots: Sequence[SlotRecords]) -> None:
        self.source, self.slots, self.rules = source, slots, source.plan.rules
        self.shape = place.shape
        rows = sorted({row for slot in slots for acquisition in slot for row in acquisition})
        for number, member in enumerate(source.plan.members):
            of_member = [row for row in rows if source.member[row] == number]
            source.records.look_up(of_member, (*member.bands, *member.quality))
        # Worked out once for all records and chunks: there are tens of thousands of these.
        self._reads_of = [self._reads(member) for member in source.plan.members]
        bands = {row: self._reads_of[int(source.member[row])] for row in rows}
        quality = {row: [Read(band) for band in self._member(row).quality] for row in rows}
        every, is_joint = range(len(source.plan.bands)), not self.rules.is_bandwise
        self.groups = [tuple(every)] if is_joint else [(band,) for band in every]
        self._rules_of = [_of_bands(self.rules, group) for group in self.groups]
        self._scalings_of = {row: self._scalings(row) for row in rows}
        self.bands = stored_pixels(source.records, bands, place, together=is_joint)
        self.quality = stored_pixels(source.records, quality, place, together=False)
        self.chunks: tuple[tuple[int, ...], ...] = da.core.normalize_chunks((place.chunks,) * 2, place.shape)
        self._blocks = [
            ((i, j), (height, width))
            for i, height in enumerate(self.chunks[0])
            for j, width in enumerate(self.chunks[1])
        ]
        """(block, shape) along (y, x)."""
        masks = [None if member.mask is None else member.mask.to_json() for member in source.plan.members]
        self.token = tokenize(
            json.dumps([self.rules.to_json(), masks], sort_keys=True), slots, source.member[rows].tolist(),
            source.passes.of_record[rows].tolist(), [array.name for array in self._stacks()],
            [(s.scale, s.offset) for row in rows for s in self._scalings_of[row]],
        )  # fmt: skip

    @property
    def centres(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Coordinates of the centres of pixels, (y, x)."""
        numbers, _ = next(iter(self.bands.stacks.values()))
        return numbers.y, numbers.x

    def pixels(self) -> da.Array:
        """Return the pixels, dims (time, band, y, x); for types whose fill no valid pixel holds."""
        return self._slots(f"cube-{self.token}", _Slot.values)

    def told_by_fill(self, pixels: da.Array) -> da.Array:
        """Return where no band of :meth:`pixels` holds the fill, dims (time, y, x)."""
        return self._over_bands("valid", pixels, partial(_none_is, self.source.plan.fill))

    def pixels_valid_filled(self) -> tuple[da.Array, da.Array, da.Array]:
        """Return the pixels, where all bands are valid, and where another acquisition than the best gave one of them.

        Dims (time, band, y, x), and twice (time, y, x).
        """
        slots = self._slots(f"slot-{self.token}", _Slot.pixels)
        first = _OnDemand(f"cube-{self.token}", slots.numblocks, partial(_first_of, slots.name))
        return (
            _array(first, [slots], slots.chunks, slots.dtype),
            self._over_bands("valid", slots, _all_valid),
            self._over_bands("filled", slots, _any_filled),
        )

    def _slots(self, name: str, make: Callable[..., Any]) -> da.Array:
        chunks = ((1,) * len(self.slots), tuple(len(group) for group in self.groups), *self.chunks)
        others: Tasks = {}
        parts: dict[tuple[int, ...], _Part] = {
            (number, group): self._part(number, group, others)
            for number in range(len(self.slots))
            for group in range(len(self.groups))
        }
        tasks = _SlotTasks(make, parts, dict(self._blocks))
        layer = _OnDemand(name, tuple(map(len, chunks)), tasks, others)
        return _array(layer, self._stacks(), chunks, np.dtype(self.source.plan.dtype))

    def _over_bands(self, what: str, bands: da.Array, make: Callable[..., Any]) -> da.Array:
        times, groups, *blocks = bands.numblocks
        task = partial(_over_bands_of, make, bands.name, groups)
        layer = _OnDemand(f"{what}-{self.token}", (times, *blocks), task)
        return _array(layer, [bands], (bands.chunks[0], *self.chunks), np.dtype(bool))

    def _part(self, number: int, group: int, others: Tasks) -> _Part:
        """Return what a group of bands of a slot is made of; tasks that others share go to ``others``."""
        prefixes: Prefixes = {}
        order = self._order(number, self.slots[number], others)
        slot = self._slot(self.slots[number], group, prefixes, others)
        return _Part(slot, tuple(prefixes), order)

    def _slot(self, records: SlotRecords, group: int, prefixes: Prefixes, tasks: Tasks) -> _Slot:
        """Return what a group of bands of a slot is made of; the chunks it needs go to ``prefixes``."""
        number = self.source.passes.of_record
        acquisitions = tuple(
            _Acquisition(
                tuple(self._record(row, self.groups[group], prefixes, tasks) for row in rows),
                rank,
                int(number[rows[0]]),
            )
            for rank, rows in enumerate(records)
        )
        return _Slot(self._rules_of[group], acquisitions)

    def _record(self, row: int, group: tuple[int, ...], prefixes: Prefixes, tasks: Tasks) -> _Record:
        reads, scalings = self._reads_of[int(self.source.member[row])], self._scalings_of[row]
        bands = []
        for at in group:
            pixels = self.bands.among(row, reads[at], prefixes)
            is_decoded = reads[at].kernel.decode is not None
            bands.append(None if pixels is None else _Band(pixels, scalings[at], is_decoded))
        hidden = (
            self._by_quality(f"hidden-{self.token}", row, _Quality.hidden, tasks)
            if self._member(row).mask is not None
            else None
        )
        return _Record(tuple(bands), None if hidden is None else prefixes.setdefault(hidden, len(prefixes)))

    def _order(self, number: int, records: SlotRecords, tasks: Tasks) -> tuple[str, int] | None:
        """Return the key of the order of a slot's acquisitions; None: it is settled."""
        pick = self.rules.pick
        if not isinstance(pick, Scored) or len(records) < 2:
            return None
        name, down, across = f"order-{self.token}", *map(len, self.chunks)
        shown = [
            [
                [[(*prefix, i, j) for j in range(across)] for i in range(down)]
                for prefix in (
                    self._by_quality(f"clear-{self.token}", row, _Quality.clear, tasks) for row in rows
                )
                if prefix is not None
            ]
            for rows in records
        ]
        tasks[name, number] = (_order_of, pick, self.shape, shown)
        return name, number

    def _by_quality(
        self, name: str, row: int, look: Callable[..., Any], tasks: Tasks
    ) -> tuple[str, int] | None:
        """Return the first part of the keys of what a record's quality bands tell; None: they are not there."""
        member, prefixes = self._member(row), Prefixes()
        if member.quality:
            bands = [self.quality.among(row, Read(band), prefixes) for band in member.quality]
        else:
            bands = [self.bands.among(row, self._reads_of[int(self.source.member[row])][0], prefixes)]
        there = tuple(band for band in bands if band is not None)
        if len(there) < len(bands):
            return None
        for block, _ in self._blocks:
            if (name, row, *block) not in tasks:
                arrays = [(*prefix, *block) for prefix in prefixes]
                tasks[name, row, *block] = (look, _Quality(member.mask, there), arrays)
        return name, row

    def _member(self, row: int) -> Member:
        member: Member = self.source.plan.members[int(self.source.member[row])]
        return member

    def _reads(self, member: Member) -> list[Read]:
        """Return how each band is read."""
        resampling = self.source.plan.resampling
        return [
            Read(
                band,
                Kernel(resampling, unit if unit.kernel_on == "decoded" else None),
            )
            for band, unit in zip(member.bands, self.rules.units, strict=True)
        ]

    def _scalings(self, row: int) -> list[Radiometry]:
        assets = [self.source.records.asset(row, band) for band in self._member(row).bands]
        return [Radiometry(asset.scale, asset.offset, asset.rule) for asset in assets]

    def _stacks(self) -> list[da.Array]:
        return [*self.bands.arrays(), *self.quality.arrays()]


@dataclass(frozen=True, slots=True)
class _Part:
    """What some bands of a slot are made of, and of which arrays."""

    slot: _Slot
    prefixes: tuple[tuple[Any, ...], ...]
    """First part of the keys of the arrays, before their block (y, x)."""
    order: tuple[str, int] | None
    """Key of the order of its acquisitions; None: as they stand."""


@dataclass(frozen=True, slots=True)
class _SlotTasks:
    """Makes the task of each block of slots."""

    make: Callable[..., Any]
    parts: dict[tuple[int, ...], _Part]
    """(slot, group of bands) -> what it is made of."""
    shapes: dict[tuple[int, ...], tuple[int, int]]
    """Block (y, x) -> its shape."""

    def __call__(self, at: tuple[int, ...]) -> Any:
        """Return the task of (slot, group, block along y, block along x)."""
        part, block = self.parts[at[:2]], at[2:]
        arrays = [(*prefix, *block) for prefix in part.prefixes]
        return self.make, part.slot, self.shapes[block], arrays, part.order


class _OnDemand(Layer):
    """Tasks of an array's chunks, each made when it is asked for: a cube has tens of thousands, and few are computed.

    Parameters
    ----------
    name
        First part of their keys.
    numblocks
        Chunks along each dimension.
    task
        Returns the task of a chunk, by its numbers.
    others
        Tasks that these share.
    """

    def __init__(
        self,
        name: str,
        numblocks: tuple[int, ...],
        task: Callable[[tuple[int, ...]], Any],
        others: Mapping[Any, Any] | None = None,
    ) -> None:
        super().__init__()
        self.name, self._numblocks, self._task, self._others = name, numblocks, task, others or {}

    def is_materialized(self) -> bool:
        """Return False: tasks are not there yet."""
        return False

    def get_output_keys(self) -> set[Any]:
        """Return the keys of all tasks."""
        return set(self)

    def __getitem__(self, key: Any) -> Any:
        if key in self._others:
            return self._others[key]
        if key not in self:
            raise KeyError(key)
        return self._task(key[1:])

    def __contains__(self, key: Any) -> bool:
        if not isinstance(key, tuple) or len(key) != 1 + len(self._numblocks) or key[0] != self.name:
            return key in self._others
        return all(0 <= at < count for at, count in zip(key[1:], self._numblocks, strict=True))

    def __iter__(self) -> Iterator[Any]:
        yield from self._others
        for at in np.ndindex(self._numblocks):
            yield (self.name, *at)

    def __len__(self) -> int:
        return len(self._others) + prod(self._numblocks)


def _array(layer: _OnDemand, below: Sequence[da.Array], chunks: Any, dtype: np.dtype[Any]) -> da.Array:
    needs: Any = below
    graph = HighLevelGraph.from_collections(layer.name, layer, dependencies=needs)
    return da.Array(graph, layer.name, chunks, dtype)


def _first_of(name: str, at: tuple[int, ...]) -> Any:
    """Return the task of the first of what a chunk of an array is a tuple of."""
    return itemgetter(0), (name, *at)


def _over_bands_of(make: Callable[..., Any], name: str, groups: int, at: tuple[int, ...]) -> Any:
    """Return the task over all groups of bands of a chunk (slot, block along y, block along x) of an array."""
    slot, *block = at
    return make, [(name, slot, group, *block) for group in range(groups)]


def _of_bands(rules: PixelRules, bands: tuple[int, ...]) -> PixelRules:
    """Return the rules of some bands."""
    return dataclasses.replace(
        rules,
        units=tuple(rules.units[band] for band in bands),
        kinds=tuple(rules.kinds[band] for band in bands),
    )


def _order_of(
    pick: Scored, shape: tuple[int, int], shown: Sequence[Sequence[Sequence[Sequence[NDArray[np.bool_]]]]]
) -> tuple[int, ...]:
    """Return the numbers of acquisitions, the best first.

    Parameters
    ----------
    shape
        (y, x) of the whole cube.
    shown
        Where they are clear: acquisition, record, block along y, block along x.
    """
    ground = np.zeros((len(shown), *shape), dtype=bool)
    for one, records in zip(ground, shown, strict=True):
        for blocks in records:
            one |= np.block([list(row) for row in blocks])
    return composing.by_score(pick, list(ground))


def _all_valid(parts: Sequence[_Pixels]) -> NDArray[np.bool_]:
    """Return where all bands are valid, shape (1, y, x), of groups of bands."""
    return np.asarray(np.logical_and.reduce([valid.all(axis=1) for _, valid, _ in parts]))


def _any_filled(parts: Sequence[_Pixels]) -> NDArray[np.bool_]:
    """Return where all bands are valid and another acquisition gave one of them, shape (1, y, x)."""
    valid = _all_valid(parts)
    some = [filled.any(axis=1) for _, _, filled in parts if filled is not None]
    return np.asarray(valid & np.logical_or.reduce(some)) if some else np.zeros(valid.shape, dtype=bool)


def _none_is(fill: Any, parts: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
    """Return where no band holds the fill, shape (1, y, x), of groups of bands."""
    return np.asarray(np.logical_and.reduce([(values != fill).all(axis=1) for values in parts]))
