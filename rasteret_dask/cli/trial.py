# SPDX-License-Identifier: Apache-2.0
"""The command that shows all of it on a made-up world."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from rasteret_dask.cli.exitcodes import ExitCode
from rasteret_dask.cli.options import command
from rasteret_dask.cli.printing import tell

__all__ = ["demo"]


@command
def demo(
    folder: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Remove what an earlier run left, first.")] = False,
    small: Annotated[bool, typer.Option("--small", help="A world of 5 x 4 km, in seconds.")] = False,
) -> None:
    """Make a small world without a network, write its train chips to a Zarr store, draw and check them.

    A second run uses what is there.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")  # the picture goes to a file, with or without a screen
    from rasteret_dask.demo.run import SMALL, run_demo

    checks = run_demo(folder, SMALL if small else None, fresh=fresh)
    failed = [check.what for check in checks if not check.ok]
    if failed:
        tell(f"the demo's result is wrong: {'; '.join(failed)}", "bold red")
        raise typer.Exit(ExitCode.FAILED)
