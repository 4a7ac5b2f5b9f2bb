"""Distributed dataflow on Dask for multi-collection satellite training data.

The main path: :func:`build_from_stac` makes a :class:`Collection`; ``merge``, ``subset``, ``harmonize``, ``join``
and ``chips`` add steps to its plan; ``split`` and ``select`` choose chips; ``explain`` tells what would be done;
``to_zarr``, ``to_xarray`` and ``cube`` do it.
"""

from rasteret_dask._version import __version__
from rasteret_dask.audit import Audit
from rasteret_dask.build import build_from_stac
from rasteret_dask.chipset import Chips
from rasteret_dask.chiptable import CHIP_SCHEMA
from rasteret_dask.cogreader import CogReader
from rasteret_dask.collection import Collection, join, merge
from rasteret_dask.errors import (
    BandError,
    GridError,
    JobError,
    PlanError,
    RasteretDaskError,
    ReadError,
    SchemaError,
    SourceError,
    StoreError,
    TrustError,
    UnreadableAssetsError,
    UnreadableTilesWarning,
)
from rasteret_dask.explain import Explanation
from rasteret_dask.openers import as_collection, build_from_table, load
from rasteret_dask.records import RECORD_SCHEMA

__all__ = [
    "Audit",
    "BandError",
    "CHIP_SCHEMA",
    "Chips",
    "CogReader",
    "Collection",
    "Explanation",
    "GridError",
    "JobError",
    "PlanError",
    "RECORD_SCHEMA",
    "RasteretDaskError",
    "ReadError",
    "SchemaError",
    "SourceError",
    "StoreError",
    "TrustError",
    "UnreadableAssetsError",
    "UnreadableTilesWarning",
    "__version__",
    "as_collection",
    "build_from_stac",
    "build_from_table",
    "join",
    "load",
    "merge",
]
