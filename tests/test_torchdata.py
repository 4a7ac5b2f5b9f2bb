"""torch Datasets: the stream's own batches, whoever loads them; forks are refused; states resume."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from waiting import PATIENCE_S

import rasteret_dask as rd
from rasteret_dask.storeset import StoredChips, open_chips

torch = pytest.importorskip("torch", reason="needs the extra torch")

from torch.utils.data import DataLoader  # noqa: E402
from torch.utils.data._utils import worker as torch_worker  # noqa: E402

from rasteret_dask.torchdata import (  # noqa: E402
    ChipDataset,
    ChipStore,
    _Run,
    as_tensors,
    choose_start,
    forkserver,
    values_of,
)

SIZE = 32
SPAWN = pytest.param("spawn", marks=pytest.mark.slow)  # each worker imports torch and all the rest


@pytest.fixture(scope="module")
def chips(s2: rd.Collection, aef: rd.Collection) -> rd.Chips:
    optical = s2.harmonize(bands=["red", "nir"], time="1MS", mask="clouds", dtype="uint16")
    return rd.join(optical=optical, embeddings=aef).chips(SIZE, cell_km=0.64).sample(60)


@pytest.fixture(scope="module")
def store(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> StoredChips:
    place = str(tmp_path_factory.mktemp("torch") / "chips.zarr")
    chips.to_zarr(place, progress=False)
    return open_chips(place)


def ids(batches: Iterable[dict[str, Any]]) -> list[tuple[str, ...]]:
    return [tuple(batch["chip_id"]) for batch in batches]


def same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Hold a batch of tensors against one of arrays."""
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        if isinstance(found[name], list):
            assert found[name] == values.tolist()
            continue
        assert found[name].is_contiguous()
        whole = values.astype(np.int64) if values.dtype.kind in "uM" else values
        np.testing.assert_array_equal(found[name].numpy(), whole, name)


def test_tensors_are_the_arrays_themselves() -> None:
    arrays: dict[str, Any] = {
        "optical": np.zeros((2, 1, 3, 4, 4), dtype=np.float32),
        "embeddings": np.zeros((2, 1, 64, 4, 4), dtype=np.int8),
        "optical/valid": np.ones((2, 1, 4, 4), dtype=bool),
        "optical/mask": np.array([0, 200], dtype=np.uint8).repeat(16).reshape(2, 4, 4),
        "count": np.array([65535, 1], dtype=np.uint16),
        "optical/datetime": np.array([["2024-04-01T00:00:00.000001"], ["NaT"]], dtype="datetime64[us]"),
        "chip_id": np.array(["a", "b"], dtype=object),
    }
    found = as_tensors(arrays)
    for name in ("optical", "embeddings", "optical/valid", "optical/mask"):
        assert found[name].data_ptr() == arrays[name].ctypes.data
    assert found["count"].dtype == torch.int32
    assert found["count"].tolist() == [65535, 1]
    assert found["optical/datetime"].tolist() == [[1711929600000001], [np.iinfo(np.int64).min]]
    assert found["chip_id"] == ["a", "b"]
    sample = as_tensors(arrays, image="optical")
    assert sample["image"].shape == (2, 3, 4, 4)
    assert sample["image"].data_ptr() == arrays["optical"].ctypes.data
    assert sample["valid"].shape == (2, 4, 4)
    assert sample["mask"].dtype == torch.int64
    assert sample["embeddings"].shape == (2, 1, 64, 4, 4)
    one = as_tensors({name: values[0] for name, values in arrays.items()}, image="optical")
    assert one["image"].shape == (3, 4, 4)
    assert one["mask"].shape == (4, 4)
    assert one["chip_id"] == "a"
    with pytest.raises(rd.PlanError, match="one of optical, embeddings"):
        as_tensors(arrays, image="radar")


