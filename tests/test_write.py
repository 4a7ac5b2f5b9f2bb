"""The store: a layout that plain xarray opens, one object a shard, and a commit that comes last."""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
import weakref
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import geopandas
import google_crc32c
import imagecodecs
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
import tifffile
import xarray as xr
import zarr
from affine import Affine
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.errors import JobError, PlanError, StoreError, UnreadableTilesWarning
from rasteret_dask.store.encode import Compression, compressors
from rasteret_dask.store.layout import Layout
from rasteret_dask.store.run import _place, delayed_zarr, run_zarr
from rasteret_dask.store.write import commit, prepare, write_sources
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.freezing import freeze
from rasteret_dask.tasks.job import Shard
from rasteret_dask.tasks.shards import lower, read_sources

SHARD_BYTES = 100_000


def layout_of(chips: rd.Chips, shard_bytes: int = SHARD_BYTES) -> Layout:
    """Return the layout of a job with small shards, so that there are several."""
    job = freeze(chips._unselected.planned, shard_bytes).select({h.split for h in chips.job.hierarchies})
    return replace(chips._layout, job=job)


def write(layout: Layout, store: Path | str) -> str:
    url = str(store)
    delayed_zarr(layout, url, ReadContext()).compute(scheduler="threads")
    return url


def computed(chips: rd.Chips, source: str | None = None) -> xr.Dataset:
    lazy = chips.to_xarray()
    node = lazy if source is None else lazy[source].to_dataset()
    assert isinstance(node, xr.Dataset)
    return node.compute()


