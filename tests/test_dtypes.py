"""Every dtype survives: what is read is the file's own number, or an error says which dtype and what to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import xarray as xr
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rasterio.transform import Affine
from rasterio.warp import transform
from test_alpha import X0, Y0, chips_of, item, write
from test_nodata import tagged
from test_reader import assets_of, own_grid

import rasteret_dask as rd
from rasteret_dask.errors import PlanError, ReadError
from rasteret_dask.headers.nodata import number_of
from rasteret_dask.reader.engine import Session
from rasteret_dask.reader.pixelgrid import Grid, Window, transformed
from rasteret_dask.reader.readplan import Request
from rasteret_dask.rules.kinds import KindName
from rasteret_dask.rules.picks import Composed, PickName
from rasteret_dask.table.records import Asset

# What the numbers are does not matter here.
pytestmark = pytest.mark.filterwarnings("ignore::rasteret_dask.errors.UnknownKindWarning")

SIDE = 64
INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
DTYPES = (*INTEGERS, "float16", "float32", "float64", "complex64", "complex128")
BOX = (X0, Y0 - 640, X0 + 640, Y0)

Pixels = NDArray[Any]


def numbers(dtype: str, seed: int) -> Pixels:
    """Numbers of all sizes that a dtype has, those beyond 2**53 among them."""
    rng, kind = np.random.default_rng(seed), np.dtype(dtype)
    if kind.kind in "iu":
        limits = np.iinfo(kind)
        return np.asarray(rng.integers(limits.min, limits.max, (SIDE, SIDE), dtype=kind, endpoint=True))
    real = rng.uniform(-6e4, 6e4, (2, SIDE, SIDE))
    made: Pixels = real[0] + 1j * real[1] if kind.kind == "c" else real[0]
    return made.astype(kind)


@dataclass(frozen=True)
class Case:
    """A file, and the grid on which it is read."""

    dtype: str
    nodata: str | None
    compression: str
    predictor: int
    tiled: bool
    grid: str
    seed: int


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype = draw(st.sampled_from([d for d in DTYPES if d != "float16"]))
    kind = np.dtype(dtype).kind
    some = ["0", "7", "-9999"]
    if kind in "iu":
        limits = np.iinfo(dtype)
        some += [str(limits.min), str(limits.max), str(limits.max - 1), "nan", str(2**65)]
    else:
        some += ["nan", "-3.4028234663852886e+38", "-3.4e+38", "0.1", "inf"]
    compression = draw(st.sampled_from(["none", "deflate", "lzw", "zstd"]))
    predictors = [1] if compression == "none" or kind == "c" else [1, 2] if kind in "iu" else [1, 3]
    return Case(
        dtype,
        draw(st.sampled_from([None, *some])),
        compression,
        draw(st.sampled_from(predictors)),
        draw(st.booleans()),
        draw(st.sampled_from(["aligned", "translated", "finer", "warped"])),
        draw(st.integers(0, 9)),
    )


def holes_of(pixels: Pixels, text: str | None) -> tuple[Pixels, NDArray[np.bool_]]:
    """Put nodata into some pixels; return them, and which are valid, by NumPy alone."""
    number = number_of(text, pixels.dtype.name)
    if number is None:
        return pixels, ~np.isnan(pixels)
    pixels = pixels.copy()
    pixels[np.random.default_rng(5).random(pixels.shape) < 0.2] = number
    known = pixels != pixels.dtype.type(number)
    return pixels, known & ~np.isnan(pixels)


def grid_of(asset: Asset, name: str) -> tuple[Grid, Window]:
    own = own_grid(asset)
    match name:
        case "aligned":
            return own, Window(-3, 5, SIDE, SIDE)
        case "translated":
            return Grid(own.epsg, own.x0 + 3.3, own.y0 - 1.7, 10.0, 10.0), Window(2, -4, SIDE, SIDE)
        case "finer":
            return Grid(own.epsg, own.x0 + 1.3, own.y0 - 1.7, 7.0, 7.0), Window(1, 3, SIDE, SIDE)
    x, y = transformed(own.epsg, 32632, np.array([own.x0 + 50]), np.array([own.y0 - 50]))
    return Grid(32632, float(x[0]) // 10 * 10, float(y[0]) // 10 * 10, 10.0, 10.0), Window(0, 0, SIDE, SIDE)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
def test_nearest_gives_the_file_s_own_numbers(tmp_path: Path, case: Case) -> None:
    """Whatever the dtype, the compression and the grid: each pixel is the one that its centre lies in."""
    pixels, seen = holes_of(numbers(case.dtype, case.seed), case.nodata)
    options: dict[str, Any] = {"compress": case.compression}
    if case.predictor > 1:
        options["predictor"] = case.predictor
    if not case.tiled:
        options |= {"tiled": False, "blockxsize": None, "blockysize": None}
    path = write(tmp_path / "a.tif", pixels[np.newaxis], **options)
    asset = assets_of(path, "class", nodata=number_of(case.nodata, case.dtype))[0]
    grid, window = grid_of(asset, case.grid)
    with Session() as session:
        block = session.read_block([Request(asset, grid, (window,))])[0]
    rows, cols = np.mgrid[window.row : window.row + SIDE, window.col : window.col + SIDE] + 0.5
    xs, ys = grid.x0 + cols * grid.xres, grid.y0 - rows * grid.yres
    flat = transformed(grid.epsg, asset.epsg, xs.ravel(), ys.ravel())
    at_col, at_row = ((flat[0] - X0) / 10).reshape(xs.shape), ((Y0 - flat[1]) / 10).reshape(xs.shape)
    i, j = np.floor(at_row + 1e-7).astype(int), np.floor(at_col + 1e-7).astype(int)
    # a centre within GDAL's tolerance of an edge may go either way
    sure = np.maximum(np.abs(at_row - np.rint(at_row)), 0) > 1e-4
    sure &= np.abs(at_col - np.rint(at_col)) > 1e-4
    inside = (i >= 0) & (i < SIDE) & (j >= 0) & (j < SIDE)
    i, j = i.clip(0, SIDE - 1), j.clip(0, SIDE - 1)
    valid = inside & seen[i, j]
    assert np.array_equal(block.valid[0][sure], valid[sure])
    due = valid & sure
    assert block.values.dtype == pixels.dtype
    assert np.array_equal(block.values[0][due], pixels[i, j][due])


def collection(tmp_path: Path, dtype: str, nodata: bool = True) -> tuple[rd.Collection, Pixels, Any]:
    """Return a collection of one image, its pixels as GDAL gives them, and which are valid."""
    pixels = numbers(dtype, 1)
    spelled = {"i": str(np.iinfo(dtype).min + 1) if dtype in INTEGERS else "", "u": "7"}
    text = spelled.get(np.dtype(dtype).kind, "-9999") if nodata else None
    if dtype == "uint64" and nodata:
        text = str(2**64 - 1)
    if text is not None:
        pixels[:20] = np.array(number_of(text, dtype), dtype)
    path = tmp_path / "a.tif"
    if dtype == "float16":
        tagged(path, pixels, str(text))
    else:
        write(path, pixels[np.newaxis])
    seen = (
        np.ones(pixels.shape, bool) if text is None else pixels != pixels.dtype.type(number_of(text, dtype))
    )
    asset = {} if text is None else {"raster:bands": [{"nodata": text}]}
    made = rd.build_from_stac([item(path, asset=asset)], name="x")
    return made, pixels.astype("float32") if dtype == "float16" else pixels, seen


@pytest.mark.parametrize("nodata", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_exits_agree_or_refuse(tmp_path: Path, dtype: str, nodata: bool) -> None:
    if dtype == "float16" and not nodata:
        return
    made, pixels, seen = collection(tmp_path, dtype, nodata)
    chips = chips_of(made)
    boxes, values = chips["bounds"].values, chips["pixels"].values[:, 0, 0]
    assert values.dtype == pixels.dtype
    corners = [(int(Y0 - ymax) // 10, int(xmin - X0) // 10) for xmin, _, _, ymax in boxes]
    assert len(corners) > 0
    for number, (row, col) in enumerate(corners):
        own, known = pixels[row : row + 32, col : col + 32], seen[row : row + 32, col : col + 32]
        if "valid" in chips:
            assert np.array_equal(chips["valid"].values[number, 0], known)
        else:
            assert np.array_equal(~np.isnan(values[number]), known)
        assert np.array_equal(values[number][known], own[known])
    cube = tried(lambda: made.cube(bounds=BOX).isel(time=0, band=0).values)
    if isinstance(cube, PlanError):
        assert dtype in ("int64", "uint64")
        assert not nodata
        assert dtype in str(cube)
        assert "chips" in str(cube)
    else:
        assert cube.dtype == pixels.dtype
        assert np.array_equal(cube[seen], pixels[seen])
        assert np.isnan(cube[~seen]).all() or (cube[~seen] == pixels[~seen]).all()
    at = np.array([[30, 30], [40, 21], [63, 63]])
    lon, lat = transform(32633, 4326, *(Affine(10, 0, X0, 0, -10, Y0) @ (at.T[::-1] + 0.5)))
    points = [shapely.Point(x, y) for x, y in zip(lon, lat, strict=True)]
    window = made.get_numpy(points, bands=["image"], size=1)
    assert window.dtype == pixels.dtype
    assert np.array_equal(window[:, 0, 0, 0], pixels[at[:, 0], at[:, 1]])
    column = tried(lambda: made.sample_points(points).column("value").to_pylist())
    if isinstance(column, PlanError):
        assert dtype in ("int64", "uint64", "complex64", "complex128")
        assert dtype in str(column)
        assert "get_numpy" in str(column)
        return
    own, known = (some[at[:, 0], at[:, 1]].tolist() for some in (pixels, seen))
    assert column == [value if there else None for value, there in zip(own, known, strict=True)]


def tried(make: Callable[[], Any]) -> Any:
    """Return what is made, or the PlanError that says why it is not."""
    try:
        return make()
    except PlanError as error:
        return error


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_kernels_refuse_integers_that_they_would_round(tmp_path: Path, dtype: str) -> None:
    made, pixels, seen = collection(tmp_path, dtype)
    coarse: dict[str, Any] = {"units": "raw", "resolution": 20}
    with pytest.raises(ReadError, match=rf"{dtype} numbers beyond 2\*\*53.*resampling='nearest'"):
        made.harmonize(**coarse).cube(bounds=BOX).compute()
    near = made.harmonize(**coarse, resampling="nearest").cube(bounds=BOX).isel(time=0, band=0).values
    assert np.array_equal(near[seen[1::2, 1::2]], pixels[1::2, 1::2][seen[1::2, 1::2]])


@pytest.mark.parametrize(
    ("dtype", "pick", "refused"),
    [("int64", "median", True), ("uint64", "mean", True), ("complex64", "median", True),
     ("complex64", "mean", True), ("int64", "closest", False), ("int32", "median", False)],
)  # fmt: skip
def test_composites_that_mean_nothing_are_refused(
    tmp_path: Path, dtype: str, pick: PickName, refused: bool
) -> None:
    made, pixels, seen = collection(tmp_path, dtype)
    monthly = made.harmonize(units="raw", time="1MS", pick=pick)
    if refused:
        with pytest.raises(PlanError, match=f"pixels of {dtype}.*'closest'"):
            monthly.cube(bounds=BOX)
        return
    cube = monthly.cube(bounds=BOX).isel(time=0, band=0).values
    assert np.array_equal(cube[seen], pixels[seen])


def test_types_without_one_that_holds_both_are_refused(tmp_path: Path) -> None:
    a, b = write(tmp_path / "a.tif", numbers("int64", 0)[np.newaxis]), numbers("float32", 0)[np.newaxis]
    one = item(a)
    one["assets"]["other"] = item(write(tmp_path / "b.tif", b))["assets"]["image"]
    made = rd.build_from_stac([one], name="x")
    with pytest.raises(PlanError, match=r"bands of float32, int64.*join"):
        chips_of(made)
    both = rd.join(a=made.harmonize(bands=["image"]), b=made.harmonize(bands=["other"]))
    tree = both.chips(32, cell_km=0.32).load()
    assert {tree[name]["pixels"].dtype.name for name in ("a", "b")} == {"int64", "float32"}


def test_complex_numbers_have_no_reflectance(tmp_path: Path) -> None:
    made, _, _ = collection(tmp_path, "complex64")
    with pytest.raises(PlanError, match=r"pixels of complex64.*units='raw'"):
        made.harmonize(units="reflectance").cube(bounds=BOX)


@st.composite
def big_codes(draw: st.DrawFn) -> tuple[str, list[int]]:
    """A type of 64 bits, and some codes of it that are the same as floats."""
    dtype = draw(st.sampled_from(["int64", "uint64"]))
    limits = np.iinfo(dtype)
    near = st.sampled_from([2**53, 2**60, limits.max - 8, *([limits.min] if dtype == "int64" else [])])
    first = draw(near)
    return dtype, [first, first + 1, first + 3]


def monthly_scenes(
    folder: Path, dtype: str, codes: list[int], scenes: int, seed: int
) -> tuple[rd.Collection, Pixels, Pixels, NDArray[np.bool_]]:
    """Return passes of one month of codes beside 16-bit numbers; both stacks, and where codes are valid."""
    rng, items = np.random.default_rng(seed), []
    stack = np.array(codes, dtype)[rng.integers(0, len(codes), (scenes, SIDE, SIDE))]
    beside = rng.integers(1, 2**16, (scenes, SIDE, SIDE)).astype("uint16")
    valid = rng.random(stack.shape) > 0.3
    stack[~valid] = 7
    for day, (one, other) in enumerate(zip(stack, beside, strict=True)):
        scene = item(
            write(folder / f"{day}.tif", one[np.newaxis]), f"s{day}", asset={"raster:bands": [{"nodata": 7}]}
        )
        other_path = write(folder / f"{day}b.tif", other[np.newaxis])
        scene["assets"]["other"] = {**item(other_path)["assets"]["image"], "raster:bands": [{"nodata": 0}]}
        scene["properties"]["datetime"] = f"2023-06-{day + 1:02}T10:00:00Z"
        items.append(scene)
    return rd.build_from_stac(items, name="x"), stack, beside, valid


def commonest(stack: Pixels, valid: NDArray[np.bool_]) -> tuple[list[list[int]], NDArray[np.bool_]]:
    """Return what most scenes have, the smallest of equals, counted by Python."""
    made = [[0] * SIDE for _ in range(SIDE)]
    for y, x in np.ndindex(SIDE, SIDE):
        votes = Counter(stack[valid[:, y, x], y, x].tolist())
        if votes:
            made[y][x] = min(votes, key=lambda code: (-votes[code], code))
    return made, np.asarray(valid.any(axis=0))


@settings(
    max_examples=8, deadline=None, phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(
    big_codes(),
    st.integers(2, 4),
    st.integers(0, 99),
    st.sampled_from(["median", "mean", "majority"]),
    st.booleans(),
)
def test_big_classes_are_composed_exactly(
    tmp_path: Path, codes: tuple[str, list[int]], scenes: int, seed: int, pick: PickName, beside: bool
) -> None:
    """Numbers that no float tells apart: chips and cubes have the code that most scenes have."""
    made, stack, numbers16, valid = monthly_scenes(tmp_path, *codes, scenes, seed)
    bands = ["image", "other"] if beside else ["image"]
    kinds: dict[str, KindName] = {"image": "class", "other": "class" if pick == "majority" else "continuous"}
    monthly = made.harmonize(bands, units="raw", time="1MS", pick=pick, kinds=kinds)
    wanted, known = commonest(stack, valid)
    cube = monthly.cube(bounds=BOX).compute()
    assert cube.dtype == codes[0]
    chips = monthly.chips(16, cell_km=0.16).load()
    assert isinstance(chips, xr.Dataset)
    at = [(int(Y0 - top) // 10, int(left - X0) // 10) for left, _, _, top in chips["bounds"].values]
    assert len(at) > 4
    for number, (row, col) in enumerate(at):
        here = slice(row, row + 16), slice(col, col + 16)
        pixels = chips["pixels"].values[number, 0]
        own = np.array(wanted, codes[0])[here]
        assert pixels.dtype == codes[0]
        assert pixels[0][known[here]].tolist() == own[known[here]].tolist()
        assert np.array_equal(pixels, cube.values[0][:, *here])
        assert np.array_equal(chips["valid"].values[number, 0], known[here])
        assert np.array_equal(cube["valid"].values[0][here], known[here])
    if beside and pick != "majority":
        middle = (np.median if pick == "median" else np.mean)(numbers16, axis=0)
        assert np.abs(cube.values[0, 1] - middle.astype(np.int64)).max() <= 1


@dataclass(frozen=True)
class Smallest(Composed):
    """A pick of a user's that chooses: its numbers stay in their type."""

    bandwise = True
    chooses = True

    def blend(self, stack: Pixels, valid: NDArray[np.bool_]) -> tuple[Pixels, NDArray[np.bool_]]:
        most = np.iinfo(stack.dtype).max
        return np.where(valid, stack, most).min(axis=0), np.asarray(valid.any(axis=0))


def test_a_user_s_pick_that_chooses_keeps_big_numbers(tmp_path: Path) -> None:
    made, stack, _, valid = monthly_scenes(tmp_path, "int64", [2**60, 2**60 + 1, 2**60 + 2], 3, 0)
    cube = made.harmonize(["image"], units="raw", time="1MS", pick=Smallest()).cube(bounds=BOX).compute()
    known = valid.any(axis=0)
    wanted = np.where(valid, stack, 2**62).min(axis=0)
    assert cube.values[0, 0][known].tolist() == wanted[known].tolist()
    assert np.array_equal(cube["valid"].values[0], known)


def test_the_remedy_for_big_numbers_under_a_composite_works(tmp_path: Path) -> None:
    made, _, _, _ = monthly_scenes(tmp_path, "int64", [2**60, 2**60 + 1], 2, 0)
    bands = ["image", "other"]
    with pytest.raises(PlanError, match=r"band 'image': pixels of int64.*kinds=\{'image': 'class'\}"):
        made.harmonize(bands, units="raw", time="1MS", pick="median").cube(bounds=BOX)
    named = made.harmonize(bands, units="raw", time="1MS", pick="median", kinds={"image": "class"})
    assert named.cube(bounds=BOX).dtype == "int64"
