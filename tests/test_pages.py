"""Every block of README.md and of the pages of docs/ runs as written."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from pages import DOCS, ELSEWHERE, PAGES, ROOT, SHELLS, Block, blocks, run_page

from rasteret_dask.demo.world import World

LANGUAGES = {"python", *SHELLS, "output", "text", "toml", "yaml", "json", "html"}
"""What a block may be written in, beside Sphinx's own directives. The last five run nothing."""

NOT_RUN = Counter({
    "clusters.md": 3, "exports.md": 5, "install.md": 1, "jupyterhub.md": 10, "records.md": 1, "slurm.md": 2,
    "prediction.md": 1, "stream-or-store.md": 1,
})  # fmt: skip
"""Blocks that are shown only, a page: each of them says why."""

EXTRAS = {"training.md": "torch"}
"""Pages that need a module which the tests do without."""

RUN_BY = {
    "command-line.md": "test_command_line_page.py",
    "errors.md": "test_errors_page.py",
    "recipes.md": "test_recipes_page.py",
    "slurm.md": "test_slurm.py",
}
"""Pages whose blocks are run by a test of their own, which also holds them against the code that they describe."""

SLOW = {"training.md"}
"""Pages that take long: torch is imported."""


@pytest.fixture
def folder(tmp_path: Path, small_world: World) -> Path:
    """Return a folder where the demo has run."""
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "world").symlink_to(small_world.sentinel2.parents[1])
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=pytest.mark.slow if p.name in SLOW else (), id=p.stem) for p in PAGES],
)
def test_the_blocks_run(page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name in EXTRAS:
        pytest.importorskip(EXTRAS[page.name], reason=f"needs {EXTRAS[page.name]}")
    if page.name in RUN_BY:
        pytest.skip(f"{RUN_BY[page.name]} runs its blocks")
    if not any(block.language in {"python", *SHELLS} for block in blocks(page)):
        pytest.skip("it has no blocks to run")
    run_page(page, folder, monkeypatch)


def test_blocks_are_of_known_languages() -> None:
    unknown = [
        f"{block}: {block.language!r}"
        for page in PAGES
        for block in blocks(page)
        if block.language not in LANGUAGES and not re.fullmatch(r"\{[\w-]+\}", block.language)
    ]
    assert not unknown, f"not {unknown}, but one of {sorted(LANGUAGES)}"


def test_blocks_that_are_shown_only_are_counted() -> None:
    shown = Counter(block.page.name for page in PAGES for block in blocks(page) if block.reason)
    assert shown == NOT_RUN


def test_commands_that_are_run_elsewhere_are_there() -> None:
    tests = {page: (Path(__file__).with_name(name)).read_text() for page, name in RUN_BY.items()}
    assert not [page for page, text in tests.items() if page not in text]
    assert not [where for where in ELSEWHERE.values() if not (ROOT / where).is_file()]
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {
        match for page in PAGES for match in re.findall(r"^make ([a-z-]+)", page.read_text(), re.MULTILINE)
    }
    assert {"demo", "test", "docs"} <= named <= targets


def test_outputs_follow_what_prints_them() -> None:
    alone = []
    for page in PAGES:
        before: Block | None = None
        for block in blocks(page):
            if block.language == "output" and (before is None or before.language not in {"python", *SHELLS}):
                alone.append(str(block))
            before = block
    assert not alone


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^(`{3,}).*?^\1", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    assert not [target for target in targets if not (page.parent / target).exists()]


def test_every_page_is_in_the_navigation() -> None:
    listed = {
        line.strip()
        for page in DOCS.glob("*.md")
        for block in blocks(page)
        if block.language == "{toctree}"
        for line in block.text.splitlines()
    }
    assert {page.stem for page in DOCS.glob("*.md")} - {"index"} <= listed


def test_no_page_names_this_project_s_own_paths() -> None:
    assert not [str(page) for page in PAGES if str(ROOT) in page.read_text()]