def test_what_torch_cannot_take_is_copied_once() -> None:
    pixels = np.arange(48, dtype=np.uint16).reshape(2, 1, 4, 6)[..., ::2]
    constant = np.broadcast_to(np.float32(3), (2, 5))
    found = as_tensors({"pixels": pixels, "constant": constant, "number": np.uint32(7)})
    assert found["pixels"].is_contiguous()
    np.testing.assert_array_equal(found["pixels"].numpy(), pixels)
    assert found["constant"].tolist() == constant.tolist()
    found["constant"] += 1  # memory of its own
    assert found["number"].shape == ()
    assert found["number"].dtype == torch.int64


@pytest.mark.parametrize("times", [1, 3])
def test_a_joined_mask_is_one_of_classes(times: int) -> None:
    classes = np.arange(2 * times * 16, dtype=np.uint8).reshape(2, times, 1, 4, 4)
    arrays: dict[str, Any] = {
        "optical": np.zeros((2, 1, 3, 4, 4), dtype=np.float32),
        "mask": classes,
        "mask/valid": np.ones((2, times, 4, 4), dtype=bool),
    }
    found = as_tensors(arrays, image="optical")
    assert found["mask"].dtype == torch.int64
    np.testing.assert_array_equal(found["mask"].numpy(), classes[:, 0, 0] if times == 1 else classes[:, :, 0])
    assert found["mask/valid"].shape == (2, times, 4, 4)
    one = as_tensors({name: values[0] for name, values in arrays.items()}, image="optical")
    assert torch.equal(one["mask"], found["mask"][0])
    several = as_tensors({**arrays, "mask": classes.repeat(2, axis=2)}, image="optical")["mask"]
    assert several.shape == ((2, 2, 4, 4) if times == 1 else (2, 3, 2, 4, 4))
    share = as_tensors({**arrays, "mask": classes.astype(np.float32)}, image="optical")["mask"]
    assert share.dtype == torch.float32
    as_image = as_tensors(arrays, image="mask")
    assert as_image["image"].dtype == torch.uint8
    assert as_image["valid"].shape[:-2] == ((2,) if times == 1 else (2, 3))


@pytest.mark.parametrize("other", ["image", "mask", "valid"])
def test_two_entries_never_get_one_name(other: str) -> None:
    arrays = {
        "optical": np.zeros((2, 1, 3, 4, 4), dtype=np.float32),
        "optical/valid": np.ones((2, 1, 4, 4), dtype=bool),
        "optical/mask": np.zeros((2, 4, 4), dtype=np.uint8),
        other: np.zeros((2, 1, 1, 4, 4), dtype=np.uint8),
    }
    for given in (arrays, dict(reversed(arrays.items()))):
        with pytest.raises(rd.PlanError, match=f"two entries named '{other}'"):
            as_tensors(given, image="optical")
        assert as_tensors(given).keys() == arrays.keys()
    assert len(as_tensors(arrays, image=other)) == len(arrays)


