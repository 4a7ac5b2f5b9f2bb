# SPDX-License-Identifier: Apache-2.0
"""What a recipe names as ``"module:name"``: functions and classes, of its folder, an installed package or a file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from rasteret_dask.errors import PlanError
from rasteret_dask.recipes.source import nearest

__all__ = ["imported", "importing_from", "named"]

_STAMP = "__rasteret_dask_recipe__"
"""Attribute of modules that were imported from a recipe's folder: the time of their file."""


def named(text: str, folder: Path) -> Any:
    """Return what ``"module:name"`` names.

    A module of the recipe's folder comes before an installed one of that name, is imported again where its file
    changed, and travels to workers as it is: they need no copy of the file.

    Parameters
    ----------
    text
        A module and a name in it; or a file and a name, ``"code/mycode.py:name"``: then its folder comes first.
    folder
        The recipe's, where the path of a file begins.

    Raises
    ------
    PlanError
        When there is no such module or name, or its import fails.
    """
    module, sign, name = text.rpartition(":")
    if module.endswith(".py"):
        file = folder / Path(module).expanduser()
        module, folder = file.stem, file.parent
    if not (sign and name and all(part.isidentifier() for part in module.split("."))):
        raise PlanError(
            f"function {text!r}", "no module and name", "'module:name', such as 'mycode:brightest'"
        )
    value: Any = imported(module, folder, f"function {text!r}")
    for part in name.split("."):
        if not hasattr(value, part):
            names = [one for one in vars(value) if not one.startswith("_")]
            raise PlanError(
                f"function {text!r}",
                f"no {part!r} in {module}",
                "a name of that module",
                nearest(part, names),
            )
        value = getattr(value, part)
    return value


@contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Look for modules in a folder first, inside a block."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def imported(module: str, folder: Path, subject: str) -> ModuleType:
    """Return a module of a folder, else an installed one: see :func:`named`.

    Parameters
    ----------
    module
        Its name.
    folder
        Where it is looked for first.
    subject
        What wants it, for messages.

    Raises
    ------
    PlanError
        When there is none, or its import fails.
    """
    _forget_others(folder)
    with importing_from(folder):
        try:
            made = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and not f"{module}.".startswith(f"{error.name}."):
                remedy = f"Install {error.name}, which {module} imports."
                raise PlanError(subject, str(error), f"a {module} that imports", remedy) from error
            names = [one.stem for one in folder.glob("*.py")]
            remedy = nearest(module, names) or f"Put {module}.py into {folder}, or install its package."
            raise PlanError(subject, f"no module {module!r}", "a module", remedy) from error
        except Exception as error:  # the user's own module: whatever it raises while it is imported
            reason = f"{type(error).__name__}: {error}"
            raise PlanError(subject, reason, f"a {module} that imports") from error
    for one in _modules_of(folder):
        if not hasattr(one, _STAMP):
            setattr(one, _STAMP, _changed(one))
            cloudpickle.register_pickle_by_value(one)
    return made


def _forget_others(folder: Path) -> None:
    """Forget modules of this folder whose files changed, and those of other recipes' folders: names may be the same.

    Functions that were taken from them go on with the modules that they know.
    """
    for name, one in list(sys.modules.items()):
        stamp = getattr(one, _STAMP, None)
        if stamp is not None and not (_lies_in(one, folder) and stamp == _changed(one)):
            del sys.modules[name]


def _modules_of(folder: Path) -> list[ModuleType]:
    """Return the imported modules whose files lie in a folder itself: packages that are installed below it do not."""
    return [
        one for one in list(sys.modules.values()) if isinstance(one, ModuleType) and _lies_in(one, folder)
    ]


def _lies_in(module: ModuleType, folder: Path) -> bool:
    file = getattr(module, "__file__", None)
    return module.__name__ != "__main__" and file is not None and Path(file).parent == folder


def _changed(module: ModuleType) -> int | None:
    try:
        return Path(str(module.__file__)).stat().st_mtime_ns
    except OSError:
        return None
