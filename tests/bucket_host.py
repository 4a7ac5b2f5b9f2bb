"""An S3 server that notes what it is asked and goes wrong as it is told; run as a process, a host that has one.

``python bucket_host.py WORLD CONTROL BUCKET`` serves the folder WORLD over HTTP and a BUCKET over S3, until it ends.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from urllib.request import Request as HttpRequest
from urllib.request import urlopen

import pytest
from servers import RangeServer

__all__ = ["S3_PORT", "WEB_PORT", "Control", "Request", "Rule", "serving_bucket"]

S3_PORT, WEB_PORT = 9000, 8000
"""Of a process that has a network of its own."""

_KEY = re.compile(r"Credential=([^/]+)/")


@dataclass(frozen=True, slots=True)
class Rule:
    """What goes wrong with the requests for one store. The default is nothing."""

    after: int = 0
    """Nothing, before so many of its shards are done."""
    hold: bool = False
    """Puts of pixels are answered once there is another rule."""
    status: int = 0
    """Answered instead, ..."""
    code: str = ""
    """... with this code, ..."""
    key: str = ""
    """... where the request is signed by this key; empty: whoever signs it, ..."""
    methods: tuple[str, ...] = ("DELETE", "GET", "HEAD", "POST", "PUT")
    """... and is one of these."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as it was answered."""

    host: str
    """Address of who asks."""
    method: str
    store: str
    path: str
    """In the store."""
    status: int
    """0: it came in, and its answer is held back."""


class Control:
    """A folder by which a test and a bucket, of whatever process, understand each other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._log, self._rules = folder / "requests.jsonl", folder / "rules.json"
        self._lock = threading.Lock()

    def rules(self) -> dict[str, Rule]:
        """Return what goes wrong with which store."""
        if not self._rules.exists():
            return {}
        rules = json.loads(self._rules.read_text())
        return {store: Rule(**{**rule, "methods": tuple(rule["methods"])}) for store, rule in rules.items()}

    def rule(self, store: str, rule: Rule) -> None:
        """Say what goes wrong with a store from now on."""
        text = json.dumps({name: asdict(one) for name, one in {**self.rules(), store: rule}.items()})
        draft = self._rules.with_suffix(".draft")
        draft.write_text(text)
        draft.replace(self._rules)

    def note(self, request: Request) -> None:
        """Note a request, of whatever thread."""
        with self._lock, self._log.open("a") as file:
            file.write(json.dumps(asdict(request)) + "\n")

    def requests(self, store: str) -> list[Request]:
        """Return what was asked of a store so far."""
        if not self._log.exists():
            return []
        lines = self._log.read_text().splitlines(keepends=True)
        every = (Request(**json.loads(line)) for line in lines if line.endswith("\n"))
        return [request for request in every if request.store == store]

    def puts(self, store: str, below: str) -> list[Request]:
        """Return the puts of a store whose paths hold some text."""
        return [
            request for request in self.requests(store) if request.method == "PUT" and below in request.path
        ]

    def done(self, store: str) -> Counter[str]:
        """Return how often each shard was reported as written."""
        puts = self.puts(store, "_job/done/")
        return Counter(Path(put.path).stem for put in puts if put.status == 200)

    def tries(self, store: str) -> Counter[str]:
        """Return how often each shard was begun to be put."""
        return Counter(put.path.split("/")[2] for put in self.puts(store, "_job/tried/") if put.status == 200)

    def held(self, store: str) -> dict[str, str]:
        """Return the objects whose puts were held back -> the address that they came from."""
        return {put.path: put.host for put in self.puts(store, "") if put.status == 0}


class _Bucket:
    """A WSGI application: moto's, between notes and rules."""

    def __init__(self, control: Control) -> None:
        moto = pytest.importorskip("moto.server")
        self._app = moto.DomainDispatcherApplication(moto.create_backend_app)
        self._control = control
        self._done: Counter[str] = Counter()

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, host = environ["REQUEST_METHOD"], environ["REMOTE_ADDR"]
        prefix = parse_qs(environ["QUERY_STRING"]).get("prefix", [""])[0]
        _, _, below = environ["PATH_INFO"].lstrip("/").partition("/")
        store, _, path = (below or prefix).partition("/")

        def note(status: int) -> None:
            if method == "PUT" and path.startswith("_job/done/") and status == 200:
                self._done[store] += 1
            self._control.note(Request(host, method, store, path, status))

        if method == "PUT" and "pixels/c/" in path and self._rule(store).hold:
            note(0)
            while self._rule(store).hold:
                time.sleep(0.05)
        rule, signed = self._rule(store), _KEY.search(environ.get("HTTP_AUTHORIZATION", ""))
        if rule.status and method in rule.methods and rule.key in ("", signed[1] if signed else ""):
            note(rule.status)
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = f"<Error><Code>{rule.code}</Code></Error>".encode()
            start(f"{rule.status} Refused", [("Content-Length", str(len(body)))])
            return [body]

        def begin(status: str, *more: Any) -> Any:
            note(int(status[:3]))
            return start(status, *more)

        answer: Iterable[bytes] = self._app(environ, begin)
        return answer

    def _rule(self, store: str) -> Rule:
        rule = self._control.rules().get(store, Rule())
        return rule if self._done[store] >= rule.after else Rule()


@contextmanager
def serving_bucket(
    control: Control, bucket: str, address: tuple[str, int] = ("127.0.0.1", 0)
) -> Iterator[int]:
    """Serve a bucket for the length of a block, at the port that is returned."""
    serving = pytest.importorskip("werkzeug.serving")
    quiet = type("Quiet", (serving.WSGIRequestHandler,), {"log": lambda *_: None})
    server = serving.make_server(*address, _Bucket(control), threaded=True, request_handler=quiet)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with urlopen(HttpRequest(f"http://127.0.0.1:{server.server_port}/{bucket}", method="PUT")):
            pass
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main(world: str, control: str, bucket: str) -> None:
    """Serve until the process is ended."""
    web = RangeServer(Path(world), ("0.0.0.0", WEB_PORT))
    web.start()
    with serving_bucket(Control(Path(control)), bucket, ("0.0.0.0", S3_PORT)):
        Path(control, "ready").touch()
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
