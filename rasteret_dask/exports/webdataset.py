# SPDX-License-Identifier: Apache-2.0
"""A tar for each shard of chips, with an index: ``to_webdataset``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import pyarrow as pa

from rasteret_dask.errors import PlanError
from rasteret_dask.exports.chipshards import ExitChips, dropped_chips, unit_job
from rasteret_dask.exports.filenames import ALL, check_clashes, file_name, sample_key
from rasteret_dask.exports.geotiffs import chip_files, names_of
from rasteret_dask.exports.sheets import SourceSheet, dates_of, window_of
from rasteret_dask.exports.stacitems import (
    ChipFacts,
    Extent,
    File,
    chip_facts,
    collection,
    document_bytes,
    item,
    mask_asset,
    pixel_asset,
    validity_asset,
)
from rasteret_dask.exports.tarshards import npy_pieces, shard_index, tar_pieces
from rasteret_dask.store.encode import Piece
from rasteret_dask.store.unitruns import UnitJob, Visible
from rasteret_dask.tasks.batches import Arrays, take

__all__ = ["DATASET", "TO_WEBDATASET", "PixelFormat", "Tars", "webdataset_job"]

TO_WEBDATASET = "to_webdataset"

DATASET = "dataset.json"
"""The root: what is put last."""

PixelFormat: TypeAlias = Literal["npy", "tif"]
"""What arrays are in a tar: NumPy's own format, or GeoTIFFs."""

_NPY = "application/x-npy"

_ABOUT = ("title", "description", "license", "providers", "sci:citation", "extent")
"""What the root says as a STAC Collection would."""


@dataclass(frozen=True)
class Tars:
    """Makes the tars of shards."""

    sheets: tuple[SourceSheet, ...]
    extent: Extent
    pixels: PixelFormat

    def objects(self, number: int, arrays: Arrays) -> Iterator[tuple[str, Sequence[Piece]]]:
        """Yield path and pieces of a tar for each split of a shard, mostly one."""
        splits = np.array([split or ALL for split in arrays["split"]], dtype=object)
        for split in dict.fromkeys(splits):
            own = take(arrays, np.flatnonzero(splits == split))
            yield _tar(split, number), list(tar_pieces(self._members(own)))

    def paths(self, number: int, split: str, chips: Sequence[str]) -> Iterable[str]:
        """Return the path of the tar of these chips."""
        return (_tar(split, number),)

    def _members(self, arrays: Arrays) -> Iterator[tuple[str, Sequence[Piece]]]:
        for row, chip in enumerate(chip_facts(arrays, self.sheets)):
            key = sample_key(chip.chip_id)
            if self.pixels == "tif":
                own = chip_files(arrays, row, chip, self.sheets, f"{key}.")
                members: list[tuple[str, Sequence[Piece]]] = [
                    (_member(end), [data]) for end, data in own.files if end.endswith(".tif")
                ]
                assets: dict[str, Mapping[str, Any]] = {
                    name: {**asset, "href": key + "." + _member(asset["href"].removeprefix(f"{key}."))}
                    for name, asset in own.assets.items()
                }
            else:
                members, assets = _arrays(arrays, row, chip, self.sheets, key)
            document = item(chip, self.sheets, assets, self.extent)
            for end, pieces in [*members, ("json", [document_bytes(document)])]:
                yield f"{key}.{end}", pieces


