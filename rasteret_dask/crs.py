# SPDX-License-Identifier: Apache-2.0
"""A coordinate reference system (CRS) as an integer: its EPSG code, or a number that follows from its WKT2.

Columns, windows, jobs and kernels keep one integer a row. A CRS without an EPSG code gets a negative number, a hash of
what it says, which is the same in every process. Whatever takes numbers to another process takes the WKT2 along
(:func:`carried`, and :func:`bring` over there); a :class:`CrsNumber` pickles with its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from hashlib import blake2b
from math import pi
from operator import index
from typing import Any, SupportsIndex

import pyproj
from pyproj.exceptions import CRSError

from rasteret_dask.errors import GridError

__all__ = [
    "CrsNumber",
    "bring",
    "carried",
    "crs_of",
    "luggage",
    "number",
    "same",
    "spelled",
    "text",
    "travelling",
    "unpack",
    "wkt2",
]

_IDENTIFY = 20
"""The least confidence (percent) of candidates that PROJ names; each is compared by its parameters."""

_WKT2: dict[int, str] = {}
"""{negative number: WKT2} of the CRSs that this process has met."""

_LUGGAGE = b"rasteret_dask:crs"

_SI = {"metre": 1.0, "degree": pi / 180, "unity": 1.0}
"""What a unit is that PROJJSON names by a word alone (PROJJSON 0.7, "unit")."""

_LONLAT = (4326, 4269)
"""Compared with every geographic CRS: PROJ knows their twins with longitude first (OGC:CRS84) by no EPSG code."""

_UNKNOWN_DATUM = ("unknown", "unnamed", "notspecified", "undefined")
_INIT = re.compile(r"\+?init=(\w+:\w+)(?:\s+\+type=crs)?\s*", re.IGNORECASE)


class CrsNumber(int):
    """The number of a CRS without an EPSG code; it pickles with the WKT2, so that another process has both."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return _arrived, (int(self), wkt2(self))


def _arrived(value: int, wkt: str) -> CrsNumber:
    bring({value: wkt})
    return CrsNumber(value)


def number(crs: Any) -> int:
    """Return the number of a CRS: the EPSG code of its horizontal part, or a negative number where it has none.

    Parameters
    ----------
    crs
        A number of this module, an EPSG code, text such as ``"EPSG:3035"``, ``"ESRI:102008"`` or ``"OGC:CRS84"``,
        WKT 1 or 2, PROJJSON (text or dict), a PROJ string, or a CRS of pyproj, rasterio or odc-geo.

    Returns
    -------
    int
        A CRS that is written out, and equals a registered one but for its names, has that one's EPSG code. Where
        the datum is not specified, its ellipsoid decides. Two others that differ in names only have one number.

    Raises
    ------
    GridError
        When PROJ does not know it, or it has no horizontal part.

    Examples
    --------
    >>> from rasteret_dask.crs import number, text
    >>> number("EPSG:32619"), number(26911), text(3035)
    (32619, 26911, 'EPSG:3035')
    >>> text(number("ESRI:102008")), number("ESRI:102008") < 0
    ('ESRI:102008', True)
    """
    if isinstance(crs, str):
        return _number_of_text(crs.strip())
    if isinstance(crs, Mapping):
        if "init" in crs:
            return _number_of_text(str(crs["init"]))
        return _number_of_text(json.dumps(crs, sort_keys=True) if "type" in crs else _proj_string(crs))
    if isinstance(crs, SupportsIndex) and not isinstance(crs, bool):
        return _number_of_int(index(crs))
    if hasattr(crs, "to_wkt"):
        return _number_of_text(str(crs.to_wkt()))
    raise GridError("a CRS", f"{type(crs).__name__} {crs!r:.80}", "a code, WKT, PROJJSON or a CRS object")


