# SPDX-License-Identifier: Apache-2.0
"""Sentinel-2's reflectance as OLI would measure it: the band-pass adjustment of HLS, put into scale and offset.

The numbers are those of the table "coefficients of linear regression used to adjust from Sentinel-2A,B/MSI to Landsat
8/OLI" of HLS's user guide (https://hls.gsfc.nasa.gov/algorithms/bandpass-adjustment/; Claverie et al. 2018, Remote
Sensing of Environment 219, 145-161), fitted on surface reflectance. HLS's own production code (the files
``bandpass_parameter.S2A.txt`` and ``.S2B.txt`` of NASA-IMPACT/hls-sentinel) and ESA's sen2like have the same numbers.

Other programs give B8A's numbers to B08 too; the user guide has none for B08, so neither has this module. Nor has it
any for Sentinel-2C: only the production code names some, the user guide's table does not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from rasteret_dask.errors import PlanError
from rasteret_dask.rules.units import OliReflectance, Unit
from rasteret_dask.table.assetkinds import with_fields
from rasteret_dask.table.records import Records

__all__ = ["COEFFICIENTS", "like_oli"]

COEFFICIENTS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "sentinel-2a": {
        "B01": (0.9959, -0.0002),
        "B02": (0.9778, -0.0040),
        "B03": (1.0053, -0.0009),
        "B04": (0.9765, 0.0009),
        "B8A": (0.9983, -0.0001),
        "B11": (0.9987, -0.0011),
        "B12": (1.0030, -0.0012),
    },
    "sentinel-2b": {
        "B01": (0.9959, -0.0002),
        "B02": (0.9778, -0.0040),
        "B03": (1.0075, -0.0008),
        "B04": (0.9761, 0.0010),
        "B8A": (0.9966, 0.0000),
        "B11": (1.0000, -0.0003),
        "B12": (0.9867, 0.0004),
    },
}
"""Platform -> Sentinel-2's code of a band -> (slope, offset): ``OLI = slope x MSI + offset``, both reflectance."""

_SENTINEL2 = frozenset({"sentinel-2-l2a", "sentinel-2-c1-l2a"})
_MSI_BANDS = frozenset(COEFFICIENTS["sentinel-2a"])
_OLI_BANDS = frozenset({"B1", "B2", "B3", "B4", "B5", "B6", "B7"})
_ALIKE: Mapping[str, tuple[frozenset[str], str]] = {
    "landsat-c2-l2": (_OLI_BANDS, "measured by OLI"),
    "hls-l30": (frozenset({"B01", "B02", "B03", "B04", "B05", "B06", "B07"}), "measured by OLI"),
    "hls-s30": (_MSI_BANDS, "adjusted to OLI by HLS"),
}
"""Datasets whose bands are OLI's as they are: their codes, and what is said of them."""
_OLI_PLATFORMS = frozenset({"landsat-8", "landsat-9"})
_IDENTITY = (1.0, 0.0)


@dataclass(frozen=True, slots=True)
class _Fit:
    """What is done to the reflectance of a record."""

    slope: float
    offset: float
    words: str


def like_oli(
    source: str,
    bands: Sequence[str],
    units: Sequence[Unit],
    tables: Sequence[Records],
    codes: Sequence[Sequence[str]],
) -> list[Records]:
    """Return the members' records; scale, offset and rule lead to OLI's reflectance in bands of that unit.

    Parameters
    ----------
    source
        Name of the source, for messages.
    bands, units
        Names and units of the output bands.
    tables
        The records of each member.
    codes
        Per member, its own code of each output band.

    Raises
    ------
    PlanError
        When coefficients are not published for a record's dataset, platform or band.
    """
    if not any(isinstance(unit, OliReflectance) for unit in units):
        return list(tables)
    return [_adjusted(source, bands, units, r, own) for r, own in zip(tables, codes, strict=True)]


