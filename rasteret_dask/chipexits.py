# SPDX-License-Identifier: Apache-2.0
"""What chips become for others: the exits of ``Chips`` beside stores and streams."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rasteret_dask.chipping.chips import PlannedChips
from rasteret_dask.chipping.steps import steps_of
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.net.places import Place
from rasteret_dask.planning.plan import Folds, Node, Split
from rasteret_dask.planning.query import Query
from rasteret_dask.runlimits import NO_LIMITS, RunLimits
from rasteret_dask.words import OnError

if TYPE_CHECKING:
    from rasteret_dask.exports.webdataset import PixelFormat
    from rasteret_dask.store.jobreport import JobReport
    from rasteret_dask.store.layout import Layout
    from rasteret_dask.streams.chipshards import ChipShards
    from rasteret_dask.tasks.context import ReadContext
    from rasteret_dask.tasks.job import Job

__all__ = ["ChipExits"]


class ChipExits:
    """Exits of chips; :class:`Chips` has them."""

    if TYPE_CHECKING:
        query: Query
        plan: Node

        @property
        def planned(self) -> PlannedChips:
            """The planned chips."""

        @property
        def job(self) -> Job:
            """The frozen plan."""

        @property
        def _layout(self) -> Layout: ...

        def _shards(self, on_error: OnError, client: ClientLike = None) -> ChipShards: ...

        def _context(self, on_error: OnError = "raise") -> ReadContext: ...

    def to_geotiff(
        self,
        folder: str | os.PathLike[str],
        client: ClientLike = None,
        progress: bool = True,
        on_error: OnError = "raise",
        limits: RunLimits = NO_LIMITS,
    ) -> JobReport:
        """Write the chips as GeoTIFFs with a STAC Item each; a rerun does what is missing.

        ``<split>/<chip>_<source>.tif`` has a band for each slot and band, slots first, called ``2024-04-01 red``, with
        nodata, scale, offset and units; ``<split>/<chip>_<mask>.tif`` has burned labels. ``<split>/<chip>.json`` is the
        chip's STAC Item, ``collection.json`` the Collection, which is put last: a folder without it is not whole. Chips
        without a split lie in ``all/``. What :meth:`filter_pixels` drops is not written. In file names,
        characters of a chip's id other than letters, digits and ``._+-`` stand as ``~2F``.

        Parameters
        ----------
        folder
            A local path or a URL of an object store.
        client
            A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
        progress
            Show how many shards are written.
        on_error
            As in :meth:`to_zarr`.
        limits
            As in :meth:`to_zarr`.

        Returns
        -------
        JobReport
            What was written, what it took and what became of the chips.

        Raises
        ------
        PlanError
            When two files would have one name.
        StoreError
            When something else lies there.
        JobError
            When shards failed; the others are written, and a rerun does only those.
        IncompleteError
            When ``limits.max_time`` is over before all is written; a rerun does the rest.

        Examples
        --------
        >>> report = chips.select("val").to_geotiff("val-tifs", progress=False)
        >>> report.kept
        9
        >>> import pystac
        >>> item = next(pystac.Collection.from_file("val-tifs/collection.json").get_items(recursive=True))
        >>> item.properties["split"], list(item.assets)
        ('val', ['s2'])
        """
        from rasteret_dask.exports.chipshards import chips_of_plan
        from rasteret_dask.exports.exits import write_geotiff

        url = Place.of(folder).folder("a folder, or nothing yet", "Choose another place.")
        chips = chips_of_plan(self._layout, self._context(on_error))
        return write_geotiff(chips, url, client, progress, limits)

    def to_webdataset(
        self,
        folder: str | os.PathLike[str],
        client: ClientLike = None,
        progress: bool = True,
        on_error: OnError = "raise",
        limits: RunLimits = NO_LIMITS,
        *,
        pixels: PixelFormat = "npy",
    ) -> JobReport:
        """Write the chips as tars that WebDataset reads, one a shard; a rerun does what is missing.

        ``<split>-00012.tar`` has for each chip ``<chip>.<source>.npy``, shape (time, band, y, x),
        ``<source>.valid.npy`` where pixels are integers, ``<mask>.npy`` of burned labels, and ``<chip>.json``: the
        chip's id, place, times and labels, as a STAC Item. In keys, commas stand for dots. ``<split>.json`` lists the
        tars of a split with their chips; ``dataset.json`` says what the sources are, and is put last: a folder without
        it is not whole.

        Parameters
        ----------
        folder, client, progress, on_error, limits
            As in :meth:`to_geotiff`.
        pixels
            What arrays are in the tars: ``"npy"``, or ``"tif"``: the GeoTIFFs of :meth:`to_geotiff`.

        Returns
        -------
        JobReport
            What was written, what it took and what became of the chips.

        Raises
        ------
        PlanError
            When ``pixels`` is no such word, or two members of a sample would have one name.
        StoreError, JobError, IncompleteError
            As :meth:`to_geotiff`.

        Examples
        --------
        >>> report = chips.select("val").to_webdataset("val-tars", progress=False)
        >>> import tarfile
        >>> with tarfile.open("val-tars/val-00000.tar") as tar:
        ...     tar.getnames()[:2]
        ['33_0,96km_32px_10m_-17367_1557.s2.npy', '33_0,96km_32px_10m_-17367_1557.json']
        """
        from rasteret_dask.exports.chipshards import chips_of_plan
        from rasteret_dask.exports.exits import write_webdataset

        url = Place.of(folder).folder("a folder, or nothing yet", "Choose another place.")
        chips = chips_of_plan(self._layout, self._context(on_error))
        return write_webdataset(chips, url, pixels, client, progress, limits)

    def to_rslearn(
        self,
        folder: str | os.PathLike[str],
        client: ClientLike = None,
        progress: bool = True,
        on_error: OnError = "raise",
        limits: RunLimits = NO_LIMITS,
    ) -> JobReport:
        """Write the chips as the windows of an rslearn dataset; a rerun does what is missing.

        ``windows/<split>/<chip>/`` is a window, whose options have the chip's id, split and labels. Each source is a
        raster layer with all its slots and their times; masks are layers too. ``config.json`` and then
        ``dataset.json`` are put last: a folder without them is not whole.

        Parameters
        ----------
        folder, client, progress, on_error, limits
            As in :meth:`to_geotiff`.

        Returns
        -------
        JobReport
            What was written, what it took and what became of the chips.

        Raises
        ------
        PlanError
            When rslearn's windows cannot say what the chips are: pixels that do not lie at multiples of their size,
            ``context_m=``, float64 or complex numbers, dots in the name of a source.
        StoreError, JobError, IncompleteError
            As :meth:`to_geotiff`.

        Examples
        --------
        >>> report = chips.select("val").to_rslearn("val-windows", progress=False)
        >>> import json
        >>> with open("val-windows/config.json") as file:
        ...     list(json.load(file)["layers"])
        ['s2']
        """
        from rasteret_dask.exports.chipshards import chips_of_plan
        from rasteret_dask.exports.exits import write_rslearn

        url = Place.of(folder).folder("a folder, or nothing yet", "Choose another place.")
        return write_rslearn(
            chips_of_plan(self._layout, self._context(on_error)), url, client, progress, limits
        )

    def to_recipe(self, path: str | os.PathLike[str] | None = None) -> str:
        """Return the recipe of these chips: TOML that :func:`load_recipe` reads, and that makes the same chips.

        Parameters
        ----------
        path
            A local file to write it to. What lies only in this process's memory (a table of records, points, labels)
            goes into GeoParquet files beside it, and so do the split cells that a stratified split dealt. None: nothing
            is written, and such chips are refused.

        Raises
        ------
        PlanError
            When a table or a function of these chips has no name that a file could hold: a lambda, say.

        Examples
        --------
        >>> s2 = rd.build("demo/sentinel-2-l2a", name="s2")
        >>> text = s2.harmonize(["red"], time="1MS").chips(32, cell_km=0.96).to_recipe()
        >>> "[chips]" in text
        True
        """
        from rasteret_dask.show.recipetext import recipe_text

        deals = {type(s) for s in steps_of(self.plan)[1] if isinstance(s, Split | Folds) and s.spec.stratify}
        cells = self.planned.cells if Split in deals and path is not None else None
        folds = self.planned.fold_cells if Folds in deals and path is not None else None
        text = recipe_text(
            self.query, path, None if cells is None else cells.table, None if folds is None else folds.folds
        )
        if path is not None:
            Path(path).expanduser().write_text(text, encoding="utf-8")
        return text

    def save_plan(self, path: str | os.PathLike[str], client: ClientLike = None) -> None:
        """Write the plan, JSON and Arrow tables, to a new folder, from which :func:`stream_from` reads it elsewhere.

        Parameters
        ----------
        path
            A folder of its own: a local path or a URL.
        client
            Who looks at all pixels once, where :meth:`filter_pixels` drops some; as in :meth:`stream`.

        Raises
        ------
        PlanError
            When a rule of the plan cannot be imported by another process.
        StoreError
            When something else lies there.

        Examples
        --------
        >>> chips.select("train").save_plan("plan")
        >>> next(rd.stream_from(None, "plan", batch_size=8))["s2"].shape
        (8, 3, 2, 32, 32)
        """
        from rasteret_dask.streamfrom import save_plan
        from rasteret_dask.tasks.jobfile import check_writable

        check_writable(self.job)
        sizes = self._shards("raise", client).sizes if self.job.pixel_rules else None
        save_plan(self, path, sizes)
