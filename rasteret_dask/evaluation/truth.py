# SPDX-License-Identifier: Apache-2.0
"""What the labels of an evaluation are: masks and bands of the chips, polygons or rasters given beside them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import PRESENT, label_fields
from rasteret_dask.chipping.labels import Labels, dense
from rasteret_dask.errors import PlanError
from rasteret_dask.evaluation.rasters import FILES, MapRequest, rasters_of
from rasteret_dask.evaluation.reading import VALID, Rasters
from rasteret_dask.geometries.areas import as_labels
from rasteret_dask.lists import listed
from rasteret_dask.rules.kinds import CLASS
from rasteret_dask.table import geoparquet
from rasteret_dask.tasks.batches import Arrays, SourcePixels
from rasteret_dask.tasks.job import Job

__all__ = ["Truth", "truth_of"]

SUBJECT = "evaluate(labels=)"

_TABLES = (".parquet", ".geoparquet")


@dataclass(frozen=True, eq=False)
class Truth:
    """True classes, or true numbers, of the pixels of chips."""

    text: str
    """What it is called."""
    is_class: bool
    source: str
    """The source on whose pixels it lies."""
    shape: tuple[int, int]
    """Pixels of a chip, (height, width)."""
    names: Mapping[int, str] = field(default_factory=dict)
    """Class -> its name, as far as names are known."""
    band: int | None = None
    """It is this band of the source."""
    pad: int = 0
    """Pixels of the source beyond the chip, on each side, which are left out."""
    labels: Labels | None = None
    """It is these polygons."""
    rasters: Rasters | None = None
    """It is what these say."""

    def on(self, arrays: Arrays, at: int) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return its numbers on one chip, and where they are valid; shape (y, x) each.

        Parameters
        ----------
        arrays
            Chips: ``bbox`` and ``epsg``, and the source's pixels where the labels are a band of it.
        at
            The place of the chip.
        """
        if self.band is not None:
            inner = slice(self.pad, -self.pad or None)
            values = arrays[self.source][at, 0, self.band, inner, inner]
            valid = arrays[f"{self.source}/valid"][at, 0, inner, inner]
            if f"{self.source}/{PRESENT}" in arrays:
                valid = valid & arrays[f"{self.source}/{PRESENT}"][at, 0]
            return self._numbers(values, valid)
        own = slice(at, at + 1)
        bounds, epsg = arrays["bbox"][own], arrays["epsg"][own].astype(np.int64)
        if self.labels is not None:
            (mask,) = self.labels.burned(bounds, epsg, self.shape[0])
            return self._numbers(mask, mask != 0 if self.is_class else ~np.isnan(mask))
        assert self.rasters is not None
        seen = self.rasters.on(int(epsg[0]), bounds[0].tolist(), self.shape)
        return seen.values, seen.state == VALID

    def _numbers(
        self, values: NDArray[Any], valid: NDArray[np.bool_]
    ) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        there = valid & np.isfinite(values) if values.dtype.kind == "f" else valid
        return np.where(there, values, 0).astype(np.int64 if self.is_class else np.float64), there


def truth_of(
    labels: Any, column: str | None, job: Job, pixels: Mapping[str, SourcePixels], reference: int
) -> Truth | str:
    """Return what the labels are; text where they are a column of the chip table.

    Parameters
    ----------
    labels
        What the user gave: see :meth:`rasteret_dask.Chips.evaluate`.
    column
        The column of polygons that says what they are.
    job, pixels
        The chips, and what the pixels of each source are.
    reference
        The number of the source on whose pixels labels lie that are given beside the chips.

    Raises
    ------
    PlanError
        When there are no such labels, or they hold several times.
    """
    size = (job.size_px[reference],) * 2
    source = job.sources[reference].name
    if (
        isinstance(labels, str)
        and not labels.lower().endswith((*FILES, *_TABLES))
        and not os.path.exists(labels)
    ):
        return _named(labels, job, pixels)
    if isinstance(labels, str | os.PathLike) and os.fspath(labels).lower().endswith(_TABLES):
        labels = geoparquet.read(labels)
    if isinstance(labels, pa.Table) or (hasattr(labels, "to_crs") and hasattr(labels, "geometry")):
        burned = _polygons(labels, column)
        names = dict(enumerate(burned.classes, 1))
        return Truth(burned.column, burned.dtype.kind != "f", source, size, names, labels=burned)
    rasters = rasters_of(labels, MapRequest(SUBJECT, None))
    return Truth(rasters.name, rasters.is_class, source, size, rasters.names, rasters=rasters)


