"""Heads of answers, read as Python's own client reads them."""

from __future__ import annotations

import io
from http.client import HTTPException, HTTPResponse
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rasteret_dask.net import reply
from rasteret_dask.net.reply import Reply

NAMES = st.sampled_from(
    [
        "Content-Length",
        "content-length",
        "Content-Range",
        "ETag",
        "Connection",
        "Transfer-Encoding",
        "X-A",
        "Date",
    ]
)
VALUES = st.sampled_from(
    ["4", "9", "bytes 0-3/9", '"a:b"', "close", "keep-alive", "Keep-Alive", "chunked", "", "x\té"]
)
FIELDS = st.lists(st.tuples(NAMES, st.sampled_from([": ", ":", " : ", ":  "]), VALUES), max_size=6)
PLAIN = 'HTTP/1.1 206 Partial Content\r\nContent-Length: 4\r\nETag: "e"\r\nConnection: keep-alive\r\n\r\nbody'


class _Sent:
    """A socket of which answers are read, so many bytes at a time."""

    def __init__(self, data: bytes, piece: int) -> None:
        self.data, self.piece = io.BytesIO(data), piece

    def makefile(self, mode: str) -> io.BufferedReader:
        outer = self

        class Raw(io.RawIOBase):
            def readable(self) -> bool:
                return True

            def readinto(self, memory: Any) -> int:
                data = outer.data.read(min(outer.piece, len(memory)))
                memory[: len(data)] = data
                return len(data)

        return io.BufferedReader(Raw())


def _seen(kind: type[HTTPResponse], data: bytes, piece: int, method: str) -> Any:
    """Return all that somebody sees of an answer, or what is raised."""
    answer = kind(_Sent(data, piece), method=method)  # type: ignore[arg-type]
    try:
        answer.begin()
        length, closes = answer.length, answer.will_close
        body = answer.read()
    except (HTTPException, ValueError) as error:
        return type(error)
    fields = {
        name: answer.headers.get(name, "-") for name in ("etag", "CONTENT-RANGE", "Content-Length", "X-a")
    }
    head = (answer.status, answer.version, answer.reason, length, answer.chunked, bool(closes))
    return head, fields, body, answer.isclosed()


@given(
    st.sampled_from(["HTTP/1.1 206 Partial Content", "HTTP/1.0 206 P", "HTTP/1.1 200 OK", "HTTP/1.1 304 N"]),
    FIELDS,
    st.sampled_from([1, 7, 10_000]),
    st.sampled_from(["GET", "GET", "HEAD"]),
)
@example(
    "HTTP/1.1 206 Partial Content", [("Content-Length", ": ", "4"), ("ETag", ": ", '"a:b"')], 10_000, "GET"
)
@example(
    "HTTP/1.1 206 Partial Content",
    [("Content-Length", ": ", "4"), ("Connection", ": ", "close")],
    10_000,
    "GET",
)
def test_an_answer_reads_as_pythons_own(status: str, fields: Any, piece: int, method: str) -> None:
    """Whatever a server sends, in however many pieces, looks the same; names of fields once, as servers send them."""
    once = {name.lower(): (name, colon, value) for name, colon, value in fields}
    lines = [status, *("".join(field) for field in once.values())]
    data = ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + b"bodymore"
    assert _seen(Reply, data, piece, method) == _seen(HTTPResponse, data, piece, method)


def test_the_head_of_a_range_is_not_parsed_as_mail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that comes whole is never seen by http.client's parser; one that does not come whole is."""
    calls: list[object] = []
    begin = HTTPResponse.begin

    def counted(self: HTTPResponse) -> None:
        calls.append(self)
        begin(self)

    monkeypatch.setattr(HTTPResponse, "begin", counted)
    for piece, count in ((10_000, 0), (10, 1)):
        answer = Reply(_Sent(PLAIN.encode(), piece))  # type: ignore[arg-type]
        answer.begin()
        assert (answer.read(), answer.headers.get("etag"), len(calls)) == (b"body", '"e"', count)


@pytest.mark.parametrize(
    "line",
    [
        "Content-Length: 4\r\nContent-Length: 4",
        "Content-Length: 4\r\n folded",
        "Content-Length : 4",
        "Content-Length: +4",
    ],
)
def test_what_may_be_read_in_two_ways_is_left_to_python(line: str) -> None:
    """Lengths told twice, lines that go on, blanks before a colon."""
    assert reply._plain(f"HTTP/1.1 206 Partial Content\r\n{line}".encode()) is None
