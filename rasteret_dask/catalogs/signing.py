# SPDX-License-Identifier: Apache-2.0
"""The URL to request for an href: with the signature, password or token that this process has for it.

Stored hrefs hold no credentials (:mod:`rasteret_dask.catalogs.credentials`). This module holds them, in the memory of
the process: those that hrefs arrived with, those of signers, and Planetary Computer's tokens. None of it is written or
pickled, but for :func:`carried`, which goes to workers over the cluster's own connections.
"""

from __future__ import annotations

import importlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from threading import Lock, RLock
from typing import TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

from rasteret_dask.catalogs.catalog import store_of
from rasteret_dask.catalogs.catalogfile import Store
from rasteret_dask.catalogs.credentials import Secret, bare, parts_of, split
from rasteret_dask.catalogs.pctokens import account_of, forget, token
from rasteret_dask.errors import PlanError, ReadError

__all__ = [
    "ANEW", "Carried", "Signer", "adopt", "carried", "check_expired", "check_signatures", "expired", "host_of",
    "is_ready_made", "keep_apart", "keep_place_apart", "lacking", "lacking_hosts", "renew", "rule_of", "sign", "signed",
    "signed_hosts", "signs_for",
]  # fmt: skip

Signer: TypeAlias = Callable[[str], str]
"""Takes an href without credentials, returns the URL to request."""

Carried: TypeAlias = "tuple[Mapping[str, Secret], tuple[tuple[str, str], ...]]"
"""What workers are told: {bare href: its credentials}, and (place, signer's name or ready-made credentials)."""

_FRESH = timedelta(seconds=60)  # a signature that ends sooner is asked for anew
_KEPT = 65536  # signed URLs a signer's answers are kept of

ANEW = "Sign the items anew and build again, or name a signer: rd.sign('https://host', 'module:name')."

_GRANTS: dict[str, dict[str, Secret]] = {}
"""{host: {bare href: the credentials that it arrived with}}."""
_SHARED: dict[Secret, Secret] = {}  # one signature often serves a whole container
_PLACES: dict[str, tuple[_Place, ...]] = {}
"""{host: places below it that have a signer, the longest first}."""
_NAMED: dict[tuple[str, str], _Place] = {}
"""{(place, name): signers that catalogs name}."""
_LOCK = RLock()


@dataclass(slots=True)
class _Place:
    """A place and who signs for it; asked by one thread at a time."""

    prefix: str
    name: str
    """``module:name``; "" for a callable, which only this process has; ``user:password@?...`` for ready-made ones."""
    call: Signer
    answers: OrderedDict[str, str] = field(default_factory=OrderedDict)
    lock: Lock = field(default_factory=Lock)

    def covers(self, href: str) -> bool:
        below = href.startswith(self.prefix)
        return below and (self.prefix.endswith("/") or href[len(self.prefix) :][:1] in ("", "/", "?"))

    def url(self, href: str) -> str:
        """Return the signed URL, asked for once while it is fresh."""
        with self.lock:
            answer = self.answers.get(href)
            if answer is None or _ends_soon(answer):
                answer = self.answers[href] = self._answer(href)
                if len(self.answers) > _KEPT:
                    self.answers.popitem(last=False)
            return answer

    def forget(self, href: str, refused: str | None) -> None:
        with self.lock:
            if refused is None or self.answers.get(href) == refused:
                self.answers.pop(href, None)

    def _answer(self, href: str) -> str:
        subject, who = f"signing {href}", self.name or getattr(self.call, "__qualname__", "a callable")
        try:
            answer = self.call(href)
        except (OSError, ValueError, LookupError, RuntimeError) as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            what = type(error).__name__ + (f" (status {status})" if status else "")
            # without its text and the error itself, which may hold what it signs by
            raise ReadError(subject, f"{what} from the signer {who}", "a signed URL") from None
        if not isinstance(answer, str) or not answer.lower().startswith(("http://", "https://")):
            raise ReadError(
                subject, f"a {type(answer).__name__} from the signer {who}", "a URL of http or https"
            )
        return answer


def signed(href: str) -> str:
    """Return the URL to request for an href; the href itself where nothing is to be added.

    Parameters
    ----------
    href
        As records hold it. An href that still has its own signature is returned as it is.

    Returns
    -------
    str
        It may hold a secret: it belongs in no message, table, graph or log.

    Raises
    ------
    ReadError
        When a signer or Planetary Computer's token service gives nothing.
    """
    host = host_of(href)
    if not host:
        return href
    rule = rule_of(href)
    place = _place_of(host, href, rule)
    if place is not None:
        return place.url(href)
    grants = _GRANTS.get(host)
    secret = grants.get(href) if grants else None
    if secret is not None:
        user, query = secret  # the whole query, as it was published: a signature may count its order
        return _added(_with(href.partition("?")[0], user), query)
    if rule is None or rule.access != "planetary-computer":
        return href
    return _added(href, token(*_container(href))[0])


