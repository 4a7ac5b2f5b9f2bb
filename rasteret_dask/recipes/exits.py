# SPDX-License-Identifier: Apache-2.0
"""What the tables [predict] and [export] say, as the calls that chips make of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rasteret_dask.chipset import Chips
from rasteret_dask.errors import PlanError
from rasteret_dask.prediction.cogtiles import CogTiles
from rasteret_dask.prediction.mapstore import MapZarr
from rasteret_dask.prediction.modelkinds import SUFFIXES
from rasteret_dask.prediction.models import Model
from rasteret_dask.prediction.outputs import Outputs
from rasteret_dask.prediction.targets import VectorTable, target_of
from rasteret_dask.recipes.arguments import parameters
from rasteret_dask.recipes.functions import named
from rasteret_dask.recipes.models import EXPORTS, ExportTable
from rasteret_dask.statistics.stats import Stats

__all__ = ["export_call", "map_call", "predict_call"]

Values = Mapping[str, Any]


def predict_call(table: Values, folder: Path, place: Callable[[str], str]) -> dict[str, Any]:
    """Return the arguments of :meth:`Chips.predict` that [predict] stands for.

    Parameters
    ----------
    table
        The table.
    folder
        Where its functions are looked for.
    place
        Makes a path or URL of a text.

    Raises
    ------
    PlanError
        When a function that it names is none, or keys do not fit each other.
    ModelError, ReadError, SchemaError
        When the model's file, or that of the statistics, is not there, or is something else.
    """
    model = {key: value for key, value in table.items() if key in parameters(Model)}
    for key in ("normalize", "inputs"):
        if key in model:
            model[key] = _function(model[key], folder, place)
    arguments = {key: value for key, value in table.items() if key in parameters(Chips.predict)}
    is_file = table["model"].lower().endswith(tuple(SUFFIXES))
    return arguments | {
        "model": Model(place(table["model"]) if is_file else named(table["model"], folder), **model),
        "outputs": _outputs(table),
        "to": _target(table, place),
    }


def map_call(arguments: Values) -> dict[str, Any] | None:
    """Return the arguments of :meth:`Chips.plan_map` for those of ``predict``; None where it makes a table.

    Parameters
    ----------
    arguments
        As :func:`predict_call` returns them.
    """
    target = target_of(arguments["to"])
    if isinstance(target, VectorTable):
        return None
    taken = {key: value for key, value in arguments.items() if key in parameters(Chips.plan_map)}
    if isinstance(target, MapZarr):
        taken["block_px"] = target.block_px
    elif isinstance(target, CogTiles):
        taken["block_px"] = target.tile_px
    return taken


def export_call(kind: str, table: Values, place: Callable[[str], str]) -> dict[str, Any]:
    """Return the arguments of the export of a format that [export] stands for.

    Raises
    ------
    PlanError
        When a key is none of its format's.
    """
    taken = parameters(EXPORTS[kind])
    arguments = {key: value for key, value in table.items() if key not in ("to", "format", "splits")}
    for key in arguments:
        if key not in taken:
            keys = ", ".join(name for name in taken if name in ExportTable.model_fields)
            raise PlanError(
                f"export(format={kind!r})", f"{key!r}, which belongs to another format", f"one of {keys}"
            )
    return {"folder": place(table["to"]), **arguments}


def _function(text: str, folder: Path, place: Callable[[str], str]) -> Any:
    """Return the statistics of a file, else what ``"module:name"`` names."""
    return Stats.load(place(text)) if text.lower().endswith(".json") else named(text, folder)


def _target(table: Values, place: Callable[[str], str]) -> Any:
    to = place(table["to"])
    store = {key: table[key] for key in parameters(MapZarr) if key in table}
    tiles = {key: table[key] for key in parameters(CogTiles) if key in table}
    if store and tiles:
        keys = ", ".join((*store, *tiles))
        raise PlanError(
            "predict(to=)", keys, "keys of a Zarr store, or of a folder of GeoTIFFs", "Leave one out."
        )
    if tiles:
        return CogTiles(to, **tiles)
    return MapZarr(to, **store) if store else to


def _outputs(table: Values) -> Outputs:
    """Return what the model's numbers are; the codes of TOML's keys are numbers."""
    arguments = {key: table[key] for key in parameters(Outputs) if key in table}
    for key in ("classes", "colors"):
        if isinstance(arguments.get(key), Mapping):
            arguments[key] = {_code(word): value for word, value in arguments[key].items()}
    return Outputs(table.get("outputs", "classes" if "classes" in table else "values"), **arguments)


def _code(word: str) -> int | str:
    return int(word) if word.isdecimal() else word
