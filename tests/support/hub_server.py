"""As much of the Hugging Face Hub as reading a model by range needs: revisions, trees, files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

SHA = hashlib.sha1(b"a commit", usedforsecurity=False).hexdigest()


@dataclass(slots=True)
class Hub:
    """The running server."""

    url: str
    repos: dict[str, Path] = field(default_factory=dict)
    """"org/name" -> folder with its files."""
    fetched: list[tuple[str, int, int]] = field(default_factory=list)
    """(path, begin, end) of what was sent of files."""
    tokens: list[str] = field(default_factory=list)
    """Authorization headers that came."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Serve repositories at a free port."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *words: Any) -> None:
            """Say nothing."""

        def answer(self, value: Any, status: int = 200, **headers: str) -> None:
            """Send JSON, or bytes."""
            body = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            for name, text in headers.items():
                self.send_header(name.replace("_", "-"), text)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", SHA)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def absent(self, code: str) -> None:
            """Say what is not there, as the Hub does."""
            self.answer({"error": code}, 404, X_Error_Code=code)

        def do_HEAD(self) -> None:
            """Answer without a body."""
            self.do_GET()

        def do_POST(self) -> None:
            """Answer paths-info."""
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            folder = hub.repos.get("/".join(parts[2:4]))
            if folder is None:
                self.absent("RepoNotFound")
                return
            self.answer([_row(folder, folder / path) for path in body["paths"] if (folder / path).exists()])

        def do_GET(self) -> None:
            """Answer a revision, a tree or a file."""
            hub.tokens.append(self.headers.get("Authorization") or "")
            parts = unquote(urlsplit(self.path).path).strip("/").split("/")
            is_api = parts[:2] == ["api", "models"]
            repo, rest = "/".join(parts[2:4] if is_api else parts[:2]), parts[4:] if is_api else parts[2:]
            folder = hub.repos.get(repo)
            if folder is None:
                self.absent("RepoNotFound")
            elif len(rest) > 1 and rest[1] not in ("main", SHA):
                self.absent("RevisionNotFound")
            elif is_api and rest[:1] in ([], ["revision"]):
                names = sorted(path.name for path in folder.iterdir() if path.is_file())
                self.answer({"id": repo, "sha": SHA, "siblings": [{"rfilename": name} for name in names]})
            elif is_api and rest[0] == "tree":
                inside = folder.joinpath(*rest[2:])
                if not inside.is_dir():
                    self.absent("EntryNotFound")
                else:
                    self.answer([_row(folder, path) for path in sorted(inside.iterdir())])
            elif rest[:1] == ["resolve"]:
                self.send_file(folder.joinpath(*rest[2:]))
            else:
                self.absent("EntryNotFound")

        def send_file(self, path: Path) -> None:
            """Send a file, or the range of it that is asked for."""
            if not path.is_file():
                self.absent("EntryNotFound")
                return
            data, begin = path.read_bytes(), 0
            tag = _digest(data)
            wanted = self.headers.get("Range")
            if wanted and self.command == "GET":
                first, last = wanted.removeprefix("bytes=").split("-")
                begin, data = int(first), data[int(first) : int(last) + 1]
            if self.command == "GET":
                hub.fetched.append((path.name, begin, begin + len(data)))
            self.answer(data, 206 if wanted else 200, ETag=f'"{tag}"')

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def _row(folder: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": name}
    data = path.read_bytes()
    return {"type": "file", "oid": _digest(data), "size": len(data), "path": name}


def _digest(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
