"""Add up a statistic over the workers of a group, at the worker that owns it.

Phases: every worker calls `reduce` for the same statistics in the same order; each hands over its
sum; the owner is left with the total, the others with nothing of use. With one worker
nothing is exchanged.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch


class Exchange(Protocol):
    """One worker's end of the exchange."""

    def reduce(self, total: torch.Tensor, owner: int) -> None:
        """Add all workers' sums into the owner's `total`, in place."""

    def close(self) -> None:
        """Let go; workers that wait for this one get an error."""


class NoExchange:
    """The exchange of a single worker."""

    def reduce(self, total: torch.Tensor, owner: int) -> None:
        """Leave the total as it is."""

    def close(self) -> None:
        """Do nothing."""


class ThreadMeeting:
    """Where the threads of one process meet."""

    def __init__(self, num_workers: int) -> None:
        self.slots: list[torch.Tensor | None] = [None] * num_workers
        self.barrier = threading.Barrier(num_workers)


class ThreadExchange:
    """Exchange between threads of one process."""

    def __init__(self, meeting: ThreadMeeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank

    def reduce(self, total: torch.Tensor, owner: int) -> None:
        """Let the owner add the others' sums in the order of the workers."""
        slots = self._meeting.slots
        slots[self._rank] = total
        self._meeting.barrier.wait()
        if self._rank == owner:
            for rank, other in enumerate(slots):
                if rank != owner:
                    assert other is not None
                    total.add_(other)
        self._meeting.barrier.wait()
        slots[self._rank] = None

    def close(self) -> None:
        """Wake whoever waits."""
        self._meeting.barrier.abort()


class TorchExchange:
    """Exchange between processes through torch.distributed: gloo on CPUs, nccl on GPUs."""

    def __init__(self, rank: int, num_workers: int, store: Any, device: str) -> None:
        """Join the group; returns when all have."""
        import torch.distributed

        backend = "nccl" if device.startswith("cuda") else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=num_workers)

    def reduce(self, total: torch.Tensor, owner: int) -> None:
        """Send the sum towards the owner; it crosses the network once."""
        import torch.distributed

        torch.distributed.reduce(total, dst=owner)

    def close(self) -> None:
        """Leave the group."""
        import torch.distributed

        torch.distributed.destroy_process_group()


def make_store(host: str, num_workers: int) -> Any:
    """Open the meeting place of a group on a port that the system chooses."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(host, 0, num_workers, is_master=True, wait_for_workers=False, multi_tenant=True)


def join_store(host: str, port: int, num_workers: int) -> Any:
    """Connect to the meeting place that another worker has opened."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    return TCPStore(host, port, num_workers, is_master=False, wait_for_workers=False)
