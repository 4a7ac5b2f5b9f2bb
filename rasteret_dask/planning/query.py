# SPDX-License-Identifier: Apache-2.0
"""A plan, with the tables and the user's functions that its nodes name: what a Collection and Chips hold."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rasteret_dask.planning.functions import Function
from rasteret_dask.planning.origins import BuildCall
from rasteret_dask.planning.plan import Node, Source, leaves
from rasteret_dask.planning.resolve import MemberTable, evaluate
from rasteret_dask.planning.scan import Table

__all__ = ["Query"]


@dataclass(frozen=True)
class Query:
    """A plan that can be carried out in this process."""

    plan: Node
    """The steps so far."""
    tables: Mapping[str, Table]
    """Token -> the table that nodes of the plan name by it."""
    functions: Mapping[Function, Callable[..., Any]] = field(default_factory=dict)
    """What the plan's functions are."""
    origins: Mapping[Source, BuildCall] = field(default_factory=dict)
    """Source -> the call that made its table, where one did."""

    def then(
        self,
        plan: Node,
        tables: Mapping[str, Table] | None = None,
        functions: Mapping[Function, Callable[..., Any]] | None = None,
    ) -> Query:
        """Return another plan, with further tables and functions that its new step names."""
        return Query(
            plan, {**self.tables, **(tables or {})}, {**self.functions, **(functions or {})}, self.origins
        )

    def made_by(self, origin: BuildCall | None) -> Query:
        """Return the same plan, of one source, with the call that made its table."""
        (source,) = leaves(self.plan)
        origins = {} if origin is None else {source: origin}
        return Query(self.plan, self.tables, self.functions, origins)

    @classmethod
    def together(cls, plan: Node, parts: Sequence[Query]) -> Query:
        """Return a plan over the plans of several queries."""
        tables: dict[str, Table] = {}
        functions: dict[Function, Callable[..., Any]] = {}
        origins: dict[Source, BuildCall] = {}
        for part in parts:
            tables |= part.tables
            functions |= part.functions
            origins |= part.origins
        return cls(plan, tables, functions, origins)

    def members(self, plan: Node | None = None) -> list[MemberTable]:
        """Return the chosen records of this plan (or of ``plan``, with the same tables), a table a member."""
        return evaluate(self.plan if plan is None else plan, self.tables)