@pytest.mark.parametrize("of", ["chips", "store"])
def test_a_pass_is_the_stream(of: str, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(of)
    dataset = ChipDataset(source.stream(7, shuffle=3))
    wanted = list(source.stream(7, shuffle=3, epochs=2))
    assert len(dataset) == len(wanted) / 2
    for found, batch in zip([*dataset, *dataset], wanted, strict=True):  # the next pass is the next epoch
        same(found, batch)
    dataset.set_epoch(1)
    assert ids(dataset) == ids(wanted[len(dataset) :])


def test_trainers_count_passes(store: StoredChips) -> None:
    epochs = [ids(store.stream(7, shuffle=3, epochs=n + 1))[-9:] for n in range(6)]
    dataset = ChipDataset(store.stream(7, shuffle=3, epochs=2))
    dataset.set_epoch(2)
    assert ids(dataset) == epochs[4] + epochs[5]
    dataset.set_epoch(0)
    loader = DataLoader(dataset, batch_size=None)
    iter(loader)  # nothing is taken of it: it is no pass
    assert ids(loader) == epochs[0] + epochs[1]
    begun = iter(dataset)
    taken = ids([next(begun)])
    state = dataset.state_dict()
    dataset.set_epoch(0)
    assert ids(dataset) == epochs[0] + epochs[1]
    for number, wanted in ((1, epochs[2] + epochs[3]), (0, epochs[0] + epochs[1])):
        dataset.load_state_dict(state)
        dataset.set_epoch(number)  # the state's own pass goes on, another one begins
        assert (taken if number else []) + ids(dataset) == wanted
    for wrong in (-1, 1.0, True, None):
        with pytest.raises(rd.PlanError, match="set_epoch"):
            dataset.set_epoch(wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", [SPAWN, forkserver()])
def test_workers_share_the_very_same_batches(chips: rd.Chips, store: StoredChips, start: Any) -> None:
    source = store if start == "spawn" else chips
    stream = source.stream(7, shuffle=3, epochs=2)
    loader = DataLoader(
        ChipDataset(stream), batch_size=None, num_workers=2, multiprocessing_context=start,
    )  # fmt: skip
    found = {key: batch for batch in loader for key in [(tuple(batch["chip_id"]))]}
    wanted = {tuple(batch["chip_id"]): batch for batch in source.stream(7, shuffle=3, epochs=2)}
    assert len(wanted) == len(stream) == len(loader)
    assert found.keys() == wanted.keys()
    for key, batch in found.items():
        same(batch, wanted[key])


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("start", [SPAWN, forkserver()])
def test_each_pass_of_workers_is_the_next_epoch(store: StoredChips, start: Any, persistent: bool) -> None:
    dataset = ChipDataset(store.stream(7, shuffle=3))
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context=start, persistent_workers=persistent
    )

    def epoch(number: int) -> list[tuple[str, ...]]:
        return sorted(ids(store.stream(7, shuffle=3, epochs=number + 1))[-len(dataset) :])

    assert epoch(0) != epoch(1)
    assert [sorted(ids(loader)), sorted(ids(loader))] == [epoch(0), epoch(1)]
    if start == "spawn":  # what follows is known of both, and a start takes seconds
        return
    batches = iter(loader)
    begun = ids([next(batches)])
    dataset.set_epoch(5)  # for the next pass, not for this one
    assert sorted(begun + ids(batches)) == epoch(2)
    assert sorted(ids(loader)) == epoch(5)
    # others go on where they stopped: the main process, and another number of workers
    assert sorted(ids(dataset)) == epoch(6)
    other = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context=start)
    assert sorted(ids(other)) == epoch(7)


@pytest.mark.slow
def test_workers_start_without_a_deadlock(store: StoredChips) -> None:
    """A few times here, fifty times in benchmarks/bench_starts.py."""
    wanted = store.table.column("chip_id").to_pylist()
    for _ in range(3):
        loader = DataLoader(
            ChipDataset(store.stream(7)), batch_size=None, num_workers=2, multiprocessing_context="spawn",
            timeout=PATIENCE_S,
        )  # fmt: skip
        assert sorted(chip for batch in ids(loader) for chip in batch) == sorted(wanted)


def passing(dataset: ChipDataset, worker: int | None, passes: int, out: Any) -> None:
    """Begin passes as a DataLoader's worker does, or as a process of its own; say their first epochs."""
    if worker is not None:
        torch_worker._worker_info = torch_worker.WorkerInfo(id=worker, num_workers=2, seed=0, dataset=dataset)
    out.put([dataset._passes.begin(1) for _ in range(passes)])


def test_workers_of_a_pass_agree_however_late_one_starts(store: StoredChips) -> None:
    context = forkserver()
    dataset, out = ChipDataset(store.stream(7)), context.SimpleQueue()

    def starts(worker: int | None, passes: int = 1) -> list[int]:
        process = context.Process(target=passing, args=(dataset, worker, passes, out))  # type: ignore[attr-defined]
        process.start()
        process.join()
        assert process.exitcode == 0
        found: list[int] = out.get()
        return found

    # each process has ended before the next one gets its dataset
    assert [starts(0), starts(1), starts(0), starts(1)] == [[0], [0], [1], [1]]
    assert [starts(None), starts(None, 2)] == [[2], [2, 3]]  # ranks, say: none hears of the others
    assert pickle.loads(pickle.dumps(dataset))._passes.begin(1) == 2
    assert [starts(0, 3), starts(1, 3)] == [[2, 3, 4], [2, 3, 4]]
    dataset.set_epoch(1)
    assert [starts(0), starts(1), dataset._passes.begin(1)] == [[1], [1], 2]


