# SPDX-License-Identifier: Apache-2.0
"""Reads a shard's chips of one source: straight to their places, then filled; or composed, slot by slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.planning.meta import MASKED
from rasteret_dask.planning.resolve import Member
from rasteret_dask.reader.engine import Session
from rasteret_dask.reader.keeping import Later
from rasteret_dask.reader.placing import Block, Clipped, Out
from rasteret_dask.reader.readplan import Request
from rasteret_dask.rules import composing
from rasteret_dask.rules.composing import Front
from rasteret_dask.rules.picks import Scored
from rasteret_dask.rules.radiometry import Radiometry
from rasteret_dask.rules.units import Unit
from rasteret_dask.table.records import Asset
from rasteret_dask.tasks.cuts import Feed, MemberCubes
from rasteret_dask.tasks.filling import (
    ChipPixels,
    ChipPlace,
    Into,
    Seen,
    Wanted,
    clear,
    copied,
    hidden,
    is_as_stored,
    scored_by,
)
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.neighbours import Neighbours

__all__ = ["Picking"]

BATCH_BYTES = 64 * 2**20
"""Validity of the bands of the slots that are read in one batch, bytes."""


class Picking:
    """Reads one source of one shard.

    Where a slot takes one acquisition's pixels, those of its nearest record go straight from the tiles to their
    places, in the stored form, for many slots in one batch. What other records have to fill, and composites, go
    slot by slot. What becomes of the numbers is said by the source's :class:`PixelRules`, here and in cubes.
    """

    def __init__(self, job: Job, shard: Shard, source: int, members: Sequence[MemberCubes]) -> None:
        self.job, self.shard, self.source = job, shard, source
        self.plan, self.rules = job.sources[source], job.sources[source].rules
        self.members = {m.number: m for m in members}
        self.size = job.size_px[source]
        self.member_of, self.pass_of = job.members[source], job.passes[source]
        self._seen: dict[tuple[int, int], list[Seen]] = {}
        """(record, chip) -> the bands that its score has read of it already."""
        self._veils: dict[tuple[int, int], NDArray[np.bool_]] = {}
        """(chip, slot) -> where a mask hides any of its records that were read: of one batch, if it is asked for."""

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
        chips = ChipPixels(
            values,
            valid,
            np.full((n, plan.times), np.datetime64("NaT", "us"), dtype="datetime64[us]"),
            np.full((n, plan.times), "", dtype=object),
            np.full((n, plan.times), -1, dtype=np.int64),
            np.zeros(len(plan.bands), dtype=np.int64),
            np.zeros((n, plan.times), dtype=np.float32) if plan.pick.fills else None,
            np.zeros((n, plan.times), dtype=np.float32) if self._is_veiled else None,
        )
        feed = Feed.of(self.job, self.shard, self.source)
        blank = np.ones((n, plan.times), dtype=bool)
        if not self.rules.composes:
            blank[feed.chip, feed.slot] = False
        for chip, slot in np.argwhere(blank).tolist():
            chips.values[chip, slot] = plan.fill
            chips.valid[chip, slot] = False
        with Session(on_error, later or Neighbours(self.job, self.shard, self.source)) as session:
            for slots in self._batches(feed):
                some = feed.take(np.isin(feed.slot, slots))
                if self.rules.composes:
                    self._compose(session, some, slots[0], chips)
                else:
                    self._pick(session, some, slots, chips)
                self._seen.clear()
                self._count_masked(chips)
            chips.counts, chips.unreadable = session.counts, session.unreadable
            chips.read_s = session.seconds
        return chips

    def _batches(self, feed: Feed) -> Iterator[list[int]]:
        """Yield slots to be read together, so that many ranges are under way at the same time."""
        slots = np.unique(feed.slot).tolist()
        cost = (self.shard.stop - self.shard.start) * len(self.plan.bands) * self.size * self.size
        alone = self.rules.composes or isinstance(self.plan.pick, Scored)
        most = 1 if alone else max(1, BATCH_BYTES // cost)
        for at in range(0, len(slots), most):
            yield slots[at : at + most]

    def _pick(self, session: Session, feed: Feed, slots: list[int], chips: ChipPixels) -> None:
        """Read slots that take one acquisition's pixels each."""
        plan, n = self.plan, self.shard.stop - self.shard.start
        if isinstance(plan.pick, Scored):
            feed = self._by_score(session, feed, plan.pick)
        shape = (n, len(plan.bands), self.size, self.size)
        several = self._several(feed, slots)
        valid = {slots[at]: np.zeros(shape, dtype=bool) for at in np.flatnonzero(several.any(0)).tolist()}
        self._straight(session, feed, slots, several, chips, valid)
        for at, slot in enumerate(slots):
            own = feed.take(feed.slot == slot)
            if slot in valid:
                fronts = {
                    chip: Front(chips.values[chip, slot], valid[slot][chip])
                    for chip in np.flatnonzero(several[:, at]).tolist()
                }
                by_others = self._fill(session, own, fronts, chips)
                for chip, front in fronts.items():
                    shown = np.logical_and.reduce(front.valid, axis=0, out=chips.valid[chip, slot])
                    if chips.filled is not None and chip in by_others:
                        chips.filled[chip, slot] = np.count_nonzero(by_others[chip] & shown) / shown.size
            self._name(own, slot, chips)

    def _several(self, feed: Feed, slots: list[int]) -> NDArray[np.bool_]:
        """Return shape (chip, slot of ``slots``): whether several records feed a chip, so that one fills another."""
        count = np.zeros((self.shard.stop - self.shard.start, len(slots)), dtype=np.int64)
        np.add.at(count, (feed.chip, np.searchsorted(slots, feed.slot)), 1)
        return count > 1

    def _straight(
        self,
        session: Session,
        feed: Feed,
        slots: list[int],
        several: NDArray[np.bool_],
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
        places = []
        for chip, slot, at in zip(
            first.chip.tolist(), first.slot.tolist(), np.searchsorted(slots, first.slot).tolist(), strict=True
        ):
            if several[chip, at]:
                places.append(ChipPlace(chips.values[chip, slot], valid[slot][chip], False))
            else:
                places.append(ChipPlace(chips.values[chip, slot], chips.valid[chip, slot], True))
                chips.valid[chip, slot] = True
        wanted, outs = self._wanted(first), []
        apart: list[tuple[Wanted, Block]] = []
        for one in wanted:
            if self._masks(one):
                block = Block.empty(one.request)
                apart.append((one, block))
                outs.append(block.out())
            else:
                outs.append(self._out(one, [places[entry] for entry in one.entries]))
        soon = rest.take(np.isin(rest.row, first.row))  # other records share no tile with these
        session.read_into([one.request for one in wanted], outs, self.requests(soon))
        for one, out in zip(wanted, outs, strict=True):
            for part in out.clipped or ():
                places[one.entries[part.window]].clipped += [(band, part) for band in one.bands]
            for entry in () if self._masks(one) else one.entries:
                places[entry].written(one.bands)
        looks = self._looks(first, apart)
        for entry, (place, windows) in enumerate(zip(places, looks, strict=True)):
            self._look(place, windows, self._member(int(first.row[entry])), chips)
            self._note_hidden(first, entry, windows)

    def _out(self, wanted: Wanted, places: Sequence[ChipPlace]) -> Out:
        band, asset = wanted.bands[0], wanted.asset
        clipped: list[Clipped] = []
        return Out(
            [place.values[band] for place in places],
            [place.valid if place.common else place.valid[band] for place in places],
            self.plan.fill,
            self.rules.turn(band, _scaling(asset)),
            [place.common for place in places],
            clipped=clipped,
        )

    def _looks(self, feed: Feed, apart: Sequence[tuple[Wanted, Block]]) -> list[list[Seen]]:
        """Return what has been read of each entry beside its bands: quality, now or for its score."""
        looks: list[list[Seen]] = [[] for _ in feed.chip]
        for one, block in apart:
            for at, entry in enumerate(one.entries):
                looks[entry].append(Seen(one, block.values[at], block.valid[at], at in block.lost))
        for entry, (row, chip) in enumerate(zip(feed.row.tolist(), feed.chip.tolist(), strict=True)):
            looks[entry] += self._seen.get((row, chip), [])
        return looks

    def _look(self, place: ChipPlace, windows: Sequence[Seen], member: Member, chips: ChipPixels) -> None:
        """Finish one chip in one slot: bands read apart, those that belong together, masked pixels."""
        for window in windows:
            for band in window.wanted.bands:
                self._put_apart(place, band, window, chips)
        place.complete(self.plan.fill)
        place.finish(self.rules)
        where = hidden(member, windows)
        place.count_clipped(where, chips.clipped)
        if where is not None:
            place.hide(where, self.plan.fill)

    def _put_apart(self, place: ChipPlace, band: int, window: Seen, chips: ChipPixels) -> None:
        """Write a band whose stored numbers were read for a mask or a score too."""
        turn = self.rules.turn(band, _scaling(window.wanted.asset))
        if turn is None:
            place.put(band, window.values, window.valid, self.plan.fill)
            return
        made = np.empty(window.values.shape, dtype=place.values.dtype)
        write = turn.write if window.wanted.request.decode is None else turn.write_decoded
        valid, clipped = write(made, window.values, window.valid)
        place.put(band, made, window.valid if valid is None else valid, self.plan.fill)
        if clipped is not None:
            place.clipped.append((band, Clipped(0, slice(None), slice(None), clipped)))

    def _masks(self, wanted: Wanted) -> bool:
        """Tell whether a band is needed as it stands in the file."""
        member = wanted.member
        shared = member.mask is not None and wanted.asset.band in member.quality
        return not wanted.bands or (shared and is_as_stored(wanted.request))

    def _fill(
        self, session: Session, feed: Feed, fronts: Mapping[int, Front], chips: ChipPixels
    ) -> dict[int, NDArray[np.bool_]]:
        """Fill the pixels that the nearest record of each chip leaves invalid, record by record.

        Parameters
        ----------
        fronts
            Each chip with several records, with the pixels of the nearest.

        Returns
        -------
        dict
            Chip -> where another acquisition than the best gave a band its pixel, shape (y, x); none: nowhere.
        """
        first = _first_of(feed.chip)
        main = dict(zip(feed.chip[first].tolist(), self.pass_of[feed.row[first]].tolist(), strict=True))
        by_others: dict[int, NDArray[np.bool_]] = {}
        for chip, row, windows in self._behind(session, feed, fronts, level=1):
            values, valid = self.rules.finish(*self._decoded(windows, self._member(row)))
            stored, clipped = self.rules.encode(values, valid)
            take = fronts[chip].behind(stored, valid)
            if clipped is not None:
                chips.clipped += np.count_nonzero(clipped & take, axis=(1, 2))
            if chips.filled is not None and self.pass_of[row] != main[chip]:
                shown = by_others.setdefault(chip, np.zeros(take.shape[1:], dtype=bool))
                shown |= take.any(axis=0)
        return by_others

    def _behind(
        self, session: Session, feed: Feed, fronts: Mapping[int, Front], level: int = 0
    ) -> Iterator[tuple[int, int, list[Seen]]]:
        """Yield (chip, record, its windows), nearest records first, while some of the chip's pixels are invalid.

        Parameters
        ----------
        fronts
            By chip: what lies in front of these records by now.
        level
            How many of the nearest records of each chip are left out.
        """
        rank = _rank_in(feed.chip, _first_of(feed.chip))
        for number in range(level, int(rank.max(initial=-1)) + 1):
            here = feed.take(rank == number)
            shows = [chip not in fronts or not fronts[chip].is_complete for chip in here.chip.tolist()]
            here = here.take(np.flatnonzero(shows))
            for entry, windows in self._windows(session, here, keep=feed.take(rank > number)):
                self._note_hidden(here, entry, windows)
                yield int(here.chip[entry]), int(here.row[entry]), windows

    def _compose(self, session: Session, feed: Feed, slot: int, chips: ChipPixels) -> None:
        """Compose all candidates of a slot.

        Candidates are taken by the start of their acquisition, so that a tile is read for all chips at once.
        """
        made = {int(chip): self.rules.begin() for chip in np.unique(feed.chip)}
        passes = self.pass_of[feed.row]
        for number in np.unique(passes).tolist():
            own = feed.take(passes == number)
            fronts: dict[int, Front] = {}
            for chip, row, windows in self._behind(session, own, fronts):
                layer = self._decoded(windows, self._member(row))
                if chip in fronts:
                    fronts[chip].behind(*layer)
                else:
                    fronts[chip] = Front(*layer)
            lead = own.take(_first_of(own.chip))
            for chip, order in zip(lead.chip.tolist(), lead.order.tolist(), strict=True):
                made[chip].add(fronts[chip].values, fronts[chip].valid, order)
        for chip, composition in made.items():
            values, valid = self.rules.finish(*composition.result())
            stored, clipped = self.rules.encode(values, valid)
            chips.values[chip, slot] = np.where(valid, stored, self.plan.fill)
            np.logical_and.reduce(valid, axis=0, out=chips.valid[chip, slot])
            if clipped is not None:
                chips.clipped += np.count_nonzero(clipped, axis=(1, 2))
        self._name(feed, slot, chips)
        self._name_composites(feed, slot, chips)

    def _windows(
        self, session: Session, feed: Feed, keep: Feed | None = None, scoring: bool = False
    ) -> Iterator[tuple[int, list[Seen]]]:
        """Yield each entry's number and what has been read of its record, all in one batch."""
        wanted = self._wanted(feed, scoring)
        kept = [] if keep is None else self._wanted(keep.take(np.isin(keep.row, feed.row)), scoring)
        blocks = session.read_block([w.request for w in wanted], [w.request for w in kept])
        read: list[list[Seen]] = [[] for _ in feed.chip]
        for one, block in zip(wanted, blocks, strict=True):
            for at, entry in enumerate(one.entries):
                read[entry].append(Seen(one, block.values[at], block.valid[at], at in block.lost))
        for entry, windows in enumerate(read):
            yield entry, windows + self._seen.get((int(feed.row[entry]), int(feed.chip[entry])), [])

    def _decoded(self, windows: Sequence[Seen], member: Member) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return one record's decoded values over one chip and their validity, masked; shape (band, y, x)."""
        bands: list[composing.StoredBand | None] = [None] * len(self.plan.bands)
        for window in windows:
            request, scaling = window.wanted.request, _scaling(window.wanted.asset)
            for band in window.wanted.bands:
                bands[band] = composing.StoredBand(
                    window.values, window.valid, scaling, is_decoded=request.decode is not None
                )
        layer = composing.decoded(self.rules, bands, (self.size, self.size), hidden(member, windows))
        return layer.values, layer.valid

    def requests(self, feed: Feed) -> list[Request]:
        """Return every read that some entries may ask for."""
        return [wanted.request for wanted in self._wanted(feed)]

    def bands_of(self, member: Member) -> list[tuple[str, Unit | None]]:
        """Return each band of a member that is read, once, with its unit; None: as its kind is, stored numbers."""
        return [(band, unit) for band, unit, _ in self._bands(member, scoring=False)]

    def _wanted(self, feed: Feed, scoring: bool = False) -> list[Wanted]:
        """Return one request per (record, cube, band) that has not been seen yet."""
        by_cube: dict[tuple[int, int], list[int]] = {}
        for entry, (row, chip) in enumerate(zip(feed.row.tolist(), feed.chip.tolist(), strict=True)):
            by_cube.setdefault((row, self._cubes(row).group_of[chip]), []).append(entry)
        wanted = []
        for (row, _), entries in by_cube.items():
            lazy = self._cubes(row)
            places = {e: lazy.window(int(feed.chip[e])) for e in entries}
            cube, whole = places[entries[0]][0], tuple(window for _, window in places.values())
            for band, unit, at in self._bands(lazy.member, scoring):
                asset = cube.assets.get((row, band))
                if asset is None:  # the footprint touches the chip, the raster does not
                    continue
                decode = unit if unit is not None and unit.kernel_on == "decoded" else None
                resampling = None if unit is None else self.plan.resampling
                how = (band, decode, resampling)
                new = entries  # most reads come first, with nothing seen yet
                if self._seen:
                    new = [e for e in entries if not self._has_seen(row, int(feed.chip[e]), how)]
                if new:
                    # one tuple for all bands: they are laid out once
                    windows = whole if len(new) == len(entries) else tuple(places[e][1] for e in new)
                    request = Request(asset, cube.grid, windows, resampling, decode)
                    wanted.append(Wanted(request, lazy.member, at, new))
        return wanted

    def _has_seen(self, row: int, chip: int, how: tuple[str, Unit | None, str | None]) -> bool:
        requests = (window.wanted.request for window in self._seen.get((row, chip), ()))
        return any((r.asset.band, r.decode, r.resampling) == how for r in requests)

    def _bands(self, member: Member, scoring: bool) -> list[tuple[str, Unit | None, list[int]]]:
        """Return each band to read, once, with its unit and the output bands it becomes.

        A quality band is read with its kind's own kernel, stored numbers: together with an output band only where
        that is read so too, else apart, without a unit.
        """
        at: dict[tuple[str, Unit | None], list[int]] = {}
        for i, (band, unit) in enumerate(zip(member.bands, self.rules.units, strict=True)):
            at.setdefault((band, unit), []).append(i)
        if scoring and not member.quality:
            return [(band, unit, own) for (band, unit), own in at.items() if band in scored_by(member)]
        for band in member.quality if scoring or member.mask is not None else ():
            if not any(known == band and self._is_as_stored(unit) for known, unit in at):
                at[band, None] = []
        return [
            (band, unit, own)
            for (band, unit), own in at.items()
            if not scoring or (band in member.quality and self._is_as_stored(unit))
        ]

    def _is_as_stored(self, unit: Unit | None) -> bool:
        """Tell whether bands of a unit are read as quality bands are: stored numbers, by their kind's own kernel."""
        return unit is None or (unit.kernel_on == "stored" and self.plan.resampling is None)

    def _cubes(self, row: int) -> MemberCubes:
        return self.members[int(self.member_of[row])]

    def _member(self, row: int) -> Member:
        return self._cubes(row).member

    def _by_score(self, session: Session, feed: Feed, pick: Scored) -> Feed:
        """Order each chip's candidates by their score, the earlier in order where equal; keep the best, or all."""
        shape = (self.shard.stop - self.shard.start, int(feed.order.max()) + 1)
        seen = np.zeros((*shape, self.size, self.size), dtype=bool)
        read: dict[tuple[int, int], list[Seen]] = {}
        for entry, windows in self._windows(session, feed, scoring=True):
            chip, order, row = (int(column[entry]) for column in (feed.chip, feed.order, feed.row))
            shown = clear(self._member(row), windows)
            if shown is not None:
                seen[chip, order] |= shown
            read[row, chip] = windows
        place = np.empty(shape, dtype=np.int64)
        for chip in np.unique(feed.chip).tolist():
            orders = np.unique(feed.order[feed.chip == chip])
            best = orders[list(composing.by_score(pick, seen[chip, orders]))]
            place[chip, best] = np.arange(len(best))
        rank = place[feed.chip, feed.order]
        chosen = np.flatnonzero(rank == 0) if not pick.fill else np.lexsort((rank, feed.slot, feed.chip))
        feed = feed.take(chosen)
        left = set(zip(feed.row.tolist(), feed.chip.tolist(), strict=True))
        self._seen = {key: [copied(w) for w in windows] for key, windows in read.items() if key in left}
        return feed

    @property
    def _is_veiled(self) -> bool:
        """Whether the share of masked pixels is asked for."""
        return MASKED in dict(self.plan.meta)

    def _note_hidden(self, feed: Feed, entry: int, windows: Sequence[Seen]) -> None:
        """Note where the mask hides a record, where the share of masked pixels is asked for."""
        if not self._is_veiled:
            return
        where = hidden(self._member(int(feed.row[entry])), windows)
        if where is not None:
            place = int(feed.chip[entry]), int(feed.slot[entry])
            self._veils[place] = where | self._veils[place] if place in self._veils else where

    def _count_masked(self, chips: ChipPixels) -> None:
        """Count the pixels of finished slots that stayed invalid, and that a mask hides."""
        for place, where in self._veils.items():
            assert chips.masked is not None
            chips.masked[place] = np.count_nonzero(where & ~chips.valid[place]) / where.size
        self._veils.clear()

    def _name(self, feed: Feed, slot: int, chips: ChipPixels) -> None:
        """Note when the first acquisition of each chip starts, its member, and its nearest record."""
        best = feed.take(_first_of(feed.chip))
        chips.row[best.chip, slot] = best.row
        chips.datetime[best.chip, slot] = self.job.starts[self.source][best.row]
        chips.member[best.chip, slot] = self._names(best.row)

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
                chips.row[chip, slot] = -1

    def _names(self, rows: NDArray[np.int64]) -> list[str]:
        return [self._member(int(row)).name for row in rows]


def _scaling(asset: Asset) -> Radiometry:
    return Radiometry(asset.scale, asset.offset, asset.rule)


def _first_of(chip: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the first entry of each chip; entries are sorted by chip."""
    return np.unique(chip, return_index=True)[1]


def _rank_in(chip: NDArray[np.int64], first: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each entry's place among those of its chip; entries are sorted by chip."""
    return np.asarray(np.arange(len(chip)) - first[np.searchsorted(chip[first], chip)])
