"""What prompts and notebooks show: short, whole, cheap, and of objects in any state."""

from __future__ import annotations

import pickle
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely
from html_tags import checked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_records import collection, record, table
from servers import RangeServer

import rasteret_dask as rd
from rasteret_dask.chipping import drawing
from rasteret_dask.chipping.chips import chip_sources
from rasteret_dask.demo.world import World
from rasteret_dask.display.card import Card, Fact
from rasteret_dask.lists import listed
from rasteret_dask.planning import recordtable
from rasteret_dask.show import cards
from rasteret_dask.statistics.sketch import measured
from rasteret_dask.statistics.stats import Stats

HEX = re.compile(r"[0-9A-Fa-f]{40}")
AWKWARD = "<script>alert('\"&')</script>"


def shown(thing: Any) -> tuple[str, str]:
    """Return an object's text and page, once they keep the rules of all of them."""
    text, page = repr(thing), thing._repr_html_()
    assert len(text.splitlines()) <= 12, text
    assert not HEX.search(text), text
    assert not HEX.search(re.sub(r"<path d='[^']*'", "", page))
    checked(page)
    assert page.count("<style>") == 1
    assert len(page) < 200_000
    return text, page


# --- any card -------------------------------------------------------------------------------------------------------

TEXTS = st.text(max_size=30) | st.sampled_from(
    [AWKWARD, " > ".join(["step(1, [2, 3])"] * 40), "a; " * 90, "\ud800"]
)


@settings(max_examples=200, deadline=None)
@given(TEXTS, st.lists(st.builds(Fact, TEXTS, TEXTS), max_size=30))
def test_a_card_is_twelve_lines_at_most_and_loses_no_value(title: str, rows: list[Fact]) -> None:
    card = Card(title, rows)
    text = card.text
    assert len(text.split("\n")) <= 12
    assert all(line.isprintable() for line in text.split("\n"))
    text.encode()
    checked(card.html)
    named = [row for row in rows if row.name]
    if len(rows) <= 11:
        plain = "".join("".join(text.split()).split())
        for row in rows:
            shown_value = "".join(one if one.isprintable() else repr(one)[1:-1] for one in row.text)
            assert "".join(shown_value.split()) in plain
    elif len(named) > 11:
        assert f"{len(named) - 10} more" in text


def test_rows_that_go_on_leave_first() -> None:
    text = Card("t", [Fact(f"r{i}", f"v{i}") if i % 2 else Fact("", f"v{i}") for i in range(1, 21)]).text
    assert [f"v{i}" in text for i in range(1, 21, 2)] == [True] * 10
    assert text.count("\n") == 11


# --- collections ----------------------------------------------------------------------------------------------------


def test_a_collection_says_what_it_holds() -> None:
    rows = [
        record("a", when="2024-04-10T10:00:00", platform="sentinel-2a"),
        record("b", when="2024-05-20T10:00:00", platform="sentinel-2b", west=600_000.0),
    ]
    text, page = shown(collection("s2", *rows).subset(bbox=(14, 48, 17, 49)).harmonize(["red"]))
    assert text.splitlines() == [
        "<Collection s2: 2 records",
        " dates:     2024-04-10 to 2024-05-20",
        " platforms: sentinel-2a 1, sentinel-2b 1",
        " bands:     red (reflectance)",
        " area:      15, 48.7084 to 16.4147, 48.753 (lon, lat)",
        ' steps:     s2 > subset(bbox=(14, 48, 17, 49)) > harmonize(["red"])>',
    ]
    for part in ("<svg", "sentinel-2b", "15.0", ".harmonize("):
        assert part in page
    assert "nir (reflectance); SCL (class)" in shown(collection("s2", *rows))[0]


def test_a_join_says_it_of_each_source(s2: rd.Collection, aef: rd.Collection) -> None:
    text, page = shown(rd.join(optical=s2, embeddings=aef))
    assert "64 bands: A00 ... A63" in text
    assert "optical: " in text
    assert "A37" in page  # folded, not left out


