"""The bytes of shards: what each implementation of Zarr reads back, and what is stored how."""

from __future__ import annotations

import importlib.util
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from waiting import PATIENCE_S
from zarr.codecs import BloscCodec, Crc32cCodec, GzipCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import LocalStore

from rasteret_dask.errors import PlanError
from rasteret_dask.store.encode import Encoding, Piece, checked, compressors, crc32

CODECS = {
    "auto": "auto",
    "none": None,
    "zstd": ZstdCodec(level=1),
    "gzip": GzipCodec(level=1),
    "lz4": BloscCodec(cname="lz4"),
    "lz4hc": BloscCodec(cname="lz4hc", clevel=3, shuffle="noshuffle"),
    "typesize 8": BloscCodec(cname="zstd", clevel=1, shuffle="bitshuffle", typesize=8),
}
FILLS = {"uint16": 65535, "int16": -32768, "int8": -128, "uint8": 0, "float32": np.nan, "bool": False}


def created(folder: Path, shape: tuple[int, ...], per: int, dtype: str, codec: Any) -> Any:
    """Create an array of shards, an inner chunk a chip."""
    return zarr.create_array(
        folder, shape=shape, shards=(per, *shape[1:]), chunks=(1, *shape[1:]), dtype=dtype,
        fill_value=FILLS[dtype], compressors=compressors(codec, dtype), overwrite=True,
    )  # fmt: skip


def chips(shape: tuple[int, ...], dtype: str, fill_every: int, seed: int = 0) -> NDArray[Any]:
    """Return pixels in patches, with chips of nothing but fill between them."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-50, 100, shape).repeat(3, axis=-1)[..., : shape[-1]].astype(dtype)
    values[::fill_every] = FILLS[dtype]
    return values


def write(folder: Path, values: NDArray[Any], per: int) -> dict[int, list[Piece]]:
    """Write every shard below an array's folder; return the pieces of those that are not all fill."""
    encoding = Encoding.of((folder / "zarr.json").read_bytes())
    found = {}
    for number, start in enumerate(range(0, len(values), per)):
        pieces = encoding.encode(values[start : start + per])
        if pieces:
            path = folder / "c" / str(number) / "/".join(["0"] * (values.ndim - 1))
            path.parent.mkdir(parents=True)
            path.write_bytes(b"".join(bytes(piece) for piece in pieces))
            found[number] = pieces
    return found


@pytest.mark.parametrize("dtype", FILLS)
@pytest.mark.parametrize("codec", CODECS)
def test_zarr_reads_back_what_was_given(tmp_path: Path, codec: str, dtype: str) -> None:
    values = chips((11, 2, 3, 8, 10), dtype, 3)
    array = created(tmp_path / "a", values.shape, 4, dtype, CODECS[codec])
    write(tmp_path / "a", values, 4)
    np.testing.assert_array_equal(array[:], values)
    for chip in (0, 3, 4, 10):
        np.testing.assert_array_equal(array[chip], values[chip])


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9), st.integers(1, 5), st.integers(1, 4), st.sampled_from(sorted(FILLS)),
    st.sampled_from(sorted(CODECS)), st.integers(1, 4), st.booleans(), st.integers(0, 99),
)  # fmt: skip
def test_any_shape_reads_back(
    tmp_path_factory: pytest.TempPathFactory, n: int, per: int, side: int, dtype: str, codec: str,
    fill_every: int, strided: bool, seed: int,
) -> None:  # fmt: skip
    folder = tmp_path_factory.mktemp("any") / "a"
    values = chips((n, side, 2, 5), dtype, fill_every, seed)
    if strided:  # as a user's function may leave it
        values = np.asfortranarray(values)
    array = created(folder, values.shape, per, dtype, CODECS[codec])
    write(folder, values, per)
    np.testing.assert_array_equal(array[:], values)


READERS = {
    "zarrs": """
import zarr, zarrs
zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"})
array = zarr.open_array(place, mode="r")
read = lambda i: array[i]
""",
    "tensorstore": """
import tensorstore
spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": place + "/"}}
array = tensorstore.open(spec, open=True).result()
read = lambda i: array[i].read().result()
""",
}
COMPARE = """
import sys
import numpy as np
for place in sys.argv[1:]:
    exec(reader)
    wanted = np.load(place + ".npy")
    np.testing.assert_array_equal(np.asarray(read(slice(None))), wanted)
    for chip in (0, 3, 4, len(wanted) - 1):
        np.testing.assert_array_equal(np.asarray(read(chip)), wanted[chip])
print("equal", len(sys.argv) - 1)
"""


