"""A real STAC API on loopback for tests: stac-fastapi over items in memory, which misbehaves as it is told."""

from __future__ import annotations

import datetime as dt
import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Lock, Thread
from typing import Any

import cql2
import numpy as np
import shapely
import uvicorn
from numpy.typing import NDArray
from stac_fastapi.api.app import StacApi
from stac_fastapi.api.models import create_get_request_model, create_post_request_model
from stac_fastapi.extensions import QueryExtension, SearchFilterExtension, TokenPaginationExtension
from stac_fastapi.types.config import ApiSettings
from stac_fastapi.types.core import BaseCoreClient
from stac_fastapi.types.errors import NotFoundError
from stac_fastapi.types.extension import ApiExtension
from stac_pydantic.shared import BBox
from starlette.responses import JSONResponse

__all__ = ["ApiFault", "StacServer", "changed", "generated", "serving_stac"]

Dict = dict[str, Any]
_COMPARE: Mapping[str, Callable[[Any, Any], bool]] = {
    "eq": lambda a, b: a == b,
    "neq": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "lte": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "gte": lambda a, b: a >= b,
    "in": lambda a, b: a in b,
    "startsWith": lambda a, b: str(a).startswith(b),
}


@dataclass(frozen=True, slots=True)
class ApiFault:
    """What goes wrong with searches. The fields can be combined."""

    status: int | None = None
    """Answered instead of a page, to the first ``times`` searches; None of them: to all."""
    times: int | None = None
    retry_after: str | None = None
    hang_s: float = 0.0
    """Waited before the answer, by the first ``times`` searches."""
    body: str | None = None
    """Answered with status 200 instead of a page."""
    most: int | None = None
    """Searches for more items a page are refused with status 400."""
    words: str = "limit must be less than or equal to {most}"
    """What that answer says."""
    change: Callable[[int, Dict], Dict] | None = None
    """Gets (number of the page from 0, page) and returns the page that is sent: its features and links."""


@dataclass
class _State:
    """What the server holds and has seen."""

    items: list[Dict]
    extensions: tuple[str, ...]
    page: int
    fault: ApiFault = ApiFault()
    log: list[Dict] = field(default_factory=list)
    searches: int = 0
    lock: Lock = field(default_factory=Lock)
    stopping: Event = field(default_factory=Event)
    known: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        texts = [None if i["geometry"] is None else json.dumps(i["geometry"]) for i in self.items]
        self.shapes: NDArray[Any] = shapely.from_geojson(texts)
        self.starts = [_instant(i, "start_datetime") for i in self.items]
        self.ends = [_instant(i, "end_datetime") for i in self.items]
        self.known.clear()


