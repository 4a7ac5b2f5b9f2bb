# SPDX-License-Identifier: Apache-2.0
"""Folders of GeoTIFFs that are chips, whoever made them, become records, masks, splits and label columns."""

from __future__ import annotations

import datetime as dt
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rasteret_dask.catalogs.signing import keep_apart
from rasteret_dask.crs import same, text
from rasteret_dask.errors import PlanError, SchemaError, SourceError
from rasteret_dask.headers.reader import Header, read_headers
from rasteret_dask.ingest.chipnames import ChipPattern, NameIndex, folder_splits, listed_splits
from rasteret_dask.ingest.filelist import FileRow, files_of, table_at
from rasteret_dask.ingest.filenames import Naming
from rasteret_dask.ingest.files import FileScenes, files_to_records
from rasteret_dask.ingest.stac import LeftOut
from rasteret_dask.lists import listed
from rasteret_dask.net.remote import is_local, redact
from rasteret_dask.net.trust import checked, resolve
from rasteret_dask.table.anytable import as_arrow
from rasteret_dask.table.records import Records

__all__ = ["FolderChips", "ChipFolder", "chip_files"]

_NAMES = ("chip", "chip_id", "name", "id", "file", "filename", "image", "path")
"""Columns of a table that may name the chip, the first of them that is there."""

_TIMES = ("datetime", "date", "time", "acquired")
"""Columns of a table that may tell when a chip was taken."""

_SAME_PX = 1e-3


@dataclass(frozen=True)
class FolderChips:
    """Chips that are files."""

    size: int
    """Pixels of a side."""
    sources: Mapping[str, pa.Table]
    """Records, whose column ``chip`` names the chip that they are a file of."""
    facts: pa.Table
    """``chip``, ``split`` where there are splits, and label columns: a row a chip."""
    masks: pa.Table | None = None
    """``chip``, ``mask`` (the variable), ``href`` and ``dtype``."""
    classes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Variable -> the names of its numbers 1, 2, ..."""
    slots: frozenset[str] = frozenset()
    """Sources whose records say which slot they fill."""
    context_m: tuple[tuple[str, float], ...] = ()
    """Sources whose windows are larger than the chips."""
    optional: frozenset[str] = frozenset()
    """Sources that chips may lack."""
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """What was left out, by reason."""


@dataclass(frozen=True)
class ChipFolder:
    """How a folder's files are chips."""

    images: Mapping[str, ChipPattern]
    """Source -> its files."""
    masks: Mapping[str, ChipPattern]
    """Variable -> its files."""
    split: Any
    table: Any
    bands: Mapping[str, Any]
    """Source -> names of its bands; None: as the files tell."""
    classes: tuple[tuple[str, tuple[str, ...]], ...]
    dataset: str | None
    naming: Naming
    crs: int | None
    skips: bool
    """Whether chips that lack a file, or whose files cannot be read, are left out."""


def chip_files(folder: str, how: ChipFolder) -> FolderChips:
    """Find the files of chips, and read their headers.

    Parameters
    ----------
    folder
        A path or URL.
    how
        Which files are what.

    Raises
    ------
    SourceError
        When there are no files, or they do not belong together.
    """
    rows = files_of(folder, "chips").rows
    left: dict[str, list[str]] = {}
    masks = {name: _matched(pattern, rows, name, "masks") for name, pattern in how.masks.items()}
    taken = {row.path for own in masks.values() for row in own.values()}
    others = [row for row in rows if row.path not in taken]
    images = {name: _matched(pattern, others, name, "images") for name, pattern in how.images.items()}
    first = next(iter(images))
    kept = _complete(images, masks, first, how.skips, left)
    index = NameIndex({chip: [images[name][chip] for name in images] for chip in kept})
    facts, times = _facts(how, folder, {chip: images[first][chip] for chip in kept}, index, left)
    groups = _groups(how.images[first], images[first], kept)
    times = times or {chip: own["date"] for chip, own in groups.items() if "date" in own}
    records = {
        name: _records(name, {chip: own[chip] for chip in kept}, how, times, left)
        for name, own in images.items()
    }
    kept, size = _one_size(records, kept, how.skips, left)
    table = _mask_table(masks, records[first], kept, size, how.skips, left)
    if table is not None:
        have = Counter(table.column("chip").to_pylist())
        kept = [chip for chip in kept if have[chip] == len(masks)]
    there = pa.array(kept, pa.string())
    return FolderChips(
        size,
        {name: own.filter(pc.is_in(own.column("chip"), value_set=there)) for name, own in records.items()},
        facts.filter(pc.is_in(facts.column("chip"), value_set=there)),
        None if table is None else table.filter(pc.is_in(table.column("chip"), value_set=there)),
        how.classes,
        left_out=left,
    )


