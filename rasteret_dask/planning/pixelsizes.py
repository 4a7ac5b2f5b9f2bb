# SPDX-License-Identifier: Apache-2.0
"""How large the pixels of a source are on the ground, and that none of them is out of all proportion."""

from __future__ import annotations

import json

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.catalogs.catalog import dataset_of
from rasteret_dask.errors import GridError
from rasteret_dask.extent import metres
from rasteret_dask.table.records import Records

__all__ = ["ALIKE", "COARSE", "alike", "catalog_m", "not_in_metres", "pixels_m"]

ALIKE = 100.0
"""Pixels of one band may be so many times as large as is usual for it: no archive mixes 10 m and 1 km in a band."""

COARSE = 1000.0
"""Pixels so many times as large as what they are resampled to are worth a word: kilometres for 10 m."""


def pixels_m(records: Records, band: str) -> NDArray[np.float64]:
    """Return the width of a band's pixels on the ground.

    Parameters
    ----------
    records
        The records; those without the band, or without a CRS, have NaN.
    band
        Its name.

    Returns
    -------
    ndarray
        Shape (record,), metres; of degrees, at the equator.
    """
    width = pc.list_element(records.level_field(band, "transform"), 0).to_numpy()
    codes, place = np.unique(records.epsg, return_inverse=True)
    unit = np.array([metres(int(code)) for code in codes])
    return np.asarray(np.abs(np.asarray(width, dtype=np.float64)) * unit[place], dtype=np.float64)


def not_in_metres(records: Records) -> NDArray[np.int64]:
    """Return the rows of records whose CRS does not count in metres: degrees, feet."""
    codes, place = np.unique(records.epsg, return_inverse=True)
    other = np.array(
        [abs(metres(int(code)) - 1.0) > 1e-9 for code in codes], dtype=bool
    )  # NaN, unknown: not other
    return np.flatnonzero(other[place])


def catalog_m(records: Records, bands: tuple[str, ...]) -> float | None:
    """Return the finest pixel that the catalog, else the items' ``gsd``, tells of some bands, in metres; else None."""
    sizes = []
    for band in dict.fromkeys(bands):
        for name in records.distinct(band, "dataset"):
            dataset = dataset_of(name) if name else None
            sizes += [b.gsd_m for b in dataset.bands if b.code == band and b.gsd_m] if dataset else []
    if sizes:
        return float(min(sizes))
    stated = json.loads(
        (records.table.column("properties")[0].as_py() if len(records) else None) or "{}"
    ).get("gsd")
    return float(stated) if isinstance(stated, int | float) and stated > 0 else None


def alike(member: str, records: Records, bands: tuple[str, ...]) -> None:
    """Raise a GridError where a record's pixels are far larger than is usual: its header is wrong, or another's.

    Such a record would claim the ground of a continent, and each of its pixels would fill whole chips.
    """
    for band in dict.fromkeys(bands):
        pixels = pixels_m(records, band)
        known = np.sort(pixels[np.isfinite(pixels)])
        usual = float(known[(len(known) - 1) // 2]) if len(known) else np.nan  # of two, the smaller
        odd = np.flatnonzero(pixels > ALIKE * usual)
        if len(odd):
            first = records.ids[int(odd[0])]
            more = f" (and {len(odd) - 1} more such records)" if len(odd) > 1 else ""
            raise GridError(
                f"record {first!r}, band {band!r} of {member!r}",
                f"pixels of {pixels[odd[0]]:.6g} m{more}",
                f"about {usual:.6g} m, as the others have; at most {ALIKE:g} times that",
                f'Leave it out with .where("id", "!=", {first!r}), or take its bands as a source of their own.',
            )
