# SPDX-License-Identifier: Apache-2.0
"""Commands by which chips leave: as the map of a model, and as files that other libraries read."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rasteret_dask.cli.options import Json, Overrides, Quiet, command
from rasteret_dask.cli.printing import answer, details, plain
from rasteret_dask.cli.recipes import (
    Cluster,
    DryRun,
    HeartbeatFile,
    MaxTime,
    Part,
    ShowProgress,
    answer_explained,
    carry_out,
    limits_of,
    report_lines,
)

if TYPE_CHECKING:
    from rasteret_dask.planset import SavedPlan
    from rasteret_dask.recipes.recipe import Recipe
    from rasteret_dask.runlimits import RunLimits
    from rasteret_dask.storeset import StoredChips

__all__ = ["export", "predict"]

MAP = "The model and its map: instead of what [predict] says"
FILES = "The files: instead of what [export] says"


def _pairs(text: str) -> Any:
    """Return ``1=water,2=forest`` as a table, and ``water,forest`` as an array."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not any("=" in part for part in parts):
        return parts
    pairs = [part.partition("=") for part in parts]
    if not all(key and sign and value for key, sign, value in pairs):
        raise typer.BadParameter(f"found {text!r}; expected pairs such as 1=water,2=forest, or names alone.")
    return {key.strip(): value.strip() for key, _, value in pairs}


def _check_function(functions: list[str] | None) -> None:
    if functions:
        words = "only a saved plan is given its functions: recipes name theirs, and stores call none."
        raise typer.BadParameter(words, param_hint="--function")


def _option(panel: str, *names: str, words: str, **options: Any) -> Any:
    return typer.Option(*names, show_default=False, rich_help_panel=panel, help=words, **options)


Functions = Annotated[
    list[str] | None,
    typer.Option(
        "--function",
        show_default=False,
        help="A function that a saved plan calls: 'mycode:bright' or 'mycode.py:bright'; may be given several times.",
    ),
]


@command
def predict(
    place: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|PLAN",
            show_default=False,
            help="A recipe, or a plan that was saved (path or URL).",
        ),
    ],
    model: Annotated[
        str | None,
        _option(
            MAP,
            "--model",
            words="A file (.onnx, .pt2, .pt), or a function of yours: 'mycode:net', 'mycode.py:net'.",
        ),
    ] = None,
    to: Annotated[
        str | None,
        _option(
            MAP,
            "--to",
            words="map.zarr, map.tif, a folder (with --tile-px), or vectors.parquet: path or URL.",
        ),
    ] = None,
    outputs: Annotated[
        str | None, _option(MAP, "--outputs", words="What the model gives: classes, probabilities or values.")
    ] = None,
    classes: Annotated[
        Any, _option(MAP, "--classes", metavar="CODE=NAME,...", parser=_pairs, words="1=water,2=forest")
    ] = None,
    colors: Annotated[
        Any, _option(MAP, "--colors", metavar="CODE=COLOR,...", parser=_pairs, words="1=#0000ff,2=#00aa00")
    ] = None,
    normalize: Annotated[
        str | None,
        _option(MAP, "--normalize", words="Statistics of the train chips: a file that `stats` wrote."),
    ] = None,
    activation: Annotated[
        str | None, _option(MAP, "--activation", words="Applied to the model's numbers: softmax or sigmoid.")
    ] = None,
    blend: Annotated[
        str | None,
        _option(MAP, "--blend", words="How chips that overlap become one map: hann, mean, max or centre."),
    ] = None,
    batch_size: Annotated[
        int | None, _option(MAP, "--batch-size", min=1, words="How many chips the model gets at a time.")
    ] = None,
    device: Annotated[str | None, _option(MAP, "--device", words="auto, cpu, cuda, cuda:1 or mps.")] = None,
    tile_px: Annotated[
        int | None,
        _option(MAP, "--tile-px", words="Write a folder of GeoTIFFs with sides of so many pixels."),
    ] = None,
    functions: Functions = None,
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
    """Make a map of what a model says about the chips of a recipe: its [predict], changed by the options here.

    Of a saved plan, the options alone. --dry-run tells of the map: its grids, blocks and memory, then of the chips.

    The chips shall cover the area: cover = true. Run it again to go on where it was stopped.
    """
    limits = limits_of(part, max_time, heartbeat)
    options = {
        "model": _here(model, is_code=True), "to": _here(to), "outputs": outputs, "classes": classes, "colors": colors,
        "normalize": _here(normalize, is_code=True), "activation": activation, "blend": blend,
        "batch_size": batch_size, "device": device, "tile_px": tile_px,
    }  # fmt: skip
    shown = not quiet if progress is None else progress
    if not place.endswith(".toml"):
        if settings:
            raise typer.BadParameter("a saved plan is as it is: name a recipe.", param_hint="--set")
        table = {key: value for key, value in options.items() if value is not None}
        for key in ("model", "to"):
            if key not in table:
                words = "a saved plan says of no model: name it and a place."
                raise typer.BadParameter(words, param_hint=f"--{key}")
        _predict(_opened(place, functions), table, limits, None if dry_run else shown, cluster, as_json)
        return
    _check_function(functions)
    made = _only("predict", Path(place), settings, options)
    if dry_run:
        _answer_map(made, cluster, as_json)
    else:
        carry_out(made, limits, shown, cluster, as_json)


