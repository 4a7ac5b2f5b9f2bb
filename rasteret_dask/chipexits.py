# SPDX-License-Identifier: Apache-2.0
"""What chips become where they are used: batches for training, and files for others."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.net.places import Place
from rasteret_dask.runlimits import NO_LIMITS, RunLimits
from rasteret_dask.words import OnError

if TYPE_CHECKING:
    from rasteret_dask.exports.webdataset import PixelFormat
    from rasteret_dask.store.jobreport import JobReport
    from rasteret_dask.store.layout import Layout
    from rasteret_dask.streams.augmenting import Augment
    from rasteret_dask.streams.chipshards import ChipShards
    from rasteret_dask.streams.stream import Normalize, Stream
    from rasteret_dask.streams.weights import WeightsLike
    from rasteret_dask.tasks.context import ReadContext

__all__ = ["ChipExits"]


class ChipExits:
    """Exits of chips; :class:`Chips` and :class:`SavedPlan` have them."""

    if TYPE_CHECKING:

        @property
        def _layout(self) -> Layout: ...

        def _shards(self, on_error: OnError, client: ClientLike = None) -> ChipShards: ...

        def _context(self, on_error: OnError = "raise") -> ReadContext: ...

    def stream(
        self,
        batch_size: int,
        shuffle: int | None = None,
        epochs: int = 1,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        pad: bool = False,
        client: ClientLike = None,
        prefetch: int = 2,
        normalize: Normalize | bool | None = None,
        *,
        buffer: int = 4,
        on_error: OnError = "raise",
        ignore_index: int | None = None,
        weights: WeightsLike | None = None,
        balance: str | None = None,
        augment: Augment | None = None,
    ) -> Stream:
        """Return the chips as batches for a training loop: an iterator of dictionaries of arrays.

        Shards are read on a Dask cluster, or by threads where there is none, just far enough ahead to keep readers
        busy: who takes no batches stops the reading. A lost worker's shards are read again; no chip comes twice.

        Parameters
        ----------
        batch_size
            Chips of a batch; an epoch's last one may be short.
        shuffle
            A seed: the same order on any number of workers, another one each epoch. None: the order of
            :meth:`Chips.to_xarray`.
        epochs
            How often the chips come.
        drop_last
            Leave out short batches.
        rank, world_size
            Which of how many disjoint parts. Every rank has the same number of batches: the last
            ``len(chips) % world_size`` chips of an epoch's order are left out.
        pad
            Leave out nothing: repeat chips until all batches are full; ``padded`` marks them.
        client
            A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
        prefetch
            Batches made ahead. A stream from a cluster holds these and two more; threads hold, beside them, the
            shards that are read and mixed.
        normalize
            What :meth:`Chips.stats` of the train split returned, for this split as for the others: only then do they
            see the same numbers. It must have measured these sources, bands, dtypes and units. True: statistics of
            these very chips, measured once a process; ranks are better given what one of them measured
            (``Stats.save``, ``Stats.load``). Or a function of a batch, such as ``partial(stats.normalize, fill=0)``.
        buffer
            Shards that ``shuffle`` mixes at any time, from the first batch to the last one. Each rank has shards of its
            own, or every rank would read every tile; from a store, each rank mixes parts of all shards. Measured for
            batches of 32 and 20 shards of 128 chips: 3.9 shards a batch in the first tenth of an epoch, 4.2 in its
            middle and 4.0 in its last tenth on one rank. On 8 ranks each has 2 or 3 shards, and mixes them: 3.0.
        ignore_index
            What invalid pixels of bands of kind ``class`` become, such as torch's -100 or 255; where the dtype cannot
            hold it, pixels get the narrowest that can. None: they stay as they are.
        weights
            How often chips come, compared with each other: a column of numbers of the chip table, or a number for each
            chip in its order. An epoch has as many chips as before; chip i comes ``len(chips) * weight / sum`` times,
            rounded down or up, which a random number of each epoch settles. A chip of weight 0 never comes. Needs
            ``shuffle``.
        balance
            A column of the chip table with a class for each chip: weights that make all classes come equally often.
        augment
            A function of a sample and random numbers, called for each sample after ``normalize``. The sample is a
            dictionary of the arrays of one chip, all sources together, without the chip axis; it may be changed in
            place, and is returned. The random numbers, a ``numpy.random.Generator``, follow from ``shuffle``, the epoch
            and the chip's id: the same sample gets the same ones on any number of ranks, in batches of any size.
        on_error
            As in :meth:`Chips.to_xarray`.

        Raises
        ------
        PlanError
            When an argument cannot be, or some rank would have no batch.

        Examples
        --------
        >>> stream = chips.select("train").stream(batch_size=16, shuffle=7)
        >>> batch = next(stream)
        >>> batch["s2"].shape, batch["chip_id"].shape
        ((16, 3, 2, 32, 32), (16,))
        >>> def flip(sample, random):
        ...     if random.random() < 0.5:
        ...         sample["s2"] = sample["s2"][..., ::-1]
        ...         sample["s2/valid"] = sample["s2/valid"][..., ::-1]
        ...     return sample
        >>> next(chips.stream(batch_size=16, shuffle=7, balance="split", augment=flip))["s2"].shape
        (16, 3, 2, 32, 32)
        """
        from rasteret_dask.statistics.measuring import measured_once
        from rasteret_dask.streams.stream import Batching

        batching = Batching(
            batch_size, shuffle, epochs, drop_last, rank, world_size, pad, client, prefetch, normalize, buffer,
            ignore_index, weights, balance, augment,
        )  # fmt: skip
        shards = self._shards(on_error, client)
        return batching.stream(shards, partial(measured_once, shards, on_error, client))

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
        without a split lie in ``all/``. What :meth:`Chips.filter_pixels` drops is not written. In file names,
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
