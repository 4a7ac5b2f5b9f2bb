# SPDX-License-Identifier: Apache-2.0
"""The words that arguments take, as types: editors complete them, mypy compares them; what uses a word checks it."""

from __future__ import annotations

from typing import Literal, TypeAlias

__all__ = [
    "Boundary",
    "Choose",
    "Dtype",
    "Duplicates",
    "Edge",
    "Grid",
    "OnBroken",
    "OnError",
    "Resampling",
    "SplitBy",
    "TableLayout",
]

Resampling: TypeAlias = Literal["nearest", "bilinear", "cubic", "average", "mode", "overview"]
"""How pixels are brought to another size."""

Dtype: TypeAlias = Literal["float32", "uint16", "int16"]
"""What reflectance is stored as."""

Choose: TypeAlias = Literal["clearest", "spread", "latest", "nearest"]
"""Which acquisitions a chip has, where there are more than it may have."""

Grid: TypeAlias = Literal["utm", "zone", "tiles", "files"]
"""Where chips lie; a GeoBox is taken too."""

Edge: TypeAlias = Literal["shift", "pad"]
"""What the last chip of a row or column does at the edge of an area that chips cover."""

SplitBy: TypeAlias = Literal["ground", "geometry", "time"]
"""What decides a chip's split; a column of the chip table is taken too."""

Boundary: TypeAlias = Literal["drop", "centre"]
"""What becomes of a window that touches two splits."""

OnError: TypeAlias = Literal["raise", "mask"]
"""What becomes of a tile that cannot be read."""

TableLayout: TypeAlias = Literal["geoparquet", "rasteret"]
"""How records are written."""

OnBroken: TypeAlias = Literal["skip", "raise"]
"""What becomes of an item that cannot be read."""

Duplicates: TypeAlias = Literal["raise", "first"]
"""What becomes of a slot of a chip that stands in two stores which are opened as one."""