def test_records_are_not_looked_at_where_there_are_many(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Their number comes from Parquet's footer, where no filter leaves some out."""
    collection("s2", *(record(f"r{i}") for i in range(7))).export(tmp_path / "t.parquet")
    lazy = rd.load(tmp_path / "t.parquet", "s2")
    assert "7 records" in shown(lazy)[0].splitlines()[0]
    monkeypatch.setattr(cards, "MOST_RECORDS", 5)

    def read(*_: Any) -> None:
        raise AssertionError("records are read")

    monkeypatch.setattr(recordtable, "table", read)
    again = rd.load(tmp_path / "t.parquet", "s2")
    assert shown(again)[0].startswith("<Collection s2: 7 records\n")
    text = shown(again.subset(cloud_cover_lt=5))[0]
    assert text.startswith("<Collection s2\n")
    assert "records of 7 not looked at: describe()" in text


def test_no_request_is_made_for_a_table_elsewhere(server: RangeServer) -> None:
    """Neither for its count, nor for records that a filter keeps."""
    collection("s2", record("a")).export(server.folder / "t.parquet")
    lazy = rd.load(server.url("t.parquet"), "s2")
    server.forget()
    for thing in (lazy, lazy.subset(cloud_cover_lt=5), lazy.harmonize(["red"]).chips(16)):
        shown(thing)
    assert server.log == []


def test_a_prompt_shows_what_is_wrong_with_a_plan(tmp_path: Path) -> None:
    text, _ = shown(collection("s2", record("a")).filter(nothing=3))
    assert "cannot be told: filter on column 'nothing'" in text
    collection("s2", record("a")).export(tmp_path / "t.parquet")
    lazy = rd.load(tmp_path / "t.parquet", "s2").subset(cloud_cover_lt=5)
    (tmp_path / "t.parquet").unlink()
    shown(lazy)


NAMES = st.sampled_from(["s2", AWKWARD, "a b", "ä", "x'\"", "\u202e"])
CHANGES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "nothing": lambda row: row,
    "no outline": lambda row: {**row, "geometry": None},
    "empty outline": lambda row: {**row, "geometry": shapely.to_wkb(shapely.Polygon())},
    "no bands": lambda row: {**row, "assets": [], "headers_metadata": []},
    "no time": lambda row: {**row, "datetime": None},
    "no platform": lambda row: {**row, "platform": None},
    "odd platform": lambda row: {**row, "platform": AWKWARD},
    "antimeridian": lambda row: {
        **row,
        "geometry": shapely.to_wkb(
            shapely.union_all([shapely.box(179, -17, 180, -16), shapely.box(-180, -17, -179, -16)])
        ),
    },
    "pole": lambda row: {**row, "geometry": shapely.to_wkb(shapely.box(-180, 89, 180, 90))},
    "point": lambda row: {**row, "geometry": shapely.to_wkb(shapely.Point(15, 50))},
}
STEPS: dict[str, Callable[[Any], Any]] = {
    "harmonize": lambda c: c.harmonize(["red"], mask="clouds", time="1MS"),
    "unknown band": lambda c: c.harmonize(["no such band"]),
    "static": lambda c: c.harmonize(time="static"),
    "subset": lambda c: c.subset(bbox=(0, 0, 1, 1), date_range=(None, "2024-05")),
    "unknown column": lambda c: c.filter(("it's <b>", "==", "\"'<")),
    "geometries": lambda c: c.subset(geometries=shapely.Point(15, 50).buffer(1)),
    "sample": lambda c: c.sample(0),
    "merge": lambda c: c | collection("other", record("o")),
    "twice": lambda c: c | c,
    "join": lambda c: c & collection("other", record("o")),
    "map": lambda c: c.map(abs, version="1"),
}


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    NAMES,
    st.lists(st.sampled_from(sorted(CHANGES)), max_size=3),
    st.lists(st.sampled_from(sorted(STEPS)), max_size=3),
    st.sampled_from(["", "chips", "split", "select", "planned"]),
)
def test_it_never_fails_to_print(name: str, changes: list[str], steps: list[str], end: str) -> None:
    """Collections of no record, of odd ones, of nonsense; chips of them, planned or not."""
    rows = [CHANGES[change](record(f"r{i}{AWKWARD}")) for i, change in enumerate(changes)]
    records = table(*rows, record("last")).slice(0, len(rows))
    thing: Any = rd.as_collection(records, name=name)
    for step in steps:
        with suppress(rd.RasteretDaskError):
            thing = STEPS[step](thing)
    if end:
        thing = thing.chips(16, cell_km=0.16)
    if end in ("split", "select"):
        thing = thing.split()
    if end == "select":
        thing = thing.select("train")
    if end == "planned":
        with suppress(rd.RasteretDaskError):
            len(thing)
    shown(thing)


# --- chips ----------------------------------------------------------------------------------------------------------


