"""Sentinel-2's reflectance as OLI would measure it, held against NumPy and the published numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import record, table

import rasteret_dask as rd
from rasteret_dask.demo.world import World
from rasteret_dask.planning import plan as p
from rasteret_dask.planning.bandpass import COEFFICIENTS
from rasteret_dask.rules.units import OliReflectance
from rasteret_dask.streamfrom import stream_from
from rasteret_dask.table.assetkinds import with_fields
from rasteret_dask.table.records import Records
from rasteret_dask.tasks.job import shard_keys

CELLS: dict[str, Any] = {"cell_km": 0.96}
OLI: Final = "oli_reflectance"

# HLS user guide, "Coefficients of linear regression used to adjust from Sentinel-2A,B/MSI to Landsat 8/OLI"
PUBLISHED = """
B01 0.9959 -0.0002 0.9959 -0.0002
B02 0.9778 -0.004  0.9778 -0.004
B03 1.0053 -0.0009 1.0075 -0.0008
B04 0.9765 0.0009  0.9761 0.001
B8A 0.9983 -0.0001 0.9966 0.000
B11 0.9987 -0.0011 1.000  -0.0003
B12 1.003  -0.0012 0.9867 0.0004
"""
# Of B02, B03 and B04
SLOPES = {"sentinel-2a": [0.9778, 1.0053, 0.9765], "sentinel-2b": [0.9778, 1.0075, 0.9761]}
OFFSETS = {"sentinel-2a": [-0.004, -0.0009, 0.0009], "sentinel-2b": [-0.004, -0.0008, 0.001]}
BANDS = ["blue", "green", "red"]


def test_numbers_are_the_published_ones() -> None:
    rows = [line.split() for line in PUBLISHED.split("\n") if line]
    for column, platform in ((1, "sentinel-2a"), (3, "sentinel-2b")):
        expected = {row[0]: (float(row[column]), float(row[column + 1])) for row in rows}
        assert dict(COEFFICIENTS[platform]) == expected


def dataset(chips: rd.Chips) -> xr.Dataset:
    found = chips.to_xarray()
    assert isinstance(found, xr.Dataset)
    return found.compute()


def platforms(world: World) -> dict[np.datetime64, tuple[str, bool]]:
    """Return, by the time of an acquisition, its platform and whether its pixels have the offset removed."""
    texts = [json.loads(path.read_text()) for path in world.sentinel2.parent.rglob("*.json")]
    items = [t["properties"] for t in texts if t["type"] == "Feature"]
    return {
        np.datetime64(i["datetime"].replace("Z", ""), "us"): (
            i["platform"],
            i["earthsearch:boa_offset_applied"],
        )
        for i in items
    }


def test_chips_are_the_formula_on_stored_numbers(s2: rd.Collection, small_world: World) -> None:
    how: dict[str, Any] = {"size": 32, **CELLS}
    stored = dataset(s2.harmonize(BANDS, units="raw").chips(**how).sample(40))
    found = dataset(s2.harmonize(BANDS, units=OLI).chips(**how).sample(40))
    assert found["chip_id"].values.tolist() == stored["chip_id"].values.tolist()
    told = platforms(small_world)
    met = set()
    for i, when in enumerate(found["datetime"].values.ravel()):
        platform, removed = told[when]
        met.add((platform, removed))
        dn = stored["pixels"].values[i].astype(np.float64)
        slope, offset = (np.array(v[platform]).reshape(3, 1, 1) for v in (SLOPES, OFFSETS))
        expected = np.where(dn == 0, np.nan, slope * (dn * 1e-4 - (0 if removed else 0.1)) + offset)
        np.testing.assert_allclose(found["pixels"].values[i], expected, rtol=1e-6, atol=1e-8)
    assert met == {("sentinel-2a", False), ("sentinel-2a", True), ("sentinel-2b", True)}


def merged(s2: rd.Collection, l8: rd.Collection, **how: Any) -> rd.Collection:
    return rd.merge(s2, l8).harmonize(BANDS, resolution=10, **how)


def test_merged_landsat_stays_and_sentinel2_moves(
    s2: rd.Collection, l8: rd.Collection, small_world: World
) -> None:
    usual, found = (
        dataset(merged(s2, l8, units=units).chips(32, **CELLS).sample(40)) for units in ("physical", OLI)
    )
    told = platforms(small_world)
    assert set(found["member"].values.ravel()) == {"s2", "l8"}
    for i, member in enumerate(found["member"].values.ravel()):
        before, after = usual["pixels"].values[i], found["pixels"].values[i]
        if member == "l8":
            np.testing.assert_array_equal(after, before)
            continue
        platform, _ = told[found["datetime"].values.ravel()[i]]
        slope, offset = (np.array(v[platform]).reshape(3, 1, 1) for v in (SLOPES, OFFSETS))
        np.testing.assert_allclose(after, slope * before + offset, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("dtype", "pick"), [(None, "mean"), ("uint16", "clearest"), ("int16", "median")])
def test_chip_is_cube(s2: rd.Collection, l8: rd.Collection, dtype: Any, pick: Any) -> None:
    source = merged(s2, l8, units=OLI, time="1MS", mask="clouds", dtype=dtype, pick=pick)
    chips = dataset(source.chips(32, **CELLS).sample(12))
    other = dataset(
        merged(s2, l8, time="1MS", mask="clouds", dtype=dtype, pick=pick).chips(32, **CELLS).sample(12)
    )
    assert not np.array_equal(chips["pixels"].values, other["pixels"].values, equal_nan=dtype is None)
    for i in range(0, 12, 4):
        chip = chips.isel(chip=i)
        cube = source.cube(
            bounds=tuple(chip["bounds"].values.tolist()), crs=int(chip["epsg"]), min_coverage=1.0
        )
        np.testing.assert_array_equal(chip["pixels"].values, cube.compute(scheduler="sync").values)


def test_a_plan_comes_back_and_its_shards_have_keys_of_their_own(
    s2: rd.Collection, l8: rd.Collection, tmp_path: Path
) -> None:
    chips = merged(s2, l8, units=OLI).chips(32, **CELLS).sample(12)
    usual = merged(s2, l8).chips(32, **CELLS).sample(12)
    text = json.dumps(p.to_json(chips.plan))
    assert p.from_json(json.loads(text)) == chips.plan
    assert "Oli" in text
    assert "Oli" not in json.dumps(p.to_json(usual.plan))
    keys, others = set(shard_keys(chips.job).values()), set(shard_keys(usual.job).values())
    assert keys
    assert not keys & others
    chips.save_plan(tmp_path / "plan")
    batches = list(stream_from(None, tmp_path / "plan", 8))
    ids = [i for batch in batches for i in batch["chip_id"]]
    direct = dataset(chips)
    order = [direct["chip_id"].values.tolist().index(i) for i in ids]
    found = np.concatenate([np.asarray(batch["merged"]) for batch in batches])
    np.testing.assert_array_equal(
        found.reshape(len(ids), *found.shape[-3:]), direct["pixels"].values[order, 0]
    )


def test_a_store_tells_what_its_numbers_are(s2: rd.Collection, tmp_path: Path) -> None:
    chips = s2.harmonize(BANDS, units=OLI, dtype="uint16").chips(32, **CELLS).sample(4)
    chips.to_zarr(tmp_path / "chips.zarr")
    stored = rd.open_chips(tmp_path / "chips.zarr").to_xarray()
    assert isinstance(stored, xr.Dataset)
    np.testing.assert_array_equal(stored["pixels"].values, dataset(chips)["pixels"].values)
    text = (tmp_path / "chips.zarr" / "zarr.json").read_text()
    assert OLI in text
    assert "from sentinel-2a to OLI, HLS user guide" in text


def test_explain_tells_what_was_done_to_each_record(s2: rd.Collection, l8: rd.Collection) -> None:
    shown = str(merged(s2, l8, units=OLI).chips(32, **CELLS).explain())
    assert "then x 0.9765 +0.0009: from sentinel-2a to OLI, HLS user guide" in shown
    assert "then x 0.9761 +0.001: from sentinel-2b to OLI, HLS user guide" in shown
    assert "measured by OLI" in shown
    assert "OLI" not in str(merged(s2, l8).chips(32, **CELLS).explain())


def test_bands_by_name_leave_the_others(s2: rd.Collection) -> None:
    usual = dataset(s2.harmonize(["red", "nir"]).chips(32, **CELLS).sample(5))
    found = dataset(s2.harmonize(["red", "nir"], units={"red": OLI}).chips(32, **CELLS).sample(5))
    assert found["units"].values.tolist() == [OLI, "reflectance"]
    np.testing.assert_array_equal(found["pixels"].values[:, :, 1], usual["pixels"].values[:, :, 1])
    assert not np.array_equal(
        found["pixels"].values[:, :, 0], usual["pixels"].values[:, :, 0], equal_nan=True
    )


# --- what nobody published --------------------------------------------------------------------------------------


def made(band: str = "B04", dataset: str | None = "sentinel-2-l2a", **columns: Any) -> rd.Collection:
    """Return a collection of one record, of a band of some dataset."""
    row = record("r1", bands=("B04",), **columns)
    (_, asset), (_, levels) = row["assets"][0], row["headers_metadata"][0]
    row["assets"] = [(band, asset | {"dataset": dataset, "common_name": "red"})]
    row["headers_metadata"] = [(band, levels)]
    return rd.as_collection(table(row), name="made")


def laid(source: rd.Collection) -> Any:
    return source.harmonize(["red"], units=OLI).chips(32, **CELLS).job


@pytest.mark.parametrize(
    ("dataset", "band", "platform"),
    [
        ("sentinel-2-l2a", "B04", None),
        ("sentinel-2-l2a", "B04", "sentinel-2"),
        ("sentinel-2-l2a", "B04", "sentinel-2c"),
        ("sentinel-2-l2a", "B05", "sentinel-2a"),
        ("sentinel-2-l2a", "B08", "sentinel-2a"),
        ("sentinel-2-l1c", "B04", "sentinel-2a"),
        ("landsat-c2-l2", "B4", "landsat-7"),
        ("landsat-c2-l2", "B4", None),
        ("hls-s30", "B05", "sentinel-2a"),
        ("modis-09a1-061", "sur_refl_b01", "terra"),
        (None, "B04", "sentinel-2a"),
    ],
)
def test_what_has_no_coefficients_is_refused_by_name(
    dataset: str | None, band: str, platform: str | None
) -> None:
    with pytest.raises(rd.PlanError, match="HLS published") as refused:
        laid(made(band, dataset, platform=platform))
    text = str(refused.value)
    assert all(word in text for word in ("'made'", "'red'", "'r1'", str(dataset), str(platform), band))


@pytest.mark.parametrize(
    ("dataset", "band", "platform", "expected"),
    [
        ("sentinel-2-l2a", "B04", "sentinel-2a", (0.9765e-4, 0.0009)),
        ("sentinel-2-l2a", "B8A", "Sentinel-2B", (0.9966e-4, 0.0)),
        ("sentinel-2-c1-l2a", "B12", "SENTINEL-2B", (0.9867e-4, 0.0004)),
        ("landsat-c2-l2", "B4", "LANDSAT_8", (1e-4, 0.0)),
        ("landsat-c2-l2", "B4", "landsat-9", (1e-4, 0.0)),
        ("hls-l30", "B04", None, (1e-4, 0.0)),
        ("hls-s30", "B04", "sentinel-2a", (1e-4, 0.0)),
    ],
)
def test_platforms_as_catalogs_spell_them(
    dataset: str, band: str, platform: str | None, expected: tuple[float, float]
) -> None:
    records = laid(made(band, dataset, platform=platform)).records[0]
    scale, offset = (records.asset_field(band, field)[0].as_py() for field in ("scale", "offset"))
    assert (scale, offset) == pytest.approx(expected)


def test_the_remedies_work() -> None:
    rows = [record(f"r{n}", bands=("B04",), platform=f"sentinel-2{n}", when=f"2024-04-1{i}T10:00:00")
            for i, n in enumerate("abc")]  # fmt: skip
    for row in rows:
        row["assets"] = [("B04", row["assets"][0][1] | {"dataset": "sentinel-2-l2a"})]
    source = rd.as_collection(table(*rows), name="made")
    with pytest.raises(rd.PlanError) as refused:
        laid(source)
    start = str(refused.value).index("('platform', 'in', [")
    listed = str(refused.value)[start:].partition("[")[2].partition("]")[0].replace("'", "").split(", ")
    assert sorted(laid(source.where(("platform", "in", listed))).records[0].ids) == ["ra", "rb"]
    with pytest.raises(rd.PlanError, match="nir08"):
        laid(made("B08"))
    with pytest.raises(rd.PlanError, match="as you build it: dataset='sentinel-2-l2a'"):
        laid(made("B04", None))
    for other in (made("B08"), made("B04", None)):
        assert other.harmonize(["red"], units="reflectance").chips(32, **CELLS).job.shards()


def test_only_reflectance_can_be_like_olis(s2: rd.Collection) -> None:
    with pytest.raises(rd.PlanError, match="'scl', of kind class"):
        len(s2.harmonize(["red", "scl"], units=OLI).chips(32, **CELLS))
    assert s2.harmonize(["red"], units=OLI).plan == s2.harmonize(["red"], units=OliReflectance()).plan


@settings(max_examples=40)
@given(data=st.data())
def test_fields_of_one_band_change_in_any_slice(data: st.DataObject) -> None:
    some = st.sampled_from([("B04",), ("B08", "B04"), ("B02", "B08"), ()])
    rows = [
        record(f"r{n}", bands=bands)
        for n, bands in enumerate(data.draw(st.lists(some, min_size=1, max_size=6)))
    ]
    whole = pa.concat_tables([table(row) for row in rows]) if data.draw(st.booleans()) else table(*rows)
    first = data.draw(st.integers(0, len(rows) - 1))
    own = whole.slice(first, data.draw(st.integers(1, len(rows))))
    values = np.arange(1.0, len(own) + 1)
    found = with_fields(own, "B04", {"scale": pa.array(values)})
    assert found.schema == own.schema
    expected = own.to_pylist()
    for value, row in zip(values.tolist(), expected, strict=True):
        for band, asset in row["assets"]:
            asset["scale"] = value if band == "B04" else asset["scale"]
    assert found.to_pylist() == expected
    assert Records(found).asset_field("B04", "scale").null_count == sum(
        "B04" not in dict(row["assets"]) for row in expected
    )


def test_one_band_of_the_files_has_one_unit() -> None:
    msi = record("m", bands=("B04", "B08"))
    oli = record("o", bands=("B4",), platform="landsat-8", when="2024-04-12T10:00:00")
    (_, asset), (_, levels) = oli["assets"][0], oli["headers_metadata"][0]
    oli["assets"] = [("B5", asset | {"dataset": "landsat-c2-l2", "common_name": "nir", "asset": "nir08"})]
    oli["headers_metadata"] = [("B5", levels)]
    red, nir = (own for _, own in msi["assets"])
    msi["assets"] = [
        ("B8A", red | {"dataset": "sentinel-2-l2a", "common_name": "nir08", "asset": "nir08"}),
        ("B08", nir | {"dataset": "sentinel-2-l2a", "common_name": "nir", "asset": "nir"}),
    ]
    msi["headers_metadata"] = [(code, levels) for code in ("B8A", "B08")]
    both = rd.merge(*(rd.as_collection(table(row), name=row["id"]) for row in (msi, oli)))
    with pytest.raises(rd.PlanError, match=r"'nir08' like OLI's and 'nir' not, both B5.*rd\.join"):
        _ = both.harmonize(["nir", "nir08"], units={"B8A": OLI}).chips(32, **CELLS).job
    apart = rd.join(a=both.harmonize(["nir08"], units=OLI), b=both.harmonize(["nir"]))
    assert [source.units for source in apart.chips(32, **CELLS).job.sources] == [(OLI,), ("reflectance",)]
