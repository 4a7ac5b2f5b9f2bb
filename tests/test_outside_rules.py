"""Rules from outside of the package, end to end: one class in one file each, and nothing else to change."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pytest
import xarray as xr
from distributed import Client, LocalCluster
from outside_rules import ClearMiddle, CloudThenLast, DarkWater, Feet, Medoid, Share
from passing import CELLS, SIDE, Asked, Passing, assert_interpreted, make
from test_picking import cloud_of, scaled

import rasteret_dask as rd
from rasteret_dask.errors import PlanError
from rasteret_dask.rules.masks import Mask
from rasteret_dask.rules.picks import Candidates, Composed, Ranked
from rasteret_dask.rules.units import Unit
from rasteret_dask.rules.values import from_json
from rasteret_dask.streamfrom import stream_from
from rasteret_dask.tasks.jobfile import open_job, write_job

Array = np.ndarray[Any, Any]
HERE = str(Path(__file__).parent)
BANDS = ("a", "b")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Passing:
    return make(tmp_path_factory.mktemp("outside"), 21, dtype="int16")


def metres(band: str, stored: Array, scene: Any) -> Array:
    feet = stored.astype(np.float64) / 10
    return np.where(feet < -250, np.nan, feet * 0.3048).astype(np.float32)


def in_steps(band: str, values: Array) -> tuple[Array, Array]:
    number = np.rint(np.nan_to_num(values.astype(np.float64)) * 10)
    return np.clip(number, 0, 65534), ~np.isnan(values) & ((number < 0) | (number > 65534))


def shares(values: Array) -> Array:
    total = values.sum(axis=0)
    return (values / np.where(total > 0, total, np.nan)).astype(np.float32)


def late(own: Any, distance: float) -> tuple[Any, ...]:
    cloud = cloud_of(own)
    return (cloud > 20, cloud if cloud > 20 else 0.0, -own[0].start.value)


def inner(clear: Array) -> float:
    return float(clear[SIDE // 4 : -(SIDE // 4), SIDE // 4 : -(SIDE // 4)].sum())


NEAREST: Any = {"order": lambda own, distance: distance}
RULES: dict[str, tuple[dict[str, Any], Asked, Any]] = {
    "ranked": ({"pick": CloudThenLast()}, Asked(BANDS, order=late, decode=scaled), np.nan),
    "ranked, filled": (
        {"pick": CloudThenLast(fill=True), "mask": "clouds"},
        Asked(
            BANDS, order=late, decode=scaled, fill=True, hidden=lambda read: np.isin(read["scl"], (3, 8, 9, 10))
        ),
        np.nan,
    ),
    "scored": (
        {"pick": ClearMiddle(), "fill": True, "mask": "clouds"},
        Asked(BANDS, score=inner, decode=scaled, fill=True, hidden=lambda read: np.isin(read["scl"], (3, 8, 9, 10))),
        np.nan,
    ),
    "mask of two bands": (
        {"mask": DarkWater()},
        Asked(
            BANDS, **NEAREST, decode=scaled, hidden_by=("scl", "b"),
            hidden=lambda read: (read["scl"] == 6) & (read["b"] < 2000),
        ),
        np.nan,
    ),
    "unit": ({"units": Feet(), "fill": True}, Asked(BANDS, **NEAREST, decode=metres, fill=True), np.nan),
    "unit as integers": (
        {"units": Feet(), "dtype": "uint16", "fill": True},
        Asked(BANDS, **NEAREST, decode=metres, encode=in_steps, fill=True),
        65535,
    ),
    "unit of all bands": (
        {"units": Share(), "fill": True},
        Asked(BANDS, **NEAREST, decode=lambda b, s, _: np.maximum(s, 0).astype(np.float32), finish=shares, fill=True),
        np.nan,
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_from_outside_makes_the_pixels_that_it_says(world: Passing, rule: str) -> None:
    how, asked, fill = RULES[rule]
    chips = world.source.harmonize(BANDS, time="1MS", **how).chips(SIDE, min_coverage=0.0, **CELLS)
    assert assert_interpreted(world.scenes, chips, asked, fill) > 10 * SIDE * SIDE


def medoid_chips(world: Passing) -> rd.Chips:
    source = world.source.harmonize(BANDS, time="1MS", pick=Medoid(), mask=DarkWater(), units=Feet())
    return source.chips(SIDE, min_coverage=0.0, **CELLS)


def test_a_medoid_keeps_bands_together(world: Passing) -> None:
    """Each pixel is one acquisition's, in all bands, and none is nearer to the median."""
    source = world.source.harmonize(BANDS, time="1MS", pick=Medoid(), units=Feet())
    first = world.source.harmonize(BANDS, units=Feet())
    made = source.chips(SIDE, min_coverage=0.0, **CELLS).load()
    alone = first.chips(SIDE, min_coverage=0.0, **CELLS).load()
    assert isinstance(made, xr.Dataset)
    assert isinstance(alone, xr.Dataset)
    compared = 0
    for chip, bounds in enumerate(made["bounds"].values.tolist()):
        here = np.flatnonzero((alone["bounds"].values == bounds).all(axis=1))
        months = alone["datetime"].values[here, 0].astype("datetime64[M]")
        for slot, time in enumerate(made["time"].values):
            stack = alone["pixels"].values[here[months == time.astype("datetime64[M]")], 0]
            found = made["pixels"].values[chip, slot]
            if not len(stack):
                assert np.isnan(found).all()
                continue
            whole = ~np.isnan(stack).any(axis=1)
            np.testing.assert_array_equal(~np.isnan(found).any(axis=0), whole.any(axis=0))
            for y, x in np.argwhere(whole.any(axis=0))[::7].tolist():
                own = stack[whole[:, y, x], :, y, x].astype(np.float64)
                far = np.square(own - np.median(own, axis=0)).sum(axis=1)
                distance = np.square(found[:, y, x] - np.median(own, axis=0)).sum()
                assert (own == found[:, y, x]).all(axis=1).any()
                np.testing.assert_allclose(distance, far.min(), rtol=1e-9)
                compared += 1
    assert compared > 500


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    """Return the client of two worker processes that can import this folder."""
    path = os.pathsep.join([HERE, os.environ.get("PYTHONPATH", "")])
    with (
        dask.config.set({"distributed.nanny.pre-spawn-environ.PYTHONPATH": path}),
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster, set_as_default=False) as running,
    ):
        yield running