def both(s2: rd.Collection, aef: rd.Collection) -> rd.Chips:
    """Return chips of two sources, which nobody has planned."""
    red = s2.harmonize(["red", "nir"], mask="clouds", time="1MS", pick="least_cloudy", resolution=10)
    return rd.join(optical=red, embeddings=aef).chips(32, cell_km=0.96).split(0.6, 0.2, 0.2, seed=1)


def test_chips_say_what_is_planned(
    s2: rd.Collection, aef: rd.Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = 0
    made = chip_sources

    def counting(*args: Any) -> Any:
        nonlocal plans
        plans += 1
        return made(*args)

    monkeypatch.setattr(drawing, "chip_sources", counting)
    chips = both(s2, aef)
    text, page = shown(chips)
    assert plans == 0
    assert "not planned yet: len(chips) plans" in text
    assert "<svg" not in page
    count = len(chips)
    text, page = shown(chips)
    assert plans == 1
    head, splits, optical, embeddings, steps = text.splitlines()[:5]
    assert head == f"<Chips: {count} of 32 px (10 m), 3 slots 2024-04-01 to 2024-06-30"
    counts = {name: int(n) for name, n in re.findall(r"(\w+) (\d+)", splits)}
    assert counts == {n: chips.table["split"].to_pylist().count(n) for n in ("train", "val", "test")}
    assert optical.split(": ", 1)[1].strip() == (
        "red, nir (reflectance, float32), least_cloudy, masked: clouds"
    )
    assert "64 bands: A00 ... A63 (embedding, int8 as stored)" in embeddings
    assert steps.endswith(
        "join(optical, embeddings) > chips(32, cell_km=0.96) > split(0.6, 0.2, 0.2, seed=1)"
    )
    assert page.count("<svg") == 2  # the splits' bar, and the map
    train = chips.select("train")
    assert shown(train)[0].startswith(
        "<Chips of 32 px\n"
    )  # it is not planned itself, and is not for a prompt
    len(train)
    assert shown(train)[0].startswith(f"<Chips: {counts['train']} of 32 px")


def test_one_chip_windows_masks_and_rules(s2: rd.Collection) -> None:
    fields = pa.table(
        {"geometry": [shapely.to_wkb(shapely.box(15.0, 50.16, 15.01, 50.17))], "crop": ["<rye>"]}
    )
    chips = (
        s2.harmonize(["red"], resolution=10)
        .chips(16, at=fields, rasterize="crop")
        .filter_pixels(min_valid=0.5)
    )
    assert len(chips)
    text, _ = shown(chips)
    assert "of 1 polygon" in text
    assert "min_valid=0.5 (decided while pixels are read)" in text
    assert "at=<a table of 1 rows>" in text
    assert "splits:" in text


def test_chips_by_blocks_are_counted_only_where_nothing_is_read(
    s2: rd.Collection, aef: rd.Collection, tmp_path: Path
) -> None:
    plan = both(s2, aef).by_blocks(tmp_path / "plan", progress=False)
    train, count = plan.select("train"), len(plan)
    some = train.filter("coverage", ">", 0.5)
    shutil.rmtree(tmp_path / "plan")
    assert f"<ChipBlocks: {count} of 32 px" in shown(plan)[0]
    assert "splits:     train " in shown(train)[0]
    assert "not counted since the last step" in shown(some)[0]


# --- stores, streams, statistics, verdicts ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(s2: rd.Collection, aef: rd.Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store of two splits."""
    place = tmp_path_factory.mktemp("cards") / "store.zarr"
    both(s2, aef).select("train", "val").to_zarr(place, progress=False)
    return place


def test_stored_chips(store: Path) -> None:
    chips = rd.open_chips(store)
    text, page = shown(chips)
    counts = {n: chips.table["split"].to_pylist().count(n) for n in ("train", "val")}
    assert f"train {counts['train']}, val {counts['val']}" in text
    assert "red, nir (reflectance, float32); (time, band, y, x) = (3, 2, 32, 32)" in text
    assert chips.digest in text
    assert str(store) in text
    assert "A37" in page
    some = chips.select("val").filter(split="val").sample(1)
    assert 'select("val") > filter(split="val") > sample(1)' in shown(some)[0]
    assert shown(some)[0].startswith("<StoredChips: 1 chip\n")


def test_stored_chips_elsewhere_ask_for_nothing(store: Path, server: RangeServer) -> None:
    shutil.copytree(store, server.folder / "s.zarr")
    chips = rd.open_chips(server.url("s.zarr")).select("train")
    away = pickle.loads(pickle.dumps(chips))
    server.forget()
    text = shown(chips)[0]
    assert "2 bands, float32; (time, band, y, x) = (3, 2, 32, 32)" in text  # names lie in objects
    assert "train" in text
    assert "not opened yet" in shown(away)[0]
    assert server.log == []
    next(chips.stream(2))
    assert "red, nir (reflectance, float32)" in shown(chips)[0]


def test_a_store_that_is_gone_or_unfinished(store: Path, tmp_path: Path) -> None:
    place = tmp_path / "gone.zarr"
    shutil.copytree(store, place)
    chips = rd.open_chips(place)
    gone = pickle.loads(pickle.dumps(chips.sample(3)))
    shutil.rmtree(place)
    from rasteret_dask.store import storemap

    storemap._opened.cache_clear()
    text = shown(gone)[0]
    assert "cannot be read" in text
    assert "because:" in text


def test_a_stream_in_every_state(store: Path) -> None:
    stream = rd.open_chips(store).select("train").stream(5, shuffle=3, epochs=2, normalize=dict)
    text = shown(stream)[0]
    assert "order:      shuffled by seed 3" in text
    assert "(5, 3, 2, 32, 32) float32: red, nir (reflectance)" in text
    assert "nothing is read yet; next: epoch 0, batch 0" in text
    next(stream)
    assert "next: epoch 0, batch 1" in shown(stream)[0]
    stream.close()
    assert "closed; next: epoch 0, batch 1" in shown(stream)[0]
    assert sum(1 for _ in stream) == len(stream) - 1
    assert f"at its end, after {len(stream)} batches" in shown(stream)[0]
    assert "\n" not in str(stream)
    part = rd.open_chips(store).stream(1, rank=1, world_size=2, pad=True)
    assert "rank:       1 of 2, padded" in shown(part)[0]


def test_statistics(store: Path) -> None:
    stats = rd.open_chips(store).stats()
    text, page = shown(stats)
    assert f"red {stats['optical'].mean[0]:.4g} \u00b1 {stats['optical'].std[0]:.3g}" in text
    assert "64 bands: A00 ... A63, means " in text
    assert page.count("<svg") == 2 + 64  # a histogram a band
    codes = np.array([[[[[1, 2], [2, 9]]]]], dtype=np.uint8)
    one = measured(codes, np.ones((1, 1, 2, 2), bool), ("map",), kinds=(rd_kind(),))
    text, page = shown(Stats({AWKWARD: one}, 1))
    assert "map: <wheat> 50%, 1 25%, 9 25%" in text
    assert "&lt;wheat&gt;" in page
    none = measured(codes, np.zeros((1, 1, 2, 2), bool), ("map",))
    shown(Stats({"none": none}, 0))
    shown(Stats({}, 0))


def rd_kind() -> Any:
    """Return a band of classes, one of which has an awkward name."""
    from rasteret_dask.planning.bandkinds import BandKind

    return BandKind("class", ((2, "<wheat>"),))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), max_size=60),
    st.integers(1, 30),
    st.sampled_from(["float32", "int16", "uint8", "int64"]),
)
def test_a_histogram_counts_what_lies_between_its_ends(values: list[float], bins: int, dtype: str) -> None:
    """The oracle is NumPy over the pixels themselves, at the edges of buckets aside."""
    limits = (0, 200) if dtype == "uint8" else (-30_000, 30_000)
    pixels = np.clip(np.array(values), *limits).astype(dtype).reshape(1, 1, 1, 1, -1)
    own = measured(pixels, np.ones(pixels[:, :, 0].shape, bool), ("b",))
    found = own.histogram(bins)
    assert found.shape == (1, bins)
    if not len(values):
        assert not found.any()
        return
    low, high = own.percentile(0.5)[0], own.percentile(99.5)[0]
    assert found.sum() == pytest.approx(((pixels >= low) & (pixels <= high)).sum(), abs=0 if own.exact else 4)
    if own.exact:
        assert found[0].tolist() == np.histogram(pixels, bins, (low, high))[0].tolist()


