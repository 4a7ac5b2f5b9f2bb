"""Damaged stores: right values or a typed error, whatever bit, key or type is another."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_stores import rewrite_root, vouch, written

import rasteret_dask as rd
from rasteret_dask.errors import FormatError, RasteretDaskError, StoreError
from rasteret_dask.formats import STORE
from rasteret_dask.net import sums
from rasteret_dask.net.lending import Lender
from rasteret_dask.net.sums import BLOCK, CHECKSUM, Sums, closed, document_of, is_closed, sealed
from rasteret_dask.store import decode, storeread, storetables
from rasteret_dask.store.storemap import _opened
from rasteret_dask.storeset import StoredChips, open_chips
from rasteret_dask.streams.chipshards import stored_chips
from rasteret_dask.tasks.batches import Arrays, assembled

MANY = settings(
    max_examples=60, deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


@pytest.fixture(scope="module")
def store(s2: rd.Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    optical = s2.harmonize(bands=["red", "nir"], units="reflectance", dtype="uint16", time="3MS")
    chips = optical.chips(size=32, cell_km=0.96).sample(5)
    place = tmp_path_factory.mktemp("fuzz") / "store"
    written(chips, place, 12_000)
    return place


def everything(store: Path) -> dict[str, NDArray[Any]]:
    """Read a store in every way: all of it, single chips, its tables, filters, xarray."""
    _opened.cache_clear()
    storeread.forget()
    opened = open_chips(store)
    ids = list(opened)
    values = {f"all/{k}": v for k, v in opened.take(ids).items()}
    for chip in ids[:2]:
        values |= {f"{chip}/{k}": v for k, v in opened.take([chip]).items()}
    values["rows"] = np.array(opened.table.drop_columns(["geometry"]).to_pandas().astype(str))
    values["near"] = np.array(list(opened.filter(("coverage", ">", 0.5))))
    loaded = opened.load()
    dataset = loaded if not hasattr(loaded, "children") else next(iter(loaded.children.values())).to_dataset()
    values |= {f"xarray/{name}": variable.values for name, variable in dataset.variables.items()}
    values["attrs"] = np.array(json.dumps(dataset["pixels"].attrs, sort_keys=True, default=str))
    return values


@pytest.fixture(scope="module")
def wanted(store: Path) -> dict[str, NDArray[Any]]:
    return everything(store)


def assert_right_or_told(store: Path, wanted: dict[str, NDArray[Any]], whole: bool = True) -> None:
    """Read a store; where that works, and it was damaged and not forged, all is as it was."""
    try:
        values = everything(store)
    except RasteretDaskError:
        return
    if whole:
        assert values.keys() == wanted.keys()
        for key, value in wanted.items():
            np.testing.assert_array_equal(values[key], value)


def objects(store: Path) -> list[str]:
    return sorted(p.relative_to(store).as_posix() for p in store.rglob("*") if p.is_file())


@pytest.fixture
def copy(store: Path, tmp_path: Path) -> Path:
    shutil.copytree(store, tmp_path / "store")
    return tmp_path / "store"


# Bits


@MANY
@given(data=st.data())
def test_bits_that_flip_are_told(
    store: Path, wanted: dict[str, NDArray[Any]], copy: Path, data: st.DataObject
) -> None:
    read = [p for p in objects(store) if not p.startswith("_job/")]
    path = data.draw(st.sampled_from(["zarr.json", "manifest.parquet", "chips.parquet", *read]))
    good = (store / path).read_bytes()
    bad = bytearray(good)
    for bit in data.draw(st.lists(st.integers(0, 8 * len(good) - 1), min_size=1, max_size=3)):
        bad[bit // 8] ^= 1 << bit % 8
    (copy / path).write_bytes(bad)
    try:
        assert_right_or_told(copy, wanted)
    finally:
        (copy / path).write_bytes(good)


@pytest.fixture(scope="module")
def shards(s2: rd.Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a store with some chips in each shard, pixels and their validity beside them."""
    optical = s2.harmonize(
        bands=["red", "nir"], units="reflectance", dtype="uint16", mask="clouds", time="3MS"
    )
    place = tmp_path_factory.mktemp("shards") / "store"
    written(optical.chips(size=16, cell_km=0.64).sample(24), place, 20_000)
    return place


