# SPDX-License-Identifier: Apache-2.0
"""How each kind of model is loaded and called: functions of arrays, torch modules, files of ONNX and of torch."""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from dask.system import CPU_COUNT

from rasteret_dask.errors import ModelError
from rasteret_dask.extras import needs
from rasteret_dask.lists import listed
from rasteret_dask.prediction.modelinputs import Inputs, tree_map

__all__ = ["SUFFIXES", "Engine", "Files", "Kind", "loaded"]

Kind: TypeAlias = Literal["function", "module", "onnx", "export", "torchscript"]
"""What a model is."""

SUFFIXES: Mapping[str, Kind] = {
    ".onnx": "onnx", ".pt2": "export", ".pt": "torchscript", ".ts": "torchscript",
}  # fmt: skip
"""How the name of a file ends -> what it holds."""

Files: TypeAlias = "tuple[tuple[str, bytes], ...]"
"""(name, bytes): the file of a model, then those that lie beside it."""

_WIDER = {"uint16": "int32", "uint32": "int64"}
"""NumPy's dtypes that torch cannot compute with, as ``torchdata.as_tensors`` takes them."""

_ONNX_TYPES = {
    "tensor(float)": "float32", "tensor(double)": "float64", "tensor(float16)": "float16", "tensor(int8)": "int8",
    "tensor(int16)": "int16", "tensor(int32)": "int32", "tensor(int64)": "int64", "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16", "tensor(bool)": "bool",
}  # fmt: skip
_PROVIDERS = {"cuda": "CUDAExecutionProvider", "mps": "CoreMLExecutionProvider"}


@dataclass(frozen=True)
class Engine:
    """A model that is loaded."""

    call: Callable[[Inputs], Any]
    """Returns what the model makes of its inputs: an array, or several by name or number."""
    device: str
    """Where it computes."""
    lanes: int
    """How many threads may call it at the same time."""
    chips: int | None = None
    """The only number of chips that it takes; None: any."""


def loaded(kind: Kind, name: str, device: str, call: Any, files: Files) -> Engine:
    """Load a model in this process.

    Parameters
    ----------
    kind, name
        What it is, and what it is called in errors.
    device
        ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``.
    call
        The function, or the module, which is moved to the device.
    files
        Of a model that is a file.

    Raises
    ------
    ModelError
        When this process has no such device, or the file holds no such model.
    MissingExtraError
        When torch or onnxruntime is not installed here.
    """
    match kind:
        case "function":
            return Engine(call, "cpu", lanes=_cores())  # as those of map() it is called from several threads
        case "onnx":
            return _onnx(name, device, files)
        case "module":
            return _torch(call.eval(), name, device)
        case "export":
            return _export(name, device, files[0][1])
        case _:
            return _torch(_torchscript(name, files[0][1]).eval(), name, device)


def _cores() -> int:
    """Return the cores that are this process's: of a Dask worker, as many as it has threads."""
    distributed = sys.modules.get("distributed")
    if distributed is not None:
        try:
            return max(1, int(distributed.get_worker().state.nthreads))
        except (ValueError, AttributeError):  # no task of a worker
            pass
    return int(CPU_COUNT)


# torch


@dataclass(frozen=True)
class _TorchCall:
    """A torch module in eval mode; nothing is kept for gradients."""

    module: Callable[..., Any]
    device: str

    def __call__(self, inputs: Inputs) -> Any:
        import torch

        with torch.inference_mode():
            tensors = tree_map(self._tensor, inputs)
            answer = self.module(*tensors) if isinstance(tensors, tuple) else self.module(tensors)
            return tree_map(_numpy, _plain_tree(answer))

    def _tensor(self, leaf: Any) -> Any:
        import torch

        if not isinstance(leaf, np.ndarray):
            return leaf
        array = np.require(leaf, _WIDER.get(leaf.dtype.name), ["C", "W"])
        return torch.from_numpy(array).to(self.device)


def _plain_tree(answer: Any) -> Any:
    """Return what a model answers as plain dicts and tuples: transformers' outputs are mappings of their own."""
    if isinstance(answer, Mapping):
        return {key: value for key, value in answer.items() if value is not None}
    return answer


def _numpy(leaf: Any) -> Any:
    import torch

    if not isinstance(leaf, torch.Tensor):
        return leaf
    if leaf.is_floating_point() and leaf.dtype != torch.float64:
        leaf = leaf.float()  # NumPy has no bfloat16
    return leaf.cpu().numpy()


