# SPDX-License-Identifier: Apache-2.0
"""With which kernel, and from which levels, each band of a source is read: told before any pixel is."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from rasteret_dask.errors import GridError, UnknownKindWarning, user_level
from rasteret_dask.planning.resolve import SourcePlan
from rasteret_dask.reader.pixelgrid import Grid
from rasteret_dask.reader.readplan import choose
from rasteret_dask.rules.units import Unit
from rasteret_dask.table.filelayouts import FileLayouts
from rasteret_dask.table.records import Records

__all__ = ["BandReading", "Places", "band_readings", "grids_alike", "warn_averaged"]

COPIED = "copied"
"""Pixels of the grid are the image's own."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where the pixels of records are wanted; one entry per record and grid."""

    row: NDArray[np.int64]
    """Shape (place,). Of the records."""
    member: NDArray[np.int64]
    """Shape (place,). The member of the source that each record belongs to."""
    epsg: NDArray[np.int64]
    """Shape (place,). CRS of the grid."""
    corner: NDArray[np.float64]
    """Shape (place, 2). x and y of a pixel's corner."""
    pixel: tuple[float, float]
    """Width and height of a pixel, in units of the CRS."""

    def __post_init__(self) -> None:
        shapes = self.row.shape, self.member.shape, self.epsg.shape, self.corner.shape
        places = len(self.row)
        if shapes != ((places,), (places,), (places,), (places, 2)):
            raise GridError(
                "places of records", f"arrays of shapes {', '.join(map(str, shapes))}", "one entry per place"
            )

    def grid(self, at: int) -> Grid:
        """Return the grid of one place."""
        x, y = self.corner[at].tolist()
        return Grid(int(self.epsg[at]), x, y, *self.pixel)


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
    plan: SourcePlan, layouts: FileLayouts, places: Places, bands: Iterable[int] | None = None
) -> dict[str, BandReading]:
    """Return how output bands are read.

    Parameters
    ----------
    plan, layouts
        The source, and how the files of its records are laid out.
    places
        Where which record is wanted; of equal grids and layouts one is looked at.
    bands
        Numbers of output bands; None: all.
    """
    result: dict[str, BandReading] = {}
    grid = grids_alike(places.epsg, places.corner, places.pixel)
    reads: dict[tuple[int, int, Unit | None], tuple[str, bool]] = {}
    for band in range(len(plan.bands)) if bands is None else bands:
        unit, codes = plan.rules.units[band], [member.bands[band] for member in plan.members]
        decode = unit if unit.kernel_on == "decoded" else None
        layout = np.empty(len(places.row), dtype=np.int64)
        for number, code in enumerate(codes):
            own = places.member == number
            layout[own] = layouts.of(code)[places.row[own]]
        pairs = layout * (int(grid.max(initial=0)) + 1) + grid
        first = np.unique(pairs, return_index=True)[1]
        asked = [(int(layout[at]), int(grid[at]), decode) for at in first.tolist()]
        layouts.look_up(
            np.array([number for number, *_ in asked if (number, *_) not in reads], dtype=np.int64)
        )
        for key, at in zip(asked, first.tolist(), strict=True):
            if key not in reads:
                read = choose(layouts.asset(key[0]), places.grid(at), plan.resampling, decode)
                is_copied = read.corner is not None and read.level == 0
                reads[key] = COPIED if is_copied else read.kernel, read.level > 0
        kernels = sorted({reads[key][0] for key in asked})
        overviews = any(reads[key][1] for key in asked)
        result[plan.bands[band]] = BandReading(tuple(kernels), overviews, _dtype(layouts, places, codes))
    return result


def _dtype(layouts: FileLayouts, places: Places, codes: Sequence[str]) -> str:
    """Return the name of the type that a band's pixels are stored in, in the first record."""
    if not len(places.row):
        return ""
    dtypes = layouts.records.asset_field(codes[int(places.member[0])], "dtype")
    return str(dtypes[int(places.row[0])].as_py())


def grids_alike(
    epsg: NDArray[np.int64], corner: NDArray[np.float64], pixel: tuple[float, float]
) -> NDArray[np.int64]:
    """Return a number for each place, the same where pixel edges of a CRS meet, to a millionth of a pixel.

    Parameters
    ----------
    epsg
        Shape (place,).
    corner
        Shape (place, 2). x and y of one corner of each.
    pixel
        Width and height of a pixel, in units of the CRS.
    """
    group = np.zeros(len(epsg), dtype=np.int64)
    for values in (epsg, *(_phase(corner[:, axis] / pixel[axis]) for axis in (0, 1))):
        if (values != values[:1]).any():  # mostly all chips lie on one lattice
            number, distinct = pd.factorize(values)
            group = pd.factorize(group * len(distinct) + number)[0]
    return group


def _phase(places: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return where between two pixel edges places lie, in millionths of a pixel: whole numbers below a million."""
    millionths = np.rint((places - np.floor(places)) * 1e6)  # several times the speed of a remainder
    millionths[millionths == 1e6] = 0.0
    return millionths


def warn_averaged(plan: SourcePlan, layouts: FileLayouts, places: Places) -> None:
    """Warn of bands of integers that are averaged although nobody says what they are.

    Parameters
    ----------
    plan, layouts, places
        As in :func:`band_readings`. Where the user named a kernel nobody is warned.
    """
    units = plan.rules.units
    unknown = [n for n, band in enumerate(plan.kinds) if band.kind is None and units[n].kernel_on == "stored"]
    if plan.resampling is not None or not unknown:
        return
    records = layouts.records
    whole = [n for n in unknown if _is_whole(records, {member.bands[n] for member in plan.members})]
    kernels_of: Mapping[str, BandReading] = band_readings(plan, layouts, places, whole)
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # one warning for a photo's bands
    for band, reading in kernels_of.items():
        mixing = tuple(k for k in reading.kernels if k not in (COPIED, "nearest", "mode"))
        if mixing:
            alike.setdefault((str(reading.dtype), mixing), []).append(band)
    for (dtype, mixing), bands in alike.items():
        several = len(bands) > 1
        warnings.warn(
            f"band{'s' * several} {', '.join(map(repr, bands))} of {plan.name!r} ({dtype}, of unknown kind) "
            f"{'are' if several else 'is'} resampled by {' and '.join(mixing)}, as measured numbers are: class codes "
            f"would become codes that no class has. Say what {'they hold' if several else 'it holds'}, "
            f"harmonize(kinds={{{bands[0]!r}: 'class'}}) or 'continuous', or name the kernel, "
            "harmonize(resampling='nearest').",
            UnknownKindWarning,
            stacklevel=user_level(),
        )


def _is_whole(records: Records, codes: Iterable[str]) -> bool:
    names = {
        n for code in codes for n in records.asset_field(code, "dtype").unique().to_pylist() if n is not None
    }
    return any(np.dtype(name).kind in "iu" for name in names)
