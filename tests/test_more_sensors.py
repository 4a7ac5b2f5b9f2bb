"""Real items of many sensors: each becomes a record with the right bands, or is refused with a reason."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import pytest

import rasteret_dask as rd
from rasteret_dask.catalogs.catalog import dataset_of
from rasteret_dask.table.layers import layers_of
from rasteret_dask.table.records import Records
from rasteret_dask.table.timing import acquisitions

Item = dict[str, Any]
Facts = tuple[str | None, str, float, float]  # common name, role, scale, offset

R, T, Q, D = "reflectance", "temperature", "quality", "data"

S2_LIGHT = {
    "B01": "coastal", "B02": "blue", "B03": "green", "B04": "red", "B05": "rededge071", "B06": "rededge075",
    "B07": "rededge078", "B08": "nir", "B8A": "nir08", "B09": "nir09", "B11": "swir16", "B12": "swir22",
}  # fmt: skip
LANDSAT_LIGHT = {"B2": "blue", "B3": "green", "B4": "red", "B5": "nir", "B6": "swir16", "B7": "swir22"}

LANDSAT_SR: dict[str, Facts] = {band: (common, R, 2.75e-5, -0.2) for band, common in LANDSAT_LIGHT.items()}
QA: dict[str, Facts] = {"qa_pixel": (None, Q, 1, 0), "qa_radsat": (None, Q, 1, 0)}
OLI: dict[str, Facts] = {
    "B1": ("coastal", R, 2.75e-5, -0.2), **LANDSAT_SR, **QA, "qa_aerosol": (None, Q, 1, 0),
}  # fmt: skip
TIRS: dict[str, Facts] = {"B10": ("lwir11", T, 0.00341802, 149.0)}
TM_THERMAL: dict[str, Facts] = {"lwir": ("lwir", T, 0.00341802, 149.0)}
HLS_S30: dict[str, Facts] = {b: (c, R, 1e-4, 0) for b, c in {**S2_LIGHT, "B10": "cirrus"}.items()} | {
    "Fmask": (None, Q, 1, 0)
}
CDSE: dict[str, Facts] = {b: (c, R, 1e-4, -0.1) for b, c in S2_LIGHT.items()} | {"SCL": (None, Q, 1, 0)}
STACTOOLS_S2: dict[str, Facts] = {
    b: ("rededge" if c.startswith("rededge") else c, D, 1e-4, -0.1) for b, c in S2_LIGHT.items()
} | {"aot": (None, D, 0.001, 0), "wvp": (None, D, 0.001, 0), "scl": (None, Q, 1, 0)}  # fmt: skip
L1C: dict[str, Facts] = {
    b: ("rededge" if c.startswith("rededge") else c, D, 1e-4, 0)
    for b, c in {**S2_LIGHT, "B10": "cirrus"}.items()
}

# written by hand from the products' guides; the catalog and the items are held against it
EXPECTED: dict[str, dict[str, Facts]] = {
    "landsat/stactools_c2l2/LC08_L2SP_047027_20201204_02_T1": OLI | TIRS,
    "landsat/stactools_c2l2/LT05_L2SP_010067_19860424_02_T2": LANDSAT_SR | QA | TM_THERMAL,
    "landsat/usgs_tm/LT05_L2SP_010067_19860424_20200918_02_T2_SR": LANDSAT_SR | QA,
    "landsat/usgs_tm/LT05_L2SP_010067_19860424_20200918_02_T2_ST": QA | TM_THERMAL,
    "landsat/usgs_oli-tirs/LC08_L2SP_047027_20201204_20210313_02_T1_SR": OLI,
    "landsat/usgs_oli-tirs/LC08_L2SP_047027_20201204_20210313_02_T1_ST": QA | TIRS,
    "landsat/scene_008059/LC08_L2SP_008059_20191201_20200825_02_T1_SR_stac": OLI,
    "landsat/scene_008059/LC08_L2SP_008059_20191201_20200825_02_T1_ST_stac": QA | TIRS,
    "landsat/l1/LM05_L1GS_039039_20130107_02_T2": QA | {
        "B1": ("green", D, 0.88504, 1.51496), "B2": ("red", D, 0.66024, 2.03976),
        "B3": ("nir08", D, 0.55866, 4.34134), "B4": ("nir09", D, 1, 0),
    },
    "hls/cmr/HLS.S30.T36MXE.2024006T075321.v2.0": HLS_S30,
    "hls/cmr/HLS.S30.T36NXF.2024006T075321.v2.0": HLS_S30,
    "hls/cmr/HLS.S30.T55LCL.2024001T003701.v2.0": HLS_S30,
    "sentinel2_cdse/S2A_MSIL2A_20200301T090901_N0500_R050_T35UPU_20230630T033416": CDSE,
    "sentinel2_cdse/S2B_MSIL2A_20200705T101559_N0500_R065_T32TNT_20230530T175912": CDSE,
    "sentinel2_cdse/S2C_MSIL2A_20260527T014651_N0512_R017_T55WFR_20260527T042005": CDSE,
    "sentinel2_l2a_stactools/S2A_T01WCP_20230625_L2A": STACTOOLS_S2,
    "sentinel2_l2a_stactools/S2B_T01VCG_20200914_L2A_N0500": STACTOOLS_S2 | {
        "cloud": (None, D, 1, 0), "snow": (None, D, 1, 0),
    },
    "sentinel2_l1c/S2A_T01LAC_20200717T221944_L1C": L1C,
    "sentinel2_l1c/S2A_T46RER_20210908_L1C": L1C,
    "modis/09Q1/MOD09Q1.A2022033.h10v10.061": {
        "sur_refl_b01": ("red", R, 1e-4, 0), "sur_refl_b02": ("nir08", R, 1e-4, 0),
        "sur_refl_state_250m": (None, Q, 1, 0),
    },
    "modis/09A1/MOD09A1.A2022033.h19v10.061": {
        **{f"sur_refl_b0{n}": (common, R, 1e-4, 0) for n, common in enumerate(
            ("red", "nir08", "blue", "green", None, "swir16", "swir22"), 1)},
        "sur_refl_state_500m": (None, Q, 1, 0),
    },
    "modis/13Q1/MOD13Q1.A2022017.h12v11.061": {
        "NDVI": (None, D, 1e-4, 0), "EVI": (None, D, 1e-4, 0), "red": ("red", R, 1e-4, 0),
        "nir": ("nir08", R, 1e-4, 0), "blue": ("blue", R, 1e-4, 0), "MIR": ("swir22", R, 1e-4, 0),
        "pixel_reliability": (None, Q, 1, 0),
    },
    "naip/pc/pr_m_1806550_ne_20_030_20221212_20230329": {
        "R": ("red", D, 1, 0), "G": ("green", D, 1, 0), "B": ("blue", D, 1, 0), "NIR": ("nir", D, 1, 0),
    },
    "sentinel1_rtc/pc/S1A_IW_GRDH_1SDV_20240419T045839_20240419T045904_053498_067DF2_rtc": {
        "vv": (None, D, 1, 0), "vh": (None, D, 1, 0),
    },
    "sentinel1_rtc/aws/S1A_20200103_17RMJ_ASC": {
        "vv": (None, D, 1, 0), "vh": (None, D, 1, 0),
    },
    "sentinel1_grd/pc/S1A_IW_GRDH_1SDV_20220428T034417_20220428T034442_042968_05213C": {
        "vv": (None, D, 1, 0), "vh": (None, D, 1, 0),
    },
    "esa_worldcover/ESA_WorldCover_10m_2021_v200_N00E006": {"MAP": (None, "class", 1, 0)},
    "cop_dem/pc/Copernicus_DSM_COG_10_S90_00_W180_00_DEM": {"DEM": (None, D, 1, 0)},
}  # fmt: skip

# geometry in metres: the item is wrong, and says so
REFUSED = {
    "sentinel1_rtc/pc_dh/S1A_IW_GRDH_1SDH_20191215T034818_20191215T034847_030353_0378EA_rtc": "no degrees"
}

OPTIONAL: dict[str, Facts] = {
    "emis": (None, D, 1e-4, 0), "emsd": (None, D, 1e-4, 0), "cdist": (None, D, 0.01, 0), "atran": (None, D, 1e-4, 0),
    "drad": (None, D, 0.001, 0), "urad": (None, D, 0.001, 0), "trad": (None, D, 0.001, 0), "qa": (None, D, 0.01, 0),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(data: Path) -> Path:
    if not (data / "more_sensors").is_dir():
        pytest.skip(f"no items of more sensors: {data / 'more_sensors'} is not there")
    return data / "more_sensors"


@pytest.fixture(scope="module")
def items(folder: Path) -> dict[str, Item]:
    """Return {path without .json: item} of all of them."""
    files = sorted(folder.rglob("*.json"))
    found = {str(f.relative_to(folder).with_suffix("")): json.loads(f.read_text()) for f in files}
    assert len(found) > 60
    return found


def facts(collection: rd.Collection, row: int = 0) -> dict[str, Facts]:
    assets = dict(collection.to_table(["assets"]).column(0)[row].as_py())
    return {b: (a["common_name"], what(a), a["scale"], a["offset"]) for b, a in assets.items()}


def what(asset: dict[str, Any]) -> str:
    """Return what a band is, as far as the table here tells it."""
    if asset["role"] == "quality":
        return "quality"
    return asset["kind"] if asset["kind"] in ("reflectance", "temperature", "class") else D


def built(*found: Item, **options: Any) -> rd.Collection:
    return rd.build_from_stac(list(found), name="more", headers=False, **options)


def test_every_item_becomes_a_record_or_says_why_not(items: dict[str, Item]) -> None:
    assert EXPECTED.keys() | REFUSED.keys() <= items.keys()
    for name, item in items.items():
        if name in REFUSED:
            with pytest.raises(rd.SourceError, match=REFUSED[name]):
                built(item)
            continue
        c = built(item)
        assert len(c) == 1, name
        assert len(c.bands) >= 1, name
        if name in EXPECTED:
            assert facts(c) == {band: pytest.approx(own) for band, own in EXPECTED[name].items()}, name


def test_every_asset_is_a_band_or_listed(items: dict[str, Item]) -> None:
    for name, item in items.items():
        if name in REFUSED:
            continue
        c = built(item)
        taken = {asset["asset"] for _, asset in c.to_table(["assets"]).column(0)[0].as_py()}
        left = c.left_out()
        assert taken | set(left.column("asset").to_pylist()) == set(item["assets"]), name
        assert not taken & set(left.column("asset").to_pylist()), name
        assert set(left.column("example").to_pylist()) <= {item["id"]}
        assert all(left.column("reason").to_pylist())


def test_the_order_of_assets_does_not_change_a_band(items: dict[str, Item]) -> None:
    for name, item in items.items():
        dataset = dataset_of(item.get("collection"))
        before = layers_of(item, dataset)
        for seed in range(3):
            keys = list(item["assets"])
            random.Random(seed).shuffle(keys)
            after = layers_of({**item, "assets": {k: item["assets"][k] for k in keys}}, dataset)
            assert after == before, name


def test_products_of_surface_temperature_are_there_when_asked_for(items: dict[str, Item]) -> None:
    for name in (
        "landsat/stactools_c2l2/LC08_L2SP_047027_20201204_02_T1",
        "landsat/usgs_tm/LT05_L2SP_010067_19860424_20200918_02_T2_ST",  # whose items say no scale
        "landsat/usgs_oli-tirs/LC08_L2SP_047027_20201204_20210313_02_T1_ST",
    ):
        assert facts(built(items[name], bands=list(OPTIONAL))) == OPTIONAL
        assets = dict(built(items[name], bands=["emis"]).to_table(["assets"]).column(0)[0].as_py())
        assert (assets["emis"]["nodata"], assets["emis"]["dtype"]) == ("-9999", "int16")


def test_reflectance_and_temperature_of_a_scene_stand_beside_each_other(items: dict[str, Item]) -> None:
    """USGS lists them as two items of one scene: neither replaces the other, or takes its band's place."""
    name = "landsat/usgs_tm/LT05_L2SP_010067_19860424_20200918_02_T2_"
    c = built(items[name + "SR"], items[name + "ST"])
    both = [facts(c, 0), facts(c, 1)]
    assert both[0]["B6"] == ("swir16", R, 2.75e-5, -0.2)
    assert "B6" not in both[1]
    assert both[1]["lwir"] == ("lwir", T, 0.00341802, 149.0)
    assert acquisitions(Records(c.to_table())).replaced == 0
    assert c.where(has_bands=["lwir"]).to_table(["id"]).column(0).to_pylist() == [items[name + "ST"]["id"]]
    assert c.where(has_bands=["swir16"]).to_table(["id"]).column(0).to_pylist() == [items[name + "SR"]["id"]]


