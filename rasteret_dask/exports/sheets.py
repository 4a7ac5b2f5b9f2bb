# SPDX-License-Identifier: Apache-2.0
"""What the files of a source say of their pixels, whatever their format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.chipping.frame import grown
from rasteret_dask.store.stored import Stored
from rasteret_dask.tasks.batches import Arrays
from rasteret_dask.tasks.job import Job, Output

__all__ = [
    "Box", "MaskSheet", "SourceSheet", "box_of", "dates_of", "iso_of", "sheets_of_job", "sheets_of_store", "window_of",
]  # fmt: skip

Box: TypeAlias = "tuple[float, float, float, float]"
"""xmin, ymin, xmax, ymax."""

_FLOATS = "fc"


@dataclass(frozen=True, slots=True)
class MaskSheet:
    """What the numbers of burned labels are."""

    name: str
    """``mask``, or of several columns ``mask_<column>``."""
    dtype: str
    classes: tuple[str, ...] = ()
    """Names of the values, from 0 on; () where these are numbers."""

    @property
    def named(self) -> tuple[tuple[int, str], ...]:
        """(value, name) of each class; the background, which has no name, is called so."""
        return tuple((value, name or "background") for value, name in enumerate(self.classes))


@dataclass(frozen=True, slots=True)
class SourceSheet:
    """What the pixels of a source are, band by band."""

    name: str
    bands: tuple[str, ...]
    dtype: str
    """NumPy's name."""
    times: int
    fill: int | None
    """What invalid pixels hold; None: NaN."""
    scale: float | None = None
    """Physical value of one stored number; None: values are stored as they are."""
    units: tuple[str, ...] = ()
    """Per band; () where nobody knows."""
    kinds: tuple[str, ...] = ()
    """Per band: ``reflectance``, ``class`` and so on; () where nobody knows."""
    classes: tuple[tuple[str, tuple[tuple[int, str], ...]], ...] = ()
    """(band, ((value, name), ...)) of bands whose classes have names."""
    slots: tuple[str, ...] | None = None
    """Where each slot of the time axis begins, ISO 8601, UTC; None where there is no axis that all chips share."""
    reach_m: float = 0.0
    """How far windows reach beyond the chips on each side."""
    masks: tuple[MaskSheet, ...] = ()
    meta: tuple[str, ...] = ()
    """What is told of each slot beside its time and validity."""
    shape: tuple[int, int] = (0, 0)
    """Rows and columns; zeros where nobody asks."""

    @property
    def facts(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "bands": list(self.bands),
            "dtype": self.dtype,
            "times": self.times,
            "nodata": "nan" if self.fill is None else self.fill,
            "scale": self.scale,
            "units": list(self.units),
            "kinds": list(self.kinds),
            "classes": {band: [list(one) for one in named] for band, named in self.classes},
            "slots": None if self.slots is None else list(self.slots),
            "reach_m": self.reach_m,
            "masks": {m.name: {"dtype": m.dtype, "classes": list(m.classes)} for m in self.masks},
            "meta": list(self.meta),
            "shape": list(self.shape),
        }

    def descriptions(self, dates: Sequence[str]) -> tuple[str, ...]:
        """Return what each band of a file is called, slot by slot: ``2024-04-01 red``."""
        return tuple(f"{date} {band}".strip() for date in dates for band in self.bands)


def sheets_of_job(job: Job, outputs: Sequence[Output]) -> tuple[SourceSheet, ...]:
    """Return the sheet of each source of a job."""
    classes = {own.name: own.attrs.get("classes", ()) for own in job.labels}
    return tuple(
        SourceSheet(
            plan.name, out.bands, out.dtype, out.times,
            _fill(out.dtype, out.fill), None if out.scale is None else float(out.scale), out.units,
            tuple(kind.kind or "unknown" for kind in out.kinds),
            tuple((band, own.classes) for band, own in zip(out.bands, out.kinds, strict=False) if own.classes),
            None if out.slots is None else tuple(_iso(np.datetime64(slot, "ns")) for slot in out.slots),
            job.reach_m(number),
            tuple(MaskSheet(name, dtype, tuple(classes[name])) for name, dtype in out.masks),
            out.meta_names, (out.height, out.width),
        )
        for number, (plan, out) in enumerate(zip(job.sources, outputs, strict=True))
    )  # fmt: skip


