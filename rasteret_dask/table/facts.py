# SPDX-License-Identifier: Apache-2.0
"""What STAC properties say of a scene: its pass, tile, baseline and times."""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from rasteret_dask.errors import SourceError
from rasteret_dask.table.itemcrs import stated_crs

__all__ = ["ENDLESS", "Range", "facts_of", "instant", "range_of", "version_of"]

Range = tuple[dt.datetime | None, dt.datetime | None]

ENDLESS = (dt.datetime.min.replace(tzinfo=dt.UTC), dt.datetime.max.replace(tzinfo=dt.UTC))
"""The interval of a record that holds at any time: elevation, soil. Filters of times take it as any other."""

_LEAP_SECOND = re.compile(r"(:\d\d):60(?:\.\d+)?")
_MIDDLE = 5000  # of the years that a datetime can hold


def facts_of(properties: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of RECORD_SCHEMA that STAC properties settle, except times and geometry."""
    uri = str(properties.get("s2:product_uri") or "")
    cloud = properties.get("eo:cloud_cover")
    platform = properties.get("platform") or properties.get("eo:platform")
    return {
        "eo:cloud_cover": None if cloud is None else float(cloud),
        "platform": str(platform).lower().replace("_", "-") if platform else None,
        "datatake": _datatake(properties, uri),
        "sat:orbit_state": _text(properties.get("sat:orbit_state")),
        "orbit": _orbit(properties, uri),
        "tile": _tile(properties),
        "baseline": _text(properties.get("s2:processing_baseline") or properties.get("processing:version")),
        "created": _created(properties),
        "proj:epsg": stated_crs(properties),
    }


def instant(value: Any) -> dt.datetime | None:
    """Return a time as an aware UTC datetime, None for None; text is RFC 3339 or a date.

    Notes
    -----
    RFC 3339 (section 5.6) allows ``t`` and ``z`` in lower case, a blank in place of ``T``, and the second 60. A leap
    second becomes the last microsecond before it, so that it stays in its day; a time that UTC moves out of the
    years 1 to 9999 becomes the first or last one of these.

    Raises
    ------
    ValueError
        When it is neither.
    """
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip().upper()
        value = dt.datetime.fromisoformat(_LEAP_SECOND.sub(r"\1:59.999999", text))
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        value = dt.datetime(value.year, value.month, value.day)
    if not isinstance(value, dt.datetime):
        raise ValueError(f"no time: {value!r}")
    aware: dt.datetime = value if value.tzinfo is not None else value.replace(tzinfo=dt.UTC)
    try:
        return aware.astimezone(dt.UTC)
    except OverflowError:  # 9999-12-31T23:59:59-05:00
        edge = dt.datetime.max if aware.year > _MIDDLE else dt.datetime.min
        return edge.replace(tzinfo=dt.UTC)


def range_of(date_range: Any) -> Range:
    """Return (start, end) of a date range, half-open, in UTC; a date without time is its whole day, month or year.

    Raises
    ------
    SourceError
        When it cannot be understood.
    """
    if date_range is None:
        return None, None
    parts = date_range.split("/") if isinstance(date_range, str) else list(date_range)
    if len(parts) == 1:
        parts *= 2
    if len(parts) != 2:
        raise SourceError(f"date_range {date_range!r}", f"{len(parts)} parts", "(start, end)")
    try:
        start, end = (None if p in (None, "", "..") else p for p in parts)
        return _edge(start, 0), _edge(end, 1)
    except ValueError as error:
        raise SourceError(f"date_range {date_range!r}", str(error), "dates or RFC 3339 times") from error


def version_of(text: str) -> tuple[tuple[int, str], ...]:
    """Return a processing baseline as what sorts by its numbers: 9.1 before 05.10 before 10.0."""
    return tuple((int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text))


def _edge(value: Any, after: int) -> dt.datetime | None:
    """Return the start (``after=0``) or the exclusive end (1) of what a time or a date names."""
    if isinstance(value, dt.date) and not isinstance(value, dt.datetime):
        value = value.isoformat()
    if isinstance(value, str) and (parts := re.fullmatch(r"(\d{4})(?:-(\d\d))?(?:-(\d\d))?", value.strip())):
        whole = np.datetime64(parts[0])  # of unit year, month or day, as it is written
        unit, _ = np.datetime_data(whole.dtype)
        edge = (whole + np.asarray(after, f"timedelta64[{unit}]")).astype("datetime64[us]")
        return instant(np.minimum(edge, np.datetime64(dt.datetime.max)).item())  # nothing lies behind 9999
    return instant(value)


def _datatake(properties: Mapping[str, Any], uri: str) -> str | None:
    """Return e.g. ``GS2A_20240422T173911_046141``: Sentinel-2's datatake id without its baseline."""
    said = properties.get("s2:datatake_id")
    if said:
        return re.sub(r"_N\d\d\.?\d\d$", "", str(said))
    parts = re.match(r"(S2[A-D])_MSIL\w\w_(\d{8}T\d{6})_", uri)
    if parts is None:
        return None
    granule = str(properties.get("s2:granule_id") or properties.get("s2:tile_id") or "")
    absolute = re.search(r"_A(\d{6})_", granule)
    return f"G{parts[1]}_{parts[2]}" + (f"_{absolute[1]}" if absolute else "")


def _orbit(properties: Mapping[str, Any], uri: str) -> int | None:
    said = properties.get("sat:relative_orbit")
    if said is None and (found := re.search(r"_R(\d{3})_", uri)):
        said = found[1]
    said = properties.get("landsat:wrs_path") if said is None else said
    return None if said is None else int(said)


def _tile(properties: Mapping[str, Any]) -> str | None:
    """Return a grid code of the STAC grid extension, without leading zeros in MGRS zones."""
    code, mgrs = properties.get("grid:code"), properties.get("s2:mgrs_tile")
    parts = [properties.get(f"mgrs:{p}") for p in ("utm_zone", "latitude_band", "grid_square")]
    path, row = properties.get("landsat:wrs_path"), properties.get("landsat:wrs_row")
    if not code and mgrs:
        code = f"MGRS-{mgrs}"
    if not code and None not in parts:
        code = "MGRS-" + "".join(map(str, parts))
    if not code and path is not None and row is not None:
        code = f"WRS{properties.get('landsat:wrs_type') or 2}-{int(path):03d}{int(row):03d}"
    return re.sub(r"^MGRS-0", "MGRS-", str(code)) if code else None


def _created(properties: Mapping[str, Any]) -> dt.datetime | None:
    for key in ("created", "s2:generation_time", "landsat:product_generated"):
        if properties.get(key) is not None:
            return instant(properties[key])
    return None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)
