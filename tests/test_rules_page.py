"""The page about rules, run from its first block to its last."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from rasteret_dask.demo.world import World
from rasteret_dask.rules.kinds import KINDS
from rasteret_dask.rules.masks import MASKS
from rasteret_dask.rules.picks import PICKS
from rasteret_dask.rules.units import UNITS

PAGE = Path(__file__).parents[1] / "docs" / "rules.md"


def test_the_blocks_run(
    small_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "world").symlink_to(small_world.sentinel2.parents[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RASTERET_DASK_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        name = re.match(r"# (\w+\.py)\n", block)
        if name:
            (tmp_path / name[1]).write_text(block)
        else:
            exec(compile(block, str(PAGE), "exec"), names)
    shown = capsys.readouterr().out
    assert "pick least_cloudy, mask clouds" in shown
    assert "('raw', 'raw')" in shown
    valid = dict(re.findall(r"^(longest|clearmiddle|greatest) ([\d.]+)$", shown, re.MULTILINE))
    assert 0 < float(valid["clearmiddle"]) <= float(valid["longest"]) <= float(valid["greatest"]) <= 1


def test_every_word_is_explained() -> None:
    text = PAGE.read_text()
    missing = [
        word for word in (*KINDS, *UNITS, *MASKS, *PICKS) if not re.search(rf'[`"( ]{word}[`", )]', text)
    ]
    assert not missing
