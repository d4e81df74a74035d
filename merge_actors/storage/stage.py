"""Keep ranges of remote objects on a node's own disk, fetched once for all of its workers.

A staged object is a sparse file of its whole length and a file with a byte per block that says whether the block
is there. Who needs a block that is not there holds its lock while fetching it: within a process a thread's lock,
between processes one on a byte of the second file. The byte is set after the block is written, so a worker that
dies leaves a block that is fetched again. What is staged stays for the next run; after a restart of the machine,
which may have lost the end of a file but not its byte, it is staged anew. A full disk only means fetching more.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from collections.abc import Iterator

import xxhash

from raymerge.merge_actors.errors import CheckpointError, OutputError
from raymerge.merge_actors.storage.ranges import REQUEST_BYTES, RemoteRanges
from raymerge.merge_actors.storage.retry import with_retries
from raymerge.merge_actors.storage.store import Entry, store_of

_BLOCK_BYTES = REQUEST_BYTES


class Stage:
    """Remote objects with a copy, as far as it was needed, in a local folder."""

    def __init__(self, folder: str, remote: RemoteRanges) -> None:
        """Make the folder.

        Raises:
            OutputError: it cannot be written.
        """
        self._folder = os.path.join(os.path.abspath(os.path.expanduser(folder)), f"staged-{_boot()}")
        self._remote = remote
        self._lock = threading.Lock()
        self._objects: dict[str, _StagedObject] = {}
        try:
            os.makedirs(self._folder, exist_ok=True)
        except OSError as error:
            raise OutputError(
                f"node {os.uname().nodename} cannot stage in {folder}: {error.strerror}; give --stage a folder that "
                "every node can write"
            ) from error

    def read_into(self, uri: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from the copy, fetching the blocks that are not there.

        Raises:
            CheckpointError: the object ends before that, or the store keeps failing.
        """
        staged = self._object(uri)
        if offset + len(buffer) > staged.num_bytes:
            self._remote.read_into(uri, offset, buffer)  # says so
        done = 0
        while done < len(buffer):
            block, begin = divmod(offset + done, _BLOCK_BYTES)
            part = buffer[done : done + _BLOCK_BYTES - begin]
            self._read_block(uri, staged, block, begin, part)
            done += len(part)

    def close(self) -> None:
        """Close the copies; they stay on the disk."""
        with self._lock:
            objects, self._objects = self._objects, {}
        for staged in objects.values():
            staged.close()

    def _object(self, uri: str) -> _StagedObject:
        with self._lock:
            if uri not in self._objects:
                entry = with_retries(lambda: store_of(uri).entry(uri), f"read {uri}", CheckpointError)
                if entry is None:
                    raise CheckpointError(f"{uri} does not exist; check the name")
                self._objects[uri] = _StagedObject(self._folder, uri, entry)
            return self._objects[uri]

    def _read_block(self, uri: str, staged: _StagedObject, block: int, begin: int, part: memoryview) -> None:
        if staged.has(block):
            staged.read(block * _BLOCK_BYTES + begin, part)
            return
        with staged.locked(block):
            if staged.has(block):
                staged.read(block * _BLOCK_BYTES + begin, part)
                return
            first = block * _BLOCK_BYTES
            data = memoryview(bytearray(min(_BLOCK_BYTES, staged.num_bytes - first)))
            self._remote.read_into(uri, first, data)
            part[:] = data[begin : begin + len(part)]
            staged.keep(block, data)


class _StagedObject:
    """The copy of one object: its data, and which blocks of them are there."""

    def __init__(self, folder: str, uri: str, entry: Entry) -> None:
        name = xxhash.xxh3_128_hexdigest(repr((uri, entry.num_bytes, entry.version)).encode())
        self.num_bytes = entry.num_bytes
        self._data = os.open(os.path.join(folder, name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._have = os.open(
            os.path.join(folder, f"{name}.have"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        os.ftruncate(self._data, entry.num_bytes)
        self._guard = threading.Lock()
        self._locks: dict[int, threading.Lock] = {}

    def has(self, block: int) -> bool:
        return os.pread(self._have, 1, block) == b"\1"

    def read(self, offset: int, part: memoryview) -> None:
        done = 0
        while done < len(part):
            done += os.preadv(self._data, [part[done:]], offset + done)

    def keep(self, block: int, data: memoryview) -> None:
        """Write a block and mark it; a full disk leaves it out."""
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._data, data[done:], block * _BLOCK_BYTES + done)
            os.pwrite(self._have, b"\1", block)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise OutputError(f"cannot stage: {error.strerror}; give --stage another folder") from error

    @contextlib.contextmanager
    def locked(self, block: int) -> Iterator[None]:
        """Hold a block against the threads of this process and the other processes of the node."""
        with self._guard:
            lock = self._locks.setdefault(block, threading.Lock())
        with lock:
            fcntl.lockf(self._have, fcntl.LOCK_EX, 1, block)
            try:
                yield
            finally:
                fcntl.lockf(self._have, fcntl.LOCK_UN, 1, block)

    def close(self) -> None:
        os.close(self._data)
        os.close(self._have)


def _boot() -> str:
    """Return what changes when this machine restarts."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()[:8]
    except OSError:
        return "unknown"
