"""[predict] and [export] of recipes and the commands of these names: what Python's calls write, from one file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import xarray as xr

import rasteret_dask as rd
from rasteret_dask.cli.app import main
from rasteret_dask.cli.exitcodes import ExitCode
from rasteret_dask.recipes.functions import named

SCENES = """
[collections.s2]
records = "s2.parquet"
harmonize = { bands = ["red", "nir"], time = "3MS", mask = "clouds", pick = "median" }

[chips]
size = 64
stride = 48
cover = true
"""

PREDICT = """
[predict]
model = "mymodel:scores"
activation = "softmax"
outputs = "classes"
classes = { 1 = "bare", 7 = "green" }
colors = { bare = "#d8b365", 7 = "#5ab45a" }
normalize = "stats.json"
batch_size = 5
blend = "mean"
to = "map.zarr"
"""

MODULE = """
import numpy as np


def scores(pixels):
    return np.stack([pixels[:, 0], pixels[:, 1]], axis=1)


def vectors(pixels):
    return pixels.mean(axis=(-2, -1))
"""


@pytest.fixture(scope="module")
def place(s2: rd.Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with records, statistics and a model."""
    folder = tmp_path_factory.mktemp("exits")
    s2.export(folder / "s2.parquet")
    (folder / "mymodel.py").write_text(MODULE)
    (folder / "map.toml").write_text(SCENES + PREDICT)
    chips(folder).stats(sample=4, progress=False).save(folder / "stats.json")
    return folder


def chips(folder: Path) -> rd.Chips:
    """Return the chips that the recipe says, made in Python."""
    s2 = rd.load(folder / "s2.parquet", "s2")
    return s2.harmonize(["red", "nir"], time="3MS", mask="clouds", pick="median").chips(
        64, stride=48, cover=True
    )


def scores(pixels: Any) -> Any:
    return np.stack([pixels[:, 0], pixels[:, 1]], axis=1)


def opened(place: Path) -> xr.Dataset:
    """Return a map of one zone."""
    made = rd.open_map(place)
    assert isinstance(made, xr.Dataset)
    return made


def same(one: xr.Dataset, other: xr.Dataset) -> None:
    """Compare maps, pixel by pixel."""
    xr.testing.assert_identical(one.load().drop_attrs(), other.load().drop_attrs())


