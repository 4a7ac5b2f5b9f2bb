# SPDX-License-Identifier: Apache-2.0
"""Windows that are the rasters of files: ``chips(grid="files")``."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.chipping.coverage import Outlines
from rasteret_dask.chipping.feeds import Feeds
from rasteret_dask.chipping.frame import Frame, in_space, within_area
from rasteret_dask.crs import text
from rasteret_dask.errors import GridError, PlanError
from rasteret_dask.lists import listed
from rasteret_dask.planning.filechips import CHIP, FileChips
from rasteret_dask.planning.pixelsizes import not_in_metres
from rasteret_dask.planning.plan import ChipSpec
from rasteret_dask.planning.resolve import ResolvedSource

__all__ = ["file_chips", "file_feeds", "file_windows", "with_file_pixels"]

STEP = "chips(grid='files')"

SAME_PX = 1e-3
"""Edges of two files of one chip that lie nearer than this share of a pixel are one."""


def file_chips(source: ResolvedSource) -> FileChips:
    """Return which chips the records of the reference are files of.

    Raises
    ------
    PlanError
        When nobody says.
    """
    if source.files is None:
        raise PlanError(
            f"{STEP} of source {source.plan.name!r}", f"records without a column {CHIP!r}",
            "records that name the chip which they are a file of",
            "rd.read_chips(folder) makes them; or cut windows out of rasters of any size: chips(size) without grid=.",
        )  # fmt: skip
    return source.files


def with_file_pixels(
    spec: ChipSpec, sources: list[ResolvedSource], reference: int, ground: tuple[Outlines, ...]
) -> list[ResolvedSource]:
    """Return sources whose pixels divide the chips' own bounds, so that those of files stay native.

    Sources that are no files get the pixels of the reference, unless ``harmonize(resolution=)`` asks for others.

    Raises
    ------
    PlanError
        When nobody says which chips the reference's records are files of.
    GridError
        When a file is no square of the chips' size, or files of one chip lie elsewhere.
    """
    own = sources[reference]
    first = file_chips(own)
    pixel, degrees = own.plan.resolution, bool(len(not_in_metres(own.records)))
    place = _place(ground[reference])
    homes = dict(zip(first.chip.to_pylist(), ground[reference].of_record.tolist(), strict=True))
    result = []
    for number, source in enumerate(sources):
        plan = source.plan
        reach = spec.reach_m(pixel, plan.name)
        if source.files is not None:
            sides = _sides(source, ground[number])
            if number == reference and (sides != spec.size).any():
                raise _other_size(source, ground[number], sides, spec.size)
            if (sides != sides[0]).any():
                raise _other_size(source, ground[number], sides, int(np.bincount(sides).argmax()))
            if number != reference:
                _check_places(own.plan.name, place, homes, (source, ground[number]), reach)
            plan = replace(plan, resolution=(pixel * spec.size + 2 * reach) / int(sides[0]))
        elif source.native or degrees:
            if not source.native:
                raise PlanError(
                    f"harmonize(resolution={plan.resolution:g}) of source {plan.name!r}, joined with files in degrees",
                    "a pixel size in metres", "the pixels of the files", "Leave resolution out.",
                )  # fmt: skip
            plan = replace(plan, resolution=pixel)
        result.append(replace(source, plan=replace(plan, by_file=True), native=False))
    return result


def file_windows(
    spec: ChipSpec, source: ResolvedSource, outlines: Outlines, table: pa.Table | None = None
) -> Frame:
    """Return a window for each chip that the reference has files of, in their order of space.

    Parameters
    ----------
    spec
        Gives the area.
    source, outlines
        The reference, and the outlines of its records.
    table
        What is known of chips, by column ``chip``; ``index`` of the windows then counts its rows, -1 for none.
    """
    chips = file_chips(source).chip
    rows = np.flatnonzero(chips.is_valid().to_numpy(zero_copy_only=False))
    names, first = np.unique(chips.take(pa.array(rows)).to_numpy(zero_copy_only=False), return_index=True)
    outline = outlines.of_record[rows[first]]
    prefix = pa.array(names, pa.string())
    index = None
    if table is not None:
        place = pc.index_in(prefix, value_set=table.column(CHIP).combine_chunks().cast(pa.string()))
        index = np.asarray(pc.fill_null(place, -1).to_numpy(), dtype=np.int64)
    count = np.arange(len(names), dtype=np.int64)
    frame = Frame(
        outlines.epsg[outline], outlines.raster[outline], np.zeros_like(count), count, None, index, prefix
    )
    return in_space(within_area(frame, spec), source.plan.resolution)


def file_feeds(source: ResolvedSource, frame: Frame) -> Feeds:
    """Return every (window, record) of one chip, one slot for each of the source's acquisitions."""
    assert source.files is not None
    place = pc.fill_null(pc.index_in(source.files.chip, value_set=frame.prefix), -1).to_numpy()
    window = np.asarray(place, dtype=np.int64)
    there = (window >= 0) & (source.passes.of_record >= 0)
    if source.files.slot is not None:
        there &= source.files.slot >= 0
    record = np.flatnonzero(there)
    record = record[np.argsort(window[record], kind="stable")]
    ones = np.ones(len(record))
    return Feeds.of(window[record], source.passes.of_record[record], np.zeros(len(record)), record, ones)


