# SPDX-License-Identifier: Apache-2.0
"""The exits of chips beside stores and streams: what a model says of them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, overload

from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.runlimits import NO_LIMITS, RunLimits
from rasteret_dask.words import OnError

if TYPE_CHECKING:
    import pyarrow as pa
    import xarray as xr

    from rasteret_dask.prediction.blending import Blend
    from rasteret_dask.prediction.maps import MapPlan
    from rasteret_dask.prediction.modelchips import ModelChips
    from rasteret_dask.prediction.models import ModelLike
    from rasteret_dask.prediction.outputs import OutputsLike
    from rasteret_dask.prediction.targets import Target
    from rasteret_dask.store.jobreport import JobReport

__all__ = ["ModelExits"]


class ModelExits:
    """Exits of chips that need a model; :class:`Chips` and :class:`SavedPlan` have them."""

    if TYPE_CHECKING:

        @property
        def _model_chips(self) -> ModelChips: ...

    @overload
    def predict(
        self,
        model: ModelLike,
        outputs: OutputsLike = "values",
        *,
        to: None = None,
        blend: Blend = "hann",
        batch_size: int = 16,
        min_inputs: int = 1,
        client: ClientLike = None,
        progress: bool = True,
        on_error: OnError = "raise",
        limits: RunLimits = NO_LIMITS,
    ) -> xr.Dataset | xr.DataTree: ...

    @overload
    def predict(
        self,
        model: ModelLike,
        outputs: OutputsLike = "values",
        *,
        to: Target,
        blend: Blend = "hann",
        batch_size: int = 16,
        min_inputs: int = 1,
        client: ClientLike = None,
        progress: bool = True,
        on_error: OnError = "raise",
        limits: RunLimits = NO_LIMITS,
    ) -> JobReport: ...

    def predict(
        self,
        model: ModelLike,
        outputs: OutputsLike = "values",
        *,
        to: Target | None = None,
        blend: Blend = "hann",
        batch_size: int = 16,
        min_inputs: int = 1,
        client: ClientLike = None,
        progress: bool = True,
        on_error: OnError = "raise",
        limits: RunLimits = NO_LIMITS,
    ) -> JobReport | xr.Dataset | xr.DataTree:
        """Run a model over the chips, and write what it says: as a map, or as a table with a row a chip.

        Use ``chips(cover=True)``, so that no ground is left out. Where chips overlap, their predictions of a pixel are
        blended; pixels without valid input stay invalid. A rerun does what is missing.

        Parameters
        ----------
        model
            A function of arrays, a ``torch.nn.Module``, the path of a file, or a :class:`Model`, which tells how chips
            become its input. It is tried on chips of zeros before any pixel is read. Each process runs it once, and
            its threads fill its batches together.
        outputs
            ``"classes"``, ``"probabilities"`` or ``"values"``, or an :class:`Outputs` with names and colours. A model
            that gives (chip, k, y, x) or (chip, y, x) makes a map; one that gives (chip, k) or (chip,) a table. The
            side of a chip's output divides that of the chip, or is a multiple of it.
        to
            Where it goes: a path that ends in ``.zarr`` (a Zarr store, see :func:`open_map`), in ``.tif`` (a COG; of
            several zones one each, ``<name>_<zone>.tif``; beside it ``<name>_count.tif`` and ``<name>_inputs.tif``)
            or ``.parquet`` (a GeoParquet file, a row a chip); a
            :class:`MapZarr`, or a :class:`CogTiles` for a folder of COGs. None: the map is returned, in memory.
        blend
            ``"hann"``: the mean of all chips, weighted by a Hann window over each; ``"mean"``: the plain mean;
            ``"max"``: the highest number of each class or value; ``"centre"``: that of the chip whose centre is the
            nearest. Of classes, scores are blended, then the highest one is taken.
        batch_size
            Chips that the model gets at once.
        min_inputs
            Valid inputs that a pixel must have, counted over slots and sources; what the model says of others does not
            count, and pixels of which no chip says anything are invalid.
        client
            A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
            Where workers declare the resource ``GPU``, only these compute (not with ``Model(device="cpu")``).
        progress
            Show how far it is.
        on_error
            What becomes of a tile that cannot be read: ``"raise"`` fails its block, ``"mask"`` makes its pixels
            invalid.
        limits
            What this run does of the job. See :class:`RunLimits`.

        Returns
        -------
        JobReport
            What was written and what it took; with ``to=None`` an ``xarray.Dataset``, or a DataTree with a node a zone.

        Raises
        ------
        ModelError
            When the model cannot be loaded, raises, gives something else than ``outputs`` says, or NaN for a valid
            pixel; when the device is not there.
        PlanError
            When several chips lie at one place, or ``to`` does not fit what the model gives.
        StoreError
            When something else lies there.
        JobError
            When blocks failed; the others are written, and a rerun does only those.
        IncompleteError
            When ``limits.max_time`` is over before all blocks are written; a rerun does the rest.

        Examples
        --------
        >>> def brightness(pixels):  # (chip, time, band, y, x)
        ...     return pixels.mean(axis=(1, 2))
        >>> report = chips.predict(brightness, to="bright.zarr", progress=False)
        >>> rd.open_map("bright.zarr")["values"].dims
        ('band', 'y', 'x')
        >>> chips.predict(brightness)["count"].dims  # in memory
        ('y', 'x')
        """
        from rasteret_dask.prediction.planmap import MapOptions
        from rasteret_dask.prediction.predicting import predicted
        from rasteret_dask.store.limits import begun

        with begun(limits) as bounds:
            options = MapOptions(blend, batch_size, min_inputs, on_error)
            return predicted(self._model_chips, model, outputs, options, to, client, progress, bounds)

    @overload
    def embed(
        self,
        model: ModelLike,
        to: None = None,
        *,
        batch_size: int = 16,
        client: ClientLike = None,
        progress: bool = True,
        on_error: OnError = "raise",
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
        on_error: OnError = "raise",
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
        on_error: OnError = "raise",
        limits: RunLimits = NO_LIMITS,
    ) -> JobReport | pa.Table:
        """Run a model that gives a vector a chip, and write the vectors as one GeoParquet file.

        The file has a row a chip: ``chip_id``, ``geometry`` (WKB, lon/lat), ``bbox``, ``datetime`` of its acquisition
        or ``start_datetime`` and ``end_datetime`` of its slots, ``split``, your columns, and ``vector`` (float32),
        which is null for chips without a valid pixel. Chips that ``filter_pixels`` drops are left out. The file is
        there once it is whole: until then the folder ``<to>.job`` holds its parts, and a rerun does what is missing.

        Parameters
        ----------
        model
            As of :meth:`predict`. It gives (chip, k).
        to
            A path or URL that ends in ``.parquet``. None: the table is returned.
        batch_size, client, progress, on_error, limits
            As of :meth:`predict`.

        Returns
        -------
        JobReport
            What was written and what it took; with ``to=None`` a ``pyarrow.Table``.

        Raises
        ------
        ModelError
            When the model cannot be loaded, raises, gives numbers for pixels, or NaN for a chip with valid pixels.
        PlanError
            When a column of yours has the name of one of the table's.
        StoreError
            When something else lies there.
        JobError
            When shards failed; the others are written, and a rerun does only those.
        IncompleteError
            When ``limits.max_time`` is over before all shards are written; a rerun does the rest.

        Examples
        --------
        >>> def encoder(pixels):  # (chip, time, band, y, x) -> (chip, 4)
        ...     return pixels.reshape(len(pixels), 4, -1).mean(axis=2)
        >>> report = chips.embed(encoder, to="embeddings.parquet", progress=False)
        >>> import duckdb
        >>> vectors = duckdb.sql("select chip_id, vector::float[4] v from 'embeddings.parquet' where v is not null")
        >>> alike = duckdb.sql(
        ...     "select a.chip_id, b.chip_id, array_cosine_similarity(a.v, b.v) alike from vectors a, vectors b "
        ...     "where a.chip_id < b.chip_id order by alike desc limit 3"
        ... )
        >>> len(alike.fetchall())
        3

        As a source like AlphaEarth's: a map whose pixels are as large as chips, joined with anything else.

        >>> report = chips.predict(encoder, to="embeddings.tif", progress=False)
        >>> ours = rd.build_from_files("embeddings.tif", name="ours", static=True)
        >>> both = rd.join(s2=collection.harmonize(["red"], time="1MS"), ours=ours.harmonize())
        >>> sorted(both.chips(32, cell_km=0.96).sample(2).load().children)
        ['ours', 's2']
        """
        from rasteret_dask.prediction.planmap import MapOptions
        from rasteret_dask.prediction.predicting import embedded
        from rasteret_dask.store.limits import begun

        with begun(limits) as bounds:
            options = MapOptions(batch_size=batch_size, on_error=on_error)
            return embedded(self._model_chips, model, options, to, client, progress, bounds)

    def plan_map(
        self,
        model: ModelLike,
        outputs: OutputsLike = "values",
        *,
        blend: Blend = "hann",
        batch_size: int = 16,
        min_inputs: int = 1,
        client: ClientLike = None,
        on_error: OnError = "raise",
        block_px: Literal[256, 512, 1024, 1536, 2048] | None = None,
    ) -> MapPlan:
        """Return what :meth:`predict` would do, before any pixel is read: the map's grids, its blocks, the memory.

        Parameters
        ----------
        model, outputs, blend, batch_size, min_inputs, client, on_error
            As of :meth:`predict`.
        block_px
            Side of what one task computes; None: the largest that takes 256 MiB of memory at most.

        Raises
        ------
        ModelError, PlanError
            As :meth:`predict`.

        Examples
        --------
        >>> plan = chips.plan_map(lambda pixels: pixels[:, 0, 0])
        >>> plan.explain()["grids"]["33"]["shape"]
        [352, 448]
        """
        from rasteret_dask.prediction.planmap import MapOptions, plan_map

        options = MapOptions(blend, batch_size, min_inputs, on_error, block_px)
        return plan_map(self._model_chips, model, outputs, options, client)
