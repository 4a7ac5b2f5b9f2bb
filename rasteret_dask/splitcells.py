# SPDX-License-Identifier: Apache-2.0
"""Tables that splits start from, wherever they are: of split cells, and of regions."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from rasteret_dask.chipping.celltable import CellTable
from rasteret_dask.errors import PlanError
from rasteret_dask.geometries.areas import as_regions
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.table import geoparquet

__all__ = ["CellsLike", "Regions", "cells_from", "regions_of", "stored_cells"]

SUBJECT = "split(cells=)"

_JOB = "_job"
"""Folder of a store where its plan lies."""


class HasCells(Protocol):
    """Chips, planned or stored."""

    @property
    def split_cells(self) -> pa.Table:
        """Split cells with their splits."""


class HasGeometry(Protocol):
    """A GeoDataFrame."""

    @property
    def geometry(self) -> Any:
        """Its shapes."""


CellsLike: TypeAlias = "pa.Table | HasCells | str | os.PathLike[str]"
"""A table with columns cell and split, chips that have one, or the path of a Parquet file, a saved plan or a store."""


Regions: TypeAlias = "pa.Table | HasGeometry | os.PathLike[str]"
"""Polygons with one column of names."""

_FILES = (".parquet", ".geoparquet")


def regions_of(by: Any) -> pa.Table | None:
    """Return the table of regions that ``split(by=)`` means; None where it is a word or a column's name."""
    if isinstance(by, os.PathLike) or (isinstance(by, str) and by.endswith(_FILES)):
        return as_regions(geoparquet.read(by))
    if isinstance(by, pa.Table) or (hasattr(by, "to_crs") and hasattr(by, "geometry")):
        return as_regions(by)
    return None


def cells_from(cells: CellsLike | Any) -> pa.Table:
    """Return the table that is meant, checked.

    Raises
    ------
    PlanError
        When it is none, or what it is read from has none.
    """
    if isinstance(cells, str | os.PathLike):
        url = Place.of(cells).url
        is_file = url.endswith((".parquet", ".pq"))
        cells = pq.read_table(pa.py_buffer(remote.get(url))) if is_file else stored_cells(url)
    elif not isinstance(cells, pa.Table) and hasattr(cells, "split_cells"):
        cells = cells.split_cells
    if not isinstance(cells, pa.Table):
        raise PlanError(
            SUBJECT, f"a {type(cells).__name__}", "a table with columns cell and split, chips, or a path",
            "chips.split_cells is such a table; the path of a store or a saved plan is one too.",
        )  # fmt: skip
    return CellTable.again(cells, SUBJECT).table


def stored_cells(url: str) -> pa.Table:
    """Read the table that a saved plan or a store has; of a store that has grown, that of all its parts.

    Raises
    ------
    PlanError
        When there is neither, or its cells were dealt by a hash.
    """
    from rasteret_dask.tasks.jobfile import (  # plans start without the room of tasks
        JOB_FILE,
        read_split_cells,
    )

    place = next(
        (p for p in (url, remote.join(url, _JOB)) if remote.exists(remote.join(p, JOB_FILE))),
        None,
    )
    if place is None:
        raise PlanError(
            f"split cells of {remote.redact(url)}", "no saved plan, store or Parquet file", "one of them",
            "chips.to_zarr(path) writes a store, chips.save_plan(path) a plan.",
        )  # fmt: skip
    tables = [table for one in (place, *_part_jobs(url)) if (table := read_split_cells(one)) is not None]
    if not tables:
        raise PlanError(
            f"split cells of {remote.redact(url)}", "a split without a table of cells",
            "split(stratify=) or split(cells=), which keep one",
            "Cells that a hash dealt have the same split again by the same seed and shares.",
        )  # fmt: skip
    return tables[0] if len(tables) == 1 else CellTable.again(pa.concat_tables(tables), SUBJECT).table


def _part_jobs(url: str) -> Iterator[str]:
    """Yield where the plans of a store's finished parts lie, but for the first one's."""
    from rasteret_dask.store.ledger import part_path  # as above
    from rasteret_dask.tasks.jobfile import JOB_FILE

    for number in itertools.count(1):
        part = remote.join(url, part_path(number))
        if not (
            remote.exists(remote.join(part, "zarr.json")) and remote.exists(remote.join(part, _JOB, JOB_FILE))
        ):
            return
        yield remote.join(part, _JOB)
