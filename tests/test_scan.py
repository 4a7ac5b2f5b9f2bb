"""Predicates on a table, a dataset and JSON properties say the same; hashes and samples are stable."""

from __future__ import annotations

import datetime as dt
import hashlib
import operator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import record, table

import rasteret_dask as rd
from rasteret_dask.planning.plan import Predicate, Source
from rasteret_dask.planning.sampling import hash_unit, sample_rows, sample_unit, text_hash
from rasteret_dask.planning.scan import filter_table, keep_whole, scan, token_of
from rasteret_dask.table.records import Records

OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
ROWS = [
    record(
        f"r{i}",
        when=f"2024-04-{1 + i:02d}T10:00:00",
        until=f"2024-05-{1 + i:02d}T00:00:00" if i % 3 == 0 else None,
        platform=("a", "b", None)[i % 3],
        properties={"view": float(i % 4), "name": "ab"[i % 2]} if i != 5 else None,
        view=None if i == 5 else float(i % 4),
        unreadable=("B08",) if i == 2 else (),
        cloud=None if i == 4 else i * 10.0,
    )
    for i in range(9)
]
TABLE = table(*ROWS)


def kept(where: tuple[Predicate, ...], data: Any = TABLE) -> list[str]:
    return list(filter_table(data, where, "t").column("id").to_pylist())


def dull(found: Any, op: str, value: Any) -> bool:
    """SQL's rule, but for null in a list: null is neither equal nor unequal to anything."""
    if op in ("in", "not in"):
        return (found in value) == (op == "in")
    return found is not None and bool(OPERATORS[op](found, value))


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["eo:cloud_cover", "platform", "view"]),
    st.sampled_from([*OPERATORS, "in", "not in"]),
    st.integers(0, 80),
    st.booleans(),
)
def test_predicates_are_those_of_python(column: str, op: str, number: int, lazy: bool) -> None:
    one: Any = "abc"[number % 3] if column == "platform" else number / (20 if column == "view" else 1) // 1
    value = (one,) if "in" in op else one
    data = pads.dataset(TABLE) if lazy else TABLE
    expected = [r["id"] for r in ROWS if dull(r[column], op, value)]
    assert kept(((column, op, value),), data) == expected
    if column == "view":  # the same figures as a property
        own = TABLE.drop_columns(["view"])
        said = kept(((column, op, value),), own)
        assert said == [r for r in expected if r != "r5"]  # it has no such property


def test_none_means_unknown() -> None:
    assert kept((("eo:cloud_cover", "==", None),)) == ["r4"]
    assert kept((("eo:cloud_cover", "!=", None),)) == [r["id"] for r in ROWS if r["id"] != "r4"]


def test_times_are_compared_in_utc() -> None:
    assert kept((("datetime", "<", "2024-04-02T12:00:00+02:00"),)) == ["r0"]
    assert kept((("datetime", "<=", "2024-04-02T12:00:00+02:00"),)) == ["r0", "r1"]
    assert kept((("datetime", "in", ("2024-04-03T10:00:00Z", "2024-04-05T10:00:00")),)) == ["r2", "r4"]
    dated = TABLE.append_column("day", pa.array([r["datetime"].date() for r in ROWS]))
    assert kept((("day", ">", "2024-04-07"),), dated) == ["r7", "r8"]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40))
def test_ranges_are_half_open_for_instants_and_intervals(a: int, b: int) -> None:
    day = dt.datetime(2024, 4, 1, tzinfo=dt.UTC)
    start, end = day + dt.timedelta(days=min(a, b)), day + dt.timedelta(days=max(a, b))
    expected = []
    for r in ROWS:
        begin, until = r["start_datetime"] or r["datetime"], r["end_datetime"] or r["datetime"]
        inside = start <= begin < end if begin == until else begin < end and until > start
        expected += [r["id"]] * inside
    assert kept((("datetime", "overlaps", (start.isoformat(), end.isoformat())),)) == expected


