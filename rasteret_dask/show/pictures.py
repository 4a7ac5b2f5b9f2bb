# SPDX-License-Identifier: Apache-2.0
"""Chips become pictures: natural colour, classes in their colours, radar in decibels, else main components."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import is_label, is_mask
from rasteret_dask.display.colours import NO_LABEL, class_colours
from rasteret_dask.errors import BandError, PlanError
from rasteret_dask.rules.kinds import AMPLITUDE, BACKSCATTER, kind_of
from rasteret_dask.rules.units import Decibel, Raw, Scaled
from rasteret_dask.table.itemkinds import CLASSES
from rasteret_dask.table.records import NS_RANGE

__all__ = ["Column", "Picture", "Sheet", "SheetRow", "by_source", "evenly", "is_natural", "sheet_of"]

_RGB = ("red", "green", "blue")
_FALSE = ("nir", "red", "green")
_GAMMA = 0.75  # lifts water and forest a little
_RAMP = (
    "#00224e",
    "#123570",
    "#3b496c",
    "#575d6d",
    "#707173",
    "#8a8678",
    "#a59c74",
    "#c3b369",
    "#e1cc55",
    "#fee838",
)
"""Ten steps of Matplotlib's cividis (Nunez, Anderton and Renslow 2018): read alike by colour-blind people."""

MOST_CODED = 3
"""Bands of codes of a source that get a column of their own."""

MOST_NAMED = 16
"""Classes that a legend names."""

MOST_LABELS = 3
"""The user's columns that are written beside a chip."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of one chip."""

    rgba: NDArray[np.float32]
    """Shape (y, x, 4), 0..1; alpha is 0 where a pixel is invalid."""
    caption: str
    """What this chip has there; may be empty."""


@dataclass(frozen=True, slots=True)
class Column:
    """What all pictures of a column have in common."""

    title: str
    """The source, its slot, and what colours mean."""
    legend: tuple[tuple[str, str], ...] = ()
    """(name, colour) of the classes that occur, or of the ends of a colour ramp."""


@dataclass(frozen=True, slots=True)
class SheetRow:
    """One chip."""

    chip_id: str
    split: str
    """Empty where it has none."""
    labels: tuple[tuple[str, str], ...]
    """(column, value) of some of the user's columns."""
    pictures: tuple[Picture, ...]
    """One a column."""


