"""What is wrong with the input is told early, by a typed error that names it and says what to do."""

from __future__ import annotations

import datetime as dt
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import rasterio

import rasteret_dask as rd

pytestmark = pytest.mark.filterwarnings(
    # affine 3 tells stackstac off for `transform * point`
    "ignore:Use `@` matmul:PendingDeprecationWarning"
)

CELL_KM = 0.96
SIDE_M = 3840
WEST, NORTH = 499200.0, 5184000.0
ASSET = pa.struct([("href", pa.string()), ("band_index", pa.int32())])


@contextmanager
def refused(kind: type[rd.RasteretDaskError], *words: str, remedy: bool = True) -> Iterator[None]:
    """Expect an error of exactly this type, with these words, whole fields, and whole after a pickle."""
    with pytest.raises(rd.RasteretDaskError) as caught:
        yield
    error = caught.value
    assert type(error) is kind, repr(error)
    for word in words:
        assert word in str(error), f"{word!r} not in: {error}"
    assert error.subject
    assert error.found
    assert error.expected or error.remedy, f"says neither what was expected nor what to do: {error}"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)
    assert again.args == error.args


def write(path: Path, pixel: float, fill: int | None = None, epsg: int = 32633, dtype: str = "uint16") -> str:
    """Write a tiled GeoTIFF of ``SIDE_M`` a side whose values come from its own place."""
    n = round(SIDE_M / pixel)
    rows, cols = np.mgrid[:n, :n]
    values = (1000 + rows * 7 % 97 + cols * 5 % 89) if fill is None else np.full((n, n), fill)
    with rasterio.open(
        path, "w", driver="GTiff", width=n, height=n, count=1, dtype=dtype, crs=f"EPSG:{epsg}", nodata=0,
        transform=rasterio.Affine(pixel, 0, WEST, 0, -pixel, NORTH),
        tiled=True, blockxsize=64, blockysize=64, compress="deflate",
    ) as file:  # fmt: skip
        file.write(values.astype(dtype), 1)
    return str(path)


def table_of(records: dict[str, tuple[str, dict[str, str]]], **columns: list[Any]) -> pa.Table:
    """Return a table of {id: (datetime, {band: href})}."""
    whens = [dt.datetime.fromisoformat(when).replace(tzinfo=dt.UTC) for when, _ in records.values()]
    assets = [
        [(band, {"href": href, "band_index": 0}) for band, href in bands.items()]
        for _, bands in records.values()
    ]
    return pa.table(
        {
            "id": list(records),
            "datetime": pa.array(whens, pa.timestamp("us", "UTC")),
            "geometry": pa.nulls(len(records), pa.binary()),
            "assets": pa.array(assets, pa.map_(pa.string(), ASSET)),
            **columns,
        }
    )


class World:
    """Two sensors and a yearly product over one place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.s2_table = table_of(
            {
                f"s2-{day}": (f"2024-04-{day}T10:00:00", self._files(f"s2-{day}", 10, "B04", "B08", "SCL"))
                for day in ("02", "12")
            },
            platform=["sentinel-2a"] * 2,
            **{"s2:processing_baseline": ["02.14"] * 2, "eo:cloud_cover": [10.0, 60.0]},
        )
        self.l8_table = table_of(
            {"l8-05": ("2024-04-05T17:00:00", self._files("l8-05", 30, "B4", "B5"))},
            platform=["landsat-8"],
        )
        year = pa.array([dt.datetime(2024, 1, 1, tzinfo=dt.UTC)], pa.timestamp("us", "UTC"))
        after = pa.array([dt.datetime(2025, 1, 1, tzinfo=dt.UTC)], pa.timestamp("us", "UTC"))
        self.year_table = table_of(
            {"y-2024": ("2024-01-01T00:00:00", self._files("y-2024", 10, "data"))},
            start_datetime=year,
            end_datetime=after,
        )
        self.s2 = rd.build_from_table(self.s2_table, name="s2", dataset="sentinel-2-l2a")
        self.l8 = rd.build_from_table(self.l8_table, name="l8", dataset="landsat-c2-l2")
        self.year = rd.build_from_table(self.year_table, name="year")

    def _files(self, name: str, pixel: float, *bands: str) -> dict[str, str]:
        fill = {"SCL": 4}
        return {b: write(self.folder / f"{name}_{b}.tif", pixel, fill.get(b)) for b in bands}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on any read of pixels: errors of the plan come before it."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("pixels were read")

    monkeypatch.setattr("rasteret_dask.reader.Session.read_block", never)


def plan(world: World) -> rd.Collection:
    return world.s2.harmonize(bands=["red", "nir"])
