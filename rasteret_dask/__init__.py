"""Distributed dataflow on Dask for multi-collection satellite training data.

The main path: :func:`build` makes a :class:`Collection`; ``merge``, ``subset``, ``harmonize``, ``join``
and ``chips`` add steps to its plan; ``split`` and ``select`` choose chips; ``explain`` tells what would be done;
``to_zarr``, ``stream``, ``to_xarray`` and ``cube`` do it. :func:`open_chips` opens what was written.
"""

from rasteret_dask._version import __version__
from rasteret_dask.build import build, build_from_stac, refresh
from rasteret_dask.catalogs.catalog import datasets
from rasteret_dask.catalogs.catalogwrite import register
from rasteret_dask.chipping.chiptable import CHIP_SCHEMA
from rasteret_dask.chipset import Chips
from rasteret_dask.collection import Collection, join, merge
from rasteret_dask.compacting import compact
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
from rasteret_dask.openers import as_collection, build_from_table, load
from rasteret_dask.reader.cogreader import CogReader
from rasteret_dask.show.audit import Audit
from rasteret_dask.show.explain import Explanation
from rasteret_dask.statistics.stats import Stats
from rasteret_dask.storeset import StoredChips, open_chips
from rasteret_dask.streamfrom import stream_from
from rasteret_dask.streams.stream import Stream
from rasteret_dask.table.records import RECORD_SCHEMA
from rasteret_dask.tasks.batches import as_xarray

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
    "Stats",
    "StoreError",
    "StoredChips",
    "Stream",
    "TrustError",
    "UnreadableAssetsError",
    "UnreadableTilesWarning",
    "__version__",
    "as_collection",
    "as_xarray",
    "build",
    "build_from_stac",
    "build_from_table",
    "compact",
    "datasets",
    "join",
    "load",
    "merge",
    "open_chips",
    "refresh",
    "register",
    "stream_from",
]
