# SPDX-License-Identifier: Apache-2.0
"""Folders that ``to_geotiff`` wrote become records, masks, splits and label columns again."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa

from rasteret_dask.errors import ReadError, SourceError
from rasteret_dask.headers.reader import read_headers
from rasteret_dask.ingest.chipfiles import FolderChips
from rasteret_dask.ingest.sources import check_href
from rasteret_dask.ingest.tables import table_to_records
from rasteret_dask.net.remote import get, is_local, join, redact
from rasteret_dask.net.trust import checked, resolve
from rasteret_dask.table.assetkinds import with_kinds
from rasteret_dask.table.facts import ENDLESS, instant

__all__ = ["exported_chips", "exported_layout"]

ROOT = "collection.json"
_TIME = pa.timestamp("us", tz="UTC")
_ALL = "all"
"""The folder of chips without a split."""
_VALID = "_valid"
"""What the asset of a source's validity is called after, where it is a file of its own."""


def exported_layout(folder: str) -> dict[str, Any] | None:
    """Return what the root of a folder says of its layout; None where ``to_geotiff`` did not write it.

    Parameters
    ----------
    folder
        A path or URL.
    """
    try:
        root = _document(join(folder, ROOT))
    except (FileNotFoundError, ReadError, SourceError):
        return None
    layout = (root.get("rasteret_dask") or {}).get("layout") if isinstance(root, dict) else None
    return layout if isinstance(layout, dict) and "sources" in layout else None


@dataclass(frozen=True, slots=True)
class _Item:
    """A chip's STAC Item, and where it lies."""

    href: str
    data: Mapping[str, Any]

    @property
    def chip(self) -> str:
        return str(self.data["id"])

    def asset(self, name: str) -> Mapping[str, Any]:
        """Return one of its files.

        Raises
        ------
        SourceError
            When it has none of that name.
        """
        asset = self.data["assets"].get(name)
        if asset is None:
            raise SourceError(
                f"read_chips, item {redact(self.href)}",
                f"assets {', '.join(self.data['assets'])}",
                f"an asset {name}",
            )
        return dict(asset)

    def file(self, name: str) -> str:
        """Return the absolute href of one of its files."""
        href = str(self.asset(name)["href"])
        subject = f"read_chips, item {redact(self.href)}"
        check_href(href, subject)
        return checked(resolve(href, self.href), local=is_local(self.href), subject=subject)


def exported_chips(folder: str, layout: Mapping[str, Any]) -> FolderChips:
    """Return the chips of a folder that ``to_geotiff`` wrote.

    Parameters
    ----------
    folder
        A path or URL.
    layout
        What :func:`exported_layout` returned.

    Raises
    ------
    SourceError
        When an item or a file lacks, or is none.
    """
    items = list(_items(folder, layout["splits"]))
    if not items:
        raise SourceError(f"read_chips({redact(folder)!r})", "no chip", "at least one")
    sources: Mapping[str, Any] = layout["sources"]
    records = {name: _records(name, own, items) for name, own in sources.items()}
    first = next(iter(sources))
    size = int(items[0].asset(first)["proj:shape"][0])
    return FolderChips(
        size,
        records,
        _facts(items, layout["labels"]),
        _masks(sources, items),
        tuple(
            (name, tuple(mask["classes"][1:]))
            for own in sources.values()
            for name, mask in own["masks"].items()
            if mask["classes"]
        ),
        frozenset(name for name, own in sources.items() if own["times"] > 1 or own["slots"]),
        tuple((name, _side(items[0], name)) for name, own in sources.items() if own["reach_m"]),
        frozenset(name for name in sources if name != first and _may_lack(items, name)),
    )


def _document(href: str) -> Any:
    try:
        return json.loads(bytes(get(href)))
    except ValueError as error:
        raise SourceError(f"read_chips, {redact(href)}", f"no JSON ({error})", "a STAC document") from error


def _items(folder: str, splits: Sequence[str]) -> Iterator[_Item]:
    for split in splits:
        place = join(folder, f"{split}/catalog.json")
        for link in _document(place)["links"]:
            if link["rel"] == "item":
                href = resolve(str(link["href"]), place)
                yield _Item(href, _document(href))


def _may_lack(items: Sequence[_Item], name: str) -> bool:
    return any(not any(s.get("present", True) for s in item.asset(name)["slots"]) for item in items)


def _side(item: _Item, name: str) -> float:
    west, _, east, _ = item.asset(name)["proj:bbox"]
    return float(east - west)


