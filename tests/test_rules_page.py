"""The page about rules explains every word; ``test_pages`` runs its blocks."""

from __future__ import annotations

import re
from pathlib import Path

from rasteret_dask.rules.kinds import KINDS
from rasteret_dask.rules.masks import MASKS
from rasteret_dask.rules.picks import PICKS
from rasteret_dask.rules.units import UNITS

PAGE = Path(__file__).parents[1] / "docs" / "rules.md"


def test_every_word_is_explained() -> None:
    text = PAGE.read_text()
    missing = [
        word for word in (*KINDS, *UNITS, *MASKS, *PICKS) if not re.search(rf'[`"( ]{word}[`", )]', text)
    ]
    assert not missing
