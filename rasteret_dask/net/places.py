"""Where a user says that something lies, as a path or URL without credentials; the process keeps those for reading."""

from __future__ import annotations

import os

from rasteret_dask.catalogs.signing import keep_place_apart

__all__ = ["place_of"]


def place_of(path: str | os.PathLike[str]) -> str:
    """Return the absolute path, or the URL, of a store, table or plan.

    Parameters
    ----------
    path
        A local path or a URL. The signature or password of a URL of http or https lets one read and write what lies
        below it, in this process and on the workers that it sends to; nothing that is pickled or written holds it.
    """
    text = os.fspath(path)
    return keep_place_apart(text) if "://" in text else os.path.abspath(text)