def _torch_device(name: str, device: str) -> str:
    """Return the device as torch calls it, once this process was seen to have it."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    word, _, number = device.partition(":")
    if word == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(number or 0) >= count:
            have = f"{count} of them" if count else "none: torch finds no GPU"
            raise _no_device(name, device, have)
    if word == "mps" and not torch.backends.mps.is_available():
        raise _no_device(name, device, "none: torch finds no Apple GPU")
    return device


def _torch(module: Any, name: str, device: str) -> Engine:
    with needs("torch", f"model {name}"):
        import torch
    place = _torch_device(name, device)
    # a Dask worker's processes compute with one thread each: several batches then use its cores
    lanes = max(1, _cores() // torch.get_num_threads()) if place == "cpu" else 1
    return Engine(_TorchCall(module.to(place), place), place, lanes)


def _only_size(shapes: Sequence[Sequence[Any]]) -> int | None:
    """Return how many chips a file takes, where its inputs say one number of them."""
    sizes = [shape[0] for shape in shapes if len(shape)]
    is_one = all(isinstance(size, int) for size in sizes) and len(set(sizes)) == 1
    return int(sizes[0]) if is_one else None


def _export(name: str, device: str, content: bytes) -> Engine:
    with needs("torch", f"model {name}"):
        import torch
    place = _torch_device(name, device)
    try:
        with _quiet("torch.export"):
            program = torch.export.load(io.BytesIO(content))
    except Exception as error:
        raise _no_model(name, "a program that torch.export.save wrote", error) from error
    if place != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, place)
    lanes = max(1, _cores() // torch.get_num_threads()) if place == "cpu" else 1
    shapes = [
        node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder"
        and node.name in program.graph_signature.user_inputs
        and "val" in node.meta
    ]
    return Engine(_TorchCall(program.module(), place), place, lanes, _only_size(shapes))


def _torchscript(name: str, content: bytes) -> Any:
    """Load TorchScript, whose reader makes no object but its own: a pickle of anything else is refused."""
    with needs("torch", f"model {name}"):
        import torch
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch prefers torch.export
            load: Any = torch.jit.load
            return load(io.BytesIO(content), map_location="cpu")
    except Exception as error:
        raise _no_model(
            name, "TorchScript, as torch.jit.save wrote it", error,
            "A checkpoint holds weights, or pickled code, which is not loaded: build the module, "
            "module.load_state_dict(torch.load(path, weights_only=True)), and give rd.Model the module.",
        ) from error  # fmt: skip


class _quiet:  # noqa: N801
    """Keep a logger silent for the length of a block: what it would say stands in the error."""

    def __init__(self, name: str) -> None:
        import logging

        self._logger = logging.getLogger(name)

    def __enter__(self) -> None:
        self._before = self._logger.disabled
        self._logger.disabled = True

    def __exit__(self, *_: object) -> None:
        self._logger.disabled = self._before


# ONNX


@dataclass(frozen=True)
class _OnnxCall:
    """A session of onnxruntime."""

    session: Any
    types: Mapping[str, str | None]
    """Input -> NumPy's name of its type; None: one that NumPy lacks."""
    outputs: tuple[str, ...]

    def __call__(self, inputs: Inputs) -> Any:
        feed = inputs if isinstance(inputs, dict) else self._by_place(inputs)
        if feed.keys() != self.types.keys():
            raise ValueError(
                f"inputs called {listed(feed)}; the file's are called {listed(self.types)}: "
                "Model(inputs=) may return a dict with these names"
            )
        typed = {key: np.ascontiguousarray(value, self.types[key]) for key, value in feed.items()}
        return dict(zip(self.outputs, self.session.run(None, typed), strict=True))

    def _by_place(self, inputs: Inputs) -> dict[str, Any]:
        values = inputs if isinstance(inputs, tuple) else (inputs,)
        if len(values) != len(self.types):
            raise ValueError(
                f"{len(values)} inputs; the file has {len(self.types)}, called {listed(self.types)}: "
                "Model(inputs=) may return a dict with these names"
            )
        return dict(zip(self.types, values, strict=True))


def _onnx(name: str, device: str, files: Files) -> Engine:
    with needs("onnx", f"model {name}"):
        import onnxruntime as ort
    providers = _onnx_providers(name, device, ort.get_available_providers())
    options = ort.SessionOptions()
    options.intra_op_num_threads = _cores()
    options.log_severity_level = 3  # errors, which are raised as well
    (_, content), *beside = files
    if beside:
        options.add_external_initializers_from_files_in_memory(
            [file for file, _ in beside], [data for _, data in beside], [len(data) for _, data in beside]
        )
    try:
        session = ort.InferenceSession(content, options, providers=providers)
    except Exception as error:
        raise _no_model(
            name, "an ONNX model", error,
            "Weights that lie beside it must be in <name>.onnx.data; onnx.save(onnx.load(path), path) puts all into "
            "one file.",
        ) from error  # fmt: skip
    chosen = session.get_providers()[0]
    place = next((word for word, provider in _PROVIDERS.items() if provider == chosen), "cpu")
    if device != "auto" and place != device.partition(":")[0]:
        raise _no_device(name, device, f"none that onnxruntime can use: it chose {chosen}")
    nodes = session.get_inputs()
    types = {node.name: _ONNX_TYPES.get(node.type) for node in nodes}
    call = _OnnxCall(session, types, tuple(node.name for node in session.get_outputs()))
    return Engine(
        call, place, 1, _only_size([node.shape for node in nodes])
    )  # a session has threads of its own


def _onnx_providers(name: str, device: str, available: Sequence[str]) -> list[Any]:
    """Return the providers that onnxruntime is to try, the last one being the CPU where that may be."""
    word, _, number = device.partition(":")
    if word == "cpu":
        return ["CPUExecutionProvider"]
    provider = _PROVIDERS["cuda" if word == "auto" else word]
    if provider not in available:
        if word == "auto":
            return ["CPUExecutionProvider"]
        raise _no_device(
            name, device, f"none: onnxruntime has {listed(available)}",
            "Install the build of onnxruntime for it (onnxruntime-gpu), or say device='auto'.",
        )  # fmt: skip
    own = (provider, {"device_id": int(number or 0)}) if word != "mps" else provider
    return [own, "CPUExecutionProvider"]


# Errors


def _no_device(name: str, device: str, have: str, remedy: str = "") -> ModelError:
    return ModelError(
        f"model {name} on device {device!r}", have, "a device of the process that computes",
        remedy or "Say device='auto', or have workers with a GPU.",
    )  # fmt: skip


def _no_model(name: str, what: str, error: Exception, remedy: str = "") -> ModelError:
    text = f"{type(error).__name__}: {error}".splitlines()[0]
    return ModelError(f"file {name}", f"{text:.300}", what, remedy)
