# SPDX-License-Identifier: Apache-2.0
"""What a model is known by: the same in every process, and another one where it would give other numbers."""

from __future__ import annotations

import hashlib
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import CodeType
from typing import Any

import numpy as np

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
        What was given as ``field``; ``functools.partial`` of it counts with its arguments, weights of modules too.
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
        values = [*enumerate(function.args), *sorted(function.keywords.items())]
        arguments = [(key, _argument(f"{field}: argument {key}", one, version)) for key, one in values]
        return f"{function_digest(function.func, version, field)} {arguments}"
    try:
        known = Function.of(function, version)
    except PlanError as error:
        raise _nameless(f"{field}: {error.subject}", error.found) from error
    return f"{known.module}.{known.name} {known.source}"


def _argument(subject: str, value: Any, version: str | None) -> str:
    if hasattr(value, "named_modules"):
        return module_digest(value, version)
    return "" if version is not None else _text(subject, value)


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
            total.update(f"{name} {_classes(part)} {_attributes(name, part)} {_hooks(part)}\n".encode())
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


def _classes(part: Any) -> str:
    """Return what a part's class is known by, and the classes that a user wrote which it inherits from."""
    kind = type(part)
    return " ".join(_code(one) for one in kind.__mro__ if one is kind or not _is_library(one))


def _is_library(kind: Any) -> bool:
    return str(kind.__module__).partition(".")[0] in ("torch", "builtins", "typing", "abc")


def _code(kind: type) -> str:
    """Return what a class is known by: its name, and its text where a user wrote it."""
    name = f"{kind.__module__}.{kind.__qualname__}"
    return name if _is_library(kind) else f"{name} {_source(kind)}"


def _source(thing: Any) -> str:
    """Return the digest of what a class or function says."""
    try:
        return bytes_digest(textwrap.dedent(inspect.getsource(thing)).encode())
    except (OSError, TypeError):  # of a notebook's cell that was run again, or compiled
        functions = [thing] if inspect.isfunction(thing) else filter(inspect.isfunction, vars(thing).values())
        return bytes_digest(*(part for one in functions for part in _instructions(one.__code__)))


def _instructions(code: CodeType) -> Iterator[bytes]:
    """Yield what code does, and the constants and names that it does it with."""
    yield code.co_code
    yield repr(code.co_names).encode()
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _instructions(constant)
        else:
            yield repr(plain(constant)).encode()


def _attributes(name: str, part: Any) -> str:
    """Return the attributes of a part of a module as text; weights and further parts are torch's own."""
    values = {
        key: value
        for key, value in vars(part).items()
        if key != "training" and (not key.startswith("_") or _is_private(part, key, value))
    }
    return "|".join(
        f"{key}={_text('model: attribute ' + f'{name}.{key}'.strip('.'), value)}"
        for key, value in sorted(values.items())
    )


def _is_private(part: Any, key: str, value: Any) -> bool:
    """Tell whether an attribute that begins with "_" is data of the user's class, and not what torch keeps there."""
    import torch

    return not _is_library(type(part)) and key not in vars(torch.nn.Module()) and _is_data(value)


def _is_data(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(_is_data(one) for one in value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return all(_is_data(one) for one in value)
    return isinstance(
        value, bool | int | float | complex | str | bytes | np.generic | np.ndarray | None
    ) or _is_of_torch(value)


def _hooks(part: Any) -> str:
    """Return what is called around a part's forward."""
    hooks = [*part._forward_pre_hooks.values(), *part._forward_hooks.values()]
    kinds = [one if inspect.isroutine(one) else type(one) for one in hooks]
    return " ".join(f"{one.__module__}.{one.__qualname__}" for one in kinds)


def _is_of_torch(value: Any) -> bool:
    """Tell whether a value is a tensor or a module."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor | torch.nn.Module)


def _text(subject: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return repr([(str(key), _text(subject, one)) for key, one in value.items()])
    if isinstance(value, list | tuple):
        return repr([_text(subject, one) for one in value])
    if _is_of_torch(value):
        return _held_module(value) if hasattr(value, "named_modules") else _tensor_text(value)
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return f"{value.dtype.str} {value.shape} {bytes_digest(np.ascontiguousarray(value).tobytes())}"
    if inspect.isroutine(value) or inspect.isclass(value) or inspect.ismodule(value):
        name = f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"
        return f"{name} {_source(value)}" if inspect.isfunction(value) and not _is_library(value) else name
    text = repr(plain(value))
    if _ADDRESS.search(text):
        raise _nameless(subject, f"a {type(value).__name__}, whose text is its address")
    if hasattr(value, "shape") and not isinstance(value, np.generic):  # tables show some of their numbers
        raise _nameless(subject, f"a {type(value).__name__}, whose text leaves numbers out")
    return text


def _held_module(module: Any) -> str:
    """Return what a module is known by that is no part of the one that holds it, and may hold that one again."""
    return f"{_classes(module)} {module_digest(module, '')}"


def _tensor_text(tensor: Any) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} {bytes_digest(_tensor_bytes(tensor))}"


def _nameless(subject: str, thing: str) -> PlanError:
    return PlanError(
        subject, thing, "what is the same in every process",
        "Say which version of the model it is: rd.Model(model, version='1').",
    )  # fmt: skip