@lru_cache(maxsize=1024)
def crs_of(crs_number: int) -> pyproj.CRS:
    """Return the CRS of a number, made once a process.

    Raises
    ------
    GridError
        For a code that PROJ does not know, and for a negative number whose WKT2 nobody brought to this process.
    """
    code = int(crs_number)
    if code < 0:
        return _parsed(wkt2(code))
    if code == 0:
        raise GridError("a CRS", "none", "an EPSG code, or another CRS")
    try:
        return pyproj.CRS.from_epsg(code)
    except CRSError as error:
        raise _unknown(f"EPSG:{code}", error) from None


def travelling(crs_number: SupportsIndex) -> int:
    """Return a number that pickles with its WKT2: for values that go to other processes one by one."""
    code = index(crs_number)
    return code if code >= 0 else CrsNumber(code)


def text(crs_number: int) -> str:
    """Return what a CRS is called in messages: ``"EPSG:32619"``, ``"ESRI:102008"``, or its name and projection."""
    code = int(crs_number)
    if code > 0:
        return f"EPSG:{code}"
    if code == 0:
        return "no CRS"
    if code not in _WKT2:
        return f"CRS number {code}"
    return _title(code)


@lru_cache(maxsize=1024)
def _title(code: int) -> str:
    crs = crs_of(code)
    authority = crs.to_authority(min_confidence=100)
    if authority is not None:
        return ":".join(authority)
    method = "" if crs.coordinate_operation is None else f" ({crs.coordinate_operation.method_name})"
    return f"CRS {crs.name!r}{method}"


def spelled(crs_number: int) -> str:
    """Return a CRS as other libraries take it: ``"EPSG:32619"``, or the WKT2 of one without a code."""
    return f"EPSG:{int(crs_number)}" if crs_number > 0 else wkt2(crs_number)


def wkt2(crs_number: int) -> str:
    """Return the WKT2 (ISO 19162:2019) of a number's CRS.

    Raises
    ------
    GridError
        As :func:`crs_of`.
    """
    code = int(crs_number)
    if code >= 0:
        return str(crs_of(code).to_wkt())
    if code not in _WKT2:
        raise GridError(
            f"CRS number {code}", "no WKT2 of it in this process", "a CRS that was read or given before",
            "Open the table, job or store that it comes from: these carry the WKT2 of their CRSs.",
        )  # fmt: skip
    return _WKT2[code]


def same(one: int, other: int) -> bool:
    """Tell whether two numbers stand for one CRS: EPSG has twins that differ in names and the order of axes only."""
    return one == other or bool(one and other and _is_twin(int(one), int(other)))


@lru_cache(maxsize=1024)
def _is_twin(one: int, other: int) -> bool:
    essences = [_essence(crs_of(code)) for code in (one, other)]
    return bool(essences[0] == essences[1])


def carried(numbers: Iterable[int]) -> dict[int, str]:
    """Return {number: WKT2} of those without an EPSG code, in ascending order: what goes along with the numbers."""
    return {code: wkt2(code) for code in sorted({int(n) for n in numbers}) if code < 0}


def bring(wkts: Mapping[Any, str]) -> None:
    """Make numbers from elsewhere known in this process.

    Parameters
    ----------
    wkts
        What :func:`carried` returned; keys may be text, as in JSON.

    Raises
    ------
    GridError
        When a WKT2 is none, or a number stands for another CRS here.
    """
    for key, wkt in wkts.items():
        code = int(key)
        if _WKT2.get(code) == wkt:
            continue
        if code >= 0:
            raise GridError("CRSs of a table, job or store", f"number {code}", "negative numbers")
        _keep(code, _parsed(wkt), wkt)


def luggage(numbers: Iterable[int]) -> dict[bytes, bytes]:
    """Return the key-value of an Arrow schema that takes along what :func:`carried` returns; empty for codes alone."""
    wkts = carried(numbers)
    return {_LUGGAGE: json.dumps(wkts).encode()} if wkts else {}


