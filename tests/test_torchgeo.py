"""A torch Dataset of lattice cells: aligned by number, filled newest first, for DataLoaders and TorchGeo's samplers."""

from __future__ import annotations

import os
import pickle
import random
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import rasterio
import rasterio.windows
import shapely
from servers import RangeServer
from test_reading import X0, Y0, collection, ground, scene
from waiting import PATIENCE_S

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.reader.sharing import SHARED
from rasteret_dask.rules.units import UnitName

pytest.importorskip("torch", reason="torch is not installed: pip install torch")
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

AEF = [f"A{band:02d}" for band in range(64)]

pytestmark = pytest.mark.filterwarnings("ignore::rasteret_dask.MixedScalesWarning")
"""The world's Sentinel-2 comes in two baselines, as the real one does, and most of these read its raw numbers."""


def dataset(source: rd.Collection, bands: list[str], **more: Any) -> Any:
    return source.to_torchgeo_dataset(bands, **more)


def boxes(found: Any) -> list[list[float]]:
    return [found[i]["bbox"].tolist() for i in range(len(found))]


def same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == b[key].dtype
            torch.testing.assert_close(value, b[key], rtol=0, atol=0, equal_nan=True)
        else:
            assert value == b[key]


# Alignment


def test_two_collections_align_number_by_number(
    s2: rd.Collection, aef: rd.Collection, small_world: World
) -> None:
    """As in the guide, whose hybrid Dataset holds both."""

    class Hybrid(Dataset[Any]):
        def __init__(self) -> None:
            self.s2 = s2.to_torchgeo_dataset(
                bands=["B04", "B03", "B02", "B08"], geometries=small_world.bbox, chip_size=64
            )
            self.aef = aef.to_torchgeo_dataset(bands=AEF, geometries=small_world.bbox, chip_size=64)

        def __len__(self) -> int:
            return len(self.s2)

        def __getitem__(self, idx: int) -> dict[str, Any]:
            one, other = self.s2[idx], self.aef[idx]
            assert torch.equal(one["bbox"], other["bbox"])
            return {"image": one["image"], "embedding": other["image"], "bbox": one["bbox"]}

    both = Hybrid()
    assert len(both) == len(both.aef) > 40
    assert both.s2.index["id"].tolist() == both.aef.index["id"].tolist()
    sample = both[len(both) // 2]
    assert sample["image"].shape == (4, 64, 64)
    assert sample["embedding"].shape == (64, 64, 64)
    assert both.s2[20]["valid"].any()


def test_numbers_depend_on_the_area_alone(s2: rd.Collection, l8: rd.Collection, small_world: World) -> None:
    area = {"geometries": small_world.bbox, "chip_size": 32, "resolution": 30}
    found = [
        dataset(s2, ["B04"], **area), dataset(l8, ["B4"], **area), dataset(s2, ["B08", "B04"], time="2024-06", **area),
        dataset(s2, ["B04"], cloud_cover_lt=5, **area),
        dataset(s2.harmonize(mask="clouds"), ["B02"], **area),
    ]  # fmt: skip
    assert all(boxes(one) == boxes(found[0]) for one in found[1:])
    assert np.mod(boxes(found[0]), 30).max() == 0


def test_cells_come_row_by_row_and_cover_the_area(s2: rd.Collection, small_world: World) -> None:
    found = dataset(s2, ["B04"], geometries=small_world.bbox, chip_size=64)
    box = np.array(boxes(found))
    order = np.lexsort((box[:, 0], -box[:, 3]))
    np.testing.assert_array_equal(order, np.arange(len(box)))
    assert not (box[:, [0, 1]] % 640).any()
    area = ground(shapely.union_all(shapely.box(*box.T)))
    assert area.buffer(1e-4).contains(shapely.box(*small_world.bbox))


def test_what_no_record_covers_is_there_and_invalid(s2: rd.Collection, small_world: World) -> None:
    west, south, east, north = small_world.bbox
    found = dataset(s2, ["B04"], geometries=(west - 0.2, south, east, north), chip_size=128)
    first = found[0]
    assert not first["valid"].any()
    assert not first["image"].any()
    assert first["image"].shape == (1, 128, 128)
    assert found[len(found) - 1]["valid"].any()
    assert any(sample["valid"].all() for sample in dataset(s2, ["B04"], chip_size=128))  # the footprints


# Pixels


@pytest.mark.parametrize("units", ["raw", "reflectance"])
def test_a_sample_is_the_newest_valid_pixel_of_the_cube(
    s2: rd.Collection, small_world: World, units: UnitName
) -> None:
    source = s2.harmonize(bands=["B04", "B08"], units=units, mask="clouds")
    found = source.to_torchgeo_dataset(geometries=small_world.bbox, chip_size=64)
    older = 0
    for number in range(0, len(found), 5):
        sample = found[number]
        cube = (
            source.cube(bounds=tuple(sample["bbox"].tolist()), crs=32633)
            .compute()
            .sortby("time", ascending=False)
        )
        valid = cube.values != 0 if units == "raw" else np.isfinite(cube.values)
        wanted, seen = (
            np.full((2, 64, 64), 0.0 if units == "raw" else np.nan, np.float32),
            np.zeros((2, 64, 64), bool),
        )
        for values, good in zip(cube.values, valid, strict=True):
            older += int((good & ~seen).any() and seen.any())
            wanted, seen = np.where(good & ~seen, values, wanted), seen | good
        np.testing.assert_array_equal(sample["image"].numpy(), wanted)
        np.testing.assert_array_equal(sample["valid"].numpy(), seen.all(axis=0))
        assert sample["image"].dtype == torch.float32
        assert sample["valid"].dtype == torch.bool
    assert older


def test_time_chooses(tmp_path: Path) -> None:
    records = {
        f"r{n}": (f"2024-0{n + 1}-10T10:00:00", {"B04": scene(tmp_path / f"{n}.tif", n, px=64)})
        for n in range(3)
    }
    source = collection(records)
    own = [
        source.where(id=name).get_numpy([(15.001, 50.19)], ["B04"], size=1)[0, 0, 0, 0] for name in records
    ]
    assert len(set(own)) == 3
    area = shapely.Point(15.001, 50.19).buffer(0.0001)

    _, where = source.get_numpy([(15.001, 50.19)], ["B04"], size=1, return_index=True)
    x, _, _, y = where["bounds"].to_pylist()[0]

    def shown(time: Any, source: rd.Collection = source) -> int:
        found = source.to_torchgeo_dataset(["B04"], geometries=area, chip_size=8, time=time)
        for sample in found:
            west, south, east, north = sample["bbox"].tolist()
            if west <= x < east and south < y <= north:
                return int(sample["image"][0, round((north - y) / 10), round((x - west) / 10)])
        raise AssertionError("no cell holds the point")

    assert shown(None) == own[2]
    assert shown("2024-02") == own[1]
    assert shown(("2024-01-01", "2024-02-28")) == own[1]
    assert shown("2024-02-10T09:00:00") == own[0]
    assert shown(pd.Timestamp("2024-02-10T10:00:00Z")) == own[1]
    assert shown(np.datetime64("2030-01-01")) == own[2]
    monthly = source.harmonize(units="raw", time="1MS")
    assert shown("2024-02", monthly) == own[1]
    assert shown("2024-03-15T00:00:00", monthly) == own[2]
    with pytest.raises(rd.PlanError, match=r"3 slots .* time="):
        shown(None, monthly)
    with pytest.raises(rd.PlanError, match="0 slots"):
        shown("2025", monthly)
    assert shown(None, source.harmonize(units="raw", pick="first")) == own[0]


@pytest.mark.parametrize(
    ("dtype", "kind"), [("uint8", torch.float32), ("uint16", torch.float32), ("int32", torch.int32),
                        ("uint32", torch.int64), ("float64", torch.float64)],
)  # fmt: skip
def test_numbers_keep_their_values(tmp_path: Path, dtype: str, kind: Any) -> None:
    path = scene(tmp_path / "a.tif", 1, px=64, dtype=dtype)
    sample = collection({"a": ("2024-04-02T10:00:00", {"B04": path})}).to_torchgeo_dataset(
        ["B04"], chip_size=64
    )[0]
    assert sample["image"].dtype == kind
    with rasterio.open(path) as ds:
        west, _, _, north = sample["bbox"].tolist()
        window = rasterio.windows.Window((west - X0) / 10, (Y0 - north) / 10, 64, 64)
        wanted = ds.read(1, window=window, boundless=True, fill_value=0)
    assert sample["valid"].any()
    assert np.array_equal(np.where(sample["valid"], sample["image"][0], 0), wanted)


# Loaders and samplers


@pytest.fixture(scope="module")
def cells(s2: rd.Collection, small_world: World) -> Any:
    return dataset(s2, ["B04", "B08"], geometries=small_world.bbox, chip_size=64)


def test_a_batch_is_its_samples(cells: Any) -> None:
    numbers = [5, 2, 5, len(cells) - 1, 0]
    for sample, number in zip(cells.__getitems__(numbers), numbers, strict=True):
        same(sample, cells[number])
    same(cells[-1], cells[len(cells) - 1])
    same(cells[np.int64(3)], cells[torch.tensor(3)])
    with pytest.raises(IndexError):
        cells[len(cells)]
    with pytest.raises(rd.PlanError, match="whole number"):
        cells["first"]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_data_loader_with_its_own_collate(cells: Any, workers: int) -> None:
    """Workers are spawned: the dataset is pickled, and opens its files there."""
    context = "spawn" if workers else None
    loader = DataLoader(cells, batch_size=16, num_workers=workers, multiprocessing_context=context)
    batches = list(loader)
    assert torch.cat([b["image"] for b in batches]).shape == (len(cells), 2, 64, 64)
    assert batches[0]["bbox"].shape == (16, 4)
    assert batches[0]["crs"] == ["EPSG:32633"] * 16
    for at, sample in enumerate(cells.__getitems__(range(16))):
        assert torch.equal(batches[0]["image"][at], sample["image"])
        assert torch.equal(batches[0]["valid"][at], sample["valid"])
        assert batches[0]["id"][at] == sample["id"]


def test_transforms_get_each_sample(s2: rd.Collection, small_world: World) -> None:
    def halved(sample: dict[str, Any]) -> dict[str, Any]:
        return {**sample, "image": sample["image"] / 2}

    area = {"geometries": small_world.bbox, "chip_size": 64}
    plain, half = dataset(s2, ["B04"], **area), dataset(s2, ["B04"], transforms=halved, **area)
    torch.testing.assert_close(half[20]["image"] * 2, plain[20]["image"])


class GridSampler(Sampler[Any]):
    """What TorchGeo's GridGeoSampler does of a dataset: look at its index and res, and yield slices."""

    def __init__(self, found: Any, size: int, stride: int) -> None:
        self.index, self.res = found.index, found.res
        assert isinstance(self.index.index, pd.IntervalIndex)
        self.size, self.stride = size * self.res[0], stride * self.res[0]

    def __iter__(self) -> Iterator[tuple[slice, slice, slice]]:
        for row in range(len(self.index)):
            xmin, ymin, xmax, ymax = self.index.geometry.iloc[row].bounds
            when = self.index.index[row]
            for y in np.arange(ymin, ymax - self.size + 1, self.stride):
                for x in np.arange(xmin, xmax - self.size + 1, self.stride):
                    yield slice(x, x + self.size), slice(y, y + self.size), slice(when.left, when.right)


def stacked(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """What TorchGeo's stack_samples does: tensors are stacked, all else becomes lists."""
    keys = samples[0].keys()
    whole = {key: [sample[key] for sample in samples] for key in keys}
    return {k: torch.stack(v) if isinstance(v[0], torch.Tensor) else v for k, v in whole.items()}


def test_a_sampler_of_whole_cells_gives_the_cells(cells: Any) -> None:
    loader = DataLoader(cells, sampler=GridSampler(cells, 64, 64), batch_size=8, collate_fn=stacked)
    batches = list(loader)
    images = torch.cat([b["image"] for b in batches])
    assert len(images) == len(cells)
    for at in range(0, len(cells), 7):
        assert torch.equal(images[at], cells[at]["image"])
        assert torch.equal(batches[at // 8]["bbox"][at % 8], cells[at]["bbox"])


def test_a_sampler_of_smaller_windows_gives_parts_of_cells(cells: Any) -> None:
    found = [cells[query] for query in list(GridSampler(cells, 32, 16))[90:99]]
    for offset, part in enumerate(found):
        whole = cells[(90 + offset) // 9]
        west, _, _, north = whole["bbox"].tolist()
        x, _, _, y = part["bbox"].tolist()
        col, row = round((x - west) / 10), round((north - y) / 10)
        assert torch.equal(part["image"], whole["image"][:, row : row + 32, col : col + 32])
        assert torch.equal(part["valid"], whole["valid"][row : row + 32, col : col + 32])


def test_a_query_may_leave_out_what_it_does_not_ask(cells: Any) -> None:
    x, y, t = cells.bounds
    whole = cells[x.start : x.stop]
    assert whole["image"].shape[1:] == (round((y.stop - y.start) / 10), round((x.stop - x.start) / 10))
    assert cells.crs.to_epsg() == 32633
    west, _, _, north = whole["bbox"].tolist()
    cell = cells[9]
    left, _, _, top = cell["bbox"].tolist()
    col, row = round((left - west) / 10), round((north - top) / 10)
    assert torch.equal(whole["image"][:, row : row + 64, col : col + 64], cell["image"])
    with pytest.raises(IndexError, match="no record between"):
        cells[x.start : x.start + 100, y.start : y.start + 100, pd.Timestamp("2030") : pd.Timestamp("2031")]
    first = cells[left : left + 640, top - 640 : top, t.start : t.start + pd.Timedelta(1, "D")]
    assert not torch.equal(first["image"], cell["image"])
    assert "32633" in repr(cells.crs)
    assert repr(cells) == f"<CellDataset s2: {len(cells)} cells of 64 px at 10, 2 bands>"


def test_cells_of_two_zones_have_numbers_but_no_crs(s2: rd.Collection) -> None:
    area = [shapely.box(15, 50.17, 15.01, 50.18), shapely.box(17.99, 50.17, 18.01, 50.18)]
    found = dataset(s2, ["B04"], geometries=area, chip_size=128)
    assert {sample["crs"] for sample in found} == {"EPSG:32633", "EPSG:32634"}
    with pytest.raises(rd.GridError, match="by number"):
        _ = found.crs


# Files


def files(server: RangeServer, px: int = 512, n: int = 1, tile: int = 128) -> rd.Collection:
    """Return scenes of a band each, behind a server."""
    for number in range(n):
        scene(server.folder / f"{number}.tif", number, px=px, blockxsize=tile, blockysize=tile)
    return collection(
        {f"r{k}": (f"2024-04-0{k + 1}T10:00:00", {"B04": server.url(f"{k}.tif")}) for k in range(n)}
    )


def test_reading_in_order_fetches_a_tile_once(server: RangeServer) -> None:
    found = files(server).to_torchgeo_dataset(["B04"], chip_size=32)
    server.forget()
    for epoch in (1, 2):
        for number in range(len(found)):
            found[number]
        assert sum(server.attempts().values()) <= 16 * epoch
    assert max(server.attempts().values()) <= 2


def test_a_shuffled_pass_over_what_fits_fetches_a_tile_once_too(server: RangeServer) -> None:
    found = files(server).to_torchgeo_dataset(["B04"], chip_size=32)
    numbers = list(range(len(found)))
    random.Random(3).shuffle(numbers)
    SHARED.clear()
    server.forget()
    for at in range(0, len(numbers), 16):
        found.__getitems__(numbers[at : at + 16])
    assert sum(server.attempts().values()) <= 16


def test_raw_numbers_of_several_scales_in_one_cell_are_told(s2: rd.Collection, small_world: World) -> None:
    area: dict[str, Any] = {"geometries": small_world.bbox, "chip_size": 64}
    with pytest.warns(
        rd.MixedScalesWarning, match=r"56 of 56 cells of 's2'.*band 'B04'.*harmonize\(\)"
    ) as told:
        dataset(s2, ["B04", "B08"], **area)
    assert [Path(one.filename) for one in told] == [Path(__file__)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", rd.MixedScalesWarning)
        dataset(s2.harmonize(["B04"]), ["B04"], **area)  # as the warning says
        dataset(s2, ["SCL"], **area)  # codes have no scale
        dataset(s2.where(id=s2.head(1).column("id")[0].as_py()), ["B04"], **area)


def test_nothing_is_read_before_the_first_sample(server: RangeServer) -> None:
    source = files(server)
    server.forget()
    found = source.to_torchgeo_dataset(["B04"], chip_size=32)
    again = pickle.loads(pickle.dumps(found))
    assert len(again) == len(found)
    assert not server.asked()
    same(again[7], found[7])


def said(code: str, *args: str) -> str:
    """Run code in a process of its own; return what it prints."""
    place = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=place,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("kind", ["local", "remote"])
def test_a_forked_worker_reads_local_files_and_does_not_hang_over_remote_ones(
    tmp_path: Path, kind: str
) -> None:
    """DataLoader forks on Linux unless told otherwise; the threads of the store stay in the parent."""
    scene(tmp_path / "a.tif", 1, px=128)
    found = said(
        """
        import sys, warnings
        warnings.simplefilter("ignore")
        from pathlib import Path
        import torch
        from servers import serving
        from test_reading import collection
        from rasteret_dask.errors import ReadError
        with serving(Path(sys.argv[1])) as server:
            href = server.url("a.tif") if sys.argv[2] == "remote" else Path(sys.argv[1]) / "a.tif"
            one = collection({"a": ("2024-04-02T10:00:00", {"B04": href})}).to_torchgeo_dataset(["B04"], chip_size=64)
            one[0]
            loader = torch.utils.data.DataLoader(one, num_workers=1, multiprocessing_context="fork", timeout=600)
            try:
                print(sum(len(batch["id"]) for batch in loader) == len(one))
            except ReadError as error:
                print("spawn" in str(error))
            except RuntimeError as error:
                print("spawn" in str(error))
        """,
        str(tmp_path), kind,
    )  # fmt: skip
    assert found.split() == ["True"]


@pytest.mark.slow
def test_torch_is_imported_by_the_torch_dataset_alone(tmp_path: Path) -> None:
    found = said(
        """
        import sys
        from pathlib import Path
        import rasteret_dask as rd
        from test_reading import collection, scene
        one = collection({"a": ("2024-04-02T10:00:00", {"B04": scene(Path(sys.argv[1]) / "a.tif", 1, px=64)})})
        one.get_numpy([(15.001, 50.19)], ["B04"], size=4)
        one.sample_points([(15.001, 50.19)], ["B04"])
        print("torch" in sys.modules)
        one.to_torchgeo_dataset(["B04"], chip_size=32)
        print("torch" in sys.modules, "torchgeo" in sys.modules)
        """,
        str(tmp_path),
    )
    assert found.split() == ["False", "True", "False"]


# Mistakes


def test_mistakes_are_told_before_anything_is_read(s2: rd.Collection, small_world: World) -> None:
    def told(error: type[Exception], **more: Any) -> str:
        with pytest.raises(error) as caught:
            s2.to_torchgeo_dataset(
                **{"bands": ["B04"], "geometries": small_world.bbox, "chip_size": 64, **more}
            )
        return str(caught.value)

    assert "split cell" in told(rd.GridError, chip_size=4096)
    assert "whole number" in told(rd.PlanError, chip_size=2.5)
    assert "no such band" in told(rd.BandError, bands=["B77"])
    assert "no record" in told(rd.PlanError, geometries=(0, 0, 0.01, 0.01))
    assert "no record" in told(rd.PlanError, time="2019")
    assert "ISO 8601" in told(rd.PlanError, time="yesterday")
    assert "split" in told(rd.PlanError, split="train")
    assert "on_error" in told(rd.PlanError, on_error="ignore")


def test_a_split_of_records_is_a_filter(s2: rd.Collection, small_world: World) -> None:
    table = s2.to_table()
    labels = ["train" if "UVR" in name else "test" for name in table["id"].to_pylist()]
    labelled = rd.as_collection(table.append_column("split", pa.array(labels)), name="s2")
    area = {"geometries": small_world.bbox, "chip_size": 64}
    whole, train = dataset(labelled, ["B04"], **area), dataset(labelled, ["B04"], split="train", **area)
    assert boxes(whole) == boxes(train)
    share = [sum(float(s["valid"].float().mean()) for s in found) for found in (whole, train)]
    assert 0 < share[1] < share[0]
