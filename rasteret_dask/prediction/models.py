# SPDX-License-Identifier: Apache-2.0
"""Models as values: what a user gives, what travels to a process, and what runs there."""

from __future__ import annotations

import copy
import hashlib
import os
import posixpath
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import cloudpickle
import numpy as np
from numpy.typing import NDArray

from rasteret_dask.errors import ModelError, PlanError, ReadError
from rasteret_dask.lists import first_of, listed
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.planning.plan import digest
from rasteret_dask.prediction.modelidentity import bytes_digest, function_digest, module_digest
from rasteret_dask.prediction.modelinputs import Inputs, ModelInputs, described, joined, repeated, rows_of
from rasteret_dask.prediction.modelkinds import SUFFIXES, Engine, Files, Kind, loaded
from rasteret_dask.prediction.modelqueue import PATIENCE_S, ModelQueue, Piece
from rasteret_dask.streams.stream import Normalize, prepared
from rasteret_dask.tasks.batches import Arrays, SourcePixels, take

__all__ = ["Activation", "Model", "ModelLike", "ModelParcel", "ModelRunner", "model_of", "parcel_of"]

Activation: TypeAlias = Literal["softmax", "sigmoid"]
"""What is applied to a model's numbers, over axis 1."""

ModelLike: TypeAlias = "Model | Callable[..., Any] | str | os.PathLike[str]"
"""What every exit that predicts takes for a model."""

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_NAMED = 4
"""Chips that an error names."""


