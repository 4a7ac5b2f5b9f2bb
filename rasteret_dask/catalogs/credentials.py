# SPDX-License-Identifier: Apache-2.0
"""What of an href identifies the file, and what is a credential: stored hrefs hold only the first."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import quote, unquote, unquote_plus

__all__ = ["Secret", "bare", "cleaned", "is_credential", "parts_of", "split", "without_credentials"]

Secret = tuple[str, str]
"""What an href has beside its bare form: (user information, the whole query string)."""

_NAMES = (
    "accesskey", "accesskeyid", "accesstoken", "apikey", "appid", "appkey", "appsecret", "auth", "authkey",
    "authorization", "authtoken", "awsaccesskeyid", "bearer", "clientid", "clientsecret", "credential",
    "credentials", "edgeauth", "googleaccessid", "hdnea", "hdntl", "hdnts", "hmac", "idtoken", "jsessionid",
    "jwt", "keypairid", "ossaccesskeyid", "passphrase", "passwd", "password", "phpsessid", "pwd", "secret",
    "session", "sessionid", "sessiontoken", "sid", "sig", "sign", "signature", "subscriptionkey", "ticket",
    "token", "verify",
)  # fmt: skip
"""Parameters that are credentials, whatever else a query holds; names without ``-``, ``_``, ``.``, in lower case."""

_ENDINGS = (
    "accesskey", "accesskeyid", "accesstoken", "apikey", "authtoken", "credential", "password", "secret", "secretkey",
    "securitytoken", "sessiontoken", "signature", "subscriptionkey", "token",
)  # fmt: skip
"""Endings of further names: ``x-ms-token``, ``my_secret``."""

_PREFIXES = (
    "x-amz-", "x-goog-", "x-oss-", "x-cos-", "x-obs-", "x-ms-", "q-sign", "q-ak", "q-key-", "q-header-", "q-url-",
)  # fmt: skip
"""Schemes whose parameters all have one prefix: AWS, Google, Alibaba, Tencent and Huawei clouds."""

_WITH_SIGNATURE = (
    "algorithm", "exp", "expire", "expires", "expiresin", "expiry", "hashalgorithm", "keyname", "policy",
    "urlprefix", "user", "username", "xid",
)  # fmt: skip
"""Parameters that go where a credential goes: they say until when, for whom or what it holds."""

_WITH_SAS = (
    "epk", "erk", "rscc", "rscd", "rsce", "rscl", "rsct", "saoid", "scid", "sdd", "sduoid", "se", "ses", "si",
    "sip", "skdutid", "ske", "skoid", "sks", "skt", "sktid", "skv", "sp", "spk", "spr", "sr", "srk", "srt",
    "ss", "st", "suoid", "sv", "tn",
)  # fmt: skip
"""The other parameters of an Azure shared access signature, which go with its ``sig``."""

_MAYBE = ("key", "code", "k")
"""Parameters that are a credential where their value reads as one; as a name, a path or a version it does not."""

_KEY = re.compile(r"AIza[\w-]+|[A-Za-z0-9+=~-]{16,}")  # Google's keys, and other long texts in one piece

_MOST_DEEP = 3  # URLs in URLs


def is_credential(name: str, value: str = "") -> bool:
    """Return whether a parameter of a query string is a credential, by itself.

    Parameters
    ----------
    name, value
        Percent-encoded, as they stand in the URL.
    """
    lower = unquote_plus(name).strip().lower()
    plain = re.sub(r"[-_.\s\[\]]", "", lower)
    if plain in _NAMES or plain.endswith(_ENDINGS) or lower.startswith(_PREFIXES):
        return True
    return plain in _MAYBE and bool(_KEY.fullmatch(unquote(value)))


def parts_of(href: str) -> tuple[str, str, str, str, str, str] | None:
    """Return (scheme, user information, host, path, query, fragment) of a remote href, as it is spelled.

    None for local paths and ``file://``. Nothing is decoded or brought into another form: what is stored is what the
    catalog published.
    """
    scheme, mark, rest = href.partition("://")
    if not mark or len(scheme) < 2 or scheme.strip().lower() == "file":
        return None
    end = min((at for c in "/?#\\" if (at := rest.find(c)) >= 0), default=len(rest))
    authority, rest = rest[:end], rest[end:]
    if "@" not in authority and "@" in rest and not re.fullmatch(r"[^:]*(:\d*)?|\[.*\](:\d*)?", authority):
        secret, _, whole = f"{authority}{rest}".rpartition("@")  # a password with an unescaped slash
        end = min((at for c in "/?#\\" if (at := whole.find(c)) >= 0), default=len(whole))
        user, host, rest = secret, whole[:end], whole[end:]
    else:
        user, _, host = authority.rpartition("@")
    rest, _, fragment = rest.partition("#")
    path, _, query = rest.partition("?")
    return scheme, user, host, path, query, fragment


def split(href: str) -> tuple[str, Secret | None]:
    """Return an href without its credentials, and those; None where it has none.

    Parameters
    ----------
    href
        As a catalog publishes it: signed or not.

    Returns
    -------
    tuple
        The href with what identifies the file: no user information, no fragment (servers never see it), of the query
        only what is no credential. An href without credentials is returned as it is, local paths always.

    Notes
    -----
    Where a query holds a credential, the parameters that belong to it go too: all of a shared access signature, expiry
    times, policies. Parameters that say which file is meant stay: ``versionId``, ``v``, ``path``.
    """
    return _split(href, _MOST_DEEP)


def bare(href: str) -> str:
    """Return an href without its credentials: see :func:`split`."""
    return split(href)[0]


def without_credentials(text: str) -> str:
    """Return text, plain or JSON, with every URL in it bare."""
    if "://" not in text:
        return text
    if text[:1] in "{[":
        try:
            values = json.loads(text)
        except ValueError:  # it only begins like JSON, as a table of TOML does
            return _bare_urls(text)
        clean = cleaned(values)
        return text if clean == values else json.dumps(clean)
    return _bare_urls(text)


def _bare_urls(text: str) -> str:
    return _URL.sub(lambda match: bare(match[0]), text)


def cleaned(value: Any) -> Any:
    """Return a value of JSON with every URL in its texts bare."""
    match value:
        case str():
            return without_credentials(value)
        case dict():
            return {key: cleaned(one) for key, one in value.items()}
        case list() | tuple():
            return type(value)(cleaned(one) for one in value)
    return value


_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://[^\s\"'<>\\{}|^`]+")


def _split(href: str, deep: int) -> tuple[str, Secret | None]:
    parts = parts_of(href)
    if parts is None:
        return href, None
    scheme, user, host, path, query, fragment = parts
    kept = _kept(query, deep)
    if not user and kept == query:
        return (href.partition("#")[0] if fragment or href.endswith("#") else href), None
    return f"{scheme}://{host}{path}{'?' if kept else ''}{kept}", (user, query)


def _kept(query: str, deep: int) -> str:
    """Return the part of a query that identifies the file."""
    if not query:
        return query
    pairs = [pair.partition("=") for pair in re.split("&|;(?=[^&;=]+=)", query)]
    guilty = [is_credential(name, value) for name, _, value in pairs]
    gone: tuple[str, ...] = _WITH_SIGNATURE if any(guilty) else ()
    if any(secret and _plain(name) == "sig" for (name, _, _), secret in zip(pairs, guilty, strict=True)):
        gone = (*gone, *_WITH_SAS)
    kept = [
        f"{name}{mark}{_inner(value, deep)}"
        for (name, mark, value), secret in zip(pairs, guilty, strict=True)
        if not secret and _plain(name) not in gone
    ]
    return query if kept == [f"{n}{m}{v}" for n, m, v in pairs] else "&".join(kept)


def _plain(name: str) -> str:
    return re.sub(r"[-_.\s\[\]]", "", unquote_plus(name).lower())


def _inner(value: str, deep: int) -> str:
    """Return a value without the credentials of a URL that it is: a proxy's or a download service's."""
    text = unquote(value)
    if deep < 1 or "://" not in text:
        return value
    inside = _split(text, deep - 1)[0]
    return value if inside == text else quote(inside, safe="")
