"""torch's number of threads, borrowed by the workers of a process and given back.

A merge worker computes on one core; a program that merges in its own process keeps its setting.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_num_borrowers = 0
_num_threads_before = 0


def borrow_threads(num_threads: int) -> None:
    """Let this process's torch use `num_threads`; the first borrower's setting is the one restored."""
    import torch

    global _num_borrowers, _num_threads_before
    with _lock:
        if _num_borrowers == 0:
            _num_threads_before = torch.get_num_threads()
        _num_borrowers += 1
        torch.set_num_threads(num_threads)


def return_threads() -> None:
    """Restore the setting when the last borrower returns."""
    import torch

    global _num_borrowers
    with _lock:
        _num_borrowers -= 1
        if _num_borrowers == 0:
            torch.set_num_threads(_num_threads_before)


class TorchThreads:
    """One borrower: torch, imported and told its number of threads when it is first needed."""

    def __init__(self) -> None:
        self._borrowing = threading.Lock()
        self._has_borrowed = False

    @contextlib.contextmanager
    def computing(self, num_threads: int) -> Iterator[None]:
        """Compute with torch on so many threads, without gradients."""
        import torch

        with self._borrowing:
            if not self._has_borrowed:
                borrow_threads(num_threads)
                self._has_borrowed = True
        with torch.inference_mode():
            yield

    def give_back(self) -> None:
        """Give the threads back, if they were borrowed."""
        with self._borrowing:
            if self._has_borrowed:
                return_threads()
                self._has_borrowed = False