def renew(href: str, refused: str | None = None) -> bool:
    """Drop what an href was signed by, after a host has answered 401 or 403, and ask anew where that is possible.

    Parameters
    ----------
    href
        As records hold it.
    refused
        The URL that the host refused, as :func:`signed` returned it: threads that were refused together ask once. None:
        ask in any case.

    Returns
    -------
    bool
        Whether another try makes sense: the signature is another one now.

    Raises
    ------
    ReadError
        As :func:`signed`.
    """
    host = host_of(href)
    if not host:
        return False
    before = signed(href)
    if refused is not None and before != refused:
        return True
    place = _place_of(host, href, rule_of(href))
    if place is not None:
        place.forget(href, before)
    elif before != href and href not in _GRANTS.get(host, {}):
        account, container = _container(href)
        forget(account, container, token(account, container)[0])
    else:
        return False  # a ready-made signature, or none
    return signed(href) != before


def sign(place: str, signer: Signer | str | None) -> None:
    """Say how hrefs below a place are signed when they are read: in this process, and on the workers that read for it.

    Stored hrefs hold no signatures: tables, plans and stores are safe to share. What reads them needs a signer, or the
    signatures that the items arrived with, which the process that built the collection keeps in its memory.

    Parameters
    ----------
    place
        ``https://host``, or a URL below which everything is signed that way: ``https://host/container``.
    signer
        ``"module:name"``: a function that takes an href and returns the URL to request; each process that reads imports
        and calls it, so it must be installed on the workers too. A callable: this process only. ``"?sv=...&sig=..."``
        or ``"user:password@"``: ready-made credentials, added to each href; they are sent to workers, and never stored.
        None: forget what was said of the place.

    Raises
    ------
    PlanError
        When the place is no http(s) URL or holds a signature itself, or the signer cannot be imported.

    Examples
    --------
    >>> import rasteret_dask as rd
    >>> rd.sign("https://data.example.com/private", "?token=abc")
    >>> rd.sign("https://data.example.com/private", None)

    Notes
    -----
    The signer of a host that a catalog names (``[store] "https://host" = {signer = "module:name"}``, which
    :func:`rasteret_dask.register` writes) holds in every process that has the catalog, without a call.
    """
    host = host_of(place)
    if not host or bare(place) != place or "?" in place:
        raise PlanError(
            "sign(place)", repr(bare(place)), "https://host, or a URL below it, without a query or a password"
        )
    prefix = _lower_host(place)
    if signer is not None:
        _put(host, _place(prefix, signer))
        return
    with _LOCK:
        _PLACES[host] = tuple(p for p in _PLACES.get(host, ()) if p.prefix != prefix)


def keep_apart(href: str) -> str:
    """Return an href without its credentials, which this process keeps for :func:`signed`.

    Planetary Computer's are not kept: whoever reads asks for a token, and tokens end within the hour.
    """
    plain, secret = split(href)
    if secret is None:
        return plain
    host, rule = host_of(plain), rule_of(plain)
    if host and (rule is None or rule.access != "planetary-computer"):
        with _LOCK:
            _GRANTS.setdefault(host, {})[plain] = _SHARED.setdefault(secret, secret)
    return plain


def keep_place_apart(url: str) -> str:
    """Return the URL of a folder or file without its credentials; this process keeps them for all that lies below."""
    plain, secret = split(url)
    host = host_of(plain)
    if secret is None or not host:
        return plain
    if "?" in plain:  # a file by its version, say: nothing lies below it
        return keep_apart(url)
    user, query = secret
    with _LOCK:
        _put(host, _place(_lower_host(plain), (f"{user}@" if user else "") + (f"?{query}" if query else "")))
    return plain


def signs_for(host: str) -> bool:
    """Return whether this process has a signature or a signer for any href of a host."""
    if _GRANTS.get(host) or _PLACES.get(host):
        return True
    rule = store_of(f"https://{host}") or store_of(f"http://{host}")
    return rule is not None and rule.signer is not None


