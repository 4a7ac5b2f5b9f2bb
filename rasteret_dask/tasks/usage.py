# SPDX-License-Identifier: Apache-2.0
"""What a job uses of what providers bill, and what that costs at prices that the caller states."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rasteret_dask.display.card import Card, Fact
from rasteret_dask.errors import PlanError
from rasteret_dask.progress import nbytes_text

__all__ = ["GB", "NOTES", "Cost", "Usage", "hours_text"]

GB = 1e9
"""Bytes of the GB that a price is for: most bills count 2**30, which is 7% more."""

NOTES = 2
"""Objects that are put for a shard besides its arrays: the mark of a try, and its report."""


@dataclass(frozen=True, slots=True, repr=False)
class Cost:
    """What a job costs, in the currency of the prices: ``total`` and its parts.

    Examples
    --------
    >>> cost = chips.explain(workers=4, rate="50 MB/s").usage.cost(worker_hour=0.1, gb_egress=0.09)
    >>> cost.total == cost.workers + cost.egress
    True
    """

    workers: float
    """Of the hours of worker processes."""
    reading: float
    """Of the requests that read the scenes."""
    writing: float
    """Of the requests that write the store."""
    egress: float
    """Of the bytes that are read from the scenes."""

    @property
    def total(self) -> float:
        """The sum of the parts.

        Examples
        --------
        >>> chips.explain().usage.cost(requests_1000=0.0004).total > 0
        True
        """
        return self.workers + self.reading + self.writing + self.egress

    @property
    def _card(self) -> Card:
        parts = {
            "worker hours": self.workers,
            "requests that read": self.reading,
            "requests that write": self.writing,
            "bytes read": self.egress,
        }
        return Card(f"Cost: {self.total:.4g}", [Fact(name, f"{part:.4g}") for name, part in parts.items()])

    def __repr__(self) -> str:
        return self._card.text

    def _repr_html_(self) -> str:
        return self._card.html


def hours_text(hours: float) -> str:
    """Return ``0.25``, ``3.1`` or ``1,204``: what is less than 36 s is ``under 0.01``."""
    if hours < 0.01:
        return "under 0.01" if hours else "0"
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


@dataclass(frozen=True, slots=True, repr=False)
class Usage:
    """What a job uses of what is billed: of a plan estimated, of a finished job counted.

    Examples
    --------
    >>> used = rd.job_report("train.zarr").usage
    >>> used.requests > 0, used.worker_hours > 0
    (True, True)
    >>> used.cost(worker_hour=0.1).total == 0.1 * used.worker_hours
    True
    """

    worker_hours: float | None
    """Hours of worker processes, summed over them; None where nobody measured or stated how fast one is."""
    requests: int
    """That read the scenes. Of a plan at most: neighbouring tiles of a file become one."""
    puts: int
    """Requests that write the shards. Of a plan at most: an array that is fill throughout is not written."""
    read_bytes: int | None
    """Read from the scenes, compressed; None where headers do not tell the sizes of tiles."""

    def cost(
        self,
        *,
        worker_hour: float = 0.0,
        requests_1000: float = 0.0,
        puts_1000: float = 0.0,
        gb_egress: float = 0.0,
    ) -> Cost:
        """Return what that costs: each amount times its price. What has no price costs nothing.

        Parameters
        ----------
        worker_hour
            Of a worker process for an hour, with all its threads and its memory.
        requests_1000
            Of 1,000 requests that read from where the scenes lie (GET).
        puts_1000
            Of 1,000 requests that write to where the store lies (PUT).
        gb_egress
            Of a GB (10**9 bytes) that is read from the scenes: 0 where the workers run in the scenes' region.

        Raises
        ------
        PlanError
            When no price is stated, or one is no number from 0 on; when the amount that a price is for is unknown.

        Examples
        --------
        >>> used = chips.explain(workers=4, threads=2, rate="50 MB/s").usage
        >>> used.cost(worker_hour=0.1, requests_1000=0.0004, gb_egress=0.09)
        <Cost: ...
        """
        prices = {
            "worker_hour": worker_hour,
            "requests_1000": requests_1000,
            "puts_1000": puts_1000,
            "gb_egress": gb_egress,
        }
        for name, price in prices.items():
            if isinstance(price, bool) or not isinstance(price, int | float) or not 0 <= price < math.inf:
                raise PlanError(f"cost({name}=)", repr(price), "a price: a number from 0 on")
        if not any(prices.values()):
            raise PlanError(
                "cost()", "no price", f"at least one of {', '.join(prices)}",
                "Take them from your provider's list: cost(worker_hour=0.1).",
            )  # fmt: skip
        if worker_hour and self.worker_hours is None:
            raise PlanError(
                "cost(worker_hour=)", "no estimate of the hours", "one",
                "Let explain make one: explain(workers=4, threads=2, probe=True), or rate='50 MB/s'.",
            )  # fmt: skip
        if gb_egress and self.read_bytes is None:
            raise PlanError(
                "cost(gb_egress=)", "files whose headers do not tell the sizes of their tiles", "the bytes to read",
                "Write a sample, chips.sample(100).to_zarr(path), and scale what its report's usage says.",
            )  # fmt: skip
        return Cost(
            (self.worker_hours or 0.0) * worker_hour,
            self.requests / 1000 * requests_1000,
            self.puts / 1000 * puts_1000,
            (self.read_bytes or 0) / GB * gb_egress,
        )

    @property
    def _card(self) -> Card:
        return Card(
            "Usage",
            [
                Fact(
                    "worker hours", "unknown" if self.worker_hours is None else hours_text(self.worker_hours)
                ),
                Fact("requests", f"{self.requests:,} to read, {self.puts:,} to write"),
                Fact("read", "unknown" if self.read_bytes is None else nbytes_text(self.read_bytes)),
            ],
        )

    def __repr__(self) -> str:
        return self._card.text

    def _repr_html_(self) -> str:
        return self._card.html
