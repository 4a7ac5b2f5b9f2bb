# SPDX-License-Identifier: Apache-2.0
"""A record table in which a band's name means the same in every record: common names decide, record by record."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Collection, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

__all__ = ["contradict", "meanings_of", "told_apart"]

_KEY = b"told_apart"
_MAPS = ("assets", "headers_metadata")
_WIDER = {
    "rededge071": "rededge", "rededge075": "rededge", "rededge078": "rededge", "nir08": "nir", "nir09": "nir",
    "lwir11": "lwir", "lwir12": "lwir",
}  # fmt: skip
"""{common name of STAC: the wider one that holds its wavelengths} (eo extension 2.0, Common Band Names)."""


def meanings_of(schema: pa.Schema) -> Mapping[str, tuple[str, ...]]:
    """Return {code that means several bands: what these are called}, as :func:`told_apart` found them."""
    text = (schema.metadata or {}).get(_KEY)
    return {} if text is None else {code: tuple(names) for code, names in json.loads(text).items()}


def contradict(common_names: Collection[str]) -> bool:
    """Return whether common names are of different light: ``rededge`` and ``rededge071`` are not, nor nir and nir08."""
    pairs = itertools.combinations(common_names, 2)
    return any(a != _WIDER.get(b, b) and b != _WIDER.get(a, a) for a, b in pairs)


def told_apart(table: pa.Table) -> pa.Table:
    """Return a record table whose bands are called by their common names where codes do not tell them apart.

    Notes
    -----
    ``B05`` is near infrared in HLS's Landsat records and a red edge in its Sentinel-2 records; ``nir08`` is ``B05`` in
    these and ``B8A`` in those. In a table with both, each band whose code has several common names, or whose common
    name has several codes, is called by its common name. Where a record has a common name twice (STAC 1.0 calls three
    bands ``rededge``), it stands before the code: ``rededge_B05``. Other tables are returned as they are.
    """
    assets = table.column("assets").combine_chunks() if "assets" in table.column_names else None
    if assets is None or not len(assets):
        return table
    chunk = assets.chunk(0) if isinstance(assets, pa.ChunkedArray) else assets
    offsets = np.asarray(chunk.offsets)
    rows = np.repeat(np.arange(len(chunk)), np.diff(offsets))
    within = slice(int(offsets[0]), int(offsets[-1]))
    keys = chunk.keys.slice(within.start, len(rows))
    commons = pc.struct_field(chunk.items, "common_name").slice(within.start, len(rows))
    names = _names(pa.table({"key": keys, "common": commons, "row": rows}))
    if not names:
        return table
    for column in _MAPS:
        if column in table.column_names:
            table = _renamed(table, column, chunk, names)
    several: dict[str, list[str]] = defaultdict(list)
    for (code, _), name in names.items():
        several[code].append(name)
    told = {code: own for code, own in several.items() if len(own) > 1}
    metadata = {**(table.schema.metadata or {}), _KEY: json.dumps(told).encode()}
    return table.replace_schema_metadata(metadata)


def _names(assets: pa.Table) -> dict[tuple[str, str], str]:
    """Return {(code, common name): name} of the bands that need another name."""
    pairs = assets.group_by(["key", "common"], use_threads=False).aggregate([])
    codes: dict[str, set[str]] = defaultdict(set)
    commons: dict[str, set[str]] = defaultdict(set)
    for key, common in zip(pairs.column("key").to_pylist(), pairs.column("common").to_pylist(), strict=True):
        if common is not None:
            codes[key].add(common)
            commons[common].add(key)
    several = {code for code, own in codes.items() if contradict(own)}
    if not several and all(len(own) == 1 for own in commons.values()):
        return {}
    per_record = assets.group_by(["row", "common"], use_threads=False).aggregate([("key", "count")])
    twice = set(per_record.filter(pc.greater(per_record.column("key_count"), 1)).column("common").to_pylist())
    names = {}
    for code, own in codes.items():
        for common in sorted(own):
            if common not in twice and (code in several or len(commons[common]) > 1):
                names[code, common] = common
            elif code in several:
                names[code, common] = f"{common}_{code}"
    return {pair: name for pair, name in names.items() if pair[0] != name}


def _renamed(
    table: pa.Table, column: str, assets: pa.MapArray, names: Mapping[tuple[str, str], str]
) -> pa.Table:
    """Return the table with the keys of a map column renamed, each by the common name in the same record's assets."""
    whole = table.column(column).combine_chunks()
    chunk = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
    offsets, own = np.asarray(chunk.offsets), np.asarray(assets.offsets)
    keys = chunk.keys.to_pylist()
    codes = assets.keys.to_pylist()
    commons = pc.struct_field(assets.items, "common_name").to_pylist()
    for row in range(len(chunk)):
        entries = range(own[row], own[row + 1])
        here = {codes[n]: names[pair] for n in entries if (pair := (codes[n], commons[n])) in names}
        for n in range(offsets[row], offsets[row + 1]) if here else ():
            keys[n] = here.get(keys[n], keys[n])
    renamed = pa.MapArray.from_arrays(
        chunk.offsets, pa.array(keys, pa.string()), chunk.items, chunk.type, mask=chunk.is_null()
    )
    return table.set_column(table.schema.get_field_index(column), table.schema.field(column), renamed)
