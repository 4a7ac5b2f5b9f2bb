# SPDX-License-Identifier: Apache-2.0
"""Commands about recipes: write one, look at what it would do, run it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rasteret_dask.cli.options import BBox, DateRange, Json, Overrides, Quiet, check_dataset, command
from rasteret_dask.cli.printing import answer, details, plain, tell_written

if TYPE_CHECKING:
    from rasteret_dask.recipes.recipe import Recipe, RecipeOutput
    from rasteret_dask.runlimits import RunLimits
    from rasteret_dask.show.explain import Explanation
    from rasteret_dask.store.jobreport import JobReport

__all__ = [
    "Cluster", "DryRun", "HeartbeatFile", "MaxTime", "Part", "RecipeFile", "ShowProgress", "answer_explained",
    "carry_out", "explain", "init", "kept_recipe", "limits_of", "loaded", "report_lines", "resume", "run",
]  # fmt: skip

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE", show_default=False, help="The recipe: a TOML file.")
]


Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster", metavar="KIND|ADDRESS", show_default=False,
        help="Where to run, instead of what the recipe says: local, gateway, kubernetes, slurm, or tcp://HOST:PORT.",
    ),
]  # fmt: skip


@command
def init(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The file to write.")] = Path(
        "recipe.toml"
    ),
    dataset: Annotated[
        str | None, typer.Option(show_default=False, help="Begin with this dataset of the catalog.")
    ] = None,
    stac: Annotated[
        str | None,
        typer.Option(show_default=False, help="Instead: with a static STAC catalog or a file of items."),
    ] = None,
    files: Annotated[
        str | None, typer.Option(show_default=False, help="Instead: with files of your own: 'ortho/*.tif'.")
    ] = None,
    records: Annotated[
        str | None, typer.Option(show_default=False, help="Instead: with a table that `build` wrote.")
    ] = None,
    bands: Annotated[
        str | None, typer.Option(show_default=False, help="The bands of the chips, by comma: red,nir.")
    ] = None,
    bbox: BBox = None,
    date_range: DateRange = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Write a recipe to begin with, and beside it the schema by which editors complete it.

    Its comments say what else it may hold. Without an option it is about the demo's scenes.
    """
    starts = {"dataset": dataset, "stac": stac, "files": files, "records": records}
    beginning: dict[str, Any] = {key: value for key, value in starts.items() if value is not None}
    if len(beginning) > 1:
        raise typer.BadParameter(
            f"expected one of them, found {', '.join(beginning)}.", param_hint="--dataset"
        )
    limits = {"bbox": None if bbox is None else list(bbox), "date_range": date_range}
    limits = {key: value for key, value in limits.items() if value is not None}
    if limits and not {"dataset", "stac"} & beginning.keys():
        raise typer.BadParameter(
            "only --dataset and --stac are searched by place and time.", param_hint="--bbox"
        )
    if dataset is not None:
        check_dataset(dataset)
    from rasteret_dask.recipes.models import schema
    from rasteret_dask.recipes.starting import SCHEMA_FILE, starter

    text = starter(beginning | limits or None, bands=bands.split(",") if bands else None, name=str(recipe))
    try:
        with recipe.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise typer.BadParameter(
            f"{recipe} is there already. Choose another name, or write over it with --force.",
            param_hint="RECIPE",
        ) from None
    beside = recipe.with_name(SCHEMA_FILE)
    beside.write_text(json.dumps(schema(), indent=1) + "\n", encoding="utf-8")
    message = f"{recipe} is written. Change it, then look at what it does: rasteret-dask explain {recipe}"
    tell_written(message, {"path": recipe, "schema": beside}, as_json=as_json, quiet=quiet)


def loaded(recipe: str | Path, texts: list[str] | None) -> Recipe:
    """Return a recipe with what ``--set`` puts over it."""
    from rasteret_dask.recipes.recipe import load_recipe
    from rasteret_dask.recipes.source import setting

    return load_recipe(recipe, dict(map(setting, texts or ())))


HOURS = "Time and worker hours"


