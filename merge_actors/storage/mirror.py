"""Bring the small files of a remote model, its config and tokenizer, into a local folder.

Tokenizers are opened by transformers, processors and templates are copied: all of them need files. They are a few
megabytes, and are kept in the cache under a name that changes when the remote folder does. Weights stay where
they are.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from fnmatch import fnmatch

import xxhash

from raymerge.merge_actors.checkpoint.pickles import cache_folder
from raymerge.merge_actors.errors import CheckpointError
from raymerge.merge_actors.storage.folders import entries, map_concurrently, read_bytes
from raymerge.merge_actors.storage.store import Entry

SMALL_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken", "*.py")
#: Folders of chat templates, and of the modules that sentence-transformers puts after the network.
_SMALL_FOLDERS = re.compile(r"additional_chat_templates|chat_templates|\d+_[A-Za-z0-9_]+")
#: The largest of them known, a tokenizer.json, has 34 MB.
_MOST_BYTES = 256 << 20


def mirrored(uri: str, listing: Sequence[Entry]) -> str:
    """Return a local folder with the small files of a remote one.

    Args:
        uri: the remote folder.
        listing: what is in it.

    Raises:
        CheckpointError: a file cannot be read.
    """
    wanted = [(entry.name, entry) for entry in listing if not entry.is_folder and _is_small(entry)]
    for folder in listing:
        if folder.is_folder and _SMALL_FOLDERS.fullmatch(folder.name):
            inner = entries(f"{uri}/{folder.name}")
            wanted += [
                (f"{folder.name}/{entry.name}", entry)
                for entry in inner
                if not entry.is_folder and entry.num_bytes <= _MOST_BYTES
            ]
    rows = [(name, entry.num_bytes, entry.version) for name, entry in wanted]
    key = xxhash.xxh3_128_hexdigest(repr((uri, rows)).encode())
    target = os.path.join(cache_folder(), "remote", key)
    if not os.path.isdir(target):
        _fetch(uri, [name for name, _ in wanted], target)
    return target


def _is_small(entry: Entry) -> bool:
    return entry.num_bytes <= _MOST_BYTES and any(fnmatch(entry.name, pattern) for pattern in SMALL_FILES)


def _fetch(uri: str, names: Sequence[str], target: str) -> None:
    """Fetch into a folder of our own and give it its name when it is whole."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    temporary = tempfile.mkdtemp(prefix="fetching-", dir=os.path.dirname(target))

    def fetch(name: str) -> None:
        data = read_bytes(f"{uri}/{name}")
        place = os.path.join(temporary, *name.split("/"))
        os.makedirs(os.path.dirname(place), exist_ok=True)
        with open(place, "wb") as stream:
            stream.write(data)

    try:
        map_concurrently(fetch, names, [uri])
        os.rename(temporary, target)
    except OSError as error:
        if not os.path.isdir(target):  # else another process was faster
            raise CheckpointError(
                f"cannot keep the small files of {uri} in {target}: {error.strerror}; free space there or set "
                "RAYMERGE_CACHE to another folder"
            ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
