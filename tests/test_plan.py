"""Plans are values: they compare, hash, become JSON, and have one digest everywhere."""

from __future__ import annotations

import dataclasses
import datetime as dt
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import PATIENCE_S

import rasteret_dask as rd
from rasteret_dask import words
from rasteret_dask.planning import plan as p
from rasteret_dask.planning.calls import calls
from rasteret_dask.rules.masks import Bits, mask_named
from rasteret_dask.rules.picks import PICKS, pick_named
from rasteret_dask.rules.units import UNITS, units_named

SCALARS = st.one_of(st.text(max_size=4), st.integers(-9, 9), st.floats(-1e6, 1e6), st.booleans(), st.none())
TRIPLES = st.tuples(
    st.text(min_size=1, max_size=6),
    st.sampled_from(["==", "<", "in"]),
    st.one_of(SCALARS, st.tuples(SCALARS, SCALARS)),
)
WHERE = st.lists(TRIPLES, max_size=3).map(tuple)
SPECS = st.builds(
    p.HarmonizeSpec,
    bands=st.none() | st.just(("red", "nir")),
    resolution=st.none() | st.floats(1, 100),
    time=st.none() | st.just("1MS"),
    mask=st.none() | st.sampled_from([mask_named("clouds"), mask_named(["snow", Bits("qa", (1, 5))])]),
    pick=st.none() | st.sampled_from(sorted(PICKS)).map(pick_named),
    fill=st.none() | st.booleans(),
    units=st.none()
    | st.sampled_from([units_named({"vv": "decibel"}), *(units_named(u) for u in ("physical", *UNITS))]),
)
FUNCTION = p.Function("m", "f", "version 1")


def grow(below: st.SearchStrategy[p.Node]) -> st.SearchStrategy[p.Node]:
    return st.one_of(
        st.builds(p.Filter, below, WHERE),
        st.builds(p.Sample, below, st.integers(0, 9), st.integers(0, 9), st.none() | st.just("tile")),
        st.builds(p.Harmonize, below, SPECS),
        st.builds(p.Map, below, st.just(FUNCTION), st.none() | st.just("a")),
        st.builds(p.Merge, st.lists(below, min_size=1, max_size=3).map(tuple)),
        st.builds(lambda a, b: p.Join(("a", "b"), (a, b)), below, below),
    )


NODES: st.SearchStrategy[p.Node] = st.recursive(
    st.builds(
        p.Source, st.sampled_from(["s2", "l8"]), st.just("0" * 32), WHERE, st.none() | st.just(("red",))
    ),
    grow,
    max_leaves=4,
)
PLANS: st.SearchStrategy[p.Node] = st.one_of(
    NODES,
    st.builds(
        lambda n, where: p.Select(
            p.Split(
                p.FilterChips(p.CutChips(n, p.ChipSpec(256, 128, aoi="00")), where),
                p.SplitSpec((("train", 0.5), ("val", 0.5), ("test", 0.0)), 3),
            ),
            ("train",),
        ),
        NODES,
        WHERE,
    ),
)


@settings(max_examples=100, deadline=None)
@given(PLANS)
def test_plans_come_back_from_json(plan: p.Node) -> None:
    again = p.from_json(json.loads(json.dumps(p.to_json(plan))))
    assert again == plan
    assert hash(again) == hash(plan)
    assert p.digest(again) == p.digest(plan)
    assert p.with_children(plan, p.children(plan)) == plan


@settings(max_examples=100, deadline=None)
@given(PLANS, PLANS)
def test_plans_differ_as_their_digests_do(one: p.Node, other: p.Node) -> None:
    if one == other:
        assert hash(one) == hash(other)
    else:
        assert p.digest(one) != p.digest(other)


