"""A lazy set of chips: split, filter and select them, look at the plan, write them out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rasteret_dask.chipping.blocks import WINDOWS
from rasteret_dask.chipping.chips import PlannedChips, used_rows
from rasteret_dask.chipping.drawing import plan_chips, plan_chosen
from rasteret_dask.chipping.steps import apply_step
from rasteret_dask.errors import PlanError, SchemaError
from rasteret_dask.extras import needs
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.net.places import Place
from rasteret_dask.planning.plan import (
    FilterChips,
    FilterPixels,
    Function,
    Map,
    Node,
    Predicate,
    Rule,
    Sample,
    Select,
    Split,
    SplitSpec,
    WithTable,
    outline,
    predicates,
)
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.scan import Table, token_of
from rasteret_dask.table import geoparquet
from rasteret_dask.words import Boundary, OnError, SplitBy

if TYPE_CHECKING:
    import xarray as xr
    from dask.delayed import Delayed
    from dask.highlevelgraph import HighLevelGraph

    from rasteret_dask.chipblocks import ChipBlocks
    from rasteret_dask.show.audit import Audit
    from rasteret_dask.show.explain import Explanation
    from rasteret_dask.statistics.stats import Stats
    from rasteret_dask.store.encode import Compression
    from rasteret_dask.store.layout import Layout
    from rasteret_dask.streams.chipshards import ChipShards
    from rasteret_dask.streams.stream import Normalize, Stream
    from rasteret_dask.tasks.context import ReadContext
    from rasteret_dask.tasks.job import Job

# What only one exit needs, that exit imports: who looks at a plan does not wait for what writes stores.

__all__ = ["Chips"]


class Chips:
    """An immutable, lazy set of chips, made by :meth:`Collection.chips`.

    Parameters
    ----------
    query
        The steps so far, with the tables and the user's functions that they name.
    parent
        The chips that the plan's last step is applied to, so that what is planned already is not planned again.
    """

    def __init__(self, query: Query, parent: Chips | None = None) -> None:
        self.query = query
        self.plan = query.plan
        self._parent = parent
        self._in_memory: PlannedChips | None = None

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
        train: float = 0.7,
        val: float = 0.15,
        test: float = 0.15,
        *,
        seed: int = 0,
        by: SplitBy | str = "ground",
        buffer_m: float = 0.0,
        boundary: Boundary = "drop",
    ) -> Chips:
        """Give each chip a split, so that the same ground always lands in the same one.

        Parameters
        ----------
        train, val, test
            Shares that sum to 1.
        seed
            Another seed deals the ground out anew.
        by
            ``"ground"`` (a hash of the split cell), ``"geometry"`` (md5 of the records' footprints, as published
            guides do; leaks, and ignores the seed), or a column of the chip table.
        buffer_m
            Drop val and test chips nearer than this to train.
        boundary
            What happens to windows that touch two splits: ``"drop"``, or ``"centre"`` decides by their centre.
        """
        ratios = (("train", train), ("val", val), ("test", test))
        return self._with(Split(self.plan, SplitSpec(ratios, seed, by, buffer_m, boundary)))

    def select(self, *splits: str) -> Chips:
        """Keep the chips of these splits."""
        if not splits:
            raise PlanError("select", "no split", "at least one, such as select('train')")
        return self._with(Select(self.plan, splits))

    def filter(self, *triples: Predicate | Any, **columns: Any) -> Chips:
        """Keep the chips whose columns fulfil all predicates: triples, or ``column=value``; as Collection.filter.

        For rules on pixels see :meth:`filter_pixels`.
        """
        return self._with(FilterChips(self.plan, predicates(triples, columns)))

    def sample(self, n: int, seed: int = 0, by: str | None = None) -> Chips:
        """Keep ``n`` chips by hash of their id, per stratum of column ``by``; a larger n contains the smaller."""
        return self._with(Sample(self.plan, n, seed, by))

    def map(
        self,
        function: Callable[[xr.DataArray], xr.DataArray],
        *,
        source: str | None = None,
        version: str | None = None,
    ) -> Chips:
        """Apply a function to the chips of each group: a DataArray (chip, time, band, y, x); see Collection.map."""
        known = Function.of(function, version)
        return self._with(Map(self.plan, known, source), functions={known: function})

    def filter_pixels(
        self,
        function: Callable[[xr.DataArray], Any] | None = None,
        *,
        min_valid: float | None = None,
        max_cloud: float | None = None,
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
            (SCL, QA_PIXEL) knows, whether they are masked or not.
        source
            The joined source this is about; None: the only one, or each that has such numbers.
        version
            A name for the function that changes when it does, where its text cannot tell.

        Raises
        ------
        PlanError
            When no rule is given, or a share is not from 0 to 1.
        """
        rule = Rule.of(function, min_valid, max_cloud, source, version)
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
            When a step needs chips of other blocks (a buffer between splits, a sample, a user's table), the grid is not
            ``"zone"``, or no chip is left.
        StoreError
            When the folder holds something else.

        Examples
        --------
        >>> plan = chips.by_blocks("s3://bucket/plan/", client=client)  # doctest: +SKIP
        >>> len(plan), plan.select("train").filter("slots", ">=", 3).sample(10_000).to_chips()  # doctest: +SKIP
        """
        from rasteret_dask.chipblocks import ChipBlocks, planned_by_blocks

        blocks = planned_by_blocks(self.query, folder, windows, client, progress)
        return ChipBlocks(self.query, blocks, Chips._of)

    # What it is

    @cached_property
    def planned(self) -> PlannedChips:
        """The planned chips: the chip table and what it was made from."""
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
    def table(self) -> pa.Table:
        """The chip table: one row per chip, CHIP_SCHEMA and the user's further columns."""
        return self.planned.table

    def to_geopandas(self) -> Any:
        """Return the chip table as a GeoDataFrame in lon/lat, without ``feeds``."""
        with needs("geo", "a GeoDataFrame of chips"):
            import geopandas
        import shapely

        plain = self.table.drop_columns(["feeds", "geometry"]).to_pandas()
        wkb = self.table.column("geometry").to_numpy(zero_copy_only=False)
        return geopandas.GeoDataFrame(plain, geometry=shapely.from_wkb(wkb), crs=4326)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the chip table as GeoParquet."""
        geoparquet.write(self.table, path)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def explain(self, workers: int | None = None, threads: int = 1) -> Explanation:
        """Say what the job will do, before anything is read.

        Parameters
        ----------
        workers
            Worker processes: says what they fetch together, at most, as what two of them need is fetched twice.
        threads
            Threads of each worker.

        Raises
        ------
        PlanError
            When there are no workers, or no threads.
        """
        from rasteret_dask.show import explain
        from rasteret_dask.tasks.runs import Workforce

        if min(1 if workers is None else workers, threads) < 1:
            raise PlanError(
                "explain(workers=, threads=)", f"{workers} and {threads}", "at least 1 of each",
                "Leave workers out for what one process fetches.",
            )  # fmt: skip
        force = None if workers is None else Workforce(workers, threads)
        return explain.explain(self.planned, self.job, self._layout.outputs, force)

    def audit(self) -> Audit:
        """Check the splits: ratios, losses, overlaps (must be 0) and distances, over all splits of the plan."""
        from rasteret_dask.show import audit

        return audit.audit(self._unselected.planned)

    def plot(self, ax: Any = None) -> Any:
        """Draw the map of chips, coloured by split."""
        from rasteret_dask.show.plot import plot_chips

        return plot_chips(self.table, ax=ax)

    # Exits

    @cached_property
    def job(self) -> Job:
        """The frozen plan: shards, the records they need, and their keys."""
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
        """The graph: one named Blockwise layer per step; culled to the selected shards."""
        from rasteret_dask.tasks.shards import lower

        return lower(self.job, self._context()).culled()

    def _context(self, on_error: OnError = "raise") -> ReadContext:
        from rasteret_dask.tasks.context import ReadContext

        return ReadContext(self.query.functions, on_error)

    @cached_property
    def _layout(self) -> Layout:
        from rasteret_dask.store.layout import layout_of

        return layout_of(self.job, used_rows(self.planned), self.query)

    def to_xarray(self, on_error: OnError = "raise") -> xr.Dataset | xr.DataTree:
        """Return the chips lazily: a Dataset, or a DataTree with a node a source.

        Each has ``pixels`` (chip, time, band, y, x), and ``valid`` (chip, time, y, x) where pixels are integers.

        Parameters
        ----------
        on_error
            What becomes of a tile that cannot be read: ``"raise"`` a ReadError, or ``"mask"``: its pixels are
            invalid, and each shard that has such tiles warns of them when it is computed.
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
        """
        from rasteret_dask.store.outputs import load

        return load(self._layout, self._context(on_error))

    def to_zarr(
        self,
        store: str | os.PathLike[str],
        client: ClientLike = None,
        compute: bool = True,
        progress: bool = True,
        compression: Compression = "auto",
        on_error: OnError = "raise",
    ) -> Delayed | None:
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

        Raises
        ------
        PlanError
            When ``compression`` or ``on_error`` is none of these.
        StoreError
            When the store holds something else, or these chips in another compression.
        JobError
            When shards failed; the others are written, and a rerun does only those.
        """
        from rasteret_dask.store.encode import checked
        from rasteret_dask.store.run import delayed_zarr, run_zarr

        url = Place.of(store).folder("a folder, or nothing yet", "Choose another place.")
        layout = replace(self._layout, compression=checked(compression))
        if not compute:
            return delayed_zarr(layout, url, self._context(on_error))
        run_zarr(layout, url, self._context(on_error), client, progress)
        return None

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
            Shards that ``shuffle`` mixes at any time.
        ignore_index
            What invalid pixels of bands of kind ``class`` become, such as torch's -100 or 255; where the dtype cannot
            hold it, pixels get the narrowest that can. None: they stay as they are.
        on_error
            As in :meth:`to_xarray`.

        Raises
        ------
        PlanError
            When an argument cannot be, or some rank would have no batch.
        """
        from rasteret_dask.statistics.measuring import recalled
        from rasteret_dask.streams.stream import Batching

        batching = Batching(
            batch_size, shuffle, epochs, drop_last, rank, world_size, pad, client, prefetch, normalize, buffer,
            ignore_index,
        )  # fmt: skip
        shards = self._shards(on_error, client)
        return batching.stream(
            shards,
            lambda: recalled(shards.digest, on_error) or self.stats(client=client, on_error=on_error),
        )

    def stats(
        self, sample: int | None = None, client: ClientLike = None, on_error: OnError = "raise"
    ) -> Stats:
        """Measure the pixels of these chips in one pass: per source and band counts, moments, percentiles, classes.

        Parameters
        ----------
        sample
            Measure so many chips, chosen as by :meth:`sample`; None: all.
        client
            A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
        on_error
            As in :meth:`to_xarray`.
        """
        from rasteret_dask.statistics.measuring import measured, remember
        from rasteret_dask.streams.planned import planned

        chips = self if sample is None else self.sample(sample)
        shards = planned(chips.job, chips._layout.outputs, self._context(on_error))
        stats = measured(shards, client)
        remember(stats, shards.digest, on_error)
        return stats

    def _shards(self, on_error: OnError, client: ClientLike = None) -> ChipShards:
        """Return what a stream reads; where rules drop chips, all are looked at once to know how many."""
        from rasteret_dask.streams.planned import planned

        make = partial(planned, self.job, self._layout.outputs, self._context(on_error))
        if not self.job.pixel_rules:
            return make()
        if on_error not in self._sizes:
            from rasteret_dask.statistics.measuring import kept_sizes

            self._sizes[on_error] = kept_sizes(make(), client)
        return make(sizes=self._sizes[on_error])

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
        """
        from rasteret_dask.streamfrom import save_plan
        from rasteret_dask.tasks.jobfile import check_writable

        check_writable(self.job)
        sizes = self._shards("raise", client).sizes if self.job.pixel_rules else None
        save_plan(self.job, path, sizes)

    def _with(
        self,
        plan: Node,
        tables: Mapping[str, Table] | None = None,
        functions: Mapping[Function, Callable[..., Any]] | None = None,
    ) -> Chips:
        return Chips(self.query.then(plan, tables, functions), parent=self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>\n" + "\n".join(outline(self.plan))
