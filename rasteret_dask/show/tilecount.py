# SPDX-License-Identifier: Apache-2.0
"""How many tiles shards need, and how many bytes these hold: counted from cached headers, a layout at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.cubes.cube import group_box, touches, windows_of
from rasteret_dask.grid import northern
from rasteret_dask.reader.levels import has_mask
from rasteret_dask.reader.pixelgrid import Grid
from rasteret_dask.reader.readplan import choose
from rasteret_dask.rules.units import Unit
from rasteret_dask.table.filelayouts import FileLayouts
from rasteret_dask.table.records import Asset, Level
from rasteret_dask.tasks.cuts import Feed, Group, groups
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.keptbytes import spread
from rasteret_dask.tasks.picking import Picking

__all__ = ["TileCount", "tile_count"]

ALIGNED_PX = 1e-4
"""Pixel edges nearer than this are the same edge."""

Ints: TypeAlias = "NDArray[np.int64]"


@dataclass(frozen=True, slots=True)
class TileCount:
    """What all shards of a job read, by some of them."""

    requests: int
    """Distinct tiles."""
    by_shard: int
    """Tiles, were none of use to two shards."""
    nbytes: int | None
    """Compressed bytes of the distinct tiles; None where headers do not tell."""
    shards: int
    """Shards that were looked at."""
    fit: float | None
    """Share of the pixels in those tiles that chips need; None where there are none."""


def tile_count(job: Job, most: int) -> TileCount:
    """Count the tiles that shards need and their compressed bytes, from the cached tile tables.

    A tile that n of the job's shards need counts as 1 / n in each of them, so that a sample of shards tells how many
    distinct tiles there are.

    Parameters
    ----------
    job
        The frozen plan.
    most
        Shards that are looked at; of more than that as many, evenly taken.
    """
    shards = job.shard_count
    step = max(shards / most, 1.0)
    chosen = [job.nth_shard(int(i * step)) for i in range(min(shards, most))]
    whole = len(chosen) == shards
    needs = list(_Looking(job, chosen).needs())
    weights = [np.ones(len(need.tiles)) for need in needs] if whole or not needs else _weights(job, needs)
    once, nbytes, pixels_read, pixels_used, unknown = 0.0, 0.0, 0, 0, False
    seen: dict[Any, set[int]] = {}
    for need, weight in zip(needs, weights, strict=True):
        if whole:
            met = seen.setdefault(need.file, set())
            weight = weight * [tile not in met for tile in need.tiles.tolist()]
            met.update(need.tiles.tolist())
        once += weight.sum()
        unknown |= not len(need.nbytes)
        nbytes += float(weight @ need.nbytes[need.tiles]) if len(need.nbytes) else 0.0
        held = len(need.tiles) * need.level.tile_width * need.level.tile_height
        pixels_read += held
        pixels_used += min(need.pixels, held)  # tiles that are not in the file hold none
    scale = shards / max(len(chosen), 1)
    return TileCount(
        round(once * scale),
        round(sum(len(need.tiles) for need in needs) * scale),
        None if unknown else round(nbytes * scale),
        len(chosen),
        round(pixels_used / pixels_read, 4) if pixels_read else None,
    )


@dataclass(frozen=True, slots=True)
class _Need:
    """What one shard needs of one level of one file."""

    file: tuple[Any, ...]
    """What tells files, planes and levels apart."""
    source: int
    row: int
    """The record that the file belongs to."""
    epsg: int
    level: Level
    tiles: Ints
    """Rising."""
    nbytes: Ints
    """Compressed bytes of each of the level's tiles; empty where unknown."""
    pixels: int
    """Pixels of the level that chips need."""


@dataclass(frozen=True, slots=True, eq=False)
class _Spot:
    """Where some windows lie in files of one layout; there is one of each, told apart by identity."""

    level: int
    tiles: Ints
    """Numbers of the tiles that they touch, rising."""
    rects: Ints
    """Shape (rectangle, 4): row0, row1, col0, col1, none of them empty."""
    pixels: int
    """Pixels in any of the rectangles."""


