"""A server on loopback that answers only who shows a signature or a password, and items whose hrefs hold one."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, urlsplit

import pystac
from servers import RangeServer, _Handler, _Server

__all__ = ["Guarded", "guarding", "signed_items"]

USER, PASSWORD = "amelie", "geheim-passwort"


class Guarded(RangeServer):
    """Serves a folder to those who are let in."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._server.RequestHandlerClass = _Guard
        self.good = {"geheim-eins"}
        """Signatures that let one in, as ``sig``, ``token`` or ``X-Amz-Signature``."""
        self.refused: list[str] = []
        """What those asked for that were not let in."""
        self.shown: list[str] = []
        """The signatures that were shown."""

    def lets_in(self, query: str, password: str | None) -> bool:
        """Return whether a request shows what it needs."""
        if password is not None:
            return base64.b64decode(password.removeprefix("Basic ")).decode() == f"{USER}:{PASSWORD}"
        fields = parse_qs(query)
        shown = [v for name in ("sig", "token", "X-Amz-Signature") for v in fields.get(name, [])]
        self.shown += shown
        return bool(shown) and shown[0] in self.good


class _Guard(_Handler):
    def do_GET(self) -> None:  # noqa: N802
        owner = cast(Guarded, cast(_Server, self.server).owner)
        if owner.lets_in(urlsplit(self.path).query, self.headers.get("Authorization")):
            super().do_GET()
            return
        owner.refused.append(self.path)
        self.send_response(403)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def guarding(folder: Path) -> Iterator[Guarded]:
    """Serve a folder for the length of a block."""
    server = Guarded(folder)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def signed_items(collection: Path, server: Guarded, sign: Callable[[str], str]) -> list[dict[str, Any]]:
    """Return the items of a static collection, their assets served below its parent folder, with signed hrefs."""
    items = []
    for item in pystac.Collection.from_file(os.fspath(collection)).get_items(recursive=True):
        item.make_asset_hrefs_absolute()
        made = item.to_dict(include_self_link=False, transform_hrefs=False)
        made["links"] = []
        for asset in made["assets"].values():
            asset["href"] = sign(server.url(os.path.relpath(asset["href"], collection.parents[1])))
        items.append(made)
    return items
