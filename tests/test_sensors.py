"""Sensors of the catalog: what their files hold, against formulas and bits written out by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from test_alpha import SIDE, X0, Y0, item, write

import rasteret_dask as rd
from rasteret_dask.catalogs.catalog import catalog
from rasteret_dask.rules.kinds import KINDS
from rasteret_dask.rules.masks import QUALITY, BitValues, clouds_of, quality_among
from rasteret_dask.rules.units import units_named
from rasteret_dask.table.records import Records

BOX = (X0, Y0 - 10 * SIDE, X0 + 10 * SIDE, Y0)


@pytest.fixture(scope="module")
def folder(data: Path) -> Path:
    if not (data / "more_sensors").is_dir():
        pytest.skip(f"no items of more sensors: {data / 'more_sensors'} is not there")
    return data / "more_sensors"


def assets_of(path: Path, **options: Any) -> dict[str, Any]:
    """Return the assets of an item as its record has them."""
    made = rd.build_from_stac([json.loads(path.read_text())], name="more", headers=False, **options)
    return dict(made.to_table(["assets"]).column(0)[0].as_py())


def test_radar_is_radar(folder: Path) -> None:
    """Power of RTC, counts of GRD; the item's product type says GRD of both."""
    rtc = "sentinel1_rtc/pc/S1A_IW_GRDH_1SDV_20240419T045839_20240419T045904_053498_067DF2_rtc.json"
    grd = "sentinel1_grd/pc/S1A_IW_GRDH_1SDV_20220428T034417_20220428T034442_042968_05213C.json"
    indigo = "sentinel1_rtc/aws/S1A_20200103_17RMJ_ASC.json"
    for place, kind, nodata in (
        (rtc, "backscatter", "-32768"),
        (grd, "amplitude", "0"),
        (indigo, "backscatter", "0"),
    ):
        assets = assets_of(folder / place)
        assert set(assets) == {"vv", "vh"}
        assert {(a["kind"], a["nodata"], a["role"]) for a in assets.values()} == {(kind, nodata, "data")}


def test_the_orbit_s_direction_is_a_column(folder: Path) -> None:
    files = sorted((folder / "sentinel1_rtc/pc").glob("*.json")) + sorted(
        (folder / "sentinel1_grd/pc").glob("*.json")
    )
    items = [json.loads(f.read_text()) for f in files]
    states = {i["id"]: i["properties"]["sat:orbit_state"] for i in items}
    assert set(states.values()) == {"ascending", "descending"}
    for state in ("ascending", "descending"):
        made = rd.build_from_stac(items, name="s1", headers=False).where(("sat:orbit_state", "==", state))
        assert set(made.to_table(["id"]).column(0).to_pylist()) == {
            n for n, s in states.items() if s == state
        }


@pytest.mark.parametrize("properties", [{}, {"sar:polarizations": ["VV"]}])
@pytest.mark.parametrize("band", ["vv", "VV"])
def test_one_s_own_radar_is_no_reflectance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, band: str, properties: dict[str, Any]
) -> None:
    """What a user registers by its bands' names alone has the kind of these names, and can be decibels."""
    power = np.random.default_rng(0).uniform(0.001, 2, (1, SIDE, SIDE)).astype("float32")
    one = item(write(tmp_path / "a.tif", power))
    one["assets"] = {band: one["assets"]["image"]}
    one["properties"] |= properties
    monkeypatch.setenv("RASTERET_DASK_CATALOG", str(tmp_path / "catalog.toml"))
    rd.register("me/s1", catalog=str(tmp_path / "catalog.json"), bands=[band])
    made = rd.build_from_stac([one], name="s1", dataset="me/s1")
    assert Records(made.to_table()).asset(0, band).kind == "backscatter"
    cube = made.harmonize(bands=[band], units={band: "decibel"}).cube(bounds=BOX).isel(time=0, band=0)
    assert np.allclose(cube.values, 10 * np.log10(power[0].astype("f8")), atol=1e-5)


