"""Which lattice a place belongs to: UTM's zones as they were, the poles, one CRS; the same ground, the same split."""

from __future__ import annotations

import hashlib
from typing import Any

import geopandas
import numpy as np
import pytest
import shapely
from affine import Affine
from made_records import collection, project, record
from odc.geo.geobox import GeoBox

import rasteret_dask as rd


def around(
    lon: float, lat: float, epsg: int, px: int = 600, pixel: float = 10.0, name: str = "a"
) -> dict[str, Any]:
    """A record of some pixels round a place."""
    place = project(shapely.Point(lon, lat), 4326, epsg)
    half = px * pixel / 2
    west, north = (float(np.round(v / pixel) * pixel) for v in (place.x - half, place.y + half))
    return record(name, epsg=epsg, west=west, north=north, px=(px, px), pixel=pixel)


def crossing(lon: float, lat: float, epsg: tuple[int, int], pixel: float = 10.0) -> rd.Collection:
    """The same ground from two zones."""
    rows = [around(lon, lat, code, pixel=pixel, name=f"z{code}") for code in epsg]
    return collection("s2", *rows)


FROZEN = {
    "Bavaria, between two zones": (12.0, 48.0, (32632, 32633), 10.0, "d002139c71853dfa"),
    "southern Norway": (6.0, 60.5, (32631, 32632), 10.0, "b0cd548239a96172"),
    "Svalbard": (21.0, 78.0, (32633, 32635), 30.0, "7c6a44249be835a4"),
    "on the equator": (-43.9, 0.0, (32623, 32723), 10.0, "0ccf0e0749435416"),
    "Fiji, at the antimeridian": (180.0, -17.0, (32701, 32760), 10.0, "8584fbd858441726"),
    "the edge of Antarctica": (77.9, -69.0, (32743, 32744), 30.0, "1640fefbd77c912e"),
    "the north end of UTM": (-36.0, 83.5, (32624, 32625), 10.0, "336fe9eef34afe3a"),
}


FREELY = {"tiles": "d3024da06c64b405", "box": "824c608736d8b2d7", "points": "52db0a45c4486d2c"}


def digest(chips: rd.Chips) -> str:
    """Ids without acquisitions, codes, bounds, split cells and splits of all chips, as one number."""
    lines = [
        f"{r['chip_id'].rsplit('_', 1)[0]} {r['epsg']} {r['xmin']} {r['ymin']} {r['xmax']} {r['ymax']} "
        f"{r['cell']} {r['split']}"
        for r in chips.table.drop_columns(["feeds", "geometry"]).to_pylist()
    ]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


@pytest.mark.parametrize("place", FROZEN)
def test_utm_stays_as_it_was(place: str) -> None:
    """Numbers of an earlier version: chip ids, bounds and splits of stores that exist hold for ever."""
    lon, lat, epsg, pixel, frozen = FROZEN[place]
    chips = crossing(lon, lat, epsg, pixel).chips(32, cell_km=0.96).split(0.5, 0.25, 0.25, seed=3)
    assert digest(chips) == frozen


def test_windows_that_lie_freely_stay_as_they_were() -> None:
    """Tiles, a GeoBox and windows at points: their splits are those of the zone's cells that they touch."""
    own = crossing(12.0, 48.0, (32632, 32633))
    box = GeoBox((600, 600), Affine(10.0, 0.0, 273_000.0, 0.0, -10.0, 5_325_000.0), "EPSG:32633")
    rng = np.random.default_rng(1)
    points = geopandas.GeoDataFrame(
        geometry=shapely.points(12.0 + rng.uniform(-0.03, 0.03, 40), 48.0 + rng.uniform(-0.02, 0.02, 40)),
        crs=4326,
    )
    freely = {
        "tiles": own.chips(32, grid="tiles", cell_km=0.96, min_coverage=0.5),
        "box": own.chips(32, 24, grid=box, cell_km=0.96),
        "points": own.chips(32, at=points, cell_km=0.96),
    }
    splits = {name: digest(chips.split(0.5, 0.25, 0.25, seed=3)) for name, chips in freely.items()}
    assert splits == FREELY


def test_one_id_and_its_split_in_plain_text() -> None:
    chips = crossing(6.0, 60.5, (32631, 32632)).chips(32, cell_km=0.96).split(0.5, 0.25, 0.25, seed=3)
    row = chips.table.drop_columns(["feeds", "geometry"]).to_pylist()[0]
    assert (row["chip_id"], row["cell"], row["split"]) == (
        "32_0.96km_32px_10m_-20981_1040_sentinel-2a-20240410T100000",
        "32/-6994/346",
        "val",
    )
