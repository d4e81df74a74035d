"""Keep two runs from one folder of a file system: a lock of the kernel, which ends with its process.

Who holds it stands in the file, for messages and for `raymerge status`, which asks without holding anybody up.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from raymerge.merge_actors.errors import OutputError
from raymerge.merge_actors.files import write_error

#: For so long a run asks again for a lock that is taken: `raymerge status` takes it for a moment to see whether it is.
_PATIENCE_SECONDS = 0.5


@contextlib.contextmanager
def locked(path: str, out: str) -> Iterator[None]:
    """Hold a lock file for this process alone; it is made if need be, its folder too.

    Args:
        path: the lock file.
        out: what it guards, for messages.

    Raises:
        OutputError: another run holds it, or it cannot be made.
    """
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise write_error(out, error) from error
    try:
        try:
            _lock(descriptor)
            if not _is_file(descriptor, path):  # its owner removed it when it was done, just now
                raise BlockingIOError
        except BlockingIOError:
            raise OutputError(
                f"another run is writing {out} ({_owner(descriptor)}); wait for it or choose another folder"
            ) from None
        owner = {"host": os.uname().nodename, "pid": os.getpid(), "since": time.strftime("%F %T")}
        with contextlib.suppress(OSError):  # a full disk is told of where it matters
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        yield
    finally:
        os.close(descriptor)


def owner_of(path: str) -> tuple[str | None, bool]:
    """Return who held a lock last, in words, and whether somebody does now."""
    with contextlib.suppress(OSError, ValueError, KeyError), open(path, "rb") as file:
        owner = in_words(json.loads(file.read()))
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return owner, True
        return owner, False
    return None, False


def in_words(owner: Mapping[str, Any]) -> str:
    """Return who a lock says its owner is.

    Raises:
        KeyError: it does not say.
    """
    return f"process {owner['pid']} on {owner['host']} since {owner['since']}"


def _is_file(descriptor: int, path: str) -> bool:
    """Return whether an open file is the one that others find under a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _lock(descriptor: int) -> None:
    """Lock a file for this process alone.

    Raises:
        BlockingIOError: another holds it, and not just for a moment.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _owner(descriptor: int) -> str:
    try:
        return in_words(json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, KeyError):
        return "its owner is not recorded"
