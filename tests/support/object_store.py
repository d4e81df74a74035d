"""An S3 server for tests: moto behind a proxy that counts what is fetched and breaks it when told to.

The server is a process of its own, started once per session and only if a test asks for it. Clients find the
proxy through AWS_ENDPOINT_URL, which `tests/conftest.py` sets before anything else starts, Ray's workers included.
"""

from __future__ import annotations

import http.client
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

BUCKET = "models"
Kind = Literal["503", "500", "cut", "drop", "stall", "403"]


#: Ends with whoever started it, however that ends: its input is then at its end.
_SERVER = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
from moto.server import main
main(sys.argv[1:])
"""


@dataclass(slots=True)
class Request:
    """One request that the proxy has seen."""

    method: str
    key: str
    """Path without the bucket; "" for the bucket itself."""
    query: str
    begin: int | None
    """First byte of its range; None if it names none."""
    num_bytes: int
    """Of the answer's body, as far as it was passed on."""
    status: int
    headers: dict[str, str]


@dataclass(slots=True)
class Fault:
    """What to do to some requests instead of answering them."""

    kind: Kind
    matches: Callable[[str, str, str], bool]
    """(method, key, query) of a request."""
    times: int
    num_done: int = 0


@dataclass(slots=True)
class ObjectStore:
    """The running server, as tests see it."""

    port: int
    requests: list[Request] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fail(
        self, kind: Kind, pattern: str = "", *, method: str = "GET", query: str = "", times: int = 1
    ) -> Fault:
        """Break the next requests whose key and query match."""

        def matches(its_method: str, key: str, its_query: str) -> bool:
            return (
                its_method == method and bool(re.search(pattern, key)) and bool(re.search(query, its_query))
            )

        fault = Fault(kind, matches, times)
        with self.lock:
            self.faults.append(fault)
        return fault

    def fetched(self, pattern: str = "") -> list[tuple[str, int, int]]:
        """Return (key, begin, end) of every range of an object that was passed on whole."""
        with self.lock:
            return sorted(
                (each.key, each.begin, each.begin + each.num_bytes)
                for each in self.requests
                if each.method == "GET" and each.begin is not None and re.search(pattern, each.key)
            )

    def forget(self) -> None:
        """Begin to count anew."""
        with self.lock:
            self.requests.clear()

    def put(self, folder: Path, prefix: str) -> str:
        """Upload a folder; returns its URI."""
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put_bytes(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        return f"s3://{BUCKET}/{prefix}"

    def put_bytes(self, key: str, data: bytes) -> None:
        """Upload an object."""
        assert self._call("PUT", f"/{BUCKET}/{key}", data)[0] == 200

    def get(self, key: str) -> bytes:
        """Return an object."""
        status, data = self._call("GET", f"/{BUCKET}/{key}")
        assert status == 200, f"{key}: {status}"
        return data

    def keys(self, prefix: str) -> list[str]:
        """Return the keys of all objects under a prefix, without those that stand for folders."""
        _, data = self._call("GET", f"/{BUCKET}?list-type=2&prefix={prefix}")
        return [key for key in re.findall(r"<Key>(.*?)</Key>", data.decode()) if not key.endswith("/")]

    def unfinished_uploads(self, prefix: str) -> int:
        """Count the multipart uploads under a prefix that were neither completed nor aborted."""
        return self._call("GET", f"/{BUCKET}?uploads")[1].decode().count(f"<Key>{prefix}")

    def _call(self, method: str, path: str, data: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"Authorization": "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"}
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response.status, body


def running_object_store(listening: socket.socket) -> Iterator[ObjectStore]:
    """Start moto and the proxy, which accepts on a socket that is bound already."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", _SERVER, "-H", "127.0.0.1", "-p", str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={key: value for key, value in os.environ.items() if not key.startswith("AWS_")},
    )
    store = ObjectStore(port)
    proxy = _Proxy(listening, store)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    try:
        _wait_until_up(port)
        store._call("PUT", f"/{BUCKET}")
        thread.start()
        yield store
    finally:
        if thread.is_alive():
            proxy.shutdown()
        server.kill()
        server.communicate()


def _wait_until_up(port: int) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "moto does not start"
            time.sleep(0.05)


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, listening: socket.socket, store: ObjectStore) -> None:
        super().__init__(listening.getsockname(), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening
        self.server_name, self.server_port = listening.getsockname()
        self.store = store

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that go are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else every answer waits 40 ms for an acknowledgement
    wbufsize = 1 << 16
    server: _Proxy

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def handle_expect_100(self) -> bool:
        """Let the client send its body at once: it would wait a second for this."""
        going_on = super().handle_expect_100()
        self.wfile.flush()
        return going_on

    def _handle(self) -> None:
        body = self._body()
        path, _, query = self.path.partition("?")
        key = path.lstrip("/").partition("/")[2]
        fault = self._fault(key, query)
        if fault in ("503", "500", "403"):
            code = {"503": "SlowDown", "500": "InternalError", "403": "AccessDenied"}[fault]
            text = (
                f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>told to</Message></Error>".encode()
            )
            self._answer(int(fault), {"Content-Type": "application/xml"}, text)
            return
        if fault == "drop":
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        if fault == "stall":
            time.sleep(60)
            return
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.store.port, timeout=60)
        sent = {name: value for name, value in self.headers.items() if name.lower() not in _REQUEST_FRAMING}
        upstream.request(self.command, self.path, body, {**sent, "Content-Length": str(len(body))})
        response = upstream.getresponse()
        data = response.read()
        upstream.close()
        hidden = _HOP_BY_HOP if self.command == "HEAD" else (*_HOP_BY_HOP, "content-length")
        headers = {name: value for name, value in response.getheaders() if name.lower() not in hidden}
        if fault == "cut":
            self._answer(response.status, headers, data, cut_at=len(data) // 2)
            return
        found = re.fullmatch(r"bytes=(\d+)-\d*", self.headers.get("Range") or "")
        request = Request(
            method=self.command,
            key=key,
            query=query,
            begin=int(found[1]) if found else None,
            num_bytes=len(data),
            status=response.status,
            headers=dict(self.headers),
        )
        with self.server.store.lock:
            self.server.store.requests.append(request)  # before the client can go on
        self._answer(response.status, headers, data)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _handle

    def _body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while num_bytes := int(self.rfile.readline().split(b";")[0], 16):
            data += self.rfile.read(num_bytes)
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return data

    def _fault(self, key: str, query: str) -> Kind | None:
        store = self.server.store
        with store.lock:
            for fault in store.faults:
                if fault.num_done < fault.times and fault.matches(self.command, key, query):
                    fault.num_done += 1
                    return fault.kind
        return None

    def _answer(self, status: int, headers: dict[str, str], data: bytes, cut_at: int | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut_at])
        self.wfile.flush()
        if cut_at is not None:
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True


_HOP_BY_HOP = ("connection", "transfer-encoding", "server", "date", "keep-alive")
_REQUEST_FRAMING = ("transfer-encoding", "content-length", "expect")