@dataclass(frozen=True, slots=True)
class Sheet:
    """Some chips as pictures: a row a chip, a column for each slot of each source, and one for the mask."""

    columns: tuple[Column, ...]
    rows: tuple[SheetRow, ...]

    @property
    def has_gaps(self) -> bool:
        """Whether some pixel is invalid."""
        return any((p.rgba[..., 3] == 0).any() for row in self.rows for p in row.pictures)

    @property
    def legend(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """Title of a column, in one line -> its names and colours; columns that look alike once."""
        return {" ".join(c.title.split("\n")[:1]): c.legend for c in self.columns if c.legend}


def by_source(chips: xr.Dataset | xr.DataTree) -> dict[str, xr.Dataset]:
    """Return every source's chips by name, those in natural colour first."""
    if isinstance(chips, xr.Dataset):
        return {"": chips}
    found = {node.name or "": node.to_dataset() for node in chips.subtree if "pixels" in node.data_vars}
    return dict(sorted(found.items(), key=lambda pair: not is_natural(pair[1])))


def is_natural(source: xr.Dataset) -> bool:
    """Tell whether a source has red, green and blue."""
    return set(_RGB) <= set(source["band"].values.tolist())


def evenly(total: int, n: int) -> NDArray[np.int64]:
    """Return ``n`` places of ``total``, evenly taken, the first and the last among them."""
    return np.unique(np.linspace(0, total - 1, min(n, total)).round().astype(np.int64))


def sheet_of(chips: xr.Dataset | xr.DataTree, n: int, slots: int = 6) -> Sheet:
    """Load a few chips, one by one, and return their pictures.

    Parameters
    ----------
    chips
        What ``Chips.to_xarray()`` or ``load()`` returns, or a store opened with plain xarray.
    n
        How many chips, evenly taken.
    slots
        Slots of each source, at most, evenly taken.

    Raises
    ------
    PlanError
        When there is no chip to draw.
    BandError
        When a source has no band.
    """
    sources = by_source(chips)
    total = min((s.sizes["chip"] for s in sources.values()), default=0)
    if not total or n < 1 or slots < 1:
        raise PlanError(
            "preview", f"{total} chips, {n} asked for, {slots} slots each", "at least one of each"
        )
    places = evenly(total, n)
    columns: list[Column] = []
    pictures: list[list[Picture]] = [[] for _ in places]
    for name, source in sources.items():
        chosen = source.isel(time=evenly(source.sizes["time"], slots))
        loaded = [chosen.isel(chip=int(i)).load() for i in places]
        for column, own in _columns(name, loaded):
            columns.append(column)
            for row, picture in zip(pictures, own, strict=True):
                row.append(picture)
    first = next(iter(sources.values()))
    rows = [_row(first.isel(chip=int(i)), own) for i, own in zip(places, pictures, strict=True)]
    return Sheet(tuple(columns), tuple(rows))


def _row(chip: xr.Dataset, pictures: Sequence[Picture]) -> SheetRow:
    labels = [
        (str(name), _text(value.values[()]))
        for name, value in chip.coords.items()
        if not value.dims and is_label(str(name))
    ]
    text = {name: str(chip[name].values[()]) if name in chip.coords else "" for name in ("chip_id", "split")}
    return SheetRow(text["chip_id"], text["split"], tuple(labels[:MOST_LABELS]), tuple(pictures))


def _text(value: Any) -> str:
    if isinstance(value, np.datetime64):
        return str(pd.Timestamp(value))
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value)


def _columns(name: str, chips: Sequence[xr.Dataset]) -> list[tuple[Column, list[Picture]]]:
    """Return the columns of one source: its measured bands and each band of codes, slot by slot; then the mask."""
    values = np.stack([_values(chip) for chip in chips])  # (chip, time, band, y, x), NaN where invalid
    first = chips[0]
    bands = [str(band) for band in first["band"].values]
    kinds = (
        [str(k) for k in first["band_kind"].values]
        if "band_kind" in first.coords
        else ["unknown"] * len(bands)
    )
    coded = [i for i, kind in enumerate(kinds) if kind != "unknown" and kind_of(kind).is_coded]
    measured = [i for i in range(len(bands)) if i not in coded]
    painted: list[tuple[str, tuple[tuple[str, str], ...], NDArray[np.float32]]] = []
    if measured:
        units = [str(u) for u in first["units"].values] if "units" in first.coords else [""] * len(bands)
        own = [(bands[i], kinds[i], units[i]) for i in measured]
        painted.append(_measured(own, values[:, :, measured]))
    for i in coded[:MOST_CODED]:
        given = first.attrs.get(CLASSES, {}).get(bands[i], ())
        names = {int(one["value"]): str(one["name"]) for one in given}
        painted.append((bands[i], *_coded(values[:, :, i], names)))
    columns = []
    for what, legend, rgba in painted:
        for t in range(values.shape[1]):
            title = "\n".join(part for part in (f"{name} {what}".strip(), _slot(first, t)) if part)
            own_pictures = [Picture(rgba[i, t], _caption(chip, t)) for i, chip in enumerate(chips)]
            columns.append((Column(title, legend), own_pictures))
    masks = [str(one) for one, values in first.data_vars.items() if is_mask(str(one)) and values.ndim == 2]
    columns += [_mask(name, mask, chips) for mask in masks]
    return columns


