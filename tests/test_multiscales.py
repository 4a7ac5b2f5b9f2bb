"""Coarser levels of a map: by a count of 2 x 2 pixels, in any cut, described as the conventions' schemas ask."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from affine import Affine
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from rasteret_dask.crs import number
from rasteret_dask.prediction.multiscales import Halving, geozarr_attributes, halve, levels

SHAPES = hnp.array_shapes(min_dims=2, max_dims=3, max_side=7)
TRANSFORM = Affine(10.0, 0.0, 500_000.0, 0.0, -10.0, 5_000_000.0)


def by_hand(pixels: NDArray[Any], how: Halving, nodata: float | None) -> NDArray[Any]:
    """Return pixels of half the size, each by a count of those below it."""
    *rest, height, width = pixels.shape
    result = np.zeros((*rest, (height + 1) // 2, (width + 1) // 2), pixels.dtype)
    for place in np.ndindex(result.shape):
        *front, y, x = place
        block = pixels[(*front, slice(2 * y, 2 * y + 2), slice(2 * x, 2 * x + 2))].ravel().tolist()
        valid = [v for v in block if nodata is None or not (v == nodata or (v != v and nodata != nodata))]
        if not valid:
            result[place] = nodata
        elif how == "mode":
            result[place] = min(Counter(valid).items(), key=lambda item: (-item[1], item[0]))[0]
        elif how == "max":
            result[place] = max(valid)
        else:
            mean = sum(map(float, valid)) / len(valid)
            result[place] = mean if pixels.dtype.kind == "f" else round(mean)
    return result


@given(
    pixels=hnp.arrays(np.uint8, SHAPES, elements=st.integers(0, 4)),
    how=st.sampled_from(["mode", "max", "average"]),
    nodata=st.sampled_from([None, 0, 3, 255]),
)
def test_codes_and_counts(pixels: NDArray[Any], how: Halving, nodata: float | None) -> None:
    np.testing.assert_array_equal(halve(pixels, how, nodata), by_hand(pixels, how, nodata))


@given(
    pixels=hnp.arrays(np.float32, SHAPES, elements=st.floats(-1e3, 1e3, width=32) | st.just(np.nan)),
    how=st.sampled_from(["max", "average"]),
)
def test_quantities(pixels: NDArray[Any], how: Halving) -> None:
    np.testing.assert_allclose(halve(pixels, how, np.nan), by_hand(pixels, how, np.nan), rtol=1e-6, atol=1e-6)


@given(pixels=hnp.arrays(np.uint8, (11, 13), elements=st.integers(0, 3)), cut=st.integers(0, 5))
def test_blocks_at_even_corners_need_no_neighbours(pixels: NDArray[Any], cut: int) -> None:
    parts = [halve(part, "mode", 0) for part in np.split(pixels, [2 * cut])]
    np.testing.assert_array_equal(np.concatenate(parts), halve(pixels, "mode", 0))


@given(shape=st.tuples(st.integers(1, 100_000), st.integers(1, 100_000)))
@settings(max_examples=50)
def test_levels_have_the_shapes_that_halving_gives(shape: tuple[int, int]) -> None:
    pyramid = levels(shape)
    assert (pyramid[0].path, pyramid[0].shape) == (".", shape)
    for finer, coarser in pairwise(pyramid):
        assert coarser.shape == tuple((side + 1) // 2 for side in finer.shape)
        assert max(finer.shape) > 512
    assert max(pyramid[-1].shape) <= 512


@pytest.mark.parametrize("crs", [32633, "+proj=laea +lat_0=47 +lon_0=11 +ellps=GRS80 +units=m"])
def test_attributes_say_what_readers_of_the_conventions_look_for(crs: Any) -> None:
    """Keys and identifiers as OpenLayers' GeoZarr source requires them, and as the schemas of v0.1 do."""
    code = number(crs)
    attributes = geozarr_attributes(code, TRANSFORM, (1500, 1025), levels((1500, 1025)), "mode")
    uuids = {entry["uuid"] for entry in attributes["zarr_conventions"]}
    assert uuids == {
        "d35379db-88df-4056-af3a-620245f8e347", "f17cb550-5864-4468-aeb7-f3180cfb622f",
        "689b58e2-cf7b-45e0-9fff-9cfc0883d6b4",
    }  # fmt: skip
    assert attributes.get("proj:code") == ("EPSG:32633" if code > 0 else None)
    assert number(attributes["proj:wkt2"]) == code
    assert attributes["spatial:bbox"] == [500_000.0, 4_985_000.0, 510_250.0, 5_000_000.0]
    assert attributes["spatial:dimensions"] == ["y", "x"]
    layout = attributes["multiscales"]["layout"]
    assert [entry["asset"] for entry in layout] == [".", "2x", "4x"]
    assert [entry.get("derived_from") for entry in layout] == [None, ".", "2x"]
    assert layout[2]["transform"]["scale"] == [2.0, 2.0]
    assert layout[2]["spatial:transform"] == [40.0, 0.0, 500_000.0, 0.0, -40.0, 5_000_000.0]
    assert layout[2]["spatial:shape"] == [375, 257]
    assert attributes["multiscales"]["resampling_method"] == "mode"


def test_a_map_of_one_level_says_nothing_of_levels() -> None:
    attributes = geozarr_attributes(32633, TRANSFORM, (15, 10))
    assert "multiscales" not in attributes
    assert [entry["name"] for entry in attributes["zarr_conventions"]] == ["proj", "spatial"]
