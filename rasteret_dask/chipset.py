# SPDX-License-Identifier: Apache-2.0
"""A lazy set of chips: split, filter and select them, look at the plan, write them out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import pyarrow as pa

from rasteret_dask.chipexits import ChipExits
from rasteret_dask.chipping.blocks import WINDOWS
from rasteret_dask.chipping.chips import PlannedChips, used_rows
from rasteret_dask.chipping.drawing import plan_chips, plan_chosen
from rasteret_dask.chipping.steps import apply_step, steps_of
from rasteret_dask.chipstatistics import ChipStatistics
from rasteret_dask.chipsteps import ChipSteps
from rasteret_dask.chipviews import ChipViews
from rasteret_dask.errors import PlanError
from rasteret_dask.extras import needs
from rasteret_dask.modelexits import ModelExits
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.net.places import Place
from rasteret_dask.planning.plan import (
    FilterChips,
    FilterPixels,
    Folds,
    Function,
    Node,
    Sample,
    Select,
    Split,
)
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.scan import Table
from rasteret_dask.runlimits import NO_LIMITS, RunLimits
from rasteret_dask.scoreexits import ScoreExits
from rasteret_dask.splitcells import no_cells
from rasteret_dask.table import geoparquet
from rasteret_dask.words import OnError

if TYPE_CHECKING:
    import xarray as xr
    from dask.delayed import Delayed
    from dask.highlevelgraph import HighLevelGraph

    from rasteret_dask.chipblocks import ChipBlocks
    from rasteret_dask.display.card import Card
    from rasteret_dask.prediction.modelchips import ModelChips
    from rasteret_dask.show.losses import Tracer
    from rasteret_dask.store.encode import Compression
    from rasteret_dask.store.jobreport import JobReport
    from rasteret_dask.store.layout import Layout
    from rasteret_dask.streams.chipshards import ChipShards
    from rasteret_dask.tasks.context import ReadContext
    from rasteret_dask.tasks.job import Job

# What only one exit needs, that exit imports: who looks at a plan does not wait for what writes stores.

__all__ = ["Chips"]


class Chips(ChipSteps, ChipViews, ChipStatistics, ChipExits, ModelExits, ScoreExits):
    """An immutable, lazy set of chips, made by :meth:`Collection.chips`.

    Parameters
    ----------
    query
        The steps so far, with the tables and the user's functions that they name.
    parent
        The chips that the plan's last step is applied to, so that what is planned already is not planned again.

    Examples
    --------
    >>> chips = collection.harmonize(["red", "nir"], time="1MS").chips(32, cell_km=0.96)
    >>> len(chips), chips.table["chip_id"][0].as_py()
    (154, '33_0.96km_32px_10m_-17375_1557')
    >>> train = chips.split(seed=1).select("train")  # a new one: the first stays as it is
    >>> len(train) < len(chips)
    True
    """

    def __init__(self, query: Query, parent: Chips | None = None) -> None:
        self.query = query
        self.plan = query.plan
        self._parent = parent
        self._in_memory: PlannedChips | None = None
        self._recipe: str | None = None  # the text that said these very chips; further steps are other chips

    @classmethod
    def _of(cls, query: Query, planned: PlannedChips) -> Chips:
        """Return chips whose table was made already, and is not made again."""
        chips = cls(query)
        chips._in_memory = planned
        return chips

    @cached_property
    def _sizes(self) -> dict[str, tuple[int, ...]]:
        """Kept chips of each shard, by ``on_error``, once a stream has looked."""
        return {}

    def by_blocks(
        self,
        folder: str | os.PathLike[str],
        client: ClientLike = None,
        progress: bool = True,
        windows: int = WINDOWS,
    ) -> ChipBlocks[Chips]:
        """Plan block by block, on a Dask cluster, into Arrow files: for more chips than fit into this process.

        The chip table is the same as :attr:`table`, row by row: ids, splits and feeds. A call of the same plan goes on
        where another one stopped, and only opens the plan once it is whole.

        Parameters
        ----------
        folder
            A folder of its own: a local path or a URL that all workers reach.
        client
            A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
        progress
            Show how many blocks are planned.
        windows
            About how many candidate windows a block has: what a task holds is some 4 kB each.

        Raises
        ------
        PlanError
            When a step needs chips of other blocks (a buffer between splits, a sample, a user's table), chips cover an
            area (``cover=True``), the grid is not UTM's or one of a CRS, or no chip is left.
        StoreError
            When the folder holds something else.

        Examples
        --------
        >>> plan = chips.by_blocks("plan", progress=False)
        >>> len(plan) == len(chips)
        True
        >>> report = plan.select("train").to_zarr("train.zarr", progress=False)
        """
        from rasteret_dask.chipblocks import ChipBlocks, planned_by_blocks

        blocks = planned_by_blocks(self.query, folder, windows, client, progress)
        return ChipBlocks(self.query, blocks, Chips._of)

    # What it is

    @cached_property
    def planned(self) -> PlannedChips:
        """The planned chips: the chip table and what it was made from.

        Examples
        --------
        >>> chips.planned.table is chips.table
        True
        """
        if self._in_memory is not None:
            return self._in_memory
        anew = isinstance(self.plan, FilterPixels) and self.plan.spec.max_cloud is not None
        if anew and self._first._in_memory is not None:
            raise PlanError(
                "filter_pixels(max_cloud=)", "chips that were planned without a quality band",
                "this step before by_blocks", "chips.filter_pixels(max_cloud=...).by_blocks(folder).",
            )  # fmt: skip
        if self._parent is None or anew:
            return plan_chips(self.plan, self.query.tables)
        again = isinstance(self.plan, FilterChips) and isinstance(self._parent.plan, Sample)
        if isinstance(self.plan, Sample | FilterChips) and not (again or self._parent._is_planned):
            chosen = plan_chosen(self.plan, self.query.tables)
            if chosen is not None:
                return chosen
        return apply_step(self._parent.planned, self.plan, self.query.tables)

    @property
    def _is_planned(self) -> bool:
        """Whether these chips, or some that they are chosen from, are planned already."""
        chips: Chips | None = self
        while chips is not None and chips._in_memory is None and "planned" not in vars(chips):
            chips = chips._parent
        return chips is not None

    @property
    def _first(self) -> Chips:
        """The chips before every step that this object knows of."""
        chips = self
        while chips._parent is not None:
            chips = chips._parent
        return chips

    @property
    def _unselected(self) -> Chips:
        """These chips before trailing selects, which number the shards."""
        chips = self
        while isinstance(chips.plan, Select) and chips._parent is not None:
            chips = chips._parent
        return chips

    @property
    def split_cells(self) -> pa.Table:
        """Split cells with the split that each got: columns cell and split, the chips' own and those of ``cells=``.

        It goes with the plan and the store. ``split(cells=)`` takes it, so that later deals move no cell.

        Raises
        ------
        PlanError
            When there is no split, or a hash deals the cells: the same seed then gives each the same split again.

        Examples
        --------
        >>> import pyarrow as pa
        >>> dealt = chips.split(cells=pa.table({"cell": ["33/-5792/519"], "split": ["test"]}))
        >>> dealt.split_cells.column_names
        ['cell', 'split']
        """
        cells = self.planned.cells
        if cells is None:
            raise no_cells("split_cells", "split")
        return cells.table

    @property
    def fold_cells(self) -> pa.Table:
        """Split cells with the fold that each got: columns cell and fold; ``folds(cells=)`` takes it.

        It goes with the plan and the store, as :attr:`split_cells`.

        Raises
        ------
        PlanError
            When there are no folds, or a hash deals the cells.

        Examples
        --------
        >>> import pyarrow as pa
        >>> folds = chips.folds(3, cells=pa.table({"cell": ["33/-5792/519"], "fold": [2]}))
        >>> folds.fold_cells.column_names
        ['cell', 'fold']
        """
        cells = self.planned.fold_cells
        if cells is None:
            raise no_cells("fold_cells", "fold")
        return cells.folds

    @property
    def table(self) -> pa.Table:
        """The chip table: one row per chip, CHIP_SCHEMA and the user's further columns.

        Examples
        --------
        >>> chips.table.column_names[:6]
        ['chip_id', 'epsg', 'row', 'col', 'cell', 'xmin']
        >>> chips.table["coverage"].to_pylist()[:2]
        [1.0, 1.0]
        """
        return self.planned.table

    def to_geopandas(self) -> Any:
        """Return the chip table as a GeoDataFrame in lon/lat, without ``feeds``.

        Examples
        --------
        >>> frame = chips.to_geopandas()
        >>> sorted(frame.groupby("split").size().to_dict().items())
        [('test', 21), ('train', 124), ('val', 9)]
        """
        with needs("geo", "a GeoDataFrame of chips"):
            import geopandas
        import shapely

        plain = self.table.drop_columns(["feeds", "geometry"]).to_pandas()
        wkb = self.table.column("geometry").to_numpy(zero_copy_only=False)
        return geopandas.GeoDataFrame(plain, geometry=shapely.from_wkb(wkb), crs=4326)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the chip table as GeoParquet.

        Examples
        --------
        >>> chips.save("chips.parquet")  # GeoParquet: QGIS and DuckDB open it
        >>> len(chips.with_table("chips.parquet")) == len(chips)
        True
        """
        geoparquet.write(self.table, path)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def _tracer(self) -> Tracer:
        """Who asks about one place asks about others: what they have in common is worked out once."""
        from rasteret_dask.show.losses import Tracer

        return Tracer(self.query, self._staged)

    def _staged(self, plan: Node) -> PlannedChips:
        """Return the planned chips behind a step of the plan."""
        chips: Chips | None = self
        while chips is not None and chips.plan is not plan:
            chips = chips._parent
        return (chips or Chips(self.query.then(plan))).planned

    # Exits

    @cached_property
    def job(self) -> Job:
        """The frozen plan: shards, the records they need, and their keys.

        Examples
        --------
        >>> job = chips.select("train").job
        >>> sum(1 for _ in job.shards())
        1
        """
        from rasteret_dask.tasks.freezing import freeze
        from rasteret_dask.tasks.jobkernels import warn_of_job

        job = freeze(self._unselected.planned)
        warn_of_job(job)
        if not isinstance(self.plan, Select):
            return job
        chosen = set(self.planned.table.column("split").to_pylist())
        return job.select(chosen)

    @property
    def dask(self) -> HighLevelGraph:
        """The graph: one named Blockwise layer per step; culled to the selected shards.

        Examples
        --------
        >>> graph = chips.dask
        >>> sorted(name.split("-")[0] for name in graph.layers)
        ['cube', 'job', 'join', 'merge']
        """
        from rasteret_dask.tasks.shards import lower

        return lower(self.job, self._context()).culled()

    def _context(self, on_error: OnError = "raise") -> ReadContext:
        from rasteret_dask.tasks.context import ReadContext

        return ReadContext(self.query.functions, on_error)

    @cached_property
    def _layout(self) -> Layout:
        from rasteret_dask.store.layout import layout_of

        return layout_of(self.job, used_rows(self.planned), self.query, self.planned.dropped)

    @property
    def _model_chips(self) -> ModelChips:
        from rasteret_dask.prediction.modelchips import ModelChips, ground_of

        return ModelChips(self.job, self.query.functions, ground_of(self.planned), self._layout.provenance)

    def to_xarray(self, on_error: OnError = "raise") -> xr.Dataset | xr.DataTree:
        """Return the chips lazily: a Dataset, or a DataTree with a node a source.

        Each has ``pixels`` (chip, time, band, y, x), and ``valid`` (chip, time, y, x) where pixels are integers.

        Parameters
        ----------
        on_error
            What becomes of a tile that cannot be read: ``"raise"`` a ReadError, or ``"mask"``: its pixels are
            invalid, and each shard that has such tiles warns of them when it is computed.

        Examples
        --------
        >>> lazy = chips.select("val").to_xarray()
        >>> lazy["pixels"].dims, lazy["pixels"].dtype
        (('chip', 'time', 'band', 'y', 'x'), dtype('float32'))
        """
        from rasteret_dask.store.outputs import to_xarray

        return to_xarray(self._layout, self._context(on_error))

    def load(self, on_error: OnError = "raise") -> xr.Dataset | xr.DataTree:
        """Read the chips into memory: what ``to_xarray().load()`` gives, without putting it together from shards.

        This process reads, with as many of Dask's threads as are configured (``dask.config`` ``num_workers``).

        Parameters
        ----------
        on_error
            As in :meth:`to_xarray`.

        Examples
        --------
        >>> val = chips.select("val").load()
        >>> val["pixels"].shape, round(float(val["valid_fraction"].mean()), 2)
        ((9, 3, 2, 32, 32), 0.55)
        """
        from rasteret_dask.store.outputs import load

        return load(self._layout, self._context(on_error))

    @overload
    def to_zarr(
        self,
        store: str | os.PathLike[str],
        client: ClientLike = None,
        compute: Literal[True] = True,
        progress: bool = True,
        compression: Compression = "auto",
        on_error: OnError = "raise",
        limits: RunLimits = NO_LIMITS,
        append: bool = False,
    ) -> JobReport: ...

    @overload
    def to_zarr(
        self,
        store: str | os.PathLike[str],
        client: ClientLike = None,
        *,
        compute: Literal[False],
        progress: bool = True,
        compression: Compression = "auto",
        on_error: OnError = "raise",
        limits: RunLimits = NO_LIMITS,
        append: bool = False,
    ) -> Delayed: ...

    def to_zarr(
        self,
        store: str | os.PathLike[str],
        client: ClientLike = None,
        compute: bool = True,
        progress: bool = True,
        compression: Compression = "auto",
        on_error: OnError = "raise",
        limits: RunLimits = NO_LIMITS,
        append: bool = False,
    ) -> JobReport | Delayed:
        """Write the chips to a sharded Zarr v3 store on a Dask cluster; a rerun does what is missing.

        Parameters
        ----------
        store
            A local path or a URL of an object store.
        client
            A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this
            process, as many as cores and memory allow.
        compute
            False returns a lazy object: ``.compute()`` on any Dask scheduler writes and commits.
        progress
            Show how many shards are written.
        compression
            ``BloscCodec``, ``ZstdCodec`` or ``GzipCodec`` of ``zarr.codecs``; None: none; ``"auto"``: what serves
            each dtype best (see ``docs/benchmarks.md``). A rerun must give the same.
        on_error
            What becomes of a tile that cannot be read: ``"raise"`` fails its shard, ``"mask"`` makes its pixels
            invalid; ``manifest.parquet`` lists such tiles, and an UnreadableTilesWarning counts them at the end.
        limits
            What this run does of the job: a part of an array job, how long it may take, a file that shows it is
            alive. See :class:`RunLimits`.
        append
            Write to a finished store what it does not have of these chips: new ground, new dates, with labels of their
            own. Area, dates and labels may differ from the store's plan, nothing else. Slots of a chip that the store
            has are not read again. Where slots are each chip's own, chips whose acquisitions changed are written whole,
            in place of what the store has of them; the dates must include those of the store. What is new is committed
            as a part of its own, which readers see once it is whole; a rerun goes on with it. Where nothing lies there,
            the chips become the store.

        Returns
        -------
        JobReport
            What was written, what it took and what became of the chips; a lazy object with ``compute=False``.

        Raises
        ------
        PlanError
            When ``compression`` or ``on_error`` is none of these, or there are limits and ``compute`` is False; when
            ``append`` comes with ``compute=False``, or with a part of an array job.
        StoreError
            When the store holds something else, or these chips in another compression; with ``append``, when its plan
            differs in more than area, dates and labels, it is not finished, or another append is not.
        JobError
            When shards failed; the others are written, and a rerun does only those.
        IncompleteError
            When ``limits.max_time`` is over before all shards are written; a rerun does the rest.

        Examples
        --------
        >>> report = chips.select("train").to_zarr("train.zarr", progress=False)
        >>> import xarray as xr
        >>> xr.open_zarr("train.zarr")["pixels"].dims
        ('chip', 'time', 'band', 'y', 'x')
        >>> report = chips.to_zarr("train.zarr", progress=False, append=True)  # the other splits
        >>> len(rd.open_chips("train.zarr")) == len(chips)
        True
        """
        from rasteret_dask.store.encode import checked
        from rasteret_dask.store.limits import begun
        from rasteret_dask.store.run import delayed_zarr, run_zarr

        if append:
            _check_append(compute, limits)

        url = Place.of(store).folder("a folder, or nothing yet", "Choose another place.")
        limits.check_computed(compute)
        with begun(limits) as bounds:
            layout = replace(self._layout, compression=checked(compression), recipe=self._recipe)
            if append:
                from rasteret_dask.store.appending import Growth, append_zarr

                context = self._context(on_error)
                growth = Growth(self.planned, self.query, layout, context, client, progress, bounds)
                return append_zarr(growth, url)
            if not compute:
                return delayed_zarr(layout, url, self._context(on_error))
            return run_zarr(layout, url, self._context(on_error), client, progress, bounds)

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
        """Write the plan, JSON and Arrow tables, to a new folder, from which :func:`open_plan` opens it elsewhere.

        What lies there of this very plan already is kept, and what of it is missing or damaged is written again.

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
        >>> next(rd.open_plan("plan").stream(batch_size=8))["s2"].shape
        (8, 3, 2, 32, 32)
        """
        from rasteret_dask.planfile import save_plan
        from rasteret_dask.tasks.jobfile import check_writable

        check_writable(self.job)
        sizes = self._shards("raise", client).sizes if self.job.pixel_rules else None
        save_plan(replace(self._layout, recipe=self._recipe), self._model_chips.ground, path, sizes)

    def _shards(self, on_error: OnError, client: ClientLike = None) -> ChipShards:
        """Return what a stream reads; where rules drop chips, all are looked at once to know how many."""
        from rasteret_dask.streams.planned import planned

        make = partial(planned, self.job, self._layout.outputs, self._context(on_error))
        if not self.job.pixel_rules:
            return make()
        if on_error not in self._sizes:
            from rasteret_dask.statistics.measuring import kept_sizes

            self._sizes[on_error] = kept_sizes(make(), client, progress=True)
        return make(sizes=self._sizes[on_error])

    def _with(
        self,
        plan: Node,
        tables: Mapping[str, Table] | None = None,
        functions: Mapping[Function, Callable[..., Any]] | None = None,
    ) -> Self:
        return type(self)(self.query.then(plan, tables, functions), parent=self)

    @property
    def _card(self) -> Card:
        from rasteret_dask.show.cards import chips_card

        return chips_card(self.query, vars(self).get("planned", self._in_memory))

    def __repr__(self) -> str:
        return self._card.text

    def _repr_html_(self) -> str:
        return self._card.html


def _check_append(compute: bool, limits: RunLimits) -> None:
    """Raise PlanError where an append is asked for what only a store's first part can be written by."""
    if not compute:
        raise PlanError(
            "to_zarr(append=True)", "compute=False", "an append that is carried out",
            "Leave compute out: which parts it takes is settled when it begins.",
        )  # fmt: skip
    if limits.part is not None:
        raise PlanError(
            "to_zarr(append=True)", f"{limits.name} of an array job", "one process, or a cluster",
            "Give to_zarr a cluster (client=), or write the parts as a store of their own: rd.open_chips([a, b]).",
        )  # fmt: skip