def _adjusted(
    source: str, bands: Sequence[str], units: Sequence[Unit], records: Records, codes: Sequence[str]
) -> Records:
    asked = {code: band for code, band, unit in zip(codes, bands, units, strict=True) if _is_oli(unit)}
    others = {code: band for code, band, unit in zip(codes, bands, units, strict=True) if not _is_oli(unit)}
    for code in asked.keys() & others.keys():
        raise PlanError(
            f"harmonize(units=) of source {source!r}",
            f"{asked[code]!r} like OLI's and {others[code]!r} not, both {code}", "one unit for what is one band",
            "Join two sources, one with each: rd.join(a=..., b=...).",
        )  # fmt: skip
    table = records.table
    for code, band in asked.items():
        table = with_fields(table, code, _fields(source, band, code, records))
    return Records(table)


def _is_oli(unit: Unit) -> bool:
    return isinstance(unit, OliReflectance)


def _fields(source: str, band: str, code: str, records: Records) -> dict[str, pa.Array]:
    """Return scale, offset and rule of a band, one a record."""
    platforms = records.table.column("platform").to_pylist()
    datasets = records.asset_field(code, "dataset").to_pylist()
    pairs = list(zip(datasets, platforms, strict=True))
    fits = {pair: _fit(*pair, code) for pair in dict.fromkeys(pairs)}
    for (dataset, platform), fit in fits.items():
        if fit is None:
            row = pairs.index((dataset, platform))
            raise _refusal(source, band, code, (dataset, platform), records.ids[row])
    settled = [fit for pair in pairs if (fit := fits[pair]) is not None]
    scale, offset = (
        np.array([usual if v is None else v for v in records.asset_field(code, field).to_pylist()])
        for field, usual in zip(("scale", "offset"), _IDENTITY, strict=True)
    )
    slope = np.array([fit.slope for fit in settled])
    rules = records.asset_field(code, "rule").to_pylist()
    return {
        "scale": pa.array(slope * scale),
        "offset": pa.array(slope * offset + np.array([fit.offset for fit in settled])),
        "rule": pa.array([f"{rule or 'identity'}; {fit.words}" for rule, fit in zip(rules, settled, strict=True)]),
    }  # fmt: skip


def _fit(dataset: str | None, platform: str | None, code: str) -> _Fit | None:
    """Return what brings a band to OLI's reflectance; None: nothing that was published."""
    craft = re.sub(r"[\s_]+", "-", (platform or "").strip().lower())
    if dataset in _SENTINEL2:
        found = COEFFICIENTS.get(craft, {}).get(code)
        if found is None:
            return None
        return _Fit(*found, f"then x {found[0]:g} {found[1]:+g}: from {craft} to OLI, HLS user guide")
    own, words = _ALIKE.get(dataset or "", (frozenset(), ""))
    if code not in own or (dataset == "landsat-c2-l2" and craft not in _OLI_PLATFORMS):
        return None
    return _Fit(*_IDENTITY, words)


def _refusal(
    source: str, band: str, code: str, pair: tuple[str | None, str | None], record: str
) -> PlanError:
    dataset, platform = pair
    known = dataset in _SENTINEL2 or dataset in _ALIKE
    own = _MSI_BANDS if dataset in _SENTINEL2 else _ALIKE[str(dataset)][0] if known else frozenset()
    if known and code not in own:
        remedy = "Choose others, or name those to adjust, such as units={'red': 'oli_reflectance'}."
        remedy += " Near infrared like OLI's is 'nir08', B8A." if code == "B08" else ""
    elif known:
        crafts = [*sorted(COEFFICIENTS), *sorted(_OLI_PLATFORMS)]
        remedy = f"Choose the records: .where(('platform', 'in', {crafts})), as their catalog spells them."
    else:
        remedy = "Join it as a source of its own, with units='reflectance'."
        if dataset is None:
            remedy += " If it is one of these, say so as you build it: dataset='sentinel-2-l2a'."
    return PlanError(
        f"harmonize(units='oli_reflectance') of source {source!r}",
        f"band {band!r}: {code} of dataset {dataset}, platform {platform}, in record {record!r}",
        "what HLS published: coastal, blue, green, red, nir08, swir16 and swir22 of Sentinel-2A and Sentinel-2B at "
        "level 2A; Landsat 8 and 9, and HLS, as they are",
        remedy,
    )
