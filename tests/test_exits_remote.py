"""Maps, vectors and exports in a bucket: what lies there is what lies in a folder, and nothing is done twice."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import rasterio
import rioxarray
import xarray as xr
from bucket_host import Control, Rule, serving_bucket
from distributed import Client, LocalCluster
from numpy.typing import NDArray
from processes import NEW_PROCESSES
from test_maps import across_zones, mapped_by_a_process

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.net import remote


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    """Serve ``s3://mine`` to this module."""
    noted = Control(tmp_path_factory.mktemp("bucket"))
    with serving_bucket(noted, "mine") as port, pytest.MonkeyPatch.context() as patch:
        keys = {"ENDPOINT_URL": f"http://127.0.0.1:{port}", "SECRET_ACCESS_KEY": "s", "REGION": "us-east-1"}
        for name, value in {**keys, "ACCESS_KEY_ID": "new"}.items():
            patch.setenv(f"AWS_{name}", value)
        yield noted


@pytest.fixture(scope="module")
def chips(s2: rd.Collection) -> rd.Chips:
    """Return chips of four splits: as many shards."""
    own = s2.harmonize(["red", "nir"], mask="clouds", time="3MS", dtype="uint16").chips(32, cell_km=0.96)
    return own.split(a=0.25, b=0.25, c=0.25, d=0.25, seed=1).sample(3, by="split")


@pytest.fixture(scope="module")
def border(tmp_path_factory: pytest.TempPathFactory) -> rd.Chips:
    """Return chips of two zones."""
    own = across_zones(tmp_path_factory.mktemp("zones"))
    return own.harmonize(time="static").chips(32, stride=24, cover=True)


