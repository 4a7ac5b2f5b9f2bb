"""docs/errors.md names every error and warning, with the message that the code beside it really produces."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shutil
import sys
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import rasteret_dask as rd
from rasteret_dask import errors
from rasteret_dask.catalogs.catalog import VARIABLE
from rasteret_dask.demo.world import World

PAGE = (Path(__file__).parents[1] / "docs" / "errors.md").read_text()
CLASSES = [name for name in errors.__all__ if isinstance(getattr(errors, name), type)]
SECTIONS = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.M | re.S))
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", flags=re.M | re.S)
BEGIN = BLOCK.findall(PAGE.partition("\n## ")[0])[0][1]


def test_every_class_is_on_the_page_once_and_in_order() -> None:
    assert set(SECTIONS) == set(CLASSES)
    assert PAGE.count("\n## ") == len(CLASSES)
    for name, text in SECTIONS.items():
        assert [kind for kind, _ in BLOCK.findall(text)] == ["python", "text"], name
        assert "**What to do.**" in text or name == "RasteretDaskError", name


def produced(code: str, names: dict[str, Any]) -> str:
    """Return what a block prints, warns of and raises."""
    out = io.StringIO()
    lines: list[str] = []
    with contextlib.redirect_stdout(out), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            exec(compile(code, "errors.md", "exec"), names)
        except rd.RasteretDaskError as error:
            lines.append(f"{type(error).__name__}: {error}")
    told = [w for w in caught if w.category.__module__ == errors.__name__]
    return "\n".join([out.getvalue(), *(f"{w.category.__name__}: {w.message}" for w in told), *lines])


def plain(text: str, folder: Path) -> str:
    return " ".join(text.replace(str(folder), "/data").split())


@pytest.mark.filterwarnings("ignore:only .* split cell:UserWarning")
@pytest.mark.parametrize("name", sorted(SECTIONS))
def test_the_message_is_the_one_that_the_code_produces(
    name: str, small_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(small_world.sentinel2.parent.parent, tmp_path / "demo" / "world")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "catalog.toml"))
    monkeypatch.setitem(sys.modules, "geopandas", import_module("geopandas"))  # one block takes it away
    (_, code), (_, text) = BLOCK.findall(SECTIONS[name])
    names: dict[str, Any] = {}
    exec(BEGIN, names)
    got, shown = plain(produced(code, names), tmp_path), plain(text, tmp_path)
    assert doctest.OutputChecker().check_output(shown, got, doctest.ELLIPSIS), f"{got}\n{shown}"
