# SPDX-License-Identifier: Apache-2.0
"""The pixels of one source in one shard: its cubes, cut, harmonized and merged into a Dataset."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask import activity
from rasteret_dask.chipping.chiptable import FILLED, META, PRESENT, label_columns
from rasteret_dask.planning.meta import DAY_OF_YEAR, MASKED, OF_SLOTS, days_of_year
from rasteret_dask.reader.readplan import Request
from rasteret_dask.tasks.cuts import Feed, MemberCubes, cubes
from rasteret_dask.tasks.filling import ChipPixels, Into
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.picking import Picking

__all__ = [
    "ChipPixels",
    "Into",
    "MemberCubes",
    "chip_coordinates",
    "cubes",
    "dataset_of",
    "members_of",
    "merged",
    "requests_of",
]


_log = logging.getLogger(__name__)


def members_of(job: Job, shard: Shard, source: int) -> list[MemberCubes]:
    """Return the cubes of each member of one source that a shard's chips need."""
    return [cubes(job, shard, source, at) for at in range(len(job.sources[source].members))]


def merged(
    job: Job,
    shard: Shard,
    source: int,
    members: Sequence[MemberCubes],
    on_error: str = "raise",
    into: Into | None = None,
) -> xr.Dataset:
    """Read the shard's chips of one source and pick across its members, into given memory or new one.

    Returns
    -------
    xarray.Dataset
        ``pixels`` (chip, time, band, y, x); ``valid`` (chip, time, y, x) for integer pixels; ``valid_fraction``,
        ``datetime`` and ``member`` (chip, time), ``filled_fraction`` where acquisitions fill each other, ``present``
        (chip, time) of a source that may be empty somewhere, what ``harmonize(meta=)`` names; counts of
        what was read, and the seconds that reading and composing took, in its attributes.
    """
    begun = time.perf_counter()
    chips = Picking(job, shard, source, members).read(on_error, into)
    dataset = dataset_of(job, shard, source, chips)
    passed = time.perf_counter() - begun
    stages = {"read": chips.read_s, "compose": passed - chips.read_s}
    dataset.attrs["seconds"] = stages
    for stage, seconds in stages.items():
        activity.spent(stage, seconds)
    _log.debug(
        "shard %s: read %d chips of %s in %.2f s, %d requests of %d bytes",
        shard.name, shard.stop - shard.start, job.sources[source].name, passed,
        chips.counts.requests, chips.counts.bytes_fetched,
    )  # fmt: skip
    return dataset


def dataset_of(job: Job, shard: Shard, source: int, chips: ChipPixels) -> xr.Dataset:
    """Return the chips of one source as :func:`merged` does, with the coordinates that the plan knows."""
    plan = job.sources[source]
    dims = ("chip", "time", "band", "y", "x")
    variables: dict[str, Any] = {"pixels": (dims, chips.values)}
    if np.dtype(plan.dtype).kind not in "fc":
        variables["valid"] = (("chip", "time", "y", "x"), chips.valid)
    own = slice(shard.start, shard.stop)
    for labels in job.labels_on(source):
        masks = labels.burned(job.bounds[own], job.epsg[own], job.size_px[source], job.names(own))
        variables[labels.name] = (("chip", "y", "x"), masks)
    coordinates: dict[str, Any] = {
        **chip_coordinates(job, shard),
        "band": ("band", list(plan.bands)),
        "valid_fraction": (
            ("chip", "time"),
            _fractions(chips.valid),
        ),
        "datetime": (("chip", "time"), chips.datetime),
        "member": (("chip", "time"), chips.member.astype(object)),
        "units": ("band", np.array(plan.units, dtype=object)),
    }
    if plan.sparse:
        there = job.feeds.present(source, plan.times, shard.start, shard.stop)
        coordinates[PRESENT] = (("chip", "time"), there)
    if chips.filled is not None:
        coordinates[FILLED] = (("chip", "time"), chips.filled)
    for name, values in _meta(job, source, chips):
        coordinates[name] = (("chip", "time"), values)
    if plan.slots is not None:
        coordinates["time"] = ("time", np.array(plan.slots, dtype="datetime64[ns]"))
    counts = {k: int(getattr(chips.counts, k)) for k in chips.counts.__slots__}
    attrs: dict[str, Any] = {
        "counts": counts,
        "clipped": dict(zip(plan.bands, chips.clipped.tolist(), strict=True)),
    }
    attrs["unreadable"] = chips.unreadable
    if plan.meta:
        attrs[META] = tuple(name for name, _ in plan.meta)
    return xr.Dataset(variables, coordinates, attrs)


def _meta(job: Job, source: int, chips: ChipPixels) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield what is asked for of each slot, shape (chip, time), but ``valid_fraction``, which is always told."""
    for name, _ in job.sources[source].meta:
        if name == DAY_OF_YEAR:
            yield name, days_of_year(chips.datetime)
        elif name == MASKED:
            assert chips.masked is not None
            yield name, chips.masked
        elif name not in OF_SLOTS:
            yield name, job.meta[source][name][chips.row]


def _fractions(valid: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the share of valid pixels, shape (chip, time); counting each in turn is far faster than over axes."""
    counted = np.array([[np.count_nonzero(one) for one in chip] for chip in valid], dtype=np.float64)
    return np.asarray(counted / (valid.shape[2] * valid.shape[3]), dtype=np.float32)


def chip_coordinates(job: Job, shard: Shard) -> dict[str, Any]:
    """Return the coordinates along ``chip`` that the plan knows, the user's own columns among them."""
    table = job.chips.slice(shard.start, shard.stop - shard.start)
    return {
        "chip_id": ("chip", np.array(table.column("chip_id").to_pylist(), dtype=object)),
        "split": ("chip", np.array([s or "" for s in table.column("split").to_pylist()], dtype=object)),
        "epsg": ("chip", job.epsg[shard.start : shard.stop].astype(np.int32)),
        "bounds": (("chip", "corner"), job.bounds[shard.start : shard.stop]),
        **{name: ("chip", values) for name, values in label_columns(table).items()},
    }


def requests_of(job: Job, shard: Shard, source: int) -> tuple[list[Request], int]:
    """Return every read that one source of a shard may ask for, and how many pixels its windows hold."""
    picking = Picking(job, shard, source, members_of(job, shard, source))
    requests = picking.requests(Feed.of(job, shard, source))
    return requests, sum(len(r.windows) * r.windows[0].height * r.windows[0].width for r in requests)