def signs_below(href: str) -> bool:
    """Return whether anything may be added to hrefs below this one before they are requested."""
    host, rule = host_of(href), rule_of(href)
    named = rule is not None and (rule.signer is not None or rule.access == "planetary-computer")
    return named or bool(_GRANTS.get(host) or _PLACES.get(host))


def signed_hosts(hrefs: Iterable[str]) -> tuple[str, ...]:
    """Return the hosts of those hrefs that arrived signed or have a signer here, sorted."""
    return tuple(sorted({host for href in hrefs if _has(host := host_of(href), href)}))


def lacking(hrefs: Iterable[str], hosts: Iterable[str]) -> tuple[str, ...]:
    """Return which hosts of signed hrefs this process cannot sign for, sorted.

    Parameters
    ----------
    hrefs
        As records hold them.
    hosts
        Where the hrefs arrived with signatures.
    """
    wanted = frozenset(hosts)
    return (
        tuple(sorted({h for href in hrefs if (h := host_of(href)) in wanted and not _has(h, href)}))
        if wanted
        else ()
    )


def check_signatures(hrefs: Iterable[str], hosts: Sequence[str]) -> None:
    """Raise PlanError where this process cannot sign hrefs that arrived signed.

    Parameters
    ----------
    hrefs, hosts
        As of :func:`lacking`.
    """
    if not hosts:
        return
    every = list(hrefs)
    missing = lacking(every, hosts)
    if missing:
        raise PlanError(
            f"reading from {', '.join(missing)}",
            "hrefs that arrived signed, and no signature in this process (what is stored holds none)",
            "a signer, or the signatures",
            f"Name a signer before reading: rd.sign('https://{missing[0]}', 'module:name'), or in the catalog that "
            "RASTERET_DASK_CATALOG names. Or build from signed items in this process. See docs/credentials.md.",
        )
    check_expired(every)


def check_expired(hrefs: Iterable[str]) -> None:
    """Raise PlanError where a signature that an href arrived with has expired."""
    for href in hrefs:
        ended = expired(href)
        if ended is not None:
            raise PlanError(
                f"reading from {host_of(href)}", f"a signature that expired at {ended:%Y-%m-%d %H:%M:%S} UTC",
                "one that holds", ANEW,
            )  # fmt: skip


def lacking_hosts(hosts: Iterable[str]) -> tuple[str, ...]:
    """Return the hosts for which this process has neither a signer nor any signature."""
    return tuple(host for host in hosts if not signs_for(host))


def is_ready_made(host: str) -> bool:
    """Return whether a host's hrefs are read by signatures that they arrived with, and by nothing that lasts."""
    return any(_place_of(host, href, rule_of(href)) is None for href in list(_GRANTS.get(host, {}))[:1])


def expired(href: str) -> datetime | None:
    """Return when the ready-made signature of an href ended; None where it has none, or one that still holds."""
    host = host_of(href)
    secret = _GRANTS.get(host, {}).get(href)
    end = None if secret is None else _expiry(secret[1])
    if end is None or end > datetime.now(UTC) or _place_of(host, href, rule_of(href)) is not None:
        return None  # a signer signs anew
    return end


def carried(hrefs: Iterable[str]) -> Carried:
    """Return what workers need to sign these hrefs: secrets, to be sent and never stored."""
    grants: dict[str, Secret] = {}
    places: dict[tuple[str, str], None] = {}
    for href in hrefs:
        host = host_of(href)
        if (place := _place_of(host, href, rule_of(href))) is not None:
            if place.name:
                places[place.prefix, place.name] = None
        elif (secret := _GRANTS.get(host, {}).get(href)) is not None:
            grants[href] = secret
    return grants, tuple(places)


def adopt(signatures: Carried) -> None:
    """Keep in this process what another one has :func:`carried` over."""
    grants, places = signatures
    for href, secret in grants.items():
        with _LOCK:
            _GRANTS.setdefault(host_of(href), {})[href] = _SHARED.setdefault(secret, secret)
    for place, name in places:
        there = any((p.prefix, p.name) == (place, name) for p in _PLACES.get(host_of(place), ()))
        if not there:
            with suppress(
                PlanError
            ):  # a signer that cannot be imported here: lacking_hosts tells, and what reads
                sign(place, name)


def rule_of(href: str) -> Store | None:
    """Return how the store of an absolute URL is accessed; None where no catalog says, or the href is signed."""
    url = urlsplit(href)
    if url.scheme.lower() not in ("s3", "http", "https") or bare(href) != href.partition("#")[0]:
        return None
    return store_of(f"{url.scheme}://{url.netloc}")


