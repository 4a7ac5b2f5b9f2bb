# SPDX-License-Identifier: Apache-2.0
"""Chips of a plan or a store are written in a format of others, on the ledger of stores."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rasteret_dask.exports.chipshards import ExitChips
from rasteret_dask.exports.geotiffs import geotiff_job
from rasteret_dask.exports.rslearn import rslearn_job
from rasteret_dask.exports.webdataset import PixelFormat, webdataset_job
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.runlimits import RunLimits
from rasteret_dask.store.limits import begun
from rasteret_dask.store.unitruns import UnitJob, write_units

if TYPE_CHECKING:
    from rasteret_dask.store.jobreport import JobReport

__all__ = ["write_geotiff", "write_rslearn", "write_webdataset"]


def write_geotiff(
    chips: ExitChips, url: str, client: ClientLike, progress: bool, limits: RunLimits
) -> JobReport:
    """Write GeoTIFFs with STAC Items to a folder; see :meth:`rasteret_dask.Chips.to_geotiff`."""
    return _written(lambda: geotiff_job(chips, url), url, client, progress, limits)


def write_rslearn(
    chips: ExitChips, url: str, client: ClientLike, progress: bool, limits: RunLimits
) -> JobReport:
    """Write windows to a folder; see :meth:`rasteret_dask.Chips.to_rslearn`."""
    return _written(lambda: rslearn_job(chips, url), url, client, progress, limits)


def write_webdataset(
    chips: ExitChips, url: str, pixels: PixelFormat, client: ClientLike, progress: bool, limits: RunLimits
) -> JobReport:
    """Write tars to a folder; see :meth:`rasteret_dask.Chips.to_webdataset`."""
    return _written(lambda: webdataset_job(chips, url, pixels), url, client, progress, limits)


def _written(
    make: Callable[[], UnitJob], url: str, client: ClientLike, progress: bool, limits: RunLimits
) -> JobReport:
    with begun(limits) as bounds:
        return write_units(url, make(), client, progress, bounds)
