"""Positioned reads and writes: the interface that workers use, and the files of this machine.

`storage/storage_files.py` adds object stores; an evaluator's memory is a third kind.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from raymerge.merge_actors.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from raymerge.merge_actors.host_input import HostInput

#: Linux moves at most 0x7ffff000 bytes a call.
_MOST_BYTES_A_CALL = 1 << 30


class RangeRead(NamedTuple):
    """Bytes of a file and the memory that they are read into."""

    path: str
    offset: int
    buffer: memoryview
    """Writable; its length is that of the range."""


class Files(Protocol):
    """What a worker reads from and writes to; every method may be called from several threads."""

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `offset`.

        Raises:
            CheckpointError: the file ends before that, or cannot be read.
        """

    def read_many(self, reads: Sequence[RangeRead]) -> None:
        """Fill many buffers, several ranges in flight where that helps.

        Raises:
            CheckpointError: as for `read_into`.
        """

    def view(self, path: str, offset: int, num_bytes: int, dtype: str) -> HostInput | None:
        """Return elements of an input that are in memory anyway, not to be written to; None if they are not."""

    def output(self, path: str, offset: int, num_bytes: int) -> NDArray[np.uint8] | None:
        """Return host memory that bytes of an output may be made in before they are written; None for any."""

    def write_from(self, path: str, offset: int, buffer: memoryview) -> None:
        """Write `buffer` to an existing file at `offset`.

        Raises:
            OutputError: the file cannot be written.
        """

    def move(self, folder: str, here: str) -> None:
        """Read files of `folder` from the folder `here`: a node's own copy of a model."""

    def remarks(self) -> tuple[str, ...]:
        """Return what the user should know of how inputs are read."""

    def take_fetched_bytes(self) -> int:
        """Return how many bytes came from object stores since this was last asked."""

    def close(self) -> None:
        """Let all files go."""


class LocalFiles:
    """File descriptors by path, opened on first use."""

    def __init__(self) -> None:
        self._moved: dict[str, str] = {}
        self._descriptors: dict[tuple[str, int], int] = {}
        self._lock = threading.Lock()
        self._writing: dict[str, threading.Lock] = {}

    def move(self, folder: str, here: str) -> None:
        """Read files of `folder` from the folder `here`: a node's own copy of a model."""
        self._moved[folder] = here

    def located(self, path: str) -> str:
        """Return where this node has a file."""
        if not self._moved:
            return path
        folder, name = os.path.split(path)
        return os.path.join(self._moved[folder], name) if folder in self._moved else path

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `offset`.

        Raises:
            CheckpointError: the file ends before that, or cannot be read.
        """
        done = 0
        try:
            descriptor = self._open(path, os.O_RDONLY)
            while done < len(buffer):
                part = buffer[done : done + _MOST_BYTES_A_CALL]
                moved = os.preadv(descriptor, [part], offset + done)
                if moved == 0:
                    raise _about(
                        path,
                        f"{path} ends at byte {offset + done}, {len(buffer) - done} bytes before the tensor "
                        "does: it was truncated or replaced during the merge",
                    )
                done += moved
        except OSError as error:
            raise _about(path, f"cannot read {path}: {error.strerror}") from error

    def read_many(self, reads: Sequence[RangeRead]) -> None:
        """Fill many buffers, by file and offset."""
        for read in sorted(reads, key=lambda read: (read.path, read.offset)):
            self.read_into(*read)

    def view(self, path: str, offset: int, num_bytes: int, dtype: str) -> HostInput | None:
        """Return None: a file is read."""
        del path, offset, num_bytes, dtype
        return None

    def output(self, path: str, offset: int, num_bytes: int) -> NDArray[np.uint8] | None:
        """Return None: a file is written from anywhere."""
        del path, offset, num_bytes
        return None

    def write_from(self, path: str, offset: int, buffer: memoryview) -> None:
        """Write `buffer` to an existing file at `offset`.

        Raises:
            OutputError: the disk is full, or the file cannot be written.
        """
        done = 0
        try:
            descriptor = self._open(path, os.O_WRONLY)
            # A file system takes one writer per file at a time, and the others spin for their turn
            # in the kernel: threads that wait here leave their core to the arithmetic.
            with self._lock:
                turn = self._writing.setdefault(path, threading.Lock())
            with turn:
                while done < len(buffer):
                    part = buffer[done : done + _MOST_BYTES_A_CALL]
                    done += os.pwrite(descriptor, part, offset + done)
        except OSError as error:
            raise write_error(path, error) from error

    def remarks(self) -> tuple[str, ...]:
        """Return nothing: files are read as ever."""
        return ()

    def take_fetched_bytes(self) -> int:
        """Return 0: nothing comes from object stores."""
        return 0

    def close(self) -> None:
        """Close every file."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def _open(self, path: str, flags: int) -> int:
        with self._lock:
            found = self._descriptors.get((path, flags))
            if found is None:
                found = self._descriptors[path, flags] = os.open(self.located(path), flags | os.O_CLOEXEC)
            return found


def allow_many_files() -> None:
    """Raise this process's limit of open files to what it may have: a large model is in hundreds."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS says "unlimited" and refuses it
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _about(path: str, sentence: str) -> CheckpointError:
    error = CheckpointError(sentence)
    error.path = path
    return error


def write_error(path: str, error: OSError) -> OutputError:
    """Say in one sentence why a write failed and what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OutputError(
            f"the disk is full while writing {path}; free some space and run again with --resume, "
            "finished tasks are kept"
        )
    return OutputError(f"cannot write {path}: {error.strerror}")
