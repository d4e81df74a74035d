"""A lane: the buffers of one task under way, used again for the next task.

On a CPU the inputs are merged where they were read. On a GPU the host buffers are pinned and
each lane has its own stream: copies in, kernels and copies out of one lane are in order, and
two lanes overlap each other.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

from raymerge.merge_actors.methods.block import Pool

if TYPE_CHECKING:
    import torch


class Lane:
    """Reusable buffers on one device."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device = device
        self.pool = Pool(device)
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._host_in = self._host_out = torch.empty(0, dtype=torch.uint8)
        self._device_out = self._host_out

    def host_arena(self, num_bytes: int) -> torch.Tensor:
        """Return host memory for a task's inputs: uint8, pinned on a GPU machine."""
        if self._host_in.numel() < num_bytes:
            self._host_in = self._host_memory(num_bytes)
        return self._host_in[:num_bytes]

    def output_arena(self, num_bytes: int) -> torch.Tensor:
        """Return device memory for a task's outputs: uint8."""
        import torch

        if self._host_out.numel() < num_bytes:
            self._host_out = self._host_memory(num_bytes)
            self._device_out = self._host_out
            if self._stream is not None:
                self._device_out = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        return self._device_out[:num_bytes]

    @contextlib.contextmanager
    def computing(self, lock: threading.Lock | None) -> Iterator[None]:
        """Hold `lock`, if any, and make this lane's stream the current one."""
        import torch

        with lock or contextlib.nullcontext():
            if self._stream is None:
                with torch.inference_mode():
                    yield
            else:
                with torch.inference_mode(), torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                    yield

    def to_device(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        """Return the inputs on the lane's device; the copies are asynchronous on its stream."""
        if self._stream is None:
            return inputs
        return [tensor.to(self.device, non_blocking=True) for tensor in inputs]

    def fetch_output(self, num_bytes: int) -> None:
        """Wait until the first `num_bytes` of the output are in host memory."""
        if self._stream is not None:
            self._host_out[:num_bytes].copy_(self._device_out[:num_bytes], non_blocking=True)
            self._stream.synchronize()

    def host_bytes(self, begin: int, num_bytes: int) -> memoryview:
        """Return a view of output bytes in host memory, valid after `fetch_output`."""
        return self._host_out.numpy().data[begin : begin + num_bytes]

    def _host_memory(self, num_bytes: int) -> torch.Tensor:
        import torch

        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)
