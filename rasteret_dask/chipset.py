"""A lazy set of chips: split, filter and select them, look at the plan, write them out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import pyarrow as pa
import xarray as xr
from dask.delayed import Delayed
from dask.highlevelgraph import HighLevelGraph
from distributed import Client

from rasteret_dask import audit, explain, geoparquet
from rasteret_dask.chips import ChipSet, used_rows
from rasteret_dask.encode import Compression, checked
from rasteret_dask.errors import PlanError, SchemaError, StoreError
from rasteret_dask.job import Job, freeze
from rasteret_dask.lazy import radiometry_of
from rasteret_dask.outputs import load, to_xarray
from rasteret_dask.plan import (
    Function,
    Keep,
    Map,
    Node,
    Predicate,
    Sample,
    Select,
    Split,
    SplitSpec,
    WithTable,
    outline,
    predicates,
)
from rasteret_dask.run import delayed_zarr, run_zarr
from rasteret_dask.scan import Table, token_of
from rasteret_dask.shards import lower, outputs_of
from rasteret_dask.steps import apply_step, plan_chips
from rasteret_dask.write import Layout

__all__ = ["Chips"]


class Chips:
    """An immutable, lazy set of chips, made by :meth:`Collection.chips`.

    Parameters
    ----------
    plan
        The steps so far.
    tables
        The tables that the plan names.
    functions
        The user's functions that the plan names.
    parent
        The chips that the plan's last step is applied to, so that what is planned already is not planned again.
    """

    def __init__(
        self,
        plan: Node,
        tables: Mapping[str, Table],
        functions: Mapping[Function, Callable[..., Any]] | None = None,
        parent: Chips | None = None,
    ) -> None:
        self.plan = plan
        self._tables = dict(tables)
        self._functions = dict(functions or {})
        self._parent = parent

    # Steps

    def split(
        self,
        train: float = 0.7,
        val: float = 0.15,
        test: float = 0.15,
        *,
        seed: int = 0,
        by: str = "ground",
        buffer_m: float = 0.0,
        boundary: str = "drop",
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

    def filter(self, *given: Predicate | Any, **columns: Any) -> Chips:
        """Keep the chips whose columns fulfil all predicates: triples, or ``column=value``."""
        return self._with(Keep(self.plan, predicates(given, columns)))

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

    # What it is

    @cached_property
    def planned(self) -> ChipSet:
        """The planned chips: the chip table and what it was made from."""
        if self._parent is None:
            return plan_chips(self.plan, self._tables)
        return apply_step(self._parent.planned, self.plan, self._tables)

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

    def explain(self) -> explain.Explanation:
        """Say what the job will do, before anything is read."""
        return explain.explain(self.planned, self.job, self._layout.outputs)

    def audit(self) -> audit.Audit:
        """Check the splits: ratios, losses, overlaps (must be 0) and distances, over all splits of the plan."""
        return audit.audit(self._unselected.planned)

    def plot(self, ax: Any = None) -> Any:
        """Draw the map of chips, coloured by split."""
        from rasteret_dask.plot import plot_chips

        return plot_chips(self.table, ax=ax)

    # Exits

    @cached_property
    def job(self) -> Job:
        """The frozen plan: shards, the records they need, and their keys."""
        job = freeze(self._unselected.planned)
        if not isinstance(self.plan, Select):
            return job
        chosen = set(self.planned.table.column("split").to_pylist())
        return job.select(chosen)

    @property
    def dask(self) -> HighLevelGraph:
        """The graph: one named Blockwise layer per step; culled to the selected shards."""
        return lower(self.job, self._functions).culled()

    @cached_property
    def _layout(self) -> Layout:
        attrs = {}
        for source, rows in used_rows(self.planned):
            attrs[source.plan.name] = {
                "units": source.plan.units,
                "radiometry": radiometry_of(source, rows),
                "mask": list(source.plan.mask),
                "pick": source.plan.pick,
                "resolution": source.plan.resolution,
            }
        return Layout(self.job, outputs_of(self.job, self._functions), attrs)

    def to_xarray(self, on_error: str = "raise") -> xr.Dataset | xr.DataTree:
        """Return the chips lazily: a Dataset, or a DataTree with a node a source.

        Each has ``pixels`` (chip, time, band, y, x), and ``valid`` (chip, time, y, x) where pixels are integers.

        Parameters
        ----------
        on_error
            What becomes of a tile that cannot be read: ``"raise"`` a ReadError, or ``"mask"``: its pixels are
            invalid, and each shard that has such tiles warns of them when it is computed.
        """
        return to_xarray(self._layout, self._functions, _checked(on_error))

    def load(self, on_error: str = "raise") -> xr.Dataset | xr.DataTree:
        """Read the chips into memory: what ``to_xarray().load()`` gives, without putting it together from shards.

        This process reads, with as many of Dask's threads as are configured (``dask.config`` ``num_workers``).

        Parameters
        ----------
        on_error
            As in :meth:`to_xarray`.
        """
        return load(self._layout, self._functions, _checked(on_error))

    def to_zarr(
        self,
        store: str | os.PathLike[str],
        client: Client | str | None = None,
        compute: bool = True,
        progress: bool = True,
        compression: Compression = "auto",
        on_error: str = "raise",
    ) -> Delayed | None:
        """Write the chips to a sharded Zarr v3 store on a Dask cluster; a rerun does what is missing.

        Parameters
        ----------
        store
            A local path or a URL of an object store.
        client
            A Dask client or a scheduler's address; None: the current client, else a cluster of this machine's size.
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
        place = os.fspath(store)
        url = place if "://" in place else os.path.abspath(place)
        if os.path.isfile(url):
            raise StoreError(f"store {url}", "a file", "a folder, or nothing yet", "Choose another place.")
        layout = replace(self._layout, compression=checked(compression))
        if not compute:
            return delayed_zarr(layout, url, self._functions, _checked(on_error))
        run_zarr(layout, url, self._functions, client, progress, _checked(on_error))
        return None

    def _with(
        self,
        plan: Node,
        tables: Mapping[str, Table] | None = None,
        functions: Mapping[Function, Callable[..., Any]] | None = None,
    ) -> Chips:
        more = {**self._functions, **(functions or {})}
        return Chips(plan, {**self._tables, **(tables or {})}, more, parent=self)

    def __repr__(self) -> str:
        return "<Chips>\n" + "\n".join(outline(self.plan))


def _checked(on_error: str) -> str:
    if on_error not in ("raise", "mask"):
        raise PlanError("on_error=", repr(on_error), "'raise' or 'mask'")
    return on_error
