"""What goes wrong on the command line: one message with what to do, the right exit code, and nothing lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import dask
import pytest
from distributed import LocalCluster
from test_cli import COMMAND, Call, call
from test_refusals import largest_file
from test_watch import scheduler, scheduler_of, without, worker
from waiting import PATIENCE_S, until

import rasteret_dask as rd
from rasteret_dask.cli.exitcodes import ExitCode
from rasteret_dask.cli.printing import plain
from rasteret_dask.demo.world import World

__all__ = ["call", "scheduler", "without"]  # fixtures of others

RECIPE = """\
[collections.s2]
stac = {stac}
date_range = ["2024-04-01", "2024-06-30"]

[collections.s2.harmonize]
bands = ["red", "nir"]

[chips]
size = 32
cell_km = 0.96

[split]
train = 0.5
val = 0.25
test = 0.25

[[outputs]]
zarr = "chips.zarr"
"""


@pytest.fixture
def recipe(tmp_path: Path, small_world: World) -> Path:
    """Return a recipe of three shards, one a split."""
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(stac=json.dumps(str(small_world.sentinel2))))
    return path


def changed(recipe: Path, old: str, new: str) -> Path:
    text = recipe.read_text()
    assert old in text
    recipe.write_text(text.replace(old, new))
    return recipe


def is_one_message(text: str) -> bool:
    """Whether there is one message of ours, and no traceback."""
    return "Traceback" not in text and len(re.findall(r"^rasteret-dask: ", text, re.MULTILINE)) == 1


# What goes well


def test_a_recipe_is_explained_measured_and_run_as_python_does(call: Call, recipe: Path) -> None:
    """And explain, --dry-run and stats write nothing."""
    made = rd.load_recipe(recipe, {"chips.size": 16})
    setting = ("--set", "chips.size=16")
    for command in (["explain", recipe], ["run", recipe, "--dry-run"]):
        code, shown, _ = call(*command, *setting, "--json")
        assert code == ExitCode.DONE
        assert json.loads(shown) == {name: one.to_dict() for name, one in made.explain().items()}
    code, shown, _ = call("stats", recipe, *setting, "--split", "train", "--json")
    assert code == ExitCode.DONE
    assert json.loads(shown)["bands"] == plain(made.chips().select("train").stats().table.to_pylist())
    assert [path.name for path in recipe.parent.iterdir()] == ["recipe.toml"]
    code, shown, _ = call("run", recipe, *setting, "--json")
    (output,) = json.loads(shown)
    assert code == ExitCode.DONE
    assert output["place"] == str(recipe.parent / "chips.zarr")
    assert output["report"] == plain(rd.job_report(output["place"]).to_dict()) | {
        name: output["report"][name] for name in ("shards_written", "seconds")
    }
    assert output["report"]["shards_written"] == output["report"]["shards"]


# The recipe


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("size = 32", "sise = 32", 9, ["'sise'", "Did you mean 'size'?"]),
        ("size = 32", 'size = "big"', 9, ['"big"', "a whole number"]),
        ("[chips]", "[chip]", None, ["'chip'", "chips"]),
        ('zarr = "chips.zarr"', 'zar = "chips.zarr"', 17, ["zarr"]),
        ("train = 0.5", "train = half", 13, ["quotes"]),
        ("train = 0.5", "train = 0.7", None, ["sum to 1"]),
    ],
)
def test_a_recipe_that_makes_no_sense(
    call: Call, recipe: Path, old: str, new: str, line: int | None, words: list[str]
) -> None:
    code, shown, aside = call("run", changed(recipe, old, new))
    assert (code, shown) == (ExitCode.USAGE, "")
    assert is_one_message(aside)
    assert f"recipe.toml:{line or ''}" in aside
    for word in words:
        assert word in aside
    assert not (recipe.parent / "chips.zarr").exists()


def test_a_recipe_that_is_not_there_names_the_one_that_is(call: Call, recipe: Path) -> None:
    code, _, aside = call("run", recipe.with_name("recpie.toml"))
    assert code == ExitCode.USAGE
    assert is_one_message(aside)
    assert "'recipe.toml'" in aside


def test_a_band_that_scenes_do_not_have(call: Call, recipe: Path) -> None:
    code, shown, aside = call("run", changed(recipe, '"nir"', '"nri"'))
    assert (code, shown) == (ExitCode.USAGE, "")
    assert is_one_message(aside)
    assert "'nri'" in aside
    assert "nir" in aside.replace("nri", "")
    assert not (recipe.parent / "chips.zarr").exists()


def test_scenes_that_are_not_there(call: Call, recipe: Path, tmp_path: Path) -> None:
    code, _, aside = call("run", recipe, "--set", f"collections.s2.stac={tmp_path / 'none.json'}")
    assert code == ExitCode.FAILED
    assert is_one_message(aside)
    assert "nothing there" in aside
    assert str(tmp_path / "none.json") in aside


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--set", "chips.size"], "--set chips.size=64"),
        (["--part", "0/3"], "1 <= K <= N"),
        (["--part", "3"], "K/N"),
        (["--max-time", "soon"], "2h"),
        (["--heartbeat", "none/of/these"], "folder"),
    ],
)
def test_options_that_make_no_sense(call: Call, recipe: Path, arguments: list[str], words: str) -> None:
    code, shown, aside = call("run", recipe, *arguments)
    assert (code, shown) == (ExitCode.USAGE, "")
    assert words in " ".join(aside.replace("│", " ").split())
    assert not (recipe.parent / "chips.zarr").exists()


# The cluster


def test_a_cluster_that_does_not_answer(call: Call, recipe: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with dask.config.set({"distributed.comm.timeouts.connect": "500ms"}):
            code, _, aside = call("run", recipe, "--set", f"cluster.address={address}")
    assert code == ExitCode.FAILED
    assert is_one_message(aside)
    assert address in aside
    assert "a Dask scheduler that answers" in aside
    assert call("run", recipe)[0] == ExitCode.DONE  # nothing stands in its way


OTHER_MEANING = "import rasteret_dask.formats\nrasteret_dask.formats.MEANING += 1\n"


@pytest.mark.slow
def test_workers_without_the_package_or_of_another_version_are_named_and_replaced_it_goes_on(
    call: Call, recipe: Path, scheduler: LocalCluster, without: str, tmp_path: Path
) -> None:
    setting = f"cluster.address={scheduler.scheduler_address}"
    with worker(scheduler, tmp_path, without):
        until(lambda: scheduler_of(scheduler).workers)
        code, _, aside = call("run", recipe, "--set", setting)
    assert code == ExitCode.FAILED
    assert is_one_message(aside)
    for words in ("1 of 2 hosts", "No module named 'rasteret_dask'", "same environment or image"):
        assert words in aside
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text(OTHER_MEANING)
    with worker(scheduler, tmp_path, str(other)):
        until(lambda: scheduler_of(scheduler).workers)
        code, _, aside = call("run", recipe, "--set", setting)
    assert code == ExitCode.FAILED
    assert is_one_message(aside)
    for words in ("1 of 2 hosts", "other pixels", "same environment or image"):
        assert words in aside
    with worker(scheduler, tmp_path):
        until(lambda: scheduler_of(scheduler).workers)
        code, shown, _ = call("run", recipe, "--set", setting, "--json")
    assert code == ExitCode.DONE
    (output,) = json.loads(shown)
    assert output["report"]["committed"]
    assert output["report"]["shards_written"] == output["report"]["shards"]


# The place that is written to


def test_a_disk_that_is_full_and_has_room_again(call: Call, recipe: Path) -> None:
    """By a real limit of the operating system."""
    with largest_file(60_000):
        code, shown, aside = call("run", recipe, "--no-progress")
    assert (code, shown) == (ExitCode.FAILED, "")
    assert is_one_message(aside), aside
    assert "Make room" in aside
    code, shown, _ = call("run", recipe, "--json")
    assert code == ExitCode.DONE
    assert json.loads(shown)[0]["report"]["committed"]


def test_a_file_where_a_folder_is_wanted(call: Call, recipe: Path) -> None:
    (recipe.parent / "file").write_bytes(b"mine")
    code, shown, aside = call("run", recipe, "--set", "outputs.0.zarr=file/chips.zarr")
    assert (code, shown) == (ExitCode.FAILED, "")
    assert is_one_message(aside)
    assert "not a directory" in aside
    assert (recipe.parent / "file").read_bytes() == b"mine"


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() == 0 and shutil.which("setpriv") is None,
    reason="root writes everywhere, and there is no command `setpriv` (Debian: util-linux), which makes it as others",
)
def test_a_place_that_must_not_be_written(recipe: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    # as somebody else it could not read the folders of the tests, which are closed
    as_others = () if os.geteuid() else ("setpriv", "--bounding-set", "-dac_override")
    done = subprocess.run(
        [
            *as_others, sys.executable, "-m", "rasteret_dask", "run", str(recipe), "-q",
            "--set", f"outputs.0.zarr={closed / 'chips.zarr'}",
        ],
        capture_output=True, text=True, check=False, timeout=PATIENCE_S,
        env={**os.environ, "RASTERET_DASK_CATALOG": str(tmp_path / "none.toml")},
    )  # fmt: skip
    assert done.returncode == ExitCode.FAILED, done.stderr
    assert is_one_message(done.stderr), done.stderr
    assert "permission denied" in done.stderr
    assert "a place that may be written" in done.stderr
    assert not list(closed.iterdir())


def test_a_store_that_is_something_else_is_left_alone(call: Call, recipe: Path, tmp_path: Path) -> None:
    store = tmp_path / "chips.zarr"
    store.mkdir()
    (store / "mine.txt").write_text("kept")
    for arguments in (["run", recipe], ["verify", store], ["stats", store], ["info", store]):
        code, shown, aside = call(*arguments)
        assert (code, shown) == (ExitCode.FAILED, ""), arguments
        assert is_one_message(aside)
        assert str(store) in aside
        assert [path.name for path in store.iterdir()] == ["mine.txt"]
    other = tmp_path / "others.zarr"
    assert call("run", recipe, "--set", f"outputs.0.zarr={other}")[0] == ExitCode.DONE  # the remedy
    code, _, aside = call("run", recipe, "--set", f"outputs.0.zarr={other}", "--set", "chips.size=16")
    assert code == ExitCode.FAILED
    assert "chips of another plan" in aside
    assert "Choose another store" in aside
    assert call("verify", other)[0] == ExitCode.DONE


def test_a_store_that_is_not_finished(call: Call, recipe: Path, tmp_path: Path) -> None:
    store = tmp_path / "chips.zarr"
    assert call("run", recipe)[0] == ExitCode.DONE
    (store / "zarr.json").unlink()
    code, shown, _ = call("verify", store)
    assert code == ExitCode.UNVERIFIED
    code, shown, _ = call("info", store)
    assert code == ExitCode.DONE
    assert re.search(r"^kind +unfinished store *$", shown, re.MULTILINE)
    assert call("run", recipe)[0] == ExitCode.DONE
    assert call("verify", store)[0] == ExitCode.DONE


def test_a_store_goes_on_by_the_recipe_that_is_kept_in_it(
    call: Call, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any folder: paths of the recipe begin where it lay, as the store's own path tells."""
    changed(recipe, 'zarr = "chips.zarr"', 'zarr = "out/chips.zarr"\nsplits = ["train", "val"]')
    code, shown, _ = call("run", recipe, "--set", "chips.size=16", "--json")
    store = tmp_path / "out" / "chips.zarr"
    before = rd.open_chips(store).digest
    (store / "zarr.json").unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert call("resume", store, "--json")[1] != shown
    assert rd.open_chips(store).digest == before
    code, shown, _ = call("resume", recipe, "--json")
    assert code == ExitCode.FAILED  # chips of another size
    code, shown, _ = call("resume", store)
    assert code == ExitCode.DONE
    assert "nothing was left to write" in shown
    (store / "_job" / "recipe.toml").unlink()
    code, _, aside = call("resume", store)
    assert code == ExitCode.FAILED
    assert "no recipe in it" in aside


