"""Signed and requester-pays stores: what is asked for, by whom it is paid, and that nothing secret is left behind."""

from __future__ import annotations

import json
import os
import pickle
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine

from rasteret_dask.catalogs import pctokens
from rasteret_dask.errors import ReadError
from rasteret_dask.headers.reader import Header, read_headers
from rasteret_dask.net import remote
from rasteret_dask.net.gdalfiles import GdalFile


class Azure:
    """A blob store that wants a token in every request, and the service that hands them out."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lives_s = 3600.0
        self.given: list[str] = []
        self.asked: list[tuple[str, str]] = []
        """(path, token) of each request for bytes."""
        self.connections = 0
        self.refuses = False
        """Every token."""
        self.fails = 0
        """Status of the next answers to those who ask for a token; 0: none fails."""
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Azure)
        self._server.daemon_threads = True
        self._server.owner = self  # type: ignore[attr-defined]
        self.host = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://{self.host}/box/{name}"

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Azure(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.owner: Azure = cast(Any, self.server).owner

    def log_message(self, *_: object) -> None:
        return

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path.startswith("/token/"):
            self._token(url.path)
            return
        sig = parse_qs(url.query).get("sig", [""])[0]
        self.owner.asked.append((url.path, sig))
        file = self.owner.folder / unquote(url.path.removeprefix("/box/"))
        if self.owner.refuses or sig not in self.owner.given:
            self._answer(403, b"<Error>no such signature</Error>")
            return
        whole = file.read_bytes()
        first, last = 0, len(whole) - 1
        if asked := self.headers.get("Range"):
            start, _, end = asked.removeprefix("bytes=").partition("-")
            first, last = int(start), min(int(end or last), last)
        more = {"Content-Range": f"bytes {first}-{last}/{len(whole)}"} if asked else {}
        more |= {"ETag": '"v1"', "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
        self._answer(206 if asked else 200, whole[first : last + 1], **more)

    def _token(self, path: str) -> None:
        owner = self.owner
        if owner.fails:
            self._answer(owner.fails, b"{}")
            return
        owner.given.append(f"geheim+{len(owner.given)}/{path.split('/')[-1]}=")
        expiry = datetime.now(UTC) + timedelta(seconds=owner.lives_s)
        text = f"sv=2024&sig={owner.given[-1].replace('+', '%2B').replace('/', '%2F').replace('=', '%3D')}"
        body = {"msft:expiry": expiry.isoformat().replace("+00:00", "Z"), "token": text}
        self._answer(200, json.dumps(body).encode())

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture
def azure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Azure]:
    """Return a signed store on loopback, which the user's catalog names as one of Planetary Computer's."""
    pytest.importorskip("planetary_computer", reason="the extra 'pc' is not installed")
    from planetary_computer import sas
    from planetary_computer.settings import Settings

    (tmp_path / "files").mkdir()
    running = Azure(tmp_path / "files")
    catalog = tmp_path / "catalog.toml"
    catalog.write_text(f'[store]\n"http://{running.host}" = {{ access = "planetary-computer" }}\n')
    monkeypatch.setenv("RASTERET_DASK_CATALOG", str(catalog))
    monkeypatch.setenv("PC_SDK_SAS_URL", f"http://{running.host}/token")
    monkeypatch.setenv("PC_SDK_SUBSCRIPTION_KEY", "")
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    monkeypatch.setattr(pctokens, "_RETRIES", 0)
    forgotten = (
        Settings.get.cache_clear,
        sas.TOKEN_CACHE.clear,
        pctokens._TOKENS.clear,
        pctokens._sas.cache_clear,
    )
    for forget in forgotten:
        forget()
    yield running
    running.stop()
    for forget in forgotten:
        forget()


def cog(path: Path) -> Path:
    profile = {"crs": "EPSG:32631", "transform": Affine(10, 0, 600000, 0, -10, 5700000), "nodata": 0}
    with rasterio.open(
        path, "w", driver="GTiff", width=96, height=96, count=1, dtype="uint16", tiled=True,
        blockxsize=32, blockysize=32, **profile,
    ) as to:  # fmt: skip
        to.write(np.arange(96 * 96, dtype="uint16").reshape(1, 96, 96))
    return path


def test_every_request_is_signed_and_one_token_serves_a_container(azure: Azure) -> None:
    for n in range(40):
        cog(azure.folder / f"{n}.tif")
    found = read_headers([azure.url(f"{n}.tif") for n in range(40)])
    assert all(isinstance(header, Header) for header in found.values()), found
    assert len(azure.given) == 1
    assert {sig for _, sig in azure.asked} == set(azure.given)
    assert len(azure.asked) == 40  # one request a file
    assert all("geheim" not in href for href in found)
    assert "geheim" not in repr(found)


def test_bytes_are_those_of_the_file(azure: Azure) -> None:
    whole = cog(azure.folder / "a b.tif").read_bytes()
    url = azure.url("a%20b.tif")
    assert remote.get(url) == whole
    assert remote.get(url, 100, 50) == whole[100:150]
    assert remote.head(url) == remote.Head(len(whole), '"v1"')


def test_an_expired_token_is_renewed(azure: Azure) -> None:
    cog(azure.folder / "a.tif")
    azure.lives_s = 1  # below what either side calls fresh: asked for again each time
    for _ in range(5):
        remote.get(azure.url("a.tif"), 0, 8)
    assert len(azure.given) >= 5
    assert len(set(azure.asked)) >= 2  # later requests carry later tokens


def test_gdal_reads_the_signed_file(azure: Azure) -> None:
    path = azure.folder / "strips.tif"
    with rasterio.open(
        path, "w", driver="GTiff", width=9, height=9, count=1, dtype="uint8", crs="EPSG:32631",
        transform=Affine(10, 0, 600000, 0, -10, 5700000),
    ) as to:  # fmt: skip
        to.write(np.full((1, 9, 9), 7, "uint8"))
    file = GdalFile(azure.url("strips.tif"))
    dataset = file.open("GTiff")
    assert int(file.call(dataset.read).sum()) == 7 * 81
    assert "geheim" not in dataset.name
    file.close()
    assert {sig for _, sig in azure.asked} == set(azure.given)


def test_refusals_hold_no_token(azure: Azure) -> None:
    cog(azure.folder / "a.tif")
    remote.get(azure.url("a.tif"), 0, 8)
    azure.refuses = True  # also the one that is asked for anew
    with pytest.raises(ReadError, match="access denied") as caught:
        remote.get(azure.url("a.tif"), 0, 8)
    text = str(caught.value) + repr(caught.value.args) + repr(pickle.loads(pickle.dumps(caught.value)))
    assert "geheim" not in text
    assert "clock" in text
    assert caught.value.__cause__ is None
    reason = read_headers([azure.url("a.tif")])[azure.url("a.tif")]
    assert isinstance(reason, str)
    assert "geheim" not in reason


@pytest.mark.parametrize("status", [404, 429, 500])
def test_a_token_service_that_fails_is_named(azure: Azure, status: int) -> None:
    azure.fails = status
    with pytest.raises(ReadError, match=r"signing for 127/box.*no token"):
        remote.get(azure.url("a.tif"))
    assert not azure.asked


def test_a_token_service_that_never_answers_is_given_up(
    azure: Azure, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pctokens, "_WAIT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("PC_SDK_SAS_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/token")
        with pytest.raises(ReadError, match=r"nothing for 0.2 s"):
            remote.get(azure.url("a.tif"))


def test_threads_at_once_ask_for_one_token(azure: Azure) -> None:
    cog(azure.folder / "a.tif")
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda n: remote.get(azure.url("a.tif"), n, 8), range(200)))
    assert len(azure.given) == 1
    assert len(azure.asked) == 200


def test_without_the_package_the_extra_is_named(azure: Azure, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "planetary_computer", None)
    pctokens._sas.cache_clear()
    with pytest.raises(ReadError, match=r"pip install 'planetary-computer>=1.0'"):
        remote.get(azure.url("a.tif"))
    found = read_headers([azure.url("a.tif")])[azure.url("a.tif")]
    assert isinstance(found, str)
    assert "planetary-computer" in found


def test_an_href_with_its_own_signature_is_left_alone(azure: Azure) -> None:
    azure.given.append("mine")
    whole = cog(azure.folder / "a.tif").read_bytes()
    assert remote.get(azure.url("a.tif?sig=mine")) == whole
    assert azure.given == ["mine"]


class _Recorder(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        return

    def do_GET(self) -> None:
        owner = cast(Any, self.server)
        owner.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        denied = "denied" in self.path
        body = b"<Error><Code>AccessDenied</Code></Error>" if denied else b"0123456789"
        self.send_response(403 if denied else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"v1"')
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        self.end_headers()
        self.wfile.write(body)


Seen = list[tuple[str, dict[str, str]]]


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Seen]:
    """Return the requests that an S3 endpoint on loopback has seen: (path, headers)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Recorder)
    server.seen = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    for name in list(os.environ):
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("RASTERET_DASK_CATALOG", str(tmp_path / "catalog.toml"))
    yield server.seen  # type: ignore[attr-defined]
    server.shutdown()
    server.server_close()


