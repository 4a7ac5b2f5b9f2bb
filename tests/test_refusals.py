"""Refusals that last: by real limits of the operating system, and by a server's answers; asked for once."""

from __future__ import annotations

import functools
import os
import pickle
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from rasteret_dask.errors import CredentialsError, ReadError, UnwritableStoreError
from rasteret_dask.net import remote


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever tries again is never heard of."""
    monkeypatch.setattr(remote, "BACKOFF_S", 1e6)


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_beyond_the_limit(tmp_path: Path) -> None:
    place = tmp_path / "new" / "x"
    with largest_file(2_000_000), pytest.raises(UnwritableStoreError) as caught:
        remote.put(str(place), [b"1" * 3_000_000, b"2"])
    text = str(caught.value)
    for part in (f"writing {place}", "(EFBIG)", "bytes are free at", "room for 3,000,001 bytes", "Make room"):
        assert part in text
    assert str(pickle.loads(pickle.dumps(caught.value))) == text
    remote.put(str(place), b"1")  # the remedy
    assert place.read_bytes() == b"1"


NOBODY = """
import os, sys
from rasteret_dask.errors import UnwritableStoreError
from rasteret_dask.net import remote
remote.BACKOFF_S = 1e6
place, open_place = sys.argv[1:]
remote.put(open_place, b"1")  # nobody may not read the package, wherever that lies: all of it is imported now
if not os.getuid():
    os.setuid(65534)
try:
    remote.put(place, b"1")
except UnwritableStoreError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["x", "new/x"])
def test_a_folder_of_somebody_else(name: str) -> None:
    """In a folder of its own: pytest's are closed to others, and each session that starts closes them again."""
    with TemporaryDirectory() as own:
        Path(own).chmod(0o755)
        folder = Path(own) / "closed"
        folder.mkdir(mode=0o555)
        words = [sys.executable, "-c", NOBODY, str(folder / name), str(Path(own) / "open")]
        done = subprocess.run(words, cwd=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"writing {folder / name}: found permission denied (EACCES)" in done.stdout
    assert "a place that may be written" in done.stdout


class Refuses(BaseHTTPRequestHandler):
    """Answers every request with one status, and counts them."""

    def __init__(self, *args: Any, status: int, code: str, seen: list[str], **kwargs: Any) -> None:
        self.status, self.code, self.seen = status, code, seen
        super().__init__(*args, **kwargs)

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        self.do_PUT()

    def do_POST(self) -> None:
        self.do_PUT()

    def do_PUT(self) -> None:
        self.seen.append(self.path)
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = f"<?xml version='1.0'?><Error><Code>{self.code}</Code></Error>".encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (507, "XMinioStorageFull", "no room (507), XMinioStorageFull; expected room for 5 bytes"),
        (403, "QuotaExceeded", "access denied (401 or 403), QuotaExceeded"),
        (403, "AccessDenied", "expected a place that may be written"),
        (
            404,
            "NoSuchBucket",
            "no such bucket (404); expected one that is there. Make it, or correct its name",
        ),
        (400, "ExpiredToken", "keys that have expired (ExpiredToken); expected keys that the store accepts"),
        (403, "InvalidAccessKeyId", "keys that the store does not accept (InvalidAccessKeyId)"),
    ],
)
def test_an_object_store_that_refuses(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, words: str
) -> None:
    with refusing(status, code, monkeypatch) as seen, pytest.raises(UnwritableStoreError) as caught:
        remote.put("s3://bucket/some/where", b"12345")
    assert words in str(caught.value)
    assert "free" not in str(caught.value)
    assert len(seen) == 1


@contextmanager
def refusing(status: int, code: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let ``s3://`` lead to a server that refuses, for the length of a block; the list is of what was asked of it."""
    seen: list[str] = []
    handler = functools.partial(Refuses, status=status, code=code, seen=seen)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        try:
            yield seen
        finally:
            server.shutdown()


ASKED: dict[str, Callable[[str], Any]] = {
    "get": remote.get, "range": lambda url: remote.get(url, 0, 5), "listing": remote.listing,
    "put": lambda url: remote.put(url, b"1"), "put_new": lambda url: remote.put_new(url, b"1"),
    "put_stream": lambda url: remote.put_stream(url, lambda: iter([b"1"])), "delete": remote.delete,
    "delete_all": lambda url: remote.delete_all(url, ["a", "b"]),
}  # fmt: skip


@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize(
    ("status", "code"), [(400, "ExpiredToken"), (403, "InvalidAccessKeyId"), (403, "SignatureDoesNotMatch")]
)
def test_keys_that_a_store_refuses_are_one_kind_of_error_whatever_is_asked(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, asked: str
) -> None:
    with refusing(status, code, monkeypatch) as seen, pytest.raises(CredentialsError, match=code) as caught:
        ASKED[asked]("s3://bucket/some/where")
    assert len(seen) == 1
    assert "test" not in str(caught.value)  # no key
    assert not isinstance(caught.value, ReadError)  # no pixel is masked because of it


@pytest.mark.parametrize("asked", ["get", "listing"])
def test_a_bucket_that_is_not_there_is_no_missing_object(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    for code, words in {"NoSuchBucket": "no such bucket", "NoSuchKey": "nothing there"}.items():
        with refusing(404, code, monkeypatch), pytest.raises(remote.MissingError, match=words):
            ASKED[asked]("s3://bucket/NoSuchBucket")


def test_a_file_where_a_folder_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UnwritableStoreError, match=r"not a directory \(ENOTDIR\)"):
        remote.put(os.fspath(tmp_path / "file" / "x"), b"1")
