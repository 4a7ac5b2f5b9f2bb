"""Recipes: a job as one TOML file, its mistakes, and what is kept of it."""

from __future__ import annotations

import os
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.config
import numpy as np
import psutil
import pytest

import rasteret_dask as rd
from rasteret_dask.chipset import Chips
from rasteret_dask.demo.world import World
from rasteret_dask.launching import slurm
from rasteret_dask.recipes.arguments import documented, parameters, toml_type
from rasteret_dask.recipes.functions import named
from rasteret_dask.recipes.models import BEGINNINGS, RECORD_STEPS, Document
from rasteret_dask.recipes.placement import placement_of
from rasteret_dask.recipes.source import setting
from rasteret_dask.recipes.starting import starter

JOB = """\
[collections.s2]
records = "s2.parquet"
subset.date_range = ["2024-04-01", 2024-06-30]
subset.cloud_cover_lt = 60

[collections.l8]
records = "l8.parquet"

[collections.optical]
merge = ["s2", "l8"]

[collections.optical.harmonize]
bands = ["red", "nir"]
resolution = 10
time = "1MS"
mask = "clouds"

[chips]
size = 32
cell_km = 0.64

[split]
seed = 42

[[steps]]
filter = [["slots", ">", 0]]

[[outputs]]
zarr = "out.zarr"
splits = ["train"]
"""


