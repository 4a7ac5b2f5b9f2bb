"""A CRS is a number that any process can turn back: the code of what is registered, a hash of the rest."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyproj
import pytest
import rasterio
from hypothesis import given, settings
from hypothesis import strategies as st
from pyproj.enums import PJType
from rasterio.crs import CRS

from rasteret_dask import crs as crs_module
from rasteret_dask.crs import CrsNumber, bring, carried, crs_of, number, same, text, wkt2
from rasteret_dask.errors import GridError
from rasteret_dask.grid import bounds_in, transformer

HLS = (
    'PROJCS["UTM Zone 19, Northern Hemisphere",GEOGCS["Unknown datum based upon the WGS 84 ellipsoid",'
    'DATUM["Not_specified_based_on_WGS_84_spheroid",SPHEROID["WGS 84",6378137,298.257223563]],'
    'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433]],PROJECTION["Transverse_Mercator"],'
    'PARAMETER["latitude_of_origin",0],PARAMETER["central_meridian",-69],PARAMETER["scale_factor",0.9996],'
    'PARAMETER["false_easting",500000],PARAMETER["false_northing",0],UNIT["metre",1]]'
)
"""As HLS v2 files have it."""

MODIS = (
    'PROJCS["unnamed",GEOGCS["Unknown datum based upon the custom spheroid",'
    'DATUM["Not specified (based on custom spheroid)",SPHEROID["Custom spheroid",6371007.181,0]],'
    'PRIMEM["Greenwich",0],UNIT["degree",0.0174532925199433,AUTHORITY["EPSG","9122"]]],PROJECTION["Sinusoidal"],'
    'PARAMETER["longitude_of_center",0],PARAMETER["false_easting",0],PARAMETER["false_northing",0],'
    'UNIT["Meter",1],AXIS["Easting",EAST],AXIS["Northing",NORTH]]'
)
"""As MODIS items have it under ``proj:wkt2``."""

CODES = (
    32619,
    32756,
    3035,
    5070,
    6350,
    3413,
    3031,
    6933,
    2154,
    27700,
    4326,
    4269,
    3857,
    2056,
    28992,
    2263,
    5041,
)
MORE_SENSORS = Path(__file__).parents[2] / "shared" / "data" / "more_sensors"


def _forms(code: int) -> list[Any]:
    """Return a registered CRS in the forms in which files, items and libraries give it."""
    crs = pyproj.CRS.from_epsg(code)
    renamed = crs.to_json_dict()
    renamed.pop("id")
    renamed["name"] = "A name of its own"
    return [
        code, np.int32(code), f"EPSG:{code}", f"epsg:{code}", f"+init=epsg:{code}", {"init": f"epsg:{code}"},
        f"urn:ogc:def:crs:EPSG::{code}", crs, crs.to_wkt(), crs.to_wkt("WKT1_GDAL"), crs.to_wkt("WKT1_ESRI"),
        crs.to_json(), crs.to_json_dict(), renamed, CRS.from_epsg(code), CRS.from_epsg(code).to_wkt(),
    ]  # fmt: skip


@pytest.mark.parametrize("code", CODES)
def test_every_form_of_a_registered_crs_is_its_code(code: int) -> None:
    assert [number(form) for form in _forms(code)] == [code] * len(_forms(code))
    assert text(code) == f"EPSG:{code}"


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(pyproj.database.query_crs_info("EPSG", pj_types=[PJType.PROJECTED_CRS])), st.booleans()
)
def test_any_registered_crs_written_out_is_itself_or_its_twin(info: Any, renamed: bool) -> None:
    crs = pyproj.CRS.from_epsg(info.code)
    fields = crs.to_json_dict()
    fields.pop("id")
    fields["name"] = "renamed" if renamed else fields["name"]

    found = number(fields)

    assert same(found, int(info.code))
    assert crs_of(found).equals(crs, ignore_axis_order=True)


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from(("laea", "sinu", "aea +lat_1=20 +lat_2=60", "tmerc", "stere")),
    st.integers(-89, 89),
    st.integers(-179, 179),
    st.sampled_from(("+ellps=GRS80", "+datum=WGS84", "+R=6371007.181")),
)
def test_a_crs_without_a_code_comes_back(projection: str, lat: int, lon: int, figure: str) -> None:
    proj = f"+proj={projection} +lat_0={lat} +lon_0={lon} {figure} +type=crs"
    crs = pyproj.CRS(proj)
    if projection.startswith("aea") and lat < -60:
        return

    found = number(proj)

    assert {number(form) for form in (crs, crs.to_wkt(), crs.to_json(), crs.to_json_dict())} == {found}
    assert found == number(found)
    ours, theirs = (pyproj.Transformer.from_crs(4326, c, always_xy=True) for c in (crs_of(found), crs))
    np.testing.assert_allclose(
        ours.transform(lon + 1.0, lat * 0.5), theirs.transform(lon + 1.0, lat * 0.5), atol=1e-6
    )
    if found < 0:
        assert found > -(2**31)
        assert found != number(proj.replace(f"+lon_0={lon}", f"+lon_0={lon + 0.5}"))


def test_names_and_unspecified_datums_make_no_other_crs() -> None:
    assert number(HLS) == 32619
    assert (
        number(HLS.replace("WGS 84", "GRS 1980").replace("298.257223563", "298.257222101")) < 0
    )  # which datum?
    assert number(MODIS) == number("+proj=sinu +lon_0=0 +x_0=0 +y_0=0 +R=6371007.181 +units=m") < 0
    assert number("OGC:CRS84") == 4326
    assert number("ESRI:102008") < 0
    assert text(number("ESRI:102008")) == "ESRI:102008"
    assert same(31468, 5678)  # Gauss-Krueger zone 4, north or east first
    assert not same(32619, 26919)  # WGS 84 and NAD83


def test_heights_are_left_out() -> None:
    compound = pyproj.CRS("EPSG:26911+5703")

    assert number(compound) == number(compound.to_json_dict()) == number(compound.to_wkt()) == 26911
    assert number(4979) == number(pyproj.CRS(4979).to_wkt()) == 4326
    assert number(5498) == 4269


def test_shifts_to_wgs84_beside_a_registered_crs_are_left_out_and_others_kept() -> None:
    dutch = pyproj.CRS(28992).to_wkt("WKT1_GDAL")
    shifted = dutch.replace("]],", "],TOWGS84[565.4,50.3,465.6,0.4,-0.35,1.88,4.08]],", 1)
    own = "+proj=tmerc +lat_0=49 +lon_0=-2 +k=0.9996 +x_0=400001 +ellps=airy +units=m +towgs84=446,-125,542,0,0,0,0"

    assert number(shifted) == 28992
    assert number(own) < 0
    assert number(own) != number(own.replace("446", "440"))


@pytest.mark.parametrize(
    ("crs", "reason"),
    [
        (99_999, "EPSG:99999"), ("EPSG:0", "a CRS: found none"), ("nonsense", "'nonsense'"), (None, "NoneType"),
        (True, "bool"), ("EPSG:5703", "Vertical"), (-12345, "no WKT2"), ({"type": "ProjectedCRS"}, "PROJ knows"),
        ("EPSG:4978", "Geocentric"), ("", "PROJ knows"),
    ],
)  # fmt: skip
def test_what_is_no_map_is_a_grid_error(crs: Any, reason: str) -> None:
    with pytest.raises(GridError, match=reason):
        number(crs)


def test_another_process_makes_the_same_number_and_gets_the_crs_by_pickle(tmp_path: Path) -> None:
    ours = number(MODIS)
    (tmp_path / "number").write_bytes(pickle.dumps({"epsg": ours}))
    script = (
        "import pickle, sys; from rasteret_dask.crs import crs_of, number, wkt2\n"
        "fields = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(crs_of(fields['epsg']).coordinate_operation.method_name, number(sys.argv[2]) == fields['epsg'])\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "number"), MODIS],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.split() == ["Sinusoidal", "True"]
    assert type(ours) is CrsNumber


def test_what_is_carried_is_brought_in_and_contradictions_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ours = number(MODIS)
    luggage = json.loads(json.dumps(carried([32619, ours, 0, ours])))
    monkeypatch.setattr(crs_module, "_WKT2", {})
    assert luggage == {str(ours): luggage[str(ours)]}
    with pytest.raises(GridError, match="no WKT2"):
        wkt2(ours)

    bring(luggage)
    bring(luggage)

    assert wkt2(ours) == luggage[str(ours)]
    with pytest.raises(GridError, match="of another CRS"):
        bring({ours: pyproj.CRS("ESRI:102008").to_wkt()})
    with pytest.raises(GridError, match="negative"):
        bring({32619: wkt2(32619)})


def test_transformers_and_bounds_take_numbers() -> None:
    modis = number(MODIS)

    x, y = transformer(modis, 4326).transform(0.0, 1_111_950.5197665)
    assert (x, y) == pytest.approx((0, 10), abs=1e-6)
    assert bounds_in((0, 0, 1, 1), 4326, modis)[2] == pytest.approx(111_195.05, abs=0.1)
    with pytest.raises(GridError, match="planet"):
        transformer(number("IAU_2015:49900"), 4326)


@pytest.mark.skipif(not MORE_SENSORS.is_dir(), reason="real items and files lie outside of the repository")
def test_real_modis_items_and_files_share_one_number() -> None:
    items = [
        json.loads(path.read_text())["properties"]
        for path in sorted((MORE_SENSORS / "modis").rglob("*.json"))
    ]
    told = {number(item[key]) for item in items for key in ("proj:wkt2", "proj:projjson") if item.get(key)}
    files = set()
    for path in (MORE_SENSORS / "modis").rglob("*.tif"):
        with rasterio.open(path) as file:
            files.add(number(file.crs))

    assert told == files == {number(MODIS)}


@pytest.mark.skipif(not MORE_SENSORS.is_dir(), reason="real items and files lie outside of the repository")
@pytest.mark.parametrize(
    ("path", "key", "code"),
    [
        ("other_dem/UT_StatewideSouth_2_2020-dsm-2m-0-7.json", "proj:projjson", 26911),
        ("land_cover_other/USGS_NLCD-2019-05-09.json", "proj:wkt2", 6350),
    ],
)
def test_real_items_with_a_registered_crs_written_out(path: str, key: str, code: int) -> None:
    assert number(json.loads((MORE_SENSORS / path).read_text())["properties"][key]) == code
