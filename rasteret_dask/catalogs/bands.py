# SPDX-License-Identifier: Apache-2.0
"""What each sensor's bands are called and measure: common names, scale, offset, nodata, quality bits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from rasteret_dask.rules.kinds import REFLECTANCE, KindName
from rasteret_dask.rules.radiometry import Radiometry

__all__ = ["TM_NUMBERS", "Band", "Dataset", "Role", "objection", "radiometry"]

Role = Literal["data", "quality"]
"""``"quality"``: serves the other bands, and is left out where none is named."""


@dataclass(frozen=True, slots=True)
class Band:
    """One layer of a sensor. Where a file or an item says something else, that holds."""

    code: str
    """The sensor's own code (``B04``, ``SCL``, ``A00``): what a record calls the band."""
    asset: str
    """The provider's asset key (``red`` on Earth Search; Planetary Computer's Sentinel-2 uses the code)."""
    common_name: str | None = None
    """STAC's common name (``red``), or None where it has none."""
    kind: KindName | None = None
    """What the numbers are; None: unknown, an item or a file may tell."""
    role: Role = "data"
    """What the band is for."""
    band_index: int = 0
    """Position in its file, counted from 0."""
    scale: float = 1.0
    """Physical value = DN x scale + offset."""
    offset: float = 0.0
    """See ``scale``."""
    nodata: float | None = None
    """DN that means no data, None where the file tells."""
    valid_min: float | None = None
    """The least DN that is a measurement: what is less is nodata, as other fill values and border noise are."""
    valid_max: float | None = None
    """The greatest DN that is a measurement."""
    dtype: str | None = None
    """NumPy name of the type it is stored in, None where unknown."""
    gsd_m: float | None = None
    """Size of a pixel, metres; None where it differs between files."""
    optional: bool = False
    """True: kept only where it is asked for by name, so that nobody else waits for its header."""


TM_NUMBERS = {"B1": "B2", "B2": "B3", "B3": "B4", "B4": "B5", "B5": "B6", "B6": "lwir", "B7": "B7"}
"""{number on Landsat 4, 5 (TM) and 7 (ETM+): what records call the band}: OLI's number of the same light. Table 1 of
the Landsat 4-7 Collection 2 Level 2 Science Product Guide (LSDS-1618)."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """What is known about a published collection without reading a file."""

    name: str
    """What its records call it."""
    bands: tuple[Band, ...]
    """All bands that records keep. Clouds are told by those of ``rules.masks.QUALITY``."""
    radiometry: str | None = None
    """Name of a rule of :func:`radiometry` that needs an item's properties, or None."""
    renumbered: bool = False
    """True where Landsat 4, 5 and 7 give a code to another band (``TM_NUMBERS``)."""


def objection(scaling: Radiometry, band: Band | None, spectral: bool) -> str | None:
    """Return why a scale and an offset cannot be those of a band, None where they can.

    Parameters
    ----------
    scaling
        The two numbers.
    band
        The known band: its own scale may differ by a factor of 1000 (percent for fractions), its offset by 100.
    spectral
        True where the item gives the band a common name: light is not counted downwards, nor by the million.
    """
    numbers = f"scale {scaling.scale:g} and offset {scaling.offset:g}"
    if not (isfinite(scaling.offset) and _SMALLEST <= abs(scaling.scale) <= 1 / _SMALLEST):
        return f"{numbers}, which give no values"
    if band is not None:
        most = _FARTHEST_OFFSET * max(1.0, abs(band.offset))
        if (
            not 1 / _FARTHEST_SCALE <= scaling.scale / band.scale <= _FARTHEST_SCALE
            or abs(scaling.offset) > most
        ):
            return f"{numbers}, where {band.code} has {band.scale:g} and {band.offset:g}"
    elif spectral and not (
        0 < scaling.scale <= _LARGEST_SPECTRAL and abs(scaling.offset) <= _LARGEST_SPECTRAL
    ):
        return f"{numbers}, of a spectral band"
    return None


_SMALLEST = 1e-30  # columns of gas reach 1e16 molecules a square centimetre, or 1e-15 of something
_FARTHEST_SCALE = 1000.0
_FARTHEST_OFFSET = 100.0
_LARGEST_SPECTRAL = 10_000.0


def radiometry(
    dataset: Dataset | None,
    band: Band | None,
    properties: Mapping[str, Any],
    scale: float | None,
    offset: float | None,
) -> Radiometry:
    """Settle the scale and offset of one asset of one item.

    Parameters
    ----------
    dataset, band
        The known dataset and band, or None.
    properties
        The STAC item's properties.
    scale, offset
        What the item's own ``raster:bands`` or ``bands`` say, None where they are silent.

    Notes
    -----
    Sentinel-2 L2A since processing baseline 04.00 (25 January 2022) carries an offset of -1000 DN. In Earth
    Search's ``sentinel-2-l2a`` the pixels have it applied already where ``earthsearch:boa_offset_applied`` is
    true, although ``raster:bands`` says -0.1 in both cases; ``sentinel-2-c1-l2a`` never has it applied, nor have
    Planetary Computer's files.
    """
    if dataset is None or band is None:
        said = "item" if scale is not None or offset is not None else "identity"
        return Radiometry(1.0 if scale is None else scale, 0.0 if offset is None else offset, said)
    if dataset.radiometry == "sentinel-2" and band.kind == REFLECTANCE.name:
        return _sentinel2(band, properties, scale, offset)
    rule = "item" if scale is not None or offset is not None else f"{dataset.name} default"
    if scale is None and offset is None and (band.scale, band.offset) == (1.0, 0.0):
        rule = "identity"
    return Radiometry(band.scale if scale is None else scale, band.offset if offset is None else offset, rule)


def _sentinel2(
    band: Band, properties: Mapping[str, Any], scale: float | None, offset: float | None
) -> Radiometry:
    found = band.scale if scale is None else scale
    if properties.get("earthsearch:boa_offset_applied") is True:
        return Radiometry(found, 0.0, "offset 0: earthsearch:boa_offset_applied, pixels have it applied")
    baseline = properties.get("s2:processing_baseline", properties.get("processing:version"))
    number = re.fullmatch(r"N?(\d\d?\.?\d\d)", str(baseline))
    if number is None:
        return Radiometry(found, 0.0 if offset is None else offset, "item; no processing baseline known")
    if float(number[1]) / (1 if "." in number[1] else 100) < 4.0:
        return Radiometry(found, 0.0, f"offset 0: baseline {baseline} is before 04.00")
    return Radiometry(found, band.offset, f"offset {band.offset:g}: baseline {baseline} is 04.00 or later")