def unpack(metadata: Mapping[bytes, bytes] | None) -> dict[str, str]:
    """Bring in what :func:`luggage` put into a schema's metadata, and return it: {number: WKT2}.

    Raises
    ------
    GridError
        As :func:`bring`.
    """
    packed: dict[str, str] = json.loads((metadata or {}).get(_LUGGAGE, b"{}"))
    bring(packed)
    return packed


@lru_cache(maxsize=4096)
def _number_of_int(code: int) -> int:
    if code < 0:
        wkt2(code)  # a GridError for one that nobody brought
        return CrsNumber(code)
    crs = crs_of(code)
    return code if _is_flat(crs) else _number_of(_horizontal(crs), f"EPSG:{code}")


@lru_cache(maxsize=4096)
def _number_of_text(crs: str) -> int:
    if match := re.fullmatch(r"(?:epsg:)?(\d+)", crs, re.IGNORECASE):
        return _number_of_int(int(match[1]))
    return _number_of(_horizontal(_parsed(crs)), crs)


def _number_of(crs: pyproj.CRS, source: str) -> int:
    if not (crs.is_projected or crs.is_geographic or crs.is_derived):
        raise GridError(
            f"CRS {source[:80]!r}", f"{crs.name!r}, a {crs.type_name}", "a map, or longitudes and latitudes"
        )
    code = _epsg(crs)
    if code is not None:
        return code
    essence = json.dumps(_essence(crs), sort_keys=True)
    digest = int.from_bytes(blake2b(essence.encode(), digest_size=8).digest(), "big")
    code = -1 - digest % (2**31 - 2)
    _keep(code, crs, crs.to_wkt())
    return CrsNumber(code)


def _keep(code: int, crs: pyproj.CRS, wkt: str) -> None:
    """Keep the first WKT2 of a number; names may differ, nothing else."""
    kept = _WKT2.setdefault(code, wkt)
    if kept != wkt and _essence(_parsed(kept)) != _essence(crs):
        raise GridError(
            f"CRS {crs.name!r}", f"the number {code} of another CRS, {kept[:80]}", "a number of its own"
        )


def _epsg(crs: pyproj.CRS) -> int | None:
    """Return the EPSG code of the registered CRS that this one equals but for names and the order of axes."""
    essence = _essence(crs)
    anonymous = '"datum": ""' in json.dumps(essence)
    code = None if anonymous else crs.to_epsg()
    if code is not None:
        return _number_of_int(int(code))
    codes = [int(a.code) for a in crs.list_authority(auth_name="EPSG", min_confidence=_IDENTIFY)]
    equal = []
    for candidate in (*codes, *(_LONLAT if crs.is_geographic else ())):
        registered = _horizontal(pyproj.CRS.from_epsg(candidate))
        if _essence(registered, anonymous) == essence:
            equal.append((_datum(registered) != "WGS 84", candidate))
    # Without a datum, codes on one ellipsoid are equal. WGS 84's ellipsoid means WGS 84; no other is that clear.
    clear = len(set(equal)) == 1 or (len(equal) > 1 and not min(equal)[0])
    return min(equal)[1] if clear else None


def _datum(crs: pyproj.CRS) -> str:
    return "" if crs.geodetic_crs is None else str(crs.geodetic_crs.name)


def _is_flat(crs: pyproj.CRS) -> bool:
    return not crs.is_compound and not crs.is_bound and len(crs.axis_info) == 2


def _horizontal(crs: pyproj.CRS) -> pyproj.CRS:
    """Return the part of a CRS that places pixels: no heights, and no shift to WGS 84 beside a registered CRS."""
    if crs.is_compound:
        return _horizontal(crs.sub_crs_list[0])
    if crs.is_bound and crs.source_crs is not None:
        source = _horizontal(crs.source_crs)
        return source if _epsg(source) is not None else crs
    return crs.to_2d() if len(crs.axis_info) == 3 else crs


def _parsed(crs: str) -> pyproj.CRS:
    old = _INIT.fullmatch(crs)
    try:
        return pyproj.CRS.from_user_input(old[1] if old else crs)
    except CRSError as error:
        raise _unknown(f"{crs[:80]!r}", error) from None


