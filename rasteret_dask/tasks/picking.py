"""Reads a shard's chips of one source: straight to their places, or picked, filled and composed slot by slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.catalogs.bands import Radiometry
from rasteret_dask.cubes.cube import GroupCube
from rasteret_dask.planning.resolve import Member
from rasteret_dask.reader import harmonize
from rasteret_dask.reader.engine import Session
from rasteret_dask.reader.keeping import Later
from rasteret_dask.reader.pixelgrid import Window
from rasteret_dask.reader.placing import Block, Out
from rasteret_dask.reader.readplan import Request
from rasteret_dask.table.records import Asset
from rasteret_dask.tasks.cuts import Cut, Feed, Harmonized
from rasteret_dask.tasks.filling import (
    ChipPixels,
    Into,
    Place,
    Seen,
    Slot,
    Wanted,
    clear,
    copied,
    masked,
    put,
)
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.neighbours import Neighbours

__all__ = ["Picking"]

BATCH_BYTES = 64 * 2**20
"""Validity of the bands of the slots that are read in one batch, bytes."""


class Picking:
    """Reads one source of one shard.

    Where each chip has one record to begin with and no numbers to count, its pixels go straight from the tiles to
    their places, in the source's units, for many slots in one batch. What other records have to fill, and
    composites, go slot by slot.
    """

    def __init__(self, job: Job, shard: Shard, source: int, members: Sequence[Harmonized]) -> None:
        self.job, self.shard, self.source = job, shard, source
        self.plan = job.sources[source]
        self.members = {m.cut.number: m for m in members}
        self.size = job.size_px[source]
        self.member_of, self.pass_of = job.members[source], job.passes[source]
        self._seen: dict[tuple[int, int], Seen] = {}
        """(record, chip) -> the band that ``clearest`` has read of it already."""

    def read(
        self, on_error: str = "raise", into: Into | None = None, later: Later | None = None
    ) -> ChipPixels:
        """Read every slot ``into`` memory, or new one; ``later`` are to be read of the same tiles, or shards near."""
        self.job.check_signatures()
        plan, size, n = self.plan, self.size, self.shard.stop - self.shard.start
        values, valid = into or (None, None)
        if values is None:
            values = np.empty((n, plan.times, len(plan.bands), size, size), dtype=plan.dtype)
        if valid is None:
            valid = np.empty((n, plan.times, size, size), dtype=bool)
        valid[...] = False
        chips = ChipPixels(
            values,
            valid,
            np.full((n, plan.times), np.datetime64("NaT", "us"), dtype="datetime64[us]"),
            np.full((n, plan.times), "", dtype=object),
            np.zeros(len(plan.bands), dtype=np.int64),
        )
        feed = Feed.of(self.job, self.shard, self.source)
        direct = self._is_direct(feed)
        blank = np.ones((n, plan.times), dtype=bool)
        if direct:
            blank[feed.chip, feed.slot] = False
        for chip, slot in np.argwhere(blank).tolist():
            chips.values[chip, slot] = plan.fill
        with Session(on_error, later or Neighbours(self.job, self.shard, self.source)) as session:
            for slots in self._batches(feed, direct):
                self._slots(session, feed.take(np.isin(feed.slot, slots)), slots, direct, chips)
            chips.counts, chips.unreadable = session.counts, session.unreadable
        return chips

    def _is_direct(self, feed: Feed) -> bool:
        """Tell whether pixels can go straight to their places: nothing to compose, to round or to count."""
        plan = self.plan
        if self._composed or (plan.units == "reflectance" and plan.dtype != "float32"):
            return False
        if plan.units != "raw":
            return True
        records = self.job.records[self.source]
        kinds = {
            records.asset(row, band).dtype
            for row in np.unique(feed.row).tolist()
            for band in self.plan.members[int(self.member_of[row])].bands
        }
        return all(np.can_cast(kind, plan.dtype) for kind in kinds)

    @property
    def _composed(self) -> bool:
        return self.plan.slots is not None and self.plan.pick in ("mean", "median")

    def _batches(self, feed: Feed, direct: bool) -> Iterator[list[int]]:
        """Yield slots to be read together, so that many ranges are under way at the same time."""
        slots = np.unique(feed.slot).tolist()
        cost = (self.shard.stop - self.shard.start) * len(self.plan.bands) * self.size * self.size
        single = not direct or (self.plan.slots is not None and self.plan.pick == "clearest")
        most = 1 if single else max(1, BATCH_BYTES // cost)
        for at in range(0, len(slots), most):
            yield slots[at : at + most]

    def _slots(self, session: Session, feed: Feed, slots: list[int], direct: bool, chips: ChipPixels) -> None:
        plan, n = self.plan, self.shard.stop - self.shard.start
        if plan.slots is not None and plan.pick == "clearest":
            feed = self._clearest(session, feed)
        shape = (n, len(plan.bands), self.size, self.size)
        ranked = self._ranked(feed, slots) if direct else np.ones((n, len(slots)), dtype=bool)
        valid = {slots[at]: np.zeros(shape, dtype=bool) for at in np.flatnonzero(ranked.any(0)).tolist()}
        if direct:
            self._straight(session, feed, slots, ranked, chips, valid)
        dn = plan.units == "reflectance" and plan.dtype != "float32"
        for at, slot in enumerate(slots):
            own = feed.take(feed.slot == slot)
            if slot in valid:
                target = Slot(chips.values[:, slot], valid[slot], plan.fill, dn)
                if self._composed:
                    chips.clipped += self._composite(session, own, target)
                else:
                    chips.clipped += self._acquisition(session, own, target, int(direct))
                for chip in np.flatnonzero(ranked[:, at]).tolist():
                    np.logical_and.reduce(valid[slot][chip], axis=0, out=chips.valid[chip, slot])
            best = own.take(_first_of(own.chip))
            chips.datetime[best.chip, slot] = self.job.starts[self.source][best.row]
            chips.member[best.chip, slot] = self._names(best.row)
            if self._composed:
                self._name_composites(own, slot, chips)
        self._seen.clear()

    def _ranked(self, feed: Feed, slots: list[int]) -> NDArray[np.bool_]:
        """Return shape (chip, slot of ``slots``): whether several records feed a chip, so that one fills another."""
        count = np.zeros((self.shard.stop - self.shard.start, len(slots)), dtype=np.int64)
        np.add.at(count, (feed.chip, np.searchsorted(slots, feed.slot)), 1)
        return count > 1

    def _straight(
        self,
        session: Session,
        feed: Feed,
        slots: list[int],
        ranked: NDArray[np.bool_],
        chips: ChipPixels,
        valid: dict[int, NDArray[np.bool_]],
    ) -> None:
        """Read the nearest record of each chip and slot to its place.

        Validity goes to ``valid[slot]``, shape (chip, band, y, x), where another record may fill invalid pixels,
        else to ``chips.valid``: what is valid in all bands.
        """
        plan = self.plan
        head = np.unique(feed.chip * plan.times + feed.slot, return_index=True)[1]
        first, rest = feed.take(head), feed.take(np.delete(np.arange(len(feed.chip)), head))
        wanted = self._wanted(first)
        places = []
        for chip, slot, at in zip(
            first.chip.tolist(), first.slot.tolist(), np.searchsorted(slots, first.slot).tolist(), strict=True
        ):
            if ranked[chip, at]:
                places.append(Place(chips.values[chip, slot], valid[slot][chip], False))
            else:
                places.append(Place(chips.values[chip, slot], chips.valid[chip, slot], True))
                chips.valid[chip, slot] = True
        outs, apart = [], []
        for one in wanted:
            if self._is_quality(one):
                block = Block.empty(one.request)
                apart.append((one, block))
                outs.append(block.out())
            else:
                outs.append(self._out(one, [places[entry] for entry in one.entries]))
        soon = rest.take(np.isin(rest.row, first.row))  # other records share no tile with these
        session.read_into([one.request for one in wanted], outs, self.requests(soon))
        for one in wanted:
            for entry in () if self._is_quality(one) else one.entries:
                places[entry].written(one.bands)
        looks = self._looks(first, apart)
        for place, windows in zip(places, looks, strict=True):
            self._look(place, windows)

    def _out(self, wanted: Wanted, places: Sequence[Place]) -> Out:
        band = wanted.bands[0]
        return Out(
            [place.values[band] for place in places],
            [place.valid if place.common else place.valid[band] for place in places],
            self.plan.fill,
            self._rule(wanted.asset) if self.plan.units == "reflectance" else None,
            [place.common for place in places],
        )

    def _looks(self, feed: Feed, apart: Sequence[tuple[Wanted, Block]]) -> list[list[Seen]]:
        """Return what has been read of each entry beside its bands: quality, now or by ``clearest``."""
        looks: list[list[Seen]] = [[] for _ in feed.chip]
        for one, block in apart:
            for at, entry in enumerate(one.entries):
                looks[entry].append(Seen(one, block.values[at], block.valid[at], at in block.lost))
        for entry, (row, chip) in enumerate(zip(feed.row.tolist(), feed.chip.tolist(), strict=True)):
            seen = self._seen.get((row, chip))
            if seen is not None:
                looks[entry].append(seen)
        return looks

    def _look(self, place: Place, windows: Sequence[Seen]) -> None:
        """Finish one chip in one slot: bands read apart, unit length, masked pixels."""
        plan = self.plan
        for window in windows:
            for band in window.wanted.bands:
                place.put(band, self._scaled(window.wanted.asset, window), window.valid, plan.fill)
        place.complete(plan.fill)
        if plan.units == "embedding":
            place.values[...] = harmonize.unit_length(place.values, axis=0)
            place.valid[...] = np.isfinite(place.values[0])
        for window in windows:
            if plan.mask and window.wanted.asset.band == window.wanted.member.quality:
                hidden = masked(window, plan.mask)
                place.valid &= ~hidden
                np.copyto(place.values, place.values.dtype.type(plan.fill), where=hidden)

    def _is_quality(self, wanted: Wanted) -> bool:
        return not wanted.bands or (bool(self.plan.mask) and wanted.asset.band == wanted.member.quality)

    def _rule(self, asset: Asset) -> Radiometry:
        return Radiometry(asset.scale, asset.offset, asset.rule)

    def _acquisition(self, session: Session, feed: Feed, target: Slot, done: int = 0) -> NDArray[np.int64]:
        """Read the nearest record of each chip's acquisition, then fill its invalid pixels from the others.

        Those of the first ``done`` ranks are read already. Returns how many pixels of each band were clipped.
        """
        first = _first_of(feed.chip)
        rank = np.arange(len(feed.chip)) - first[np.searchsorted(feed.chip[first], feed.chip)]
        clipped = np.zeros(target.values.shape[1], dtype=np.int64)
        for level in range(done, int(rank.max(initial=-1)) + 1):
            here = feed.take(rank == level)
            if level:
                here = here.take(np.flatnonzero(~target.valid[here.chip].all(axis=(1, 2, 3))))
            for entry, windows in self._windows(session, here, keep=feed.take(rank > level)):
                values, valid = self._in_units(windows)
                clipped += put(values, valid, int(here.chip[entry]), target)
        return clipped

    def _windows(
        self, session: Session, feed: Feed, keep: Feed | None = None, quality_only: bool = False
    ) -> Iterator[tuple[int, list[Seen]]]:
        """Yield each entry's number and what has been read of its record, all in one batch."""
        wanted = self._wanted(feed, quality_only)
        kept = [] if keep is None else self._wanted(keep.take(np.isin(keep.row, feed.row)), quality_only)
        blocks = session.read_block([w.request for w in wanted], [w.request for w in kept])
        found: list[list[Seen]] = [[] for _ in feed.chip]
        for one, block in zip(wanted, blocks, strict=True):
            for at, entry in enumerate(one.entries):
                found[entry].append(Seen(one, block.values[at], block.valid[at], at in block.lost))
        for entry, windows in enumerate(found):
            seen = self._seen.get((int(feed.row[entry]), int(feed.chip[entry])))
            yield entry, windows if seen is None else [*windows, seen]

    def _in_units(self, windows: Sequence[Seen]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return values in the source's units and validity, shape (band, y, x), of one record over one chip."""
        plan = self.plan
        shape = (len(plan.bands), self.size, self.size)
        values = np.zeros(shape, dtype=plan.dtype if plan.units == "raw" else np.float32)
        valid = np.zeros(shape, dtype=bool)
        cloudy = np.zeros(shape[1:], dtype=bool)
        for window in windows:
            asset = window.wanted.asset
            if asset.band == window.wanted.member.quality:
                cloudy |= masked(window, plan.mask)
            for band in window.wanted.bands:
                values[band] = self._scaled(asset, window)
                valid[band] = window.valid
        if plan.units == "embedding":
            values[~valid] = np.nan
            values = harmonize.unit_length(values, axis=0)
            valid[:] = np.isfinite(values[:1])
        if plan.mask:
            valid &= ~cloudy
        return values, valid

    def _scaled(self, asset: Asset, window: Seen) -> NDArray[Any]:
        if self.plan.units == "reflectance":
            return harmonize.to_float(window.values, window.valid, self._rule(asset))
        return window.values

    def requests(self, feed: Feed) -> list[Request]:
        """Return every read that some entries may ask for."""
        return [wanted.request for wanted in self._wanted(feed)]

    def _wanted(self, feed: Feed, quality_only: bool = False) -> list[Wanted]:
        """Return one request per (record, cube, band) that has not been seen yet."""
        by_cube: dict[tuple[int, int], list[int]] = {}
        for entry, (row, chip) in enumerate(zip(feed.row.tolist(), feed.chip.tolist(), strict=True)):
            by_cube.setdefault((row, self._cut(row).group_of[chip]), []).append(entry)
        wanted = []
        for (row, _), entries in by_cube.items():
            lazy = self._cut(row)
            places = {e: lazy.window(int(feed.chip[e])) for e in entries}
            cube = places[entries[0]][0]
            for band, at in self._bands(lazy.member, quality_only):
                asset = cube.assets.get((row, band))
                if asset is None:  # the footprint touches the chip, the raster does not
                    continue
                new = [e for e in entries if not self._has_seen(row, int(feed.chip[e]), band)]
                if new:
                    windows = tuple(places[e][1] for e in new)
                    request = self._request(asset, cube, windows, band == lazy.member.quality)
                    wanted.append(Wanted(request, lazy.member, at, new))
        return wanted

    def _has_seen(self, row: int, chip: int, band: str) -> bool:
        window = self._seen.get((row, chip))
        return window is not None and window.wanted.asset.band == band

    def _request(self, asset: Asset, cube: GroupCube, windows: tuple[Window, ...], quality: bool) -> Request:
        decode = "embedding" if self.plan.units == "embedding" and not quality else None
        return Request(asset, cube.grid, windows, None if quality else self.plan.resampling, decode)

    def _bands(self, member: Member, quality_only: bool) -> list[tuple[str, list[int]]]:
        """Return each band to read, once, with the output bands it becomes."""
        at: dict[str, list[int]] = {}
        for i, band in enumerate(member.bands):
            at.setdefault(band, []).append(i)
        if quality_only:
            band = member.quality or member.bands[0]
            return [(band, at.get(band, []))]
        if self.plan.mask and member.quality is not None:
            at.setdefault(member.quality, [])
        return list(at.items())

    def _cut(self, row: int) -> Cut:
        return self.members[int(self.member_of[row])].cut

    def _clearest(self, session: Session, feed: Feed) -> Feed:
        """Keep of each chip the candidate with the most valid pixels, the earlier in order where equal."""
        shape = (self.shard.stop - self.shard.start, int(feed.order.max()) + 1)
        seen = np.zeros((*shape, self.size, self.size), dtype=bool)
        read: dict[tuple[int, int], Seen] = {}
        for entry, windows in self._windows(session, feed, quality_only=True):
            chip, order, row = (int(column[entry]) for column in (feed.chip, feed.order, feed.row))
            for window in windows:
                seen[chip, order] |= clear(window, self.plan.mask)
                read[row, chip] = window
        scores = np.full(shape, -1, dtype=np.int64)
        scores[feed.chip, feed.order] = seen.sum(axis=(2, 3))[feed.chip, feed.order]
        best = scores.argmax(axis=1)
        chosen = feed.take(feed.order == best[feed.chip])
        left = set(zip(chosen.row.tolist(), chosen.chip.tolist(), strict=True))
        self._seen = {key: copied(window) for key, window in read.items() if key in left}
        return chosen

    def _composite(self, session: Session, feed: Feed, target: Slot) -> NDArray[np.int64]:
        """Compose all candidates of the slot; a mean is summed up, a median holds them all.

        Candidates are taken by the start of their acquisition, so that a tile is read for all chips at once.
        """
        passes = self.pass_of[feed.row]
        found = np.unique(passes).tolist()
        shape, mean = target.values.shape, self.plan.pick == "mean"
        dtype = harmonize.composite_dtype(self.plan.dtype)
        stack = [
            Slot(np.full(shape, np.nan, dtype), np.zeros(shape, dtype=bool), np.nan, False)
            for _ in range(1 if mean else len(found))
        ]
        total = np.zeros(shape if mean else 0, dtype=np.float64)
        count = np.zeros(shape if mean else 0, dtype=np.int32)
        for i, number in enumerate(found):
            own, one = feed.take(passes == number), stack[0 if mean else i]
            self._acquisition(session, own, one)
            for chip in np.unique(own.chip).tolist() if mean else ():
                harmonize.add(one.values[chip], total[chip], count[chip])
                one.values[chip], one.valid[chip] = np.nan, False
        clipped = np.zeros(shape[1], dtype=np.int64)
        for chip in np.unique(feed.chip).tolist():
            if mean:
                made = harmonize.divided(total[chip], count[chip], dtype)
            else:
                made = harmonize.composite(np.stack([s.values[chip] for s in stack]), "median")
            if self.plan.units == "embedding":
                made = harmonize.unit_length(made, axis=0)
            clipped += put(made, np.isfinite(made), chip, target)
        return clipped

    def _name_composites(self, feed: Feed, slot: int, chips: ChipPixels) -> None:
        """Name the members of each chip's candidates; only a single candidate has a time."""
        change = np.diff(feed.chip, prepend=-1) | np.diff(feed.order, prepend=-1)
        leads = feed.take(np.flatnonzero(change))
        names = np.array(self._names(leads.row), dtype=object)
        for chip in np.unique(leads.chip).tolist():
            own = leads.chip == chip
            chips.member[chip, slot] = "+".join(sorted(set(names[own].tolist())))
            if own.sum() > 1:
                chips.datetime[chip, slot] = np.datetime64("NaT", "us")

    def _names(self, rows: NDArray[np.int64]) -> list[str]:
        return [self.plan.members[int(self.member_of[r])].name for r in rows]


def _first_of(chip: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the first entry of each chip; entries are sorted by chip."""
    return np.unique(chip, return_index=True)[1]
