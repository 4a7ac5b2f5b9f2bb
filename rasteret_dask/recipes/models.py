# SPDX-License-Identifier: Apache-2.0
"""The tables of a recipe as checked values, and their JSON Schema."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, create_model
from pydantic_core import PydanticCustomError

from rasteret_dask.building import build, build_from_stac
from rasteret_dask.chipset import Chips
from rasteret_dask.collection import Collection, join
from rasteret_dask.exports.webdataset import PixelFormat
from rasteret_dask.launching.cluster import ClusterKind
from rasteret_dask.openers import build_from_files, build_from_table, load
from rasteret_dask.planning.plan import OPERATORS
from rasteret_dask.prediction.blending import Blend
from rasteret_dask.prediction.cogtiles import CogTiles
from rasteret_dask.prediction.mapstore import MapZarr
from rasteret_dask.prediction.models import Model
from rasteret_dask.prediction.outputs import OutputKind, Outputs
from rasteret_dask.recipes.arguments import Table, documented, fields_of, table_of
from rasteret_dask.words import OnError

__all__ = [
    "BEGINNINGS",
    "CHIP_STEPS",
    "OUTPUTS",
    "RECORD_STEPS",
    "Document",
    "beginning_of",
    "output_of",
    "schema",
    "step_of",
]

Shapes = str | list[float] | list[list[float]] | dict[str, Any]
"""A file's path, a box, points, or GeoJSON."""

Crs = str | int


class GridSpecTable(Table):
    """An odc-geo GridSpec: one lattice in a CRS, whose split cells are its tiles."""

    crs: str
    tile_shape: list[int] = Field(min_length=2, max_length=2, description="Pixels of a tile: rows, columns.")
    resolution: float = Field(description="Metres a pixel.")
    origin: list[float] = Field([0.0, 0.0], min_length=2, max_length=2, description="A tile's corner: x, y.")


class GeoBoxTable(Table):
    """An odc-geo GeoBox: chips from its upper left corner on, and nothing beyond it."""

    crs: str
    bbox: list[float] = Field(min_length=4, max_length=4, description="xmin, ymin, xmax, ymax, in the CRS.")
    resolution: float = Field(gt=0, description="Metres a pixel.")


# Steps on records


