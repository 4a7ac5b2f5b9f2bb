"""Chips over the poles and along 84 N, from a mosaic on a polar map: their ground, pixels and splits."""

from __future__ import annotations

import datetime as dt
import functools
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyproj
import pytest
import rasterio
import shapely
import xarray as xr
from numpy.typing import NDArray
from rasterio.merge import merge

import rasteret_dask as rd

ARCTIC = 3413
PIXEL = 100.0
SIDE_PX = 320
CELL_KM = 6.4
ASSET = pa.struct([("href", pa.string()), ("band_index", pa.int32())])
PLACES = {
    "the pole": (0.0, 90.0),
    "85 N": (-30.0, 85.0),
    "the antimeridian": (180.0, 86.0),
    "84 N": (22.5, 84.0),
}


@functools.cache
def transformer(source: int, target: int) -> pyproj.Transformer:
    return pyproj.Transformer.from_crs(source, target, always_xy=True)


def moved(x: Any, y: Any, source: int, target: int) -> Any:
    return transformer(source, target).transform(x, y)


def corner_of(place: str) -> tuple[float, float]:
    """A corner of the mosaic's tiles near a place, metres of the Arctic map."""
    x, y = moved(*PLACES[place], 4326, ARCTIC)
    return round(x / PIXEL) * PIXEL, round(y / PIXEL) * PIXEL


def tiles_at(folder: Path, place: str) -> list[str]:
    """Four tiles that meet near a place; each pixel's value tells where it is."""
    paths = []
    x0, y0 = corner_of(place)
    for name, (right, up) in {"nw": (-1, 1), "ne": (0, 1), "sw": (-1, 0), "se": (0, 0)}.items():
        path = folder / f"{name}.tif"
        west, north = x0 + right * SIDE_PX * PIXEL, y0 + up * SIDE_PX * PIXEL
        rows, cols = np.mgrid[:SIDE_PX, :SIDE_PX]
        x, y = west + (cols + 0.5) * PIXEL, north - (rows + 0.5) * PIXEL
        values = 1 + np.round(x / PIXEL - 0.5) % 251 + 251 * (np.round(y / PIXEL - 0.5) % 241)
        with rasterio.open(
            path, "w", driver="GTiff", width=SIDE_PX, height=SIDE_PX, count=1, dtype="uint16", nodata=0,
            crs=f"EPSG:{ARCTIC}", transform=rasterio.Affine(PIXEL, 0, west, 0, -PIXEL, north), tiled=True,
            blockxsize=64, blockysize=64,
        ) as file:  # fmt: skip
            file.write(values.astype("uint16"), 1)
        paths.append(str(path))
    return paths


