# SPDX-License-Identifier: Apache-2.0
"""Labels and splits that come after the pixels: columns are written beside a finished store, a version at a time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from rasteret_dask.chipping.chips import PlannedChips
from rasteret_dask.chipping.chiptable import CHIP_SCHEMA, label_fields, with_columns
from rasteret_dask.chipping.steps import carried_out
from rasteret_dask.errors import PlanError, SchemaError, StoreError
from rasteret_dask.lists import first_of
from rasteret_dask.net import remote
from rasteret_dask.planning.plan import Source, Split, SplitSpec, from_json, to_json
from rasteret_dask.store.addedtables import AddedColumns, put_columns
from rasteret_dask.store.law import read_law
from rasteret_dask.store.stored import Stored
from rasteret_dask.store.union import grown_store, open_parts

__all__ = ["as_planned", "deal", "put_labels"]

TRIES = 20
"""How often somebody else may write a version first."""

_GROUND = ["chip_id", "cell", "epsg", "xmin", "ymin", "xmax", "ymax", "geometry", "split"]


def put_labels(chips: Stored, table: pa.Table, on: str) -> Stored:
    """Write columns of all chips of a store beside it; return the chips that have them.

    Parameters
    ----------
    chips
        All chips of one store.
    table
        A row for each of them: its id, and the columns.
    on
        The column with the ids.

    Raises
    ------
    SchemaError
        When ids are unknown, missing, twice or no text, or a column is no label.
    PlanError
        When these are not all chips of one store.
    """
    _check_all(chips, "with_table")
    if on not in table.column_names:
        raise SchemaError(
            f"with_table(on={on!r})", f"columns {', '.join(table.column_names)}", "a column of chip ids",
            "Say which column has them: with_table(table, on='id').",
        )  # fmt: skip
    ids = table.column(on).combine_chunks()
    if not (pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)) or ids.null_count:
        kind = f"{ids.null_count} nulls" if ids.null_count else str(ids.type)
        raise SchemaError(f"with_table, column {on!r}", kind, "the ids of chips, as text")
    ids = ids.cast(pa.string())
    _check_ids(chips, ids)
    names = [name for name in table.column_names if name != on]
    taken = [name for name in names if name in CHIP_SCHEMA.names]
    if taken or not names:
        raise SchemaError(
            "with_table", f"column {taken[0]!r}, which the plan decides" if taken else "no column but the ids",
            "columns of other names",
            "Rename it; a column that says the split is taken by split(by='column').",
        )  # fmt: skip
    kinds = [table.schema.field(name).type for name in names]
    plain_kinds = [kind.value_type if pa.types.is_dictionary(kind) else kind for kind in kinds]
    fit = {one.name for one in label_fields(pa.schema(list(zip(names, plain_kinds, strict=True))))}
    fit -= {name for group in chips.map.first for name in group.meta}
    unfit = [name for name in names if name not in fit]
    if unfit:
        raise SchemaError(
            f"with_table, column {unfit[0]!r}", f"type {table.schema.field(unfit[0]).type}, or a name that is taken",
            "text, numbers, booleans, dates or times", "Convert it, or leave it out.",
        )  # fmt: skip
    return _put(chips, with_columns(pa.table({"chip_id": ids}), table.select(names)), {})


def deal(chips: Stored, spec: SplitSpec) -> Stored:
    """Give all chips of a store other splits, by a rule of ``split``; write them beside it.

    Raises
    ------
    PlanError
        When the rule needs the records, or a column that is not there, or these are not all chips of one store.
    """
    _check_all(chips, "split")
    if spec.by == "geometry":
        raise PlanError(
            "split(by='geometry') of a store", "footprints of records, which a store does not keep",
            "'ground' or a column of the chip table",
        )  # fmt: skip
    planned = as_planned(chips, [] if spec.column is None else [spec.column])
    dealt = carried_out(planned, Split(chips.plan, spec), {}, whole=True).table.select(["chip_id", "split"])
    return _put(chips, dealt, {"split": to_json(spec)})


def as_planned(chips: Stored, more: list[str] | None = None) -> PlannedChips:
    """Return stored chips as far as they are ground and splits: what deals and audits these.

    Raises
    ------
    StoreError
        When an earlier version wrote the store, which does not say how its ground was cut.
    """
    law = read_law(chips.url)
    if law is None or law.spec is None or law.resolution is None:
        raise StoreError(
            f"store {remote.redact(chips.url)}", "no law.json, which says how its ground was cut",
            "a store that this version wrote", "Deal and audit splits of its plan: chips.split(...).audit().",
        )  # fmt: skip
    names = list(dict.fromkeys([*_GROUND, *(more or ())]))
    unknown = [name for name in names if name not in chips.map.chips.names]
    if unknown:
        raise PlanError(
            "split(by=)", repr(unknown[0]), f"'ground' or one of {', '.join(chips.map.chips.names)}"
        )
    table = chips.map.chips.columns(names).take(pa.array(chips.rows)).combine_chunks()
    return PlannedChips(table, (), 0, law.spec, _rule_of(chips, law.split), law.resolution)


def _rule_of(chips: Stored, split: SplitSpec | None) -> SplitSpec | None:
    """Return the rule that the chips' splits were dealt by, the last time."""
    mark = None if chips.parts is None else chips.parts.columns[0]
    if mark is None:
        return split
    note = AddedColumns.at(mark).note.get("split")
    return split if note is None else from_json(note)


