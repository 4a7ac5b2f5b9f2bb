# SPDX-License-Identifier: Apache-2.0
"""Chips of a finished store: choose, read, look them up by id."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, get_args

import pyarrow as pa

from rasteret_dask.display.tableview import TableView
from rasteret_dask.errors import PlanError, SchemaError, StoreError
from rasteret_dask.net import remote
from rasteret_dask.net.places import Place
from rasteret_dask.planning.plan import (
    FilterChips,
    Folds,
    Node,
    Predicate,
    Sample,
    Select,
    Split,
    digest,
    predicates,
)
from rasteret_dask.planning.shares import Share, fold_spec, split_spec
from rasteret_dask.statistics.measuring import chosen_sources, measured, recalled, remember
from rasteret_dask.statistics.stats import Stats
from rasteret_dask.store import stored
from rasteret_dask.store.shardreports import JOB
from rasteret_dask.store.stored import Stored
from rasteret_dask.store.union import grown_store, open_parts
from rasteret_dask.storeexits import StoredExits
from rasteret_dask.streams.augmenting import Augment
from rasteret_dask.streams.chipshards import stored_chips
from rasteret_dask.streams.stream import Batching, Normalize, Stream
from rasteret_dask.streams.weights import WeightsLike
from rasteret_dask.tasks.batches import Arrays
from rasteret_dask.words import Boundary, Duplicates, SplitBy

if TYPE_CHECKING:
    import xarray as xr

    from rasteret_dask.display.card import Card
    from rasteret_dask.net.clusters import ClientLike
    from rasteret_dask.show.audit import Audit

__all__ = ["StoredChips", "open_chips"]


def open_chips(
    store: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    split: str | None = None,
    *,
    duplicates: Duplicates = "raise",
    columns: int | None = None,
) -> StoredChips:
    """Open the chips of a store that :meth:`Chips.to_zarr` wrote, of one that grew, or of several stores as one.

    A chip is one sample, with the slots of all parts it stands in, in order of time. A slot that it does not have is
    blank: fill, invalid, without a time.

    Parameters
    ----------
    store
        A local path or a URL; or a list of them: stores of the same sources, bands, sizes, dtypes and units, and of
        the same columns but for those that were added later.
    split
        Only the chips of this split: ``open_chips(store).select(split)``.
    duplicates
        What becomes of a slot of a chip that stands in two stores of a list: ``"raise"`` refuses it by name,
        ``"first"`` takes the first store's.
    columns
        The version of the columns that :meth:`StoredChips.with_table` and :meth:`StoredChips.split` added to see; 0:
        none, None: the latest. Of several stores, the latest of each are seen, with nulls for the chips of a store that
        lacks a column; a chip of two stores has the value of the first one that has any.

    Raises
    ------
    StoreError
        When there is no store, it is not finished, something else lies there, or objects do not have the sizes that
        its manifest names (plain HTTP servers do not list: there, and while reading, each object is compared when
        it is read); when stores differ in more than chips and dates, a chip has two splits, or a slot stands twice.
    PlanError
        When it has no such split, or an argument is none of these.

    Examples
    --------
    >>> stored = rd.open_chips("train.zarr", split="train")
    >>> len(stored)
    124
    >>> for name in ("train", "val"):
    ...     report = chips.select(name).to_zarr(f"{name}-only.zarr", progress=False)
    >>> len(rd.open_chips(["train-only.zarr", "val-only.zarr"]))
    133
    """
    if duplicates not in get_args(Duplicates):
        raise PlanError("open_chips(duplicates=)", repr(duplicates), "'raise' or 'first'")
    places: list[Any] = list(store) if isinstance(store, list | tuple) else [store]
    if not places:
        raise PlanError("open_chips", "no store", "at least one")
    urls = [Place.of(one).folder("a folder that to_zarr wrote", "Give the store's folder.") for one in places]
    if len(set(urls)) < len(urls):
        raise PlanError(
            "open_chips", f"a store twice ({remote.redact(max(urls, key=urls.count))})", "each once"
        )
    if columns not in (None, 0) and len(urls) > 1:
        raise PlanError(
            "open_chips(columns=)", f"version {columns!r}, of several stores", "None or 0",
            "Each store has versions of its own: None sees the latest of each, 0 sees none.",
        )  # fmt: skip
    grown = [grown_store(url) for url in urls]
    for one in grown:
        one.check_sizes()
    chips = StoredChips(Stored.over(open_parts(grown, duplicates, columns)), opened=True)
    if chips.stored.parts is not None:
        _ = chips.stored.map  # so that stores that do not fit are told here
    return chips if split is None else chips.select(split)


class StoredChips(StoredExits):
    """An immutable set of chips in a finished store, made by :func:`open_chips`.

    Only chips that were kept are seen. It pickles small, and a process that gets one opens the store when it reads.

    Parameters
    ----------
    stored
        The store, and the steps so far.
    opened
        Whether this process has opened the store.

    Examples
    --------
    >>> stored = rd.open_chips("train.zarr")
    >>> ids = list(stored)
    >>> stored[ids[0]]["s2"].shape, ids[0] in stored
    ((3, 2, 32, 32), True)
    """

    def __init__(self, stored: Stored, opened: bool = False) -> None:
        self.stored = stored
        self._opened = opened

    def __reduce__(self) -> tuple[type[StoredChips], tuple[Stored]]:
        return StoredChips, (self.stored,)  # not the table

    # Steps

    def select(self, *splits: str) -> StoredChips:
        """Keep the chips of these splits.

        Examples
        --------
        >>> len(stored.select("train", "val")) < len(stored)
        True
        """
        if not splits:
            raise PlanError("select", "no split", "at least one, such as select('train')")
        return self._with(Select(self.stored.plan, splits))

    def filter(self, *triples: Predicate | Any, **columns: Any) -> StoredChips:
        """Keep the chips whose columns fulfil all predicates: triples, or ``column=value``.

        Examples
        --------
        >>> len(stored.filter(("ymax", "<", 5_558_000), split="train"))
        47
        """
        return self._with(FilterChips(self.stored.plan, predicates(triples, columns)))

    def sample(self, n: int, seed: int = 0, by: str | None = None) -> StoredChips:
        """Keep ``n`` chips by hash of their id, per stratum of column ``by``; a larger n contains the smaller.

        Examples
        --------
        >>> len(stored.sample(4, by="split"))
        12
        """
        return self._with(Sample(self.stored.plan, n, seed, by))

    def folds(self, k: int, *, seed: int = 0) -> StoredChips:
        """Add a column ``fold``, as :meth:`Chips.folds`; nothing is written.

        Raises
        ------
        PlanError
            When there are fewer split cells than folds, a column ``fold``, or chips were not laid out in split cells.

        Examples
        --------
        >>> sorted(set(stored.folds(5).table["fold"].to_pylist()))
        [0, 1, 2, 3, 4]
        """
        return self._with(Folds(self.stored.plan, fold_spec(k, seed, "drop")))

    def fold(self, i: int) -> StoredChips:
        """Split the chips by their column ``fold``: val is fold ``i``, train all others; as :meth:`Chips.fold`.

        The store's own splits count no more: choose chips of one of them before this.

        Raises
        ------
        PlanError
            When there is no column ``fold``, or ``i`` is none of its values.

        Examples
        --------
        >>> fold = stored.select("train").folds(5).fold(0)
        >>> len(fold.select("train")) + len(fold.select("val")) == len(fold)
        True
        """
        return self._with(Split(self.stored.plan, split_spec({"val": [i]}, 0, "fold", 0.0, "drop")))

    # Columns beside the store

    def with_table(self, table: Any, on: str = "chip_id") -> StoredChips:
        """Add columns to all chips of the store, such as labels that came later; return the chips that have them.

        They are written beside the store as a new version, whole or not at all, which has the columns of earlier
        versions too. :func:`open_chips` sees the latest, in this and other processes; ``open_chips(store, columns=n)``
        an older one. Pixels are not touched. Chips that are appended later have nulls.

        Parameters
        ----------
        table
            A DataFrame of pandas, an Arrow table, or anything with ``__arrow_c_stream__``: a row for each chip.
        on
            The column with the chips' ids.

        Raises
        ------
        SchemaError
            When ids are unknown, missing, twice or no text, or a column cannot be a label (of its type or name).
        PlanError
            When these are not all chips of one store.
        StoreError
            When the store cannot be written to.

        Examples
        --------
        >>> import pyarrow as pa
        >>> mine = rd.open_chips("train.zarr")
        >>> labels = pa.table({"chip_id": list(mine), "yield_t": [4.5 + n % 3 for n in range(len(mine))]})
        >>> labelled = mine.with_table(labels)
        >>> labelled.take(list(labelled)[:2])["labels/yield_t"]
        array([4.5, 5.5])
        >>> len(rd.open_chips("train.zarr").filter(("yield_t", ">", 5)))
        102
        """
        from rasteret_dask.store.adding import put_labels  # pandas: training workers start without it
        from rasteret_dask.table.anytable import as_arrow

        found = as_arrow(table, "with_table")
        arrow = found if isinstance(found, pa.Table) else found.to_table()
        return StoredChips(put_labels(self.stored, arrow, on), opened=True)

    def split(
        self,
        /,
        train: Share | None = None,
        val: Share | None = None,
        test: Share | None = None,
        *,
        seed: int = 0,
        by: SplitBy | str = "ground",
        buffer_m: float = 0.0,
        boundary: Boundary = "drop",
        **shares: Share,
    ) -> StoredChips:
        """Deal the chips of the store anew, as :meth:`Chips.split` does; written beside it as :meth:`with_table` does.

        ``by="geometry"`` needs the records, which a store does not keep. Chips that are appended later have no split
        until it is called again.

        Examples
        --------
        >>> again = rd.open_chips("train.zarr").split(train=0.5, val=0.25, test=0.25, seed=3)
        >>> again.audit().ok
        True
        >>> len(rd.open_chips("train.zarr", columns=0).select("train"))  # as they were written
        124
        """
        from rasteret_dask.store.adding import deal

        parts = {"train": train, "val": val, "test": test, **shares}
        return StoredChips(deal(self.stored, split_spec(parts, seed, by, buffer_m, boundary)), opened=True)

    def audit(self) -> Audit:
        """Check the splits of these chips, over all parts and stores: see :meth:`Chips.audit`.

        Raises
        ------
        PlanError
            When they have no splits.
        StoreError
            When an earlier version wrote the store, which does not say how its ground was cut.

        Examples
        --------
        >>> stored.audit().overlaps
        {'train-val': 0, 'train-test': 0, 'val-test': 0}
        """
        from rasteret_dask.show.audit import audit
        from rasteret_dask.store.adding import as_planned

        return audit(as_planned(self.stored))

    def _with(self, plan: Node) -> StoredChips:
        chosen = StoredChips(replace(self.stored, plan=plan), opened=True)
        len(chosen)  # so that a mistake is told where it is made
        return chosen

    # What it is

    @cached_property
    def table(self) -> pa.Table:
        """The chip table: one row per chip, CHIP_SCHEMA and the user's further columns.

        Examples
        --------
        >>> stored.table.schema.names[:4]
        ['chip_id', 'epsg', 'row', 'col']
        """
        return self.stored.whole()

    @property
    def split_cells(self) -> pa.Table:
        """Split cells with the split that each got, as :attr:`Chips.split_cells`.

        Raises
        ------
        PlanError
            When a hash dealt the cells.

        Examples
        --------
        >>> import pyarrow as pa
        >>> dealt = chips.split(cells=pa.table({"cell": ["33/-5792/519"], "split": ["test"]}))
        >>> report = dealt.select("train").to_zarr("dealt.zarr", progress=False)
        >>> rd.open_chips("dealt.zarr").split_cells.equals(dealt.split_cells)
        True
        """
        from rasteret_dask.splitcells import stored_cells  # plans: training workers start without them

        return stored_cells(self.stored.url)

    @property
    def fold_cells(self) -> pa.Table:
        """Split cells with the fold that each got, as :attr:`Chips.fold_cells`.

        Raises
        ------
        PlanError
            When the store has no folds, or a hash dealt the cells.

        Examples
        --------
        >>> import pyarrow as pa
        >>> folds = chips.folds(3, cells=pa.table({"cell": ["33/-5792/519"], "fold": [2]}))
        >>> report = folds.sample(6).to_zarr("folded.zarr", progress=False)
        >>> rd.open_chips("folded.zarr").fold_cells.equals(folds.fold_cells)
        True
        """
        from rasteret_dask.splitcells import stored_cells  # plans: training workers start without them

        return stored_cells(self.stored.url, "fold")

    @property
    def digest(self) -> str:
        """What these chips are known by: the store's digest and the steps.

        Examples
        --------
        >>> stored.digest == stored.select("val").digest
        False
        """
        return self.stored.digest

    def __len__(self) -> int:
        return len(self.stored.rows)

    def __iter__(self) -> Iterator[str]:
        """Yield the ids."""
        return iter(self.stored.place)

    def __contains__(self, chip: object) -> bool:
        return chip in self.stored.place

    # Reading

    def __getitem__(self, chip: str) -> dict[str, Any]:
        """Read one chip by its id: the arrays of :meth:`take`, without the chip axis.

        Raises
        ------
        PlanError
            When there is no such chip here.
        """
        if not isinstance(chip, str):
            raise PlanError("chips[...]", repr(chip), "a chip's id", "Ids stand in column chip_id of .table.")
        return {name: values[0] for name, values in self.take([chip]).items()}

    def take(self, ids: Sequence[str]) -> Arrays:
        """Read some chips, in the order asked for, by concurrent single gets.

        A chip costs one request an array of pixels, a shard one for its index, one for its times and for each
        other array (chip, time); these are kept.

        Parameters
        ----------
        ids
            Chip ids; one may stand more than once.

        Returns
        -------
        dict
            Chips along axis 0: ``"<source>"`` pixels (chip, time, band, y, x), ``"<source>/valid"`` (chip, time, y,
            x), ``"<source>/datetime"`` (chip, time) and what ``harmonize(meta=)`` names, ``"chip_id"``, ``"split"``,
            ``"epsg"``, ``"bbox"`` (chip, 4) and ``"labels/<column>"``.

        Raises
        ------
        PlanError
            When there is no such chip here.
        StoreError
            When an object is missing, damaged, or of another size than the manifest says.

        Examples
        --------
        >>> arrays = stored.take(list(stored)[:4])
        >>> {name: values.shape for name, values in arrays.items() if name.startswith("s2")}
        {'s2': (4, 3, 2, 32, 32), 's2/valid': (4, 3, 32, 32), 's2/datetime': (4, 3)}
        """
        wrong = [ids] if isinstance(ids, str) else [i for i in ids if not isinstance(i, str)]
        if wrong:
            raise PlanError(
                "take", repr(wrong[0]), "a list of chip ids",
                "For one chip: chips[id]; of a table's column: column.to_pylist().",
            )  # fmt: skip
        return stored.take(self.stored, self.stored.rows_of(list(ids)))

    def to_xarray(self) -> xr.Dataset | xr.DataTree:
        """Return the chips lazily, a Dask chunk a shard: a Dataset, or a DataTree with a node a source.

        Values are as stored, like those of :meth:`Chips.to_xarray`: attributes hold scale and fill.
        ``xr.open_zarr(store, chunks={"chip": n})`` has the same chunks where n is the attribute ``chips_per_shard`` of
        the group; without ``chunks`` xarray makes a chunk, and Dask a task, of each chip.

        Examples
        --------
        >>> stored.to_xarray()["pixels"].dims
        ('chip', 'time', 'band', 'y', 'x')
        """
        return self._as_xarray(lazy=True)

    def load(self) -> xr.Dataset | xr.DataTree:
        """Read the chips into memory: what ``to_xarray().load()`` gives, without putting it together from shards.

        Examples
        --------
        >>> stored.select("val").load()["pixels"].shape
        (9, 3, 2, 32, 32)
        """
        return self._as_xarray(lazy=False)

    def _as_xarray(self, lazy: bool) -> xr.Dataset | xr.DataTree:
        from rasteret_dask.store.datasets import to_xarray  # xarray: training workers start without it

        return to_xarray(self.stored, lazy)

    def stats(
        self,
        sample: int | None = None,
        client: ClientLike = None,
        progress: bool = True,
        sources: Sequence[str] | None = None,
    ) -> Stats:
        """Measure the pixels of these chips in one pass, or say what was measured before.

        What is found stays with the store, below ``_job/stats/``, where it can be written to.

        Parameters
        ----------
        sample
            Measure so many chips, chosen as by :meth:`sample`; None: all.
        client
            A Dask client or cluster, or a scheduler's address; None: the current client, else threads of this process.
        progress
            Show how many shards are measured.
        sources
            Read and measure only these sources; None: all.

        Raises
        ------
        PlanError
            When no chip is left, or there is no such source.

        Examples
        --------
        >>> stats = stored.select("train").stats()
        >>> stats.table["band"].to_pylist()
        ['red', 'nir']
        """
        chips = self if sample is None else self.sample(sample)
        only = chosen_sources(list(chips.stored.map.sources), sources)
        name = chips.digest if only is None else digest(chips.digest, only)
        place = remote.join(self.stored.url, JOB, "stats", f"{name}.json")
        try:
            return Stats.load(place)
        except (remote.MissingError, SchemaError):  # none, damaged, or of a version that measured otherwise
            found = measured(stored_chips(chips.stored, only), client, progress)
        if only is None:
            remember(found, self.stored.url, chips.digest)
        with suppress(StoreError):  # a store that cannot be written to is measured each time
            found.save(place)
        return found

    def class_shares(
        self, target: str, *, prefix: str = "share_", client: ClientLike = None, progress: bool = True
    ) -> pa.Table:
        """Return how much of each chip every class has, told by the stored pixels: see :meth:`Chips.class_shares`.

        Examples
        --------
        >>> scl = collection.harmonize(["scl"], units="raw").chips(32, cell_km=0.96).sample(20)
        >>> report = scl.to_zarr("classes.zarr", progress=False)
        >>> classes = rd.open_chips("classes.zarr")
        >>> shares = classes.class_shares("s2", progress=False)
        >>> "share_4" in classes.with_table(shares).table.column_names
        True
        """
        from rasteret_dask.statistics.classshares import class_shares, class_target

        found = class_target(self.stored.map.pixels, target)
        return class_shares(stored_chips(self.stored, (found.source,)), found, prefix, client, progress)

    def plot(self, ax: Any = None) -> Any:
        """Draw the map of chips: see :meth:`Chips.plot`.

        Examples
        --------
        >>> stored.plot().figure.savefig("chips.png")
        """
        from rasteret_dask.show.plot import plot_chips

        return plot_chips(self.table, ax=ax)

    def preview(self, n: int = 6) -> Any:
        """Draw some chips, as :meth:`Chips.preview` does; reads only these.

        Examples
        --------
        >>> stored.preview(2).savefig("preview.png")
        """
        from rasteret_dask.show.plot import preview

        return preview(self, n)

    def explore(self, tiles: str | None = "OpenStreetMap") -> Any:
        """Return an interactive map of the chips: see :meth:`Chips.explore`.

        Examples
        --------
        >>> stored.explore(tiles=None).save("chips.html")
        """
        from rasteret_dask.show.maps import explore_chips

        return explore_chips(self.table, tiles)

    @property
    def dropped(self) -> TableView:
        """The chips of the store that ``filter_pixels`` left out: chip_id, split and reason.

        Examples
        --------
        >>> stored.dropped.num_rows  # no filter_pixels in this store's plan
        0
        """
        shards = self.stored.map.shards
        rows = [(chip, s.split, reason) for s in shards for chip, reason in s.dropped.items()]
        if self.stored.parts is not None:  # other parts may have kept it, or dropped it too
            rows = list({row[0]: row for row in rows if not self._is_kept(row[0])}.values())
        names = ("chip_id", "split", "reason")
        columns = {n: pa.array([row[i] for row in rows], pa.string()) for i, n in enumerate(names)}
        return TableView(pa.table(columns))

    def _is_kept(self, chip: str) -> bool:
        row = self.stored.map.chips.row_of(chip)
        return row is not None and bool(self.stored.map.kept[row])

    def stream(
        self,
        batch_size: int,
        shuffle: int | None = None,
        epochs: int = 1,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        pad: bool = False,
        client: ClientLike = None,
        prefetch: int = 2,
        normalize: Normalize | bool | None = None,
        *,
        buffer: int = 4,
        ignore_index: int | None = None,
        weights: WeightsLike | None = None,
        balance: str | None = None,
        augment: Augment | None = None,
    ) -> Stream:
        """Return the chips as batches for a training loop: the parameters are those of :meth:`Chips.stream`.

        With ``shuffle``, each of several ranks gets its own part of every shard, so that its batches are of parts of
        ``buffer * world_size`` shards, in the memory of ``buffer`` shards. Measured for batches of 32 and 20 shards of
        128 chips, the first tenth of an epoch, its middle and its last tenth: 3.9, 4.2 and 4.0 shards a batch on one
        rank, and 15.3, 16.3 and 16.6 on each of 8 ranks.

        Examples
        --------
        >>> for batch in stored.select("train").stream(batch_size=32, shuffle=7, drop_last=True):
        ...     assert batch["s2"].shape == (32, 3, 2, 32, 32)
        """
        batching = Batching(
            batch_size, shuffle, epochs, drop_last, rank, world_size, pad, client, prefetch, normalize, buffer,
            ignore_index, weights, balance, augment,
        )  # fmt: skip
        return batching.stream(
            stored_chips(self.stored),
            lambda: recalled(self.stored.url, self.digest) or self.stats(client=client),
        )

    @property
    def _card(self) -> Card:
        from rasteret_dask.show.cards import stored_card

        return stored_card(self.stored, self._opened)

    def __repr__(self) -> str:
        return self._card.text

    def _repr_html_(self) -> str:
        return self._card.html
