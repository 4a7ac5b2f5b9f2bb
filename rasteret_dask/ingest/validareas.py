# SPDX-License-Identifier: Apache-2.0
"""The outline of a file's valid pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import rasterio
import shapely
from numpy.typing import NDArray
from rasterio._err import CPLE_BaseError
from rasterio.control import GroundControlPoint
from rasterio.errors import RasterioError
from rasterio.features import shapes
from rasterio.session import DummySession
from rasterio.transform import Affine, GCPTransformer

from rasteret_dask.errors import ReadError, SourceError, TrustError
from rasteret_dask.footprint import outline_of
from rasteret_dask.grid import transformer
from rasteret_dask.net.gdalfiles import GdalFile
from rasteret_dask.net.remote import is_local, local_path, redact

__all__ = ["valid_area"]

_FEW = 256
"""Pixels of the longer side that an overview must have, and to which a file without overviews is thinned out."""


def valid_area(href: str, driver: str, crs: int) -> bytes:
    """Return the ground of a file's valid pixels as WKB in lon/lat, to a pixel of its coarsest useful overview.

    Parameters
    ----------
    href
        An absolute path or URL.
    driver
        GDAL's, that may open it.
    crs
        Where it lies, as :func:`rasteret_dask.crs.number` counts it.

    Raises
    ------
    SourceError
        When no pixel is valid, or the file cannot be read.
    """
    subject = f"valid pixels of file {redact(href)}"
    file = None if is_local(href) else GdalFile(href)

    def opened(**options: Any) -> Any:
        if file is None:
            return rasterio.open(local_path(href), driver=driver, **options)
        return file.open(driver, **options)

    try:
        with rasterio.Env(DummySession(), GDAL_NUM_THREADS="1"):
            valid, whole = _mask(opened) if file is None else file.call(lambda: _mask(opened))
    except (CPLE_BaseError, RasterioError, OSError, ValueError) as error:
        if file is not None and isinstance(file.failure, ReadError | TrustError):
            raise SourceError(subject, file.failure.found, "pixels that can be read") from error
        raise SourceError(subject, redact(str(error))[:200], "pixels that can be read") from error
    finally:
        if file is not None:
            file.close()
    if not valid.any():
        raise SourceError(
            subject, "no valid pixel", "at least one", "footprints='header' takes the whole raster instead."
        )
    thinned = Affine.scale(whole.width / valid.shape[1], whole.height / valid.shape[0])
    parts = shapes(valid.astype(np.uint8), mask=valid, transform=thinned)
    area = shapely.union_all([shapely.geometry.shape(geometry) for geometry, _ in parts])
    area = shapely.segmentize(area, max(whole.width, whole.height) / 16)  # straight here, curved in lon/lat
    move = transformer(crs, 4326).transform
    lonlat = shapely.transform(area, lambda points: np.column_stack(move(*whole.ground(*points.T))))
    outline = outline_of(shapely.geometry.mapping(lonlat), None, crs)
    assert outline is not None
    return outline


@dataclass(frozen=True, slots=True)
class _Raster:
    """Where the pixels of a file lie."""

    height: int
    width: int
    transform: Affine
    gcps: tuple[GroundControlPoint, ...]
    """Ground control points; where there are any, they decide."""

    def ground(self, cols: NDArray[np.float64], rows: NDArray[np.float64]) -> tuple[Any, Any]:
        """Return x and y in the file's CRS of places counted in pixels from its first corner."""
        if not self.gcps:
            x, y = self.transform @ (cols, rows)
            return x, y
        with GCPTransformer(self.gcps) as places:
            x, y = places.xy(rows, cols, offset="ul")
        return x, y


def _mask(opened: Callable[..., Any]) -> tuple[NDArray[np.bool_], _Raster]:
    """Return where any band is valid, of the coarsest overview that is no speck, and where the whole file lies."""
    with opened() as source:
        width, height = source.width, source.height
        factors = [f for f in source.overviews(1) if max(width, height) / f >= _FEW]
        whole = _Raster(height, width, source.transform, tuple(source.gcps[0]))
        factor = max(factors, default=max(1.0, max(width, height) / _FEW))
        shape = max(1, round(height / factor)), max(1, round(width / factor))
        valid: NDArray[np.bool_] = np.ones(shape, bool)
        if source.nodata is None:  # beside a nodata value, GDAL does not look at an alpha channel, and warns
            valid = source.dataset_mask(out_shape=shape) > 0
        if source.nodata is not None or np.dtype(source.dtypes[0]).kind == "f":
            pixels = source.read(out_shape=(source.count, *shape))
            values = np.array([np.nan if n is None else n for n in source.nodatavals])
            if pixels.dtype.kind == "f":
                values = values.astype(pixels.dtype)  # 0.1 of a text, and 0.1 as stored
            measured = np.isfinite(pixels) & (pixels != values[:, None, None])
            valid = valid & measured.any(axis=0)
    return valid, whole
