# SPDX-License-Identifier: Apache-2.0
"""Spectra of a few points: as members store them, and as a harmonize step makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.display.colours import INK, LINES
from rasteret_dask.errors import PlanError
from rasteret_dask.geometries.points import sample_points
from rasteret_dask.geometries.windows import geometries_of
from rasteret_dask.planning.optimize import optimize
from rasteret_dask.planning.plan import (
    Harmonize,
    HarmonizeSpec,
    Join,
    Merge,
    Node,
    Source,
    children,
    leaves,
    spec_field,
    with_children,
)
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.resolve import resolve_source
from rasteret_dask.rules.units import Raw, Units
from rasteret_dask.show.plot import for_any_page, pyplot
from rasteret_dask.tasks.context import ReadContext

__all__ = ["NANOMETRES", "Spectrum", "plot_spectra", "spectra_of"]

NANOMETRES = {
    "coastal": 443, "blue": 490, "green": 560, "yellow": 600, "red": 665, "rededge071": 704, "rededge075": 740,
    "rededge078": 783, "nir": 842, "nir08": 865, "nir09": 945, "cirrus": 1375, "swir16": 1610, "swir22": 2190,
}  # fmt: skip
"""Common name -> where it is drawn: centre wavelengths, nm, of Sentinel-2's bands (ESA, Sentinel-2 MSI spectral
responses); a sensor's own centres differ by a few nanometres."""

MOST_POINTS = 6
"""Points of a picture: a row each."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The values of one member's acquisitions at one point."""

    point: int
    member: str
    bands: tuple[str, ...]
    values: NDArray[np.float64]
    """Shape (acquisition, band). NaN where invalid."""
    harmonized: bool


def spectra_of(query: Query, points: Any) -> list[Spectrum]:
    """Read the values of a plan's members at points: as stored, then as the plan's harmonize steps make them.

    Parameters
    ----------
    query
        A plan of records; slots of time are left out: every acquisition counts.
    points
        As ``Collection.sample_points`` takes them.

    Raises
    ------
    PlanError
        When the plan is a join, or no record covers a point.
    """
    if isinstance(query.plan, Join):
        raise PlanError(
            "plot_spectra", "a join of several sources", "one source", "Draw one of its collections."
        )
    source = resolve_source("spectra", query.members(optimize(_by_acquisition(query.plan))))
    bands = source.plan.bands
    result = []
    for number, (leaf, member) in enumerate(zip(leaves(query.plan), source.plan.members, strict=True)):
        stored = Harmonize(
            _branch(query.plan, number, keep=False), HarmonizeSpec(bands=member.bands, units=_RAW)
        )
        result += _read(query.then(stored), points, leaf.name, bands, harmonized=False)
        if spec_field(query.plan, "bands") is not None or spec_field(query.plan, "units") is not None:
            made = Harmonize(_branch(query.plan, number, keep=True), HarmonizeSpec(bands=bands))
            result += _read(query.then(made), points, leaf.name, bands, harmonized=True)
    return result


_RAW = Units(Raw())


def _by_acquisition(node: Node) -> Node:
    """Return a plan without slots of time."""
    node = with_children(node, tuple(_by_acquisition(child) for child in children(node)))
    if isinstance(node, Harmonize):
        free = {"time": None, "max_acquisitions": None, "choose": None, "relative_to": None}
        return replace(node, spec=replace(node.spec, **free, tolerance=None, pick=None, fill=None))
    return node


def _branch(node: Node, number: int, keep: bool) -> Node:
    """Return the steps above one leaf of a plan, without slots of time; ``keep``: with its harmonize steps."""
    if isinstance(node, Merge):
        for child in node.children:
            count = len(list(leaves(child)))
            if number < count:
                return _branch(child, number, keep)
            number -= count
    if isinstance(node, Source):
        return node
    (child,) = children(node)
    below = _branch(child, number, keep)
    if isinstance(node, Harmonize):
        return _by_acquisition(replace(node, child=below)) if keep else below
    return with_children(node, (below,))


def _read(query: Query, points: Any, member: str, bands: Sequence[str], harmonized: bool) -> list[Spectrum]:
    frame = sample_points(query, points, None, ReadContext()).to_pandas()
    codes = list(dict.fromkeys(frame["band"]))
    result = []
    for point, own in frame.groupby("point_index"):
        values = own.pivot_table("value", "record_id", "band", dropna=False, sort=False)
        if len(values):
            found = values.reindex(columns=codes).to_numpy(dtype=np.float64)
            result.append(Spectrum(int(point), member, tuple(bands), found, harmonized))
    return result


def plot_spectra(query: Query, points: Any) -> Any:
    """Draw spectra: a row a point; values as stored on the left, as harmonized on the right; a colour a member.

    Returns
    -------
    matplotlib.figure.Figure
        Thin lines are acquisitions, thick ones their median.

    Raises
    ------
    PlanError
        When the plan is a join, no record covers a point, or there are more than six points.
    MissingExtraError
        When matplotlib is not installed.
    """
    pyplot()
    from matplotlib.figure import Figure

    count = len(geometries_of(points).shape)
    if count > MOST_POINTS:
        raise PlanError("plot_spectra", f"{count} points", f"at most {MOST_POINTS}: a row each")
    spectra = spectra_of(query, points)
    places = sorted({one.point for one in spectra})
    sides = [False, True] if any(one.harmonized for one in spectra) else [False]
    figure = Figure(figsize=(4.2 * len(sides) + 0.6, 2.3 * len(places) + 0.6), layout="constrained")
    figure.patch.set_alpha(0)
    grid = figure.subplots(len(places), len(sides), squeeze=False, sharex=True, sharey="col")
    names = list(dict.fromkeys(one.member for one in spectra))
    for row, place in zip(grid, places, strict=True):
        for axes, harmonized in zip(row, sides, strict=True):
            own = [one for one in spectra if (one.point, one.harmonized) == (place, harmonized)]
            _draw(axes, own, {name: LINES[i % len(LINES)] for i, name in enumerate(names)})
            for_any_page(axes)
        row[0].set_ylabel(f"point {place}", color=INK)
    for axes, harmonized in zip(grid[0], sides, strict=True):
        axes.set_title("as harmonized" if harmonized else "as stored", loc="left", fontsize=10, color=INK)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=4, frameon=False, labelcolor=INK)
    return figure


def _draw(axes: Any, spectra: Sequence[Spectrum], colours: Mapping[str, str]) -> None:
    bands = spectra[0].bands if spectra else ()
    where = np.array([NANOMETRES.get(band, np.nan) for band in bands], dtype=np.float64)
    in_nanometres = len(bands) > 0 and not np.isnan(where).any()
    x = where if in_nanometres else np.arange(len(bands), dtype=np.float64)
    order = np.argsort(x)
    for one in spectra:
        colour = colours[one.member]
        for values in one.values:
            axes.plot(x[order], values[order], color=colour, linewidth=0.6, alpha=0.45)
        valid = one.values[np.isfinite(one.values).all(axis=1)]
        if len(valid):
            middle = np.median(valid, axis=0)
            axes.plot(
                x[order],
                middle[order],
                color=colour,
                linewidth=2,
                marker="o",
                markersize=3.5,
                label=one.member,
            )
    if in_nanometres:
        axes.set_xlabel("Wavelength (nm)" if axes.get_subplotspec().is_last_row() else "")
    else:
        axes.set_xticks(x, bands)
