"""Where windows are laid: the zone's lattice, tiles, a GeoBox, points; what their ids say."""

from __future__ import annotations

import itertools
import random
from typing import Any

import geopandas
import numpy as np
import pyproj
import pytest
import shapely
from made_records import boxes, collection, ids, project, record
from odc.geo.geobox import GeoBox

import rasteret_dask as rd
from rasteret_dask.grid import Lattice, utm_zone

CELLS: dict[str, Any] = {"cell_km": 1.28}
SIZE_M = 320.0


def rows_of(chips: rd.Chips) -> list[dict[str, Any]]:
    return list(chips.table.drop_columns(["feeds", "geometry"]).to_pylist())


def untimed(chips: rd.Chips) -> list[str]:
    """Ids without their acquisitions."""
    return [c.rsplit("_", 1)[0] for c in ids(chips)]


def cells_of(chips: rd.Chips) -> list[str]:
    """Each cell's id once, in the order of chips."""
    return list(dict.fromkeys(untimed(chips)))


def ids_of(chips: rd.Chips) -> list[str]:
    return list(chips.table.column("chip_id").to_pylist())


def check_lattice(chips: rd.Chips, size: int, pixel: float, stride: int, cell_km: float) -> None:
    """Every row's cell, bounds and id are those of the zone's lattice, moved by less than a pixel."""
    for row in rows_of(chips):
        zone = row["epsg"] - 32600
        lattice = Lattice(cell_km * 1000, size * pixel, stride * pixel)
        cell = np.array([[row["row"], row["col"]]])
        west, _, _, north = lattice.bounds(cell)[0]
        assert 0 <= row["xmin"] - west < pixel
        assert 0 <= north - row["ymax"] < pixel
        assert row["xmax"] - row["xmin"] == row["ymax"] - row["ymin"] == size * pixel
        split = lattice.split_cell_of(cell)[0].tolist()
        assert row["cell"] == f"{zone}/{split[0]}/{split[1]}"
        inner = Lattice(cell_km * 1000, cell_km * 1000, cell_km * 1000).split_bounds(np.array([split]))[0]
        assert west >= inner[0]
        assert west + size * pixel <= inner[2] + 1e-6
        assert north - size * pixel >= inner[1] - 1e-6
        said = f"{zone:02d}_{cell_km:g}km_{size}px{'' if stride == size else f's{stride}'}_{pixel:g}m"
        assert row["chip_id"].startswith(f"{said}_{row['row']}_{row['col']}_")
        lon, lat = pyproj.Transformer.from_crs(row["epsg"], 4326, always_xy=True).transform(
            west + size * pixel / 2, north - size * pixel / 2
        )
        assert int(utm_zone(lon, lat)) == zone


@pytest.mark.parametrize(("size", "stride"), [(32, 32), (32, 16), (20, 7), (48, 48), (16, 40), (128, 128)])
def test_chips_lie_on_the_lattice(size: int, stride: int) -> None:
    chips = collection("s2", record("a")).chips(size, stride, **CELLS)
    check_lattice(chips, size, 10.0, stride, 1.28)
    assert len(set(ids(chips))) == len(chips)


def test_landsat_keeps_its_pixels_in_the_south() -> None:
    """Origins are 15 mod 30; 327zz differs from 326zz by 10,000,000 m, which is 10 mod 30."""
    row = record("l8", epsg=32723, west=599_985.0, north=7_770_015.0, px=(200, 200), pixel=30.0)
    chips = collection("l8", row).chips(16, cell_km=1.92)
    check_lattice(chips, 16, 30.0, 16, 1.92)
    for r in rows_of(chips):
        assert r["epsg"] == 32623
        assert r["ymin"] < r["ymax"] < 0
        assert (r["xmin"] - 599_985.0) % 30 == 0
        assert (r["ymax"] + 1e7 - 7_770_015.0) % 30 == 0
    share = chips.explain()["pixels"]["l8"]
    assert share == {"native": 0, "translated": 1, "resampled": 0}


