"""torch's number of threads, borrowed by the workers of a process and given back.

A merge worker computes on one core; a program that merges in its own process keeps its setting.
"""

from __future__ import annotations

import threading

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
