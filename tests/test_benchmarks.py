"""The benchmark's own arithmetic: what it counts, and what is written by hand beside a reader."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

sys.path.append(str(Path(__file__).parent / "benchmarks"))
import contender
import lines
import maps
import nginx
import readme_by_hand
from jobs import MapJob, ReadmeJob, read_job
from readme_plan import Source

AREA = MapJob(
    name="map", items="", table="", folder="", bands=("a", "b"), epsg=32633, resolution=10.0,
    box=(0.0, 0.0, 260.0, 200.0), size_px=8, stride_px=6, blend="mean", batch=5,
)  # fmt: skip
JOB = ReadmeJob(
    name="J4",
    items="",
    tables="",
    epsg=32633,
    area=(0.0, 0.0, 80.0, 40.0),
    dtype="float32",
    fill=True,
    chip_px=4,
)


@pytest.mark.parametrize("name", [n for n in contender.CONTENDERS if "README" in n or "worker" in n])
def test_contenders_of_the_readmes_job_are_there(name: str) -> None:
    """A renamed function would end the benchmark an hour after its start."""
    one = contender.CONTENDERS[name]
    assert callable(getattr(import_module(one.module), one.function))
    assert lines.count(one.code) > 0 or not one.code


def test_lines_of_code_are_those_of_statements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No docstring, comment, import or blank line counts; a call over three lines counts three."""
    (tmp_path / "part.py").write_text(
        '"""Docstring."""\n\nimport os\n\n\n# comment\ndef f():\n    """Docstring\n    in two lines."""\n'
        "    return max(\n        1,\n    )\n\n\nA = 1\n"
    )
    monkeypatch.setattr(lines, "__file__", str(tmp_path / "lines.py"))
    assert lines.count(["part"]) == 5
    assert lines.count(["part:f"]) == 4
    with pytest.raises(SystemExit, match=r"no g in part\.py"):
        lines.count(["part:g"])


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 60), st.integers(0, 30)), max_size=20))
def test_distinct_bytes_are_a_set(asked: list[tuple[str, int, int]]) -> None:
    """However requests overlap, a byte of a file counts once."""
    log = "".join(f"/{path} {size} bytes={start}-{start + size - 1}\n" for path, start, size in asked)
    assert nginx.distinct(log) == len(
        {(p, n) for p, start, size in asked for n in range(start, start + size)}
    )
    assert nginx.distinct("/a 7 -\n/a 7 -\n") == 7  # whole files


@pytest.mark.parametrize("fresh", [False, True])
def test_a_job_comes_back_from_its_file(tmp_path: Path, fresh: bool) -> None:
    """A flag that is off is left out, as an older checkout may not know it."""
    job = JOB.replace(fresh=fresh)
    path = job.write(tmp_path / "job.json")
    assert read_job(path) == job
    assert ("fresh" in path.read_text()) == fresh


