# SPDX-License-Identifier: Apache-2.0
"""What chips of a finished store become for others: the exits of ``StoredChips`` to files."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from rasteret_dask.net.places import Place
from rasteret_dask.runlimits import NO_LIMITS, RunLimits

if TYPE_CHECKING:
    from rasteret_dask.exports.webdataset import PixelFormat
    from rasteret_dask.net.clusters import ClientLike
    from rasteret_dask.store.jobreport import JobReport
    from rasteret_dask.store.stored import Stored

__all__ = ["StoredExits"]


class StoredExits:
    """Exits of stored chips; :class:`StoredChips` has them."""

    stored: Stored

    def to_geotiff(
        self,
        folder: str | os.PathLike[str],
        client: ClientLike = None,
        progress: bool = True,
        limits: RunLimits = NO_LIMITS,
    ) -> JobReport:
        """Write the chips as :meth:`Chips.to_geotiff` does, with the splits and columns that they have by now.

        Examples
        --------
        >>> report = stored.select("val").to_geotiff("stored-tifs", progress=False)
        >>> report.kept
        9
        """
        from rasteret_dask.exports.chipshards import chips_of_store
        from rasteret_dask.exports.exits import write_geotiff

        url = Place.of(folder).folder("a folder, or nothing yet", "Choose another place.")
        return write_geotiff(chips_of_store(self.stored), url, client, progress, limits)

    def to_webdataset(
        self,
        folder: str | os.PathLike[str],
        client: ClientLike = None,
        progress: bool = True,
        limits: RunLimits = NO_LIMITS,
        *,
        pixels: PixelFormat = "npy",
    ) -> JobReport:
        """Write the chips as :meth:`Chips.to_webdataset` does, with the splits and columns that they have by now.

        Examples
        --------
        >>> report = stored.select("val").to_webdataset("stored-tars", progress=False)
        >>> report.kept
        9
        """
        from rasteret_dask.exports.chipshards import chips_of_store
        from rasteret_dask.exports.exits import write_webdataset

        url = Place.of(folder).folder("a folder, or nothing yet", "Choose another place.")
        return write_webdataset(chips_of_store(self.stored), url, pixels, client, progress, limits)

    def to_rslearn(
        self,
        folder: str | os.PathLike[str],
        client: ClientLike = None,
        progress: bool = True,
        limits: RunLimits = NO_LIMITS,
    ) -> JobReport:
        """Write the chips as :meth:`Chips.to_rslearn` does, with the splits and columns that they have by now.

        Examples
        --------
        >>> report = stored.select("val").to_rslearn("stored-windows", progress=False)
        >>> report.kept
        9
        """
        from rasteret_dask.exports.chipshards import chips_of_store
        from rasteret_dask.exports.exits import write_rslearn

        url = Place.of(folder).folder("a folder, or nothing yet", "Choose another place.")
        return write_rslearn(chips_of_store(self.stored), url, client, progress, limits)
