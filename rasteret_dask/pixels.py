"""The pixels of one source in one shard: cubes, cut into chips, harmonized, and picked slot by slot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask import harmonize
from rasteret_dask.bands import Radiometry
from rasteret_dask.cube import GroupCube, compact_groups, group_cube
from rasteret_dask.errors import RasteretDaskError, ReadError
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
    """Reads one source of one shard."""

    def __init__(self, job: Job, shard: Shard, source: int, members: Sequence[Harmonized]) -> None:
        self.job, self.shard, self.source = job, shard, source
        self.plan = job.sources[source]
        self.members = {m.cut.number: m for m in members}
        self.records = job.records[source]
        self.size = job.size_px[source]
        self.member_of = job.members[source]

    def read(self) -> Chips:
        """Read every slot."""
        plan, size, n = self.plan, self.size, self.shard.stop - self.shard.start
        shape = (n, plan.times, len(plan.bands), size, size)
        chips = Chips(
            np.full(shape, plan.fill, dtype=plan.dtype),
            np.zeros((n, plan.times, size, size), dtype=bool),
            np.full((n, plan.times), np.datetime64("NaT", "us"), dtype="datetime64[us]"),
            np.full((n, plan.times), "", dtype=object),
            np.zeros(len(plan.bands), dtype=np.int64),
        )
        feed = Feed.of(self.job, self.shard, self.source)
        with Session() as session:
            for slot in np.unique(feed.slot).tolist():
                self._slot(session, feed.take(feed.slot == slot), int(slot), chips)
            chips.counts = session.counts
        return chips

    def _slot(self, session: Session, feed: Feed, slot: int, chips: Chips) -> None:
        if self.plan.pick == "clearest":
            feed = self._clearest(session, feed)
        if self.plan.pick in ("mean", "median"):
            self._composite(session, feed, slot, chips)
            return
        self._mosaic(session, feed, slot, chips)
        best = feed.take(_first_of(feed.chip))
        chips.datetime[best.chip, slot] = self._starts(best.row)
        chips.source[best.chip, slot] = self._names(best.row)

    def _mosaic(self, session: Session, feed: Feed, slot: int, chips: Chips) -> None:
        """Read the nearest record of each chip's acquisition, then fill its invalid pixels from the others."""
        values, valid, order = self._acquisition(session, feed)
        stored, clipped = self._stored(values, valid)
        chips.values[order, slot] = stored
        chips.valid[order, slot] = valid.all(axis=1)
        chips.clipped += clipped

    def _acquisition(
        self, session: Session, feed: Feed
    ) -> tuple[NDArray[Any], NDArray[np.bool_], NDArray[np.int64]]:
        """Return values and validity (chip, band, y, x) of one acquisition per chip, and which chips they are."""
        first = _first_of(feed.chip)
        rest = np.setdiff1d(np.arange(len(feed.chip)), first)
        order = feed.chip[first]
        values, valid = self._windows(session, feed.take(first), keep=feed.take(rest))
        place = np.searchsorted(order, feed.chip)
        rank = np.arange(len(feed.chip)) - first[place]
        for level in range(1, int(rank.max(initial=0)) + 1):
            again = rest[rank[rest] == level]
            again = again[~valid[place[again]].all(axis=(1, 2, 3))]
            if not len(again):
                continue
            later = rest[rank[rest] > level]
            more, more_valid = self._windows(session, feed.take(again), keep=feed.take(later))
            for i, at in enumerate(place[again]):
                harmonize.fill_in(values[at], valid[at], more[i], more_valid[i])
        return values, valid, order

    def _windows(
        self, session: Session, feed: Feed, keep: Feed | None = None, quality_only: bool = False
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Read one record per chip, entry by entry: values in the source's units and validity (entry, band, y, x)."""
        requests, places = self._requests(feed, quality_only)
        kept = self._requests(keep, quality_only)[0] if keep is not None and len(keep.chip) else []
        blocks = session.read_block([r for r, *_ in requests], [r for r, *_ in kept])
        bands = 1 if quality_only else len(self.plan.bands)
        shape = (len(feed.chip), bands, self.size, self.size)
        raw = self.plan.units == "raw"
        values = np.zeros(shape, dtype=self.plan.dtype if raw else np.float32)
        valid = np.zeros(shape, dtype=bool)
        cloudy = np.zeros((len(feed.chip), self.size, self.size), dtype=bool)
        for (_, asset, member, bands_at), at, block in zip(requests, places, blocks, strict=True):
            if asset.band == member.quality and (self.plan.mask or quality_only):
                assert member.quality_kind is not None
                cloudy[at] = harmonize.bad_pixels(block.values, member.quality_kind, self.plan.mask)
                if quality_only:
                    valid[at, 0] = block.valid
            for band in bands_at:
                values[at, band] = self._in_units(asset, block.values, block.valid)
                valid[at, band] = block.valid
        if self.plan.units == "embedding":
            values = harmonize.unit_length(values, axis=1)
            valid = np.broadcast_to(np.isfinite(values[:, :1]), shape).copy()
        if self.plan.mask:
            valid &= ~cloudy[:, None]
        if not raw:
            values[~valid] = np.nan
        return values, valid

    def _in_units(self, asset: Asset, raw: NDArray[Any], valid: NDArray[np.bool_]) -> NDArray[Any]:
        if self.plan.units == "raw":
            return raw
        if self.plan.units == "embedding":
            return harmonize.dequantize(raw, valid)
        return harmonize.to_float(raw, valid, Radiometry(asset.scale, asset.offset, asset.rule))

    def _requests(
        self, feed: Feed, quality_only: bool = False
    ) -> tuple[list[tuple[Request, Asset, Member, list[int]]], list[NDArray[np.int64]]]:
        """Return one request per (record, cube, band), and the entries its windows stand for."""
        keys = [(int(r), self._group(int(r), int(c))) for r, c in zip(feed.row, feed.chip, strict=True)]
        by_key: dict[tuple[int, int], list[int]] = {}
        for entry, key in enumerate(keys):
            by_key.setdefault(key, []).append(entry)
        requests, places = [], []
        for (row, _), entries in by_key.items():
            lazy = self.members[int(self.member_of[row])].cut
            cube = lazy.window(int(feed.chip[entries[0]]))[0]
            windows = tuple(lazy.window(int(feed.chip[e]))[1] for e in entries)
            for band, at in self._bands(lazy.member, quality_only):
                asset = cube.assets.get((row, band))
                if asset is None:  # the footprint touches the chip, the raster does not
                    continue
                kernel = None if band == lazy.member.quality else self.plan.resampling
                requests.append((Request(asset, cube.grid, windows, kernel), asset, lazy.member, at))
                places.append(np.array(entries))
        return requests, places

    def _bands(self, member: Member, quality_only: bool) -> list[tuple[str, list[int]]]:
        """Return each band to read, once, with the output bands it becomes."""
        if quality_only and member.quality is not None:
            return [(member.quality, [])]
        wanted = member.bands[:1] if quality_only else member.bands
        at: dict[str, list[int]] = {}
        for i, band in enumerate(wanted):
            at.setdefault(band, []).append(i)
        if self.plan.mask and member.quality is not None and not quality_only:
            at.setdefault(member.quality, [])
        return list(at.items())

    def _group(self, row: int, chip: int) -> int:
        return self.members[int(self.member_of[row])].cut.group_of[chip]

    def _stored(
        self, values: NDArray[Any], valid: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], NDArray[np.int64]]:
        if self.plan.units == "raw":
            values[~valid] = np.asarray(self.plan.fill).astype(self.plan.dtype)
            return values, np.zeros(len(self.plan.bands), dtype=np.int64)
        return harmonize.to_dtype(values, self.plan.dtype, self.plan.fill)

    def _clearest(self, session: Session, feed: Feed) -> Feed:
        """Keep of each chip the candidate with the most valid pixels, the earlier in order where equal."""
        scores = np.zeros((self.shard.stop - self.shard.start, int(feed.order.max()) + 1), dtype=np.int64)
        scores -= 1
        for order in np.unique(feed.order).tolist():
            own = feed.take(feed.order == order)
            first = _first_of(own.chip)
            valid = np.zeros((len(first), self.size, self.size), dtype=bool)
            place = np.searchsorted(own.chip[first], own.chip)
            _, seen = self._windows(session, own, quality_only=True)
            np.logical_or.at(valid, place, seen[:, 0])
            scores[own.chip[first], order] = valid.sum(axis=(1, 2))
        best = scores.argmax(axis=1)
        return feed.take(feed.order == best[feed.chip])

    def _composite(self, session: Session, feed: Feed, slot: int, chips: Chips) -> None:
        """Compose all candidates of the slot; a mean is summed up, a median holds them all."""
        n, bands = chips.values.shape[0], chips.values.shape[2]
        orders = np.unique(feed.order).tolist()
        held = len(orders) if self.plan.pick == "median" else 1
        stack = np.full((held, n, bands, self.size, self.size), np.nan, dtype=np.float32)
        total = np.zeros((n, bands, self.size, self.size)) if self.plan.pick == "mean" else None
        count = np.zeros((n, bands, self.size, self.size), dtype=np.int32)
        for i, order in enumerate(orders):
            own = feed.take(feed.order == order)
            values, valid, at = self._acquisition(session, own)
            if total is not None:
                total[at] += np.where(valid, values, 0)
                count[at] += valid
            else:
                stack[i, at] = np.where(valid, values, np.nan)
        if total is not None:
            with np.errstate(invalid="ignore", divide="ignore"):
                result = np.where(count > 0, total / count, np.nan).astype(np.float32)
        else:
            result = harmonize.composite(stack, self.plan.pick)
        if self.plan.units == "embedding":
            result = harmonize.unit_length(result, axis=1)
        valid = np.isfinite(result)
        if self.plan.units == "raw":
            result = np.where(valid, np.rint(result), self.plan.fill).astype(self.plan.dtype)
            stored, clipped = result, np.zeros(bands, dtype=np.int64)
        else:
            stored, clipped = harmonize.to_dtype(result, self.plan.dtype, self.plan.fill)
        chips.values[:, slot] = stored
        chips.valid[:, slot] = valid.all(axis=1)
        chips.clipped += clipped
        for chip in np.unique(feed.chip):
            names = self._names(feed.row[feed.chip == chip])
            chips.source[chip, slot] = "+".join(sorted(set(names)))

    def _starts(self, rows: NDArray[np.int64]) -> NDArray[np.datetime64]:
        text = [self.records.starts[int(r)].replace("+00:00", "") for r in rows]
        return np.array(text, dtype="datetime64[us]")

    def _names(self, rows: NDArray[np.int64]) -> list[str]:
        return [self.plan.members[int(self.member_of[r])].name for r in rows]


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
    """Return the coordinates along ``chip`` that the plan knows."""
    table = job.chips.slice(shard.start, shard.stop - shard.start)
    return {
        "chip_id": ("chip", np.array(table.column("chip_id").to_pylist(), dtype=object)),
        "split": ("chip", np.array([s or "" for s in table.column("split").to_pylist()], dtype=object)),
        "epsg": ("chip", job.epsg[shard.start : shard.stop].astype(np.int32)),
        "bounds": (("chip", "corner"), job.bounds[shard.start : shard.stop]),
    }


def chip_error(error: RasteretDaskError, shard: Shard) -> ReadError:
    """Say which shard an error happened in."""
    return ReadError(f"shard {shard.name}: {error.subject}", error.found, error.expected, error.remedy)


def requests_of(
    job: Job, shard: Shard, source: int, members: Sequence[Harmonized]
) -> tuple[list[Request], int]:
    """Return every read that one source of a shard may ask for, and how many pixels its windows hold."""
    reading = _Reading(job, shard, source, members)
    feed = Feed.of(job, shard, source)
    requests = [request for request, *_ in reading._requests(feed)[0]]
    return requests, sum(len(r.windows) * r.windows[0].height * r.windows[0].width for r in requests)