def test_rules_from_outside_reach_every_exit(world: Passing, client: Client, tmp_path: Path) -> None:
    chips = medoid_chips(world)
    here = chips.load()
    assert isinstance(here, xr.Dataset)
    lazy = chips.to_xarray()
    assert isinstance(lazy, xr.Dataset)
    xr.testing.assert_identical(here, lazy.compute(scheduler="sync"))
    with client.as_current():
        xr.testing.assert_identical(here, lazy.compute())
    chips.to_zarr(tmp_path / "store", client=client, progress=False)
    stored = rd.open_chips(tmp_path / "store").load()
    assert isinstance(stored, xr.Dataset)
    np.testing.assert_array_equal(stored["pixels"].values, here["pixels"].values)
    chips.save_plan(tmp_path / "plan")
    for stream in (
        chips.stream(4),
        chips.stream(4, client=client),
        stream_from(client, tmp_path / "plan", 4),
    ):
        batches = list(stream)
        (pixels,) = {key for key, values in batches[0].items() if values.ndim == 5}
        np.testing.assert_array_equal(np.concatenate([b[pixels] for b in batches]), here["pixels"].values)


def test_plans_name_rules_from_outside_and_come_back(world: Passing, tmp_path: Path) -> None:
    chips = medoid_chips(world)
    assert "pick=Medoid()" in repr(chips)
    assert "units=Feet(per_foot=0.3048)" in repr(chips)
    shown = str(chips.explain())
    assert "pick medoid, mask DarkWater(below=2000)" in shown
    write_job(chips.job, str(tmp_path / "job"))
    again = open_job(str(tmp_path / "job"), chips.job.digest)
    assert again.sources[0].rules == chips.job.sources[0].rules
    assert again.sources[0].members == chips.job.sources[0].members
    other = world.source.harmonize(BANDS, time="1MS", pick=Medoid(), mask=DarkWater(below=1999), units=Feet())
    assert other.chips(SIDE, min_coverage=0.0, **CELLS).job.digest != chips.job.digest


