"""The command line: what it answers, where, and with which exit code; real processes where a process matters."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import shapely
import typer
from distributed import KilledWorker
from distributed.client import FutureCancelledError
from distributed.comm.core import CommClosedError
from distributed.scheduler import WorkerState
from hypothesis import given
from hypothesis import strategies as st
from waiting import PATIENCE_S

import rasteret_dask as rd
from rasteret_dask import __version__, errors, reportpage
from rasteret_dask.cli.app import app, main
from rasteret_dask.cli.exitcodes import ExitCode, failure_of
from rasteret_dask.cli.printing import plain
from rasteret_dask.demo.world import World

COMMAND = [sys.executable, "-m", "rasteret_dask"]

Answer = tuple[int, str, str]
Call = Callable[..., Answer]


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [*COMMAND, *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S, env=env)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Return a function that runs a command in this process, as in a pipe: exit code, stdout, stderr."""
    monkeypatch.delenv("COLUMNS", raising=False)  # pytest-xdist sets it in its workers

    def called(*arguments: str | Path) -> Answer:
        capsys.readouterr()
        code = main(list(map(str, arguments)))
        return code, *capsys.readouterr()

    return called


@pytest.fixture(scope="module")
def store(s2: rd.Collection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished store of some chips in two splits."""
    path = tmp_path_factory.mktemp("cli") / "chips.zarr"
    chips = s2.harmonize(bands=["red", "nir"], units="reflectance").chips(size=32, cell_km=0.96)
    chips.split(train=0.6, val=0.4, test=0.0, seed=1).select("train", "val").to_zarr(path, progress=False)
    return path


# The program


SCRIPT = "import sys; from rasteret_dask.cli import main; sys.exit(main())"


@pytest.mark.parametrize("start", [["-m", "rasteret_dask"], ["-c", SCRIPT]])
def test_version_ends_well_however_it_is_started(start: list[str]) -> None:
    command = [sys.executable, *start, "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"rasteret-dask {__version__}\n", "")


def test_alone_it_prints_its_help(call: Call) -> None:
    code, shown, _ = call()
    assert code == 0
    assert shown.rstrip() == call("--help")[1].rstrip() == call("-h")[1].rstrip()
    assert all(name in shown for name in ("verify", "datasets", "demo", "Exit codes"))


def commands() -> list[str]:
    return sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", commands())
def test_every_command_has_help_and_what_all_have(call: Call, name: str) -> None:
    code, shown, _ = call(name, "--help")
    assert code == 0
    for option in ("--verbose", "--quiet", "--debug", "--help"):
        assert option in shown


LOADED = """
import sys
from rasteret_dask.cli.app import main
code = main(sys.argv[1:])
heavy = ["dask", "distributed", "xarray", "pandas", "numpy", "pyarrow", "zarr", "rasterio", "jinja2"]
print("LOADED", len(sys.modules), [name for name in heavy if name in sys.modules])
"""


@pytest.mark.parametrize("arguments", [["--help"], ["verify", "--help"], ["build"]])
def test_help_and_mistakes_import_next_to_nothing(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    last = done.stdout.splitlines()[-1]
    assert last.endswith("[]"), last
    assert int(last.split()[1]) < 700


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_and_datasets(tmp_path: Path) -> None:
    """By the script that the command prints, asked as bash asks it."""
    wanted = {
        "rasteret-dask ver": "verify",
        "rasteret-dask verify --js": "--json",
        "rasteret-dask build demo/sentinel-2": "demo/sentinel-2-l2a",
    }
    asked = "\n".join(
        f"COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))\n"
        "_rasteret_dask_completion rasteret-dask; printf '%s\\n' \"${COMPREPLY[@]}\""
        for words in wanted
    )
    program = tmp_path / "rasteret-dask"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m rasteret_dask "$@"\n')
    program.chmod(0o755)
    script = (
        f'eval "$(_RASTERET_DASK_COMPLETE=source_bash rasteret-dask)"\ncomplete -p rasteret-dask\n{asked}\n'
    )
    done = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, check=False, timeout=300,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
    )  # fmt: skip
    assert done.stderr == ""
    registered, *offered = done.stdout.splitlines()
    assert "_rasteret_dask_completion" in registered
    assert offered == list(wanted.values())


# Where what goes


def test_an_answer_as_json_is_all_of_stdout(call: Call, store: Path) -> None:
    code, shown, aside = call("verify", store, "--json", "-vv")
    assert code == ExitCode.DONE
    assert json.loads(shown)["ok"] is True
    assert "objects" in aside  # how far it is


@pytest.mark.parametrize("arguments", [["info"], ["verify"], ["stats", "--split", "train"]])
def test_json_is_json_and_quiet_is_quiet(call: Call, store: Path, arguments: list[str]) -> None:
    code, shown, aside = call(*arguments, store, "--json", "--quiet")
    assert code == 0
    assert isinstance(json.loads(shown), dict)
    assert aside == ""


def test_on_a_terminal_of_80_columns_numbers_and_ids_stay_whole(
    call: Call, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    _, shown, _ = call("datasets")
    ids = rd.datasets()["id"].to_pylist()
    assert [line.split()[0] for line in shown.splitlines() if line.split()[0] in ids] == ids
    bands = json.loads(call("stats", store, "--json")[1])["bands"]
    _, shown, _ = call("stats", store)
    for row in bands:
        assert re.search(
            rf"{row['band']} +{row['kind']} .* {row['mean']:.4g} .* {row['p98']:.4g}$", shown, re.MULTILINE
        )
    assert max(map(len, shown.splitlines())) <= 80


COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7]m")


def test_colours_are_for_terminals() -> None:
    """A mistake is told in red there, unless NO_COLOR is set; in a pipe nothing is."""
    assert "\x1b[" not in run("verify").stderr
    assert COLOUR.search(on_terminal("verify"))
    assert not COLOUR.search(on_terminal("verify", NO_COLOR="1"))


def on_terminal(*arguments: str | Path, **environment: str) -> str:
    """Return what a command writes on a terminal of 80 columns."""
    pty = pytest.importorskip("pty")
    outer, inner = pty.openpty()
    env = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", **environment}
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=inner, stderr=inner, stdin=inner, env=env
    )
    os.close(inner)
    shown = b""
    while True:
        try:
            piece = os.read(outer, 4096)
        except OSError:  # the other side is closed
            break
        if not piece:
            break
        shown += piece
    process.wait(PATIENCE_S)
    os.close(outer)
    return shown.decode()


def test_in_a_pipe_a_row_is_a_line(call: Call) -> None:
    _, shown, _ = call("datasets")
    rows = [line.split()[0] for line in shown.splitlines()]
    assert rows == ["id", *rd.datasets()["id"].to_pylist()]


def test_who_reads_only_the_head_of_a_pipe_breaks_nothing() -> None:
    command = " ".join(COMMAND) + " datasets --json | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=300)
    assert (done.stdout, done.stderr) == ("[\n", "")


def test_logs_are_for_those_who_ask(tmp_path: Path, small_world: World, call: Call) -> None:
    def told(*more: str) -> str:
        place = tmp_path / f"records{len(more)}.parquet"
        code, _, aside = call("build", "--stac", small_world.sentinel2, "-o", place, "-q", *more)
        assert code == 0
        return aside

    assert told() == ""
    assert "INFO rasteret_dask" in told("-v")


# What the commands answer


def test_datasets_are_searched_by_id_title_band_and_pattern(call: Call) -> None:
    def ids(*pattern: str) -> list[str]:
        return [row["id"] for row in json.loads(call("datasets", *pattern, "--json")[1])]

    assert ids() == rd.datasets()["id"].to_pylist()
    assert ids("demo/*") == [name for name in ids() if name.startswith("demo/")]
    assert "earthsearch/sentinel-2-l2a" in ids("SENTINEL-2")
    assert ids("red") == [row["id"] for row in rd.datasets().to_pylist() if "red" in row["common_names"]]
    code, shown, aside = call("datasets", "nosuchthing")
    assert (code, shown.split()) == (0, ["id", "title", "metres", "bands", "access"])
    assert "nosuchthing" in aside


def test_build_writes_what_python_would(call: Call, tmp_path: Path, small_world: World) -> None:
    place, dates = tmp_path / "records.parquet", "2024-04-01/2024-04-30"
    code, shown, _ = call(
        "build", "--stac", small_world.sentinel2, "--date-range", dates, "--bands", "red,nir",
        "--name", "s2", "-o", place, "--json",
    )  # fmt: skip
    assert code == 0
    python = rd.build_from_stac(small_world.sentinel2, name="s2", date_range=dates, bands=["red", "nir"])
    mine, theirs = (c.to_table().drop_columns(["headers_metadata"]) for c in (rd.load(place), python))
    assert mine.sort_by("id").equals(theirs.sort_by("id"))
    assert json.loads(shown)["records"] == len(python)
    assert json.loads(shown)["path"] == str(place)


def test_build_takes_files_of_one_s_own(call: Call, tmp_path: Path, small_world: World) -> None:
    pattern = str(Path(small_world.sentinel2).parent / "*_20240409_*" / "B04.tif")
    code, shown, _ = call(
        "build", "--files", pattern, "-o", tmp_path / "x.parquet", "--bands", "red",
        "--filename-regex", r"_(?P<date>\d{8})_.*/B04", "--json",
    )  # fmt: skip
    assert code == 0
    assert json.loads(shown)["bands"] == ["red"]
    assert json.loads(shown)["start"].startswith("2024-04-09")
    _, shown, _ = call("info", tmp_path / "x.parquet", "--json")
    assert json.loads(shown)["kind"] == "record table"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected one of DATASET, --stac and --files"),
        (["demo/sentinel-2-l2a", "--stac", "x"], "expected one of DATASET, --stac and --files"),
        (["x", "--bbox", "1,2,3"], "west,south,east,north"),
        (["x", "--bbox", "a,b,c,d"], "west,south,east,north"),
        (["--stac", "x", "--filename-regex", "y"], "only --files"),
        (["--files", "x", "--max-items", "3"], "files are no search"),
        (["x", "--max-items", "0"], "--max-items"),
    ],
)
def test_build_refuses_what_makes_no_sense(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, shown, aside = call("build", *arguments, "-o", tmp_path / "x.parquet")
    assert (code, shown) == (ExitCode.USAGE, "")
    assert words in aside
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--dataset", "earthsearch/sentinel-2-l2a", "--bbox", "-1,2,3,4", "--date-range", "2024-04-01/.."],
        ["--records", "records.parquet", "--bands", "red,nir"],
        ["--stac", "collection.json", "--date-range", "2024-04-01/2024-06-30"],
    ],
)
def test_init_writes_what_can_be_loaded(call: Call, tmp_path: Path, arguments: list[str]) -> None:
    place = tmp_path / "job.toml"
    code, shown, aside = call("init", place, *arguments)
    assert (code, shown) == (ExitCode.DONE, "")
    assert f"rasteret-dask explain {place}" in aside
    made = rd.load_recipe(place)
    assert [output.kind for output in made.outputs] == ["zarr"]
    (table,) = made.source.document["collections"].values()
    if "--bbox" in arguments:
        assert (table["bbox"], table["date_range"]) == ([-1, 2, 3, 4], "2024-04-01/..")
    if "--bands" in arguments:
        assert table["harmonize"]["bands"] == ["red", "nir"]
    schema = json.loads((tmp_path / "recipe.schema.json").read_text())
    assert schema["properties"].keys() >= {"collections", "chips", "outputs"}
    assert re.match(r"kind +recipe$", call("info", place)[1].splitlines()[1])


def test_init_writes_over_nothing_unless_it_is_told_to(call: Call, tmp_path: Path) -> None:
    place = tmp_path / "job.toml"
    place.write_text("mine")
    code, _, aside = call("init", place)
    assert code == ExitCode.USAGE
    assert "--force" in aside
    assert place.read_text() == "mine"
    assert call("init", place, "--force", "--quiet") == (ExitCode.DONE, "", "")
    assert rd.load_recipe(place).outputs
    assert (
        call("init", tmp_path / "x.toml", "--dataset", "demo/aef-v1-annual", "--stac", "x")[0]
        == ExitCode.USAGE
    )
    assert (
        call("init", tmp_path / "x.toml", "--records", "x", "--date-range", "2024/2025")[0] == ExitCode.USAGE
    )
    assert call("init", tmp_path / "none" / "x.toml")[0] == ExitCode.FAILED


def test_info_tells_what_something_is(call: Call, store: Path, s2: rd.Collection, tmp_path: Path) -> None:
    records, plan = tmp_path / "records.parquet", tmp_path / "plan"
    s2.export(records)
    s2.export(tmp_path / "parts", partition_by=["month"])
    s2.harmonize(bands=["red"]).chips(size=32, cell_km=0.96).save_plan(plan)
    kinds = {
        store: "store", store / "chips.parquet": "chip table", records: "record table", plan: "plan",
        tmp_path / "parts": "record table",
    }  # fmt: skip
    for place, kind in kinds.items():
        code, shown, _ = call("info", place)
        assert (code, shown.splitlines()[0]) == (0, str(place))
        assert re.search(rf"^kind +{kind} *$", shown, re.MULTILINE)
        assert len(shown.splitlines()) <= 20
        assert json.loads(call("info", place, "--json")[1])["kind"] == kind
    document = json.loads(call("info", store, "--json")[1])
    chips = rd.open_chips(store)
    assert document["chips"] == len(chips)
    assert document["splits"] == {name: len(chips.select(name)) for name in ("train", "val")}
    assert document["digest"] == chips.stored.map.digest
    assert document["sources"]["s2"]["bands"] == ["red", "nir"]
    days = [f"{moment:%Y-%m-%d}" for moment in s2.to_table(["datetime"])["datetime"].to_pylist()]
    assert min(days) <= document["dates"][0] <= document["dates"][1] <= max(days)
    ground = s2.describe().bounds
    assert ground is not None
    assert shapely.box(*ground).buffer(1e-3).contains(shapely.box(*document["bounds"]))
    assert json.loads(call("info", records, "--json")[1])["records"] == len(s2)


def test_stats_are_those_of_python(call: Call, store: Path) -> None:
    document = json.loads(call("stats", store, "--split", "train", "--json")[1])
    assert document["bands"] == plain(rd.open_chips(store, "train").stats().table.to_pylist())
    _, shown, _ = call("stats", store, "--sample", "3")
    assert shown.startswith("3 chips\n")
    code, _, aside = call("stats", store, "--set", "chips.size=3")
    assert code == ExitCode.USAGE
    assert "--set" in aside
    code, _, aside = call("stats", store, "--split", "nosuch")
    assert code == ExitCode.USAGE
    assert "train" in aside
    _, shown, _ = call("stats", store, "--sample", "3")
    assert all(word in shown for word in ("band", "mean", "98 %", "red", "nir"))


def test_verify_finds_a_flipped_byte(call: Call, store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "copy.zarr"))
    code, shown, _ = call("verify", copy)
    assert code == ExitCode.DONE
    assert "every object is what was written" in shown
    shard = max(copy.rglob("pixels/c/**/*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    code, shown, _ = call("verify", copy)
    assert code == ExitCode.UNVERIFIED
    assert "damaged" in shown
    assert shard.relative_to(copy).as_posix() in shown
    code, shown, _ = call("verify", copy, "--json")
    assert code == ExitCode.UNVERIFIED
    assert json.loads(shown)["damaged"] == [shard.relative_to(copy).as_posix()]


def test_verify_reads_chips_again_from_their_scenes(call: Call, store: Path) -> None:
    code, shown, _ = call("verify", store, "--sources", "2", "--json")
    assert code == ExitCode.DONE
    assert json.loads(shown)["compared"] == 2
    assert "2 chips from their scenes" in call("verify", store, "--sources", "2")[1]


MAPPED = """\
[collections.s2]
records = "s2.parquet"
harmonize = { bands = ["red"], units = "reflectance" }

[chips]
size = 32
cell_km = 0.96

[[steps]]
sample = 3

[[steps]]
map = "functions_of_verify:halved"

[[outputs]]
zarr = "halved.zarr"
"""


def test_verify_imports_the_functions_that_it_is_told_to(
    call: Call, s2: rd.Collection, tmp_path: Path
) -> None:
    """In a process that did not write the store: its plan names functions, and imports nothing by itself."""
    s2.export(tmp_path / "s2.parquet")
    (tmp_path / "functions_of_verify.py").write_text("def halved(pixels):\n    return pixels / 2\n")
    (tmp_path / "halved.toml").write_text(MAPPED)
    assert call("run", tmp_path / "halved.toml", "-q")[0] == ExitCode.DONE
    del sys.modules["functions_of_verify"]
    verify = ["verify", tmp_path / "halved.zarr", "--sources", "2"]
    code, _, aside = call(*verify)
    assert code == ExitCode.USAGE
    assert "--import functions_of_verify" in aside
    assert call(*verify, "--import", "functions_of_verify")[0] == ExitCode.USAGE  # it does not lie here
    told = ("--import", "functions_of_verify", "--folder", tmp_path)
    code, shown, _ = call(*verify, *told, "--json")
    assert code == ExitCode.DONE
    assert json.loads(shown)["compared"] == 2
    assert call(*verify[:2], *told)[0] == ExitCode.USAGE  # nothing to import it for


def test_a_compacted_store_keeps_the_recipe_and_is_not_resumed_by_it(
    call: Call, s2: rd.Collection, tmp_path: Path
) -> None:
    s2.export(tmp_path / "s2.parquet")
    recipe, store, small = (tmp_path / name for name in ("job.toml", "halved.zarr", "small.zarr"))
    recipe.write_text(MAPPED.replace('map = "functions_of_verify:halved"', "sample = 2"))
    assert call("run", recipe, "-q")[0] == ExitCode.DONE
    rd.compact(store, small, progress=False)
    kept = small / "_job" / "recipe.toml"
    assert kept.read_text() == (store / "_job" / "recipe.toml").read_text()
    assert rd.verify(small, progress=False).ok  # the commit vouches for it
    assert "functions_of_verify" not in kept.read_text()
    assert "cell_km = 0.96" in reportpage.report_page(small, progress=False)
    code, _, aside = call("resume", small)
    assert code == ExitCode.FAILED
    assert "Resume that one" in aside
    assert call("resume", store)[0] == ExitCode.DONE


def test_explain_tells_the_time_where_it_is_asked_to(call: Call, s2: rd.Collection, tmp_path: Path) -> None:
    s2.export(tmp_path / "s2.parquet")
    recipe = tmp_path / "job.toml"
    recipe.write_text(MAPPED.replace('map = "functions_of_verify:halved"', "sample = 2"))

    def told(*arguments: str) -> dict[str, Any]:
        code, shown, _ = call("explain", recipe, "--json", *arguments)
        assert code == ExitCode.DONE
        (explanation,) = json.loads(shown).values()
        return dict(explanation)

    assert "time" not in told()
    assert told("--rate", "50 MB/s")["time"]["seconds"] > 0
    assert told("--probe")["time"]["measured"]["tiles"] > 0
    for arguments in (["--probe", "--rate", "50 MB/s"], ["--rate", "0 MB/s"]):
        assert call("explain", recipe, *arguments)[0] == ExitCode.USAGE


@pytest.mark.parametrize("command", [["build", "-o", "x.parquet"], ["init", "x.toml", "--dataset"]])
def test_a_dataset_that_nobody_knows_is_a_mistake_of_the_command_line(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    code, shown, aside = call(*command, "earthsearch/sentinel-2-l2b")
    assert (code, shown) == (ExitCode.USAGE, "")
    assert "'earthsearch/sentinel-2-l2a'" in aside
    assert not list(tmp_path.iterdir())


def test_what_writes_a_file_answers_as_json_too(call: Call, store: Path, tmp_path: Path) -> None:
    page, picture, recipe = (tmp_path / name for name in ("page.html", "sheet.png", "job.toml"))
    answers = []
    for arguments in (
        ("init", recipe), ("report", store, "-o", page, "-q"), ("preview", store, "-o", picture, "-n", "2"),
    ):  # fmt: skip
        code, shown, aside = call(*arguments, "--json")
        assert (code, aside) == (ExitCode.DONE, "")
        answers.append(json.loads(shown))
    assert answers == [
        {"path": str(recipe), "schema": str(tmp_path / "recipe.schema.json")},
        {"path": str(page), "store": str(store)},
        {"path": str(picture), "store": str(store), "chips": 2},
    ]
    assert all(Path(answer["path"]).exists() for answer in answers)


def test_report_and_preview_write_what_python_would(call: Call, store: Path, tmp_path: Path) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "sheet.png"
    code, shown, aside = call("report", store, "-o", page)
    assert (code, shown) == (ExitCode.DONE, "")
    assert aside.endswith(f"rasteret-dask: {page} is written.\n")
    assert call("report", store, "-o", page, "-q") == (ExitCode.DONE, "", "")
    assert page.read_text().startswith("<!doctype html>")
    assert call("preview", store, "-o", picture, "-n", "2", "--split", "val", "-q") == (ExitCode.DONE, "", "")
    assert picture.read_bytes().startswith(b"\x89PNG")
    code, _, aside = call("preview", store, "-o", tmp_path / "sheet.doc")
    assert code == ExitCode.USAGE
    assert ".png" in aside
    assert call("report", tmp_path / "none", "-o", page)[0] == ExitCode.FAILED


@pytest.mark.slow
def test_demo_in_a_process_of_its_own(tmp_path: Path) -> None:
    first = run("demo", "--small", "--folder", tmp_path / "demo")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "none failed" in first.stdout
    assert "Traceback" not in first.stderr
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["demo.png", "train.zarr", "world"]

    shard = max((tmp_path / "demo" / "train.zarr" / "optical").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    second = run("demo", "--small", "--folder", tmp_path / "demo")
    assert second.returncode == 1
    assert "nothing is written" in second.stdout
    (line,) = second.stderr.splitlines()
    assert line.startswith("rasteret-dask: the demo's result is wrong: the store's objects")

    third = run("demo", "--small", "--fresh", "--folder", tmp_path / "demo")
    assert third.returncode == 0, third.stdout + third.stderr


# Errors


def test_an_error_is_one_line(tmp_path: Path, call: Call) -> None:
    mine = tmp_path / "world" / "sentinel-2-l2a"
    mine.mkdir(parents=True)
    code, _, aside = call("demo", "--small", "--folder", str(tmp_path))
    assert code == 1
    (line,) = aside.splitlines()
    assert line.startswith("rasteret-dask: making the made-up world")
    assert mine.is_dir()


def test_debug_shows_the_traceback_of_an_error(tmp_path: Path, call: Call) -> None:
    code, _, aside = call("verify", tmp_path / "none", "--debug")
    assert code == 1
    assert aside.startswith("Traceback (most recent call last)")
    assert aside.splitlines()[-1] == call("verify", tmp_path / "none")[2].strip()


BUG = """
import sys
from rasteret_dask.catalogs import catalog

def datasets():
    raise ZeroDivisionError("of two numbers")

catalog.datasets = datasets
from rasteret_dask.cli.app import main
sys.exit(main())
"""


def test_a_bug_is_a_line_that_says_so() -> None:
    def ended(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", BUG, "datasets", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)

    done = ended()
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("rasteret-dask: found ZeroDivisionError (of two numbers) at datasets, line 6")
    assert "bug" in line
    assert "--debug" in line
    traced = ended("--debug")
    assert traced.returncode == 1
    assert "Traceback" in traced.stderr


def foreign_errors() -> dict[str, tuple[BaseException, str]]:
    return {
        "a full disk": (OSError(errno.ENOSPC, "No space left on device", "x.zarr"), "Make room"),
        "no permission": (PermissionError(errno.EACCES, "Permission denied", "x.zarr"), "who may read"),
        "a missing file": (FileNotFoundError(errno.ENOENT, "No such file", "x.tif"), "Check the path"),
        "many open files": (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        "no answer": (TimeoutError("Timed out trying to connect to tcp://x"), "can be reached"),
        "a refused connection": (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), "can be reached"),
        "another one": (OSError("something"), "run the same command again"),
        "no memory": (MemoryError(), "fewer threads"),
        "a closed scheduler": (CommClosedError("gone"), "can be reached"),
        "lost workers": (
            KilledWorker("task", cast("WorkerState", SimpleNamespace(address="tcp://x")), 3),
            "logs and the memory",
        ),
        "cancelled tasks": (FutureCancelledError("key", "gone"), "logs and the memory"),
    }  # fmt: skip


@pytest.mark.parametrize("name", foreign_errors())
def test_errors_of_others_have_a_remedy(name: str) -> None:
    error, remedy = foreign_errors()[name]
    failure = failure_of(error)
    assert failure is not None
    assert failure.code is ExitCode.FAILED
    assert remedy in failure.message
    assert "\n" not in failure.message
    assert "found " in failure.message


def test_every_error_of_ours_has_a_code() -> None:
    kinds = [
        kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.RasteretDaskError)
    ]
    assert len(kinds) > 10
    senseless = ("RecipeError", "PlanError", "BandError", "GridError", "EmptyError")
    codes = {"IncompleteError": ExitCode.INCOMPLETE, **dict.fromkeys(senseless, ExitCode.USAGE)}
    for kind in kinds:
        error = kind.__new__(kind)
        errors.RasteretDaskError.__init__(error, "this", "that", "these", "Do so.")
        failure = failure_of(error)
        assert failure is not None
        assert failure.code is codes.get(kind.__name__, ExitCode.FAILED)


def test_exit_codes_are_documented_in_the_help(call: Call) -> None:
    text = " ".join(call("--help")[1].split())
    for code in ExitCode:
        assert re.search(rf"\b{code.value} \w", text), code


def test_a_mistake_is_told_on_stderr_with_code_2(call: Call) -> None:
    for arguments in (["nonsense"], ["verify"], ["verify", "a", "b"], ["stats", "x", "--sample", "many"]):
        code, shown, aside = call(*arguments)
        assert (code, shown) == (ExitCode.USAGE, "")
        assert "rasteret-dask" in aside


# Values


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text()
        | st.dates()
        | st.binary(max_size=4),
        lambda inner: (
            st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner) | st.tuples(inner, inner)
        ),
        max_leaves=8,
    )
)
def test_whatever_is_answered_is_json(value: Any) -> None:
    text = json.dumps(plain(value), allow_nan=False)
    assert plain(json.loads(text)) == json.loads(text)
