"""Which addresses are connected to: never a forbidden one, however its host is spelled, resolved or redirected to."""

from __future__ import annotations

import doctest
import ipaddress
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import dask
import numpy as np
import pyarrow as pa
import pystac
import pytest
import rasterio
from answers import Answers, Asked, Said, answering, ranged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rasterio.errors import RasterioError
from rasterio.transform import Affine

import rasteret_dask as rd
from rasteret_dask.errors import PlanError, ReadError, TrustError
from rasteret_dask.headers.reader import read_headers
from rasteret_dask.ingest.sources import read_items
from rasteret_dask.ingest.stac import items_to_table
from rasteret_dask.ingest.tables import table_to_records
from rasteret_dask.net import hrefs, remote, trust
from rasteret_dask.net.gdalfiles import GdalFile

OPEN, CLOSED = "127.0.0.1", "127.0.0.9"
DATA = b"0123456789"


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Answers, Answers]]:
    """Return two servers at the same port: one may be opened, the other stands for a metadata service."""
    with (
        answering(lambda asked: ranged(DATA, asked), OPEN) as good,
        answering(lambda _: Said(200, {}, b"secret"), CLOSED, good.port) as bad,
    ):
        yield good, bad


@contextmanager
def forbidding(**names: str) -> Iterator[None]:
    """Forbid 127.0.0.9; resolve these names ("a_test" is a.test), loopback's addresses, and no other."""
    real = socket.getaddrinfo
    table = {name.replace("_", "."): address for name, address in names.items()}

    def resolve(host: Any, *more: Any, **further: Any) -> Any:
        text = table.get(host, host)
        if "%" in text or not ipaddress.ip_address(_mapped(text)).is_loopback:
            raise socket.gaierror(socket.EAI_NONAME, "no test goes there")
        return real(text, *more, **further)

    def looked_up(host: Any, *more: Any, **further: Any) -> Any:
        try:
            return resolve(host, *more, **further)
        except ValueError:
            raise socket.gaierror(socket.EAI_NONAME, "no test goes there") from None

    forbidden = (*trust.FORBIDDEN, ipaddress.ip_network(f"{CLOSED}/32"))
    with (
        mock.patch.object(trust, "FORBIDDEN", forbidden),
        mock.patch.object(socket, "getaddrinfo", looked_up),
        mock.patch.object(remote, "ATTEMPTS", 1),
    ):
        yield


def _mapped(text: str) -> str:
    address = ipaddress.ip_address(text)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return text if mapped is None else str(mapped)


def percent(text: str, which: list[bool]) -> str:
    return (
        "".join(f"%{ord(c):02x}" if w else c for c, w in zip(text, which, strict=False)) + text[len(which) :]
    )


def wide(text: str) -> str:
    return "".join(chr(ord(c) - 0x30 + 0xFF10) if c.isdigit() else c for c in text)


def forms(address: str) -> list[str]:
    """Return ways to write an IPv4 address that one C library or browser or other reads as it."""
    a, b, c, d = map(int, address.split("."))
    number = (a << 24) + (b << 16) + (c << 8) + d
    return [
        address, f"{address}.", str(number), hex(number), f"0{number:o}", f"{a}.{(b << 16) + (c << 8) + d}",
        f"{a}.{b}.{(c << 8) + d}", f"0x{a:x}.{b}.{c}.0{d:o}", wide(address), address.replace(".", "\u3002"),
        address.replace(".", "\uff0e"), address.replace("1", "\u2460"), f"\u200b{address}",
    ]  # fmt: skip


