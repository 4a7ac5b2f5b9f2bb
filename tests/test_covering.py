"""Chips that cover an area, painted pixel by pixel: none is left out; explain() tells the share of the ground."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pytest
import shapely
from affine import Affine
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from made_records import collection, record
from numpy.typing import NDArray
from odc.geo.geobox import GeoBox

import rasteret_dask as rd
from rasteret_dask.chipping.boxes import apart
from rasteret_dask.chipping.covering import ground_share, map_extents
from rasteret_dask.chipping.coverwindows import starts
from rasteret_dask.planning.plan import ChipSpec, from_json, to_json

PIXEL = 10.0
EDGES = st.sampled_from(["shift", "pad"])
SOME = settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much]
)
FEWER = settings(SOME, max_examples=10)
FINE = 3
"""Points along a side of a pixel that tell how much of it is asked for."""


@dataclass(frozen=True)
class Scene:
    """A raster of 10 m pixels: EPSG code, west, north, width and height in pixels."""

    epsg: int
    west: float
    north: float
    px: tuple[int, int]

    @property
    def box(self) -> Any:
        """The raster's rectangle in its CRS."""
        east, south = self.west + self.px[0] * PIXEL, self.north - self.px[1] * PIXEL
        return shapely.box(self.west, south, east, self.north)

    def holds(self, lon: NDArray[np.float64], lat: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which places lie on the raster."""
        x, y = moved(4326, self.epsg, lon, lat)
        west, south, east, north = self.box.bounds
        return np.asarray((x > west) & (x < east) & (y > south) & (y < north))


def moved(source: Any, target: Any, x: Any, y: Any) -> tuple[Any, Any]:
    return pyproj.Transformer.from_crs(source, target, always_xy=True).transform(x, y)


def records_of(scenes: Sequence[Scene]) -> rd.Collection:
    """Return a record a scene, of one acquisition."""
    rows = [record(f"r{n}", west=s.west, north=s.north, px=s.px, epsg=s.epsg) for n, s in enumerate(scenes)]
    return collection("s2", *rows)


@dataclass(frozen=True)
class Painted:
    """A map of some chips, pixel by pixel, and which places are asked for."""

    west: float
    north: float
    count: NDArray[np.int64]
    """Shape (y, x). How many chips lie over each pixel."""
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    """Shape (y, x), or finer. Places, one in each pixel or in each part of one."""
    asked: NDArray[np.bool_]
    """The same shape. Whether records lie there, in the area."""

    @property
    def bounds(self) -> tuple[float, float, float, float]:
        """Bounds of the pixels that are asked for."""
        rows, cols = np.flatnonzero(self.asked.any(1)), np.flatnonzero(self.asked.any(0))
        west, north = self.west + cols[0] * PIXEL, self.north - rows[0] * PIXEL
        return west, self.north - (rows[-1] + 1) * PIXEL, self.west + (cols[-1] + 1) * PIXEL, north


def painted(chips: rd.Chips, asked: Asked, code: int, fine: int = 1) -> Painted:
    """Paint the chips of one map by NumPy alone; of finer places, each lies anywhere in its part of a pixel."""
    epsg, *edges = (chips.table.column(n).to_numpy() for n in ("epsg", "xmin", "ymin", "xmax", "ymax"))
    box = np.stack(edges, -1)[epsg == code]
    rings = [shapely.get_coordinates(shapely.segmentize(s.box, 100.0)) for s in asked.scenes]
    ground = np.concatenate(
        [np.stack(moved(s.epsg, code, *r.T), -1) for s, r in zip(asked.scenes, rings, strict=True)]
    )
    west = box[0, 0] + np.floor((ground[:, 0].min() - box[0, 0]) / PIXEL - 2) * PIXEL
    north = box[0, 3] + np.ceil((ground[:, 1].max() - box[0, 3]) / PIXEL + 2) * PIXEL
    wide = int((ground[:, 0].max() - west) / PIXEL) + 3
    high = int((north - ground[:, 1].min()) / PIXEL) + 3
    count = np.zeros((high, wide), dtype=np.int64)
    places = np.stack([north - box[:, 3], north - box[:, 1], box[:, 0] - west, box[:, 2] - west], -1) / PIXEL
    assert np.abs(places - np.round(places)).max() < 1e-6
    for top, bottom, left, right in np.clip(
        np.round(places).astype(int), 0, [high, high, wide, wide]
    ).tolist():
        count[top:bottom, left:right] += 1
    random = np.random.default_rng(0)
    steps = (np.arange(high * fine)[:, None], np.arange(wide * fine)[None])
    inner = random.random((2, high * fine, wide * fine)) if fine > 1 else np.full((2, high, wide), 0.5)
    x, y = west + (steps[1] + inner[1]) * PIXEL / fine, north - (steps[0] + inner[0]) * PIXEL / fine
    lon, lat = moved(code, 4326, x, y)
    return Painted(west, north, count, x, y, asked.on(code, x, y, lon, lat))


@dataclass(frozen=True)
class Asked:
    """What is asked of the ground of scenes."""

    scenes: tuple[Scene, ...]
    area: Any = None
    """In degrees; None: all of it."""
    grid: Any = "utm"

    def on(self, code: int, x: Any, y: Any, lon: Any, lat: Any) -> NDArray[np.bool_]:
        """Return whether places of a map, which are given in degrees too, are asked for there."""
        there = np.zeros(lon.shape, dtype=bool)
        for scene in self.scenes:
            there |= scene.holds(lon, lat)
        if self.area is not None:
            there &= shapely.contains_xy(self.area, lon, lat)
        if isinstance(self.grid, GeoBox):
            edges = self.grid.boundingbox
            there &= (x > edges.left) & (x < edges.right) & (y > edges.bottom) & (y < edges.top)
        return there & (np.floor((lon + 180) / 6) + 1 == code - 32600) if self.grid == "utm" else there

    def chips(self, size: int, stride: int, **options: Any) -> rd.Chips:
        """Lay chips; an area without a record on it is none."""
        return records_of(self.scenes).chips(size, stride, aoi=self.area, grid=self.grid, **options)


@st.composite
def asks(draw: st.DrawFn, kind: str, least: int = 25) -> Asked:
    """Draw scenes of a kind, and an area on them that is as large as so many pixels a side."""
    px = st.tuples(st.integers(30, 160), st.integers(30, 160))
    grid: Any = "EPSG:3035" if kind == "3035" else "tiles" if kind == "tiles" else "utm"
    scenes: tuple[Scene, ...]
    if kind == "border":
        (x, y), (u, v) = (moved(4326, code, 12.0, 48.0) for code in (32632, 32633))
        scenes = (
            Scene(32632, round(x, -1) - 900.0, round(y, -1), (90 + draw(st.integers(10, 90)), 120)),
            Scene(32633, round(u, -1) - 10.0 * draw(st.integers(0, 90)), round(v, -1) - 300.0, draw(px)),
        )
    else:
        epsg, north = (32733, 6_200_000.0) if kind == "south" else (32633, 5_400_000.0)
        first = Scene(epsg, 500_000.0 + draw(st.sampled_from([0.0, 3.0, 1234.0])), north, draw(px))
        scenes = (first, replace(first, west=first.west + 1280.0, north=north - 1280.0, px=draw(px)))
        scenes = scenes if draw(st.booleans()) else (first,)
    if kind == "box":
        high, wide = draw(px)
        corner = [
            scenes[0].west + 10.0 * draw(st.integers(-20, 20)),
            scenes[0].north - 10.0 * draw(st.integers(-9, 9)),
        ]
        grid = GeoBox((high, wide), Affine(10, 0, corner[0], 0, -10, corner[1]), f"EPSG:{scenes[0].epsg}")
    area, shape = None, draw(st.sampled_from(["none", "box", "triangle"]))
    if shape != "none":
        places = st.tuples(st.floats(-0.2, 1.2), st.floats(-0.2, 1.2))
        corners = []
        for scene in (scenes * 3)[:3]:
            right, down = draw(places)
            x, y = scene.west + right * 10 * scene.px[0], scene.north - down * 10 * scene.px[1]
            corners.append(moved(scene.epsg, 4326, x, y))
        (west, south), (east, north) = np.min(corners, axis=0), np.max(corners, axis=0)
        area = shapely.box(west, south, east, north) if shape == "box" else shapely.Polygon(corners)
    asked = Asked(scenes, area, grid)
    codes = {s.epsg if s.epsg < 32700 else s.epsg - 100 for s in scenes} if grid != "EPSG:3035" else {3035}
    outlines = [
        shapely.Polygon(np.stack(moved(s.epsg, 4326, *shapely.get_coordinates(s.box).T), -1)) for s in scenes
    ]
    ground = shapely.union_all(outlines)
    ground = ground if area is None else shapely.intersection(ground, area)
    if isinstance(grid, GeoBox):
        edges = shapely.box(*grid.boundingbox)
        ring = shapely.Polygon(np.stack(moved(codes.pop(), 4326, *shapely.get_coordinates(edges).T), -1))
        ground = shapely.intersection(ground, ring)
    assume(ground.area * np.cos(np.radians(ground.bounds[1])) * 111_000**2 > (least * PIXEL) ** 2)
    return asked


KINDS = ("north", "south", "border", "3035", "box", "tiles")


@st.composite
def sides(draw: st.DrawFn, kind: str) -> tuple[int, int]:
    """Draw size and stride."""
    size = draw(st.integers(10, 80))
    if kind == "tiles":
        return size, draw(st.sampled_from([n for n in (8, 16, 32, 64) if size // 3 <= n <= size]))
    return size, draw(st.integers(size // 2, size))


@pytest.mark.parametrize("kind", KINDS)
@SOME
@given(st.data(), EDGES)
def test_no_pixel_is_left_out(kind: str, data: st.DataObject, edge: Any) -> None:
    """Each pixel whose middle is asked for is in a chip; chips end at the map's edges, or begin at whole strides."""
    asked, (size, stride) = data.draw(asks(kind)), data.draw(sides(kind))
    chips = asked.chips(size, stride, cover=True, edge=edge)
    ids = chips.table["chip_id"].to_pylist()
    assert len(ids) == len(set(ids))
    assert not chips.planned.dropped
    assert ground_share(chips.planned).share == 1.0
    extents = map_extents(chips.planned)
    table = chips.table.select(["epsg", "row", "col", "xmin", "ymin", "xmax", "ymax"]).to_pandas()
    assert set(extents) == set(table["epsg"])
    for code, (west, south, east, north) in extents.items():
        paint = painted(chips, asked, code)
        assert paint.count[paint.asked].min(initial=1) >= 1
        if not paint.asked.any():
            continue  # less than a pixel of the neighbouring zone
        xmin, ymin, xmax, ymax = paint.bounds
        assert (np.array([west, south, -east, -north]) < np.array([xmin, ymin, -xmax, -ymax]) + 1e-6).all()
        own = table[table["epsg"] == code]
        if edge == "shift" and east - west >= size * PIXEL:
            assert own["xmin"].min() >= west - 1e-6
            assert own["xmax"].max() <= east + 1e-6
        if edge == "shift" and north - south >= size * PIXEL:
            assert own["ymin"].min() >= south - 1e-6
            assert own["ymax"].max() <= north + 1e-6
        if edge == "pad":
            assert not (own[["row", "col"]].to_numpy() % stride).any()
        if asked.area is None and not isinstance(asked.grid, GeoBox):
            assert max(abs(west - xmin), abs(south - ymin), abs(east - xmax), abs(north - ymax)) < 2 * PIXEL


@pytest.mark.parametrize("kind", KINDS)
@FEWER
@given(st.data())
def test_explain_tells_the_painted_share(kind: str, data: st.DataObject) -> None:
    """Of any chips, also after a filter: those side by side, with a stride, at places, in a GeoBox, in tiles."""
    asked, (size, stride) = data.draw(asks(kind, 80)), data.draw(sides(kind))
    options: dict[str, Any] = {"min_coverage": data.draw(st.sampled_from([0.0, 0.5, 1.0]))}
    if kind == "tiles":
        size = stride = 16
    elif kind == "box":
        options["cover"] = data.draw(st.booleans())
    else:
        options["cell_km"] = 1.28
        stride = data.draw(st.integers(size // 2, 2 * size))
    try:
        chips = asked.chips(size, stride, **options)
        if data.draw(st.booleans()):
            chips = (
                chips.filter(("xmin", ">", asked.scenes[0].west + 500.0))
                if kind != "3035"
                else chips.sample(3)
            )
        _ = chips.table
    except rd.PlanError:
        assume(False)
    whole = covered = 0.0
    maps = set(chips.table["epsg"].to_pylist())
    if kind == "border":
        # a chip reaches over the border, where its zone has no map of its own
        assume(maps == {32632, 32633} and len(chips) < 300)
    for code in maps:
        paint = painted(chips, asked, code, FINE)
        held = np.kron(paint.count > 0, np.ones((FINE, FINE), dtype=bool))
        if kind == "border":
            held |= reached(chips, code, paint)
        whole += float(paint.asked.sum())
        covered += float((paint.asked & held).sum())
    told = ground_share(chips.planned)
    assert told.share == pytest.approx(covered / whole, abs=1e-3)
    assert told.ground_km2 == pytest.approx(whole * (PIXEL / FINE) ** 2 / 1e6, rel=2e-2)


def reached(chips: rd.Chips, code: int, paint: Painted) -> NDArray[np.bool_]:
    """Return which places of a map chips of the neighbouring zone hold."""
    epsg, *edges = (chips.table.column(n).to_numpy() for n in ("epsg", "xmin", "ymin", "xmax", "ymax"))
    other = np.stack(edges, -1)[epsg != code]
    x, y = moved(code, int(epsg[epsg != code][0]), paint.x, paint.y)
    held = np.zeros(x.shape, dtype=bool)
    for xmin, ymin, xmax, ymax in other.tolist():
        held |= (x > xmin) & (x < xmax) & (y > ymin) & (y < ymax)
    return held


@given(st.integers(-300, 300), st.integers(1, 400), st.integers(1, 90), st.data(), st.booleans())
def test_windows_of_a_line_hold_all_its_pixels(
    first: int, length: int, size: int, data: st.DataObject, shift: bool
) -> None:
    stride = data.draw(st.integers(1, size))
    begin = starts(first, first + length, size, stride, shift)
    assert (np.diff(begin) > 0).all()
    assert (np.diff(begin) <= stride).all()
    assert begin[0] <= first
    assert begin[-1] + size >= first + length
    if not shift:
        assert not (begin % stride).any()
        assert begin[0] > first - stride
    elif length >= size:
        assert begin[0] == first
        assert begin[-1] + size == first + length
        assert not (begin[1:-1] % stride).any()
    else:
        assert len(begin) == 1
        assert abs((first - begin[0]) - (begin[0] + size - first - length)) <= 1


@given(st.lists(st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(1, 25)] * 2), max_size=60), st.booleans())
def test_rectangles_that_overlap_come_apart(boxes: list[tuple[int, int, int, int]], halved: bool) -> None:
    from rasteret_dask.chipping import boxes as room

    given_ = np.array([(x, y, x + w, y + h) for x, y, w, h in boxes], dtype=np.int64).reshape(-1, 4)
    wanted, got = np.zeros((90, 90), dtype=int), np.zeros((90, 90), dtype=int)
    for x0, y0, x1, y1 in given_.tolist():
        wanted[y0:y1, x0:x1] = 1
    few, pieces = room.FEW, room.PIECES
    try:
        room.FEW, room.PIECES = (1, 1) if halved else (few, pieces)
        parts = apart(given_)
    finally:
        room.FEW, room.PIECES = few, pieces
    for x0, y0, x1, y1 in parts.tolist():
        got[y0:y1, x0:x1] += 1
    assert (got == wanted).all()


def test_a_million_rectangles_of_a_lattice_are_one() -> None:
    place = np.stack(np.meshgrid(np.arange(1000), np.arange(1000)), -1).reshape(-1, 2) * 192
    assert apart(np.concatenate([place, place + 256], axis=1)).tolist() == [[0, 0, 192_064, 192_064]]


SCENE = Scene(32633, 500_003.0, 5_400_000.0, (400, 300))


def test_ids_tell_places_whatever_the_area() -> None:
    """Chips of two areas with one id are one window; those not at an edge have the same id in both."""
    own = records_of([SCENE])
    west, south, east, north = 15.005, 48.73, 15.03, 48.748
    options: dict[str, Any] = {"cover": True, "stride": 24}
    for edge in ("shift", "pad"):
        one = own.chips(32, **options, edge=edge, aoi=(west, south, east, north))
        other = own.chips(32, **options, edge=edge, aoi=(west + 0.004, south, east + 0.01, north + 0.003))
        places = [
            {r["chip_id"]: (r["xmin"], r["ymax"], r["row"], r["col"]) for r in c.table.select(
                ["chip_id", "xmin", "ymax", "row", "col"]).to_pylist()}
            for c in (one, other, own.chips(32, **options, edge=edge))
        ]  # fmt: skip
        shared = places[0].keys() & places[1].keys()
        assert len(shared) > 5
        assert all(places[0][name] == places[1][name] for name in shared)
        inner = {name for name, place in places[0].items() if not (place[2] % 24 or place[3] % 24)}
        assert inner <= places[2].keys() if edge == "shift" else places[0].keys() <= places[2].keys()
        assert all(place[2] == -540_000 + round((5_400_000 - place[1]) / 10) for place in places[2].values())
        assert all(place[3] == round((place[0] - 3) / 10) for place in places[2].values())


def test_an_area_smaller_than_a_chip_has_one() -> None:
    own = records_of([SCENE])
    area = (15.011, 48.736, 15.0125, 48.7375)
    one, padded = own.chips(64, cover=True, aoi=area), own.chips(64, cover=True, edge="pad", aoi=area)
    assert 1 <= len(padded) <= 4
    assert one.explain()["ground"]["share"] == padded.explain()["ground"]["share"] == 1.0
    (shifted,) = one.table.to_pylist()
    ((west, south, east, north),) = map_extents(one.planned).values()
    assert abs((shifted["xmin"] + shifted["xmax"]) - (west + east)) <= 2 * PIXEL
    assert abs((shifted["ymin"] + shifted["ymax"]) - (south + north)) <= 2 * PIXEL


def test_what_overlaps_is_not_split() -> None:
    """Each refusal says why, and what it advises works."""
    own = records_of([SCENE])
    chips = own.chips(64, cell_km=0.64, cover=True)
    steps: list[Callable[[], rd.Chips]] = [
        lambda: chips.split(), lambda: chips.split(by="time", test=("2024", None)), lambda: chips.folds(3),
        lambda: chips.fold(0), lambda: chips.sample(4).split(), lambda: chips.split(stratify="no/such/raster.tif"),
    ]  # fmt: skip
    for step in steps:
        with pytest.raises(rd.PlanError, match=r"leaks from one into the other.*without cover=True"):
            step()
    dealt = own.chips(64, cell_km=0.64).split(0.5, 0.25, 0.25)
    assert set(dealt.table["split"].to_pylist()) <= {"train", "val", "test"}
    with pytest.raises(rd.PlanError, match=r"lie across blocks.*without by_blocks"):
        chips.by_blocks("nowhere", progress=False)
    planned = own.chips(64, cover=True)
    assert len(planned) == 42
    assert "none: chips cover the area, and overlap" in repr(planned)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 32, "stride": 33, "cover": True}, "at most 32.*Shorten the stride"),
        ({"size": 32, "at": [(15.0, 48.7)], "cover": True}, "at=, which says where.*Leave out at="),
        ({"size": 32, "edge": "pad"}, "edge='pad'.*cover=True, edge='pad'"),
        ({"size": 32, "cover": True, "edge": "wrap"}, "'shift', 'pad'"),
        ({"size": 32, "stride": 24, "grid": "tiles", "cover": True}, "a stride that divides the tile"),
        ({"size": 2000, "cover": True}, "larger cell_km"),
    ],
)
def test_what_cannot_cover_is_refused(options: dict[str, Any], message: str) -> None:
    size = options.pop("size")
    with pytest.raises(rd.RasteretDaskError, match=message):
        _ = records_of([SCENE]).chips(size, **options).table


