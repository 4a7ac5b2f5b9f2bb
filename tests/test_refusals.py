"""Refusals that last: by real limits of the operating system, and by a server's answers; asked for once."""

from __future__ import annotations

import functools
import os
import pickle
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rasteret_dask.errors import UnwritableStoreError
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
if not os.getuid():
    os.setuid(65534)
try:
    remote.put(sys.argv[1], b"1")
except UnwritableStoreError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["x", "new/x"])
def test_a_folder_of_somebody_else(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    for parent in (folder, *folder.parents[: len(folder.parts) - 3]):
        parent.chmod(0o555 if parent == folder else 0o755)
    done = subprocess.run(
        [sys.executable, "-c", NOBODY, str(folder / name)], capture_output=True, text=True, check=True
    )
    assert "permission denied (EACCES)" in done.stdout
    assert "a place that may be written" in done.stdout


class Refuses(BaseHTTPRequestHandler):
    """Answers every PUT with one status, and counts them."""

    def __init__(self, *args: Any, status: int, code: str, seen: list[str], **kwargs: Any) -> None:
        self.status, self.code, self.seen = status, code, seen
        super().__init__(*args, **kwargs)

    def log_message(self, *_: object) -> None:
        return

    def do_PUT(self) -> None:
        self.seen.append(self.path)
        self.rfile.read(int(self.headers["Content-Length"]))
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
    ],
)
def test_an_object_store_that_refuses(
    monkeypatch: pytest.MonkeyPatch, status: int, code: str, words: str
) -> None:
    seen: list[str] = []
    handler = functools.partial(Refuses, status=status, code=code, seen=seen)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}", "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        with pytest.raises(UnwritableStoreError) as caught:
            remote.put("s3://bucket/some/where", b"12345")
        server.shutdown()
    assert words in str(caught.value)
    assert "free" not in str(caught.value)
    assert len(seen) == 1


def test_a_file_where_a_folder_is_wanted(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UnwritableStoreError, match=r"not a directory \(ENOTDIR\)"):
        remote.put(os.fspath(tmp_path / "file" / "x"), b"1")