@dataclass(frozen=True)
class Model:
    """A trained model, and how chips become its input.

    Parameters
    ----------
    call
        A function of arrays, a ``torch.nn.Module``, or the path or URL of a file: ``.onnx`` (run by onnxruntime),
        ``.pt2`` (of ``torch.export.save``; load only files that you trust, as torch reads them with pickle), ``.pt`` or
        ``.ts`` (TorchScript, which holds no pickled code; a checkpoint of weights or a pickled module is refused).
        Functions are called from several threads at the same time. A module is copied, and runs in eval mode.
    device
        ``"auto"``: a GPU of CUDA where the process that computes has one, else the CPU; or ``"cpu"``, ``"cuda"``,
        ``"cuda:1"``, ``"mps"``. A function chooses for itself.
    normalize
        As of :meth:`Chips.stream`: what ``stats()`` of the training chips returned, or a function of a batch. Give what
        the stream had that the model was trained with.
    fill
        What invalid pixels hold when the model sees them, after ``normalize``.
    inputs
        A function of a batch (:data:`rasteret_dask.tasks.batches.Arrays`) that returns the model's input: an array
        with chips along axis 0, a tuple of several, or a dict. None: the pixels (chip, time, band, y, x) of the one
        source, without the time axis where it has one entry; of several sources a dict, source -> pixels. A function
        of arrays and a torch module get a dict as one argument and a tuple as several. To ONNX a dict's keys are
        the names of its inputs; values get the type that the file states. A torch module gets tensors on its device:
        uint16 becomes int32 and uint32 int64, as in ``torchdata``.
    activation
        ``"softmax"`` or ``"sigmoid"``: applied to what the model returns, over axis 1.
    output
        Which of several outputs: its name in a dict or an ONNX file, its number in a tuple. None: the only one.
    version
        As of functions given to ``map()``: stands in place of the text of functions and of the module's classes where
        these cannot tell what they do, as of functions that close over data. Weights count all the same.

    Raises
    ------
    ModelError
        When a local file is not there.
    PlanError
        When an argument is none of these.

    Examples
    --------
    >>> def ndvi(pixels):  # (chip, time, band, y, x), or (chip, band, y, x) where there is one time
    ...     red, nir = pixels[:, -1, 0], pixels[:, -1, 1]
    ...     return (nir - red) / (nir + red + 1e-6)
    >>> rd.Model(ndvi)
    Model(function ndvi)
    >>> stats = chips.select("train").stats()
    >>> rd.Model(ndvi, normalize=stats, fill=0.0).name
    'ndvi'
    """

    call: Callable[..., Any] | str | os.PathLike[str]
    device: str = "auto"
    normalize: Normalize | None = None
    fill: float = 0.0
    inputs: Callable[[Arrays], Any] | None = None
    activation: Activation | None = None
    output: str | int | None = None
    version: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise PlanError("Model(device=)", repr(self.device), "'auto', 'cpu', 'cuda', 'cuda:1' or 'mps'")
        if self.activation is not None and self.activation not in get_args(Activation):
            raise PlanError("Model(activation=)", repr(self.activation), "'softmax', 'sigmoid' or None")
        if isinstance(self.fill, bool) or not isinstance(self.fill, int | float | np.number):
            raise PlanError("Model(fill=)", repr(self.fill), "a number")
        if self.inputs is not None and not callable(self.inputs):
            raise PlanError("Model(inputs=)", repr(self.inputs), "a function of a batch")
        if self.version is not None and not isinstance(self.version, str):
            raise PlanError("Model(version=)", repr(self.version), "a text")
        if self.kind == "function" and self.device not in ("auto", "cpu"):
            raise PlanError(
                f"Model(device={self.device!r})", f"a function, {self.name}", "a torch module or a file",
                "A function of arrays chooses its device itself.",
            )  # fmt: skip
        if isinstance(self.call, str | os.PathLike):
            place = Place.of(self.call)
            if place.is_local and not place.is_file:
                raise ModelError(f"model {place.url}", "no such file", "a file of a model")

    @property
    def kind(self) -> Kind:
        """What it is: ``"function"``, ``"module"``, ``"onnx"``, ``"export"`` or ``"torchscript"``.

        Raises
        ------
        PlanError
            When it is none of these.

        Examples
        --------
        >>> rd.Model(len).kind
        'function'
        """
        if isinstance(self.call, str | os.PathLike):
            suffix = posixpath.splitext(os.fspath(self.call))[1].lower()
            if suffix not in SUFFIXES:
                raise PlanError(
                    f"model {os.fspath(self.call)}", f"a file that ends in {suffix!r}",
                    f"one that ends in {', '.join(SUFFIXES)}",
                    "Of a checkpoint of weights, build the module, load them, and give the module.",
                )  # fmt: skip
            return SUFFIXES[suffix]
        torch = sys.modules.get("torch")
        if torch is not None:
            if isinstance(self.call, torch.jit.ScriptModule):
                return "torchscript"
            if isinstance(self.call, torch.nn.Module):
                return "module"
            if isinstance(self.call, torch.export.ExportedProgram):
                return "export"
        if not callable(self.call):
            raise PlanError(
                "model", f"a {type(self.call).__name__}", "a function of arrays, a torch.nn.Module, or a path"
            )
        return "function"

    @property
    def name(self) -> str:
        """What it is called in messages: of a file its name, of a module its class, of a function its own.

        Examples
        --------
        >>> rd.Model(len).name
        'len'
        """
        if isinstance(self.call, str | os.PathLike):
            return posixpath.basename(os.fspath(self.call))
        return str(getattr(self.call, "__qualname__", type(self.call).__qualname__)).rpartition(".")[2]

    def __repr__(self) -> str:
        device = "" if self.device == "auto" else f" on {self.device}"
        return f"Model({self.kind} {self.name}{device})"


def model_of(model: ModelLike) -> Model:
    """Return what every exit that predicts was given, as a Model.

    Raises
    ------
    PlanError
        When it is neither a model, a function, a module nor a path.
    """
    return model if isinstance(model, Model) else Model(model)


