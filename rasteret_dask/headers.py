"""COG headers, parsed once, concurrently."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Lock

from rasterio.errors import NotGeoreferencedWarning

from rasteret_dask.errors import ReadError, TrustError
from rasteret_dask.gdalheader import from_gdal
from rasteret_dask.headerpage import Header, RefusedError, UnsupportedError
from rasteret_dask.remote import redact
from rasteret_dask.tiffheader import BROKEN, RangeFile, from_tiff

__all__ = ["Header", "read_headers"]


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


def read_headers(hrefs: Sequence[str], workers: int = 16) -> dict[str, Header | str]:
    """Read the header of every distinct href.

    Parameters
    ----------
    hrefs
        Local paths, or URLs of scheme file, http, https, s3, gs or az.
    workers
        Requests in flight.

    Returns
    -------
    dict
        {href: its Header, or the reason why it is unreadable}. Reasons hold no query strings or keys.
    """
    distinct = list(dict.fromkeys(hrefs))
    if not distinct:
        return {}
    with _QUIET, ThreadPoolExecutor(max(1, min(workers, len(distinct)))) as pool:
        return dict(zip(distinct, pool.map(_read_header, distinct), strict=True))


def _read_header(href: str) -> Header | str:
    try:
        file = RangeFile(href)
    except (ReadError, TrustError) as error:
        return error.found
    if file.driver is None:
        return "neither a TIFF nor a JPEG 2000 file"
    header: Header | str
    try:
        if file.driver != "GTiff":
            raise UnsupportedError("not a TIFF file")
        header = from_tiff(file)
    except ReadError as error:
        return error.found
    except RefusedError as error:
        return f"refused: {error}"
    except (UnsupportedError, *BROKEN) as error:
        # a broken or georeferenceless TIFF may still be one to GDAL, with its sidecar files
        header = from_gdal(href, file.driver, redact(str(error)) or type(error).__name__)
        if isinstance(header, Header):
            header = replace(header, size=file.head.size, etag=file.head.etag)
    if isinstance(header, Header):
        return _objection(header) or header
    return header


def _objection(header: Header) -> str | None:
    _, b, _, d, _, _ = header.pages[0].transform
    if b or d:
        return f"rotated: transform {header.pages[0].transform}; only north-up and south-up grids are served"
    return None
