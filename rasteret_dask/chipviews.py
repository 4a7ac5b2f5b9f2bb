# SPDX-License-Identifier: Apache-2.0
"""What a plan of chips will do, why each chip is as it is, and pictures of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import pyarrow as pa

from rasteret_dask.errors import PlanError

if TYPE_CHECKING:
    import xarray as xr

    from rasteret_dask.chipping.chips import PlannedChips
    from rasteret_dask.show.audit import Audit
    from rasteret_dask.show.explain import Explanation
    from rasteret_dask.show.losses import Tracer
    from rasteret_dask.show.why import Why
    from rasteret_dask.store.jobreport import JobReport
    from rasteret_dask.store.layout import Layout
    from rasteret_dask.tasks.job import Job

__all__ = ["ChipViews"]


class ChipViews:
    """What chips show of themselves; :class:`Chips` has it."""

    if TYPE_CHECKING:

        @property
        def planned(self) -> PlannedChips:
            """The planned chips."""

        @property
        def table(self) -> pa.Table:
            """The chip table."""

        @property
        def job(self) -> Job:
            """The frozen plan."""

        @property
        def _layout(self) -> Layout: ...

        @property
        def _tracer(self) -> Tracer: ...

        @property
        def _unselected(self) -> ChipViews: ...

        def __len__(self) -> int: ...

        def sample(self, n: int, seed: int = 0, by: str | None = None) -> Self:
            """Keep ``n`` chips."""

        def load(self) -> xr.Dataset | xr.DataTree:
            """Read the chips into memory."""

    def explain(
        self,
        workers: int | None = None,
        threads: int = 1,
        *,
        probe: bool = False,
        rate: str | float | JobReport | None = None,
    ) -> Explanation:
        """Say what the job will do, before anything is read, and how much of the ground lies in a chip.

        ``["ground"]`` has the share of the ground that the plan asks for: what of the area (``aoi``, a GeoBox; else
        everywhere) the reference source's records lie on. With ``probe`` or ``rate`` it also estimates the time and the
        hours of all workers together, which :attr:`Explanation.usage` brings to a price.

        Parameters
        ----------
        workers
            Worker processes: says what they fetch together, at most, as what two of them need is fetched twice.
        threads
            Threads of each worker.
        probe
            Estimate the time from a few tiles, at most 12, which this process reads now from where they lie. Workers
            in another place read at another rate.
        rate
            Estimate the time from what one worker process fetches in a second: ``"50 MB/s"``, or a number of bytes;
            or from the report of a finished job of the same kind, such as a sample's. Only a report tells what masks,
            your functions and writing take. Nothing is read.

        Raises
        ------
        PlanError
            When there are no workers, or no threads; when both ``probe`` and ``rate`` are given, or that is no rate.
        ReadError
            When a tile of the probe cannot be read.

        Examples
        --------
        >>> told = chips.select("train").explain(workers=4, threads=2)
        >>> told["chips"], told["splits"], told["pixels"]["s2"]["native"]
        (124, {'train': 124}, 5)
        >>> print(told)
        records ...
        chips ...
        ...
        """
        from rasteret_dask.show import explain, probing
        from rasteret_dask.tasks.runs import Workforce

        if min(1 if workers is None else workers, threads) < 1:
            raise PlanError(
                "explain(workers=, threads=)", f"{workers} and {threads}", "at least 1 of each",
                "Leave workers out for what one process fetches.",
            )  # fmt: skip
        if probe and rate is not None:
            raise PlanError("explain(probe=, rate=)", "both", "one of them: measured, or stated")
        force = None if workers is None else Workforce(workers, threads)
        speed = None if rate is None else probing.rate_of(rate)
        measured = probing.probed(self.job) if probe else speed
        return explain.explain(self.planned, self.job, self._layout.outputs, force, measured)

    def audit(self) -> Audit:
        """Check the splits: ratios, losses, overlaps (must be 0) and distances, over all splits of the plan.

        Examples
        --------
        >>> audit = chips.audit()
        >>> audit.ok  # no ground in two splits
        True
        >>> print(audit)
        ok: no two splits share ground
        ...
        """
        from rasteret_dask.show import audit

        return audit.audit(self._unselected.planned)

    def why(self, chip_id: str | None = None, *, lon: float | None = None, lat: float | None = None) -> Why:
        """Say why a chip is as it is, or why there is none at a place.

        Of a chip: which records compete for each slot, with the share of the chip that each covers, that is valid and
        that is cloudy, which one was picked and why, and why the chip is in its split. The pixels of this one chip are
        read, of each record for itself. Of a place: what each step of the plan leaves there, up to the first that
        leaves no chip, and why. No pixel is read; steps that look at all chips (a sample, a buffer) plan all of them.

        Parameters
        ----------
        chip_id
            The chip, as in column ``chip_id`` of :attr:`table`.
        lon, lat
            The place, degrees.

        Raises
        ------
        PlanError
            When neither is given or both are, or no step of the plan ever had such a chip.

        Examples
        --------
        >>> print(chips.why(chips.table["chip_id"][3].as_py()))
        chip 33_0.96km_32px_10m_-17375_1560
          split train
          split cell 33/-5792/520: its hash with seed 1 is 0.1049, in train (0 to 0.7)
          s2, slot 2024-04: S2A_33UVR_20240409_0_L2A: 6.6 days from the slot's middle, and the next 8.4; 100.0% valid
          s2, slot 2024-06: S2B_33UVR_20240623_0_L2A: 7.4 days from the slot's middle, and the next 7.6; 100.0% valid
          source  slot_name  record                    datetime          coverage  valid   cloudy  role
          s2      2024-04    S2A_33UVR_20240409_0_L2A  2024-04-09 10:04  100.0%    100.0%  0.0%    picked
          s2      2024-04    S2B_33UVR_20240424_0_L2A  2024-04-24 10:04  100.0%    0.0%    100.0%  not used
          s2      2024-06    S2B_33UVR_20240623_0_L2A  2024-06-23 10:04  100.0%    100.0%  0.0%    picked
          s2      2024-06    S2A_33UVR_20240608_0_L2A  2024-06-08 10:04  100.0%    100.0%  0.0%    not used
        >>> why = chips.why(lon=14.975, lat=50.17)
        >>> why.chips, why.step[:5]
        ((), 'chips')
        >>> why.reasons
        ('covered to 78.1% at most by s2, in slot 2024-04; min_coverage asks for 100%',)
        """
        from rasteret_dask.show import why

        return why.why(self._tracer, chip_id, lon, lat)

    def plot(self, ax: Any = None) -> Any:
        """Draw the map of chips, coloured by split, with a legend that counts them; returns Matplotlib axes.

        Examples
        --------
        >>> axes = chips.plot()
        >>> axes.get_xlabel()
        'Easting, UTM zone 33N (km)'
        >>> axes.figure.savefig("chips.png")
        """
        from rasteret_dask.show.plot import plot_chips

        return plot_chips(self.table, ax=ax)

    def preview(self, n: int = 6) -> Any:
        """Draw some chips, chosen as by :meth:`sample`: all slots and sources, masks and labels; reads only these.

        Parameters
        ----------
        n
            How many chips.

        Returns
        -------
        matplotlib.figure.Figure
            A row a chip. It shows where it is the last value of a notebook's cell; ``.savefig(path)`` writes it.

        Raises
        ------
        PlanError
            When there is no chip to draw.
        MissingExtraError
            When matplotlib is not installed.

        Examples
        --------
        >>> figure = chips.preview(2)
        >>> figure.savefig("preview.png")
        """
        from rasteret_dask.show.plot import preview

        return preview(self, n)

    def explore(self, tiles: str | None = "OpenStreetMap") -> Any:
        """Return an interactive map of the chips, coloured by split, with their columns as popups (needs folium).

        Parameters
        ----------
        tiles
            What folium draws behind them, which the reader's browser asks for; None: nothing.

        Raises
        ------
        PlanError
            When there are no chips.
        MissingExtraError
            When folium is not installed.

        Examples
        --------
        >>> chips.explore(tiles=None).save("chips.html")
        """
        from rasteret_dask.show.maps import explore_chips

        return explore_chips(self.table, tiles)
