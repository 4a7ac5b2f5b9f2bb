"""What an item's assets are called: a band is what it measures, however the item spells it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from rasteret_dask.catalogs.catalog import DATASETS
from rasteret_dask.errors import BandError
from rasteret_dask.table.layers import Layer, check_bands, layers_of, offer_of, restrict

COG = "image/tiff; application=geotiff; profile=cloud-optimized"

# (code, Earth Search's key, common name of STAC 1.0, metres)
MSI = [
    ("B02", "blue", "blue", 10), ("B03", "green", "green", 10), ("B04", "red", "red", 10), ("B08", "nir", "nir", 10),
    ("B05", "rededge1", "rededge", 20), ("B06", "rededge2", "rededge", 20), ("B8A", "nir08", "nir08", 20),
    ("B11", "swir16", "swir16", 20), ("B09", "nir09", "nir09", 60),
]  # fmt: skip

# what each sensor of Landsat calls a light, and what our records do: (sensor's number, key, common name, record's)
TM = [
    ("B1", "blue", "blue", "B2"), ("B2", "green", "green", "B3"), ("B3", "red", "red", "B4"),
    ("B4", "nir08", "nir08", "B5"), ("B5", "swir16", "swir16", "B6"), ("B7", "swir22", "swir22", "B7"),
    ("B6", "lwir", "lwir", "lwir"),
]  # fmt: skip
OLI = [
    ("B1", "coastal", "coastal", "B1"), ("B2", "blue", "blue", "B2"), ("B3", "green", "green", "B3"),
    ("B4", "red", "red", "B4"), ("B5", "nir08", "nir08", "B5"), ("B6", "swir16", "swir16", "B6"),
    ("B7", "swir22", "swir22", "B7"), ("B10", "lwir11", "lwir11", "B10"),
]  # fmt: skip
SENSORS = [("landsat-4", "LT04", TM), ("LANDSAT_5", "LT05", TM), ("landsat-7", "LE07", TM), ("LANDSAT_8", "LC08", OLI),
           ("Landsat-9", "LC09", OLI)]  # fmt: skip
THERMAL = ("B6", "B10")


def stac_item(version: str, assets: dict[str, dict[str, Any]], **properties: Any) -> dict[str, Any]:
    """Return an item of STAC 0.7, 1.0 or 1.1; each asset has ``name``, ``common``, ``href`` and ``type``."""
    item: dict[str, Any] = {"id": "a", "stac_version": version, "properties": dict(properties), "assets": {}}
    table: list[dict[str, Any]] = []
    for key, own in assets.items():
        asset = {k: v for k, v in own.items() if k not in ("name", "common")}
        band = {"name": own.get("name"), "common_name": own.get("common")}
        band = {k: v for k, v in band.items() if v is not None}
        if band and version.startswith("0"):
            asset["eo:bands"] = [len(table)]
            table.append(band)
        elif band and version == "1.0.0":
            asset["eo:bands"] = [band]
        elif band:
            asset["bands"] = [{{"common_name": "eo:common_name"}.get(k, k): v for k, v in band.items()}]
        item["assets"][key] = asset
    if table:
        item["properties"]["eo:bands"] = table
    return item


versions = st.sampled_from(["0.7.0", "1.0.0", "1.1.0"])


@st.composite
def copies_of_sentinel_2(draw: DrawFn) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Return assets of some bands, each in several spellings and sizes, and {band: the asset to be read}."""
    by_key = draw(st.booleans())
    assets, best = {}, {}
    for code, key, common, finest in draw(st.lists(st.sampled_from(MSI), min_size=1, unique=True)):
        base = key if by_key else code
        sizes = draw(
            st.lists(st.sampled_from([s for s in (10, 20, 60) if s >= finest]), min_size=1, unique=True)
        )
        spellings = draw(st.lists(st.sampled_from(["{}", "s3_{}", "{}-jp2"]), min_size=1, unique=True))
        ranked = []
        for size in sizes:
            for spelling in spellings:
                name = spelling.format(f"{base}_{size}m") if len(sizes) > 1 else spelling.format(base)
                suffix = "jp2" if spelling == "{}-jp2" else "tif"
                scheme = "s3" if spelling == "s3_{}" else "https"
                assets[name] = {
                    "href": f"{scheme}://host/{name}.{suffix}", "type": "image/jp2" if suffix == "jp2" else COG,
                    "gsd": size, "name": code, "common": common,
                }  # fmt: skip
                ranked.append((size, suffix == "jp2", scheme == "s3", name))
        best[code] = min(ranked)[-1]
    order = list(assets)
    random.Random(draw(st.integers(0, 999))).shuffle(order)
    return {name: assets[name] for name in order}, best


