"""Areas and points in any form are the same area and the same points."""

from __future__ import annotations

from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pytest
import shapely

import rasteret_dask as rd
from rasteret_dask.geometries.areas import as_area, as_points, bbox_of

BOX = (14.0, 48.0, 15.0, 49.0)
SHAPE = shapely.box(*BOX)
GEOJSON = shapely.geometry.mapping(SHAPE)
FRAME = geopandas.GeoDataFrame({"label": [1]}, geometry=[SHAPE], crs=4326)


@pytest.mark.parametrize(
    "form",
    [
        BOX,
        list(BOX),
        np.array(BOX),
        SHAPE,
        [SHAPE],
        shapely.to_wkb(SHAPE),
        GEOJSON,
        {"type": "Feature", "geometry": GEOJSON, "properties": {}},
        {"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": GEOJSON}]},
        FRAME,
        FRAME.geometry,
        pa.array([shapely.to_wkb(SHAPE)]),
        pa.table({"geometry": [shapely.to_wkb(SHAPE)]}),
        [shapely.box(14, 48, 14.5, 49), shapely.box(14.5, 48, 15, 49)],
    ],
)
def test_all_forms_are_one_area(form: Any) -> None:
    assert shapely.from_wkb(bytes.fromhex(as_area(form))).symmetric_difference(SHAPE).area == 0


def test_a_frame_of_another_crs_is_projected() -> None:
    moved = FRAME.to_crs(32633)
    again = shapely.from_wkb(bytes.fromhex(as_area(moved)))
    assert again.symmetric_difference(SHAPE).area < 1e-9


@pytest.mark.parametrize(
    "form",
    [None, 3, "14,48,15,49", [], shapely.Polygon(), b"none", {"type": "Nothing"}, shapely.box(0, 0, 500000, 10),
     FRAME.set_crs(None, allow_override=True), (15.0, 49.0, 14.0, 48.0)],
)  # fmt: skip
def test_what_is_no_area_is_refused(form: Any) -> None:
    with pytest.raises(rd.PlanError):
        as_area(form)


@pytest.mark.parametrize(
    "bbox",
    [
        (0, 0, 0, 1),
        (1, 1, 0, 0),
        (190, 0, 170, 1),
        (0, 0, 1),
        "abcd",
        (0, 0, 1, 91),
        (0, 0, 1, float("nan")),
        4,
        None,
    ],
)
def test_a_bad_bbox_is_refused(bbox: Any) -> None:
    with pytest.raises(rd.PlanError):
        bbox_of(bbox)


def test_columns_and_index_of_a_frame_travel() -> None:
    points = geopandas.GeoDataFrame(
        {"crop": ["rye", "oat"], "yield": [1.5, None]},
        geometry=[shapely.Point(14.5, 48.5), shapely.Point(14.6, 48.5)],
        index=["a", "b"],
        crs=4326,
    ).rename_geometry("where")
    for form in (points, points.to_crs(32633)):
        table = as_points(form)
        assert table.column_names == ["crop", "yield", "geometry", "__index__"]
        assert table.column("crop").to_pylist() == ["rye", "oat"]
        assert table.column("yield").to_pylist() == [1.5, None]
        assert table.column("__index__").to_pylist() == ["a", "b"]
        shapes = shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False))
        np.testing.assert_allclose(shapely.get_coordinates(shapes), [[14.5, 48.5], [14.6, 48.5]], atol=1e-9)


def test_points_may_be_pairs_shapes_or_a_table() -> None:
    wkb = shapely.to_wkb([shapely.Point(1, 2), shapely.Point(3, 4)])
    for form in (
        [(1, 2), (3, 4)],
        [shapely.Point(1, 2), shapely.Point(3, 4)],
        pa.table({"geometry": pa.array(wkb)}),
    ):
        table = as_points(form)
        assert table.column("geometry").to_pylist() == list(wkb)
        assert table.column("__index__").to_pylist() == ["0", "1"]


def test_bad_points_are_refused() -> None:
    twice = geopandas.GeoDataFrame(geometry=[shapely.Point(1, 2)] * 2, index=[7, 7], crs=4326)
    forms: list[Any] = [[], 5, pa.table({"x": [1]}), twice, FRAME.iloc[:0]]
    for form in forms:
        with pytest.raises(rd.PlanError):
            as_points(form)


def test_a_label_that_a_chip_table_has_already_is_refused() -> None:
    own = FRAME.assign(split="train")
    with pytest.raises(rd.PlanError, match=r"split.*rename"):
        as_points(own)
