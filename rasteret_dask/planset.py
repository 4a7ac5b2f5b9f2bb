# SPDX-License-Identifier: Apache-2.0
"""Chips of a saved plan: for a process or machine that did not make it, and cannot reach the catalogue."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rasteret_dask.chipexits import ChipExits
from rasteret_dask.errors import PlanError
from rasteret_dask.modelexits import ModelExits
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.net.places import Place
from rasteret_dask.planfile import PlanFiles
from rasteret_dask.planning.calls import call
from rasteret_dask.planning.functions import Function
from rasteret_dask.planning.plan import Node, Select, Source
from rasteret_dask.runlimits import NO_LIMITS, RunLimits
from rasteret_dask.words import OnError

if TYPE_CHECKING:
    from rasteret_dask.display.card import Card
    from rasteret_dask.prediction.modelchips import ModelChips
    from rasteret_dask.store.encode import Compression
    from rasteret_dask.store.jobreport import JobReport
    from rasteret_dask.store.layout import Layout
    from rasteret_dask.streams.chipshards import ChipShards
    from rasteret_dask.tasks.context import Functions, ReadContext
    from rasteret_dask.tasks.job import Job

__all__ = ["SavedPlan", "open_plan"]


def open_plan(place: str | os.PathLike[str], functions: Iterable[Callable[..., Any]] = ()) -> SavedPlan:
    """Open the chips of a plan that :meth:`Chips.save_plan` wrote, in a process that did not make it.

    It needs no catalogue: the records lie in the plan, with their headers. Where files want a signature, this process
    must be able to sign them.

    Parameters
    ----------
    place
        The folder: a local path or a URL.
    functions
        The functions that the plan calls (those given to ``map`` and ``filter_pixels``): a saved plan holds their
        names and digests, never code, and nothing is imported or unpickled because a file says so.

    Raises
    ------
    StoreError
        When no saved plan lies there, or it is damaged.
    FormatError
        When another version wrote it, in a format that this one does not read.
    PlanError
        When the plan calls a function that is not among ``functions``, or one that says something else by now; when
        this process cannot sign what the plan reads.

    Examples
    --------
    >>> chips.save_plan("plan")
    >>> plan = rd.open_plan("plan")
    >>> len(plan) == len(chips), plan.digest == chips.job.digest
    (True, True)
    >>> report = plan.select("val").to_zarr("val.zarr", progress=False)
    >>> report.kept
    9
    """
    files = PlanFiles.at(Place.of(place).url)
    files.job.check_signatures()
    return SavedPlan(files, _matched(files.job, tuple(functions)))


class SavedPlan(ChipExits, ModelExits):
    """An immutable set of chips of a saved plan, opened by :func:`open_plan`.

    Parameters
    ----------
    files
        What lies in its folder.
    functions
        The user's functions that it names.
    plan
        The steps since it was opened; None: there are none.

    Examples
    --------
    >>> chips.save_plan("plan")
    >>> val = rd.open_plan("plan").select("val")
    >>> len(val), next(val.stream(batch_size=9))["s2"].shape
    (9, (9, 3, 2, 32, 32))
    """

    def __init__(self, files: PlanFiles, functions: Functions, plan: Node | None = None) -> None:
        self._files, self._functions = files, functions
        self._plan: Node = Source("plan", files.job.digest) if plan is None else plan

    def select(self, *splits: str) -> SavedPlan:
        """Keep the chips of these splits.

        Raises
        ------
        PlanError
            When the plan has no chips of such a split.

        Examples
        --------
        >>> chips.save_plan("plan")
        >>> plan = rd.open_plan("plan")
        >>> len(plan.select("train", "val")) < len(plan)
        True
        """
        if not splits:
            raise PlanError("select", "no split", "at least one, such as select('train')")
        names = [h.split for h in self._bare.hierarchies if h.split]
        unknown = [split for split in splits if split not in names]
        if unknown:
            raise PlanError(
                "select", f"split {', '.join(map(repr, unknown))}",
                f"one of {', '.join(names)}" if names else "a plan with splits: this one has none",
                "Save the plan of all splits: chips.split().save_plan(path), before select().",
            )  # fmt: skip
        return SavedPlan(self._files, self._functions, Select(self._plan, splits))

    # What it is

    def __len__(self) -> int:
        return sum(h.chips for h in self._bare.hierarchies)

    @property
    def digest(self) -> str:
        """What these chips are known by: that of the job that made them, and of a store of them.

        Examples
        --------
        >>> chips.save_plan("plan")
        >>> rd.open_plan("plan").select("val").digest == chips.select("val").job.digest
        True
        """
        return self._bare.digest

    @cached_property
    def table(self) -> pa.Table:
        """The chip table: one row per chip, CHIP_SCHEMA and the user's further columns, split by split as in a store.

        ``feeds`` names records by their rows in the saved plan, which has only those that feed a chip.

        Examples
        --------
        >>> chips.save_plan("plan")
        >>> rd.open_plan("plan").table.column_names == chips.table.column_names
        True
        """
        return self._job.chosen_chips()

    # Exits

    def to_zarr(
        self,
        store: str | os.PathLike[str],
        client: ClientLike = None,
        progress: bool = True,
        compression: Compression = "auto",
        on_error: OnError = "raise",
        limits: RunLimits = NO_LIMITS,
    ) -> JobReport:
        """Write the chips to a store, as :meth:`Chips.to_zarr` does: the same bytes; a rerun does what is missing.

        A store that is there grows by the chips of a plan as it is made, not of a saved one.

        Parameters
        ----------
        store, client, progress, compression, on_error, limits
            As in :meth:`Chips.to_zarr`.

        Returns
        -------
        JobReport
            What was written, what it took and what became of the chips.

        Examples
        --------
        >>> chips.save_plan("plan")
        >>> report = rd.open_plan("plan").to_zarr("all.zarr", progress=False)
        >>> len(rd.open_chips("all.zarr")) == len(chips)
        True
        """
        from rasteret_dask.store.encode import checked
        from rasteret_dask.store.limits import begun
        from rasteret_dask.store.run import run_zarr

        url = Place.of(store).folder("a folder, or nothing yet", "Choose another place.")
        with begun(limits) as bounds:
            layout = replace(self._layout, compression=checked(compression))
            return run_zarr(layout, url, self._context(on_error), client, progress, bounds)

    # What exits ask for

    def _selection(self, job: Job) -> Job:
        """Return the job of the splits that are selected."""
        node = self._plan
        while isinstance(node, Select):
            job, node = job.select(set(node.splits)), node.child
        return job

    @cached_property
    def _bare(self) -> Job:
        """The job without the outlines of chips."""
        return self._selection(self._files.job)

    @cached_property
    def _job(self) -> Job:
        return self._selection(self._files.with_outlines)

    @cached_property
    def _layout(self) -> Layout:
        from rasteret_dask.store.layout import Layout, source_attrs
        from rasteret_dask.tasks.mapping import outputs_of

        files, used = self._files, self._job.record_rows()
        provenance, node, steps = files.provenance, self._plan, list[str]()
        while isinstance(node, Select):
            steps, node = [call(node), *steps], node.child
        for step in steps:
            provenance = provenance.after(step, used)
        return Layout(
            self._job,
            outputs_of(self._job, self._functions),
            source_attrs(self._job, used),
            provenance=provenance,
            law=files.law,
            recipe=None if steps else files.recipe,
        )

    @cached_property
    def _model_chips(self) -> ModelChips:
        from rasteret_dask.prediction.modelchips import ModelChips

        ground = self._files.ground
        if isinstance(self._plan, Select):
            ground = ground.around(self._job.chosen_chips())
        return ModelChips(self._job, self._functions, ground, self._layout.provenance)

    def _context(self, on_error: OnError = "raise") -> ReadContext:
        from rasteret_dask.tasks.context import ReadContext

        return ReadContext(self._functions, on_error)

    def _shards(self, on_error: OnError, client: ClientLike = None) -> ChipShards:
        """Return what a stream reads; how many chips of each shard are kept was counted when the plan was saved."""
        from rasteret_dask.streams.planned import planned
        from rasteret_dask.tasks.mapping import outputs_of

        job = self._bare
        sizes = None
        if job.pixel_rules:
            kept = {s.name: n for s, n in zip(self._files.job.shards(), self._files.sizes, strict=True)}
            sizes = tuple(kept[shard.name] for shard in job.shards())
        return planned(job, outputs_of(job, self._functions), self._context(on_error), sizes)

    @property
    def _card(self) -> Card:
        from rasteret_dask.show.cards import saved_card

        return saved_card(self._files.url, self._bare, lambda: self.table)

    def __repr__(self) -> str:
        return self._card.text

    def _repr_html_(self) -> str:
        return self._card.html


def _matched(job: Job, functions: tuple[Callable[..., Any], ...]) -> Functions:
    """Return the functions that a job names."""
    given: Mapping[tuple[str, str], Callable[..., Any]] = {
        (f.__module__, f.__qualname__): f for f in functions
    }
    result = {}
    for function in job.all_functions:
        call = given.get((function.module, function.name))
        if call is None:
            raise PlanError(
                "functions= of a saved plan", f"no {function.module}.{function.name}",
                "every function that the plan calls",
                f"Give it: functions=[{function.name}]; on the command line, "
                f"--function {function.module}:{function.name}.",
            )  # fmt: skip
        if not function.source.startswith("version ") and Function.of(call) != function:
            raise PlanError(
                "functions= of a saved plan", f"a {function.module}.{function.name} that says something else",
                "the one that the plan was made with", "Save the plan again, or use the same version of your code.",
            )  # fmt: skip
        result[function] = call
    return result