def _records(name: str, layout: Mapping[str, Any], items: Sequence[_Item]) -> pa.Table:
    """Return the records of a source: one for each slot of a chip."""
    bands, times = list(layout["bands"]), int(layout["times"])
    slotted = times > 1 or bool(layout["slots"])
    if any(name + _VALID in item.data["assets"] for item in items):
        odd = next(item for item in items if name + _VALID in item.data["assets"])
        raise SourceError(
            f"read_chips, source {name!r}", f"chip {odd.chip!r}, whose validity is a file of its own, as valid pixels "
            "have the number of nodata", "chips whose own files say which pixels are valid",
            "Write the folder again, of pixels stored with another nodata: harmonize(dtype=...).",
        )  # fmt: skip
    rows: dict[str, list[Any]] = {
        key: []
        for key in (
            "id", "chip", "slot", "slot_start", "present", "datetime", "start_datetime", "end_datetime", "datatake",
            "assets",
        )
    }  # fmt: skip
    timeless = all(slot["datetime"] is None for item in items for slot in item.asset(name)["slots"])
    for item in items:
        href, slots = item.file(name), item.asset(name)["slots"]
        there = _present(slots, timeless)
        for number, slot in enumerate(slots):
            if not slotted and not there[number]:
                continue
            begin = instant(slot.get("slot"))
            when = instant(slot["datetime"]) or begin or _time_of(item)
            key = item.chip if not slotted else f"{item.chip}#{number}"
            endless = timeless and not slotted
            values = (
                key, item.chip, number, begin, there[number], None if endless else when,
                ENDLESS[0] if endless else None, ENDLESS[1] if endless else None, key,
                [
                    (band, {"href": href, "band_index": number * len(bands) + at})
                    for at, band in enumerate(bands)
                ],
            )  # fmt: skip
            for column, value in zip(rows.values(), values, strict=True):
                column.append(value)
    asset = pa.map_(pa.string(), pa.struct([("href", pa.string()), ("band_index", pa.int64())]))
    moments = ("slot_start", "datetime", "start_datetime", "end_datetime")
    types = {"slot": pa.int64(), "present": pa.bool_(), "assets": asset, **dict.fromkeys(moments, _TIME)}
    table = pa.table({key: pa.array(own, types.get(key, pa.string())) for key, own in rows.items()})
    table = table.append_column("geometry", pa.nulls(table.num_rows, pa.binary()))
    if not slotted:
        table = table.drop_columns(["slot", "slot_start", "present"])
    hrefs = [item.file(name) for item in items]
    records = table_to_records(table, name=name, headers=read_headers(hrefs))
    kinds = zip(bands, layout["kinds"], strict=False)
    return with_kinds(records, [(band, kind) for band, kind in kinds if kind != "unknown"])


def _present(slots: Sequence[Mapping[str, Any]], timeless: bool) -> list[bool]:
    """Return which slots have a record: as the item says; else those that have a time, or a valid pixel."""
    told = [slot.get("present") for slot in slots]
    if all(one is not None for one in told):
        return [bool(one) for one in told]
    there = [timeless or slot["datetime"] is not None or slot["valid_fraction"] > 0 for slot in slots]
    return there if any(there) else [True] * len(there)


def _time_of(item: _Item) -> datetime | None:
    told = item.data["properties"]
    return instant(told.get("datetime") or told.get("start_datetime"))


def _facts(items: Sequence[_Item], labels: Mapping[str, str]) -> pa.Table:
    """Return splits and label columns."""
    facts = {"chip": pa.array([item.chip for item in items], pa.string())}
    splits = [item.data["properties"].get("split") for item in items]
    if any(split is not None for split in splits):
        facts["split"] = pa.array(splits, pa.string())
    for name, dtype in labels.items():
        values = [item.data["properties"]["labels"].get(name) for item in items]
        kind = _arrow_type(dtype)
        if pa.types.is_timestamp(kind):
            values = [instant(value) for value in values]
            facts[name] = pa.array(values, _TIME).cast(kind)
        else:
            facts[name] = pa.array(values, kind)
    return pa.table(facts)


def _arrow_type(dtype: str) -> pa.DataType:
    kind = np.dtype(dtype) if dtype not in ("str", "object", "string") else np.dtype(object)
    if kind.kind in "OUST":
        return pa.string()
    if kind.kind == "M":
        return pa.timestamp("us")
    return pa.from_numpy_dtype(kind)


def _masks(sources: Mapping[str, Any], items: Sequence[_Item]) -> pa.Table | None:
    columns: dict[str, list[str]] = {"chip": [], "mask": [], "href": [], "dtype": []}
    for own in sources.values():
        for name, mask in own["masks"].items():
            for item in items:
                values = (item.chip, name, item.file(name), str(mask["dtype"]))
                for column, value in zip(columns.values(), values, strict=True):
                    column.append(value)
    if not columns["chip"]:
        return None
    return pa.table({column: pa.array(values, pa.string()) for column, values in columns.items()})
