"""TIFFs of 64 x 64 pixels whose tags are whatever one says, and items that name them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["WEST", "NORTH", "TAGS", "item", "tiff"]

WEST, NORTH = 500_000.0, 5_200_000.0
SIDE, TILE = 64, 32
_KINDS = {"H": 3, "I": 4, "d": 12, "s": 2, "Q": 16}
_TILES = [
    zlib.compress(np.arange(n, n + TILE * TILE, dtype="<u2").tobytes())
    for n in range(1, 1 + SIDE * SIDE, 1024)
]

Values = tuple[str, Any]

TAGS: dict[int, Values] = {
    256: ("I", [SIDE]),
    257: ("I", [SIDE]),
    258: ("H", [16]),
    259: ("H", [8]),
    262: ("H", [1]),
    277: ("H", [1]),
    317: ("H", [1]),
    322: ("I", [TILE]),
    323: ("I", [TILE]),
    339: ("H", [1]),
    33550: ("d", [10.0, 10.0, 0.0]),
    33922: ("d", [0.0, 0.0, 0.0, WEST, NORTH, 0.0]),
    34735: ("H", [1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32633]),
    42113: ("s", b"0\0"),
}
"""{tag: (type as struct writes it, values)}; tile tables are added where they are missing."""


def tiff(changes: dict[int, Values | None]) -> bytes:
    """Return a file with other tags; None leaves one out."""
    tags = {**TAGS, 324: ("I", [0] * len(_TILES)), 325: ("I", [len(t) for t in _TILES])}
    tags = {t: v for t, v in sorted({**tags, **changes}.items()) if v is not None}
    head = 8 + 2 + 12 * len(tags) + 4
    packed = {t: _packed(*v) for t, v in tags.items()}
    pixels = head + sum(len(data) + len(data) % 2 for data, _ in packed.values())
    if 324 not in changes:
        places = pixels + np.cumsum([0, *(len(t) for t in _TILES[:-1])])
        packed[324] = _packed("I", places.tolist())
    entries, values, at = b"", b"", head
    for tag, (data, count) in packed.items():
        kind = _KINDS[tags[tag][0]]
        if len(data) <= 4:
            entries += struct.pack("<HHI4s", tag, kind, count, data)
        else:
            entries += struct.pack("<HHII", tag, kind, count, at)
            data += b"\0" * (len(data) % 2)
            values += data
            at += len(data)
    filler = b"\0" * (pixels - head - len(values))
    return (
        b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + b"\0" * 4 + values + filler + b"".join(_TILES)
    )


def _packed(kind: str, values: Any) -> tuple[bytes, int]:
    if kind == "s":
        return bytes(values), len(values)
    return struct.pack(f"<{len(values)}{kind}", *values), len(values)


def item(name: str, href: str | Path, **properties: Any) -> dict[str, Any]:
    """Return an item of one file, without an outline."""
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "geometry": None,
        "properties": {"datetime": "2024-01-01T00:00:00Z", **properties},
        "assets": {"x": {"href": str(href), "type": "image/tiff"}},
    }
