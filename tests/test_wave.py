"""Ranges that one thread asks a web server for at the same time: what comes, by how many requests and connections."""

from __future__ import annotations

import datetime
import ipaddress
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from answers import Answers, Asked, Said, answering, ranged
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import PATIENCE_S

from rasteret_dask.errors import ReadError, TrustError
from rasteret_dask.net import gate, remote, web
from rasteret_dask.net.hrefs import host_of
from rasteret_dask.net.remote import Folder
from rasteret_dask.net.wave import Wave

DATA = bytes(range(256)) * 4000  # more than a socket holds


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF_S", 0.001)
    for name in web._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server() -> Iterator[Answers]:
    with answering(lambda asked: ranged(DATA, asked, ETag='"1"')) as running:
        yield running


def opened(server: Answers, connections: int) -> Folder:
    """Return the server's folder, with so many connections that are open."""
    folder, together = Folder.of(server.url("/f")), threading.Barrier(connections)
    answer = server.respond

    def meet(asked: Asked) -> Said:
        together.wait(PATIENCE_S)
        return answer(asked)

    server.respond = meet
    with ThreadPoolExecutor(connections) as threads:
        list(threads.map(lambda _: folder.fetch("a", 0, 1), range(connections)))
    server.respond = answer
    server.log.clear()
    return folder


def waved(folder: Folder, ranges: Mapping[int, tuple[int, int]]) -> dict[int, bytes | None]:
    """Ask for ranges of one object in a wave; those that could not be begun are left out."""
    wave = folder.wave()
    assert wave is not None
    found: dict[int, bytes | None] = {}
    try:
        for number, (start, length) in ranges.items():
            wave.begin(number, f"{folder.url}/a", start, length)
        while len(wave):
            for number, fetched in wave.answers():
                found[number] = None if fetched is None else bytes(fetched.data)
                assert fetched is None or fetched.head.size == len(DATA)
    finally:
        wave.close()
    assert gate.at(host_of(folder.url))._under == 0
    return found


def test_a_range_is_a_request_and_connections_stay_open(server: Answers) -> None:
    folder, clients = opened(server, 5), set(server.clients)
    ranges = {n: (n * 1000, 200_000) for n in range(5)}
    for _ in range(3):
        assert waved(folder, ranges) == {n: DATA[s : s + length] for n, (s, length) in ranges.items()}
    assert len(server.log) == 15
    assert server.clients == clients


def test_no_connection_is_opened_and_no_turn_is_waited_for(server: Answers) -> None:
    folder = opened(server, 2)
    assert waved(folder, {n: (n, 10) for n in range(4)}).keys() == {0, 1}
    assert len(server.log) == 2


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(DATA) - 1), st.integers(1, len(DATA))), min_size=1, max_size=4))
def test_any_ranges(pairs: list[tuple[int, int]]) -> None:
    with answering(lambda asked: ranged(DATA, asked)) as running:
        found = waved(opened(running, 4), dict(enumerate(pairs)))
    assert found == {n: DATA[s : s + length] for n, (s, length) in enumerate(pairs)}


CHUNKED = b"5\r\nhello\r\n0\r\n\r\n"


@pytest.mark.parametrize(
    "said",
    [
        Said(404),
        Said(503, {"Retry-After": "0"}),
        Said(302, {"Location": "/elsewhere"}),
        Said(200, {}, DATA),
        Said(206, {"Content-Range": "bytes 6-15/1024000"}, DATA[6:16]),
        Said(206, {"Content-Range": "bytes 5-14/1024000", "Content-Encoding": "gzip"}, DATA[5:15]),
        Said(206, {"Content-Range": "bytes 5-9/1024000", "Transfer-Encoding": "chunked"}, CHUNKED),
        Said(206, {"Content-Range": "bytes 5-14/1024000", "Content-Length": "5"}, DATA[5:10]),
    ],
    ids=lambda said: f"{said.status} {' '.join(said.headers)}",
)
def test_who_gets_no_good_answer_is_told_and_the_others_get_theirs(server: Answers, said: Said) -> None:
    folder, answer = opened(server, 3), server.respond
    server.respond = lambda asked: said if asked.headers["range"] == "bytes=5-14" else answer(asked)
    found = waved(folder, {0: (0, 10), 1: (5, 10), 2: (20, 30)})
    assert found == {0: DATA[:10], 1: None, 2: DATA[20:50]}
    server.respond = answer
    assert folder.fetch("a", 5, 10).data == DATA[5:15]


