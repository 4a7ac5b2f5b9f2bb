"""The chips of a store in formats of others: webdataset's tar files, litdata's and MosaicML's chunks."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import shutil
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rasteret_dask.storeset import StoredChips

PER_FILE = 64

Pair = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class Loader:
    """Who reads a format."""

    name: str
    take: Callable[[Sequence[int]], Pair] | None
    stream: Callable[[int, int, int], Iterator[Pair]]
    """Takes the batch size, epochs and a seed."""


def make_formats(opened: StoredChips, folder: Path, missing: dict[str, str]) -> list[Loader]:
    """Write what can be written here, and return who reads it.

    Parameters
    ----------
    opened
        The chips.
    folder
        Where the formats lie; one that is there is not written again.
    missing
        Gets the name of whoever cannot be asked, and why.
    """
    loaders = []
    for name, (module, make) in FORMATS.items():
        if importlib.util.find_spec(module) is None:
            missing[name] = "not installed"
            continue
        try:
            importlib.import_module(module)
        except ImportError as error:
            missing[name] = f"does not import: {error}"
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaders.append(make(opened, folder / name))
    return loaders


def _chips(opened: StoredChips) -> Iterator[dict[str, Any]]:
    source, ids = opened.stored.map.sources[0], list(opened)
    for start in range(0, len(ids), PER_FILE):
        arrays = opened.take(ids[start : start + PER_FILE])
        for pixels, valid in zip(arrays[source], arrays[f"{source}/valid"], strict=True):
            yield {"pixels": pixels, "valid": valid.astype(np.uint8)}


def _written(folder: Path, write: Callable[[], None]) -> None:
    done = folder.with_suffix(".done")
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write()
        done.touch()


def _batched(samples: Iterator[Pair], size: int) -> Iterator[Pair]:
    batch: list[Pair] = []
    for sample in samples:
        batch.append(sample)
        if len(batch) == size:
            yield _stacked(batch)
            batch = []
    if batch:
        yield _stacked(batch)


def _stacked(batch: Sequence[Pair]) -> Pair:
    pixels, valid = zip(*batch, strict=True)
    return np.stack(pixels), np.stack(valid).astype(bool)


def _webdataset(opened: StoredChips, folder: Path) -> Loader:
    import webdataset

    def write() -> None:
        for number, chip in enumerate(_chips(opened)):
            with tarfile.open(folder / f"{number // PER_FILE:04d}.tar", "a") as tar:
                for name, values in chip.items():
                    body = io.BytesIO()
                    np.save(body, values)
                    entry = tarfile.TarInfo(f"{number:06d}.{name}.npy")
                    entry.size = body.tell()
                    tar.addfile(entry, io.BytesIO(body.getvalue()))

    _written(folder, write)
    files = sorted(str(path) for path in folder.glob("*.tar"))

    def stream(size: int, epochs: int, seed: int) -> Iterator[Pair]:
        for epoch in range(epochs):
            order = np.random.default_rng((seed, epoch)).permutation(len(files))
            samples = webdataset.WebDataset(
                [files[n] for n in order], shardshuffle=False, empty_check=False
            ).shuffle(4 * PER_FILE, initial=PER_FILE).decode()  # fmt: skip
            yield from _batched(((s["pixels.npy"], s["valid.npy"]) for s in samples), size)

    return Loader("webdataset (.npy in tar, not compressed)", None, stream)


def _as_is(sample: dict[str, Any]) -> dict[str, Any]:
    return sample


def _litdata(opened: StoredChips, folder: Path) -> Loader:
    import litdata
    from litdata.streaming.writer import BinaryWriter

    def write() -> None:
        writer = BinaryWriter(str(folder), chunk_size=PER_FILE)
        for number, chip in enumerate(_chips(opened)):
            writer[number] = chip
        writer.done()
        writer.merge()

    _written(folder, write)
    rows = litdata.StreamingDataset(str(folder))

    def pair(sample: dict[str, Any]) -> Pair:
        return np.asarray(sample["pixels"]), np.asarray(sample["valid"])

    def stream(size: int, epochs: int, seed: int) -> Iterator[Pair]:
        dataset = litdata.StreamingDataset(str(folder), shuffle=True, seed=seed)
        for epoch in range(epochs):
            dataset.set_epoch(epoch)
            yield from _batched((pair(sample) for sample in dataset), size)

    return Loader("litdata (not compressed)", lambda some: _stacked([pair(rows[n]) for n in some]), stream)


def _mosaicml(opened: StoredChips, folder: Path) -> Loader:
    import streaming

    logging.getLogger("streaming").setLevel(logging.ERROR)
    first = next(_chips(opened))
    columns = {n: f"ndarray:{v.dtype}:{','.join(map(str, v.shape))}" for n, v in first.items()}

    def write() -> None:
        with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=2**25, exist_ok=True) as writer:
            for chip in _chips(opened):
                writer.write(chip)

    _written(folder, write)
    assert json.loads((folder / "index.json").read_text())["shards"]
    streaming.base.util.clean_stale_shared_memory()

    def dataset(seed: int, shuffle: bool) -> Any:
        return streaming.StreamingDataset(
            local=str(folder), shuffle=shuffle, shuffle_seed=seed, batch_size=1, num_canonical_nodes=1
        )

    rows = dataset(0, False)

    def pair(sample: dict[str, Any]) -> Pair:
        return sample["pixels"], sample["valid"]

    def stream(size: int, epochs: int, seed: int) -> Iterator[Pair]:
        for _ in range(epochs):
            yield from _batched((pair(sample) for sample in rows_shuffled), size)

    rows_shuffled = dataset(1, True)
    return Loader(
        "MosaicML streaming (not compressed)",
        lambda some: _stacked([pair(rows[int(n)]) for n in some]),
        stream,
    )


FORMATS: dict[str, tuple[str, Callable[[StoredChips, Path], Loader]]] = {
    "webdataset": ("webdataset", _webdataset),
    "litdata": ("litdata", _litdata),
    "mosaicml-streaming": ("streaming", _mosaicml),
}
"""Name in a registry -> the module that it is, and who writes and reads its files."""
