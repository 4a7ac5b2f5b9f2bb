# SPDX-License-Identifier: Apache-2.0
"""A job as one file: load it, look at what it does, run it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from rasteret_dask.catalogs.credentials import without_credentials
from rasteret_dask.chipset import Chips
from rasteret_dask.errors import StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.net.places import Place
from rasteret_dask.recipes.assembling import Assembly, codec_of, references
from rasteret_dask.recipes.blame import blamed, blamed_by_words
from rasteret_dask.recipes.exits import export_call, map_call, predict_call
from rasteret_dask.recipes.functions import importing_from
from rasteret_dask.recipes.lines import spelled
from rasteret_dask.recipes.models import EXPORTS, Document, output_of
from rasteret_dask.recipes.placement import placement_of
from rasteret_dask.recipes.problems import recipe_error
from rasteret_dask.recipes.source import RecipeSource, differences, nearest, values_of
from rasteret_dask.runlimits import NO_LIMITS, RunLimits
from rasteret_dask.store.ledger import RECIPE

if TYPE_CHECKING:
    from rasteret_dask.prediction.maps import MapPlan
    from rasteret_dask.show.explain import Explanation
    from rasteret_dask.statistics.stats import Stats
    from rasteret_dask.store.jobreport import JobReport

__all__ = ["RecipeOutput", "Recipe", "load_recipe", "planned_maps", "recipe_of"]


@dataclass(frozen=True, slots=True)
class RecipeOutput:
    """One thing that a recipe writes."""

    name: str
    """Path or URL as the recipe says it."""
    kind: str
    """``"zarr"``, ``"table"``, ``"plan"``, ``"stats"``, ``"predict"``, or the format of an export."""
    place: str
    """Path or URL; relative ones begin at the recipe's folder."""
    splits: tuple[str, ...]
    """Only the chips of these; none: all chips."""
    options: Mapping[str, Any]
    """Further arguments of what writes it."""

    def __str__(self) -> str:
        return f"{self.kind} {self.name}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """A job as one file, checked; nothing is read or written before ``chips``, ``explain`` or ``run``.

    Made by :func:`load_recipe`.

    Examples
    --------
    >>> recipe = rd.load_recipe("train.toml")
    >>> (report,) = recipe.run(progress=False)
    >>> report.committed
    True
    """

    source: RecipeSource
    """Its text and values."""
    outputs: tuple[RecipeOutput, ...]
    """What it writes, in order."""

    @property
    def path(self) -> str:
        """The file, as it was named.

        Examples
        --------
        >>> rd.load_recipe("train.toml").path
        'train.toml'
        """
        return self.source.path

    @property
    def text(self) -> str:
        """What is carried out: the file's text, with the overrides.

        Examples
        --------
        >>> "[chips]" in rd.load_recipe("train.toml").text
        True
        """
        return self.source.text

    def chips(self) -> Chips:
        """Return the chips before outputs: their collections are built, or opened where they were built before.

        Raises
        ------
        RecipeError
            When a table of the recipe cannot be carried out; the error that says why is its cause.

        Examples
        --------
        >>> len(rd.load_recipe("train.toml").chips().select("val"))
        9
        """
        return Assembly(self.source).chips()

    def explain(
        self,
        cluster: str | None = None,
        workers: int | None = None,
        threads: int | None = None,
        *,
        probe: bool = False,
        rate: str | float | JobReport | None = None,
    ) -> dict[str, Explanation]:
        """Say what each output would take, before any pixel is read: {output: explanation}.

        Outputs are called ``"zarr train.zarr"``, as in the recipe; one without outputs explains its ``"chips"``.

        Parameters
        ----------
        cluster
            As in :meth:`run`.
        workers, threads, probe, rate
            As in :meth:`Chips.explain`; workers and threads are the cluster's where they are not given.

        Raises
        ------
        RecipeError
            As in :meth:`chips`, and when the chips cannot be planned.

        Examples
        --------
        >>> told = rd.load_recipe("train.toml").explain()
        >>> [(name, one["chips"]) for name, one in told.items()]
        [('zarr out.zarr', 9)]
        """
        placement = placement_of(self.source, cluster)
        self._called()

        def explanation(part: Chips) -> Explanation:
            count, each = (None, 1) if placement is None else placement.workforce(part)
            return part.explain(workers or count, threads or each, probe=probe, rate=rate)

        chips = self._planned()
        if not self.outputs:
            return {"chips": explanation(chips)}
        with blamed_by_words(self.source):
            parts = zip(self.outputs, self._selected(chips), strict=True)
            return {str(output): explanation(part) for output, part in parts}

    def run(
        self, limits: RunLimits = NO_LIMITS, progress: bool = True, cluster: str | None = None
    ) -> tuple[JobReport | Stats | None, ...]:
        """Write all outputs, in order, on the recipe's cluster, else on threads of this process.

        A cluster that the recipe starts is taken down at the end, whatever happens. A script that runs a recipe on a
        ``local`` one has its ``if __name__ == "__main__":``, as each script that starts processes.

        Parameters
        ----------
        limits
            As in :meth:`Chips.to_zarr`, for each store, map and export. Of a job in parts, the first writes the others.
        progress
            Whether to show how far it is.
        cluster
            Where to run instead: ``"local"``, ``"gateway"``, ``"kubernetes"``, ``"slurm"``, or a scheduler's address.
            Sizes of the recipe's ``[cluster]`` still hold, its ``options`` only for its own kind.

        Returns
        -------
        tuple
            For each output what its writer returns: Stats of statistics, None of a table or plan, else a JobReport.

        Raises
        ------
        RecipeError
            As in :meth:`explain`, and when the recipe has no outputs.
        StoreError
            When a store holds something else; where it was written by a recipe, the error tells what differs.
        JobError
            When shards failed, the cluster cannot be started or does not answer, or its workers have too little memory:
            what is written stays, and another run goes on.

        Examples
        --------
        >>> (report,) = rd.load_recipe("train.toml").run(progress=False)
        >>> len(rd.open_chips("out.zarr")) == report.kept
        True
        """
        if not self.outputs:
            raise self.source.error(
                (), "no [[outputs]], [predict] or [export]",
                'at least one, such as [[outputs]] with the line zarr = "train.zarr"',
                "Add it, or say --set outputs.0.zarr=train.zarr.",
            )  # fmt: skip
        placement = placement_of(self.source, cluster)
        outputs = self._called()
        with ExitStack() as stack:
            client: ClientLike = None
            if placement is not None and placement.runs_already:
                client = stack.enter_context(placement.cluster(()))
            parts = self._selected(self._planned())
            if placement is not None and client is None:
                stack.enter_context(importing_from(self.source.folder))  # by its workers, too
                client = stack.enter_context(placement.cluster(parts))
            return tuple(
                self._write(chips, output, client, limits, progress)
                for output, chips in zip(outputs, parts, strict=True)
            )

    def _planned(self) -> Chips:
        chips = self.chips()
        with blamed_by_words(self.source):
            _ = chips.planned
        return chips

    def _selected(self, chips: Chips) -> list[Chips]:
        """Return the chips of each output, planned: a split that is not there is told before anything is written."""
        with blamed_by_words(self.source):
            parts = [chips.select(*output.splits) if output.splits else chips for output in self.outputs]
            for part in parts:
                _ = part.planned
        return parts

    def _write(
        self, chips: Chips, output: RecipeOutput, client: ClientLike, limits: RunLimits, progress: bool
    ) -> JobReport | Stats | None:
        """Write the chips of one output."""
        if output.kind in ("table", "plan", "stats") and limits.part is not None and limits.part[0] != 1:
            return None
        match output.kind:
            case "zarr":
                chips._recipe = without_credentials(self.text)
                with self._compared(output.place):
                    report: JobReport = chips.to_zarr(
                        output.place, client=client, progress=progress, limits=limits, **output.options
                    )
                return report
            case "table":
                chips.save(output.place)
            case "plan":
                chips._recipe = without_credentials(self.text)
                chips.save_plan(output.place, client=client)
            case "predict":
                with blamed_by_words(self.source):
                    made: JobReport = chips.predict(
                        client=client, progress=progress, limits=limits, **output.options
                    )
                return made
            case "geotiff" | "webdataset" | "rslearn" as kind:
                with blamed_by_words(self.source):
                    files: JobReport = EXPORTS[kind](
                        chips, client=client, progress=progress, limits=limits, **output.options
                    )
                return files
            case _:
                stats = chips.stats(client=client, **output.options)
                stats.save(output.place)
                return stats
        return None

    def _called(self) -> tuple[RecipeOutput, ...]:
        """Return the outputs with the arguments of what writes them: models, statistics and functions are opened."""
        place = Assembly(self.source).place
        outputs = []
        for output in self.outputs:
            options = output.options
            if output.kind == "predict":
                with blamed(self.source, ("predict",)):
                    options = predict_call(options, self.source.folder, place)
            elif output.kind in EXPORTS:
                with blamed(self.source, ("export",)):
                    options = export_call(output.kind, options, place)
            outputs.append(replace(output, options=options))
        return tuple(outputs)

    @contextmanager
    def _compared(self, store: str) -> Iterator[None]:
        """Say of a store that holds something else in what the recipe that wrote it differs from this one."""
        try:
            yield
        except StoreError as error:
            difference = self._difference_from(store) if type(error) is StoreError else ""
            if not difference:
                raise
            fault = f"{error.found}; their recipe differs: {difference}"
            raise StoreError(error.subject, fault, error.expected, error.remedy) from error

    def _difference_from(self, store: str) -> str:
        """Return in what the recipe of a store differs from this one; "" where nothing tells."""
        try:
            there = values_of(remote.get(remote.join(Place.of(store).url, RECIPE)).decode())
        except (remote.MissingError, ValueError):
            return ""
        return ", ".join(differences(there, values_of(without_credentials(self.text)))[:3])


def load_recipe(path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> Recipe:
    """Read and check a recipe: a TOML file with the arguments of this package's functions, see ``docs/recipes.md``.

    Parameters
    ----------
    path
        The file.
    overrides
        {dotted key: value} that is put over the file: ``{"chips.size": 64}``; ``outputs.0.zarr`` is the first output's.

    Raises
    ------
    RecipeError
        When the file is missing, is no TOML, or has a key or value that no recipe has; it names the line.

    Examples
    --------
    >>> recipe = rd.load_recipe("train.toml", overrides={"chips.size": 16})
    >>> [told["chips"] for told in recipe.explain().values()]
    [36]
    """
    return recipe_of(RecipeSource.read(path, overrides or {}))


def planned_maps(recipe: Recipe) -> dict[str, MapPlan]:
    """Return the map that [predict] makes, before any pixel is read: {output: plan}; a table of answers has none.

    Raises
    ------
    RecipeError
        As :meth:`Recipe.explain`; and when the model does not fit the chips.
    """
    outputs, chips = recipe._called(), recipe._planned()
    with blamed_by_words(recipe.source):
        parts = zip(outputs, recipe._selected(chips), strict=True)
        calls = {str(own): (part, map_call(own.options)) for own, part in parts if own.kind == "predict"}
        return {name: part.plan_map(**call) for name, (part, call) in calls.items() if call is not None}


def recipe_of(source: RecipeSource) -> Recipe:
    """Return a recipe whose text was read already; raises as :func:`load_recipe` does."""
    try:
        Document.model_validate(source.document)
    except ValidationError as error:
        raise recipe_error(source, Document, error) from error
    _check_references(source)
    assembly = Assembly(source)
    assembly.chosen()
    placement_of(source, None)
    return Recipe(source, tuple(_outputs(source, assembly)))


def _check_references(source: RecipeSource) -> None:
    """Refuse names of collections that the recipe does not have, and collections that need themselves."""
    tables: Mapping[str, Any] = source.document["collections"]
    others = {name: dict(references(table)) for name, table in tables.items()}
    for name, parts in others.items():
        for path, other in parts.items():
            if other not in tables:
                raise source.error(
                    ("collections", name, *path), f"{spelled(('collections', name, *path))} = {other!r}",
                    f"one of {', '.join(tables)}", nearest(other, tables),
                )  # fmt: skip
    chosen = source.document["chips"].get("collection")
    if chosen is not None and chosen not in tables:
        raise source.error(
            ("chips", "collection"), f"chips.collection = {chosen!r}",
            f"one of {', '.join(tables)}", nearest(chosen, tables),
        )  # fmt: skip
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            circle = (*above[above.index(name) :], name)
            raise source.error(
                ("collections", name), f"a circle: {' needs '.join(circle)}", "collections that begin somewhere",
                "Give one of them a dataset, files, table, stac or records.",
            )  # fmt: skip
        if name not in done:
            for other in others[name].values():
                visit(other, (*above, name))
            done.add(name)

    for name in tables:
        visit(name, ())


def _outputs(source: RecipeSource, assembly: Assembly) -> Iterator[RecipeOutput]:
    for number, table in enumerate(source.document.get("outputs", ())):
        kind = output_of(table)
        assert kind is not None
        options = {key: value for key, value in table.items() if key not in (kind, "splits")}
        if "compression" in options:
            with blamed(source, ("outputs", number, "compression")):
                options["compression"] = codec_of(options["compression"])
        yield RecipeOutput(
            table[kind], kind, assembly.place(table[kind]), tuple(table.get("splits", ())), options
        )
    for key in ("predict", "export"):
        table = source.document.get(key)
        if table is not None:
            kind = key if key == "predict" else table.get("format", "geotiff")
            splits = tuple(table.get("splits", ()))
            yield RecipeOutput(table["to"], kind, assembly.place(table["to"]), splits, table)
