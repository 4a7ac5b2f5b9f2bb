# SPDX-License-Identifier: Apache-2.0
"""How much of each class of a raster split cells hold: read once, on few points of each cell."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from rasteret_dask.chipping.celltable import cell_texts
from rasteret_dask.chipping.chips import below_join, chip_sources
from rasteret_dask.chipping.drawing import plan_chips
from rasteret_dask.chipping.frame import zone_cells
from rasteret_dask.chipping.ground import cells_under
from rasteret_dask.chipping.splits import SplitCells
from rasteret_dask.chipping.steps import steps_of
from rasteret_dask.chipping.strata import MOST_CLASSES
from rasteret_dask.errors import EmptyError, PlanError
from rasteret_dask.geometries.areas import as_points
from rasteret_dask.grid import transformer
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.planning.optimize import optimize
from rasteret_dask.planning.plan import (
    ChipSpec,
    CutChips,
    Harmonize,
    HarmonizeSpec,
    Join,
    Map,
    Node,
    Source,
    WithTable,
    leaves,
)
from rasteret_dask.planning.query import Query
from rasteret_dask.planning.scan import as_table, token_of
from rasteret_dask.rules.kinds import CLASS
from rasteret_dask.zones import UTM, CrsGrid

__all__ = ["ClassRaster", "StratifyLike", "raster_of"]

SIDE = 64
"""Points of a side of a split cell: 240 m apart in one of 15.36 km. 4,096 tell a share to 1 percentage point."""

_FILES = (".tif", ".tiff", ".jp2")
_TABLES = (".parquet", ".pq")
_NOTE = b"rasteret_dask:classes_of"
"""Key of the schema's metadata: what the raster is called."""


class HasQuery(Protocol):
    """A Collection."""

    @property
    def query(self) -> Query:
        """Its plan, with its tables."""


StratifyLike: TypeAlias = "str | Sequence[str] | os.PathLike[str] | pa.Table | HasQuery"
"""Columns of the chip table; or a raster of classes: a file, a Collection, a joined source's name, or the table of what
was counted in one."""


@dataclass(frozen=True)
class ClassRaster:
    """A raster of classes, or what was counted in one."""

    name: str
    query: Query | None
    """Its records; None: it was counted before."""
    band: str | None = None
    """The band of classes; None: its only one."""
    counts: pa.Table | None = None

    def counted(self, chips: Query, step: str) -> pa.Table:
        """Return how much of each class the split cells of a plan hold.

        Parameters
        ----------
        chips
            The plan of chips.
        step
            What asks, for messages: ``"split"`` or ``"folds"``.

        Returns
        -------
        pyarrow.Table
            ``cell``, and a column of whole numbers for each class that is there: of ``SIDE * SIDE`` points of the cell,
            those that have it. Points without a class count nowhere.

        Raises
        ------
        PlanError
            When the raster has no band of classes, or several; too many classes; or lies elsewhere.
        """
        if self.counts is not None:
            return self.counts
        from rasteret_dask.statistics.classshares import (
            class_shares,
            class_target,
        )  # rasterio: plans start without
        from rasteret_dask.streams.planned import planned
        from rasteret_dask.tasks.context import ReadContext
        from rasteret_dask.tasks.freezing import freeze
        from rasteret_dask.tasks.mapping import outputs_of

        assert self.query is not None
        subject = f"{step}(stratify={self.name!r})"
        node, _ = steps_of(optimize(chips.plan))
        points = as_points(_middles(node, chips))
        cut, tables = self._cut(node.spec, points, subject)
        try:
            found = plan_chips(cut, tables)
        except EmptyError as error:
            raise PlanError(
                subject, "no record of the raster on the ground of the chips", "a raster that covers them",
                "Check its CRS and its place, or leave stratify out.",
            ) from error  # fmt: skip
        job = freeze(found)
        reading = planned(
            job, outputs_of(job, self.query.functions), ReadContext(self.query.functions, "raise")
        )
        (name,) = reading.pixels
        shares = class_shares(reading, class_target(reading.pixels, name), "")
        place = pc.index_in(
            shares.column("chip_id"), value_set=found.table.column("chip_id").combine_chunks()
        )
        return _counts(found.table.column("split_cell").take(place), shares, self.name, subject)

    def _cut(self, spec: ChipSpec, points: pa.Table, subject: str) -> tuple[CutChips, dict[str, Any]]:
        """Return the plan whose chips are split cells, each SIDE pixels wide, of the band of classes; its tables."""
        assert self.query is not None
        token = token_of(points)
        tables = {**self.query.tables, token: points}
        grid = spec.grid if isinstance(spec.grid, CrsGrid) else UTM
        cells = ChipSpec(SIDE, SIDE, grid, spec.cell_km, min_coverage=0.0, at=token)
        coarse = HarmonizeSpec(resolution=spec.cell_km * 1000.0 / SIDE, resampling="overview")
        if self.band is not None:
            coarse = HarmonizeSpec((self.band,)).under(coarse)
        source = chip_sources(CutChips(Harmonize(self.query.plan, coarse), cells), tables).sources[0].plan
        kinds = [source.rules.kind(number).name for number in range(len(source.bands))]
        coded = (
            (CLASS.name, None) if len(kinds) == 1 else (CLASS.name,)
        )  # one band of which nothing is known is it
        bands = [band for band, kind in zip(source.bands, kinds, strict=True) if kind in coded]
        if len(bands) != 1:
            raise PlanError(
                subject, f"bands {', '.join(source.bands)}, of which {len(bands)} hold classes", "one band of classes",
                "Choose it, and say what it is: collection.harmonize(['map'], kinds={'map': 'class'}).",
            )  # fmt: skip
        only = HarmonizeSpec(tuple(bands), kinds=((bands[0], "class"),))
        return CutChips(Harmonize(Harmonize(self.query.plan, coarse), only), cells), tables


