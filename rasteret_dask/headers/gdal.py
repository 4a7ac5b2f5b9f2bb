# SPDX-License-Identifier: Apache-2.0
"""The header of a file that is no plain tiled TIFF, as GDAL tells it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from threading import Lock
from typing import Any

import numpy as np
import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError, RasterioIOError
from rasterio.session import DummySession
from rasterio.transform import GCPTransformer
from rasterio.vrt import WarpedVRT

from rasteret_dask.crs import number
from rasteret_dask.errors import GridError, ReadError, TrustError
from rasteret_dask.extent import north_up
from rasteret_dask.headers.nodata import number_of, text_of
from rasteret_dask.headers.page import (
    LONGEST_TAG,
    Header,
    HeaderRefusedError,
    Page,
    Placement,
    checked,
    reading_order,
    unlisted_mask,
)
from rasteret_dask.net.gdalfiles import GdalFile
from rasteret_dask.net.remote import is_local, local_path, redact

__all__ = ["from_gdal", "placement_of"]

_WARPED_TILE = 512
_EDGE_POINTS = 8
"""Points along each edge of a file that is no rectangle in its CRS."""


class _Quiet:
    """No warning of missing georeference, which a header's reason tells; filters are the process's, so it counts."""

    def __init__(self) -> None:
        self._lock, self._inside = Lock(), 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
            self._inside += 1

    def __exit__(self, *raised: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(None, None, None)


_QUIET = _Quiet()


def from_gdal(href: str, driver: str, because: str) -> Header | str:
    """Read what GDAL knows of a file that the TIFF path does not serve; tile tables stay empty."""
    file = None if is_local(href) else GdalFile(href)
    options = {
        # sidecar files (.aux.xml) count beside local files; far away each would be a request
        "GDAL_DISABLE_READDIR_ON_OPEN": "FALSE" if file is None else "EMPTY_DIR",
        "GDAL_NUM_THREADS": "1",  # only threads of ours can call back for bytes
    }

    def opened(**overview: int) -> Any:
        if file is None:
            return rasterio.open(local_path(href), driver=driver, **overview)
        return file.open(driver, **overview)

    def read() -> Header | str:
        with opened() as source:
            return _gdal_header(source, opened, because)

    try:
        with _QUIET, rasterio.Env(DummySession(), **options):
            return read() if file is None else file.call(read)
    except (
        CPLE_BaseError,
        RasterioError,
        RasterioIOError,
        CRSError,
        OSError,
        ArithmeticError,
        ValueError,
    ) as error:
        if file is not None and isinstance(file.failure, ReadError | TrustError):
            return f"{because}; {file.failure.found}"
        return f"{because}; GDAL: {redact(str(error))[:200]}"
    except HeaderRefusedError as error:
        return f"refused: {error}"
    except GridError as error:
        return f"{because}; {error.subject}: {error.found}"
    finally:
        if file is not None:
            file.close()


def _gdal_header(source: Any, opened: Callable[..., Any], because: str) -> Header | str:
    if not source.gcps[0] and source.transform.is_identity:
        return f"no geotransform; {because}"
    place = tuple(source.transform)[:6]
    if not source.gcps[0] and not (np.isfinite(place).all() and source.transform.determinant):
        return f"no invertible geotransform: {place}; {because}"
    placement = placement_of(source)
    thematic = tuple(color is ColorInterp.palette for color in source.colorinterp)
    flags = source.mask_flag_enums[0]
    alphas = [
        n for n, what in enumerate(source.colorinterp) if what == ColorInterp.alpha and source.count > 1
    ]
    masks = MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags
    nodata = text_of(source.nodata)
    crs = source.crs
    outline: tuple[tuple[float, float], ...] = ()
    if placement is not None:
        crs = source.gcps[1] if placement == "gcps" else source.crs
        if placement == "gcps" and not crs:
            return f"ground control points without a CRS; {because}"
        pages, outline = [_warped_page(source, crs)], _outline(source)
    else:
        pages = [_gdal_page(source, source, "image")]
        for n in range(len(source.overviews(1))):
            with opened(overview_level=n) as overview:
                pages.append(_gdal_page(source, overview, "overview"))
        if masks:
            pages.append(unlisted_mask(pages[0]))
    return Header(
        pages=tuple(sorted(pages, key=reading_order)),
        epsg=_crs_number(crs),
        nodata=number_of(nodata, source.dtypes[0]),
        dtype=source.dtypes[0],
        samples=source.count,
        size=None,
        etag=None,
        scales=tuple(source.scales) if any(s != 1 for s in source.scales) else (),
        offsets=tuple(source.offsets) if any(o != 0 for o in source.offsets) else (),
        thematic=thematic if any(thematic) else (),
        nodata_tag=nodata,
        alpha=alphas[0] if len(alphas) == 1 else None,
        placement=placement,
        outline=outline,
        descriptions=tuple(source.descriptions) if any(source.descriptions) else (),
        tags=tuple((name, text) for name, text in source.tags().items() if len(text) <= LONGEST_TAG),
    )


def placement_of(source: Any) -> Placement | None:
    """Return how a file that GDAL has opened lies, None where its rows and columns are axes of its CRS."""
    if source.gcps[0]:
        return "gcps"
    return "rotated" if source.transform.b or source.transform.d else None


def _warped_page(source: Any, crs: Any) -> Page:
    """Return the page of the north-up raster in the file's own CRS that GDAL would make of it."""
    if source.gcps[0]:
        with WarpedVRT(source, crs=crs) as warped:
            place, size = tuple(warped.transform)[:6], warped.shape
    else:
        place, size = north_up(tuple(source.transform), source.shape)
    a, b, c, d, e, f = place
    return replace(
        _gdal_page(source, source, "image"), height=size[0], width=size[1], transform=(a, b, c, d, e, f),
        tile_height=min(_WARPED_TILE, size[0]), tile_width=min(_WARPED_TILE, size[1]),
    )  # fmt: skip


