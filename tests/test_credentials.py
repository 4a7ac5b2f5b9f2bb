"""What of an href is a credential: laws for drawn hrefs of every scheme."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rasteret_dask.catalogs.credentials import bare, cleaned, split, without_credentials

Pairs = list[tuple[str, str]]

SECRET = st.text("abcdefghijkXYZ0123456789", min_size=10, max_size=40).map(lambda text: f"geheim{text}")
"""What must be nowhere afterwards."""


def azure(secret: str) -> Pairs:
    return [
        ("sv", "2024-05-04"), ("ss", "b"), ("srt", "co"), ("sp", "rl"), ("se", "2026-01-01T00%3A00%3A00Z"),
        ("skoid", f"{secret}-oid"), ("sig", f"{secret}%2B%2F%3D"),
    ]  # fmt: skip


def aws(secret: str) -> Pairs:
    return [
        ("X-Amz-Algorithm", "AWS4-HMAC-SHA256"), ("X-Amz-Credential", f"AKIA{secret}%2F20260101%2Fus-west-2%2Fs3"),
        ("X-Amz-Date", "20260101T000000Z"), ("X-Amz-Expires", "3600"), ("X-Amz-SignedHeaders", "host"),
        ("X-Amz-Security-Token", secret), ("X-Amz-Signature", secret),
    ]  # fmt: skip


def aws_2(secret: str) -> Pairs:
    return [("AWSAccessKeyId", f"AKIA{secret}"), ("Expires", "1893456000"), ("Signature", f"{secret}%3D")]


def google(secret: str) -> Pairs:
    return [("x-goog-date", "20260101T000000Z"), ("X-Goog-Credential", secret), ("X-Goog-Signature", secret)]


def cloudfront(secret: str) -> Pairs:
    return [
        ("Expires", "1893456000"),
        ("Policy", secret),
        ("Signature", f"{secret}__"),
        ("Key-Pair-Id", secret),
    ]


def tencent(secret: str) -> Pairs:
    return [("q-sign-algorithm", "sha1"), ("q-ak", secret), ("q-key-time", "1;2"), ("q-signature", secret)]


def alone(name: str) -> Any:
    return lambda secret: [(name, secret)]


SCHEMES = [
    azure, aws, aws_2, google, cloudfront, tencent,
    *map(alone, [
        "token", "access_token", "api_key", "apikey", "api-key", "subscription-key", "Ocp-Apim-Subscription-Key",
        "TOKEN", "sas_token", "auth", "Authorization", "password", "my_secret", "x-ms-token", "hdnts", "jwt", "t%6Fken",
        "key", "OSSAccessKeyId", "security-token",
    ]),
]  # fmt: skip
KEPT = [
    ("versionId", "3HL4kqtJ"), ("v", "2"), ("path", "%2Fdata%2Fa.tif"), ("file", "a.tif"), ("band", "B04"),
    ("key", "a/b.tif"), ("code", "S2A"), ("id", "17"), ("sr", "1"), ("format", "image%2Ftiff"), ("year", "2024"),
]  # fmt: skip
hosts = st.sampled_from(["data.example.com", "127.0.0.1:8080", "acct.blob.core.windows.net", "[::1]:90"])
paths = st.sampled_from(["/a.tif", "/box/a%20b.tif", "/x/y@2x.tif", "/", ""])
# "sr" belongs to a shared access signature where there is one
kept = st.lists(st.sampled_from([pair for pair in KEPT if pair[0] != "sr"]), max_size=3, unique=True)


def url(scheme: str, user: str, host: str, path: str, pairs: Pairs) -> str:
    query = "&".join(f"{name}={value}" for name, value in pairs)
    return f"{scheme}://{user}{host}{path}{'?' if query else ''}{query}"


@given(
    st.sampled_from(["https", "http", "s3", "HTTPS"]), hosts, paths, kept, st.sampled_from(SCHEMES),
    st.tuples(SECRET, SECRET), st.data(),
)  # fmt: skip
def test_one_file_has_one_bare_href_whatever_it_was_signed_by(
    scheme: str, host: str, path: str, plain: Pairs, sign: Any, secrets: tuple[str, str], data: st.DataObject
) -> None:
    expected = url(scheme, "", host, path, plain)
    assert bare(expected) == expected
    for secret in secrets:
        mixed = list(plain)
        for pair in sign(secret):
            mixed.insert(data.draw(st.integers(0, len(mixed))), pair)
        user = data.draw(st.sampled_from(["", f"me:{secret}@", f"{secret}@"]))
        found = bare(
            url(scheme, user, host, path, mixed) + data.draw(st.sampled_from(["", "#", f"#{secret}"]))
        )
        assert found == expected


PIECES = ["sig=", "token", "&", "?", "://", "@", "a", "=", "http", "%3A%2F%2F", "#", "/", ":", ";"]


@given(st.text("ab:/@?#&;=%.[]\\ \n~+-_", max_size=40) | st.lists(st.sampled_from(PIECES)).map("".join))
def test_what_is_bare_stays_so(text: str) -> None:
    for href in (text, f"https://{text}", f"https://h/{text}"):
        assert bare(bare(href)) == bare(href)


@given(st.text(max_size=30).filter(lambda text: "://" not in text))
def test_local_paths_stay_as_they_are(path: str) -> None:
    for href in (path, f"/data/{path}?sig=1#token=2", f"file:///data/{path}?sig=1"):
        assert split(href) == (href, None)


@given(SECRET, st.sampled_from(SCHEMES))
def test_texts_and_json_lose_the_credentials_of_their_urls(secret: str, sign: Any) -> None:
    href = url("https", f"u:{secret}@", "h.example", "/é/a.tif", [*sign(secret), ("v", "2")])
    inner = url("https", "", "h.example", "/a.tif", sign(secret))
    proxy = f"https://tiles.example/cog?url={quote(inner, safe='')}&v=2"
    assert bare(proxy) == f"https://tiles.example/cog?url={quote('https://h.example/a.tif', safe='')}&v=2"
    for text in (
        f"see {href}, or <{proxy}>",
        json.dumps({"a": [{"b": href}, 1], "c": None}),
        json.dumps([href]),
    ):
        clean = without_credentials(text)
        assert secret not in clean
        assert "v=2" in clean
        assert without_credentials(clean) == clean
    assert cleaned({"a": (href, 1.5, None)}) == {"a": ("https://h.example/é/a.tif?v=2", 1.5, None)}


@pytest.mark.parametrize(
    ("href", "expected"),
    [
        ("https://u:p/w@h/a.tif", "https://h/a.tif"),  # a password that nobody has escaped
        ("https://h/a.tif?sr=1&st=2", "https://h/a.tif?sr=1&st=2"),  # no signature that these belong to
        ("https://h/get?key=collections/a.tif", "https://h/get?key=collections/a.tif"),
        ("https://h/get?key=0123456789abcdef0123", "https://h/get"),
        ("https://h/a.tif#access_token=x", "https://h/a.tif"),
        ("https://h/a.tif?a=1;token=x", "https://h/a.tif?a=1"),
        ("s3://AKIA:secret@bucket/a.tif", "s3://bucket/a.tif"),
        ("https://h/a.tif?", "https://h/a.tif?"),
    ],
)
def test_what_stays_of_some_hrefs(href: str, expected: str) -> None:
    assert bare(href) == expected
