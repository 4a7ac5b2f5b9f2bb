"""The guide to training on several collections, as its readers type it: two sensors and embeddings, local."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely

import rasteret_dask as rasteret
from rasteret_dask.demo.world import World

DATES = ("2024-04-01", "2024-06-30")
SIZE = 64


@pytest.fixture(scope="module")
def folder(small_world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a working directory where ``demo/world`` is the small world, as after ``make demo``."""
    place = tmp_path_factory.mktemp("guide")
    (place / "demo").mkdir()
    (place / "demo" / "world").symlink_to(small_world.sentinel2.parents[1])
    return place


@pytest.fixture
def built(folder: Path, small_world: World, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the guide's three collections."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RASTERET_DASK_CACHE", str(folder / "cache"))
    bbox = small_world.bbox
    return (
        rasteret.build("demo/sentinel-2-l2a", name="s2", bbox=bbox, date_range=DATES),
        rasteret.build("demo/landsat-c2-l2", name="landsat", bbox=bbox, date_range=DATES),
        rasteret.build("demo/aef-v1-annual", name="aef", bbox=bbox, date_range=DATES),
    )


def merged_of(s2_collection: Any, landsat_collection: Any) -> Any:
    """The guide's second block."""
    s2_table = s2_collection.dataset.to_table()
    landsat_table = landsat_collection.dataset.to_table()
    s2_table = s2_table.append_column("source", pa.array(["sentinel-2"] * s2_table.num_rows))
    landsat_table = landsat_table.append_column("source", pa.array(["landsat"] * landsat_table.num_rows))
    common = ["id", "datetime", "geometry", "assets", "scene_bbox", "proj:epsg", "eo:cloud_cover", "source"]
    s2_table = s2_table.select(common + [c for c in s2_table.column_names if c.endswith("_metadata")])
    landsat_table = landsat_table.select(
        common + [c for c in landsat_table.column_names if c.endswith("_metadata")]
    )
    merged = pa.concat_tables([s2_table, landsat_table])
    return rasteret.as_collection(merged, name="multi_source", data_source="sentinel-2+landsat")


def assign_global_splits(
    collections: Any, train_ratio: float = 0.7, val_ratio: float = 0.15, seed: int = 42
) -> Any:
    """The guide's function; ``seed`` has no effect in it."""
    result = {}
    for coll in collections:
        table = coll.dataset.to_table()
        labels = []
        for g in table.column("geometry").to_pylist():
            share = int(hashlib.md5(g).hexdigest(), 16) / 2**128
            labels.append(
                "train" if share < train_ratio else "val" if share < train_ratio + val_ratio else "test"
            )
        table = table.append_column("split", pa.array(labels))
        result[coll.name] = rasteret.as_collection(table, name=coll.name)
    return result


def test_two_collections_become_one(built: Any) -> None:
    s2_collection, landsat_collection, _ = built
    merged = merged_of(s2_collection, landsat_collection)
    assert merged.dataset.count_rows() == len(s2_collection) + len(landsat_collection)
    for source, own in (("sentinel-2", s2_collection), ("landsat", landsat_collection)):
        part = merged.subset(source=source)
        assert sorted(part.to_table(["id"])["id"].to_pylist()) == sorted(
            own.to_table(["id"])["id"].to_pylist()
        )


def test_both_sensors_are_read_as_arrays(built: Any, small_world: World) -> None:
    s2_collection, landsat_collection, _ = built
    merged = merged_of(s2_collection, landsat_collection)
    west, south, east, north = small_world.bbox
    box = shapely.box(west, south, east, north).centroid.buffer(0.004).envelope
    s2_data = merged.subset(source="sentinel-2").get_numpy(geometries=box, bands=["B04", "B03", "B02", "B08"])
    landsat_data = merged.subset(source="landsat").get_numpy(geometries=box, bands=["B4", "B3", "B2", "B5"])
    assert s2_data.ndim == landsat_data.ndim == 4
    assert s2_data.shape[1] == landsat_data.shape[1] == 4
    alone = s2_collection.get_numpy(geometries=box, bands=["B04", "B03", "B02", "B08"])
    np.testing.assert_array_equal(s2_data, alone)  # what the table lost on the way decides no pixel


def test_one_resolution_and_size_make_one_ground(built: Any, small_world: World) -> None:
    s2_collection, landsat_collection, _ = built
    merged = merged_of(s2_collection, landsat_collection)
    west, south, east, north = small_world.bbox
    points = [shapely.Point(west + (east - west) * f, south + (north - south) * f) for f in (0.4, 0.5, 0.6)]
    same = {"geometries": points, "resolution": 10, "size": SIZE, "return_index": True}
    s2_data, s2_index = merged.subset(source="sentinel-2").get_numpy(
        bands=["B04", "B03", "B02", "B08"], **same
    )
    landsat_data, landsat_index = merged.subset(source="landsat").get_numpy(
        bands=["B4", "B3", "B2", "B5"], **same
    )
    assert s2_data.shape[1:] == landsat_data.shape[1:] == (4, SIZE, SIZE)

    def grounds(index: pa.Table) -> dict[int, set[Any]]:
        found: dict[int, set[Any]] = {}
        for row in index.to_pylist():
            found.setdefault(row["geometry_number"], set()).add((row["epsg"], *row["bounds"]))
        return found

    assert grounds(s2_index) == grounds(landsat_index)
    assert sorted(grounds(s2_index)) == [0, 1, 2]


def test_splits_of_records_are_a_column(built: Any) -> None:
    splits = assign_global_splits(built)
    for coll in built:
        parts = [splits[coll.name].subset(split=name) for name in ("train", "val", "test")]
        assert sum(len(part) for part in parts) == len(coll)
        assert splits[coll.name].bands == coll.bands


@pytest.mark.filterwarnings("ignore::rasteret_dask.MixedScalesWarning")  # the guide takes raw numbers
def test_images_and_embeddings_lie_on_the_same_ground(built: Any, small_world: World) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    s2_collection, _, aef_collection = built

    class HybridDataset(torch.utils.data.Dataset):  # type: ignore[misc, name-defined]
        def __init__(self, s2_coll: Any, aef_coll: Any, bbox: Any) -> None:
            self.s2 = s2_coll.to_torchgeo_dataset(
                bands=["B04", "B03", "B02", "B08"], geometries=bbox, chip_size=SIZE
            )
            self.aef = aef_coll.to_torchgeo_dataset(
                bands=[f"A{i:02d}" for i in range(64)], geometries=bbox, chip_size=SIZE
            )

        def __len__(self) -> int:
            return len(self.s2)

        def __getitem__(self, idx: int) -> dict[str, Any]:
            s2_sample = self.s2[idx]
            aef_sample = self.aef[idx]
            return {
                "image": s2_sample["image"],
                "embedding": aef_sample["image"],
                "bbox": s2_sample["bbox"],
                "bbox of the embedding": aef_sample["bbox"],
            }

    dataset = HybridDataset(s2_collection, aef_collection, small_world.bbox)
    assert len(dataset) == len(dataset.s2) == len(dataset.aef) > 10
    for idx in (0, len(dataset) // 2, len(dataset) - 1):
        sample = dataset[idx]
        assert sample["image"].shape == (4, SIZE, SIZE)
        assert sample["embedding"].shape == (64, SIZE, SIZE)
        assert tuple(sample["bbox"]) == tuple(sample["bbox of the embedding"])
