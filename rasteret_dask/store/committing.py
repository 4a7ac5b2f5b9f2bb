# SPDX-License-Identifier: Apache-2.0
"""A store whose shards are all written becomes a finished one, without the plan that they came from."""

from __future__ import annotations

import os

from rasteret_dask.errors import StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.store import ledger, shardreports, write
from rasteret_dask.store.jobreport import JobReport, job_report
from rasteret_dask.store.presence import forget_clients
from rasteret_dask.tasks.jobfile import JOB_FILE, open_job

__all__ = ["commit"]


def commit(store: str | os.PathLike[str]) -> JobReport:
    """Finish a store all of whose shards are written, by parts of an array job that have not finished it themselves.

    The part that ends last does so by itself: this is for when it was stopped right before. Of a finished store, it
    only returns the report.

    Parameters
    ----------
    store
        What ``to_zarr(limits=RunLimits(part=...))`` has written: a local path, or a URL.

    Returns
    -------
    JobReport
        What was written, and what that took.

    Raises
    ------
    StoreError
        When no store lies there, ``to_zarr`` does not write it, or something but shards is missing or damaged.
    JobError
        When shards are missing.

    Examples
    --------
    >>> for part in (1, 2):
    ...     report = chips.to_zarr("train.zarr", progress=False, limits=rd.RunLimits(part=(part, 2)))
    >>> report.committed
    True
    >>> rd.commit("train.zarr").committed
    True
    """
    url = Place.of(store).folder("a folder that to_zarr wrote", "Give the store's folder.")
    subject = f"commit {remote.redact(url)}"
    mark = ledger.begun(url)
    if mark is None:
        raise StoreError(subject, "no store", "one that to_zarr began", "Check the path.")
    if mark["writer"] != ledger.TO_ZARR:
        raise StoreError(
            subject, f"what {mark['writer']} writes", "a store that to_zarr began",
            f"Call {mark['writer']} again: it commits by itself.",
        )  # fmt: skip
    ledger.check_owner(url, mark, ledger.Owner(mark["digest"], mark["compression"]))
    if not write.is_committed(url, mark["digest"], mark["compression"]):
        place = remote.join(url, shardreports.JOB)
        if not remote.exists(remote.join(place, JOB_FILE)):
            raise StoreError(
                subject, "a plan by blocks, which lies elsewhere", "a plan inside the store",
                "Call to_zarr of the same ChipBlocks again: it commits by itself.",
            )  # fmt: skip
        write.commit(url, open_job(place, mark["digest"]))
        forget_clients(url)
    return job_report(url)
