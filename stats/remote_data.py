"""Bring data from an object store to this node: the readers of data, and images, need files.

A file, or a folder with what is below it, is copied once per node into `$RAYMERGE_CACHE/data`, under a name that
changes when the length or the time of an object does, and stays there for the next run.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence

import filelock
import xxhash

from raymerge.merge_actors.checkpoint.pickles import cache_folder
from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.storage.folders import entries, map_concurrently, reading, remote_entry
from raymerge.merge_actors.storage.ranges import REQUEST_BYTES
from raymerge.merge_actors.storage.store import Entry
from raymerge.merge_actors.storage.uris import absolute, is_remote


def local_data(source: str) -> str:
    """Return where data can be read: a local path with `~` resolved, or the copy of what a URI names.

    Args:
        source: path, URI of a file or a folder, or the name of a data set on the Hub, which is given back.

    Raises:
        RecipeError: there is nothing under the URI, or no room for a copy.
        CheckpointError: the store refuses, or keeps failing.
    """
    if not is_remote(source):
        return os.path.expanduser(source)
    uri = absolute(source)
    name = uri.rpartition("/")[2]
    found = remote_entry(uri)
    files = (
        [("", found)]
        if found and not found.is_folder
        else sorted(_files_below(uri, ""), key=lambda each: each[0])
    )
    if not files:
        raise RecipeError(f"the data {source!r} do not exist; give a file or a folder in the store.")
    key = xxhash.xxh3_128_hexdigest(
        repr((uri, [(path, each.num_bytes, each.version) for path, each in files])).encode()
    )
    target = os.path.join(cache_folder(), "data", key)
    if not os.path.isdir(target):
        _copy(uri, files, target, name)
    return os.path.join(target, name)


def _files_below(uri: str, path: str) -> Iterator[tuple[str, Entry]]:
    for each in entries(f"{uri}{path}"):
        if each.name in (".", ".."):  # on a disk it would lead out of the copy
            raise RecipeError(
                f"{uri}{path} holds objects below {each.name!r}, which is no name of a file or a folder; remove them"
            )
        if each.is_folder:
            yield from _files_below(uri, f"{path}/{each.name}")
        else:
            yield f"{path}/{each.name}", each


def _copy(uri: str, files: Sequence[tuple[str, Entry]], target: str, name: str) -> None:
    """Copy into a folder of our own and give it its name when it is whole; the other processes of the node wait."""
    temporary = ""

    def copy(each: tuple[str, Entry]) -> None:
        path, entry = each
        place = os.path.join(temporary, name) + path
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with reading(f"{uri}{path}") as reader, open(place, "wb") as file:
            for begin in range(0, reader.num_bytes, REQUEST_BYTES):
                file.write(reader.read(begin, REQUEST_BYTES))
        if entry.modified_seconds is not None:  # large files count by length and time
            os.utime(place, (entry.modified_seconds, entry.modified_seconds))

    try:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with filelock.FileLock(target + ".lock"):
            if not os.path.isdir(target):
                temporary = tempfile.mkdtemp(prefix="copying-", dir=os.path.dirname(target))
                map_concurrently(copy, files, [uri])
                os.rename(temporary, target)
    except OSError as error:
        raise RecipeError(
            f"cannot keep a copy of the data {uri} in {target}: {error.strerror}; free space there or set "
            "RAYMERGE_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
