"""Signed hrefs from end to end: what needs a signature reads, everywhere, and nothing that is written holds one."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import cloudpickle
import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import xarray as xr
import zarr
from distributed import Client, LocalCluster
from numpy.typing import NDArray
from signed_items import PASSWORD, USER, Guarded, guarding, signed_items
from stac_api import serving_stac

import rasteret_dask as rd
from rasteret_dask.catalogs import signing
from rasteret_dask.catalogs.credentials import bare
from rasteret_dask.demo.world import World
from rasteret_dask.errors import PlanError, ReadError, SignedHrefsWarning
from rasteret_dask.net import remote
from rasteret_dask.reader.sharing import SHARED

SECRETS = ("geheim-eins", "geheim-zwei", PASSWORD, USER)
SIGNER = """
import pathlib

def sign(href):
    mine = pathlib.Path(__file__).with_name("signature.txt").read_text()
    return f"{href}?token={mine}"
"""


def azure(url: str, signature: str = "geheim-eins", until: str = "2099-01-01T00:00:00Z") -> str:
    return f"{url}?sv=2024-05-04&sr=c&sp=r&se={quote(until)}&sig={signature}"


def aws(url: str) -> str:
    return f"{url}?X-Amz-Algorithm=A&X-Amz-Date=20260101T000000Z&X-Amz-Expires=9999999999&X-Amz-Signature=geheim-eins"


def token(url: str) -> str:
    return f"{url}?v=2&token=geheim-eins#access_token=geheim-eins"


def basic(url: str) -> str:
    return url.replace("://", f"://{USER}:{PASSWORD}@")


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let each test begin as a process of its own does."""
    for name in ("_GRANTS", "_PLACES", "_NAMED", "_SHARED"):
        monkeypatch.setattr(signing, name, {})
    monkeypatch.setenv("RASTERET_DASK_CATALOG", str(tmp_path / "no-catalog.toml"))
    SHARED.clear()


@pytest.fixture
def guard(small_world: World) -> Iterator[Guarded]:
    """Serve the world's files to those who show a signature."""
    with guarding(small_world.sentinel2.parents[1]) as server:
        yield server


def chips_of(collection: rd.Collection) -> rd.Chips:
    return collection.harmonize(bands=["red", "nir"], dtype="uint16").chips(size=64)


@pytest.fixture(scope="module")
def wanted(small_world: World) -> NDArray[Any]:
    """Return the pixels, from local files."""
    return np.asarray(chips_of(rd.build_from_stac(small_world.sentinel2, name="s2")).load()["pixels"])


def built(world: World, guard: Guarded, sign: Callable[[str], str] = azure) -> rd.Collection:
    with pytest.warns(SignedHrefsWarning, match=guard.host):
        return rd.build_from_stac(signed_items(world.sentinel2, guard, sign), name="s2")


def pixels_in(store: Path) -> NDArray[Any]:
    return np.asarray(xr.open_zarr(store, mask_and_scale=False)["pixels"])


def assert_clean(text: str | bytes, where: object) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    for secret in SECRETS:
        assert secret.encode() not in data, where


