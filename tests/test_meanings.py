"""Names of bands inside one table: the same name means the same in every record."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_records import record, table

import rasteret_dask as rd
from rasteret_dask.table.meanings import meanings_of, told_apart
from rasteret_dask.table.records import Records

CODES = ["B05", "B8A", "B04", "x"]
COMMONS = ["nir08", "rededge", "red", None]


def rows(*scenes: dict[str, str | None]) -> Any:
    """Return a record for each {code: common name}."""
    made = []
    for n, scene in enumerate(scenes):
        row = record(f"r{n}", bands=("data",) * len(scene))
        for field in ("assets", "headers_metadata"):
            row[field] = [(code, own) for code, (_, own) in zip(scene, row[field], strict=True)]
        row["assets"] = [
            (code, {**own, "common_name": scene[code], "asset": code, "href": f"s3://b/r{n}/{code}.tif"})
            for code, own in row["assets"]
        ]
        made.append(row)
    return table(*made)


scenes = st.lists(
    st.dictionaries(st.sampled_from(CODES), st.sampled_from(COMMONS), min_size=1), min_size=1, max_size=5
)


@given(scenes)
def test_a_name_means_one_thing_in_a_table(drawn: list[dict[str, str | None]]) -> None:
    before = rows(*drawn)
    after = told_apart(before)
    meant: dict[str, set[str]] = {}
    found = after.to_pylist()
    for scene, row in zip(drawn, found, strict=True):
        names = [band for band, _ in row["assets"]]
        assert len(names) == len(set(names)) == len(scene)
        assert [band for band, _ in row["headers_metadata"]] == names
        for (band, asset), (code, common) in zip(row["assets"], scene.items(), strict=True):
            assert asset["asset"] == code  # nothing is moved, only called otherwise
            if common is not None:
                meant.setdefault(band, set()).add(common)
                once = all(list(s.values()).count(common) <= 1 for s in drawn)
                keys = {c for s in drawn for c, other in s.items() if other == common}
                assert (
                    band == common if once and len(keys) > 1 else band in (code, common, f"{common}_{code}")
                )
    assert all(len(commons) == 1 for commons in meant.values())
    assert told_apart(after).equals(after)
    for scene, row in zip(drawn, found, strict=True):
        for code, common in scene.items():
            if common is not None and all(list(s.values()).count(common) <= 1 for s in drawn):
                name = Records(after).band_names(common)[""]
                assert dict(row["assets"])[name]["asset"] == code


@given(scenes)
def test_a_code_that_means_several_bands_is_refused(drawn: list[dict[str, str | None]]) -> None:
    after = told_apart(rows(*drawn))
    for code in CODES:
        commons = {scene[code] for scene in drawn if scene.get(code) is not None}
        if len(commons) > 1:
            assert len(meanings_of(after.schema)[code]) == len(commons)
            with pytest.raises(rd.BandError, match=r"means [23] bands") as caught:
                Records(after).band_names(code)
            for name in meanings_of(after.schema)[code]:  # the remedy works
                assert repr(name) in str(caught.value)
                assert Records(after).band_names(name)[""] == name


def test_other_tables_are_what_they_were() -> None:
    own = rows({"B05": "rededge", "B06": "rededge", "B04": "red"}, {"B04": "red", "SCL": None})
    assert told_apart(own) is own
    sliced = rows({"B05": "red"}, {"B05": "nir08"}, {"B8A": "nir08"}).slice(1)
    assert [b for b, _ in told_apart(sliced).column("assets")[0].as_py()] == ["nir08"]


def test_a_wider_common_name_is_no_other_band() -> None:
    """STAC 1.0 calls rededge what 1.1 calls rededge071: the same code of the same sensor."""
    own = rows({"B05": "rededge", "B06": "rededge"}, {"B05": "rededge071", "B06": "rededge075"})
    assert told_apart(own) is own
    old, new = (rd.as_collection(own.slice(n, 1), name=f"c{n}") for n in range(2))
    bands = rd.merge(old, new).harmonize(bands=["B05"]).chips(32, cell_km=1.28).explain()["bands"]
    assert list(bands.values()) == [["B05"]]


def test_a_collection_of_both_reads_each_record_s_own_band() -> None:
    c = rd.as_collection(
        rows({"B05": "nir08", "B04": "red"}, {"B05": "rededge", "B8A": "nir08", "B04": "red"}), name="hls"
    )
    (source,) = c.harmonize(bands=["nir08"]).chips(32, cell_km=1.28).planned.sources
    hrefs = source.records.asset_field(source.plan.members[0].bands[0], "href").to_pylist()
    assert hrefs == ["s3://b/r0/B05.tif", "s3://b/r1/B8A.tif"]
    assert c.harmonize().chips(32, cell_km=1.28).explain()["bands"]["hls"] == ["nir08", "B04"]
    only = c.where(has_bands=["rededge"]).harmonize(bands=["rededge"])
    assert only.chips(32, cell_km=1.28).explain()["records"]["hls"]["scanned"] == 1


def test_members_of_a_merge_are_told_apart_too() -> None:
    l30 = rd.as_collection(rows({"B05": "nir08", "B04": "red"}), name="l30")
    s30 = rd.as_collection(rows({"B05": "rededge", "B8A": "nir08", "B04": "red"}), name="s30")
    with pytest.raises(rd.BandError, match=r"nir08 in 'l30'; rededge in 's30'.*'nir08' or 'rededge'"):
        rd.merge(l30, s30).harmonize(bands=["B05"]).chips(32, cell_km=1.28).explain()
    told = rd.merge(l30, s30).harmonize(bands=["nir08"]).chips(32, cell_km=1.28).explain()
    assert told["bands"]["l30+s30" if "l30+s30" in told["bands"] else "merged"] == ["nir08"]


def test_without_bands_every_record_s_own_are_taken() -> None:
    c = rd.as_collection(rows({"B04": "red", "B8A": "nir08"}, {"B04": "red", "x": None}), name="c")
    told = c.harmonize().chips(32, cell_km=1.28).explain()
    assert told["bands"]["c"] == ["B04"]
    assert told["left_bands"]["c"] == {"B8A": 1, "x": 1}
    assert "bands left: B8A (1 of 2 records), x (1 of 2 records)" in str(told)
    with pytest.raises(rd.PlanError, match=r"none that all 2 records have \(red in 1, x in 1\).*has_bands"):
        rd.as_collection(rows({"B04": "red"}, {"x": None}), name="c").chips(32, cell_km=1.28).explain()
