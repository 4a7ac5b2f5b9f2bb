"""The same place is found however its degrees are counted, wherever an area or a box is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.transform import from_origin
from rasterio.warp import transform
from shapely.geometry import mapping

import rasteret_dask as rd
from rasteret_dask.table.geoparquet import write_ordered

CENTRES = [(178.2, -16.5), (179.7, -17.0), (-179.9, -16.8), (-178.0, -17.5), (3.0, -17.0)]
COUNTS: dict[str, Any] = {
    "from -180": lambda x: (x + 180) % 360 - 180,
    "from 0": lambda x: x % 360,
    "west": lambda x: x % 360 - 360,
}


def item(name: str, geometry: Any, bbox: Any, **fields: Any) -> dict[str, Any]:
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "collection": "things", "links": [],
        "bbox": bbox, "geometry": None if geometry is None else mapping(geometry),
        "properties": {"datetime": "2023-06-01T10:00:00Z", **fields},
        "assets": {"red": {"href": "https://nowhere.invalid/x.tif", "type": "image/tiff; application=geotiff"}},
    }  # fmt: skip


def tilted(lon: float, lat: float) -> Any:
    """A scene as Landsat's, in longitudes that count on beyond 180."""
    return shapely.Polygon(
        [(lon - 0.8, lat + 0.2), (lon - 0.1, lat - 0.9), (lon + 0.9, lat - 0.3), (lon + 0.2, lat + 0.8)]
    )


def counted(shape: Any, how: str) -> Any:
    return shapely.transform(shape, lambda p: np.column_stack([COUNTS[how](p[:, 0]), p[:, 1]]))


GROUND = {f"s{n}": tilted(lon % 360, lat) for n, (lon, lat) in enumerate(CENTRES)}


def collection(how: str, box: str) -> rd.Collection:
    """The scenes of GROUND in one spelling of their outlines and one of their boxes."""
    items = []
    for name, ground in GROUND.items():
        west, south, east, north = ground.bounds
        boxes = {
            "crossing": [COUNTS["from -180"](west), south, COUNTS["from -180"](east), north],
            "beyond": [west, south, east, north],
            "world": [-180, south, 180, north],
        }
        items.append(item(name, counted(ground, how), boxes[box]))
    return rd.build_from_stac(items, name="things", headers=False)


@pytest.fixture(
    scope="module", params=[("from -180", "crossing"), ("from 0", "beyond"), ("west", "world")], ids=str
)
def scenes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[rd.Collection]:
    """The scenes in memory, and as a file of row groups of one record."""
    made = collection(*request.param)
    path = tmp_path_factory.mktemp("ground") / "t.parquet"
    write_ordered([made.to_table()], path, rows_per_group=1)
    return [made, rd.as_collection(pq.read_table(path), name="things"), rd.load(path)]


def ids(found: rd.Collection) -> list[str]:
    return sorted(found.to_table(columns=["id"]).column("id").to_pylist())


@settings(max_examples=8, deadline=None)
@given(st.floats(175, 183), st.floats(0.01, 5), st.floats(-19, -15), st.floats(0.01, 2), st.data())
def test_a_box_finds_what_its_ground_touches(
    scenes: list[rd.Collection], west: float, width: float, south: float, height: float, data: st.DataObject
) -> None:
    east, north = west + width, south + height
    wanted = sorted(n for n, g in GROUND.items() if shapely.box(west, south, east, north).intersects(g))
    forms = {
        "crossing": (COUNTS["from -180"](west), south, COUNTS["from -180"](east), north),
        "beyond": (west, south, east, north),
        "west": (west - 360, south, east - 360, north),
    }
    box = forms[data.draw(st.sampled_from(sorted(forms)))]
    # wound as GeoJSON wants it, counter-clockwise on the ground
    area = counted(shapely.box(west, south, east, north), data.draw(st.sampled_from(sorted(COUNTS))))
    for made in scenes:
        assert ids(made.subset(bbox=box)) == wanted
        assert ids(made.subset(geometries=box)) == wanted
        assert ids(made.subset(geometries=area)) == wanted
        assert ids(made.subset(geometries=mapping(area))) == wanted
        assert ids(made.where("bbox", "intersects", box)) == wanted


def test_build_and_subset_take_the_same_boxes() -> None:
    items = [item(n, counted(g, "from -180"), None) for n, g in GROUND.items()]
    whole = rd.build_from_stac(items, name="things", headers=False)
    for box in ((177, -18, -179.5, -16), (177, -18, 180.5, -16), (-183, -18, -179.5, -16), (0, -20, 5, -10)):
        built = rd.build_from_stac(items, name="things", headers=False, bbox=box)
        assert ids(built) == ids(whole.subset(bbox=box)) == ids(whole.subset(geometries=box))
        assert ids(built)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_scene_over_a_pole_is_found_from_every_side(sign: int) -> None:
    ring = shapely.Polygon([(45, 80 * sign), (135, 80 * sign), (-135, 80 * sign), (-45, 80 * sign)])
    for polygon in (ring, ring.reverse(), counted(ring, "from 0")):
        # a box as upstream makes it, of the corners' extremes
        cap = item(
            "cap", polygon, [-135, 80 * sign, 135, 80 * sign], **{"proj:epsg": 3413 if sign > 0 else 3031}
        )
        made = rd.build_from_stac([cap], name="things", headers=False)
        for lon in (-179.9, -60, 0, 5, 60, 180):
            south, north = sorted((86 * sign, 87 * sign))
            assert ids(made.subset(geometries=shapely.Point(lon, 88 * sign))) == ["cap"]
            assert ids(made.subset(bbox=(lon - 0.05, south, lon + 0.05, north))) == ["cap"]
            assert ids(made.subset(geometries=shapely.Point(lon, 78 * sign))) == []