def raster_of(stratify: Any, chips: Query) -> ClassRaster | None:
    """Return the raster of classes that ``stratify=`` means; None where it names columns.

    Parameters
    ----------
    stratify
        What the user gave.
    chips
        The plan of chips, whose sources and columns it may name.

    Raises
    ------
    PlanError, SourceError
        When a table is not of cells and classes, or a file cannot be read.
    """
    if isinstance(stratify, pa.Table):
        return _of_counts(stratify)
    if isinstance(stratify, os.PathLike) or (
        isinstance(stratify, str) and stratify.lower().endswith((*_FILES, *_TABLES))
    ):
        url = Place.of(stratify).url
        if url.endswith(_TABLES):
            return _of_counts(pq.read_table(pa.py_buffer(remote.get(url))))
        return _of_file(url)
    if isinstance(stratify, str):
        return _of_source(stratify, chips)
    query = getattr(stratify, "query", None)
    if isinstance(query, Query):
        return ClassRaster("+".join(leaf.name for leaf in leaves(query.plan)), query)
    return None


def _of_file(url: str) -> ClassRaster:
    from rasteret_dask.ingest.filenames import Naming  # as above
    from rasteret_dask.ingest.files import FileScenes, files_to_records
    from rasteret_dask.ingest.stac import LeftOut

    name = url.rpartition("/")[2].rpartition(".")[0]
    scenes = FileScenes(Naming.of(None, "%Y%m%d", None), static=True)
    table = files_to_records([url], scenes, name=name, column_map=None, broken=LeftOut(False))
    token = token_of(table)
    return ClassRaster(name, Query(Source(name, token), {token: table}))


def _of_source(text: str, chips: Query) -> ClassRaster | None:
    """Return the source of a plan that a text names, with a band or without; None where a column is called so."""
    node, steps = steps_of(chips.plan)
    tokens = [node.spec.at, *(step.token for step in steps if isinstance(step, WithTable))]
    columns = {
        name for token in tokens if token is not None for name in as_table(chips.tables[token]).column_names
    }
    if text in columns or text == node.spec.rasterize:
        return None
    name, _, band = text.partition("/")
    child: Node = below_join(node.child)
    while isinstance(child, Map) and isinstance(child.child, Join):
        child = child.child
    if isinstance(child, Join):
        own = dict(zip(child.names, child.children, strict=True)).get(name)
    else:
        own = child if name == "+".join(leaf.name for leaf in leaves(child)) else None
    return None if own is None else ClassRaster(text, Query.together(own, [chips]), band or None)