def _matched(pattern: ChipPattern, rows: Sequence[FileRow], name: str, argument: str) -> dict[str, FileRow]:
    """Return chip -> its file."""
    result: dict[str, FileRow] = {}
    for row in rows:
        own = pattern.match(row.path)
        if own is None:
            continue
        other = result.setdefault(own.chip, row)
        if other is not row:
            raise SourceError(
                f"read_chips({argument}={pattern.text!r}), chip {own.chip!r}",
                f"two files: {other.path} and {row.path}",
                "one file of each kind for a chip",
                "Let the pattern tell them apart: what its wildcards (or its group chip) stand for names the chip.",
            )  # fmt: skip
    if not result:
        raise SourceError(
            f"read_chips({argument}={pattern.text!r})", f"none of {len(rows)} files: {listed([r.path for r in rows])}",
            f"files of {name!r}", "Write the path below the folder; ** stands for folders at any depth.",
        )  # fmt: skip
    return result


def _groups(
    pattern: ChipPattern, files: Mapping[str, FileRow], kept: Sequence[str]
) -> dict[str, Mapping[str, str]]:
    """Return chip -> what groups of a pattern tell."""
    result = {}
    for chip in kept:
        found = pattern.match(files[chip].path)
        assert found is not None
        result[chip] = found.groups
    return result


def _complete(
    images: Mapping[str, Mapping[str, FileRow]],
    masks: Mapping[str, Mapping[str, FileRow]],
    first: str,
    skips: bool,
    left: dict[str, list[str]],
) -> list[str]:
    """Return the chips that have a file of each kind."""
    kept = list(images[first])
    for name, own in [*images.items(), *masks.items()]:
        missing = [chip for chip in kept if chip not in own]
        if len(missing) == len(kept):
            raise SourceError(
                f"read_chips, {name!r}", f"files of none of {len(kept)} chips: {listed([repr(c) for c in own])} "
                f"beside {listed([repr(c) for c in kept])}", "files that are named alike",
                "What wildcards stand for has to be the same text in all patterns: images='*_image.tif', "
                "masks='*_mask.tif'.",
            )  # fmt: skip
        if missing and not skips:
            raise SourceError(
                f"read_chips, {name!r}", f"no file for {len(missing)} of {len(kept)} chips: "
                f"{listed([images[first][chip].path for chip in missing])}", "a file for each chip",
                "on_error='skip' leaves such chips out, and names them.",
            )  # fmt: skip
        if missing:
            left[f"chip without a file of {name}"] = missing
        strangers = [row.path for chip, row in own.items() if chip not in images[first]]
        if strangers:
            left[f"file of {name} without a file of {first}"] = strangers
        kept = [chip for chip in kept if chip in own]
    return kept