def _answer_map(recipe: Recipe, cluster: str | None, as_json: bool) -> None:
    """Print what a map will be and take, then the same of its chips."""
    from rich.console import Group
    from rich.text import Text

    from rasteret_dask.recipes.recipe import planned_maps

    maps, document, shown = planned_maps(recipe), {}, list[Any]()
    for name, chips in recipe.explain(cluster).items():
        document[name] = chips.to_dict()
        shown.append(Text(name, style="bold underline"))
        if name in maps:
            document[name]["map"] = maps[name].explain()
            shown.append(Text(str(maps[name])))
        shown.append(Text(str(chips)))
    answer(document, Group(*shown), as_json)


@command
def export(
    place: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE|PLAN|STORE",
            show_default=False,
            help="A recipe, a plan that was saved, or a finished store (path or URL).",
        ),
    ],
    to: Annotated[str | None, _option(FILES, "--to", words="The folder: path or URL.")] = None,
    kind: Annotated[
        str | None, _option(FILES, "--format", words="geotiff (the default), webdataset or rslearn.")
    ] = None,
    split: Annotated[
        list[str] | None,
        _option(FILES, "--split", words="Only the chips of this split; may be given several times."),
    ] = None,
    functions: Functions = None,
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
    """Write chips as files that other libraries read.

    GeoTIFFs with STAC items, labels as masks; tars of WebDataset; windows of rslearn. Of a recipe, as its [export]
    says, changed by the options here; of a saved plan or a store, all or some splits. Run it again to go on where it
    was stopped.
    """
    import rasteret_dask as rd

    limits = limits_of(part, max_time, heartbeat)
    options = {"to": _here(to), "format": kind, "splits": split or None}
    shown = not quiet if progress is None else progress
    if place.endswith(".toml"):
        _check_function(functions)
        made = _only("export", Path(place), settings, options)
        if dry_run:
            answer_explained(made.explain(cluster), as_json)
        else:
            carry_out(made, limits, shown, cluster, as_json)
        return
    for name, value in {"--set": settings, "--dry-run": dry_run}.items():
        if value:
            raise typer.BadParameter("a store or a saved plan is as it is: name a recipe.", param_hint=name)
    if to is None:
        raise typer.BadParameter("chips are exported to a folder of their own.", param_hint="--to")
    table = {key: value for key, value in options.items() if value}
    if _is_plan(place):
        chips: SavedPlan | StoredChips = _opened(place, functions)
    else:
        _check_function(functions)
        chips = rd.open_chips(place)
    _export(chips, table, limits, shown, cluster, as_json)