def sheets_of_store(stored: Stored) -> tuple[SourceSheet, ...]:
    """Return the sheet of each source of a store."""
    store, table = stored.map, stored.columns(["xmin", "xmax"]).slice(0, 1)
    side = float(table.column("xmax")[0].as_py() - table.column("xmin")[0].as_py())
    sheets = []
    for group in store.first:
        pixels, attrs = store.pixels[group.source], group.arrays["pixels"].attrs
        slots, wide = store.times(group.source), group.attrs.get("context_m")
        units = store.values(group.arrays["units"]) if "units" in group.arrays else ()
        classes = zip(pixels.bands, pixels.kinds, strict=False)
        sheets.append(
            SourceSheet(
                group.source,
                pixels.bands,
                pixels.dtype,
                pixels.shape[0],
                _fill(pixels.dtype, attrs.get("_FillValue", attrs.get("nodata", 0))),
                attrs.get("scale_factor"),
                tuple(map(str, units)),
                tuple(kind.kind or "unknown" for kind in pixels.kinds),
                tuple((band, own.classes) for band, own in classes if own.classes),
                None if slots is None else tuple(_iso(slot) for slot in slots.view("datetime64[us]")),
                0.0 if wide is None else (wide - side) / 2,
                tuple(MaskSheet(m.name, m.dtype, m.classes) for m in pixels.masks),
                group.meta,
                (pixels.shape[2], pixels.shape[3]),
            )
        )
    return tuple(sheets)


def _fill(dtype: str, fill: float) -> int | None:
    return None if np.dtype(dtype).kind in _FLOATS else int(fill)


def dates_of(sheet: SourceSheet, datetimes: NDArray[np.datetime64]) -> tuple[str, ...]:
    """Return what each slot of a chip is called: the slot's date, else its acquisition's, else its number.

    Parameters
    ----------
    sheet
        The source.
    datetimes
        Shape (time,). When the chip's slots were taken; NaT where nobody knows.
    """
    if sheet.slots is not None:
        return _short(sheet.slots)
    if np.isnat(datetimes).all() and len(datetimes) == 1:
        return ("",)
    return tuple(
        f"slot {number}" if np.isnat(when) else str(when.astype("datetime64[D]"))
        for number, when in enumerate(datetimes)
    )


def window_of(arrays: Arrays, row: int, sheet: SourceSheet) -> Box:
    """Return xmin, ymin, xmax, ymax of a chip's window in a source."""
    return box_of(grown(arrays["bbox"][row : row + 1], sheet.reach_m)[0])


def box_of(values: NDArray[np.float64]) -> Box:
    """Return four numbers of a table of bounds."""
    west, south, east, north = values.tolist()
    return west, south, east, north


def _short(slots: tuple[str, ...]) -> tuple[str, ...]:
    """Return dates, with the time of day where two slots share a date."""
    days = tuple(slot[:10] for slot in slots)
    return days if len(set(days)) == len(days) else tuple(slot[:19] for slot in slots)


def _iso(when: Any) -> str:
    return f"{np.datetime_as_string(when.astype('datetime64[us]'), unit='s')}Z"


def iso_of(values: NDArray[np.datetime64]) -> Iterator[str | None]:
    """Yield times as ISO 8601, UTC, to the microsecond where there is one; None of NaT."""
    for when in values.astype("datetime64[us]"):
        if np.isnat(when):
            yield None
        else:
            text = str(when).rstrip("0") if "." in str(when) else str(when)
            yield f"{text.removesuffix('.')}Z"
