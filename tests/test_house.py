"""The house keeps its own rules: one direction of imports, pinned versions, no traces of a machine."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FunctionType

import pytest

from rasteret_dask.rules.kinds import KINDS
from rasteret_dask.rules.masks import MASKS
from rasteret_dask.rules.picks import PICKS
from rasteret_dask.rules.units import UNITS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rasteret_dask"

# Reading order = dependency order, of packages as of the modules in them: each imports only from those before it.
# fmt: off
ORDER = {
    "": "_version errors extras words lists formats runlimits activity progress crs grid footprint extent zones",
    "display": "colours html card tableview",
    "rules": "kinds radiometry values units masks picks stored tables pixels composing",
    "catalogs": "bands catalogfile catalog catalogwrite credentials pctokens signing access",
    "net": "hrefs places trust answers gate localfile reply web wave lending refusals remote remotefs gdalfiles sums "
           "limits allocator clusters probe readiness watch awaiting signatureplugin signatures",
    "headers": "nodata page rangefile directories geokeys tiff gdal sidecar reader",
    "table": "assetkinds itemkinds itemcrs schema barehrefs anytable meanings records filelayouts rasteretio "
             "geoparquet export rasters layers leftassets terms facts rowgroups timing",
    "ingest": "search stacapi tablecache describe sources fileindex filelist filenames validareas stac tables files "
              "chipnames chipfiles exported pages order",
    "planning": "functions rules names plan shares calls bandkinds bandpass sampling scan optimize pixelsizes "
                "chiptimes meta filechips resolve radiometry origins query recordtable",
    "chipping": "coverage chiptable labels maskfiles boxes mapground coverwindows tilelattice frame leftover distances "
                "celltable regions feeds filewindows chipslots laying chips covering splits dealing ground strata "
                "randomwindows splittimes rulesteps steps drawing blocks blockfiles planblocks",
    "reader": "pixelgrid levels readplan kernels sharing ranges tilecodec rasterfile layout warp placing turnedfile "
              "tilefile wants keeping engine plainhref cogreader",
    "cubes": "cube storedpixels slotgraph cubegrid lazy",
    "tasks": "context job jobkernels jobfile freezing jobparts cuts filling keptbytes workermemory runs "
             "neighbours picking pixels clouds mapping filtering shards batches usage",
    "store": "heartbeat limits stopping encode decode smallobjects shardreports remains ledger provenance bytecache "
             "storetables jobreport law datacard layout manifest workunits write presence committing paging runtasks "
             "onthreads oncluster shardruns unitruns run outputs storemap storeread addedtables uniontables union "
             "atonce storefolds stored unitchips adding holding datasets rereading verifying appending",
    "streams": "weights deals epochs augmenting chipshards planned ignoring datasets shardsource clustersource ahead "
               "stream",
    "statistics": "sketch labelcounts stats measuring classshares classplaces",
    "prediction": "modelchips modelidentity modelinputs modelqueue modelkinds models modelsending multiscales cogtiles "
                  "cogs outputs blending mapgrid mapjob mapstore mapwork openmap maps storedjob vectorwork vectors "
                  "planmap mapfiles targets predicting",
    "exports": "sheets filenames geotiff stacitems tarshards chipshards geotiffs webdataset rslearn exits",
    "geometries": "areas windows rows reading points cells torchset",
    "show": "fetching tilecount probing explain audit foreign recipetext losses contenders why cards maps pictures "
            "plot plotrecords spectra",
    "evaluation": "confusion reading rasters truth ground naming passes samples errormap picture evaluation evaluate",
    "launching": "request local gateway kubespec kubefaults kubernetes slurmjobs slurm cluster",
    "training": "tensors chipbatch passes datamodule",
    "the face": "compacting splitcells classraster storeexits storeset reportpage planfile chipexits modelexits "
                "planset streamfrom torchdata chipblocks chipsteps chipviews chipstatistics scoreexits chipset "
                "tableexits recordviews pixelreads collection openers building chipfolder",
    "recipes": "lines arguments source models problems functions shapes blame assembling placement exits recipe "
               "starting",
    "the names": "__init__",
    "demo": "world checks run",
    "cli": "exitcodes printing options data recipes stores exits information trial app",
    "the end": "__main__",
}
# fmt: on
ROOT_ROOMS = ("", "the face", "the names", "the end")

# A folder that only one machine has. Spelled in pieces, so that this file passes its own test.
MACHINE_PATH = re.compile(
    r"(?<![\w.:/~-])/(?:" + "|".join(["root", "work", r"home/(?!jovyan\b)\w+", "Users"]) + r")/"
)


def places() -> dict[str, int]:
    """Return module -> its place in the order: ``grid``, ``reader.engine``."""
    names = [
        name if room in ROOT_ROOMS else f"{room}.{name}"
        for room, own in ORDER.items()
        for name in own.split()
    ]
    assert len(names) == len(set(names))
    return {name: at for at, name in enumerate(names)}


def modules() -> Iterator[tuple[str, Path]]:
    """Yield (name, file) of every module; the files of a package inside a package count as one module."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if len(parts) == 2 and parts[1] == "__init__":
            assert not list(imported(path)), f"{path}: a package's own file says what it is, and no more"
            continue
        yield ".".join(parts[:2]), path


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module) for each import from the package itself, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: name the module in full"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            package, *rest = name.split(".")
            if package == "rasteret_dask":
                inside = rest and (PACKAGE / rest[0]).is_dir()
                found = ".".join(rest[:2]) if inside else rest[0] if rest else "__init__"
                yield node.lineno, found if inside or (PACKAGE / f"{found}.py").is_file() else "__init__"


