# SPDX-License-Identifier: Apache-2.0
"""Steps of chips: each returns other chips, and nothing is planned or read."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa

from rasteret_dask.chipping.regions import check_regions
from rasteret_dask.chipping.steps import FOLD
from rasteret_dask.classraster import StratifyLike, raster_of
from rasteret_dask.errors import PlanError, SchemaError
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
from rasteret_dask.splitcells import CellsLike, Regions, cells_from, regions_of
from rasteret_dask.table import geoparquet
from rasteret_dask.words import Boundary, SplitBy

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["ChipSteps"]


class ChipSteps:
    """Steps of chips; :class:`Chips` has them."""

    if TYPE_CHECKING:
        query: Query
        plan: Node

        def _with(
            self,
            plan: Node,
            tables: Mapping[str, Table] | None = None,
            functions: Mapping[Function, Callable[..., Any]] | None = None,
        ) -> Self: ...

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
    ) -> Self:
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
    ) -> Self:
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

    def fold(self, i: int, *, buffer_m: float = 0.0) -> Self:
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

    def select(self, *splits: str) -> Self:
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

    def filter(self, *triples: Predicate | Any, **columns: Any) -> Self:
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

    def sample(self, n: int, seed: int = 0, by: str | None = None) -> Self:
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
    ) -> Self:
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
    ) -> Self:
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
    ) -> Self:
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

    def with_table(self, table: pa.Table | str | os.PathLike[str]) -> Self:
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