def test_north_and_south_of_the_equator_are_one_lattice() -> None:
    """The same raster described in 327zz and 326zz: the same chips, but for the record's own words."""
    south = record("a", epsg=32723, north=9_999_000.0)
    north = record("a", epsg=32623, north=-1000.0)
    one, other = (collection("s2", r).chips(32, **CELLS) for r in (south, north))
    assert one.table.drop_columns(["geometry"]).equals(other.table.drop_columns(["geometry"]))
    across = collection("s2", south, record("b", epsg=32623, north=3000.0)).chips(32, **CELLS)
    assert set(across.table.column("epsg").to_pylist()) == {32623}
    assert len(across) > len(one)


def test_ids_do_not_depend_on_order_extra_records_areas_or_sensors() -> None:
    s2 = [record(f"a{i}", west=500_000.0 + 2000 * i, datatake="d") for i in range(3)]
    base = set(untimed(collection("s2", *s2).chips(32, **CELLS)))
    for order in itertools.permutations(s2):
        assert set(untimed(collection("s2", *order).chips(32, **CELLS))) == base
    more = [*s2, record("far", north=5_300_000.0), record("other", epsg=32632)]
    random.Random(1).shuffle(more)
    assert base < set(untimed(collection("s2", *more).chips(32, **CELLS)))
    area = project(shapely.box(501_000, 5_397_000, 503_000, 5_399_000), 32633, 4326)
    part = set(untimed(collection("s2", *s2).chips(32, **CELLS, aoi=area)))
    assert part < base
    sensor = collection("x", record("x", west=499_000.0, px=(1000, 500), platform="x", bands=("B4", "B5")))
    assert base <= set(untimed(sensor.chips(32, **CELLS)))


def test_an_area_takes_the_cells_it_shares_ground_with() -> None:
    own = collection("s2", record("a"))
    whole = own.chips(32, **CELLS)
    area = project(shapely.Point(502_000, 5_398_000).buffer(900), 32633, 4326)
    part = own.chips(32, **CELLS, aoi=area)
    here = project(area, 4326, 32633)
    share = shapely.area(shapely.intersection(boxes(whole), here)) / SIZE_M**2
    expected = [i for i, s in zip(ids(whole), share, strict=True) if s > 1e-3]
    assert ids(part) == expected
    assert own.chips(32, **CELLS, aoi=(-180, -80, 180, 80)).table.equals(whole.table)
    with pytest.raises(rd.PlanError, match="no record left"):
        _ = own.chips(32, **CELLS, aoi=(20.0, 50.0, 21.0, 51.0)).table
    with pytest.raises(rd.PlanError, match="no chip of"):
        _ = own.chips(32, **CELLS, aoi=(15.1, 48.7, 15.11, 48.71)).table


