"""A file server on loopback with latency that can be set and requests that are counted: Debian's nginx with Lua."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

PACKAGES = ("nginx-light", "libnginx-mod-http-lua", "lua-resty-core", "lua-resty-lrucache")
MODULES = Path("/usr/lib/nginx/modules")

_CONFIG = """
load_module {modules}/ndk_http_module.so;
load_module {modules}/ngx_http_lua_module.so;
{user}
worker_processes 2;
daemon off;
pid {home}/nginx.pid;
error_log {home}/error.log warn;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  log_format ranges '$request_uri $body_bytes_sent $http_range';
  sendfile on;
  tcp_nopush on;
  keepalive_requests 1000000;
  open_file_cache max=2000 inactive=60s;
  client_body_temp_path {home}/tmp; proxy_temp_path {home}/tmp; fastcgi_temp_path {home}/tmp;
  uwsgi_temp_path {home}/tmp; scgi_temp_path {home}/tmp;
  types {{ image/tiff tif; application/json json; }}
  lua_package_path "/usr/share/lua/5.1/?.lua;;";
  lua_shared_dict counts 1m;
  server {{
    listen 127.0.0.1:{port};
    root {root};
    location = /_latency {{ content_by_lua_block {{
      local args = ngx.req.get_uri_args()
      ngx.shared.counts:set("low", tonumber(args.low)); ngx.shared.counts:set("high", tonumber(args.high))
      ngx.say("ok") }} }}
    location = /_reset {{ content_by_lua_block {{
      for _, key in ipairs({{"requests", "bytes", "errors"}}) do ngx.shared.counts:set(key, 0) end
      ngx.say("ok") }} }}
    location = /_counts {{ content_by_lua_block {{
      local c = ngx.shared.counts
      ngx.say((c:get("requests") or 0), " ", (c:get("bytes") or 0), " ", (c:get("errors") or 0)) }} }}
    rewrite ^/copy[0-9]+/(.*)$ /$1;
    location / {{
      access_log {home}/ranges.log ranges;
      access_by_lua_block {{
        local low, high = ngx.shared.counts:get("low") or 0, ngx.shared.counts:get("high") or 0
        if high > 0 then ngx.sleep((low + (high - low) * math.random()) / 1000) end }}
      log_by_lua_block {{
        local c = ngx.shared.counts
        c:incr("requests", 1, 0)
        c:incr("bytes", tonumber(ngx.var.body_bytes_sent) or 0, 0)
        if ngx.status >= 400 then c:incr("errors", 1, 0) end }}
    }}
  }}
}}
"""


@dataclass(frozen=True)
class Served:
    """What the server has answered since it was last reset."""

    requests: int
    nbytes: int
    """Of bodies."""
    errors: int
    """Answers of 400 and above, among them lookups of files that are not there."""
    distinct: int
    """Of bodies, each byte of a file counted once."""


class Nginx:
    """Serves a folder while it is open.

    Parameters
    ----------
    root
        The folder. ``/copy<n>/path`` is answered as ``/path``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self.url = ""

    def __enter__(self) -> Nginx:
        install()
        self._home = Path(tempfile.mkdtemp(prefix="rasteret-dask-nginx-"))
        os.chmod(self._home, 0o755)
        self._log = self._home / "ranges.log"
        (self._home / "tmp").mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        user = "user root;" if os.geteuid() == 0 else ""
        config = self._home / "nginx.conf"
        config.write_text(
            _CONFIG.format(modules=MODULES, home=self._home, root=self.root, port=port, user=user)
        )
        self._process = subprocess.Popen([_nginx(), "-p", str(self._home), "-c", str(config)])
        self.url = f"http://127.0.0.1:{port}"
        try:
            self._wait()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(10)
        shutil.rmtree(self._home, ignore_errors=True)

    def latency(self, low_ms: float, high_ms: float) -> None:
        """Delay every answer's first byte by a random time between the two, milliseconds."""
        self._get(f"/_latency?low={low_ms}&high={high_ms}")

    def reset(self) -> None:
        """Count from zero."""
        self._get("/_reset")
        self._log.write_text("")  # nginx appends

    def served(self) -> Served:
        """Return the counts since the last reset."""
        requests, nbytes, errors = (int(n) for n in self._get("/_counts").split())
        return Served(requests, nbytes, errors, distinct(self._log.read_text()))

    def _get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=10) as answer:
            return str(answer.read().decode())

    def _wait(self) -> None:
        end = time.monotonic() + 10
        while True:
            try:
                self.reset()
                return
            except urllib.error.URLError as error:
                if self._process.poll() is not None or time.monotonic() > end:
                    log = self._home / "error.log"
                    said = log.read_text() if log.exists() else ""
                    raise SystemExit(f"nginx did not start on {self.url}: {said}") from error
                time.sleep(0.02)


def distinct(log: str) -> int:
    """Return how many bytes a log of ``path sent range`` tells of, each byte of a file counted once."""
    spans: dict[str, list[tuple[int, int]]] = {}
    for line in log.splitlines():
        path, sent, asked = line.split(" ", 2)
        first = asked.removeprefix("bytes=").split("-")[0]
        start = int(first) if first.isdigit() else 0
        spans.setdefault(path, []).append((start, start + int(sent)))
    total = 0
    for ranges in spans.values():
        end = 0
        for start, stop in sorted(ranges):
            total += max(stop - max(start, end), 0)
            end = max(end, stop)
    return total


def install() -> None:
    """Install nginx and its Lua module with apt-get where they are missing.

    Raises
    ------
    SystemExit
        Where that takes rights or a system that are not there.
    """
    if _nginx() and (MODULES / "ngx_http_lua_module.so").exists():
        return
    command = f"apt-get install --no-install-recommends {' '.join(PACKAGES)}"
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise SystemExit(
            f"The benchmark serves its files with nginx and its Lua module. On Debian:\n  {command}"
        )
    quiet = {"env": {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}, "stdout": subprocess.DEVNULL}
    subprocess.run(["apt-get", "update", "-qq"], check=True, **quiet)  # type: ignore[call-overload]
    subprocess.run([*command.split(), "-y", "-qq"], check=True, **quiet)  # type: ignore[call-overload]


def _nginx() -> str:
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin") or ""