def mosaic(paths: list[str]) -> rd.Collection:
    """The tiles as a collection of one slot, nearest pixels."""
    when = dt.datetime(2024, 4, 2, tzinfo=dt.UTC)
    table = pa.table(
        {
            "id": [Path(p).stem for p in paths],
            "datetime": pa.array([when] * len(paths), pa.timestamp("us", "UTC")),
            "geometry": pa.nulls(len(paths), pa.binary()),
            "assets": pa.array(
                [[("data", {"href": p, "band_index": 0})] for p in paths], pa.map_(pa.string(), ASSET)
            ),
        }
    )
    made = rd.build_from_table(table, name="ice")
    return made.harmonize(["data"], time="1MS", resampling="nearest", fill=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    return {place: tiles_at(tmp_path_factory.mktemp("tiles"), place) for place in PLACES}


@functools.cache
def merged(paths: tuple[str, ...]) -> Any:
    return merge(list(paths))


def whole(paths: list[str], epsg: int, bounds: list[float], size: int) -> NDArray[Any]:
    """The tiles' own pixels at a square of ground of any CRS: those that rasterio reads where each centre lies."""
    values, transform = merged(tuple(paths))
    west, _, _, north = bounds
    step = (np.arange(size) + 0.5) * (bounds[2] - west) / size
    x, y = moved(*np.meshgrid(west + step, north - step), epsg, ARCTIC)
    cols, rows = ~transform * (x, y)
    return np.asarray(values[0][np.floor(rows).astype(int), np.floor(cols).astype(int)])


@pytest.mark.parametrize("grid", ["utm", f"EPSG:{ARCTIC}"])
@pytest.mark.parametrize("place", PLACES)
def test_pixels_and_splits_at_the_top_of_the_world(
    files: dict[str, list[str]], place: str, grid: str
) -> None:
    paths = files[place]
    chips = mosaic(paths).chips(32, grid=grid, cell_km=CELL_KM).split(0.4, 0.3, 0.3, seed=2)
    rows = chips.table.drop_columns(["feeds", "geometry"]).to_pylist()
    assert len({row["chip_id"] for row in rows}) == len(rows)
    codes = {row["epsg"] for row in rows}
    if grid == "utm":
        assert codes == ({32661, 32633, 32635} if place == "84 N" else {32661})
    else:
        assert codes == {ARCTIC}
    assert set(expected_cells(place, codes, rows)) <= {(r["epsg"], r["row"], r["col"]) for r in rows}
    assert chips.audit().ok
    assert {"train", "val", "test"} <= {row["split"] for row in rows}
    check_splits(rows)
    pixels = chips.to_xarray()
    assert isinstance(pixels, xr.Dataset)
    of_chip = dict(
        zip(pixels["chip_id"].values.tolist(), pixels["pixels"].load().values[:, 0, 0], strict=True)
    )
    looked, wrong = 0, 0
    for row in [row for row in rows if row["split"]][::16]:
        wanted = whole(paths, row["epsg"], [row[n] for n in ("xmin", "ymin", "xmax", "ymax")], 32)
        looked, wrong = looked + wanted.size, wrong + int((of_chip[row["chip_id"]] != wanted).sum())
    assert looked > 5_000
    assert wrong <= (
        0 if grid != "utm" else 1e-3 * looked
    )  # a centre on the edge of two pixels may go to either


def check_splits(rows: list[dict[str, Any]]) -> None:
    """An independent reader: no two chips of different splits share ground, on an equal-area map of the Arctic."""
    shapes, splits = [], []
    for row in rows:
        if row["split"] is None:
            continue
        box = shapely.segmentize(shapely.box(*(row[n] for n in ("xmin", "ymin", "xmax", "ymax"))), 100.0)
        shapes.append(
            shapely.transform(box, lambda p, e=row["epsg"]: np.stack(moved(p[:, 0], p[:, 1], e, 6931), -1))
        )
        splits.append(row["split"])
    found = np.array(shapes, dtype=object)
    a, b = shapely.STRtree(found).query(found, predicate="intersects")
    differ = np.array(splits)[a] != np.array(splits)[b]
    assert (
        differ.sum() == 0
        or shapely.area(shapely.intersection(found[a[differ]], found[b[differ]])).max() < 10.0
    )
    cells: dict[str, str] = {}
    for row in rows:
        if row["split"] is not None:
            assert cells.setdefault(row["cell"], row["split"]) == row["split"]


def expected_cells(place: str, codes: set[int], rows: list[dict[str, Any]]) -> list[tuple[int, int, int]]:
    """Chips that must be there: squares of the polar map's lattice that lie well inside of the mosaic."""
    x0, y0 = corner_of(place)
    half = SIDE_PX * PIXEL
    ground = shapely.box(x0 - half, y0 - half, x0 + half, y0 + half).buffer(-2 * PIXEL)
    side, result = 32 * PIXEL, []
    for code in codes & {32661, ARCTIC}:
        outline = shapely.get_coordinates(shapely.segmentize(ground, 500.0))
        x, y = moved(outline[:, 0], outline[:, 1], ARCTIC, code)
        for row in range(int(-max(y) // side), int(-min(y) // side) + 1):
            for col in range(int(min(x) // side), int(max(x) // side) + 1):
                west, north = col * side, -row * side
                lat = moved(west + side / 2, north - side / 2, code, 4326)[1]
                box = shapely.get_coordinates(shapely.box(west, north - side, west + side, north))
                inside = shapely.Polygon(np.stack(moved(box[:, 0], box[:, 1], code, ARCTIC), -1))
                if ground.contains(inside) and (code == ARCTIC or lat > 84.0):
                    result.append((code, row, col))
    assert len(result) > 100 or place == "84 N"
    return result


@pytest.mark.parametrize("grid", ["utm", f"EPSG:{ARCTIC}"])
@pytest.mark.parametrize(
    ("place", "aoi", "south"),
    [("the pole", (-180, 89.9, 180, 90), 89.9), ("the antimeridian", (178, 85.9, -178, 90), 85.9)],
)
def test_an_area_over_the_pole_holds_its_chips(
    files: dict[str, list[str]], place: str, grid: str, aoi: tuple[float, ...], south: float
) -> None:
    own = mosaic(files[place])
    part = own.chips(16, grid=grid, cell_km=CELL_KM, aoi=aoi).table
    every = own.chips(16, grid=grid, cell_km=CELL_KM).table
    wanted = set()
    for row in every.drop_columns(["feeds", "geometry"]).to_pylist():
        x, y = (np.linspace(row[a], row[b], 41) for a, b in (("xmin", "xmax"), ("ymin", "ymax")))
        lon, lat = moved(*np.meshgrid(x, y), row["epsg"], 4326)
        inside = (lat > south) & ((np.abs(lon) > 178.0) | (aoi[0] < -179))
        if inside.mean() > 5e-3:
            wanted.add(row["chip_id"])
        elif not inside.any():
            wanted.add("not " + row["chip_id"])
    names = set(part.column("chip_id").to_pylist())
    assert {name for name in wanted if not name.startswith("not ")} <= names
    assert not [name for name in names if f"not {name}" in wanted]
    assert 0 < len(names) < every.num_rows


ITS_OWN = "+proj=laea +lat_0=90 +lon_0=7 +x_0=0 +y_0=0 +datum=WGS84 +units=m +no_defs"

ELSEWHERE = """
import sys
import numpy as np
import rasteret_dask as rd
from rasteret_dask.crs import crs_of

plan, store, crs = sys.argv[1:]
stored = rd.open_chips(store, split="train")
code = int(stored.table.column("epsg")[0].as_py())
assert crs_of(code).to_wkt() == crs or crs_of(code).equals(crs), crs_of(code)
total = sum(int(batch["ice"].sum()) for batch in rd.stream_from(None, plan, 16))
print(code, total, int(np.asarray(stored.to_xarray()["pixels"]).sum()))
"""


@pytest.mark.parametrize("crs", ["EPSG:3571", ITS_OWN])
def test_a_grid_goes_wherever_its_plan_goes(files: dict[str, list[str]], tmp_path: Path, crs: str) -> None:
    """Blocks, a saved plan, a store and another process: a CRS without a code is told of everywhere."""
    chips = mosaic(files["85 N"]).chips(64, grid=crs, cell_km=12.8).split(0.5, 0.25, 0.25, seed=2)
    (code,) = set(chips.table.column("epsg").to_pylist())
    assert (code < 0) == (crs == ITS_OWN)
    blocks = chips.by_blocks(tmp_path / "blocks", progress=False, windows=16)
    assert blocks.table.equals(chips.table)
    assert blocks.audit().to_dict() == chips.audit().to_dict()
    train = chips.select("train")
    train.save_plan(tmp_path / "plan")
    chips.to_zarr(tmp_path / "store", progress=False)
    wanted = train.to_xarray()
    assert isinstance(wanted, xr.Dataset)
    total = int(wanted["pixels"].values.sum())
    told = pyproj.CRS.from_user_input(crs).to_wkt()
    arguments = [str(tmp_path / "plan"), str(tmp_path / "store"), told]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [int(n) for n in done.stdout.split()] == [code, total, total]