def test_a_refusal_narrows_the_gate(server: Answers) -> None:
    folder, answer = opened(server, 2), server.respond
    server.respond = lambda asked: Said(429, {"Retry-After": "0"})
    assert waved(folder, {0: (0, 1), 1: (1, 1)}) == {0: None, 1: None}
    assert gate.at(host_of(folder.url)).width == 1
    server.respond = answer
    assert folder.fetch("a", 5, 10).data == DATA[5:15]


def test_connections_that_the_server_closed_are_not_used() -> None:
    with answering(lambda asked: ranged(DATA, asked, Connection="close")) as running:
        folder = opened(running, 2)
        assert waved(folder, {0: (0, 5)}) == {}
        assert folder.fetch("a", 3, 4).data == DATA[3:7]


def test_what_is_under_way_can_be_let_go(server: Answers) -> None:
    folder = opened(server, 2)
    wave = folder.wave()
    assert isinstance(wave, Wave)
    assert wave.begin(0, f"{folder.url}/a", 0, len(DATA))
    wave.close()
    assert gate.at(host_of(folder.url))._under == 0
    assert folder.fetch("a", 3, 4).data == DATA[3:7]


def test_a_folder_is_no_way_round_trust() -> None:
    with pytest.raises(TrustError, match="link-local"):
        Folder.of("http://169.254.169.254/store")
    with answering(lambda _: Said(302, {"Location": "http://169.254.169.254/a"})) as running:
        folder = Folder.of(running.url("/f"))
        with pytest.raises(TrustError, match="redirects to"):
            folder.fetch("a", 0, 5)


# https


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """Return a certificate of localhost by its own hand, and what a server shows it by."""
    key, name = (
        ec.generate_private_key(ec.SECP256R1()),
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "me")]),
    )
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public, secret = folder / "public.pem", folder / "secret.pem"
    public.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, secret)
    return public, context


@pytest.fixture
def secured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Serve by https, with a certificate of localhost; return what makes a URL of a host's name."""
    public, context = certificate(tmp_path)
    with answering(lambda asked: ranged(DATA, asked)) as running:
        running._server.socket = context.wrap_socket(running._server.socket, server_side=True)
        monkeypatch.setenv("SSL_CERT_FILE", str(public))
        yield lambda host: f"https://{host}:{running.port}/f"


def test_https(secured: Callable[[str], str]) -> None:
    folder = Folder.of(secured("localhost"))
    assert folder.fetch("a", 3, 400_000).data == DATA[3:400_003]
    for start in (0, 7):
        assert waved(folder, {0: (start, 500_000)}) == {0: DATA[start : start + 500_000]}


def test_a_certificate_of_another_name_or_nobody_s_is_refused(
    secured: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ReadError, match="not trusted"):
        remote.get(f"{secured(str(ipaddress.ip_address('127.0.0.1')))}/a", 0, 5)
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(ReadError, match="not trusted"):
        remote.get(f"{secured('localhost')}/a", 0, 5)


def test_a_process_ends_with_its_connections_closed(server: Answers) -> None:
    """Sockets that are left to the interpreter's end are ResourceWarnings there."""
    remote.get(server.url("/a"))
    idle = [one for route in web._ROUTES.values() if route.direct is not None for one in route.direct.idle]
    assert any(one.sock is not None for one in idle)
    web._close_idle()
    assert all(one.sock is None for one in idle)
