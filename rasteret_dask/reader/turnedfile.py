# SPDX-License-Identifier: Apache-2.0
"""Windows of files whose rows and columns are no axes of a CRS: GDAL warps each from the file itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.enums import MaskFlags, Resampling
from rasterio.io import DatasetReader
from rasterio.transform import AffineTransformer, GCPTransformer
from rasterio.warp import reproject
from rasterio.windows import Window as FileWindow

from rasteret_dask.headers.nodata import INEXACT
from rasteret_dask.reader.pixelgrid import Rect, Window, crs_of, transformed
from rasteret_dask.reader.placing import PendingRead, decoded, within
from rasteret_dask.reader.rasterfile import RasterFile, gdal_env
from rasteret_dask.reader.warp import SourceBlock, valid_pixels

__all__ = ["TurnedRead"]

_REACH_PX = 4
"""Source pixels around those that a window maps to, times the pixels of the file a pixel of the grid."""

_EXACT_COLUMNS = 5
"""Pixels of a row whose places GDAL works out one by one."""


@dataclass(slots=True)
class TurnedRead(PendingRead):
    """A request of such a file: no tiles are waited for, each window is read when its turn comes."""

    file: RasterFile | None = None

    def finish(self) -> None:
        """Warp every window from the file.

        Raises
        ------
        ReadError
            When the file cannot be opened, is not what its record says, or GDAL cannot warp it.
        """
        assert self.file is not None
        with self.file.lock, gdal_env(self.request.asset.href):
            self.file.open()
            PendingRead.finish(self)

    def lose(self) -> None:
        """Make every window invalid, as the file cannot be read."""
        out = self.out
        for number in range(len(self.request.windows)):
            if out.lost is not None:
                out.lost.add(out.first + number)
            out.values[number][...] = self._empty(out.values[number].dtype)
            out.valid[number][...] = False

    def _warped(self, source: SourceBlock, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        assert self.file is not None
        return self.file.warped(lambda dataset: self._of(dataset, window), "warping a window of it")

    def _of(self, dataset: DatasetReader, window: Window) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """Return values and validity of a window of the grid, of the file's pixels around it."""
        request, plan = self.request, self.plan
        asset, shape = request.asset, (window.height, window.width)
        rect = self._around(dataset, window)
        if rect.empty:
            dtype = np.dtype(asset.dtype if request.decode is None else np.float32)
            return np.zeros(shape, dtype), np.zeros(shape, np.bool_)
        part = FileWindow(rect.col0, rect.row0, *rect.shape[::-1])
        stored = within(dataset.read(asset.band_index + 1, window=part), asset)
        valid = valid_pixels(stored, asset.nodata)
        if MaskFlags.per_dataset in dataset.mask_flag_enums[asset.band_index]:
            valid &= dataset.read_masks(asset.band_index + 1, window=part) != 0
        numbers = stored if request.decode is None else decoded(request, stored, valid)
        by_position = numbers.dtype.name in INEXACT and plan.kernel == "nearest"
        if by_position:  # GDAL would round the numbers themselves to doubles
            numbers = np.arange(stored.size, dtype=np.float64).reshape(stored.shape)
        elif numbers.dtype.kind not in "fc":  # validity goes through the kernel as NaN
            self._check_exact(SourceBlock(stored, valid, rect, asset.nodata))
            numbers = numbers.astype(np.float64)
        numbers[~valid] = np.nan
        place = self._place(dataset, rect)
        if numbers.dtype.kind == "c":
            real, imaginary = (
                self._resampled(part, place, window)
                for part in (numbers.real, np.where(valid, numbers.imag, np.nan))
            )
            result = (real + 1j * imaginary).astype(numbers.dtype)
        else:
            result = self._resampled(numbers, place, window)
        seen = ~np.isnan(result)
        if by_position:
            position = np.where(seen, result, 0).astype(np.int64)
            result = np.where(seen, stored.ravel()[position], stored.dtype.type(0))
        elif request.decode is None and stored.dtype.kind in "iub":
            limits = np.iinfo(np.uint8 if stored.dtype.kind == "b" else stored.dtype)
            whole = np.floor(np.where(seen, result, 0) + 0.5)
            result = np.clip(whole, limits.min, limits.max).astype(stored.dtype)  # cubic kernels overshoot
        return result, seen

    def _resampled(
        self, numbers: NDArray[Any], place: Mapping[str, Any], window: Window
    ) -> NDArray[np.floating[Any]]:
        """Return floats of the file, NaN where invalid, on a window of the grid.

        rasterio's ``reproject`` lets GDAL be an eighth of a pixel off, which depends on the window; ``WarpedVRT``
        takes a tolerance, but gives nothing of control points on a grid of ours. Of so few columns GDAL approximates
        nothing (``GDALApproxTransform``).
        """
        grid, plan = self.request.grid, self.plan
        source, result = np.ascontiguousarray(numbers), []
        for left in range(0, window.width, _EXACT_COLUMNS):
            width = min(_EXACT_COLUMNS, window.width - left)
            strip = np.full((window.height, width), np.nan, numbers.dtype)
            reproject(
                source, strip, **place, src_nodata=np.nan, dst_nodata=np.nan, dst_crs=crs_of(grid.epsg),
                dst_transform=grid.transform(Window(window.row, window.col + left, window.height, width)),
                resampling=Resampling[plan.kernel], XSCALE=plan.scale[0], YSCALE=plan.scale[1],
            )  # fmt: skip
            result.append(strip)
        return np.hstack(result)

    def _place(self, dataset: DatasetReader, rect: Rect) -> dict[str, Any]:
        """Return where pixels of the file lie, as GDAL takes it."""
        points, crs = dataset.gcps
        if not points:
            turned = dataset.transform @ Affine.translation(rect.col0, rect.row0)
            return {"src_transform": turned, "src_crs": dataset.crs or crs_of(self.request.asset.epsg)}
        moved = [
            GroundControlPoint(p.row - rect.row0, p.col - rect.col0, p.x, p.y, p.z, p.id) for p in points
        ]
        return {"gcps": moved, "src_crs": crs}

    def _around(self, dataset: DatasetReader, window: Window) -> Rect:
        """Return the file's pixels that a window needs, with the kernel's reach around them."""
        grid, epsg = (
            self.request.grid,
            self.request.asset.epsg,
        )  # not the frame's, which may be the northern twin
        steps = np.linspace(0.0, 1.0, 9)
        down, across = (g.ravel() for g in np.meshgrid(steps, steps, indexing="ij"))
        xs = grid.x0 + (window.col + window.width * across) * grid.xres
        ys = grid.y0 - (window.row + window.height * down) * grid.yres
        if epsg != grid.epsg:
            xs, ys = transformed(grid.epsg, epsg, xs, ys)
        there = np.isfinite(xs) & np.isfinite(ys)
        if not there.any():
            return Rect(0, 0, 0, 0)
        places = GCPTransformer(dataset.gcps[0]) if dataset.gcps[0] else AffineTransformer(dataset.transform)
        with places:
            rows, cols = (np.asarray(v) for v in places.rowcol(xs[there], ys[there], op=float))
        reach = ceil(_REACH_PX / min(*self.plan.scale, 1.0))
        slack = reach + 0.01 * max(np.ptp(rows), np.ptp(cols))  # what nine points a side miss
        low, high = (
            np.floor(v)
            for v in (
                np.array([rows.min(), cols.min()]) - slack,
                np.array([rows.max(), cols.max()]) + slack + 1,
            )
        )
        return Rect(int(low[0]), int(high[0]), int(low[1]), int(high[1])).clip(dataset.height, dataset.width)