def _polygons(labels: Any, column: str | None) -> Labels:
    table = as_labels(dense(labels))
    own = [name for name in table.column_names if name not in ("geometry", "__index__")]
    if column is None and len(own) != 1:
        raise PlanError(
            SUBJECT, f"polygons with {len(own)} columns", "one that says what they are",
            f"Name it: column={own[0]!r}." if own else "Give them a column with a class each.",
        )  # fmt: skip
    if column is not None and column not in own:
        raise PlanError("evaluate(column=)", repr(column), f"one of {listed(own)}")
    return Labels.of(table, column or own[0])


def _named(text: str, job: Job, pixels: Mapping[str, SourcePixels]) -> Truth | str:
    """Return the mask or band that a name means, or the name of a column of the chip table."""
    burned = {labels.name: labels for labels in job.labels}
    burned |= {f"{job.sources[one.source].name}/{one.name}": one for one in job.labels}
    if text in burned:
        own = burned[text]
        size = (job.size_px[own.source],) * 2
        return Truth(
            text,
            own.dtype.kind != "f",
            job.sources[own.source].name,
            size,
            dict(enumerate(own.classes, 1)),
            labels=own,
        )
    bands = _bands(pixels)
    if text in bands:
        return _band(text, *bands[text], job, pixels)
    columns = [one.name for one in label_fields(job.chips.schema)]
    if text in columns:
        return text
    raise PlanError(
        SUBJECT, f"no {text!r}", f"one of {listed([*burned, *bands, *columns])}",
        "Or give labels here: polygons, or a raster of classes.",
    )  # fmt: skip


def _bands(pixels: Mapping[str, SourcePixels]) -> dict[str, tuple[str, int]]:
    """Return the bands that there are: ``source/band``, and ``source`` where it has one, or one of classes."""
    result: dict[str, tuple[str, int]] = {}
    for name, own in pixels.items():
        classes = [at for at, kind in enumerate(own.kinds) if kind.kind == CLASS.name]
        one = classes if len(classes) == 1 else [0] if len(own.bands) == 1 else []
        if one:
            result[name] = (name, one[0])
        result |= {f"{name}/{band}": (name, at) for at, band in enumerate(own.bands)}
    return result


def _band(text: str, source: str, band: int, job: Job, pixels: Mapping[str, SourcePixels]) -> Truth:
    own = pixels[source]
    times, _, height, width = own.shape
    kind = own.kinds[band] if own.kinds else None
    if times != 1:
        raise PlanError(
            f"evaluate(labels={text!r})", f"{times} slots of time", "labels that hold once",
            "Give the source of labels one slot: harmonize(time='static').",
        )  # fmt: skip
    if kind is None or kind.kind is None:
        raise PlanError(
            f"evaluate(labels={text!r})", "a band of which nobody knows whether it holds classes", "a known kind",
            f"Say it: harmonize(kinds={{{own.bands[band]!r}: 'class'}}).",
        )  # fmt: skip
    number = next(n for n, plan in enumerate(job.sources) if plan.name == source)
    reach, side = job.reach_m(number), float(job.bounds[0, 2] - job.bounds[0, 0]) if len(job.bounds) else 1.0
    pad = reach * width / (side + 2 * reach)
    if abs(pad - round(pad)) > 1e-6:
        raise PlanError(
            f"evaluate(labels={text!r})", f"windows that reach {pad:.3g} pixels beyond the chips", "whole pixels",
            "Choose another context_m for this source.",
        )  # fmt: skip
    shape = (height - 2 * round(pad), width - 2 * round(pad))
    return Truth(text, kind.kind == CLASS.name, source, shape, dict(kind.classes), band, round(pad))
