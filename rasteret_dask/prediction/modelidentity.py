# SPDX-License-Identifier: Apache-2.0
"""What a model is known by: the same in every process, and another one where it would give other numbers."""

from __future__ import annotations

import hashlib
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rasteret_dask.errors import PlanError
from rasteret_dask.planning.functions import Function, plain
from rasteret_dask.statistics.stats import Stats

__all__ = ["bytes_digest", "function_digest", "module_digest"]

_ADDRESS = re.compile(r"\bat 0x[0-9a-f]+")


def bytes_digest(*parts: bytes | memoryview) -> str:
    """Return the sha256 of bytes, one part after another."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    return total.hexdigest()


def function_digest(function: Callable[..., Any] | Any, version: str | None, field: str) -> str:
    """Return what a user's function, statistics, or a method of these are known by.

    Parameters
    ----------
    function
        What was given as ``field``; ``functools.partial`` of it counts with its plain arguments.
    version
        As of every function of a user.
    field
        What it was given as, for errors: ``"Model(normalize=)"``.

    Raises
    ------
    PlanError
        When it closes over data or its source cannot be found, and no ``version`` was given.
    """
    if function is None:
        return ""
    if isinstance(function, Stats):
        return bytes_digest(function.to_json().encode())
    if isinstance(holder := getattr(function, "__self__", None), Stats):
        return f"{function.__name__} of {function_digest(holder, version, field)}"
    if isinstance(function, partial):
        arguments = repr((plain(function.args), sorted((k, plain(v)) for k, v in function.keywords.items())))
        if _ADDRESS.search(arguments):
            raise _nameless(field, f"a partial with arguments {arguments:.80}")
        return f"{function_digest(function.func, version, field)} {arguments}"
    try:
        known = Function.of(function, version)
    except PlanError as error:
        raise _nameless(f"{field}: {error.subject}", error.found) from error
    return f"{known.module}.{known.name} {known.source}"


def module_digest(module: Any, version: str | None) -> str:
    """Return what a ``torch.nn.Module`` is known by: its parts, their code, their plain attributes, all weights.

    Parameters
    ----------
    module
        The module.
    version
        Stands in place of code and attributes, which are not looked at; weights count all the same.

    Raises
    ------
    PlanError
        When an attribute is neither a plain value, a function nor a tensor, and no ``version`` was given.
    """
    total = hashlib.sha256()
    if version is None:
        for name, part in module.named_modules():
            total.update(f"{name} {_code(type(part))} {_attributes(name, part)}\n".encode())
    else:
        total.update(f"{type(module).__qualname__} version {version}".encode())
    tensors = [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(_tensor_bytes(tensor))
    return total.hexdigest()


def _tensor_bytes(tensor: Any) -> memoryview:
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b"")


def _code(kind: type) -> str:
    """Return what a class is known by: its name, and its text where a user wrote it."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind.__module__.partition(".")[0] == "torch":
        return name
    try:
        text = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):  # of a notebook's cell that was run again, or compiled
        return f"{name} {_methods(kind)}"
    return f"{name} {bytes_digest(text.encode())}"


def _methods(kind: type) -> str:
    codes = [value.__code__.co_code for value in vars(kind).values() if inspect.isfunction(value)]
    return bytes_digest(*codes)


def _attributes(name: str, part: Any) -> str:
    """Return the attributes of a part of a module as text; hooks, weights and further parts are torch's own."""
    values = {
        key: value for key, value in vars(part).items() if not key.startswith("_") and key != "training"
    }
    return "|".join(
        f"{key}={_text(f'{name}.{key}'.strip('.'), value)}" for key, value in sorted(values.items())
    )


def _text(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return repr([(str(key), _text(name, one)) for key, one in value.items()])
    if isinstance(value, list | tuple):
        return repr([_text(name, one) for one in value])
    if inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
    if type(value).__name__ == "Tensor":
        return bytes_digest(_tensor_bytes(value))
    text = repr(plain(value))
    if _ADDRESS.search(text):
        raise _nameless(f"model: attribute {name}", f"a {type(value).__name__}, whose text is its address")
    return text


def _nameless(subject: str, thing: str) -> PlanError:
    return PlanError(
        subject, thing, "what is the same in every process",
        "Say which version of the model it is: rd.Model(model, version='1').",
    )  # fmt: skip