SPELLED = st.sampled_from([OPEN, CLOSED]).flatmap(
    lambda address: st.tuples(
        st.just(address),
        st.one_of(
            st.sampled_from(forms(address)),
            st.lists(st.booleans(), max_size=9).map(lambda which: percent(address, which)),
            st.sampled_from([f"[::ffff:{address}]", f"[::{address}]", f"[::ffff:{address}%251]"]),
            st.just("good.test" if address == OPEN else "bad.test"),
            st.just("GOOD.test." if address == OPEN else "b%61d.TEST"),
        ),
    )
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spelled=SPELLED, prefix=st.sampled_from(["", "user:pw@", f"{OPEN}@", f"{OPEN}%40"]), data=st.data())
def test_what_is_accepted_connects_to_an_allowed_address(
    hosts: tuple[Answers, Answers], spelled: tuple[str, str], prefix: str, data: st.DataObject
) -> None:
    good, bad = hosts
    address, host = spelled
    scheme = data.draw(st.sampled_from(["http", "HTTP"]))
    href = f"{scheme}://{prefix}{host}:{good.port}/a"
    bad.log.clear()
    bad.clients.clear()
    with forbidding(good_test=OPEN, bad_test=CLOSED):
        refusal = None
        try:
            assert remote.get(trust.checked(href, local=False, subject="item 'a'")) == DATA
        except (TrustError, ReadError) as error:
            refusal = error
    assert "pw@" not in str(refusal)
    # the open one is reached by every spelling that some client reads as it, but for IPv6 and a name of "user%40..."
    odd = "[" in host or prefix.endswith("%40")
    assert (refusal is None) == (address == OPEN) or odd, refusal
    assert not bad.clients


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=40))
def test_any_text_as_a_host_is_refused_or_has_one_spelling(text: str) -> None:
    try:
        once = hrefs.plain_host(text)
    except ValueError:
        return
    assert hrefs.plain_host(once) == once
    assert once.isascii()
    assert not set(once) & set("/?#@%\\ ")


@pytest.mark.parametrize(
    "address",
    ["169.254.169.254", "fe80::1", "fe80::1%eth0", "::ffff:169.254.169.254", "64:ff9b::169.254.169.254",
     "::169.254.1.1", "2002:a9fe:a9fe::1", "fd00:ec2::254", "100.100.100.200", "168.63.129.16", "192.0.0.192"],
)  # fmt: skip
def test_addresses_that_are_never_connected_to(address: str) -> None:
    with pytest.raises(TrustError, match="link-local or metadata"):
        trust.check_address(address, "some.host", "test")


@pytest.mark.parametrize(
    "address", ["127.0.0.1", "10.1.2.3", "192.168.1.1", "::1", "8.8.8.8", "2001:4860::1"]
)
def test_addresses_that_are(address: str) -> None:
    trust.check_address(address, "some.host", "test")


def test_a_name_that_turns_into_a_forbidden_address_is_not_connected_to(
    hosts: tuple[Answers, Answers],
) -> None:
    """Also when it is checked at one address and resolved to another afterwards."""
    good, bad = hosts
    bad.clients.clear()
    with forbidding(turns_test=OPEN):
        href = trust.checked(f"http://turns.test:{good.port}/a", local=False, subject="x")
    with forbidding(turns_test=CLOSED), pytest.raises(TrustError, match=r"'turns.test' at 127.0.0.9"):
        remote.get(href)
    assert not bad.clients


# Redirects


def redirecting(target: Callable[[], str], status: int = 302) -> Callable[[Asked], Said]:
    return lambda asked: (
        Said(status, {"Location": target()}) if asked.path.startswith("/go") else ranged(DATA, asked)
    )


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_to_where_one_may_go(status: int) -> None:
    with answering(lambda asked: ranged(DATA, asked, ETag='"x"')) as other:
        with answering(redirecting(lambda: other.url("/there?sig=theirs"), status)) as server:
            found = remote.fetch(f"http://ann:secret@{server.host}:{server.port}/go?sig=ours", 2, 3)
        assert (bytes(found.data), found.head) == (DATA[2:5], remote.Head(10, '"x"'))
        (asked,) = other.log
    assert asked.headers["range"] == "bytes=2-4"
    assert "authorization" not in asked.headers  # of the first host, and for it only
    assert asked.path == "/there?sig=theirs"
    assert "authorization" in server.log[0].headers


