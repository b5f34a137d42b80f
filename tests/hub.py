"""A Hugging Face Hub on this machine: serves folders over HTTP, for tests without a network.

Implements what huggingface_hub requests (https://huggingface.co/docs/hub/api): model info, the file tree of a revision,
and files under `resolve/` with the headers ETag, X-Repo-Commit and X-Error-Code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

NOWHERE = "http://127.0.0.1:9"
"""Port 9 (discard), where connections are refused."""

Files = dict[str, bytes]


class Hub:
    """A server at `url`. `publish` adds a repository; `log` holds every request as (method, path)."""

    def __init__(self) -> None:
        self.refs: dict[str, dict[str, str]] = {}
        self.commits: dict[tuple[str, str], Files] = {}
        self.gated: set[str] = set()
        self.log: list[tuple[str, str]] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()

    def publish(self, repo: str, folder: Path, branch: str = "main") -> str:
        """Commit the files of `folder`, and return the commit id, which depends on their contents."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        commit = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[repo, commit] = files
        self.refs.setdefault(repo, {})[branch] = commit
        return commit

    @property
    def downloads(self) -> set[str]:
        """Names of the files that were downloaded."""
        return {path.split("/", 5)[5] for method, path in self.log if method == "GET" and "/resolve/" in path}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def point_client_at(url: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make huggingface_hub use `url` and `cache`, in this process and in its children."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)


@contextmanager
def running(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a Hub for one test, and close its sockets afterwards."""
    from huggingface_hub import close_session

    hub = Hub()
    point_client_at(hub.url, cache, monkeypatch)
    try:
        yield hub
    finally:
        close_session()
        hub.close()


_ROUTES = (
    ("info", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")),
    ("tree", re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")),
    ("file", re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")),
)


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.log.append((self.command, path))
            for kind, route in _ROUTES:
                if match := route.fullmatch(path):
                    return self.respond(kind, **match.groupdict())
            self.fail(404, "EntryNotFound")

        def do_HEAD(self) -> None:
            self.do_GET()

        def respond(self, kind: str, repo: str, revision: str | None, name: str = "") -> None:
            if repo not in hub.refs:
                return self.fail(404, "RepoNotFound")
            commit = hub.refs[repo].get(revision or "main", revision or "")
            files = hub.commits.get((repo, commit))
            if files is None:
                return self.fail(404, "RevisionNotFound")
            if kind == "info":
                return self.json({"id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in files]})
            if kind == "tree":
                return self.json(
                    [{"type": "file", "path": p, "size": len(d), "oid": _oid(d)} for p, d in files.items()]
                )
            if repo in hub.gated:
                return self.fail(403, "GatedRepo")
            if name not in files:
                return self.fail(404, "EntryNotFound")
            self.send(200, files[name], {"ETag": f'"{_oid(files[name])}"', "X-Repo-Commit": commit})

        def json(self, value: Any) -> None:
            self.send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def fail(self, status: int, code: str) -> None:
            self.send(status, b"", {"X-Error-Code": code})

        def send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for header, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    return Handler


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