def tracked() -> list[Path]:
    """Return the files that git tracks or would add."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout, so nothing is tracked")
    return [path for name in done.stdout.decode().split("\0") if name and (path := ROOT / name).is_file()]


def project() -> dict[str, object]:
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert isinstance(found, dict)
    return found


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """Return the constraints, name -> version."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_every_module_has_its_place() -> None:
    unknown = {name for name, _ in modules()} ^ places().keys()
    assert not unknown, f"add {sorted(unknown)} to ORDER in {Path(__file__).name}, or take them out"


def test_imports_go_one_way() -> None:
    place = places()
    backwards = {
        f"{path.relative_to(ROOT)}:{line}: {name} imports {other}, which comes later in ORDER"
        for name, path in modules()
        for line, other in imported(path)
        # the files of a package inside a package may import each other
        if other != name and place.get(other, len(place)) >= place[name]
    }
    assert not backwards, "\n".join(sorted(backwards))


def test_public_names_are_sorted_and_there() -> None:
    package = importlib.import_module("rasteret_dask")
    names = list(package.__all__)
    assert names == sorted(set(names))
    assert not [name for name in names if not hasattr(package, name)]
    assert dir(package) == names
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_a_training_worker_imports_little() -> None:
    """What its start must not wait for: half a second and more each."""
    heavy = [
        "distributed",
        "xarray",
        "pandas",
        "rasterio",
        "stackstac",
        "geopandas",
        "matplotlib",
        "dask.array",
    ]
    code = (
        "import sys, rasteret_dask\n"
        "assert len(sys.modules) < 300, len(sys.modules)\n"
        "assert not [name for name in sys.modules if name.startswith('rasteret_dask.rules')]\n"
        "rasteret_dask.masks.Mask, rasteret_dask.picks.Pick, rasteret_dask.units.Unit\n"
        "from rasteret_dask import open_chips\n"
        "from rasteret_dask.storeset import StoredChips\n"
        "import rasteret_dask.store.holding, rasteret_dask.streams.stream\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version_is_the_project_s() -> None:
    assert project()["dynamic"] == ["version"]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["version"]
    (written,) = re.findall(r'^__version__ = "(.+)"$', (ROOT / build["path"]).read_text(), re.MULTILINE)
    assert importlib.import_module("rasteret_dask").__version__ == written


def test_no_path_of_a_machine_in_tracked_files() -> None:
    found = []
    for path in tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # a picture
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in MACHINE_PATH.finditer(text)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text", ["see /root" + "/x", '"/work' + '/main"', "=/home" + "/ann/data", "(/Users" + "/ann"]
)
def test_a_path_of_a_machine_is_seen(text: str) -> None:
    assert MACHINE_PATH.search(text)


@pytest.mark.parametrize(
    "text", ["s3://bucket/root/x", "/home/jovyan/data", "https://x.org/root/", "~/root/", "/scratch"]
)
def test_other_paths_are_left_alone(text: str) -> None:
    assert not MACHINE_PATH.search(text)


def test_constraints_are_names_and_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    entries = [line for line in lines if not line.startswith("#")]
    assert not [line for line in entries if not re.fullmatch(r"[a-z0-9-]+==[0-9][\w.]*", line)]
    names = [line.split("==")[0] for line in entries]
    assert names == sorted(set(names))


def test_every_direct_dependency_is_pinned() -> None:
    settings = project()
    extras, core = settings["optional-dependencies"], settings["dependencies"]
    assert isinstance(extras, dict)
    assert isinstance(core, list)
    wanted = {
        normal(re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0])
        for requirement in [*core, *(one for extra in extras.values() for one in extra)]
    }
    # torch and lightning: builds differ by machine, and whoever trains has them already
    assert wanted - {"rasteret-dask", "torch", "lightning"} <= set(pins())
    assert "torch" not in pins()


