# SPDX-License-Identifier: Apache-2.0
"""Targets in statistics: classes, masks and label columns are counted, weighted, added up, and never scaled."""

from __future__ import annotations

from collections import Counter
from functools import reduce
from itertools import pairwise
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_stores import written
from test_sketch import same

import rasteret_dask as rd
from rasteret_dask.errors import PlanError
from rasteret_dask.planning.bandkinds import BandKind
from rasteret_dask.statistics import labelcounts
from rasteret_dask.statistics.labelcounts import LabelCounts
from rasteret_dask.statistics.stats import Stats, measure
from rasteret_dask.tasks.batches import Arrays, MaskPixels, SourcePixels

NAMES = ((0, "water"), (1, "crop"), (2, "forest"), (7, "bog"))
PIXELS = {
    "optical": SourcePixels(
        ("red", "nir"),
        "float32",
        "reflectance",
        (MaskPixels("mask", "uint8", ("no", "yes")),),
        (BandKind("reflectance"),) * 2,
    ),
    "cover": SourcePixels(("cover",), "uint8", "", (), (BandKind("class", NAMES),)),
}


def drawn(seed: int, chips: int) -> Arrays:
    """Return made-up chips: two sources, a mask, a source that some lack, and label columns of several types."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(2, 3, (chips, 2, 2, 4, 4)).astype(np.float32)
    pixels[rng.random(pixels.shape) < 0.1] = np.nan
    present = rng.random((chips, 2)) < 0.7
    cover = rng.choice([0, 1, 2, 9], (chips, 2, 1, 4, 4)).astype(np.uint8)
    return {
        "optical": pixels,
        "optical/valid": np.asarray(np.isfinite(pixels).all(axis=2)),
        "optical/mask": rng.integers(0, 2, (chips, 4, 4)).astype(np.uint8),
        "cover": np.where(present[:, :, None, None, None], cover, 255).astype(np.uint8),
        "cover/valid": np.broadcast_to(present[:, :, None, None], (chips, 2, 4, 4)).copy(),
        "cover/present": present,
        "chip_id": np.array([str(n) for n in range(chips)], dtype=object),
        "labels/crop": rng.choice(["", "maize", "rye"], chips).astype(object),
        "labels/code": rng.choice([1.0, 2.0, np.nan, 30.0], chips),
        "labels/fold": rng.integers(0, 5, chips),
        "labels/edge": rng.random(chips) < 0.5,
        "labels/seen": np.full(chips, np.datetime64("2024-01-01", "us")),
    }


def rows(arrays: Arrays, own: slice) -> Arrays:
    """Return some chips."""
    return {name: values[own] for name, values in arrays.items()}


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_parts_add_up_to_the_whole(seed: int, sizes: list[int]) -> None:
    arrays = drawn(seed, sum(sizes))
    ends = np.cumsum([0, *sizes]).tolist()
    parts = [measure(rows(arrays, slice(a, b)), PIXELS) for a, b in pairwise(ends)]
    whole, found = measure(arrays, PIXELS), reduce(add, parts)
    same(found, whole)
    assert found.labels == whole.labels
    assert found.class_table.to_pylist() == whole.class_table.to_pylist()
    assert Stats.from_json(found.to_json()).labels == found.labels
    for column in ("crop", "code", "fold", "edge"):
        values = [v for v in arrays[f"labels/{column}"].tolist() if v != "" and v == v]
        assert whole.labels[column].counts == Counter(values)
        assert whole.labels[column].missing == sum(sizes) - len(values)
        assert list(whole.labels[column].counts or ()) == sorted(set(values))
    assert "seen" not in whole.labels
    targets = {
        "cover": arrays["cover"][arrays["cover/valid"][:, :, None]],
        "optical/mask": arrays["optical/mask"],
        "labels/fold": arrays["labels/fold"],
    }
    for target, array in targets.items():
        if array.size:
            check_weights(whole, target, array)


def check_weights(stats: Stats, target: str, values: Any) -> None:
    """Hold weights against their definition, over all values one by one."""
    distinct, count = np.unique(values, return_counts=True)
    weights = stats.class_weights(target)
    wanted = dict(
        zip(distinct.tolist(), (len(values.ravel()) / (len(distinct) * count)).tolist(), strict=True)
    )
    assert {value: weight for value, weight in weights.items() if weight} == pytest.approx(wanted)
    assert np.mean([weights[v] for v in values.ravel().tolist()]) == pytest.approx(1.0)
    table = stats.classes(target).to_pydict()
    assert {v: n for v, n in zip(table["value"], table["count"], strict=True) if n} == dict(
        zip(distinct.tolist(), count.tolist(), strict=True)
    )


def test_targets_are_never_scaled() -> None:
    arrays = drawn(3, 12)
    made = measure(arrays, PIXELS).normalize(arrays, nan=0)
    for name in arrays:
        if name not in ("optical", "optical/valid"):
            np.testing.assert_array_equal(made[name], arrays[name])
            assert made[name].dtype == arrays[name].dtype
    seen = arrays["optical/valid"]
    for band in range(2):
        values = arrays["optical"][:, :, band][seen].astype(np.float64)
        wanted = (values - values.mean()) / values.std()
        np.testing.assert_allclose(made["optical"][:, :, band][seen], wanted, rtol=1e-5, atol=1e-5)
        assert (made["optical"][:, :, band][~seen] == 0).all()
    left = measure(arrays, PIXELS).normalize(arrays, sources=["cover"])
    np.testing.assert_array_equal(left["optical"], arrays["optical"])


def test_what_a_chip_lacks_does_not_count() -> None:
    arrays = drawn(5, 12)
    stats = measure(arrays, PIXELS)
    assert stats["cover"].total == arrays["cover/present"].sum() * 16
    assert stats["cover"].valid_fraction.tolist() == [1.0]
    assert 255 not in stats["cover"].classes["cover"]
    table = stats.classes("cover").to_pydict()
    assert table["value"] == [0, 1, 2, 7, 9]
    assert table["name"] == ["water", "crop", "forest", "bog", ""]
    assert table["count"][3] == 0 == stats.class_weights("cover")[7]


def test_a_value_that_does_not_count() -> None:
    arrays = drawn(7, 40)
    stats = measure(arrays, PIXELS)
    weights = stats.class_weights("labels/fold", ignore=[0])
    folds = arrays["labels/fold"][arrays["labels/fold"] != 0]
    assert weights[0] == 0.0
    assert np.mean([weights[fold] for fold in folds.tolist()]) == pytest.approx(1.0)
    for ignore in ([99], [0, 1, 2, 3, 4]):
        with pytest.raises(PlanError, match="class_weights"):
            stats.class_weights("labels/fold", ignore=ignore)
    with pytest.raises(PlanError, match=r"one of labels/crop.*cover"):
        stats.class_weights("labels/corp")
    with pytest.raises(PlanError, match="no such target"):
        stats.classes("optical")


def test_a_column_of_too_many_values_is_none_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelcounts, "MOST_VALUES", 3)
    few, more = (labelcounts.count(np.arange(start, start + 3)) for start in (0, 1))
    assert few is not None
    assert few.counts == {0: 1, 1: 1, 2: 1}
    assert labelcounts.add(few, more, (3, 3)) == LabelCounts(None)
    assert labelcounts.add(LabelCounts(None, 2), few, (5, 3)) == LabelCounts(None, 2)
    assert labelcounts.add(few, None, (3, 4)) == LabelCounts({0: 1, 1: 1, 2: 1}, 4)
    stats = Stats({}, 3, {"id": LabelCounts(None)})
    with pytest.raises(PlanError, match="more than 3 different values"):
        stats.classes("labels/id")
    assert "more than 3 values" in repr(stats)


def test_they_are_shown() -> None:
    stats = measure(drawn(1, 12), PIXELS)
    assert "labels/crop" in repr(stats)
    assert "maize" in repr(stats)
    assert "maize" in stats._repr_html_()
    rows = [
        row for row in stats.class_table.to_pylist() if row["source"] == "labels" and row["band"] == "crop"
    ]
    assert [row["name"] for row in rows] == ["maize", "rye"]
    assert sum(row["share"] for row in rows) == pytest.approx(1.0)


def test_other_sources_do_not_add_up() -> None:
    arrays = drawn(2, 4)
    stats = measure(arrays, PIXELS)
    other = measure(arrays, {"cover": PIXELS["cover"]})
    with pytest.raises(PlanError, match="adding statistics"):
        stats + other
    with pytest.raises(TypeError):
        stats + 1  # type: ignore[operator]


def test_chosen_sources_and_a_joined_mask(s2: rd.Collection, tmp_path: Path) -> None:
    optical = s2.harmonize(["red"], time="3MS")
    chips = rd.join(optical=optical, mask=s2.harmonize(["scl"], time="3MS")).chips(64, cell_km=1.28).sample(6)
    crops = pa.table({"chip_id": chips.table.column("chip_id"), "crop": ["a", "b", "b", "a", "b", None]})
    chips = chips.with_table(crops)
    whole = chips.stats(progress=False)
    stored = rd.open_chips(written(chips, tmp_path / "store.zarr"))
    same(stored.stats(progress=False), whole)
    assert stored.stats(progress=False).labels == whole.labels
    assert whole.labels["crop"] == LabelCounts({"a": 2, "b": 3}, 1)
    plain, scaled = (next(chips.stream(6, normalize=how)) for how in (None, True))
    np.testing.assert_array_equal(scaled["mask"], plain["mask"])
    assert scaled["mask"].dtype == plain["mask"].dtype
    assert set(whole.class_weights("mask")) == set(
        np.unique(plain["mask"][plain["mask/valid"][:, :, None]]).tolist()
    )
    for one in (chips, stored):
        some = one.stats(progress=False, sources=["optical"])
        assert list(some.sources) == ["optical"]
        np.testing.assert_array_equal(some["optical"].mean, whole["optical"].mean)
        with pytest.raises(PlanError, match="some of optical, mask"):
            one.stats(progress=False, sources=["sar"])
        with pytest.raises(PlanError, match="source 'mask'"):
            next(one.stream(6, normalize=some))


def test_weights_have_the_names_of_classes_where_these_are_known() -> None:
    stats = measure(drawn(3, 5), PIXELS)
    by_value, by_name = stats.class_weights("cover"), stats.class_weights("cover", names=True)
    known = dict(NAMES)
    assert list(by_name) == [known.get(int(value), value) for value in by_value]
    assert list(by_name.values()) == list(by_value.values())
    mask = stats.class_weights("optical/mask", ignore=["no"], names=True)
    assert list(mask)[:2] == ["no", "yes"]
    assert mask["no"] == 0
    assert list(mask.values()) == list(stats.class_weights("optical/mask", ignore=[0]).values())
    alike = {"cover": SourcePixels(("cover",), "uint8", "", (), (BandKind("class", ((0, "a"), (1, "a"))),))}
    twice = measure({key: v for key, v in drawn(3, 5).items() if key.startswith(("cover", "chip_id"))}, alike)
    assert not {"a"} & set(
        twice.class_weights("cover", names=True)
    )  # two classes of one name keep their values