def _export(
    chips: SavedPlan | StoredChips,
    table: dict[str, Any],
    limits: RunLimits,
    progress: bool,
    place: str | None,
    as_json: bool,
) -> None:
    """Write chips as files, and print what was done."""
    from rasteret_dask.recipes.exits import export_call
    from rasteret_dask.recipes.models import EXPORTS

    kind = _format(table)
    arguments = export_call(kind, table, str)
    if "splits" in table:
        chips = chips.select(*table["splits"])
    write = partial(getattr(chips, EXPORTS[kind].__name__), progress=progress, limits=limits, **arguments)
    _answer_written(kind, table["to"], write, place, as_json)


def _predict(
    chips: SavedPlan,
    table: dict[str, Any],
    limits: RunLimits,
    progress: bool | None,
    place: str | None,
    as_json: bool,
) -> None:
    """Make the map of a plan's chips, and print what was done; without progress (None) only what would be."""
    from rasteret_dask.recipes.exits import map_call, predict_call

    arguments = predict_call(table, Path.cwd(), str)
    if progress is not None:
        write = partial(chips.predict, progress=progress, limits=limits, **arguments)
        _answer_written("predict", table["to"], write, place, as_json)
        return
    call, name = map_call(arguments), f"predict {table['to']}"
    if call is None:
        answer({name: {"chips": len(chips)}}, details([("chips", len(chips))], name), as_json)
        return
    made = chips.plan_map(**call)
    answer({name: {"chips": len(chips), "map": made.explain()}}, str(made), as_json)


def _opened(plan: str, functions: list[str] | None) -> SavedPlan:
    """Open a saved plan with its functions: ``mycode:bright`` of the folder one is in, or ``code/mycode.py:bright``."""
    import rasteret_dask as rd
    from rasteret_dask.recipes.functions import named

    calls = [named(text, Path.cwd()) for text in functions or ()]
    return rd.open_plan(plan, calls)


def _format(table: dict[str, Any]) -> str:
    from rasteret_dask.recipes.models import EXPORTS

    kind = str(table.get("format", "geotiff"))
    if kind not in EXPORTS:
        raise typer.BadParameter(f"found {kind!r}; expected {', '.join(EXPORTS)}.", param_hint="--format")
    return kind


def _answer_written(kind: str, to: str, write: Callable[..., Any], place: str | None, as_json: bool) -> None:
    """Write something on the cluster that is meant, and print what was done."""
    import rasteret_dask as rd

    with ExitStack() as stack:
        client = None if place is None else stack.enter_context(rd.cluster(place))
        report = write(client=client)
    document = {"kind": kind, "place": to, "report": plain(report.to_dict())}
    answer(document, details(report_lines(report), f"{kind} {to}"), as_json)


def _is_plan(place: str) -> bool:
    """Tell whether a saved plan lies at a place."""
    from rasteret_dask.net import remote
    from rasteret_dask.net.places import Place
    from rasteret_dask.tasks.jobfile import JOB_FILE

    return remote.exists(remote.join(Place.of(place).url, JOB_FILE))


def _only(table: str, recipe: Path, settings: list[str] | None, options: dict[str, Any]) -> Recipe:
    """Return a recipe with nothing but that table to carry out; options stand over what it says.

    Raises
    ------
    RecipeError
        When neither the recipe nor an option says what it needs.
    """
    from rasteret_dask.recipes.models import EXPORTS
    from rasteret_dask.recipes.recipe import load_recipe
    from rasteret_dask.recipes.source import setting

    changes = {f"{table}.{key}": value for key, value in options.items() if value is not None}
    made = load_recipe(recipe, {**dict(map(setting, settings or ())), **changes})
    kinds = ("predict",) if table == "predict" else EXPORTS
    outputs = tuple(output for output in made.outputs if output.kind in kinds)
    if not outputs:
        needs = {"predict": "--model and --to", "export": "--to"}[table]
        raise made.source.error((), f"no [{table}]", f"that table, or {needs}", "docs/recipes.md shows both.")
    return replace(made, outputs=outputs)


def _here(text: str | None, is_code: bool = False) -> str | None:
    """Return a path of the command line, which begins here, as one that begins nowhere else; URLs and code stay."""
    if text is None or "://" in text or (is_code and ":" in text and not Path(text).exists()):
        return text
    return str(Path(text).expanduser().absolute())