def _facts(
    how: ChipFolder, folder: str, files: Mapping[str, FileRow], index: NameIndex, left: dict[str, list[str]]
) -> tuple[pa.Table, dict[str, Any]]:
    """Return splits and label columns of chips, and when they were taken, as a table tells."""
    names = list(files)
    facts, times = pa.table({"chip": pa.array(names, pa.string())}), dict[str, Any]()
    if how.table is not None:
        facts, times = _with_table(how, folder, facts, index, left)
    splits: Mapping[str, str] | None = None
    split = how.split
    if isinstance(split, Mapping):
        splits, strangers = listed_splits(split, index, folder, how.skips)
        if strangers:
            left["name in a list of a split that is no chip's"] = strangers
    elif split == "folders":
        splits = None if "split" in facts.column_names else folder_splits(files)
        groups = _groups(next(iter(how.images.values())), files, names)
        if (
            splits is None
            and "split" not in facts.column_names
            and all("split" in g for g in groups.values())
        ):
            splits = {chip: own["split"] for chip, own in groups.items()}
    elif isinstance(split, str):
        facts = _renamed(facts, split)
    elif split is not None:
        raise PlanError(
            "read_chips(split=)", repr(split), "'folders', a column of table=, lists by split, or None"
        )
    elif "split" in facts.column_names:
        facts = facts.drop_columns(["split"])
    if splits is not None:
        if "split" in facts.column_names:
            facts = facts.drop_columns(["split"])
        facts = facts.append_column("split", pa.array([splits.get(chip) for chip in names], pa.string()))
    return facts, times


def _renamed(facts: pa.Table, split: str) -> pa.Table:
    if split == "chip" or split not in facts.column_names:
        own = [name for name in facts.column_names if name != "chip"]
        raise PlanError(
            f"read_chips(split={split!r})", "no such column" if own else "no table=",
            f"one of {', '.join(own)}" if own else "a table with that column",
            "Say table=, whose column names the split of each chip; split='folders' takes the folders' names.",
        )  # fmt: skip
    column = facts.column(split).cast(pa.string())
    facts = facts.drop_columns([name for name in {split, "split"} if name in facts.column_names])
    return facts.append_column("split", column)


def _with_table(
    how: ChipFolder, folder: str, facts: pa.Table, index: NameIndex, left: dict[str, list[str]]
) -> tuple[pa.Table, dict[str, Any]]:
    """Join a user's table by the names of chips."""
    table = _table_of(how.table, folder)
    column = next((name for name in _NAMES if name in table.column_names), None)
    if column is None:
        raise SchemaError(
            "read_chips(table=)", f"columns {', '.join(table.column_names)}", "a column chip with the names of chips",
            "Rename the column that names files or chips: table.rename(columns={'yours': 'chip'}).",
        )  # fmt: skip
    rows: dict[str, int] = {}
    strangers = []
    for at, name in enumerate(table.column(column).to_pylist()):
        chip = index.chip(str(name), f"read_chips(table=), column {column}")
        if chip is None:
            strangers.append(str(name))
        elif rows.setdefault(chip, at) != at:
            raise SourceError(
                f"read_chips(table=), chip {chip!r}", f"rows {rows[chip]} and {at}", "one row for each chip"
            )
    if not rows or (strangers and not how.skips):
        raise SourceError(
            "read_chips(table=)", f"{len(strangers)} of {table.num_rows} names in column {column} are no chip's: "
            f"{listed([repr(name) for name in strangers])}", f"names of chips: {index.some()}",
            "Correct the names" + ("; or leave such rows out: on_error='skip'." if rows else "."),
        )  # fmt: skip
    if strangers:
        left["row of table= that is no chip's"] = strangers
    at = pa.array([rows.get(chip) for chip in facts.column("chip").to_pylist()], pa.int64())
    own = table.drop_columns([column]).take(at)
    times = dict[str, Any]()
    when = next((name for name in _TIMES if name in own.column_names), None)
    if when is not None:
        values = own.column(when).to_pylist()
        times = {
            chip: value
            for chip, value in zip(facts.column("chip").to_pylist(), values, strict=True)
            if value is not None
        }
        own = own.drop_columns([when])
    for name in own.column_names:
        if name != "chip":
            facts = facts.append_column(name, own.column(name))
    return facts, times


