"""The pixels of one source in one shard: cubes, cut into chips, harmonized, and picked slot by slot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask import harmonize
from rasteret_dask.bands import Radiometry
from rasteret_dask.chiptable import label_columns
from rasteret_dask.cube import GroupCube, compact_groups, group_cube
from rasteret_dask.job import Job, Shard
from rasteret_dask.reader import Counts, Request, Session, Window
from rasteret_dask.records import Asset
from rasteret_dask.resolve import Member, SourcePlan

__all__ = ["Cut", "Harmonized", "MemberCubes", "cubes", "cut", "harmonized", "merged"]


@dataclass(frozen=True)
class Feed:
    """One shard's feed entries of one source; all arrays have one entry per (chip, slot, record)."""

    chip: NDArray[np.int64]
    """Place of the chip in the shard."""
    slot: NDArray[np.int64]
    order: NDArray[np.int64]
    row: NDArray[np.int64]

    @classmethod
    def of(cls, job: Job, shard: Shard, source: int) -> Feed:
        """Take a shard's entries from the job's chip table."""
        feeds = job.feeds
        span = slice(feeds.offsets[shard.start], feeds.offsets[shard.stop])
        count = np.diff(feeds.offsets[shard.start : shard.stop + 1])
        chip = np.repeat(np.arange(shard.stop - shard.start), count)
        own = feeds.source[span] == source
        return cls(chip[own], feeds.slot[span][own], feeds.order[span][own], feeds.row[span][own])

    def take(self, at: NDArray[Any]) -> Feed:
        """Return some entries."""
        return Feed(self.chip[at], self.slot[at], self.order[at], self.row[at])


@dataclass(frozen=True)
class MemberCubes:
    """The cubes of one member over one shard: nothing is read yet."""

    member: Member
    number: int
    groups: tuple[GroupCube, ...]


@dataclass(frozen=True)
class Cut:
    """Lazy windows: where each (record, band) of a chip is read, and in which cube."""

    member: Member
    number: int
    group_of: Mapping[int, int]
    """Chip -> its group."""
    groups: tuple[GroupCube, ...]

    def window(self, chip: int) -> tuple[GroupCube, Window]:
        """Return a chip's cube and its window in it."""
        group = self.groups[self.group_of[chip]]
        return group, group.windows[chip]


@dataclass(frozen=True)
class Harmonized:
    """Lazy windows with the rules that make their values comparable."""

    cut: Cut
    plan: SourcePlan


def cubes(job: Job, shard: Shard, source: int, member: int) -> MemberCubes:
    """Make a stackstac cube per compact group of the shard's chips that this member feeds."""
    plan, records = job.sources[source], job.records[source]
    own = plan.members[member]
    feed = Feed.of(job, shard, source)
    feed = feed.take(job.members[source][feed.row] == member)
    chips = np.unique(feed.chip)
    bounds, epsg = job.bounds[shard.start : shard.stop], job.epsg[shard.start : shard.stop]
    bands = [b for b in dict.fromkeys((*own.bands, own.quality)) if b is not None]
    groups = []
    for run in compact_groups(epsg[chips], bounds[chips]):
        inside = chips[run]
        rows = np.unique(feed.row[np.isin(feed.chip, inside)]).tolist()
        code = int(epsg[inside[0]])
        groups.append(group_cube(records, rows, bands, code, inside, bounds[inside], plan.resolution))
    return MemberCubes(own, member, tuple(groups))


def cut(found: MemberCubes) -> Cut:
    """Cut the cubes into chips."""
    group_of = {chip: number for number, group in enumerate(found.groups) for chip in group.windows}
    return Cut(found.member, found.number, group_of, found.groups)


def harmonized(found: Cut, plan: SourcePlan) -> Harmonized:
    """Attach the source's rules: units, masks and kernels are applied where pixels are read."""
    return Harmonized(found, plan)


@dataclass
class Chips:
    """What a source's shard is made of while slots are read."""

    values: NDArray[Any]
    """Shape (chip, time, band, y, x)."""
    valid: NDArray[np.bool_]
    """Shape (chip, time, y, x). True where every band has a value."""
    datetime: NDArray[np.datetime64]
    """Shape (chip, time). Start of the picked acquisition; NaT where empty or composed of several."""
    source: NDArray[Any]
    """Shape (chip, time). Name of the picked member, "" where empty; several are joined by +."""
    clipped: NDArray[np.int64]
    """Shape (band,). Pixels outside the range of an integer dtype."""
    counts: Counts = field(default_factory=Counts)


