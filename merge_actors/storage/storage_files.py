"""The files of a worker wherever they are: local paths by descriptor, URIs by range."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.merge_actors.files import LocalFiles, RangeRead
from raymerge.merge_actors.storage.ranges import RangePool, RemoteRanges, wait_for
from raymerge.merge_actors.storage.stage import Stage
from raymerge.merge_actors.storage.uris import is_remote


class StorageFiles(LocalFiles):
    """Local files, and objects of any store for reading."""

    def __init__(self, stage: str | None = None) -> None:
        """Open nothing yet.

        Args:
            stage: folder on this node's disk where ranges of remote objects are kept; None keeps none.
        """
        super().__init__()
        self._remote = RemoteRanges()
        self._stage = Stage(stage, self._remote) if stage is not None else None
        self._pool = RangePool(self._remote.read_into if self._stage is None else self._stage.read_into)
        self._taken_bytes = 0

    def read_into(self, path: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the file's bytes from `offset`."""
        if is_remote(path):
            wait_for(self._pool.start([RangeRead(path, offset, buffer)]))
        else:
            super().read_into(path, offset, buffer)

    def read_many(self, reads: Sequence[RangeRead]) -> None:
        """Fill many buffers: remote ranges several at once, local ones meanwhile."""
        started = self._pool.start(remote) if (remote := [r for r in reads if is_remote(r.path)]) else []
        try:
            super().read_many([read for read in reads if not is_remote(read.path)] if started else reads)
        finally:
            wait_for(started)

    def remarks(self) -> tuple[str, ...]:
        """Return what the user should know of how inputs are read."""
        return (self._stage.remark,) if self._stage is not None and self._stage.remark else ()

    def take_fetched_bytes(self) -> int:
        """Return how many bytes came from stores since this was last asked."""
        with self._lock:
            taken, self._taken_bytes = self._taken_bytes, self._remote.fetched_bytes
            return self._taken_bytes - taken

    def close(self) -> None:
        """Close every file, local or remote."""
        self._pool.close()
        self._remote.close()
        if self._stage is not None:
            self._stage.close()
        super().close()
