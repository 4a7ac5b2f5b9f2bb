# SPDX-License-Identifier: Apache-2.0
"""Which chips of a shard are kept, as rules on their pixels say, and what becomes of the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from rasteret_dask.chipping.chiptable import FILLED, PRESENT, is_mask
from rasteret_dask.planning.meta import MASKED
from rasteret_dask.planning.rules import Rule
from rasteret_dask.tasks.clouds import cloud_fractions, has_clouds
from rasteret_dask.tasks.context import ReadContext
from rasteret_dask.tasks.job import Job, Shard
from rasteret_dask.tasks.mapping import kept_by

__all__ = ["KEPT", "filtered", "tally"]

KEPT = "kept"
"""Name of the coordinate (chip,) that tells which chips are kept."""


_NUMBER = re.compile(r" \d\.\d{3}(?=, (below|above) )")
"""A chip's own figure in the reason why it fell."""


def tally(reasons: Iterable[str]) -> str:
    """Say how many chips fell to which rule, most first: ``40: valid, below 0.9; 3: filter_pixels(bright)``."""
    counts = Counter(_NUMBER.sub("", reason) for reason in reasons)
    return "; ".join(
        f"{n:,}: {rule}" for rule, n in sorted(counts.items(), key=lambda own: (-own[1], own[0]))
    )


def filtered(
    job: Job, shard: Shard, joined: Mapping[str, xr.Dataset], context: ReadContext
) -> dict[str, xr.Dataset]:
    """Apply a job's rules to one shard.

    Parameters
    ----------
    job, shard
        What was read.
    joined
        Source -> its chips in memory; the pixels of chips that are not kept are overwritten.
    context
        What the shard is read with.

    Returns
    -------
    dict
        The Datasets with a coordinate ``kept`` (chip,), and ``dropped`` (chip id -> reason) in their attributes. A
        chip that is not kept stays in its place, all fill and invalid.
    """
    if not job.pixel_rules:
        return dict(joined)
    reasons: dict[int, str] = {}
    for rule in job.pixel_rules:
        for number, (name, dataset) in enumerate(joined.items()):
            if rule.source in (None, name):
                found = _failing(job, shard, rule, name, dataset, context)
                if job.sources[number].optional:  # what a chip does not have is not judged
                    there = np.asarray(_fed(job, shard, number).any(axis=1))
                    found = {place: why for place, why in found.items() if there[place]}
                reasons = {**found, **reasons}  # the first reason stays
    places = sorted(reasons)
    kept = np.ones(shard.stop - shard.start, dtype=bool)
    kept[places] = False
    result = {}
    for number, (name, dataset) in enumerate(joined.items()):
        made = _blanked(dataset, places, job.sources[number].fill).assign_coords({KEPT: ("chip", kept)})
        ids = dataset["chip_id"].values
        made.attrs["dropped"] = {str(ids[place]): reasons[place] for place in places}
        result[name] = made
    return result


def _failing(
    job: Job,
    shard: Shard,
    rule: Rule,
    name: str,
    dataset: xr.Dataset,
    context: ReadContext,
) -> dict[int, str]:
    """Return the chips of one source that a rule drops: place in the shard -> reason."""
    of = f" of {name}" if len(job.sources) > 1 else ""
    number = [s.name for s in job.sources].index(name)
    found: dict[int, str] = {}
    if rule.function is not None:
        kept = kept_by(context.functions[rule.function], dataset["pixels"])
        found |= {int(at): f"filter_pixels({rule.function.name}){of}" for at in np.flatnonzero(~kept)}
    if rule.max_cloud is not None and has_clouds(job.sources[number]):
        cloud, unreadable = cloud_fractions(job, shard, number, context.on_error)
        dataset.attrs["unreadable"] = [*dataset.attrs["unreadable"], *unreadable]
        found |= {
            int(at): f"cloud{of} {cloud[at]:.3f}, above {rule.max_cloud:g}"
            for at in np.flatnonzero(cloud > rule.max_cloud)
        }
    if rule.min_valid is not None:
        valid = _valid_share(dataset, _fed(job, shard, number))
        found |= {
            int(at): f"valid{of} {valid[at]:.3f}, below {rule.min_valid:g}"
            for at in np.flatnonzero(valid < rule.min_valid)
        }
    if rule.min_labelled is not None and job.labels_on(number):
        labelled = _labelled_share(job, shard, number, dataset)
        found |= {
            int(at): f"labelled{of} {labelled[at]:.3f}, below {rule.min_labelled:g}"
            for at in np.flatnonzero(labelled < rule.min_labelled)
        }
    return found


def _labelled_share(job: Job, shard: Shard, source: int, dataset: xr.Dataset) -> NDArray[np.float64]:
    """Return the share of each chip's pixels that have any label, also where a function changed the pixels' grid."""
    own, parts = slice(shard.start, shard.stop), []
    for labels in job.labels_on(source):
        if labels.name in dataset:
            masks = dataset[labels.name].values
        else:
            masks = labels.burned(job.bounds[own], job.epsg[own], job.size_px[source], job.names(own))
        parts.append(~np.isnan(masks) if masks.dtype.kind == "f" else masks != labels.fill)
    return np.asarray(np.logical_or.reduce(parts).mean(axis=(1, 2)))


def _fed(job: Job, shard: Shard, source: int) -> NDArray[np.bool_]:
    """Shape (chip, slot). True where a slot of a source has any record."""
    return job.feeds.present(source, job.sources[source].times, shard.start, shard.stop)


def _valid_share(dataset: xr.Dataset, fed: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the share of valid pixels of each chip: where integers say so, or no band is NaN.

    Slots without a record do not count: that nothing was there says nothing of the pixels. Where a user's function
    changed the number of slots, all of them count.
    """
    pixels = dataset["pixels"].values
    known = fed if fed.shape[1] == pixels.shape[1] else np.ones(pixels.shape[:2], dtype=bool)
    if "valid" in dataset.variables:
        seen = dataset["valid"].values
        return np.array([np.mean(v[own]) if own.any() else 0.0 for v, own in zip(seen, known, strict=True)])
    if pixels.dtype.kind != "f":
        return np.ones(len(pixels))
    return np.array(
        [
            np.mean(np.isfinite(chip[own]).all(axis=1)) if own.any() else 0.0
            for chip, own in zip(pixels, known, strict=True)
        ]
    )


def _blanked(dataset: xr.Dataset, places: list[int], fill: float) -> xr.Dataset:
    """Return a Dataset whose chips at some places are all fill and invalid."""
    if places and not dataset["pixels"].values.flags.writeable:  # a user's function made a view
        dataset = dataset.copy(deep=True)
    floats = dataset["pixels"].dtype.kind == "f"
    fills: dict[str, Any] = {
        "pixels": np.nan if floats else fill if np.isfinite(fill) else 0,
        "valid": False,
        "valid_fraction": 0,
        FILLED: 0,
        MASKED: 0,
        PRESENT: False,
    }
    masks = [name for name, v in dataset.data_vars.items() if is_mask(str(name)) and v.ndim == 3]
    fills |= {str(name): np.nan if dataset[name].dtype.kind == "f" else 0 for name in masks}
    for name in fills.keys() & dataset.variables.keys():
        dataset[name].values[places] = fills[name]
    return dataset