@pytest.fixture(scope="module")
def place(
    small_world: World, s2: rd.Collection, l8: rd.Collection, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Return a folder where ``demo/world`` is the small world, with the tables of two of its collections."""
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "demo").mkdir()
    (folder / "demo" / "world").symlink_to(small_world.sentinel2.parents[1])
    for collection in (s2, l8):
        collection.export(folder / f"{collection.name}.parquet")
    return folder


@pytest.fixture
def folder(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of the test's own for recipes; this process works where the demo's world is."""
    monkeypatch.chdir(place)
    return with_records(place, tmp_path)


def with_records(place: Path, folder: Path) -> Path:
    for name in ("s2", "l8"):
        (folder / f"{name}.parquet").symlink_to(place / f"{name}.parquet")
    return folder


def written(folder: Path, text: str = JOB, name: str = "job.toml") -> Path:
    (folder / name).write_text(text)
    return folder / name


# Mistakes

MISTAKES = {
    "unknown key": ("size = 32", "sise = 32", 19, "unknown key 'sise' in chips", "Did you mean 'size'?"),
    "unknown table": ("[split]", "[spilt]", 22, "unknown key 'spilt' in the recipe", "Did you mean 'split'?"),
    "unknown argument": ("time = ", "tme = ", 15, "unknown key 'tme'", "Did you mean 'time'?"),
    "wrong type": ("size = 32", 'size = "32"', 19, 'chips.size = "32"; expected a whole number', ""),
    "float for int": ("size = 32", "size = 32.5", 19, "expected a whole number", ""),
    "wrong word": ('"clouds"', '"cloud"', 16, "expected one of 'clouds', 'snow', 'water'", "Did you mean 'clouds'?"),
    "missing key": ("size = 32\n", "", 18, "no key 'size' in chips", ""),
    "unknown collection": ('["s2", "l8"]', '["s2", "l9"]', 10, "optical.merge[1] = 'l9'", "Did you mean 'l8'?"),
    "circle": ('records = "l8.parquet"', 'from = "optical"', 6, "l8 needs optical needs l8", "dataset"),
    "two beginnings": ('merge = ["s2", "l8"]', 'merge = ["s2"]\nfrom = "l8"', 9, "'from' and 'merge'", ""),
    "no beginning": ('merge = ["s2", "l8"]', 'merg = ["s2"]', 9, "none of its first keys", "'merge' instead of"),
    "two outputs in one": ('zarr = "out.zarr"', 'zarr = "o"\ntable = "t"', 28, "'zarr' and 'table'", "exactly one of"),
    "no output": ('zarr = "out.zarr"', 'zar = "o"', 28, "none of its first keys", "'zarr' instead of 'zar'?"),
    "two steps in one": ('filter = [["slots", ">", 0]]', "sample = 3\nmap = 'a:b'", 25, "'sample' and 'map'", ""),
    "no TOML": ("size = 32", "size = 32,", 19, "no TOML", ""),
    "True": ("size = 32", "size = True", 19, "no TOML", "TOML writes true and false"),
    "no quotes": ('"clouds"', "clouds", 16, "no TOML", "text stands in quotes"),
    "a key twice": ("size = 32", "size = 32\nsize = 3", 20, "no TOML", ""),
    "unfinished": ('splits = ["train"]', 'splits = ["train"', 30, "no TOML", ""),
    "codec": ('zarr = "out.zarr"', 'zarr = "o"\ncompression = { codec = "zstd", level = "x" }', 30, "compression", ""),
    "compression": ('zarr = "out.zarr"', 'zarr = "o"\ncompression = "zstt"', 30, "compression", "Did you mean 'zstd'?"),
}  # fmt: skip
"""{what: (text, what it becomes, line, what the message says, what it proposes)}, told by load_recipe."""

LATER = {
    "wrong split": ('["train"]', '["tran"]', 30, "split 'tran', in select", ""),
    "dataset": ('records = "l8.parquet"', 'dataset = "demo/landsat"', 7, "no such id, in dataset 'demo/landsat'", ""),
    "band": ('["red", "nir"]', '["red", "nirr"]', 13, "no such band", "Did you mean nir?"),
    "number": ("resolution = 10", "resolution = -10", 14, "-10, in harmonize(resolution=)", "a positive"),
    "slot": ('"1MS"', '"1QX"', 15, "'1QX', in harmonize(time=)", "a pandas offset"),
    "column": ("cloud_cover_lt", "cloud_cver_lt", 4, "no such column", "Did you mean 'cloud_cover_lt'?"),
    "percent": ("= 60", "= 600", 4, "600, in subset(cloud_cover_lt=)", "a percentage"),
    "dates": ('"2024-04-01"', '"2024-14-01"', 3, "'2024-14-01', in date_range", "ISO 8601"),
    "shares": ("seed = 42", "seed = 42\ntrain = 0.9\nval = 0.3", 22, "sum 1.2", "sum to 1"),
    "split": ('["train"]', '["tran"]', 30, "'tran'", "train"),
    "grid": ("size = 32", 'size = 32\ngrid = "EPSG:4326"', 20, "EPSG:4326", "in metres"),
    "digits": ("size = 32", 'size = 32\naoi = { wkb = "01zz" }', 20, "wkb = '01zz'", "hexadecimal digits"),
    "bytes": ("size = 32", 'size = 32\naoi = { wkb = "01ff" }', 20, "Unexpected EOF", "hexadecimal"),
    "shapes": ("size = 32", 'size = 32\naoi = "a.geojson"', 20, "no such file", "GeoJSON"),
    "reference": ("size = 32", 'size = 32\nreference = "optic"', 20, "'optic'", ""),
    "size": ("size = 32", "size = 999", 18, "9990 m", "Choose a smaller size"),
    "operator": ('">", 0', '"=>", 0', 26, "'=>'", "operator one of"),
    "chip column": ('"slots"', '"slts"', 26, "'slts'", ""),
    "path": ('filter = [["slots", ">", 0]]', 'map = "code/mycde.py:f"', 26, "no module 'mycde'", "Put mycde.py into"),
    "function": ('filter = [["slots", ">", 0]]', 'map = "mycde:f"', 26, "no module 'mycde'", "Put mycde.py into"),
    "function name": ('filter = [["slots", ">", 0]]', 'map = "os:getcw"', 26, "no 'getcw' in os", "'getcwd'?"),
    "rule": ('"clouds"', '{ rule = "Clases" }', 16, "no module and name", ""),
    "rule field": ('"clouds"', '{ rule = "Classes", band = "SCL", clases = [3] }', 16, "'clases'", "'classes'?"),
    "records": ('records = "l8.parquet"', 'records = "no.parquet"', 7, "nothing there", "a Parquet file"),
    "files": ('records = "l8.parquet"', 'files = "no/*.tif"', 7, "no/*.tif", ""),
}  # fmt: skip
"""The same, told where the recipe is carried out."""


def test_a_split_of_a_later_output_is_looked_for_before_anything_is_written(folder: Path) -> None:
    path = written(folder, JOB + '\n[[outputs]]\nzarr = "other.zarr"\nsplits = ["tran"]\n')
    with pytest.raises(rd.RecipeError, match=r"'tran'"):
        rd.load_recipe(path).run(progress=False)
    assert not (folder / "out.zarr").exists()


def check(told: pytest.ExceptionInfo[rd.RecipeError], path: Path, wanted: tuple[Any, ...]) -> None:
    _, _, line, words, proposal = wanted
    error = told.value
    assert (error.path, error.line) == (str(path), line), error
    assert str(error).startswith(f"recipe {path}:{line}: found ")
    assert words in str(error)
    assert proposal in str(error)
    copy = pickle.loads(pickle.dumps(error))
    assert (str(copy), copy.line) == (str(error), line)


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_told_with_its_line(folder: Path, what: str) -> None:
    before, after, *_ = MISTAKES[what]
    assert JOB.count(before) == 1
    path = written(folder, JOB.replace(before, after))
    with pytest.raises(rd.RecipeError) as told:
        rd.load_recipe(path)
    check(told, path, MISTAKES[what])


@pytest.mark.parametrize("what", LATER)
def test_what_the_api_refuses_is_told_with_the_line_and_its_cause(folder: Path, what: str) -> None:
    before, after, *_ = LATER[what]
    assert JOB.count(before) >= 1
    path = written(folder, JOB.replace(before, after, 1))
    recipe = rd.load_recipe(path)
    with pytest.raises(rd.RecipeError) as told:
        recipe.explain()
    check(told, path, LATER[what])
    assert isinstance(told.value.__cause__, rd.RasteretDaskError)


def test_a_missing_file_is_told_with_its_neighbours(folder: Path) -> None:
    written(folder, name="train.toml")
    with pytest.raises(rd.RecipeError, match=r"no such file; expected .*Did you mean 'train.toml'"):
        rd.load_recipe(folder / "trian.toml")
    with pytest.raises(rd.RecipeError, match=r"folder. Name a file in it: train.toml"):
        rd.load_recipe(folder)


def test_a_file_that_is_no_text_is_told_with_its_line(folder: Path) -> None:
    (folder / "x.toml").write_bytes(b"[chips]\nsize = 3 # \xff\n")
    with pytest.raises(rd.RecipeError, match=r"x.toml:2: found bytes that are no UTF-8"):
        rd.load_recipe(folder / "x.toml")


def test_several_mistakes_are_counted_in_one_message(folder: Path) -> None:
    path = written(folder, JOB.replace("size = 32", "sise = 32").replace("seed = 42", 'seed = "x"'))
    with pytest.raises(
        rd.RecipeError, match=r"'sise'.* See also line 23, split.seed = \"x\" \(expected a whole number\)\."
    ):
        rd.load_recipe(path)


def test_a_recipe_without_outputs_is_refused_before_it_plans_and_takes_one_beside_it(folder: Path) -> None:
    path = written(folder, JOB[: JOB.index("[[outputs]]")])
    with pytest.raises(
        rd.RecipeError,
        match=r"found no \[\[outputs\]\], \[predict\] or \[export\]; .*--set outputs\.0\.zarr=train\.zarr",
    ):
        rd.load_recipe(path).run(progress=False)
    recipe = rd.load_recipe(path, overrides={"outputs.0.zarr": "beside.zarr"})
    recipe.run(progress=False)
    assert (folder / "beside.zarr" / "zarr.json").exists()
    again = rd.load_recipe(written(folder, recipe.text))
    assert [str(output) for output in again.outputs] == ["zarr beside.zarr"]


def test_a_recipe_must_say_which_collection_where_several_are_the_last(folder: Path) -> None:
    text = JOB.replace(
        "[chips]", '[collections.few]\nfrom = "optical"\n[collections.other]\nfrom = "l8"\n[chips]'
    )
    with pytest.raises(rd.RecipeError, match=r"several that no other uses: few, other"):
        rd.load_recipe(written(folder, text))
    recipe = rd.load_recipe(written(folder, text), {"chips.collection": "few"})
    assert recipe.chips().plan
    with pytest.raises(rd.RecipeError, match=r"--set chips.collection: .*'fw'.*Did you mean 'few'"):
        rd.load_recipe(written(folder, text), {"chips.collection": "fw"})


# Overrides


def test_values_are_put_over_those_of_the_file(folder: Path) -> None:
    settings = ["chips.size=64", 'collections.s2.subset."eo:x"=3', "outputs.0.zarr=b.zarr", "split.seed=7",
                "outputs.1={ table = 't.parquet' }", "chips.reference='optical'"]  # fmt: skip
    recipe = rd.load_recipe(written(folder), dict(map(setting, settings)))
    values = recipe.source.document
    assert values["chips"] == {"size": 64, "cell_km": 0.64, "reference": "optical"}
    assert values["collections"]["s2"]["subset"]["eo:x"] == 3
    assert [output.name for output in recipe.outputs] == ["b.zarr", "t.parquet"]
    assert values["split"]["seed"] == 7
    again = rd.load_recipe(written(folder, recipe.text, "again.toml"))
    assert again.source.document == values
    assert (folder / "job.toml").read_text() == JOB


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("chips.sise", "unknown key 'sise' in chips; expected one of size, stride"),
        ("chip.size", "unknown key 'chip' in the recipe"),
        ("chips.size.x", "where no value can be"), ("outputs.7.zarr", "'7' in an array of 1"),
        ("outputs.first.zarr", "'first' in an array of 1"), ("a b", "where no value can be"),
        ("outputs.0.splits.0", "splits[0]"),
    ],
)  # fmt: skip
def test_a_wrong_path_of_an_override_is_named(folder: Path, key: str, words: str) -> None:
    with pytest.raises(rd.RecipeError) as told:
        rd.load_recipe(written(folder), {key: 64})
    assert str(told.value).startswith(f"recipe {folder / 'job.toml'} with --set {key}: found ")
    assert words in str(told.value)
    assert told.value.line is None


