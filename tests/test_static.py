"""What does not change holds at any time: one slot, in every range, beside slots and single acquisitions alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import xarray as xr
from numpy.typing import NDArray
from test_files import X0, tif

import rasteret_dask as rd
from rasteret_dask.catalogs.catalog import find
from rasteret_dask.table.facts import ENDLESS

SIDE = 64


def height() -> NDArray[Any]:
    return np.arange(SIDE * SIDE, dtype="float32").reshape(1, SIDE, SIDE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Elevation without a time, and three optical scenes of three months."""
    folder = tmp_path_factory.mktemp("static")
    tif(folder / "dem" / "dem.tif", height())
    for month in (3, 4, 5):
        tif(folder / "s2" / f"s_2024{month:02d}10.tif", np.full((2, SIDE, SIDE), month, "uint16"))
    return folder


def optical(folder: Path) -> rd.Collection:
    return rd.build_from_files(
        folder / "s2", name="s2", bands=["red", "nir"], filename_regex=r"_(?P<date>\d{8})"
    ).harmonize(units="raw")


def dem(folder: Path) -> rd.Collection:
    return rd.build_from_files(folder / "dem", name="dem", bands=["h"], static=True)


def item(folder: Path, **properties: Any) -> dict[str, Any]:
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": "dem", "geometry": None, "properties": properties,
        "assets": {"h": {"href": str(folder / "dem" / "dem.tif"), "type": "image/tiff"}},
    }  # fmt: skip


def every_way(folder: Path) -> dict[str, rd.Collection]:
    """The same elevation, made to hold at any time by each way there is."""
    dated = rd.build_from_stac([item(folder, datetime="2011-01-01T00:00:00Z")], name="dem")
    nothing = pa.array([None], pa.timestamp("us", "UTC"))
    timeless = dated.to_table().set_column(2, "datetime", nothing)
    return {
        "files": dem(folder),
        "stac": rd.build_from_stac([item(folder, datetime=None)], name="dem", static=True),
        "dated stac": rd.build_from_stac(
            [item(folder, datetime="2011-01-01T00:00:00Z")], name="dem", static=True
        ),
        "table": rd.build_from_table(dated.to_table(), name="dem", static=True),
        "harmonize": dated.harmonize(time="static"),
        "harmonize without time": rd.as_collection(timeless, name="dem").harmonize(time="static"),
    }


def test_every_way_is_the_same(folder: Path) -> None:
    wanted = None
    for way, source in every_way(folder).items():
        source = source.harmonize(units="raw")
        cube = source.cube()
        assert cube.sizes["time"] == 1, way
        np.testing.assert_array_equal(cube.isel(time=0).to_numpy(), height())
        chips = source.chips(32, cell_km=0.64)
        assert chips.explain().facts["static"] == ["dem"], way
        assert "static: one slot that holds at any time" in str(chips.explain())
        loaded = chips.load()
        wanted = loaded if wanted is None else wanted
        np.testing.assert_array_equal(loaded["pixels"], wanted["pixels"])


@pytest.mark.parametrize("time", [None, "1MS"])
def test_it_joins_with_slots_and_with_acquisitions(folder: Path, time: str | None) -> None:
    s2 = optical(folder).harmonize(units="raw", time=time)
    shapes = set()
    for way, source in every_way(folder).items():
        joined = rd.join(s2=s2, dem=source.harmonize(units="raw"))
        loaded = joined.chips(32, cell_km=0.64).load()
        pixels = {name: loaded[name]["pixels"] for name in ("s2", "dem")}
        shapes.add((pixels["s2"].shape, pixels["dem"].shape))
        for chip in range(pixels["dem"].sizes["chip"]):
            found = np.squeeze(pixels["dem"].isel(chip=chip).to_numpy())
            assert found.shape == (32, 32), way
            assert found[0, 1] - found[0, 0] == 1, way
            assert found[1, 0] - found[0, 0] == SIDE, way
    ((s2_shape, dem_shape),) = shapes
    windows = len(optical(folder).harmonize(units="raw", time="1MS").chips(32, cell_km=0.64).table)
    assert (dem_shape[0], dem_shape[1]) == (windows * (3 if time is None else 1), 1)
    assert (s2_shape[0], s2_shape[1]) == (dem_shape[0], 1 if time is None else 3)


def test_it_is_in_every_range(folder: Path) -> None:
    for way, source in every_way(folder).items():
        if "harmonize" in way:
            continue  # a step over records whose own times filters see
        for dates in ("1850", "2024-03", ("2023-01-01", None)):
            assert len(source.subset(date_range=dates)) == 1, way


def test_it_travels(folder: Path, tmp_path: Path) -> None:
    """Tables, plans, stores, streams and cubes carry it; splits and points work."""
    dem(folder).export(tmp_path / "dem.parquet")
    again = rd.load(tmp_path / "dem.parquet").harmonize(units="raw")
    assert again.to_table(["start_datetime", "end_datetime"]).to_pylist()[0] == dict(
        zip(("start_datetime", "end_datetime"), ENDLESS, strict=True)
    )
    joined = rd.join(s2=optical(folder).harmonize(units="raw", time="1MS"), dem=again)
    chips = joined.chips(32, cell_km=0.32).split(train=0.5, val=0.5, test=0, seed=3)
    with pytest.warns(UserWarning, match="only 2 split cells"):
        splits = chips.table.column("split").to_pylist()
    assert set(splits) <= {"train", "val"}
    chips.to_zarr(tmp_path / "store.zarr", progress=False)
    stored = rd.open_chips(tmp_path / "store.zarr").load()
    loaded = chips.load()
    for name in ("s2", "dem"):
        xr.testing.assert_equal(stored[name]["pixels"].variable, loaded[name]["pixels"].variable)
    assert stored["dem"].sizes["time"] == 1