@pytest.fixture
def call(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs a command in this process: exit code, stdout, stderr."""
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it in its workers

    def called(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(map(str, arguments)))
        return code, *capsys.readouterr()

    return called


@pytest.fixture(scope="module")
def truth(place: Path) -> xr.Dataset:
    """Return the map that Python's call gives."""
    model = rd.Model(scores, normalize=rd.Stats.load(place / "stats.json"), activation="softmax")
    outputs = rd.Outputs("classes", classes={1: "bare", 7: "green"}, colors={"bare": "#d8b365", 7: "#5ab45a"})
    made = chips(place).predict(model, outputs=outputs, blend="mean", batch_size=5, progress=False)
    assert isinstance(made, xr.Dataset)
    return made


def test_a_recipe_makes_the_map_that_python_makes(place: Path, truth: xr.Dataset) -> None:
    recipe = rd.load_recipe(place / "map.toml")
    assert [str(output) for output in recipe.outputs] == ["predict map.zarr"]
    assert list(recipe.explain()) == ["predict map.zarr"]
    (report,) = recipe.run(progress=False)
    assert isinstance(report, rd.JobReport)
    assert report.committed
    made = opened(place / "map.zarr")
    same(made, truth)
    assert made["classes"].attrs == truth["classes"].attrs
    assert {1, 7} <= set(np.unique(made["classes"]).tolist()) <= {0, 1, 7}
    (again,) = recipe.run(progress=False)
    assert isinstance(again, rd.JobReport)
    assert not again.shards_written


def test_options_of_the_command_stand_over_the_recipe(
    place: Path, truth: xr.Dataset, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "bare.toml").write_text(SCENES)
    monkeypatch.chdir(tmp_path)
    options = [
        "--model", "mymodel:scores", "--to", "own.zarr", "--outputs", "classes", "--classes", "1=bare,7=green",
        "--colors", "bare=#d8b365,7=#5ab45a", "--normalize", place / "stats.json", "--activation", "softmax",
        "--blend", "mean", "--batch-size", "5",
    ]  # fmt: skip
    code, out, _ = call("predict", place / "bare.toml", *options, "--json", "-q")
    assert code == ExitCode.DONE
    (document,) = json.loads(out)
    assert document["kind"] == "predict"
    assert document["report"]["committed"]
    same(opened(tmp_path / "own.zarr"), truth)
    code, out, _ = call("predict", place / "bare.toml", *options, "-q")
    assert (code, "nothing was left to write" in out) == (ExitCode.DONE, True)
    assert call("predict", place / "map.toml", "--to", "max.zarr", "--blend", "max", "-q")[0] == ExitCode.DONE
    assert opened(tmp_path / "max.zarr")["classes"].shape == truth["classes"].shape


def test_a_dry_run_writes_nothing(place: Path, call: Callable[..., Any], tmp_path: Path) -> None:
    """It tells of the map what ``plan_map`` does, and of the chips what ``explain`` does."""
    dry = ["predict", place / "map.toml", "--to", tmp_path / "none.zarr", "--dry-run"]
    code, out, _ = call(*dry)
    assert code == ExitCode.DONE
    for words in ("grids", "blocks", "peak per task", "a memory limit of", "coverage", "chips"):
        assert words in out
    code, out, _ = call(*dry, "--json")
    ((name, document),) = json.loads(out).items()
    assert name == f"predict {tmp_path / 'none.zarr'}"
    model = rd.Model(scores, normalize=rd.Stats.load(place / "stats.json"), activation="softmax")
    named = rd.Outputs("classes", classes={1: "bare", 7: "green"})
    plan = chips(place).plan_map(model, named, blend="mean", batch_size=5)
    assert document["map"] == json.loads(json.dumps(plan.explain()))
    assert document["chips"] == len(chips(place))
    code, out, _ = call(*dry[:3], tmp_path / "tiles", "--tile-px", "512", "--dry-run", "--json")
    assert next(iter(json.loads(out).values()))["map"]["block_px"] == 512
    assert list(tmp_path.iterdir()) == []


def test_a_saved_plan_is_predicted_and_exported_as_its_chips_are(
    place: Path, truth: xr.Dataset, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)  # where the model's module lies
    plan, model = tmp_path / "plan", [
        "--model", "mymodel:scores", "--outputs", "classes", "--classes", "1=bare,7=green", "--activation", "softmax",
        "--colors", "bare=#d8b365,7=#5ab45a", "--normalize", "stats.json", "--blend", "mean",
    ]  # fmt: skip
    chips(place).save_plan(plan)
    code, out, _ = call("predict", plan, *model, "--to", tmp_path / "map.zarr", "--dry-run", "--json")
    told = next(iter(json.loads(out).values()))
    assert (code, told["chips"]) == (ExitCode.DONE, len(chips(place)))
    assert told["map"]["pixels"] == truth["count"].size
    assert not (tmp_path / "map.zarr").exists()
    code, out, _ = call("predict", plan, *model, "--to", tmp_path / "map.zarr", "--json", "-q")
    assert (code, json.loads(out)["report"]["committed"]) == (ExitCode.DONE, True)
    same(opened(tmp_path / "map.zarr"), truth)
    assert call("predict", plan, "--model", "mymodel:vectors", "--to", tmp_path / "v.parquet", "-q")[0] == 0
    chips(place).predict(vectors, to=tmp_path / "want.parquet", progress=False)
    assert pq.read_table(tmp_path / "v.parquet").equals(pq.read_table(tmp_path / "want.parquet"))

    s2 = rd.load(place / "s2.parquet", "s2").harmonize(["red"], time="3MS", dtype="uint16")
    some = s2.chips(32, cell_km=0.64).split(train=0.5, val=0.5, seed=1).sample(3, by="split")
    some.save_plan(tmp_path / "train")
    some.to_geotiff(tmp_path / "want", progress=False)
    assert call("export", tmp_path / "train", "--to", tmp_path / "tifs", "-q")[0] == ExitCode.DONE
    assert files_of(tmp_path / "tifs") == files_of(tmp_path / "want")
    assert call("export", tmp_path / "train", "--to", tmp_path / "val", "--split", "val", "-q")[0] == 0
    assert set(content(tmp_path / "val")) == {f for f in content(tmp_path / "want") if f.startswith("val/")}


def test_functions_of_a_saved_plan_are_named(
    place: Path, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "mycode.py").write_text("def halved(pixels):\n    return pixels * 0.5\n")
    s2 = rd.load(place / "s2.parquet", "s2").harmonize(["red"], time="3MS")
    some = s2.chips(32, cell_km=0.64).sample(3).map(named("mycode:halved", place))
    some.save_plan(tmp_path / "plan")
    some.to_geotiff(tmp_path / "want", progress=False)
    monkeypatch.chdir(tmp_path)
    code, _, told = call("export", "plan", "--to", "tifs", "-q")
    assert (code, "--function mycode:halved" in told) == (ExitCode.USAGE, True), told
    assert call("export", "plan", "--to", "tifs", "-q", "--function", place / "mycode.py:halved")[0] == 0
    assert files_of(tmp_path / "tifs") == files_of(tmp_path / "want")
    monkeypatch.chdir(place)  # where the module lies
    code, _, told = call(
        "export", tmp_path / "plan", "--to", tmp_path / "again", "-q", "--function", "mycode:halved"
    )
    assert (code, files_of(tmp_path / "again")) == (ExitCode.DONE, files_of(tmp_path / "want")), told
    for words in (("predict", "map.toml"), ("export", "map.toml", "--to", "x")):
        code, _, told = call(*words, "--function", "mycode:halved")
        assert (code, "only a saved plan" in told) == (ExitCode.USAGE, True), told


def test_what_a_saved_plan_cannot_say_is_told(place: Path, call: Callable[..., Any], tmp_path: Path) -> None:
    plan = tmp_path / "plan"
    chips(place).save_plan(plan)
    for words, match in {
        ("predict", plan, "--to", "a.zarr"): "--model",
        ("predict", plan, "--model", "mymodel:scores"): "--to",
        ("predict", plan, "--set", "chips.size=1"): "name a recipe",
        ("export", plan, "--to", tmp_path / "a", "--split", "val"): "this one has none",
        ("export", plan): "--to",
    }.items():
        code, _, told = call(*words)
        assert (code, match in told) == (ExitCode.USAGE, True), told
    (plan / "provenance.json").unlink()
    code, _, told = call("export", plan, "--to", tmp_path / "a")
    assert (code, "Save the plan again" in told) == (ExitCode.FAILED, True)


def vectors(pixels: Any) -> Any:
    return pixels.mean(axis=(-2, -1))


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the files of an export, but what tells of the run."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.relative_to(folder).parts[0] not in ("_job", "manifest.parquet")
    }


