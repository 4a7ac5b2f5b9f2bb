"""What real rasteret does, in an environment of its own: builds a table, or reads one; told by JSON on stdin."""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np


def build(job: dict[str, Any]) -> None:
    """Build rasteret's own collection from an Arrow table of files and export it."""
    import pyarrow.parquet as pq
    import rasteret

    made = rasteret.build_from_table(
        pq.read_table(job["table"]), name="theirs", workspace_dir=job["folder"], enrich_cog=True,
        band_codes=job["bands"], data_source=job["data_source"],
    )  # fmt: skip
    made.export(job["out"], partition_by=job["partition_by"])


def read(job: dict[str, Any]) -> None:
    """Read pixels of boxes: one array of (record and box, band, y, x), and the ids in the order of records."""
    import rasteret
    import shapely

    found = rasteret.load(job["table"])
    pixels = found.get_numpy(
        geometries=[shapely.box(*box) for box in job["boxes"]], bands=job["bands"],
        geometry_crs=job["epsg"], all_touched=True,
    )  # fmt: skip
    ids = [i for batch in found.to_batches(columns=["id"]) for i in batch.column("id").to_pylist()]
    np.savez(job["out"], pixels=pixels, ids=ids, data_source=found.data_source, bands=found.bands)


if __name__ == "__main__":
    job = json.load(sys.stdin)
    {"build": build, "read": read}[job["do"]](job)
