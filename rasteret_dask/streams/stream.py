# SPDX-License-Identifier: Apache-2.0
"""Batches for a training loop: read ahead, bounded, in an order that can be resumed anywhere."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from rasteret_dask.chipping.chiptable import MASK
from rasteret_dask.display.card import Card, Fact, counted
from rasteret_dask.errors import PlanError
from rasteret_dask.formats import STATE
from rasteret_dask.lists import listed
from rasteret_dask.net import clusters
from rasteret_dask.planning.plan import digest
from rasteret_dask.streams.ahead import Shelf, fill
from rasteret_dask.streams.augmenting import Augment, Augmenting
from rasteret_dask.streams.chipshards import ChipShards
from rasteret_dask.streams.deals import Deal
from rasteret_dask.streams.epochs import BatchOrder, Begun
from rasteret_dask.streams.ignoring import Ignoring
from rasteret_dask.streams.shardsource import OnThreads, ShardSource
from rasteret_dask.streams.weights import Weights, WeightsLike
from rasteret_dask.tasks.batches import Arrays, SourcePixels

if TYPE_CHECKING:
    from rasteret_dask.net.clusters import ClientLike

__all__ = ["Batching", "Normalize", "Stream", "prepared"]

_PLENTY = 2**62
"""Chips enough for any number of ranks: an order of so many is refused only where an argument is wrong."""

_log = logging.getLogger(__name__)


class Normalizer(Protocol):
    """Such as the statistics of chips."""

    def normalize(self, arrays: Arrays) -> Arrays:
        """Return a batch with other pixels."""


Normalize: TypeAlias = Normalizer | Callable[[Arrays], Arrays]
"""What is done to each batch before it is handed over, on the thread that makes it."""


@dataclass(frozen=True, slots=True)
class Batching:
    """How chips become batches: the arguments of every ``stream``, which :meth:`Chips.stream` documents.

    Raises
    ------
    PlanError
        Where an argument cannot be; what depends on the chips is told by :meth:`stream`.
    """

    batch_size: int
    shuffle: int | None = None
    epochs: int = 1
    drop_last: bool = False
    rank: int = 0
    world_size: int = 1
    pad: bool = False
    client: ClientLike = None
    prefetch: int = 2
    normalize: Normalize | bool | None = None
    buffer: int = 4
    ignore_index: int | None = None
    weights: WeightsLike | None = None
    balance: str | None = None
    augment: Augment | None = None

    def __post_init__(self) -> None:
        clusters.check(self.client, "stream(client=)")
        for name in ("epochs", "prefetch"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise PlanError(f"stream({name}=)", repr(count), "a whole number from 1 on")
        if self.augment is not None and not callable(self.augment):
            raise PlanError(
                "stream(augment=)", repr(self.augment), "a function of a sample and its random numbers",
                "Such as: def augment(sample, random): return sample.",
            )  # fmt: skip
        self.order((_PLENTY,))

    def order(
        self, sizes: tuple[int, ...], parts: bool = False, weights: Weights | None = None
    ) -> BatchOrder:
        """Return which chip comes when, of shards of these sizes."""
        return BatchOrder(
            sizes, self.batch_size, self.shuffle, self.drop_last, self.rank, self.world_size, self.pad, self.buffer,
            parts, weights,
        )  # fmt: skip

    def stream(self, shards: ChipShards, measure: Callable[[], Normalizer] | None = None) -> Stream:
        """Return a stream of chips.

        Parameters
        ----------
        shards
            The chips.
        measure
            Returns the statistics that ``normalize=True`` means; None: there are none, and True is refused.

        Raises
        ------
        PlanError
            When ``normalize``, ``weights`` or ``balance`` do not fit these chips, or some rank would have no batch.
        """
        order = self.order(shards.sizes, shards.parts is not None, self._weights(shards))
        normalize = measure() if self.normalize is True and measure is not None else self.normalize
        function = prepared(normalize or None, self.ignore_index, shards.pixels)
        return Stream(shards, order, replace(self, normalize=function, weights=None, balance=None))

    def _weights(self, shards: ChipShards) -> Weights | None:
        if self.weights is None and self.balance is None:
            return None
        if shards.column is None:
            raise PlanError(
                "stream(weights=, balance=)", "a plan with filter_pixels(), whose chips are settled when they are read",
                "chips whose table is known", "Write them first: to_zarr(store), then open_chips(store).stream(...).",
            )  # fmt: skip
        return Weights.of(self.weights, self.balance, sum(shards.sizes), shards.column)


def prepared(
    normalize: Normalize | bool | None, ignore_index: int | None, pixels: Mapping[str, SourcePixels]
) -> Callable[[Arrays], Arrays] | None:
    """Return what is done to each batch, once statistics were seen to be of these sources; None: nothing.

    Parameters
    ----------
    normalize
        What :meth:`Chips.stats` returned, a method of it or a ``partial`` of one, another function, or None.
    ignore_index
        What invalid pixels of class bands become; None: they stay.
    pixels
        Source -> what its pixels are.

    Raises
    ------
    PlanError
        When ``normalize`` is none of these, or statistics of other bands, dtypes or units; when ``ignore_index`` is no
        whole number, or no source has a band of classes.
    """
    function: Callable[[Arrays], Arrays] | None = None
    if normalize is not None:
        named: Any = getattr(normalize, "normalize", normalize)
        if not callable(named):
            raise PlanError("normalize=", repr(normalize), "what stats() returned, or a function of a batch")
        function = named
        method = getattr(function, "func", function)
        if callable(check := getattr(getattr(method, "__self__", None), "check", None)):
            sources = getattr(function, "keywords", {}).get("sources")
            check(pixels) if sources is None else check(pixels, sources)
    if ignore_index is None:
        return function
    ignoring = Ignoring.of(ignore_index, pixels)
    return ignoring if function is None else partial(_both, function, ignoring)


def _both(first: Callable[[Arrays], Arrays], second: Callable[[Arrays], Arrays], arrays: Arrays) -> Arrays:
    return second(first(arrays))


class Stream(Iterator[Arrays]):
    """Batches of chips, made by ``chips.stream(...)`` or :func:`rasteret_dask.stream_from`.

    Each batch is a dictionary of contiguous arrays of its own, with the chips along axis 0: see
    :data:`rasteret_dask.tasks.batches.Arrays`. ``len()`` is the number of batches of all epochs, the same on every
    rank. Reading begins with the first ``next()`` and ends with the last batch, with :meth:`close`, at the end of a
    ``with`` block, or when nobody holds the stream any more.

    Raises
    ------
    JobError
        When the cluster is lost, or has no worker that may read. The batches before are delivered, and
        :meth:`state_dict` says where to go on.
    ReadError
        When chips could not be read.

    Examples
    --------
    >>> with chips.select("train").stream(batch_size=32, shuffle=7, epochs=2) as stream:
    ...     for batch in stream:
    ...         pixels = batch["s2"]  # (chip, time, band, y, x)
    >>> stream.epoch
    2
    """

    def __init__(
        self, shards: ChipShards, order: BatchOrder, batching: Batching, epochs: int | None = None
    ) -> None:
        self.order = order
        self.epochs = batching.epochs if epochs is None else epochs
        """How often the chips come; 0 where a resumed pass has nothing left."""
        self._shards, self._batching = shards, batching
        self._token = digest(shards.digest, list(shards.sizes))
        self._begin(Begun())
        self._shelf: Shelf | None = None
        self._finalizer: Any = None
        self._taking = threading.Lock()

    @property
    def bands(self) -> Mapping[str, tuple[str, ...]]:
        """Source -> names of its bands.

        Examples
        --------
        >>> dict(chips.stream(batch_size=32).bands)
        {'s2': ('red', 'nir')}
        """
        return self._shards.bands

    @property
    def classes(self) -> Mapping[str, tuple[str, ...]]:
        """Source with a mask of names -> the name of each of its values, from 0 (no polygon, "") on.

        Of several burned columns, the keys are those of batches: ``"<source>/mask_<column>"``.

        Examples
        --------
        >>> dict(chips.stream(batch_size=32).classes)  # no masks of polygons
        {}
        """
        return {
            source if mask == MASK else f"{source}/{mask}": names
            for source, own in self._shards.pixels.items()
            for mask, names in own.classes.items()
        }

    def __len__(self) -> int:
        return self.order.batches * self.epochs + self._more

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Arrays:
        with self._taking:  # threads may take turns
            if self._position >= len(self):
                if self._shelf is not None:
                    _log.info("%s: ended", str(self))
                self.close()
                raise StopIteration
            shelf = self._shelf or self._start()
            try:
                batch = shelf.take(self._position)
            except BaseException:
                if shelf.failed:  # the next call reads on from here
                    self.close()
                raise
            self._position += 1
            return batch

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next batch belongs to, from 0 on; :attr:`epochs` at the end.

        Examples
        --------
        >>> stream = chips.stream(batch_size=100, epochs=2)
        >>> batches = [next(stream), next(stream)]
        >>> stream.epoch
        1
        """
        return self._place(self._position)[0]

    def _place(self, position: int) -> tuple[int, int]:
        """Return the epoch of a batch, and how many of that epoch come before it."""
        batches, begun = self.order.batches, self._begun
        inside = position - begun.epoch * batches
        if inside < batches + self._more:
            return begun.epoch, inside
        later, batch = divmod(inside - self._more, batches)
        return begun.epoch + later, batch

    def _begin(self, begun: Begun) -> None:
        """Stand where an epoch has begun."""
        self._begun = begun
        # how many batches more than others the epoch has which goes on: dealt anew, or in batches of another size
        self._more = 0
        if begun.epoch < self.epochs:
            self._more = begun.batch + self.order.left(begun) - self.order.batches
        self._position = begun.epoch * self.order.batches + begun.batch

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands, as JSON values: a stream that loads it yields what comes next.

        It is the same on every rank, once all have taken as many batches.

        Examples
        --------
        >>> stream = chips.stream(batch_size=32, shuffle=7)
        >>> batch = next(stream)
        >>> stream.state_dict()["batch"]
        1
        """
        epoch, batch = self._place(self._position)
        dealt: tuple[Deal, ...] = ()
        if epoch == self._begun.epoch:
            dealt = self.order.taken(self._begun, batch - self._begun.batch)
        elif batch:
            dealt = self.order.taken(Begun(epoch), batch)
        return {
            **STATE.note, "chips": self._token, **self.order.arguments(), "epoch": epoch, "batch": batch,
            "dealt": [deal.note for deal in dealt],
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another stream of these chips, in this order, stood.

        With the same arguments it yields the very next batch. The number of ranks, ``batch_size``, ``buffer``, ``pad``
        and ``drop_last`` may be others: then what is left of the epoch is dealt to the ranks there are now, and all of
        them together yield exactly the chips that no rank had before. The next epoch begins as if nothing had been.

        Parameters
        ----------
        state
            What :meth:`state_dict` returned, here, on another rank or in another process.

        Raises
        ------
        PlanError
            When it is none, or one of other chips, another seed or other weights.
        FormatError
            When another version of the package made it, in a format that this one does not read.

        Examples
        --------
        >>> stream = chips.stream(batch_size=32, shuffle=7)
        >>> batch = next(stream)
        >>> state = stream.state_dict()
        >>> again = chips.stream(batch_size=32, shuffle=7)
        >>> again.load_state_dict(state)
        >>> next(again)["chip_id"].tolist() == next(stream)["chip_id"].tolist()
        True
        >>> ranks = [chips.stream(batch_size=10, shuffle=7, rank=rank, world_size=2) for rank in (0, 1)]
        >>> for rank in ranks:
        ...     rank.load_state_dict(state)  # two ranks go on where one was
        >>> sum(len(batch["chip_id"]) for rank in ranks for batch in rank) == len(chips) - 32
        True
        """
        mine = self.state_dict()
        if isinstance(state, Mapping) and "format" in state:
            STATE.check("load_state_dict", state)
        if not isinstance(state, Mapping) or mine.keys() != state.keys():
            raise PlanError("load_state_dict", f"{state!r:.100}", "what state_dict() of a stream returned")
        if state["chips"] != self._token:
            raise PlanError(
                "load_state_dict", f"a state of other chips ({state['chips']!s:.12})", f"of these ({self._token:.12})",
                "Make the stream from the plan, the split and the store that the state was made with.",
            )  # fmt: skip
        for name, value in self.order.arguments().items():
            if state[name] != value:
                shown = "shuffle" if name == "seed" else name
                raise PlanError(
                    "load_state_dict", f"a state with {shown}={state[name]!r:.40}", f"{shown}={value!r:.40}",
                    "Give the stream the arguments that the state was made with.",
                )  # fmt: skip
        begun = self._place_of(state["epoch"], state["batch"], state["dealt"])
        self.close()
        self._begin(begun)

    def _place_of(self, epoch: Any, batch: Any, dealt: Any) -> Begun:
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (epoch, batch))
        deals = tuple(map(Deal.of, dealt)) if isinstance(dealt, list) else ()
        chips = self.order.chips
        for deal in deals:
            chips = max(0, deal.left(chips))
        if not whole or (batch > 0) != bool(deals) or not chips or epoch > self.epochs - bool(deals):
            raise PlanError(
                "load_state_dict", f"epoch {epoch!r}, batch {batch!r}, {self.order.chips - chips} chips taken",
                f"a place in {self.epochs} epochs of {self.order.chips} chips",
                "Give the stream at least as many epochs as the one that the state was made with.",
            )  # fmt: skip
        return self.order.begun(epoch, batch, deals)

    def with_order(self, order: BatchOrder, epochs: int | None = None) -> Stream:
        """Return a new stream of these chips in another order, such as another rank's.

        Parameters
        ----------
        order
            Its sizes are those of this stream's order.
        epochs
            How often the chips come; None: as often as here.

        Examples
        --------
        >>> from dataclasses import replace
        >>> stream = chips.stream(batch_size=32)
        >>> second = stream.with_order(replace(stream.order, rank=1, world_size=2))
        >>> len(stream), len(second)
        (5, 3)
        """
        return Stream(self._shards, order, self._batching, self.epochs if epochs is None else epochs)

    def close(self) -> None:
        """Stop reading and let go of everything; ``next()`` begins to read again where the stream stands.

        Examples
        --------
        >>> stream = chips.stream(batch_size=32)
        >>> batch = next(stream)
        >>> stream.close()
        """
        shelf, self._shelf = self._shelf, None
        if shelf is not None:
            self._finalizer()

    def __getstate__(self) -> dict[str, Any]:
        """Return what another process begins with: where it stands, not what is on its way."""
        return {**self.__dict__, "_shelf": None, "_finalizer": None, "_taking": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._taking = threading.Lock()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _source(self) -> ShardSource:
        client, owned = clusters.meant(self._batching.client)
        if client is None:
            return OnThreads(self._shards)
        from rasteret_dask.streams.clustersource import OnCluster  # it imports distributed

        return OnCluster(self._shards, client, self.order.world_size, owned, self.order.seed is None)

    def _start(self) -> Shelf:
        """Begin to read where the stream stands."""
        source = self._source()
        shelf = Shelf(self._batching.prefetch, self._position)
        function = self._batching.augment
        augment = None if function is None else Augmenting(function, self.order.seed or 0)
        epoch, batch = self._place(self._position)
        begun = Begun(epoch)
        if batch:
            before = self._begun if epoch == self._begun.epoch else begun
            begun = replace(
                before, batch=batch, offset=before.offset + (batch - before.batch) * self.order.batch_size
            )
        plan = self.order.epochs(begun, self.epochs)
        made = threading.Thread(
            target=fill,
            args=(plan, self.order.pad, source, shelf, self._batching.normalize, augment),
            name="rasteret-batches",
            daemon=True,
        )
        try:
            made.start()
        except BaseException:
            shelf.stop()
            source.close()
            raise
        self._finalizer = weakref.finalize(self, shelf.stop)  # the thread holds no stream
        self._shelf = shelf
        # as text: a handler that formats later would tell of another batch
        _log.info("%s: reading begins, %s", str(self), type(source).__name__)
        return shelf

    def __repr__(self) -> str:
        return self._card.text

    def _repr_html_(self) -> str:
        return self._card.html

    @property
    def _card(self) -> Card:
        o = self.order
        rows = [
            Fact("batches", f"{self.epochs} x {o.batches:,} of {counted(o.batch_size, 'chip')}"),
            Fact("order", "as planned" if o.seed is None else f"shuffled by seed {o.seed}"),
        ]
        if o.world_size > 1:
            rows.append(Fact("rank", f"{o.rank} of {o.world_size}" + (", padded" if o.pad else "")))
        for name, own in self._shards.pixels.items():
            shape = (
                f"({', '.join(map(str, (o.batch_size, *own.shape)))}) {own.dtype}" if own.shape else own.dtype
            )
            rows.append(
                Fact(name, f"{shape}: {listed(own.bands, 'bands')}{f' ({own.units})' if own.units else ''}")
            )
        if o.weights is not None:
            rows.append(Fact("weighted", "yes"))
        if self._batching.normalize is not None:
            rows.append(Fact("normalized", "yes"))
        if self._batching.augment is not None:
            rows.append(Fact("augmented", "yes"))
        state = (
            "reading ahead"
            if self._shelf is not None
            else "nothing is read yet"
            if not self._position
            else "closed"
        )
        if self._position >= len(self):
            rows.append(Fact("state", f"at its end, after {counted(self._position, 'batch', 'batches')}"))
        else:
            at = "epoch {}, batch {}".format(*self._place(self._position))
            rows.append(Fact("state", f"{state}; next: {at}"))
        return Card(f"Stream of {counted(o.chips, 'chip')}", rows)

    def __str__(self) -> str:
        """Return it in one line, as logs have it."""
        o = self.order
        part = f", rank {o.rank} of {o.world_size}" if o.world_size > 1 else ""
        order = "in order" if o.seed is None else f"shuffled by seed {o.seed}"
        return (
            f"<Stream of {o.chips} chips, {order}, {self.epochs} x {o.batches} batches of {o.batch_size}{part}; "
            "next: epoch {}, batch {}>".format(*self._place(self._position))
        )
