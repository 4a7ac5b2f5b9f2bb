"""A chip is the cube over its own bounds, whatever the type, the kind, the mask and the pick: drawn worlds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import rasterio
import xarray as xr
from affine import Affine
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from test_cubes import NOON, X0, Y0, dataset, scene

import rasteret_dask as rd
from rasteret_dask.reader.cogreader import CogReader
from rasteret_dask.rules.masks import Classes, Mask
from rasteret_dask.rules.picks import Composed, Ranked, Scored

Array = NDArray[Any]

DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "int64", "uint64", "float32", "float64", "complex64")
KINDS: dict[str, dict[str, Any]] = {
    "unknown": {},
    "class": {"classification:classes": [{"value": 1, "name": "one"}]},
    "bitfield": {"classification:bitfields": [{"offset": 0, "length": 1, "classes": []}]},
}
SIZE = 16


@dataclass(frozen=True)
class Oldest(Ranked):
    """A pick of one's own that the plan decides."""

    fill: bool = False

    def order(self, candidates: Any) -> Array:
        return np.asarray(candidates.start)


@dataclass(frozen=True)
class FewestInFirstRow(Scored):
    """A pick of one's own that looks at where in the chip pixels are clear."""

    fill: bool = False

    def score(self, clear: NDArray[np.bool_]) -> float:
        return -float(np.count_nonzero(clear[0]))


@dataclass(frozen=True)
class Greatest(Composed):
    """A composite of one's own."""

    def blend(self, stack: Array, valid: NDArray[np.bool_]) -> tuple[Array, NDArray[np.bool_]]:
        return np.where(valid, stack, -np.inf).max(axis=0), valid.any(axis=0)


@dataclass(frozen=True)
class Odd(Mask):
    """A mask of one's own, by two bands."""

    @property
    def needs(self) -> tuple[str, ...]:
        return "scl", "other"

    def hidden(self, *stored: Array) -> NDArray[np.bool_]:
        return np.asarray((stored[0].astype(np.int64) + stored[1]) % 5 == 1)


def numbers(dtype: str, shape: tuple[int, int], rng: np.random.Generator) -> Array:
    """Return numbers all over a type's range, those next to its limits too, with many equal ones."""
    kind = np.dtype(dtype).kind
    if kind == "f":
        values = rng.choice([-1.5, 0.0, 0.25, 3.0, 1e30, np.nan], shape)
    elif kind == "c":
        values = rng.choice([0, 1 + 2j, -3.5j, 1e20 + 1j, complex(np.nan, 0)], shape)
    else:
        limits = np.iinfo(dtype)
        some = [0, 1, 2, 7, limits.min, limits.min + 1, limits.max - 1, limits.max]
        return rng.choice(np.array(some, dtype=dtype), shape)
    return np.asarray(values).astype(dtype)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, float | None], rd.Collection]:
    """Return what makes a collection of four records: two tiles of one pass, a whole one, and one half a pixel off."""
    folder = tmp_path_factory.mktemp("drawn")
    made: dict[Any, rd.Collection] = {}

    def of(dtype: str, kind: str, nodata: float | None) -> rd.Collection:
        if (dtype, kind, nodata) not in made:
            path = folder / f"{dtype}-{kind}-{nodata}"
            path.mkdir()
            made[dtype, kind, nodata] = collection(path, dtype, kind, nodata)
        return made[dtype, kind, nodata]

    return of


def collection(folder: Path, dtype: str, kind: str, nodata: float | None) -> rd.Collection:
    rng = np.random.default_rng(5)
    take = {"platform": "p", "sat:relative_orbit": 3}
    records = [  # name, days, corner, shape, what makes one pass of two
        ("west", 0, (0, 0), (48, 32), take),
        ("east", 0, (240, 0), (48, 40), take),
        ("whole", 9, (0, 0), (48, 64), {"platform": "q"}),
        ("off", 20, (-35, 45), (56, 56), {"platform": "r"}),
    ]
    items = []
    for name, days, (dx, dy), shape, properties in records:
        pixels = {
            "data": numbers(dtype, shape, rng),
            "other": numbers("uint8", shape, rng),
            "scl": rng.choice(np.array([0, 4, 5, 8, 3], np.uint8), shape),
        }
        at = Affine(10, 0, X0 + dx, 0, -10, Y0 + dy)
        item = scene(folder, name, NOON + timedelta(days=days), pixels, at, (16, 16), **properties)
        item["assets"]["data"] |= KINDS[kind]
        for key, own in (("data", nodata), ("other", None)):
            with rasterio.open(item["assets"][key]["href"], "r+") as file:
                file.nodata = own
        items.append(item)
    return rd.build_from_stac(items, name="drawn")


picks = st.sampled_from(
    ["closest", "first", "last", "newest", "least_cloudy", "clearest", "median", "mean", "majority",
     Oldest(), FewestInFirstRow(), Greatest()]
)  # fmt: skip
masks = st.sampled_from([None, "clouds", Classes("other", (1, 7)), Odd()])


@settings(max_examples=40, deadline=None, phases=[Phase.generate], report_multiple_bugs=False, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_chip_is_cube_for_all_rules(
    world: Callable[[str, str, float | None], rd.Collection], data: st.DataObject
) -> None:
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    whole = np.dtype(dtype).kind in "iu"
    kind = data.draw(st.sampled_from([*KINDS]) if whole else st.just("unknown"), "kind")
    pick = data.draw(picks, "pick")
    is_complex = np.dtype(dtype).kind == "c"
    if is_complex and pick in ("median", "mean", "majority", Greatest()):
        pick = "closest"  # complex numbers have no order
    fills = not (isinstance(pick, Composed) or pick in ("median", "mean", "majority"))
    fill = data.draw(st.booleans(), "fill") if fills else None
    nodata = data.draw(st.sampled_from([None, 0, 1]), "nodata")
    # numbers of 64 bits and complex ones cannot be averaged without loss
    is_exact = is_complex or (whole and np.dtype(dtype).itemsize == 8)
    source = world(dtype, kind, nodata).harmonize(
        bands=data.draw(st.sampled_from([["data"], ["data", "other"], ["other", "data", "scl"]]), "bands"),
        units="raw", time="1MS", pick=pick, fill=fill, mask=data.draw(masks, "mask"),
        resolution=data.draw(st.sampled_from([10, 20]), "resolution"),
        resampling=data.draw(st.sampled_from(["nearest"] if is_exact else [None, "nearest", "cubic"]), "kernel"),
    )  # fmt: skip
    chips = dataset(source.chips(size=SIZE, cell_km=0.64, min_coverage=data.draw(st.sampled_from([0.1, 1.0]))))
    for i in range(0, chips.sizes["chip"], 3):
        chip = chips.isel(chip=i)
        cube = source.cube(
            bounds=tuple(chip["bounds"].values.tolist()), chunks=data.draw(st.sampled_from([5, 16, 64]))
        )
        same(chip, cube)


def same(chip: xr.Dataset, cube: xr.DataArray) -> None:
    """Check that a chip is the cube over its bounds, validity and all."""
    computed = cube.compute(scheduler="sync")
    pixels = chip["pixels"]
    assert computed.dtype == pixels.dtype
    np.testing.assert_array_equal(pixels.values, computed.values)
    assert computed["band"].values.tolist() == chip["band"].values.tolist()
    if "valid" in chip:
        np.testing.assert_array_equal(chip["valid"].values, computed["valid"].values)
        if "nodata" in computed.attrs:
            told = (computed.values != computed.attrs["nodata"]).all(axis=1)
            np.testing.assert_array_equal(told, computed["valid"].values)
