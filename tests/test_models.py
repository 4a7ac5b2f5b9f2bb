"""A model gives the same for a chip whatever its kind, batch and thread; what it cannot answer is told."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import rasteret_dask as rd
from rasteret_dask.prediction import models
from rasteret_dask.prediction.modelqueue import ModelQueue, Piece
from rasteret_dask.prediction.models import Model, ModelParcel, ModelRunner, model_of, parcel_of
from rasteret_dask.tasks.batches import Arrays, SourcePixels

PIXELS = {"s2": SourcePixels(("red", "nir"), "float32")}
WEIGHTS = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)


@pytest.fixture(autouse=True)
def _no_model_is_left() -> Iterator[None]:
    yield
    models._RUNNERS.clear()


def chips(count: int, bands: int = 2, times: int = 1, seed: int = 0, side: int = 4) -> Arrays:
    """Return made-up chips, a tenth of whose pixels is NaN and invalid."""
    rng = np.random.default_rng(seed)
    valid = rng.random((count, times, side, side)) > 0.1
    pixels = rng.random((count, times, bands, side, side), dtype=np.float32)
    pixels[~np.broadcast_to(valid[:, :, None], pixels.shape)] = np.nan
    return {"s2": pixels, "s2/valid": valid, "chip_id": np.array([f"chip-{seed}-{n}" for n in range(count)])}


def mixed(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return three sums of the two bands: what the models of all kinds here compute."""
    return np.asarray(np.einsum("kb,nbyx->nkyx", WEIGHTS, pixels), np.float32)


def answer(arrays: Arrays, fill: float = 0.0) -> NDArray[np.float32]:
    """Return what is to come out, chip by chip, by hand."""
    rows = []
    for pixels, valid in zip(arrays["s2"], arrays["s2/valid"], strict=True):
        image = np.array(pixels[0])
        image[:, ~valid[0]] = fill
        rows.append(np.stack([sum(w * band for w, band in zip(row, image, strict=True)) for row in WEIGHTS]))
    return np.array(rows)


def version_of_mixed() -> Model:
    return Model(mixed, version="1")


def torch_module() -> Any:
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    module = torch.nn.Conv2d(2, 3, 1, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(WEIGHTS[:, :, None, None].copy()))
    return module


def module_model(folder: Path) -> Model:
    return Model(torch_module())


def export_model(folder: Path) -> Model:
    module = torch_module()
    import torch

    chips_axis = torch.export.Dim("chips", min=1, max=4096)
    program = torch.export.export(module, (torch.zeros(3, 2, 4, 4),), dynamic_shapes=({0: chips_axis},))
    torch.export.save(program, folder / "model.pt2")
    return Model(folder / "model.pt2")


def program_model(folder: Path) -> Model:
    """Return a program in memory that takes five chips, no other number of them."""
    module = torch_module()
    import torch

    return Model(torch.export.export(module, (torch.zeros(5, 2, 4, 4),)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def script_model(folder: Path) -> Model:
    module = torch_module()
    import torch

    jit: Any = torch.jit
    jit.save(jit.trace(module, torch.zeros(1, 2, 4, 4)), folder / "model.pt")
    return Model(str(folder / "model.pt"))


def onnx_model(folder: Path, chip_axis: int | str = "n", outputs: int = 1, name: str = "model.onnx") -> Model:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    weight = onnx.numpy_helper.from_array(WEIGHTS[:, :, None, None], "w")
    nodes = [helper.make_node("Conv", ["image", "w"], ["logits"])]
    if outputs == 2:
        nodes.append(helper.make_node("GlobalAveragePool", ["logits"], ["pooled"]))
    shapes = {"logits": [chip_axis, 3, 4, 4], "pooled": [chip_axis, 3, 1, 1]}
    graph = helper.make_graph(
        nodes,
        "mixed",
        [helper.make_tensor_value_info("image", kind, [chip_axis, 2, 4, 4])],
        [helper.make_tensor_value_info(key, kind, shapes[key]) for key in list(shapes)[:outputs]],
        [weight],
    )
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), folder / name
    )
    return Model(folder / name)


