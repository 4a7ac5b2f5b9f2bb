# SPDX-License-Identifier: Apache-2.0
"""Drawings of chips: where they lie, and what is in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import xarray as xr

from rasteret_dask.display.colours import INK, INVALID, colours_of
from rasteret_dask.errors import PlanError
from rasteret_dask.extras import needs
from rasteret_dask.show.maps import outlines_of
from rasteret_dask.show.pictures import Picture, Sheet, by_source, sheet_of

__all__ = ["contact_sheet", "draw_sheet", "for_any_page", "plot_chips", "plot_demo", "preview", "pyplot"]


def plot_chips(table: pa.Table, ax: Any = None) -> Any:
    """Draw the map of chips, coloured by split, with a legend that counts them.

    Parameters
    ----------
    table
        A chip table: ``Chips.table``, or a loaded one.
    ax
        Matplotlib axes to draw on; None: new ones.

    Returns
    -------
    matplotlib.axes.Axes
        In kilometres of their CRS where all chips lie in one, else in degrees. Chips without a split are grey. The
        background lets the page through, and all colours can be read on a light and on a dark one.

    Raises
    ------
    PlanError
        When the table has no chips.
    MissingExtraError
        When matplotlib is not installed.
    """
    if not table.num_rows:
        raise PlanError("plot", "no chips", "at least one chip")
    plt = pyplot()
    from matplotlib.collections import PolyCollection
    from matplotlib.patches import Patch

    axes = plt.subplots(figsize=(6, 6), layout="constrained")[1] if ax is None else ax
    corners, names, aspect = outlines_of(table)
    split = np.array([name or "" for name in table.column("split").to_pylist()], dtype=object)
    handles = []
    for label, colour in colours_of(split.tolist()).items():
        own = np.flatnonzero(split == label)
        outlines = [corners[i] for i in own]
        axes.add_collection(
            PolyCollection(outlines, facecolors=colour, edgecolors=colour, linewidths=0.4, alpha=0.85)
        )
        told = label or ("no split" if np.any(split != "") else "chips")
        handles.append(Patch(facecolor=colour, label=f"{told} ({len(own):,})"))
    axes.autoscale_view()
    axes.set_aspect(aspect, anchor="N")
    axes.set(xlabel=names[0], ylabel=names[1])
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, borderaxespad=0.2,
        borderpad=0, columnspacing=1.2, handlelength=1, handleheight=1, labelcolor=INK,
    )  # fmt: skip
    for_any_page(axes)
    return axes


def for_any_page(axes: Any) -> None:
    """Give axes no background, and text that can be read on a light and on a dark page."""
    axes.figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.tick_params(labelsize="small", colors=INK)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    axes.title.set_color(INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)


class _Readable(Protocol):
    """Chips of a plan or of a store."""

    def __len__(self) -> int: ...

    def sample(self, n: int, seed: int = 0, by: str | None = None) -> Self:
        """Keep n of them."""

    def load(self) -> xr.Dataset | xr.DataTree:
        """Read them."""


def preview(chips: _Readable, n: int) -> Any:
    """Draw some chips of a plan or a store, of which only these are read: see :func:`draw_sheet`.

    Raises
    ------
    PlanError
        When there is no chip to draw.
    MissingExtraError
        When matplotlib is not installed.
    """
    pyplot()
    if n < 1:
        raise PlanError("preview", f"{n} chips asked for", "at least one")
    return draw_sheet(sheet_of(chips.sample(n).load(), n))


def contact_sheet(chips: xr.Dataset | xr.DataTree, n: int = 5, *, figure: Any = None) -> Any:
    """Draw a few chips: a row each, a column for each time slot of each source, and one for masks.

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
        See :func:`draw_sheet`.

    Raises
    ------
    PlanError
        When there is no chip to draw.
    MissingExtraError
        When matplotlib is not installed.
    """
    pyplot()
    return draw_sheet(sheet_of(chips, n), figure)


def draw_sheet(sheet: Sheet, figure: Any = None) -> Any:
    """Draw pictures of chips.

    Parameters
    ----------
    sheet
        The pictures.
    figure
        Matplotlib figure or subfigure to draw on; None: a new one, which shows where it is the last value of a
        notebook's cell.

    Returns
    -------
    matplotlib.figure.Figure
        Sources with red, green and blue in natural colour; classes in colours that a legend names; radar in decibels;
        of others the three main components of their bands. All pictures of a source share one stretch (its 0.2nd to
        98th percentile). Invalid pixels are hatched.

    Raises
    ------
    MissingExtraError
        When matplotlib is not installed.
    """
    pyplot()
    from matplotlib.figure import Figure

    rows, columns = len(sheet.rows), len(sheet.columns)
    legends = _legends(sheet)
    size = (1.55 * columns + 0.5, 1.7 * rows + 0.5 + 0.22 * len(legends))
    canvas = Figure(figsize=size, layout="constrained") if figure is None else figure
    grid = canvas.subplots(rows, columns, squeeze=False)
    for i, row in enumerate(sheet.rows):
        for axes, column, picture in zip(grid[i], sheet.columns, row.pictures, strict=True):
            _draw(axes, picture, title=column.title if i == 0 else "")
        about = [_wrapped(row.chip_id), row.split, *(f"{name}: {value}"[:28] for name, value in row.labels)]
        grid[i][0].set_ylabel("\n".join(filter(None, about)), fontsize=6.5, color=INK, labelpad=3)
    canvas.patch.set_alpha(0)
    if legends:
        _put_legends(canvas, legends)
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
    plt = pyplot()
    first, *others = by_source(chips).values()
    columns = sum(s.sizes["time"] for s in (first, *others))
    height = 1.62 * n + 0.9
    widths = (0.92 * height, 1.48 * columns)
    figure = plt.figure(figsize=(sum(widths), height), layout="constrained")
    figure.patch.set_alpha(0)
    left, right = figure.subfigures(1, 2, width_ratios=widths, wspace=0.03)
    plot_chips(table, ax=left.subplots())
    contact_sheet(chips, n, figure=right)
    west, _, east, _ = first["bounds"].values[0]
    split = ", ".join(sorted({str(s) for s in first["split"].values.tolist()} - {""}))
    shown = f"{n} of {first.sizes['chip']:,} {split} chips, {(east - west) / 1000:g} km wide".replace(
        "  ", " "
    )
    for part, title in ((left, "Chips by split"), (right, shown)):
        part.suptitle(title, x=0.02, ha="left", size="medium", weight="bold", color=INK)
    return figure


def pyplot() -> Any:
    """Import Matplotlib's pyplot, which registers how notebooks show figures; or say which extra it needs."""
    with needs("plot", "drawing a picture"):
        import matplotlib.pyplot as plt
    # Loads the backend, which tells IPython how to show figures: the first one would be too early for it.
    plt.draw_if_interactive()  # type: ignore[no-untyped-call]
    return plt