@dataclass(frozen=True)
class _Wanted:
    """One request, and what its windows stand for."""

    request: Request
    member: Member
    bands: list[int]
    """Output bands it becomes; none for a quality band."""
    entries: list[int]
    """Per window, the feed entry."""

    @property
    def asset(self) -> Asset:
        return self.request.asset


@dataclass(frozen=True)
class _Window:
    """One band of one record over one chip, as it stands in the file."""

    wanted: _Wanted
    values: NDArray[Any]
    """Shape (y, x)."""
    valid: NDArray[np.bool_]
    """Shape (y, x)."""


@dataclass(frozen=True)
class _Slot:
    """The chips of one slot while acquisitions are read into it."""

    values: NDArray[Any]
    """Shape (chip, band, y, x). Holds ``fill`` where not valid."""
    valid: NDArray[np.bool_]
    """Shape (chip, band, y, x)."""
    fill: float
    dn: bool
    """Whether reflectance is stored as integers."""


def merged(job: Job, shard: Shard, source: int, members: Sequence[Harmonized]) -> xr.Dataset:
    """Read the shard's chips of one source, slot by slot, and pick across its members.

    Returns
    -------
    xarray.Dataset
        ``pixels`` (chip, time, band, y, x); ``valid`` (chip, time, y, x) for integer pixels; ``valid_fraction``,
        ``datetime`` and ``source`` (chip, time); counts of what was read in its attributes.
    """
    chips = _Reading(job, shard, source, members).read()
    return _dataset(job, shard, source, chips)


