"""The page about sensors names every dataset of the catalog; ``test_pages`` runs its blocks."""

from __future__ import annotations

from pathlib import Path

from rasteret_dask.catalogs.catalog import catalog

PAGE = Path(__file__).parents[1] / "docs" / "sensors.md"


def test_every_dataset_is_named() -> None:
    text = PAGE.read_text()
    assert not [name for name in catalog().datasets if f"`{name}`" not in text]
