"""Every real file of the test data reads as GDAL reads it, in its own CRS and another; or is refused with a reason."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.errors import NodataShadowWarning, NotGeoreferencedWarning
from rasterio.transform import Affine
from rasterio.warp import reproject, transform_bounds

import rasteret_dask as rd

SIDE = 48
ENDINGS = (".tif", ".tiff", ".jp2")

# what GDAL cannot read either, and what lies nowhere
REFUSED = {
    "edge_cases/gdal_byte_truncated.tif": "reading tile",
    "edge_cases/gdal_byte_zstd_corrupted.tif": "reading tile",
    "edge_cases/rasterio_corrupt.tif": "reading tile",
    "edge_cases/gdal_cog_sparse_strile_arrays_zeroified_when_possible.tif": "no geotransform",
}


@pytest.fixture(scope="module")
def files(data: Path) -> list[Path]:
    found = sorted(f for f in data.rglob("*") if f.suffix.lower() in ENDINGS)
    assert len(found) > 140
    return found


def built(path: Path) -> rd.Collection:
    """Return a collection of one file, each band by nearest pixels, so that any kind of band may be compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rd.UntiledFilesWarning)
        rows = pa.table({"href": [str(path)], "datetime": ["2024-06-01"]})
        return rd.build_from_files(rows, name="file")


def grid_of(path: Path) -> tuple[Affine, Any]:
    """Return a grid of square pixels around the middle of a file, in its own CRS, off its pixels' edges."""
    with rasterio.open(path) as file:
        if file.gcps[0]:
            xs, ys = np.array([(p.x, p.y) for p in file.gcps[0]]).T
            crs, x, y = file.gcps[1], xs.mean(), ys.mean()
            size = np.ptp(xs) / file.width
        else:
            crs, size = file.crs, max(np.hypot(file.transform.a, file.transform.d), 1e-9)
            x, y = file.transform @ (file.width / 2, file.height / 2)
    return Affine(size, 0, x - (SIDE / 2 - 0.3) * size, 0, -size, y + (SIDE / 2 - 0.3) * size), crs


def by_gdal(path: Path, place: Affine, crs: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Return the nearest pixels of a file's first band on a grid, and where they are valid."""
    warnings.simplefilter("ignore", NodataShadowWarning)
    with rasterio.open(path) as file:
        stored, valid = file.read(1), file.read_masks(1) != 0
        where = (
            {"gcps": file.gcps[0], "src_crs": file.gcps[1]}
            if file.gcps[0]
            else {"src_transform": file.transform, "src_crs": file.crs}
        )
    numbers = np.where(valid & ~np.isnan(stored.astype("f8")), stored.astype("f8"), np.nan)
    columns = []  # one by one: of several, GDAL approximates where they lie, by up to an eighth of a pixel
    for column in range(SIDE):
        result = np.full((SIDE, 1), np.nan)
        reproject(
            numbers, result, **where, dst_transform=place @ Affine.translation(column, 0), dst_crs=crs,
            src_nodata=np.nan, dst_nodata=np.nan, resampling=Resampling.nearest,
        )  # fmt: skip
        columns.append(result)
    whole = np.hstack(columns)
    return whole, ~np.isnan(whole)


def read(made: rd.Collection, place: Affine, crs: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    raw = made.harmonize([made.bands[0]], units="raw", resampling="nearest", resolution=place.a)
    box = (place.c, place.f - SIDE * place.a, place.c + SIDE * place.a, place.f)
    cube = raw.cube(bounds=box, crs=crs.to_wkt())
    values = cube.isel(time=0, band=0).values
    seen = cube["valid"].isel(time=0).values if "valid" in cube.coords else ~np.isnan(values)
    return values.astype("f8"), seen


def test_every_file_is_read_as_gdal_reads_it(files: list[Path], data: Path) -> None:
    """Nearest pixels of the middle of each file, on a grid of its CRS and one of another."""
    warnings.simplefilter("ignore", NotGeoreferencedWarning)
    read_files = 0
    for path in files:
        name = path.relative_to(data).as_posix()
        if name in REFUSED:
            continue
        made = built(path)
        place, crs = grid_of(path)
        west, south, east, north = transform_bounds(
            crs, 4326, *rasterio.transform.array_bounds(SIDE, SIDE, place)
        )
        grids = [(place, crs)]
        if south > -80 and north < 80:
            lon = (west + east) / 2
            other = rasterio.CRS.from_epsg(3857)
            x, y, _, _ = transform_bounds(4326, 3857, lon, (south + north) / 2, lon, (south + north) / 2)
            size = (transform_bounds(4326, 3857, west, south, east, north)[2] - x) / SIDE * 2
            grids.append((Affine(size, 0, x - SIDE / 2 * size, 0, -size, y + SIDE / 2 * size), other))
        for at, code in grids:
            due, valid = by_gdal(path, at, code)
            values, seen = read(made, at, code)
            assert np.array_equal(seen, valid), name
            assert np.array_equal(values[seen], due[seen]), name
        read_files += 1
    assert read_files == len(files) - len(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
def test_what_gdal_cannot_read_is_refused(data: Path, name: str) -> None:
    """The error names the file, and what is wrong with it."""
    path = data / name
    if not path.is_file():
        pytest.skip(f"no {path}")

    def whole() -> None:
        made = built(path)
        read(made, *grid_of(path))

    with pytest.raises((rd.ReadError, rd.SourceError), match=REFUSED[name]) as caught:
        whole()
    assert path.name in str(caught.value)
