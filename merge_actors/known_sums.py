"""Sums of Gram matrices, kept from merge to merge: what an alpha axis shrinks and factorises."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

from raymerge.merge_actors.methods.regmean_solve import GramSums


class KnownSums:
    """Sums by the matrices and weights that they were made of, up to a bound; the oldest go first."""

    def __init__(self, budget_bytes: int) -> None:
        self._left = budget_bytes
        self._sums: OrderedDict[Hashable, GramSums] = OrderedDict()
        self._lock = threading.Lock()
        self.num_reused = 0
        """Sums that were taken over."""

    def get(self, key: Hashable, make: Callable[[], GramSums]) -> GramSums:
        """Return the sums of a key, made now if they are not there."""
        with self._lock:
            found = self._sums.get(key)
            if found is not None:
                self._sums.move_to_end(key)
                self.num_reused += 1
                return found
        made = make()
        with self._lock:
            self._sums[key] = made
            self._left -= _bytes_of(made)
            while self._left < 0 and self._sums:
                self._left += _bytes_of(self._sums.popitem(last=False)[1])
        return made


def _bytes_of(sums: GramSums) -> int:
    return sums.triangle_T.numel() * sums.triangle_T.element_size()
