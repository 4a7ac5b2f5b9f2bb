# SPDX-License-Identifier: Apache-2.0
"""Drawings of records: where their footprints lie, and how much of the area each date covers, clear and cloudy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import shapely
from numpy.typing import NDArray

from rasteret_dask.display.colours import INK, LINES, mixed
from rasteret_dask.errors import PlanError
from rasteret_dask.show.plot import for_any_page, pyplot

__all__ = ["Day", "days_of", "plot_records"]

COLUMNS = ("id", "datetime", "eo:cloud_cover", "geometry")
"""What :func:`plot_records` looks at."""


@dataclass(frozen=True, slots=True)
class Day:
    """What the records of one member cover on one day (UTC)."""

    date: np.datetime64
    covered: float
    """Share of the area of all footprints."""
    cloudy: float
    """Share of the area that is covered and cloudy: the records' own cloud cover, weighed by area; NaN: not stated."""
    records: int


def days_of(table: pa.Table, area: Any) -> list[Day]:
    """Return what each day covers of an area.

    Parameters
    ----------
    table
        Records with ``COLUMNS``; those without a time or an outline are left out.
    area
        A shapely geometry in degrees.
    """
    shapes = shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False))
    stamps = np.array(table.column("datetime").cast(pa.timestamp("us")).to_numpy(), dtype="datetime64[D]")
    clouds = table.column("eo:cloud_cover").to_numpy().astype(np.float64)
    there = ~(np.isnat(stamps) | shapely.is_missing(shapes) | shapely.is_empty(shapes))
    total = _size(np.array([area]))[0]
    days = []
    for date in np.unique(stamps[there]):
        own = np.flatnonzero(there & (stamps == date))
        covered = _size(np.array([shapely.intersection(shapely.union_all(shapes[own]), area)]))[0] / total
        weights = _size(shapes[own])
        stated = ~np.isnan(clouds[own])
        cloud = np.average(clouds[own][stated], weights=weights[stated]) / 100 if stated.any() else np.nan
        days.append(Day(date, float(covered), float(covered * cloud), len(own)))
    return days


def _size(shapes: NDArray[Any]) -> NDArray[np.float64]:
    """Return areas in square degrees of latitude: shares of an area need no more."""
    boxes = shapely.bounds(shapes)
    return np.asarray(shapely.area(shapes) * np.cos(np.radians((boxes[:, 1] + boxes[:, 3]) / 2)))


def plot_records(members: Sequence[tuple[str, pa.Table]]) -> Any:
    """Draw footprints, and below them a calendar of what each day covers.

    Parameters
    ----------
    members
        Name and records (``COLUMNS``) of each member.

    Returns
    -------
    matplotlib.figure.Figure
        A bar a day and member: as high as the share of the area that is covered, pale where it is cloudy.

    Raises
    ------
    PlanError
        When no record has an outline.
    MissingExtraError
        When matplotlib is not installed.
    """
    pyplot()
    from matplotlib import dates as ticks
    from matplotlib.figure import Figure

    ticking: Any = ticks  # its classes have no annotations

    shapes = [shapely.from_wkb(t.column("geometry").to_numpy(zero_copy_only=False)) for _, t in members]
    there = [own[~(shapely.is_missing(own) | shapely.is_empty(own))] for own in shapes]
    if not sum(map(len, there)):
        raise PlanError("plot", "no record with an outline", "at least one")
    area = shapely.union_all(np.concatenate(there))
    colours = {name: LINES[i % len(LINES)] for i, (name, _) in enumerate(members)}
    figure = Figure(figsize=(7.5, 4.2 + 1.1 * len(members)), layout="constrained")
    figure.patch.set_alpha(0)
    ratios = [3.2, *[0.9] * len(members)]
    axes, *calendars = figure.subplots(1 + len(members), 1, height_ratios=ratios)
    _footprints(
        axes, area, [(name, own, colours[name]) for (name, _), own in zip(members, there, strict=True)]
    )
    every = [(name, days_of(table, area)) for name, table in members]
    dates = [day.date for _, days in every for day in days]
    for calendar, (name, days) in zip(calendars, every, strict=True):
        _calendar(calendar, name, days, colours[name])
        if dates:
            pad = max((max(dates) - min(dates)) // 40, np.timedelta64(1, "D"))
            calendar.set_xlim(min(dates) - pad, max(dates) + pad)
            locator = ticking.AutoDateLocator()
            calendar.xaxis.set_major_locator(locator)
            calendar.xaxis.set_major_formatter(ticking.ConciseDateFormatter(locator))
        for_any_page(calendar)
        calendar.xaxis.get_offset_text().set_color(INK)
    for calendar in calendars[:-1]:
        calendar.tick_params(labelbottom=False)
    calendars[0].set_title(
        "Share of the area covered each day; pale: cloudy", loc="left", fontsize=9, color=INK
    )
    return figure


def _footprints(axes: Any, area: Any, members: Sequence[tuple[str, NDArray[Any], str]]) -> None:
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    handles = []
    for name, shapes, colour in sorted(
        members, key=lambda one: -_size(one[1]).max(initial=0.0)
    ):  # small ones on top
        rings = [
            shapely.get_coordinates(r)
            for r in shapely.get_exterior_ring(shapely.get_parts(shapes))
            if r is not None
        ]
        alpha = max(1 - 0.5 ** (1 / max(len(rings), 1)), 0.01)  # all of the same ground are half opaque
        fill = PolyCollection(rings, facecolors=colour, edgecolors="none", alpha=alpha)
        axes.add_collection(fill)
        axes.add_collection(
            PolyCollection(rings, facecolors="none", edgecolors=colour, linewidths=0.6, alpha=0.6)
        )
        handles.append(Patch(facecolor=colour, label=f"{name} ({len(shapes):,})"))
    _, south, _, north = shapely.bounds(area)
    axes.autoscale_view()
    axes.set_aspect(1 / max(np.cos(np.radians((south + north) / 2)), 0.05))
    axes.set(xlabel="Longitude (degrees)", ylabel="Latitude (degrees)")
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, labelcolor=INK,
                borderaxespad=0.2, borderpad=0, handlelength=1, handleheight=1)  # fmt: skip
    for_any_page(axes)


def _calendar(axes: Any, name: str, days: Sequence[Day], colour: str) -> None:
    if not days:
        axes.text(
            0.01, 0.5, f"{name}: no dates", transform=axes.transAxes, color=INK, fontsize=8, va="center"
        )
    dates = np.array([day.date for day in days], dtype="datetime64[D]")
    covered = np.array([day.covered for day in days])
    cloudy = np.array([day.cloudy for day in days])
    clear = covered - np.nan_to_num(cloudy)
    width = np.timedelta64(20, "h")
    axes.bar(dates, clear, width=width, color=colour, label="clear")
    axes.bar(
        dates,
        np.nan_to_num(cloudy),
        width=width,
        bottom=clear,
        color=mixed(colour, "#b3b3b3", 0.55),
        alpha=0.55,
        label="cloudy",
    )
    axes.set_ylim(0, 1.02)
    axes.set_yticks([0, 1], ["0", "100 %"])
    axes.set_ylabel(name + ("" if not len(days) or not np.isnan(cloudy).all() else "\n(clouds\nnot stated)"))
