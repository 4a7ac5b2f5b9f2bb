"""Columns of a record table, against the same table as plain Python."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import record, table

from rasteret_dask.table.records import ASSET_TYPE, LEVEL_TYPE, Records
from rasteret_dask.tasks import keptbytes

BANDS = ("B02", "B04", "B08", "SCL")


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    """Draw records that have some bands each, some without headers, and some rows of them."""
    some = st.lists(st.sampled_from(BANDS), unique=True)
    rows = draw(st.lists(st.tuples(some, some), min_size=1, max_size=4))
    made = table(
        *(
            record(f"r{n}", bands=tuple(bands), unreadable=tuple(set(bands) & set(lost)))
            for n, (bands, lost) in enumerate(rows)
        )
    )
    start = draw(st.integers(0, len(rows)))
    return made.slice(start, draw(st.integers(0, len(rows))))


@settings(max_examples=25)
@given(tables(), st.lists(st.sampled_from([*BANDS, "none"]), min_size=1, unique=True))
def test_fields_of_bands_are_those_of_their_rows(made: pa.Table, bands: list[str]) -> None:
    records, rows = Records(made), made.to_pylist()
    assets = [dict(row["assets"]).get(band) for band in bands for row in rows]
    levels = [(dict(row["headers_metadata"] or ()).get(band) or [None])[0] for band in bands for row in rows]
    for kind, got, expected in (
        (ASSET_TYPE, records.asset_fields, assets),
        (LEVEL_TYPE, records.level_fields, levels),
    ):
        for field in kind:
            column = got(bands, field.name)
            assert column.type == field.type
            wanted = [None if one is None else one[field.name] for one in expected]
            assert column.to_pylist() == wanted
            one_by_one = records.asset_field if kind is ASSET_TYPE else records.level_field
            assert [v for band in bands for v in one_by_one(band, field.name).to_pylist()] == wanted
    for kept in (records, larger := Records(made)):
        larger._is_small = False
        for field in ASSET_TYPE:
            for band in bands:
                values = records.asset_field(band, field.name).to_pylist()
                assert kept.asset_values(band, field.name) == values
                if not pa.types.is_nested(field.type):
                    assert kept.distinct(band, field.name) == list(dict.fromkeys(values))


def test_assets_that_are_at_hand_are_not_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard asks for the assets of its records, and most of a job's shards share records."""
    records = Records(table(record("r", bands=BANDS)))
    records.look_up([0], BANDS)
    first = records.asset(0, BANDS[0])
    monkeypatch.setattr(records, "table", None)
    records.look_up([0, 0], BANDS[:2])
    assert records.asset(0, BANDS[0]) is first


def test_kept_bytes_ask_for_a_field_once_whatever_the_number_of_bands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """64 bands of embeddings: asking for each band alone was a tenth of a job's time in Python."""
    calls: list[str] = []
    take = pc.index_in

    def counted(*arguments: Any) -> Any:
        calls.append("")
        return take(*arguments)

    monkeypatch.setattr(pc, "index_in", counted)
    counts = []
    for bands in (BANDS[:1], BANDS):
        calls.clear()
        ((level, nbytes),) = keptbytes._levels(Records(table(record("r", bands=BANDS))), dict.fromkeys(bands))
        assert level.shape == (1, 8)
        assert nbytes.tolist() == [3 * len(bands)]  # uint16, and a mask
        counts.append(len(calls))
    assert counts[0] == counts[1] < 12
