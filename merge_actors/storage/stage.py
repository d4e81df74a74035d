"""Keep ranges of remote objects on a node's own disk, fetched once for all of its workers.

A staged object is a sparse file of its whole length and a file with a byte per block that says whether the block
is there. Who needs a block that is not there holds its lock while fetching it: within a process a thread's lock,
between processes one on a byte of the second file, which the kernel drops with its process. The byte is set after
the block is written, so a worker that dies leaves a block that is fetched again. Nobody waits for ever: a worker that
does not get on is gone round.

What is staged stays for the next run; after a restart of the machine, which may have lost the end of a file but not
its byte, it is staged anew, and so is an object whose tag, length or time has changed. A disk that is full, or fails,
only means that what is not there is fetched by those who need it, which is said.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import threading
import time
from collections.abc import Iterator

import xxhash

from raymerge.merge_actors.errors import OutputError
from raymerge.merge_actors.storage.ranges import REQUEST_BYTES, RemoteRanges

_BLOCK_BYTES = REQUEST_BYTES
#: How long to wait for somebody else who fetches a block: longer than a request with all its repetitions takes.
PATIENCE_SECONDS = 120.0
_FIRST_POLL_SECONDS, _MOST_POLL_SECONDS = 0.002, 0.1
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class Stage:
    """Remote objects with a copy, as far as it was needed, in a local folder."""

    def __init__(self, folder: str, remote: RemoteRanges) -> None:
        """Make the folder.

        Raises:
            OutputError: it cannot be made.
        """
        self._given = folder
        self._folder = os.path.join(os.path.abspath(os.path.expanduser(folder)), f"staged-{_boot()}")
        self._remote = remote
        self._lock = threading.Lock()
        self._objects: dict[str, _StagedObject | None] = {}
        self.remark: str | None = None
        """What has gone wrong with the folder; nothing more is kept there since."""
        try:
            os.makedirs(self._folder, exist_ok=True)
        except OSError as error:
            if error.errno in _NO_SPACE:
                self._give_up(error)
                return
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
        if staged is None or offset + len(buffer) > staged.num_bytes:
            self._remote.read_into(uri, offset, buffer)  # an object that has become shorter is found here
            return
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
            if staged is not None:
                staged.close()

    def _object(self, uri: str) -> _StagedObject | None:
        with self._lock:
            if uri not in self._objects:
                self._objects[uri] = self._opened(uri)
            return self._objects[uri]

    def _opened(self, uri: str) -> _StagedObject | None:
        num_bytes, version = self._remote.identity(uri)
        try:
            return _StagedObject(self._folder, repr((uri, num_bytes, version)), num_bytes)
        except OSError as error:
            self._give_up(error)
            return None

    def _read_block(self, uri: str, staged: _StagedObject, block: int, begin: int, part: memoryview) -> None:
        first = block * _BLOCK_BYTES
        if staged.read(block, begin, part):
            return
        if self.remark is None:
            with staged.locked(block) as is_ours:
                if staged.read(block, begin, part):
                    return
                if is_ours:
                    data = memoryview(bytearray(min(_BLOCK_BYTES, staged.num_bytes - first)))
                    self._remote.read_into(uri, first, data)
                    part[:] = data[begin : begin + len(part)]
                    try:
                        staged.keep(block, data)
                    except OSError as error:
                        self._give_up(error)
                    return
        self._remote.read_into(uri, first + begin, part)

    def _give_up(self, error: OSError) -> None:
        """Keep nothing more; what is kept already is still used."""
        way_out = (
            "give --stage more room"
            if error.errno in _NO_SPACE
            else "see to that disk, or give another --stage"
        )
        self.remark = (
            f"node {os.uname().nodename} cannot keep more of the remote inputs in {self._given} ({error.strerror}): "
            f"the rest is fetched by every worker that needs it; {way_out}"
        )


class _StagedObject:
    """The copy of one object: its data, and which blocks of them are there."""

    def __init__(self, folder: str, identity: str, num_bytes: int) -> None:
        """Open or make the two files.

        Raises:
            OSError: the disk is full, or does not take a file of that length.
        """
        path = os.path.join(folder, xxhash.xxh3_128_hexdigest(identity.encode()))
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self.num_bytes = num_bytes
        self._data = os.open(path, flags, 0o600)
        try:
            os.ftruncate(self._data, num_bytes)
            self._have = os.open(f"{path}.have", flags, 0o600)
        except OSError:
            os.close(self._data)
            raise
        self._guard = threading.Lock()
        self._locks: dict[int, threading.Lock] = {}

    def read(self, block: int, begin: int, part: memoryview) -> bool:
        """Fill `part` from a block; tell whether it is there."""
        if os.pread(self._have, 1, block) != b"\1":
            return False
        done = 0
        while done < len(part):
            moved = os.preadv(self._data, [part[done:]], block * _BLOCK_BYTES + begin + done)
            if moved == 0:  # somebody has cut the file
                return False
            done += moved
        return True

    def keep(self, block: int, data: memoryview) -> None:
        """Write a block and mark it.

        Raises:
            OSError: the disk is full, or fails; the block is then not marked.
        """
        done = 0
        while done < len(data):
            done += os.pwrite(self._data, data[done:], block * _BLOCK_BYTES + done)
        os.pwrite(self._have, b"\1", block)

    @contextlib.contextmanager
    def locked(self, block: int) -> Iterator[bool]:
        """Hold a block against the threads of this process and the other processes of the node.

        Yields whether it is held: not if whoever holds it has not let go after `PATIENCE_SECONDS`.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        with self._guard:
            lock = self._locks.setdefault(block, threading.Lock())
        if not lock.acquire(timeout=PATIENCE_SECONDS):
            yield False
            return
        try:
            is_held = self._wait_for_file(block, deadline)
            try:
                yield is_held
            finally:
                if is_held:
                    _lock_byte(self._have, fcntl.F_UNLCK, block)
        finally:
            lock.release()

    def _wait_for_file(self, block: int, deadline: float) -> bool:
        pause = _FIRST_POLL_SECONDS
        while not _lock_byte(self._have, fcntl.F_WRLCK, block):
            if time.monotonic() > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, _MOST_POLL_SECONDS)
        return True

    def close(self) -> None:
        """Close both files."""
        os.close(self._data)
        os.close(self._have)


def _lock_byte(descriptor: int, kind: int, at: int) -> bool:
    """Lock or unlock one byte of a file for this opening of it; tell whether that could be done at once.

    Locks of an opening (Linux), not of the process: two workers in one process exclude each other, and
    closing the file elsewhere in the process does not let go.
    """
    command = getattr(fcntl, "F_OFD_SETLK", None)
    try:
        if command is None:
            how = fcntl.LOCK_UN if kind == fcntl.F_UNLCK else fcntl.LOCK_EX | fcntl.LOCK_NB
            fcntl.lockf(descriptor, how, 1, at)
        else:
            fcntl.fcntl(descriptor, command, struct.pack("hhqqiI", kind, os.SEEK_SET, at, 1, 0, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True


def _boot() -> str:
    """Return what changes when this machine restarts."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()[:8]
    except OSError:
        return "unknown"
