# SPDX-License-Identifier: Apache-2.0
"""What chips of a finished store become for others: the exits of ``StoredChips`` to files and models."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, overload

from rasteret_dask.net.places import Place
from rasteret_dask.runlimits import NO_LIMITS, RunLimits

if TYPE_CHECKING:
    import pyarrow as pa

    from rasteret_dask.exports.webdataset import PixelFormat
    from rasteret_dask.net.clusters import ClientLike
    from rasteret_dask.prediction.models import ModelLike
    from rasteret_dask.prediction.outputs import OutputsLike
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

    @overload
    def predict(
        self,
        model: ModelLike,
        outputs: OutputsLike = "values",
        *,
        to: None = None,
        batch_size: int = 16,
        client: ClientLike = None,
        progress: bool = True,
        limits: RunLimits = NO_LIMITS,
    ) -> pa.Table: ...

    @overload
    def predict(
        self,
        model: ModelLike,
        outputs: OutputsLike = "values",
        *,
        to: str | os.PathLike[str],
        batch_size: int = 16,
        client: ClientLike = None,
        progress: bool = True,
        limits: RunLimits = NO_LIMITS,
    ) -> JobReport: ...

    def predict(
        self,
        model: ModelLike,
        outputs: OutputsLike = "values",
        *,
        to: str | os.PathLike[str] | None = None,
        batch_size: int = 16,
        client: ClientLike = None,
        progress: bool = True,
        limits: RunLimits = NO_LIMITS,
    ) -> JobReport | pa.Table:
        """Run a model that gives one answer a chip, as :meth:`Chips.predict` does: no scene is read again.

        Rows are those of planned chips; where the store has a time axis, ``start_datetime`` and ``end_datetime`` are
        of the records that a chip shows. Maps are made of planned chips.

        Parameters
        ----------
        model, outputs, batch_size, client, progress, limits
            As of :meth:`Chips.predict`.
        to
            A path or URL that ends in ``.parquet``. None: the table is returned.

        Raises
        ------
        PlanError
            When ``to`` is a map.
        ModelError, StoreError, JobError, IncompleteError
            As of :meth:`Chips.predict`.

        Examples
        --------
        >>> codes = stored.predict(lambda pixels: pixels.mean(axis=(1, 2, 3, 4)))
        >>> codes.column_names[-1], len(codes) == len(stored)
        ('value', True)
        """
        from rasteret_dask.prediction.predicting import stored_answers
        from rasteret_dask.store.limits import begun

        with begun(limits) as bounds:
            return stored_answers(
                self.stored, model, outputs, batch_size, to, client, progress, bounds, is_vector=False
            )

    @overload
    def embed(
        self,
        model: ModelLike,
        to: None = None,
        *,
        batch_size: int = 16,
        client: ClientLike = None,
        progress: bool = True,
        limits: RunLimits = NO_LIMITS,
    ) -> pa.Table: ...

    @overload
    def embed(
        self,
        model: ModelLike,
        to: str | os.PathLike[str],
        *,
        batch_size: int = 16,
        client: ClientLike = None,
        progress: bool = True,
        limits: RunLimits = NO_LIMITS,
    ) -> JobReport: ...

    def embed(
        self,
        model: ModelLike,
        to: str | os.PathLike[str] | None = None,
        *,
        batch_size: int = 16,
        client: ClientLike = None,
        progress: bool = True,
        limits: RunLimits = NO_LIMITS,
    ) -> JobReport | pa.Table:
        """Run a model that gives a vector a chip, as :meth:`Chips.embed` does: no scene is read again.

        Examples
        --------
        >>> report = stored.embed(lambda pixels: pixels.mean(axis=(1, 3, 4)), "stored.parquet", progress=False)
        >>> report.kept == len(stored)
        True
        """
        from rasteret_dask.prediction.predicting import stored_answers
        from rasteret_dask.store.limits import begun

        with begun(limits) as bounds:
            return stored_answers(
                self.stored, model, "values", batch_size, to, client, progress, bounds, is_vector=True
            )
