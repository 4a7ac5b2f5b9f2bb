"""One answer a chip: the table is what the model says of each chip by hand, and it appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import dask.config
import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import shapely
import xarray as xr
from distributed import Client, LocalCluster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_stores import small, written

import rasteret_dask as rd
from rasteret_dask.prediction import models, vectors
from rasteret_dask.prediction.models import ModelLike, model_of, parcel_of
from rasteret_dask.prediction.outputs import Outputs, OutputsLike, outputs_of, settled
from rasteret_dask.prediction.vectors import VectorPlan, answers_note, vector_plan
from rasteret_dask.prediction.vectorwork import VectorWork
from rasteret_dask.streams.planned import planned
from rasteret_dask.tasks import mapping
from rasteret_dask.tasks.context import ReadContext


@pytest.fixture(autouse=True)
def _no_model_is_left() -> Iterator[None]:
    yield
    models._RUNNERS.clear()


@pytest.fixture(scope="module")
def chips(s2: rd.Collection) -> rd.Chips:
    """Return chips of three months, some of which are cloudy all the time."""
    kept = s2.harmonize(["red", "nir"], mask="clouds", time="3MS").chips(32, cell_km=0.96)
    crops = pa.table({"chip_id": kept.table["chip_id"], "crop": ["maize", "wheat"] * (len(kept) // 2)})
    return kept.with_table(crops).split(train=0.5, val=0.3, test=0.2, seed=1)


def means(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mean of each band and the largest number of a chip: filled pixels count as 0."""
    return np.concatenate([pixels.mean(axis=(2, 3)), pixels.max(axis=(1, 2, 3))[:, None]], axis=1)