class _Columns(Table):
    """Any further key is a column, or a property of STAC: equal to a value, or to one of a list."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class Triple(Table):
    """A predicate where an array cannot say it: no ``value`` means a column that is null."""

    column: str
    operator: str = Field(json_schema_extra={"enum": list(OPERATORS)})
    value: Any = None


class Called(Table):
    """A function of yours."""

    function: str = Field(description="'module:name', from the recipe's folder or an installed package.")
    source: str | None = Field(None, description="Of a join: the source it applies to.")
    version: str | None = Field(None, description="A name for the function that changes when it does.")


Triples = list[list[Any] | Triple]
Subset = table_of("Subset", Collection.subset, others={"geometries": Shapes}, base=_Columns)
Sample = table_of("Sample", Collection.sample)
Harmonize = table_of("Harmonize", Collection.harmonize)

RECORD_STEPS = ("subset", "filter", "sample", "harmonize", "map")
"""Steps of a collection, in the order in which they are taken."""

_STEPS: dict[str, Any] = {
    "subset": (Subset, Field(None, description="Keep the records that fulfil all conditions.")),
    "filter": (
        Triples,
        Field(None, description='Keep the records that fulfil all triples: [["eo:cloud_cover", "<", 20]].'),
    ),
    "sample": (int | Sample, Field(None, description="Keep so many records, by hash of their id.")),
    "harmonize": (
        Harmonize,
        Field(None, description="Give all records the same bands, units, grid and time axis."),
    ),
    "map": (
        str | Called,
        Field(None, description="A function 'module:name' applied to the chips of each group."),
    ),
}


# Collections, by the way they begin

_BUILT = {"crs": Crs}
_OMITTED = ("force", "progress", "filter")
_CQL2: dict[str, Any] = {
    "cql2": (
        str | dict[str, Any],
        Field(None, description="The filter= of the search: CQL2, as text or JSON, where the API can."),
    )
}


def _begun(
    name: str, function: Any, further: dict[str, Any] | None = None, **options: Any
) -> type[BaseModel]:
    omit = (*_OMITTED, *options.pop("omit", ()))
    return table_of(
        name, function, omit=omit, optional=("name",), others={**_BUILT, **options.pop("others", {})},
        further={**_STEPS, **(further or {})},
    )  # fmt: skip


FromDataset = _begun("FromDataset", build, _CQL2)
FromStac = _begun(
    "FromStac", build_from_stac, omit=("source", "stac_api", "collection", "workspace_dir"),
    further={"stac": (str, Field(description="An ItemCollection, a catalog or STAC GeoParquet: path or URL."))},
)  # fmt: skip
FromSearch = _begun(
    "FromSearch", build_from_stac, omit=("source", "stac_api", "collection", "workspace_dir"),
    further={
        "stac_api": (str, Field(description="Root of a STAC API.")),
        "collection": (str, Field(description="The collection to search there.")),
        **_CQL2,
    },
)  # fmt: skip
FromFiles = _begun("FromFiles", build_from_files, others={"files": str | list[str]})
FromTable = _begun("FromTable", build_from_table, others={"table": str})
FromRecords = _begun(
    "FromRecords", load, omit=("path",),
    further={"records": (str, Field(description="What export() or build() wrote: path or URL."))},
)  # fmt: skip


def _combined(
    name: str, key: str, kind: Any, words: str, further: dict[str, Any] | None = None
) -> type[BaseModel]:
    fields = {key: (kind, Field(description=words)), **(further or {}), **_STEPS}
    made: type[BaseModel] = create_model(name, __base__=Table, __doc__=words, **fields)
    return made


FromOther = _combined("FromOther", "from", str, "Another collection of the recipe, with further steps.")
FromMerge = _combined("FromMerge", "merge", list[str], "The union of collections, as one source.")
FromJoin = _combined(
    "FromJoin", "join", dict[str, str], "Collections side by side, by the source's name.",
    {"require": (list[str], Field(None, description=documented(join)["require"]))},
)  # fmt: skip

BEGINNINGS: dict[str, type[BaseModel]] = {
    "dataset": FromDataset, "stac": FromStac, "stac_api": FromSearch, "files": FromFiles, "table": FromTable,
    "records": FromRecords, "from": FromOther, "merge": FromMerge, "join": FromJoin,
}  # fmt: skip
"""The key that a collection begins with -> its table."""

_AMONG_OTHERS = {"dataset": ("stac", "stac_api", "files", "table"), "stac_api": ("dataset",)}
"""Beginnings that are further arguments beside these others."""


def beginning_of(table: Any) -> str | None:
    """Return the key that a collection begins with; None where there is not exactly one."""
    if not isinstance(table, dict):
        return None
    keys = [key for key in BEGINNINGS if key in table]
    if {"dataset", "stac_api"} == set(keys):
        return "stac_api" if "collection" in table else "dataset"
    if "dataset" in keys and any(key in keys for key in _AMONG_OTHERS["dataset"]):
        keys.remove("dataset")
    return keys[0] if len(keys) == 1 else None


def _with_one(table: Any, words: Iterable[str], chosen: str | None) -> Any:
    """Return a table, or refuse it where not exactly one of the words is a key of it."""
    if isinstance(table, dict) and chosen is None:
        keys = [repr(key) for key in words if key in table]
        found = " and ".join(keys) if keys else "none of its first keys"
        raise PydanticCustomError(
            "beginning", "{found}", {"found": found, "expected": ", ".join(map(repr, words))}
        )
    return table


def _with_beginning(table: Any) -> Any:
    return _with_one(table, BEGINNINGS, beginning_of(table))


def _tagged(tables: dict[str, type[BaseModel]], chosen: Any, check: Any) -> Any:
    """Return the type of a table that is one of several, told by a key; tags have brackets, which no key has."""
    kinds = tuple(Annotated[table, Tag(f"[{key}]")] for key, table in tables.items())
    tag = Discriminator(lambda table: None if (key := chosen(table)) is None else f"[{key}]")
    return Annotated[Union[kinds], tag, BeforeValidator(check)]  # noqa: UP007  # of a tuple


CollectionTable: Any = _tagged(BEGINNINGS, beginning_of, _with_beginning)


# Chips

ChipsTable = table_of(
    "Chips", Collection.chips,
    others={"aoi": Shapes, "at": Shapes, "labels": Shapes, "grid": str | GridSpecTable | GeoBoxTable},
    further={"collection": (str, Field(None, description="Which collection; None: the one no other uses."))},
)  # fmt: skip
_Values = list[str | int | float | bool]


class _Shares(Table):
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)
    __pydantic_extra__: dict[
        str, float | list[str | int | float | bool]
    ]  # no name: pydantic 2.10 does not find it


class OfCollection(Table):
    """A collection of the recipe with one band of classes."""

    collection: str


_DEAL = {"cells": str, "stratify": str | list[str] | OfCollection}
_SHARES = {**dict.fromkeys(("train", "val", "test"), float | _Values), "by": str, **_DEAL}
SplitTable = table_of("Split", Chips.split, base=_Shares, others=_SHARES)
FoldsTable = table_of("Folds", Chips.folds, others=_DEAL)
FoldTable = table_of("Fold", Chips.fold)
RandomTable = table_of("Random", Chips.random, others={"balance": str | list[str]})
FilterPixels = table_of(
    "FilterPixels", Chips.filter_pixels,
    others={"function": str},
)  # fmt: skip

_CHIP_STEPS: dict[str, Any] = {
    "split": SplitTable, "folds": int | FoldsTable, "fold": int | FoldTable,
    "filter": Triples, "sample": int | Sample, "random": int | RandomTable, "select": list[str],
    "map": str | Called, "filter_pixels": FilterPixels, "with_table": str,
}  # fmt: skip
CHIP_STEPS = tuple(_CHIP_STEPS)
"""What a step on chips can be."""


def step_of(table: Any) -> str | None:
    """Return the key that says what a step is; None where there is not exactly one."""
    keys = [key for key in CHIP_STEPS if isinstance(table, dict) and key in table]
    return keys[0] if len(keys) == 1 else None


def _table(name: str, words: str, fields: dict[str, Any], base: type[BaseModel] = Table) -> type[BaseModel]:
    made: type[BaseModel] = create_model(name, __base__=base, __doc__=words, **fields)
    return made


Step = _table(
    "Step",
    "One step on chips: one of these keys.",
    {k: (kind, Field(None)) for k, kind in _CHIP_STEPS.items()},
)


def _with_one_step(table: Any) -> Any:
    return _with_one(table, CHIP_STEPS, step_of(table))


# Outputs


class _Output(Table):
    splits: list[str] | None = Field(None, min_length=1, description="Only the chips of these splits.")


class Codec(Table):
    """A codec of Zarr with its settings."""

    codec: Literal["zstd", "gzip", "blosc"]
    level: int | None = Field(None, description="How hard it tries.")
    cname: str | None = Field(None, description="Of blosc: the compressor, as 'lz4' or 'zstd'.")
    shuffle: Literal["noshuffle", "shuffle", "bitshuffle"] | None = Field(None, description="Of blosc.")


class ToZarr(_Output):
    """A sharded Zarr store."""

    zarr: str = Field(description="The store: path or URL.")
    compression: Literal["auto", "none", "zstd", "gzip", "blosc"] | Codec | None = Field(
        None, description="'auto' is what serves each dtype best; { codec = 'zstd', level = 3 } says more."
    )
    on_error: OnError | None = Field(None, description="What becomes of a tile that cannot be read.")
    append: bool | None = Field(
        None, description="Write what a finished store does not have yet; where nothing lies there, begin it."
    )


class ToTable(_Output):
    """The chip table as GeoParquet."""

    table: str = Field(description="A local path.")


class ToPlan(_Output):
    """The plan, for stream_from."""

    plan: str = Field(description="A folder of its own: path or URL.")


class ToStats(_Output):
    """Statistics per band, as JSON."""

    stats: str = Field(description="The file: path or URL.")
    sample: int | None = Field(None, description="Measure so many chips; None: all.")
    sources: list[str] | None = Field(None, description="Read and measure only these sources; None: all.")
    on_error: OnError | None = Field(None, description="What becomes of a tile that cannot be read.")


OUTPUTS: dict[str, type[BaseModel]] = {"zarr": ToZarr, "table": ToTable, "plan": ToPlan, "stats": ToStats}
"""The key that says what an output is -> its table."""


def output_of(table: Any) -> str | None:
    """Return the key that says what an output is; None where there is not exactly one."""
    keys = [key for key in OUTPUTS if isinstance(table, dict) and key in table]
    return keys[0] if len(keys) == 1 else None


def _with_output(table: Any) -> Any:
    return _with_one(table, OUTPUTS, output_of(table))


OutputTable: Any = _tagged(OUTPUTS, output_of, _with_output)


# What chips become: a map, files that others read

_CALLED = ("client", "progress", "limits", "functions")
"""Arguments that say how a call runs, which a recipe says elsewhere."""

_PARTS_OF_A_MAP: dict[str, Any] = {
    **fields_of("Predict", Model, omit=("call", "normalize"), others={"inputs": str}),
    **fields_of(
        "Predict",
        Outputs,
        omit=("kind",),
        others={"classes": dict[str, str] | list[str], "colors": dict[str, str]},
    ),
    **fields_of("Predict", MapZarr, omit=("store",)),
    **fields_of("Predict", CogTiles, omit=("folder",)),
    "model": (
        str,
        Field(
            description="A file ('unet.onnx', '.pt2', '.pt'), or a function or torch module: 'module:name'."
        ),
    ),
    "normalize": (
        str,
        Field(
            None, description="Statistics of the train chips, a file '.json'; or a function 'module:name'."
        ),
    ),
    "outputs": (OutputKind, Field(None, description=documented(Outputs)["kind"])),
    "to": (
        str,
        Field(description="Where it goes: '.zarr', '.tif', '.parquet'; with `tile_px` a folder of GeoTIFFs."),
    ),
}

PredictTable = table_of(
    "Predict", Chips.predict, base=_Output, omit=_CALLED,
    others={"model": str, "outputs": str, "to": str, "blend": Blend}, further=_PARTS_OF_A_MAP,
)  # fmt: skip

EXPORTS: dict[str, Any] = {
    "geotiff": Chips.to_geotiff, "webdataset": Chips.to_webdataset, "rslearn": Chips.to_rslearn,
}  # fmt: skip
"""Format of an export -> what writes it."""

ExportTable = _table(
    "Export",
    "Chips as files that other libraries read.",
    {
        "to": (str, Field(description="The folder: path or URL.")),
        "format": (
            Literal["geotiff", "webdataset", "rslearn"],
            Field(
                None,
                description="GeoTIFFs with STAC items (the default), tars of WebDataset, windows of rslearn.",
            ),
        ),
        **{
            key: field
            for function in EXPORTS.values()
            for key, field in fields_of(
                "Export", function, omit=(*_CALLED, "folder"), others={"pixels": PixelFormat}
            ).items()
        },
    },
    base=_Output,
)


class ClusterTable(Table):
    """Where tasks run; without this table, on threads of this process."""

    kind: ClusterKind | None = Field(
        None, description="What is started: processes of this machine (the default), or a cluster."
    )
    address: str | None = Field(
        None, description="Instead of all other keys: the address of a Dask scheduler that runs."
    )
    workers: int | None = Field(
        None, ge=1, description="How many; left out: as many as there are tasks for, at most 4."
    )
    min_workers: int | None = Field(
        None, ge=0, description="At least so many, where their number follows the work: 0."
    )
    max_workers: int | None = Field(
        None, ge=1, description="At most so many, where their number follows the work."
    )
    threads: int | None = Field(None, ge=1, description="Tasks of each worker at the same time: 2.")
    memory: str | int | None = Field(
        None, description="Memory limit of each worker, as '4GiB'; left out: what explain tells."
    )
    lifetime: str | int | float | None = Field(
        None, description="After so long, as '55 minutes', a worker hands its tasks over and ends."
    )
    image: str | None = Field(None, description="Container image of workers.")
    environment: dict[str, str] | None = Field(None, description="Environment variables of workers.")
    idle_timeout: str | int | float | None = Field(
        None, description="After so long without tasks the cluster takes itself down: '10 minutes'."
    )
    allowed_failures: int | None = Field(None, ge=0, description="How many lost workers a task survives: 3.")
    options: dict[str, Any] | None = Field(
        None, description="What only this kind takes: see docs/clusters.md."
    )


Document = _table(
    "Recipe", "Collections, the chips that are cut from them, and what is written.",
    {
        "collections": (dict[str, CollectionTable], Field(min_length=1)),
        "chips": (ChipsTable, Field()),
        "split": (SplitTable, Field(None)),
        "steps": (list[Annotated[Step, BeforeValidator(_with_one_step)]], Field([])),  # type: ignore[valid-type]
        "outputs": (list[OutputTable], Field([])),
        "predict": (PredictTable, Field(None)),
        "export": (ExportTable, Field(None)),
        "cluster": (ClusterTable, Field(None)),
    },
)  # fmt: skip


def schema() -> dict[str, Any]:
    """Return the JSON Schema of recipes, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Document.model_json_schema()}