@pytest.mark.parametrize(
    "target",
    ["http://127.0.0.9:{port}/a", "//127.0.0.9:{port}/a", "http://%31%32%37.0.0.9:{port}/a", "http://0x7f000009:{port}/",
     "http://bad.test:{port}/a", "file:///etc/passwd", "s3://bucket/a", "ftp://127.0.0.9/a", "gopher://127.0.0.1/",
     "http://[fe80::1]/a", "http://metadata.google.internal/"],
)  # fmt: skip
def test_redirects_elsewhere_are_refused(hosts: tuple[Answers, Answers], target: str) -> None:
    good, bad = hosts
    bad.clients.clear()
    with answering(redirecting(lambda: target.format(port=good.port))) as server, forbidding(bad_test=CLOSED):
        with pytest.raises(TrustError) as caught:
            remote.fetch(server.url("/go?sig=secret"), 0, 4)
        assert "secret" not in str(caught.value)
        assert len(server.log) == 1  # what is refused is not asked for again
        reason = read_headers([server.url("/go")])[server.url("/go")]
        assert isinstance(reason, str)
    assert not bad.clients


def test_chains_and_loops_of_redirects_end(hosts: tuple[Answers, Answers]) -> None:
    good, bad = hosts

    def chain(asked: Asked) -> Said:
        left = int(asked.path.rpartition("/")[2])
        return Said(302, {"Location": f"/go/{left - 1}"}) if left else ranged(DATA, asked)

    with answering(chain) as server:
        assert remote.get(server.url("/go/5")) == DATA
        with pytest.raises(ReadError, match="more than 5 redirects"):
            remote.get(server.url("/go/6"))
    with answering(lambda asked: Said(302, {"Location": asked.path})) as loop:
        with pytest.raises(ReadError, match="more than 5 redirects"):
            remote.get(loop.url("/round"))
        assert len(loop.log) == 6
    bad.clients.clear()
    with (
        forbidding(),
        answering(redirecting(lambda: f"http://{CLOSED}:{good.port}/")) as last,
        answering(redirecting(lambda: last.url("/go"))) as first,
        pytest.raises(TrustError),
    ):
        remote.get(first.url("/go"))
    assert not bad.clients


def test_gdal_s_reads_pass_the_same_checks(tmp_path: Path, hosts: tuple[Answers, Answers]) -> None:
    """A file that only GDAL reads: its first request is ours, later ones are redirected to a forbidden address."""
    good, bad = hosts
    profile = {"crs": "EPSG:32631", "transform": Affine(10, 0, 6e5, 0, -10, 5.7e6), "compress": "lerc"}
    with rasterio.open(
        tmp_path / "a.tif",
        "w",
        driver="GTiff",
        width=200,
        height=200,
        count=1,
        dtype="float32",
        blockysize=8,
        **profile,
    ) as to:
        to.write(np.random.default_rng(0).random((1, 200, 200), "float32"))
    data = (tmp_path / "a.tif").read_bytes()
    count = 0

    def turning(asked: Asked) -> Said:
        nonlocal count
        count += 1
        return (
            ranged(data, asked)
            if count == 1
            else Said(302, {"Location": f"http://{CLOSED}:{good.port}/a.tif"})
        )

    bad.clients.clear()
    with answering(turning) as server, forbidding():
        file = GdalFile(server.url("/a.tif"))
        dataset = file.open("GTiff")
        with pytest.raises(RasterioError):
            file.call(dataset.read)
        assert isinstance(file.failure, TrustError)
        assert "link-local or metadata" in str(file.failure)
        file.close()
    assert count > 1
    assert not bad.clients


# The user's list


