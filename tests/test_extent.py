"""Where a raster may lie: all that archives hold, and nothing beyond the Earth."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj import CRS
from pyproj.aoi import AreaOfInterest
from pyproj.database import query_crs_info
from pyproj.enums import PJType

import rasteret_dask as rd
from rasteret_dask.extent import is_geographic, metres, misplaced
from rasteret_dask.grid import bounds_in
from rasteret_dask.headers.reader import read_headers
from rasteret_dask.ingest.sources import read_items
from rasteret_dask.ingest.stac import LeftOut, items_to_table
from rasteret_dask.table.records import RECORD_SCHEMA

CODES = sorted(
    int(info.code)
    for info in query_crs_info(
        "EPSG",
        [PJType.PROJECTED_CRS, PJType.GEOGRAPHIC_2D_CRS],
        AreaOfInterest(-180, -90, 180, 90),
    )
)


def covering(bounds: tuple[float, ...], pixels: int = 1000) -> tuple[tuple[float, ...], int, int]:
    """Return transform, width and height of a raster over bounds."""
    xmin, ymin, xmax, ymax = bounds
    return ((xmax - xmin) / pixels, 0, xmin, 0, -(ymax - ymin) / pixels, ymax), pixels, pixels


@settings(deadline=None, derandomize=True, max_examples=40, database=None)
@given(st.sampled_from(CODES))
def test_every_crs_holds_its_own_area_of_use(epsg: int) -> None:
    area = CRS.from_epsg(epsg).area_of_use
    assert area is not None
    try:
        box = bounds_in(area.bounds, 4326, epsg)
    except rd.GridError:
        return  # the area cannot be projected as a box
    if box[0] >= box[2]:
        box = (
            box[0],
            box[1],
            box[2] + 2 * math.pi / CRS.from_epsg(epsg).axis_info[0].unit_conversion_factor,
            box[3],
        )
    assert misplaced(epsg, *covering(box)) is None
    transform, width, height = covering(box)
    far = [transform[0], 0, transform[2] + 1e9, 0, transform[4], transform[5]]
    assert "beyond" in str(misplaced(epsg, far, width, height))
    large = [transform[0] * 1e6, 0, transform[2], 0, transform[4] * 1e6, transform[5]]
    assert "beyond" in str(misplaced(epsg, large, width, height))


Raster = tuple[int, tuple[float, ...], int, int]

KEPT: dict[str, Raster] = {
    "all longitudes, pixels' centres on the edge": (4326, (0.25, 0, -180.125, 0, -0.25, 90.125), 1441, 721),
    "longitudes from 0 to 360": (4326, (1, 0, 0, 0, -1, 90), 360, 180),
    "points at every 10 degrees": (4326, (10, 0, -185, 0, -10, 95), 37, 19),
    "southwards up": (4326, (1, 0, -180, 0, 1, -90), 360, 180),
    "grads": (4807, (0.01, 0, -5, 0, -0.01, 57), 1500, 1000),
    "all of Mercator's map": (3857, (156543.03392804097, 0, -20037508.342789244, 0, -156543.03392804097,
                                     20037508.342789244), 256, 256),
    "the north in polar stereographic": (3413, (25000, 0, -5837500, 0, -25000, 5837500), 467, 467),
    "EASE": (6933, (36032.22, 0, -17367530.45, 0, -36032.22, 7314540.83), 964, 406),
    "southern Landsat in a northern zone": (32619, (30, 0, 300000, 0, -30, -6200000), 7800, 7900),
    "Norway in one zone": (32633, (1000, 0, -75000, 0, -1000, 7940000), 1195, 1550),
    "a centimetre": (25832, (0.01, 0, 500000, 0, -0.01, 5500000), 20000, 20000),
    "zone numbers before the easting": (31467, (10, 0, 3400000, 0, -10, 5500000), 1000, 1000),
    "Lambert with feet": (2263, (1, 0, 913000, 0, -1, 272000), 5000, 5000),
}  # fmt: skip

REFUSED: dict[str, tuple[int, tuple[float, ...], int, int, str]] = {
    "no such code": (999_999, (10, 0, 5e5, 0, -10, 5e6), 64, 64, "PROJ does not know"),
    "heights": (5703, (10, 0, 5e5, 0, -10, 5e6), 64, 64, "no map"),
    "from the Earth's centre": (4978, (10, 0, 5e5, 0, -10, 5e6), 64, 64, "no map"),
    "infinite": (32633, (math.inf, 0, 5e5, 0, -10, 5e6), 64, 64, "no size"),
    "no number": (32633, (10, 0, math.nan, 0, -10, 5e6), 64, 64, "no size"),
    "no pixel": (32633, (0, 0, 5e5, 0, -10, 5e6), 64, 64, "no size"),
    "a billionth of a metre": (32633, (1e-9, 0, 5e5, 0, -1e-9, 5e6), 64, 64, "pixels of 1e-09"),
    "100 km pixels": (32633, (1e5, 0, 5e5, 0, -1e5, 5e6), 256, 256, "beyond EPSG:32633"),
    "metres for degrees": (4326, (10, 0, 5e5, 0, -10, 5e6), 64, 64, "beyond EPSG:4326"),
    "twice round": (4326, (1, 0, -360, 0, -1, 90), 720, 180, "beyond EPSG:4326"),
    "beyond the pole": (4326, (1, 0, 0, 0, -1, 100), 10, 10, "beyond EPSG:4326"),
    "on the Moon": (32633, (10, 0, 3.8e8, 0, -10, 5e6), 64, 64, "beyond EPSG:32633"),
    "more pixels than TIFF counts": (4326, (1e-9, 0, 0, 0, -1e-9, 0), 2**31, 1, "pixels"),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_archives_hold(case: str) -> None:
    assert misplaced(*KEPT[case]) is None


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_nowhere(case: str) -> None:
    epsg, transform, width, height, why = REFUSED[case]
    assert why in str(misplaced(epsg, transform, width, height))


def test_units() -> None:
    assert metres(32633) == pytest.approx(1)
    assert metres(2263) == pytest.approx(1200 / 3937)  # US survey feet
    assert metres(4326) == pytest.approx(111_319.5, rel=1e-5)
    assert math.isnan(metres(0))
    assert [is_geographic(code) for code in (4326, 4807, 32633, 4978, 0)] == [True, True, False, False, False]


def test_no_real_file_is_refused(data: Path) -> None:
    files = [str(p) for p in data.rglob("*") if p.suffix.lower() in (".tif", ".tiff", ".jp2")]
    assert len(files) > 100
    refused = {f: why for f, why in read_headers(files).items() if "refused" in str(why)[:8]}
    assert not refused


def test_no_real_item_is_refused(data: Path) -> None:
    documents: list[Any] = [*data.rglob("*.parquet"), *(p for p in data.rglob("*.json") if is_stac(p))]
    # an example of the specification: metres in a CRS of Mars that counts in degrees
    documents = [p for p in documents if p.name != "projection_item_custom_proj.json"]
    assert len(documents) > 10
    count = 0
    for document in documents:
        broken = LeftOut(True)  # an outline in metres, say, which is none of a raster's
        table = RECORD_SCHEMA.empty_table()
        with suppress(rd.SourceError):
            table = items_to_table(read_items(document), name=document.name, headers=False, broken=broken)
        assert len(broken.items) <= 1
        for assets in table.column("assets").to_pylist():
            count += len(assets)
            assert not [a["error"] for _, a in assets if "refused" in str(a["error"])[:8]], document
    assert count > 1000


def is_stac(path: Path) -> bool:
    """Return whether a file holds one item, or several."""
    document = json.loads(path.read_text())
    return isinstance(document, dict) and document.get("type") in ("Feature", "FeatureCollection")