def _sides(source: ResolvedSource, outlines: Outlines) -> NDArray[np.int64]:
    """Return the side of each outline's raster in pixels; a raster that is no square is refused."""
    box, pixel = outlines.raster, np.abs(outlines.transform[:, [0, 4]])
    pixels = np.rint((box[:, 2:] - box[:, :2]) / pixel).astype(np.int64)
    odd = np.flatnonzero(pixels[:, 0] != pixels[:, 1])
    if len(odd):
        width, height = pixels[odd[0]].tolist()
        raise GridError(
            f"{STEP}, record {outlines.name[odd[0]]!r} of {source.plan.name!r}",
            f"{height} x {width} pixels", "as many rows as columns: chips are squares",
            f"Cut squares out of such files: rd.build_from_files(files, name=...).chips({min(width, height)}).",
        )  # fmt: skip
    return np.asarray(pixels[:, 0], dtype=np.int64)


def _other_size(
    source: ResolvedSource, outlines: Outlines, sides: NDArray[np.int64], usual: int
) -> GridError:
    odd = np.flatnonzero(sides != usual)
    named = listed([f"{outlines.name[at]} ({sides[at]} px)" for at in odd.tolist()])
    return GridError(
        f"{STEP} of source {source.plan.name!r}", f"files of other sizes than {usual} pixels: {named}",
        "files of one size",
        "rd.read_chips(on_error='skip') leaves them out; rd.build_from_files(files, name=...)"
        f".chips({int(sides.min())}) cuts chips of one size out of rasters of any.",
    )  # fmt: skip


def _place(outlines: Outlines) -> NDArray[np.float64]:
    """Shape (outline, 5). CRS and rectangle of each."""
    return np.column_stack([outlines.epsg.astype(np.float64), outlines.raster])


def _check_places(
    name: str,
    place: NDArray[np.float64],
    homes: dict[str, int],
    others: tuple[ResolvedSource, Outlines],
    reach_m: float,
) -> None:
    """Raise GridError where a file of a chip lies elsewhere than the reference's, or reaches not as far beyond it."""
    source, ground = others
    assert source.files is not None
    other = _place(ground)
    other[:, 1:] += np.array([reach_m, reach_m, -reach_m, -reach_m])
    pixel = np.abs(ground.transform[:, [0, 4]]).max(axis=1)
    for chip, at in zip(source.files.chip.to_pylist(), ground.of_record.tolist(), strict=True):
        home = homes.get(chip)
        if home is None:
            continue
        apart = np.abs(place[home, 1:] - other[at, 1:]).max()
        if place[home, 0] != other[at, 0] or apart > SAME_PX * pixel[at]:
            raise GridError(
                f"{STEP}, chip {chip!r}", f"a file of {source.plan.name!r} at {_shown(other[at])}",
                f"the ground of its file of {name!r}: {_shown(place[home])}",
                "Build that source by rd.build_from_files(files, name=...), and give it as join=: it is then brought "
                "to the chips' pixels.",
            )  # fmt: skip


def _shown(place: NDArray[np.float64]) -> str:
    return f"({', '.join(f'{v:.10g}' for v in place[1:])}) in {text(int(place[0]))}"
