# SPDX-License-Identifier: Apache-2.0
"""Files of a user's own become records: what their names, headers and rows tell, put together."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import pyarrow as pa
import shapely
from shapely.errors import ShapelyError

from rasteret_dask.catalogs.signing import keep_apart
from rasteret_dask.crs import same, text
from rasteret_dask.errors import (
    BandError,
    PlanError,
    SchemaError,
    SourceError,
    UntiledFilesWarning,
    user_level,
)
from rasteret_dask.headers.reader import Header, read_headers
from rasteret_dask.ingest.filelist import FileRow, FileRows, files_of
from rasteret_dask.ingest.filenames import Naming, Period
from rasteret_dask.ingest.sources import check_href, reason_of, short
from rasteret_dask.ingest.stac import LeftOut
from rasteret_dask.ingest.tables import table_to_records
from rasteret_dask.net.remote import is_local, redact
from rasteret_dask.net.trust import checked, resolve
from rasteret_dask.table.facts import ENDLESS
from rasteret_dask.table.itemcrs import stated_crs

__all__ = ["FileScenes", "Footprints", "files_to_records"]

Footprints: TypeAlias = Literal["header", "valid"]
"""What the outline of a scene is: that of its raster, or that of its valid pixels."""

Bands: TypeAlias = "tuple[str, ...] | Mapping[str, int] | None"

_COLUMNS = ("id", "band", "datetime", "start_datetime", "end_datetime", "geometry")
_GROUPS = ("date", "start", "stop", "band", "id")
_CLEAN = re.compile(r"^\w[\w.\- ]*$")
_GENERIC = re.compile(r"^(band[\s_-]?\d*|\d+|gr[ae]y)$", re.IGNORECASE)
_CHIP = 256
"""Pixels a side of the chip by which files that are not tiled are judged."""
_WASTE = 8.0
"""Times the pixels of a chip that a file without tiles makes one read, from which on a warning tells of it."""
_SHOWN = 3
_TIME = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True, slots=True)
class FileScenes:
    """How files become scenes."""

    naming: Naming
    bands: Bands = None
    """Names of the bands of each file, in order; {band: position from 0}; or those to keep, where names tell bands."""
    dataset: str | None = None
    """Name of a known dataset, for scale, kinds and masks."""
    footprints: Footprints = "header"
    static: bool = False
    """Whether the files hold at any time: then they need none."""
    crs: int | None = None
    """The CRS of files that have none, as :func:`rasteret_dask.crs.number` counts it."""

    def __post_init__(self) -> None:
        if self.footprints not in ("header", "valid"):
            raise PlanError("footprints", repr(self.footprints), "'header' or 'valid'")
        if self.bands is not None and (not self.bands or len(set(self.bands)) != len(self.bands)):
            raise PlanError("bands", repr(self.bands), "at least one band, none twice")


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a scene, its header read."""

    row: FileRow
    href: str
    groups: Mapping[str, str]
    scene: str
    header: Header

    @property
    def subject(self) -> str:
        return f"file {redact(self.href)}"

    @property
    def band(self) -> str | None:
        """The band that the file's row or name tells."""
        told = self.row.cells.get("band") or self.groups.get("band")
        return None if told is None else str(told)


def files_to_records(
    files: Any, how: FileScenes, *, name: str, column_map: Mapping[str, str] | None, broken: LeftOut
) -> pa.Table:
    """Turn files into a record table.

    Parameters
    ----------
    files
        What :func:`filelist.files_of` takes.
    how
        What their names, tags and bands mean.
    name
        What the collection is called in messages.
    column_map
        {column of a table of files: name here}.
    broken
        Takes files that cannot be read or placed, where they are to be left out.

    Returns
    -------
    pyarrow.Table
        Of RECORD_SCHEMA, a row a scene, with the further columns of a table of files and the further groups of the
        pattern behind it.

    Raises
    ------
    SourceError, BandError, SchemaError, TrustError
        When there are no files, or they tell too little, or contradict each other.
    """
    listed = files_of(files, name, column_map)
    readable = list(_read(_placed(listed, how.naming, name, broken), how.crs, broken))
    if not readable:
        raise broken.all_of(name)
    _tell_untiled(readable, name)
    scenes: dict[str, list[_File]] = defaultdict(list)
    for file in readable:
        scenes[file.scene].append(file)
    rows = []
    for scene, own in scenes.items():
        with broken.of(scene):
            rows.append(_row(scene, own, how))
    if not rows:
        raise broken.all_of(name)
    _check_kept(rows, how, readable)
    table = _table(rows, listed.types)
    headers = {file.href: file.header for file in readable}
    return table_to_records(
        table, name=name, dataset=how.dataset, headers=headers, broken=broken, crs=how.crs
    )