class _Core(BaseCoreClient):
    """Search, as the specification says it, over a list."""

    state: _State

    def all_collections(self, **kwargs: Any) -> Any:
        """Return every collection."""
        return {"collections": [_collection(c) for c in self._ids()], "links": []}

    def get_collection(self, collection_id: str, **kwargs: Any) -> Any:
        """Return one collection."""
        if collection_id not in self._ids():
            raise NotFoundError(f"no collection {collection_id}")
        return _collection(collection_id)

    def get_item(self, item_id: str, collection_id: str, **kwargs: Any) -> Any:
        """Return one item."""
        for item in self.state.items:
            if (item["id"], item["collection"]) == (item_id, collection_id):
                return item
        raise NotFoundError(f"no item {item_id}")

    def item_collection(
        self,
        collection_id: str,
        bbox: BBox | None = None,
        datetime: str | None = None,
        limit: int = 10,
        token: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return a page of one collection."""
        return self._answer({"collections": [collection_id]}, kwargs["request"], None)

    def post_search(self, search_request: Any, **kwargs: Any) -> Any:
        """Return a page."""
        asked = search_request.model_dump(mode="json", exclude_none=True, by_alias=True)
        if "filter_expr" in asked:
            asked["filter"] = asked.pop("filter_expr")
        return self._answer(asked, kwargs["request"], "POST")

    def get_search(
        self,
        collections: list[str] | None = None,
        ids: list[str] | None = None,
        bbox: BBox | None = None,
        intersects: Any = None,
        datetime: str | None = None,
        limit: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return a page."""
        asked = {"collections": collections, "ids": ids, "bbox": bbox, "datetime": datetime, "limit": limit}
        asked["filter"] = kwargs.get("filter_expr")
        asked["token"] = kwargs.get("token")
        if kwargs.get("query"):
            asked["query"] = json.loads(kwargs["query"])
        return self._answer({k: v for k, v in asked.items() if v is not None}, kwargs["request"], "GET")

    def _ids(self) -> list[str]:
        return sorted({i["collection"] for i in self.state.items})

    def _answer(self, asked: Dict, request: Any, method: str | None) -> JSONResponse:
        state, fault = self.state, self.state.fault
        with state.lock:
            state.log.append({**asked, "method": method})
            state.searches += 1
            attempt = state.searches
        first = fault.times is None or attempt <= fault.times
        if first and fault.hang_s:
            state.stopping.wait(fault.hang_s)
        if first and fault.status is not None:
            headers = {} if fault.retry_after is None else {"Retry-After": fault.retry_after}
            return JSONResponse({"description": "asked to refuse"}, fault.status, headers)
        if first and fault.body is not None:
            return JSONResponse(fault.body)
        if fault.most is not None and int(asked.get("limit") or 10) > fault.most:
            return JSONResponse({"code": "Bad", "description": fault.words.format(most=fault.most)}, 400)
        if not _is_cql2(asked.get("filter")):
            return JSONResponse({"description": "no CQL2"}, 400)
        at = int(asked.get("token") or 0)
        limit = min(int(asked.get("limit") or 10), state.page)
        found = self._found({k: v for k, v in asked.items() if k not in ("token", "limit")})
        page: Dict = {
            "type": "FeatureCollection",
            "features": [state.items[i] for i in found[at : at + limit]],
            "numberMatched": len(found),
            "links": [],
        }
        if at + limit < len(found):
            page["links"] = [self._next(request, method, asked, str(at + limit))]
        if fault.change is not None:
            page = fault.change(at // limit, page)
        return JSONResponse(page)

    def _next(self, request: Any, method: str | None, asked: Dict, token: str) -> Dict:
        url = request.url
        if method == "POST":
            body = {**asked, "token": token}
            return {"rel": "next", "href": str(url), "method": "POST", "body": body}
        return {"rel": "next", "href": str(url.include_query_params(token=token)), "method": "GET"}

    def _found(self, asked: Dict) -> list[int]:
        """Return the rows of a search, in the server's order; pages of one search share it."""
        state = self.state
        key = json.dumps(asked, sort_keys=True, default=str)
        if key not in state.known:
            state.known[key] = [i for i in self._candidates(asked) if self._matches(state.items[i], asked)]
        return state.known[key]

    def _candidates(self, asked: Dict) -> list[int]:
        state = self.state
        keep = np.ones(len(state.items), dtype=bool)
        box = asked.get("bbox")
        if box:
            west, south, east, north = box if len(box) == 4 else (box[0], box[1], box[3], box[4])
            area = shapely.box(west, south, east, north)
            if west > east:
                area = shapely.box(west, south, 180, north).union(shapely.box(-180, south, east, north))
            keep &= shapely.intersects(state.shapes, area)
        when = asked.get("datetime")
        if when:
            low, high = (None if p in ("", "..") else _time(p) for p in (when.split("/") * 2)[:2])
            keep &= np.array(
                [
                    (low is None or end >= low) and (high is None or start <= high)
                    for start, end in zip(state.starts, state.ends, strict=True)
                ],
                dtype=bool,
            )
        return [int(i) for i in np.flatnonzero(keep)]

    def _matches(self, item: Dict, asked: Dict) -> bool:
        if asked.get("collections") and item["collection"] not in asked["collections"]:
            return False
        if asked.get("ids") and item["id"] not in asked["ids"]:
            return False
        for name, tests in (asked.get("query") or {}).items():
            value = item["properties"].get(name)
            if value is None or not all(_COMPARE[op](value, wanted) for op, wanted in tests.items()):
                return False
        wanted = asked.get("filter")
        return wanted is None or bool(cql2.Expr(wanted).matches(item))


class StacServer:
    """A STAC API: landing page, conformance, collections, GET and POST search with paging.

    Parameters
    ----------
    items
        What it holds; their ``collection`` says which collections there are.
    extensions
        ``"query"`` and ``"filter"`` (CQL2), or none of them: then it neither declares nor honours them.
    page
        The largest page it gives.
    """

    def __init__(
        self, items: Sequence[Dict], extensions: Sequence[str] = ("query", "filter"), page: int = 250
    ) -> None:
        self._state = _State(list(items), tuple(extensions), page)
        own: list[ApiExtension] = [TokenPaginationExtension()]
        own += [QueryExtension()] if "query" in extensions else []
        own += [SearchFilterExtension()] if "filter" in extensions else []
        core = _Core(extensions=own)
        core.state = self._state
        settings = ApiSettings(
            stac_fastapi_title="test",
            stac_fastapi_description="test",
            stac_fastapi_landing_id="test",
            stac_fastapi_version="1",
        )
        api = StacApi(
            settings=settings,
            client=core,
            extensions=own,
            search_get_request_model=create_get_request_model(own),
            search_post_request_model=create_post_request_model(own),
            middlewares=[],
        )
        # named by its protocol, as asyncio sends small answers at once only there
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        """The API's root."""
        config = uvicorn.Config(
            api.app, log_level="critical", lifespan="off", ws="none", timeout_keep_alive=2
        )
        self._server = uvicorn.Server(config)
        self._thread = Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)

    @property
    def log(self) -> list[Dict]:
        """Every search as it was asked, its method with it."""
        with self._state.lock:
            return list(self._state.log)

    def forget(self) -> None:
        """Begin a new log."""
        with self._state.lock:
            self._state.log.clear()
            self._state.searches = 0

    def fault(self, fault: ApiFault) -> None:
        """Let searches go wrong from now on."""
        self.forget()
        self._state.fault = fault

    def hold(self, items: Sequence[Dict]) -> None:
        """Hold other items from now on."""
        with self._state.lock:
            self._state.items = list(items)
            self._state.__post_init__()

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()
        until = time.monotonic() + 600
        while not self._server.started:
            if time.monotonic() > until or not self._thread.is_alive():
                raise RuntimeError("the STAC API did not start")
            time.sleep(0.01)

    def stop(self) -> None:
        """Answer no more."""
        self._state.stopping.set()
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self._socket.close()


@contextmanager
def serving_stac(
    items: Sequence[Dict], extensions: Sequence[str] = ("query", "filter"), page: int = 250
) -> Iterator[StacServer]:
    """Serve items for the length of a block."""
    server = StacServer(items, extensions, page)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def generated(
    count: int,
    *,
    collection: str = "sentinel-2-l2a",
    href: str = "https://nowhere.invalid/{id}/{asset}.tif",
    assets: Sequence[str] = ("red", "nir"),
    columns: int = 40,
) -> list[Dict]:
    """Return items like those of Earth Search's Sentinel-2: tiles side by side, again every five days.

    Parameters
    ----------
    count
        How many.
    collection
        What they belong to.
    href
        Where their files are: a pattern of ``id`` and ``asset``.
    assets
        Keys of their assets.
    columns
        Tiles from west to east; 10 rows of them make one date.
    """
    return [_generated(n, collection, href, assets, columns) for n in range(count)]


def _generated(n: int, collection: str, href: str, assets: Sequence[str], columns: int) -> Dict:
    date, tile = divmod(n, columns * 10)
    row, column = divmod(tile, columns)
    when = dt.datetime(2024, 1, 1, 10, 30, tzinfo=dt.UTC) + dt.timedelta(days=5 * date, seconds=tile)
    west, south = 6 + 0.15 * column, 44 + 0.1 * row
    corners = [[west, south], [west + 0.2, south], [west + 0.2, south + 0.12], [west, south + 0.12]]
    grid = f"MGRS-32T{chr(65 + row)}{column:02d}"
    name = f"S2A_{grid[5:]}_{when:%Y%m%d}_0_L2A"
    east, north = 399960 + 109800 * (column % 4), 4900020 + 9000 * row
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "stac_extensions": [],
        "id": name,
        "collection": collection,
        "bbox": [west, south, west + 0.2, south + 0.12],
        "geometry": {"type": "Polygon", "coordinates": [[*corners, corners[0]]]},
        "properties": {
            "datetime": f"{when:%Y-%m-%dT%H:%M:%S}Z",
            "created": f"{when + dt.timedelta(hours=6):%Y-%m-%dT%H:%M:%S}Z",
            "updated": f"{when + dt.timedelta(hours=6):%Y-%m-%dT%H:%M:%S}Z",
            "platform": "sentinel-2a",
            "proj:epsg": 32632,
            "grid:code": grid,
            "eo:cloud_cover": (n * 37 % 1000) / 10,
            "s2:processing_baseline": "05.09",
            "s2:datatake_id": f"GS2A_{when:%Y%m%d}T103000_0{date:05d}_N05.09",
            "earthsearch:boa_offset_applied": True,
        },
        "links": [],
        "assets": {
            key: {
                "href": href.format(id=name, asset=key),
                "type": "image/tiff; application=geotiff; profile=cloud-optimized",
                "roles": ["data"],
                "proj:shape": [10980, 10980],
                "proj:transform": [10, 0, east, 0, -10, north],
                "raster:bands": [{"nodata": 0, "data_type": "uint16", "scale": 0.0001, "offset": -0.1}],
            }
            for key in assets
        },
    }


def changed(item: Dict, **properties: Any) -> Dict:
    """Return an item with other properties; ``id`` becomes its id, ``geometry`` and ``bbox`` its own."""
    top: Dict = {k: properties.pop(k) for k in ("id", "geometry", "bbox", "assets") if k in properties}
    return {**item, **top, "properties": {**item["properties"], **properties}}


def _is_cql2(text: Any) -> bool:
    try:
        if text is not None:
            cql2.parse_text(text) if isinstance(text, str) else cql2.parse_json(json.dumps(text)).validate()
    except (cql2.ParseError, cql2.ValidationError):
        return False
    return True


def _collection(name: str) -> Dict:
    world: Dict = {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}}
    return {
        "type": "Collection",
        "stac_version": "1.0.0",
        "id": name,
        "description": name,
        "license": "other",
        "extent": world,
        "links": [],
    }


def _instant(item: Dict, name: str) -> dt.datetime:
    return _time(item["properties"].get(name) or item["properties"]["datetime"])


def _time(text: str) -> dt.datetime:
    found = dt.datetime.fromisoformat(text)
    return found if found.tzinfo else found.replace(tzinfo=dt.UTC)
