"""The face: immutable, lazy, named, pickled, and at home among Arrow's tables."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from made_records import collection, ids, record, table

import rasteret_dask as rd

CELLS: dict[str, Any] = {"cell_km": 1.28}
ROWS = [
    record(f"r{i}", west=500_000.0 + 2000 * i, datatake=f"d{i}", label=i, cloud=i * 10.0) for i in range(5)
]


def own(name: str = "s2") -> rd.Collection:
    return collection(name, *ROWS)


def test_verbs_return_new_collections_and_read_nothing() -> None:
    base = own()
    before = base.plan
    steps: list[Any] = [
        base.subset(cloud_cover_lt=5), base.where(label=1), base.sample(2), base.harmonize(["red"]), base | own("b"),
        base & own("b"), base.map(abs, version="1"), base.chips(32), base.select_split("train"),
        base.where(("no such column", "==", 1)), base.harmonize(["no such band"]), base.chips(10**6),
    ]  # fmt: skip
    assert base.plan is before
    assert all(s.plan != before for s in steps)
    assert all(s is not base for s in steps)
    assert len(base) == 5


def test_repr_is_a_report() -> None:
    text = repr(own().subset(cloud_cover_lt=30).harmonize(["red"], resolution=20))
    assert text.startswith("<Collection s2: 3 records\n dates:")
    assert 's2 > subset(cloud_cover_lt=30) > harmonize(["red"], resolution=20)>' in text
    assert repr(own().chips(32).split()).startswith("<Chips of 32 px\n chips: not planned yet")


def test_tables_of_a_collection() -> None:
    base = own()
    whole = base.to_table()
    assert len(base) == whole.num_rows == 5
    assert whole.schema.names == [*rd.RECORD_SCHEMA.names, "label"]
    assert base.to_table(["id", "label"]).to_pylist() == [{"id": f"r{i}", "label": i} for i in range(5)]
    part = base.subset(cloud_cover_lt=15)
    assert pa.table(part).equals(part.to_table())
    assert isinstance(part.dataset, pads.Dataset)
    assert part.dataset.to_table().equals(part.to_table())
    assert base.bands == ("B04", "B08", "SCL")
    with pytest.raises(rd.SchemaError, match="nothing"):
        base.to_table(["nothing"])


def test_a_merge_keeps_the_columns_of_both() -> None:
    both = rd.merge(own(), collection("b", record("x", other="y")))
    whole = both.to_table()
    assert whole.column("label").to_pylist() == [0, 1, 2, 3, 4, None]
    assert whole.column("other").to_pylist() == [None] * 5 + ["y"]
    assert both.name == "s2+b"


def test_tables_of_two_sensors_concatenate() -> None:
    s2, l8 = table(record("a")), table(record("b", pixel=30.0, bands=("B4", "B5", "qa_pixel")))
    assert pa.concat_tables([s2, l8]).schema == rd.RECORD_SCHEMA


def test_collections_and_chips_pickle() -> None:
    base = own().subset(cloud_cover_lt=35).harmonize(["red"], time="1MS")
    again = pickle.loads(pickle.dumps(base))
    assert again.plan == base.plan
    assert again.to_table().equals(base.to_table())
    chips = base.chips(32, **CELLS).split(seed=1)
    for done in (False, True):  # planned or not
        if done:
            assert len(chips)
        assert pickle.loads(pickle.dumps(chips)).table.equals(chips.table)


def by_id(c: rd.Collection) -> pa.Table:
    return c.to_table().sort_by("id")


def test_what_is_exported_is_loaded(tmp_path: Path) -> None:
    part = own().subset(cloud_cover_lt=35)
    part.export(tmp_path / "part.parquet")
    again = rd.load(tmp_path / "part.parquet")
    assert again.name == "part"
    assert by_id(again).equals(part.to_table())
    assert isinstance(again.query.tables[next(iter(again.query.tables))], pads.Dataset)
    steps: list[Callable[[rd.Collection], rd.Collection]] = [
        lambda c: c.subset(cloud_cover_lt=25),
        lambda c: c.where(label=[0, 2]),
        lambda c: c.sample(2),
    ]
    for step in steps:
        assert by_id(step(again)).equals(step(part).to_table())
    assert again.dataset.to_table().sort_by("id").equals(part.to_table())
    eager = part.harmonize(["nir"]).chips(32, **CELLS).table
    lazy = rd.load(tmp_path / "part.parquet", name="s2").harmonize(["nir"]).chips(32, **CELLS).table
    assert lazy.drop_columns(["feeds"]).equals(eager.drop_columns(["feeds"]))
    fed = [
        [[{k: v for k, v in f.items() if k != "row"} for f in own] for own in t.column("feeds").to_pylist()]
        for t in (lazy, eager)
    ]
    assert fed[0] == fed[1]  # but for where in its table a record stands
    assert pickle.loads(pickle.dumps(again)).to_table().equals(again.to_table())


def test_a_loaded_table_needs_its_columns(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ["a"], "datetime": [None]}), tmp_path / "t.parquet")
    with pytest.raises(rd.SchemaError, match="geometry, assets"):
        rd.load(tmp_path / "t.parquet")
    (tmp_path / "no.parquet").write_bytes(b"no Parquet at all")
    with pytest.raises(rd.SourceError, match="Parquet"):
        rd.load(tmp_path / "no.parquet")


def test_slices_of_a_table_are_collections_of_their_own() -> None:
    whole = table(*ROWS)
    part = rd.as_collection(whole.slice(2, 2), name="part").harmonize(["nir"])
    chips = part.chips(32, **CELLS)
    assets = {
        a.href
        for records in (chips.planned.sources[0].records,)
        for a in (records.asset(r, "B08") for r in range(2))
    }
    assert assets == {"s3://bucket/r2/B08.tif", "s3://bucket/r3/B08.tif"}
    other = rd.as_collection(table(ROWS[0], record("l", bands=("B4",))).slice(1), name="l")
    assert other.bands == ("B4",)


def test_operators_are_merge_and_join() -> None:
    a, b, c = own("a"), own("b"), own("c")
    assert (a | b | c).chips(32).plan == rd.merge(rd.merge(a, b), c).chips(32).plan
    assert (a & b).plan == rd.join(a=a, b=b).plan
    assert (a & b & c).plan == rd.join(a=a, b=b, c=c).plan
    assert a.merge(b, c).plan == rd.merge(a, b, c).plan
    assert a.join(x=b).plan == rd.join(a=a, x=b).plan
    assert rd.merge(a).plan == a.plan
    three = [ids(m.chips(32, **CELLS)) for m in (a | b | c, rd.merge(a, b, c))]
    assert three[0] == three[1]


def test_names_that_clash_are_refused() -> None:
    with pytest.raises(rd.PlanError, match=r"'s2'"):
        _ = own() & own()
    with pytest.raises(rd.PlanError, match=r"'s2'"):
        own().join(s2=own("b"))
    with pytest.raises(rd.PlanError, match="a name of its own for each member"):
        _ = len(own() | own())
    with pytest.raises(rd.PlanError, match="join"):
        rd.merge(own("a") & own("b"), own("c"))
    for empty in (rd.merge, rd.join):
        with pytest.raises(rd.PlanError, match="at least one"):
            empty()


def test_chips_of_steps_are_planned_once() -> None:
    chips = own().chips(32, **CELLS)
    parts = [chips.split(seed=s).select("train") for s in (1, 2)]
    assert all(len(part) < len(chips) for part in parts)
    assert all(part.planned.sources is chips.planned.sources for part in parts)


def test_select_split_reads_a_column_of_the_records() -> None:
    rows = [{**r, "split": "train" if i % 2 else "val"} for i, r in enumerate(ROWS)]
    chosen = collection("s2", *rows).select_split("train")
    assert chosen.to_table(["id"]).to_pylist() == [{"id": "r1"}, {"id": "r3"}]