def _proj_string(parameters: Mapping[str, Any]) -> str:
    """Return PROJ parameters, as Fiona and older rasterio gave them, as one string."""
    words = (f"+{k}" if v is True else f"+{k}={v}" for k, v in sorted(parameters.items()) if v is not False)
    return " ".join(words)


def _unknown(crs: str, error: CRSError) -> GridError:
    reason = str(error).splitlines()[0] if str(error) else "nothing"
    return GridError(f"CRS {crs}", f"none that PROJ knows ({reason[:160]})", "an EPSG code, WKT or PROJJSON")


def _essence(crs: pyproj.CRS, anonymous: bool = False) -> Any:
    """Return what places a CRS on the Earth, in SI units, without names, ids and the order of axes.

    Parameters
    ----------
    crs
        Any CRS.
    anonymous
        Leave the names of datums out as well.
    """
    return _placing(crs.to_json_dict(), anonymous)


def _placing(node: Any, anonymous: bool) -> Any:
    if isinstance(node, list):
        return [_placing(each, anonymous) for each in node]
    if isinstance(node, int | float) and not isinstance(node, bool):
        return _rounded(float(node))
    if not isinstance(node, dict):
        return node
    if "semi_major_axis" in node or "radius" in node:
        return _ellipsoid(node)
    parts: dict[str, Any] = {}
    for key, part in node.items():
        if key in ("datum", "datum_ensemble"):
            parts["datum"] = "" if anonymous else _datum_name(part["name"])
            parts["ellipsoid"] = _ellipsoid(part["ellipsoid"])
            parts["meridian"] = _measure(part.get("prime_meridian", {}).get("longitude", 0.0), "degree")
        elif key == "coordinate_system":
            parts["axes"] = sorted([a["direction"], _factor(a.get("unit", "metre"))] for a in part["axis"])
        elif key == "parameters":
            values = {
                _word(p["name"]): _measure(p["value"], p.get("unit", "unity")) for p in part if "value" in p
            }
            files = {_word(p["name"]): p["value"] for p in part if isinstance(p.get("value"), str)}
            parts["parameters"] = {name: value for name, value in sorted(values.items()) if value} | files
        elif key == "method":
            parts["method"] = _word(part["name"])
        elif key in ("base_crs", "conversion", "source_crs", "target_crs", "transformation"):
            parts[key] = _placing(part, anonymous)
    return {**parts, "type": node.get("type", "")}


def _ellipsoid(node: Mapping[str, Any]) -> list[float]:
    """Return the semi-major axis in metres, and the inverse flattening (0 of a sphere)."""
    if "radius" in node:
        return [_measure(node["radius"], "metre"), 0.0]
    major = _measure(node["semi_major_axis"], "metre")
    if "inverse_flattening" in node:
        return [major, _rounded(float(node["inverse_flattening"]), 10)]
    minor = _measure(node["semi_minor_axis"], "metre")
    return [major, 0.0 if major == minor else _rounded(major / (major - minor), 10)]


def _measure(value: Any, unit: Any) -> float:
    """Return a value of PROJJSON in metres, radians or as it is."""
    if isinstance(value, str):
        return 0.0
    if isinstance(value, Mapping):
        value, unit = value["value"], value["unit"]
    return _rounded(float(value) * _factor(unit))


def _factor(unit: Any) -> float:
    return _rounded(_SI[unit] if isinstance(unit, str) else float(unit["conversion_factor"]))


def _rounded(value: float, digits: int = 11) -> float:
    """Return a number to so many digits: WKT 1 writes angles and axes with fifteen, and not all of them right."""
    return float(f"{value:.{digits}g}") + 0.0


def _datum_name(name: str) -> str:
    word = _word(name.removesuffix(" ensemble"))
    return "" if word.startswith(_UNKNOWN_DATUM) else word


def _word(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())
