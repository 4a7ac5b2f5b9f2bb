# SPDX-License-Identifier: Apache-2.0
"""Where something lies: a path of this machine or a URL, decided once; the process keeps a URL's credentials."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rasteret_dask.catalogs.signing import keep_place_apart
from rasteret_dask.errors import StoreError
from rasteret_dask.net.hrefs import is_local, local_path, redact

__all__ = ["Place"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a user says that a store, table, plan or catalog lies."""

    url: str
    """An absolute path of this machine, or a URL without credentials."""
    is_local: bool
    """Whether ``url`` is a path of this machine."""

    @classmethod
    def of(cls, place: str | os.PathLike[str]) -> Place:
        """Return what a path or URL names.

        Parameters
        ----------
        place
            A local path (``~`` is the home folder), ``file://`` or a URL. The signature or password of a URL of http
            or https lets one read and write what lies below it, in this process and on the workers that it sends
            to; nothing that is pickled or written holds it.

        Raises
        ------
        TrustError
            When a path is one of GDAL's virtual file systems.

        Examples
        --------
        >>> Place.of("file:///data/train.zarr"), Place.of("s3://bucket/train.zarr").is_local
        (Place(url='/data/train.zarr', is_local=True), False)
        """
        text = os.fspath(place)
        if is_local(text):
            return cls(local_path(os.path.expanduser(text)), True)
        return cls(keep_place_apart(text), False)

    @classmethod
    def at(cls, href: str) -> Place:
        """Return where an absolute href lies, credentials and all: of what is read at once, and not kept."""
        return cls(href, is_local(href))

    @property
    def is_file(self) -> bool:
        """Whether a file of this machine lies here."""
        return self.is_local and os.path.isfile(self.url)

    def folder(self, expected: str, remedy: str) -> str:
        """Return :attr:`url`, or raise StoreError where a file lies instead of a folder."""
        if self.is_file:
            raise StoreError(f"store {redact(self.url)}", "a file", expected, remedy)
        return self.url

    def file(self, remedy: str) -> str:
        """Return :attr:`url`, or raise StoreError where no file can be: a folder lies here, or a file is in the way."""
        if self.is_local:
            if os.path.isdir(self.url):
                raise StoreError(f"file {redact(self.url)}", "a folder", "a file, or nothing yet", remedy)
            above = os.path.dirname(self.url)
            while above and not os.path.lexists(above):
                above = os.path.dirname(above)
            if os.path.isfile(above):
                raise StoreError(
                    f"file {redact(self.url)}", f"a file in place of the folder {above}", "a folder, or nothing yet",
                    remedy,
                )  # fmt: skip
        return self.url
