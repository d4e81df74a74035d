"""Run a model whose blocks lie on several devices: tensors are handed over as they enter a block.

The blocks' modules are called as ever; a hook before each moves its arguments to where its parameters are, and one
behind the last block of a stack brings the hidden states home. So whatever stands outside the blocks (embeddings,
masks, heads, generation) sees one device, and what a block keeps, its keys and values, stays where the block is.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raymerge.stats.block_passes import stack_of

if TYPE_CHECKING:
    import torch

#: Tensors that were handed over, by identity: the tensor, kept so that its id stays its own, and the copy.
_HandedOver = dict[int, tuple[Any, Any]]


class SpreadBlocks:
    """The hooks of one model; undone by `close`."""

    def __init__(self, model: Any, device_of: Mapping[str, int], devices: Sequence[str]) -> None:
        """Set hooks on the blocks, unless all of them are home.

        Args:
            model: its parameters and buffers are where they belong.
            device_of: number of the device of every block, by name, in the order in which they run.
            devices: by number; the first one is home.
        """
        self._devices = devices
        self._handles: list[Any] = []
        self._local = threading.local()
        if not any(device_of.values()):
            return
        stacks: dict[str, list[str]] = {}
        for name in device_of:
            stacks.setdefault(stack_of(name), []).append(name)
        for names in stacks.values():
            self._hook_stack(model, names, [device_of[name] for name in names])

    def _hook_stack(self, model: Any, names: Sequence[str], numbers: Sequence[int]) -> None:
        first_away = next((i for i, number in enumerate(numbers) if number), len(numbers))
        for i in range(first_away, len(names)):
            before = self._before(numbers[i], is_first=i == first_away or numbers[i - 1] != numbers[i])
            module = model.get_submodule(names[i])
            self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        if numbers[-1]:
            self._handles.append(model.get_submodule(names[-1]).register_forward_hook(self._bring_home))

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, device: int, *, is_first: bool) -> Any:
        def hook(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
            known = self._handed_over(anew=is_first)
            return self._moved(arguments, device, known), self._moved(named, device, known)

        return hook

    def _bring_home(self, module: Any, arguments: Any, output: Any) -> Any:
        return self._moved(output, 0, self._handed_over(anew=True))

    def _handed_over(self, *, anew: bool) -> _HandedOver:
        """Return what this thread handed over: masks and positions once for all blocks of a device in a row."""
        if anew or not hasattr(self._local, "handed_over"):
            self._local.handed_over = {}
        found: _HandedOver = self._local.handed_over
        return found

    def _moved(self, value: Any, device: int, known: _HandedOver) -> Any:
        """Return a value with every tensor in it on a device; caches and other objects are left alone."""
        import torch

        if isinstance(value, torch.Tensor):
            if id(value) in known:
                return known[id(value)][1]
            moved = hand_over(value, device, self._devices)
            if moved is not value:
                known[id(value)] = (value, moved)
            return moved
        if type(value) in (tuple, list):
            return type(value)(self._moved(each, device, known) for each in value)
        if type(value) is dict:
            return {name: self._moved(each, device, known) for name, each in value.items()}
        return value


def hand_over(tensor: torch.Tensor, device: int, devices: Sequence[str]) -> torch.Tensor:
    """Return a tensor on a device: itself, if it is there."""
    return tensor.to(devices[device])  # between GPUs nobody waits: the streams are in order
