"""With which kernel, and from which levels, each band of a source is read: told before any pixel is."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rasteret_dask.errors import UnknownKindWarning, user_level
from rasteret_dask.planning.resolve import SourcePlan
from rasteret_dask.reader.pixelgrid import Grid
from rasteret_dask.reader.readplan import choose
from rasteret_dask.table.records import Records

__all__ = ["BandReading", "RecordGrid", "band_readings", "warn_averaged"]

COPIED = "copied"
"""Pixels of the grid are the image's own."""


@dataclass(frozen=True, slots=True)
class RecordGrid:
    """A record, and where its pixels are wanted."""

    row: int
    """Of the records."""
    member: int
    """The member of the source that the record belongs to."""
    grid: Grid


@dataclass(frozen=True, slots=True)
class BandReading:
    """How one band of a source is read."""

    kernels: tuple[str, ...]
    """GDAL's names, in alphabetical order; ``"copied"`` where pixels are not resampled."""
    overviews: bool
    """Whether any record is read from an overview."""
    dtype: str
    """NumPy name of the type that the first record is stored in."""


def band_readings(
    plan: SourcePlan, records: Records, places: Sequence[RecordGrid], bands: Iterable[int] | None = None
) -> dict[str, BandReading]:
    """Return how output bands are read.

    Parameters
    ----------
    plan, records
        The source and its records.
    places
        Where which record is wanted; of equal grids and images one is looked at.
    bands
        Numbers of output bands; None: all.
    """
    result = {}
    for at in range(len(plan.bands)) if bands is None else bands:
        codes = [member.bands[at] for member in plan.members]
        images = {code: _images(records, code) for code in dict.fromkeys(codes)}
        kernels: set[str] = set()
        overviews, dtype = False, ""
        seen: set[Any] = set()
        for place in places:
            code = codes[place.member]
            key = (images[code][place.row], place.grid.epsg, _phase(place.grid), place.grid.xres)
            if key in seen:
                continue
            seen.add(key)
            asset = records.asset(place.row, code)
            unit = plan.rules.units[at]
            decode = unit if unit.kernel_on == "decoded" else None
            read = choose(asset, place.grid, plan.resampling, decode)
            own = read.corner is not None and read.level == 0
            kernels.add(COPIED if own else read.kernel)
            overviews |= read.level > 0
            dtype = dtype or str(asset.dtype)
        result[plan.bands[at]] = BandReading(tuple(sorted(kernels)), overviews, dtype)
    return result


def warn_averaged(plan: SourcePlan, records: Records, places: Sequence[RecordGrid]) -> None:
    """Warn of bands of integers that are averaged although nobody says what they are.

    Parameters
    ----------
    plan, records, places
        As in :func:`band_readings`. Where the user named a kernel nobody is warned.
    """
    units = plan.rules.units
    unknown = [n for n, band in enumerate(plan.kinds) if band.kind is None and units[n].kernel_on == "stored"]
    if plan.resampling is not None or not unknown:
        return
    whole = [n for n in unknown if _is_whole(records, {member.bands[n] for member in plan.members})]
    kernels_of: Mapping[str, BandReading] = band_readings(plan, records, places, whole)
    for band, reading in kernels_of.items():
        mixing = [k for k in reading.kernels if k not in (COPIED, "nearest", "mode")]
        if mixing:
            warnings.warn(
                f"band {band!r} of {plan.name!r} ({reading.dtype}, of unknown kind) is resampled by "
                f"{' and '.join(mixing)}, as measured numbers are: class codes would become codes that no class "
                f"has. Say what it holds, harmonize(kinds={{{band!r}: 'class'}}) or 'continuous', or name the kernel, "
                "harmonize(resampling='nearest').",
                UnknownKindWarning,
                stacklevel=user_level(),
            )


def _is_whole(records: Records, codes: Iterable[str]) -> bool:
    names = {
        n for code in codes for n in records.asset_field(code, "dtype").unique().to_pylist() if n is not None
    }
    return any(np.dtype(name).kind in "iu" for name in names)


def _images(records: Records, band: str) -> list[Any]:
    """Return for each record what its image's place and size are, in a form that can be compared."""
    transforms = records.level_field(band, "transform").to_pylist()
    widths = records.level_field(band, "width").to_pylist()
    kinds = records.asset_field(band, "kind").to_pylist()
    epsg = records.epsg.tolist()
    return [
        (code, None if t is None else tuple(t), width, kind)
        for code, t, width, kind in zip(epsg, transforms, widths, kinds, strict=True)
    ]


def _phase(grid: Grid) -> tuple[float, float]:
    """Return where the grid's pixel edges lie within a pixel, to a millionth of it."""
    return round(grid.x0 / grid.xres % 1.0, 6) % 1.0, round(grid.y0 / grid.yres % 1.0, 6) % 1.0
