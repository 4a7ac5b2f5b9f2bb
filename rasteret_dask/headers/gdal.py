"""The header of a file that is no plain tiled TIFF, as GDAL tells it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from threading import Lock
from typing import Any

import rasterio
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import CRSError, NotGeoreferencedWarning, RasterioError, RasterioIOError
from rasterio.session import DummySession

from rasteret_dask.errors import ReadError, TrustError
from rasteret_dask.headers.nodata import number_of, text_of
from rasteret_dask.headers.page import Header, HeaderRefusedError, Page, checked, reading_order, unlisted_mask
from rasteret_dask.net.gdalfiles import GdalFile
from rasteret_dask.net.remote import is_local, local_path, redact

__all__ = ["from_gdal"]


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
    except (CPLE_BaseError, RasterioError, RasterioIOError, CRSError, OSError, ValueError) as error:
        if file is not None and isinstance(file.failure, ReadError | TrustError):
            return f"{because}; {file.failure.found}"
        return f"{because}; GDAL: {redact(str(error))[:200]}"
    except HeaderRefusedError as error:
        return f"refused: {error}"
    finally:
        if file is not None:
            file.close()


def _gdal_header(source: Any, opened: Callable[..., Any], because: str) -> Header | str:
    epsg = source.crs.to_epsg() if source.crs else None
    if epsg is None:
        return f"no EPSG code ({'another CRS' if source.crs else 'no CRS'}); {because}"
    if source.gcps[0] or source.transform.is_identity:
        return f"no geotransform{' but ground control points' if source.gcps[0] else ''}; {because}"
    thematic = tuple(color is ColorInterp.palette for color in source.colorinterp)
    flags = source.mask_flag_enums[0]
    alphas = [
        n for n, what in enumerate(source.colorinterp) if what == ColorInterp.alpha and source.count > 1
    ]
    masks = MaskFlags.per_dataset in flags and MaskFlags.alpha not in flags
    nodata = text_of(source.nodata)
    pages = [_gdal_page(source, source, "image")]
    for n in range(len(source.overviews(1))):
        with opened(overview_level=n) as overview:
            pages.append(_gdal_page(source, overview, "overview"))
    if masks:
        pages.append(unlisted_mask(pages[0]))
    return Header(
        pages=tuple(sorted(pages, key=reading_order)),
        epsg=int(epsg),
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
    )


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
