"""Where an extra's package is not installed, the error names the extra and what installs it."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.extras import EXTRAS, how_to_install, needs


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_error_names_what_to_install(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in EXTRAS[extra]:
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(rd.MissingExtraError) as caught, needs(extra, "drawing"):
        __import__(next(iter(EXTRAS[extra])) + ".part")
    assert isinstance(caught.value, ImportError)
    assert str(caught.value).startswith("drawing: found no package ")
    assert str(caught.value).endswith(f"expected the extra {extra!r}. Install it: {how_to_install(extra)}.")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_another_missing_module_is_another_fault() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"), needs("plot", "drawing"):
        __import__("no_such_module")


@pytest.mark.parametrize(
    "use",
    [
        lambda s2, bbox: s2.to_geopandas(),
        lambda s2, bbox: s2.harmonize(resolution=10).chips(64, cell_km=0.64).to_geopandas(),
        lambda s2, bbox: s2.get_gdf(bbox, ["B04"]),
    ],
    ids=["records", "chips", "pixels"],
)
def test_geodataframes_need_the_extra_geo(
    use: Callable[[rd.Collection, Any], Any],
    s2: rd.Collection,
    small_world: World,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "geopandas", None)
    with pytest.raises(
        rd.MissingExtraError, match=r"GeoDataFrame .* the extra 'geo'.* pip install 'geopandas>="
    ):
        use(s2, small_world.bbox)