def _of_counts(table: pa.Table) -> ClassRaster:
    """Check a table of what was counted before."""
    subject, expected = "split(stratify=<a table>)", "column cell, and a column of numbers for each class"
    names = [name for name in table.column_names if name != "cell"]
    if "cell" not in table.column_names or not names:
        raise PlanError(subject, f"columns {', '.join(table.column_names)}", expected)
    cells = table.column("cell").cast(pa.string())
    if cells.null_count or pc.count_distinct(cells).as_py() != len(cells) or not len(cells):
        raise PlanError(
            subject, "no cell, a cell that stands twice, or none in a row", "each split cell once"
        )
    columns = {"cell": cells}
    for name in names:
        column = table.column(name)
        numeric = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        values = column.cast(pa.float64()).to_numpy() if numeric else np.zeros(0)
        if not numeric or not bool(np.all(np.isfinite(values) & (values >= 0))):
            raise PlanError(
                subject, f"column {name!r} with other values", f"{expected}: 0 or more, none missing"
            )
        columns[name] = pa.array(np.rint(values).astype(np.int64))
    note = (table.schema.metadata or {}).get(_NOTE)
    label = "a table" if note is None else note.decode()
    return ClassRaster(label, None, counts=pa.table(columns).replace_schema_metadata({_NOTE: label.encode()}))


def _middles(node: CutChips, chips: Query) -> pa.Table:
    """Return the middle of each split cell that chips of a plan may lie on: ``geometry`` and ``split_cell``."""
    texts: list[str] = []
    lonlat: list[NDArray[np.float64]] = []
    zones = node.spec.grid.zones
    for zone, cells in _cells(node, chips):
        bounds = SplitCells(zones, node.spec.cell_km * 1000.0).lattice.split_bounds(cells)
        lon, lat = transformer(zone, 4326).transform(bounds[:, [0, 2]].mean(1), bounds[:, [1, 3]].mean(1))
        there = zones.codes(lon, lat) != 0
        texts += cell_texts(zones.cell_name(zone), cells[there])
        lonlat.append(np.stack([lon, lat], -1)[there])
    places = np.concatenate([*lonlat, np.zeros((0, 2))])
    return pa.table(
        {"geometry": shapely.to_wkb(shapely.points(places)), "split_cell": pa.array(texts, pa.string())}
    )


def _cells(node: CutChips, chips: Query) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield the split cells (row, col) that chips may lie on, zone by zone."""
    ground, spec = chip_sources(node, chips.tables), node.spec
    if spec.in_cells:
        reference = ground.outlines[ground.reference]
        yield from zone_cells(spec, reference, ground.resolution).items()
        return
    points = None if spec.at is None else as_table(chips.tables[spec.at])
    frame = ground.frame(points)
    cells = SplitCells(spec.grid.zones, spec.cell_km * 1000.0)
    links = cells_under(frame.epsg.astype(np.int64), frame.bounds, cells, "centre", None)
    for zone in np.unique(links.zone).tolist():
        yield zone, np.unique(links.cell[links.zone == zone], axis=0)


def _counts(cells: pa.ChunkedArray, shares: pa.Table, name: str, subject: str) -> pa.Table:
    """Return the points of each class in each cell; of several times of a cell, their mean."""
    texts, cell = np.unique(np.array(cells.to_pylist(), dtype=object).astype(str), return_inverse=True)
    times = np.bincount(cell, minlength=len(texts))
    columns: dict[str, pa.Array] = {"cell": pa.array(texts.tolist(), pa.string())}
    for column in shares.column_names[1:]:
        share = np.bincount(cell, weights=shares.column(column).to_numpy(), minlength=len(texts)) / times
        points = np.rint(share * SIDE * SIDE).astype(np.int64)
        if points.any():
            columns[column] = pa.array(points)
    if len(columns) == 1:
        raise PlanError(
            subject,
            "no valid pixel on the ground of the chips",
            f"a raster of at most {MOST_CLASSES} classes there",
        )
    return pa.table(columns).replace_schema_metadata({_NOTE: name.encode()})
