"""Statistics: NumPy's over what load gives, whatever the shards, the cluster or the store."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dask.callbacks import Callback
from distributed import Client, LocalCluster
from numpy.typing import NDArray
from small_stores import nodes, small, written
from streams import assert_same
from test_sketch import agree, same

import rasteret_dask as rd
from rasteret_dask.errors import PlanError, ReadError, SchemaError
from rasteret_dask.statistics.measuring import measured
from rasteret_dask.statistics.stats import Stats
from rasteret_dask.storeset import open_chips
from rasteret_dask.streams.planned import planned
from rasteret_dask.streams.stream import Batching
from rasteret_dask.tasks.batches import arrays_of
from rasteret_dask.tasks.context import ReadContext


@pytest.fixture(scope="module")
def joined(s2: rd.Collection, aef: rd.Collection) -> rd.Chips:
    optical = s2.harmonize(
        bands=["red", "nir"], units="reflectance", resolution=10, time="1MS", mask="clouds", dtype="uint16"
    )
    classes = s2.harmonize(bands=["scl"], resolution=10, time="1MS")
    vectors = aef.harmonize(bands=["A00", "A01"], units="embedding")
    chips = rd.join(optical=optical, classes=classes, embeddings=vectors).chips(size=32, cell_km=0.96)
    return chips.split(train=0.6, val=0.2, test=0.2, seed=42)


@pytest.fixture(scope="module")
def store(joined: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(joined, tmp_path_factory.mktemp("stats") / "store")


def valid_values(dataset: Any, band: int) -> NDArray[Any]:
    pixels = dataset["pixels"].values[:, :, band]
    whole = dataset["pixels"].values
    good = np.isfinite(whole).all(axis=2) if whole.dtype.kind == "f" else dataset["valid"].values
    return np.asarray(pixels[good])


@pytest.mark.parametrize("split", ["train", "val"])
def test_they_are_numpy_s_over_load(joined: rd.Chips, split: str) -> None:
    chips = joined.select(split)
    layout = small(chips)
    found = measured(planned(layout.job, layout.outputs, ReadContext()))
    assert found.chips == len(chips)
    for name, dataset in nodes(chips.load()).items():
        own = found[name]
        assert own.bands == tuple(dataset["band"].values.tolist())
        for band in range(len(own.bands)):
            agree(own, band, valid_values(dataset, band), dataset["pixels"].values[:, :, band].size)
    scl = nodes(chips.load())["classes"]
    values, counts = np.unique(valid_values(scl, 0), return_counts=True)
    assert found["classes"].classes["scl"] == dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert found["embeddings"].classes == {}


def test_the_size_of_shards_does_not_matter(joined: rd.Chips) -> None:
    chips = joined.select("train")
    one = chips.stats()
    layout = small(chips)
    many = measured(planned(layout.job, layout.outputs, ReadContext()))
    assert len(list(layout.job.shards())) > 16  # so that the tree has two levels
    same(one, many)


# Where they come from, and stay


def test_a_cluster_finds_the_same(joined: rd.Chips, store: str) -> None:
    chips = joined.select("test")
    wanted = chips.stats()
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as client,
    ):
        same(chips.stats(client=client), wanted)
        same(open_chips(store).select("test").stats(client=cluster.scheduler_address), wanted)


def test_a_store_measures_once_and_remembers(store: str, joined: rd.Chips, tmp_path: Path) -> None:
    place = tmp_path / "store"
    shutil.copytree(store, place)
    opened = open_chips(place).select("train")
    found = opened.stats()
    same(found, joined.select("train").stats())
    some = opened.stats(sample=9)
    assert some.chips == 9
    same(some, opened.sample(9).stats())
    for shard in place.glob("train/*/pixels/c/*/0/0/0/0"):
        shard.unlink()
    same(opened.stats(), found)
    same(joined.select("train").stats(sample=9), some)


def test_they_are_saved_whole(joined: rd.Chips, tmp_path: Path) -> None:
    found = joined.select("val").stats()
    found.save(tmp_path / "stats.json")
    again = Stats.load(tmp_path / "stats.json")
    same(found, again)
    assert repr(again) == repr(found)
    assert "embeddings" in repr(found)
    with pytest.raises(ReadError, match=r"none\.json.*nothing"):
        Stats.load(tmp_path / "none.json")


def old(text: str) -> bytes:
    """Return statistics as they were written before there were versions of them."""
    said = json.loads(text)
    del said["version"]
    for own in said["sources"].values():
        del own["units"], own["by_value"]
    return json.dumps(said).encode()


@pytest.mark.parametrize(
    "damaged",
    [
        lambda text: text.encode()[: len(text) // 2],
        lambda text: b"",
        lambda text: b"\xff\xfe not text",
        lambda text: b'{"chips": 3}',
        lambda text: b"[1, 2]",
        lambda text: text.replace('"sources": {', '"sources": [], "were": {').encode(),
        lambda text: text.replace("eJ", "eK").encode(),
        lambda text: text.replace('"by_value": [', '"by_value": [true, ').encode(),
        old,
    ],
)
def test_damaged_ones_are_measured_anew(store: str, tmp_path: Path, damaged: Callable[[str], bytes]) -> None:
    chips = open_chips(store).sample(3)
    wanted = chips.stats()
    place = Path(store) / "_job" / "stats" / f"{chips.digest}.json"
    text = place.read_text()
    place.write_bytes(damaged(text))
    with pytest.raises(SchemaError, match=rf"{chips.digest}.json.*what Stats.save.*Measure again"):
        Stats.load(place)
    same(chips.stats(), wanted)
    assert place.read_text() == text


def test_normalized_bands_have_mean_0_and_spread_1(joined: rd.Chips) -> None:
    chips = joined.select("val")
    stats = chips.stats()
    arrays = arrays_of(nodes(chips.load()))
    made = stats.normalize(arrays)
    for name in ("optical", "embeddings"):
        values = made[name].astype(np.float64)
        assert made[name].dtype == np.float32
        np.testing.assert_allclose(np.nanmean(values, axis=(0, 1, 3, 4)), 0, atol=1e-5)
        np.testing.assert_allclose(np.nanstd(values, axis=(0, 1, 3, 4)), 1, atol=1e-5)
        np.testing.assert_array_equal(~np.isnan(values).any(axis=2), arrays[f"{name}/valid"])
    assert made["chip_id"] is arrays["chip_id"]
    filled = stats.normalize(arrays, nan=0)
    assert not np.isnan(filled["optical"]).any()
    assert (filled["optical"][~np.isfinite(made["optical"])] == 0).all()


def test_masks_are_counted(s2: rd.Collection, tmp_path: Path) -> None:
    bare = s2.harmonize(bands=["red"], time="1MS").chips(32, cell_km=0.96)
    fields = bare.to_geopandas()[["geometry"]].iloc[::3]
    fields["crop"] = ["rye", "oats", "flax"] * (len(fields) // 3) + ["rye"] * (len(fields) % 3)
    chips = s2.harmonize(bands=["red"], time="1MS").chips(32, cell_km=0.96, labels=fields, rasterize="crop")
    chips = chips.sample(40)
    layout = small(chips)
    mask = nodes(chips.load())[""]["mask"].values
    numbers, pixels = np.unique(mask, return_counts=True)
    assert len(numbers) == 4
    place = written(chips, tmp_path / "store")
    for found in (measured(planned(layout.job, layout.outputs, ReadContext())), open_chips(place).stats()):
        assert found["s2/mask"].bands == ("mask",)
        assert found["s2/mask"].total == mask.size
        assert found["s2/mask"].classes == {"mask": dict(zip(numbers.tolist(), pixels.tolist(), strict=True))}
    batch = next(open_chips(place).stream(40, normalize=True))
    np.testing.assert_array_equal(np.sort(batch["s2/mask"].ravel()), np.sort(mask.ravel()))


# Where they belong


def as_read(chips: rd.Chips) -> list[Callable[..., Any]]:
    """Return the streams of some chips, planned and stored."""
    layout = small(chips)
    reading = planned(layout.job, layout.outputs, ReadContext())
    return [chips.stream, lambda n, **more: Batching(n, **more).stream(reading)]


def test_statistics_of_other_bands_are_refused(s2: rd.Collection, tmp_path: Path) -> None:
    def chips(*bands: str) -> rd.Chips:
        return s2.harmonize(bands=list(bands), time="1MS").chips(32, cell_km=0.96).sample(6)

    stats = chips("red", "nir").stats()
    for others in (chips("nir", "red"), chips("red"), chips("red", "green")):
        for stream in as_read(others):
            for given in (stats, stats.normalize, partial(stats.normalize, nan=0)):
                with pytest.raises(PlanError, match=r"bands .* expected the bands red, nir .*train split"):
                    stream(4, normalize=given)
    others = chips("nir", "red")
    others.save_plan(tmp_path / "plan")
    with pytest.raises(PlanError, match=r"found bands nir, red"):
        rd.stream_from(None, tmp_path / "plan", 4, normalize=stats)
    place = written(others, tmp_path / "store")
    with pytest.raises(PlanError, match=r"found bands nir, red"):
        open_chips(place).stream(4, normalize=stats)
    for stream in as_read(chips("red", "nir")):
        assert np.nanstd(next(stream(6, normalize=stats))["s2"]) == pytest.approx(1, abs=1e-5)


def doubled(pixels: Any) -> Any:
    return pixels * 2


def test_statistics_of_other_units_are_refused(s2: rd.Collection, tmp_path: Path) -> None:
    def chips(**how: Any) -> rd.Chips:
        return s2.harmonize(bands=["red"], time="1MS", **how).chips(32, cell_km=0.96).sample(6)

    raw, dn = chips(units="raw"), chips(units="reflectance", dtype="uint16")
    reflectance = chips(units="reflectance")
    dn_store = open_chips(written(dn, tmp_path / "dn"))
    for wrong, chosen, said in (
        (raw, dn, "'reflectance'.*'raw'"),
        (dn, raw, "'raw'.*'reflectance'"),
        (reflectance, dn, "uint16 pixels.*float32 pixels"),
        (dn, reflectance, "float32 pixels.*uint16 pixels"),
    ):
        stored = open_chips(written(wrong, tmp_path / f"{len(list(tmp_path.iterdir()))}"))
        for stats in (wrong.stats(), stored.stats(), Stats.from_json(wrong.stats().to_json())):
            with pytest.raises(PlanError, match=said):
                chosen.stream(4, normalize=stats)
            if chosen is dn:
                with pytest.raises(PlanError, match=said):
                    dn_store.stream(4, normalize=stats)
    unknown = dn.map(doubled)  # what a function's results are measured in, nobody knows
    assert unknown.stats()["s2"].units == ""
    assert len(unknown.stream(4, normalize=dn.stats())) == 2


def test_ranks_of_a_process_measure_once(s2: rd.Collection, tmp_path: Path) -> None:
    chips = s2.harmonize(bands=["red"], time="1MS").chips(32, cell_km=0.96).sample(12).map(noted, version="1")
    seen.clear()
    first = next(chips.stream(12, normalize=True))
    measured_and_read = seen.total()
    assert measured_and_read == 2 * len(chips)
    again = [chips.stream(6, normalize=True, rank=rank, world_size=2) for rank in (0, 1)]
    assert seen.total() == measured_and_read
    both = [next(stream)["s2"] for stream in again]
    np.testing.assert_array_equal(np.concatenate(both), first["s2"])
    before = seen.total()
    chips.stats()  # who asks for it has it measured
    assert seen.total() == before + len(chips)
    place = Path(written(chips, tmp_path / "store"))
    opened = open_chips(place)
    wanted = next(opened.stream(12, normalize=True))
    shutil.rmtree(place / "_job" / "stats")
    assert_same(next(open_chips(place).stream(12, normalize=True)), wanted)
    assert not (place / "_job" / "stats").exists()


seen: Counter[str] = Counter()
"""How many chips :func:`noted` has seen."""


def noted(pixels: Any) -> Any:
    if pixels.notnull().any():  # pixels that were read, not the zeros that say what comes out
        seen["chips"] += pixels.sizes["chip"] if float(pixels.max()) else 0
    return pixels


def test_no_two_measurements_share_a_task(joined: rd.Chips) -> None:
    layout = small(joined.select("test"))
    names: dict[str, set[str]] = {}
    for how in ("raise", "mask"):
        own = names.setdefault(how, set())
        with Callback(pretask=lambda key, *_, own=own: own.add(key)):
            measured(planned(layout.job, layout.outputs, ReadContext(on_error=how)))
    assert len(names["raise"]) == len(names["mask"]) > 3
    assert names["raise"].isdisjoint(names["mask"])


def test_mistakes_are_told(joined: rd.Chips, store: str) -> None:
    stats = open_chips(store).stats(sample=3)
    with pytest.raises(PlanError, match=r"source 'radar'.*one of optical, classes, embeddings"):
        stats["radar"]
    with pytest.raises(PlanError, match=r"percentile.*found 120; expected 0 to 100"):
        stats["optical"].percentile(120)
    arrays = {"optical": np.zeros((1, 1, 3, 2, 2), np.float32)}
    with pytest.raises(PlanError, match=r"found 3 bands; expected the 2 bands"):
        stats.normalize(arrays)
    with pytest.raises(PlanError, match=r"client=.*found 3"):
        joined.stats(client=3)  # type: ignore[arg-type]