def test_tables_and_commands_have_the_arguments_of_python() -> None:
    """What a call takes, a recipe takes, by the same name."""
    from rasteret_dask.recipes.arguments import parameters
    from rasteret_dask.recipes.models import ExportTable, PredictTable

    asked = [*parameters(rd.Chips.predict), *parameters(rd.Model), *parameters(rd.Outputs)]
    asked += [*parameters(rd.MapZarr), *parameters(rd.CogTiles)]
    elsewhere = {"client", "progress", "limits", "call", "kind", "store", "folder", "compute"}
    assert set(asked) - elsewhere <= set(PredictTable.model_fields)
    files = {*parameters(rd.Chips.to_geotiff), *parameters(rd.Chips.to_webdataset)}
    assert files - elsewhere <= set(ExportTable.model_fields)


FAULTS = {
    "no model": ('model = "mymodel:scores"\n', "", "'model' in predict"),
    "no such function": ("mymodel:scores", "mymodel:score", "Did you mean 'scores'?"),
    "no such file": ("mymodel:scores", "unet.onnx", "no such file"),
    "another word": ('blend = "mean"', 'blend = "men"', "predict.blend"),
    "both kinds of targets": ('to = "map.zarr"', 'to = "map"\ntile_px = 512\nblock_px = 512', "Leave one out"),
    "no colour": ("#d8b365", "brown", "'#rrggbb'"),
    "another number of classes": ("7 = \"green\" }", '7 = "green", 8 = "wet" }', "classes"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_mistakes_are_told_before_anything_is_written(
    name: str, place: Path, call: Callable[..., Any], tmp_path: Path
) -> None:
    old, new, words = FAULTS[name]
    text = SCENES + PREDICT
    assert old in text
    text = text.replace(old, new).replace('to = "map', f'to = "{tmp_path}/map')
    (place / "wrong.toml").write_text(text)
    code, _, told = call("run", place / "wrong.toml", "-q")
    assert code != ExitCode.DONE
    assert words in told
    assert not list(tmp_path.iterdir())


def test_without_a_table_the_command_says_which_options_it_needs(
    place: Path, call: Callable[..., Any]
) -> None:
    (place / "bare.toml").write_text(SCENES)
    code, _, told = call("predict", place / "bare.toml")
    assert code == ExitCode.USAGE
    assert "--model and --to" in told
    code, _, told = call("export", place / "bare.toml")
    assert code == ExitCode.USAGE
    assert "--to" in told


def test_chips_are_exported_as_python_exports_them(
    place: Path, call: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "files.toml").write_text(SCENES + '\n[export]\nto = "tiffs"\n')
    rd.load_recipe(place / "files.toml").run(progress=False)
    chips(place).to_geotiff(tmp_path / "python", progress=False)
    assert content(place / "tiffs") == content(tmp_path / "python")
    monkeypatch.chdir(tmp_path)
    code, out, _ = call("export", place / "files.toml", "--to", "tars", "--format", "webdataset", "-q")
    assert code == ExitCode.DONE
    assert "finished" in out
    assert list(Path("tars").glob("*.tar"))


def content(folder: Path) -> dict[str, bytes]:
    """Return the files for readers, without what the package keeps for itself."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.tif"))}


def test_a_vector_for_each_chip_goes_to_a_table(place: Path, tmp_path: Path) -> None:
    text = SCENES + f'\n[predict]\nmodel = "mymodel:vectors"\nto = "{tmp_path}/vectors.parquet"\n'
    (place / "vectors.toml").write_text(text)
    rd.load_recipe(place / "vectors.toml").run(progress=False)
    import pyarrow.parquet as pq

    assert pq.read_table(tmp_path / "vectors.parquet").num_rows == len(chips(place))