def _wrapped(chip_id: str) -> str:
    """Break a chip's id, whose last two parts are its row and column."""
    parts = chip_id.split("_")
    return "_".join(parts[:-2]) + "\n" + "_".join(parts[-2:]) if len(parts) > 2 else chip_id[:28]


def _legends(sheet: Sheet) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    """Return what each line of the legend names: the classes of each source, and the hatch."""
    lines = list(sheet.legend.items())
    return [*lines, ("", (("cloud or no data", "hatch"),))] if sheet.has_gaps else lines


def _put_legends(canvas: Any, legends: Sequence[tuple[str, tuple[tuple[str, str], ...]]]) -> None:
    from matplotlib.patches import Patch

    handles = []
    for title, names in legends:
        for name, colour in names:
            text = f"{title}: {name}" if title else name
            if colour == "hatch":
                handles.append(
                    Patch(facecolor=INVALID[0], edgecolor=INVALID[1], hatch="////", lw=0, label=text)
                )
            else:
                handles.append(Patch(facecolor=colour or "none", label=text))
    canvas.legend(
        handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=7, labelcolor=INK,
        handlelength=1, handleheight=1, columnspacing=1.2,
    )  # fmt: skip


def _draw(axes: Any, picture: Picture, title: str) -> None:
    height, width = picture.rgba.shape[:2]
    if (picture.rgba[..., 3] == 0).any():
        axes.fill_between([-0.5, width - 0.5], -0.5, height - 0.5, facecolor=INVALID[0], edgecolor=INVALID[1],
                          hatch="////", linewidth=0, zorder=0)  # fmt: skip
    axes.imshow(picture.rgba, interpolation="nearest", zorder=1)
    axes.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    axes.patch.set_alpha(0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(picture.caption, fontsize=7.5, color=INK, labelpad=2)
    if title:
        axes.set_title(title, fontsize=9, color=INK)