def parcel(model: Any, batch_size: int = 4) -> ModelParcel:
    """Return a model as it arrives in another process."""
    result = pickle.loads(pickle.dumps(parcel_of(model_of(model), batch_size, PIXELS)))
    assert isinstance(result, ModelParcel)
    return result


KINDS: dict[str, Callable[[Path], Model]] = {
    "function": lambda folder: version_of_mixed(),
    "module": module_model,
    "export": export_model,
    "program": program_model,
    "torchscript": script_model,
    "onnx": onnx_model,
    "onnx of five": partial(onnx_model, chip_axis=5),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_give_what_is_computed_by_hand(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind](tmp_path)
    for batch_size, count in ((1, 1), (4, 4), (4, 11), (16, 3)):
        own, arrays = parcel(model, batch_size), chips(count, seed=batch_size)
        rows = own.runner().predict(arrays)
        assert rows.dtype == np.float32
        np.testing.assert_allclose(rows, answer(arrays), rtol=0, atol=1e-6)
        assert own.trial(chips(2)) == ((3, 4, 4), np.dtype(np.float32))


def test_a_module_runs_in_eval_mode_and_stays_as_it_was(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    module = torch.nn.Sequential(torch_module(), torch.nn.BatchNorm2d(3), torch.nn.Dropout(0.9))
    module.train()
    arrays = chips(3)
    rows = parcel(module).runner().predict(arrays)
    np.testing.assert_allclose(rows, answer(arrays) / np.sqrt(1 + 1e-5), atol=1e-6)
    assert module.training
    assert float(module[1].running_mean.abs().sum()) == 0.0


def test_weights_beside_an_onnx_file_travel_with_it(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install onnx")
    model = onnx_model(tmp_path)
    whole = onnx.load(tmp_path / "model.onnx")
    onnx.save_model(
        whole,
        tmp_path / "apart.onnx",
        save_as_external_data=True,
        location="apart.onnx.data",
        size_threshold=0,
    )
    assert (tmp_path / "apart.onnx.data").stat().st_size >= WEIGHTS.nbytes
    apart = parcel(Model(tmp_path / "apart.onnx"))
    (tmp_path / "apart.onnx.data").unlink()
    arrays = chips(3)
    np.testing.assert_array_equal(apart.runner().predict(arrays), parcel(model).runner().predict(arrays))


# What the model sees


def scaled(arrays: Arrays) -> Arrays:
    return {**arrays, "s2": arrays["s2"] * 2 + 1}


def seen(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    return pixels


def both(arrays: Arrays) -> Any:
    return {"image": arrays["s2"][:, 0], "scale": 3.0}


def times_scale(inputs: Any) -> NDArray[np.float32]:
    return np.asarray(inputs["image"] * inputs["scale"])


@given(st.integers(1, 6), st.integers(1, 3), st.floats(-5, 5, width=32), st.booleans())
@settings(max_examples=15)
def test_inputs_are_normalized_then_filled(count: int, times: int, fill: float, normal: bool) -> None:
    arrays = chips(count, times=times)
    rows = parcel(Model(seen, normalize=scaled if normal else None, fill=fill), 4).runner().predict(arrays)
    want = np.array(arrays["s2"] * 2 + 1 if normal else arrays["s2"])
    for chip in range(count):
        for at in range(times):
            want[chip, at][:, ~arrays["s2/valid"][chip, at]] = fill
    np.testing.assert_array_equal(rows, want[:, 0] if times == 1 else want)


def test_statistics_of_training_are_what_a_stream_applies(s2: rd.Collection) -> None:
    plan = s2.harmonize(["red", "nir"], time="3MS").chips(16, cell_km=0.96)
    stats = plan.stats(sample=6, progress=False)
    batch = next(iter(plan.sample(6, seed=1).stream(batch_size=6, normalize=partial(stats.normalize, nan=0))))
    plain = next(iter(plan.sample(6, seed=1).stream(batch_size=6)))
    pixels = {"s2": SourcePixels(("red", "nir"), str(plain["s2"].dtype))}
    rows = parcel_of(Model(seen, normalize=stats), 4, pixels).runner().predict(plain)
    np.testing.assert_allclose(rows, batch["s2"][:, 0], atol=1e-6)
    with pytest.raises(rd.PlanError, match="bands blue, nir"):
        parcel_of(Model(seen, normalize=stats), 4, {"s2": SourcePixels(("blue", "nir"), "float32")})


def test_inputs_may_be_several_and_share_values() -> None:
    arrays = chips(5)
    rows = parcel(Model(times_scale, inputs=both), 2).runner().predict(arrays)
    np.testing.assert_array_equal(rows, np.nan_to_num(arrays["s2"][:, 0]) * 3)


@given(st.integers(2, 5), st.integers(1, 7))
@settings(max_examples=10)
def test_activations_are_those_of_the_book(classes: int, count: int) -> None:
    arrays = chips(count, bands=classes)
    arrays["s2"] = np.nan_to_num(arrays["s2"]) * 200 - 100
    numbers = arrays["s2"][:, 0].astype(np.float64)
    soft = parcel(Model(seen, activation="softmax", fill=-100.0)).runner().predict(arrays)
    logistic = parcel(Model(seen, activation="sigmoid", fill=-100.0)).runner().predict(arrays)
    numbers[np.broadcast_to(~arrays["s2/valid"], numbers.shape)] = -100.0
    shifted = np.exp(numbers - numbers.max(axis=1, keepdims=True))
    np.testing.assert_allclose(soft, shifted / shifted.sum(axis=1, keepdims=True), atol=1e-6)
    np.testing.assert_allclose(logistic, 1 / (1 + np.exp(-numbers)), atol=1e-6)


# Batches of several threads


@given(st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(5, 9), st.integers(1, 3))
@settings(max_examples=20)
def test_chips_of_several_threads_fill_batches(counts: list[int], size: int, lanes: int) -> None:
    """Each brings its chips once: so all batches but the last are full, and each gets its own answer."""
    batches: list[int] = []

    def compute(pieces: Any) -> NDArray[np.float64]:
        rows = np.concatenate([share.value[start:stop] for share, start, stop in pieces])
        batches.append(len(rows))
        return rows * 2.0

    queue, ready = ModelQueue(compute, size, lanes, patience_s=None), threading.Barrier(len(counts))

    def bring(thread: int) -> bool:
        with queue.reading():
            ready.wait()
            values = np.arange(counts[thread]) + 100 * thread
            return bool((queue.results(values, len(values)) == values * 2.0).all())

    with ThreadPoolExecutor(len(counts)) as pool:
        assert all(pool.map(bring, range(len(counts))))
    assert sum(batches) == sum(counts)
    assert len(batches) == -(-sum(counts) // size)


def test_a_batch_does_not_wait_for_who_has_ended_or_never_comes() -> None:
    queue = ModelQueue(
        lambda pieces: np.concatenate([s.value[a:b] for s, a, b in pieces]), 8, patience_s=0.01
    )
    with queue.reading(), ThreadPoolExecutor(1) as pool:  # this thread reads, and never comes
        assert pool.submit(queue.results, np.arange(3), 3).result().tolist() == [0, 1, 2]
    assert queue.callers == 0


def test_nobody_fails_because_of_another_one_s_chips() -> None:
    def compute(pieces: list[Piece]) -> NDArray[Any]:
        rows = np.concatenate([share.value[start:stop] for share, start, stop in pieces])
        if (rows == 13).any():
            raise ValueError("thirteen")
        return rows

    queue, ready = ModelQueue(compute, 8, patience_s=None), threading.Barrier(3)  # type: ignore[arg-type]

    def bring(first: int) -> list[int]:
        with queue.reading():
            ready.wait()
            return [int(value) for value in queue.results(np.array([first, first + 1]), 2)]

    with ThreadPoolExecutor(3) as pool:
        futures = {first: pool.submit(bring, first) for first in (0, 12, 20)}
    assert (futures[0].result(), futures[20].result()) == ([0, 1], [20, 21])
    with pytest.raises(ValueError, match="thirteen"):
        futures[12].result()


def test_a_process_has_one_runner_and_forgets_idle_ones() -> None:
    first, second = parcel(version_of_mixed()), parcel(Model(seen))
    runner = first.runner()
    assert parcel(version_of_mixed()).runner() is runner
    with runner.reading():
        second.runner()
        assert first.runner() is runner
    assert len(models._RUNNERS) == 2
    parcel(Model(mixed, fill=1.0, version="1")).runner()
    assert len(models._RUNNERS) == 1


class OneBuffer:
    """A model that answers in memory of its own, each time the same."""

    def __init__(self, dtype: str) -> None:
        self.memory = np.empty((64, 2, 4, 4), dtype=dtype)

    def __call__(self, pixels: NDArray[Any]) -> NDArray[Any]:
        self.memory[: len(pixels)] = pixels * 100
        return self.memory[: len(pixels)]


@pytest.mark.parametrize("dtype", ["float32", "int32"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 20])
def test_an_answer_stays_when_the_model_writes_over_its_memory(dtype: str, batch_size: int) -> None:
    arrays = chips(20)
    rows = parcel(Model(OneBuffer(dtype), version=dtype), batch_size=batch_size).runner().predict(arrays)
    np.testing.assert_array_equal(rows, (np.nan_to_num(arrays["s2"][:, 0]) * 100).astype(dtype))


# What a model is known by


def test_the_digest_is_that_of_what_decides_the_numbers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    module = torch_module()
    base = parcel_of(Model(module), 4, PIXELS).digest
    same = [
        parcel_of(Model(torch_module()), 4, PIXELS), parcel_of(Model(module), 9, PIXELS),
        parcel_of(Model(module, device="cpu"), 4, {}), parcel_of(Model(module.train()), 4, PIXELS),
    ]  # fmt: skip
    assert {one.digest for one in same} == {base}
    other = torch_module()
    with torch.no_grad():
        other.weight[0, 0] += 1e-6
    others = [
        Model(other), Model(module, fill=1.0), Model(module, normalize=scaled), Model(module, inputs=both),
        Model(module, activation="softmax"), Model(module, version="1"), Model(torch.nn.Sequential(module)),
        Model(module, output=0), Model(seen), Model(times_scale), Model(module, normalize=partial(scaled)),
    ]  # fmt: skip
    assert len({base, *(parcel_of(one, 4, PIXELS).digest for one in others)}) == len(others) + 1


def test_plain_attributes_of_modules_count() -> None:
    torch = pytest.importorskip("torch", reason="needs the extra torch")

    class Scaled(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self, factor: float, more: Any = None) -> None:
            super().__init__()
            self.factor, self.more = factor, more

        def forward(self, pixels: Any) -> Any:
            return pixels * self.factor

    digests = [parcel_of(Model(Scaled(factor)), 4, {}).digest for factor in (1.0, 2.0, 1.0)]
    assert digests[0] == digests[2] != digests[1]
    with pytest.raises(rd.PlanError, match=r"attribute more: found a object.*version='1'"):
        parcel_of(Model(Scaled(1.0, object())), 4, {})
    assert parcel_of(Model(Scaled(1.0, object()), version="1"), 4, {}).digest
    arrays = chips(2)
    rows = parcel(Scaled(3.0)).runner().predict(arrays)
    np.testing.assert_allclose(rows, np.nan_to_num(arrays["s2"][:, 0]) * 3)


def written(name: str, text: str) -> Any:
    """Return a class whose text no file has, as of a notebook's cell that was run again."""
    space: dict[str, Any] = {"__name__": "of_a_cell"}
    exec(text, space)
    return space[name]


def weighted(pixels: Any, net: Any = None, table: Any = None) -> Any:
    return pixels


NETS: list[Any] = []
FACTOR = 2.0


def by_a_global(pixels: Any) -> Any:
    return NETS[0](pixels)


def by_a_lambda(pixels: Any) -> Any:
    return np.stack([(lambda one: one * FACTOR)(one) for one in pixels])


def test_all_that_a_module_or_a_partial_holds_counts() -> None:
    """Whatever changes numbers changes the digest: else a map that was begun would be finished by another model."""
    torch = pytest.importorskip("torch", reason="needs the extra torch")

    class Holder(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self, own: Any) -> None:
            super().__init__()
            self._own, self.own = own, own

        def forward(self, pixels: Any) -> Any:
            return pixels

    class Private(Holder):
        def __init__(self, own: Any) -> None:
            super().__init__(0)
            self._own = own

    def net(weight: float) -> Any:
        module = torch.nn.Conv2d(2, 1, 1, bias=False)
        with torch.no_grad():
            module.weight.fill_(weight)
        return module

    def table(at: int) -> Any:
        values = np.zeros(5_000)
        values[at] = 1.0
        return values

    def hooked(hook: Any) -> Any:
        module = net(1.0)
        if hook is not None:
            module.register_forward_hook(hook)
        return module

    text = "import torch\nclass Cell(torch.nn.Module):\n    def forward(self, pixels): return pixels * {}\n"
    pairs: list[tuple[Callable[[Any], Any], Any, Any]] = [
        (Private, 1.0, 2.0), (Private, {"a": [table(1)]}, {"a": [table(2)]}), (Holder, [net(1.0)], [net(2.0)]),
        (Holder, torch.zeros(2), torch.ones(2)), (hooked, None, weighted),
        (lambda k: written("Cell", text.format(k))(), 2.0, 3.0),
        (lambda k: partial(weighted, net=k), net(1.0), net(2.0)),
        (lambda k: partial(weighted, table=k), {"w": table(2_000)}, {"w": table(2_001)}),
        (lambda k: partial(weighted, table=k), torch.zeros(3), torch.ones(3)),
    ]  # fmt: skip
    for make, one, other in pairs:
        first, again, second = (parcel_of(Model(make(v)), 4, {}).digest for v in (one, one, other))
        assert first == again != second, (one, other)
    mutual = Holder(None)
    mutual.own = [Holder([mutual])]  # no end of looking
    assert parcel_of(Model(mutual), 4, {}).digest


def test_a_base_class_of_a_module_counts() -> None:
    pytest.importorskip("torch", reason="needs the extra torch")
    text = (
        "import torch\nclass Base(torch.nn.Module):\n    def forward(self, pixels): return pixels * {}\n"
        "class Cell(Base): pass\n"
    )
    first, second = (parcel_of(Model(written("Cell", text.format(k))()), 4, {}).digest for k in (2.0, 3.0))
    assert first != second


def test_data_that_functions_name_anywhere_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function's digest holds no weights: of a net that is a global it must not say that it is the same."""
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    before = parcel_of(Model(by_a_lambda), 4, {}).digest
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 3.0)
    assert parcel_of(Model(by_a_lambda), 4, {}).digest != before
    monkeypatch.setattr(sys.modules[__name__], "NETS", torch.nn.Identity())
    with pytest.raises(
        rd.PlanError, match=r"by_a_global: found a global or default NETS, a Identity.*version='1'"
    ):
        parcel_of(Model(by_a_global), 4, {})
    assert parcel_of(Model(by_a_global, version="1"), 4, {}).digest
    pandas = pytest.importorskip("pandas")
    told = partial(weighted, table=pandas.DataFrame({"a": np.arange(1_000.0)}))
    with pytest.raises(rd.PlanError, match=r"argument table: found a DataFrame.*version='1'"):
        parcel_of(Model(told), 4, {})
    assert parcel_of(Model(told, version="1"), 4, {}).digest


def test_another_process_knows_it_by_the_same_digest(tmp_path: Path) -> None:
    (tmp_path / "own_model.py").write_text("def double(pixels):\n    return pixels * 2\n")
    code = (
        "from own_model import double; import rasteret_dask as rd, sys\n"
        "from rasteret_dask.prediction.models import parcel_of\n"
        "print(parcel_of(rd.Model(double), 4, {}).digest)\n"
        "print([name for name in ('torch', 'onnxruntime', 'distributed') if name in sys.modules])\n"
    )
    run = partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=True)
    first, second = (run(cwd=tmp_path).stdout.split("\n") for _ in range(2))
    assert first[:1] == second[:1]
    assert first[1] == "[]", "a function needs neither torch nor onnxruntime"


def test_functions_that_close_over_data_need_a_version() -> None:
    weights = np.ones(3)
    with pytest.raises(rd.PlanError, match=r"Model\(\).*a closure over weights.*version='1'"):
        parcel_of(Model(lambda pixels: pixels * weights), 4, {})
    with pytest.raises(rd.PlanError, match=r"Model\(inputs=\).*a closure over weights"):
        parcel_of(Model(seen, inputs=lambda arrays: arrays["s2"] * weights), 4, {})
    assert parcel_of(Model(lambda pixels: pixels * weights, version="1"), 4, {}).digest


def test_a_parcel_without_its_content_runs_what_lies_there_unless_it_was_changed(tmp_path: Path) -> None:
    whole, arrays = parcel_of(version_of_mixed(), 4, PIXELS), chips(3)
    light, name, content = whole.apart(str(tmp_path))
    (tmp_path / name).write_bytes(content)
    assert len(pickle.dumps(light)) < 1000
    assert light.digest == whole.digest
    np.testing.assert_array_equal(ModelRunner(light).predict(arrays), ModelRunner(whole).predict(arrays))
    (tmp_path / name).write_bytes(content + b" ")
    with pytest.raises(rd.ModelError, match=r"other bytes than were put there"):
        ModelRunner(light)


# What is wrong


def raises(pixels: Any) -> Any:
    raise KeyError("no such layer")


def too_few(pixels: Any) -> Any:
    return pixels[:-1]


def sums(pixels: Any) -> Any:
    return pixels.sum()


def objects(pixels: Any) -> Any:
    return np.array([None] * len(pixels))


def texts(pixels: Any) -> Any:
    return ["forest"] * len(pixels)


def masked(pixels: Any) -> Any:
    return np.ma.masked_greater(pixels, 0.5)


def two(pixels: Any) -> Any:
    return {"logits": pixels, "aux": pixels}


def uneven(arrays: Arrays) -> Any:
    return {"image": arrays["s2"], "waves": np.arange(7)}


def broken(arrays: Arrays) -> Arrays:
    raise ZeroDivisionError("of nothing")


GIVEN = r"float32 \(2, 2, 4, 4\) of s2 with bands red, nir"

FAULTS: dict[str, tuple[Model, str]] = {
    "masked": (Model(masked), r"found a masked array; expected a number.*answer\.filled\(0\)"),
    "raises": (
        Model(raises),
        rf"model raises on chips chip-0-0, chip-0-1: found KeyError: 'no such layer'.*{GIVEN}",
    ),
    "too few": (
        Model(too_few),
        rf"found an answer of shape \(1, 2, 4, 4\); expected 2 chips along axis 0, for {GIVEN}",
    ),
    "one number": (Model(sums), r"found a float32; expected an array of numbers"),
    "objects": (Model(objects), r"found an array of object; expected an array of numbers"),
    "texts": (Model(texts), r"found 2 outputs: 0, 1; expected one output"),
    "two outputs": (Model(two), r"found 2 outputs: logits, aux; expected one output.*Model\(output=...\)"),
    "no such output": (Model(two, output="probs"), r"expected one called 'probs'"),
    "normalize": (
        Model(seen, normalize=broken),
        r"inputs of model seen on chips .*ZeroDivisionError: of nothing",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_no_answer_is_told(name: str) -> None:
    model, message = FAULTS[name]
    with pytest.raises(rd.ModelError, match=message) as caught:
        parcel(model).trial(chips(2))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_the_remedy_of_several_outputs_helps() -> None:
    arrays = chips(2)
    rows = parcel(Model(two, output="aux")).runner().predict(arrays)
    np.testing.assert_array_equal(rows, np.nan_to_num(arrays["s2"][:, 0]))


def test_inputs_without_the_chips_are_told() -> None:
    with pytest.raises(
        rd.PlanError, match=r"an array of shape \(7,\) for 2 chips; expected chips along axis 0"
    ):
        parcel(Model(seen, inputs=uneven)).trial(chips(2))


def test_a_fill_that_the_pixels_cannot_hold_is_told() -> None:
    arrays = {**chips(2), "s2": np.zeros((2, 1, 2, 4, 4), np.uint16)}
    with pytest.raises(rd.PlanError, match=r"Model\(fill=-1\) of source 's2': found pixels of uint16"):
        parcel(Model(seen, fill=-1.0)).trial(arrays)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("kind", ["module", "export", "torchscript", "onnx"])
def test_another_number_of_bands_is_told_with_what_the_model_was_given(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind](tmp_path)
    own = parcel_of(model, 4, {"s2": SourcePixels(("red", "nir", "blue"), "float32")})
    given_to_it = r"expected an answer to float32 \(2, 3, 4, 4\) of s2 with bands red, nir, blue"
    with pytest.raises(rd.ModelError, match=given_to_it) as caught:
        own.trial(chips(2, bands=3))
    assert caught.value.__cause__ is not None
    assert "chip-0-0, chip-0-1" in caught.value.subject


def test_names_of_onnx_inputs_and_outputs(tmp_path: Path) -> None:
    model = onnx_model(tmp_path, outputs=2)
    arrays = chips(3)
    renamed = Model(model.call, inputs=lambda a: {"image": a["s2"][:, 0].astype("float64")}, output="pooled")
    rows = parcel(renamed).runner().predict(arrays)
    np.testing.assert_allclose(rows[:, :, 0, 0], answer(arrays).mean(axis=(2, 3)), atol=1e-6)
    with pytest.raises(rd.ModelError, match="found 2 outputs: logits, pooled"):
        parcel(model).trial(chips(2))
    with pytest.raises(rd.ModelError, match="inputs called x; the file's are called image"):
        parcel(Model(model.call, inputs=lambda a: {"x": a["s2"]}, output="pooled")).trial(chips(2))
    with pytest.raises(rd.ModelError, match="2 inputs; the file has 1, called image"):
        parcel(Model(model.call, inputs=lambda a: (a["s2"], a["s2"]), output="pooled")).trial(chips(2))


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "mps"])
@pytest.mark.parametrize("kind", ["module", "export", "onnx"])
def test_a_device_that_is_not_there_is_told_when_the_model_is_loaded(
    kind: str, device: str, tmp_path: Path
) -> None:
    model = KINDS[kind](tmp_path)
    if kind != "onnx":
        import torch

        if (torch.cuda.is_available() and device == "cuda") or torch.backends.mps.is_available():
            pytest.skip("this machine has such a device")
    with pytest.raises(rd.ModelError, match=rf"on device '{device}': found none.*device='auto'"):
        parcel(Model(model.call, device=device)).runner()


def test_a_file_that_holds_no_model_is_told(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs the extra torch")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    with pytest.raises(rd.ModelError, match="no such file"):
        Model(tmp_path / "none.onnx")
    with pytest.raises(
        rd.PlanError, match=r"a file that ends in '.ckpt'; expected one that ends in .onnx, .pt2"
    ):
        Model(tmp_path / "last.ckpt")
    for suffix, what in ((".onnx", "an ONNX model"), (".pt2", "torch.export.save"), (".pt", "TorchScript")):
        (tmp_path / f"bad{suffix}").write_bytes(b"no model at all")
        with pytest.raises(rd.ModelError, match=rf"file bad{suffix}: found .*expected .*{what}"):
            parcel(tmp_path / f"bad{suffix}").runner()
    torch.save(torch_module().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(rd.ModelError, match=r"load_state_dict\(torch.load\(path, weights_only=True\)\)"):
        parcel(tmp_path / "weights.pt").runner()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device": "gpu"}, r"Model\(device=\): found 'gpu'"),
        ({"device": "cuda"}, "a function, seen; expected a torch module or a file"),
        ({"activation": "relu"}, r"Model\(activation=\)"),
        ({"fill": True}, r"Model\(fill=\)"),
        ({"inputs": "s2"}, r"Model\(inputs=\)"),
        ({"version": 1}, r"Model\(version=\)"),
        ({"call": 7}, "a int; expected a function of arrays"),
    ],
)
def test_arguments_that_make_no_sense_are_told(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(rd.PlanError, match=message):
        Model(**{"call": seen, **arguments})


@pytest.mark.parametrize("batch_size", [0, True, 1.5])
def test_a_batch_has_chips(batch_size: Any) -> None:
    with pytest.raises(rd.PlanError, match=r"predict\(batch_size=\)"):
        parcel_of(Model(seen), batch_size, PIXELS)


@pytest.mark.parametrize(("kind", "package"), [("onnx", "onnxruntime"), ("module", "torch")])
def test_a_process_without_the_package_says_what_to_install(
    kind: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = parcel_of(KINDS[kind](tmp_path), 4, PIXELS)
    content = own.unpacked()
    monkeypatch.setattr(ModelParcel, "unpacked", lambda self: content)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(rd.MissingExtraError, match=f"no package {package}.*pip install '{package}>="):
        own.runner()