def assert_folder_clean(folder: Path) -> int:
    """Look at every byte below a folder, and at what all of it says once it is decoded; return the number of files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        assert_clean(path.read_bytes(), path)
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            assert_clean(f"{table.schema.to_string(truncate_metadata=False)}\n{table.to_pylist()}", path)
        if path.suffix == ".arrow":
            table = pa.ipc.open_file(path).read_all()
            assert_clean(f"{table.schema.to_string(truncate_metadata=False)}\n{table.to_pylist()}", path)
    for root in {path.parent for path in files if path.name == "zarr.json"}:
        node = zarr.open(root, mode="r")
        assert_clean(json.dumps(dict(node.attrs), default=str), root)
        if isinstance(node, zarr.Array) and node.dtype.kind in "OTU":
            assert_clean(repr(np.asarray(node[...]).tolist()), root)
    return len(files)


@pytest.mark.parametrize("sign", [azure, aws, token, basic])
def test_nothing_that_is_written_shown_or_pickled_holds_a_signature(
    small_world: World, guard: Guarded, wanted: NDArray[Any], tmp_path: Path, sign: Callable[[str], str],
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with caplog.at_level(logging.DEBUG):
        collection = built(small_world, guard, sign)
        chips = chips_of(collection)
        chips.to_zarr(tmp_path / "store", progress=True)
        chips.save_plan(tmp_path / "plan")
        collection.export(tmp_path / "records.parquet")
        collection.export(tmp_path / "parts", partition_by=("year", "month"))
        collection.export(tmp_path / "rasteret.parquet", format="rasteret")
        batches = list(rd.stream_from(None, tmp_path / "plan", 64))
    np.testing.assert_array_equal(pixels_in(tmp_path / "store"), wanted)
    np.testing.assert_array_equal(np.concatenate([np.asarray(b["s2"]) for b in batches]), wanted)
    again = chips_of(rd.load(tmp_path / "records.parquet", name="s2"))
    np.testing.assert_array_equal(np.asarray(again.load()["pixels"]), wanted)
    assert not guard.refused
    lazy = chips.to_xarray()
    for thing in (
        collection,
        chips,
        again,
        chips.stream(4),
        lazy,
        lazy.__dask_graph__(),
        rd.open_chips(tmp_path / "store"),
    ):
        assert_clean(cloudpickle.dumps(thing), type(thing))
        assert_clean(repr(thing), type(thing))
    assert_clean(
        str(chips.explain()) + str(collection.describe()) + str(collection.to_table().to_pylist()), "shown"
    )
    assert_clean(caplog.text + "".join(capsys.readouterr()), "logged")
    assert assert_folder_clean(tmp_path) > 10


def test_the_same_items_signed_anew_are_the_same_table_plan_and_store(
    small_world: World, guard: Guarded, tmp_path: Path
) -> None:
    guard.good.add("geheim-zwei")
    one = built(small_world, guard, partial(azure, signature="geheim-eins"))
    other = built(small_world, guard, partial(azure, signature="geheim-zwei"))
    assert one.to_table().equals(other.to_table(), check_metadata=True)
    assert one.plan == other.plan
    chips_of(one).to_zarr(tmp_path / "store", progress=False)
    guard.forget()
    chips_of(other).to_zarr(tmp_path / "store", progress=False)  # which is finished
    assert not guard.log
    for number, collection in enumerate((one, other)):
        chips_of(collection).save_plan(tmp_path / f"plan{number}")
    names = sorted(p.relative_to(tmp_path / "plan0") for p in (tmp_path / "plan0").rglob("*") if p.is_file())
    assert names
    assert all((tmp_path / "plan0" / n).read_bytes() == (tmp_path / "plan1" / n).read_bytes() for n in names)


@pytest.fixture(scope="module")
def signer_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return a folder with a module ``my_signer``, which other processes can import."""
    folder = tmp_path_factory.mktemp("signer")
    (folder / "my_signer.py").write_text(SIGNER)
    (folder / "signature.txt").write_text("geheim-zwei")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        yield folder


@pytest.fixture(scope="module")
def cluster(signer_folder: Path) -> Iterator[LocalCluster]:
    """Return a cluster of processes that can import ``my_signer``."""
    assert signer_folder.is_dir()
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=True, dashboard_address=":0") as running:
        yield running


