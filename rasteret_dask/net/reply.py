# SPDX-License-Identifier: Apache-2.0
"""Answers of Python's own connections: heads of ranges are read without its parser of mail."""

from __future__ import annotations

from http.client import HTTPResponse
from typing import Any

from urllib3 import HTTPHeaderDict

__all__ = ["Reply"]

_END = b"\r\n\r\n"


class Reply(HTTPResponse):
    """An answer. The head of a range, as most servers send it, takes a fifth of the time of Python's own reading."""

    def begin(self) -> None:
        """Read the head; whatever is not plain is left to Python's own reading of it."""
        own: Any = self  # stubs tell less of it
        seen = own.fp.peek()  # nothing is taken yet
        end = seen.find(_END)
        fields = None if end < 0 or own._method == "HEAD" else _plain(seen[:end])
        if fields is None:
            super().begin()
            return
        own.fp.read(end + len(_END))
        own.headers = own.msg = fields
        self.code, self.status, self.reason, self.version = 206, 206, "Partial Content", 11
        self.chunked, self.will_close, self.length = False, False, int(fields["Content-Length"])


def _plain(head: bytes) -> HTTPHeaderDict | None:
    """Return the fields of a head (RFC 9112), where it is that of one range, of a length, on a connection kept open."""
    status, *lines = head.decode("latin-1").split("\r\n")
    if not status.startswith("HTTP/1.1 206 "):
        return None
    fields = HTTPHeaderDict()
    for line in lines:
        name, colon, value = line.partition(":")
        if not (colon and name) or name != name.strip():  # a line that goes on with the one before, say
            return None
        fields.add(name, value.strip())
    kept = (
        fields.get("Connection", "keep-alive").lower() == "keep-alive" and "Transfer-Encoding" not in fields
    )
    return fields if kept and fields.get("Content-Length", "").isdecimal() else None
