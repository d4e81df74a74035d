"""Write and remove small objects: journals, locks, metadata."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from raymerge.merge_actors.errors import OutputError
from raymerge.merge_actors.storage.retry import with_retries
from raymerge.merge_actors.storage.staged_outputs import upload
from raymerge.merge_actors.storage.store import store_of


def write_object(uri: str, data: bytes) -> None:
    """Write an object whole.

    Raises:
        OutputError: the store refuses, or keeps failing.
    """
    with_retries(lambda: store_of(uri).write(uri, [data], blocks_in_flight=1), f"write {uri}", OutputError)


def upload_file(path: str, uri: str) -> None:
    """Upload a local file.

    Raises:
        OutputError: it cannot be read, or the store refuses or keeps failing.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise OutputError(f"cannot read {path}: {error.strerror}") from error
    with contextlib.closing(os.fdopen(descriptor, "rb")):
        upload(uri, descriptor, os.fstat(descriptor).st_size)


def delete_objects(uris: Sequence[str]) -> None:
    """Remove objects; those that are not there are fine.

    Raises:
        OutputError: the store refuses, or keeps failing.
    """
    if uris:
        with_retries(lambda: store_of(uris[0]).delete(uris), f"remove {uris[0]}", OutputError)


def delete_folder(uri: str) -> None:
    """Remove all objects under a URI.

    Raises:
        OutputError: the store refuses, or keeps failing.
    """
    with_retries(lambda: store_of(uri).delete_folder(uri), f"remove {uri}", OutputError)