def _check_all(chips: Stored, step: str) -> None:
    if not isinstance(chips.plan, Source):
        raise PlanError(
            f"{step} of stored chips", f"{len(chips.rows):,} chosen ones", "all chips of the store",
            f"Call open_chips(store).{step}(...) first, then select, filter or sample.",
        )  # fmt: skip
    if chips.parts is not None and len(set(chips.parts.origin)) > 1:
        raise PlanError(
            f"{step} of stored chips", "several stores", "one store, beside which the columns are written",
            "Open each by itself, and add the columns to it.",
        )  # fmt: skip


def _check_ids(chips: Stored, ids: pa.Array) -> None:
    """Raise SchemaError unless ids are those of the chips, each once."""
    there = chips.table.column("chip_id").combine_chunks()
    unknown = ids.filter(pc.invert(pc.is_in(ids, value_set=there)))
    missing = there.filter(pc.invert(pc.is_in(there, value_set=ids)))
    for some, what in (
        (unknown, "ids of no chip of the store"),
        (missing, "chips of the store that are missing"),
    ):
        if len(some):
            raise SchemaError(
                "with_table", f"{len(some):,} {what} ({first_of(some.to_pylist(), 3)})",
                f"a row for each of its {len(there):,} chips",
                "They stand in open_chips(store).table; give chips without a label null.",
            )  # fmt: skip
    if len(ids) > len(there):
        twice = next(one["values"].as_py() for one in pc.value_counts(ids) if one["counts"].as_py() > 1)
        raise SchemaError("with_table", f"{twice!r} twice", "each chip once")


def _put(chips: Stored, table: pa.Table, note: Mapping[str, Any]) -> Stored:
    """Write a version that has the columns of the latest one, with these put over them."""
    for _ in range(TRIES):
        store = grown_store(chips.url)
        (latest,) = open_parts([store]).columns
        columns, notes = table, dict(note)
        if latest is not None:
            before = AddedColumns.at(latest)
            notes = {key: before.note[key] for key in ("split",) if key in before.note} | notes
            columns = _over(before, table)
        first = store.parts[0]
        if put_columns(first.url, first.digest, columns, store.version + 1, notes) is not None:
            return Stored.over(open_parts([grown_store(chips.url)], version=store.version + 1))
    raise StoreError(
        f"store {remote.redact(chips.url)}", f"{TRIES} versions of columns that others wrote meanwhile",
        "a moment without", "Call it again.",
    )  # fmt: skip


def _over(before: AddedColumns, table: pa.Table) -> pa.Table:
    """Return columns with those of an earlier version that they do not replace; of chips of either."""
    kept = [name for name in before.names if name not in table.column_names]
    older = before.table.select(["chip_id", *kept])
    ids = pa.concat_arrays([table["chip_id"].combine_chunks(), older["chip_id"].combine_chunks()]).unique()
    result = pa.table({"chip_id": ids})
    for one in (older, table):
        at = pc.index_in(ids, value_set=one["chip_id"].combine_chunks())
        for name in one.column_names[1:]:
            column = one.column(name).take(at)
            result = result.append_column(pa.field(name, column.type, bool(column.null_count)), column)
    return result