def test_a_larger_min_coverage_leaves_edges_out_and_says_so() -> None:
    own = records_of([SCENE])
    whole = own.chips(64, stride=48, cover=True, edge="pad", min_coverage=1.0)
    told = whole.explain()
    assert told["ground"]["share"] < 1.0
    assert "window not covered to 100% by s2" in str(told)
    assert f"{np.floor(told['ground']['share'] * 1000) / 10:g}% of the ground" in str(told)
    plain = own.chips(64, stride=48, cover=True, edge="pad")
    assert plain.explain()["ground"]["share"] == 1.0
    assert not plain.planned.dropped


def test_a_plan_without_cover_has_the_json_that_it_had() -> None:
    assert not {"cover", "edge"} & to_json(ChipSpec(64, 64)).keys()
    spec = ChipSpec(64, 48, cover=True, edge="pad", min_coverage=0.0)
    assert from_json(to_json(spec)) == spec
    chips = records_of([SCENE]).chips(64, stride=48, cover=True, edge="pad")
    assert 'chips(64, stride=48, cover=True, edge="pad")' in repr(chips)
    assert "min_coverage" not in repr(chips)


def test_a_geobox_that_chips_do_not_fill_is_covered_and_put_together(s2: rd.Collection) -> None:
    """Its right and bottom remainder too: a map made of chips is the cube of the box, pixel by pixel."""
    one = s2.filter(id=s2.to_table(["id"])["id"][0].as_py()).harmonize(["red"])
    ((west, _, _, north),) = map_extents(one.chips(32, cover=True).planned).values()
    box = GeoBox((91, 133), Affine(10, 0, west + 500, 0, -10, north - 500), "EPSG:32633")
    plain = one.chips(40, grid=box)
    assert plain.explain()["ground"]["share"] == pytest.approx(80 * 120 / (91 * 133))
    cube = one.cube(bounds=box.boundingbox.bbox).compute().to_numpy()[0, 0]
    assert np.isfinite(cube).mean() > 0.5
    for edge in ("shift", "pad"):
        chips = one.chips(40, stride=30, grid=box, cover=True, edge=edge)
        assert "100% of the ground" in str(chips.explain())
        made = np.full((91, 133), -1, dtype=np.float32)
        pixels = chips.load()["pixels"].to_numpy()[:, 0, 0]
        for chip, row, col in zip(pixels, *(chips.table[n].to_pylist() for n in ("row", "col")), strict=True):
            part = made[row : row + 40, col : col + 40]
            part[:] = chip[: part.shape[0], : part.shape[1]]
        np.testing.assert_array_equal(made, cube)


def test_a_recipe_says_it_too(s2: rd.Collection, tmp_path: Path) -> None:
    chips = s2.harmonize(["red"]).chips(40, stride=30, cover=True, edge="pad")
    text = chips.to_recipe(tmp_path / "map.toml")
    assert {"cover = true", 'edge = "pad"'} <= set(text.splitlines())
    assert "min_coverage" not in text
    again = rd.load_recipe(tmp_path / "map.toml").chips()
    assert again.table["chip_id"].to_pylist() == chips.table["chip_id"].to_pylist()
    (tmp_path / "map.toml").write_text(text + "\n[split]\ntrain = 0.8\ntest = 0.2\n")
    with pytest.raises(rd.RasteretDaskError, match="whose windows overlap across split cells"):
        rd.load_recipe(tmp_path / "map.toml").chips()


def test_why_a_place_has_no_chip_that_covers() -> None:
    own = records_of([SCENE])
    chips = own.chips(64, stride=48, cover=True)
    assert len(chips.why(lon=15.02, lat=48.74).chips) >= 1
    assert "outside of the area that chips cover" in str(chips.why(lon=15.2, lat=48.74))