def test_ci_runs_all_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text().endswith("\nmake test\nmake test-slow\n")
    assert "set -euo pipefail" in script.read_text(), "it must stop at what fails"


# Coordinate systems

BY_NUMBER = re.compile(r"from_epsg\(|f\"EPSG:\{|(?<!EPSG:)(?<!, )\b32[67]\d\d\b|\b32[67]\b")
"""A CRS taken for an EPSG code, or a zone of UTM for a sum."""


@pytest.mark.parametrize("room", ["chipping", "show", "geometries", "cubes", "tasks", "zones.py"])
def test_a_zone_is_a_value(room: str) -> None:
    """What a number stands for is known in ``crs``, the arithmetic of UTM's in ``grid``: others ask these."""
    paths = [PACKAGE / room] if room.endswith(".py") else sorted((PACKAGE / room).rglob("*.py"))
    faults = [
        f"{path.relative_to(ROOT)}:{line}: {text.strip()}"
        for path in paths
        for line, text in enumerate(path.read_text().splitlines(), 1)
        if BY_NUMBER.search(text)
    ]
    assert not faults, "\n".join(faults)


# Words

NO_NOUNS = {"said", "found", "known", "given", "own", "asked", "told"}
"""Participles and adjectives: what a value is called says what it is."""

ERRORS = "errors"  # whose ``found`` is the word of every message: "found X; expected Y"


def names_that_are_read(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, name) of functions, classes, parameters, fields, and what a module holds; not of locals."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        if isinstance(node, ast.FunctionDef):
            yield from ((node.lineno, a.arg) for a in (*node.args.args, *node.args.kwonlyargs))
        if isinstance(node, ast.ClassDef | ast.Module):
            for statement in node.body:
                targets = statement.targets if isinstance(statement, ast.Assign) else []
                targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
                yield from ((t.lineno, t.id) for t in targets if isinstance(t, ast.Name))


def test_values_have_nouns_for_names() -> None:
    faults = [
        f"{path.relative_to(ROOT)}:{line}: {word}"
        for name, path in modules()
        for line, word in names_that_are_read(ast.parse(path.read_text()))
        if word.strip("_").lower() in NO_NOUNS and name != ERRORS
    ]
    assert not faults, "\n".join(faults)