@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_chips_by_hand_are_masked_then_filled(tmp_path: Path, dtype: str) -> None:
    """The next record fills exactly what clouds and nodata leave; the offset is not taken twice."""
    layout, ground = tmp_path / "layout", readme_by_hand.Ground((0.0, 0.0, 80.0, 40.0), 10.0)
    group = zarr.open_group(layout, mode="w")
    group.create_array("optical/bounds", data=np.array([[0.0, 0, 40, 40], [40, 0, 80, 40]]))
    missing = np.nan if dtype == "float32" else 65535
    for name, shape, kind, fill in (
        ("optical/pixels", (2, 1, 4, 4, 4), dtype, missing),
        ("optical/valid", (2, 1, 4, 4), "bool", False),
        ("embeddings/pixels", (2, 1, 2, 4, 4), "int8", -128),
        ("embeddings/valid", (2, 1, 4, 4), "bool", False),
    ):
        group.create_array(
            name, shape=shape, chunks=(1, *shape[1:]), shards=shape, dtype=kind, fill_value=fill
        )
    keys = ("red", "green", "blue", "nir")
    bands = {key: {"raster:bands": [{"scale": 1e-4, "offset": -0.1}]} for key in keys}
    items = {
        "s2": [
            {"assets": bands, "properties": {"earthsearch:boa_offset_applied": True}},
            {"assets": bands, "properties": {"earthsearch:boa_offset_applied": False}},
        ]
    }
    first, second = Source("s2", 0), Source("s2", 1)
    one, two = np.full((4, 8), 3000, np.uint16), np.full((4, 8), 5000, np.uint16)
    one[0], clouds = 0, np.full((4, 8), 4, np.uint8)
    clouds[1] = 9
    layers: dict[Source, list[NDArray[Any]]] = {
        first: [one] * 4 + [clouds],
        second: [two] * 4 + [np.full((4, 8), 4, np.uint8)],
    }
    vectors = [np.full((4, 8), 5, np.int8), np.full((4, 8), 6, np.int8)]
    vectors[1][3, 7] = -128
    job = JOB.replace(layout=str(layout), store=str(tmp_path / "store"), dtype=dtype)
    plan = [((first, second),), ((first,),)]
    readme_by_hand.write(job, plan, items, layers, vectors, ground)
    written: Any = zarr.open_group(job.store, mode="r")
    unit = 1 if dtype == "float32" else 1e4
    want = np.full((2, 1, 4, 4, 4), 0.3 * unit, np.float64)
    want[0, :, :, :2], want[1, :, :, :2] = 0.4 * unit, missing
    np.testing.assert_allclose(np.asarray(written["optical/pixels"][:]), want, rtol=1e-6)
    valid = np.asarray(written["embeddings/valid"][:])
    assert valid.sum() == valid.size - 1
    assert not valid[1, 0, 3, 3]


# A model over an area


def test_a_map_s_job_comes_back_from_its_file(tmp_path: Path) -> None:
    assert read_job(AREA.write(tmp_path / "job.json")) == AREA


@pytest.mark.parametrize("blend", ["mean", "hann", "centre"])
def test_windows_of_a_pixelwise_model_blend_to_the_model_of_the_whole(blend: str) -> None:
    """Whatever the weights: windows agree where they overlap."""
    job = AREA.replace(blend=blend)
    cube = np.random.default_rng(0).random((2, *job.shape), np.float32)
    made = maps.slide(job, cube, lambda pixels: pixels.mean(1, keepdims=True))
    np.testing.assert_allclose(made, cube.mean(0), rtol=1e-6)


def test_a_window_gives_the_pixels_that_are_nearest_to_its_middle() -> None:
    job = AREA.replace(blend="centre")
    numbers = iter(range(1000))
    made = maps.slide(job, np.zeros((2, *job.shape)), lambda pixels: np.stack(
        [np.full((1, 8, 8), next(numbers)) for _ in pixels]
    ))  # fmt: skip
    middles = np.array(maps.corners(job)) + 3.5
    for (y, x), window in np.ndenumerate(made):
        away = np.abs(middles - (y, x))
        assert away[int(window)].tolist() <= [away[:, 0].min(), away[:, 1].min()]


def test_the_score_of_a_window_is_a_mean_of_three_by_three() -> None:
    pixels = np.random.default_rng(0).integers(0, 12_000, (2, 4, 5, 6), np.uint16)
    line = np.tensordot(np.array(maps.WEIGHTS, float), pixels.astype(float), (0, 1))
    wide = np.pad(line, ((0, 0), (1, 1), (1, 1)), mode="edge")
    expected = sum(wide[:, y : y + 5, x : x + 6] for y in range(3) for x in range(3)) / 9
    np.testing.assert_allclose(maps.score(pixels)[:, 0], expected, rtol=1e-5)


def test_windows_that_do_not_end_at_the_edges_are_refused() -> None:
    with pytest.raises(SystemExit, match="do not end"):
        maps.corners(AREA.replace(stride_px=7))