def means(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(pixels.mean(axis=(2, 3)))


def scores(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.concatenate([pixels, 3 - pixels], axis=1)


Exit = Callable[[str, Any], rd.JobReport]

UNITS = {
    "zones.zarr": 2,
    "zones.tif": 2,
    "tiles": 2,
    "vectors.parquet": 4,
    "tifs": 4,
    "tars": 4,
    "windows": 4,
}
"""What each exit writes is called -> how many units it is made of."""

FILES = ("zones.tif", "vectors.parquet")
"""Those that are files: their units lie beside them until they are whole."""


@pytest.fixture(scope="module")
def exits(chips: rd.Chips, border: rd.Chips) -> dict[str, Exit]:
    """Return the name of each exit -> what writes it to a path or URL, on a cluster or None."""
    named = rd.Outputs("classes", classes=["dark", "bright"])

    def mapped(to: Any, client: Any) -> rd.JobReport:
        report: rd.JobReport = border.predict(scores, named, to=to, client=client, progress=False)
        return report

    return {
        "zones.zarr": mapped,
        "zones.tif": mapped,
        "tiles": lambda to, client: mapped(rd.CogTiles(to, tile_px=256), client),
        "vectors.parquet": lambda to, client: chips.embed(means, to=to, client=client, progress=False),
        "tifs": lambda to, client: chips.to_geotiff(to, client, progress=False),
        "tars": lambda to, client: chips.to_webdataset(to, client, progress=False),
        "windows": lambda to, client: chips.to_rslearn(to, client, progress=False),
    }


@pytest.fixture(scope="module")
def folder(exits: dict[str, Exit], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return what writes an exit's result to a folder of its own, once, and returns its path."""
    places: dict[str, str] = {}

    def place(name: str) -> str:
        if name not in places:
            places[name] = str(tmp_path_factory.mktemp("folder") / name)
            report = exits[name](places[name], None)
            assert (report.committed, report.shards) == (True, UNITS[name])
        return places[name]

    return place


@dataclass(frozen=True)
class Written:
    """What became of an exit in the bucket, where keys expired when half of its units were done."""

    url: str
    failure: str
    before: Counter[str]
    """Units that were done by then."""
    report: rd.JobReport
    """Of the second call, with new keys."""
    after: Counter[str]


@pytest.fixture(scope="module")
def bucket(control: Control, exits: dict[str, Exit]) -> Callable[[str], Written]:
    """Return what writes an exit's result to the bucket, once."""
    results: dict[str, Written] = {}

    def place(name: str) -> Written:
        if name not in results:
            store = f"{name}.job" if name in FILES else name
            half = UNITS[name] // 2
            control.rule(store, Rule(after=half, status=400, code="ExpiredToken", key="old"))
            # one after another: of two at once both may be done by then
            with pytest.MonkeyPatch.context() as patch, dask.config.set(num_workers=1):
                patch.setenv("AWS_ACCESS_KEY_ID", "old")
                with pytest.raises(rd.JobError) as caught:
                    exits[name](f"s3://mine/{name}", None)
            before = control.done(store)
            report = exits[name](f"s3://mine/{name}", None)
            results[name] = Written(
                f"s3://mine/{name}", str(caught.value), before, report, control.done(store)
            )
        return results[name]

    return place


OF_RUNS = re.compile(r"(.*/)?(manifest\.parquet|_job/done/.*)")
"""What tells times and processes."""


def objects(url: str) -> dict[str, bytes]:
    """Return key -> bytes; of what tells of a run, the key alone, of an attempt its unit."""
    result = {}
    for path in remote.listing(url):
        head, tried, unit = path.partition("_job/tried/")
        key = f"{head}{tried}{unit.partition('/')[0]}"
        result[key] = b"" if tried or OF_RUNS.fullmatch(path) else remote.get(remote.join(url, path))
    return result


def whole(place: str, name: str) -> dict[str, bytes]:
    """Return the objects of an exit's result: of a file, all files beside it that are called alike."""
    if name not in FILES:
        return objects(place)
    base, _, _ = place.rpartition("/")
    stem = name.partition(".")[0]
    paths = [path for path in remote.listing(base) if path.startswith((f"{stem}.p", f"{stem}.t", f"{stem}_"))]
    return {path: remote.get(remote.join(base, path)) for path in paths}


@pytest.mark.parametrize("name", UNITS)
def test_a_bucket_holds_what_a_folder_holds_and_nothing_is_done_twice(
    name: str,
    bucket: Callable[[str], Written],
    folder: Callable[[str], str],
    control: Control,
    exits: dict[str, Exit],
) -> None:
    done = bucket(name)
    assert "keys that have expired (ExpiredToken)" in done.failure
    assert done.before.total() == UNITS[name] // 2
    assert (done.report.committed, done.report.store) == (True, done.url)
    assert done.report.shards_written == UNITS[name] - UNITS[name] // 2
    assert set(done.after.values()) == {1}
    there, here = whole(done.url, name), whole(folder(name), name)
    assert there.keys() == here.keys()
    assert [key for key, data in here.items() if there[key] != data] == []
    stores = (name, f"{name}.job")
    puts = sum(len(control.puts(store, "")) for store in stores)
    again = exits[name](done.url, None)
    assert (again.committed, again.shards_written, again.kept) == (True, 0, done.report.kept)
    assert sum(len(control.puts(store, "")) for store in stores) == puts


def test_a_killed_process_repeats_no_finished_block(
    small_world: World, control: Control, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    east, store, stac = tmp_path / "east", "killed.zarr", str(small_world.sentinel2)
    monkeypatch.setenv("DEADLY", str(east))
    mapped_by_a_process(stac, str(tmp_path / "map.zarr"))
    here = rd.open_map(tmp_path / "map.zarr")
    assert isinstance(here, xr.Dataset)
    east.write_text(str(float(here.x[0]) + 2600))
    code = f"import test_maps; test_maps.mapped_by_a_process({stac!r}, 's3://mine/{store}')"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=False)
    assert done.returncode == -signal.SIGKILL
    finished = control.done(store)
    assert 0 < finished.total() < 4
    with pytest.raises(rd.StoreError, match="no finished map"):
        rd.open_map(f"s3://mine/{store}")
    east.unlink()
    mapped_by_a_process(stac, f"s3://mine/{store}")
    assert set(control.done(store).values()) == {1}
    assert {control.tries(store)[name] for name in finished} == {1}
    there = rd.open_map(f"s3://mine/{store}")
    xr.testing.assert_equal(there.load(), here.load())


def test_a_cluster_writes_the_same(
    folder: Callable[[str], str], exits: dict[str, Exit], control: Control
) -> None:
    name = "vectors.parquet"
    with (
        dask.config.set(NEW_PROCESSES),  # they find the bucket by this process's environment
        LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        exits[name](f"s3://mine/by-workers/{name}", client)
    assert whole(f"s3://mine/by-workers/{name}", name) == whole(folder(name), name)


# What reads it


def test_open_map_and_evaluate_take_maps_of_zones(
    border: rd.Chips, bucket: Callable[[str], Written], folder: Callable[[str], str]
) -> None:
    here, there = folder("zones.zarr"), bucket("zones.zarr").url
    trees = rd.open_map(here), rd.open_map(there)
    for tree in trees:
        assert isinstance(tree, xr.DataTree)
        assert set(tree.children) == {"33", "34"}
    xr.testing.assert_equal(trees[0].load(), trees[1].load())
    scores = [border.evaluate(place, labels=here, progress=False).scores for place in (here, there)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("name", ["zones_33.tif", "tiles"])
def test_open_map_says_what_opens_geotiffs(
    name: str, bucket: Callable[[str], Written], folder: Callable[[str], str]
) -> None:
    whole = "tiles" if name == "tiles" else "zones.tif"
    words = {"zones_33.tif": "a GeoTIFF;", "tiles": r"a folder of GeoTIFFs;.*map_<zone>\.vrt"}[name]
    places = [place.replace(whole, name) for place in (bucket(whole).url, folder(whole))]
    for place in places:
        with pytest.raises(rd.StoreError, match=rf"{words}.*rioxarray\.open_rasterio or rasterio\.open"):
            rd.open_map(place)
    local = f"{places[1]}/map_33.vrt" if name == "tiles" else places[1]
    opened = rioxarray.open_rasterio(local)
    assert isinstance(opened, xr.DataArray)
    with opened, rasterio.open(local) as file:
        assert opened.shape == (file.count, *file.shape)


def test_a_map_of_geotiffs_is_a_source_from_there_too(
    bucket: Callable[[str], Written], folder: Callable[[str], str]
) -> None:
    cubes = [
        rd.build_from_files(place.replace(".tif", "_33.tif"), name="map", static=True)
        .harmonize()
        .cube()
        .load()
        for place in (bucket("zones.tif").url, folder("zones.tif"))
    ]
    np.testing.assert_array_equal(cubes[0].values, cubes[1].values)


def test_read_chips_takes_geotiffs_back(
    bucket: Callable[[str], Written], folder: Callable[[str], str]
) -> None:
    there, here = rd.read_chips(bucket("tifs").url), rd.read_chips(folder("tifs"))
    xr.testing.assert_identical(there.load(), here.load())


def test_read_chips_says_why_tars_are_none(
    bucket: Callable[[str], Written], folder: Callable[[str], str]
) -> None:
    for place in (bucket("tars").url, folder("tars")):
        with pytest.raises(rd.SourceError, match=r"tars that to_webdataset wrote; .*chips with to_geotiff"):
            rd.read_chips(place)
