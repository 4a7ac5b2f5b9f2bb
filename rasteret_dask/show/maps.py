# SPDX-License-Identifier: Apache-2.0
"""Where chips and records lie: their outlines for a picture, and interactive maps of them."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from rasteret_dask.crs import crs_of
from rasteret_dask.display.colours import colours_of
from rasteret_dask.errors import PlanError
from rasteret_dask.extras import needs

__all__ = ["explore_chips", "explore_records", "outlines_of"]

MOST_SHAPES = 5_000
"""Shapes of an interactive map: some 400 bytes each, in a page that a browser must hold."""


def outlines_of(table: pa.Table) -> tuple[list[NDArray[np.float64]], tuple[str, str], float]:
    """Return each chip's corners (x, y), the names of the axes, and how much longer a unit of y is than one of x."""
    zones = table.column("epsg").unique().to_pylist()
    if len(zones) == 1:
        west, south, east, north = (
            table.column(c).to_numpy() / 1000 for c in ("xmin", "ymin", "xmax", "ymax")
        )
        corners = np.stack([west, south, east, south, east, north, west, north], -1).reshape(-1, 4, 2)
        zone = crs_of(int(zones[0])).name.removeprefix("WGS 84 / ")
        return list(corners), (f"Easting, {zone} (km)", "Northing (km)"), 1.0
    shapes = shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False))
    rings = [shapely.get_coordinates(shape) for shape in shapes]
    middle = float(np.mean([ring[:, 1].mean() for ring in rings]))
    return rings, ("Longitude (degrees)", "Latitude (degrees)"), float(1 / np.cos(np.radians(middle)))


def explore_chips(table: pa.Table, tiles: str | None) -> Any:
    """Return an interactive map of a chip table, coloured by split; a popup tells a chip's id, split, dates and CRS.

    Parameters
    ----------
    table
        The chip table.
    tiles
        What folium draws behind them; None: nothing.

    Raises
    ------
    PlanError
        When there is no chip, or there are too many for a page.
    MissingExtraError
        When folium is not installed.
    """
    split = np.array([name or "" for name in table.column("split").to_pylist()], dtype=object)
    fields = {"chip": "chip_id", "split": "split", "date": "datetime", "EPSG": "epsg"}
    return _map("chips", table, fields, split, tiles)


def explore_records(table: pa.Table, tiles: str | None) -> Any:
    """Return an interactive map of records' outlines, coloured by collection; a popup tells id, date and clouds.

    Parameters
    ----------
    table
        Records: id, collection, datetime, ``eo:cloud_cover``, platform and geometry.
    tiles
        What folium draws behind them; None: nothing.

    Raises
    ------
    PlanError
        When there is no record with an outline, or there are too many for a page.
    MissingExtraError
        When folium is not installed.
    """
    fields = {
        "record": "id", "collection": "collection", "date": "datetime", "clouds (%)": "eo:cloud_cover",
        "platform": "platform",
    }  # fmt: skip
    label = np.array([name or "" for name in table.column("collection").to_pylist()], dtype=object)
    return _map("records", table, fields, label, tiles)


def _map(
    what: str, table: pa.Table, fields: Mapping[str, str], label: NDArray[Any], tiles: str | None
) -> Any:
    with needs("map", f"an interactive map of {what}"):
        import folium

    geometry = table.column("geometry").to_numpy(zero_copy_only=False)
    shapes = shapely.from_wkb(geometry)
    there = np.flatnonzero(~(shapely.is_missing(shapes) | shapely.is_empty(shapes)))
    if not len(there):
        raise PlanError("explore", f"no {what} with an outline", "at least one")
    if len(there) > MOST_SHAPES:
        raise PlanError(
            "explore", f"{len(there):,} {what}", f"at most {MOST_SHAPES:,}, which a browser can show",
            "Choose some: sample(1000).explore(); plot() draws all of them.",
        )  # fmt: skip
    west, south, east, north = shapely.total_bounds(shapes[there])
    result = folium.Map(location=[(south + north) / 2, (west + east) / 2], control_scale=True, tiles=tiles)
    columns = [(title, table.column(name).to_pylist()) for title, name in fields.items()]
    for name, colour in colours_of(label.tolist()).items():
        own = there[label[there] == name]
        layer = folium.FeatureGroup(name=_html(f"{name or what} ({len(own):,})"))
        for row in own.tolist():
            lines = [f"<b>{title}</b> {_html(_shown(values[row]))}" for title, values in columns]
            folium.GeoJson(
                shapely.geometry.mapping(shapes[row]),
                style_function=lambda _, colour=colour: {"color": colour, "weight": 1, "fillOpacity": 0.35},
            ).add_child(folium.Popup("<br>".join(lines), max_width=360)).add_to(layer)
        layer.add_to(result)
    folium.LayerControl().add_to(result)
    result.fit_bounds([[south, west], [north, east]])
    return result


def _shown(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _html(text: str) -> str:
    """Escape text for HTML inside a JavaScript template literal, as folium writes popups."""
    return (
        escape(text).replace("\\", "&#92;").replace("`", "&#96;").replace("$", "&#36;").replace("{", "&#123;")
    )