@pytest.mark.parametrize(
    ("pattern", "href", "fits"),
    [
        ("data.org", "https://data.org/a", True),
        ("data.org", "http://DATA.org.:8080/a", True),
        ("data.org:8080", "http://data.org:8080/a", True),
        ("data.org:8080", "http://data.org/a", False),
        ("*.data.org", "https://a.b.data.org/a", True),
        ("*.data.org", "https://data.org/a", False),
        ("*.data.org", "https://evildata.org/a", False),
        ("*.data.org", "https://x.data.org@evil.org/a", False),
        ("https://data.org", "http://data.org/a", False),
        ("https://data.org/", "https://data.org/a", True),
        ("s3://bucket", "s3://bucket/a", True),
        ("s3://bucket", "s3://bucket-2/a", False),
        ("s3://team-*", "s3://team-a/a", True),
        ("*", "s3://bucket/a", False),
        ("*", "https://any.org/a", True),
        ("bucket", "s3://bucket/a", False),
        ("gs://b", "s3://b/a", False),
    ],
)
def test_patterns_of_the_list(pattern: str, href: str, fits: bool) -> None:
    with rd.trust(hosts=[pattern]):
        if fits:
            assert trust.checked(href, local=True, subject="x") == href
        else:
            with pytest.raises(TrustError, match=r"rasteret_dask.trust.hosts.*rd.trust\("):
                trust.checked(href, local=True, subject="x")
    trust.checked(href, local=True, subject="x")  # the list has gone


def test_the_list_holds_for_reads_redirects_and_buckets(hosts: tuple[Answers, Answers]) -> None:
    good, _ = hosts
    with answering(redirecting(lambda: f"http://localhost:{good.port}/")) as server:
        with rd.trust(hosts=["127.0.0.1"]):
            assert remote.get(server.url("/x")) == DATA
            with pytest.raises(TrustError, match="'localhost'"):
                remote.get(server.url("/go"))
        with rd.trust(hosts=["127.0.0.1", "localhost"]):
            assert remote.get(server.url("/go")) == DATA
    with rd.trust(hosts=[]):
        for ask in (remote.get, remote.listing, remote.delete):
            with pytest.raises(TrustError, match="none"):
                ask("s3://bucket/a")
        with pytest.raises(TrustError):
            remote.put("s3://bucket/a", b"")


def test_the_list_comes_from_dask_s_configuration() -> None:
    code = "from rasteret_dask.net import trust; trust.checked('https://data.org/a', local=True, subject='x')"
    for value, fine in (("['*.org']", True), ("*.com, data.org", True), ("['*.com']", False)):
        quiet = {**os.environ, "DASK_RASTERET_DASK__TRUST__HOSTS": value}
        done = subprocess.run([sys.executable, "-c", code], env=quiet, capture_output=True, text=True)
        assert (done.returncode == 0) == fine, done.stderr
    with dask.config.set({"rasteret_dask.trust.hosts": [5]}), pytest.raises(PlanError, match="patterns"):
        trust.checked("https://data.org/a", local=True, subject="x")
    for wrong in (5, [""], [None]):
        with pytest.raises(PlanError, match="patterns"):
            rd.trust(hosts=wrong)  # type: ignore[arg-type]


def test_the_example_of_plain_host_runs() -> None:
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    (example,) = finder.find(hrefs.plain_host, globs=dict(vars(hrefs)))
    assert runner.run(example).failed == 0


# Where items in memory come from


def item(href: str, **links: str) -> dict[str, Any]:
    return {
        "type": "Feature", "stac_version": "1.0.0", "stac_extensions": [], "id": "a", "bbox": [0, 0, 1, 1],
        "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]]},
        "properties": {"datetime": "2024-05-01T00:00:00Z", "proj:epsg": 32631},
        "links": [{"rel": rel, "href": to} for rel, to in links.items()],
        "assets": {"data": {"href": href, "type": "image/tiff; application=geotiff", "roles": ["data"]}},
    }  # fmt: skip


FAR = "https://api.example.com/items/a"


def in_dict(one: dict[str, Any]) -> Any:
    return one


def in_list(one: dict[str, Any]) -> Any:
    return [one]


def in_collection(one: dict[str, Any]) -> Any:
    return {"type": "FeatureCollection", "features": [one]}


def in_pystac(one: dict[str, Any]) -> Any:
    return pystac.Item.from_dict(one)


