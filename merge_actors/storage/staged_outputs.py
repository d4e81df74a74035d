"""Output files for an object store: made on the node's disk in any order, then uploaded whole.

A store has no positioned writes and no rename: an object is there when its upload is complete, and not before.
So one worker makes a file from its first to its last tensor in a temporary file without a name, which vanishes
with its process, and uploads it by parts. Memory is bounded by the parts in flight. A failed upload is repeated
from the disk; nothing is merged again.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.errors import OutputError
from raymerge.merge_actors.files import Files, RangeRead, write_error
from raymerge.merge_actors.host_input import HostInput
from raymerge.merge_actors.storage.retry import with_retries
from raymerge.merge_actors.storage.store import store_of
from raymerge.merge_actors.task import OutputObject

#: Bytes of a part of an upload.
PART_BYTES = 8 << 20
#: Parts of one upload under way at once; each is in memory.
PARTS_IN_FLIGHT = 8
#: Stores take 10,000 parts.
_MOST_PARTS = 9_000


class StagedOutputs:
    """`Files` whose writes go to temporary files."""

    def __init__(self, inputs: Files, objects: Sequence[OutputObject], folder: str | None) -> None:
        """Make the temporary files at their whole length, headers written.

        Args:
            inputs: for reading.
            objects: what is to be made.
            folder: on this node's disk; None for the system's temporary folder.

        Raises:
            OutputError: the disk has no room for them.
        """
        self._inputs, self._objects = inputs, objects
        self._files: dict[str, IO[bytes]] = {}
        self._folder = folder or tempfile.gettempdir()
        try:
            os.makedirs(self._folder, exist_ok=True)
            for each in objects:
                self._files[each.uri] = tempfile.TemporaryFile(prefix="raymerge-", dir=self._folder)
                descriptor = self._files[each.uri].fileno()
                os.posix_fallocate(descriptor, 0, each.num_bytes)
                os.pwrite(descriptor, each.header, 0)
        except OSError as error:
            self.close()
            total = sum(each.num_bytes for each in objects)
            raise OutputError(
                f"node {os.uname().nodename} has no room in {self._folder} for {total / 1e9:.2f} GB of output before "
                f"their upload ({error.strerror}); use --stage on a larger disk, or a smaller --out-shard-size"
            ) from error

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from an input."""
        self._inputs.read_into(path, offset, buffer)

    def read_many(self, reads: Sequence[RangeRead]) -> None:
        """Fill many buffers from inputs."""
        self._inputs.read_many(reads)

    def view(self, path: str, offset: int, num_bytes: int, dtype: str) -> HostInput | None:
        """Return elements of an input that are in memory anyway."""
        return self._inputs.view(path, offset, num_bytes, dtype)

    def output(self, path: str, offset: int, num_bytes: int) -> NDArray[np.uint8] | None:
        """Return None: a file is written from anywhere."""
        del path, offset, num_bytes
        return None

    def write_from(self, path: str, offset: int, buffer: memoryview) -> None:
        """Write `buffer` into the temporary file of an object."""
        descriptor = self._files[path].fileno()
        done = 0
        try:
            while done < len(buffer):
                done += os.pwrite(descriptor, buffer[done:], offset + done)
        except OSError as error:
            raise write_error(os.path.join(self._folder, os.path.basename(path)), error) from error

    def move(self, folder: str, here: str) -> None:
        """Read files of an input's `folder` from the folder `here`."""
        self._inputs.move(folder, here)

    def remarks(self) -> tuple[str, ...]:
        """Return what the user should know of how inputs are read."""
        return self._inputs.remarks()

    def take_fetched_bytes(self) -> int:
        """Return how many bytes of inputs came from object stores since this was last asked."""
        return self._inputs.take_fetched_bytes()

    def upload(self) -> None:
        """Upload every file whole.

        Raises:
            OutputError: the store refuses, or keeps failing.
        """
        for each in self._objects:
            descriptor = self._files[each.uri].fileno()
            upload(each.uri, descriptor, each.num_bytes)
            self._files.pop(each.uri).close()

    def close(self) -> None:
        """Drop what was not uploaded."""
        for file in self._files.values():
            file.close()
        self._files.clear()


def upload(uri: str, descriptor: int, num_bytes: int) -> None:
    """Upload an open local file.

    Raises:
        OutputError: the store refuses, or keeps failing.
    """
    part_bytes = max(PART_BYTES, -(-num_bytes // _MOST_PARTS))

    def parts() -> Iterator[bytes]:
        for begin in range(0, num_bytes, part_bytes):
            wanted = min(part_bytes, num_bytes - begin)
            data = os.pread(descriptor, wanted, begin)
            if len(data) != wanted:
                raise OSError(f"the staged file has {begin + len(data):,} bytes, not {num_bytes:,}")
            yield data

    in_flight = max(1, PARTS_IN_FLIGHT * PART_BYTES // part_bytes)
    with_retries(
        lambda: store_of(uri).write(uri, parts(), blocks_in_flight=in_flight), f"write {uri}", OutputError
    )