def _outline(source: Any) -> tuple[tuple[float, float], ...]:
    """Return points along the file's edges in its CRS, corner after corner."""
    steps = np.linspace(0.0, 1.0, _EDGE_POINTS, endpoint=False)
    ones, zeros = np.ones(len(steps)), np.zeros(len(steps))
    cols = np.concatenate([steps, ones, 1 - steps, zeros]) * source.width
    rows = np.concatenate([zeros, steps, ones, 1 - steps]) * source.height
    if source.gcps[0]:
        with GCPTransformer(source.gcps[0]) as places:
            xs, ys = places.xy(rows, cols, offset="ul")
    else:
        xs, ys = source.transform @ (cols, rows)
    return tuple(zip(np.asarray(xs).tolist(), np.asarray(ys).tolist(), strict=True))


def _crs_number(crs: Any) -> int | None:
    """Return the number of a file's CRS, None where it has none that is a map."""
    return number(crs) if crs and (crs.is_projected or crs.is_geographic) else None


def _gdal_page(source: Any, level: Any, kind: str) -> Page:
    tile_height, tile_width = level.block_shapes[0]
    a, b, c, d, e, f = tuple(source.transform)[:6]
    sx, sy = source.width / level.width, source.height / level.height
    return checked(
        Page(
            kind=kind,
            driver=source.driver,
            width=level.width,
            height=level.height,
            tile_width=tile_width,
            tile_height=tile_height,
            dtype=source.dtypes[0],
            byteorder="<",
            compression=0,  # unknown: GDAL decodes
            predictor=1,
            planar=2 if source.interleaving and source.interleaving.name == "band" else 1,
            samples=source.count,
            transform=(a * sx, b * sy, c, d * sx, e * sy, f),
            tile_offsets=(),
            tile_byte_counts=(),
        )
    )
