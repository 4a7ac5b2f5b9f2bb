# SPDX-License-Identifier: Apache-2.0
"""Audits of splits that others made: pixels counted by NumPy on a grid."""

from __future__ import annotations

from pathlib import Path

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pytest
import shapely

from rasteret_dask.errors import PlanError
from rasteret_dask.show.foreign import audit

PIXEL = 100.0
CORNER = (
    500_000.0,
    5_500_000.0,
)  # on zone 33's meridian, where a metre of the map is 1 / 0.9996 m of the ground
SCALE = 0.9996**-2


def squares(seed: int, count: int = 60) -> tuple[gpd.GeoDataFrame, dict[str, np.ndarray]]:
    """Draw squares of 3 x 3 pixels in three splits; return them, and which pixels each split covers."""
    rng = np.random.default_rng(seed)
    row, col = rng.integers(0, 40, (2, count))
    split = np.array(["test", "train", "val"])[rng.integers(0, 3, count)]
    x, y = CORNER[0] + col * PIXEL, CORNER[1] + row * PIXEL
    frame = gpd.GeoDataFrame(
        {"split": split}, geometry=shapely.box(x, y, x + 3 * PIXEL, y + 3 * PIXEL), crs=32633
    )
    cover = {name: np.zeros((43, 43), dtype=bool) for name in ("train", "val", "test")}
    for r, c, name in zip(row, col, split, strict=True):
        cover[name][r : r + 3, c : c + 3] = True
    return frame, cover


@pytest.mark.parametrize("seed", range(3))
def test_pixels_that_leak_are_counted(seed: int) -> None:
    frame, cover = squares(seed)
    leak = audit(frame, resolution=PIXEL)
    assert list(leak.samples) == ["train", "val", "test"]
    for pair in leak.overlaps:
        one, other = pair.split("-")
        shared = int(np.sum(cover[one] & cover[other]))
        assert leak.shared_px[pair] == pytest.approx(shared * SCALE, abs=0.6 + 0.002 * shared)
        assert leak.shared_share[pair] == pytest.approx(shared / cover[other].sum(), rel=0.01, abs=1e-4)
    shapes, split = frame.geometry.to_numpy(), frame["split"].to_numpy()
    pairs = [
        (a, b)
        for a in range(len(shapes))
        for b in range(len(shapes))
        if (split[a], split[b]) == ("train", "val")
        and shapely.area(shapely.intersection(shapes[a], shapes[b])) > 1
    ]
    assert leak.overlaps["train-val"] == len(pairs)
    assert leak.ok == (not any(leak.overlaps.values()))


def test_splits_that_lie_apart() -> None:
    x = CORNER[0] + np.array([0.0, 700.0, 5000.0])
    frame = gpd.GeoDataFrame(
        {"part": ["train", "test", None]}, geometry=shapely.box(x, 5.5e6, x + 300, 5.5e6 + 300), crs=32633
    )
    leak = audit(frame, "part")
    assert leak.ok
    assert leak.distance_m["train-test"] == pytest.approx(400.0, abs=0.5)
    assert leak.lost == {"sample without a part": 1}
    assert "at least 400 m apart" in str(leak)
    assert leak.to_dict()["ok"] is True


def test_across_a_zone_s_edge() -> None:
    """Windows of two UTM zones around 12 degrees east: the same ground is told from either."""
    points = gpd.GeoDataFrame(
        {"split": ["train", "test"]},
        geometry=[shapely.Point(11.999, 50.0), shapely.Point(12.001, 50.0)],
        crs=4326,
    )
    leak = audit(points, window_m=320)
    assert not leak.ok
    assert 40_000 < leak.shared_m2["train-test"] < 65_000  # 320 x (320 - 143) m, turned against each other
    assert audit(points).ok
    assert audit(points).distance_m["train-test"] == pytest.approx(143.4, abs=1.0)


def test_tables_and_files_say_the_same(tmp_path: Path) -> None:
    frame, _ = squares(1)
    degrees = frame.to_crs(4326)
    table = pa.table(
        {"geometry": shapely.to_wkb(degrees.geometry.to_numpy()), "split": frame["split"].to_numpy()}
    )
    frame.to_parquet(tmp_path / "foreign.parquet")
    ours = audit(frame).overlaps
    assert audit(table).overlaps == ours
    assert audit(tmp_path / "foreign.parquet").overlaps == ours


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    frame, _ = squares(1)
    with pytest.raises(PlanError, match=r"'fold'.*no such column.*one of split"):
        audit(frame, "fold")
    with pytest.raises(PlanError, match="resolution"):
        audit(frame, resolution=0)
    with pytest.raises(PlanError, match="window_m"):
        audit(frame, window_m=-1)
    with pytest.raises(PlanError, match="no such file"):
        audit(tmp_path / "none.parquet")