def in_pystac_collection(one: dict[str, Any]) -> Any:
    return pystac.ItemCollection([pystac.Item.from_dict(one)])


def in_table(one: dict[str, Any]) -> Any:
    row = {k: v for k, v in one.items() if k not in ("properties", "stac_extensions", "geometry", "bbox")}
    return pa.Table.from_pylist([{**row, **one["properties"]}])


HOLDERS = (in_dict, in_list, in_collection, in_pystac, in_pystac_collection, in_table)


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize(
    "links", [{"self": FAR}, {"root": "https://api.example.com/"}, {"self": "/here/a.json", "root": FAR}]
)
@pytest.mark.parametrize("href", ["/abs/x.tif", "file:///abs/x.tif"])
def test_items_of_a_remote_catalog_name_no_local_files(
    holder: Callable[[dict[str, Any]], Any], links: dict[str, str], href: str
) -> None:
    with pytest.raises(TrustError, match="named by a remote catalog"):
        items_to_table(read_items(holder(item(href, **links))), name="x", headers=False)


@pytest.mark.parametrize("holder", HOLDERS)
def test_relative_hrefs_start_from_where_the_item_came_from(holder: Callable[[dict[str, Any]], Any]) -> None:
    table = items_to_table(read_items(holder(item("./b.tif", self=FAR))), name="x", headers=False)
    assert "https://api.example.com/items/b.tif" in str(table.column("assets").to_pylist())


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("links", [{}, {"self": "/here/a.json"}, {"derived_from": FAR}])
def test_other_items_in_memory_may(holder: Callable[[dict[str, Any]], Any], links: dict[str, str]) -> None:
    table = items_to_table(read_items(holder(item("/abs/x.tif", **links))), name="x", headers=False)
    assert "/abs/x.tif" in str(table.column("assets").to_pylist())


def test_a_collection_of_items_that_came_from_afar() -> None:
    whole = {
        "type": "FeatureCollection",
        "features": [item("/abs/x.tif")],
        "links": [{"rel": "self", "href": FAR}],
    }
    with pytest.raises(TrustError, match="named by a remote catalog"):
        items_to_table(read_items(whole), name="x", headers=False)


def test_rows_of_any_table_too() -> None:
    row = {
        "id": "a",
        "datetime": "2024-05-01T00:00:00Z",
        "collection": "c",
        "assets": {"data": {"href": "/abs/x.tif"}},
        "geometry": "POLYGON ((0 0, 1 0, 1 1, 0 0))",
    }
    table = pa.Table.from_pylist([{**row, "links": [{"rel": "self", "href": FAR}]}])
    with pytest.raises(TrustError, match="named by a remote catalog"):
        table_to_records(table, name="x")


def test_a_catalog_in_memory_is_followed_through_the_same_door(hosts: tuple[Answers, Answers]) -> None:
    good, bad = hosts
    bad.clients.clear()
    catalog = pystac.Catalog("c", "d", href="https://api.example.com/catalog.json")
    for target, text in (
        (f"http://{CLOSED}:{good.port}/i.json", "link-local"),
        ("/etc/passwd", "remote catalog"),
    ):
        catalog.clear_links("item")
        catalog.add_link(pystac.Link("item", target))
        with forbidding(), pytest.raises(TrustError, match=text):
            read_items(catalog)
    assert not bad.clients


def test_texts_for_messages_are_made_only_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []

    def redacted(text: str) -> str:
        texts.append(text)
        return text

    monkeypatch.setattr(trust, "redact", redacted)
    for n in range(3):  # as for each file of each item
        trust.checked(f"https://example.com/{n}.tif", local=False, subject="item 'a'")
    assert texts == []
    with pytest.raises(TrustError):
        trust.checked("https://169.254.169.254/a.tif", local=False, subject="item 'a'")
    with pytest.raises(TrustError):
        trust.checked("ftp://example.com/a.tif", local=False, subject="item 'a'")
    assert texts
