# SPDX-License-Identifier: Apache-2.0
"""Distributed dataflow on Dask for multi-collection satellite training data.

The main path: :func:`build` makes a :class:`Collection`; ``merge``, ``subset``, ``harmonize``, ``join``
and ``chips`` add steps to its plan; ``split`` and ``select`` choose chips; ``explain`` tells what would be done;
``to_zarr``, ``stream``, ``to_xarray`` and ``cube`` do it. :func:`open_chips` opens what was written.

In the examples of docstrings, ``collection`` is the Sentinel-2 scenes of the demo's world
(``rd.build("demo/sentinel-2-l2a")``), ``landsat`` and ``embeddings`` are its other two collections, ``chips`` is what
``collection.harmonize(["red", "nir"], mask="clouds", time="1MS").chips(32, cell_km=0.96).split(seed=1)`` returns, and
``stored`` these chips in a store, ``train.zarr``, and ``evaluation`` is what ``chips.evaluate`` says of a
map of two classes.

What happens is logged below ``logging.getLogger("rasteret_dask")``: a line a phase at INFO, a line a shard at DEBUG, a
job that stands still at WARNING. Nothing is shown unless the application configures logging.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rasteret_dask._version import __version__

if TYPE_CHECKING:
    from rasteret_dask.building import build, build_from_stac, refresh
    from rasteret_dask.catalogs.catalog import datasets
    from rasteret_dask.catalogs.catalogwrite import register
    from rasteret_dask.catalogs.signing import sign
    from rasteret_dask.chipblocks import ChipBlocks
    from rasteret_dask.chipfolder import read_chips
    from rasteret_dask.chipping.chiptable import CHIP_SCHEMA
    from rasteret_dask.chipset import Chips
    from rasteret_dask.collection import Collection, join, merge
    from rasteret_dask.compacting import compact
    from rasteret_dask.errors import (
        BandError,
        ConcurrentWriteWarning,
        CredentialsError,
        EmptyError,
        FormatError,
        GridError,
        IncompleteError,
        JobError,
        MissingExtraError,
        MixedScalesWarning,
        ModelError,
        PlanError,
        RasteretDaskError,
        ReadError,
        RecipeError,
        SchemaError,
        SignedHrefsWarning,
        SourceError,
        StoreError,
        StrataWarning,
        TrustError,
        UnknownKindWarning,
        UnreadableAssetsError,
        UnreadableTilesWarning,
        UntiledFilesWarning,
        UnwritableStoreError,
    )
    from rasteret_dask.evaluation.evaluation import Evaluation
    from rasteret_dask.launching.cluster import cluster
    from rasteret_dask.launching.request import WorkerSize
    from rasteret_dask.net.trust import trust
    from rasteret_dask.openers import as_collection, build_from_files, build_from_table, load
    from rasteret_dask.planset import SavedPlan, open_plan
    from rasteret_dask.prediction.cogtiles import CogTiles
    from rasteret_dask.prediction.mapstore import MapZarr
    from rasteret_dask.prediction.models import Model
    from rasteret_dask.prediction.openmap import open_map
    from rasteret_dask.prediction.outputs import Outputs
    from rasteret_dask.reader.cogreader import CogReader
    from rasteret_dask.recipes.recipe import Recipe, load_recipe
    from rasteret_dask.reportpage import report
    from rasteret_dask.rules import masks, picks, units
    from rasteret_dask.runlimits import RunLimits
    from rasteret_dask.show.audit import Audit
    from rasteret_dask.show.explain import Explanation
    from rasteret_dask.show.foreign import Leak, audit
    from rasteret_dask.statistics.stats import Stats
    from rasteret_dask.store.committing import commit
    from rasteret_dask.store.jobreport import JobReport, job_report
    from rasteret_dask.store.verifying import Verification, verify
    from rasteret_dask.storeset import StoredChips, open_chips
    from rasteret_dask.streamfrom import stream_from
    from rasteret_dask.streams.datasets import as_xarray
    from rasteret_dask.streams.stream import Stream
    from rasteret_dask.table.records import RECORD_SCHEMA
    from rasteret_dask.tasks.usage import Cost, Usage

__all__ = [
    "Audit",
    "BandError",
    "CHIP_SCHEMA",
    "ChipBlocks",
    "Chips",
    "CogReader",
    "CogTiles",
    "Collection",
    "ConcurrentWriteWarning",
    "Cost",
    "CredentialsError",
    "EmptyError",
    "Evaluation",
    "Explanation",
    "FormatError",
    "GridError",
    "IncompleteError",
    "JobError",
    "JobReport",
    "Leak",
    "MapZarr",
    "MissingExtraError",
    "MixedScalesWarning",
    "Model",
    "ModelError",
    "Outputs",
    "PlanError",
    "RECORD_SCHEMA",
    "RasteretDaskError",
    "ReadError",
    "Recipe",
    "RecipeError",
    "RunLimits",
    "SavedPlan",
    "SchemaError",
    "SignedHrefsWarning",
    "SourceError",
    "Stats",
    "StoreError",
    "StoredChips",
    "StrataWarning",
    "Stream",
    "TrustError",
    "UnknownKindWarning",
    "UnreadableAssetsError",
    "UnreadableTilesWarning",
    "UntiledFilesWarning",
    "UnwritableStoreError",
    "Usage",
    "Verification",
    "WorkerSize",
    "__version__",
    "as_collection",
    "as_xarray",
    "audit",
    "build",
    "build_from_files",
    "build_from_stac",
    "build_from_table",
    "cluster",
    "commit",
    "compact",
    "datasets",
    "job_report",
    "join",
    "load",
    "load_recipe",
    "masks",
    "merge",
    "open_chips",
    "open_map",
    "open_plan",
    "picks",
    "read_chips",
    "refresh",
    "register",
    "report",
    "sign",
    "stream_from",
    "trust",
    "units",
    "verify",
]

# Imported when first used: a training worker that streams from a store starts in half the time without xarray, Dask's
# cluster and GDAL.
_MODULES = {
    "building": "build build_from_stac refresh",
    "catalogs.catalog": "datasets",
    "catalogs.catalogwrite": "register",
    "catalogs.signing": "sign",
    "chipping.chiptable": "CHIP_SCHEMA",
    "chipblocks": "ChipBlocks",
    "chipfolder": "read_chips",
    "chipset": "Chips",
    "collection": "Collection join merge",
    "compacting": "compact",
    "errors": "BandError ConcurrentWriteWarning CredentialsError EmptyError FormatError GridError IncompleteError "
    "JobError MissingExtraError MixedScalesWarning ModelError PlanError RasteretDaskError ReadError RecipeError "
    "SchemaError SignedHrefsWarning SourceError StoreError StrataWarning TrustError UnknownKindWarning "
    "UnreadableAssetsError UnreadableTilesWarning UntiledFilesWarning UnwritableStoreError",
    "evaluation.evaluation": "Evaluation",
    "launching.cluster": "cluster",
    "launching.request": "WorkerSize",
    "net.trust": "trust",
    "openers": "as_collection build_from_files build_from_table load",
    "planset": "SavedPlan open_plan",
    "prediction.mapstore": "MapZarr",
    "prediction.models": "Model",
    "prediction.openmap": "open_map",
    "prediction.outputs": "Outputs",
    "prediction.cogtiles": "CogTiles",
    "reader.cogreader": "CogReader",
    "recipes.recipe": "Recipe load_recipe",
    "reportpage": "report",
    "runlimits": "RunLimits",
    "show.audit": "Audit",
    "show.explain": "Explanation",
    "statistics.stats": "Stats",
    "store.committing": "commit",
    "show.foreign": "Leak audit",
    "store.jobreport": "JobReport job_report",
    "store.verifying": "Verification verify",
    "storeset": "StoredChips open_chips",
    "streamfrom": "stream_from",
    "streams.datasets": "as_xarray",
    "streams.stream": "Stream",
    "table.records": "RECORD_SCHEMA",
    "tasks.usage": "Cost Usage",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}
_RULES = {"masks": "rules.masks", "picks": "rules.picks", "units": "rules.units"}
"""Modules that are names of the package: what to subclass for rules of one's own."""


# silent until an application says otherwise: logging.basicConfig(level="INFO")
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name in _RULES:
        found = import_module(f"{__name__}.{_RULES[name]}")
    elif name in _HOME:
        found = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
