# SPDX-License-Identifier: Apache-2.0
"""Which chip each record is a file of, and which slot of it: told by columns of the records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rasteret_dask.errors import PlanError
from rasteret_dask.planning.plan import FILES, HarmonizeSpec
from rasteret_dask.table.anytable import as_arrow
from rasteret_dask.table.records import NS_RANGE
from rasteret_dask.table.timing import TimeAxis

__all__ = ["CHIP", "PRESENT", "SLOT", "SLOT_START", "FileChips", "facts_of_chips"]

CHIP = "chip"
"""The column of records that names the chip which a record is a file of."""

SLOT = "slot"
"""The column that says which slot of its chip a record fills, from 0."""

SLOT_START = "slot_start"
"""The column that says when that slot begins, where all chips share a time axis; null elsewhere."""

PRESENT = "present"
"""The column that is False of records which stand for an empty slot."""


@dataclass(frozen=True)
class FileChips:
    """The chips of a source's records; all arrays have one entry per record."""

    chip: pa.Array
    """Names; null where a record is of no chip."""
    slot: NDArray[np.int64] | None = None
    """Slots, -1 for records that stand for an empty one; None: each chip is one acquisition."""
    times: int = 0
    """How many slots there are."""
    axis: TimeAxis | None = None
    """The slots, where all chips share them."""

    @classmethod
    def of(cls, name: str, spec: HarmonizeSpec, members: Sequence[pa.Table]) -> FileChips | None:
        """Return what columns of the records say; None where they name no chips.

        Parameters
        ----------
        name, spec
            The source, and what its harmonize steps ask for.
        members
            The records of each member, with all of their columns.

        Raises
        ------
        PlanError
            When ``time="files"`` is asked for, and no column says which slots there are.
        """
        wanted = (CHIP, SLOT) if spec.time == FILES else (CHIP,)
        missing = [column for column in wanted if not all(column in table.column_names for table in members)]
        if missing and spec.time == FILES:
            raise PlanError(
                f"harmonize(time={FILES!r}) of source {name!r}", f"records without a column {missing[0]!r}",
                "records of files of chips, as rd.read_chips makes them", "Say time='1MS', or leave time out.",
            )  # fmt: skip
        if missing or not all(pa.types.is_string(table.schema.field(CHIP).type) for table in members):
            return None
        chip = _joined(members, CHIP, pa.string())
        if spec.time != FILES:
            return cls(chip)
        slot = np.asarray(_joined(members, SLOT, pa.int64()).to_numpy(), dtype=np.int64)
        times = int(slot.max(initial=0)) + 1
        axis = None
        if all(SLOT_START in table.column_names for table in members):
            axis = _axis(slot, times, _joined(members, SLOT_START, pa.timestamp("us", "UTC")))
        if all(PRESENT in table.column_names for table in members):
            there = pc.fill_null(_joined(members, PRESENT, pa.bool_()), True)
            slot = np.where(there.to_numpy(zero_copy_only=False), slot, -1)
        return cls(chip, slot, times, axis)


def facts_of_chips(at: Any) -> pa.Table:
    """Return what ``chips(grid="files", at=)`` was given: a table with a column that names chips.

    Raises
    ------
    PlanError
        When it has no such column.
    """
    found = as_arrow(at, "chips(at=)")
    table = found if isinstance(found, pa.Table) else found.to_table()
    if CHIP not in table.column_names:
        raise PlanError(
            "chips(grid='files', at=)", f"columns {', '.join(table.column_names)}", f"a column {CHIP!r}",
            "Rename the column that names the chips; split= and label columns stand beside it.",
        )  # fmt: skip
    return table.combine_chunks()


def _joined(members: Sequence[pa.Table], column: str, kind: pa.DataType) -> pa.Array:
    chunks = [chunk.cast(kind) for table in members for chunk in table.column(column).chunks]
    return pa.concat_arrays([pa.array([], kind), *chunks])


def _axis(slot: NDArray[np.int64], times: int, begin: pa.Array) -> TimeAxis | None:
    """Return the slots that all chips share; None where nobody knows when they are."""
    moments = np.asarray(begin.to_numpy(zero_copy_only=False), dtype="datetime64[us]")
    start = np.full(times, np.datetime64("NaT", "us"))
    start[slot] = moments
    if np.isnat(start).any():
        return None
    start = np.clip(start, *NS_RANGE).astype("datetime64[ns]")
    length = start[-1] - start[-2] if times > 1 else np.timedelta64(1, "D").astype("timedelta64[ns]")
    end = np.append(start[1:], start[-1] + length)
    return TimeAxis(start, end, (start[0], end[-1]))