def _placed(
    listed: FileRows, naming: Naming, name: str, broken: LeftOut
) -> list[tuple[FileRow, str, Mapping[str, str], str]]:
    """Return each file whose name fits the pattern, with its absolute href, its groups and its scene."""
    local = listed.place is None or is_local(listed.place)
    placed, strangers = [], []
    for row in listed.rows:
        fit = naming.groups_of(row)
        if fit is None:
            strangers.append(row.path)
            continue
        with broken.of(redact(row.path)):
            subject = f"file {redact(short(row.href))!r} of {name!r}"
            check_href(row.href, subject)
            href = keep_apart(checked(resolve(row.href, listed.place), local=local, subject=subject))
            placed.append((row, href, *fit))
    if strangers and naming.regex is not None:
        shown = ", ".join(strangers[:_SHOWN]) + (", ..." if len(strangers) > _SHOWN else "")
        if not placed:
            raise SourceError(
                f"filename_regex {naming.regex.pattern!r} on {len(strangers)} files of {name!r}",
                f"no match ({shown})",
                "a pattern that is found in the files' names",
                _pattern_for(strangers[0]),
            )
        warnings.warn(
            f"{name}: {len(strangers)} of {len(listed.rows)} files do not match filename_regex and are left out: "
            f"{shown}",
            UserWarning,
            stacklevel=user_level(),
        )
    short_ids = _short_ids([scene for *_, scene in placed])
    ids = [row.cells.get("id", groups.get("id")) for row, _, groups, _ in placed]
    return [
        (row, href, groups, short_ids[scene] if told is None else str(told))
        for (row, href, groups, scene), told in zip(placed, ids, strict=True)
    ]


def _pattern_for(path: str) -> str:
    """Return what to do about a pattern that is not found, or about a file without a time."""
    base = os.path.basename(path)
    if re.search(r"(?<!\d)(19|20)\d{6}(?!\d)", base):
        return r"filename_regex=r'(?P<date>\d{8})' finds the date in " + base + "."
    if re.search(r"(?<!\d)(19|20)\d{2}(?!\d)", base):
        return r"filename_regex=r'(?P<date>(19|20)\d{2})', date_format='%Y' finds the year in " + base + "."
    return (
        "A pattern is searched for anywhere in a file's name; one with a slash, in its path below the folder."
    )


def _read(
    placed: Sequence[tuple[FileRow, str, Mapping[str, str], str]], crs: int | None, broken: LeftOut
) -> Iterator[_File]:
    """Yield the files whose headers can be read; each distinct file is opened once."""
    headers = read_headers([href for _, href, _, _ in placed])
    failed = sum(isinstance(header, str) for header in headers.values())
    for row, href, groups, scene in placed:
        header = headers[href]
        with broken.of(redact(row.path)):
            if isinstance(header, str):
                others = f" (so are {failed - 1} others of {len(headers)})" if failed > 1 else ""
                raise SourceError(
                    f"file {redact(href)}", f"{header}{others}", "a TIFF or JPEG 2000 file with a place on the ground",
                    "on_error='skip' leaves out such files, and names them.",
                )  # fmt: skip
            file = _File(row, href, groups, scene, header)
            if header.epsg is None and crs is None and stated_crs(row.cells) is None:
                raise SourceError(
                    file.subject, "no CRS in it", "a file with a CRS, or crs= for those without",
                    "Say where it lies: crs='EPSG:32633'; in a table of files, a column proj:code.",
                )  # fmt: skip
            yield file


def _short_ids(scenes: Sequence[str]) -> dict[str, str]:
    """Return {scene: the last parts of its path, as few as tell it apart from the others}."""
    ids: dict[str, str] = {}
    left = list(dict.fromkeys(scenes))
    depth = 0
    while left:
        depth += 1
        tails = {scene: "/".join(scene.split("/")[-depth:]) for scene in left}
        counts = Counter(tails.values())
        ids |= {scene: tail for scene, tail in tails.items() if counts[tail] == 1}
        left = [scene for scene in left if scene not in ids]
    return ids


