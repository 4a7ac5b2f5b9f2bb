"""The page about recipes: its blocks run, and its reference and the published schema are what the models say.

``python tests/test_recipes_page.py`` writes both anew.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.recipes.models import BEGINNINGS, OUTPUTS, schema

ROOT = Path(__file__).parents[1]
PAGE, SCHEMA, README = ROOT / "docs" / "recipes.md", ROOT / "docs" / "recipe.schema.json", ROOT / "README.md"
HEADING = "## All keys\n"

ORTHO = (("20230401", 0), ("20230501", 1), ("20230601", 2))


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def recipes() -> dict[str, str]:
    """Return the page's recipes by the name in their first line."""
    return {m[1]: text for text in blocks("toml") if (m := re.match(r"# (\w+\.toml)\n", text))}


# The reference


def kind_of(node: dict[str, Any]) -> str:
    """Return the type of a schema's node in words."""
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "enum" in node:
        return ", ".join(f"`{one}`" for one in node["enum"])
    if "const" in node:
        return f"`{node['const']}`"
    if "anyOf" in node:
        return " or ".join(dict.fromkeys(kind_of(one) for one in node["anyOf"] if one.get("type") != "null"))
    match node.get("type"):
        case "array":
            return f"array of {kind_of(node['items'])}" if node.get("items") else "array"
        case "object":
            inside = node.get("additionalProperties")
            return f"table of {kind_of(inside)}" if isinstance(inside, dict) else "table"
        case None:
            return "anything"
        case str() as word:
            return {"string": "text", "integer": "whole number", "boolean": "true or false"}.get(word, word)
    raise AssertionError(node)


def rows(table: dict[str, Any]) -> Iterator[str]:
    yield "| key | type | meaning |"
    yield "|---|---|---|"
    for key, node in table["properties"].items():
        needed = " (needed)" if key in table.get("required", ()) else ""
        words = re.sub(r"(?<!\\)\|", r"\\|", node.get("description", "")).replace("\n", " ")
        yield f"| `{key}` | {kind_of(node)}{needed} | {words} |"


def reference() -> str:
    """Return the tables of all keys."""
    whole = schema()
    lines = ["A recipe has these tables:", "", "| table | type |", "|---|---|"]
    for key, node in whole["properties"].items():
        several = key in ("collections", "outputs")
        kind = "one of those below, by a key that only it has" if several else kind_of(node)
        lines.append(f"| `{key}` | {kind} |")
    for name, table in whole["$defs"].items():
        lines += ["", f"### {name}", "", table.get("description", ""), "", *rows(table)]
    return "\n".join(lines) + "\n"


def test_the_reference_is_what_the_models_say() -> None:
    _, _, written = PAGE.read_text().partition(HEADING)
    assert written.strip() == reference().strip(), f"write it anew: python {Path(__file__).relative_to(ROOT)}"


def test_the_published_schema_is_what_the_models_say() -> None:
    assert json.loads(SCHEMA.read_text()) == schema(), (
        f"write it anew: python {Path(__file__).relative_to(ROOT)}"
    )


def test_every_way_to_begin_and_to_end_is_in_the_tables_of_the_page() -> None:
    text = PAGE.read_text().partition(HEADING)[0]
    for key in (*BEGINNINGS, *OUTPUTS):
        assert f"| `{key}`" in text


@pytest.mark.parametrize("name", sorted(recipes()))
def test_editors_find_no_fault_in_the_page_s_recipes(name: str) -> None:
    values = tomllib.loads(recipes()[name])
    if "chips" in values:  # else it is a part of one
        jsonschema.Draft202012Validator(schema()).validate(values)


@pytest.mark.parametrize(
    ("fault", "place"),
    [
        ('[chips]\nsize = "64"', "chips"), ("[chips]\nsise = 64", "chips"), ("[chips]\nsize = 64\n[spilt]", ""),
        ('[chips]\nsize = 64\n[[outputs]]\nzar = "x"', "outputs"),
        ('[chips]\nsize = 64\n[collections.y]\ndataset = "a"\nfiles = "b"\nmerge = ["x"]', "collections"),
    ],
)  # fmt: skip
def test_editors_find_faults_too(fault: str, place: str) -> None:
    values = tomllib.loads(f'[collections.x]\ndataset = "demo/sentinel-2-l2a"\n{fault}')
    errors = list(jsonschema.Draft202012Validator(schema()).iter_errors(values))
    assert errors
    assert all(next(iter(error.path), "") == place for error in errors)


