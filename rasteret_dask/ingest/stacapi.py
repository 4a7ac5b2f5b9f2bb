# SPDX-License-Identifier: Apache-2.0
"""The pages of items that a STAC API answers a search with.

It imports pystac_client, and with that JSON Schema and its grammars: half a second that only a search is worth.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any
from urllib.parse import urlsplit

from pystac import STACError
from pystac_client import Client
from pystac_client.errors import ClientTypeError
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from requests import Request
from requests.exceptions import RequestException

from rasteret_dask.errors import RasteretDaskError, SourceError
from rasteret_dask.ingest.search import Search, conditions, fits
from rasteret_dask.net import remote
from rasteret_dask.net.answers import BrokenError, RefusedError
from rasteret_dask.net.gate import ThrottledError
from rasteret_dask.net.remote import public, redact
from rasteret_dask.net.trust import checked

__all__ = ["ItemPage", "pages"]

READ_S = 60.0
"""Seconds without a byte: a search may take a while to begin its answer."""
PAGE = 250
"""Items a page: what public APIs give readily. One that refuses so many is asked for fewer."""

_OTHER_JSON = (ValueError, KeyError, TypeError, AttributeError)  # what pystac makes of JSON that is no STAC
_OVER_LIMIT = (400, 413, 422)
_PASSING = (408, 425, 429, 500, 502, 503, 504)
_SAME_PAGES = 3


@dataclass(frozen=True, slots=True)
class ItemPage:
    """Some items, as an API sent them."""

    items: tuple[Any, ...]
    matched: int | None
    """Items of the whole search, as far as the API says."""


def pages(search: Search, most: int | None = None) -> Iterator[ItemPage]:
    """Yield the pages of a search, each when it is asked for.

    Parameters
    ----------
    search
        What is asked for. A query that the API does not know how to answer is answered here, on its items.
    most
        Items that are needed, so that pages are not larger.

    Notes
    -----
    Items stand on two pages where they move while the pages are read, and where they lie in both halves of a box
    across the antimeridian. The end of the range is sent as it is, and APIs include it: look at the items' times.

    Raises
    ------
    SourceError
        When the API does not answer, answers nonsense, links its pages in a circle, does not have the collection,
        or cannot filter.
    """
    client, io = _open(search)
    if search.query is not None:
        conditions(
            search.query, search.subject
        )  # an operator that nobody knows is told before anything is asked
    sent = json.loads(search.query) if search.query and client.conforms_to("QUERY") else None
    _check_filter(client, search)
    limit = PAGE if most is None else max(1, min(PAGE, most))
    empty = True
    for box in search.boxes or (None,):
        first: dict[str, Any] | None = None
        while True:
            io.begin()
            walk = client.search(
                # text of CQL2 goes into a GET: POST takes JSON only
                method="GET" if search.filter is not None and _json(search.filter) is None else "POST",
                collections=[search.collection],
                bbox=None if box is None else list(box),
                datetime=_window(search.span),
                query=sent,
                filter=None if search.filter is None else _json(search.filter) or search.filter,
                filter_lang=None if search.filter is None else _language(search.filter),
                limit=limit,
            ).pages_as_dicts()
            try:
                first = _next(search, walk)
                break
            except APIError as error:
                fewer = _fewer(error, limit)
                if fewer is None:
                    raise _failure(search, error) from None
                limit = fewer
        for page in _guarded(search, first, walk):
            empty = False
            items = tuple(page["features"])
            if sent is None:
                items = tuple(i for i in items if fits(i, search.query, search.subject))
            yield ItemPage(items, _matched(page))
    if empty:
        _check_collection(client, search)


def _open(search: Search) -> tuple[Client, _Io]:
    if urlsplit(search.api).scheme not in ("http", "https"):
        raise SourceError(
            search.subject,
            f"{public(search.api)!r}",
            "the http(s) root of a STAC API",
            "Static catalogs and files are read by build_from_stac(path or URL, ...).",
        )
    io = _Io(search)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing conformance classes, which is told below
            client = Client.open(search.api, stac_io=io)
    except APIError as error:
        raise _failure(search, error) from None
    except RasteretDaskError:
        raise
    except (ClientTypeError, STACError, *_OTHER_JSON) as error:
        raise SourceError(
            search.subject, f"an answer that is no STAC: {redact(str(error))[:200]}", "a STAC API"
        ) from None
    if not client.conforms_to("ITEM_SEARCH"):
        raise SourceError(
            search.subject,
            "a catalog that says nothing of item search",
            "the root of a STAC API",
            "If it is a static catalog, read it by build_from_stac(its URL, name=...).",
        )
    return client, io


class _Io(StacApiIO):
    """Requests with patience, that never asks for the same page twice."""

    def __init__(self, search: Search) -> None:
        super().__init__(max_retries=None)
        self.search = search
        self._asked: set[str] = set()

    def begin(self) -> None:
        """Begin another search: its first page may be like another's."""
        self._asked.clear()

    def request(
        self,
        href: str,
        method: str | None = None,
        headers: dict[str, str] | None = None,
        parameters: dict[str, Any] | None = None,
    ) -> str:
        """Return the text of an answer; pages link to where they like, so their links are looked at."""
        checked(href, local=False, subject=f"{self.search.subject}, a link of its pages")
        key = json.dumps([href, method, parameters], sort_keys=True, default=str)
        if key in self._asked:
            raise SourceError(
                self.search.subject,
                f"pages that link in a circle (after {len(self._asked)} of them)",
                "a next page that was not read before",
                "Report it to who runs the API, or narrow the search.",
            )
        self._asked.add(key)
        verb, given = (method or "GET").upper(), parameters or {}
        asked = Request(
            verb,
            href,
            headers,
            params=None if verb == "POST" else given,
            json=given if verb == "POST" else None,
        )
        try:
            ready = self.session.prepare_request(asked)  # netrc's password too
            sent = {name: str(value) for name, value in ready.headers.items()}
            body = json.dumps(given).encode() if verb == "POST" else None
            return remote.request(str(ready.url), verb, sent, body, READ_S).body.decode()
        except RefusedError as error:
            raise _api_error(error.text, error.status) from None
        except ThrottledError as error:
            raise _api_error(error.text, 429 if "429" in error.text else 503) from None
        except (BrokenError, RequestException, UnicodeError) as error:
            raise _api_error(error.text if isinstance(error, BrokenError) else str(error), None) from None

    def read_json(self, source: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return an answer that is a JSON object."""
        text = self.read_text(source, *args, **kwargs)
        try:
            answer = json.loads(text)
        except ValueError as error:
            raise SourceError(self.search.subject, f"no JSON: {error}", "an answer of a STAC API") from None
        if not isinstance(answer, dict) or not isinstance(answer.get("features", []), list):
            raise SourceError(
                self.search.subject, f"a JSON {type(answer).__name__}", "a page: an object with features"
            )
        return answer


def _api_error(text: str, status: int | None) -> APIError:
    error = APIError(text)
    error.status_code = status
    return error


def _fewer(error: APIError, limit: int) -> int | None:
    """Return how many items a page an API may give that refuses ``limit``; None where it refuses something else."""
    if error.status_code not in _OVER_LIMIT or limit == 1:
        return None
    text = re.sub(r"^status \d+", "", str(error))
    if not re.search(r"limit|page.?size|too many (items|results)", text, re.IGNORECASE):
        return None
    told = [n for n in map(int, re.findall(r"\d{1,6}", text)) if limit // 10 <= n < limit]
    return max(told, default=limit // 2) or 1


def _next(search: Search, walk: Iterator[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the next page, None behind the last.

    Raises
    ------
    APIError
        When the API refuses.
    SourceError
        When its answer is no page.
    """
    try:
        return next(walk, None)
    except (APIError, RasteretDaskError):
        raise
    except _OTHER_JSON as error:
        raise SourceError(
            search.subject, f"a page whose links cannot be read ({error!r})"[:200], "a STAC API"
        ) from None


def _guarded(
    search: Search, page: dict[str, Any] | None, walk: Iterator[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Yield the first page of a search and those that follow, as long as they bring something new."""
    seen: set[int] = set()
    stale = 0
    while True:
        if page is None:
            return
        names = {hash(str(i.get("id")) if isinstance(i, Mapping) else repr(i)) for i in page["features"]}
        stale = 0 if names - seen else stale + 1
        seen |= names
        if stale >= _SAME_PAGES:
            raise SourceError(
                search.subject,
                f"{stale} pages with only items that came before, and a link to a further one",
                "pages that come to an end",
                "Report it to who runs the API, or narrow the search.",
            )
        yield page
        try:
            page = _next(search, walk)
        except APIError as error:
            raise _failure(search, error) from None


def _failure(search: Search, error: APIError) -> SourceError:
    status = getattr(error, "status_code", None)
    text = " ".join(redact(str(error)).split())[:300] or type(error).__name__
    if status in _PASSING:
        remedy = "It was asked several times: try again later, or ask for less at a time."
    elif status is None:
        remedy = "Is the network there, and the address right?"
    elif status in (401, 403):
        remedy = "It wants credentials."
    else:
        remedy = "Look at bbox, dates, query and filter."
    told = f"HTTP {status}: {text}" if status is not None else f"no answer: {text}"
    return SourceError(search.subject, told, "an answer of a STAC API", remedy)


def _check_filter(client: Client, search: Search) -> None:
    # an API without the class answers with no items at all, or with all of them, and does not say so
    if search.filter is not None and not client.conforms_to("FILTER"):
        raise SourceError(
            search.subject,
            "an API that does not say it can filter by CQL2",
            "the conformance class item-search#filter",
            "Use query=, or choose records after the build: collection.subset(...) or .where(...).",
        )


def _check_collection(client: Client, search: Search) -> None:
    """Raise SourceError where nothing was found because there is no such collection."""
    try:
        names = [c.id for c in client.get_collections()]
    except (APIError, SourceError, KeyError, ValueError, TypeError, AttributeError, NotImplementedError):
        return  # it has no list of them, so nothing can be said
    if not names or search.collection in names:
        return
    near = get_close_matches(search.collection, names, n=3)
    raise SourceError(
        search.subject,
        "no such collection",
        f"one of {', '.join(names[:20])}" + (", ..." if len(names) > 20 else ""),
        f"Did you mean {', '.join(near)}?" if near else "",
    )


def _matched(page: Mapping[str, Any]) -> int | None:
    context = page.get("context")
    told = context.get("matched") if isinstance(context, Mapping) else None
    told = page.get("numberMatched", told)
    return told if isinstance(told, int) and told >= 0 else None


def _window(span: tuple[str | None, str | None]) -> str | None:
    if span == (None, None):
        return None
    return "/".join(".." if part is None else part.replace("+00:00", "Z") for part in span)


def _json(text: str) -> Any:
    """Return the object that a text is the JSON of, None where it is none."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _language(text: str) -> str:
    return "cql2-text" if _json(text) is None else "cql2-json"
