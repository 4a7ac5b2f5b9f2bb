# SPDX-License-Identifier: Apache-2.0
"""What comes after training: maps and predictions of chips, compared with labels."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa

from rasteret_dask.net import remote
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.net.places import Place
from rasteret_dask.splitcells import HasGeometry, Regions, regions_of
from rasteret_dask.words import OnError

if TYPE_CHECKING:
    import xarray as xr

    from rasteret_dask.chipping.chips import PlannedChips
    from rasteret_dask.evaluation.evaluation import Evaluation
    from rasteret_dask.evaluation.ground import TrainingPlan
    from rasteret_dask.store.layout import Layout
    from rasteret_dask.storeset import StoredChips
    from rasteret_dask.tasks.context import ReadContext
    from rasteret_dask.tasks.job import Job

__all__ = ["ScoreExits", "PredictionsLike", "TrainingPlanLike"]

PredictionsLike: TypeAlias = (
    "xr.DataArray | xr.Dataset | xr.DataTree | pa.Table | HasGeometry | str | os.PathLike[str]"
)
"""A map, or a table with a row a chip: in memory, or its path."""

TrainingPlanLike: TypeAlias = "ScoreExits | StoredChips | pa.Table | str | os.PathLike[str]"
"""Chips, a store, a saved plan, or a chip table: as such or by path."""


class ScoreExits:
    """The exits of :class:`Chips` that have to do with models."""

    if TYPE_CHECKING:

        @property
        def planned(self) -> PlannedChips:
            """The planned chips."""

        @property
        def job(self) -> Job:
            """The frozen plan."""

        @property
        def _layout(self) -> Layout: ...

        def _context(self, on_error: OnError = "raise") -> ReadContext: ...

    def evaluate(
        self,
        predictions: PredictionsLike,
        labels: Any,
        *,
        splits: TrainingPlanLike | None = None,
        regions: Regions | str | None = None,
        distances_m: Sequence[float] = (0, 1_000, 5_000, 20_000),
        column: str | None = None,
        classes: Mapping[int, str | int] | None = None,
        band: int | str | None = None,
        nodata: float | None = None,
        once: bool = True,
        client: ClientLike = None,
        on_error: OnError = "raise",
        progress: bool = True,
    ) -> Evaluation:
        """Compare predictions with labels on the ground of these chips, in one pass on Dask.

        Chips settle which ground counts. The map is read at the pixels of each chip: where these are its own pixels, by
        counting rows and columns; else by nearest, which the result tells. Pixels without a label, and those where the
        map is invalid or does not reach, are not compared, and are counted.

        Parameters
        ----------
        predictions
            A map: the path of a Zarr store (``classes``, ``probabilities`` or ``values``, a group a zone), of a GeoTIFF
            or of a folder of them, or an xarray DataArray, Dataset or DataTree with a CRS. Of bands that hold how
            likely each class is, the likeliest counts. Or predictions of whole chips: a table with ``chip_id`` and a
            column ``class``, or the path of such a GeoParquet file.
        labels
            What is true: the name of a burned mask (``"mask"``, ``"mask_crop"``), of a joined source of classes
            (``"cover"``, ``"cover/map"``) or of a column of the chip table, where predictions are of whole chips. Or
            labels given here: polygons (a GeoDataFrame, a table with WKB, a GeoParquet file's path), or a raster as
            ``predictions``. Masks and bands of measured numbers are compared with measured numbers.
        splits
            The chips that the model was trained with: chips, a store, a saved plan, or a chip table (the last three by
            path too). It gives the distance of each chip to the nearest train chip, and a split to chips that have
            none: the one of the same ground.
        regions
            Polygons with one column of names, or a column of the chip table: scores for each, of chips that lie in
            one as a whole.
        distances_m
            Where bins of distance to train begin, metres.
        column
            The column of polygons (or of predictions of chips) that has the classes; None: the only one.
        classes
            Predicted class -> the name or number of the labels' class. None: classes of the same name are the same
            where both sides have names, else those of the same number.
        band
            Which band of a map of several, by name or place; None: the only one, or the likeliest class.
        nodata
            The number of invalid pixels; None: as the map says.
        once
            A pixel of ground that several chips show (``stride`` below the size, several times) is compared in the
            first of them only. False: in each of them. Chips of two zones are never compared with each other.
        client
            A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
        on_error
            As in :meth:`to_xarray`.
        progress
            Show how many shards are done.

        Raises
        ------
        PlanError
            When there are no such labels or classes, they hold several times, chips of another split lie on train
            ground of the plan, or nothing is left to compare.
        GridError
            When a map has no CRS, is rotated, or lies on the ground of no chip.
        StoreError, ReadError
            When nothing lies at a path, or it cannot be read.

        Examples
        --------
        >>> scl = collection.harmonize(["scl"], units="raw", time="6MS")
        >>> april = scl.subset(date_range=("2024-04-01", "2024-04-30")).cube()  # as good a map as any
        >>> all_chips = scl.chips(32, cell_km=0.96).split(seed=1)
        >>> test = all_chips.select("test")
        >>> scores = test.evaluate(april, labels="s2", splits=all_chips, progress=False)
        >>> scores.pixels + sum(scores.left_out.values()) == 32 * 32 * len(test)
        True
        >>> scores.by_distance.column_names[:4]
        ['from_m', 'to_m', 'chips', 'pixels']
        """
        from rasteret_dask.evaluation.evaluate import ChipReading, Question, evaluate

        plan = None if splits is None else training_plan(splits)
        table = regions if regions is None or isinstance(regions, pa.Table) else regions_of(regions)
        question = Question(
            predictions, labels, plan, regions if table is None else table, tuple(distances_m), column, classes, band,
            nodata, once,
        )  # fmt: skip
        chosen = ChipReading(self.job, self._layout.outputs, self._context(on_error), self.planned.reference)
        return evaluate(chosen, question, client, progress)


def training_plan(splits: Any) -> TrainingPlan:
    """Return the chips that ``evaluate(splits=)`` means.

    Raises
    ------
    PlanError, SchemaError, StoreError
        When they are none, or no chip of them is train.
    """
    from rasteret_dask.chipping.chips import PlannedChips
    from rasteret_dask.errors import PlanError
    from rasteret_dask.evaluation.ground import TrainingPlan
    from rasteret_dask.store.adding import as_planned
    from rasteret_dask.storeset import StoredChips, open_chips
    from rasteret_dask.table import geoparquet
    from rasteret_dask.tasks.jobfile import JOB_FILE, open_job, read_note

    if isinstance(splits, str | os.PathLike):
        url = Place.of(splits).url
        if url.endswith((".parquet", ".geoparquet")):
            return TrainingPlan.of(geoparquet.read(url))
        if remote.exists(remote.join(url, JOB_FILE)):
            job = open_job(url, read_note(url)["digest"])
            return TrainingPlan.of(job.chosen_chips(), max(job.reaches_m, default=0.0))
        splits = open_chips(splits)
    if isinstance(splits, StoredChips):
        chips = as_planned(splits.stored)
        return TrainingPlan.of(chips.table, chips.reach_m)
    if isinstance(splits, pa.Table):
        return TrainingPlan.of(splits)
    planned = getattr(splits, "planned", None)
    if not isinstance(planned, PlannedChips):
        raise PlanError(
            "evaluate(splits=)", f"a {type(splits).__name__}", "chips, a store, a saved plan or a chip table",
            "Give one of them, or its path.",
        )  # fmt: skip
    return TrainingPlan.of(planned.table, planned.reach_m)
