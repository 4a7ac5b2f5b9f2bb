# SPDX-License-Identifier: Apache-2.0
"""Split cells with the split that each has got, as a table that later deals start from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.planning.plan import ChipSpec

__all__ = ["CELL_SCHEMA", "CellTable", "Dealt", "cell_places", "cell_texts"]

Dealt: TypeAlias = Literal["split", "fold"]
"""What split cells are dealt to."""

CELL_SCHEMA = pa.schema([("cell", pa.string()), ("split", pa.string())])
"""``cell`` is the chip table's: zone, row and column of a split cell, as ``33/-362/27``."""

_NOTE = b"rasteret_dask:split_cells"
"""Key of the schema's metadata: the side of the cells, and their grid."""


def cell_texts(name: str, cells: NDArray[np.int64]) -> list[str]:
    """Return what cells (row, col) of a zone are called, where ``name`` is the zone's."""
    return [f"{name}/{row}/{col}" for row, col in cells.tolist()]


def cell_places(chips: pa.Table) -> NDArray[np.int64] | None:
    """Return row and column of the split cell that each chip was laid out in; None where they lie freely."""
    if chips.column("cell").null_count:
        return None
    cells = chips.column("cell").combine_chunks().dictionary_encode()  # a cell has many chips
    distinct = [[int(n) for n in name.split("/")[1:]] for name in cells.dictionary.to_pylist()]
    return np.asarray(np.array(distinct, dtype=np.int64).reshape(-1, 2)[cells.indices.to_numpy()])