def test_workers_get_signatures_in_memory_those_that_join_later_too(
    small_world: World, guard: Guarded, wanted: NDArray[Any], tmp_path: Path, cluster: LocalCluster
) -> None:
    chips = chips_of(built(small_world, guard))
    with Client(cluster, set_as_default=False) as client:
        chips.to_zarr(tmp_path / "store", progress=False, client=client)
        np.testing.assert_array_equal(pixels_in(tmp_path / "store"), wanted)
        guard.forget()
        streamed = np.concatenate([np.asarray(b["s2"]) for b in chips.stream(64, client=client)])
        np.testing.assert_array_equal(streamed, wanted)
        assert guard.log
        assert chips.stats(client=client).chips == len(wanted)
        cluster.scale(2)
        client.wait_for_workers(2)
        assert list(client.run(signing.lacking_hosts, (guard.host,)).values()) == [(), ()]
    with Client(cluster):  # the current one: lazy arrays are read on it
        np.testing.assert_array_equal(np.asarray(chips.to_xarray()["pixels"]), wanted)
    assert not guard.refused
    assert_folder_clean(tmp_path)


def test_a_signer_by_name_runs_in_each_worker(
    small_world: World, guard: Guarded, wanted: NDArray[Any], tmp_path: Path, cluster: LocalCluster
) -> None:
    guard.good = {"geheim-zwei"}
    rd.sign(f"http://{guard.host}", "my_signer:sign")
    items = signed_items(small_world.sentinel2, guard, str)  # no item is signed: the signer is all there is
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a signer lasts: there is nothing to warn of
        collection = rd.build_from_stac(items, name="s2")
    with Client(cluster, set_as_default=False) as client:
        chips_of(collection).to_zarr(tmp_path / "store", progress=False, client=client)
    np.testing.assert_array_equal(pixels_in(tmp_path / "store"), wanted)
    assert set(guard.shown) == {"geheim-zwei"}
    assert not guard.refused
    assert_folder_clean(tmp_path / "store")


def test_a_callable_stays_in_its_process(
    small_world: World, guard: Guarded, tmp_path: Path, cluster: LocalCluster
) -> None:
    with guarding(small_world.sentinel2.parents[1]) as other:  # whose host no worker has met
        rd.sign(f"http://{other.host}", azure)
        chips = chips_of(rd.build_from_stac(signed_items(small_world.sentinel2, other, azure), name="s2"))
        assert len(np.asarray(chips.load()["pixels"]))
        other.forget()
        with (
            Client(cluster, set_as_default=False) as client,
            pytest.raises(PlanError, match=r"workers without a signature.*rd\.sign"),
        ):
            chips.to_zarr(tmp_path / "store", progress=False, client=client)
        assert not other.log


OTHER_PROCESS = """
import sys
import numpy as np
import rasteret_dask as rd

def main():
    plan, host, signer = sys.argv[1:4]
    try:
        if signer:
            rd.sign(f"http://{host}", signer)
        stream = rd.stream_from(None, plan, 64)
    except rd.PlanError as error:
        print("PlanError", error)
        return
    np.save(sys.argv[4], np.concatenate([np.asarray(b["s2"]) for b in stream]))

if __name__ == "__main__":
    main()
"""


def test_another_process_is_told_what_it_lacks_and_reads_with_a_signer(
    small_world: World, guard: Guarded, wanted: NDArray[Any], tmp_path: Path, signer_folder: Path
) -> None:
    assert signer_folder.is_dir()
    (tmp_path / "other.py").write_text(OTHER_PROCESS)
    chips_of(built(small_world, guard)).save_plan(tmp_path / "plan")
    guard.forget()
    guard.good = {"geheim-zwei"}  # what the signer gives

    def run(signer: str, **environment: str) -> str:
        command = [sys.executable, "other.py", "plan", guard.host, signer, "x"]
        done = subprocess.run(
            command, env={**os.environ, **environment}, cwd=tmp_path, capture_output=True, text=True, timeout=300,
            check=True,
        )  # fmt: skip
        return done.stdout

    told = run("")
    assert told.startswith("PlanError")
    assert guard.host in told
    assert "rd.sign(" in told
    assert not guard.log + guard.refused  # before a byte was asked for
    assert run("my_signer:sign") == ""
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), wanted)
    catalog = tmp_path / "catalog.toml"
    rd.register(
        "me/s2", catalog="x.json", stores=[f"http://{guard.host}"], signer="my_signer:sign", path=catalog
    )
    (tmp_path / "x.npy").unlink()
    assert run("", RASTERET_DASK_CATALOG=str(catalog)) == ""
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), wanted)