def test_a_part_of_a_job_and_a_time_that_is_over(call: Call, recipe: Path, tmp_path: Path) -> None:
    alive = tmp_path / "alive.json"
    code, shown, aside = call("run", recipe, "--max-time", "1ms", "--heartbeat", alive)
    assert (code, shown) == (ExitCode.INCOMPLETE, "")
    assert is_one_message(aside)
    assert json.loads(alive.read_text())["done"] == 0
    code, shown, _ = call("run", recipe, "--part", "2/2")
    assert code == ExitCode.DONE
    assert "not finished: other parts still write" in shown
    code, shown, _ = call("run", recipe, "--part", "1/2", "--json")
    assert code == ExitCode.DONE
    (output,) = json.loads(shown)
    assert output["report"]["committed"]
    assert 0 < output["report"]["shards_written"] < output["report"]["shards"]
    assert call("verify", tmp_path / "chips.zarr")[0] == ExitCode.DONE


# Who stops it

SLOW = """
import time
from pathlib import Path

HERE = Path(__file__).parent


def slow(chips):
    if not (HERE / "chips.zarr" / "_job" / "begun.json").exists():  # while it is planned
        return chips
    (HERE / "begun").touch()
    while not (HERE / "go").exists():
        time.sleep(0.02)
    return chips
"""


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (signal.SIGINT, ExitCode.INTERRUPTED),
        pytest.param(signal.SIGTERM, ExitCode.TERMINATED, marks=pytest.mark.slow),
    ],
)
def test_stopped_while_shards_are_written_it_goes_on_by_the_same_command(
    call: Call, recipe: Path, tmp_path: Path, sent: signal.Signals, code: ExitCode
) -> None:
    """Shards under way end, no further one is begun, and the second run writes only the others."""
    (tmp_path / "mycode.py").write_text(SLOW)
    changed(
        recipe, "[[outputs]]", '[[steps]]\nmap = { function = "mycode:slow", version = "1" }\n\n[[outputs]]'
    )
    command = [*COMMAND, "run", str(recipe), "--json"]
    env = {**os.environ, "DASK_NUM_WORKERS": "1"}
    log = tmp_path / "log.txt"
    with (
        log.open("w") as aside_file,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=aside_file, text=True, env=env) as process,
    ):
        until(lambda: (tmp_path / "begun").exists() or process.poll() is not None)
        process.send_signal(sent)
        until(lambda: "stopping once" in log.read_text() or process.poll() is not None)
        (tmp_path / "go").touch()
        shown, _ = process.communicate(timeout=PATIENCE_S)
    aside = log.read_text()
    assert (process.returncode, shown) == (code, ""), aside
    assert is_one_message(aside)
    assert "run the same command again" in aside
    assert not (tmp_path / "chips.zarr" / "zarr.json").exists()
    again, shown, aside = call("run", recipe, "--json", "-q")
    assert (again, aside) == (ExitCode.DONE, "")
    report = json.loads(shown)[0]["report"]
    assert report["committed"]
    assert 0 < report["shards_written"] < report["shards"]  # those under way had ended
    assert report["retries"] == 0