def test_verdicts_come_first(s2: rd.Collection, aef: rd.Collection, store: Path, tmp_path: Path) -> None:
    audit = both(s2, aef).audit()
    text, page = shown(audit)
    assert text.startswith("ok: no two splits share ground\n")
    assert page.index("no two splits share ground") < page.index("train")
    place = tmp_path / "s.zarr"
    shutil.copytree(store, place)
    text, page = shown(rd.verify(place))
    assert text.startswith("<Verification: ok\n")
    assert "rd-good" in page.partition("</style>")[2]
    for number, path in enumerate(sorted(place.rglob("c/*/0/0/0/0"))):
        path.unlink()
        if number > 12:
            break
    text, page = shown(rd.verify(place))
    assert text.startswith("<Verification: damaged\n")
    assert "missing:" in text
    assert "rd-bad" in page.partition("</style>")[2]


# --- tables ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(small_world: World, store: Path) -> list[Any]:
    """Return everything that prints as a table."""
    own = rd.build_from_stac(small_world.sentinel2, name="s2")
    stats = rd.open_chips(store).stats()
    return [
        rd.datasets(), own.head(), own.head(0), own.head(2, ["id", "assets"]), own.left_out(), stats.table,
        stats.class_table, rd.open_chips(store).dropped, own.subset(cloud_cover_lt=0).head(),
    ]  # fmt: skip