@pytest.mark.parametrize("text", ["chips.size", "=3", ""])
def test_a_setting_has_a_key_and_a_value(text: str) -> None:
    with pytest.raises(rd.RecipeError, match="no key and value"):
        setting(text)


# The models


@pytest.mark.parametrize(
    ("begins", "function", "left_out"),
    [
        ("dataset", rd.build, {"filter", "force", "progress"}),
        ("stac", rd.build_from_stac,
         {"source", "stac_api", "collection", "workspace_dir", "filter", "force", "progress"}),
        ("stac_api", rd.build_from_stac, {"source", "workspace_dir", "filter", "force", "progress"}),
        ("files", rd.build_from_files, set()),
        ("table", rd.build_from_table, set()),
        ("records", rd.load, {"path"}),
    ],
)  # fmt: skip
def test_every_argument_can_be_said(begins: str, function: Callable[..., Any], left_out: set[str]) -> None:
    arguments = set(parameters(function)) - left_out - {"filter"}  # cql2, as filter is a step
    keys = BEGINNINGS[begins].model_fields.keys() - set(RECORD_STEPS) - {"cql2"}
    assert arguments == keys - ({begins} - arguments)


@pytest.mark.parametrize(
    ("key", "function", "left_out"),
    [
        ("chips", rd.Collection.chips, set()), ("split", Chips.split, set()),
    ],
)  # fmt: skip
def test_every_argument_of_a_method_can_be_said(key: str, function: Any, left_out: set[str]) -> None:
    (table,) = [one for one in (Document.model_fields[key].annotation,) if one is not None]
    assert set(parameters(function)) - left_out <= table.model_fields.keys()