def test_a_class_name_is_one_class() -> None:
    """But those of a leading underscore, which nobody else sees, and those of the demo's world."""
    rooms: dict[str, list[str]] = {}
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and name != "demo.world":
                rooms.setdefault(node.name, []).append(name)
    twice = {word: names for word, names in rooms.items() if len(names) > 1}
    assert not twice, "one word, one meaning"


WORDS = {*PICKS, *UNITS, *MASKS, *KINDS, "physical", "auto"}
OTHER_MEANINGS = (
    "statistics/stats.py: 'mean'",  # of a histogram
    "store/encode.py: 'auto'",  # compression
    "launching/request.py: 'auto'",  # memory of a worker
    "recipes/assembling.py: 'auto'",  # compression, in a recipe
    "chipping/chipslots.py: 'clearest'",  # of acquisitions by their records' cloud cover, which no pick looks at
    "prediction/vectorwork.py: 'class'",  # a column
    "prediction/modelkinds.py: 'auto'",  # a device
    "prediction/models.py: 'auto'",
    "table/itemkinds.py: 'kelvin'",  # as STAC writes raster:bands.unit
)


def rule_words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield (line, word) where a rule's name is compared or is the key of a dictionary."""
    for node in ast.walk(tree):
        parts: list[ast.AST | None] = []
        if isinstance(node, ast.Compare):
            parts = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            parts = list(node.keys)
        elif isinstance(node, ast.MatchValue):
            parts = [node.value]
        elif isinstance(node, ast.Subscript) and "Literal" not in ast.unparse(node.value):
            parts = [node.slice]
        for part in parts:
            several = part.elts if isinstance(part, ast.Tuple | ast.List | ast.Set) else [part]
            for one in several:
                if isinstance(one, ast.Constant) and one.value in WORDS:
                    yield one.lineno, str(one.value)


def test_rules_are_values_outside_their_room() -> None:
    """What a name stands for is looked up once, in ``rules``: code elsewhere asks the value, never the name."""
    compared = [
        f"{place}:{line}: {word!r}"
        for _, path in modules()
        if not (place := path.relative_to(PACKAGE).as_posix()).startswith(("rules/", "demo/"))
        for line, word in rule_words(ast.parse(path.read_text(), str(path)))
        if f"{place}: {word!r}" not in OTHER_MEANINGS
    ]
    assert not compared, "ask the rule's value instead:\n" + "\n".join(compared)


@pytest.mark.parametrize(
    "text",
    [
        "pick == 'median'", "'raw' != unit", "unit in ('raw', 'kelvin')", "x = {'clouds': 1}", "TABLE['embedding']",
        "match kind:\n    case 'class':\n        pass",
    ],
)  # fmt: skip
def test_a_compared_rule_is_seen(text: str) -> None:
    assert list(rule_words(ast.parse(text)))


@pytest.mark.parametrize(
    "text", ["pick = 'median'", "f(units='raw')", "'nothing' in x", "x: Literal['class', 'angle']"]
)
def test_other_uses_of_a_rule_s_name_are_left_alone(text: str) -> None:
    assert not list(rule_words(ast.parse(text)))


CRS_FORMS = re.compile(r"""from_epsg\(|f["'][^"']*EPSG:\{|CRS\.from_|to_epsg\(|Transformer\.from_crs\(""")
CRS_OWN = {"crs.py", "grid.py", "reader/pixelgrid.py"}
"""Where codes become CRSs, transformers and GDAL's CRSs; everybody else asks these."""


def test_a_crs_is_made_and_named_in_one_place() -> None:
    faults = {
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for name, path in modules()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if CRS_FORMS.search(line)
        and name.partition(".")[0] != "demo"
        and str(path.relative_to(PACKAGE)) not in CRS_OWN
    }

    assert not faults, "\n".join(sorted(faults))