def host_of(href: str) -> str:
    """Return ``host`` or ``host:port`` of an href of http or https, in lower case; "" of any other."""
    parts = parts_of(href) if href[:4].lower() == "http" else None
    return parts[2].lower() if parts is not None and parts[0].lower() in ("http", "https") else ""


def _place_of(host: str, href: str, rule: Store | None) -> _Place | None:
    """Return who signs for an href: what the process was told, else what a catalog names."""
    places = _PLACES.get(host)
    if places:
        spelled = _lower_host(href)
        for place in places:
            if place.covers(spelled):
                return place
    if rule is None or rule.signer is None:
        return None
    key = (f"{href.partition('://')[0].lower()}://{host}", rule.signer)
    place_named = _NAMED.get(key)
    if place_named is None:
        with _LOCK:
            place_named = _NAMED.setdefault(key, _place(*key))
    return place_named


def _has(host: str, href: str) -> bool:
    return href in _GRANTS.get(host, {}) or _place_of(host, href, rule_of(href)) is not None


def _put(host: str, made: _Place) -> None:
    with _LOCK:
        others = [p for p in _PLACES.get(host, ()) if p.prefix != made.prefix]
        _PLACES[host] = tuple(sorted([*others, made], key=lambda p: -len(p.prefix)))


def _place(prefix: str, signer: Signer | str) -> _Place:
    if not isinstance(signer, str):
        if not callable(signer):
            raise PlanError(
                f"sign({prefix!r})",
                f"a {type(signer).__name__}",
                "'module:name', a callable, '?...' or 'user:password@'",
            )
        return _Place(prefix, "", signer)
    ready = re.fullmatch(r"(?:([^/?#]+)@)?(?:\?(.+))?", signer)
    if signer and ready is not None:
        return _Place(prefix, signer, lambda href: _added(_with(href, ready[1] or ""), ready[2] or ""))
    module, mark, name = signer.partition(":")
    if not mark or not re.fullmatch(r"[\w.]+", module) or not re.fullmatch(r"[\w.]+", name):
        raise PlanError(
            f"sign({prefix!r})",
            "a text of another form",
            "'module:name', a callable, '?...' or 'user:password@'",
        )
    try:
        call: object = importlib.import_module(module)
        for part in name.split("."):
            call = getattr(call, part)
    except (ImportError, AttributeError) as error:
        raise PlanError(
            f"sign({prefix!r})", f"no signer {signer!r} ({error})", "a function that this process can import",
            "Install its package here and on every worker.",
        ) from None  # fmt: skip
    if not callable(call):
        raise PlanError(f"sign({prefix!r})", f"{signer!r}, a {type(call).__name__}", "a function")
    return _Place(prefix, signer, call)


def _with(href: str, user: str) -> str:
    """Return an href with user information."""
    scheme, mark, rest = href.partition("://")
    return f"{scheme}{mark}{user}@{rest}" if user else href


def _added(href: str, query: str) -> str:
    return f"{href}{'&' if '?' in href else '?'}{query}" if query else href


def _container(href: str) -> tuple[str, str]:
    return account_of(host_of(href)), unquote(urlsplit(href).path).lstrip("/").partition("/")[0]


def _lower_host(href: str) -> str:
    scheme, _, rest = href.partition("://")
    host, mark, path = rest.partition("/")
    return f"{scheme.lower()}://{host.lower()}{mark}{path}"


def _ends_soon(url: str) -> bool:
    end = _expiry(urlsplit(url).query)
    return end is not None and end - datetime.now(UTC) < _FRESH


def _expiry(query: str) -> datetime | None:
    """Return when a signature ends, as its query tells: AWS's, Google's, Azure's, or ``Expires`` in seconds of Unix."""
    fields = {name.lower(): value for name, value in parse_qsl(query)}
    try:
        if "se" in fields and "sig" in fields:
            end = datetime.fromisoformat(fields["se"])
            return end if end.tzinfo is not None else end.replace(tzinfo=UTC)
        for scheme in ("x-amz", "x-goog"):
            if f"{scheme}-date" in fields and f"{scheme}-expires" in fields:
                start = datetime.strptime(fields[f"{scheme}-date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
                return start + timedelta(seconds=int(fields[f"{scheme}-expires"]))
        text = next((fields[name] for name in ("expires", "expiry", "exp") if name in fields), None)
        return None if text is None else datetime.fromtimestamp(int(text), UTC)
    except (ValueError, OverflowError, OSError):
        return None