def _table_of(table: Any, folder: str) -> pa.Table:
    if isinstance(table, str | os.PathLike):
        place = os.fspath(table)
        if is_local(folder) and not os.path.isabs(os.path.expanduser(place)) and not os.path.exists(place):
            place = os.path.join(folder, place)
        return table_at(place)
    found = as_arrow(table, "table")
    return found if isinstance(found, pa.Table) else found.to_table()


def _records(
    name: str,
    files: Mapping[str, FileRow],
    how: ChipFolder,
    times: Mapping[str, Any],
    left: dict[str, list[str]],
) -> pa.Table:
    """Return the records of a source, one a chip."""
    columns: dict[str, Any] = {
        "href": [row.href for row in files.values()],
        "id": list(files),
        "chip": list(files),
        "datatake": list(files),  # so that no two chips are one acquisition
    }
    static = not times
    if times:
        columns["datetime"] = pa.array([_text(times.get(chip)) for chip in files], pa.string())
    scenes = FileScenes(how.naming, how.bands.get(name), how.dataset, static=static, crs=how.crs)
    broken = LeftOut(how.skips)
    try:
        records = files_to_records(pa.table(columns), scenes, name=name, column_map=None, broken=broken)
    except SourceError as error:
        raise _placeless(error) from error
    if broken.items:
        left[f"file of {name} that cannot be read"] = [str(one) for one in broken.items]
    return records


def _text(value: Any) -> str | None:
    return value.isoformat() if isinstance(value, dt.date) else None if value is None else str(value)


def _placeless(error: SourceError) -> SourceError:
    """Return the same error, with what helps where a file has no place on the ground."""
    if "no geotransform" in error.found:
        remedy = (
            "Chips have a place on the ground: give the file one (rio edit-info FILE --like REFERENCE --all), or leave "
            "such files out: on_error='skip'."
        )
    elif error.found == "no CRS in it":
        remedy = "Say where such files lie: crs='EPSG:32633'; or leave them out: on_error='skip'."
    elif error.found == "no time":
        remedy = (
            "Some chips have a time, this one has none: complete the column of table=, or leave it out, for chips "
            "without times."
        )
    else:
        return error
    return SourceError(error.subject, error.found, error.expected, remedy)


def _one_size(
    records: Mapping[str, pa.Table], kept: list[str], skips: bool, left: dict[str, list[str]]
) -> tuple[list[str], int]:
    """Return the chips whose files are squares of one size, and that size of the first source."""
    size = 0
    for name, table in records.items():
        rows = Records(table)
        chips = table.column("chip").to_pylist()
        band = rows.bands[0]
        sides = np.stack([rows.level_field(band, side).to_numpy() for side in ("height", "width")], -1)
        there = set(chips)
        kept = [chip for chip in kept if chip in there]
        oblong = np.flatnonzero(sides[:, 0] != sides[:, 1])
        if len(oblong) and (not skips or len(oblong) == len(sides)):
            height, width = sides[oblong[0]].tolist()
            raise SourceError(
                f"read_chips, {name!r}", f"{len(oblong)} of {len(sides)} files are no squares: {chips[oblong[0]]} has "
                f"{height} x {width} pixels", "as many rows as columns: chips are squares",
                f"Cut squares out of such files: rd.build_from_files(files, name={name!r})"
                f".chips({min(height, width)}).",
            )  # fmt: skip
        values, counts = np.unique(sides[:, 0], return_counts=True)
        usual = int(values[np.argmax(counts)])
        odd = np.flatnonzero((sides != usual).any(axis=1))
        if len(odd):
            named = [f"{chips[at]} ({sides[at, 0]} x {sides[at, 1]})" for at in odd.tolist()]
            if not skips:
                raise SourceError(
                    f"read_chips, {name!r}", f"{len(odd)} of {len(sides)} files have other sizes than "
                    f"{usual} x {usual} pixels: {listed(named)}", "files of one size",
                    f"on_error='skip' leaves them out; rd.build_from_files(files, name={name!r})"
                    f".chips({int(sides.min())}) cuts chips of one size out of rasters of any.",
                )  # fmt: skip
            left[f"file of {name} of another size than {usual} x {usual}"] = named
            gone = {chips[at] for at in odd.tolist()}
            kept = [chip for chip in kept if chip not in gone]
        size = size or usual
    if not kept:
        raise SourceError("read_chips", "no chip whose files all can be read", "at least one")
    return kept, size


