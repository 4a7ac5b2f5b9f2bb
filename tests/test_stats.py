"""Statistics: NumPy's over what load gives, whatever the shards, the cluster or the store."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import Client, LocalCluster
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_stores import nodes, small, written

import rasteret_dask as rd
from rasteret_dask.errors import PlanError, SchemaError
from rasteret_dask.statistics.measuring import measured
from rasteret_dask.statistics.sketch import SourceStats
from rasteret_dask.statistics.stats import Stats, measure, merged
from rasteret_dask.storeset import open_chips
from rasteret_dask.streams.planned import planned
from rasteret_dask.tasks.batches import arrays_of

PERCENT = (0, 0.1, 1, 2, 25, 50, 75, 98, 99.9, 100)
OFF = 2.0**-8


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
    return np.asarray(pixels[np.isfinite(pixels) if pixels.dtype.kind == "f" else dataset["valid"].values])


def agree(own: SourceStats, band: int, values: NDArray[Any], total: int) -> None:
    """Compare one band with NumPy."""
    assert own.count[band] == values.size
    assert own.valid_fraction[band] == pytest.approx(values.size / total)
    assert (own.min[band], own.max[band]) == (values.min(), values.max())
    assert own.mean[band] == pytest.approx(values.mean(dtype=np.float64), rel=1e-12)
    assert own.std[band] == pytest.approx(values.std(dtype=np.float64), rel=1e-9)
    for q in PERCENT:
        wanted = float(np.percentile(values, q, method="inverted_cdf"))
        assert own.percentile(q)[band] == pytest.approx(wanted, rel=0 if own.exact else OFF, abs=1e-12)


@pytest.mark.parametrize("split", ["train", "val"])
def test_they_are_numpy_s_over_load(joined: rd.Chips, split: str) -> None:
    chips = joined.select(split)
    layout = small(chips)
    found = measured(planned(layout.job, layout.outputs, {}))
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
    many = measured(planned(layout.job, layout.outputs, {}))
    assert len(list(layout.job.shards())) > 16  # so that the tree has two levels
    same(one, many)


def same(one: Stats, other: Stats) -> None:
    assert one.chips == other.chips
    for name, own in one.sources.items():
        theirs = other[name]
        assert (own.bands, own.dtype, own.total) == (theirs.bands, theirs.dtype, theirs.total)
        for field in ("count", "min", "max"):
            np.testing.assert_array_equal(getattr(own, field), getattr(theirs, field))
        for field in ("mean", "std"):
            np.testing.assert_allclose(getattr(own, field), getattr(theirs, field), rtol=1e-12)
        for (numbers, counts), (others, theirs_) in zip(own.buckets, theirs.buckets, strict=True):
            np.testing.assert_array_equal(numbers, others)
            np.testing.assert_array_equal(counts, theirs_)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["float32", "float64", "uint8", "int8", "uint16", "int16", "int32"]),
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 12), max_size=3),
)
def test_parts_add_up_to_the_whole(dtype: str, seed: int, cuts: list[int]) -> None:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        pixels = (rng.normal(size=(12, 2, 3, 4, 5)) * 10.0 ** rng.integers(-6, 6)).astype(dtype)
        pixels[rng.random(pixels.shape) < 0.2] = np.nan
    else:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        pixels = rng.integers(low, high, (12, 2, 3, 4, 5), dtype=dtype, endpoint=True)
    valid = rng.random((12, 2, 4, 5)) < 0.7
    arrays = {"a": pixels, "a/valid": valid, "chip_id": np.arange(12).astype(str).astype(object)}
    bands = {"a": ("x", "y", "z")}
    whole = measure(arrays, bands)
    edges = [0, *sorted(cuts), 12]
    parts = [measure({k: v[a:b] for k, v in arrays.items()}, bands) for a, b in itertools.pairwise(edges)]
    same(whole, merged(parts))
    same(whole, merged(parts[::-1]))
    for band in range(3):
        layer = pixels[:, :, band]
        agree(
            whole["a"],
            band,
            layer[np.isfinite(layer)] if layer.dtype.kind == "f" else layer[valid],
            layer.size,
        )


def test_bands_without_a_valid_pixel_say_so() -> None:
    arrays = {
        "a": np.full((2, 1, 1, 3, 3), np.nan, np.float32),
        "a/valid": np.zeros((2, 1, 3, 3), bool),
        "chip_id": np.array(["p", "q"], dtype=object),
    }
    own = measure(arrays, {"a": ("x",)})["a"]
    assert own.count.tolist() == [0]
    assert own.valid_fraction.tolist() == [0]
    assert np.isnan([own.mean, own.std, own.min, own.max, own.percentile(50)]).all()


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
    (tmp_path / "stats.json").write_text('{"chips": 3}')
    with pytest.raises(SchemaError, match=r"stats.json.*what Stats.save wrote"):
        Stats.load(tmp_path / "stats.json")


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
    filled = stats.normalize(arrays, fill=0)
    assert not np.isnan(filled["optical"]).any()
    assert (filled["optical"][~np.isfinite(made["optical"])] == 0).all()


def test_mistakes_are_told(joined: rd.Chips, store: str) -> None:
    stats = open_chips(store).stats(sample=3)
    with pytest.raises(PlanError, match=r"source 'radar'.*one of optical, classes, embeddings"):
        stats["radar"]
    with pytest.raises(PlanError, match=r"percentile.*found 120; expected 0 to 100"):
        stats["optical"].percentile(120)
    arrays = {"optical": np.zeros((1, 1, 3, 2, 2), np.float32)}
    with pytest.raises(PlanError, match=r"found 3 bands; expected the 2"):
        stats.normalize(arrays)
    with pytest.raises(PlanError, match=r"client=.*found 3"):
        joined.stats(client=3)  # type: ignore[arg-type]