ANY_TAKEN = {
    "options": "what only one kind of cluster takes: texts, numbers, lists, objects of its library",
    "aoi": "an area in any form: a bbox, shapely, GeoJSON, WKB, a GeoDataFrame",
    "geometries": "the same, or several of them, or points",
    "points": "points in any of these forms",
    "at": "a table of points or polygons of any library",
    "labels": "a table of polygons of any library",
    "samples": "a table of geometries of any library",
    "grid": "a CRS in any form, an odc-geo GridSpec or GeoBox, beside its words",
    "crs": "a CRS in any form: a code, WKT, PROJJSON, an object of any library",
    "target_crs": "the same",
    "table": "a table of any library that Arrow can take",
    "files": "a path, a pattern, a list, a table of any library",
    "source": "STAC items of any library, a path, a table",
    "columns": "the value of a column: whatever the column holds",
    "filters": "the same",
    "triples": "the three parts of a predicate, the last of which is a column's value",
    "query": "STAC's own JSON",
    "filter": "CQL2, as text or JSON",
    "bands": "of register: a TOML table's values",
    "overrides": "values of TOML",
    "state": "JSON that state_dict() made",
    **(
        {}
        if find_spec("lightning") is None
        else {
            **dict.fromkeys(("train", "val", "test", "predict"), "datasets of torch, of samples of any type"),
        }
    ),
    "facts": "figures that become JSON",
    "arrays": "arrays and texts of a batch",
    "ax": "Axes of matplotlib, which need not be installed",
    "call": "a user's model returns arrays or tensors, one or several",
    "inputs": "a user's function returns whatever the model takes",
    "function": "a user's function returns whatever it does",
    "functions": "users' functions",
    "transforms": "samples of torch, whose values are tensors, texts and numbers",
    "spec": "stackstac's, which calls the reader",
    "dtype": "the same",
    "fill_value": "the same",
    "gdal_env": "the same",
    "window": "rasterio's, or of whatever has its four numbers",
}
"""Public arguments that really take anything, or come from a library, and why."""


def arguments_typed_any() -> dict[str, str]:
    """Return argument -> one public name that has it, of those whose annotation says Any; arrays of any dtype aside."""
    from test_docexamples import public

    found: dict[str, str] = {}
    for name, documented in public().items():
        thing = documented.thing
        if isinstance(thing, type) and not isinstance(vars(thing).get("__init__"), FunctionType):
            continue
        for argument, parameter in inspect.signature(thing).parameters.items():
            text = str(parameter.annotation).replace("NDArray[Any]", "")
            if re.search(r"\bAny\b", text):
                found[argument] = name
    return found


def test_a_public_argument_is_any_for_a_reason() -> None:
    found = arguments_typed_any()
    unknown = {argument: name for argument, name in found.items() if argument not in ANY_TAKEN}
    assert not unknown, f"say what they take, or why that is anything: {unknown}"
    assert not ANY_TAKEN.keys() - found.keys(), "no public argument of that name is Any"


def test_words_are_types_where_arguments_take_them() -> None:
    """Each word's type of words.py is the type of some public argument."""
    from test_docexamples import public

    from rasteret_dask import words

    texts = " ".join(
        str(parameter.annotation)
        for documented in public().values()
        if not isinstance(documented.thing, type)
        for parameter in inspect.signature(documented.thing).parameters.values()
    )
    unused = [name for name in words.__all__ if not re.search(rf"\b{name}\b", texts)]
    assert not unused


def test_files_of_the_package_name_their_licence() -> None:
    line = "# SPDX-License-Identifier: Apache-2.0\n"
    files = (path for path in tracked() if path.is_relative_to(PACKAGE) and path.suffix == ".py")
    bare = [str(path.relative_to(ROOT)) for path in files if not path.read_text().startswith(line)]
    assert not bare, f"they begin with {line!r}: sed -i '1i {line.strip()}' {' '.join(bare)}"