def test_an_expired_signature_is_told_before_anything_is_read(
    small_world: World, guard: Guarded, tmp_path: Path
) -> None:
    past = (datetime.now(UTC) - timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    chips = chips_of(built(small_world, guard, lambda url: azure(url, until=past)))
    guard.forget()
    guard.good.clear()
    with pytest.raises(PlanError, match=r"expired at .* UTC.*[Ss]ign the items anew"):
        chips.to_zarr(tmp_path / "store", progress=False)
    with pytest.raises(PlanError, match="expired"):
        chips.load()
    assert not guard.log + guard.refused
    with pytest.raises(ReadError, match="expired at") as caught:
        remote.get(next(iter(signing._GRANTS[guard.host])))
    assert_clean(str(caught.value) + repr(caught.value.args), "error")
    assert_clean(
        remote.redact(f"cannot read {token('https://h/a.tif').replace('token=geheim-eins#', '#')}"), "text"
    )
    guard.good.add("geheim-zwei")
    rd.sign(f"http://{guard.host}", "?sig=geheim-zwei")  # the remedy
    assert len(np.asarray(chips.load()["pixels"]))


def test_a_refused_signature_is_asked_for_anew_once(tmp_path: Path) -> None:
    asked: list[str] = []

    def signer(href: str) -> str:
        asked.append(href)
        return f"{href}?sig={len(asked)}"

    rd.sign("https://h.example/box", signer)
    href = "https://h.example/box/a.tif"
    first = signing.signed(href)
    assert signing.signed(href) == first
    assert signing.renew(href, first)
    assert signing.renew(href, first)  # another thread that was refused with it
    assert len(asked) == 2
    assert signing.signed(href) == f"{href}?sig=2"
    assert signing.signed("https://h.example/boxes/a.tif") == "https://h.example/boxes/a.tif"
    rd.sign("https://h.example/box", lambda href: f"{href}?sig=always")
    assert not signing.renew(href, signing.signed(href))  # nothing new
    rd.sign("https://h.example/box", None)
    assert signing.signed(href) == href
    assert not signing.renew(href)
    kept = signing.keep_apart(azure("https://h.example/b.tif"))
    assert not signing.renew(kept)
    assert signing.signed(kept) == azure("https://h.example/b.tif")


def test_a_signature_that_a_host_refuses_is_renewed_and_the_read_goes_on(tmp_path: Path) -> None:
    """An expired token costs one refusal a read under way, and no read."""
    (tmp_path / "a.bin").write_bytes(bytes(range(256)))
    tokens = iter(["old", "new"])
    with guarding(tmp_path) as server:
        server.good = {"new"}
        rd.sign(server.url().rstrip("/"), lambda href: f"{href}?sig={next(tokens)}")
        try:
            assert remote.get(server.url("a.bin"), 10, 5) == bytes(range(10, 15))
            assert remote.get(server.url("a.bin"), 20, 5) == bytes(range(20, 25))
        finally:
            rd.sign(server.url().rstrip("/"), None)
    assert server.refused == ["/a.bin?sig=old"]
    assert server.shown == ["old", "new", "new"]


def test_an_answer_that_ends_soon_is_asked_for_anew() -> None:
    asked: list[str] = []

    def signer(href: str) -> str:
        asked.append(href)
        soon = datetime.now(UTC) + timedelta(seconds=30 if len(asked) < 3 else 3600)
        return f"{href}?Expires={int(soon.timestamp())}&Signature=x"

    rd.sign("https://h.example", signer)
    for _ in range(5):
        signing.signed("https://h.example/a.tif")
    assert len(asked) == 3


@pytest.mark.parametrize(
    "href",
    [azure("https://h/a.tif"), aws("https://h/a%20b.tif"), basic("https://h/a.tif?v=2"), "https://h/a?x"],
)
def test_a_url_is_requested_as_it_was_published(href: str) -> None:
    assert signing.signed(signing.keep_apart(href)) == href


@pytest.mark.parametrize(
    ("place", "signer", "found"),
    [
        ("s3://bucket", "?sig=1", "https://host"),
        ("https://u:geheim-eins@h", "?sig=1", "without a query or a password"),
        ("https://h/?token=geheim-eins", "?sig=1", "without a query or a password"),
        ("https://h", "no_such_module:sign", "no signer 'no_such_module:sign'"),
        ("https://h", "os:sep", "a str"),
        ("https://h", "token=geheim-eins", "a text of another form"),
        ("https://h", 17, "a int"),
    ],
)
def test_what_is_no_signer_is_refused(place: str, signer: Any, found: str) -> None:
    with pytest.raises(PlanError, match=found.replace("?", r"\?")) as caught:
        rd.sign(place, signer)
    assert_clean(str(caught.value), "error")


def test_what_a_signer_raises_stays_with_it() -> None:
    def signer(href: str) -> str:
        raise ValueError(f"no key geheim-eins for {href}")

    rd.sign("https://h", signer)
    with pytest.raises(ReadError, match=r"signing https://h/a.tif.*ValueError from the signer") as caught:
        signing.signed("https://h/a.tif")
    assert_clean("".join([str(caught.value), repr(caught.value.__cause__)]), "error")


def test_an_older_table_with_signed_hrefs_is_cleaned_when_it_is_opened(
    small_world: World, guard: Guarded, wanted: NDArray[Any], tmp_path: Path
) -> None:
    table = built(small_world, guard).to_table()
    hrefs = [
        [(band, {**asset, "href": azure(asset["href"])}) for band, asset in row]
        for row in table["assets"].to_pylist()
    ]
    old = table.set_column(
        table.schema.get_field_index("assets"),
        table.schema.field("assets"),
        pa.array(hrefs, table["assets"].type),
    )
    old = old.append_column("links", pa.array([[{"href": azure("https://h/x.json")}]] * len(old)))
    old = old.append_column("thumb", pa.array([token("https://h/x.png")] * len(old)).dictionary_encode())
    old = old.append_column("extra", pa.array(['{"a": "' + azure("https://h/é") + '"}'] * len(old)))
    old = old.replace_schema_metadata(None)
    pq.write_table(old, tmp_path / "old.parquet")
    signing._GRANTS.clear()
    doors: list[Callable[[], rd.Collection]] = [
        lambda: rd.load(tmp_path / "old.parquet", name="s2"),
        lambda: rd.as_collection(old, name="s2"),
        lambda: rd.build_from_table(old, name="s2"),
    ]
    for open_it in doors:
        with pytest.warns(SignedHrefsWarning, match=guard.host):
            collection = open_it()
        assert_clean(cloudpickle.dumps(collection) + str(collection.to_table().to_pylist()).encode(), open_it)
        assert collection.to_table()["links"][0].as_py() == [{"href": "https://h/x.json"}]
        np.testing.assert_array_equal(np.asarray(chips_of(collection).load()["pixels"]), wanted)
        collection.export(tmp_path / "new.parquet")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert isinstance(rd.load(tmp_path / "new.parquet").dataset, pads.FileSystemDataset)  # lazy again
    (tmp_path / "old.parquet").unlink()
    assert_folder_clean(tmp_path)


def test_a_table_of_signed_files_is_indexed_without_their_signatures(
    small_world: World, guard: Guarded, wanted: NDArray[Any]
) -> None:
    table = built(small_world, guard).to_table()
    red = [dict(row)["B04"]["href"] for row in table["assets"].to_pylist()]
    signing._GRANTS.clear()
    files = table.select(["id", "datetime", "geometry"]).append_column(
        "url", pa.array([azure(href) for href in red])
    )
    with pytest.warns(SignedHrefsWarning):
        collection = rd.build_from_files(files, name="s2", column_map={"url": "href"}, bands=["red"])
    kept = collection.to_table()["assets"].to_pylist()
    assert [dict(row)["red"]["href"] for row in kept] == red
    found = np.asarray(collection.chips(size=64).load()["pixels"])
    assert found.shape[0] == len(wanted)
    assert not guard.refused


def test_urls_of_stores_and_tables_are_kept_without_their_signatures(
    small_world: World, guard: Guarded, wanted: NDArray[Any], tmp_path: Path, cluster: LocalCluster
) -> None:
    chips_of(rd.build_from_stac(small_world.sentinel2, name="s2")).to_zarr(tmp_path / "store", progress=False)
    built(small_world, guard).export(tmp_path / "records.parquet")
    with guarding(tmp_path) as stores, Client(cluster, set_as_default=False) as client:
        opened = rd.open_chips(stores.url("store") + "?sv=1&sig=geheim-eins")
        basic_opened = rd.open_chips(basic(stores.url("store/")))
        table = rd.load(
            stores.url("records.parquet") + "?X-Amz-Signature=geheim-eins&X-Amz-Date=x", name="s2"
        )
        for thing in (opened, basic_opened, opened.stream(4), table, table.dataset):
            assert_clean(cloudpickle.dumps(thing) + repr(thing).encode(), thing)
        np.testing.assert_array_equal(np.asarray(opened.load()["pixels"]), wanted)
        np.testing.assert_array_equal(np.asarray(chips_of(table).load()["pixels"]), wanted)
        streamed = np.concatenate([np.asarray(b["s2"]) for b in opened.stream(64, client=client)])
        np.testing.assert_array_equal(streamed, wanted)
        assert not stores.refused


def test_a_built_table_that_is_opened_again_gets_its_signatures_from_the_api(
    small_world: World, guard: Guarded, wanted: NDArray[Any], tmp_path: Path
) -> None:
    items = signed_items(small_world.sentinel2, guard, azure)
    with serving_stac(items) as api:

        def build() -> rd.Collection:
            with pytest.warns(SignedHrefsWarning, match=guard.host):
                return rd.build_from_stac(
                    stac_api=api.url, collection=items[0]["collection"], name="s2", max_items=100, cache_dir=tmp_path,
                    progress=False,
                )  # fmt: skip

        build()
        api.forget()
        build()
        assert not api.log  # what this process has is good
        signing._GRANTS.clear()  # as in another process
        guard.forget()
        collection = build()
        assert api.log
        assert not guard.log  # no header is read twice
    np.testing.assert_array_equal(
        np.sort(np.asarray(chips_of(collection).load()["pixels"]), None), np.sort(wanted, None)
    )
    assert assert_folder_clean(tmp_path) >= 2


def test_the_signer_in_the_documents_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[1] / "docs" / "credentials.md").read_text()
    blocks = [part.partition("```")[0] for part in text.split("```python\n")[1:]]
    (tmp_path / "my_signer.py").write_text(blocks[0])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_signer", raising=False)
    monkeypatch.setenv("MY_TOKEN", "abc")
    exec(blocks[1], {})
    assert (
        signing.signed("https://data.example.com/private/a.tif")
        == "https://data.example.com/private/a.tif?token=abc"
    )
    exec("import rasteret_dask as rd\n" + blocks[2], {})
    basic_url = "https://u:p@account.blob.core.windows.net/box/a.tif"
    assert signing.signed(bare(basic_url)).endswith("/box/a.tif?sv=2024-05-04&sp=r&sig=...")