CODE = """
import dataclasses
import numpy as np
from rasteret_dask.rules.picks import Ranked

@dataclasses.dataclass(frozen=True)
class Mine(Ranked):
    fill: bool = False

    def order(self, candidates):
        return {order}
"""


def known_as(folder: Path, code: str, name: str = "mine") -> Any:
    """Return how another process knows a rule that stands in a module."""
    (folder / f"{name}.py").write_text(textwrap.dedent(code))
    script = f"import json, {name}; print(json.dumps({name}.Mine().to_json()))"
    path = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-B", "-c", script],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def test_a_method_that_changes_makes_another_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = known_as(tmp_path, CODE.format(order="candidates.start"), "my_rule_a")
    two = known_as(tmp_path, CODE.format(order="-candidates.start"), "my_rule_a")
    same = known_as(tmp_path, CODE.format(order="candidates.start"), "my_rule_a")
    assert one == same != two
    with pytest.raises(PlanError, match="Put it into a module that is installed here and on every worker"):
        from_json(one)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert from_json(one).to_json() == one  # the remedy works
    with pytest.raises(PlanError, match=r"methods other than those of the plan.*make the plan anew"):
        from_json(two)


@pytest.mark.parametrize("name", ["json:JSONDecoder", "json:dumps", "rasteret_dask.errors:PlanError"])
def test_what_is_no_rule_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match="a type that is no rule"):
        from_json({"rule": name, "source": "", "fields": {}})


@pytest.mark.parametrize(
    "name", ["no_such_module_at_all:Rule", "outside_rules:Nothing", "outside_rules:Feet.<locals>.X"]
)
def test_what_cannot_be_imported_is_told(name: str) -> None:
    with pytest.raises(PlanError, match="no such type in this process"):
        from_json({"rule": name, "source": "", "fields": {}})


@dataclasses.dataclass(frozen=True)
class Shallow(Unit):
    """The same as one that is written inside a function."""

    name = "shallow"

    def decode(self, stored: Array, scaling: Any) -> Array:
        return stored.astype(np.float32) / 2


def test_a_rule_inside_a_function_works_here_and_is_refused_where_it_is_written(
    world: Passing, tmp_path: Path
) -> None:
    """A plan that nobody could open again is not written; the remedy is tried."""

    @dataclasses.dataclass(frozen=True)
    class Deep(Unit):
        name = "shallow"

        def decode(self, stored: Array, scaling: Any) -> Array:
            return stored.astype(np.float32) / 2

    def chips_in(unit: Unit) -> rd.Chips:
        source = world.source.harmonize(BANDS[:1], units={BANDS[0]: unit})
        return source.chips(SIDE, min_coverage=0.0, **CELLS)

    inside = chips_in(Deep())
    here = inside.load()
    assert isinstance(here, xr.Dataset)
    lazy = inside.to_xarray()
    assert isinstance(lazy, xr.Dataset)
    xr.testing.assert_identical(here, lazy.compute(scheduler="threads"))
    (key,) = {k for k, v in next(iter(inside.stream(4))).items() if v.ndim == 5}
    streamed = np.concatenate([batch[key] for batch in inside.stream(4)])
    np.testing.assert_array_equal(streamed, here["pixels"].values)
    writes: list[tuple[str, Any]] = [
        ("store", lambda: inside.to_zarr(tmp_path / "store", progress=False)),
        ("plan", lambda: inside.save_plan(tmp_path / "plan")),
    ]
    for name, write in writes:
        with pytest.raises(PlanError, match=r"Deep.*Move the class Deep out of .*to the top of its module"):
            write()
        assert not list((tmp_path / name).rglob("*")), f"something of {name} was written"
    moved = chips_in(Shallow())
    moved.save_plan(tmp_path / "plan")
    moved.to_zarr(tmp_path / "store", progress=False)
    stored = rd.open_chips(tmp_path / "store").load()
    assert isinstance(stored, xr.Dataset)
    np.testing.assert_array_equal(stored["pixels"].values, here["pixels"].values)