def test_an_asset_has_one_name_in_all_items(items: dict[str, Item]) -> None:
    """``nir`` alone in one item, beside ``nir_20m`` and ``nir_60m`` in the next."""
    own = [item for name, item in items.items() if name.startswith("sentinel2_l2a_stactools")]
    c = built(*own)
    names: dict[str, set[str]] = {}
    for assets in c.to_table(["assets"]).column(0).to_pylist():
        for band, asset in assets:
            names.setdefault(asset["asset"], set()).add(band)
    assert {key: len(bands) for key, bands in names.items()} == dict.fromkeys(names, 1)
    assert names["nir"] == {"B08"}


def as_l30(item: Item) -> Item:
    """Return the item of HLS's Landsat half: the same form, OLI's own numbers (no real one is at hand)."""
    made = copy.deepcopy(item)
    made |= {"id": item["id"].replace("S30", "L30"), "collection": "HLSL30_2.0"}
    made["assets"] = {k: a for k, a in made["assets"].items() if not k.endswith(("B08", "B8A", "B12"))}
    return made


def test_hls_of_both_sensors_in_one_collection(items: dict[str, Item]) -> None:
    s30 = copy.deepcopy(items["hls/cmr/HLS.S30.T55LCL.2024001T003701.v2.0"])
    grid = {"proj:epsg": 32755, "proj:shape": [3660, 3660], "proj:transform": [30, 0, 3e5, 0, -30, 9e6]}
    s30["properties"] |= grid
    l30 = as_l30(s30)
    l30["properties"]["datetime"] = "2024-01-02T00:10:00Z"
    c = built(s30, l30)
    rows = {row["id"]: dict(row["assets"]) for row in c.to_table(["id", "assets"]).to_pylist()}
    assert rows[s30["id"]]["B05"]["common_name"] == "rededge071"
    assert rows[l30["id"]]["B05"]["common_name"] == "nir08"
    chips = c.harmonize(bands=["nir08", "red", "swir16"]).chips(64, min_coverage=0.1)
    (source,) = chips.planned.sources
    keys = {
        band: source.records.asset_field(code, "asset").to_pylist()
        for band, code in zip(source.plan.bands, source.plan.members[0].bands, strict=True)
    }
    assert keys == {"nir08": ["B8A", "B05"], "red": ["B04", "B04"], "swir16": ["B11", "B06"]}
    with pytest.raises(rd.BandError, match=r"'B05'.*rededge071, nir08|'B05'.*nir08, rededge071"):
        c.harmonize(bands=["B05"]).chips(64, min_coverage=0.1).explain()
    both = rd.merge(built(s30), rd.build_from_stac([l30], name="l30", headers=False))
    with pytest.raises(rd.BandError, match=r"'B05'.*common name: 'nir08' or 'rededge071'"):
        both.harmonize(bands=["B05"]).chips(64, min_coverage=0.1).explain()
    told = c.harmonize().chips(64, min_coverage=0.1).explain()
    assert {"nir08", "swir16", "swir22", "cirrus"} <= set(told["bands"]["more"])
    assert told["left_bands"]["more"] == {
        "rededge071": 1, "rededge075": 1, "rededge078": 1, "B08": 1, "nir09": 1, "lwir11": 1, "lwir12": 1,
    }  # fmt: skip
    assert "bands left: " in str(told)