@pytest.mark.parametrize(
    ("lon", "lat", "zone"),
    [(5.0, 60.0, 32), (2.5, 60.0, 31), (8.0, 78.0, 31), (10.0, 78.0, 33), (20.5, 78.0, 33)],
)
def test_norway_and_svalbard(lon: float, lat: float, zone: int) -> None:
    own = int((lon + 180) // 6) + 1  # the zone a regular world would have
    place = project(shapely.Point(lon, lat), 4326, 32600 + own)
    row = record("n", epsg=32600 + own, west=round(place.x, -1), north=round(place.y, -1))
    chips = collection("s2", row).chips(32, **CELLS)
    assert set(chips.table.column("epsg").to_pylist()) == {32600 + zone}


def test_chips_beyond_84_north_lie_on_the_polar_map() -> None:
    row = record("n", epsg=32633, north=9_340_000.0)
    chips = collection("s2", row).chips(32, **CELLS)
    assert set(chips.table.column("epsg").to_pylist()) == {32661}
    assert all(name.startswith("upsn_1.28km_32px_10m_") for name in ids(chips))


def test_the_antimeridian_is_a_zone_boundary_like_any_other() -> None:
    place = project(shapely.Point(179.98, -17.0), 4326, 32760)
    row = record("fiji", epsg=32760, west=round(place.x, -1), north=round(place.y, -1) + 10_000_000.0 * 0)
    chips = collection("s2", row).chips(32, **CELLS)
    assert set(chips.table.column("epsg").to_pylist()) == {32660, 32601}
    check_lattice(chips, 32, 10.0, 32, 1.28)


def test_a_strip_too_thin_for_a_chip_is_reported() -> None:
    row = record("a", px=(3200, 3200))
    chips = collection("s2", row).chips(224)
    assert chips.explain()["uncovered"]["share"] == pytest.approx(1 - (13440 / 15360) ** 2)
    assert "23.4% of each split cell, a strip of 1920 m on two sides" in str(chips.explain())
    check_lattice(chips, 224, 10.0, 224, 15.36)


# Phases


def test_the_phase_is_the_first_member_s_and_there_of_most_records() -> None:
    def at(name: str, *shifts: float) -> rd.Collection:
        rows = [record(f"{name}{i}", west=500_000.0 + s, datatake=f"{name}{i}") for i, s in enumerate(shifts)]
        return collection(name, *rows)

    def phase(own: rd.Collection) -> set[float]:
        return {x % 10 for x in own.chips(32, **CELLS).table.column("xmin").to_pylist()}

    assert phase(at("a", 3.0, 7.0, 7.0)) == {7.0}
    assert phase(rd.merge(at("a", 3.0), at("b", 7.0, 7.0))) == {3.0}
    assert phase(rd.merge(at("b", 7.0), at("a", 3.0, 3.0))) == {7.0}
    odd = at("a", 3.0, 7.0, 7.0).chips(32, **CELLS).explain()["pixels"]["a"]
    assert odd == {"native": 2, "translated": 0, "resampled": 1}


def test_only_the_reference_keeps_its_pixels() -> None:
    s2 = collection("s2", record("s2"))
    l8 = collection("l8", record("l8", west=499_995.0, north=5_400_015.0, pixel=30.0, px=(140, 140)))
    for name, resampled in (("s2", "l8"), ("l8", "s2")):
        chips = rd.join(s2=s2, l8=l8).chips(48 if name == "s2" else 16, cell_km=1.44, reference=name)
        said = chips.explain()["pixels"]
        assert said[name] == {"native": 1, "translated": 0, "resampled": 0}
        assert said[resampled] == {"native": 0, "translated": 0, "resampled": 1}
    with pytest.raises(rd.PlanError, match=r"reference.*s2, l8"):
        _ = rd.join(s2=s2, l8=l8).chips(48, cell_km=1.44, reference="no").table


# at=


def test_windows_stand_around_points_on_pixel_edges() -> None:
    rng = np.random.default_rng(0)
    xy = np.stack([rng.uniform(500_500, 503_500, 20), rng.uniform(5_396_500, 5_399_500, 20)], -1)
    points = geopandas.GeoDataFrame(
        {"crop": [f"c{i}" for i in range(20)]},
        geometry=shapely.points(xy),
        index=[f"field-{i}" for i in range(20)],
        crs=32633,
    )
    chips = collection("s2", record("a")).chips(32, at=points.sample(frac=1, random_state=1))
    table = chips.table.to_pylist()
    assert len(table) == 20
    for row in table:
        number = int(row["crop"][1:])
        assert f"_field-{number}_" in row["chip_id"]
        assert "__index__" not in row or row["__index__"] is None
        x, y = xy[number]
        assert abs((row["xmin"] + row["xmax"]) / 2 - x) <= 5.0 + 1e-6
        assert abs((row["ymin"] + row["ymax"]) / 2 - y) <= 5.0 + 1e-6
        assert row["xmin"] % 10 == row["ymax"] % 10 == 0
        assert row["cell"] is None
        window = f"33_32px_10m_{row['xmin']:.3f}_{row['ymax']:.3f}_field-{number}"
        assert row["chip_id"].startswith(window)


def test_polygons_get_a_window_at_their_representative_point() -> None:
    bend = shapely.Polygon([(0, 0), (900, 0), (900, 100), (100, 100), (100, 900), (0, 900)])
    shape = shapely.transform(bend, lambda p: p + np.array([501_000, 5_397_000]))
    lonlat = project(shape, 32633, 4326)
    inside = project(lonlat.point_on_surface(), 4326, 32633)
    (row,) = rows_of(collection("s2", record("a")).chips(32, at=[lonlat]))
    assert abs((row["xmin"] + row["xmax"]) / 2 - inside.x) <= 5
    assert abs((row["ymin"] + row["ymax"]) / 2 - inside.y) <= 5


def test_windows_outside_the_records_are_dropped_and_counted() -> None:
    here = project(shapely.Point(502_000, 5_398_000), 32633, 4326)
    chips = collection("s2", record("a")).chips(32, at=[here, (16.0, 48.0), (-60.0, -3.0)])
    assert len(chips) == 1
    assert chips.planned.dropped == {"window not covered to 100% by s2": 2}


def test_windows_and_an_area_are_what_both_allow() -> None:
    pair = [project(shapely.Point(x, 5_398_000), 32633, 4326) for x in (501_000, 503_000)]
    area = project(shapely.box(500_000, 5_396_000, 502_000, 5_400_000), 32633, 4326)
    (row,) = rows_of(collection("s2", record("a")).chips(32, at=pair, aoi=area))
    assert row["xmax"] < 502_000


def test_points_that_are_no_degrees_are_refused() -> None:
    for at in ([(500_000.0, 5_400_000.0)], [(15.0, 95.0)], [shapely.Point()]):
        with pytest.raises(rd.PlanError, match="at="):
            _ = collection("s2", record("a")).chips(32, at=at).table


# Order


def test_the_order_depends_on_the_chips_alone() -> None:
    rows = [
        record(f"a{i}", west=500_000.0 + 2000 * i, when=f"2024-04-{10 + i % 3}T10:00:00", tile=str(i))
        for i in range(5)
    ]
    more = [record("b", west=505_000.0, north=5_397_000.0), record("c", epsg=32632, west=700_000.0)]
    whole = ids_of(collection("s2", *rows, *more).chips(32, **CELLS))
    part = ids_of(collection("s2", *rows[::-1]).chips(32, **CELLS))
    assert len(part) < len(whole)
    assert part == [i for i in whole if i in set(part)]
    split = collection("s2", *rows).chips(32, **CELLS).split(seed=1)
    train = ids_of(split.select("train"))
    assert train == [i for i in part if i in set(train)]


@pytest.mark.parametrize(("west", "north"), [(300_000.0, 5_400_000.0), (399_960.0, 5_340_000.0)])
def test_neighbours_follow_each_other(west: float, north: float) -> None:
    """Of a scene of 1024-px tiles, few are met again that none of the last shards needed."""
    own = collection("s2", record("a", west=west, north=north, px=(10_980, 10_980), tile_px=1024))
    bounds = np.stack([own.chips(256).table.column(n).to_numpy() for n in ("xmin", "ymin", "xmax", "ymax")])
    left, bottom = np.floor((bounds[:2].T - [west, north] + [0.5, 0.5]) / 10_240).T.astype(int)
    right, top = np.floor((bounds[2:].T - [west, north] - [0.5, 0.5]) / 10_240).T.astype(int)
    shards = [
        {t for i in range(first, min(first + 38, len(left))) for t in itertools.product(
            range(left[i], right[i] + 1), range(bottom[i], top[i] + 1)
        )}
        for first in range(0, len(left), 38)
    ]  # fmt: skip
    tiles = len(set().union(*shards))
    fetched = [len(s - set().union(*shards[max(i - 5, 0) : i])) for i, s in enumerate(shards)]
    assert sum(fetched) <= 1.17 * tiles
    assert sum(len(s) for s in shards) <= 2.9 * tiles


def test_outlines_are_what_shapely_writes() -> None:
    chips = collection("s2", record("a"), record("b", epsg=32733, north=7_700_000.0)).chips(64, **CELLS)
    shapes = boxes(chips)
    wanted = [
        shapely.Polygon(np.asarray(project(shape, epsg, 4326).exterior.coords)[[2, 3, 0, 1]])
        for shape, epsg in zip(shapes, chips.table.column("epsg").to_pylist(), strict=True)
    ]
    found = chips.table.column("geometry").to_pylist()
    assert shapely.equals_exact(shapely.from_wkb(found), wanted, 1e-12, normalize=True).all()
    assert found == shapely.to_wkb(shapely.from_wkb(found)).tolist()


# grid="tiles"


def test_tiles_are_used_whole() -> None:
    rows = [
        record(f"a{i}", west=500_030.0 + i * 1280 * 3, north=5_400_010.0, px=(384, 256)) for i in range(2)
    ]
    chips = collection("s2", *rows).chips(64, grid="tiles")
    own = rows_of(chips)
    assert len(own) == 2 * 6 * 4
    for r in own:
        assert (r["xmin"] - 500_030.0) % 640 == 0
        assert (5_400_010.0 - r["ymax"]) % 640 == 0
        assert r["cell"] is None
    said = chips.explain()
    assert said["tile_fit"] == pytest.approx(1.0)
    assert said["requests"] == 2 * 2 * 6  # each of the tiles once per band
    assert said["uncovered"] == {}


def test_tiles_in_the_south_are_translated() -> None:
    row = record("a", epsg=32723, west=500_030.0, north=7_700_010.0, px=(256, 256))
    own = rows_of(collection("s2", row).chips(128, grid="tiles"))
    assert {r["epsg"] for r in own} == {32623}
    assert sorted({r["ymax"] for r in own}) == [7_700_010.0 - 1e7 - 1280, 7_700_010.0 - 1e7]


@pytest.mark.parametrize(
    ("other", "size", "stride", "word"),
    [
        ({"west": 500_010.0}, 64, None, "2 tile lattices"),
        ({"tile_px": 64}, 64, None, "tiles of"),
        ({"pixel": 20.0}, 64, None, "pixels of"),
        ({}, 48, None, "divides the tile"),
        ({}, 64, 32, "no stride"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(
    other: dict[str, Any], size: int, stride: int | None, word: str
) -> None:
    own = collection("s2", record("a"), record("c"), record("b", **other))
    with pytest.raises(rd.GridError, match=word):
        _ = own.chips(size, stride, grid="tiles").table


def test_each_crs_has_its_own_tiles() -> None:
    own = collection("s2", record("a"), record("b", epsg=32632, west=600_010.0))
    assert {r["epsg"] for r in rows_of(own.chips(64, grid="tiles"))} == {32632, 32633}


# grid=GeoBox


def test_a_geobox_is_cut_from_its_corner() -> None:
    box = GeoBox.from_bbox(
        (500_003.0, 5_397_007.0, 502_003.0, 5_399_007.0), crs="EPSG:32633", resolution=10.0
    )
    corner = box.transform.c, box.transform.f
    chips = collection("s2", record("a")).chips(32, 24, grid=box)
    per_side = (box.shape[0] - 32) // 24 + 1
    own = rows_of(chips)
    assert len(own) == per_side**2
    for r in own:
        assert r["xmin"] == corner[0] + r["col"] * 240
        assert r["ymax"] == corner[1] - r["row"] * 240
    assert len(set(ids(chips)) | set(ids(collection("s2", record("a")).chips(32, grid=box)))) > len(own) + 10
    with pytest.raises(rd.GridError, match="GeoBox"):
        _ = collection("s2", record("a")).harmonize(["red"], resolution=20).chips(32, grid=box).table


@pytest.mark.parametrize("grid", ["squares", 3, None])
def test_other_grids_are_refused(grid: Any) -> None:
    with pytest.raises(rd.PlanError, match="grid="):
        _ = collection("s2", record("a")).chips(32, grid=grid).table
