"""How a request is let in: signed by Planetary Computer, paid for by the requester, or anonymous; told by the host.

Hrefs of tables stay as their catalogs publish them. What lets one read them is found when they are read, in the
process that reads: the catalog's ``store`` tables say which host wants what, keys come from the environment, and
Planetary Computer's tokens from its own package; they are kept until a minute before they expire.
"""

from __future__ import annotations

import os
import warnings
from datetime import UTC, datetime
from functools import cache
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from rasteret_dask.catalogs.catalog import store_of
from rasteret_dask.catalogs.catalogfile import Store
from rasteret_dask.errors import ReadError
from rasteret_dask.extras import how_to_install

if TYPE_CHECKING:
    from obstore.store import AzureSASToken

__all__ = ["Token", "environment", "for_gdal", "has_keys", "remedy", "rule_of", "token"]

_KEYS = {
    "s3": (
        "AWS_ACCESS_KEY_ID",
        "AWS_WEB_IDENTITY_TOKEN_FILE",
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
        "AWS_CONTAINER_CREDENTIALS_FULL_URI",
        "AWS_SKIP_SIGNATURE",  # "false" makes obstore ask the instance's metadata service
    ),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_KEY"),
}
_VSI = {"s3": "/vsis3/", "gs": "/vsigs/", "az": "/vsiaz/"}
_RETRIES = 3
_WAIT_S = 60
_FRESH_S = 60  # the package renews its own tokens at the same age
_TOKENS: dict[tuple[str, str], tuple[str, datetime]] = {}
_LOCK = Lock()


class Token:
    """Planetary Computer's token for one container, as obstore asks for it: a new one when the old one expires."""

    def __init__(self, account: str, container: str) -> None:
        self._account, self._container = account, container

    def __call__(self) -> AzureSASToken:
        """Return ``sas_token`` and ``expires_at``."""
        text, expiry = token(self._account, self._container)
        return {"sas_token": text, "expires_at": expiry}


def token(account: str, container: str) -> tuple[str, datetime]:
    """Return a token that lets one read a container, and when it expires.

    Raises
    ------
    ReadError
        When the planetary-computer package is missing, or the service gives none.
    """
    known = _TOKENS.get((account, container))
    if known is None or _left_s(known[1]) < _FRESH_S:
        with _LOCK:  # one thread asks, the others find the answer
            known = _TOKENS.get((account, container))
            if known is None or _left_s(known[1]) < _FRESH_S:
                known = _TOKENS[account, container] = _asked(account, container)
    return known


def _asked(account: str, container: str) -> tuple[str, datetime]:
    subject = f"signing for {account}/{container}"
    get_token = _package(subject)
    answer: SimpleQueue[Any] = SimpleQueue()

    def ask() -> None:
        try:
            answer.put(get_token(account, container, retry_total=_RETRIES))
        except (OSError, ValueError) as error:  # of requests and pydantic
            status = getattr(getattr(error, "response", None), "status_code", None)
            answer.put(f"status {status}" if status else type(error).__name__)

    Thread(
        target=ask, daemon=True
    ).start()  # the package waits without end for a service that does not answer
    try:
        found = answer.get(timeout=_WAIT_S)
    except Empty:
        found = f"nothing for {_WAIT_S} s"
    if isinstance(found, str):
        raise ReadError(
            subject,
            f"no token: {found}",
            "an answer of Planetary Computer's token service",
            "Check the network, PC_SDK_SAS_URL and PC_SDK_SUBSCRIPTION_KEY.",
        )
    return found.token, found.expiry


def _package(subject: str) -> Any:
    try:
        return _get_token()
    except ImportError:
        raise ReadError(
            subject,
            "no package planetary-computer",
            "it, to read what Planetary Computer stores",
            f"Install it here and on every worker: {how_to_install('pc')}.",
        ) from None


@cache
def _get_token() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of pydantic, about planetary-computer's own code
        from planetary_computer import sas
    return sas.get_token


def _left_s(expiry: datetime) -> float:
    return (expiry - datetime.now(UTC)).total_seconds()


def rule_of(href: str) -> Store | None:
    """Return how the store of an absolute URL lets one in; None where no catalog says, or the href is signed."""
    url = urlsplit(href)
    if url.scheme.lower() not in ("s3", "http", "https") or url.query:
        return None
    return store_of(f"{url.scheme}://{url.netloc.rpartition('@')[2]}")


def environment() -> tuple[tuple[str, str], ...]:
    """Return the environment's variables that stores look at, sorted."""
    return tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith(("AWS_", "AZURE_", "GOOGLE_"))))


def has_keys(scheme: str, names: dict[str, str]) -> bool:
    """Return whether an environment holds keys for a kind of store; without any, requests are not signed."""
    return any(key in names for key in _KEYS.get(scheme, ()))


def for_gdal(href: str) -> tuple[str, dict[str, str]]:
    """Return what GDAL is to open for an href, signed where that is due, and the settings it needs.

    The path may hold a token: it belongs in no message (see :func:`rasteret_dask.net.remote.redact`), and holds for
    minutes only.
    """
    url, rule = urlsplit(href), rule_of(href)
    scheme = url.scheme.lower()
    if scheme in ("http", "https"):
        if rule is None or rule.access != "planetary-computer":
            return f"/vsicurl/{href}", {}
        container = unquote(url.path).lstrip("/").partition("/")[0]
        return f"/vsicurl/{href}?{token(url.netloc.partition('.')[0], container)[0]}", {}
    if scheme not in _VSI:
        return unquote(url.path) if scheme == "file" else href, {}
    options = {}
    names = dict(environment())
    if scheme == "s3":
        if not has_keys("s3", names) or (rule is not None and rule.access == "anonymous"):
            options["AWS_NO_SIGN_REQUEST"] = "YES"
        elif rule is not None and rule.access == "requester-pays":
            options["AWS_REQUEST_PAYER"] = "requester"
        if rule is not None and rule.region:
            options["AWS_REGION"] = rule.region
        elif "AWS_REGION" not in names and "AWS_DEFAULT_REGION" not in names:
            options["AWS_REGION"] = "us-west-2"
    return f"{_VSI[scheme]}{url.netloc}{url.path}", options


def remedy(href: str) -> str:
    """Return what may help where a store has refused an href; "" where nothing is known of it."""
    rule = rule_of(href)
    if rule is None or rule.access == "anonymous":
        return ""
    if rule.access == "requester-pays":
        where = f" (transfer within {rule.region} is free)" if rule.region else ""
        return (
            f"This bucket's reader pays{where}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of your account here "
            "and on every worker."
        )
    return "Planetary Computer's token was refused: check this machine's clock."
