"""Devices that are not there: CPU tensors carry the number of one, and no operation may see two numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class FakeDevices(TorchDispatchMode):
    """While entered, checks every operation of this thread: what it is given lies on one device.

    What an operation returns lies where its arguments do. Tensors that were made of nothing (zeros, aranges) have no
    number until they meet one that has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.num_copies = 0
        """Tensors that were handed over from one device to another."""
        self.used: dict[int, int] = {}
        """Operations on each device."""
        self._numbers: dict[int, int] = {}
        self._keep: list[Any] = []  # so that an address is never that of another storage

    def put(self, tensors: Iterable[torch.Tensor], number: int) -> None:
        """Say where tensors lie."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._keep.append(storage)
            self._numbers[storage._cdata] = number

    def of(self, tensor: torch.Tensor) -> int | None:
        """Return where a tensor lies."""
        return self._numbers.get(tensor.untyped_storage()._cdata)

    def hand_over(self, tensor: torch.Tensor, device: int, devices: Sequence[str]) -> torch.Tensor:
        """Copy a tensor to a device: the double of `block_hooks.hand_over`."""
        assert device < len(devices)
        if self.of(tensor) == device:
            return tensor
        self.num_copies += 1
        with _disable_current_modes():
            copy = tensor.clone()
        self.put([copy], device)
        return copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation if its tensors lie together."""
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, torch.Tensor)]
        numbers = {number for number in map(self.of, given) if number is not None}
        assert len(numbers) <= 1, f"{func} is given tensors of the devices {sorted(numbers)}"
        returned = func(*args, **(kwargs or {}))
        for number in numbers:
            self.used[number] = self.used.get(number, 0) + 1
            self.put((leaf for leaf in tree_leaves(returned) if isinstance(leaf, torch.Tensor)), number)
        return returned
