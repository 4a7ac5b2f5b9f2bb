"""The command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rasteret_dask._version import __version__
from rasteret_dask.errors import RasteretDaskError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``rasteret-dask`` and return its exit code.

    Parameters
    ----------
    argv
        Arguments behind the program's name; None: those of the process.

    Returns
    -------
    int
        0; 1 where something failed, said in one line; 2 where the arguments make no sense; 130 when interrupted.
    """
    asked = _parser().parse_args(argv)
    try:
        return _demo(asked.folder, asked.fresh, asked.small)
    except RasteretDaskError as error:
        print(f"rasteret-dask: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nrasteret-dask: stopped; run it again to go on.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rasteret-dask", description="Satellite training data on Dask.")
    parser.add_argument("--version", action="version", version=f"rasteret-dask {__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")
    demo = commands.add_parser(
        "demo",
        help="make a small world, write its train chips, check them",
        description="Makes a small world without a network, writes its train chips to a Zarr store, draws them and "
        "checks the result. A second run uses what is there.",
    )
    demo.add_argument(
        "--folder", type=Path, default=Path("demo"), help="where everything goes (default: demo)"
    )
    demo.add_argument("--fresh", action="store_true", help="remove what an earlier run left, first")
    demo.add_argument("--small", action="store_true", help="a world of 5 x 4 km, in seconds")
    return parser


def _demo(folder: Path, fresh: bool, small: bool) -> int:
    os.environ.setdefault("MPLBACKEND", "Agg")  # the picture goes to a file, with or without a screen
    from rasteret_dask.demo.run import SMALL, run_demo

    checks = run_demo(folder, SMALL if small else None, fresh=fresh)
    failed = [check.what for check in checks if not check.ok]
    if failed:
        print(f"rasteret-dask: the demo's result is wrong: {'; '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0
