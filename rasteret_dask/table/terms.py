# SPDX-License-Identifier: Apache-2.0
"""Under which terms records may be used: a table's schema metadata keep what the catalog's entry says."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.dataset as pads

__all__ = ["Terms"]

_KEY = b"terms"


@dataclass(frozen=True, slots=True)
class Terms:
    """Licence and attribution of a dataset; empty where nobody states them."""

    dataset: str = ""
    """Id in the catalog."""
    licence: str = ""
    """An SPDX id, "public domain" or "proprietary"."""
    licence_url: str = ""
    attribution: str = ""
    """The sentence that the licence asks for."""

    @classmethod
    def of(cls, schema: pa.Schema) -> Terms:
        """Return what a table's schema keeps."""
        text = (schema.metadata or {}).get(_KEY)
        fields = {} if text is None else json.loads(text)
        return cls(**{name: str(fields.get(name) or "") for name in cls.__slots__})

    def marked(self, table: pa.Table | pads.Dataset) -> pa.Table | pads.Dataset:
        """Return a table or dataset whose schema keeps them."""
        metadata = {**(table.schema.metadata or {}), _KEY: json.dumps(asdict(self)).encode()}
        if isinstance(table, pa.Table):
            return table.replace_schema_metadata(metadata)
        return table.replace_schema(table.schema.with_metadata(metadata))