def test_arguments_are_explained_by_their_docstrings() -> None:
    words = documented(Chips.split)
    assert words["train"] == words["test"] == words["val"]
    assert words["train"].startswith("Shares of the ground. Nothing: 0.7")
    assert set(documented(rd.build)) >= set(parameters(rd.build))


def test_an_argument_that_takes_anything_wants_a_type_of_toml() -> None:
    with pytest.raises(TypeError, match=r"chips\.aoi: no type of TOML"):
        toml_type(Any, "chips.aoi")


# Running


@pytest.fixture(scope="module")
def ran(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe that was run there, with a comment that names a signed URL."""
    folder = with_records(place, tmp_path_factory.mktemp("ran"))
    before = Path.cwd()
    os.chdir(place)
    try:
        path = written(folder, JOB + "# was: https://ann:pass@host.example/items.json?token=secret\n")
        (report,) = rd.load_recipe(path, {"split.seed": 7}).run(progress=False)
    finally:
        os.chdir(before)
    assert isinstance(report, rd.JobReport)
    assert report.committed
    return folder


def test_a_store_keeps_its_recipe_as_it_ran(ran: Path, folder: Path) -> None:
    kept = (ran / "out.zarr" / "_job" / "recipe.toml").read_text()
    assert kept == JOB.replace("seed = 42", "seed = 7") + "# was: https://host.example/items.json\n"
    report = rd.verify(ran / "out.zarr")
    assert report.ok
    assert not report.unexpected
    (ran / "out.zarr" / "_job" / "recipe.toml").write_text(kept + "#")
    assert rd.verify(ran / "out.zarr").damaged == ("_job/recipe.toml",)
    (ran / "out.zarr" / "_job" / "recipe.toml").write_text(kept)
    again = rd.load_recipe(written(ran, kept, "again.toml")).run(progress=False)
    assert [report.shards_written for report in again if isinstance(report, rd.JobReport)] == [0]


def test_another_run_does_nothing_and_says_so(
    ran: Path, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    store = ran / "out.zarr"
    before = {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}
    (report,) = rd.load_recipe(ran / "job.toml", {"split.seed": 7}).run()
    assert "is finished: nothing to do" in capsys.readouterr().err
    assert isinstance(report, rd.JobReport)
    assert report.shards_written == 0
    assert {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()} == before


def test_another_recipe_is_refused_and_what_differs_is_named(
    ran: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    other = rd.load_recipe(ran / "job.toml", {"collections.optical.harmonize.mask": "water"})
    with pytest.raises(rd.StoreError, match="chips of another plan") as told:
        other.run(progress=False)
    assert 'collections.optical.harmonize.mask is "clouds" in the store and "water" here' in str(told.value)
    assert "split.seed is 7 in the store and 42 here" in str(told.value)


def test_an_unfinished_store_is_finished_by_another_text_of_the_same_job(folder: Path) -> None:
    path = written(folder)
    first = rd.load_recipe(path, {"chips.cell_km": 0.32})
    with pytest.raises(rd.IncompleteError):
        first.run(rd.RunLimits(max_time=1e-6), progress=False)
    kept = (folder / "out.zarr" / "_job" / "recipe.toml").read_text()
    path.write_text(f"# the same\n{first.text}")
    (report,) = rd.load_recipe(path).run(progress=False)
    assert report is not None
    assert rd.verify(folder / "out.zarr").ok
    assert (folder / "out.zarr" / "_job" / "recipe.toml").read_text() == kept


def test_what_is_made_further_in_python_is_not_the_recipe_s(folder: Path) -> None:
    recipe = rd.load_recipe(written(folder))
    recipe.chips().sample(2).to_zarr(folder / "two.zarr", progress=False)
    assert not (folder / "two.zarr" / "_job" / "recipe.toml").exists()


def test_only_the_first_part_writes_what_is_no_store(folder: Path) -> None:
    outputs = '\n[[outputs]]\ntable = "chips.parquet"\n'
    recipe = rd.load_recipe(written(folder, JOB + outputs))
    reports = recipe.run(rd.RunLimits(part=(2, 2)), progress=False)
    assert reports[1] is None
    assert not (folder / "chips.parquet").exists()
    assert recipe.run(rd.RunLimits(part=(1, 2)), progress=False)[0].committed  # type: ignore[union-attr]
    assert (folder / "chips.parquet").exists()


def test_all_outputs_are_written(folder: Path) -> None:
    text = (
        JOB
        + """
[[outputs]]
table = "all.parquet"
[[outputs]]
stats = "stats.json"
sample = 3
[[outputs]]
plan = "plan"
splits = ["val"]
[[outputs]]
zarr = "small.zarr"
splits = ["test"]
compression = { codec = "zstd", level = 3 }
on_error = "mask"
"""
    )
    recipe = rd.load_recipe(written(folder, text))
    explained = recipe.explain()
    assert list(explained) == [
        "zarr out.zarr", "table all.parquet", "stats stats.json", "plan plan", "zarr small.zarr",
    ]  # fmt: skip
    for _ in range(2):  # the second run does it again, to the same result
        _, _, stats, _, _ = recipe.run(progress=False)
    assert isinstance(stats, rd.Stats)
    assert stats.chips == 3
    chips = recipe.chips()
    assert (
        rd.load_recipe(written(folder)).chips().with_table(folder / "all.parquet").table.equals(chips.table)
    )
    assert len(rd.open_chips(folder / "small.zarr")) == len(chips.select("test"))
    assert '"name": "zstd"' in (folder / "small.zarr" / "zarr.json").read_text()


# Functions, shapes and clusters

CODE = """\
import helper

def scaled(pixels):
    return pixels * helper.FACTOR
"""


CLUSTER = '\n[cluster]\nworkers = 1\nthreads = 1\nmemory = "1GiB"\n'


def with_function(text: str = JOB) -> str:
    return text + '\n[[steps]]\nsample = 4\n[[steps]]\nmap = "mycode:scaled"\n'


def test_functions_of_the_folder_are_those_of_this_recipe(folder: Path) -> None:
    """Two recipes have modules of the same names, and each module changes once."""
    values = []
    for number in (1, 2):
        own = folder / str(number)
        own.mkdir()
        for name in ("s2", "l8"):
            (own / f"{name}.parquet").symlink_to(folder / f"{name}.parquet")
        (own / "helper.py").write_text(f"FACTOR = {number}\n")
        (own / "mycode.py").write_text(CODE)
        path = written(own, with_function())
        values.append(np.asarray(rd.load_recipe(path).chips().sample(1).load()["pixels"]))
        (own / "helper.py").write_text(f"FACTOR = 10 * {number}\n")
        (own / "mycode.py").write_text(CODE + "# changed\n")
        for name in ("helper", "mycode"):
            os.utime(own / f"{name}.py", ns=(1, 1))  # a change within the clock's resolution
        values.append(np.asarray(rd.load_recipe(path).chips().sample(1).load()["pixels"]))
    for factor, pixels in zip((10, 2, 20), values[1:], strict=True):
        np.testing.assert_allclose(pixels, factor * values[0], rtol=1e-6)
    assert str(folder) not in sys.path


@pytest.mark.parametrize("path", ["code/mine.py", "./code/mine.py", "/code/mine.py"])
def test_a_function_in_a_file(tmp_path: Path, path: str) -> None:
    own = tmp_path / "code"
    own.mkdir()
    (own / "beside.py").write_text("FACTOR = 3\n")
    (own / "mine.py").write_text(
        "from beside import FACTOR\ndef scaled(pixels):\n    return FACTOR * pixels\n"
    )
    place = f"{tmp_path}{path}" if path.startswith("/") else path
    assert named(f"{place}:scaled", tmp_path)(2) == 6
    assert str(own) not in sys.path
    with pytest.raises(rd.PlanError, match=r"no 'scald' in mine"):
        named(f"{place}:scald", tmp_path)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("limits = {}\nlimits['cloud']", "KeyError: 'cloud'"),
        ("raise RuntimeError('no licence')", "RuntimeError: no licence"),
        ("import no_such_package_here", "Install no_such_package_here, which mycode imports"),
        ("def scaled(pixels:", "was never closed"),
        ("from os import no_such_name", "cannot import name"),
    ],
)
def test_a_module_that_cannot_be_imported_is_told(folder: Path, code: str, words: str) -> None:
    (folder / "mycode.py").write_text(code)
    with pytest.raises(rd.RecipeError, match=re.escape(words)) as told:
        rd.load_recipe(written(folder, with_function())).chips()
    assert told.value.line == 35


def children() -> set[int]:
    """Return the processes of this one, but those that Python keeps for starting others."""
    me, kept = psutil.Process(), ("resource_tracker", "forkserver")
    starters = {one.pid for one in me.children() if any(word in " ".join(one.cmdline()) for word in kept)}
    return {one.pid for one in me.children(recursive=True)} - starters


def test_processes_of_a_recipe_run_its_functions_and_are_closed(folder: Path) -> None:
    (folder / "mycode.py").write_text(CODE)
    (folder / "helper.py").write_text("FACTOR = 2\n")
    before = children()
    recipe = rd.load_recipe(written(folder, with_function() + CLUSTER))
    recipe.run(progress=False)
    assert not children() - before
    stored = rd.open_chips(folder / "out.zarr").to_xarray()
    np.testing.assert_array_equal(
        stored["pixels"].values, recipe.chips().select("train").load()["pixels"].values
    )


def test_processes_of_a_recipe_are_closed_where_the_job_fails(folder: Path) -> None:
    (folder / "mycode.py").write_text(CODE)
    (folder / "helper.py").write_text("FACTOR = 'x'\n")
    before = children()
    recipe = rd.load_recipe(written(folder, with_function() + CLUSTER))
    with pytest.raises(TypeError, match="raised by map"):  # what the function itself raised
        recipe.run(progress=False)
    assert not children() - before


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_processes_end_also_where_someone_stops_the_run(folder: Path, stop: type[BaseException]) -> None:
    (folder / "mycode.py").write_text("def stop(*_):\n    return 1\n")
    before = children()
    recipe = rd.load_recipe(written(folder, JOB + "\n[cluster]\nworkers = 1\n"))
    placement = placement_of(recipe.source, None)
    assert placement is not None

    def stopped() -> None:
        with placement.cluster([]) as client:
            client.wait_for_workers(1)
            assert children() - before
            raise stop

    with pytest.raises(stop):
        stopped()
    assert not children() - before


def test_a_cluster_that_does_not_answer_is_told_before_anything_is_planned(folder: Path) -> None:
    text = (
        JOB.replace('records = "l8.parquet"', 'dataset = "no/such"')
        + '\n[cluster]\naddress = "tcp://127.0.0.1:9"\n'
    )
    recipe = rd.load_recipe(written(folder, text))
    timeout = dask.config.set({"distributed.comm.timeouts.connect": "1s"})
    with timeout, pytest.raises(rd.JobError, match=r"scheduler tcp://127.0.0.1:9: found"):
        recipe.run(progress=False)


TABLES = {
    'kind = "cloud"': 'cluster.kind = "cloud"; expected one of',
    'address = "tcp://a:1"\nworkers = 2': "cluster.address, and cluster.workers; expected nothing beside an address",
    "workers = 2\nmax_workers = 4": "cluster.workers, and cluster.max_workers; expected one of them",
    "min_workers = 2": "cluster.min_workers alone; expected max_workers too",
    "min_workers = 5\nmax_workers = 4": "from 5 to 4 workers; expected min_workers <= max_workers",
    'memory = "much"': "'much', in WorkerSize(memory=); expected at least 256 MiB",
    'idle_timeout = "later"': "'later', in cluster('local', options=) idle_timeout; expected seconds",
    'options = { queue = "short" }': "'queue', in cluster('local', options=); expected one of idle_timeout",
}
"""{what a table says: what is wrong with it}"""


@pytest.mark.parametrize("table", TABLES)
def test_a_table_about_a_cluster_that_makes_no_sense_is_told_with_its_line(folder: Path, table: str) -> None:
    with pytest.raises(rd.RecipeError, match=re.escape(TABLES[table])) as told:
        rd.load_recipe(written(folder, f"{JOB}\n[cluster]\n{table}\n"))
    assert told.value.line is not None
    assert told.value.line > JOB.count("\n")


def test_a_word_beside_the_recipe_decides_where_it_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "OPTIONS", {"queue": "of the jobs"})
    text = JOB + '\n[cluster]\nkind = "slurm"\nmax_workers = 9\nthreads = 3\noptions = { queue = "short" }\n'
    source = rd.load_recipe(written(folder, text)).source
    queue, local, address = (placement_of(source, place) for place in (None, "local", "tcp://a:1"))
    assert queue is not None
    assert local is not None
    assert address is not None
    assert (queue.place, queue.workers, queue.options) == ("slurm", (0, 9), {"queue": "short"})
    assert (local.place, local.workers, local.size, local.options) == ("local", (0, 9), queue.size, {})
    assert queue.size == rd.WorkerSize(threads=3)
    assert (address.place, address.workers, address.size, address.options) == ("tcp://a:1", None, None, {})
    with pytest.raises(rd.PlanError, match=r"'slrum'; expected one of .*Did you mean 'slurm'\?"):
        placement_of(source, "slrum")


def test_an_image_is_left_out_where_a_recipe_runs_without_containers(folder: Path) -> None:
    text = JOB + '\n[cluster]\nkind = "kubernetes"\nimage = "lab/rasteret:1"\n'
    source = rd.load_recipe(written(folder, text)).source
    for place, image in {
        None: "lab/rasteret:1",
        "gateway": "lab/rasteret:1",
        "local": None,
        "slurm": None,
    }.items():
        placement = placement_of(source, place)
        assert placement is not None
        assert placement.size == rd.WorkerSize(image=image)


def test_explain_tells_what_the_workers_of_a_cluster_need(folder: Path) -> None:
    recipe = rd.load_recipe(written(folder, JOB + "\n[cluster]\nworkers = 3\nthreads = 4\n"))
    for told in recipe.explain().values():
        assert (told["workers"]["processes"], told["workers"]["threads"]) == (3, 4)
        assert told["worker_threads"] == 4
        assert told["worker_bytes"] == told.worker_bytes(4)
    for told in recipe.explain(cluster="tcp://scheduler:8786").values():
        assert "workers" not in told.facts


# The first recipe


def test_the_first_recipe_runs_as_it_is(folder: Path) -> None:
    text = starter(name="first.toml")
    assert text.startswith("#:schema recipe.schema.json\n")
    assert "rasteret-dask run first.toml" in text
    rd.load_recipe(written(folder, text)).run(progress=False)
    assert rd.verify(folder / "train.zarr").ok


@pytest.mark.parametrize("dataset", rd.datasets().column("id").to_pylist())
def test_every_known_dataset_has_a_first_recipe(folder: Path, dataset: str) -> None:
    recipe = rd.load_recipe(written(folder, starter({"dataset": dataset})))
    if dataset.startswith("demo/"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of few split cells: it is a small world
            assert len(recipe.chips())


def test_every_example_of_the_first_recipe_is_one(folder: Path) -> None:
    """Each line behind ``#`` that is a key of a table can be taken in."""
    text = starter({"files": ["x.tif"], "static": True})
    for match in re.finditer(r"^# (\w+ = .*)$", text, re.MULTILINE):
        if match[1].startswith(("filter_pixels", "address", "kind", "workers", "memory", "table")):
            continue  # in a table that is an example itself
        changed = text[: match.start()] + match[1] + text[match.end() :]
        rd.load_recipe(written(folder, changed))
    blocks = re.sub(r"^# (?=\[|filter_pixels|table = |kind|workers|memory)", "", text, flags=re.MULTILINE)
    assert {"steps", "cluster", "outputs"} <= rd.load_recipe(written(folder, blocks)).source.document.keys()


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["o_20240401.tif", "o_20240501.tif"], {"filename_regex": r"(?<!\d)(?P<date>\d{8})(?!\d)"}),
        (["2024-04-01_o.tif"], {"filename_regex": r"(?P<date>\d{4}-\d\d-\d\d)", "date_format": "%Y-%m-%d"}),
        (["o_99999999.tif"], {"static": True}),
        (["a.tif", "o_20240401.tif"], {"static": True}),
    ],
)
def test_dates_of_own_files_are_looked_for(folder: Path, names: list[str], wanted: dict[str, Any]) -> None:
    for name in names:
        (folder / name).touch()
    recipe = rd.load_recipe(written(folder, starter({"files": f"{folder}/*.tif"})))
    table = recipe.source.document["collections"]["scenes"]
    assert {key: value for key, value in table.items() if key not in ("files", "harmonize")} == wanted