class _Looking:
    """Looks up what shards need, each distinct question once."""

    def __init__(self, job: Job, shards: Sequence[Shard]) -> None:
        self._job, self._shards = job, shards
        self._files: dict[tuple[int, str], _Files] = {}
        self._rows: dict[int, Ints] = {}
        self._spots: dict[Any, _Spot | None] = {}
        self._joined: dict[frozenset[_Spot], _Spot] = {}

    def needs(self) -> Iterator[_Need]:
        """Yield what shards need of files, shard by shard."""
        for shard in self._shards:
            for source in range(len(self._job.sources)):
                yield from self._of_source(shard, source)

    def _of_source(self, shard: Shard, source: int) -> Iterator[_Need]:
        """Yield what one source of a shard needs; bands of one file, and its places in several cubes, together."""
        plan = self._job.sources[source]
        parts: dict[tuple[Any, ...], tuple[int, _Files, list[_Spot]]] = {}
        for at, member in enumerate(plan.members):
            reads = [
                (self._files_of(source, band), unit if unit and unit.kernel_on == "decoded" else None,
                 plan.resampling if unit else None)
                for band, unit in Picking(self._job, shard, source, ()).bands_of(member)
            ]  # fmt: skip
            for group in groups(self._job, shard, source, at):
                for row, windows in _windows(group):
                    for files, decode, kernel in reads:
                        key = (source, files.layout(row), windows, decode, kernel)
                        if key not in self._spots:
                            self._spots[key] = _spot(files.asset(row), windows, decode, kernel)
                        spot = self._spots[key]
                        if spot is not None:
                            file = (*files.name(row), spot.level)
                            parts.setdefault(file, (row, files, []))[2].append(spot)
        for file, (row, files, spots) in parts.items():
            yield _need(file, source, row, files, self._join(frozenset(spots)))

    def _join(self, spots: frozenset[_Spot]) -> _Spot:
        """Return several places in files of one layout as one: records of other dates have the same ones."""
        if len(spots) == 1:
            return next(iter(spots))
        if spots not in self._joined:
            rects = np.concatenate([spot.rects for spot in spots])
            tiles = _distinct(np.concatenate([spot.tiles for spot in spots]))
            self._joined[spots] = _Spot(next(iter(spots)).level, tiles, rects, _area(rects))
        return self._joined[spots]

    def _files_of(self, source: int, band: str) -> _Files:
        if (source, band) not in self._files:
            self._files[source, band] = _Files(self._job.layouts[source], self._rows_of(source), band)
        return self._files[source, band]

    def _rows_of(self, source: int) -> Ints:
        """Return the rows of a source's records that feed these shards, rising."""
        if source not in self._rows:
            rows = [Feed.of(self._job, shard, source).row for shard in self._shards]
            self._rows[source] = np.flatnonzero(np.bincount(np.concatenate(rows)))
        return self._rows[source]


def _need(file: tuple[Any, ...], source: int, row: int, files: _Files, spot: _Spot) -> _Need:
    asset, tiles = files.asset(row), spot.tiles
    offsets, counts = files.tiles_of(row, spot.level)
    if not counts.all() and not has_mask(asset):
        listed = min(len(offsets), len(counts))
        absent = np.flatnonzero((counts[:listed] == 0) & (offsets[:listed] == 0))
        if len(absent):
            tiles = np.setdiff1d(tiles, absent)
    return _Need(file, source, row, asset.epsg, asset.levels[spot.level], tiles, counts, spot.pixels)


def _distinct(values: Ints) -> Ints:
    """Return distinct values, rising: by sorting, which is faster than NumPy's hashing of so many."""
    ordered = np.sort(values)
    return np.asarray(ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]])


class _Windows(NamedTuple):
    """The windows of some chips in their cube, in a form that can be compared."""

    grid: Grid
    box: tuple[float, float, float, float]
    """Of the whole cube, in its CRS."""
    numbers: bytes
    """Row, column, height and width of each."""

    @property
    def array(self) -> Ints:
        """Shape (window, 4)."""
        return np.frombuffer(self.numbers, dtype=np.int64).reshape(-1, 4)


def _windows(group: Group) -> Iterator[tuple[int, _Windows]]:
    """Yield each record of a group with the windows that it feeds."""
    box = group_box(group.bounds)
    grid = Grid(group.epsg, box[0], box[3], *group.pixel)
    windows = windows_of(group.bounds, grid, group.pixel)
    pair = _distinct(
        group.feed.row.astype(np.int64) * len(group.chips) + np.searchsorted(group.chips, group.feed.chip)
    )
    row, place = np.divmod(pair, len(group.chips))
    starts = np.flatnonzero(np.diff(row, prepend=-1)).tolist()
    for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
        yield int(row[start]), _Windows(grid, box, windows[place[start:stop]].tobytes())