@pytest.mark.parametrize(
    ("dtype", "kind", "factor"), [("float32", "backscatter", 10), ("uint16", "amplitude", 20)]
)
def test_decibels_average_power(tmp_path: Path, dtype: str, kind: str, factor: int) -> None:
    """On a coarser grid too: 10 log10 of mean power, 20 log10 of the root of the mean square of amplitudes."""
    numbers = np.random.default_rng(0).integers(1, 900, (1, SIDE, SIDE)).astype(dtype)
    one = item(write(tmp_path / "a.tif", numbers))
    one["assets"] = {"vv": one["assets"]["image"]}
    one["properties"]["sar:polarizations"] = ["VV"]
    made = rd.build_from_stac([one], name="s1")
    assert Records(made.to_table()).asset(0, "vv").kind == kind
    fine = made.harmonize(units={"vv": "decibel"}).cube(bounds=BOX).isel(time=0, band=0).values
    assert np.allclose(fine, factor * np.log10(numbers[0].astype("f8")), atol=1e-4)
    coarse = (
        made.harmonize(units={"vv": "decibel"}, resolution=40).cube(bounds=BOX).isel(time=0, band=0).values
    )
    power = (numbers[0].astype("f8") ** (factor / 10)).reshape(32, 4, 32, 4).mean(axis=(1, 3))
    assert np.allclose(coarse, 10 * np.log10(power), atol=1e-4)


def test_what_no_power_can_be_is_invalid(tmp_path: Path) -> None:
    """RTC's files say nothing, -32768 or 0 on one scene; NaN is nothing as well."""
    power = np.random.default_rng(0).uniform(0.001, 2, (1, SIDE, SIDE)).astype("float32")
    power[0, :10], power[0, 10:20], power[0, 20:30], power[0, 30:40] = -32768, 0, np.nan, 1e-10
    one = item(write(tmp_path / "a.tif", power))
    one["collection"], one["assets"] = "sentinel-1-rtc", {"vv": one["assets"]["image"]}
    cube = rd.build_from_stac([one], name="s1").cube(bounds=BOX).isel(time=0, band=0).values
    assert np.isnan(cube[:40]).all()
    assert np.array_equal(cube[40:], power[0, 40:])


def test_units_of_a_kind_become_json_and_back() -> None:
    units = units_named({"vv": "decibel"})
    of_counts, of_power = (units.of({"vv"}, KINDS[kind], False) for kind in ("amplitude", "backscatter"))
    assert (of_counts.name, of_power.name) == ("decibel", "decibel")
    assert of_counts != of_power
    assert np.allclose(
        of_counts.finish(of_counts.decode(np.array([10.0]), rd.rules.radiometry.Radiometry(1.0, 0.0, ""))), 20
    )


@given(st.integers(0, 2**16 - 1))
def test_modis_state_by_its_bits(state: int) -> None:
    """By text of its bits, the most significant first, as the guide prints them."""
    bits = format(state, "016b")
    cloud, shadow, cirrus = bits[14:16], bits[13], bits[6:8]
    cloudy = (
        cloud in ("01", "10") or shadow == "1" or cirrus in ("10", "11") or bits[5] == "1" or bits[2] == "1"
    )
    snow = bits[3] == "1" or bits[0] == "1"
    water = bits[10:13] in ("000", "011", "101", "110", "111")
    field = np.array([[state]], np.uint16)
    quality = quality_among(["sur_refl_b01", "sur_refl_state_500m"])
    assert quality is not None
    for word, due in (("clouds", cloudy), ("snow", snow), ("water", water)):
        mask = quality.mask([word])
        assert mask.needs == ("sur_refl_state_500m",)
        assert bool(mask.hidden(field)[0, 0]) is due
    assert bool(quality.mask(["clouds", "snow"]).hidden(field)[0, 0]) is (cloudy or snow)


@pytest.mark.parametrize(
    ("first", "length", "values"), [(-1, 2, (1,)), (0, 0, (0,)), (0, 2, (4,)), (3, 1, (-1,))]
)
def test_bits_that_cannot_be_are_refused(first: int, length: int, values: tuple[int, ...]) -> None:
    with pytest.raises(rd.PlanError, match="BitValues"):
        BitValues("qa", first, length, values)