def test_points_take_it(folder: Path) -> None:
    import geopandas as gpd

    points = gpd.GeoDataFrame(geometry=gpd.points_from_xy([X0 + 320.0], [5_200_000.0 - 320.0]), crs=32633)
    at = rd.join(
        s2=optical(folder).harmonize(units="raw", time="1MS"), dem=dem(folder).harmonize(units="raw")
    )
    pixels = at.chips(16, at=points).load()["dem"]["pixels"]
    assert pixels.shape == (1, 1, 1, 16, 16)
    assert np.isfinite(pixels).all()


def test_who_forgets_it_is_told(folder: Path) -> None:
    none = pa.array([None], pa.timestamp("us", "UTC"))
    timeless = dem(folder).to_table()
    for name in ("start_datetime", "end_datetime", "datetime"):
        timeless = timeless.set_column(timeless.schema.get_field_index(name), name, none)
    with pytest.raises(rd.PlanError, match=r"no datetime.*harmonize\(time='static'\)"):
        rd.as_collection(timeless, name="dem").cube()
    with pytest.raises(rd.SourceError, match="static=True"):
        rd.build_from_stac([item(folder, datetime=None)], name="dem")
    s2 = optical(folder).harmonize(units="raw", time="1MS")
    old = {"datetime": None, "start_datetime": "2010-01-01T00:00:00Z", "end_datetime": "2011-01-01T00:00:00Z"}
    cover = rd.build_from_stac([item(folder, **old)], name="cover").harmonize(units="raw")
    with pytest.raises(rd.PlanError, match=r"harmonize\(time='static'\)"):
        rd.join(s2=s2, cover=cover).chips(32, cell_km=0.64).table  # noqa: B018
    any_time = rd.join(s2=s2, cover=cover.harmonize(units="raw", time="static")).chips(32, cell_km=0.64)
    assert len(any_time.table) == len(s2.chips(32, cell_km=0.64).table)
    single = rd.join(dem=dem(folder).harmonize(units="raw"), s2=optical(folder))
    with pytest.raises(rd.PlanError, match=r"chips\(reference='s2'\)"):
        single.chips(32, cell_km=0.64).table  # noqa: B018
    assert len(single.chips(32, cell_km=0.64, reference="s2").table) == 3 * len(any_time.table)


def test_the_catalog_says_it() -> None:
    for name in ("earthsearch/cop-dem-glo-30", "earthsearch/cop-dem-glo-90", "pc/nasadem"):
        assert find(name).static
    assert not find("earthsearch/sentinel-2-l2a").static


def test_a_registered_dataset_may_be_static(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    monkeypatch.setenv("RASTERET_DASK_CATALOG", str(tmp_path / "own.toml"))
    features = {"type": "FeatureCollection", "features": [item(folder, datetime="2011-01-01T00:00:00Z")]}
    (tmp_path / "items.json").write_text(json.dumps(features))
    entry = rd.register(
        "me/dem", catalog=str(tmp_path / "items.json"), static=True, path=tmp_path / "own.toml"
    )
    assert entry.static


def test_slots_and_images_take_the_interval_that_holds_them_or_the_nearest(tmp_path: Path) -> None:
    """Land cover of 2020 and 2021 beside images of 2019 to 2023."""
    days = ("20190615", "20200615", "20210615", "20230615")
    for day in days:
        tif(tmp_path / "s2" / f"s_{day}.tif", np.full((1, SIDE, SIDE), int(day[:4]), "uint16"))
    for year in (2020, 2021):
        tif(tmp_path / "cover" / f"c_{year}.tif", np.full((1, SIDE, SIDE), year % 100, "uint8"))
    s2 = rd.build_from_files(tmp_path / "s2", name="s2", bands=["x"], filename_regex=r"_(?P<date>\d{8})")
    cover = rd.build_from_files(
        tmp_path / "cover", name="cover", bands=["class"], filename_regex=r"_(?P<date>\d{4})", date_format="%Y",
        kinds={"class": "class"},
    )  # fmt: skip

    def classes(time: str | None, tolerance: str | None) -> dict[int, int]:
        """Return {year of the image: class beside it}, 0 where there is none."""
        joined = rd.join(
            s2=s2.harmonize(units="raw", time=time), cover=cover.harmonize(units="raw", tolerance=tolerance)
        )
        chips = joined.chips(32, cell_km=0.32, min_coverage=0.5)
        loaded = chips.load()
        images, labels = (loaded[n]["pixels"].to_numpy()[..., 0, 0, 0] for n in ("s2", "cover"))
        assert images.shape == labels.shape
        return {
            int(image): int(label)
            for image, label in zip(images.ravel(), labels.ravel(), strict=True)
            if image
        }

    assert classes(None, None) == {2020: 20, 2021: 21}
    assert classes(None, "200D") == {2019: 20, 2020: 20, 2021: 21}
    assert classes(None, "3650D") == {2019: 20, 2020: 20, 2021: 21, 2023: 21}
    assert classes("1YS", "200D") == {2019: 20, 2020: 20, 2021: 21, 2023: 0}
    assert classes("1YS", "3650D") == {2019: 20, 2020: 20, 2021: 21, 2023: 21}
    for wrong in ("a while", "-3D"):
        with pytest.raises(rd.PlanError, match="'400D'"):
            classes(None, wrong)
    with pytest.raises(rd.PlanError, match="records of instants"):
        s2.harmonize(units="raw", tolerance="3D").chips(32, cell_km=0.32).table  # noqa: B018
