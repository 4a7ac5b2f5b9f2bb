"""What planning costs where only some chips are wanted, and what looking at a plan costs: CPU seconds and ratios.

``python tests/benchmarks/bench_choice.py`` prints the rows of docs/benchmarks.md; ``--chips million`` those of the
large plan of ``bench_plan.py`` (some minutes, 3 GB); ``--repeat``: how often each is measured, in turn; the median
counts.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from synthetic import BANDS, sentinel2_records

import rasteret_dask as rd

PLANS = {"sixty": (44, 15, 2, 180), "million": (700, 15, 10, 180)}
"""Granules, dates, zones and days: some 65,000 chips of 256 px, and a million."""

CUBE_ITEMS = 300


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", choices=tuple(PLANS), default="sixty")
    parser.add_argument("--repeat", type=int, default=5)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    records = _records(*PLANS[options.chips])
    _plan(records.slice(0, 30)).split(seed=1).explain()  # imports
    rounds = [_measured(records) for _ in range(options.repeat)]
    chips = rounds[0].pop("chips")
    print(f"{chips:,.0f} chips of {records.num_rows:,} records; CPU seconds, median of {len(rounds)}")
    whole = statistics.median(one["plan all"] for one in rounds)
    for name in rounds[0]:
        seconds = statistics.median(one[name] for one in rounds)
        print(f"| {name} | {seconds:.2f} | {seconds / whole:.1%} |")
    items = [_cube() for _ in range(options.repeat)]
    print(f"| cube of {CUBE_ITEMS} items, 4 bands: ms an item | {statistics.median(items):.2f} | |")


def _records(*shape: int) -> pa.Table:
    path = Path(tempfile.gettempdir()) / f"rasteret-dask-choice-{'-'.join(map(str, shape))}.parquet"
    if not path.exists():
        pq.write_table(sentinel2_records(*shape), path)
    return pq.read_table(path)


def _plan(records: pa.Table, **more: Any) -> rd.Chips:
    own = rd.as_collection(records, name="s2")
    return own.harmonize(BANDS, units="reflectance", dtype="uint16", time="1MS").chips(256, **more)


def _measured(records: pa.Table) -> dict[str, float]:
    """Return CPU seconds by what was done, each on plans of its own."""
    result: dict[str, float] = {}

    def measured(name: str, what: Callable[[], Any]) -> Any:
        begun = time.process_time()
        value = what()
        result[name] = time.process_time() - begun
        return value

    whole = _plan(records)
    count = measured("plan all", lambda: len(whole))
    split = whole.split(seed=1)
    measured("split", lambda: len(split))
    measured("job", lambda: split.job)
    measured("explain", split.explain)
    measured("audit", split.audit)
    few = count // 100
    # The plan of all was a Collection before the clock began, and so are these.
    sample, chosen = _plan(records).sample(few), _plan(records).split(seed=1).select("train").sample(few)
    measured("sample of 1 %", lambda: len(sample))
    measured("split, select train, sample of 1 %", lambda: len(chosen))
    boxes = whole.table.slice(count // 2, few)
    area = shapely.union_all(
        shapely.from_wkb(boxes.column("geometry").to_numpy(zero_copy_only=False))
    ).envelope
    inside = _plan(records, aoi=area)
    measured("an area of about as many chips", lambda: len(inside))
    west = boxes.column("xmin")[0].as_py()
    here = (("xmin", ">=", west), ("xmin", "<", west + 10_240.0))
    strip = _plan(records).filter(*here)
    measured("filter of a strip of 10 km", lambda: len(strip))
    return {"chips": count, **result}


def _cube() -> float:
    """Return the milliseconds of CPU that each item of a lazy cube takes."""
    records = _records(1, CUBE_ITEMS, 1, 360)
    west, south, east, north = records.column("scene_bbox")[0].as_py()
    box = (west + 0.3, south + 0.3, (west + east) / 2, (south + north) / 2)
    own = rd.as_collection(records, name="s2").harmonize(BANDS, units="reflectance", dtype="uint16")
    begun = time.process_time()
    cube = own.cube(bounds_latlon=box)
    return (time.process_time() - begun) / cube.sizes["time"] * 1000


if __name__ == "__main__":
    main()