def _values(chip: xr.Dataset) -> NDArray[np.float32]:
    pixels = chip["pixels"].values.astype(np.float32)
    if "valid" in chip:
        pixels = np.where(chip["valid"].values[:, None], pixels, np.float32(np.nan))
    if not pixels.shape[1]:
        raise BandError("preview", "no bands", "at least one band")
    return pixels


def _measured(
    bands: Sequence[tuple[str, str, str]], values: NDArray[np.float32]
) -> tuple[str, tuple[tuple[str, str], ...], NDArray[np.float32]]:
    """Paint bands that were measured: what colours mean, the ends of a ramp, and shape (chip, time, y, x, 4).

    Parameters
    ----------
    bands
        Name, kind and unit of each.
    values
        Shape (chip, time, band, y, x), NaN where invalid.
    """
    names = [name for name, *_ in bands]
    if set(_RGB) <= set(names):
        return "", (), _stretched(values[:, :, [names.index(b) for b in _RGB]], together=True)
    if {kind for _, kind, _ in bands} <= {BACKSCATTER.name, AMPLITUDE.name}:
        decibels = [_decibel(values[:, :, i], kind, unit) for i, (_, kind, unit) in enumerate(bands)]
        two = len(decibels) > 1
        channels = [decibels[0], decibels[1], decibels[0] - decibels[1]] if two else [decibels[0]] * 3
        what = f"{names[0]}, {names[1]}, ratio" if two else names[0]
        return f"{what} (dB)", (), _stretched(np.stack(channels, 2), together=False)
    if set(_FALSE) <= set(names):
        picked = _stretched(values[:, :, [names.index(b) for b in _FALSE]], together=True)
        return ", ".join(_FALSE), (), picked
    if len(names) >= 3:
        return "", (), _muted(_stretched(_main_components(values), together=False))
    rgba, low, high = _ramp(values[:, :, 0])
    unit = f" {bands[0][2]}" if bands[0][2] not in ("", Raw.name, Scaled.name) else ""
    ends = () if np.isnan(low) else ((f"{low:.4g}{unit}", _RAMP[0]), (f"{high:.4g}{unit}", _RAMP[-1]))
    return names[0], ends, rgba


def _decibel(values: NDArray[np.float32], kind: str, unit: str) -> NDArray[np.float32]:
    """Return radar power, or its root, in decibels; what is 0 becomes the smallest number above it."""
    if unit == Decibel.name:
        return values
    above = values[values > 0]
    least = above.min() if above.size else np.float32(1)
    factor = np.float32(20 if kind == AMPLITUDE.name else 10)
    return np.asarray(factor * np.log10(np.maximum(values, least)), dtype=np.float32)


def _coded(
    values: NDArray[np.float32], names: Mapping[int, str]
) -> tuple[tuple[tuple[str, str], ...], NDArray[np.float32]]:
    """Paint codes in the colours of their classes: names and colours of those that occur, and (chip, time, y, x, 4)."""
    valid = np.isfinite(values)
    codes = np.where(valid, values, 0).astype(np.int64)
    there = np.unique(codes[valid]).tolist()
    colours = class_colours({*there, *names})
    rgba = np.zeros((*values.shape, 4), dtype=np.float32)
    for value in there:
        rgba[valid & (codes == value)] = (*_rgb(colours[value]), 1.0)
    legend = [(names.get(value) or str(value), colours[value]) for value in there]
    more = [(f"and {len(legend) - MOST_NAMED} more", "")] if len(legend) > MOST_NAMED else []
    return (*legend[:MOST_NAMED], *more), rgba


