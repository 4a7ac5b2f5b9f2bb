"""The site builds strictly, the public names have their pages, and the files that a project has are valid."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from distributions import Environment
from pages import DOCS, ROOT, blocks
from waiting import PATIENCE_S

import rasteret_dask as rd

NOT_LISTED = {"__version__", "masks", "picks", "units"}
"""Public names without a page of their own: what the modules hold is listed by itself."""


def listed() -> set[str]:
    """Return the names of docs/api.md."""
    return {
        word
        for block in blocks(DOCS / "api.md")
        for line in block.text.splitlines()
        for word in re.findall(r"^(?:``rasteret_dask\.|   )(\w+)", line)
    }


def test_every_public_name_is_in_the_reference() -> None:
    assert set(rd.__all__) - NOT_LISTED <= listed()


def test_the_picture_of_the_readme_is_small() -> None:
    (path,) = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert 0 < (ROOT / path).stat().st_size < 150_000


@pytest.mark.slow
@pytest.mark.skipif(find_spec("sphinx") is None, reason="needs the extra docs")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", DOCS, tmp_path / "html"],
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "html").rglob("*.html"))
    assert {f"{page.stem}.html" for page in DOCS.glob("*.md")} <= {page.name for page in pages}
    fetched = r"<(?:script|img|link|iframe)[^>]+(?:src|href)=\"(?:https?:)?//[^\"]+"
    assert not [match for page in pages for match in re.findall(fetched, page.read_text())]


def loaded(path: str) -> Any:
    return yaml.safe_load((ROOT / path).read_text())


def test_the_citation_is_of_this_project() -> None:
    citation = loaded("CITATION.cff")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["version"] == rd.__version__
    assert citation["license"] == project["license"]
    assert [author["name"] for author in citation["authors"]] == [a["name"] for a in project["authors"]]
    assert not [
        key for key in ("cff-version", "message", "title", "type") if not isinstance(citation[key], str)
    ]


@pytest.mark.slow
def test_the_citation_is_valid(tmp_path: Path) -> None:
    """By the schema of its version, in an environment of its own: cffconvert wants an old jsonschema."""
    environment = Environment.made("3.11", tmp_path)
    environment.install("cffconvert", "setuptools<81")
    done = environment.run("cffconvert", "--validate", "--infile", ROOT / "CITATION.cff")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "valid according to schema version 1.2.0" in done.stdout


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_issue_forms_ask_for_something(form: str) -> None:
    text = loaded(f".github/ISSUE_TEMPLATE/{form}.yml")
    fields = [part for part in text["body"] if part["type"] != "markdown"]
    assert text["name"]
    assert text["description"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_hooks_run_what_is_installed() -> None:
    (repo,) = loaded(".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"
    for hook in repo["hooks"]:
        program = hook["entry"].split()[0]
        assert hook["language"] == "system"
        assert Path(program).parent == Path(".venv/bin")
        assert find_spec(Path(program).name) is not None


def test_the_release_notes_name_this_version() -> None:
    first = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first[1] == rd.__version__


def test_the_notebooks_are_valid_pages() -> None:
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        first = json.loads(path.read_text())["cells"][0]
        assert first["cell_type"] == "markdown"
        assert "".join(first["source"]).startswith("# ")