def _spot(asset: Asset, windows: _Windows, decode: Unit | None, kernel: str | None) -> _Spot | None:
    """Return where windows lie in files of an asset's layout; None: nowhere."""
    if not touches(asset, windows.grid.epsg, windows.box):
        return None
    choice = choose(asset, windows.grid, kernel, decode)
    rects = choice.rects(windows.grid, windows.array)
    rects = rects[(rects[:, 0] < rects[:, 1]) & (rects[:, 2] < rects[:, 3])]
    tiles = _tiles(rects, asset.levels[choice.level], choice.frame.flipped)
    return _Spot(choice.level, tiles, rects, _area(rects))


def _tiles(rects: Ints, level: Level, is_flipped: bool) -> Ints:
    """Return the numbers of the tiles that rectangles touch, in file order."""
    row0, row1, col0, col1 = rects.T
    if is_flipped:
        row0, row1 = level.height - row1, level.height - row0
    top, left = row0 // level.tile_height, col0 // level.tile_width
    high, wide = -(-row1 // level.tile_height) - top, -(-col1 // level.tile_width) - left
    rect, nth = spread(high * wide)
    row, col = np.divmod(nth, wide[rect])
    return _distinct((top[rect] + row) * _across(level) + left[rect] + col)


def _area(rects: Ints) -> int:
    """Return how many pixels lie in any of some rectangles: as rectangles between all their edges."""
    if not len(rects):
        return 0
    rows, cols = _distinct(rects[:, :2].ravel()), _distinct(rects[:, 2:].ravel())
    corners = np.zeros((len(rows), len(cols)), dtype=np.int64)
    at = np.searchsorted(rows, rects[:, :2]), np.searchsorted(cols, rects[:, 2:])
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        np.add.at(corners, (at[0][:, down], at[1][:, right]), 1 if down == right else -1)
    covered = corners.cumsum(0).cumsum(1)[:-1, :-1] > 0
    return int(np.diff(rows) @ covered @ np.diff(cols))


class _Files:
    """One band's files of some records.

    Parameters
    ----------
    layouts
        How the files of a source's records are laid out.
    rows
        Rising. Those that are looked at.
    band
        The records' own code.
    """

    def __init__(self, layouts: FileLayouts, rows: Ints, band: str) -> None:
        records = layouts.records
        self._layouts, self._numbers = layouts, layouts.of(band)
        layouts.look_up(self._numbers[rows])
        hrefs, planes = (
            records.asset_field(band, name).take(pa.array(rows)).to_pylist()
            for name in ("href", "band_index")
        )
        self._names = dict(zip(rows.tolist(), zip(hrefs, planes, strict=True), strict=True))
        self._first = records.level_places(band)[0]
        self._tables = [
            pc.struct_field(records.levels, name) for name in ("tile_offsets", "tile_byte_counts")
        ]

    def layout(self, row: int) -> int:
        """Return the number of what decides where pixels lie in a record's file."""
        return int(self._numbers[row])

    def name(self, row: int) -> tuple[Any, ...]:
        """Return what tells files and planes apart: bands of a chunky file share its tiles."""
        href, plane = self._names[row]
        return href, plane or 0 if self.asset(row).image.planar == 2 else 0

    def asset(self, row: int) -> Asset:
        """Return an asset whose file has the layout of this record's."""
        return self._layouts.asset(self.layout(row))

    def tiles_of(self, row: int, level: int) -> list[Ints]:
        """Return offset and compressed bytes of each tile of a level of a record's file; empty where unknown."""
        lists = [table[int(self._first[row]) + level].values for table in self._tables]
        return [np.zeros(0, dtype=np.int64) if values is None else values.to_numpy() for values in lists]


def _weights(job: Job, needs: Sequence[_Need]) -> list[NDArray[np.float64]]:
    """Return for each tile that shards need 1 / how many of the job's shards do: all that its record feeds."""
    numbers: dict[tuple[Any, ...], int] = {}
    place = [
        numbers.setdefault((need.source, need.row, need.epsg, *_lattice(need.level)), len(numbers))
        for need in needs
    ]
    most = max(_across(need.level) * -(-need.level.height // need.level.tile_height) for need in needs)
    entry, chip = _feeding(job, list(numbers))
    # Records of one place's dates lie alike: what is under a chip is worked out once for all of them.
    layouts, layout = np.unique(
        np.array([(*northern(key[2]), *key[3:], job.reach_m(key[0])) for key in numbers]),
        axis=0,
        return_inverse=True,
    )
    layout = np.ravel(layout)  # NumPy 2.0 gives it a second dimension
    pair, pairs = pd.factorize(layout[entry] * job.chips.num_rows + chip)
    kind, place_of = np.divmod(pairs, job.chips.num_rows)
    code, shift, a, c, e, f, width, height, tile_width, tile_height, reach = layouts[kind].T
    west, south, east, north = _bounds_in(job, place_of, code.astype(np.int64), reach).T
    spans = []
    for ends, tile, size in (
        (((north - shift - f) / e, (south - shift - f) / e), tile_height, height),
        (((west - c) / a, (east - c) / a), tile_width, width),
    ):
        low = np.floor(np.minimum(*ends) / tile + ALIGNED_PX)
        high = np.ceil(np.maximum(*ends) / tile - ALIGNED_PX)
        spans += [np.clip(edge, 0, np.ceil(size / tile)).astype(np.int64) for edge in (low, high)]
    top, bottom, left, right = spans
    wide, high = np.maximum(right - left, 0), np.maximum(bottom - top, 0)
    across = np.ceil(width / tile_width).astype(np.int64)
    of, nth = spread((wide * high)[pair])
    row, col = np.divmod(nth, np.maximum(wide, 1)[pair[of]])
    tile_number = (top[pair] * across[pair] + left[pair])[of] + row * across[pair[of]] + col
    shards = int(job.running.max()) + 1
    key = (entry * most)[of] + tile_number
    key = key * shards + job.running[chip][of]
    tiles, count = np.unique(_distinct(key) // shards, return_counts=True)
    asked = np.concatenate([at * most + need.tiles for at, need in zip(place, needs, strict=True)])
    at = np.minimum(np.searchsorted(tiles, asked), max(len(tiles) - 1, 0))
    needed = np.where(tiles[at] == asked, count[at], 1) if len(tiles) else np.ones(len(asked))
    return np.split(1.0 / needed, np.cumsum([len(need.tiles) for need in needs])[:-1])


def _lattice(level: Level) -> tuple[float, ...]:
    """Return where the pixels of a level lie, and its tiles among them."""
    a, _, c, _, e, f = level.transform
    return a, c, e, f, level.width, level.height, level.tile_width, level.tile_height


def _across(level: Level) -> int:
    return -(-level.width // level.tile_width)


def _feeding(job: Job, files: Sequence[tuple[Any, ...]]) -> tuple[Ints, Ints]:
    """Return the chips of the job's shards that the record of each file feeds: number of the file, and chip.

    Files begin with their source and row.
    """
    feeds = job.feeds
    base = np.cumsum([0, *(len(records) for records in job.records)])
    records = np.array([base[source] + row for source, row, *_ in files])
    asked = np.zeros(base[-1], dtype=bool)
    asked[records] = True
    every = feeds.row if len(job.records) == 1 else base[feeds.source] + feeds.row
    at = np.flatnonzero(asked[every])
    chip = np.searchsorted(feeds.offsets, at, side="right") - 1
    pair = _distinct(every[at].astype(np.int64) * job.chips.num_rows + chip)
    record, chip = np.divmod(pair, job.chips.num_rows)
    chosen = job.running[chip] >= 0
    record, chip = record[chosen], chip[chosen]
    first, last = np.searchsorted(record, records), np.searchsorted(record, records, side="right")
    file, nth = spread(last - first)
    return file, chip[first[file] + nth]


def _bounds_in(job: Job, chip: Ints, code: Ints, reach: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return bounds of chips, each in a CRS of its own, and so much wider on each side."""
    result = np.empty((len(chip), 4))
    for epsg, reach_m in {*zip(code.tolist(), reach.tolist(), strict=True)}:
        own = np.flatnonzero((code == epsg) & (reach == reach_m))
        result[own] = job.bounds_in(chip[own], epsg, reach_m)
    return result
