"""Pictures of chips: where they lie, and what is in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import shapely
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask.errors import BandError, PlanError

__all__ = ["contact_sheet", "plot_chips", "plot_demo"]

SPLIT_COLOURS = {"train": "#4878a8", "val": "#eda83b", "test": "#b5446e"}
"""Told apart by colour-blind readers, and in print by their lightness."""

_FURTHER = ("#5a9367", "#8a6fb0", "#7f5f3f", "#3fa7a3", "#c96f4a")
_NO_SPLIT, _INVALID, _HATCH, _INK = "#c9c9c9", "#e4e4e4", "#b4b4b4", "#333333"
_RGB = ("red", "green", "blue")
_GAMMA = 0.75  # lifts water and forest a little


@dataclass(frozen=True, slots=True)
class _Picture:
    """One picture of one chip."""

    rgba: NDArray[np.float32]
    """Shape (y, x, 4), 0..1; alpha is 0 where a pixel is invalid."""
    column: str
    """Title of its column: the source's slot."""
    caption: str
    """What this chip has there; may be empty."""


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
        When the table has no chips, or matplotlib is not installed.
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
        All pictures of a source share one stretch (its 0.2nd to 99th percentile). Invalid pixels are hatched.

    Raises
    ------
    PlanError
        When there is no chip to draw, or matplotlib is not installed.
    """
    plt = _pyplot()
    sources = _sources(chips)
    total = min((s.sizes["chip"] for s in sources.values()), default=0)
    if not total or n < 1:
        raise PlanError("contact_sheet", f"{total} chips, {n} asked for", "at least one chip to draw")
    rows = np.unique(np.linspace(0, total - 1, min(n, total)).round().astype(int))
    pictures = [_pictures(name, source, rows) for name, source in sources.items()]
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
    first, *others = _sources(chips).values()
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
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise PlanError(
            "drawing a picture", "no matplotlib", "the extra 'plot'", "pip install 'rasteret-dask[plot]'"
        ) from error
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


def _sources(chips: xr.Dataset | xr.DataTree) -> dict[str, xr.Dataset]:
    """Return every source's chips by name, those in natural colour first."""
    if isinstance(chips, xr.Dataset):
        return {"": chips}
    found = {node.name or "": node.to_dataset() for node in chips.subtree if "pixels" in node.data_vars}
    return dict(sorted(found.items(), key=lambda pair: not _natural(pair[1])))


def _natural(source: xr.Dataset) -> bool:
    return set(_RGB) <= set(source["band"].values.tolist())


def _pictures(name: str, source: xr.Dataset, rows: Sequence[int] | NDArray[Any]) -> list[list[_Picture]]:
    """Load these chips of one source and return their pictures: one list per chip, one picture per slot."""
    loaded = [source.isel(chip=int(i)).load() for i in rows]
    values = np.stack([_values(chip) for chip in loaded])  # (chip, time, band, y, x), NaN where invalid
    bands = source["band"].values.tolist()
    if _natural(source):
        rgba = _stretched(values[:, :, [bands.index(b) for b in _RGB]], together=True)
    else:
        rgba = _muted(_stretched(_main_components(values), together=False))
    return [
        [
            _Picture(rgba[i, t], _slot(name, source, chip, t), _caption(chip, t, _natural(source)))
            for t in range(chip.sizes["time"])
        ]
        for i, chip in enumerate(loaded)
    ]


def _values(chip: xr.Dataset) -> NDArray[np.float32]:
    pixels = chip["pixels"].values.astype(np.float32)
    if "valid" in chip:
        pixels = np.where(chip["valid"].values[:, None], pixels, np.float32(np.nan))
    if not pixels.shape[1]:
        raise BandError("contact_sheet", "no bands", "at least one band")
    return pixels


def _main_components(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Project bands onto their three main components: (chip, time, band, y, x) -> (chip, time, 3, y, x)."""
    flat = np.moveaxis(values, 2, -1)
    known = flat[np.isfinite(flat).all(-1)]
    if not len(known) or known.shape[1] < 3:
        return np.repeat(values[:, :, :1], 3, axis=2)
    middle = known.mean(axis=0, dtype=np.float64)
    known = known[:: max(1, len(known) // 50_000)]
    axes = np.linalg.eigh(np.cov(known - middle, rowvar=False))[1][:, :-4:-1]
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), [0, 1, 2]])  # a component's sign is arbitrary
    return np.asarray(np.moveaxis((flat - middle) @ axes, -1, 2), dtype=np.float32)


def _stretched(colour: NDArray[np.float32], together: bool) -> NDArray[np.float32]:
    """Stretch (chip, time, 3, y, x) to 0..1 and return (chip, time, y, x, 4) with alpha 0 where invalid.

    ``together`` keeps the three channels' proportions, hence natural colours natural.
    """
    image = np.moveaxis(colour, 2, -1)
    valid: NDArray[np.bool_] = np.asarray(np.isfinite(image).all(axis=-1))
    if valid.any():
        low, high = np.percentile(image[valid], (0.2, 99), axis=None if together else 0)
        image = np.clip((image - low) / np.maximum(high - low, 1e-9), 0, 1) ** _GAMMA
    image = np.where(valid[..., None], image, 0)
    return np.concatenate([image, valid[..., None]], axis=-1).astype(np.float32)


def _muted(rgba: NDArray[np.float32]) -> NDArray[np.float32]:
    """Read three channels as lightness and two hues (YUV, ITU-R BT.601), so that no component shouts."""
    y = 0.2 + 0.65 * rgba[..., 0]
    u, v = 0.35 * (rgba[..., 1] - 0.5), 0.35 * (rgba[..., 2] - 0.5)
    image = np.stack([y + 1.14 * v, y - 0.395 * u - 0.581 * v, y + 2.032 * u, rgba[..., 3]], axis=-1)
    return np.asarray(np.clip(image, 0, 1), dtype=np.float32)


def _slot(name: str, source: xr.Dataset, chip: xr.Dataset, t: int) -> str:
    """Return a column's title: the source, and its slot as short as the other slots allow."""
    if "time" not in source.coords:
        return name
    when = pd.DatetimeIndex(source["time"].values)
    yearly = bool(np.all((when.month == 1) & (when.day == 1))) and when.year.is_unique
    form = "%Y" if yearly else "%b %Y" if bool(np.all(when.day == 1)) else "%d %b %Y"
    return f"{name}\n{when[t].strftime(form)}".strip()


def _caption(chip: xr.Dataset, t: int, dated: bool) -> str:
    parts: Mapping[str, Any] = {k: chip[k].values[t] for k in ("source", "datetime") if k in chip.coords}
    name, when = str(parts.get("source", "")), pd.Timestamp(parts.get("datetime", pd.NaT))
    if not name:
        return "no scene"
    return f"{name}, {when.day} {when:%b}" if dated and not pd.isna(when) else name


def _draw(axes: Any, picture: _Picture, title: str) -> None:
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