@pytest.mark.parametrize("kernel_on", ["stored", "decoded"])
def test_rules_inside_a_function_reach_the_workers_of_a_cluster(
    world: Passing, client: Client, kernel_on: Any
) -> None:
    """As those of a notebook: workers can import none of them."""

    @dataclasses.dataclass(frozen=True)
    class Deep(Unit):
        name = "deep"

        def decode(self, stored: Array, scaling: Any) -> Array:
            return stored.astype(np.float32) / 2

    Deep.kernel_on = kernel_on

    @dataclasses.dataclass(frozen=True)
    class Bright(Mask):
        most: int = 3000

        @property
        def needs(self) -> tuple[str, ...]:
            return (BANDS[0],)

        def hidden(self, *stored: Array) -> Array:
            return np.asarray(stored[0] > self.most)

    @dataclasses.dataclass(frozen=True)
    class Latest(Ranked):
        fill: bool = True

        def order(self, candidates: Candidates) -> Array:
            return -candidates.start

    @dataclasses.dataclass(frozen=True)
    class Greatest(Composed):
        def blend(self, stack: Array, valid: Array) -> tuple[Array, Array]:
            return np.where(valid, stack, -np.inf).max(axis=0), np.asarray(valid.any(axis=0))

    for pick in (Latest(), Greatest()):
        source = world.source.harmonize(BANDS, time="1MS", pick=pick, mask=Bright(), units=Deep())
        chips = source.chips(SIDE, min_coverage=0.0, **CELLS)
        here = chips.load()
        assert isinstance(here, xr.Dataset)
        batches = list(chips.stream(8, client=client))
        (key,) = {k for k, v in batches[0].items() if v.ndim == 5}
        np.testing.assert_array_equal(np.concatenate([b[key] for b in batches]), here["pixels"].values)
        cube = source.cube(bounds=tuple(here["bounds"].values[0].tolist()))
        with client.as_current():
            np.testing.assert_array_equal(cube.compute().values, here["pixels"].values[0])


def test_a_unit_without_a_name_cannot_exist() -> None:
    @dataclasses.dataclass(frozen=True)
    class Nameless(Unit):
        def decode(self, stored: Array, scaling: Any) -> Array:
            return stored

    with pytest.raises(TypeError, match="Nameless has no name: write name"):
        Nameless()


@dataclasses.dataclass(frozen=True)
class Above(Mask):
    """Pixels above a number of one band, as it stands in the file."""

    band: str
    most: int

    @property
    def needs(self) -> tuple[str, ...]:
        return (self.band,)

    def hidden(self, *stored: Array) -> Array:
        assert stored[0].dtype.kind in "iu"
        return np.asarray(stored[0] > self.most)


def pixels_of(source: rd.Collection) -> Array:
    loaded = source.chips(32, cell_km=0.96).sample(6).load()
    assert isinstance(loaded, xr.Dataset)
    return np.asarray(loaded["pixels"].values)


def test_a_mask_sees_stored_numbers_of_bands_that_are_decoded_first(aef: rd.Collection) -> None:
    raw = pixels_of(aef.harmonize(["A00", "A01"], units="raw"))
    plain = pixels_of(aef.harmonize(["A00", "A01"]))
    masked = pixels_of(aef.harmonize(["A00", "A01"], mask=Above("A00", 20)))
    hidden = np.broadcast_to(raw[:, :, :1] > 20, raw.shape)
    assert 0.02 < hidden.mean() < 0.98
    np.testing.assert_array_equal(masked, np.where(hidden, np.nan, plain))


@pytest.mark.parametrize("resampling", ["cubic", "nearest", None])
def test_a_mask_of_a_band_leaves_its_kernel_alone(s2: rd.Collection, resampling: str | None) -> None:
    how: dict[str, Any] = {"bands": ["red", "nir"], "resolution": 15, "resampling": resampling}
    one = s2.filter(
        tile=s2.to_table(columns=["tile"])["tile"][0].as_py()
    )  # where two overlap, the other shows
    plain, masked = (pixels_of(one.harmonize(**how, mask=mask)) for mask in (None, Above("red", 1500)))
    shown = ~np.isnan(masked)
    assert 0.02 < shown.mean() < 0.98
    np.testing.assert_array_equal(masked[shown], plain[shown])


def test_a_pick_without_the_field_that_fills_is_told(s2: rd.Collection) -> None:
    @dataclasses.dataclass(frozen=True)
    class Lame(Ranked):
        def order(self, candidates: Candidates) -> Array:
            return candidates.start

    with pytest.raises(PlanError, match=r"no field fill.*Write fill: bool = False in it"):
        s2.harmonize(pick=Lame(), time="1MS")
