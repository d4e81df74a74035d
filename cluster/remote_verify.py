"""Let transformers look at an output in an object store: its small files, and weight files without their values.

Config, tokenizer, and the names, shapes and dtypes of the tensors are what loading can fail at; the values have
been read for their checksums already. So weight files get their headers and their lengths and no bytes: they are
sparse, and nothing is downloaded twice.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping

from raymerge.merge_actors.storage.folders import entries, reading
from raymerge.merge_actors.storage.mirror import mirrored
from raymerge.merge_actors.storage.uris import is_remote

REMARK = "it was loaded without the values of its weights, which lie in an object store"


@contextlib.contextmanager
def loadable(folder: str, files: Mapping[str, int]) -> Iterator[str]:
    """Give a local folder that transformers can load in place of an output.

    Args:
        folder: the output; a local one is given as it is.
        files: its weight files and their lengths.

    Raises:
        CheckpointError: the store fails.
    """
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="raymerge-verify-") as local:
        shutil.copytree(mirrored(folder, entries(folder)), local, dirs_exist_ok=True)
        for name, num_bytes in files.items():
            with open(os.path.join(local, name), "wb") as stream:
                stream.write(_header(f"{folder}/{name}"))
                stream.truncate(num_bytes)
        yield local


def _header(path: str) -> bytes:
    with reading(path) as reader:
        length = reader.read(0, 8)
        return length + reader.read(8, int.from_bytes(length, "little"))
