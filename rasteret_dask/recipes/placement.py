# SPDX-License-Identifier: Apache-2.0
"""Where a recipe runs: on the cluster that its table [cluster] or a word beside it names, else in this process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rasteret_dask.launching.cluster import (
    CONTAINERS,
    Explained,
    check_place,
    checked_options,
    cluster,
    is_address,
    most_for,
)
from rasteret_dask.launching.request import WorkerSize
from rasteret_dask.recipes.blame import blamed
from rasteret_dask.recipes.source import RecipeSource

if TYPE_CHECKING:
    from distributed import Client

    from rasteret_dask.chipset import Chips

__all__ = ["Placement", "placement_of"]

_TABLE = ("cluster",)


@dataclass(frozen=True, slots=True)
class Placement:
    """The cluster that a recipe runs on."""

    source: RecipeSource
    place: str
    """A kind of cluster, or an address."""
    workers: int | tuple[int, int] | None
    """How many, or at least and at most; None: as many as there is work for."""
    size: WorkerSize | None
    """Of each worker; None: at an address."""
    options: Mapping[str, Any]
    """What only its kind takes."""

    @property
    def runs_already(self) -> bool:
        """Whether it is only connected to: then it can be asked before anything is planned."""
        return is_address(self.place)

    def cluster(self, chips: Sequence[Explained]) -> AbstractContextManager[Client]:
        """Return the cluster, to be entered.

        Parameters
        ----------
        chips
            What is to be computed on it.

        Raises
        ------
        RecipeError
            When the table says what no such cluster takes.
        """
        with blamed(self.source, _TABLE):
            return cluster(
                self.place, chips=tuple(chips), workers=self.workers, size=self.size, options=self.options
            )

    def workforce(self, chips: Chips) -> tuple[int | None, int]:
        """Return how many workers chips would have at most, None where nobody knows, and the threads of each."""
        if self.size is None:
            return None, 1
        threads, workers = self.size.threads, self.workers
        most = workers[1] if isinstance(workers, tuple) else workers
        return most or most_for(chips.explain()["tasks"], threads), threads


def placement_of(source: RecipeSource, place: str | None) -> Placement | None:
    """Return where a recipe runs; None: in this process.

    Parameters
    ----------
    source
        The recipe.
    place
        A kind of cluster, or an address, instead of the recipe's; None: what the recipe says. With another kind the
        recipe's ``options`` are left out, as they are its own kind's, and its ``image`` where workers are no
        containers; at an address all of its table is.

    Raises
    ------
    RecipeError
        When the table contradicts itself.
    PlanError
        When ``place`` is no kind of cluster and no address.
    """
    if place is not None:
        check_place(place)
    table: Mapping[str, Any] = source.document.get("cluster", {})
    if place is None and not table:
        return None
    _check(source, table)
    where = str(place or table.get("address") or table.get("kind", "local"))
    if is_address(where):
        return Placement(source, where, None, None, {})
    options = dict(table.get("options", {})) if where == table.get("kind", "local") else {}
    options |= {key: table[key] for key in ("idle_timeout", "allowed_failures") if key in table}
    workers: int | tuple[int, int] | None = table.get("workers")
    if "max_workers" in table:
        workers = table.get("min_workers", 0), table["max_workers"]
    keys = {"threads", "memory", "lifetime", "image", "environment"} & table.keys()
    if where != table.get("kind", "local") and where not in CONTAINERS:
        keys -= {"image"}
    with blamed(source, _TABLE):
        checked_options(where, options)  # here, before anything is planned
        return Placement(
            source, where, workers, WorkerSize(**{key: table[key] for key in sorted(keys)}), options
        )


def _check(source: RecipeSource, table: Mapping[str, Any]) -> None:
    """Refuse keys that contradict each other."""

    def refuse(key: str, fault: str, expected: str, remedy: str) -> None:
        raise source.error((*_TABLE, key), fault, expected, remedy)

    others = [key for key in table if key != "address"]
    if "address" in table and others:
        refuse(
            others[0], f"cluster.address, and cluster.{others[0]}", "nothing beside an address",
            "A cluster that runs has its workers: leave one of the two out.",
        )  # fmt: skip
    for key in ("min_workers", "max_workers"):
        if key in table and "workers" in table:
            refuse(
                key, f"cluster.workers, and cluster.{key}", "one of them",
                "Say workers for a fixed number, min_workers and max_workers for limits.",
            )  # fmt: skip
    if "min_workers" in table and "max_workers" not in table:
        refuse(
            "min_workers",
            "cluster.min_workers alone",
            "max_workers too",
            "Say how many there may be at most.",
        )
    if table.get("min_workers", 0) > table.get("max_workers", table.get("min_workers", 0)):
        refuse(
            "max_workers", f"from {table['min_workers']} to {table['max_workers']} workers",
            "min_workers <= max_workers", "",
        )  # fmt: skip
