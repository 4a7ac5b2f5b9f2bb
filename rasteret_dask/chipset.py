# SPDX-License-Identifier: Apache-2.0
"""A lazy set of chips: split, filter and select them, look at the plan, write them out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import pyarrow as pa

from rasteret_dask.chipexits import ChipExits
from rasteret_dask.chipping.blocks import WINDOWS
from rasteret_dask.chipping.chips import PlannedChips, used_rows
from rasteret_dask.chipping.drawing import plan_chips, plan_chosen
from rasteret_dask.chipping.regions import check_regions
from rasteret_dask.chipping.steps import FOLD, apply_step, steps_of
from rasteret_dask.classraster import StratifyLike, raster_of
from rasteret_dask.errors import PlanError, SchemaError
from rasteret_dask.extras import needs
from rasteret_dask.modelexits import ModelExits
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.net.places import Place
from rasteret_dask.planning.plan import (
    FilterChips,
    FilterPixels,
    Folds,
    Function,
    Map,
    Node,
    Predicate,
    Random,
    Rule,
    Sample,
    Select,
    Split,
    SplitSpec,
    WithTable,
    check_apart,
    predicates,
)
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.scan import Table, token_of
from rasteret_dask.planning.shares import Share, dealt_spec, fold_spec, split_spec
from rasteret_dask.runlimits import NO_LIMITS, RunLimits
from rasteret_dask.scoreexits import ScoreExits
from rasteret_dask.splitcells import CellsLike, Regions, cells_from, no_cells, regions_of
from rasteret_dask.table import geoparquet
from rasteret_dask.words import Boundary, OnError, SplitBy

if TYPE_CHECKING:
    import xarray as xr
    from dask.delayed import Delayed
    from dask.highlevelgraph import HighLevelGraph

    from rasteret_dask.chipblocks import ChipBlocks
    from rasteret_dask.display.card import Card
    from rasteret_dask.show.audit import Audit
    from rasteret_dask.show.explain import Explanation
    from rasteret_dask.show.losses import Tracer
    from rasteret_dask.show.why import Why
    from rasteret_dask.statistics.stats import Stats
    from rasteret_dask.store.encode import Compression
    from rasteret_dask.store.jobreport import JobReport
    from rasteret_dask.store.layout import Layout
    from rasteret_dask.streams.augmenting import Augment
    from rasteret_dask.streams.chipshards import ChipShards
    from rasteret_dask.streams.stream import Normalize, Stream
    from rasteret_dask.streams.weights import WeightsLike
    from rasteret_dask.tasks.context import ReadContext
    from rasteret_dask.tasks.job import Job

# What only one exit needs, that exit imports: who looks at a plan does not wait for what writes stores.

__all__ = ["Chips"]


class Chips(ChipExits, ModelExits, ScoreExits):
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

    # Steps

    def split(
        self,
        /,
        train: Share | None = None,
        val: Share | None = None,
        test: Share | None = None,
        *,
        seed: int = 0,
        by: SplitBy | str | Regions = "ground",
        buffer_m: float = 0.0,
        boundary: Boundary = "drop",
        gap: str | None = None,
        date: str | None = None,
        stratify: StratifyLike | None = None,
        cells: CellsLike | None = None,
        **shares: Share,
    ) -> Chips:
        """Give each chip a split, so that the same ground always lands in the same one.

        Parameters
        ----------
        train, val, test
            Shares of the ground. Nothing: 0.7, 0.15 and 0.15; train alone: val and test halve the rest. Where ``by`` is
            a column, lists of its values; all others are train.
        **shares
            The same for splits of any other name. All shares sum to 1.
        seed
            Another seed deals the ground out anew.
        by
            ``"ground"`` (a hash of the split cell), ``"geometry"`` (md5 of the records' footprints, as published
            guides do; leaks, and ignores the seed), or a column of the chip table. Without lists, each of its values
            is a split of that name, and null is none. ``"time"``: each split has a range, ``test=("2023", None)``, and
            chips with records of two ranges have no split; with ``date``, the range that holds the chip's own date.
            Polygons with one column of names (a GeoDataFrame, a table with WKB, a GeoParquet file's path): the split is
            by that column, of the region that holds the whole chip.
        buffer_m
            Drop chips of other splits nearer than this to train.
        boundary
            What happens to windows that touch two splits: ``"drop"``, or ``"centre"`` decides by their centre.
        gap
            Of splits by time, a length such as ``"30D"``: drop chips of other splits that are nearer in time to any
            train chip: by their records, or by ``date``.
        date
            Of splits by time: a column of dates of the chip table, such as one of ``chips(at=)``: a chip is in the
            split whose range holds its date, whatever its records' time. A chip without a date has no split, and is
            counted. None: the time of the chip's records.
        stratify
            Deal split cells so that each split has its share of every class: a column of the chip table with a class
            for each chip, the column that ``chips(labels=, rasterize=)`` burns, or a list of columns of numbers that
            say how much of a class each chip has. Or a raster of classes: the path or URL of a GeoTIFF, a Collection
            with one band of classes, or a joined source of classes by its name (``"cover"``, ``"cover/map"``). It is
            read now, once, on 64 x 64 points of each split cell, from the coarsest overview that is fine enough; each
            chip counts with the classes of its split cell. The counts are kept with the plan. None: a hash deals them.
        cells
            Split cells that keep the split which they have: a table with columns cell and split
            (:attr:`split_cells`), chips, or the path of a store, a saved plan or a Parquet file. Other cells are dealt
            so that shares come near to those that are wanted.

        Raises
        ------
        PlanError
            When shares do not sum to 1, or a split has a name that a store cannot have; of chips that cover an area, as
            they overlap; when planning finds a class in one split cell only, or fewer cells than splits.

        Warns
        -----
        StrataWarning
            When classes lie in fewer split cells than there are splits.

        Notes
        -----
        Splits follow each other as train, val, test, then the others by name, in whatever order they are written.

        Examples
        --------
        >>> dealt = chips.split(train=0.6, val=0.2, test=0.1, calibration=0.1, seed=7)
        >>> sorted(set(dealt.table["split"].to_pylist()))
        ['calibration', 'test', 'train', 'val']
        >>> chips.folds(5).split(by="fold", test=[0], val=[1]).audit().ok
        True
        >>> apart = chips.split(train=0.6, val=0.2, test=0.2, seed=7, buffer_m=400)
        >>> len(chips.split(0.6, seed=7).select("test")), len(apart.select("test"))
        (37, 3)
        """
        parts = {"train": train, "val": val, "test": test, **shares}
        regions = regions_of(by)
        token = None if regions is None else token_of(regions)
        own: dict[str, Table] = {}
        if regions is not None:
            by = check_regions(regions)
            own[str(token)] = regions
        spec = split_spec(parts, seed, by, buffer_m, boundary)  # type: ignore[arg-type]
        spec, tables = self._dealt(replace(spec, gap=gap, date=date, regions=token), stratify, cells)
        return self._with(Split(self.plan, spec), own | tables)

    def _dealt(
        self, spec: SplitSpec, stratify: StratifyLike | None, cells: CellsLike | None
    ) -> tuple[SplitSpec, dict[str, Table]]:
        """Return splits or folds with what decides the deal of their cells, and the tables that they name."""
        check_apart(self.plan, spec.step)  # before a raster is read
        tables: dict[str, Table] = {}
        dealt = None
        if cells is not None:
            table = cells_from(cells, "fold" if spec.step == "folds" else "split")
            tables[dealt := token_of(table)] = table
        raster = None if stratify is None else raster_of(stratify, self.query)
        if raster is None:
            return dealt_spec(spec, stratify, dealt), tables  # type: ignore[arg-type]
        spec = dealt_spec(spec, raster.name, dealt)  # what goes wrong is told before anything is read
        counts = raster.counted(self.query, spec.step)
        tables[token_of(counts)] = counts
        return replace(spec, raster=token_of(counts)), tables

    def folds(
        self,
        k: int,
        *,
        seed: int = 0,
        boundary: Boundary = "drop",
        stratify: StratifyLike | None = None,
        cells: CellsLike | None = None,
    ) -> Chips:
        """Add a column ``fold`` for cross-validation: split cells are dealt to ``k`` equal folds.

        The same ground is in the same fold, as with :meth:`split`; seeds of both have nothing to do with each other.

        Parameters
        ----------
        k
            How many folds; they are called 0 to k - 1.
        seed
            Another seed deals the ground out anew.
        boundary
            Windows that touch two folds are in none (null), or with ``"centre"`` in that of their centre.
        stratify
            Deal cells so that each fold has its share of every class, as in :meth:`split`. None: a hash deals them.
        cells
            Split cells that keep the fold which they have: a table with columns cell and fold (:attr:`fold_cells`),
            chips, or the path of a store, a saved plan or a Parquet file.

        Raises
        ------
        PlanError
            When there are fewer split cells than folds, or there is a column ``fold``; of chips that cover an area, as
            they overlap; when planning finds a class in one split cell only.

        Warns
        -----
        StrataWarning
            When classes lie in fewer split cells than there are folds.

        Examples
        --------
        >>> folds = chips.folds(5, seed=1)
        >>> sorted(set(folds.table["fold"].to_pylist()))
        [0, 1, 2, 3, 4]
        >>> sum(len(folds.fold(i).select("val")) for i in range(5)) == len(chips)
        True
        """
        spec, tables = self._dealt(fold_spec(k, seed, boundary), stratify, cells)
        return self._with(Folds(self.plan, spec), tables)

    def fold(self, i: int, *, buffer_m: float = 0.0) -> Chips:
        """Split the chips by their column ``fold``: val is fold ``i``, train all others.

        Parameters
        ----------
        i
            A value of the column, which :meth:`folds` makes, or a table of yours has.
        buffer_m
            Drop val chips nearer than this to train.

        Raises
        ------
        PlanError
            When there is no column ``fold``, or ``i`` is none of its values.

        Examples
        --------
        >>> for i in range(5):
        ...     fold = chips.folds(5).fold(i)
        ...     assert fold.audit().ok
        """
        return self.split(by=FOLD, val=[i], buffer_m=buffer_m)

    def select(self, *splits: str) -> Chips:
        """Keep the chips of these splits.

        Examples
        --------
        >>> train = chips.select("train")
        >>> set(train.table["split"].to_pylist())
        {'train'}
        """
        if not splits:
            raise PlanError("select", "no split", "at least one, such as select('train')")
        return self._with(Select(self.plan, splits))

    def filter(self, *triples: Predicate | Any, **columns: Any) -> Chips:
        """Keep the chips whose columns fulfil all predicates: triples, or ``column=value``; as Collection.filter.

        For rules on pixels see :meth:`filter_pixels`.

        Examples
        --------
        >>> south = chips.filter(("ymax", "<", 5_558_000))
        >>> len(south), len(chips)
        (56, 154)
        >>> len(chips.filter(split="val")) == len(chips.select("val"))
        True
        """
        return self._with(FilterChips(self.plan, predicates(triples, columns)))

    def sample(self, n: int, seed: int = 0, by: str | None = None) -> Chips:
        """Keep ``n`` chips by hash of their id, per stratum of column ``by``; a larger n contains the smaller.

        Notes
        -----
        Of chips that nobody has looked at, a small sample is drawn before records are looked for, and the others are
        never planned. What only all of them tell is then not told: ``explain()`` counts what was dropped among the
        windows that were looked at, and a ``split`` before the sample does not warn of few split cells. Look at
        ``len(chips)`` before the sample to plan all of them.

        Examples
        --------
        >>> len(chips.sample(10, seed=1))
        10
        >>> len(chips.sample(5, by="split"))  # five of each split
        15
        """
        return self._with(Sample(self.plan, n, seed, by))

    def random(
        self,
        n: int,
        *,
        seed: int = 0,
        size: int | None = None,
        balance: str | Sequence[str] | pa.Table | None = None,
    ) -> Chips:
        """Draw ``n`` windows at random places on the ground of these chips, which take the chips' place.

        Each window lies on whole pixels, and on ground that chips of one split cell, split and fold cover: so it is in
        their split, and no window shares ground with one of another split. It keeps the columns of the chip that
        holds its middle. What feeds it is looked for anew, as for any chip.

        Parameters
        ----------
        n
            How many. A larger n of the same chips contains the smaller one; no window comes twice.
        seed
            Another seed draws others.
        size
            Pixels of the reference source; None: as large as the chips. Windows may be larger than chips that lie side
            by side.
        balance
            Draw equally many windows for each class. The name of a column: one that ``chips(rasterize=)`` burns, where
            a window's middle is a pixel of the class; or one of the chip table that has a class for each chip. A list
            of columns of numbers, as :meth:`class_shares` makes them: chips are drawn by how much they have of each.
            A table of places, as :meth:`class_places` makes it: middles are such places.
            A column ``centre_class`` tells for which class a window was drawn. Ground without a label is no class.

        Raises
        ------
        PlanError
            When there is no such column, it holds no classes, or there are fewer windows than classes; when no window
            of that size lies on the ground of chips that belong together.
        GridError
            When the size is no whole number of the pixels of every source.

        Warns
        -----
        UserWarning
            When there are fewer different windows, of some class, than are asked for.

        Notes
        -----
        A place is drawn, a pixel of the ground or of a class, as the middle of a window. Where this reaches beyond the
        ground, another place is drawn. After 16 of them, as where chips lie apart, the window is moved into its chip.
        Windows of several sources lie on whole pixels of each, so that the middle is the place but for less than the
        coarsest pixel.

        Examples
        --------
        >>> windows = chips.split(seed=1).random(100, seed=5, size=48)
        >>> len(windows), windows.load()["pixels"].sizes["y"]
        (100, 48)
        >>> windows.audit().ok
        True
        """
        if isinstance(balance, pa.Table):
            lacking = [
                name for name in ("chip_id", "class", "y", "x", "pixels") if name not in balance.column_names
            ]
            if lacking:
                raise SchemaError(
                    "random(balance=<places>)", f"a table without column {', '.join(lacking)}",
                    "a table of places, as class_places() makes it",
                )  # fmt: skip
            token = token_of(balance)
            return self._with(Random(self.plan, n, seed, size, places=token), {token: balance})
        columns = () if balance is None else (balance,) if isinstance(balance, str) else tuple(balance)
        return self._with(Random(self.plan, n, seed, size, columns))

    def map(
        self,
        function: Callable[[xr.DataArray], xr.DataArray],
        *,
        source: str | None = None,
        version: str | None = None,
    ) -> Chips:
        """Apply a function to the chips of each group: a DataArray (chip, time, band, y, x); see Collection.map.

        Examples
        --------
        >>> def brighter(pixels):
        ...     return pixels * 1.1
        >>> chips.sample(2).map(brighter).load()["pixels"].sizes["chip"]
        2
        """
        known = Function.of(function, version)
        return self._with(Map(self.plan, known, source), functions={known: function})

    def filter_pixels(
        self,
        function: Callable[[xr.DataArray], Any] | None = None,
        *,
        min_valid: float | None = None,
        max_cloud: float | None = None,
        min_labelled: float | None = None,
        source: str | None = None,
        version: str | None = None,
    ) -> Chips:
        """Keep the chips whose pixels pass every rule; rules are evaluated while pixels are read.

        ``len``, ``table`` and ``explain`` count what is planned, dropped chips too. A chip that is dropped keeps
        its place in a store, unwritten; :func:`open_chips`, ``load``, ``stream`` and ``stats`` see kept
        chips only. A stream looks at all pixels once, before its first batch, to know how many there are.

        Parameters
        ----------
        function
            Gets the pixels of a shard's chips, a DataArray (chip, time, band, y, x) after every ``map``, and returns
            True or False for each chip. What counts as the same function: see :meth:`map`.
        min_valid
            Smallest share of valid pixels, over the slots that have records.
        max_cloud
            Largest share of clouds and their shadows, over all slots, among the pixels that the records' quality band
            (SCL, QA_PIXEL, Fmask, ...) knows, whether they are masked or not.
        min_labelled
            Smallest share of the mask's pixels that have a label: that polygons of ``chips(labels=, rasterize=)``
            cover. Of several columns: a label of any of them.
        source
            The joined source this is about; None: the only one, or each that has such numbers.
        version
            A name for the function that changes when it does, where its text cannot tell.

        Raises
        ------
        PlanError
            When no rule is given, or a share is not from 0 to 1; when ``min_labelled`` speaks of a source without a
            mask.

        Examples
        --------
        >>> clear = chips.sample(20).filter_pixels(min_valid=0.9)
        >>> len(clear), clear.load().sizes["chip"]  # planned, kept
        (20, 12)
        """
        rule = Rule.of(function, min_valid, max_cloud, source, version, min_labelled)
        functions = {rule.function: function} if function is not None and rule.function is not None else {}
        return self._with(FilterPixels(self.plan, rule), functions=functions)

    def with_table(self, table: pa.Table | str | os.PathLike[str]) -> Chips:
        """Keep the chips of a table, with its further columns: ``.table`` or the path of what :meth:`save` wrote.

        The columns that the plan decides (bounds, split, ...) must be the plan's own; to split by a column of
        yours, give it another name and use ``split(by=...)``.

        Raises
        ------
        SchemaError
            When it is no table, names chips of another plan, or changes what the plan decides.

        Examples
        --------
        >>> import pyarrow as pa
        >>> table = chips.table.append_column("fold", pa.array([n % 5 for n in range(len(chips))]))
        >>> chips.with_table(table).filter(fold=0).table.num_rows
        31
        """
        if isinstance(table, str | os.PathLike):
            table = geoparquet.read(table)
        if not isinstance(table, pa.Table):
            raise SchemaError(
                "with_table", f"a {type(table).__name__}", "an Arrow table, or a GeoParquet file's path"
            )
        token = token_of(table)
        return self._with(WithTable(self.plan, token), tables={token: table})

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

    def explain(
        self,
        workers: int | None = None,
        threads: int = 1,
        *,
        probe: bool = False,
        rate: str | float | JobReport | None = None,
    ) -> Explanation:
        """Say what the job will do, before anything is read, and how much of the ground lies in a chip.

        ``["ground"]`` has the share of the ground that the plan asks for: what of the area (``aoi``, a GeoBox; else
        everywhere) the reference source's records lie on. With ``probe`` or ``rate`` it also estimates the time and the
        hours of all workers together, which :attr:`Explanation.usage` brings to a price.

        Parameters
        ----------
        workers
            Worker processes: says what they fetch together, at most, as what two of them need is fetched twice.
        threads
            Threads of each worker.
        probe
            Estimate the time from a few tiles, at most 12, which this process reads now from where they lie. Workers
            in another place read at another rate.
        rate
            Estimate the time from what one worker process fetches in a second: ``"50 MB/s"``, or a number of bytes;
            or from the report of a finished job of the same kind, such as a sample's. Only a report tells what masks,
            your functions and writing take. Nothing is read.

        Raises
        ------
        PlanError
            When there are no workers, or no threads; when both ``probe`` and ``rate`` are given, or that is no rate.
        ReadError
            When a tile of the probe cannot be read.

        Examples
        --------
        >>> told = chips.select("train").explain(workers=4, threads=2)
        >>> told["chips"], told["splits"], told["pixels"]["s2"]["native"]
        (124, {'train': 124}, 5)
        >>> print(told)
        records ...
        chips ...
        ...
        """
        from rasteret_dask.show import explain, probing
        from rasteret_dask.tasks.runs import Workforce

        if min(1 if workers is None else workers, threads) < 1:
            raise PlanError(
                "explain(workers=, threads=)", f"{workers} and {threads}", "at least 1 of each",
                "Leave workers out for what one process fetches.",
            )  # fmt: skip
        if probe and rate is not None:
            raise PlanError("explain(probe=, rate=)", "both", "one of them: measured, or stated")
        force = None if workers is None else Workforce(workers, threads)
        speed = None if rate is None else probing.rate_of(rate)
        measured = probing.probed(self.job) if probe else speed
        return explain.explain(self.planned, self.job, self._layout.outputs, force, measured)

    def audit(self) -> Audit:
        """Check the splits: ratios, losses, overlaps (must be 0) and distances, over all splits of the plan.

        Examples
        --------
        >>> audit = chips.audit()
        >>> audit.ok  # no ground in two splits
        True
        >>> print(audit)
        ok: no two splits share ground
        ...
        """
        from rasteret_dask.show import audit

        return audit.audit(self._unselected.planned)

    def why(self, chip_id: str | None = None, *, lon: float | None = None, lat: float | None = None) -> Why:
        """Say why a chip is as it is, or why there is none at a place.

        Of a chip: which records compete for each slot, with the share of the chip that each covers, that is valid and
        that is cloudy, which one was picked and why, and why the chip is in its split. The pixels of this one chip are
        read, of each record for itself. Of a place: what each step of the plan leaves there, up to the first that
        leaves no chip, and why. No pixel is read; steps that look at all chips (a sample, a buffer) plan all of them.

        Parameters
        ----------
        chip_id
            The chip, as in column ``chip_id`` of :attr:`table`.
        lon, lat
            The place, degrees.

        Raises
        ------
        PlanError
            When neither is given or both are, or no step of the plan ever had such a chip.

        Examples
        --------
        >>> print(chips.why(chips.table["chip_id"][3].as_py()))
        chip 33_0.96km_32px_10m_-17375_1560
          split train
          split cell 33/-5792/520: its hash with seed 1 is 0.1049, in train (0 to 0.7)
          s2, slot 2024-04: S2A_33UVR_20240409_0_L2A: 6.6 days from the slot's middle, and the next 8.4; 100.0% valid
          s2, slot 2024-06: S2B_33UVR_20240623_0_L2A: 7.4 days from the slot's middle, and the next 7.6; 100.0% valid
          source  slot_name  record                    datetime          coverage  valid   cloudy  role
          s2      2024-04    S2A_33UVR_20240409_0_L2A  2024-04-09 10:04  100.0%    100.0%  0.0%    picked
          s2      2024-04    S2B_33UVR_20240424_0_L2A  2024-04-24 10:04  100.0%    0.0%    100.0%  not used
          s2      2024-06    S2B_33UVR_20240623_0_L2A  2024-06-23 10:04  100.0%    100.0%  0.0%    picked
          s2      2024-06    S2A_33UVR_20240608_0_L2A  2024-06-08 10:04  100.0%    100.0%  0.0%    not used
        >>> why = chips.why(lon=14.975, lat=50.17)
        >>> why.chips, why.step[:5]
        ((), 'chips')
        >>> why.reasons
        ('covered to 78.1% at most by s2, in slot 2024-04; min_coverage asks for 100%',)
        """
        from rasteret_dask.show import why

        return why.why(self._tracer, chip_id, lon, lat)

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

    def plot(self, ax: Any = None) -> Any:
        """Draw the map of chips, coloured by split, with a legend that counts them; returns Matplotlib axes.

        Examples
        --------
        >>> axes = chips.plot()
        >>> axes.get_xlabel()
        'Easting, UTM zone 33N (km)'
        >>> axes.figure.savefig("chips.png")
        """
        from rasteret_dask.show.plot import plot_chips

        return plot_chips(self.table, ax=ax)

    def preview(self, n: int = 6) -> Any:
        """Draw some chips, chosen as by :meth:`sample`: all slots and sources, masks and labels; reads only these.

        Parameters
        ----------
        n
            How many chips.

        Returns
        -------
        matplotlib.figure.Figure
            A row a chip. It shows where it is the last value of a notebook's cell; ``.savefig(path)`` writes it.

        Raises
        ------
        PlanError
            When there is no chip to draw.
        MissingExtraError
            When matplotlib is not installed.

        Examples
        --------
        >>> figure = chips.preview(2)
        >>> figure.savefig("preview.png")
        """
        from rasteret_dask.show.plot import preview

        return preview(self, n)

    def explore(self, tiles: str | None = "OpenStreetMap") -> Any:
        """Return an interactive map of the chips, coloured by split, with their columns as popups (needs folium).

        Parameters
        ----------
        tiles
            What folium draws behind them, which the reader's browser asks for; None: nothing.

        Raises
        ------
        PlanError
            When there are no chips.
        MissingExtraError
            When folium is not installed.

        Examples
        --------
        >>> chips.explore(tiles=None).save("chips.html")
        """
        from rasteret_dask.show.maps import explore_chips

        return explore_chips(self.table, tiles)

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
            :meth:`to_xarray`.
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
            What :meth:`stats` of the train split returned, for this split as for the others: only then do they see the
            same numbers. It must have measured these sources, bands, dtypes and units. True: statistics of these
            very chips, measured once a process; ranks are better given what one of them measured
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
            As in :meth:`to_xarray`.

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
        from rasteret_dask.statistics.measuring import recalled
        from rasteret_dask.streams.stream import Batching

        batching = Batching(
            batch_size, shuffle, epochs, drop_last, rank, world_size, pad, client, prefetch, normalize, buffer,
            ignore_index, weights, balance, augment,
        )  # fmt: skip
        shards = self._shards(on_error, client)
        return batching.stream(
            shards,
            lambda: recalled(shards.digest, on_error) or self.stats(client=client, on_error=on_error),
        )

    def stats(
        self,
        sample: int | None = None,
        client: ClientLike = None,
        on_error: OnError = "raise",
        progress: bool = True,
        sources: Sequence[str] | None = None,
    ) -> Stats:
        """Measure the pixels of these chips in one pass: per source and band counts, moments, percentiles, classes.

        Label columns are counted too. Slots of a source that a chip lacks do not count.

        Parameters
        ----------
        sample
            Measure so many chips, chosen as by :meth:`sample`; None: all.
        client
            A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
        on_error
            As in :meth:`to_xarray`.
        progress
            Show how many shards are measured.
        sources
            Read and measure only these sources; None: all. Where ``filter_pixels`` decides on chips, all are read.

        Raises
        ------
        PlanError
            When no chip is left, or there is no such source.

        Examples
        --------
        >>> stats = chips.select("train").stats(sample=20)
        >>> stats.table["band"].to_pylist(), stats.table["mean"].to_pylist()[0] < 0.2
        (['red', 'nir'], True)
        """
        from rasteret_dask.statistics.measuring import chosen_sources, measured, remember
        from rasteret_dask.streams.planned import planned

        chips = self if sample is None else self.sample(sample)
        only = chosen_sources([s.name for s in chips.job.sources], sources)
        shards = planned(chips.job, chips._layout.outputs, self._context(on_error), only=only)
        stats = measured(shards, client, progress)
        if only is None:
            remember(stats, shards.digest, on_error)
        return stats

    def class_shares(
        self,
        target: str,
        *,
        prefix: str = "share_",
        client: ClientLike = None,
        on_error: OnError = "raise",
        progress: bool = True,
    ) -> pa.Table:
        """Return how much of each chip every class has, as a table that :meth:`with_table` takes.

        The class shares become columns of the chip table, for ``filter``, ``split(stratify=[...])`` and
        ``stream(weights=)``. A mask of polygons is burned for this, and no pixel is read; a band of classes is read
        once. The table stays with the plan, so that nothing is counted again.

        Parameters
        ----------
        target
            ``"<source>/mask"``, a source with one band of classes, or ``"<source>/<band>"``; as in
            :meth:`Stats.classes`.
        prefix
            Stands before the name of a class (its number where it has none) in the name of its column.
        client
            A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
        on_error
            As in :meth:`to_xarray`.
        progress
            Show how many shards are done.

        Returns
        -------
        pyarrow.Table
            ``chip_id``, and a column of float64 for each class, by value: its share of the pixels of a chip, from 0 to
            1; classes that have a name are there in any case. What no polygon covers, or is invalid, is of no class.
            Slots of which nothing is valid do not count.

        Raises
        ------
        PlanError
            When there is no such target, it is a mask of floats, or it has more than 256 classes.

        Examples
        --------
        >>> scl = collection.harmonize(["scl"], units="raw").chips(32, cell_km=0.96).sample(20)
        >>> shares = scl.class_shares("s2", progress=False)
        >>> shares.column_names[:2], shares.num_rows
        (['chip_id', 'share_3'], 20)
        >>> green = scl.with_table(shares).filter("share_4", ">", 0.5)  # SCL's vegetation
        >>> len(green) < len(scl)
        True
        """
        from rasteret_dask.statistics.classshares import burned_shares, class_shares, class_target
        from rasteret_dask.streams.planned import planned

        make = partial(planned, self.job, self._layout.outputs, self._context(on_error))
        found = class_target(make().pixels, target)
        if found.band is None and not self.job.pixel_rules:
            return burned_shares(self.job, found, prefix, client, progress)
        return class_shares(make(only=(found.source,)), found, prefix, client, progress)

    def class_places(
        self,
        target: str,
        *,
        per_chip: int = 16,
        seed: int = 0,
        client: ClientLike = None,
        on_error: OnError = "raise",
        progress: bool = True,
    ) -> pa.Table:
        """Return places of each class in each chip, as a table that :meth:`random` takes as ``balance``.

        A raster of classes is read once for this. Random windows are then drawn around these places, so that each class
        gets equally many. Burned labels need no such table: ``random(balance="crop")``.

        Parameters
        ----------
        target
            As in :meth:`class_shares`.
        per_chip
            Places of a class in a chip, at most: of more pixels, some are drawn.
        seed
            Another seed draws others.
        client, on_error, progress
            As in :meth:`class_shares`.

        Returns
        -------
        pyarrow.Table
            ``chip_id``; ``class``, its name or number; ``y`` and ``x``, from 0 at the chip's north-west corner to 1;
            ``pixels`` of the class in the chip, over all slots.

        Raises
        ------
        PlanError
            When there is no such target, it is a mask of floats, or ``per_chip`` is not from 1 to 1,000.

        Examples
        --------
        >>> scl = collection.harmonize(["scl"], units="raw", time="3MS").chips(32, cell_km=0.96)
        >>> places = scl.class_places("s2", progress=False)
        >>> windows = scl.random(30, seed=1, size=16, balance=places)
        >>> max(windows.table["centre_class"].value_counts().field("counts").to_pylist()) <= 30 // 2
        True
        """
        from rasteret_dask.statistics.classplaces import class_places
        from rasteret_dask.statistics.classshares import class_target
        from rasteret_dask.streams.planned import planned

        make = partial(planned, self.job, self._layout.outputs, self._context(on_error))
        found = class_target(make().pixels, target)
        return class_places(make(only=(found.source,)), found, per_chip, seed, client, progress)

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

    def _with(
        self,
        plan: Node,
        tables: Mapping[str, Table] | None = None,
        functions: Mapping[Function, Callable[..., Any]] | None = None,
    ) -> Chips:
        return Chips(self.query.then(plan, tables, functions), parent=self)

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
