"""The card of a store: what it says is what lies there, tools can read it, and verify checks it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import rasteret_dask as rd


@pytest.fixture(scope="module")
def chips(s2: rd.Collection) -> rd.Chips:
    return s2.harmonize(["red"], time="1MS").chips(32, cell_km=0.96).split(seed=1).sample(20)


@pytest.fixture(scope="module")
def store(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "store"
    chips.to_zarr(folder, progress=False)
    return folder


def test_the_card_says_what_lies_there(chips: rd.Chips, store: Path, s2: rd.Collection) -> None:
    text = (store / "README.md").read_text()
    table = pq.read_table(store / "chips.parquet")
    for split in set(table["split"].to_pylist()):
        assert f"| {split} | {table['split'].to_pylist().count(split)} |" in text
    records = {feed["record"] for row in table["feeds"].to_pylist() for feed in row}
    assert all(record in text for record in records)
    assert not [one for one in set(s2.to_table(["id"])["id"].to_pylist()) - records if one in text]
    assert "0 pairs of chips of two splits share ground" in text
    assert all(step in text for step in ("harmonize(", "chips(32", "split(", "sample(20)"))
    assert chips.job.digest in text


def test_croissant_has_what_its_specification_wants(store: Path) -> None:
    """Required properties of Croissant 1.0, references that lead somewhere, and a file that is the one it names."""
    document = json.loads((store / "croissant.json").read_text())
    wanted = {
        "@context",
        "@type",
        "name",
        "description",
        "conformsTo",
        "license",
        "distribution",
        "recordSet",
    }
    assert wanted <= document.keys()
    assert document["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    files = {one["@id"]: one for one in document["distribution"]}
    chips = files["chips.parquet"]
    assert {"@type", "name", "contentUrl", "encodingFormat", "sha256"} <= chips.keys()
    assert chips["sha256"] == hashlib.sha256((store / chips["contentUrl"]).read_bytes()).hexdigest()
    (records,) = document["recordSet"]
    schema = pq.read_schema(store / "chips.parquet")
    for one in records["field"]:
        assert one["dataType"] in {"sc:Text", "sc:Integer", "sc:Float", "sc:Boolean", "sc:Date"}
        assert one["source"]["fileObject"]["@id"] in files
        assert one["source"]["extract"]["column"] in schema.names
    assert records["key"]["@id"] in {one["@id"] for one in records["field"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of rdflib, by which mlcroissant reads JSON-LD
@pytest.mark.skipif(importlib.util.find_spec("mlcroissant") is None, reason="needs mlcroissant")
def test_mlcroissant_reads_it(store: Path) -> None:
    import mlcroissant

    dataset = mlcroissant.Dataset(jsonld=str(store / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    ids = [row["chips/chip_id"].decode() for row in dataset.records("chips")]
    assert sorted(ids) == sorted(rd.open_chips(store))


def test_verify_checks_the_card_and_readers_need_none(store: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(store, tmp_path / "copy"))
    (copy / "README.md").write_text("mine")
    (copy / "croissant.json").unlink()
    found = rd.verify(copy)
    assert (found.damaged, found.missing) == (("README.md",), ("croissant.json",))
    assert len(rd.open_chips(copy)) == 20


def test_equal_stores_have_equal_cards(chips: rd.Chips, store: Path, tmp_path: Path) -> None:
    chips.to_zarr(tmp_path / "elsewhere", progress=False)
    for name in ("README.md", "croissant.json"):
        assert (store / name).read_bytes() == (tmp_path / "elsewhere" / name).read_bytes()
