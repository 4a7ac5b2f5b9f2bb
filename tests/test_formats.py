"""Formats are read before anything else: newer ones name the version that is needed, damaged files are told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_ledger import deleted, flipped, truncated

import rasteret_dask as rd
from rasteret_dask import formats
from rasteret_dask.errors import FormatError, PlanError, RasteretDaskError, StoreError
from rasteret_dask.formats import Format
from rasteret_dask.ingest.tablecache import shelf_of
from rasteret_dask.net.sums import sealed
from rasteret_dask.tasks.jobfile import _read, read_note

NEEDED = r"of format 99, written by rasteret_dask 9\.9; .*pip install 'rasteret-dask>=9\.9'"


@given(st.integers(-3, 9) | st.none() | st.booleans() | st.text(max_size=2), st.integers(1, 5))
def test_exactly_one_format_is_read(found: Any, known: int) -> None:
    one = Format("thing", known, "Do it again.")
    note = {"format": found, "version": "9.9"}
    if found == known and not isinstance(found, bool):
        one.check("x", note)
        return
    with pytest.raises(FormatError) as caught:
        one.check("x", note)
    newer = isinstance(found, int) and not isinstance(found, bool) and found > known
    assert (">=9.9" in caught.value.remedy) == newer
    assert newer or caught.value.remedy == "Do it again."


# Saved plans


@pytest.fixture(scope="module")
def chips(s2: rd.Collection) -> rd.Chips:
    optical = s2.harmonize(bands=["red"], units="reflectance", time="3MS")
    return optical.chips(size=32, cell_km=0.96).sample(4).filter_pixels(min_valid=0.01)


@pytest.fixture(scope="module")
def saved(chips: rd.Chips, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("plans") / "plan"
    chips.save_plan(place)
    return place


@pytest.fixture
def plan(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "plan")
    return tmp_path / "plan"


def ids(plan: Path) -> list[str]:
    _read.cache_clear()
    return [i for batch in rd.stream_from(None, plan, 4) for i in batch["chip_id"]]


def rewritten(plan: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a plan's JSON as somebody would who knows its checksum."""
    text = json.loads((plan / "job.json").read_bytes())
    del text["checksum"]
    change(text)
    (plan / "job.json").write_bytes(sealed(text))


def test_a_plan_of_a_newer_format_says_which_version_reads_it(plan: Path, chips: rd.Chips) -> None:
    rewritten(plan, lambda text: text.update(format=99, version="9.9"))
    for read in (ids, chips.save_plan):
        with pytest.raises(FormatError, match=f"a saved plan {NEEDED}"):
            read(plan)
    text = json.loads((plan / "job.json").read_bytes())
    (plan / "job.json").write_text(json.dumps({**text, "checksum": "made in another way"}))
    with pytest.raises(FormatError, match=NEEDED):
        ids(plan)


def test_a_plan_of_before_formats_is_refused_by_name(plan: Path) -> None:
    text = json.loads((plan / "job.json").read_bytes())
    for name in ("format", "checksum", "tables", "meaning"):
        del text[name]
    (plan / "job.json").write_text(json.dumps(text))
    with pytest.raises(FormatError, match=r"a saved plan without a format.*Save it again with save_plan"):
        ids(plan)


def exits(plan: Path) -> int:
    """Ask for what models and stores need."""
    _read.cache_clear()
    chips = rd.open_plan(plan)
    _ = chips._layout, chips._model_chips
    return len(chips)


READ_BY = dict.fromkeys(("ground.json", "provenance.json", "law.json"), exits) | {"sizes.json": ids}
"""Files of a plan that batches need, and models and exports do not, or the other way round."""


@pytest.mark.parametrize("damage", [deleted, truncated, flipped])
def test_whatever_is_damaged_in_a_plan_is_told(
    plan: Path, saved: Path, damage: Callable[[Path], None]
) -> None:
    for file in sorted(saved.iterdir()):
        damage(plan / file.name)
        for read in (ids, exits):
            if file.name in READ_BY and READ_BY[file.name] is not read:
                read(plan)
                continue
            with pytest.raises(RasteretDaskError):
                read(plan)
        shutil.copyfile(file, plan / file.name)
    assert len(ids(plan)) == exits(plan) == 4