# The blocks


@pytest.fixture
def folder(small_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a working directory with the demo's world, files of one's own and labels."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "world").symlink_to(small_world.sentinel2.parents[1])
    monkeypatch.chdir(tmp_path)
    west, south, east, north = small_world.bbox
    x, y, dx, dy = (west + east) / 2, (south + north) / 2, (east - west) / 20, (north - south) / 20
    ring = [[x, y], [x + dx, y], [x + dx, y + dy], [x, y + dy], [x, y]]
    crop = {
        "type": "Feature",
        "properties": {"crop": "rye"},
        "geometry": {"type": "Polygon", "coordinates": [ring]},
    }
    Path("fields.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": [crop]}))
    return tmp_path


def test_the_blocks_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in recipes().items():
        Path(name).write_text(text)
    names: dict[str, Any] = {}
    for block in blocks("python"):
        module = re.match(r"# (\w+\.py)\n", block)
        if module:
            Path(module[1]).write_text(block)
        else:
            exec(compile(block, str(PAGE), "exec"), names)
    shown = capsys.readouterr()
    assert "finished: nothing to do" in shown.err
    assert "their recipe differs: chips.size is 64 in the store and 32 here" in shown.out
    assert "unknown key 'sise' in chips; expected one of size, stride" in shown.out
    assert "Did you mean 'size'?" in shown.out
    assert "join" not in names["chips"].to_recipe()
    assert names["small"].text.count("small.zarr") == 1

    assert len(rd.load_recipe("steps.toml").chips().table)
    assert "mask snow, Classes" in str(rd.load_recipe("rules.toml").explain()["chips"])
    _, stats = rd.load_recipe("fields.toml").run(progress=False)
    assert stats is not None
    assert {one.name for one in folder.iterdir()} >= {
        "chips.parquet",
        "stats.json",
        "train.zarr",
        "again.toml",
    }


def test_the_main_job_is_the_readme_s(folder: Path) -> None:
    text = recipes()["main.toml"]
    assert len(text.splitlines()) < 40
    Path("main.toml").write_text(text)
    code = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(compile(code.partition("train = ")[0], str(README), "exec"), names)
    assert rd.load_recipe("main.toml").chips().plan == names["chips"].plan


def test_a_newcomer_s_recipe_for_own_files(folder: Path, make_files: Callable[[Path], None]) -> None:
    text = recipes()["own.toml"]
    assert len([line for line in text.splitlines() if line.strip()]) < 20
    Path("own.toml").write_text(text)
    make_files(folder / "ortho")
    (report,) = rd.load_recipe("own.toml").run(progress=False)
    assert report is not None
    stored = rd.open_chips("ortho.zarr")
    assert len(stored) == 3 * 100
    assert rd.verify("ortho.zarr").ok


@pytest.fixture
def make_files() -> Callable[[Path], None]:
    """Return a function that makes files of four bands, one a date, over the same four chips."""
    import numpy as np
    import rasterio
    from rasterio.transform import from_origin

    def make(place: Path) -> None:
        place.mkdir()
        for date, level in ORTHO:
            pixels = np.full((4, 640, 640), 10 * level + 1, np.uint8)
            with rasterio.open(
                place / f"ortho_{date}.tif", "w", driver="GTiff", width=640, height=640, count=4, dtype="uint8",
                crs="EPSG:32633", transform=from_origin(499840.0, 5560320.0, 10, 10), tiled=True, blockxsize=64,
                blockysize=64, compress="deflate",
            ) as file:  # fmt: skip
                file.write(pixels)

    return make


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(schema(), indent=1) + "\n")
    page = PAGE.read_text().partition(HEADING)[0]
    PAGE.write_text(f"{page}{HEADING}\n{reference()}")