def stamps(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def tries(store: Path) -> dict[str, int]:
    """Return how often each shard has been begun."""
    return {p.name: len(list(p.iterdir())) for p in (store / "_job" / "tried").iterdir()}


@pytest.fixture(scope="module")
def optical(s2: rd.Collection, l8: rd.Collection) -> rd.Collection:
    return rd.merge(s2, l8).harmonize(
        bands=["red", "nir"], resolution=10, time="1MS", mask="clouds", pick="median", dtype="uint16"
    )


@pytest.fixture(scope="module")
def joined(optical: rd.Collection, aef: rd.Collection) -> rd.Chips:
    chips = rd.join(optical=optical, embeddings=aef.harmonize(bands=["A00", "A01"], units="embedding"))
    return chips.chips(size=32, cell_km=0.96).split(train=0.6, val=0.2, test=0.2, seed=42)


@pytest.fixture(scope="module")
def plain(optical: rd.Collection) -> rd.Chips:
    return optical.chips(size=32, cell_km=0.96).sample(41)


@pytest.fixture(scope="module")
def trained(joined: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store") / "train.zarr"
    write(layout_of(joined.select("train")), store)
    return store


@pytest.fixture(scope="module")
def single(plain: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store") / "plain.zarr"
    write(layout_of(plain), store)
    return store


# Layout; every warning is an error here


def test_plain_xarray_opens_the_tree(trained: Path, joined: rd.Chips) -> None:
    found = xr.open_datatree(trained, engine="zarr")
    assert sorted(found.children) == ["embeddings", "optical"]
    wanted = joined.select("train").to_xarray().compute()
    for name, node in found.children.items():
        mine, theirs = node.to_dataset(), wanted[name].to_dataset()
        assert set(mine.variables) == set(theirs.variables)
        for variable in (
            "chip_id",
            "split",
            "epsg",
            "bounds",
            "band",
            "time",
            "datetime",
            "member",
            "valid_fraction",
        ):
            assert mine[variable].dims == theirs[variable].dims
            one, other = mine[variable].values, theirs[variable].values
            if one.dtype.kind in "fM":
                np.testing.assert_array_equal(one, other.astype(one.dtype))
            else:
                assert one.tolist() == other.tolist()
        assert mine["pixels"].attrs["units"] == theirs["pixels"].attrs["units"]


@pytest.mark.parametrize("group", ["optical", "embeddings"])
def test_plain_xarray_opens_a_group(trained: Path, joined: rd.Chips, group: str) -> None:
    wanted = computed(joined.select("train"), group)
    for found in (
        xr.open_zarr(trained, group=group, mask_and_scale=False),
        xr.open_dataset(trained, engine="zarr", group=group, mask_and_scale=False),
    ):
        assert found["pixels"].dims == ("chip", "time", "band", "y", "x")
        np.testing.assert_array_equal(found["pixels"].values, wanted["pixels"].values)
        assert found["pixels"].dtype == wanted["pixels"].dtype


def test_integers_decode_to_reflectance_and_nan(trained: Path) -> None:
    stored = xr.open_zarr(trained, group="optical", mask_and_scale=False)
    found = xr.open_zarr(trained, group="optical")
    dn, valid = stored["pixels"].values, stored["valid"].values
    assert dn.dtype == np.uint16
    assert 0 < valid.mean() < 1
    assert found["pixels"].dtype.kind == "f"
    np.testing.assert_array_equal(np.isnan(found["pixels"].values), dn == 65535)
    np.testing.assert_array_equal(valid, (dn != 65535).all(axis=2))
    np.testing.assert_allclose(found["pixels"].values[dn != 65535], dn[dn != 65535] * 1e-4, rtol=1e-6)
    share = valid.mean(axis=(2, 3))
    np.testing.assert_allclose(found["valid_fraction"].values, share, atol=1e-7)
    assert found["datetime"].dtype.kind == "M"
    single = np.isin(found["member"].values, ("s2", "l8"))
    assert np.isnat(found["datetime"].values[~single]).all()  # of several, or none


def test_one_source_and_one_split_is_a_dataset_at_the_root(single: Path, plain: rd.Chips) -> None:
    found = xr.open_zarr(single)
    assert found["chip_id"].values.tolist() == plain.table.column("chip_id").to_pylist()
    assert not [p for p in single.iterdir() if p.is_dir() and (p / "zarr.json").exists()
                and json.loads((p / "zarr.json").read_text())["node_type"] == "group"]  # fmt: skip


def test_several_splits_make_a_hierarchy_each(joined: rd.Chips, tmp_path: Path) -> None:
    write(layout_of(joined.select("val", "test")), tmp_path / "s.zarr")
    found = xr.open_datatree(tmp_path / "s.zarr", engine="zarr")
    assert sorted(found.groups) == [
        "/", "/test", "/test/embeddings", "/test/optical", "/val", "/val/embeddings", "/val/optical",
    ]  # fmt: skip
    for name in ("val", "test"):
        wanted = computed(joined.select(name), "optical")
        mine = xr.open_zarr(tmp_path / "s.zarr", group=f"{name}/optical", mask_and_scale=False)
        np.testing.assert_array_equal(mine["pixels"].values, wanted["pixels"].values)
        assert set(mine["split"].values.tolist()) == {name}


def test_a_shard_is_a_task_and_a_chunk_is_a_chip(single: Path, plain: rd.Chips) -> None:
    layout = layout_of(plain)
    shards = list(layout.job.shards())
    per = layout.job.hierarchies[0].per_shard
    assert len(shards) > 3
    assert [s.stop - s.start for s in shards[:-1]] == [per] * (len(shards) - 1)
    assert 0 < shards[-1].stop - shards[-1].start < per
    for name in ("pixels", "valid"):
        array = zarr.open_array(single / name, mode="r")
        assert array.shards is not None
        assert array.shards[0] == per
        assert array.shards[1:] == array.shape[1:]
        assert array.chunks == (1, *array.shape[1:])
        objects = [p for p in (single / name / "c").rglob("*") if p.is_file()]
        assert len(objects) == len(shards)


def test_chunks_are_where_the_specification_says(single: Path, plain: rd.Chips) -> None:
    """A reader of fifteen lines: the shard's index at its end, a Blosc chunk and its checksum a chip."""
    wanted = computed(plain)["pixels"].values
    per = layout_of(plain).job.hierarchies[0].per_shard
    for chip in (0, per, 2 * per + 1, len(wanted) - 1):
        shard, inner = divmod(chip, per)
        data = (single / "pixels" / "c" / str(shard) / "0/0/0/0").read_bytes()
        index = data[-(16 * per + 4) :]
        assert struct.unpack("<I", index[-4:])[0] == int(google_crc32c.value(index[:-4]))
        offset, length = struct.unpack_from("<QQ", index, 16 * inner)
        stored = data[offset : offset + length]
        assert struct.unpack("<I", stored[-4:])[0] == int(google_crc32c.value(stored[:-4]))
        chunk = np.frombuffer(imagecodecs.blosc_decode(stored[:-4]), dtype="<u2")
        np.testing.assert_array_equal(chunk, wanted[chip].ravel())


def test_coordinates_of_very_many_chips_lie_in_several_chunks(
    plain: rd.Chips, single: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rasteret_dask.store.layout.COORDINATE_CHIPS", 16)
    store = tmp_path / "store.zarr"
    write(layout_of(plain), store)
    assert {path.name for path in (store / "chip_id" / "c").iterdir()} == {"0", "1", "2"}
    xr.testing.assert_equal(xr.open_zarr(store).load(), xr.open_zarr(single).load())
    assert rd.verify(store, progress=False).ok
    assert rd.open_chips(store).table.equals(rd.open_chips(single).table)
    rd.compact(store, tmp_path / "compact.zarr")
    xr.testing.assert_equal(xr.open_zarr(tmp_path / "compact.zarr").load(), xr.open_zarr(single).load())


def test_attributes_say_what_was_applied(trained: Path) -> None:
    found = xr.open_datatree(trained, engine="zarr")
    optical = found["optical"].attrs
    assert (optical["units"], optical["mask"], optical["pick"], optical["resolution"]) == (
        "reflectance", ["clouds"], "median", 10,
    )  # fmt: skip
    rules = {(r["member"], r["scale"], r["offset"], r["rule"].split(":")[0]) for r in optical["radiometry"]}
    assert rules == {
        ("s2", 1e-4, -0.1, "offset -0.1"), ("s2", 1e-4, 0.0, "offset 0"), ("l8", 2.75e-5, -0.2, "item"),
    }  # fmt: skip
    embeddings = found["embeddings"].attrs
    assert "127.5" in embeddings["radiometry"][0]["rule"]
    assert found.attrs["rasteret_dask"]["version"] == rd.__version__


def test_manifest_knows_every_object(trained: Path) -> None:
    manifest = pq.read_table(trained / "manifest.parquet").to_pylist()
    named = {}
    for row in manifest:
        assert row["attempts"] == 1
        assert row["bytes"] == sum(o["size"] for o in row["objects"])
        for entry in row["objects"]:
            data = (trained / entry["path"]).read_bytes()
            assert (len(data), zlib.crc32(data)) == (entry["size"], entry["crc32"])
            named[entry["path"]] = row["shard"]
    shards = {str(p.relative_to(trained)) for p in trained.rglob("pixels/c/**/*") if p.is_file()}
    assert shards <= named.keys()
    assert sum(row["chips"] for row in manifest) == xr.open_zarr(trained, group="optical").sizes["chip"]


def test_the_chip_table_of_the_store_s_chips_lies_beside_them(trained: Path, joined: rd.Chips) -> None:
    table = geopandas.read_parquet(trained / "chips.parquet")
    assert set(table["split"]) == {"train"}
    assert table["chip_id"].tolist() == xr.open_zarr(trained, group="optical")["chip_id"].values.tolist()
    assert table.crs.is_geographic
    assert len(table) == len(joined.select("train"))


def test_clipped_pixels_are_counted_per_band(s2: rd.Collection, tmp_path: Path) -> None:
    source = s2.harmonize(bands=["red", "nir"], time="3MS", units="reflectance", dtype="uint16", pick="first")
    floats = s2.harmonize(bands=["red", "nir"], time="3MS", units="reflectance", pick="first")
    write(layout_of(source.chips(size=32, cell_km=0.96)), tmp_path / "c.zarr")
    wanted = computed(floats.chips(size=32, cell_km=0.96))["pixels"].values
    with np.errstate(invalid="ignore"):
        dn = np.rint(wanted.astype(np.float64) * 1e4)
        outside = ((dn < 0) | (dn > 65534)).sum(axis=(0, 1, 3, 4))
    rows = pq.read_table(tmp_path / "c.zarr" / "manifest.parquet")["clipped"].to_pylist()
    found = [sum(json.loads(row).get(f"s2/{band}", 0) for row in rows) for band in ("red", "nir")]
    assert found == outside.tolist()


def blank(folder: Path, dtype: str, fill: float) -> rd.Collection:
    """Return one record whose eastern half holds no pixel, although its footprint says so."""
    from test_cubes import NOON, X0, Y0, scene

    values = np.full((96, 192), 7, dtype=dtype)
    values[:, 96:] = fill
    item = scene(folder, "half", NOON, {"data": values}, Affine(10, 0, X0, 0, -10, Y0))
    with rasterio.open(item["assets"]["data"]["href"], "r+") as file:
        file.nodata = fill
    return rd.build_from_stac([item], name="half").harmonize(units="raw")


@pytest.mark.parametrize(("dtype", "fill"), [("float32", np.nan), ("uint16", 0), ("int16", -9999)])
def test_shards_without_a_valid_pixel_take_no_object(tmp_path: Path, dtype: str, fill: float) -> None:
    chips = blank(tmp_path, dtype, fill).chips(size=32, cell_km=0.96)
    layout = layout_of(chips, 3 * 32 * 32 * 4)
    store = tmp_path / "blank.zarr"
    write(layout, store)
    found = xr.open_zarr(store, mask_and_scale=False)
    wanted = computed(chips)
    np.testing.assert_array_equal(found["pixels"].values, wanted["pixels"].values)
    west = wanted["bounds"].values[:, 0] < wanted["bounds"].values[:, 0].mean()
    np.testing.assert_array_equal(found["valid_fraction"].values[:, 0], west.astype(np.float32))
    objects = [p for p in (store / "pixels" / "c").rglob("*") if p.is_file()]
    assert 0 < len(objects) < len(list(layout.job.shards()))
    assert prepare(layout, str(store)).keys() == {s.name for s in layout.job.shards()}


# Commit


def test_an_unfinished_store_does_not_open(plain: rd.Chips, tmp_path: Path) -> None:
    store = tmp_path / "x.zarr"
    layout = layout_of(plain)
    assert prepare(layout, str(store)) == {}
    with pytest.raises((FileNotFoundError, ValueError)):
        xr.open_zarr(store)
    with pytest.raises((FileNotFoundError, ValueError)):
        zarr.open_group(store, mode="r")
    with pytest.raises(JobError, match=r"shards missing.*all-00000"):
        commit(str(store), layout.job)
    assert not (store / "zarr.json").exists()


def test_groups_of_an_unfinished_store_do_not_open(joined: rd.Chips, tmp_path: Path) -> None:
    store = tmp_path / "x.zarr"
    prepare(layout_of(joined.select("train")), str(store))
    for group in ("optical", "embeddings"):
        with pytest.raises((FileNotFoundError, ValueError)):
            xr.open_zarr(store, group=group)


def test_pixels_of_a_source_are_let_go_of_before_the_next_is_read(joined: rd.Chips, tmp_path: Path) -> None:
    layout, store = layout_of(joined), str(tmp_path / "store")
    job, names = layout.job, [source.name for source in layout.job.sources]
    held, first = set[int](), set[str]()
    prepare(layout, store)

    def watched(shard: Shard) -> Iterator[tuple[str, xr.Dataset]]:
        pixels: list[weakref.ref[Any]] = []
        for name, dataset in read_sources(job, shard, ReadContext()):
            first.update([name][len(pixels) :])
            pixels.append(weakref.ref(dataset["pixels"].values))
            yield name, dataset
            del dataset
            held.add(sum(one() is not None for one in pixels))

    for shard in job.shards():
        report = write_sources(job, (shard.hierarchy, shard.number), f"{store}/_job", watched(shard))
        places = [
            names.index(next(part for part in o["path"].split("/") if part in names))
            for o in report["objects"]
        ]
        assert places == sorted(places)
    assert held == {0}
    assert first == set(names)  # neighbours begin with different ones
    commit(store, job, layout)
    other = write(layout, tmp_path / "other")
    one, two = (xr.open_datatree(s, engine="zarr").load() for s in (store, other))
    xr.testing.assert_identical(one, two)


def test_a_finished_store_is_left_alone(single: Path, plain: rd.Chips) -> None:
    before = stamps(single)
    run_zarr(layout_of(plain), str(single), ReadContext(), None, progress=False)
    write(layout_of(plain), single)
    assert stamps(single) == before


def test_whatever_else_lies_there_is_left_alone(plain: rd.Chips, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"1 objects of something else \(notes.txt\).*an empty place"):
        plain.to_zarr(tmp_path, progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("finished", [True, False])
def test_another_plan_s_store_is_refused(
    plain: rd.Chips, joined: rd.Chips, tmp_path: Path, finished: bool
) -> None:
    store = tmp_path / "x.zarr"
    if finished:
        write(layout_of(plain), store)
    else:
        prepare(layout_of(plain), str(store))
    before = stamps(store)
    for other in (joined.select("train"), plain.sample(40)):
        with pytest.raises(StoreError, match="chips of another plan"):
            other.to_zarr(store, progress=False)
    assert stamps(store) == before


@pytest.mark.parametrize("left", ["mark", "arrays", "tables", "everything"])
def test_stopped_while_preparing(plain: rd.Chips, single: Path, tmp_path: Path, left: str) -> None:
    """Whatever was put before the stop, a rerun knows the store for its own and finishes it."""
    store = tmp_path / "x.zarr"
    layout = layout_of(plain)
    prepare(layout, str(store))
    if left != "everything":
        (store / "_job" / "ledger.json").unlink()
    if left in ("mark", "arrays"):
        for path in (store / "_job").iterdir():
            if path.name != "begun.json":
                path.unlink()
    if left == "mark":
        for path in store.iterdir():
            if path.name != "_job":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    write(layout, store)
    xr.testing.assert_equal(xr.open_zarr(store).load(), xr.open_zarr(single).load())


def test_a_rerun_does_what_is_missing_and_what_is_damaged(
    plain: rd.Chips, single: Path, tmp_path: Path
) -> None:
    store = tmp_path / "x.zarr"
    shutil.copytree(single, store)
    (store / "zarr.json").unlink()
    cut, gone, unreported = (store / "pixels" / "c" / str(n) / "0/0/0/0" for n in (0, 2, 3))
    cut.write_bytes(cut.read_bytes()[:-7])
    gone.unlink()
    (store / "_job" / "done" / "all-00003.json").unlink()
    before = stamps(store)
    write(layout_of(plain), store)
    after = stamps(store)
    changed = {p for p in after if after[p] != before.get(p) and p.startswith("pixels/c/")}
    assert changed == {f"pixels/c/{n}/0/0/0/0" for n in (0, 2, 3)}
    assert {name for name, n in tries(store).items() if n == 2} == {"all-00000", "all-00002", "all-00003"}
    assert unreported.exists()
    xr.testing.assert_equal(xr.open_zarr(store).load(), xr.open_zarr(single).load())
    attempts = pq.read_table(store / "manifest.parquet")["attempts"].to_pylist()
    assert attempts == [2, 1, 2, 2] + [1] * (len(attempts) - 4)


def test_a_broken_scene_stops_its_own_shards_only(small_world: World, tmp_path: Path) -> None:
    """The error names record and file; mended, a rerun does only what failed."""
    folder = tmp_path / "s2"
    shutil.copytree(small_world.sentinel2.parent, folder)
    s2 = rd.build_from_stac(folder / "collection.json", name="s2")
    plan = s2.harmonize(bands=["red"], units="reflectance").chips(size=32, cell_km=0.96).sample(80)
    layout, store = layout_of(plan, 20_000), tmp_path / "x.zarr"
    path = sorted(folder.rglob("B04.tif"))[3]
    record = path.parent.name
    hidden = path.rename(path.with_suffix(".gone"))
    with pytest.raises(JobError, match=rf"(?s)\d+ of \d+ shards failed.*{record}.*call to_zarr again"):
        run_zarr(layout, str(store), ReadContext(), None, progress=False)
    assert not (store / "zarr.json").exists()
    done = {p.stem for p in (store / "_job" / "done").iterdir()}
    every = {s.name for s in layout.job.shards()}
    assert set() < done < every
    assert set(tries(store)) == set() or all(tries(store)[name] == 1 for name in done)
    written = {p: m for p, m in stamps(store).items() if p.startswith("pixels/c/")}
    hidden.rename(path)
    run_zarr(layout, str(store), ReadContext(), None, progress=False)
    again = {p: m for p, m in stamps(store).items() if p.startswith("pixels/c/")}
    assert written.items() <= again.items()
    assert all(tries(store)[name] == 1 for name in done)
    wanted = computed(plan)
    np.testing.assert_array_equal(xr.open_zarr(store)["pixels"].values, wanted["pixels"].values)


def test_a_truncated_scene_is_an_error_not_zeros(small_world: World, tmp_path: Path) -> None:
    folder = tmp_path / "s2"
    shutil.copytree(small_world.sentinel2.parent, folder)
    s2 = rd.build_from_stac(folder / "collection.json", name="s2")
    plan = s2.harmonize(bands=["red"], units="reflectance").chips(size=32, cell_km=0.96).sample(10)
    for path in folder.rglob("*"):
        if path.suffix in (".tif", ".tiff") and path.stat().st_size > 5_000:
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(JobError, match="shards failed"):
        run_zarr(layout_of(plan), str(tmp_path / "x.zarr"), ReadContext(), None, progress=False)
    assert not (tmp_path / "x.zarr" / "zarr.json").exists()


def test_labels_are_coordinates_of_the_store_and_of_the_lazy_chips(
    optical: rd.Collection, joined: rd.Chips, tmp_path: Path
) -> None:
    boxes = joined.to_geopandas().geometry[:12].representative_point()
    points = geopandas.GeoDataFrame(
        {"crop": [f"crop {i}" for i in range(12)], "weight": np.arange(12.0)}, geometry=boxes, crs=4326
    )
    chips = optical.chips(size=16, at=points)
    store = write(layout_of(chips), tmp_path / "labels.zarr")
    found, lazy = xr.open_zarr(store), computed(chips)
    for name in ("crop", "weight"):
        assert name in found.coords
        assert (
            found[name].values.tolist() == lazy[name].values.tolist() == chips.table.column(name).to_pylist()
        )


def test_a_file_is_no_store(plain: rd.Chips, tmp_path: Path) -> None:
    place = tmp_path / "notes.txt"
    place.write_text("mine")
    with pytest.raises(StoreError, match="a file"):
        plain.to_zarr(place)
    assert place.read_text() == "mine"


# Bytes


def test_a_shard_is_few_objects_each_put_once(single: Path, plain: rd.Chips) -> None:
    """Each variable, a mark that the shard was begun, a report: nothing is listed or asked for on the way."""
    shards = len(list(layout_of(plain).job.shards()))
    for name in ("pixels", "valid", "valid_fraction", "datetime", "member"):
        assert len([p for p in (single / name / "c").rglob("*") if p.is_file()]) == shards
    assert set(tries(single).values()) == {1}
    assert len(list((single / "_job" / "done").iterdir())) == shards


CODECS: list[Compression] = [
    None, ZstdCodec(level=3), GzipCodec(level=1), BloscCodec(cname="zstd", clevel=1), "auto"
]  # fmt: skip


@pytest.mark.parametrize("compression", CODECS)
def test_every_compression_holds_the_same_chips(
    plain: rd.Chips, single: Path, compression: Compression
) -> None:
    """One place for all of them, too: what a worker remembers of an earlier store there must not count."""
    store = Path(tempfile.gettempdir()) / f"rasteret-dask-test-{os.getpid()}.zarr"
    shutil.rmtree(store, ignore_errors=True)
    try:
        write(replace(layout_of(plain), compression=compression), store)
        xr.testing.assert_equal(xr.open_zarr(store).load(), xr.open_zarr(single).load())
        expected = compressors(compression, "uint16")
        found = zarr.open_array(store / "pixels", mode="r").compressors
        assert [type(codec) for codec in found] == [type(codec) for codec in expected]
    finally:
        shutil.rmtree(store)


@pytest.mark.parametrize("finished", [True, False])
def test_another_compression_is_refused_not_mixed(plain: rd.Chips, tmp_path: Path, finished: bool) -> None:
    store = tmp_path / "x.zarr"
    if finished:
        plain.to_zarr(store, progress=False, compression=ZstdCodec(level=1))
    else:
        prepare(replace(plain._layout, compression=ZstdCodec(level=1)), str(store))
    before = stamps(store)
    for other in ("auto", None, ZstdCodec(level=2)):
        with pytest.raises(StoreError, match=r"these chips with compression .*zstd.*expected compression"):
            plain.to_zarr(store, progress=False, compression=other)
    assert stamps(store) == before
    plain.to_zarr(store, progress=False, compression=ZstdCodec(level=1))
    assert xr.open_zarr(store).sizes["chip"] == len(plain)


def test_the_same_shard_is_the_same_bytes(plain: rd.Chips, single: Path, tmp_path: Path) -> None:
    """Whichever thread was first."""
    write(layout_of(plain), tmp_path / "x.zarr")
    for path in single.rglob("c/**/*"):
        if path.is_file():
            assert (tmp_path / "x.zarr" / path.relative_to(single)).read_bytes() == path.read_bytes()


# Tiles that cannot be read


@pytest.fixture(scope="module")
def spoilt(small_world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[rd.Chips, Path]:
    """Return chips of a copy of the world, and the file of which one tile is no longer what it was."""
    folder = tmp_path_factory.mktemp("spoilt") / "s2"
    shutil.copytree(small_world.sentinel2.parent, folder)
    s2 = rd.build_from_stac(folder / "collection.json", name="s2")
    path = sorted(folder.rglob("B04.tif"))[3]
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        assert isinstance(page, tifffile.TiffPage)
        offset, length = page.dataoffsets[1], page.databytecounts[1]
    data = bytearray(path.read_bytes())
    data[offset : offset + length] = bytes(length)
    path.write_bytes(data)
    return s2.harmonize(bands=["red", "nir"], units="raw").chips(size=32, cell_km=0.96), path


def test_a_masked_tile_is_counted_listed_and_told(spoilt: tuple[rd.Chips, Path], tmp_path: Path) -> None:
    """What failed is finished by a rerun that masks; only the tile's own pixels are invalid."""
    chips, path = spoilt
    store, layout = tmp_path / "x.zarr", layout_of(chips)
    with pytest.raises(JobError, match=path.parent.name):
        run_zarr(layout, str(store), ReadContext(), None, progress=False)
    done = {p.stem for p in (store / "_job" / "done").iterdir()}
    with pytest.warns(UnreadableTilesWarning) as caught:
        run_zarr(layout, str(store), ReadContext(on_error="mask"), None, progress=False)
    manifest = pq.read_table(store / "manifest.parquet").to_pylist()
    assert all(row["attempts"] == 1 for row in manifest if row["shard"] in done)
    lists = {row["shard"]: json.loads(row["unreadable_tiles"]) for row in manifest}
    assert [row["unreadable"] for row in manifest] == [len(own) for own in lists.values()]
    hit = {shard for shard, own in lists.items() if own}
    assert hit
    assert not hit & done
    assert all(path.parent.name in line for own in lists.values() for line in own)
    (warning,) = caught
    told = str(warning.message)
    count = sum(len(own) for own in lists.values())
    assert f"{count} tiles of {len(hit)} of {len(lists)} shards" in told
    assert "manifest.parquet" in told
    assert next(own[0] for own in lists.values() if own) in told

    found = xr.open_zarr(store, mask_and_scale=False).load()
    whole = rd.build_from_stac(path.parents[1] / "collection.json", name="s2")
    nir = whole.harmonize(bands=["nir"], units="raw").chips(size=32, cell_km=0.96).to_xarray()
    assert isinstance(nir, xr.Dataset)
    np.testing.assert_array_equal(found["pixels"].values[:, :, 1:], nir["pixels"].values)
    lost = ~found["valid"].values & nir["valid"].values
    assert 0 < lost.sum() < lost.size // 2
    assert (found["pixels"].values[:, :, 0][lost] == 0).all()
    assert (found["pixels"].values[:, :, 0][found["valid"].values] != 0).all()


def test_lazy_chips_warn_of_masked_tiles(spoilt: tuple[rd.Chips, Path]) -> None:
    chips, path = spoilt
    masked, strict = chips.to_xarray(on_error="mask"), chips.to_xarray()
    assert isinstance(masked, xr.Dataset)
    assert isinstance(strict, xr.Dataset)
    assert masked["pixels"].data.name != strict["pixels"].data.name
    with pytest.warns(UnreadableTilesWarning, match=path.parent.name):
        found = masked.compute(scheduler="sync")
    assert not found["valid"].values.all()
    with pytest.raises(rd.ReadError, match=path.parent.name):
        strict.compute(scheduler="sync")


def test_tasks_that_mask_have_names_of_their_own(spoilt: tuple[rd.Chips, Path]) -> None:
    job = spoilt[0].job
    strict, masked = lower(job, ReadContext()), lower(job, ReadContext(on_error="mask"))
    shared = set(strict.graph.layers) & set(masked.graph.layers)
    assert {name.split("-")[0] for name in shared} == {"job"}
    assert _place(spoilt[0]._layout, "x", ReadContext()) != _place(
        spoilt[0]._layout, "x", ReadContext(on_error="mask")
    )


@pytest.mark.parametrize("given", ["ignore", "", None])
def test_on_error_is_checked_at_the_door(plain: rd.Chips, tmp_path: Path, given: Any) -> None:
    with pytest.raises(PlanError, match="'raise' or 'mask'"):
        plain.to_zarr(tmp_path / "x.zarr", on_error=given)
    with pytest.raises(PlanError, match="'raise' or 'mask'"):
        plain.to_xarray(on_error=given)
    with pytest.raises(PlanError, match="compression="):
        plain.to_zarr(tmp_path / "x.zarr", compression="fast")  # type: ignore[call-overload]
    assert not (tmp_path / "x.zarr").exists()