def test_more_workers_than_batches_is_no_mistake(store: StoredChips) -> None:
    loader = DataLoader(
        ChipDataset(store.stream(60)), batch_size=None, num_workers=2, multiprocessing_context=forkserver()
    )
    assert ids(loader) == [tuple(store.table.column("chip_id").to_pylist())]


@pytest.mark.parametrize("size", [1, 3])
def test_whole_batches_are_not_batched_again(store: StoredChips, size: int) -> None:
    told = r"whole batches into one; expected batch_size=None. Say DataLoader\(dataset, batch_size=None\)"
    for dataset in (ChipDataset(store.stream(7)), ChipDataset(store.stream(7), transforms=dict)):
        with pytest.raises(rd.PlanError, match=told):
            next(iter(DataLoader(dataset, batch_size=size)))
        batch = next(iter(dataset))
        (loaded,) = [found for found, _ in zip(DataLoader(dataset, batch_size=None), range(1), strict=False)]
        assert loaded.keys() == batch.keys()
        assert isinstance(pickle.loads(pickle.dumps(loaded)), dict)


SCRIPT = """
import multiprocessing, sys
from torch.utils.data import DataLoader
import rasteret_dask as rd
from rasteret_dask.torchdata import ChipDataset, ChipStore

if __name__ == "__main__":
    chips = rd.open_chips(sys.argv[1])
    batches = DataLoader(ChipDataset(chips.stream(7, shuffle=3)), batch_size=None, num_workers=2)
    print(sorted(chip for batch in batches for chip in batch["chip_id"]) == sorted(chips))
    print(multiprocessing.get_start_method())
"""


@pytest.mark.slow  # three processes import torch and all the rest
def test_workers_start_as_people_type_it(store: StoredChips, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, str(tmp_path / "script.py"), store.stored.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "forkserver"]


def test_a_start_that_somebody_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    monkeypatch.setattr("multiprocessing.set_start_method", chosen.append)
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["fork", "spawn", "forkserver"])
    for method, wanted in (("fork", []), ("spawn", []), (None, ["forkserver"])):
        monkeypatch.setattr("multiprocessing.get_start_method", lambda allow_none=False, m=method: m)
        choose_start()
        assert chosen == wanted
    chosen.clear()
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["forkserver", "spawn", "fork"])
    choose_start()
    assert not chosen


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forks_are_refused(store: StoredChips) -> None:
    for dataset, size in ((ChipDataset(store.stream(7)), None), (ChipStore(store), 2)):
        loader = DataLoader(dataset, batch_size=size, num_workers=1, multiprocessing_context="fork")
        with pytest.raises(RuntimeError, match=r'forkserver\(\), or "spawn"'):
            next(iter(loader))