def test_a_second_ctrl_c_ends_it_at_once(call: Call, recipe: Path, tmp_path: Path) -> None:
    """A shard that never ends is not waited for; nothing half written is left, and the next run does it all."""
    (tmp_path / "mycode.py").write_text(SLOW)
    changed(
        recipe, "[[outputs]]", '[[steps]]\nmap = { function = "mycode:slow", version = "1" }\n\n[[outputs]]'
    )
    env = {**os.environ, "DASK_NUM_WORKERS": "1"}
    log = tmp_path / "log.txt"
    with (
        log.open("w") as aside_file,
        subprocess.Popen([*COMMAND, "run", str(recipe)], stderr=aside_file, text=True, env=env) as process,
    ):
        until(lambda: (tmp_path / "begun").exists() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        until(lambda: "stopping once" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == ExitCode.INTERRUPTED
    aside = log.read_text()
    assert is_one_message(aside)
    assert "at once" in aside
    (tmp_path / "go").touch()
    assert call("run", recipe, "-q")[0] == ExitCode.DONE
    assert rd.verify(tmp_path / "chips.zarr", progress=False).ok


@pytest.mark.slow
def test_stopped_while_it_plans_it_says_so_too(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "mycode.py").write_text(
        "import time\nfrom pathlib import Path\n"
        "Path(__file__).with_name('begun').touch()\ntime.sleep(600)\ndef slow(chips):\n    return chips\n"
    )
    changed(
        recipe, "[[outputs]]", '[[steps]]\nmap = { function = "mycode:slow", version = "1" }\n\n[[outputs]]'
    )
    command = [*COMMAND, "run", str(recipe)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until(lambda: (tmp_path / "begun").exists() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        shown, aside = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, shown) == (ExitCode.INTERRUPTED, "")
    assert is_one_message(aside), aside


# Memory


def test_a_function_that_takes_all_memory_is_no_bug(call: Call, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "greedy.py").write_text("def greedy(chips):\n    raise MemoryError\n")
    changed(recipe, "[[outputs]]", '[[steps]]\nmap = "greedy:greedy"\n\n[[outputs]]')
    code, _, aside = call("run", recipe)
    assert code == ExitCode.FAILED
    assert is_one_message(aside)
    assert "MemoryError" in aside or "memory" in aside
