"""A chip is the cube over its own bounds, whatever the type, the kind, the mask and the pick: drawn worlds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

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
from rasteret_dask.catalogs.bands import Radiometry
from rasteret_dask.rules.masks import Classes, Mask
from rasteret_dask.rules.picks import Composed, Ranked, Scored
from rasteret_dask.rules.units import Unit

Array = NDArray[Any]

DTYPES = (
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "int64",
    "uint64",
    "float32",
    "float64",
    "complex64",
)
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
class Feet(Unit):
    """A unit of one's own in which some numbers have no value."""

    name = "metres"

    def decode(self, stored: Array, scaling: Radiometry) -> Array:
        values = stored.astype(np.float64) * 0.3048
        return np.where(values > 1.5, values, np.nan).astype(np.float32)


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


def settled(pick: str | Ranked | Scored | Composed) -> bool:
    """Tell whether a pick takes one acquisition, which may be filled."""
    return not (isinstance(pick, Composed) or pick in ("median", "mean", "majority"))


def raw(data: st.DataObject) -> tuple[tuple[str, str, float | None], dict[str, Any]]:
    """Draw a world, and rules of stored numbers."""
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    whole, size = np.dtype(dtype).kind in "iu", np.dtype(dtype).itemsize
    kind = data.draw(st.sampled_from([*KINDS]) if whole else st.just("unknown"), "kind")
    pick = data.draw(picks, "pick")
    if dtype == "complex64" and not settled(pick):
        pick = "closest"  # complex numbers have no order
    # numbers of 64 bits and complex ones cannot be averaged without loss
    is_exact = dtype == "complex64" or (whole and size == 8)
    return (dtype, kind, data.draw(st.sampled_from([None, 0, 1]), "nodata")), {
        "units": "raw",
        "bands": data.draw(st.sampled_from([["data"], ["data", "other"], ["other", "data", "scl"]]), "bands"),
        "pick": pick,
        "resampling": data.draw(
            st.sampled_from(["nearest"] if is_exact else [None, "nearest", "cubic"]), "kernel"
        ),
    }


def in_units(data: st.DataObject) -> tuple[tuple[str, str, float | None], dict[str, Any]]:
    """Draw a world, and rules with units."""
    units: Any = data.draw(
        st.sampled_from(
            [
                ("reflectance", "uint16"), ("reflectance", "int16"), ("reflectance", None), ("embedding", None),
                ("decibel", "int16"), ({"data": "decibel", "other": "raw"}, None), ({"data": "scaled"}, None),
                ({"data": "embedding", "other": "embedding"}, None), (Feet(), None),
            ]
        ),
        "units",
    )  # fmt: skip
    return (data.draw(st.sampled_from(["uint8", "int16", "int32", "float32"]), "dtype"), "unknown", 1), {
        "units": units[0],
        "dtype": units[1],
        "bands": ["other", "data"],
        "pick": data.draw(picks, "pick"),
        "resampling": data.draw(st.sampled_from([None, "nearest", "average"]), "kernel"),
    }


def assert_law(data: st.DataObject, source: rd.Collection, rules: dict[str, Any]) -> None:
    """Check that chips, drawn with a mask, a resolution and a fill, are the cubes over their bounds."""
    fill = data.draw(st.booleans(), "fill") if settled(rules["pick"]) else None
    source = source.harmonize(
        **rules, time="1MS", fill=fill, mask=data.draw(masks, "mask"),
        resolution=data.draw(st.sampled_from([10, 20]), "resolution"),
    )  # fmt: skip
    coverage = data.draw(st.sampled_from([0.1, 1.0]), "min_coverage")
    chips = dataset(source.chips(size=SIZE, cell_km=0.64, min_coverage=coverage).sample(6))
    for i in range(0, chips.sizes["chip"], 2):
        chip, chunks = chips.isel(chip=i), data.draw(st.sampled_from([5, 16]), "chunks")
        cube = source.cube(bounds=tuple(chip["bounds"].values.tolist()), chunks=chunks, min_coverage=coverage)
        same(chip, cube)


drawn = settings(
    max_examples=15, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow]
)
World = Callable[[str, str, float | None], rd.Collection]


@drawn
@given(data=st.data())
def test_chip_is_cube_for_stored_numbers(world: World, data: st.DataObject) -> None:
    where, rules = raw(data)
    assert_law(data, world(*where), rules)


@drawn
@given(data=st.data())
def test_chip_is_cube_in_units(world: World, data: st.DataObject) -> None:
    where, rules = in_units(data)
    assert_law(data, world(*where), rules)


@pytest.mark.slow
@settings(drawn, max_examples=150)
@given(data=st.data(), draw=st.sampled_from([raw, in_units]))
def test_chip_is_cube_for_many_rules(world: World, data: st.DataObject, draw: Any) -> None:
    where, rules = draw(data)
    assert_law(data, world(*where), rules)


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