def test_tables_are_arrow_and_read_like_tables(tables: list[Any]) -> None:
    for one in tables:
        assert pa.table(one).equals(one.arrow)
        assert one == one.arrow
        assert len(one) == one.num_rows == len(one.to_pandas())
        assert one.column_names == one.arrow.column_names
        assert pickle.loads(pickle.dumps(one)).arrow.equals(one.arrow)
        text = repr(one)
        assert "pyarrow" not in text
        assert "chunk" not in text
        assert len({line.count("  ") > 0 for line in text.splitlines()[:-1]}) <= 2
        checked(one._repr_html_())


def test_datasets_say_what_one_can_build() -> None:
    text = repr(rd.datasets())
    assert text.splitlines()[0].split() == [
        "id",
        "title",
        "bands",
        "pixel,",
        "m",
        "since",
        "until",
        "licence",
    ]
    (line,) = [line for line in text.splitlines() if line.startswith("aef/v1-annual")]
    for part in ("AlphaEarth", "64", "10", "2017-01-01", "now", "CC-BY-4.0"):
        assert part in line


def test_head_shows_no_headers(s2: rd.Collection) -> None:
    text = repr(s2.head(3))
    assert "EPSG:32633" in text
    assert "2024-04-09 10:04" in text
    assert len(text.splitlines()) == 5
    assert max(map(len, text.splitlines())) < 140
    assert "tile_offsets" not in text


def test_describe_is_a_card(s2: rd.Collection) -> None:
    text, _ = shown(s2.describe())
    assert text.startswith("<s2: 8 records\n")
    shown(s2.subset(cloud_cover_lt=0).describe())


# --- empty selections -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choose", "words"),
    [
        (lambda c: c.chips(32, aoi=(20.0, 50.0, 21.0, 51.0)).table,
         r"the AOI \(.*\) lies outside the records' bounds \(15, 48\.7"),
        (lambda c: c.subset(bbox=(20.0, 50.0, 21.0, 51.0)).cube(),
         r"the bbox \(20, 50, 21, 51\) lies outside the records' bounds"),
        (lambda c: c.subset(geometries=shapely.box(2, 5, 3, 6)).cube(), r"the area \(2, 5, 3, 6\) lies outside"),
        (lambda c: c.subset(date_range="2023").cube(),
         "no record from 2023-01-01 to 2023-12-31; theirs are 2024-04-10 to 2024-05-10"),
        (lambda c: c.subset(cloud_cover_lt=5).cube(), "eo:cloud_cover < 5.0 leaves none of 2 records"),
        (lambda c: c.subset(cloud_cover_lt=15, date_range="2024-05").cube(),
         "alone from 2024-05-01 to 2024-05-31 leaves 1, eo:cloud_cover < 15.0 leaves 1; together none"),
        (lambda c: c.filter(has_bands=["purple"]).cube(), r"has_bands in \[\"purple\"\] leaves none of 2 records"),
        (lambda c: c.sample(0).cube(), "a sample leaves none"),
    ],
)  # fmt: skip
def test_why_no_record_is_left_is_told_in_a_user_s_words(choose: Callable[[Any], Any], words: str) -> None:
    rows = [record("a", cloud=10), record("b", cloud=40, when="2024-05-10T10:00:00")]
    with pytest.raises(rd.PlanError, match=words) as caught:
        choose(collection("s2", *rows))
    assert "overlaps" not in str(caught.value)
    assert "'near'" not in str(caught.value)


def test_long_lists_name_both_ends() -> None:
    assert listed([f"A{i:02d}" for i in range(64)], "bands") == "64 bands: A00 ... A63"