def test_hls_fmask(folder: Path) -> None:
    """A real tile: 255 is nodata before it is all bits, and hides nothing."""
    path = folder / "hls/rasters/HLS.L30.T15UWP.2024283T165135.v2.0.Fmask.tif"
    mask = clouds_of(["B04", "Fmask"])
    assert mask is not None
    with rasterio.open(path) as file:
        window = rasterio.windows.Window(1000, 1000, 512, 512)
        field, place = file.read(1, window=window), file.window_transform(window)
    box = rasterio.transform.array_bounds(512, 512, place)
    one = item(path)
    one["collection"], one["assets"] = "HLSL30_2.0", {"Fmask": one["assets"]["image"]}
    cube = rd.build_from_stac([one], name="hls").harmonize(bands=["Fmask"]).cube(bounds=box)
    assert np.array_equal(cube["valid"].isel(time=0).values if "valid" in cube.coords else
                          cube.isel(time=0, band=0).values != 255, field != 255)  # fmt: skip
    by_hand = [[bool(int(v) & 0b1110) for v in row] for row in field[:40, :40]]
    assert mask.hidden(field[:40, :40]).tolist() == by_hand


def test_records_of_any_quality_band_are_readable_by_it() -> None:
    """Every quality band that is known has a dataset whose band it is, in the catalog's own spelling."""
    codes = {
        band.code
        for dataset in catalog().datasets.values()
        for band in dataset.bands
        if band.role == "quality"
    }
    assert {quality.band for quality in QUALITY} <= codes


def test_another_s_embeddings(tmp_path: Path) -> None:
    """Vectors stored as they are: NaN on water, nearest pixels on another grid, no formula of AlphaEarth's."""
    vectors = np.random.default_rng(0).normal(0, 3, (128, 64, 64)).astype("float32")
    vectors[:, :10] = np.nan
    path = write(tmp_path / "grid_0.15_52.05_2024.tif", vectors, nodata=float("nan"))
    one = item(path)
    one["collection"], one["assets"] = "tessera-v1", {"embedding": one["assets"]["image"]}
    made = rd.build_from_stac([one], name="tessera")
    assert len(made.bands) == 128
    box = (X0, Y0 - 640, X0 + 640, Y0)
    assert np.array_equal(made.cube(bounds=box).isel(time=0).values, vectors, equal_nan=True)
    coarse = made.harmonize(resolution=20).cube(bounds=box).isel(time=0).values
    seen = coarse[:, ~np.isnan(coarse).any(0)].T
    assert {v.tobytes() for v in seen} <= {v.tobytes() for v in vectors.reshape(128, -1).T}


def test_jpeg_2000_in_a_bucket_of_another_service(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CDSE's items name s3://eodata, which another endpoint has than AWS."""
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(port=0)
    source = data / "edge_cases/mapchete_s2_band.jp2"
    if not source.is_file():
        pytest.skip(f"no {source}")
    server.start()
    try:
        host, port = server.get_host_and_port()
        for key, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s")):
            monkeypatch.setenv(f"AWS_{key}", value)
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        client.create_bucket(Bucket="eodata")
        client.upload_file(str(source), "eodata", "S2/B04_10m.jp2")
        monkeypatch.setenv("RASTERET_DASK_CATALOG", str(tmp_path / "catalog.toml"))
        rd.register(
            "me/cdse", like="sentinel-2-l2a", stac_api="https://stac.example.com", collection="sentinel-2-l2a",
            stores=["s3://eodata"], access="keys", region="us-east-1", endpoint=f"http://{host}:{port}",
        )  # fmt: skip
        with rasterio.open(source) as file:
            assert file.driver == "JP2OpenJPEG"
            pixels, box, place = file.read(1), file.bounds, file.transform
        one = item(source)
        one["collection"], one["properties"]["processing:version"] = "sentinel-2-l2a", "05.12"
        one["assets"] = {
            "B04_10m": {**one["assets"]["image"], "href": "s3://eodata/S2/B04_10m.jp2", "type": "image/jp2"}
        }
        made = rd.build_from_stac([one], name="cdse")
        size = place.a
        box = (box.left, box.top - 64 * size, box.left + 64 * size, box.top)
        cube = made.harmonize(units="raw").cube(bounds=box).isel(time=0, band=0).values
        assert np.array_equal(cube, pixels[:64, :64])
    finally:
        server.stop()
