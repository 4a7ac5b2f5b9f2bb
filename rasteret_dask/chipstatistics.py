# SPDX-License-Identifier: Apache-2.0
"""What the pixels of chips hold: statistics, shares of classes, places of classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Self

import pyarrow as pa

from rasteret_dask.net.clusters import ClientLike
from rasteret_dask.words import OnError

if TYPE_CHECKING:
    from rasteret_dask.statistics.stats import Stats
    from rasteret_dask.store.layout import Layout
    from rasteret_dask.tasks.context import ReadContext
    from rasteret_dask.tasks.job import Job

__all__ = ["ChipStatistics"]


class ChipStatistics:
    """What is measured of chips; :class:`Chips` has it."""

    if TYPE_CHECKING:

        @property
        def job(self) -> Job:
            """The frozen plan."""

        @property
        def _layout(self) -> Layout: ...

        def _context(self, on_error: OnError = "raise") -> ReadContext: ...

        def sample(self, n: int, seed: int = 0, by: str | None = None) -> Self:
            """Keep ``n`` chips."""

    def stats(
        self,
        sample: int | None = None,
        client: ClientLike = None,
        on_error: OnError = "raise",
        progress: bool = True,
        sources: Sequence[str] | None = None,
    ) -> Stats:
        """Measure the pixels of these chips in one pass: per source and band counts, moments, percentiles, classes.

        Label columns are counted too. Slots of a source that a chip lacks do not count.

        Parameters
        ----------
        sample
            Measure so many chips, chosen as by :meth:`sample`; None: all.
        client
            A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
        on_error
            As in :meth:`to_xarray`.
        progress
            Show how many shards are measured.
        sources
            Read and measure only these sources; None: all. Where ``filter_pixels`` decides on chips, all are read.

        Raises
        ------
        PlanError
            When no chip is left, or there is no such source.

        Examples
        --------
        >>> stats = chips.select("train").stats(sample=20)
        >>> stats.table["band"].to_pylist(), stats.table["mean"].to_pylist()[0] < 0.2
        (['red', 'nir'], True)
        """
        from rasteret_dask.statistics.measuring import chosen_sources, measured, remember
        from rasteret_dask.streams.planned import planned

        chips = self if sample is None else self.sample(sample)
        only = chosen_sources([s.name for s in chips.job.sources], sources)
        shards = planned(chips.job, chips._layout.outputs, self._context(on_error), only=only)
        stats = measured(shards, client, progress)
        if only is None:
            remember(stats, shards.digest, on_error)
        return stats

    def class_shares(
        self,
        target: str,
        *,
        prefix: str = "share_",
        client: ClientLike = None,
        on_error: OnError = "raise",
        progress: bool = True,
    ) -> pa.Table:
        """Return how much of each chip every class has, as a table that :meth:`with_table` takes.

        The class shares become columns of the chip table, for ``filter``, ``split(stratify=[...])`` and
        ``stream(weights=)``. A mask of polygons is burned for this, and no pixel is read; a band of classes is read
        once. The table stays with the plan, so that nothing is counted again.

        Parameters
        ----------
        target
            ``"<source>/mask"``, a source with one band of classes, or ``"<source>/<band>"``; as in
            :meth:`Stats.classes`.
        prefix
            Stands before the name of a class (its number where it has none) in the name of its column.
        client
            A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
        on_error
            As in :meth:`to_xarray`.
        progress
            Show how many shards are done.

        Returns
        -------
        pyarrow.Table
            ``chip_id``, and a column of float64 for each class, by value: its share of the pixels of a chip, from 0 to
            1; classes that have a name are there in any case. What no polygon covers, or is invalid, is of no class.
            Slots of which nothing is valid do not count.

        Raises
        ------
        PlanError
            When there is no such target, it is a mask of floats, or it has more than 256 classes.

        Examples
        --------
        >>> scl = collection.harmonize(["scl"], units="raw").chips(32, cell_km=0.96).sample(20)
        >>> shares = scl.class_shares("s2", progress=False)
        >>> shares.column_names[:2], shares.num_rows
        (['chip_id', 'share_3'], 20)
        >>> green = scl.with_table(shares).filter("share_4", ">", 0.5)  # SCL's vegetation
        >>> len(green) < len(scl)
        True
        """
        from rasteret_dask.statistics.classshares import burned_shares, class_shares, class_target
        from rasteret_dask.streams.planned import planned

        make = partial(planned, self.job, self._layout.outputs, self._context(on_error))
        found = class_target(make().pixels, target)
        if found.band is None and not self.job.pixel_rules:
            return burned_shares(self.job, found, prefix, client, progress)
        return class_shares(make(only=(found.source,)), found, prefix, client, progress)

    def class_places(
        self,
        target: str,
        *,
        per_chip: int = 16,
        seed: int = 0,
        client: ClientLike = None,
        on_error: OnError = "raise",
        progress: bool = True,
    ) -> pa.Table:
        """Return places of each class in each chip, as a table that :meth:`random` takes as ``balance``.

        A raster of classes is read once for this. Random windows are then drawn around these places, so that each class
        gets equally many. Burned labels need no such table: ``random(balance="crop")``.

        Parameters
        ----------
        target
            As in :meth:`class_shares`.
        per_chip
            Places of a class in a chip, at most: of more pixels, some are drawn.
        seed
            Another seed draws others.
        client, on_error, progress
            As in :meth:`class_shares`.

        Returns
        -------
        pyarrow.Table
            ``chip_id``; ``class``, its name or number; ``y`` and ``x``, from 0 at the chip's north-west corner to 1;
            ``pixels`` of the class in the chip, over all slots.

        Raises
        ------
        PlanError
            When there is no such target, it is a mask of floats, or ``per_chip`` is not from 1 to 1,000.

        Examples
        --------
        >>> scl = collection.harmonize(["scl"], units="raw", time="3MS").chips(32, cell_km=0.96)
        >>> places = scl.class_places("s2", progress=False)
        >>> windows = scl.random(30, seed=1, size=16, balance=places)
        >>> max(windows.table["centre_class"].value_counts().field("counts").to_pylist()) <= 30 // 2
        True
        """
        from rasteret_dask.statistics.classplaces import class_places
        from rasteret_dask.statistics.classshares import class_target
        from rasteret_dask.streams.planned import planned

        make = partial(planned, self.job, self._layout.outputs, self._context(on_error))
        found = class_target(make().pixels, target)
        return class_places(make(only=(found.source,)), found, per_chip, seed, client, progress)
