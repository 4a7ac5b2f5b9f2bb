"""HTTP as servers speak it: ranges, refusals, broken bodies, proxies, connections; and what is left after a fork."""

from __future__ import annotations

import gzip
import logging
import os
import pickle
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from answers import Answers, Asked, Said, answering, ranged

from rasteret_dask.errors import ReadError, StoreError, TrustError
from rasteret_dask.net import remote, web
from rasteret_dask.net.gate import HOST_CONNECTIONS
from rasteret_dask.net.hrefs import host_of
from rasteret_dask.net.remote import Head, MissingError

DATA = bytes(range(256)) * 100


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF_S", 0.001)
    for name in web._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Answers]:
    with answering(lambda asked: ranged(DATA, asked, ETag='W/"1"')) as running:
        yield running


def failure(respond: Callable[[Asked], Said], *range_: int) -> tuple[ReadError, int]:
    """Return what reading ends in, and how many requests it took."""
    with answering(respond) as running:
        with pytest.raises(ReadError) as caught:
            remote.fetch(running.url("/a?sig=secret"), *range_)
        error = caught.value
        assert str(pickle.loads(pickle.dumps(error))) == str(error)
        assert error.__cause__ is None
        assert "secret" not in str(error) + repr(error)
        return error, len(running.log)


def test_ranges_and_wholes(server: Answers) -> None:
    url = server.url("/a")
    for start, length in (
        (0, 5),
        (7, 100),
        (len(DATA) - 3, 3),
        (len(DATA) - 3, 50),
        (5, None),
        (0, None),
        (9, 0),
    ):
        found = remote.fetch(url, start, length)
        assert bytes(found.data) == (DATA[start:] if length is None else DATA[start : start + length])
        assert found.head == remote.head(url) == Head(len(DATA), 'W/"1"')
    assert {a.headers["accept-encoding"] for a in server.log} == {"identity"}
    assert len(server.clients) == 1


@pytest.mark.parametrize(
    ("said", "text", "most"),
    [
        (Said(200, {}, DATA), "knows no ranges", 1),
        (Said(206, {"Content-Range": "bytes 0-9/100"}, DATA[:10]), "another range", 1),
        (Said(206, {"Content-Range": "bytes 5-14/*"}, DATA[:10]), "without its place", 1),
        (Said(206, {}, DATA[:10]), "without its place", 1),
        (Said(206, {"Content-Range": "bytes 5-9/100"}, DATA[:5]), "shorter", 6),
        (Said(206, {"Content-Range": "bytes 5-14/100"}, DATA[:50]), "another range", 1),
        (Said(206, {"Content-Range": "bytes 5-14/100", "Content-Encoding": "gzip"}, DATA[:10]), "'gzip'", 1),
        (Said(304), "status 304", 1),
        (Said(416, {"Content-Range": "bytes */3"}), "416", 1),
        (Said(400, {"Content-Type": "application/json"}, b'{"why": "http://x/?token=hush"}'), "why", 1),
        (Said(500), "status 500", 6),
        (Said(501), "status 501", 1),
        (Said(302), "status 302", 1),
    ],
)
def test_answers_that_are_not_what_was_asked_for(said: Said, text: str, most: int) -> None:
    error, asked = failure(lambda _: said, 5, 10)
    assert text in error.found
    assert "hush" not in str(error)
    assert asked == most


@pytest.mark.parametrize("status", [404, 401, 403])
def test_what_is_not_there_or_not_ours(status: int) -> None:
    error, asked = failure(lambda _: Said(status), 0, 4)
    assert isinstance(error, MissingError) == (status == 404)
    assert asked == 1


def test_a_refusal_with_a_long_or_endless_body_leaves_the_connection_fit(server: Answers) -> None:
    def long(asked: Asked) -> Said:
        return ranged(DATA, asked) if asked.path == "/a" else Said(404, {}, bytes(2**20))

    with answering(long) as running:
        for _ in range(3):
            assert not remote.exists(running.url("/b"))
            with pytest.raises(MissingError):
                remote.get(running.url("/b"))
            assert remote.get(running.url("/a"), 3, 4) == DATA[3:7]


def test_bodies_without_a_length(server: Answers) -> None:
    chunk = b"5\r\nhello\r\n0\r\n\r\n"
    with answering(lambda _: Said(200, {"Transfer-Encoding": "chunked"}, chunk)) as running:
        assert remote.get(running.url("/a")) == b"hello"


def test_a_service_s_answer_may_be_compressed() -> None:
    body = gzip.compress(b'{"a": 1}')
    with answering(lambda _: Said(200, {"Content-Encoding": "gzip"}, body)) as running:
        answer = remote.request(running.url("/"), "POST", {"Accept-Encoding": "gzip"}, b"{}")
        assert answer.body == b'{"a": 1}'
        assert running.log[0].body == b"{}"