def test_a_table_and_a_file_give_the_same(tmp_path: Any) -> None:
    pq.write_table(TABLE, tmp_path / "t.parquet", row_group_size=2)
    data = pads.dataset(tmp_path / "t.parquet")
    for where in (
        (("eo:cloud_cover", "<", 40.0), ("name", "==", "a")),
        (("bbox", "intersects", (14.9, 48.0, 15.01, 49.0)),),
        (),
    ):
        assert filter_table(data, where, "t").equals(filter_table(TABLE, where, "t"))


def test_a_bbox_touches_or_does_not() -> None:
    corners = shapely.get_coordinates(shapely.from_wkb(ROWS[0]["geometry"]))
    east, north = corners[np.argmax(corners.sum(1))]
    corner = (east, north, east + 1, north + 1)
    beyond = (east + 1e-6, north + 1e-6, *corner[2:])
    unknown = table(ROWS[0], {**ROWS[1], "bbox": None})
    assert kept((("bbox", "intersects", corner),), unknown) == ["r0"]
    assert kept((("bbox", "intersects", beyond),), unknown) == []
    bare = table({**ROWS[0], "geometry": None}, ROWS[1])
    for reach in (0, -1e-6):  # the box decides where there is no outline
        box = ROWS[0]["bbox"]
        beside = (box["xmax"] + reach, box["ymax"] + reach, box["xmax"] + 1, box["ymax"] + 1)
        assert kept((("bbox", "intersects", beside),), bare) == ["r0"]
    assert kept((("bbox", "near", beyond),), unknown) == ["r1"]


@pytest.mark.parametrize(
    "predicate",
    [
        ("nothing", "==", 1),
        ("eo:cloud_cover", "<", "much"),
        ("eo:cloud_cover", "in", ("much",)),
        ("datetime", "<", "soon"),
        ("datetime", "in", ("soon",)),
        ("name", "<", 3),
        ("datetime", "overlaps", ("soon", None)),
        ("geometry", "intersects", "no hex"),
    ],
)
def test_what_cannot_be_compared_is_told(predicate: Predicate) -> None:
    with pytest.raises(rd.PlanError):
        kept((predicate,))


def test_bands_are_kept_by_any_of_their_names() -> None:
    for wanted, expected in (
        (("red",), ("B04",)), (("B08", "red"), ("B04", "B08")), (("scl",), ("SCL",)),
        (("b04", "@quality"), ("B04", "SCL")), (("red", "unheard"), ("B04", "B08", "SCL")),
    ):  # fmt: skip
        found = scan(Source("t", "k", (), wanted), {"k": TABLE})
        assert Records(found).bands == expected
        assert found.drop_columns(["assets", "headers_metadata"]).equals(
            TABLE.drop_columns(["assets", "headers_metadata"])
        )
        for row, own in zip(found.to_pylist(), TABLE.to_pylist(), strict=True):
            for column in ("assets", "headers_metadata"):
                assert row[column] == [(k, v) for k, v in own[column] if k in expected]


def test_bands_of_a_slice_are_its_own() -> None:
    part = TABLE.slice(3, 4)
    found = scan(Source("t", "k", (), ("nir",)), {"k": part})
    assert [
        h["href"] for h in Records(found).asset_field("B08", "href").to_pandas().map(lambda h: {"href": h})
    ] == [f"s3://bucket/r{i}/B08.tif" for i in range(3, 7)]


def test_readable_looks_at_the_bands_that_are_left() -> None:
    where = (("readable", "==", True),)
    assert len(keep_whole(TABLE, where)) == 8
    assert len(keep_whole(scan(Source("t", "k", (), ("red",)), {"k": TABLE}), where)) == 9
    assert len(keep_whole(TABLE, (("readable", "==", False),))) == 1


def test_hashes_are_what_the_documentation_says() -> None:
    digest = hashlib.sha256(b"ground|7|33|1|2").digest()
    assert hash_unit(["33|1|2"], "ground", 7)[0] == int.from_bytes(digest[:8], "big") / 2.0**64
    units = hash_unit(range(4000), "x")
    assert 0 <= units.min() < units.max() < 1
    assert abs(units.mean() - 0.5) < 0.02
    assert len(np.unique(units)) == 4000


