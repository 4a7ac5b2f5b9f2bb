# SPDX-License-Identifier: Apache-2.0
"""All commands together, and the process's end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Annotated

import typer

from rasteret_dask._version import __version__
from rasteret_dask.cli.data import build, datasets
from rasteret_dask.cli.exitcodes import ExitCode, told_as_bug
from rasteret_dask.cli.exits import export, predict
from rasteret_dask.cli.information import info
from rasteret_dask.cli.printing import tell
from rasteret_dask.cli.recipes import explain, init, resume, run
from rasteret_dask.cli.stores import commit, preview, report, stats, verify
from rasteret_dask.cli.trial import demo

__all__ = ["NAME", "app", "main"]

NAME = "rasteret-dask"

app = typer.Typer(
    name=NAME,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

STORES = "Stores: what was written"
SCENES = "Scenes: what is read"
TRIAL = "Try it"

RECIPES = "Recipes: a job as one file"
_PANELS = {
    RECIPES: (init, explain, run, resume, predict, export),
    STORES: (info, verify, commit, stats, preview, report),
    SCENES: (datasets, build),
    TRIAL: (demo,),
}
for _panel, _commands in _PANELS.items():
    for _one in _commands:
        app.command(rich_help_panel=_panel)(_one)


def _version(asked_for: bool) -> None:
    if asked_for:
        typer.echo(f"{NAME} {__version__}")
        raise typer.Exit


CODES = (
    "Exit codes: 0 done; 1 failed; 2 the command line or the recipe makes no sense; 3 incomplete, run it again; "
    "4 a store is damaged or not finished; 130 stopped by Ctrl-C; 143 stopped by SIGTERM."
)


@app.callback(invoke_without_command=True, epilog=CODES)
def _begin(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train chips from satellite collections, on Dask: several sensors become one Zarr store.

    `rasteret-dask demo --small` shows all of it in a minute.
    """
    if context.invoked_subcommand is None:
        text = context.get_help()
        if text:
            typer.echo(text)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rasteret-dask`` and return its exit code.

    Parameters
    ----------
    argv
        Arguments behind the program's name; None: those of the process.

    Returns
    -------
    int
        One of :class:`ExitCode`. An error that nobody foresaw is raised: of a process of its own it becomes a line
        that says so, and with ``--debug`` a traceback.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if argv is None and "--debug" not in arguments:
        sys.excepthook = _tell_bug
    try:
        typer.main.get_command(app).main(args=arguments, prog_name=NAME)
    except SystemExit as end:
        return int(end.code or 0)
    except KeyboardInterrupt:
        return int(ExitCode.INTERRUPTED)
    return int(ExitCode.DONE)


def _tell_bug(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tell of an error that no command expects, in place of its traceback."""
    for line in told_as_bug(error):
        tell(line, "bold red")
