"""Read ranges of remote objects: several at once, each byte once, repeated when the store fails."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Iterator, Sequence

from raymerge.merge_actors.errors import CheckpointError
from raymerge.merge_actors.files import RangeRead
from raymerge.merge_actors.storage.retry import ShortReadError, with_retries
from raymerge.merge_actors.storage.store import Reader, store_of

#: Requests of one process that are under way at once.
NUM_IN_FLIGHT = 16
#: Bytes of a request at most: enough that its latency hardly counts.
REQUEST_BYTES = 8 << 20
#: Neighbours in a file that are smaller than this are fetched by one request.
_SMALL_BYTES = 4 << 20

Fetch = Callable[[str, int, memoryview], None]


class RemoteRanges:
    """Objects that are open for reading, some times each, by URI."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: dict[str, list[Reader]] = {}
        self.fetched_bytes = 0
        """Bytes that came from stores; a request that failed does not count."""

    def num_bytes(self, uri: str) -> int:
        """Return the length of an object.

        Raises:
            CheckpointError: it is absent, or the store keeps failing.
        """
        reader = with_retries(lambda: self._take(uri), f"read {uri}", CheckpointError)
        self._give_back(uri, reader)
        return reader.num_bytes

    def identity(self, uri: str) -> tuple[int, str]:
        """Return the length of an object, and a text that is another one when its content is.

        Raises:
            CheckpointError: it is absent, or the store keeps failing.
        """
        reader = with_retries(lambda: self._take(uri), f"read {uri}", CheckpointError)
        self._give_back(uri, reader)
        if reader.tag:
            return reader.num_bytes, reader.tag
        entry = with_retries(lambda: store_of(uri).entry(uri), f"look at {uri}", CheckpointError)
        return reader.num_bytes, entry.version if entry else ""

    def read_into(self, uri: str, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the object's bytes from `offset` by one request.

        Raises:
            CheckpointError: the object ends before that, or the store keeps failing.
        """
        if not len(buffer):
            return
        what = f"read bytes [{offset:,}, {offset + len(buffer):,}) of {uri}"
        with_retries(lambda: self._read_once(uri, offset, buffer), what, CheckpointError)
        with self._lock:
            self.fetched_bytes += len(buffer)

    def close(self) -> None:
        """Let all objects go."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for reader in [reader for readers in idle.values() for reader in readers]:
            reader.close()

    def _read_once(self, uri: str, offset: int, buffer: memoryview) -> None:
        reader = self._take(uri)
        if offset + len(buffer) > reader.num_bytes:
            raise CheckpointError(
                f"{uri} ends at byte {reader.num_bytes:,}, {offset + len(buffer) - reader.num_bytes:,} bytes before "
                "the tensor does: it was truncated or replaced during the merge"
            )
        try:
            got = reader.read_into(offset, buffer)
        except OSError:
            reader.close()  # whatever state the connection is in, the next attempt has a new one
            raise
        if got != len(buffer):
            reader.close()
            raise ShortReadError(f"{got:,} bytes came of {len(buffer):,}")
        self._give_back(uri, reader)

    def _take(self, uri: str) -> Reader:
        with self._lock:
            idle = self._idle.get(uri)
            if idle:
                return idle.pop()
        return store_of(uri).open(uri)

    def _give_back(self, uri: str, reader: Reader) -> None:
        with self._lock:
            self._idle.setdefault(uri, []).append(reader)


class RangePool:
    """Threads that fetch ranges; made when first needed."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._lock = threading.Lock()
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None

    def start(self, reads: Sequence[RangeRead]) -> list[concurrent.futures.Future[None]]:
        """Begin to fill the buffers; the caller waits for the futures."""
        with self._lock:
            if self._pool is None:
                self._pool = concurrent.futures.ThreadPoolExecutor(NUM_IN_FLIGHT, thread_name_prefix="range")
            pool = self._pool
        return [pool.submit(self._fetch_group, group) for group in requests_for(reads)]

    def close(self) -> None:
        """Stop the threads."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _fetch_group(self, group: Sequence[RangeRead]) -> None:
        if len(group) == 1:
            self._fetch(*group[0])
            return
        data = memoryview(bytearray(sum(len(read.buffer) for read in group)))
        self._fetch(group[0].path, group[0].offset, data)
        at = 0
        for read in group:
            read.buffer[:] = data[at : at + len(read.buffer)]
            at += len(read.buffer)


def requests_for(reads: Sequence[RangeRead]) -> Iterator[list[RangeRead]]:
    """Cut long ranges and join small neighbours; yields what one request fetches.

    The ranges of a request lie end to end in their file, so no byte is fetched that was not asked for.
    """
    group: list[RangeRead] = []
    filled = 0
    for read in sorted(reads, key=lambda read: (read.path, read.offset)):
        is_small = len(read.buffer) < _SMALL_BYTES
        if group:
            last = group[-1]
            is_next = (read.path, read.offset) == (last.path, last.offset + len(last.buffer))
            if not (is_small and is_next and filled + len(read.buffer) <= REQUEST_BYTES):
                yield group
                group, filled = [], 0
        if is_small:
            group.append(read)
            filled += len(read.buffer)
            continue
        for at in range(0, len(read.buffer), REQUEST_BYTES):
            yield [RangeRead(read.path, read.offset + at, read.buffer[at : at + REQUEST_BYTES])]
    if group:
        yield group


def wait_for(futures: Sequence[concurrent.futures.Future[None]]) -> None:
    """Wait for ranges; on an error drop those that have not begun, wait for the others, and raise it."""
    try:
        for future in futures:
            future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        concurrent.futures.wait(futures)
        raise