def _mask(name: str, mask: str, chips: Sequence[xr.Dataset]) -> tuple[Column, list[Picture]]:
    """Paint rasterized labels; what no polygon covers is grey."""
    own = [chip[mask] for chip in chips]
    names = dict(enumerate(own[0].attrs.get("classes", ())))
    values = np.stack([mask.values for mask in own]).astype(np.float32)[:, None]
    background = (values == 0) & (not names.get(0))
    labelled = np.where(background, np.float32(np.nan), values)
    legend, rgba = _coded(labelled, {value: text for value, text in names.items() if text})
    rgba[background] = (*_rgb(NO_LABEL), 1.0)
    shares = (~background[:, 0]).mean(axis=(1, 2))
    pictures = [Picture(one[0], f"{share:.0%} labelled") for one, share in zip(rgba, shares, strict=True)]
    return Column(f"{name} {mask}".strip(), (*legend, ("no label", NO_LABEL))), pictures


def _main_components(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Project bands onto their three main components: (chip, time, band, y, x) -> (chip, time, 3, y, x)."""
    flat = np.moveaxis(values, 2, -1)
    known = flat[np.isfinite(flat).all(-1)]
    if not len(known):
        return values[:, :, :3]
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
        low, high = np.percentile(image[valid], (0.2, 98), axis=None if together else 0)
        image = np.clip((image - low) / np.maximum(high - low, 1e-9), 0, 1) ** _GAMMA
    image = np.where(valid[..., None], image, 0)
    return np.concatenate([image, valid[..., None]], axis=-1).astype(np.float32)


def _ramp(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], float, float]:
    """Paint (chip, time, y, x) along a ramp of colours; and the values of its ends, NaN where nothing is valid."""
    valid: NDArray[np.bool_] = np.isfinite(values)
    if not valid.any():
        return np.zeros((*values.shape, 4), dtype=np.float32), np.nan, np.nan
    low, high = (float(v) for v in np.percentile(values[valid], (0.2, 99.8)))
    place = np.where(valid, np.clip((values - low) / max(high - low, 1e-9), 0, 1), 0) * (len(_RAMP) - 1)
    steps = np.arange(len(_RAMP))
    channels = [np.interp(place, steps, [_rgb(colour)[c] for colour in _RAMP]) for c in range(3)]
    return np.stack([*channels, valid], axis=-1).astype(np.float32), low, high


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return red, green, blue


def _muted(rgba: NDArray[np.float32]) -> NDArray[np.float32]:
    """Read three channels as lightness and two hues (YUV, ITU-R BT.601), so that no component shouts."""
    y = 0.2 + 0.65 * rgba[..., 0]
    u, v = 0.35 * (rgba[..., 1] - 0.5), 0.35 * (rgba[..., 2] - 0.5)
    image = np.stack([y + 1.14 * v, y - 0.395 * u - 0.581 * v, y + 2.032 * u, rgba[..., 3]], axis=-1)
    return np.asarray(np.clip(image, 0, 1), dtype=np.float32)


def _slot(chip: xr.Dataset, t: int) -> str:
    """Return a slot as short as the other slots allow; empty where there is no time axis."""
    if "time" not in chip.coords:
        return ""
    when = pd.DatetimeIndex(chip["time"].values)
    if when[0] == pd.Timestamp(NS_RANGE[0]):
        return "static"  # one slot that holds at any time begins where times begin
    yearly = bool(np.all((when.month == 1) & (when.day == 1))) and when.year.is_unique
    form = "%Y" if yearly else "%b %Y" if bool(np.all(when.day == 1)) else "%d %b %Y"
    return str(when[t].strftime(form))


def _caption(chip: xr.Dataset, t: int) -> str:
    """Return what filled the slot, with its day where the slot does not tell it."""
    parts: Mapping[str, Any] = {k: chip[k].values[t] for k in ("member", "datetime") if k in chip.coords}
    name, when = str(parts.get("member", "")), pd.Timestamp(parts.get("datetime", pd.NaT))
    if not name:
        return "no scene"
    dated = not pd.isna(when) and not (when.month == when.day == 1 and when.hour == 0)
    year = "" if "time" in chip.coords else f" {when:%Y}"
    return f"{name}, {when.day} {when:%b}{year}" if dated else name