def _row(scene: str, files: Sequence[_File], how: FileScenes) -> dict[str, Any]:
    """Return one scene as a row of ``id, times, geometry, assets`` with the further columns."""
    codes = {file.header.epsg: file for file in files if file.header.epsg is not None}
    if not all(same(code, next(iter(codes))) for code in codes):
        shown = ", ".join(f"{text(code)} ({file.row.path})" for code, file in sorted(codes.items()))
        raise SourceError(
            f"scene {scene!r}", f"files in several CRS: {shown}", "one CRS for all bands of a scene",
            "Give files of different ground ids of their own: a group (?P<id>...), a column id.",
        )  # fmt: skip
    assets: dict[str, dict[str, Any]] = {}
    holders: dict[str, _File] = {}
    for file in files:
        for band, position in _bands_of(file, how.bands).items():
            if band in assets:
                raise SourceError(
                    f"scene {scene!r}, band {band!r}",
                    f"two files: {holders[band].row.path} and {file.row.path}",
                    "one file for each band of a scene",
                    "Tell them apart by the pattern's groups (?P<band>...) and (?P<id>...), or by columns band and id.",
                )
            assets[band] = {"href": file.href, "band_index": position}
            holders[band] = file
    cells: dict[str, Any] = {
        k: v for file in reversed(files) for k, v in file.row.cells.items() if k not in _COLUMNS
    }
    cells |= {k: v for file in reversed(files) for k, v in file.groups.items() if k not in _GROUPS}
    if "assets" in cells:
        raise SchemaError(
            f"scene {scene!r}", "a column assets", "a table of files, a file a row",
            "A table of scenes is taken by rd.build_from_table(table, name=...).",
        )  # fmt: skip
    times = [period for file in files if (period := _period(file, how)) is not None]
    start, end = min(times, key=lambda period: period[0]) if times else (None, None)
    if start is None and not how.static:
        raise _timeless(files[0])
    interval = (None if end is None else start, end)
    if how.static:
        interval = ENDLESS
    return {
        **cells,
        "id": scene,
        "datetime": start,
        "start_datetime": interval[0],
        "end_datetime": interval[1],
        "geometry": _outline(files, how),
        "assets": list(assets.items()),
    }


def _bands_of(file: _File, bands: Bands) -> dict[str, int]:
    """Return {band: position in the file} of a file."""
    header, code = file.header, file.band
    measured = [n for n in range(header.samples) if n != header.alpha or header.samples == 1]
    if code is not None:
        names = [code] if len(measured) == 1 else [f"{code}_{n + 1}" for n in measured]
        own = dict(zip(names, measured, strict=True))
        return {band: at for band, at in own.items() if bands is None or band in bands}
    if isinstance(bands, Mapping):
        beyond = {band: at for band, at in bands.items() if not 0 <= at < header.samples}
        if beyond:
            raise SourceError(
                file.subject, f"{header.samples} bands", f"positions {beyond} of bands=, counted from 0"
            )
        return dict(bands)
    if bands is not None:
        if len(bands) not in (header.samples, len(measured)):
            count = f"{header.samples} band" + "s" * (header.samples > 1)
            raise SourceError(
                file.subject,
                count + (", one of them the alpha channel" if header.alpha is not None else ""),
                f"{len(bands)} of them, as bands={list(bands)} names",
                "Name all bands of the files, or some by position: bands={'red': 0, 'nir': 3}. For files of one band "
                "each, filename_regex= with (?P<band>...) tells which one a file is.",
            )
        positions = range(header.samples) if len(bands) == header.samples else measured
        return dict(zip(bands, positions, strict=True))
    names = [(words or "").strip() for words in header.descriptions]
    telling = all(_CLEAN.match(n) and not _GENERIC.match(n) for n in names)
    if len(names) == header.samples and telling and len(set(names)) == len(names):
        return {words: n for n, words in enumerate(names)}
    alone = len(measured) == 1  # beside its alpha channel, as bands of STAC items are called
    return {"band" if alone and n in measured else f"band_{n + 1}": n for n in range(header.samples)}


def _period(file: _File, how: FileScenes) -> Period | None:
    """Return a file's time: as its row tells, else its name, else its tag."""
    cells, naming = file.row.cells, how.naming
    start, end = (
        naming.period_of_cell(cells.get(f"{edge}_datetime"), file.subject) for edge in ("start", "end")
    )
    if start is not None and end is not None:
        return start[0], end[0]
    told = naming.period_of_cell(cells.get("datetime"), file.subject) or start
    told = told or naming.period_of_groups(file.groups, file.subject)
    if told is None and naming.date_tag is not None:
        tags = dict(file.header.tags)
        told = naming.period_of_cell(tags.get(naming.date_tag), f"{file.subject}, tag {naming.date_tag}")
        if told is None and not how.static:
            raise SourceError(
                file.subject,
                f"no tag {naming.date_tag} (tags: {', '.join(tags) or 'none'})",
                "the tag of its time",
            )
    return told


