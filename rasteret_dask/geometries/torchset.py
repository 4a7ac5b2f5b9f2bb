# SPDX-License-Identifier: Apache-2.0
"""Cells of an area as a torch Dataset, by number or, as TorchGeo's samplers ask, by bounds."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import pyproj
import shapely
from numpy.typing import NDArray

from rasteret_dask.crs import crs_of, spelled, text
from rasteret_dask.errors import GridError, PlanError
from rasteret_dask.extras import needs
from rasteret_dask.geometries.cells import Cells

with needs("torch", "a torch Dataset of cells"):
    import torch
    from torch.utils.data import Dataset

__all__ = ["CellDataset", "Sample"]

Sample: TypeAlias = "dict[str, Any]"

_EXACT = 24
"""Bits of whole numbers that float32 holds exactly (IEEE 754)."""


class CellDataset(Dataset[Sample]):
    """A torch Dataset of the lattice cells of an area; see :meth:`Collection.to_torchgeo_dataset`.

    Parameters
    ----------
    cells
        The cells.
    transforms
        Gets and returns each sample.
    """

    def __init__(self, cells: Cells, transforms: Callable[[Sample], Sample] | None = None) -> None:
        self.cells = cells
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, query: Any) -> Sample:
        """Return one sample.

        Parameters
        ----------
        query
            A cell's number; or slices of x, y and time (any may be left out at the end) in the dataset's CRS, as
            TorchGeo's samplers yield them. Bounds are moved to the nearest pixel edges.

        Raises
        ------
        IndexError
            When there is no such cell: so a loop over the dataset ends.
        """
        if isinstance(query, slice | tuple):
            return self._window(query if isinstance(query, tuple) else (query,))
        return self.__getitems__([query])[0]

    def __getitems__(self, queries: Sequence[Any]) -> list[Sample]:
        """Return several samples, numbered ones read in one batch: what a DataLoader asks for."""
        if any(isinstance(q, slice | tuple) for q in queries):
            return [self[q] for q in queries]
        numbers = [self._number(q) for q in queries]
        pixels, valid = self.cells.read(numbers)
        frame = self.cells.frame
        return [
            self._sample(pixels[i], valid[i], frame.bounds[n], int(frame.epsg[n]), self.cells.name(n))
            for i, n in enumerate(numbers)
        ]

    def _number(self, query: Any) -> int:
        try:
            number = operator.index(query)
        except TypeError as error:
            raise PlanError(
                "sample of a dataset", repr(query), "a whole number, or slices of x, y and time"
            ) from error
        if not -len(self) <= number < len(self):
            raise IndexError(f"cell {number} of a dataset of {len(self)}")
        return number % len(self)

    def _window(self, slices: tuple[slice, ...]) -> Sample:
        x, y, t = (*slices, *(slice(None),) * (3 - len(slices)))[:3]
        west, east, south, north = (
            float(given if given is not None else own)
            for given, own in zip(
                (x.start, x.stop, y.start, y.stop),
                (self.bounds[0].start, self.bounds[0].stop, self.bounds[1].start, self.bounds[1].stop),
                strict=True,
            )
        )
        span = None
        if t.start is not None or t.stop is not None:
            first, last = self.cells.span
            begin = first if t.start is None else _stamp(t.start)
            end = (
                last if t.stop is None else _stamp(t.stop) + np.timedelta64(1, "us")
            )  # TorchGeo's are closed
            span = (max(begin, first), min(end, last))
            if not span[0] < span[1]:
                raise IndexError(
                    f"no record between {t.start} and {t.stop}: the dataset has {first} to {last}"
                )
        box = np.array([west, south, east, north])
        pixels, valid = self.cells.read_window(self.epsg, box.tolist(), span)
        name = "window_" + "_".join(f"{v:.12g}" for v in box.tolist())
        return self._sample(pixels, valid, box, self.epsg, name)

    def _sample(
        self,
        pixels: NDArray[Any],
        valid: NDArray[np.bool_],
        bounds: NDArray[np.float64],
        epsg: int,
        name: str,
    ) -> Sample:
        sample = {
            "image": torch.from_numpy(np.ascontiguousarray(pixels.astype(_kind(pixels.dtype), copy=False))),
            "valid": torch.from_numpy(np.ascontiguousarray(valid)),
            "bbox": torch.from_numpy(bounds.astype(np.float64)),
            "crs": spelled(epsg),
            "id": name,
        }
        return sample if self.transforms is None else self.transforms(sample)

    # What TorchGeo's samplers look at

    @property
    def epsg(self) -> int:
        """CRS of all cells, as :func:`rasteret_dask.crs.number` counts it.

        Raises
        ------
        GridError
            When they lie in several UTM zones: then there is no CRS to give bounds in; numbers work.
        """
        codes = np.unique(self.cells.frame.epsg).tolist()
        if len(codes) > 1:
            raise GridError(
                "CRS of a dataset", f"cells in {', '.join(map(text, codes))}", "one UTM zone",
                "Index it by number, or make a dataset a zone.",
            )  # fmt: skip
        return int(codes[0])

    @property
    def crs(self) -> pyproj.CRS:
        """CRS of all cells."""
        return crs_of(self.epsg)

    @property
    def res(self) -> tuple[float, float]:
        """Pixel size (x, y)."""
        pixel = self.cells.source.plan.resolution
        return pixel, pixel

    @property
    def bounds(self) -> tuple[slice, slice, slice]:
        """Bounds of all cells together as slices of x, y and time, as in TorchGeo."""
        box = self.cells.frame.bounds
        first, last = (pd.Timestamp(t) for t in self.cells.span)
        return (
            slice(float(box[:, 0].min()), float(box[:, 2].max())),
            slice(float(box[:, 1].min()), float(box[:, 3].max())),
            slice(first, last),
        )

    @property
    def index(self) -> Any:
        """A GeoDataFrame with a row a cell and an IntervalIndex of time, as in TorchGeo >= 0.7."""
        with needs("geo", "the index of a torch Dataset of cells"):
            import geopandas

        first, last = (pd.Timestamp(t) for t in self.cells.span)
        n = len(self)
        times = pd.IntervalIndex.from_arrays([first] * n, [last] * n, closed="both", name="datetime")
        names = self.cells.frame.prefix.to_pylist()
        cells = shapely.box(*self.cells.frame.bounds.T)
        return geopandas.GeoDataFrame({"id": names}, index=times, geometry=cells, crs=self.crs)

    def __repr__(self) -> str:
        plan = self.cells.source.plan
        return (
            f"<CellDataset {plan.name}: {len(self):,} cells of {self.cells.size} px at {plan.resolution:g}, "
            f"{len(plan.bands)} bands>"
        )


def _kind(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Return float32 where that holds all values exactly, else the narrowest type that torch computes with."""
    if dtype.kind == "f":
        return dtype
    if dtype.itemsize * 8 <= _EXACT:
        return np.dtype(np.float32)
    return np.dtype(np.int64 if dtype.kind == "u" else dtype)


def _stamp(moment: Any) -> np.datetime64:
    stamp = pd.Timestamp(moment)
    stamp = stamp if stamp.tzinfo is None else stamp.tz_convert("UTC").tz_localize(None)
    return stamp.to_datetime64()