def brightest(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the largest number."""
    return np.asarray(pixels.max(axis=(1, 2, 3)))


def codes(pixels: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return 1 for dark chips, 7 for bright ones."""
    return np.where(pixels.max(axis=(1, 2, 3)) > 0.4, 7, 1)


def nans(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return NaN for bright chips."""
    return np.where(pixels.max(axis=(1, 2, 3)) > 0.4, np.nan, 1.0).astype(np.float32)


def plan(
    chips: rd.Chips,
    model: ModelLike = means,
    shape: tuple[int, ...] = (3,),
    outputs: OutputsLike = "values",
    batch_size: int = 5,
    shard_bytes: int | None = 60_000,
    **options: Any,
) -> VectorPlan:
    """Return the plan of answers, of chips in small shards."""
    sources = mapping.outputs_of(chips.job, chips.query.functions)
    pixels = planned(chips.job, sources, ReadContext(chips.query.functions)).pixels
    parcel = parcel_of(model_of(model), batch_size, pixels)
    dtype = np.int64 if model is codes else np.float32
    output = settled(outputs_of(outputs), shape, dtype, chips.planned.spec.size, parcel.name)
    own = chips._model_chips
    if shard_bytes is not None:
        own = replace(own, job=small(chips, shard_bytes).job)
    return vector_plan(own, parcel, output, sources, **options)


def by_hand(chips: rd.Chips, model: Callable[[Any], NDArray[Any]]) -> dict[str, Any]:
    """Return chip -> what the model says of it alone; None where no pixel is valid."""
    loaded = chips.load()
    assert isinstance(loaded, xr.Dataset)
    pixels = loaded["pixels"].values[:, 0]
    result = {}
    for chip, image in zip(loaded["chip_id"].values, pixels, strict=True):
        valid = np.isfinite(image).all(axis=0)
        answer = model(np.where(valid, image, 0.0)[None].astype(np.float32))[0]
        result[str(chip)] = answer if valid.any() else None
    return result


@pytest.fixture(scope="module")
def want(chips: rd.Chips) -> dict[str, Any]:
    made = by_hand(chips, means)
    assert len({answer is None for answer in made.values()}) == 2, (
        "there are chips without a valid pixel, and others"
    )
    return made


def check(table: pa.Table, want: dict[str, Any], column: str = "vector") -> None:
    ids, found = table.column("chip_id").to_pylist(), table.column(column).to_pylist()
    assert sorted(ids) == sorted(want)
    for chip, answer in zip(ids, found, strict=True):
        if want[chip] is None:
            assert answer is None
        else:
            np.testing.assert_allclose(answer, want[chip], rtol=0, atol=1e-6)


@given(
    batch_size=st.integers(1, 40), threads=st.integers(1, 3), shard_bytes=st.sampled_from([30_000, 200_000])
)
@settings(max_examples=4, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_vectors_are_those_of_each_chip_by_hand(
    chips: rd.Chips, want: dict[str, Any], batch_size: int, threads: int, shard_bytes: int
) -> None:
    own = plan(chips, batch_size=batch_size, shard_bytes=shard_bytes)
    with dask.config.set(num_workers=threads):
        table = own.load()
    assert table.schema.equals(own.schema)
    assert table.column("chip_id").to_pylist() == own.job.chosen_chips().column("chip_id").to_pylist()
    check(table, want)


def test_the_file_is_the_same_on_threads_and_on_a_cluster(
    chips: rd.Chips, want: dict[str, Any], tmp_path: Path
) -> None:
    own = plan(chips)
    report = own.to_parquet(str(tmp_path / "threads.parquet"), progress=False)
    assert (report.committed, report.kept, report.shards) == (True, len(chips), len(list(own.job.shards())))
    check(pq.read_table(tmp_path / "threads.parquet"), want)
    with (
        LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        again = plan(chips, batch_size=3)
        assert again.digest == own.digest
        again.to_parquet(str(tmp_path / "cluster.parquet"), client, progress=False)
        there = client.run(lambda: len(models._RUNNERS))
        check(plan(chips, batch_size=16).load(client), want)
    assert {1} <= set(there.values()) <= {0, 1}, "a process that computes has the model once"
    assert (tmp_path / "cluster.parquet").read_bytes() == (tmp_path / "threads.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cluster.parquet", "threads.parquet"]


def test_the_file_is_geoparquet_that_says_what_it_is(chips: rd.Chips, tmp_path: Path) -> None:
    own, path = plan(chips), tmp_path / "out.parquet"
    own.to_parquet(str(path), progress=False)
    table, geo = pq.read_table(path), json.loads(pq.read_schema(path).metadata[b"geo"])
    assert table.column_names == [
        "chip_id", "geometry", "bbox", "datetime", "start_datetime", "end_datetime", "split", "crop", "vector",
    ]  # fmt: skip
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 3)
    column = geo["columns"]["geometry"]
    assert (geo["version"], column["encoding"], column["geometry_types"]) == ("1.1.0", "WKB", ["Polygon"])
    assert column["covering"]["bbox"]["xmin"] == ["bbox", "xmin"]
    shapes = shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False))
    boxes = [tuple(box.values()) for box in table.column("bbox").to_pylist()]
    np.testing.assert_allclose(boxes, shapely.bounds(shapes))
    np.testing.assert_allclose(column["bbox"], shapely.total_bounds(shapes))
    begin, end = (
        table.column("start_datetime").unique().to_pylist(),
        table.column("end_datetime").unique().to_pylist(),
    )
    assert [str(when[0].date()) for when in (begin, end)] == ["2024-04-01", "2024-07-01"]
    assert table.column("datetime").null_count == len(table)
    plans = {row["chip_id"]: row for row in chips.table.select(["chip_id", "split", "crop"]).to_pylist()}
    for row in table.select(["chip_id", "split", "crop"]).to_pylist():
        assert plans[row["chip_id"]] == row
    note = answers_note(str(path))
    assert note is not None
    assert (note["digest"], note["model"]["digest"]) == (own.digest, own.parcel.digest)
    assert (note["bands"], note["chips"], note["dropped"]) == ({"s2": ["red", "nir"]}, len(chips), 0)


def test_times_are_those_of_the_acquisition_or_of_the_chip_s_own_slots(s2: rd.Collection) -> None:
    single = s2.harmonize(["red"]).chips(32, cell_km=1.92)
    table = plan(single, brightest, ()).load()
    moments = dict(
        zip(single.table["chip_id"].to_pylist(), single.table["datetime"].to_pylist(), strict=True)
    )
    assert dict(zip(table["chip_id"].to_pylist(), table["datetime"].to_pylist(), strict=True)) == moments
    assert table["start_datetime"].null_count == len(table)
    several = s2.harmonize(["red"], time="acquisitions", max_acquisitions=2).chips(32, cell_km=1.92)
    loaded = several.load()
    assert isinstance(loaded, xr.Dataset)
    table = plan(several, lambda pixels: pixels.max(axis=(1, 2, 3, 4)), ()).load()
    spans = {row["chip_id"]: (row["start_datetime"], row["end_datetime"]) for row in table.to_pylist()}
    for chip, whens in zip(loaded["chip_id"].values, loaded["datetime"].values, strict=True):
        some = np.sort(whens[~np.isnat(whens)]).astype("datetime64[us]")
        begin, end = (when.replace(tzinfo=None) for when in spans[str(chip)])
        assert (begin, end) == (some[0].item(), some[-1].item())


# Classes, probabilities, numbers


def test_classes_have_codes_and_names(chips: rd.Chips) -> None:
    named = Outputs("classes", classes={1: "dark", 7: "bright"})
    table = plan(chips, codes, (), named).load()
    check(table, by_hand(chips, codes), "class")
    names = dict(zip(table["class"].to_pylist(), table["class_name"].to_pylist(), strict=True))
    assert names == {1: "dark", 7: "bright", None: None}
    scores = plan(chips, scores_of, (2,), "classes").load()
    assert scores.column_names[-1] == "class"
    want = by_hand(chips, lambda pixels: np.argmax(scores_of(pixels), axis=1))
    check(scores, want, "class")


def scores_of(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    mean = pixels.mean(axis=(1, 2, 3))
    return np.stack([0.15 - mean, mean - 0.15], axis=1)


def shares(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.stack([pixels.max(axis=(1, 2, 3)), 1 - pixels.max(axis=(1, 2, 3))], axis=1)


def test_probabilities_and_numbers_have_columns_of_their_own(chips: rd.Chips) -> None:
    table = plan(chips, shares, (2,), "probabilities").load()
    assert table.schema.field("probabilities").type == pa.list_(pa.float32(), 2)
    check(table, by_hand(chips, shares), "probabilities")
    number = plan(chips, brightest, ()).load()
    check(number, by_hand(chips, brightest), "value")
    vector = plan(chips, brightest, (), is_vector=True).load()
    assert vector.schema.field("vector").type == pa.list_(pa.float32(), 1)
    assert pc.list_flatten(vector["vector"]).equals(number["value"].drop_null())


# What is wrong, and what is left out


def test_nan_of_a_chip_with_valid_pixels_is_an_error(chips: rd.Chips, tmp_path: Path) -> None:
    with pytest.raises(
        rd.ModelError, match="NaN from the model, in 1 of 1 numbers, though the chip has valid pixels"
    ):
        plan(chips, nans, ()).load()
    with pytest.raises(rd.JobError, match="NaN from the model"):
        plan(chips, nans, ()).to_parquet(str(tmp_path / "out.parquet"), progress=False)
    assert not (tmp_path / "out.parquet").exists()


def test_dropped_chips_are_left_out_and_counted(
    chips: rd.Chips, want: dict[str, Any], tmp_path: Path
) -> None:
    rare = chips.filter_pixels(min_valid=0.5)
    own = plan(rare)
    report = own.to_parquet(str(tmp_path / "out.parquet"), progress=False)
    table = pq.read_table(tmp_path / "out.parquet")
    loaded = rare.load()
    assert isinstance(loaded, xr.Dataset)
    ids = [str(chip) for chip in loaded["chip_id"].values]
    assert 0 < len(ids) < len(want)
    check(table, {chip: want[chip] for chip in ids})
    assert (report.kept, report.chips) == (len(ids), len(want))
    note = answers_note(str(tmp_path / "out.parquet"))
    assert note is not None
    assert note["dropped"] == len(want) - len(ids)
    again = own.to_parquet(str(tmp_path / "out.parquet"), progress=False)
    assert (again.kept, again.chips, again.shards_written) == (len(ids), len(want), 0)
    bounds = json.loads(pq.read_schema(tmp_path / "out.parquet").metadata[b"geo"])["columns"]["geometry"][
        "bbox"
    ]
    shapes = shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False))
    np.testing.assert_allclose(bounds, shapely.total_bounds(shapes))


def test_a_model_of_pixels_and_columns_of_the_same_name_are_told(chips: rd.Chips) -> None:
    with pytest.raises(
        rd.ModelError, match=r"32 x 32 numbers for a chip; expected one answer for each chip.*map.zarr"
    ):
        plan(chips, means, (3, 32, 32), shard_bytes=None)
    taken = chips.with_table(pa.table({"chip_id": chips.table["chip_id"], "vector": np.ones(len(chips))}))
    with pytest.raises(rd.PlanError, match="a column vector of yours"):
        plan(taken, shard_bytes=None)


# Resuming


class StopError(Exception):
    """Somebody has pulled the plug."""


def test_a_rerun_computes_what_is_missing_and_of_a_whole_file_nothing(
    chips: rd.Chips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, out = plan(chips), tmp_path / "out.parquet"
    seen: list[int] = []
    compute = VectorWork.compute

    def counted(self: Any, job: Any, item: Any, *roots: Any) -> Any:
        seen.append(item)
        if len(seen) > 3 and fails:
            raise StopError("no power")
        return compute(self, job, item, *roots)

    monkeypatch.setattr(VectorWork, "compute", counted)
    fails = True
    with dask.config.set(num_workers=1), pytest.raises(rd.JobError, match="no power"):
        own.to_parquet(str(out), progress=False)
    assert not out.exists()
    fails, before = False, len(seen)
    monkeypatch.setattr(vectors.VectorPlan, "_put", partial(_fails, StopError("at the commit")))
    with pytest.raises(StopError):
        own.to_parquet(str(out), progress=False)
    assert len(seen) - before == len(list(own.job.shards())) - 3
    assert not out.exists()
    monkeypatch.undo()
    monkeypatch.setattr(VectorWork, "compute", counted)
    before = len(seen)
    assert own.to_parquet(str(out), progress=False).committed
    data = out.read_bytes()
    own.to_parquet(str(out), progress=False)
    assert len(seen) == before
    assert out.read_bytes() == data
    assert not Path(f"{out}.job").exists()
    other = tmp_path / "other.parquet"
    own.to_parquet(str(other), progress=False)
    assert other.read_bytes() == data


def _fails(error: Exception, *_: Any) -> None:
    raise error


def test_what_is_left_when_it_was_killed_behind_the_file_is_removed(chips: rd.Chips, tmp_path: Path) -> None:
    own, out = plan(chips), tmp_path / "out.parquet"
    own.to_parquet(str(out), progress=False)
    Path(f"{out}.job").mkdir()
    Path(f"{out}.job", "begun.json").write_text("{}")
    own.to_parquet(str(out), progress=False)
    assert not Path(f"{out}.job").exists()


def test_another_file_and_other_answers_are_left_alone(chips: rd.Chips, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    out.write_text("my notes")
    with pytest.raises(rd.StoreError, match="found something else; expected these answers"):
        plan(chips).to_parquet(str(out), progress=False)
    assert out.read_text() == "my notes"
    out.unlink()
    plan(chips).to_parquet(str(out), progress=False)
    data = out.read_bytes()
    with pytest.raises(rd.StoreError, match="answers of means to other chips, or of another model"):
        plan(chips, brightest, ()).to_parquet(str(out), progress=False)
    with pytest.raises(rd.StoreError, match="answers of means to other chips"):
        plan(chips.select("train")).to_parquet(str(out), progress=False)
    assert out.read_bytes() == data
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.parquet"]


# Others read it


def test_duckdb_finds_what_is_alike(chips: rd.Chips, want: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "embeddings.parquet"
    plan(chips).to_parquet(str(path), progress=False)
    chip = next(name for name, answer in want.items() if answer is not None)
    with duckdb.connect() as connection:
        rows = connection.execute(
            """
            with one as (select vector from read_parquet($path) where chip_id = $chip)
            select chip_id, array_cosine_similarity(every.vector::float[3], one.vector::float[3]) as alike
            from read_parquet($path) every, one
            where every.vector is not null order by alike desc, chip_id
            """,
            {"path": str(path), "chip": chip},
        ).fetchall()
    one = np.asarray(want[chip], np.float64)
    alike = {
        name: float(one @ answer / np.linalg.norm(one) / np.linalg.norm(answer))
        for name, answer in want.items()
        if answer is not None
    }
    assert {name: pytest.approx(value, abs=1e-6) for name, value in rows} == alike
    assert rows[0][1] == pytest.approx(1.0, abs=1e-6)


def test_geopandas_reads_it(chips: rd.Chips, tmp_path: Path) -> None:
    geopandas = pytest.importorskip("geopandas", reason="needs the extra geo")
    path = tmp_path / "embeddings.parquet"
    plan(chips).to_parquet(str(path), progress=False)
    frame = geopandas.read_parquet(path)
    assert frame.crs.to_epsg() == 4326 or str(frame.crs) == "OGC:CRS84"
    some = geopandas.read_parquet(path, bbox=tuple(frame.geometry.iloc[0].bounds))
    assert 0 < len(some) < len(frame)
    shutil.rmtree(tmp_path)


# The exits


def encoder(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return three numbers a chip."""
    return np.stack(
        [pixels[:, 0].mean(axis=(1, 2)), pixels[:, 1].max(axis=(1, 2)), pixels[:, 1].std(axis=(1, 2))], 1
    )


class Heavy:
    """A model that Dask would warn of in a graph: 12 MB."""

    def __init__(self) -> None:
        self.weights = np.random.default_rng(1).random(1_500_000)

    def __call__(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        return means(pixels)


def test_embed_and_predict_are_the_exits(chips: rd.Chips, want: dict[str, Any], tmp_path: Path) -> None:
    table = chips.embed(means)
    check(table, want)
    report = chips.embed(means, tmp_path / "embeddings.parquet", progress=False)
    assert report.committed
    assert pq.read_table(tmp_path / "embeddings.parquet").equals(table)
    named = Outputs("classes", classes={1: "dark", 7: "bright"})
    assert chips.predict(codes, named, to=tmp_path / "classes.parquet", progress=False).committed
    classes = pq.read_table(tmp_path / "classes.parquet").select(["chip_id", "class_name"])
    bright = chips.with_table(classes).filter(class_name="bright")
    assert set(bright.table["chip_id"].to_pylist()) == {
        chip for chip, answer in by_hand(chips, codes).items() if answer == 7
    }
    with pytest.raises(rd.PlanError, match=r"embed\(to=\).*ends in .parquet"):
        chips.embed(means, tmp_path / "embeddings.tif")
    with pytest.raises(rd.ModelError, match="expected one answer for each chip"):
        chips.embed(lambda pixels: pixels)


def test_vectors_stay_with_the_chip_table(chips: rd.Chips, want: dict[str, Any]) -> None:
    both = chips.with_table(chips.embed(means).select(["chip_id", "vector"]))
    with pytest.warns(UserWarning, match="columns that stay in the chip table and are no labels .*: vector"):
        batch = next(iter(both.stream(batch_size=4)))
    check(both.table, want)
    assert "labels/vector" not in batch


def test_a_large_model_travels_once(chips: rd.Chips, want: dict[str, Any], tmp_path: Path) -> None:
    heavy = rd.Model(Heavy(), version="1")
    with (
        LocalCluster(1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        check(chips.embed(heavy, client=client), want)
        chips.embed(heavy, tmp_path / "out.parquet", client=client, progress=False)
    check(pq.read_table(tmp_path / "out.parquet"), want)


def test_own_embeddings_join_as_a_source(chips: rd.Chips, s2: rd.Collection, tmp_path: Path) -> None:
    """A map whose pixels are chips: any other plan on the same lattice gets each chip's vector."""
    vectors_of = chips.embed(encoder)
    outputs = Outputs("values", names=["e0", "e1", "e2"])
    chips.predict(encoder, outputs, to=tmp_path / "embeddings.tif", progress=False)
    ours = rd.build_from_files(str(tmp_path / "embeddings.tif"), name="ours", static=True)
    assert ours.bands == ("e0", "e1", "e2")
    red = s2.harmonize(["red"], time="1MS")
    loaded = rd.join(red=red, ours=ours.harmonize()).chips(32, cell_km=0.96).load()
    assert isinstance(loaded, xr.DataTree)
    pixels = loaded["ours"].to_dataset()["pixels"]
    assert pixels.shape[1:] == (1, 3, 1, 1)
    want = dict(zip(vectors_of["chip_id"].to_pylist(), vectors_of["vector"].to_pylist(), strict=True))
    assert len(pixels) > 20
    for chip, vector in zip(pixels["chip_id"].values, pixels.values[:, 0, :, 0, 0], strict=True):
        answer = want[str(chip)]
        np.testing.assert_allclose(vector, [np.nan] * 3 if answer is None else answer, rtol=0, atol=1e-6)


# Chips of a store


def test_stored_chips_have_the_answers_of_planned_ones(chips: rd.Chips, tmp_path: Path) -> None:
    """Of the same pixels: vectors, classes and probabilities, whichever chips were chosen of the store."""
    kept = chips.filter_pixels(min_valid=0.1)
    written(kept, tmp_path / "chips.zarr", 60_000)
    stored = rd.open_chips(tmp_path / "chips.zarr")
    assert len(stored.stored.shards) > 3
    planned = kept.embed(means)
    vectors = stored.embed(means)
    shared = [
        name for name in planned.column_names if name not in ("start_datetime", "end_datetime", "vector")
    ]
    order = [("chip_id", "ascending")]
    one, other = planned.sort_by(order), vectors.sort_by(order)
    assert one.select(shared).equals(other.select(shared))
    np.testing.assert_allclose(
        np.array(other["vector"].to_pylist()), np.array(one["vector"].to_pylist()), rtol=0, atol=1e-6
    )
    for begin, end in zip(
        vectors["start_datetime"].to_pylist(), vectors["end_datetime"].to_pylist(), strict=True
    ):
        assert begin <= end
    named = Outputs("classes", classes={1: "dark", 7: "bright"})
    val, path = stored.select("val"), tmp_path / "val.parquet"
    report = val.predict(codes, named, to=path, progress=False)
    assert (report.committed, report.kept) == (True, len(val))
    want = by_hand(kept.select("val"), codes)
    check(pq.read_table(path), {chip: want[chip] for chip in val}, "class")
    data = path.read_bytes()
    assert val.predict(codes, named, to=path, progress=False).shards_written == 0
    assert path.read_bytes() == data
    check(val.predict(shares, "probabilities"), by_hand(kept.select("val"), shares), "probabilities")


def test_a_cluster_answers_for_stored_chips_too(chips: rd.Chips, tmp_path: Path) -> None:
    written(chips, tmp_path / "chips.zarr", 60_000)
    stored = rd.open_chips(tmp_path / "chips.zarr")
    stored.embed(means, tmp_path / "here.parquet", progress=False)
    with (
        LocalCluster(1, threads_per_worker=2, processes=False, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        stored.embed(means, tmp_path / "there.parquet", client=client, progress=False)
        assert stored.embed(means, client=client).equals(stored.embed(means))
    assert (tmp_path / "there.parquet").read_bytes() == (tmp_path / "here.parquet").read_bytes()


def test_what_stored_chips_cannot_be_asked_is_told(chips: rd.Chips, tmp_path: Path) -> None:
    chips.select("val").to_zarr(tmp_path / "chips.zarr", progress=False)
    stored = rd.open_chips(tmp_path / "chips.zarr")
    for to in ("map.zarr", "map.tif"):
        with pytest.raises(rd.PlanError, match=r"a row a chip.*chips\(cover=True\)"):
            stored.predict(means, to=tmp_path / to)
    with pytest.raises(rd.ModelError, match="32 x 32 numbers for a chip"):
        stored.predict(lambda pixels: pixels)
    with pytest.raises(rd.PlanError, match=r"limits=.*Give to="):
        stored.embed(means, limits=rd.RunLimits(max_time="1h"))
    assert not list(tmp_path.glob("map*"))
