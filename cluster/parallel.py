"""Run a function over many items on a few threads, results in order, little in flight."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

#: More threads than this do not make one machine's storage faster.
_MOST_THREADS = 16


def num_usable_threads() -> int:
    """Return how many threads reading and measuring may use: the cores of this process, at most 16."""
    return min(_MOST_THREADS, len(os.sched_getaffinity(0)))


def map_in_order(
    function: Callable[[_Item], _Result], items: Iterable[_Item], num_threads: int
) -> Iterator[_Result]:
    """Yield `function(item)` for each item, in the order of the items.

    At most two items per thread are begun ahead of the one that is yielded, so memory stays
    bounded for any number of items. The first exception ends it; nothing begins after that.
    """
    waiting: deque[Future[_Result]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > 2 * num_threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
