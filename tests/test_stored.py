"""Opened stores: exactly the planned chips, by shard, by chip, and in processes that did not open them."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xarray as xr
import zarr
from distributed import Client, LocalCluster
from numpy.typing import NDArray
from small_stores import assert_same, rewrite_root, small, vouch, written
from zarr.codecs import GzipCodec, ZstdCodec

import rasteret_dask as rd
from rasteret_dask.errors import PlanError, StoreError
from rasteret_dask.net import lending, localfile
from rasteret_dask.net.lending import Lender
from rasteret_dask.store import decode, outputs, stored, storeread
from rasteret_dask.store.encode import Compression
from rasteret_dask.store.holding import hold
from rasteret_dask.store.storemap import StoreMap, _opened
from rasteret_dask.storeset import StoredChips, open_chips
from rasteret_dask.streams.chipshards import stored_chips
from rasteret_dask.streams.planned import planned
from rasteret_dask.tasks.batches import Arrays, assembled, take
from rasteret_dask.tasks.context import ReadContext


@pytest.fixture(scope="module")
def joined(s2: rd.Collection, l8: rd.Collection, aef: rd.Collection) -> rd.Chips:
    optical = rd.merge(s2, l8).harmonize(
        bands=["red", "nir"], resolution=10, time="1MS", mask="clouds", pick="median", dtype="uint16"
    )
    chips = rd.join(optical=optical, embeddings=aef.harmonize(bands=["A00", "A01"], units="embedding"))
    return chips.chips(size=32, cell_km=0.96).split(train=0.6, val=0.2, test=0.2, seed=42)


@pytest.fixture(scope="module")
def single(s2: rd.Collection) -> rd.Chips:
    optical = s2.harmonize(bands=["red", "nir"], units="reflectance", resolution=10)
    return optical.chips(size=32, cell_km=0.96).sample(41)


@pytest.fixture(scope="module")
def stores(
    single: rd.Chips, joined: rd.Chips, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[rd.Chips, Path]]:
    folder = tmp_path_factory.mktemp("stores")
    made = {"single": single, "joined": joined, "train": joined.select("train")}
    for name, chips in made.items():
        written(chips, folder / name)
    return {name: (chips, folder / name) for name, chips in made.items()}


@pytest.fixture
def copy(stores: dict[str, tuple[rd.Chips, Path]], tmp_path: Path) -> Path:
    """Return a store of one's own to break."""
    store = tmp_path / "copy"
    shutil.copytree(stores["single"][1], store)
    return store


# The law: what comes back is what was planned


@pytest.mark.parametrize("name", ["single", "joined", "train"])
def test_a_store_holds_exactly_what_load_gives(name: str, stores: dict[str, tuple[rd.Chips, Path]]) -> None:
    chips, store = stores[name]
    opened = open_chips(store)
    wanted = outputs.load(small(chips), ReadContext())
    assert_same(opened.load(), wanted)
    assert_same(opened.to_xarray().compute(), wanted)
    assert len(opened) == len(chips)
    assert opened.table.column("chip_id").to_pylist() == list(opened)


@pytest.mark.parametrize("name", ["single", "joined", "train"])
def test_shards_and_chips_are_those_of_the_plan(name: str, stores: dict[str, tuple[rd.Chips, Path]]) -> None:
    chips, store = stores[name]
    layout, opened = small(chips), open_chips(store)
    plan = planned(layout.job, layout.outputs, ReadContext())
    assert opened.stored.sizes == plan.sizes
    assert opened.stored.bands == plan.bands
    first, memory = 0, Lender()
    for number, size in enumerate(plan.sizes[:5]):
        ids, forth = list(opened)[first : first + size], np.arange(size)
        wanted = assembled([(forth, (plan.read(number, memory), None))], size, memory)
        held, half = hold(opened.stored, number, memory), size // 2
        ways = {
            "shard": stored.read_shard(opened.stored, number),
            "singly": take(opened.take(ids[::-1]), forth[::-1]),
            "held": assembled([(forth, (held, None))], size, memory),
            "in two parts": assembled(
                [(at, (held, at)) for at in (forth[half:][::-1], forth[:half])], size, memory
            ),
        }
        for way, found in ways.items():
            assert found.keys() == wanted.keys(), way
            for key, values in wanted.items():
                np.testing.assert_array_equal(found[key], values)
                assert found[key].dtype == values.dtype
                assert way == "singly" or found[key].flags.c_contiguous
        first += size