@command
def explain(
    recipe: RecipeFile,
    settings: Overrides = None,
    cluster: Cluster = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            show_default=False,
            rich_help_panel=HOURS,
            help="Worker processes: what they fetch together, as what two of them need is fetched twice.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(min=1, show_default=False, rich_help_panel=HOURS, help="Threads of each worker."),
    ] = None,
    probe: Annotated[
        bool,
        typer.Option("--probe", rich_help_panel=HOURS, help="Read at most 12 tiles, and estimate from them."),
    ] = False,
    rate: Annotated[
        str | None,
        typer.Option(
            metavar="RATE|STORE",
            show_default=False,
            rich_help_panel=HOURS,
            help="Estimate from what a worker fetches in a second, '50 MB/s', or from a finished store of such chips.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a recipe would do, before any pixel is read: chips, requests, bytes, memory, and why.

    Items are searched, headers are read, and chips are planned; nothing is written. --probe and --rate tell how long
    it would take.
    """
    from rasteret_dask.store.jobreport import job_report

    if probe and rate is not None:
        raise typer.BadParameter("expected one of them: measured, or stated.", param_hint="--probe, --rate")
    stated = rate if rate is None or re.search(r"B/s\s*$", rate) else job_report(rate)
    made = loaded(recipe, settings)
    answer_explained(made.explain(cluster, workers, threads, probe=probe, rate=stated), as_json)


def _explained(explanations: Mapping[str, Explanation]) -> Any:
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = []
    for name, one in explanations.items():
        parts += [Text(name, style="bold underline"), Text(str(one))]
    return Group(*parts)


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise typer.BadParameter(f"found {text!r}; expected K/N with 1 <= K <= N, such as 3/20.")
    return int(match[1]), int(match[2])


LIMITS = "Options of batch jobs"

Part = Annotated[
    Any,
    typer.Option(
        "--part", metavar="K/N", parser=_part, show_default=False, rich_help_panel=LIMITS,
        help="Write the K-th of N parts of the shards, for array jobs. The part that ends last finishes the store.",
    ),
]  # fmt: skip
MaxTime = Annotated[
    str | None,
    typer.Option(
        "--max-time", metavar="TIME", show_default=False, rich_help_panel=LIMITS,
        help="Begin no shard that would not end in time: 2h, 90min, 1-12:00:00. Code 3 when shards are left.",
    ),
]  # fmt: skip
HeartbeatFile = Annotated[
    Path | None,
    typer.Option(
        "--heartbeat", metavar="FILE", show_default=False, rich_help_panel=LIMITS,
        help="Renew this file while the run is alive: time, shards done, shards in all, as JSON.",
    ),
]  # fmt: skip
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only say what would be done: the same as `explain`.")
]
ShowProgress = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress", show_default=False,
        help="Show how far it is, on stderr. By default, but for -q.",
    ),
]  # fmt: skip


@command
def run(
    recipe: RecipeFile,
    settings: Overrides = None,
    dry_run: DryRun = False,
    cluster: Cluster = None,
    part: Part = None,
    max_time: MaxTime = None,
    heartbeat: HeartbeatFile = None,
    progress: ShowProgress = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Carry out a recipe: write all of its outputs.

    Run it again to go on where it was stopped: what is written stays, and a finished store is left as it is.
    """
    limits = limits_of(part, max_time, heartbeat)  # the time counts from here
    made = loaded(recipe, settings)
    if dry_run:
        answer_explained(made.explain(cluster), as_json)
    else:
        carry_out(made, limits, not quiet if progress is None else progress, cluster, as_json)


@command
def resume(
    place: Annotated[
        str,
        typer.Argument(
            metavar="STORE|RECIPE",
            show_default=False,
            help="A store that a recipe wrote (path or URL), or the recipe.",
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Option(
            show_default=False,
            help="Where relative paths of the kept recipe begin. By default where it lay, as the store's path tells, "
            "else the current folder.",
        ),
    ] = None,
    cluster: Cluster = None,
    part: Part = None,
    max_time: MaxTime = None,
    heartbeat: HeartbeatFile = None,
    progress: ShowProgress = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Go on with a store that was stopped: by the recipe that is kept in it. A finished store is left as it is."""
    limits = limits_of(part, max_time, heartbeat)
    made = loaded(place, None) if place.endswith(".toml") else kept_recipe(place, folder)
    carry_out(made, limits, not quiet if progress is None else progress, cluster, as_json)


def answer_explained(explanations: Mapping[str, Explanation], as_json: bool) -> None:
    """Print what each output of a recipe would take."""
    answer({name: one.to_dict() for name, one in explanations.items()}, _explained(explanations), as_json)


def carry_out(recipe: Recipe, limits: RunLimits, progress: bool, cluster: str | None, as_json: bool) -> None:
    """Write all outputs of a recipe, and print what was done."""
    pairs = list(zip(recipe.outputs, recipe.run(limits, progress, cluster), strict=True))
    answer([_document(*pair) for pair in pairs], _written(pairs), as_json)


def kept_recipe(store: str, folder: Path | None) -> Recipe:
    """Return the recipe that is kept in a store, with this store as its only output.

    Parameters
    ----------
    store
        Path or URL.
    folder
        Where relative paths of the recipe begin; None: the folder that the store's path tells, else the current one.

    Raises
    ------
    StoreError
        When there is no recipe in it, or one that writes several stores.
    """
    from dataclasses import replace
    from tempfile import TemporaryDirectory

    from rasteret_dask.errors import StoreError
    from rasteret_dask.net import remote
    from rasteret_dask.net.places import Place
    from rasteret_dask.recipes.recipe import recipe_of
    from rasteret_dask.recipes.source import RecipeSource
    from rasteret_dask.store.ledger import COMPACT, RECIPE, begun

    place = Place.of(store)
    url = place.folder("a folder that a recipe wrote", "Give the store's folder, or the recipe.")
    subject = f"resume {remote.redact(url)}"
    try:
        data = remote.get(remote.join(url, RECIPE))
    except remote.MissingError as error:
        raise StoreError(
            subject, "no recipe in it", "a store that rasteret-dask run wrote",
            "Run what wrote it once more, a script or a recipe: it does what is missing.",
        ) from error  # fmt: skip
    if (begun(url) or {}).get("writer") == COMPACT:
        raise StoreError(
            subject, "a compacted store: its recipe wrote the one that it was made from",
            "a store that rasteret-dask run wrote",
            "Resume that one; where compact() was stopped, call it again: it does what is missing.",
        )  # fmt: skip
    with TemporaryDirectory() as temporary:
        copy = Path(temporary, "recipe.toml")
        copy.write_bytes(data)
        source = RecipeSource.read(copy, {})
    written = [str(table["zarr"]) for table in source.document["outputs"] if "zarr" in table]
    begin = folder or _folder_of(url, written) or Path.cwd()
    recipe = recipe_of(
        replace(source, path=str(begin.absolute() / f"recipe.toml of {place.url.rpartition('/')[2]}"))
    )
    stores = [output for output in recipe.outputs if output.kind == "zarr"]
    same = [output for output in stores if Place.of(output.place).url == url] or stores
    if len(same) != 1:
        raise StoreError(
            subject, f"a recipe that writes {len(same)} stores: {', '.join(written)}", "one of them here",
            "Run the recipe itself, or name its folder: --folder.",
        )  # fmt: skip
    return replace(recipe, outputs=(replace(same[0], place=url),))


def _folder_of(url: str, written: list[str]) -> Path | None:
    """Return the folder in which a recipe with one of these relative outputs writes the store."""
    here = Path(url).parts
    for text in written:
        parts = Path(text).parts
        if not Path(text).is_absolute() and "://" not in text and here[-len(parts) :] == parts:
            return Path(*here[: -len(parts)])
    return None


def limits_of(part: tuple[int, int] | None, max_time: str | None, heartbeat: Path | None) -> RunLimits:
    """Return what bounds a run; what makes no sense is a mistake of the command line."""
    from rasteret_dask.errors import PlanError
    from rasteret_dask.runlimits import RunLimits

    try:
        return RunLimits(part, max_time, heartbeat)
    except PlanError as error:
        raise typer.BadParameter(str(error)) from error


def _document(output: RecipeOutput, result: Any) -> dict[str, Any]:
    document = {"kind": output.kind, "place": output.place, "splits": list(output.splits)}
    return document | {"report": plain(result.to_dict())} if hasattr(result, "to_dict") else document


def _written(pairs: list[tuple[RecipeOutput, Any]]) -> Any:
    from rich.console import Group

    from rasteret_dask.store.jobreport import JobReport

    return Group(
        *(
            details(
                report_lines(result) if isinstance(result, JobReport) else [("state", "written")], str(output)
            )
            for output, result in pairs
        )
    )


def report_lines(report: JobReport) -> list[tuple[str, Any]]:
    """Return what a run did, a line each."""
    if not report.committed:
        state = "not finished: other parts still write; the last one, or rasteret-dask commit, finishes it"
    elif report.shards_written:
        state = "finished"
    else:
        state = "finished; nothing was left to write"
    return [("state", state), *((name, text) for name, text in report.lines if name != "store")]
