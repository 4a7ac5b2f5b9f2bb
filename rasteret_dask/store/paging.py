# SPDX-License-Identifier: Apache-2.0
"""Reports of finished shards go into pages while a store is written: many in an object."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rasteret_dask.store import shardreports
from rasteret_dask.store.presence import Presence

__all__ = ["Paging"]


class Paging:
    """Turns a page of the ledger whenever enough shards have ended that no task asks for any more.

    Only a client that is alone with its shards does: the tasks of another one look for a shard's own report, to leave
    it out. A part of an array job turns pages while it has shards that are not begun: then no other part finds all
    reports there, and commits the store meanwhile.

    Parameters
    ----------
    presence
        This client's trace in the store.
    keys
        As in :class:`rasteret_dask.store.ledger.Content`.
    """

    def __init__(self, presence: Presence, keys: Mapping[str, str]) -> None:
        self._presence, self._keys = presence, keys
        self._waiting: list[str] = []
        self._next = shardreports.PAGE_REPORTS

    def since(self, done: Mapping[str, shardreports.ReportPlace]) -> set[str]:
        """Return shards that went into pages after ``done`` was read, and before others could see this client."""
        return shardreports.on_pages(self._presence.url, {place.path for place in done.values()}, self._keys)

    def settle(self, shards: Sequence[str], more: bool) -> None:
        """Take shards whose tasks have ended: their reports are put together once there are enough.

        ``more`` tells whether there are shards that have not begun.
        """
        self._waiting += shards
        if len(self._waiting) < self._next or (self._presence.part is not None and not more):
            return
        if not self._presence.is_alone():
            self._next = len(self._waiting) + shardreports.PAGE_REPORTS
            return
        size = shardreports.PAGE_REPORTS
        whole = len(self._waiting) // size * size
        for at in range(0, whole, size):
            shardreports.turn_page(self._presence.url, self._waiting[at : at + size], self._keys)
        del self._waiting[:whole]
        self._next = size