def test_an_answer_that_trickles_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte now and then keeps a connection alive, but not for ever."""
    monkeypatch.setattr(web, "WHOLE_S", 0.5)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def trickle() -> None:
            for _ in range(2):
                client, _ = listening.accept()
                client.recv(4096)
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
                try:
                    while not stop.wait(0.05):
                        client.sendall(b"x")
                except OSError:
                    pass
                finally:
                    client.close()

        threading.Thread(target=trickle, daemon=True).start()
        with pytest.raises(ReadError, match=r"timed out|too long"):
            remote.get(f"http://127.0.0.1:{listening.getsockname()[1]}/a")
        stop.set()


def test_web_servers_neither_list_nor_take_files(server: Answers) -> None:
    with pytest.raises(StoreError, match="a web server"):
        remote.put(server.url("/a"), b"x")
    with pytest.raises(StoreError, match="a web server"):
        remote.delete(server.url("/a"))
    with pytest.raises(ReadError, match="a web server"):
        remote.listing(server.url("/"))
    assert not server.log


def test_connections_are_kept_and_bounded() -> None:
    gates, most, busy, lock = threading.Event(), [0], [0], threading.Lock()

    def slow(asked: Asked) -> Said:
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        gates.wait(0.02)
        with lock:
            busy[0] -= 1
        return ranged(DATA, asked)

    with answering(slow) as running, ThreadPoolExecutor(100) as pool:
        spelled = [running.url("/a"), f"HTTP://127.0.0.1:{running.port}/a", f"http://127.1:{running.port}/a"]
        list(pool.map(lambda n: remote.get(spelled[n % 3], n, 5), range(400)))
        assert most[0] <= HOST_CONNECTIONS
        assert len(running.clients) <= HOST_CONNECTIONS


@pytest.mark.parametrize(
    ("href", "host"),
    [
        ("http://a.org/x", "http://a.org"), ("HTTP://A.org:80/y?z", "http://a.org"), ("https://u:p@a.org:443", "https://a.org"),
        ("https://a.org:80/", "https://a.org:80"), ("http://127.1/", "http://127.0.0.1"), ("http://[::1]:81/", "http://[::1]:81"),
        ("s3://Bucket/key", "s3://Bucket"), ("/a/b", ""), ("file:///a", ""),
    ],
)  # fmt: skip
def test_one_host_has_one_name(href: str, host: str) -> None:
    assert host_of(href) == host


# Proxies and certificates


def proxy(seen: list[str]) -> Callable[[Asked], Said]:
    def respond(asked: Asked) -> Said:
        seen.append(asked.path)
        return ranged(DATA, Asked(asked.method, urlsplit(asked.path).path, asked.headers))

    return respond


def test_a_proxy_is_used_where_the_environment_names_one(
    server: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    with answering(proxy(seen)) as between:
        monkeypatch.setenv("HTTP_PROXY", f"http://ann:p%40ss@127.0.0.1:{between.port}")
        assert remote.get("http://far.invalid/a b", 2, 3) == DATA[2:5]
        assert seen == ["http://far.invalid/a%20b"]
        assert between.log[0].headers["proxy-authorization"] == "Basic YW5uOnBAc3M="
        for bypass in ("127.0.0.1", "127.0.0.0/8", "*"):
            monkeypatch.setenv("NO_PROXY", bypass)
            assert remote.get(server.url("/a"), 2, 3) == DATA[2:5]
        assert len(seen) == 1
        monkeypatch.setenv("NO_PROXY", "other.org")
        monkeypatch.setenv("HTTP_PROXY", "socks5://127.0.0.1:1")
        with pytest.raises(ReadError, match="'socks5'"):
            remote.get("http://far.invalid/a")
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{server.port}")  # which gives no tunnel
    monkeypatch.setattr(remote, "ATTEMPTS", 1)
    with pytest.raises(ReadError):
        remote.get("https://far.invalid/a")
    assert server.log[-1].method == "CONNECT"
    assert server.log[-1].path == "far.invalid:443"


def test_a_certificate_that_is_not_there(
    server: Answers, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "missing.pem"))
    with pytest.raises(ReadError, match="REQUESTS_CA_BUNDLE"):
        remote.get(f"https://127.0.0.1:{server.port}/a")
    assert not server.log


# Secrets, forks


def test_urllib3_s_log_shows_no_signature(server: Answers, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    remote.get(server.url("/a?sig=secret"), 0, 3)
    assert "127.0.0.1" in caplog.text
    assert "secret" not in caplog.text


def test_a_forked_child_has_connections_of_its_own(server: Answers) -> None:
    assert remote.get(server.url("/a"), 0, 5) == DATA[:5]
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.write(writing, remote.get(server.url("/a"), 5, 5))
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(reading, 5) == DATA[5:10]
    os.close(reading)
    os.close(writing)
    assert remote.get(server.url("/a"), 1, 5) == DATA[1:6]
    assert len(server.clients) == 2


def test_nothing_but_typed_errors_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "ATTEMPTS", 1)

    def odd(text: bytes) -> Any:
        listening = socket.create_server(("127.0.0.1", 0))

        def serve() -> None:
            with listening:
                client, _ = listening.accept()
                with client:
                    client.recv(4096)
                    client.sendall(text)

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listening.getsockname()[1]}/a"

    for text in (
        b"", b"nonsense\r\n\r\n", b"HTTP/1.1 abc\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\nshort", b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 1000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 302 Found\r\nLocation: http://[/\r\n\r\n",
    ):  # fmt: skip
        try:
            remote.get(odd(text))
        except (ReadError, TrustError):
            continue
        assert b"Content-Length: x" in text
    for href in (
        "http://",
        "http://:80/a",
        "http://a:b/",
        "http://[::1/a",
        "http://" + "a" * 200_000,
        "http://a b/",
    ):
        with pytest.raises((ReadError, TrustError)):
            remote.get(href)