def test_plain_zarr_reads_the_same_chips(stores: dict[str, tuple[rd.Chips, Path]]) -> None:
    opened = open_chips(stores["single"][1])
    array: Any = zarr.open_group(str(stores["single"][1]), mode="r")["pixels"]
    ids = list(opened)
    rows = [40, 3, 17, 3, 29]
    found = opened.take([ids[row] for row in rows])["s2"]
    for mine, row in zip(found, rows, strict=True):
        np.testing.assert_array_equal(mine, array[row])
    one = opened[ids[17]]
    np.testing.assert_array_equal(one["s2"], array[17])
    assert one["chip_id"] == ids[17]


@pytest.mark.parametrize(
    "codec", [None, ZstdCodec(level=3), GzipCodec(level=1)], ids=["none", "zstd", "gzip"]
)
def test_every_compression_comes_back(codec: Compression, single: rd.Chips, tmp_path: Path) -> None:
    opened = open_chips(written(single, tmp_path / "store", compression=codec))
    assert_same(opened.load(), outputs.load(small(single), ReadContext()))
    singly = opened.take(list(opened)[::9])
    np.testing.assert_array_equal(singly["s2"], opened.take(list(opened))["s2"][::9])


def test_the_lazy_chips_have_a_chunk_a_shard(stores: dict[str, tuple[rd.Chips, Path]]) -> None:
    opened = open_chips(stores["single"][1])
    lazy = opened.to_xarray()
    assert isinstance(lazy, xr.Dataset)
    assert lazy.chunks["chip"] == opened.stored.sizes
    assert len(dict(lazy["pixels"].data.dask)) == len(opened.stored.sizes)


# Choosing


def test_steps_choose_what_the_same_steps_on_the_plan_do(
    stores: dict[str, tuple[rd.Chips, Path]], joined: rd.Chips
) -> None:
    opened = open_chips(stores["joined"][1])
    for mine, theirs in (
        (opened.select("val"), joined.select("val")),
        (open_chips(stores["joined"][1], split="val"), joined.select("val")),
        (opened.filter(("coverage", ">", 0.5)).select("test", "val"), joined.select("test", "val")),
        (opened.sample(20, seed=3), joined.sample(20, seed=3)),
        (opened.select("train").sample(7), joined.select("train").sample(7)),
    ):
        assert sorted(mine) == sorted(theirs.table.column("chip_id").to_pylist())
    some = opened.select("val").sample(5)
    whole = opened.take(list(some))
    for key, values in stored.take(some.stored, np.arange(5)).items():
        np.testing.assert_array_equal(values, whole[key])
    loaded = some.load()
    assert isinstance(loaded, xr.DataTree)
    assert loaded["optical"].to_dataset()["chip_id"].values.tolist() == list(some)


def test_mistakes_are_told_with_what_to_do(stores: dict[str, tuple[rd.Chips, Path]]) -> None:
    opened = open_chips(stores["joined"][1])
    some = next(iter(opened.select("val")))
    with pytest.raises(PlanError, match=r"chip 'nowhere', which it never had.*column chip_id"):
        opened["nowhere"]
    with pytest.raises(PlanError, match=r"which was not selected"):
        opened.select("train")[some]
    with pytest.raises(PlanError, match=r"chips\[...\].*found 3; expected a chip's id"):
        opened[3]  # type: ignore[index]
    with pytest.raises(PlanError, match=r"expected a list of chip ids"):
        opened.take(some)
    with pytest.raises(PlanError, match=r"found split 'dev'; expected one of"):
        opened.select("dev")
    with pytest.raises(PlanError, match=r"at least one"):
        opened.select()
    with pytest.raises(PlanError, match=r"'cloud'.*no such column"):
        opened.filter(cloud=3)
    with pytest.raises(PlanError, match=r"no chip left"):
        opened.filter(("coverage", ">", 2))