def _timeless(file: _File) -> SourceError:
    """Return the error of a file of which nothing tells when it was taken."""
    hint = _pattern_for(file.row.path) if "filename_regex" in _pattern_for(file.row.path) else ""
    if not hint and "TIFFTAG_DATETIME" in dict(file.header.tags):
        hint = "The file has one: date_tag='TIFFTAG_DATETIME'."
    return SourceError(
        file.subject,
        "no time",
        "a column datetime, a group (?P<date>...) of filename_regex=, or date_tag=",
        (hint + " " if hint else "") + "static=True is for what holds at any time: elevation, soil.",
    )


def _outline(files: Sequence[_File], how: FileScenes) -> bytes | None:
    """Return a scene's outline as WKB in lon/lat: as its row tells, or around its valid pixels; None: the raster's."""
    told = next((cell for file in files if (cell := file.row.cells.get("geometry")) is not None), None)
    if told is None and how.footprints == "valid":
        from rasteret_dask.ingest.validareas import valid_area  # it imports rasterio

        own = files[0].header.epsg or stated_crs(files[0].row.cells) or how.crs
        assert own is not None
        return valid_area(files[0].href, files[0].header.pages[0].driver, own)
    try:
        return bytes(shapely.to_wkb(shapely.from_wkt(told))) if isinstance(told, str) else told
    except ShapelyError as error:
        raise SourceError(
            files[0].subject, f"geometry: {reason_of(error)}", "WKB or WKT in degrees"
        ) from error


def _check_kept(rows: Sequence[Mapping[str, Any]], how: FileScenes, files: Sequence[_File]) -> None:
    """Raise BandError where bands are asked for that no file has."""
    have = {band for row in rows for band, _ in row["assets"]}
    missing = [band for band in how.bands or () if band not in have]
    if missing:
        told = dict.fromkeys(file.band or "" for file in files)
        raise BandError(
            f"bands {', '.join(map(repr, missing))}", "no file with such a band", f"one of {', '.join(told)}",
            "Ask by what the files' names tell.",
        )  # fmt: skip


_ASSETS = pa.map_(pa.string(), pa.struct([("href", pa.string()), ("band_index", pa.int64())]))
_TYPES: Mapping[str, pa.DataType] = {
    "id": pa.string(),
    "datetime": _TIME,
    "start_datetime": _TIME,
    "end_datetime": _TIME,
    "geometry": pa.binary(),
    "assets": _ASSETS,
}


def _table(rows: Sequence[Mapping[str, Any]], types: Mapping[str, pa.DataType]) -> pa.Table:
    """Return rows as a table, further columns in the types that they came in, groups of a pattern as text."""
    further = dict.fromkeys(name for row in rows for name in row if name not in _TYPES)
    kinds = {**_TYPES, **{name: types.get(name, pa.string()) for name in further}}
    return pa.table({name: pa.array([row.get(name) for row in rows], kind) for name, kind in kinds.items()})


def _tell_untiled(files: Sequence[_File], name: str) -> None:
    """Warn of files of which a chip needs far more than its own pixels, and tell what tiling would gain."""
    wasteful = [(waste, file) for file in files if (waste := _waste(file.header)) >= _WASTE]
    if not wasteful:
        return
    most, file = max(wasteful, key=lambda pair: pair[0])
    image = file.header.pages[0]
    layout = f"strips of {image.tile_height} x {image.width} px"
    if image.tile_width < image.width:
        layout = f"tiles of {image.tile_height} x {image.tile_width} px"
    warnings.warn(
        f"{name}: {len(wasteful)} of {len(files)} files lie in {layout} or the like: a chip of {_CHIP} px reads up to "
        f"{most:,.0f} times its own pixels. They work; `rio cogeo create {os.path.basename(file.row.path)} OUT.tif` "
        "makes a tiled copy, of which a chip reads only the tiles it lies in",
        UntiledFilesWarning,
        stacklevel=user_level(),
    )


def _waste(header: Header) -> float:
    """Return how many times the pixels of a chip its read takes, of a chip that lies as well as it can."""
    image = header.pages[0]
    side_x, side_y = min(_CHIP, image.width), min(_CHIP, image.height)
    across = min(-(-side_x // image.tile_width) * image.tile_width, image.width)
    down = min(-(-side_y // image.tile_height) * image.tile_height, image.height)
    return across * down / (side_x * side_y)
