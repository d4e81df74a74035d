"""One interface to every object store, and the cache of clients that a process keeps.

The clients are pyarrow's (S3, GCS, Azure, HDFS) and, for every other scheme, fsspec's (the Hugging Face Hub
among them). They find credentials and endpoints themselves, in the environment or on the instance. Nothing here
repeats what failed: that is `retry.py`'s, which sees every attempt.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol
from urllib.parse import urlsplit

#: Schemes of pyarrow's own file systems.
_ARROW_SCHEMES = frozenset({"s3", "gs", "gcs", "abfs", "abfss", "az", "hdfs"})


@dataclass(frozen=True, slots=True)
class Entry:
    """What a listing says of an object or a folder."""

    name: str
    """Without the folder that it is in."""
    is_folder: bool
    num_bytes: int
    """0 for a folder."""
    version: str
    """Changes when the object does: its time, and its tag where the store tells it."""
    modified_seconds: float | None = None
    """By the store's clock; None where it does not tell."""


class NoClientError(OSError):
    """No client can be made for a URI: its scheme, a package or a setting is not there."""


class Reader(Protocol):
    """An object that is open for reading by range; one range at a time."""

    num_bytes: int
    tag: str
    """The store's tag of the content (ETag); "" where it tells none."""

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill `buffer` from `offset` by one request; return how many bytes came."""

    def close(self) -> None:
        """Let the object go."""


class Store(Protocol):
    """A client of one store; every method raises OSError when the store fails."""

    def entry(self, uri: str) -> Entry | None:
        """Return what there is at a URI; None if nothing."""

    def entries(self, uri: str) -> list[Entry]:
        """Return what is in a folder, without what is in its folders; [] if there is no such folder."""

    def open(self, uri: str) -> Reader:
        """Open an object for reading."""

    def write(self, uri: str, blocks: Iterable[bytes | memoryview], *, blocks_in_flight: int) -> None:
        """Make an object of some blocks; on an error there is none, or what was there before."""

    def delete(self, uris: Sequence[str]) -> None:
        """Remove objects; those that are not there are fine."""

    def delete_folder(self, uri: str) -> None:
        """Remove all objects under a URI."""


_lock = threading.Lock()
_stores: dict[tuple[str, str], Store] = {}


def store_of(uri: str) -> Store:
    """Return this process's client for a URI.

    Raises:
        NoClientError: the client cannot be made.
    """
    parts = urlsplit(uri)
    key = (parts.scheme, parts.netloc)
    with _lock:
        if key not in _stores:
            _stores[key] = _make(parts.scheme, uri)
        return _stores[key]


def forget_stores() -> None:
    """Drop all clients, so that the next ones look at the environment anew."""
    with _lock:
        _stores.clear()


def _make(scheme: str, uri: str) -> Store:
    if scheme in _ARROW_SCHEMES:
        from raymerge.merge_actors.storage.arrow_store import make_arrow_store

        return make_arrow_store(uri)
    from raymerge.merge_actors.storage.fsspec_store import make_fsspec_store

    return make_fsspec_store(uri)
