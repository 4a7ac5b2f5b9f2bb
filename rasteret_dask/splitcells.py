# SPDX-License-Identifier: Apache-2.0
"""Tables that splits start from, wherever they are: of split cells, and of regions."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from rasteret_dask.chipping.celltable import CellTable, Dealt
from rasteret_dask.errors import PlanError
from rasteret_dask.geometries.areas import as_regions
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.table import geoparquet

__all__ = ["CellsLike", "Regions", "cells_from", "no_cells", "regions_of", "stored_cells"]

_JOB = "_job"
"""Folder of a store where its plan lies."""


class HasCells(Protocol):
    """Chips, planned or stored."""

    @property
    def split_cells(self) -> pa.Table:
        """Split cells with their splits."""

    @property
    def fold_cells(self) -> pa.Table:
        """Split cells with their folds."""


class HasGeometry(Protocol):
    """A GeoDataFrame."""

    @property
    def geometry(self) -> Any:
        """Its shapes."""


CellsLike: TypeAlias = "pa.Table | HasCells | str | os.PathLike[str]"
"""A table with columns cell and split (of folds: cell and fold), chips that have one, or the path of a Parquet file,
a saved plan or a store."""


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


def cells_from(cells: CellsLike | Any, what: Dealt = "split") -> pa.Table:
    """Return the table that is meant, checked: columns cell and split.

    Parameters
    ----------
    cells
        What the user gave.
    what
        Whether the table is of splits or of folds, whose numbers are text in the result.

    Raises
    ------
    PlanError
        When it is none, or what it is read from has none.
    """
    subject, name = ("split(cells=)" if what == "split" else "folds(cells=)"), f"{what}_cells"
    if isinstance(cells, str | os.PathLike):
        url = Place.of(cells).url
        is_file = url.endswith((".parquet", ".pq"))
        cells = pq.read_table(pa.py_buffer(remote.get(url))) if is_file else stored_cells(url, what)
    elif not isinstance(cells, pa.Table) and hasattr(cells, name):
        cells = getattr(cells, name)
    if not isinstance(cells, pa.Table):
        raise PlanError(
            subject, f"a {type(cells).__name__}", f"a table with columns cell and {what}, chips, or a path",
            f"chips.{name} is such a table; the path of a store or a saved plan is one too.",
        )  # fmt: skip
    return (CellTable.again if what == "split" else CellTable.of_folds)(cells, subject).table


def stored_cells(url: str, what: Dealt = "split") -> pa.Table:
    """Read the table that a saved plan or a store has; of a store that has grown, that of all its parts.

    Parameters
    ----------
    url
        Where it lies.
    what
        Whether the table is of splits (cell, split) or of folds (cell, fold).

    Raises
    ------
    PlanError
        When there is neither, or its cells were dealt by a hash.
    """
    from rasteret_dask.tasks.jobfile import JOB_FILE, read_cells  # plans start without the room of tasks

    place = next(
        (p for p in (url, remote.join(url, _JOB)) if remote.exists(remote.join(p, JOB_FILE))),
        None,
    )
    if place is None:
        raise PlanError(
            f"{what} cells of {remote.redact(url)}", "no saved plan, store or Parquet file", "one of them",
            "chips.to_zarr(path) writes a store, chips.save_plan(path) a plan.",
        )  # fmt: skip
    tables = [table for one in (place, *_part_jobs(url)) if (table := read_cells(one, what)) is not None]
    if not tables:
        raise no_cells(f"{what} cells of {remote.redact(url)}", what)
    if len(tables) == 1:
        return tables[0]
    together = pa.concat_tables(tables)
    return CellTable.again(together).table if what == "split" else CellTable.of_folds(together).folds


def no_cells(subject: str, what: Dealt) -> PlanError:
    """Return the error of a plan whose cells a hash dealt."""
    step = "split" if what == "split" else "folds"
    return PlanError(
        subject, f"a {what} without a table of cells", f"{step}(stratify=) or {step}(cells=), which keep one",
        f"Cells that a hash dealt have the same {what} again by the same seed and "
        f"{'shares' if what == 'split' else 'number of folds'}.",
    )  # fmt: skip


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
