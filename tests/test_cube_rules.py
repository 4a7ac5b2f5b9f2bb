"""A chip is the cube over its own bounds, whatever the type, the kind, the mask and the pick: drawn worlds."""

from __future__ import annotations

import pickle
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
from rasteret_dask.cubes import slotgraph
from rasteret_dask.reader.engine import Session
from rasteret_dask.rules.masks import Classes, Mask
from rasteret_dask.rules.picks import Composed, Ranked, Scored
from rasteret_dask.rules.radiometry import Radiometry
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
    "measured": {"raster:bands": [{"unit": "m"}]},
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
        return np.where(valid, stack, -np.inf).max(axis=0), np.asarray(valid.any(axis=0))


@dataclass(frozen=True)
class Brightest(Composed):
    """A composite that chooses by all bands together."""

    def blend(self, stack: Array, valid: NDArray[np.bool_]) -> tuple[Array, NDArray[np.bool_]]:
        whole = valid.all(axis=1)
        light = np.where(whole, np.where(valid, stack, 0.0).astype(np.float64).sum(axis=1), -np.inf)
        chosen = light.argmax(axis=0)[None, None]
        return np.take_along_axis(stack, chosen, axis=0)[0], np.broadcast_to(
            whole.any(axis=0), stack.shape[1:]
        )


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
    records: list[
        tuple[str, int, tuple[int, int], tuple[int, int], dict[str, Any]]
    ] = [  # name, days, corner, shape, what makes one pass of two
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
        item["assets"]["other"] |= KINDS["measured"]
        for key, own in (("data", nodata), ("other", None)):
            with rasterio.open(item["assets"][key]["href"], "r+") as file:
                file.nodata = own
        items.append(item)
    return rd.build_from_stac(items, name="drawn")


picks: st.SearchStrategy[Any] = st.sampled_from(
    ["closest", "first", "last", "newest", "least_cloudy", "clearest", "median", "mean", "majority",
     Oldest(), FewestInFirstRow(), Greatest(), Brightest()]
)  # fmt: skip
masks: st.SearchStrategy[Any] = st.sampled_from([None, "clouds", Classes("other", (1, 7)), Odd()])


def settled(pick: str | Ranked | Scored | Composed) -> bool:
    """Tell whether a pick takes one acquisition, which may be filled."""
    return not (isinstance(pick, Composed) or pick in ("median", "mean", "majority"))


def raw(data: st.DataObject) -> tuple[tuple[str, str, float | None], dict[str, Any]]:
    """Draw a world, and rules of stored numbers."""
    dtype = data.draw(st.sampled_from(DTYPES), "dtype")
    whole, size = np.dtype(dtype).kind in "iu", np.dtype(dtype).itemsize
    kind = data.draw(st.sampled_from([*KINDS]) if whole else st.just("measured"), "kind")
    pick: Any = data.draw(picks, "pick")
    # numbers of 64 bits and complex ones cannot be averaged without loss, nor composed
    is_exact = dtype == "complex64" or (whole and size == 8)
    if is_exact and not settled(pick):
        pick = "closest"
    kernels = ["nearest"] if is_exact else [None, "nearest", "cubic" if kind == "measured" else "mode"]
    return (dtype, kind, data.draw(st.sampled_from([None, 0, 1]), "nodata")), {
        "units": "raw",
        "bands": data.draw(st.sampled_from([["data"], ["data", "other"], ["other", "data", "scl"]]), "bands"),
        "pick": pick,
        "resampling": data.draw(st.sampled_from(kernels), "kernel"),
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
    quantized = "embedding" in (units[0].values() if isinstance(units[0], dict) else units)
    dtypes = [
        "uint8",
        "int16",
        "int32",
        *([] if quantized else ["float32"]),
    ]  # no float is a quantized number
    return (data.draw(st.sampled_from(dtypes), "dtype"), "measured", 1), {
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


@pytest.mark.parametrize("chunks", [5, 64])
def test_a_composite_of_all_bands_sees_all_of_them_in_cubes(world: World, chunks: int) -> None:
    source = world("uint8", "measured", 1).harmonize(
        ["data", "other"], units="raw", time="1MS", pick=Brightest(), resampling="nearest"
    )
    chips = dataset(source.chips(size=SIZE, cell_km=0.64, min_coverage=0.1).sample(4))
    alone = source.harmonize(pick="first").cube(bounds=tuple(chips.isel(chip=0)["bounds"].values.tolist()))
    chosen = source.cube(bounds=tuple(chips.isel(chip=0)["bounds"].values.tolist()))
    assert (alone.values != chosen.values).any()
    for i in range(chips.sizes["chip"]):
        chip = chips.isel(chip=i)
        box = tuple(chip["bounds"].values.tolist())
        same(chip, source.cube(bounds=box, chunks=chunks, min_coverage=0.1))


@pytest.mark.slow
@settings(drawn, max_examples=40)
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
    assert ("filled_fraction" in chip.coords) == ("filled" in computed.coords)
    if "filled" in computed.coords:
        share = computed["filled"].mean(("y", "x")).values.astype(np.float32)
        np.testing.assert_array_equal(chip["filled_fraction"].values, share)
    if "valid" in chip:
        np.testing.assert_array_equal(chip["valid"].values, computed["valid"].values)
        if "nodata" in computed.attrs:
            told = (computed.values != computed.attrs["nodata"]).all(axis=1)
            np.testing.assert_array_equal(told, computed["valid"].values)


# What a cube says beside its pixels


def cube_of(collection: rd.Collection, **harmonized: Any) -> xr.DataArray:
    return collection.harmonize(**{"units": "raw", "bands": ["data"], **harmonized}).cube(chunks=24)


@pytest.mark.parametrize(
    ("dtype", "nodata", "how", "told"),
    [
        ("uint16", 0, {}, True),
        ("uint16", 0, {"resampling": "bilinear", "resolution": 20}, True),
        ("uint16", 0, {"resampling": "cubic"}, False),  # overshoots, and is clamped to 0
        ("int16", 0, {}, False),  # between the others: 0 is the mean of -1 and 1
        ("int16", 0, {"resampling": "nearest"}, True),
        ("int64", -(2**40), {"resampling": "nearest"}, True),
        ("uint16", None, {"resampling": "nearest"}, False),
        ("uint16", 0, {"bands": ["data", "other"]}, False),  # the other band has no nodata
        ("uint16", 0, {"pick": "mean", "time": "1MS"}, False),
    ],
)
def test_nodata_is_told_only_where_no_valid_pixel_can_be_it(
    world: World, dtype: str, nodata: float | None, how: dict[str, Any], told: bool
) -> None:
    cube = cube_of(world(dtype, "measured", nodata), **how)
    assert ("nodata" in cube.attrs) == told
    assert "_FillValue" not in cube.attrs
    assert cube["valid"].dims == ("time", "y", "x")
    assert cube["valid"].dtype == bool
    assert cube["valid"].chunks is not None
    if told:
        assert cube.rio.nodata == nodata
        found = cube.compute(scheduler="sync")
        np.testing.assert_array_equal((found.values != nodata).all(axis=1), found["valid"].values)


def test_a_gap_is_told_from_a_zero(world: World) -> None:
    """The western tile is a part of the ground; its zeros are pixels, the ground beside it is none."""
    collection = world("uint8", "measured", None).subset(id="west")
    found = (
        collection.harmonize(bands=["data"], units="raw").cube(bounds=(X0, Y0 - 480, X0 + 640, Y0)).compute()
    )
    with rasterio.open(dict(collection.to_table()["assets"].to_pylist()[0])["data"]["href"]) as file:
        stored = file.read(1)
    assert (stored == 0).any()
    assert found["valid"].values[0, :, :32].all()
    assert not found["valid"].values[0, :, 32:].any()
    np.testing.assert_array_equal(found.values[0, 0, :, :32], stored)
    assert "nodata" not in found.attrs


def test_bands_have_their_units(world: World) -> None:
    cube = cube_of(
        world("int16", "measured", 1), bands=["data", "other"], units={"data": "decibel", "other": "raw"}
    )
    assert cube["units"].dims == ("band",)
    assert cube["units"].values.tolist() == ["decibel", "raw"]
    assert "units" not in cube.attrs
    one = cube_of(world("int16", "measured", 1), units="decibel", dtype="int16")
    assert one.attrs["units"] == "decibel"
    assert (one.attrs["scale_factor"], one.attrs["_FillValue"]) == (0.01, -32768)
    assert "valid" in one.coords
    assert "valid" not in cube_of(world("int16", "measured", 1), units="decibel").coords


class Counted:
    """Counts what is read, by band."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bands: list[str] = []
        read = Session.read_block

        def counted(session: Session, requests: Any, *others: Any) -> Any:
            self.bands += [request.asset.band for request in requests]
            return read(session, requests, *others)

        monkeypatch.setattr(Session, "read_block", counted)


def test_nothing_is_read_before_it_is_computed_nor_what_is_not_asked_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted = Counted(monkeypatch)
    how: dict[str, Any] = {"bands": ["data", "other"], "mask": "clouds", "time": "1MS", "pick": "clearest"}
    cube = cube_of(world("uint16", "measured", 0), **how)
    assert counted.bands == []
    cube.isel(y=slice(0, 10), x=slice(0, 10)).sel(band="data").values  # noqa: B018
    assert set(counted.bands) == {"data", "scl"}
    few = len(counted.bands)
    cube.sel(band="data").values  # noqa: B018
    assert len(counted.bands) > 2 * few


@pytest.mark.parametrize("fill", [False, True])
def test_pixels_and_what_is_told_of_them_are_read_once(
    world: World, monkeypatch: pytest.MonkeyPatch, fill: bool
) -> None:
    counted = Counted(monkeypatch)
    cube = cube_of(world("uint16", "measured", None), resampling="nearest", fill=fill, time="1MS")
    assert {"valid", "filled"} & set(cube.coords) == ({"valid", "filled"} if fill else {"valid"})
    blocks = int(np.prod(cube.data.numblocks[2:]))
    cube.compute(scheduler="sync")
    assert 0 < len(counted.bands) <= 4 * blocks


def test_what_is_told_of_bands_is_the_same_for_all_of_them(world: World) -> None:
    """So that arithmetic between bands compares no pixels of it: xarray takes arrays of one name as equal."""
    cube = cube_of(world("uint16", "measured", 0), bands=["data", "other"], fill=True, time="1MS")
    one, other = cube.sel(band="data"), cube.sel(band="other")
    for name in ("valid", "filled"):
        assert one[name].data.name == other[name].data.name
        assert (one - other)[name].chunks is not None
    part = one["filled"].isel(y=slice(0, 10), x=slice(0, 10)).data
    assert len(part.dask.cull(part.__dask_keys__())) < len(one["filled"].data.dask)


def test_cubes_are_called_alike_only_where_they_are_alike(world: World) -> None:
    collection, other = world("uint16", "measured", 0), world("uint16", "measured", 1)
    rules: list[dict[str, Any]] = [
        {}, {"units": "scaled"}, {"units": Feet()}, {"mask": "clouds"}, {"mask": Classes("scl", (8,))},
        {"time": "1MS"}, {"time": "1MS", "pick": "mean"}, {"time": "1MS", "fill": True}, {"resampling": "cubic"},
    ]  # fmt: skip
    names = [cube_of(collection, **how).data.name for how in rules]
    assert len(set(names)) == len(names)
    assert names == [cube_of(collection, **how).data.name for how in rules]
    assert cube_of(other).data.name not in names


@pytest.mark.parametrize("fill", [False, True])
def test_tasks_are_made_of_what_is_computed_and_not_before(
    world: World, monkeypatch: pytest.MonkeyPatch, fill: bool
) -> None:
    """A cube of years has tens of thousands of chunks, of which one place or one slot is looked at."""
    made: list[tuple[int, ...]] = []
    plain = slotgraph._SlotTasks.__call__

    def counted(tasks: Any, at: tuple[int, ...]) -> Any:
        made.append(at)
        return plain(tasks, at)

    monkeypatch.setattr(slotgraph._SlotTasks, "__call__", counted)
    how: dict[str, Any] = {"bands": ["data", "other"], "mask": "clouds", "time": "1MS", "fill": fill}
    own = world("uint16", "measured", 0).harmonize(units="raw", resampling="nearest", **how)
    cube = own.cube(chunks=24)
    assert cube.data.npartitions > 8
    assert not made
    pickle.dumps(cube.data.dask)
    assert not made, "a cluster gets them as they are, and makes those that it needs"
    part = cube.isel(y=slice(0, 10), x=slice(0, 10)).sel(band="data")
    part.drop_vars(["valid", "filled"], errors="ignore").compute(scheduler="sync")
    assert {(band, *block) for _, band, *block in made} == {(0, 0, 0)}
    layer: Any = cube.data.dask.layers[cube.data.name]
    assert len(layer) == len(set(layer)) == len(dict(layer))
    for key in ((cube.data.name, 0), (cube.data.name, 0, 0, 0, 10**6), ("other", 0, 0, 0, 0), "other"):
        assert key not in layer
        with pytest.raises(KeyError):
            layer[key]


def test_a_cube_has_few_tasks(world: World) -> None:
    """One a slot, block and band, beside those that read and mask; more for validity that no number tells."""
    collection = world("uint16", "measured", 0)

    def tasks(**how: Any) -> tuple[int, int, int]:
        cube = cube_of(collection, bands=["data", "other"], time="1MS", **how)
        steps, bands, down, across = cube.data.numblocks
        return len(dict(cube.data.__dask_graph__())), steps * bands * down * across, steps * down * across

    # what is read: a task a record and band, and one more for each block
    records, bands = 4, 2
    for how, extra in (({"units": "scaled"}, 0), ({"units": "scaled", "mask": "clouds"}, 1)):
        total, pixels, blocks = tasks(**how)
        per_slot = blocks // 1
        reads = records * (bands + extra) * (1 + per_slot)
        assert total <= pixels + reads + extra * records * per_slot