def test_a_state_goes_on_at_the_next_batch(store: StoredChips) -> None:
    def dataset() -> ChipDataset:
        return ChipDataset(store.stream(7, shuffle=3))

    first = dataset()
    both = [ids(first), ids(first)]
    second, third = dataset(), dataset()
    loader = iter(DataLoader(second, batch_size=None))
    begun = ids([next(loader) for _ in range(4)])
    state = pickle.loads(pickle.dumps(second.state_dict()))
    third.load_state_dict(state)
    assert third.state_dict() == state
    assert [begun + ids(third), ids(third)] == both
    fourth = dataset()
    fourth.load_state_dict(first.state_dict())  # at its end: the next pass
    assert ids(fourth) == ids(store.stream(7, shuffle=3, epochs=3))[-len(first) :]
    loader = iter(DataLoader(second, batch_size=None))
    batches = ids([next(loader) for _ in range(9)])  # all, but nobody asked for more
    fifth = dataset()
    fifth.load_state_dict(second.state_dict())
    assert [batches, ids(fifth), ids(fifth)] == [both[1], [], ids(store.stream(7, shuffle=3, epochs=3))[-9:]]
    with pytest.raises(rd.PlanError, match="shuffle=3"):
        ChipDataset(store.stream(7, shuffle=4)).load_state_dict(state)
    other = ChipDataset(store.stream(4, shuffle=3))  # batches of another size
    other.load_state_dict(state)
    assert sorted(chip for batch in begun + ids(other) for chip in batch) == sorted(
        c for b in both[0] for c in b
    )
    for wrong in ({"epoch": 1}, {"stop": None, "stream": None}, None):
        with pytest.raises(rd.PlanError, match="state_dict"):
            dataset().load_state_dict(wrong)  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata calls it
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("taken", [8, 9, 10])
def test_torchdata_resumes_at_the_end_of_a_pass(store: StoredChips, workers: int, taken: int) -> None:
    """One worker is done and the other is not; all batches are there; the loop has ended."""
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")
    context = forkserver() if workers else None

    def loader() -> Any:
        dataset = ChipDataset(store.stream(7, shuffle=3))
        return stateful.StatefulDataLoader(
            dataset, batch_size=None, num_workers=workers, multiprocessing_context=context
        )

    first, second = loader(), loader()
    batches = iter(first)
    begun = ids(batch for _, batch in zip(range(taken), batches, strict=False))
    second.load_state_dict(first.state_dict())
    epochs = ids(store.stream(7, shuffle=3, epochs=2))
    passes = [begun] if taken == 10 else [begun + ids(second)]
    passes += [ids(second)]
    assert [sorted(found) for found in passes] == [sorted(epochs[:9]), sorted(epochs[9:])]


def test_a_worker_s_state_is_none_of_a_stream(store: StoredChips) -> None:
    stream = store.stream(7, shuffle=3)
    part = stream.with_order(_Run(**values_of(stream.order), worker=1, workers=2))
    with pytest.raises(rd.PlanError, match="state_dict"):
        stream.load_state_dict(part.state_dict())
    assert next(stream)["chip_id"].tolist() == list(ids(store.stream(7, shuffle=3))[0])


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")  # torchdata calls it
def test_workers_resume_with_torchdata(store: StoredChips) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="needs torchdata")

    def loader() -> Any:
        return stateful.StatefulDataLoader(
            ChipDataset(store.stream(7, shuffle=3)),
            batch_size=None,
            num_workers=2,
            multiprocessing_context=forkserver(),
        )

    first = loader()
    batches = iter(first)
    for _ in range(3):
        next(batches)
    state = first.state_dict()
    rest = ids(batches)
    second = loader()
    second.load_state_dict(state)
    assert ids(second) == rest
    assert len(rest) == len(store.stream(7)) - 3
    assert sorted(ids(second)) == sorted(ids(store.stream(7, shuffle=3, epochs=2))[9:])  # the next pass
    third = ChipDataset(store.stream(7, shuffle=3))
    third.load_state_dict({**third.state_dict(), "stream": store.stream(7, shuffle=3).state_dict()})
    with pytest.raises(RuntimeError, match="StatefulDataLoader with the same num_workers"):
        list(DataLoader(third, batch_size=None, num_workers=1, multiprocessing_context=forkserver()))


def test_ranks_divide_an_undivided_stream(store: StoredChips) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=1, world_size=3)
    try:
        found = ids(ChipDataset(store.stream(7, shuffle=3)))
        given = ids(ChipDataset(store.stream(7, shuffle=3, rank=0, world_size=2)))
    finally:
        torch.distributed.destroy_process_group()
    assert found == ids(store.stream(7, shuffle=3, rank=1, world_size=3))
    assert given == ids(store.stream(7, shuffle=3, rank=0, world_size=2))


def first_band(sample: dict[str, Any]) -> dict[str, Any]:
    return {"image": sample["image"][..., :1, :, :].float(), "chip_id": sample["chip_id"]}


