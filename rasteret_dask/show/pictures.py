"""Chips become pictures: in natural colour, or the main components of their bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask.errors import BandError

__all__ = ["Picture", "by_source", "is_natural", "pictures_of"]

_RGB = ("red", "green", "blue")
_GAMMA = 0.75  # lifts water and forest a little


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of one chip."""

    rgba: NDArray[np.float32]
    """Shape (y, x, 4), 0..1; alpha is 0 where a pixel is invalid."""
    column: str
    """Title of its column: the source's slot."""
    caption: str
    """What this chip has there; may be empty."""


def by_source(chips: xr.Dataset | xr.DataTree) -> dict[str, xr.Dataset]:
    """Return every source's chips by name, those in natural colour first."""
    if isinstance(chips, xr.Dataset):
        return {"": chips}
    found = {node.name or "": node.to_dataset() for node in chips.subtree if "pixels" in node.data_vars}
    return dict(sorted(found.items(), key=lambda pair: not is_natural(pair[1])))


def is_natural(source: xr.Dataset) -> bool:
    """Tell whether a source has red, green and blue."""
    return set(_RGB) <= set(source["band"].values.tolist())


def pictures_of(name: str, source: xr.Dataset, rows: Sequence[int] | NDArray[Any]) -> list[list[Picture]]:
    """Load these chips of one source and return their pictures: one list per chip, one picture per slot."""
    loaded = [source.isel(chip=int(i)).load() for i in rows]
    values = np.stack([_values(chip) for chip in loaded])  # (chip, time, band, y, x), NaN where invalid
    bands = source["band"].values.tolist()
    if is_natural(source):
        rgba = _stretched(values[:, :, [bands.index(b) for b in _RGB]], together=True)
    else:
        rgba = _muted(_stretched(_main_components(values), together=False))
    return [
        [
            Picture(rgba[i, t], _slot(name, source, chip, t), _caption(chip, t, is_natural(source)))
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
        low, high = np.percentile(image[valid], (0.2, 98), axis=None if together else 0)
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
    parts: Mapping[str, Any] = {k: chip[k].values[t] for k in ("member", "datetime") if k in chip.coords}
    name, when = str(parts.get("member", "")), pd.Timestamp(parts.get("datetime", pd.NaT))
    if not name:
        return "no scene"
    return f"{name}, {when.day} {when:%b}" if dated and not pd.isna(when) else name