def by_parts(opened: StoredChips, _: str) -> list[Arrays]:
    """Read each shard in two parts, as ranks do."""
    reading, memory, found = stored_chips(opened.stored), Lender(), []
    assert reading.parts is not None
    for number, size in enumerate(reading.sizes):
        for part in (slice(0, size // 2), slice(size // 2, size)):
            count = part.stop - part.start
            held = reading.parts.read(number, part, memory)
            found += [assembled([(np.arange(count), (held, None))], count, memory)] if count else []
    return found


def by_tasks(opened: StoredChips, _: str) -> list[Arrays]:
    """Read each shard in two parts, as tasks on a cluster do."""
    reading = stored_chips(opened.stored)
    assert reading.parts is not None
    parts = [(n, slice(at, at + 1)) for n, size in enumerate(reading.sizes) for at in range(size)]
    return [reading.parts.task(number, part)[1]() for number, part in parts]


def by_ranks(opened: StoredChips, _: str) -> list[Arrays]:
    """Read all chips as three ranks do."""
    return [b for rank in range(3) for b in opened.stream(4, shuffle=2, rank=rank, world_size=3, pad=True)]


WAYS: dict[str, Callable[[StoredChips, str], Any]] = {
    "one": lambda opened, chip: opened[chip],
    "some": lambda opened, chip: opened.take([next(i for i in opened if i != chip), chip]),
    "all": lambda opened, _: opened.take(list(opened)),
    "load": lambda opened, _: opened.load(),
    "xarray": lambda opened, _: opened.to_xarray().compute(scheduler="synchronous"),
    "in order": lambda opened, _: list(opened.stream(5)),
    "shuffled": lambda opened, _: list(opened.stream(5, shuffle=1)),
    "ranks": by_ranks,
    "parts": by_parts,
    "tasks": by_tasks,
    "stats": lambda opened, _: opened.stats(progress=False),
}
"""How chips are read: shards as a whole, some chips of them, or parts, here and in Dask tasks."""


@pytest.mark.parametrize("place", ["disk", "server"])
@pytest.mark.parametrize("way", WAYS)
def test_a_byte_that_flips_is_told_on_every_way(
    way: str, place: str, shards: Path, tmp_path: Path, serve: Callable[[Path], tuple[str, Any]]
) -> None:
    """Of a chip's pixels and validity, of the checksums behind them, and of the index of their shard."""
    opened = open_chips(shards)
    number = next(n for n, size in enumerate(opened.stored.sizes) if size >= 4)
    shard, row = opened.stored.shards[number], 1
    chip = opened.table.column("chip_id")[int(opened.stored.offsets[number]) + row].as_py()
    shutil.copytree(shards, tmp_path / "copy", ignore=shutil.ignore_patterns("stats"))
    url = str(tmp_path / "copy") if place == "disk" else serve(tmp_path / "copy")[0]
    (group,) = opened.stored.map.groups[shard.split]
    for name in ("pixels", "valid"):
        array = group.arrays[name]
        path = array.object(shard.number)
        good = (shards / path).read_bytes()
        tail = decode.index_nbytes(array.encoding.chunk[0])
        start, length = decode.index_of(array.encoding.chunk[0], good[-tail:], len(good), path)[row].tolist()
        first, last, checksum = start, start + length - CHECKSUM - 1, start + length - 1
        for at in (first, last, checksum, len(good) - tail + 16 * row):
            bad = bytearray(good)
            bad[at] ^= 1 << at % 8
            (tmp_path / "copy" / path).write_bytes(bad)
            _opened.cache_clear()
            storeread.forget()
            with pytest.raises(StoreError, match=path):
                WAYS[way](open_chips(url), chip)
        (tmp_path / "copy" / path).write_bytes(good)


def test_every_byte_of_the_tables_counts(store: Path, copy: Path) -> None:
    """A flipped bit in any byte of the chip table or the manifest that is read is refused, whatever part it is."""
    for name in ("chips.parquet", "manifest.parquet"):
        good = (store / name).read_bytes()
        for place in range(0, len(good), 97):
            bad = bytearray(good)
            bad[place] ^= 1 << place % 8
            (copy / name).write_bytes(bad)
            _opened.cache_clear()
            with pytest.raises(StoreError, match=name):
                _ = open_chips(copy).stored.map.chips.table
        (copy / name).write_bytes(good)


@MANY
@given(size=st.sampled_from([0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]), data=st.data())
def test_blocks_are_those_of_the_object(size: int, data: st.DataObject) -> None:
    content = np.random.default_rng(size).bytes(size)
    one = Sums.of(content)
    assert Sums.again(json.loads(json.dumps(one.text))) == one
    assert one.is_of(content)
    assert not one.is_of(content + b"x")
    assert not one.is_of(content[:-1]) or not size
    if size:
        bit = data.draw(st.integers(0, 8 * size - 1))
        bad = bytearray(content)
        bad[bit // 8] ^= 1 << bit % 8
        assert not one.is_of(bytes(bad))
        block = bit // 8 // BLOCK
        for n in range(len(one.crcs)):
            assert one.match(content[n * BLOCK : (n + 1) * BLOCK], n)
            assert one.match(bytes(bad[n * BLOCK : (n + 1) * BLOCK]), n) == (n != block)


def test_only_blocks_that_are_used_are_read_and_each_is_compared(
    copy: Path,
    serve: Callable[[Path], tuple[str, list[tuple[str, str | None]]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A table that comes by ranges: damage in a column is told by those who read it, and by nobody else."""
    table = pq.read_table(copy / "chips.parquet")
    outlines = [np.random.default_rng(n).bytes(400_000) for n in range(table.num_rows)]
    table = table.set_column(table.schema.get_field_index("geometry"), "geometry", [outlines])
    pq.write_table(table, copy / "chips.parquet")
    vouch(copy, "chips.parquet")
    monkeypatch.setattr(storetables, "WHOLE", BLOCK)
    url, _ = serve(copy)
    file = pq.ParquetFile(copy / "chips.parquet").metadata
    column = next(
        file.row_group(0).column(i) for i in range(file.num_columns)
        if file.row_group(0).column(i).path_in_schema == "geometry"
    )  # fmt: skip
    data = bytearray((copy / "chips.parquet").read_bytes())
    data[(column.dictionary_page_offset or column.data_page_offset) + 700_000] ^= 1
    (copy / "chips.parquet").write_bytes(data)
    for place in (url, str(copy)):
        _opened.cache_clear()
        opened = open_chips(place)
        assert len(opened.filter(("coverage", ">", 0.0))) == len(opened)
        with pytest.raises(StoreError, match=r"chips.parquet: found other bytes; expected the \d+ bytes"):
            _ = opened.table


# Documents that somebody changed, and whose checksum is right


def paths_of(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path to every value of a JSON document."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_of(inner, (*path, key))


OTHERS: list[Any] = [
    None,
    -1,
    0,
    10**9,
    1.5,
    "",
    "x",
    True,
    [],
    {},
    [10**6, 10**6],
    ["a"],
    {"name": "x"},
    float("nan"),
]


@settings(MANY, max_examples=150)
@given(data=st.data())
def test_documents_with_other_values_are_told(
    store: Path, wanted: dict[str, NDArray[Any]], copy: Path, data: st.DataObject
) -> None:
    """Forged: what it says instead may be read, but nothing fails without a type."""
    root = json.loads((store / "zarr.json").read_bytes())
    path = data.draw(st.sampled_from(sorted(paths_of(root), key=str)))
    other = data.draw(st.sampled_from(["removed", *OTHERS]))

    def change(document: Any) -> None:
        inside = document
        for key in path[:-1]:
            inside = inside[key]
        if other == "removed":
            del inside[path[-1]]
        else:
            inside[path[-1]] = other

    try:
        rewrite_root(copy, change)
    except (KeyError, TypeError):
        return  # nothing left to hold a checksum
    try:
        assert_right_or_told(copy, wanted, whole=False)
    finally:
        shutil.copyfile(store / "zarr.json", copy / "zarr.json")


def test_absurd_shapes_are_refused_before_memory_is_asked_for(copy: Path) -> None:
    def huge(document: Any) -> None:
        for node in document["consolidated_metadata"]["metadata"].values():
            if node["node_type"] == "array" and len(node["shape"]) == 5:
                node["shape"][3:] = [10**6, 10**6]
                node["chunk_grid"]["configuration"]["chunk_shape"][3:] = [10**6, 10**6]
                node["codecs"][0]["configuration"]["chunk_shape"][3:] = [10**6, 10**6]

    rewrite_root(copy, huge)
    with pytest.raises(StoreError, match=r"array .*pixels: .*bytes of shape .*, more than the 2147483647"):
        open_chips(copy)


def test_more_chips_than_the_manifest_lists_are_refused(copy: Path) -> None:
    def longer(document: Any) -> None:
        for node in document["consolidated_metadata"]["metadata"].values():
            if node["node_type"] == "array" and len(node["shape"]) == 5:
                node["shape"][0] = 10**12

    rewrite_root(copy, longer)
    with pytest.raises(StoreError, match=r"of shape \(1000000000000, .*expected one of the \d chips"):
        open_chips(copy)


# Documents and tables with their own checksums


@given(
    st.dictionaries(st.text(max_size=3), st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=4),
                    lambda inner: st.lists(inner, max_size=3), max_leaves=5), max_size=4),
    st.data(),
)  # fmt: skip
def test_a_sealed_document_is_itself_or_none(document: dict[str, Any], data: st.DataObject) -> None:
    document.pop("checksum", None)
    text = sealed(document)
    again = document_of(text)
    assert again is not None
    assert {k: v for k, v in again.items() if k != "checksum"} == document
    bit = data.draw(st.integers(0, 8 * len(text) - 1))
    bad = bytearray(text)
    bad[bit // 8] ^= 1 << bit % 8
    found = document_of(bytes(bad))
    assert found is None or found == again
    assert document_of(text[:-1]) is None


@pytest.mark.parametrize("text", [b"", b"1", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"checksum": 3}'])
def test_what_is_no_sealed_document_is_none(text: bytes) -> None:
    assert document_of(text) is None


def test_a_closed_table_is_read_by_anybody(tmp_path: Path, store: Path) -> None:
    import duckdb

    data = (store / "manifest.parquet").read_bytes()
    assert is_closed(data)
    assert not any(is_closed(data[:n]) for n in (0, 4, 7, 8, 12, 20, len(data) - 1))
    plain = pq.read_table(store / "manifest.parquet")
    pq.write_table(plain, tmp_path / "plain.parquet")
    once = (tmp_path / "plain.parquet").read_bytes()
    assert not is_closed(once)
    (tmp_path / "closed.parquet").write_bytes(closed(once))
    assert pq.read_table(tmp_path / "closed.parquet").equals(plain)
    both = (f"select shard, chips, objects from '{tmp_path / name}.parquet'" for name in ("closed", "plain"))
    one, other = (duckdb.connect().execute(query).fetchall() for query in both)
    assert one == other
    assert sums.crc32_of(b"") == 0


# Formats


def test_a_store_of_a_newer_format_says_which_version_reads_it(copy: Path) -> None:
    rewrite_root(copy, lambda root: root["attributes"]["rasteret_dask"].update(format=99, version="9.9.1"))
    told = r"a store of format 99, written by rasteret_dask 9.9.1; .*'rasteret-dask>=9.9.1'"
    for read in (open_chips, rd.verify, lambda place: rd.stream_from(None, place, 2)):
        with pytest.raises(FormatError, match=told):
            read(copy)


def test_a_store_of_before_formats_is_refused_by_name(copy: Path) -> None:
    root = json.loads((copy / "zarr.json").read_bytes())
    root["attributes"]["rasteret_dask"] = {
        "version": "0.1.0",
        "digest": "x",
        "compression": '"auto"',
        "sources": ["s2"],
    }
    (copy / "zarr.json").write_text(json.dumps(root))
    with pytest.raises(FormatError, match=r"a store without a format.*expected format 2. Write it again"):
        open_chips(copy)
    for version in ("; rm -rf ~", None, 3, "x" * 99):
        with pytest.raises(FormatError) as caught:
            STORE.check("store x", {"format": STORE.number + 1, "version": version})
        assert "Update the package." in str(caught.value)
        assert "rm -rf" not in str(caught.value)