def test_nodes_are_frozen() -> None:
    for node in (
        p.Source("a", "t"),
        p.ChipSpec(8, 8),
        p.SplitSpec((("train", 1.0),)),
        p.HarmonizeSpec(),
        FUNCTION,
    ):
        field = dataclasses.fields(node)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(node, field, None)


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import rasteret_dask as rd
from made_records import collection, record
from rasteret_dask.planning.plan import digest
c = collection("s2", record("a"), record("b"))
chips = (c.where(platform={{"x", "y", "sentinel-2a", "q", "landsat-8"}}).subset(cloud_cover_lt=20)
         .harmonize(["red"], time="1MS").chips(16, cell_km=1.28).split(seed=3).select("train"))
print(digest(chips.plan))
"""


def test_the_digest_is_the_same_in_every_process() -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent))
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script], env={**os.environ, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE
        )
        for seed in ("1", "2")
    ]
    said = {process.communicate(timeout=PATIENCE_S)[0].decode().strip() for process in running}
    assert len(said) == 1
    assert len(said.pop()) == 32


def test_predicates_become_plain_values() -> None:
    given_ = (
        ("a", "in", ["x", "y"]),
        ("b", "<", np.int64(3)),
        ("c", ">=", dt.datetime(2024, 4, 1, tzinfo=dt.UTC)),
        ("d", "in", {"q", "b"}),
        ("e", "<", np.datetime64("2024-04-01")),
    )
    said = p.predicates(given_, {"f": np.float32(0.5), "g": np.array([1, 2])})
    assert said == (
        ("a", "in", ("x", "y")),
        ("b", "<", 3),
        ("c", ">=", "2024-04-01T00:00:00+00:00"),
        ("d", "in", ("b", "q")),
        ("e", "<", "2024-04-01"),
        ("f", "==", 0.5),
        ("g", "in", (1, 2)),
    )
    node = p.Filter(p.Source("a", "t"), said)
    assert p.from_json(json.loads(json.dumps(p.to_json(node)))) == node
    assert p.predicates(("a", "==", 1), {}) == (("a", "==", 1),)


@contextmanager
def refused(*words: str) -> Iterator[None]:
    with pytest.raises(rd.PlanError) as caught:
        yield
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("triple", [("a", "=", 1), ("a", "=="), ["a", "==", 1], "a", ("a", "near", 1)])
def test_a_predicate_of_another_form_is_refused(triple: Any) -> None:
    with refused("operator"):
        p.predicates((triple,), {})


@pytest.mark.parametrize("size", [0, -1, 2.5, "256", None, True, float("nan")])
def test_sizes_are_positive_whole_numbers(size: Any) -> None:
    with refused("chips(size=)"):
        p.ChipSpec(size, 8)
    with refused("chips(stride=)"):
        p.ChipSpec(8, size)


@pytest.mark.parametrize("share", [float("nan"), -0.1, 0.5, "a"])
def test_ratios_sum_to_one(share: Any) -> None:
    with refused("split ratios"):
        p.SplitSpec((("train", 0.7), ("val", share)))


def test_specs_put_what_is_said_later_over_what_was_said() -> None:
    inner = p.HarmonizeSpec(bands=("red",), resolution=10.0, time="1MS")
    assert inner.under(p.HarmonizeSpec(resolution=30.0)) == p.HarmonizeSpec(
        ("red",), resolution=30.0, time="1MS"
    )


# Functions


def ndvi(chips: xr.DataArray) -> xr.DataArray:
    return chips


def made(threshold: float) -> Callable[[xr.DataArray], xr.DataArray]:
    def over(chips: xr.DataArray) -> xr.DataArray:
        return chips > threshold

    return over


def test_a_function_is_its_place_and_its_source() -> None:
    known = p.Function.of(ndvi)
    assert (known.module, known.name) == (__name__, "ndvi")
    assert len(known.source) == 64
    assert p.Function.of(ndvi) == known
    assert p.Function.of(ndvi, "2").source == "version 2"


def test_a_function_s_source_counts_not_its_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    said = []
    for number, body in enumerate(("x + 1", "x + 1", "x + 2")):
        (tmp_path / f"mod{number}.py").write_text(f"def f(x):\n    return {body}\n")
        said.append(p.Function.of(__import__(f"mod{number}").f).source)
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize("function", [made(0.5), functools.partial(ndvi), np.abs, [].append, abs])
def test_data_in_a_function_needs_a_version(function: Any) -> None:
    with refused("version="):
        p.Function.of(function)
    assert p.Function.of(function, version="1") != p.Function.of(function, version="2")


BANDS = frozenset({"red", "nir", "blue", "green", "swir16", "swir22"})
LIMITS = [0.1, 0.2]


def with_names(chips: xr.DataArray) -> xr.DataArray:
    return chips.sel(band=sorted(BANDS))


def with_limits(chips: xr.DataArray) -> xr.DataArray:
    return chips.clip(*LIMITS)


def test_the_names_a_function_uses_count_the_same_in_every_process() -> None:
    script = "import sys; sys.path.insert(0, %r); import test_plan as t; print(t.p.Function.of(t.with_names).source)"
    said = {p.Function.of(with_names).source}
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script % str(Path(__file__).parent)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        )
        said.add(done.stdout.decode().strip())
    assert len(said) == 1
    with refused("LIMITS", "version="):
        p.Function.of(with_limits)


def test_a_function_without_source_needs_a_version() -> None:
    space: dict[str, Any] = {"__name__": "typed_in"}
    exec("def f(x):\n    return x", space)
    with refused("no source text", "version="):
        p.Function.of(space["f"])


def test_lambdas_of_one_line_are_told_apart() -> None:
    pair = (lambda x: x + 1, lambda x: x * 2)
    one, other = (p.Function.of(f) for f in pair)
    assert one != other
    assert one == p.Function.of(pair[0])


def test_all_lambdas_of_a_chain_are_kept() -> None:
    from made_records import collection, record

    chips = collection("a", record("r")).chips(16).map(lambda x: x + 1).map(lambda x: x * 2)
    assert len(chips.query.functions) == 2
    outer = chips.plan
    assert isinstance(outer, p.Map)
    assert isinstance(outer.child, p.Map)
    assert [chips.query.functions[n.function](3) for n in (outer.child, outer)] == [4, 6]


@pytest.mark.parametrize(
    "step", [c for c in p._NODES.values() if "child" in c.__dataclass_fields__] + [p.Merge, p.Join]
)
def test_a_step_is_called_what_the_api_calls_it(step: Any) -> None:
    name = p.step_name(object.__new__(step))
    assert any(callable(getattr(holder, name, None)) for holder in (rd.Collection, rd.Chips, rd))


def test_chips_print_the_steps_that_were_called() -> None:
    from made_records import collection, record

    source = collection("a", record("r")).filter(("eo:cloud_cover", "<", 101))
    chips = source.chips(16).split(1, 0, 0).select("train").filter(split="train").filter_pixels(min_valid=0.5)
    verbs = [call.partition("(")[0] for call in calls(chips.plan)]
    assert verbs == ["a", "filter", "chips", "split", "select", "filter", "filter_pixels"]
    assert " ".join(repr(chips).split()).endswith(" > ".join(calls(chips.plan)) + ">")


@pytest.mark.parametrize(
    ("word", "checked"),
    [
        (words.Resampling, p.RESAMPLINGS), (words.Dtype, p.DTYPES),
    ],
)  # fmt: skip
def test_the_words_that_are_typed_are_those_that_are_checked(
    word: Any, checked: tuple[str | None, ...]
) -> None:
    assert set(get_args(word)) == set(checked) - {None}


FACTOR = 2.0


def scaled(da: Any) -> Any:
    return da * FACTOR


def test_a_function_is_known_by_the_plain_values_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    before = p.Function.of(scaled)
    monkeypatch.setitem(globals(), "FACTOR", 5.0)
    assert p.Function.of(scaled) != before
    monkeypatch.setitem(globals(), "FACTOR", [5.0])  # changes in place: only a version can tell
    with pytest.raises(rd.PlanError, match="FACTOR"):
        p.Function.of(scaled)