class _Reading:
    """Reads one source of one shard.

    Pixels stay as they are in the files until a chip is finished: floats of more than one chip exist only where
    a composite needs them.
    """

    def __init__(self, job: Job, shard: Shard, source: int, members: Sequence[Harmonized]) -> None:
        self.job, self.shard, self.source = job, shard, source
        self.plan = job.sources[source]
        self.members = {m.cut.number: m for m in members}
        self.size = job.size_px[source]
        self.member_of, self.pass_of = job.members[source], job.passes[source]
        self._seen: dict[tuple[int, int], _Window] = {}
        """(record, chip) -> the band that ``clearest`` has read of it already."""

    def read(self) -> Chips:
        """Read every slot."""
        plan, size, n = self.plan, self.size, self.shard.stop - self.shard.start
        chips = Chips(
            np.full((n, plan.times, len(plan.bands), size, size), plan.fill, dtype=plan.dtype),
            np.zeros((n, plan.times, size, size), dtype=bool),
            np.full((n, plan.times), np.datetime64("NaT", "us"), dtype="datetime64[us]"),
            np.full((n, plan.times), "", dtype=object),
            np.zeros(len(plan.bands), dtype=np.int64),
        )
        feed = Feed.of(self.job, self.shard, self.source)
        with Session() as session:
            for slot in np.unique(feed.slot).tolist():
                self._slot(session, feed.take(feed.slot == slot), int(slot), chips)
                session.forget()
                self._seen.clear()
            chips.counts = session.counts
        return chips

    def _slot(self, session: Session, feed: Feed, slot: int, chips: Chips) -> None:
        pick = self.plan.pick if self.plan.slots is not None else "first"
        composed = pick in ("mean", "median")
        if pick == "clearest":
            feed = self._clearest(session, feed)
        values, dn = chips.values[:, slot], self.plan.units == "reflectance" and self.plan.dtype != "float32"
        target = _Slot(values, np.zeros(values.shape, dtype=bool), self.plan.fill, dn)
        if composed:
            chips.clipped += self._composite(session, feed, target)
        else:
            chips.clipped += self._acquisition(session, feed, target)
        np.all(target.valid, axis=1, out=chips.valid[:, slot])
        best = feed.take(_first_of(feed.chip))
        chips.datetime[best.chip, slot] = self.job.starts[self.source][best.row]
        chips.source[best.chip, slot] = self._names(best.row)
        if composed:
            self._name_composites(feed, slot, chips)

    def _acquisition(self, session: Session, feed: Feed, target: _Slot) -> NDArray[np.int64]:
        """Read the nearest record of each chip's acquisition, then fill its invalid pixels from the others.

        Returns how many pixels of each band were clipped.
        """
        first = _first_of(feed.chip)
        rank = np.arange(len(feed.chip)) - first[np.searchsorted(feed.chip[first], feed.chip)]
        clipped = np.zeros(target.values.shape[1], dtype=np.int64)
        for level in range(int(rank.max(initial=-1)) + 1):
            here = feed.take(rank == level)
            if level:
                here = here.take(np.flatnonzero(~target.valid[here.chip].all(axis=(1, 2, 3))))
            for entry, windows in self._windows(session, here, keep=feed.take(rank > level)):
                values, valid = self._in_units(windows)
                clipped += _put(values, valid, int(here.chip[entry]), target)
        return clipped

    def _windows(
        self, session: Session, feed: Feed, keep: Feed | None = None, quality_only: bool = False
    ) -> Iterator[tuple[int, list[_Window]]]:
        """Yield each entry's number and what has been read of its record, all in one batch."""
        wanted = self._wanted(feed, quality_only)
        kept = [] if keep is None else self._wanted(keep, quality_only)
        blocks = session.read_block([w.request for w in wanted], [w.request for w in kept])
        found: list[list[_Window]] = [[] for _ in feed.chip]
        for one, block in zip(wanted, blocks, strict=True):
            for at, entry in enumerate(one.entries):
                found[entry].append(_Window(one, block.values[at], block.valid[at]))
        for entry, windows in enumerate(found):
            seen = self._seen.get((int(feed.row[entry]), int(feed.chip[entry])))
            yield entry, windows if seen is None else [*windows, seen]

    def _in_units(self, windows: Sequence[_Window]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return values in the source's units and validity, shape (band, y, x), of one record over one chip."""
        plan = self.plan
        shape = (len(plan.bands), self.size, self.size)
        values = np.zeros(shape, dtype=plan.dtype if plan.units == "raw" else np.float32)
        valid = np.zeros(shape, dtype=bool)
        cloudy = np.zeros(shape[1:], dtype=bool)
        for window in windows:
            asset = window.wanted.asset
            if asset.band == window.wanted.member.quality:
                cloudy |= ~_clear(window, plan.mask) & window.valid
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

    def _scaled(self, asset: Asset, window: _Window) -> NDArray[Any]:
        if self.plan.units == "reflectance":
            rule = Radiometry(asset.scale, asset.offset, asset.rule)
            return harmonize.to_float(window.values, window.valid, rule)
        return window.values

    def _wanted(self, feed: Feed, quality_only: bool = False) -> list[_Wanted]:
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
                    wanted.append(_Wanted(request, lazy.member, at, new))
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
        read: dict[tuple[int, int], _Window] = {}
        for entry, windows in self._windows(session, feed, quality_only=True):
            chip, order, row = (int(column[entry]) for column in (feed.chip, feed.order, feed.row))
            for window in windows:
                seen[chip, order] |= _clear(window, self.plan.mask)
                read[row, chip] = window
        scores = np.full(shape, -1, dtype=np.int64)
        scores[feed.chip, feed.order] = seen.sum(axis=(2, 3))[feed.chip, feed.order]
        best = scores.argmax(axis=1)
        chosen = feed.take(feed.order == best[feed.chip])
        left = set(zip(chosen.row.tolist(), chosen.chip.tolist(), strict=True))
        self._seen = {key: _copied(window) for key, window in read.items() if key in left}
        return chosen

    def _composite(self, session: Session, feed: Feed, target: _Slot) -> NDArray[np.int64]:
        """Compose all candidates of the slot; a mean is summed up, a median holds them all.

        Candidates are taken by the start of their acquisition, so that a tile is read for all chips at once.
        """
        passes = self.pass_of[feed.row]
        found = np.unique(passes).tolist()
        shape, mean = target.values.shape, self.plan.pick == "mean"
        dtype = harmonize.composite_dtype(self.plan.dtype)
        stack = [
            _Slot(np.full(shape, np.nan, dtype), np.zeros(shape, dtype=bool), np.nan, False)
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
            clipped += _put(made, np.isfinite(made), chip, target)
        return clipped

    def _name_composites(self, feed: Feed, slot: int, chips: Chips) -> None:
        """Name the members of each chip's candidates; only a single candidate has a time."""
        change = np.diff(feed.chip, prepend=-1) | np.diff(feed.order, prepend=-1)
        leads = feed.take(np.flatnonzero(change))
        names = np.array(self._names(leads.row), dtype=object)
        for chip in np.unique(leads.chip).tolist():
            own = leads.chip == chip
            chips.source[chip, slot] = "+".join(sorted(set(names[own].tolist())))
            if own.sum() > 1:
                chips.datetime[chip, slot] = np.datetime64("NaT")

    def _names(self, rows: NDArray[np.int64]) -> list[str]:
        return [self.plan.members[int(self.member_of[r])].name for r in rows]


def _clear(window: _Window, mask: tuple[str, ...]) -> NDArray[np.bool_]:
    """Return where a record is valid and not masked, as far as one of its bands tells; shape (y, x)."""
    member = window.wanted.member
    if not mask or window.wanted.asset.band != member.quality or member.quality_kind is None:
        return window.valid
    return window.valid & ~harmonize.bad_pixels(window.values, member.quality_kind, mask)


def _copied(window: _Window) -> _Window:
    """Return a window that does not hold its whole block in memory."""
    return _Window(window.wanted, window.values.copy(), window.valid.copy())


def _put(values: NDArray[Any], valid: NDArray[np.bool_], chip: int, target: _Slot) -> NDArray[np.int64]:
    """Store what is valid in a chip's pixels that are not; return how many of each band were clipped."""
    take = valid & ~target.valid[chip]
    clipped = np.zeros(len(values), dtype=np.int64)
    if target.dn:
        values = np.where(take, values, np.nan)
        values, clipped = harmonize.to_dtype(values, target.values.dtype.name, target.fill)
    elif target.values.dtype.kind in "iu" and values.dtype.kind == "f":
        values = np.rint(np.where(take, values, 0))
    np.copyto(target.values[chip], values, where=take, casting="unsafe")
    np.logical_or(target.valid[chip], take, out=target.valid[chip])
    return clipped


def _first_of(chip: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the first entry of each chip; entries are sorted by chip."""
    return np.unique(chip, return_index=True)[1]


def _dataset(job: Job, shard: Shard, source: int, chips: Chips) -> xr.Dataset:
    plan = job.sources[source]
    dims = ("chip", "time", "band", "y", "x")
    variables: dict[str, Any] = {"pixels": (dims, chips.values)}
    if not plan.dtype.startswith("float"):
        variables["valid"] = (("chip", "time", "y", "x"), chips.valid)
    coordinates: dict[str, Any] = {
        **chip_coordinates(job, shard),
        "band": ("band", list(plan.bands)),
        "valid_fraction": (
            ("chip", "time"),
            chips.valid.mean(axis=(2, 3), dtype=np.float64).astype(np.float32),
        ),
        "datetime": (("chip", "time"), chips.datetime),
        "source": (("chip", "time"), chips.source.astype(object)),
    }
    if plan.slots is not None:
        coordinates["time"] = ("time", np.array(plan.slots, dtype="datetime64[ns]"))
    counts = {k: int(getattr(chips.counts, k)) for k in chips.counts.__slots__}
    attrs = {"counts": counts, "clipped": dict(zip(plan.bands, chips.clipped.tolist(), strict=True))}
    return xr.Dataset(variables, coordinates, attrs)


def chip_coordinates(job: Job, shard: Shard) -> dict[str, Any]:
    """Return the coordinates along ``chip`` that the plan knows, the user's own columns among them."""
    table = job.chips.slice(shard.start, shard.stop - shard.start)
    return {
        "chip_id": ("chip", np.array(table.column("chip_id").to_pylist(), dtype=object)),
        "split": ("chip", np.array([s or "" for s in table.column("split").to_pylist()], dtype=object)),
        "epsg": ("chip", job.epsg[shard.start : shard.stop].astype(np.int32)),
        "bounds": (("chip", "corner"), job.bounds[shard.start : shard.stop]),
        **{name: ("chip", values) for name, values in label_columns(table).items()},
    }


def requests_of(
    job: Job, shard: Shard, source: int, members: Sequence[Harmonized]
) -> tuple[list[Request], int]:
    """Return every read that one source of a shard may ask for, and how many pixels its windows hold."""
    reading = _Reading(job, shard, source, members)
    feed = Feed.of(job, shard, source)
    requests = [wanted.request for wanted in reading._wanted(feed)]
    return requests, sum(len(r.windows) * r.windows[0].height * r.windows[0].width for r in requests)
