"""Inputs that stay in memory between merges: files mapped once, with all their pages.

The pages are those of the kernel's cache, so the evaluators of a node share them, and a file costs
the disk one pass. On GPUs a file is copied to the one with the most room, if any has enough; what
is not there goes through pinned buffers like every other merge.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


class Source(NamedTuple):
    """A file in memory."""

    data: NDArray[np.uint8]
    """All of its bytes; writing to them would end the process."""
    memory: mmap.mmap
    """What they lie in."""
    on_device: torch.Tensor | None
    """The same on a device, if there is room."""


class MappedSources:
    """Whole files, up to a bound."""

    def __init__(
        self,
        budget_bytes: int,
        *,
        device_budgets: Mapping[str, int] | None = None,
        room_of: Callable[[str], int] = lambda device: 1 << 62,
    ) -> None:
        """Take the bounds; nothing is mapped yet.

        Args:
            budget_bytes: of all files together, in host memory. What comes later is not mapped.
            device_budgets: bytes of the copies on each device.
            room_of: says how many bytes a device has to spare when a file comes.
        """
        self._left = budget_bytes
        self._device_left, self._room_of = dict(device_budgets or {}), room_of
        self._files: dict[str, Source | None] = {}
        self._lock = threading.Lock()
        self.num_bytes = 0
        """Bytes of the files that were mapped so far: what was read from the disk, or its cache."""
        self.num_device_bytes = 0
        """Bytes of the copies on devices."""

    def find(self, path: str) -> Source | None:
        """Return a file's bytes, not to be written to; None where there was no room for it, or no such file."""
        if path in self._files:
            return self._files[path]
        with self._lock:
            if path not in self._files:
                self._files[path] = self._map(path)
            return self._files[path]

    def _map(self, path: str) -> Source | None:
        try:
            num_bytes = os.path.getsize(path)
            if not 0 < num_bytes <= self._left:
                return None
            with open(path, "rb") as file:
                # On Linux all pages at once: touching them one by one is twenty times slower.
                populate = getattr(mmap, "MAP_POPULATE", 0)
                memory = mmap.mmap(
                    file.fileno(), num_bytes, flags=mmap.MAP_SHARED | populate, prot=mmap.PROT_READ
                )
        except OSError:
            return None  # who reads it the ordinary way is told what is wrong
        self._left -= num_bytes
        self.num_bytes += num_bytes
        data = _array_over(memory)
        device = self._device_for(num_bytes)
        if device is None:
            return Source(data, memory, None)
        self._device_left[device] -= num_bytes
        self.num_device_bytes += num_bytes
        return Source(data, memory, _copied(data, device))

    def _device_for(self, num_bytes: int) -> str | None:
        """Return the device with the most left for a file; None where it does not fit."""
        left = {device: min(budget, self._room_of(device)) for device, budget in self._device_left.items()}
        device = max(left, key=lambda each: left[each], default=None)
        return None if device is None or num_bytes > left[device] else device


def _array_over(memory: mmap.mmap) -> NDArray[np.uint8]:
    """Return an array that torch takes for writable: it warns of every other, and nobody writes to a source."""
    address = np.frombuffer(memory, np.uint8).ctypes.data
    return np.ctypeslib.as_array((ctypes.c_uint8 * len(memory)).from_address(address))


def _copied(data: NDArray[np.uint8], device: str) -> torch.Tensor:
    import torch

    return torch.from_numpy(data).to(device, copy=True)