def _mask_table(
    masks: Mapping[str, Mapping[str, FileRow]],
    records: pa.Table,
    kept: Sequence[str],
    size: int,
    skips: bool,
    left: dict[str, list[str]],
) -> pa.Table | None:
    """Return the masks of chips, their headers held against those of the images."""
    if not masks:
        return None
    rows = Records(records)
    band = rows.bands[0]
    place = dict(zip(records.column("chip").to_pylist(), range(len(rows)), strict=True))
    transforms = rows.level_field(band, "transform").to_pylist()
    columns: dict[str, list[str]] = {"chip": [], "mask": [], "href": [], "dtype": []}
    for name, own in masks.items():
        hrefs = {chip: _href(own[chip]) for chip in kept}
        headers = read_headers(list(hrefs.values()))
        found: dict[str, Header] = {}
        for chip in kept:
            at = place[chip]
            header = headers[hrefs[chip]]
            why = _unlike(header, transforms[at], int(rows.epsg[at]), size)
            if why is None:
                assert isinstance(header, Header)
                found[chip] = header
                continue
            if not skips:
                raise SourceError(
                    f"read_chips, mask {redact(own[chip].path)}", why,
                    "one band with the size and the place of its image",
                    "rio edit-info MASK --like IMAGE --all gives it the image's place; on_error='skip' leaves the chip "
                    "out.",
                )  # fmt: skip
            left.setdefault(f"{name} unlike its image", []).append(f"{own[chip].path} ({why})")
        types = Counter(header.dtype for header in found.values())
        if len(types) > 1:
            usual = types.most_common(1)[0][0]
            odd = [f"{own[c].path} ({h.dtype})" for c, h in found.items() if h.dtype != usual]
            raise SourceError(
                f"read_chips, {name!r}", f"masks of several types, most of {usual}: {listed(odd)}", "masks of one type",
                f"Write them anew: rio convert MASK OUT --dtype {usual}.",
            )  # fmt: skip
        for chip, header in found.items():
            for column, value in zip(columns, (chip, name, hrefs[chip], header.dtype), strict=True):
                columns[column].append(value)
    return pa.table({column: pa.array(values, pa.string()) for column, values in columns.items()})


def _href(row: FileRow) -> str:
    subject = f"file {redact(row.href)}"
    return keep_apart(checked(resolve(row.href, None), local=is_local(row.href), subject=subject))


def _unlike(header: Header | str, transform: Sequence[float], epsg: int, size: int) -> str | None:
    """Say in what a mask's header differs from its image's; None: in nothing that counts."""
    if isinstance(header, str):
        return header
    page = header.pages[0]
    if header.samples != 1:
        return f"{header.samples} bands"
    if (page.height, page.width) != (size, size):
        return f"{page.height} x {page.width} pixels"
    if header.epsg is None:
        return "no CRS in it"
    if not same(header.epsg, epsg):
        return f"another CRS ({text(header.epsg)})"
    pixel = max(abs(transform[0]), abs(transform[4]))
    if np.abs(np.subtract(page.transform, transform)).max() > _SAME_PX * pixel:
        return f"another place (corner {page.transform[2]:.10g}, {page.transform[5]:.10g})"
    return None