# What is read, and how often

BATCH_COLUMNS = ["chip_id", "epsg", "xmin", "ymin", "xmax", "ymax", "split"]


def test_only_columns_that_are_used_are_read(
    copy: Path, serve: Callable[[Path], tuple[str, list[tuple[str, str | None]]]]
) -> None:
    """A chip table of 8 MB, most of it outlines and records: batches leave them alone, a filter reads its column."""
    table = pq.read_table(copy / "chips.parquet")
    outlines = pa.array([np.random.default_rng(n).bytes(200_000) for n in range(table.num_rows)], pa.binary())
    table = table.set_column(table.schema.get_field_index("geometry"), "geometry", outlines)
    pq.write_table(table.append_column("crop", pa.array(range(table.num_rows))), copy / "chips.parquet")
    vouch(copy, "chips.parquet")
    size = (copy / "chips.parquet").stat().st_size
    url, seen = serve(copy)
    opened = open_chips(url)

    def nbytes() -> int:
        ranges = [asked for path, asked in seen if path == "/chips.parquet"]
        ends = [(asked or f"bytes=0-{size - 1}").removeprefix("bytes=").split("-") for asked in ranges]
        seen.clear()
        return sum(int(end) - int(start) + 1 for start, end in ends)

    seen.clear()
    found = opened.take(list(opened)[:3])
    assert found["labels/crop"].tolist() == [0, 1, 2]
    assert opened.stored.table.column_names == [*BATCH_COLUMNS, "crop"]
    assert 0 < nbytes() < 0.6 * size
    some = opened.filter(("coverage", ">", 0.5), ("datetime", ">", "2024-04-01"))
    assert 0 < len(some) <= len(opened)
    assert 0 < nbytes() < 0.6 * size
    assert len(some.filter(("crop", "<", 5))) == 5
    assert not nbytes()
    assert opened.table.column_names == [*table.column_names, "crop"]


def _count_samples() -> None:
    """Have this process count how often it carries a sample out."""
    plain = vars(stored)["sample_rows"]
    _samples.clear()

    def counted(*args: Any) -> NDArray[np.int64]:
        _samples.append(1)
        rows: NDArray[np.int64] = plain(*args)
        return rows

    vars(stored)["sample_rows"] = counted


def _samples_counted() -> int:
    return len(_samples)


_samples: list[int] = []