def _arrays(
    arrays: Arrays, row: int, chip: ChipFacts, sheets: Sequence[SourceSheet], key: str
) -> tuple[list[tuple[str, Sequence[Piece]]], dict[str, Mapping[str, Any]]]:
    """Return a chip's arrays as members of a tar, and what its Item says of them."""
    members: list[tuple[str, Sequence[Piece]]] = []
    assets: dict[str, Mapping[str, Any]] = {}
    for sheet in sheets:
        pixels, valid = arrays[sheet.name][row], arrays[f"{sheet.name}/valid"][row]
        window = window_of(arrays, row, sheet)
        dates = dates_of(sheet, arrays[f"{sheet.name}/datetime"][row])
        end, shape = _member(f"{file_name(sheet.name)}.npy"), pixels.shape[-2:]
        members.append((end, npy_pieces(pixels)))
        file = File(f"{key}.{end}", _NPY, window, shape)
        names = sheet.descriptions(dates)
        assets[sheet.name] = pixel_asset(file, sheet, chip.slots[sheet.name], names, pixels.dtype.kind == "f")
        if pixels.dtype.kind != "f":
            end = end.removesuffix(".npy") + ".valid.npy"
            members.append((end, npy_pieces(valid)))
            file = File(f"{key}.{end}", _NPY, window, shape)
            assets[f"{sheet.name}_valid"] = validity_asset(file, sheet.name)
        for mask in sheet.masks:
            values = arrays[f"{sheet.name}/{mask.name}"][row]
            end = _member(f"{file_name(mask.name)}.npy")
            members.append((end, npy_pieces(values)))
            assets[mask.name] = mask_asset(File(f"{key}.{end}", _NPY, chip.bounds, values.shape), mask)
    return members, assets


def _member(end: str) -> str:
    """Return what stands behind a sample's key: a dot in a name would be the end of it; small, as readers make it."""
    name, _, kind = end.rpartition(".")
    name = name.removesuffix("_valid") + ".valid" if name.endswith("_valid") else name.replace(".", ",")
    return f"{name}.{kind}".lower()


def _tar(split: str, number: int) -> str:
    return f"{split}-{number:05d}.tar"


def webdataset_job(chips: ExitChips, url: str, pixels: PixelFormat) -> UnitJob:
    """Return what is to lie in a folder of tars.

    Parameters
    ----------
    chips
        The chips.
    url
        The folder.
    pixels
        What arrays are in the tars.

    Raises
    ------
    PlanError
        When ``pixels`` is no format, or two members would have one name.
    """
    if pixels not in get_args(PixelFormat):
        raise PlanError("to_webdataset(pixels=)", repr(pixels), "'npy' or 'tif'")
    check_clashes(TO_WEBDATASET, names_of(chips.sheets), ())
    about = collection(chips.sheets, chips.labels, chips.splits, chips.extent, chips.reading.provenance)
    paths = {split: f"{split}.json" for split in chips.splits}
    document: dict[str, Any] = {
        "type": "WebDataset",
        **{name: about[name] for name in _ABOUT if name in about},
        "splits": {split: {"index": paths[split], "planned": count} for split, count in chips.splits.items()},
        "pixels": pixels,
        "rasteret_dask": about["rasteret_dask"],
    }

    def indexes(manifest: pa.Table) -> dict[str, bytes]:
        tars = _tars(chips, manifest)
        features = {sheet.name: sheet.facts for sheet in chips.sheets}
        return {
            paths[split]: document_bytes(shard_index(split, own, features)) for split, own in tars.items()
        }

    encoder, root = Tars(chips.sheets, chips.extent, pixels), Visible(DATASET, document)
    return unit_job(TO_WEBDATASET, url, chips, encoder, root, indexes, paths, pixels)


def _tars(chips: ExitChips, manifest: pa.Table) -> dict[str, list[tuple[str, int, int]]]:
    """Return split -> file, chips and bytes of each of its tars."""
    sizes = {one["path"]: one["size"] for own in manifest.column("objects").to_pylist() for one in own}
    dropped = dropped_chips(manifest)
    tars: dict[str, list[tuple[str, int, int]]] = {split: [] for split in chips.splits}
    for one in sorted(chips.units, key=lambda own: own.unit.number):
        for split, ids in one.splits().items():
            path = _tar(split, one.unit.number)
            if path in sizes:
                tars[split].append((path, sum(chip not in dropped for chip in ids), sizes[path]))
    return tars