@dataclass(frozen=True)
class ModelParcel:
    """A model as what travels to the processes that run it; made by :func:`parcel_of`.

    It pickles, weights and all. :meth:`apart` returns one that is a few bytes, for graphs of many tasks.
    """

    name: str
    kind: Kind
    digest: str
    """What decides its numbers: the file's bytes, weights, functions, and every field but device and batch size."""
    device: str
    batch_size: int
    activation: Activation | None
    output: str | int | None
    content: bytes | None = field(repr=False)
    """A pickled :class:`_Content`; None: it lies at ``place``."""
    place: str | None = None
    checksum: str = ""
    """SHA-256 of the content that lies at ``place``; it travels with the task, over the cluster's connections."""

    def apart(self, folder: str) -> tuple[ModelParcel, str, bytes]:
        """Return a parcel without its content, the name under which that is to lie in a folder, and the content."""
        assert self.content is not None, "it lies somewhere already"
        checksum = hashlib.sha256(self.content).hexdigest()
        name = f"model-{checksum[:16]}.bin"
        place = remote.join(folder, name)
        return replace(self, content=None, place=place, checksum=checksum), name, self.content

    def runner(self) -> ModelRunner:
        """Return this process's runner of the model, loaded and on its device; the same one each time.

        Raises
        ------
        ModelError
            When the process has no such device, or the model cannot be loaded.
        MissingExtraError
            When torch or onnxruntime is not installed here.
        """
        key = (self.digest, self.device, self.batch_size)
        with _LOCK:
            if key not in _RUNNERS:
                for other in [k for k, runner in _RUNNERS.items() if not runner.queue.callers]:
                    del _RUNNERS[other]  # memory of a GPU holds one model, but for those that are in use
                _RUNNERS[key] = ModelRunner(self)
            return _RUNNERS[key]

    def trial(self, arrays: Arrays) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Run the model on a few made-up chips in this process: what is wrong with it shows before pixels are read.

        Parameters
        ----------
        arrays
            Chips with the shapes and types of those that will come.

        Returns
        -------
        tuple
            The shape of the answer to one chip, and its dtype.

        Raises
        ------
        ModelError
            As :meth:`ModelRunner.predict`, and :meth:`runner`.
        """
        answer = self.runner().predict(arrays)
        return answer.shape[1:], answer.dtype

    def unpacked(self) -> _Content:
        """Return the model, and what is done to its inputs, in this process."""
        content = self.content
        if content is None:
            assert self.place is not None
            content = remote.get(self.place)
            # it is unpickled, so whoever may write to the place must not decide what runs here
            if hashlib.sha256(content).hexdigest() != self.checksum:
                raise ModelError(
                    f"model {self.name} at {remote.redact(self.place)}", "other bytes than were put there",
                    "those of this run", "Somebody changed them: run it again, in a place that only you write to.",
                )  # fmt: skip
        try:
            result: _Content = cloudpickle.loads(content)
        except (ImportError, AttributeError) as error:
            raise ModelError(
                f"model {self.name}", f"{type(error).__name__}: {error}", "code that this process can import",
                "Install on the workers what the model needs, or send it: client.upload_file('model.py').",
            ) from error  # fmt: skip
        return result


@dataclass(frozen=True)
class _Content:
    """What a process needs to run a model."""

    call: Any
    files: Files
    inputs: ModelInputs


def parcel_of(model: Model, batch_size: int, pixels: Mapping[str, SourcePixels]) -> ModelParcel:
    """Return a model as what travels to the processes that run it.

    Parameters
    ----------
    model
        The model.
    batch_size
        How many chips it gets at once, at most.
    pixels
        Source -> what the chips' pixels are: ``normalize`` is checked against them, and messages name their bands.

    Raises
    ------
    PlanError
        When ``batch_size`` is no number of chips, ``normalize`` does not fit the chips, or a function can only be told
        by a ``version``.
    ModelError
        When its file cannot be read.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
        raise PlanError("predict(batch_size=)", repr(batch_size), "a whole number from 1 on")
    normalize = prepared(model.normalize, None, pixels)
    bands = {name: own.bands for name, own in pixels.items()}
    inputs = ModelInputs(normalize, float(model.fill), model.inputs, bands)
    call, files, known = _parts(model)
    content = cloudpickle.dumps(_Content(call, files, inputs))
    identity = digest(
        "model", model.kind, known,
        function_digest(model.normalize, model.version, "Model(normalize=)"),
        function_digest(model.inputs, model.version, "Model(inputs=)"),
        repr(float(model.fill)), model.activation, model.output, model.version,
    )  # fmt: skip
    return ModelParcel(
        model.name,
        model.kind,
        identity,
        model.device,
        int(batch_size),
        model.activation,
        model.output,
        content,
    )


def _parts(model: Model) -> tuple[Any, Files, str]:
    """Return the code of a model, its files, and what these are known by."""
    call = model.call
    if isinstance(call, str | os.PathLike):
        files = _files(Place.of(call), model.kind)
        return None, files, bytes_digest(*(content for _, content in files))
    if model.kind == "module":
        module: Any = getattr(call, "_orig_mod", call)  # what torch.compile was given
        known = module_digest(module, model.version)
        if any(tensor.device.type != "cpu" for tensor in (*module.parameters(), *module.buffers())):
            module = copy.deepcopy(module).to("cpu")  # else only a process with such a GPU could unpickle it
        return module, (), known
    if model.kind in ("torchscript", "export"):
        content = _saved(call, model.kind)
        return None, ((model.name, content),), bytes_digest(content)
    return call, (), function_digest(call, model.version, "Model()")