@given(copies_of_sentinel_2(), versions, st.booleans())
def test_spelling_order_and_version_do_not_change_a_band(
    drawn: tuple[dict[str, dict[str, Any]], dict[str, str]], version: str, known: bool
) -> None:
    assets, best = drawn
    offer = offer_of(stac_item(version, assets), DATASETS["sentinel-2-l2a"] if known else None)
    assert {band: layer.asset for band, layer in offer.layers.items()} == best
    held = {layer.asset for layer in offer.layers.values()}
    assert {key for key, _ in offer.left} == assets.keys() - held
    assert all(
        offer.layers[code].asset in why for key, why in offer.left for code in best if f"'{code}'" in why
    )
    commons = {code: common for code, _, common, _ in MSI}
    for band, layer in offer.layers.items():
        same = commons[band] == "rededge" or layer.common_name == commons[band]
        assert same


@given(
    st.sampled_from(SENSORS),
    versions,
    st.sampled_from(["{key}", "{product}_{number}", "{product}_{number}.TIF", "{number}"]),
    st.sampled_from(["{number}", "{product}_{number}", "{sensor}_{number}", None]),
    st.booleans(),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_a_landsat_band_is_what_its_sensor_measures(
    sensor: tuple[str, str, list[tuple[str, str, str, str]]],
    version: str,
    keys: str,
    names: str | None,
    commons: bool,
    by_id: bool,
    order: random.Random,
) -> None:
    """B6 is thermal on Landsat 4, 5 and 7, and swir16 on 8 and 9; each of four hints is enough."""
    platform, scene, table = sensor
    assets = {}
    for number, key, common, record in table:
        thermal = record.startswith(("lwir", "B10"))
        fields = {
            "key": key, "number": number, "product": "ST" if thermal else "SR",
            "sensor": ("TM" if table is TM else "TIRS" if thermal else "OLI"),
        }  # fmt: skip
        name = None if names is None else names.format(**fields)
        assets[keys.format(**fields)] = {
            "href": f"https://host/{number}.TIF", "type": COG, "name": name, "common": common if commons else None,
        }  # fmt: skip
    shuffled = list(assets)
    order.shuffle(shuffled)
    item = stac_item(version, {k: assets[k] for k in shuffled}, **({} if by_id else {"platform": platform}))
    item["id"] = f"{scene}_L2SP_010067_19860424_20200918_02_T2" if by_id else "scene"
    layers = layers_of(item, DATASETS["landsat-c2-l2"])
    expected = {record: f"https://host/{number}.TIF" for number, _, _, record in table}
    assert {band: layer.href for band, layer in layers.items()} == expected
    for band, layer in layers.items():
        assert layer.definition is not None
        assert (layer.definition.kind == "temperature") == (band in ("lwir", "B10"))


def test_a_thermal_band_alone_is_never_swir16() -> None:
    """An item that says neither its platform nor a scene's id."""
    asset = {"href": "https://host/x.TIF", "type": COG}
    for own in ({"name": "B6", "common": "lwir"}, {"name": "B6", "roles": ["data", "temperature"]}):
        layers = layers_of(stac_item("1.0.0", {"x": {**asset, **own}}), DATASETS["landsat-c2-l2"])
        assert "B6" not in layers
    assert list(layers_of(stac_item("1.0.0", {"ST_B6": asset}), DATASETS["landsat-c2-l2"])) == ["lwir"]
    found = layers_of(stac_item("1.0.0", {"x": {**asset, "name": "B6", "common": "lwir"}}), None)
    assert found["B6"].thermal


def test_a_wavelength_contradicts_a_common_name() -> None:
    """MODIS's band 5, 1.24 um, is called lwir12 in stactools' items."""
    item = stac_item("1.0.0", {"b05": {"href": "a.tif", "name": "b05", "common": "lwir12"}})
    item["assets"]["b05"]["eo:bands"][0]["center_wavelength"] = 1.24
    layer = layers_of(item, None)["b05"]
    assert (layer.common_name, layer.thermal) == (None, False)
    item["assets"]["b05"]["eo:bands"][0]["center_wavelength"] = 12.0
    assert layers_of(item, None)["b05"].thermal


@pytest.mark.parametrize("others", [{}, {"coarse": "Band1"}, {"mask": "gray"}])
def test_words_of_gdal_are_no_names(others: dict[str, str]) -> None:
    """Else the same asset would be ``Band1`` in one item and ``map`` in the next."""
    assets = {key: {"href": f"{key}.tif", "name": name} for key, name in {"map": "Band1", **others}.items()}
    assert list(layers_of(stac_item("1.0.0", assets), None)) == ["map", *others]


def test_two_bands_of_one_name_keep_their_keys() -> None:
    assets = {key: {"href": f"{key}.tif", "name": "vv"} for key in ("sigma", "gamma")}
    assert list(layers_of(stac_item("1.0.0", assets), None)) == ["sigma", "gamma"]
    picture = {"href": "rgb.tif", "bands": [{"name": n} for n in ("B04", "B03", "B02")]}
    item = stac_item("1.1.0", {"red": {"href": "red.tif", "name": "B04"}})
    item["assets"]["rgb"] = picture
    assert list(layers_of(item, None)) == ["B04", "rgb_1", "B03", "B02"]


@pytest.mark.parametrize(
    "media",
    ["image/tiff", "image/x.geotiff", "application/geotiff", "application/octet-stream", "", None, "IMAGE/TIFF; a=b",
     "binary/octet-stream", "image/vnd.something", 7],
)  # fmt: skip
@pytest.mark.parametrize("href", ["a.tif", "s3://b/A.TIFF", "https://h/a.tif?token=x", "a.jp2"])
def test_what_ends_as_a_tiff_is_taken(media: Any, href: str) -> None:
    item = {"id": "a", "properties": {}, "assets": {"x": {"href": href, "type": media}}}
    assert list(layers_of(item, None)) == ["x"]


@pytest.mark.parametrize(
    ("key", "asset", "why"),
    [
        ("q", {"href": "q.png", "type": "image/png"}, "image/png"),
        ("q", {"href": "q.tif", "type": "image/jpeg"}, "image/jpeg"),
        ("q", {"href": "q.png"}, "type is unknown"),
        ("q", {"href": "a.tif.aux.xml", "type": "application/xml"}, "application/xml"),
        ("q", {"href": "a.hdf", "type": "application/x-hdf"}, "application/x-hdf"),
        ("q", {"href": "a.tif", "roles": ["overview"]}, "its role is overview"),
        ("tci_10m", {"href": "a.tif"}, "preview"),
        ("q", {"type": "image/tiff"}, "no href"),
        ("q", "text", "no fields"),
    ],
)
def test_what_is_left_out_has_a_reason(key: str, asset: Any, why: str) -> None:
    item = {"id": "a", "properties": {}, "assets": {"x": {"href": "x.tif"}, key: asset}}
    offer = offer_of(item, None)
    assert list(offer.layers) == ["x"]
    ((left, reason),) = offer.left
    assert left == key
    assert why in reason


def test_every_asset_is_a_band_or_left_out() -> None:
    item = {
        "id": "a", "properties": {},
        "assets": {
            "red": {"href": "r.tif"}, "purple": {"href": "p.tif"}, "red-jp2": {"href": "r.jp2"},
            "meta": {"href": "m.xml"},
        },
    }  # fmt: skip
    for dataset in (None, DATASETS["sentinel-2-l2a"]):
        offer = offer_of(item, dataset)
        taken = {layer.asset for layer in offer.layers.values()}
        assert taken | {key for key, _ in offer.left} == set(item["assets"])
        assert not taken & {key for key, _ in offer.left}


def test_optional_bands_are_kept_where_they_are_asked_for() -> None:
    assets = {key: {"href": f"{key}.TIF"} for key in ("red", "emis", "cdist", "lwir11")}
    layers = layers_of(stac_item("1.0.0", assets), DATASETS["landsat-c2-l2"])
    assert list(restrict(layers, None)) == ["B4", "B10"]
    assert list(restrict(layers, ["emis", "lwir11"])) == ["B10", "emis"]
    check_bands([layers], ["cdist"])
    with pytest.raises(BandError, match="emis"):
        check_bands([layers], ["purple"])


@pytest.mark.parametrize("dataset", ["hls-s30", "hls-l30"])
def test_hls_bands_are_in_physical_order(dataset: str) -> None:
    """The numbers of both sensors, by their common names (HLS user guide 2.0, table 3)."""
    commons = {band.common_name: band.code for band in DATASETS[dataset].bands if band.common_name}
    assert commons["nir08"] == {"hls-s30": "B8A", "hls-l30": "B05"}[dataset]
    assert commons["swir16"] == {"hls-s30": "B11", "hls-l30": "B06"}[dataset]
    thermal = [band for band in DATASETS[dataset].bands if band.kind == "temperature"]
    kelvin = [np.float64(2500) * band.scale + band.offset for band in thermal]  # 25 degrees Celsius
    assert kelvin == pytest.approx([298.15] * {"hls-s30": 0, "hls-l30": 2}[dataset])


def test_a_layer_knows_its_copies_best_first() -> None:
    assets = {
        f"B04_{m}m": {"href": f"{m}.jp2", "type": "image/jp2", "gsd": 10 if m == 60 else m}
        for m in (60, 10, 20)
    }  # CDSE's gsd of B07_60m is 20
    layer: Layer = layers_of(stac_item("1.0.0", assets), None)["B04"]
    assert [one.asset for one in (layer, *layer.copies)] == ["B04_10m", "B04_20m", "B04_60m"]