def drawn_by(name: str, seed: int) -> float:
    """An independent reader: FNV-1a and the last step of MurmurHash3, in whole numbers of any size."""
    number = 0xCBF29CE484222325
    for byte in f"sample|{seed}|{name}".encode():
        number = ((number ^ byte) * 0x100000001B3) % 2**64
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        number = ((number ^ (number >> 33)) * factor) % 2**64
    return float(((number ^ (number >> 33)) >> 11) / 2**53)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(max_size=12), max_size=9), st.integers(-3, 2**40), st.integers(0, 3))
def test_a_sample_is_drawn_by_the_bytes_of_ids(names: list[str], seed: int, before: int) -> None:
    whole = pa.array(["x", "yy", "zzz", *names])
    ids = whole.slice(before)
    expected = [drawn_by(name, seed) for name in ids.to_pylist()]
    assert sample_unit(ids, seed).tolist() == expected
    assert sample_unit(pa.chunked_array([ids[:1], ids[1:]]), seed).tolist() == expected
    assert sample_unit(ids.cast(pa.large_string()), seed).tolist() == expected
    ends = pa.array([name[1:] for name in ids.to_pylist()])
    heads = text_hash(pa.array([name[:1] for name in ids.to_pylist()], pa.string()))
    assert text_hash(ends.cast(pa.string()), heads).tolist() == text_hash(ids).tolist()


def test_seeds_draw_independently_of_each_other_and_evenly() -> None:
    ids = pa.array(
        [f"33_10.24km_256px_10m_{row}_{col}" for row in range(-1200, -1000) for col in range(100, 200)]
    )
    units = np.stack([sample_unit(ids, seed) for seed in (0, 1, 2, 256, 10**9)])
    assert len(np.unique(units)) == units.size
    counts = np.apply_along_axis(lambda u: np.histogram(u, 100, (0, 1))[0], 1, units)
    assert (
        ((counts - 200.0) ** 2 / 200.0).sum(axis=1) < 170.0
    ).all()  # chi-square of 99 degrees: 1 in 10,000
    assert np.abs(np.corrcoef(units) - np.eye(len(units))).max() < 0.03
    neighbours = units.reshape(len(units), 200, 100)
    for one, other in ((neighbours[..., 1:], neighbours[..., :-1]), (neighbours[:, 1:], neighbours[:, :-1])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 5), st.randoms(), st.booleans())
def test_a_larger_sample_contains_the_smaller(a: int, b: int, seed: int, random: Any, strata: bool) -> None:
    rows = [{"id": f"r{i}", "kind": "abc"[i % 3] if i % 7 else None} for i in range(25)]
    random.shuffle(rows)
    data = pa.Table.from_pylist(rows)
    by = "kind" if strata else None

    def chosen(n: int) -> list[str]:
        found = [rows[i]["id"] for i in sample_rows(data, "id", n, seed, by)]
        assert found == [r["id"] for r in rows if r["id"] in found]  # in row order
        return [str(i) for i in found]

    small, large = chosen(min(a, b)), chosen(max(a, b))
    assert set(small) <= set(large)
    # A dull oracle: sort each stratum by hash.
    expected: set[str] = set()
    for kind in {r["kind"] for r in rows} if strata else {0}:
        own = [str(r["id"]) for r in rows if not strata or r["kind"] == kind]
        expected |= set(sorted(own, key=lambda i: drawn_by(i, seed))[: min(a, b)])
    assert set(small) == expected


def test_tokens_tell_tables_apart() -> None:
    assert token_of(TABLE) == token_of(pa.Table.from_batches(TABLE.to_batches()))
    assert token_of(TABLE) != token_of(TABLE.slice(1))
    assert token_of(TABLE) != token_of(TABLE.rename_columns([*TABLE.column_names[:-1], "other"]))