@pytest.mark.parametrize("sign", [1, -1])
def test_a_polar_raster_lies_round_its_pole_without_an_outline(tmp_path: Path, sign: int) -> None:
    path = raster(tmp_path / "cap.tif", 3413 if sign > 0 else 3031, -500_000, 500_000, 2000.0)
    made = rd.build_from_stac([local("cap", path)], name="things")
    for lon in (-179.9, -60, 0, 5, 60, 180):
        assert ids(made.subset(geometries=shapely.Point(lon, 88 * sign))) == ["cap"]
        assert ids(made.subset(geometries=shapely.Point(lon, 78 * sign))) == []


def raster(path: Path, epsg: int, west: float, north: float, pixel: float, side: int = 512) -> Path:
    values = np.random.default_rng(1).integers(1, 60000, (side, side)).astype(np.uint16)
    with rasterio.open(
        path, "w", driver="GTiff", width=side, height=side, count=1, dtype="uint16", crs=f"EPSG:{epsg}",
        transform=from_origin(west, north, pixel, pixel), tiled=True, blockxsize=128, blockysize=128, nodata=0,
    ) as file:  # fmt: skip
        file.write(values, 1)
    return path


def local(name: str, path: Path) -> dict[str, Any]:
    made = item(name, None, None)
    made["assets"]["red"]["href"] = str(path)
    return made


@pytest.fixture(scope="module")
def across(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, rd.Collection]:
    """A raster of zone 1 that lies on both sides of 180 degrees, 16 degrees south."""
    x, y = transform("EPSG:4326", "EPSG:32601", [180.0], [-16.0])
    west, north = round(x[0] / 10) * 10 - 2560, round(y[0] / 10) * 10 + 2560
    path = raster(tmp_path_factory.mktemp("across") / "a.tif", 32601, west, north, 10.0)
    return path, rd.build_from_stac([local("a", path)], name="things")


FORMS = {
    "crossing": (179.99, -16.01, -179.985, -15.995),
    "beyond": (179.99, -16.01, 180.015, -15.995),
    "west": (-180.01, -16.01, -179.985, -15.995),
}


def test_chips_of_an_area_are_the_same_in_every_count(across: tuple[Path, rd.Collection]) -> None:
    _, made = across
    wanted = None
    for box in FORMS.values():
        for area in (box, shapely.box(*box) if box[0] < box[2] else None):
            if area is None:
                continue
            chips = made.chips(32, cell_km=0.32, aoi=area)
            names = chips.table.column("chip_id").to_pylist()
            wanted = wanted or names
            assert names == wanted
    # each is a chip of the whole raster that shares ground with the area, counted from 0
    whole = made.chips(32, cell_km=0.32).table
    east = counted(shapely.box(*FORMS["beyond"]), "from 0")
    shapes = [counted_on(shapely.from_wkb(g)) for g in whole.column("geometry").to_pylist()]
    assert all(s.area < 1e-4 for s in shapes)
    share = [shapely.intersection(s, east).area / s.area for s in shapes]
    ids_there = [n for n, part in zip(whole.column("chip_id").to_pylist(), share, strict=True) if part > 1e-3]
    assert sorted(wanted or []) == sorted(ids_there)
    assert {n[:2] for n in ids_there} == {"01", "60"}


def counted_on(shape: Any) -> Any:
    return shapely.union_all([counted(part, "from 0") for part in shapely.get_parts(shape)])


def test_pixels_of_a_place_are_the_same_in_every_count(across: tuple[Path, rd.Collection]) -> None:
    path, made = across
    read = [np.ma.getdata(made.get_numpy(box, "red")) for box in FORMS.values()]
    assert read[0].size
    for other in read[1:]:
        np.testing.assert_array_equal(read[0], other)
    points = [(180.0 + d, -16.0 - d / 3) for d in (-0.013, -0.002, 0.003, 0.011)]
    with rasterio.open(path) as file:
        places = transform("EPSG:4326", file.crs, *map(list, zip(*points, strict=True)))
        wanted = [int(v[0]) for v in file.sample(zip(*places, strict=True))]
    for how in COUNTS.values():
        sampled = made.sample_points([(how(x), y) for x, y in points], "red")
        assert sampled.column("value").to_pylist() == wanted
        assert sampled.column("point_index").to_pylist() == [0, 1, 2, 3]


def test_windows_at_points_are_the_same_in_every_count(across: tuple[Path, rd.Collection]) -> None:
    _, made = across
    read = [
        made.chips(16, at=pa.table({"geometry": [shapely.to_wkb(shapely.Point(how(180.004), -16.0))]}))
        .load()
        .pixels
        for how in COUNTS.values()
    ]
    assert (read[0] > 0).all()
    for other in read[1:]:
        np.testing.assert_array_equal(read[0], other)