@pytest.mark.parametrize("reader", READERS)
def test_other_implementations_read_the_same(tmp_path: Path, reader: str) -> None:
    """In a process of its own: both keep threads, and hang or abort where a process with them is forked."""
    if importlib.util.find_spec(reader) is None:
        pytest.skip(f"{reader} is not installed")
    places = []
    for codec in CODECS:
        for dtype in FILLS:
            folder = tmp_path / f"{codec}-{dtype}".replace(" ", "-")
            values = chips((11, 2, 3, 8, 10), dtype, 3)
            created(folder, values.shape, 4, dtype, CODECS[codec])
            write(folder, values, 4)
            np.save(folder, values)
            places.append(str(folder))
    script = f"reader = {READERS[reader]!r}\n{COMPARE}"
    done = subprocess.run(
        [sys.executable, "-c", script, *places], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.stdout.strip() == f"equal {len(places)}", done.stderr[-3000:]


def test_a_shard_is_its_chips_and_then_the_index(tmp_path: Path) -> None:
    """Section "Binary shard format" of the specification; a chip of nothing but fill takes no byte."""
    values = chips((3, 1, 2, 4, 4), "uint16", 2)
    created(tmp_path / "a", values.shape, 4, "uint16", None)
    (pieces,) = write(tmp_path / "a", values, 4).values()
    absent = 2**64 - 1
    index = struct.pack("<8Q", absent, absent, 0, 68, absent, absent, absent, absent)
    checksums = [struct.pack("<I", google_crc32c.value(data)) for data in (values[1].tobytes(), index)]
    stored = values[1].tobytes() + checksums[0] + index + checksums[1]
    assert b"".join(map(bytes, pieces)) == stored


def test_nothing_but_fill_is_no_object(tmp_path: Path) -> None:
    for dtype, fill in FILLS.items():
        values = np.full((5, 2, 2, 4, 4), fill, dtype)
        array = created(tmp_path / dtype, values.shape, 4, dtype, "auto")
        assert write(tmp_path / dtype, values, 4) == {}
        np.testing.assert_array_equal(array[:], values)


def test_zero_and_minus_zero_are_not_the_same_fill(tmp_path: Path) -> None:
    values = np.full((2, 3), -0.0, np.float32)
    zarr.create_array(
        tmp_path / "a", shape=(2, 3), shards=(2, 3), chunks=(1, 3), dtype="float32", fill_value=0.0,
        compressors=compressors("auto", "float32"),
    )  # fmt: skip
    write(tmp_path / "a", values, 2)
    assert np.signbit(zarr.open_array(tmp_path / "a", mode="r")[:]).all()


def test_pixels_without_a_codec_are_not_copied(tmp_path: Path) -> None:
    values = chips((4, 2, 3, 8, 8), "uint16", 9)
    created(tmp_path / "a", values.shape, 4, "uint16", None)
    pieces = Encoding.of((tmp_path / "a" / "zarr.json").read_bytes()).encode(values)
    for chip, piece in zip(values[1:], pieces[::2], strict=False):  # each is followed by its checksum
        assert np.shares_memory(chip, piece)


def test_the_checksum_is_that_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    pieces: list[Piece] = [rng.bytes(n) for n in (0, 1, 1000, 77)]
    pieces[2] = np.frombuffer(rng.bytes(999), np.uint8)
    assert crc32(pieces) == zlib.crc32(b"".join(map(bytes, pieces)))


def test_texts_and_short_ends_of_small_arrays(tmp_path: Path) -> None:
    texts = np.array([["s2", ""], ["", "l8+s2"], ["ü", "s2"]], dtype=object)
    array = zarr.create_array(
        tmp_path / "t",
        shape=(7, 2),
        chunks=(4, 2),
        dtype=str,
        fill_value="",
        compressors=compressors("auto", str),
    )
    folder = tmp_path / "t"
    encoding = Encoding.of((folder / "zarr.json").read_bytes())
    (folder / "c" / "1").mkdir(parents=True)
    (folder / "c" / "1" / "0").write_bytes(b"".join(map(bytes, encoding.encode(texts))))
    assert np.asarray(array[4:]).tolist() == texts.tolist()
    assert encoding.encode(np.full((3, 2), "", dtype=object)) == []


def test_chips_of_another_shape_are_refused(tmp_path: Path) -> None:
    created(tmp_path / "a", (8, 2, 3, 8, 8), 4, "uint16", "auto")
    encoding = Encoding.of((tmp_path / "a" / "zarr.json").read_bytes())
    for shape in ((4, 2, 3, 8, 7), (5, 2, 3, 8, 8)):
        with pytest.raises(PlanError, match="chips of shape"):
            encoding.encode(np.zeros(shape, np.uint16))


class Noting(LocalStore):
    """A local store that notes which ranges are asked of it."""

    seen: list[str]

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Buffer | None:
        self.seen.append(type(byte_range).__name__)
        return await super().get(key, prototype, byte_range)


def test_a_chip_is_read_by_one_request_after_the_index(tmp_path: Path) -> None:
    values = chips((11, 2, 3, 8, 10), "uint16", 3)
    created(tmp_path / "a", values.shape, 4, "uint16", "auto")
    write(tmp_path / "a", values, 4)
    store = Noting(tmp_path / "a", read_only=True)
    store.seen = []
    array = zarr.open_array(store, mode="r")
    store.seen.clear()
    np.testing.assert_array_equal(array[5], values[5])
    assert store.seen == ["SuffixByteRequest", "RangeByteRequest"]


@pytest.mark.parametrize("given", ["zstd", "", 5, Crc32cCodec(), [ZstdCodec()], {"name": "zstd"}])
def test_other_compressions_are_refused_by_name(given: Any) -> None:
    with pytest.raises(PlanError, match=r"compression=.*'auto', None, or a BloscCodec"):
        checked(given)
