# SPDX-License-Identifier: Apache-2.0
"""The command line: ``rasteret-dask``, which is also ``python -m rasteret_dask``."""

from importlib import import_module

__all__ = ["main"]


def main() -> int:
    """Run ``rasteret-dask`` with the arguments of this process: what the installed script calls."""
    return int(import_module("rasteret_dask.cli.app").main())
