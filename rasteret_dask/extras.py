# SPDX-License-Identifier: Apache-2.0
"""Packages that only some exits need, and how one that is missing is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rasteret_dask.errors import MissingExtraError

__all__ = ["EXTRAS", "how_to_install", "needs"]

EXTRAS = {
    "gateway": {"aiohttp": "aiohttp", "dask_gateway": "dask-gateway>=2025.4"},
    "geo": {"geopandas": "geopandas>=1.0"},
    "kubernetes": {"dask_kubernetes": "dask-kubernetes>=2025.7", "httpx": "httpx", "kr8s": "kr8s"},
    "lightning": {"lightning": "lightning>=2.4"},
    "map": {"folium": "folium>=0.18"},
    "onnx": {"onnxruntime": "onnxruntime>=1.20"},
    "pc": {"planetary_computer": "planetary-computer>=1.0"},
    "plot": {"matplotlib": "matplotlib>=3.9"},
    "slurm": {"cryptography": "cryptography", "dask_jobqueue": "dask-jobqueue>=0.9"},
    "torch": {"torch": "torch>=2.4"},
}
"""{extra: {module: what pip installs it by}}, as in ``pyproject.toml``."""


def how_to_install(extra: str) -> str:
    """Return the command that installs what an extra needs.

    It names the packages themselves, not ``rasteret-dask[extra]``: that works wherever this package came from, also
    from a checkout or a wheel that is in no index.

    Examples
    --------
    >>> from rasteret_dask.extras import how_to_install
    >>> how_to_install("plot")
    "pip install 'matplotlib>=3.9'"
    """
    return "pip install " + " ".join(f"'{requirement}'" for requirement in EXTRAS[extra].values())


@contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Import an extra's packages inside: where one is not installed, the error names the extra.

    Parameters
    ----------
    extra
        One of :data:`EXTRAS`.
    what
        What the packages are imported for, as ``"drawing a picture"``.

    Raises
    ------
    MissingExtraError
        When a package of the extra is not installed. Any other ImportError stays what it is: a package that is there
        and broken is another fault.

    Examples
    --------
    >>> from rasteret_dask.extras import needs
    >>> with needs("geo", "a GeoDataFrame of records"):
    ...     import geopandas
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRAS[extra]:
            raise
        raise MissingExtraError(
            what,
            f"no package {error.name.partition('.')[0]}",
            f"the extra {extra!r}",
            f"Install it: {how_to_install(extra)}.",
        ) from error