def test_a_worker_carries_steps_out_once(stores: dict[str, tuple[rd.Chips, Path]]) -> None:
    """Whatever the number of shards, threads and streams."""
    opened = open_chips(stores["joined"][1], split="train").sample(40).sample(30)
    assert np.count_nonzero(opened.stored.sizes) > 5
    with (
        LocalCluster(n_workers=1, threads_per_worker=3, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        client.run(_count_samples)
        ids = [i for batch in opened.stream(8, client=client) for i in batch["chip_id"]]
        assert opened.stats(client=client).chips == 30
        lazy = opened.to_xarray()
        found = {name: node.to_dataset().compute(scheduler=client) for name, node in lazy.children.items()}
        counted = client.run(_samples_counted)
    assert list(counted.values()) == [2]
    assert ids == list(opened)
    assert_same(xr.DataTree.from_dict({f"/{n}": d for n, d in found.items()}), opened.load())


# Requests


def test_a_chip_costs_one_request_once_its_shard_is_known(
    stores: dict[str, tuple[rd.Chips, Path]],
    serve: Callable[[Path], tuple[str, list[tuple[str, str | None]]]],
) -> None:
    url, seen = serve(stores["single"][1])
    opened = open_chips(url)
    ids = list(opened)
    seen.clear()
    opened.take([ids[0], ids[13]])
    assert sorted(path.split("/c/")[0] for path, _ in seen) == sorted(["/pixels"] * 4 + ["/datetime"] * 2)
    seen.clear()
    opened.take([ids[1], ids[14], ids[2]])
    assert [path.split("/c/")[0] for path, _ in seen] == ["/pixels"] * 2  # 1 and 2 lie beside each other
    assert all(asked for _, asked in seen)
    seen.clear()
    assert_same(opened.load(), open_chips(stores["single"][1]).load())
    assert sum("/pixels/" in path for path, _ in seen) == len(opened.stored.sizes)


@dataclass
class Work:
    """What reading a store on disk took."""

    reads: list[tuple[str, int]] = field(default_factory=list)
    """Path below the store and bytes of each."""
    outs: list[tuple[int, int]] = field(default_factory=list)
    """Where each chip was decoded to: addresses."""
    checksums: int = 0
    """Chips that were compared with their own checksum."""

    def forget(self) -> None:
        self.reads, self.outs, self.checksums = [], [], 0


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Work:
    """Count what is done from now on."""
    done, lock = Work(), Lock()
    read, into, checked = localfile.read, decode.body_into, decode._checked

    def counted_read(path: str, start: int, length: int | None, memory: Any = None) -> localfile.Fetched:
        answer = read(path, start, length, memory)
        with lock:
            done.reads.append((path, len(answer.data)))
        return answer

    def counted_into(encoding: Any, body: Any, out: Any, subject: object) -> None:
        with lock:
            done.outs.append(np.lib.array_utils.byte_bounds(out))
        into(encoding, body, out, subject)

    def counted_checked(data: Any, subject: object) -> Any:
        with lock:
            done.checksums += 1
        return checked(data, subject)

    monkeypatch.setattr(localfile, "read", counted_read)
    monkeypatch.setattr(decode, "body_into", counted_into)
    monkeypatch.setattr(decode, "_checked", counted_checked)
    return done


def _inside(outs: list[tuple[int, int]], arrays: Arrays) -> bool:
    """Tell whether all that was decoded lies in the memory of some arrays."""
    spans = [np.lib.array_utils.byte_bounds(a) for a in arrays.values() if a.dtype != object and a.size]
    return all(any(a <= start and stop <= b for a, b in spans) for start, stop in outs)


@pytest.mark.parametrize("name", ["single", "joined"])
def test_chips_on_a_disk_are_decoded_once_to_where_they_stay(
    name: str, stores: dict[str, tuple[rd.Chips, Path]], work: Work
) -> None:
    opened = open_chips(stores[name][1])
    ids, groups = list(opened), opened.stored.map.first
    sharded = [a for g in groups for n, a in g.arrays.items() if n in g.sampled and a.encoding.sharded]
    first, second = ids[: opened.stored.sizes[0]], ids[opened.stored.sizes[0] :]
    some = [first[0], first[1], second[0]]
    storeread.forget()
    work.forget()
    chips = opened.take(some)
    objects = Counter(path.split("/c/")[0] for path, _ in work.reads)
    small = sum(count for name, count in objects.items() if name.endswith("/datetime"))
    # of each of two shards an index, and one read of neighbours; nothing where all of a shard is fill
    assert all(count <= 4 for count in objects.values()), objects
    assert len(work.outs) == 3 * len(sharded)
    assert _inside(work.outs, chips)
    assert work.checksums <= len(work.outs) + small
    reads = len(work.reads)
    work.forget()
    again = opened.take(some)
    assert len(work.reads) < reads
    assert {n for _, n in work.reads}.isdisjoint({decode.index_nbytes(a.encoding.chunk[0]) for a in sharded})
    work.forget()
    one = opened[some[2]]
    assert len(work.reads) <= len(sharded) == len(work.outs)
    opened.take(ids)  # times of the other shards, which are kept
    work.forget()
    whole = opened.take(ids)
    assert len({path for path, _ in work.reads}) == len(work.reads) == opened_objects(opened)
    assert work.checksums == 0  # the objects were compared as such
    assert len(work.outs) == len(ids) * len(sharded)
    assert _inside(work.outs, whole)
    for key, values in chips.items():
        np.testing.assert_array_equal(values, again[key])
        np.testing.assert_array_equal(values[2], one[key])
        np.testing.assert_array_equal(values, whole[key][[ids.index(i) for i in some]])


def test_sources_that_nobody_asks_for_are_not_read(
    stores: dict[str, tuple[rd.Chips, Path]], work: Work, tmp_path: Path
) -> None:
    """By statistics in this process, and by whoever reads shards and parts of them for streams and tasks."""
    shutil.copytree(stores["train"][1], tmp_path / "store")
    opened = open_chips(tmp_path / "store")
    some = stored_chips(opened.stored, ("embeddings",))
    parts = some.parts
    assert parts is not None
    objects = {path: size for path, size in opened.stored.map.objects() if "/c/" in path}
    wanted = sum(size for path, size in objects.items() if path.startswith("embeddings/"))
    part, memory = slice(0, 1), Lender()
    tasks = [task for _, task in some.tasks()[1]]
    ways: dict[str, tuple[Callable[[], Any], int]] = {
        "statistics": (lambda: opened.stats(progress=False, sources=["embeddings"]), wanted),
        "shards": (lambda: [some.read(number, memory) for number in range(len(some.sizes))], wanted),
        "tasks": (lambda: [task() for task in tasks], wanted),
        "a part": (lambda: parts.read(0, part, memory), wanted // 2),
        "a part's task": (lambda: parts.task(0, part)[1](), wanted // 2),
    }
    for way, (read, most) in ways.items():
        storeread.forget()
        work.forget()
        read()
        of_objects = [(path, n) for path, n in work.reads if "/c/" in path]
        assert of_objects, way
        assert all("/embeddings/" in path for path, _ in of_objects), way
        assert sum(n for _, n in of_objects) <= most, way


def opened_objects(opened: StoredChips) -> int:
    """Return how many objects the pixels of all shards are, and what is stored like them."""
    store = opened.stored.map
    assert isinstance(store, StoreMap)
    arrays = [(s, g, n, a) for s in store.shards for g in store.groups_of(s) for n, a in g.arrays.items()]
    return sum(
        a.object(s.number) in s.sizes for s, g, n, a in arrays if n in g.sampled and a.encoding.sharded
    )


def test_a_stream_decodes_to_its_batches_whose_memory_is_used_again(
    stores: dict[str, tuple[rd.Chips, Path]], work: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lending, "LARGE", 1)
    opened = open_chips(stores["single"][1])
    ids = list(opened)
    kept = list(
        opened.stream(5, shuffle=1, epochs=2)
    )  # times too; nothing is used again while somebody holds it
    assert [i for b in kept for i in b["chip_id"].tolist()] == [
        i for b in opened.stream(5, shuffle=1, epochs=2) for i in b["chip_id"].tolist()
    ]
    alone = dict(zip(ids, opened.take(ids)["s2"], strict=True))
    for batch in kept:
        np.testing.assert_array_equal(batch["s2"], np.stack([alone[i] for i in batch["chip_id"]]))
    work.forget()
    places = set()
    stream = opened.stream(5, shuffle=1, epochs=4, prefetch=2, drop_last=True)
    for batch in stream:
        places.add(batch["s2"].__array_interface__["data"][0])
        del batch
    assert work.checksums == 0
    assert len(places) <= 2 + 2  # those ahead, the one that was taken last, and the one that is made


# Other processes


def _ask(chips: StoredChips, chip: str) -> tuple[int, float]:
    return len(chips), float(chips[chip]["s2"].sum())


def test_it_pickles_small_and_opens_in_a_spawned_worker(stores: dict[str, tuple[rd.Chips, Path]]) -> None:
    opened = open_chips(stores["single"][1]).sample(30)
    opened.load()
    assert len(pickle.dumps(opened)) < 1000
    chip = list(opened)[11]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_ask, (opened, chip)) == _ask(opened, chip)


# Stores that are not what they say


def test_what_is_no_finished_store_is_told_apart(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"no zarr.json.*Check the path"):
        open_chips(tmp_path / "nowhere")
    with pytest.raises(StoreError, match=r"found a file"):
        open_chips(copy / "zarr.json")
    zarr.create_group(tmp_path / "other")
    with pytest.raises(StoreError, match=r"Zarr store of something else"):
        open_chips(tmp_path / "other")
    (copy / "zarr.json").unlink()
    with pytest.raises(StoreError, match=r"an unfinished store.*Call to_zarr with the same plan again"):
        open_chips(copy)
    (copy / "zarr.json").write_text("{")
    with pytest.raises(StoreError, match=r"no JSON"):
        open_chips(copy)


def test_objects_of_another_size_are_seen_at_the_door(copy: Path) -> None:
    shard = copy / "pixels/c/1/0/0/0/0"
    data = shard.read_bytes()
    shard.write_bytes(data[:-7])
    with pytest.raises(StoreError, match=r"1 objects missing or of another size: pixels/c/1/0/0/0/0 \("):
        open_chips(copy)
    shard.unlink()
    with pytest.raises(StoreError, match=r"no bytes, not \d+"):
        open_chips(copy)
    (copy / "manifest.parquet").unlink()
    _opened.cache_clear()
    with pytest.raises(StoreError, match=r"no manifest.parquet"):
        open_chips(copy)


def test_what_changes_after_opening_is_seen_when_it_is_read(copy: Path) -> None:
    opened = open_chips(copy)
    ids = list(opened)
    shard = copy / "pixels/c/1/0/0/0/0"
    data = bytearray(shard.read_bytes())
    data[50] ^= 255
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"pixels/c/1.*other bytes.*that the manifest names"):
        stored.read_shard(opened.stored, 1)
    data[-1] ^= 255
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"does not match its checksum"):
        opened[ids[13]]
    shard.write_bytes(data[:-1])
    with pytest.raises(StoreError, match=r"bytes; expected the \d+ bytes"):
        opened[ids[13]]
    shard.unlink()
    with pytest.raises(StoreError, match=r"nothing; expected"):
        opened[ids[13]]
    assert opened[ids[2]]["chip_id"] == ids[2]


def test_another_plan_at_the_same_place_is_refused(copy: Path) -> None:
    opened = pickle.loads(pickle.dumps(open_chips(copy)))
    rewrite_root(copy, lambda root: root["attributes"]["rasteret_dask"].update(digest="0" * 32))
    _opened.cache_clear()  # as in a worker that has not opened it yet
    with pytest.raises(StoreError, match=r"another store .*written anew meanwhile"):
        len(opened)


@pytest.mark.parametrize("warm", [True, False])
def test_an_uncompressed_store_written_anew_is_noticed(s2: rd.Collection, tmp_path: Path, warm: bool) -> None:
    """Its objects have the same sizes and indexes as those before, and single chips have no checksums."""

    def store_of(band: str) -> str:
        chips = s2.harmonize(bands=[band], time="1MS", dtype="uint16").chips(size=32, cell_km=0.96).sample(60)
        return written(chips, tmp_path / band, 150_000, None)

    red, nir = store_of("red"), store_of("nir")
    opened = open_chips(red)
    ids = list(opened)[:3]
    wanted = opened.take(list(opened))["s2"][:3]
    if warm:
        opened.take(ids)
    shutil.copytree(red, tmp_path / "kept")
    shutil.rmtree(red)
    shutil.copytree(nir, red)
    with pytest.raises(StoreError, match="another store"):
        opened.take(ids)
    shutil.rmtree(red)
    shutil.copytree(tmp_path / "kept", red)  # the same again, with other times
    for _ in range(2):
        np.testing.assert_array_equal(opened.take(ids)["s2"], wanted)


def test_a_process_with_a_path_trains_on_one_split(stores: dict[str, tuple[rd.Chips, Path]]) -> None:
    _, store = stores["joined"]
    with pytest.raises(PlanError, match=r"a store of train, val, test.*split='train'"):
        rd.stream_from(None, store, 8)
    with pytest.raises(PlanError, match="trian"):
        rd.stream_from(None, store, 8, split="trian")
    found = [batch["split"] for batch in rd.stream_from(None, store, 8, split="val")]
    assert set(np.concatenate(found)) == {"val"}
    assert sum(map(len, found)) == len(open_chips(store, split="val"))
    assert len(rd.stream_from(None, stores["train"][1], 8)) == len(open_chips(stores["train"][1]).stream(8))


def test_what_is_no_list_of_ids_and_no_batch_is_refused(stores: dict[str, tuple[rd.Chips, Path]]) -> None:
    opened = open_chips(stores["single"][1])
    ids = list(opened)
    with pytest.raises(PlanError, match="to_pylist"):
        opened.take(opened.table.column("chip_id")[:2])
    with pytest.raises(PlanError, match=r"chips.take\(\[id\]\)"):
        rd.as_xarray(opened[ids[0]])
    with pytest.raises(PlanError, match="1 names; expected 2"):
        rd.as_xarray(opened.take(ids[:2]), {"s2": ("red",)})
    with pytest.raises(PlanError, match="filter: found no chip left"):
        opened.filter(chip_id="zz")


@pytest.mark.filterwarnings("ignore:The specified chunks separate")  # of coordinates, which lie in one piece
def test_a_group_tells_how_many_chips_a_dask_chunk_needs_to_be_a_shard(
    stores: dict[str, tuple[rd.Chips, Path]],
) -> None:
    _, path = stores["joined"]
    opened = open_chips(path)
    for split in ("train", "val", "test"):
        sizes = tuple(s.chips for s in opened.stored.map.shards if s.split == split)
        for source in ("optical", "embeddings"):
            group = f"{split}/{source}"
            n = zarr.open_group(path, path=group, mode="r").attrs["chips_per_shard"]
            dataset = xr.open_zarr(path, group=group, chunks={"chip": n})
            assert dataset["pixels"].chunks[0] == sizes, group
            shards = zarr.open_array(path, path=f"{group}/pixels", mode="r").shards
            assert shards is not None
            assert shards[0] == n
    assert max(s.number for s in opened.stored.map.shards) > 0  # else the sizes tell nothing


# Folds


def test_folds_of_a_store_are_those_of_its_plan(
    joined: rd.Chips, stores: dict[str, tuple[rd.Chips, Path]], tmp_path: Path
) -> None:
    """Of a store without the column, of one with it, and of one split: the same chips are val, by every way out."""
    from rasteret_dask.planning.plan import Select, Split

    assert isinstance(joined.plan, Split)
    whole = rd.Chips(joined.query.then(joined.plan.child))
    planned_folds = dict(
        zip(*(whole.folds(3, seed=2).table[n].to_pylist() for n in ("chip_id", "fold")), strict=True)
    )
    for name, chips in (("joined", joined), ("train", joined.select("train"))):
        opened = open_chips(stores[name][1]).folds(3, seed=2)
        assert dict(zip(*(opened.table[n].to_pylist() for n in ("chip_id", "fold")), strict=True)) == {
            chip: planned_folds[chip] for chip in chips.table["chip_id"].to_pylist()
        }
    place = tmp_path / "folds"
    written(whole.folds(3, seed=2), place)
    store = open_chips(place)
    for i in range(3):
        fold = store.fold(i)
        val, train = fold.select("val"), fold.select("train")
        assert sorted(val) == sorted(c for c, own in planned_folds.items() if own == i)
        assert sorted([*val, *train]) == sorted(fold) == sorted(store)
        assert set(val.table["split"].to_pylist()) == {"val"}
        for batch in val.stream(batch_size=8, shuffle=1):
            assert set(batch["split"]) == {"val"}
            assert set(batch["labels/fold"]) == {i}
        assert set(val.take(list(val)[:3])["split"]) == {"val"}
        assert (
            pickle.loads(pickle.dumps(val)).digest
            == val.digest
            != store.fold((i + 1) % 3).select("val").digest
        )
        assert len(fold.filter(split="val")) == len(val)
        assert len(fold.sample(2, by="split")) == 4
        assert f"val {len(val)}" in repr(fold)
    assert isinstance(val.stored.plan, Select)
    mistakes: tuple[tuple[Callable[[], Any], str], ...] = (
        (lambda: store.fold(3), "values of column fold: 0, 1, 2"),
        (lambda: store.folds(2), "there already"),
        (lambda: open_chips(stores["train"][1]).fold(0), r"chips.folds\(5\) makes it"),
        (lambda: open_chips(stores["train"][1]).folds(10_000), "fewer folds"),
        (lambda: store.fold(0).select("test"), "train, val"),
    )
    for wrong, told in mistakes:
        with pytest.raises(PlanError, match=told):
            wrong()