@dataclass(frozen=True, eq=False)
class CellTable:
    """Split cells and their splits."""

    table: pa.Table
    """CELL_SCHEMA, a row a cell, in the order of ``cell``."""
    raster: str = ""
    """Name of the raster whose classes decided the deal, if one did."""
    classes: pa.Table | None = None
    """How much of each class of that raster cells hold: ``cell``, and a column of pixels for each class."""

    @classmethod
    def of(cls, cells: Sequence[str], splits: Sequence[str], spec: ChipSpec) -> CellTable:
        """Put cells of a plan's grid together with their splits."""
        note = json.dumps({"cell_km": spec.cell_km, "grid": str(spec.grid)})
        table = pa.table([pa.array(cells, pa.string()), pa.array(splits, pa.string())], schema=CELL_SCHEMA)
        return cls(table.sort_by("cell").replace_schema_metadata({_NOTE: note.encode()}))

    @classmethod
    def again(cls, table: pa.Table, subject: str = "split(cells=)") -> CellTable:
        """Check a table that a user gives.

        Raises
        ------
        PlanError
            When a column is missing, a cell stands twice with two splits, or a value is null or no cell's name.
        """
        missing = [name for name in CELL_SCHEMA.names if name not in table.column_names]
        if missing:
            raise PlanError(
                subject, f"a table without column {', '.join(missing)}", "columns cell and split",
                "chips.split_cells is such a table.",
            )  # fmt: skip
        note = (table.schema.metadata or {}).get(_NOTE)
        plain = table.select(CELL_SCHEMA.names)
        if any(plain.column(name).null_count for name in CELL_SCHEMA.names):
            raise PlanError(subject, "a row without a cell or a split", "both in each row")
        plain = pa.table({n: plain.column(n).cast(pa.string()) for n in CELL_SCHEMA.names})
        plain = plain.group_by(CELL_SCHEMA.names).aggregate([]).select(CELL_SCHEMA.names).sort_by("cell")
        if pc.count_distinct(plain.column("cell")).as_py() != plain.num_rows:
            counted = pc.value_counts(plain.column("cell")).to_pylist()
            twice = sorted(entry["values"] for entry in counted if entry["counts"] > 1)
            raise PlanError(subject, f"cell {twice[0]!r} in two splits", "one split for each cell")
        result = cls(plain.combine_chunks().replace_schema_metadata(None if note is None else {_NOTE: note}))
        try:
            _ = result._places
        except ValueError as error:
            raise PlanError(
                subject, f"a cell that is none ({error})", "zone/row/col, as '33/-362/27'",
                "chips.split_cells has such names.",
            ) from error  # fmt: skip
        return result

    @classmethod
    def of_folds(cls, table: pa.Table, subject: str = "folds(cells=)") -> CellTable:
        """Check a table of folds that a user gives: columns cell and fold.

        Raises
        ------
        PlanError
            As :meth:`again`.
        """
        if "fold" not in table.column_names or "cell" not in table.column_names:
            raise PlanError(
                subject, f"a table of {', '.join(table.column_names)}", "columns cell and fold",
                "chips.fold_cells is such a table.",
            )  # fmt: skip
        own = pa.table({"cell": table.column("cell"), "split": table.column("fold").cast(pa.string())})
        return cls.again(own.replace_schema_metadata(table.schema.metadata), subject)

    @property
    def folds(self) -> pa.Table:
        """The same as columns cell and fold, a number."""
        fold = self.table.column("split").cast(pa.int64())
        own = pa.table({"cell": self.table.column("cell"), "fold": fold})
        return own.replace_schema_metadata(self.table.schema.metadata)

    def check(self, spec: ChipSpec, names: Sequence[str], subject: str = "split(cells=)") -> None:
        """Compare with the cells and the splits of a plan.

        Raises
        ------
        PlanError
            When cells are of another size or grid, or in a split that the plan does not have.
        """
        note = (self.table.schema.metadata or {}).get(_NOTE)
        if note is not None:
            own = json.loads(note)
            if own["cell_km"] != spec.cell_km or own["grid"] != str(spec.grid):
                raise PlanError(
                    subject, f"cells of {own['cell_km']:g} km on grid {own['grid']}",
                    f"those of this plan: {spec.cell_km:g} km on grid {spec.grid}",
                    f"Cut chips as before: chips(cell_km={own['cell_km']:g}, grid={own['grid']!r}).",
                )  # fmt: skip
        unknown = sorted(set(pc.unique(self.table.column("split")).to_pylist()) - set(names))
        if unknown:
            raise PlanError(
                subject, f"cells in split {', '.join(map(repr, unknown))}", f"one of {', '.join(names)}",
                "Name that split too, with its share or 0.",
            )  # fmt: skip

    @cached_property
    def _places(self) -> dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Zone -> keys of its cells, rising, and the rows where these stand."""
        parts: dict[str, list[tuple[int, int]]] = {}
        for at, text in enumerate(self.table.column("cell").to_pylist()):
            zone, row, col = text.rsplit("/", 2)
            parts.setdefault(zone, []).append((int(row) * 2**32 + int(col), at))
        result = {}
        for zone, pairs in parts.items():
            both = np.array(sorted(pairs), dtype=np.int64)
            result[zone] = (both[:, 0], both[:, 1])
        return result

    def numbers(self, zone: str, cells: NDArray[np.int64], names: Sequence[str]) -> NDArray[np.int64]:
        """Return the number of the split of cells (row, col) of a zone, -1 of those that do not stand here.

        Parameters
        ----------
        zone
            The zone's name.
        cells
            Shape (cell, 2).
        names
            The splits; one that is not among them is -1.
        """
        result = np.full(len(cells), -1, dtype=np.int64)
        if zone not in self._places or not len(cells):
            return result
        keys, rows = self._places[zone]
        wanted = cells[:, 0] * 2**32 + cells[:, 1]
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        hit = keys[place] == wanted
        result[hit] = self._split_numbers(tuple(names))[rows[place[hit]]]
        return result

    def _split_numbers(self, names: tuple[str, ...]) -> NDArray[Any]:
        number = pc.index_in(self.table.column("split"), value_set=pa.array(names, pa.string()))
        return np.asarray(pc.fill_null(number, -1).to_numpy(), dtype=np.int64)
