"""The steps that choose and change chips, each a node on a plan."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa

from rasteret_dask.errors import PlanError, SchemaError
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
from rasteret_dask.words import Boundary, SplitBy

if TYPE_CHECKING:
    import xarray as xr

__all__ = ["ChipSteps"]


class ChipSteps:
    """A plan of chips, and the tables and functions that it names; every step returns another one.

    Parameters
    ----------
    query
        The steps so far, with the tables and the user's functions that they name.
    parent
        The chips that the plan's last step is applied to, so that what is planned already is not planned again.
    """

    def __init__(self, query: Query, parent: Self | None = None) -> None:
        self.query = query
        self.plan = query.plan
        self._parent = parent

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
    ) -> Self:
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

    def select(self, *splits: str) -> Self:
        """Keep the chips of these splits."""
        if not splits:
            raise PlanError("select", "no split", "at least one, such as select('train')")
        return self._with(Select(self.plan, splits))

    def filter(self, *triples: Predicate | Any, **columns: Any) -> Self:
        """Keep the chips whose columns fulfil all predicates: triples, or ``column=value``; as Collection.filter.

        For rules on pixels see :meth:`filter_pixels`.
        """
        return self._with(FilterChips(self.plan, predicates(triples, columns)))

    def sample(self, n: int, seed: int = 0, by: str | None = None) -> Self:
        """Keep ``n`` chips by hash of their id, per stratum of column ``by``; a larger n contains the smaller."""
        return self._with(Sample(self.plan, n, seed, by))

    def map(
        self,
        function: Callable[[xr.DataArray], xr.DataArray],
        *,
        source: str | None = None,
        version: str | None = None,
    ) -> Self:
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

    def with_table(self, table: pa.Table | str | os.PathLike[str]) -> Self:
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

    def _with(
        self,
        plan: Node,
        tables: Mapping[str, Table] | None = None,
        functions: Mapping[Function, Callable[..., Any]] | None = None,
    ) -> Self:
        return type(self)(self.query.then(plan, tables, functions), parent=self)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>\n" + "\n".join(outline(self.plan))
