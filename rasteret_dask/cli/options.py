# SPDX-License-Identifier: Apache-2.0
"""Options that several commands share, and what every command does beside its own work."""

from __future__ import annotations

import functools
import inspect
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from rasteret_dask.cli.exitcodes import AGAIN, ExitCode, failure_of
from rasteret_dask.cli.printing import tell
from rasteret_dask.store.stopping import ended_by_a_second_interrupt, terminable

__all__ = ["BBox", "DateRange", "Debug", "Json", "Overrides", "Quiet", "Verbose", "check_dataset", "command"]

GENERAL = "Options of every command"

Verbose = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, show_default=False, rich_help_panel=GENERAL,
        help="Log what happens to stderr: -v a line a phase, -vv a line a shard.",
    ),
]  # fmt: skip
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", rich_help_panel=GENERAL, help="No progress, no warnings: answers and errors only."
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", rich_help_panel=GENERAL, help="Show the traceback of an error.")
]
Json = Annotated[
    bool, typer.Option("--json", help="Answer as JSON on stdout; everything else goes to stderr.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="a.b=value", show_default=False,
        help="Replace a value of the recipe: chips.size=64. Repeatable; values as in TOML, bare words are texts.",
    ),
]  # fmt: skip


def _box(text: str) -> tuple[float, ...]:
    try:
        corners = tuple(float(part) for part in re.split(r"[,\s]+", text.strip()))
    except ValueError:
        corners = ()
    if len(corners) != 4:
        raise typer.BadParameter(f"found {text!r}; expected four numbers: west,south,east,north in degrees.")
    return corners


BBox = Annotated[
    Any,
    typer.Option(
        "--bbox", metavar="W,S,E,N", parser=_box, show_default=False,
        help="Only scenes that touch this box: west,south,east,north in degrees.",
    ),
]  # fmt: skip
DateRange = Annotated[
    str | None,
    typer.Option(
        "--date-range", metavar="START/END", show_default=False,
        help="Only scenes of these days, the last one included: 2024-04-01/2024-06-30; .. leaves an end open.",
    ),
]  # fmt: skip


def check_dataset(name: str) -> None:
    """Refuse an id that the catalog does not have: a mistake of the command line, told with the nearest ids."""
    from rasteret_dask.catalogs.catalog import catalog, find
    from rasteret_dask.errors import SourceError

    if name in catalog().entries:
        return
    try:
        find(name)
    except SourceError as error:
        raise typer.BadParameter(str(error)) from None


_P = ParamSpec("_P")
_R = TypeVar("_R")

_EVERYWHERE: dict[str, Any] = {"verbose": (Verbose, 0), "quiet": (Quiet, False), "debug": (Debug, False)}


def command(function: Callable[_P, _R]) -> Callable[..., _R]:
    """Let a function be a command: with -v, -q and --debug, and with errors that become one line and an exit code.

    Parameters
    ----------
    function
        Its parameters are the command's. Where it has one of these three itself, it gets what was typed.
    """
    signature = inspect.signature(function, eval_str=True)
    further = {name: option for name, option in _EVERYWHERE.items() if name not in signature.parameters}
    parameters = [
        *signature.parameters.values(),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, (kind, default) in further.items()
        ),
    ]

    @functools.wraps(function)
    def run(**values: Any) -> _R:
        debug, quiet, verbose = (values[name] for name in ("debug", "quiet", "verbose"))
        arguments = {name: value for name, value in values.items() if name not in further}
        with ExitStack() as stack:
            stack.enter_context(_reported(debug))
            stack.enter_context(_logged(verbose))
            stack.enter_context(_warned(quiet))
            stack.enter_context(terminable())
            stack.enter_context(ended_by_a_second_interrupt(_ended_at_once))
            return function(**arguments)  # type: ignore[call-arg]

    run.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _ended_at_once() -> None:
    tell(f"stopped at once by a second Ctrl-C. {AGAIN}", "yellow")
    sys.stderr.flush()


@contextmanager
def _reported(debug: bool) -> Iterator[None]:
    """Turn an error that a user can do something about into a line on stderr and an exit code; others are bugs."""
    try:
        yield
    except BrokenPipeError:  # whoever read the answer has seen enough
        raise
    except BaseException as error:
        failure = failure_of(error)
        if failure is None:
            raise
        if debug:
            traceback.print_exc()
        tell(failure.message, "yellow" if failure.code is not ExitCode.FAILED else "bold red")
        raise typer.Exit(failure.code) from None


@contextmanager
def _logged(verbose: int) -> Iterator[None]:
    """Write what this package logs on stderr, for the length of a command."""
    if not verbose:
        yield
        return
    logger, handler = logging.getLogger("rasteret_dask"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if verbose == 1 else logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextmanager
def _warned(quiet: bool) -> Iterator[None]:
    """Write warnings as lines of ours: where in the code they were raised tells a user nothing."""
    shown = warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *place: Any, **named: Any) -> None:
        if not issubclass(category, UserWarning):
            shown(message, category, *place, **named)
        elif not quiet:
            tell(f"warning: {message}", "yellow")

    warnings.showwarning = show
    try:
        yield
    finally:
        warnings.showwarning = shown