def _saved(call: Any, kind: Kind) -> bytes:
    """Return TorchScript or an exported program as its file."""
    import io
    import warnings

    import torch

    into = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch prefers torch.export
        torch.export.save(call, into) if kind == "export" else torch.jit.save(call, into)
    return into.getvalue()


def _files(place: Place, kind: Kind) -> Files:
    """Return the bytes of a model's file, and of the weights that torch puts beside an ONNX file."""
    try:
        files = [(posixpath.basename(place.url), remote.get(place.url))]
    except ReadError as error:
        raise ModelError(f"model {remote.redact(place.url)}", error.found, "a file of a model") from error
    if kind == "onnx":
        beside = f"{place.url}.data"
        if Path(beside).is_file() if place.is_local else remote.exists(beside):
            files.append((posixpath.basename(beside), remote.get(beside)))
    return tuple(files)


_LOCK = threading.Lock()
_RUNNERS: dict[tuple[str, str, int], ModelRunner] = {}
"""This process's: those in use, and the last one."""


def _forget() -> None:
    """Start anew in a forked child: the threads that wait, and what a GPU holds, stayed in its parent."""
    global _LOCK
    _LOCK = threading.Lock()
    _RUNNERS.clear()


os.register_at_fork(after_in_child=_forget)


class ModelRunner:
    """A model that is loaded in this process: threads bring their chips, which fill its batches.

    Parameters
    ----------
    parcel
        The model.
    patience_s
        Seconds after which a batch goes though it is not full, and though threads that are reading may bring more.
    """

    def __init__(self, parcel: ModelParcel, patience_s: float | None = PATIENCE_S) -> None:
        content = parcel.unpacked()
        self.parcel, self._inputs = parcel, content.inputs
        self.engine: Engine = loaded(parcel.kind, parcel.name, parcel.device, content.call, content.files)
        self.batch_size = self.engine.chips or parcel.batch_size
        self.queue = ModelQueue(self._compute, self.batch_size, self.engine.lanes, patience_s)

    def reading(self) -> AbstractContextManager[None]:
        """Say for the length of a block that this thread may bring chips: then batches wait for them."""
        return self.queue.reading()

    def predict(self, arrays: Arrays) -> NDArray[Any]:
        """Return what the model makes of chips, once it has seen them all.

        Parameters
        ----------
        arrays
            Chips: at least the sources' pixels with their ``valid``, and ``chip_id``.

        Returns
        -------
        numpy.ndarray
            Chips along axis 0. Floats are float32; whole numbers stay as the model gives them.

        Raises
        ------
        ModelError
            When the model raises, or returns no array of numbers with these chips along axis 0.
        """
        parts = [rows for _, rows in self.answers(arrays)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def answers(self, arrays: Arrays) -> Iterator[tuple[int, NDArray[Any]]]:
        """Yield what the model makes of chips, batch by batch: the first of its chips, and a row for each.

        Parameters
        ----------
        arrays
            As of :meth:`predict`.

        Raises
        ------
        ModelError
            As :meth:`predict`.
        """
        chips = len(arrays["chip_id"])
        if not chips:
            raise PlanError("predict", "no chips", "at least one")
        alike: tuple[tuple[int, ...], np.dtype[Any]] | None = None
        with self.reading():
            for start in range(0, chips, self.batch_size):
                batch = take(arrays, np.arange(start, min(start + self.batch_size, chips)))
                rows = self.queue.results(self._brought(batch), len(batch["chip_id"]))
                if alike not in (None, (rows.shape[1:], rows.dtype)):
                    shape, dtype = alike
                    raise ModelError(
                        self._subject(batch["chip_id"]), described(rows), f"{dtype} {(len(rows), *shape)}",
                        "A model must answer all chips alike.",
                    )  # fmt: skip
                alike = rows.shape[1:], rows.dtype
                yield start, rows

    def _brought(self, batch: Arrays) -> _Brought:
        try:
            inputs = self._inputs(batch)
        except PlanError:
            raise
        except Exception as error:
            raise ModelError(
                f"inputs of {self._subject(batch['chip_id'])}", _text(error), "what the model is called with",
                "Model(normalize=) and Model(inputs=) get a batch as streams give it.",
            ) from error  # fmt: skip
        return _Brought(inputs, tuple(map(str, batch["chip_id"])), self._inputs.words(inputs, batch))

    def _compute(self, pieces: Sequence[Piece]) -> NDArray[Any]:
        """Run one batch."""
        inputs = joined([rows_of(share.value.inputs, start, stop) for share, start, stop in pieces])
        ids = [one for share, start, stop in pieces for one in share.value.ids[start:stop]]
        if self.engine.chips:
            inputs = repeated(inputs, self.engine.chips)
        words = pieces[0][0].value.words
        try:
            answer = self.engine.call(inputs)
        except Exception as error:
            raise ModelError(
                self._subject(ids), _text(error), f"an answer to {words}", _remedy(error, self.batch_size)
            ) from error
        return self._rows(answer, ids, words)

    def _rows(self, answer: Any, ids: Sequence[str], words: str) -> NDArray[Any]:
        """Return what the model answered as a row a chip."""
        rows = self._chosen(answer, ids)
        if isinstance(rows, np.ma.MaskedArray):
            raise ModelError(
                self._subject(ids), "a masked array", "a number for each chip and pixel",
                "Fill what is masked: answer.filled(0). Pixels whose input is invalid are no part of a map anyway.",
            )  # fmt: skip
        if not isinstance(rows, np.ndarray) or rows.dtype.kind not in "fiub":
            kind = f"an array of {rows.dtype}" if isinstance(rows, np.ndarray) else f"a {type(rows).__name__}"
            raise ModelError(self._subject(ids), kind, f"an array of numbers for {words}")
        expected = self.engine.chips or len(ids)
        if not rows.ndim or len(rows) != expected:
            raise ModelError(
                self._subject(ids),
                f"an answer of shape {rows.shape}",
                f"{expected} chips along axis 0, for {words}",
            )
        return _activated(rows[: len(ids)], self.parcel.activation)

    def _chosen(self, answer: Any, ids: Sequence[str]) -> Any:
        output = self.parcel.output
        if isinstance(answer, Mapping):
            values = dict(answer)
        elif isinstance(answer, tuple | list):
            values = dict(enumerate(answer))
        else:
            return answer
        key = next(iter(values)) if output is None and len(values) == 1 else output
        if key not in values:
            raise ModelError(
                self._subject(ids), f"{len(values)} outputs: {listed(values)}",
                "one output" if output is None else f"one called {output!r}", "Say which: Model(output=...).",
            )  # fmt: skip
        return values[key]

    def _subject(self, ids: Sequence[str] | NDArray[Any]) -> str:
        return f"model {self.parcel.name} on chips {first_of(ids, _NAMED)}"


@dataclass(frozen=True)
class _Brought:
    """What one thread brings: the model's inputs, of which chips, and what they are in words."""

    inputs: Inputs
    ids: tuple[str, ...]
    words: str


def _text(error: Exception) -> str:
    """Return an error in one line; of a long one the beginning and the end, where TorchScript says what it was."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 500 else f"{text[:240]} ... {text[-240:]}"


def _remedy(error: Exception, batch_size: int) -> str:
    if "OutOfMemory" in type(error).__name__ or isinstance(error, MemoryError):
        return f"Give it less at once: predict(batch_size={max(1, batch_size // 2)})."
    return "Give it what it was trained with: the same bands, times and sizes, Model(normalize=) and Model(inputs=)."


def _activated(rows: NDArray[Any], activation: Activation | None) -> NDArray[Any]:
    """Return numbers as float32 or whole ones, after the activation: always a copy.

    Of a model that keeps the memory of its answer, the next call would write over an answer that is still needed.
    """
    if activation is None:
        kinds: dict[str, type[Any]] = {"b": np.uint8, "f": np.float32}
        return rows.astype(kinds.get(rows.dtype.kind, rows.dtype))
    numbers = rows.astype(np.float32)
    if activation == "sigmoid":
        with np.errstate(over="ignore"):
            return np.asarray(1 / (1 + np.exp(-numbers)), np.float32)
    numbers -= numbers.max(axis=1, keepdims=True)
    np.exp(numbers, out=numbers)
    numbers /= numbers.sum(axis=1, keepdims=True)
    return numbers
