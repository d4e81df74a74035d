"""Add up a statistic over the workers of a group, at the worker that owns it.

Phases: every member calls `reduce` for the same statistics in the same order; each hands over its
sum; the owner is left with the total, the others with nothing of use. A single member exchanges nothing.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

#: Ranks of the workers that sum the same statistics, ascending.
Members = tuple[int, ...]


class Exchange(Protocol):
    """One worker's end of the exchange."""

    def reduce(self, total: torch.Tensor, owner: int, members: Members | None = None) -> None:
        """Add the members' sums (all workers' by default) into the owner's `total`, in place."""

    def close(self) -> None:
        """Let go; workers that wait for this one get an error."""


class NoExchange:
    """The exchange of a single worker."""

    def reduce(self, total: torch.Tensor, owner: int, members: Members | None = None) -> None:
        """Leave the total as it is."""

    def close(self) -> None:
        """Do nothing."""


class ThreadMeeting:
    """Where the threads of one process meet."""

    def __init__(self, num_workers: int) -> None:
        self.slots: list[torch.Tensor | None] = [None] * num_workers
        self.everyone: Members = tuple(range(num_workers))
        self._barriers: dict[Members, threading.Barrier] = {}
        self._lock = threading.Lock()
        self._is_over = False

    def barrier(self, members: Members) -> threading.Barrier:
        """Return where some of the workers wait for each other."""
        with self._lock:
            if members not in self._barriers:
                self._barriers[members] = threading.Barrier(len(members))
                if self._is_over:
                    self._barriers[members].abort()
            return self._barriers[members]

    def abort(self) -> None:
        """Give an error to all who wait, now or later."""
        with self._lock:
            self._is_over = True
            for barrier in self._barriers.values():
                barrier.abort()


class ThreadExchange:
    """Exchange between threads of one process."""

    def __init__(self, meeting: ThreadMeeting, rank: int) -> None:
        self._meeting, self._rank = meeting, rank

    def reduce(self, total: torch.Tensor, owner: int, members: Members | None = None) -> None:
        """Let the owner add the others' sums in the order of the workers."""
        members = self._meeting.everyone if members is None else members
        if len(members) == 1:
            return
        slots, barrier = self._meeting.slots, self._meeting.barrier(members)
        slots[self._rank] = total
        barrier.wait()
        if self._rank == owner:
            for rank in members:
                other = slots[rank]
                if rank != owner:
                    assert other is not None
                    total.add_(other)
        barrier.wait()
        slots[self._rank] = None

    def close(self) -> None:
        """Wake whoever waits."""
        self._meeting.abort()


class TorchExchange:
    """Exchange between processes through torch.distributed: gloo on CPUs, nccl on GPUs."""

    def __init__(self, rank: int, num_workers: int, store: Any, device: str) -> None:
        """Join the group; returns when all have."""
        import torch.distributed

        if torch.distributed.is_initialized():  # of an earlier run in this process
            torch.distributed.destroy_process_group()
        backend = "nccl" if device.startswith("cuda") else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=rank, world_size=num_workers)
        self._subgroups: dict[Members, Any] = {tuple(range(num_workers)): None}

    def reduce(self, total: torch.Tensor, owner: int, members: Members | None = None) -> None:
        """Send the sum towards the owner; it crosses the network once."""
        import torch.distributed

        if members is not None and len(members) == 1:
            return
        if members is not None and members not in self._subgroups:
            # Only the members meet: the other workers are busy with statistics of their own.
            self._subgroups[members] = torch.distributed.new_group(
                list(members), use_local_synchronization=True
            )
        group = None if members is None else self._subgroups[members]
        torch.distributed.reduce(total, dst=owner, group=group)

    def close(self) -> None:
        """Leave the group."""
        import torch.distributed

        torch.distributed.destroy_process_group()


def make_store(host: str, num_workers: int) -> Any:
    """Open the meeting place of a group on a port that the system chooses.

    Args:
        host: address of this node; nothing listens at its others.
        num_workers: of the group.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    _stay_on_loopback(host)
    family, *_, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family)
    listener.bind(address)
    listener.listen()
    port = listener.getsockname()[1]
    return TCPStore(
        host, port, num_workers, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def join_store(host: str, port: int, num_workers: int) -> Any:
    """Connect to the meeting place that another worker has opened."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    _stay_on_loopback(host)
    return TCPStore(host, port, num_workers, is_master=False, wait_for_workers=False)


def _stay_on_loopback(host: str) -> None:
    """Let the group of an embedded Ray talk on this machine only: sums go from process to process unencrypted."""
    address = str(socket.getaddrinfo(host, None)[0][4][0]).partition("%")[0]
    if sys.platform == "linux" and ipaddress.ip_address(address).is_loopback:
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(variable, "lo")
