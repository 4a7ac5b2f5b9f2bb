"""Drawings of chips: where they lie, and what is in them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import shapely
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.extras import needs
from rasteret_dask.show.pictures import Picture, by_source, pictures_of

__all__ = ["contact_sheet", "plot_chips", "plot_demo"]

SPLIT_COLOURS = {"train": "#4878a8", "val": "#eda83b", "test": "#b5446e"}
"""Told apart by colour-blind readers, and in print by their lightness."""

_FURTHER = ("#5a9367", "#8a6fb0", "#7f5f3f", "#3fa7a3", "#c96f4a")
_NO_SPLIT, _INVALID, _HATCH, _INK = "#c9c9c9", "#e4e4e4", "#b4b4b4", "#333333"


def plot_chips(table: pa.Table, ax: Any = None) -> Any:
    """Draw the map of chips, coloured by split.

    Parameters
    ----------
    table
        A chip table: ``Chips.table``, or a loaded one.
    ax
        Matplotlib axes to draw on; None: new ones.

    Returns
    -------
    matplotlib.axes.Axes
        In kilometres of the UTM zone where all chips lie in one, else in degrees. Chips without a split are grey.

    Raises
    ------
    PlanError
        When the table has no chips.
    MissingExtraError
        When matplotlib is not installed.
    """
    if not table.num_rows:
        raise PlanError("plot", "no chips", "at least one chip")
    plt = _pyplot()
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    axes = plt.subplots(figsize=(6, 6), layout="constrained")[1] if ax is None else ax
    corners, names, aspect = _outlines(table)
    split = np.array([name or "" for name in table.column("split").to_pylist()], dtype=object)
    handles = []
    for label, colour in _colours(split).items():
        own = np.flatnonzero(split == label)
        outlines = [corners[i] for i in own]
        axes.add_collection(PolyCollection(outlines, facecolors=colour, edgecolors="white", linewidths=0.4))
        told = label or ("no split" if np.any(split != "") else "chips")
        handles.append(Patch(facecolor=colour, label=f"{told} ({len(own):,})"))
    axes.autoscale_view()
    axes.set_aspect(aspect, anchor="N")
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.tick_params(labelsize="small")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, borderaxespad=0.2,
        borderpad=0, columnspacing=1.2, handlelength=1, handleheight=1,
    )  # fmt: skip
    return axes


def contact_sheet(chips: xr.Dataset | xr.DataTree, n: int = 5, *, figure: Any = None) -> Any:
    """Draw a few chips: a row each, a column for each time slot of each source.

    Parameters
    ----------
    chips
        What ``Chips.to_xarray()`` returns, or a store opened with plain xarray. Only the chips drawn are loaded,
        one by one.
    n
        How many chips, evenly taken.
    figure
        Matplotlib figure or subfigure to draw on; None: a new one.

    Returns
    -------
    matplotlib.figure.Figure
        Sources with red, green and blue in natural colour; of others the three main components of their bands.
        All pictures of a source share one stretch (its 0.2nd to 98th percentile). Invalid pixels are hatched.

    Raises
    ------
    PlanError
        When there is no chip to draw.
    MissingExtraError
        When matplotlib is not installed.
    """
    plt = _pyplot()
    sources = by_source(chips)
    total = min((s.sizes["chip"] for s in sources.values()), default=0)
    if not total or n < 1:
        raise PlanError("contact_sheet", f"{total} chips, {n} asked for", "at least one chip to draw")
    rows = np.unique(np.linspace(0, total - 1, min(n, total)).round().astype(int))
    pictures = [pictures_of(name, source, rows) for name, source in sources.items()]
    table = [[p for source in pictures for p in source[i]] for i in range(len(rows))]
    columns = len(table[0])
    size = (1.55 * columns, 1.7 * len(rows) + 0.4)
    canvas = plt.figure(figsize=size, layout="constrained") if figure is None else figure
    grid = canvas.subplots(len(rows), columns, squeeze=False)
    for i, row in enumerate(table):
        for axes, picture in zip(grid[i], row, strict=True):
            _draw(axes, picture, title=picture.column if i == 0 else "")
    return canvas


def plot_demo(table: pa.Table, chips: xr.Dataset | xr.DataTree, n: int = 5) -> Any:
    """Draw the map of chips beside a contact sheet of some of them, in one figure.

    Parameters
    ----------
    table
        The chip table, all splits.
    chips
        Chips to show, as for :func:`contact_sheet`.
    n
        How many of them.

    Returns
    -------
    matplotlib.figure.Figure
        Not shown; save it with ``figure.savefig``.
    """
    plt = _pyplot()
    first, *others = by_source(chips).values()
    columns = sum(s.sizes["time"] for s in (first, *others))
    height = 1.62 * n + 0.9
    widths = (0.92 * height, 1.48 * columns)
    figure = plt.figure(figsize=(sum(widths), height), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=widths, wspace=0.03)
    plot_chips(table, ax=left.subplots())
    contact_sheet(chips, n, figure=right)
    west, _, east, _ = first["bounds"].values[0]
    split = ", ".join(sorted({str(s) for s in first["split"].values.tolist()} - {""}))
    shown = f"{n} of {first.sizes['chip']:,} {split} chips, {(east - west) / 1000:g} km wide".replace(
        "  ", " "
    )
    for part, title in ((left, "Chips by split"), (right, f"{shown} (hatched: cloud or no data)")):
        part.suptitle(title, x=0.02, ha="left", size="medium", weight="bold", color=_INK)
    return figure


def _pyplot() -> Any:
    with needs("plot", "drawing a picture"):
        import matplotlib.pyplot as plt
    return plt


def _colours(split: NDArray[Any]) -> dict[str, str]:
    """Return a colour for each label, known splits first, chips without one last."""
    found = set(split.tolist())
    result = {name: colour for name, colour in SPLIT_COLOURS.items() if name in found}
    others = sorted(found - set(result) - {""})
    result |= {name: _FURTHER[i % len(_FURTHER)] for i, name in enumerate(others)}
    if "" in found:
        result[""] = _NO_SPLIT if len(found) > 1 else SPLIT_COLOURS["train"]
    return result


def _outlines(table: pa.Table) -> tuple[list[NDArray[np.float64]], tuple[str, str], float]:
    """Return each chip's corners (x, y), the names of the axes, and how much longer a unit of y is than one of x."""
    zones = table.column("epsg").unique().to_pylist()
    if len(zones) == 1:
        west, south, east, north = (
            table.column(c).to_numpy() / 1000 for c in ("xmin", "ymin", "xmax", "ymax")
        )
        corners = np.stack([west, south, east, south, east, north, west, north], -1).reshape(-1, 4, 2)
        zone = f"UTM zone {zones[0] % 100}N"
        return list(corners), (f"Easting, {zone} (km)", "Northing (km)"), 1.0
    shapes = shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False))
    rings = [shapely.get_coordinates(shape) for shape in shapes]
    middle = float(np.mean([ring[:, 1].mean() for ring in rings]))
    return rings, ("Longitude (degrees)", "Latitude (degrees)"), float(1 / np.cos(np.radians(middle)))


def _draw(axes: Any, picture: Picture, title: str) -> None:
    height, width = picture.rgba.shape[:2]
    if (picture.rgba[..., 3] == 0).any():
        axes.fill_between([-0.5, width - 0.5], -0.5, height - 0.5, facecolor=_INVALID, edgecolor=_HATCH,
                          hatch="////", linewidth=0, zorder=0)  # fmt: skip
    axes.imshow(picture.rgba, interpolation="nearest", zorder=1)
    axes.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.spines[:].set_visible(False)
    axes.set_xlabel(picture.caption, fontsize=7.5, color=_INK, labelpad=2)
    if title:
        axes.set_title(title, fontsize=9, color=_INK)