def test_a_store_answers_by_number(store: StoredChips) -> None:
    dataset = ChipStore(store)
    chip = store.table.column("chip_id").to_pylist()
    assert len(dataset) == 60
    wanted = store.take([chip[4], chip[59], chip[4]])
    for at, number in enumerate((4, -1, 4)):
        one = dataset[number]
        assert one["chip_id"] == chip[number]
        for name, values in wanted.items():
            if values.dtype != object:
                np.testing.assert_array_equal(one[name].numpy(), values[at].astype(one[name].numpy().dtype))
    for number in (60, -61):
        with pytest.raises(IndexError, match="the store has 60"):
            dataset[number]
    assert len(pickle.dumps(dataset)) < 2000
    stats = store.stats()
    wanted = stats.normalize(wanted)
    for normalize in (True, stats, stats.normalize):
        found = ChipStore(store, normalize=normalize)[4]["optical"]
        np.testing.assert_array_equal(found.numpy(), wanted["optical"][0])
    loader = DataLoader(ChipStore(store, image="optical", transforms=first_band), batch_size=16, shuffle=True)
    batches = list(loader)
    assert sorted(i for b in batches for i in b["chip_id"]) == sorted(chip)
    assert batches[0]["image"].shape == (16, 3, 1, SIZE, SIZE)


@pytest.mark.slow
def test_a_store_opens_in_workers(store: StoredChips) -> None:
    loader = DataLoader(
        ChipStore(store, image="optical", transforms=first_band), batch_size=16, num_workers=2,
        multiprocessing_context="spawn",
    )  # fmt: skip
    assert [i for b in loader for i in b["chip_id"]] == store.table.column("chip_id").to_pylist()


def test_a_network_learns_from_it(s2: rd.Collection) -> None:
    import geopandas as gpd

    optical = s2.harmonize(bands=["red", "nir"], time="3MS", pick="median", mask="clouds")
    ground = optical.chips(SIZE, cell_km=0.64).to_geopandas().to_crs(32633)
    fields = gpd.GeoDataFrame(
        {"crop": ["a", "b"] * 40}, geometry=ground.geometry.iloc[:80].buffer(-40), crs=32633
    )
    chips = optical.chips(SIZE, cell_km=0.64, labels=fields, rasterize="crop")
    torch.manual_seed(0)
    model = torch.nn.Conv2d(2, 3, 3, padding=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for batch in ChipDataset(chips.stream(32, shuffle=0, epochs=4, drop_last=True), image="s2"):
        loss = torch.nn.functional.cross_entropy(model(batch["image"].nan_to_num()), batch["mask"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_mistakes_are_told_where_they_are_made(chips: rd.Chips, store: StoredChips) -> None:
    with pytest.raises(rd.PlanError, match=r"chips\.stream\(batch_size=\.\.\.\)"):
        ChipDataset(chips)  # type: ignore[arg-type]
    with pytest.raises(rd.PlanError, match="use ChipDataset"):
        ChipStore(chips)  # type: ignore[arg-type]
    for make in (
        lambda: ChipStore(store, image="radar"),
        lambda: ChipDataset(store.stream(7), image="radar"),
    ):
        with pytest.raises(rd.PlanError, match="one of optical, embeddings"):
            make()
    with pytest.raises(rd.PlanError, match="what stats"):
        ChipStore(store, normalize="std")  # type: ignore[arg-type]
    stats = store.stats()
    own = stats["optical"]
    others = replace(stats, sources={**stats.sources, "optical": replace(own, bands=own.bands[::-1])})
    for normalize in (others, others.normalize):
        with pytest.raises(rd.PlanError, match="nir, red"):
            ChipStore(store, normalize=normalize)
    begun = store.stream(7)
    next(begun)
    with pytest.raises(rd.PlanError, match=r"dataset\.load_state_dict"):
        ChipDataset(begun)
    begun.close()


def test_a_client_stays_where_it_is(store: StoredChips) -> None:
    from distributed import Client

    with Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=":0") as client:
        dataset = ChipDataset(store.stream(30, client=client))
        assert len(list(dataset)) == 2
        loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="spawn")
        with pytest.raises(rd.PlanError, match=r"client\.scheduler\.address"):
            next(iter(loader))