def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDUMMY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "geheim")


@pytest.mark.parametrize("bucket", ["usgs-landsat", "naip-analytic", "sentinel-s2-l2a"])
def test_the_requester_pays_where_the_catalog_says_so(
    s3: Seen, monkeypatch: pytest.MonkeyPatch, bucket: str
) -> None:
    keys(monkeypatch)
    assert remote.get(f"s3://{bucket}/a.tif") == b"0123456789"
    assert s3[0][1]["x-amz-request-payer"] == "requester"
    assert "AKIDUMMY" in s3[0][1]["authorization"]


def test_nobody_pays_elsewhere(s3: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    keys(monkeypatch)
    remote.get("s3://my-own/a.tif")
    remote.get("s3://copernicus-dem-30m/a.tif")
    assert not any("x-amz-request-payer" in headers for _, headers in s3)
    assert ["authorization" in headers for _, headers in s3] == [True, False]  # a public bucket needs no key


def test_a_user_s_catalog_adds_a_bucket(s3: Seen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keys(monkeypatch)
    remote.get("s3://paid-for/a.tif")
    (tmp_path / "catalog.toml").write_text(
        '[store]\n"s3://paid-*" = { access = "requester-pays", region = "eu-west-3" }\n'
    )
    remote.get("s3://paid-for/a.tif")
    assert ["x-amz-request-payer" in headers for _, headers in s3] == [False, True]
    assert "/eu-west-3/s3/" in s3[1][1]["authorization"]  # the signature's region
    monkeypatch.setenv("AWS_REQUEST_PAYER", "requester")
    remote.get("s3://my-own/a.tif")
    assert s3[2][1]["x-amz-request-payer"] == "requester"


def test_who_pays_is_told_when_refused(s3: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReadError, match=r"reader pays.*AWS_ACCESS_KEY_ID"):
        remote.get("s3://usgs-landsat/denied.tif")
    assert "authorization" not in s3[0][1]  # without keys nothing is signed
    with pytest.raises(ReadError, match="access denied") as caught:
        remote.get("s3://my-own/denied.tif")
    assert caught.value.remedy == ""


def test_no_catalog_is_needed_for_a_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "catalog.toml").write_text("broken [")
    (tmp_path / "a.bin").write_bytes(b"123")
    monkeypatch.setenv("RASTERET_DASK_CATALOG", str(tmp_path / "catalog.toml"))
    assert remote.get(str(tmp_path / "a.bin")) == b"123"