@pytest.mark.parametrize(
    "field", ["pixel_rules", "sources", "digest", "phase", "tables", "hierarchies", "maps"]
)
def test_a_plan_with_a_field_missing_or_unknown_is_told(plan: Path, field: str) -> None:
    text = json.loads((plan / "job.json").read_bytes())
    (plan / "job.json").write_text(json.dumps({k: v for k, v in text.items() if k != field}))
    with pytest.raises((StoreError, FormatError), match=r"checksum|without a format"):
        ids(plan)
    (plan / "job.json").write_text(json.dumps(text))
    rewritten(plan, lambda text: text.pop(field))
    with pytest.raises(StoreError, match=rf"plan .*a job.json that is none \(.*{field}.*[wW]rite it again"):
        ids(plan)
    (plan / "job.json").write_text(json.dumps(text))
    rewritten(plan, lambda text: text["sources"][0].update(colour="red"))
    with pytest.raises(StoreError, match=r"a job.json that is none .*colour"):
        ids(plan)


# Record tables


def test_a_table_notes_its_format(s2: rd.Collection, tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    s2.export(path)
    schema = pq.read_schema(path)
    assert json.loads(schema.metadata[b"rasteret_dask"]) == formats.TABLE.note
    assert rd.load(path).to_table().num_rows == len(s2)


@pytest.mark.parametrize("directory", [False, True])
def test_a_table_of_a_newer_format_says_which_version_reads_it(
    s2: rd.Collection, tmp_path: Path, directory: bool
) -> None:
    path = tmp_path / "t.parquet"
    s2.export(path)
    table = pq.read_table(path)
    note = json.dumps({"format": 99, "version": "9.9"}).encode()
    table = table.replace_schema_metadata({**table.schema.metadata, b"rasteret_dask": note})
    pq.write_table(table, path)
    place = tmp_path if directory else path
    with pytest.raises(FormatError, match=f"a record table {NEEDED}"):
        rd.load(place)
    for lazy in (table, pads.dataset(path)):
        with pytest.raises(FormatError, match=NEEDED):
            rd.as_collection(lazy, name="t")
    bare = table.replace_schema_metadata({b"rasteret_dask": b"{"})
    with pytest.raises(FormatError, match=r"of format None.*expected format 1"):
        rd.as_collection(bare, name="t")
    assert len(rd.as_collection(table.replace_schema_metadata(None), name="t")) == len(s2)  # anybody's table


def test_a_cached_table_of_a_newer_format_says_which_version_reads_it(tmp_path: Path) -> None:
    file, search = tmp_path / "records.parquet", tmp_path / "search.json"
    search.write_text(json.dumps({"made": {}}))
    assert shelf_of(str(file)) is not None
    search.write_text(json.dumps({**formats.TABLE.note, "made": {}}))
    assert shelf_of(str(file)) is not None
    search.write_text(json.dumps({"format": 99, "version": "9.9"}))
    with pytest.raises(FormatError, match=f"a record table {NEEDED}"):
        shelf_of(str(file))


# Stream states


def test_a_state_of_a_newer_format_says_which_version_reads_it(chips: rd.Chips) -> None:
    stream = chips.stream(2)
    state = stream.state_dict()
    assert {k: state[k] for k in formats.STATE.note} == formats.STATE.note
    chips.stream(2).load_state_dict({**state, "version": "0.0.7"})
    with pytest.raises(FormatError, match=f"load_state_dict: found a stream state {NEEDED}"):
        stream.load_state_dict({**state, "format": 99, "version": "9.9", "something": "new"})
    with pytest.raises(FormatError, match="format 0"):
        stream.load_state_dict({**state, "format": 0})
    with pytest.raises(PlanError, match="state_dict"):
        stream.load_state_dict({k: v for k, v in state.items() if k != "format"})


def test_notes_are_plain(saved: Path) -> None:
    assert read_note(str(saved))["version"] == rd.__version__
    assert pa.schema([]).with_metadata(formats.table_metadata()).metadata.keys() == {b"rasteret_dask"}
