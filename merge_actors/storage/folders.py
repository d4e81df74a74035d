"""Look into folders and read small files, local or remote: what planning needs.

Weights are never read here; see `ranges.py` and `files.py`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

from raymerge.merge_actors.errors import CheckpointError
from raymerge.merge_actors.storage.ranges import NUM_IN_FLIGHT, RemoteRanges
from raymerge.merge_actors.storage.retry import with_retries
from raymerge.merge_actors.storage.store import Entry, store_of
from raymerge.merge_actors.storage.uris import is_remote

S = TypeVar("S")
T = TypeVar("T")


class SmallReader(Protocol):
    """An open file of which some bytes are read."""

    num_bytes: int

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return bytes from `offset`, fewer at the end of the file."""


class _LocalReader:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self.num_bytes = os.fstat(descriptor).st_size

    def read(self, offset: int, num_bytes: int) -> bytes:
        return os.pread(self._descriptor, num_bytes, offset)


class _RemoteReader:
    def __init__(self, remote: RemoteRanges, uri: str) -> None:
        self._remote, self._uri = remote, uri
        self.num_bytes = remote.num_bytes(uri)

    def read(self, offset: int, num_bytes: int) -> bytes:
        data = bytearray(max(0, min(num_bytes, self.num_bytes - offset)))
        self._remote.read_into(self._uri, offset, memoryview(data))
        return bytes(data)


@contextlib.contextmanager
def reading(path: str) -> Iterator[SmallReader]:
    """Open a file for a few reads.

    Raises:
        OSError: a local file cannot be opened.
        CheckpointError: a remote one cannot be read.
    """
    if is_remote(path):
        remote = RemoteRanges()
        try:
            yield _RemoteReader(remote, path)
        finally:
            remote.close()
        return
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield _LocalReader(descriptor)
    finally:
        os.close(descriptor)


def read_bytes(path: str) -> bytes:
    """Return a whole small file.

    Raises:
        OSError: a local file cannot be read.
        CheckpointError: a remote one cannot be read.
    """
    if not is_remote(path):
        with open(path, "rb") as stream:
            return stream.read()
    with reading(path) as reader:
        return reader.read(0, reader.num_bytes)


def entries(folder: str) -> list[Entry]:
    """Return what is in a folder, by name; [] if there is none.

    Raises:
        CheckpointError: a store refuses, or keeps failing.
    """
    if is_remote(folder):
        found = with_retries(lambda: store_of(folder).entries(folder), f"list {folder}", CheckpointError)
        return sorted(found, key=lambda entry: entry.name)
    if not os.path.isdir(folder):
        return []
    found = []
    for each in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):  # a link to nothing
            status = each.stat()
            num_bytes = 0 if each.is_dir() else status.st_size
            version, modified = str(status.st_mtime_ns), status.st_mtime
            found.append(Entry(each.name, each.is_dir(), num_bytes, version, modified))
    return sorted(found, key=lambda entry: entry.name)


def exists(path: str) -> bool:
    """Return whether there is a file or a folder.

    Raises:
        CheckpointError: a store refuses, or keeps failing.
    """
    return remote_entry(path) is not None if is_remote(path) else os.path.exists(path)


def remote_entry(uri: str) -> Entry | None:
    """Return what there is under a URI; None if nothing.

    Raises:
        CheckpointError: a store refuses, or keeps failing.
    """
    return with_retries(lambda: store_of(uri).entry(uri), f"look at {uri}", CheckpointError)


def map_concurrently(function: Callable[[S], T], items: Sequence[S], paths: Sequence[str]) -> list[T]:
    """Apply a function that reads a file to each item, several at once if a file is remote.

    Args:
        function: of one item.
        items: in the order of the results.
        paths: the files that it reads.
    """
    if len(items) < 2 or not any(map(is_remote, paths)):
        return [function(item) for item in items]
    with concurrent.futures.ThreadPoolExecutor(NUM_IN_FLIGHT, thread_name_prefix="headers") as pool:
        return list(pool.map(function, items))
