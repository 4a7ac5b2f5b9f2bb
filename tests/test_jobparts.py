"""A store written from a plan by blocks, part by part: the store of the plan in one piece, byte for byte."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from distributed import Client, LocalCluster
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from waiting import until

import rasteret_dask as rd
from rasteret_dask import chipblocks
from rasteret_dask.chipping import blocks, frame
from rasteret_dask.demo.world import World
from rasteret_dask.tasks import freezing
from rasteret_dask.tasks.jobparts import parts_of

pytestmark = pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")

SMALL = {(frame, "BLOCK_PX"): 96, (blocks, "BLOCK_PX"): 96, (freezing, "BLOCK_PX"): 96, (freezing, "SHARD_CHIPS"): 5,
         (chipblocks, "PART_CHIPS"): 60}  # fmt: skip
"""So that a small world has several blocks, shards and parts."""


def shrink(patch: pytest.MonkeyPatch) -> None:
    for (module, name), value in SMALL.items():
        patch.setattr(module, name, value)


def plan(s2: rd.Collection, l8: rd.Collection) -> rd.Chips:
    """Return chips of two sources, with a rule on pixels."""
    source = rd.join(
        s2=s2.harmonize(["red", "nir"], time="1MS", dtype="uint16", mask="clouds"),
        l8=l8.harmonize(["red"], resolution=10, time="1MS"),
    )
    return source.chips(16, cell_km=0.64).split(0.6, 0.2, 0.2).filter_pixels(min_valid=0.1)


def contents(store: Path) -> dict[str, str]:
    """Return path -> digest of all that readers of a store see, but for the manifest: see :func:`rows`."""
    files = (path for path in store.rglob("*") if path.is_file() and "_job" not in path.parts)
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "manifest.parquet"
    }


def rows(store: Path) -> list[dict[str, object]]:
    """Return what the manifest says of each shard, but for who wrote it and what that took."""
    names = [
        "shard",
        "split",
        "number",
        "chips",
        "kept",
        "dropped_chips",
        "bytes",
        "objects",
        "unreadable",
        "key",
    ]
    return list(pq.read_table(store / "manifest.parquet").select(names).to_pylist())


@given(
    counts=st.dictionaries(st.sampled_from(["train", "val", "test"]), st.integers(1, 500), min_size=1),
    per_shard=st.integers(1, 20), size=st.integers(1, 300),
)  # fmt: skip
def test_every_shard_is_in_one_part(counts: dict[str | None, int], per_shard: int, size: int) -> None:
    parts = parts_of(counts, per_shard, size)
    for split, count in counts.items():
        spans = [span for part in parts for span in part if span.split == split]
        chips = [chip for span in spans for chip in range(span.start, span.stop)]
        assert chips == list(range(count))
        assert all(span.start == min(span.first * per_shard, count) for span in spans)
        assert all(span.stop % per_shard == 0 or span.stop == count for span in spans)


def test_a_store_of_parts_is_the_store_of_the_plan_in_one_piece(
    s2: rd.Collection, l8: rd.Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shrink(monkeypatch)
    chips = plan(s2, l8)
    chips.to_zarr(tmp_path / "one.zarr", progress=False)
    planned = chips.by_blocks(tmp_path / "plan", progress=False, windows=40)
    assert len(list((tmp_path / "plan").glob("*.arrow"))) > 5
    planned.to_zarr(tmp_path / "parts.zarr", progress=False)
    assert len(list((tmp_path / "plan").glob("job-*/*"))) > 2
    assert contents(tmp_path / "parts.zarr") == contents(tmp_path / "one.zarr")
    assert rows(tmp_path / "parts.zarr") == rows(tmp_path / "one.zarr")
    assert rd.verify(tmp_path / "parts.zarr").ok
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "parts.zarr").rglob("*")}
    planned.to_zarr(tmp_path / "parts.zarr", progress=False)  # it is finished
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "parts.zarr").rglob("*")} == before


STEPS = st.one_of(
    st.tuples(st.just("select"), st.sampled_from([("train",), ("val", "test"), ("train", "val")])),
    st.tuples(st.just("filter"), st.sampled_from([("col", ">", 2445), ("coverage", ">", 0.99), ("cell", "!=", "")])),
    st.tuples(st.just("sample"), st.sampled_from([(40, 0), (70, 1)])),
)  # fmt: skip


@pytest.fixture(scope="module")
def halves(
    s2: rd.Collection, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[rd.Chips, rd.ChipBlocks[rd.Chips]]]:
    """Return the same chips, planned in one piece and by blocks, in small shards and parts."""
    chips = s2.harmonize(["red"], time="3MS", dtype="uint16", pick="median").chips(16, cell_km=0.64)
    chips = chips.split(0.5, 0.3, 0.2)
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        yield chips, chips.by_blocks(tmp_path_factory.mktemp("halves"), progress=False, windows=60)


@settings(max_examples=6, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(steps=st.lists(STEPS, min_size=1, max_size=3))
def test_what_is_chosen_lazily_is_written_as_in_one_piece(
    halves: tuple[rd.Chips, rd.ChipBlocks[rd.Chips]],
    tmp_path_factory: pytest.TempPathFactory,
    steps: list[tuple[str, tuple[Any, ...]]],
) -> None:
    folder = tmp_path_factory.mktemp("chosen")
    chips, blocks = halves
    for name, values in steps:
        chips, blocks = getattr(chips, name)(*values), getattr(blocks, name)(*values)
    if not len(blocks):
        with pytest.raises(rd.PlanError) as in_one:
            chips.to_zarr(folder / "one.zarr", progress=False)
        with pytest.raises(rd.PlanError) as in_blocks:
            blocks.to_zarr(folder / "parts.zarr", progress=False)
        assert str(in_blocks.value) == str(in_one.value)
        return
    blocks.to_zarr(folder / "parts.zarr", progress=False)
    chips.to_zarr(folder / "one.zarr", progress=False)
    assert contents(folder / "parts.zarr") == contents(folder / "one.zarr")
    assert rows(folder / "parts.zarr") == rows(folder / "one.zarr")
    assert rd.verify(folder / "parts.zarr").ok
    assert len(rd.open_chips(folder / "parts.zarr")) == len(chips)


def test_a_cluster_writes_the_same_and_a_killed_client_leaves_what_another_goes_on_with(
    small_world: World, s2: rd.Collection, l8: rd.Collection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import pytest, rasteret_dask as rd
from test_jobparts import plan, shrink
shrink(pytest.MonkeyPatch())
dates = ("2024-04-01", "2024-06-30")
s2 = rd.build_from_stac({str(small_world.sentinel2)!r}, name="s2", date_range=dates)
l8 = rd.build_from_stac({str(small_world.landsat)!r}, name="l8", date_range=dates)
blocks = plan(s2, l8).by_blocks({str(tmp_path / "plan")!r}, progress=False, windows=40)
blocks.to_zarr({str(tmp_path / "parts.zarr")!r}, progress=False)
"""
    done = tmp_path / "parts.zarr" / "_job" / "done"
    with subprocess.Popen([sys.executable, "-W", "ignore", "-c", code]) as client:
        until(lambda: done.is_dir() and len(list(done.iterdir())) >= 3)
        client.kill()
    assert not (tmp_path / "parts.zarr" / "zarr.json").exists()
    whole = {path: path.stat().st_mtime_ns for path in done.glob("*.json")}
    shrink(monkeypatch)
    chips = plan(s2, l8)
    planned = chips.by_blocks(tmp_path / "plan", progress=False, windows=40)
    with (
        LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=":0") as cluster,
        Client(cluster) as writers,
    ):
        planned.to_zarr(tmp_path / "parts.zarr", client=writers, progress=False)
    assert {path: path.stat().st_mtime_ns for path in whole} == whole
    chips.to_zarr(tmp_path / "one.zarr", progress=False)
    assert contents(tmp_path / "parts.zarr") == contents(tmp_path / "one.zarr")
    assert rows(tmp_path / "parts.zarr") == rows(tmp_path / "one.zarr")
