# SPDX-License-Identifier: Apache-2.0
"""Planetary Computer's tokens: asked for when a container is read, kept in the memory of the process that reads."""

from __future__ import annotations

import warnings
from datetime import UTC, datetime
from functools import cache
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any

from rasteret_dask.errors import ReadError
from rasteret_dask.extras import how_to_install

__all__ = ["account_of", "forget", "token"]

_RETRIES = 3
_WAIT_S = 60
_FRESH_S = 60  # the package renews its own tokens at the same age
_TOKENS: dict[tuple[str, str], tuple[str, datetime]] = {}
_LOCK = Lock()


def account_of(host: str) -> str:
    """Return the storage account of a blob host: the first label of its name."""
    return host.partition(".")[0].partition(":")[0]


def token(account: str, container: str) -> tuple[str, datetime]:
    """Return a token that lets one read a container, and when it expires.

    Raises
    ------
    ReadError
        When the planetary-computer package is missing, or the service gives none.
    """
    kept = _TOKENS.get((account, container))
    if kept is None or _left_s(kept[1]) < _FRESH_S:
        with _LOCK:  # one thread asks, the others find the answer
            kept = _TOKENS.get((account, container))
            if kept is None or _left_s(kept[1]) < _FRESH_S:
                kept = _TOKENS[account, container] = _new_token(account, container)
    return kept


def forget(account: str, container: str, text: str) -> None:
    """Drop a container's token where it is still this one, also from the package's memory."""
    with _LOCK:
        if _TOKENS.get((account, container), ("",))[0] == text:
            del _TOKENS[account, container]
            _service(f"signing for {account}/{container}").TOKEN_CACHE.clear()


def _new_token(account: str, container: str) -> tuple[str, datetime]:
    subject = f"signing for {account}/{container}"
    service = _service(subject)
    answer: SimpleQueue[Any] = SimpleQueue()

    def ask() -> None:
        try:
            answer.put(service.get_token(account, container, retry_total=_RETRIES))
        except (OSError, ValueError) as error:  # of requests and pydantic
            status = getattr(getattr(error, "response", None), "status_code", None)
            answer.put(f"status {status}" if status else type(error).__name__)

    Thread(
        target=ask, daemon=True
    ).start()  # the package waits without end for a service that does not answer
    try:
        reply = answer.get(timeout=_WAIT_S)
    except Empty:
        reply = f"nothing for {_WAIT_S} s"
    if isinstance(reply, str):
        raise ReadError(
            subject,
            f"no token: {reply}",
            "an answer of Planetary Computer's token service",
            "Check the network, PC_SDK_SAS_URL and PC_SDK_SUBSCRIPTION_KEY.",
        )
    return reply.token, reply.expiry


def _service(subject: str) -> Any:
    try:
        return _sas()
    except ImportError:
        raise ReadError(
            subject,
            "no package planetary-computer",
            "it, to read what Planetary Computer stores",
            f"Install it here and on every worker: {how_to_install('pc')}.",
        ) from None


@cache
def _sas() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydantic, about planetary-computer's own code
        from planetary_computer import sas
    return sas


def _left_s(expiry: datetime) -> float:
    return (expiry - datetime.now(UTC)).total_seconds()
