"""A lane: the buffers of one task under way, used again for the next task.

On a CPU the inputs are merged where they were read. On a GPU the host buffers are pinned and
each lane has its own stream: copies in, kernels and copies out of one lane are in order, and
two lanes overlap each other. On a CPU nothing here imports torch before a tensor is asked for.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.dtypes import torch_dtype
from raymerge.merge_actors.host_input import HostInput
from raymerge.merge_actors.methods.block import Pool

if TYPE_CHECKING:
    import torch


class Lane:
    """Reusable buffers on one device."""

    def __init__(self, kind: Literal["cpu", "cuda"], gpu: int = 0) -> None:
        self._kind, self._gpu = kind, gpu
        self._stream: torch.cuda.Stream | None = None
        if kind == "cuda":
            import torch

            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        self._host_in = self._host_out = np.empty(0, np.uint8)
        self._device_out: torch.Tensor | None = None

    @functools.cached_property
    def device(self) -> torch.device:
        """Where tensors are merged."""
        import torch

        return torch.device("cuda", self._gpu) if self._kind == "cuda" else torch.device("cpu")

    @functools.cached_property
    def pool(self) -> Pool:
        """Scratch of the eager formulas."""
        return Pool(self.device)

    def host_arena(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return host memory for a task's inputs: pinned on a GPU machine."""
        if len(self._host_in) < num_bytes:
            self._host_in = self._host_memory(num_bytes)
        return self._host_in[:num_bytes]

    def make_output(self, num_bytes: int) -> None:
        """Make room for a batch of outputs, on the device and in host memory."""
        if len(self._host_out) < num_bytes:
            self._host_out = self._host_memory(num_bytes)
            if self._stream is not None:
                import torch

                self._device_out = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)

    def output(self, begin: int, num_bytes: int, dtype: str) -> torch.Tensor:
        """Return a flat tensor on the device for one output of the batch."""
        if self._device_out is None:
            return HostInput(self.host_output(begin, num_bytes), dtype).tensor()
        return self._device_out[begin : begin + num_bytes].view(torch_dtype(dtype))

    def host_output(self, begin: int, num_bytes: int) -> NDArray[np.uint8]:
        """Return output bytes in host memory; those of a GPU are there after `fetch_output`."""
        return self._host_out[begin : begin + num_bytes]

    @contextlib.contextmanager
    def computing(self, lock: threading.Lock | None) -> Iterator[None]:
        """Hold `lock`, if any, and make this lane's stream the current one."""
        with lock or contextlib.nullcontext():
            if self._stream is None:
                yield
            else:
                import torch

                with torch.cuda.device(self.device), torch.cuda.stream(self._stream):
                    yield

    def to_device(self, inputs: Sequence[HostInput]) -> list[torch.Tensor]:
        """Return the inputs as tensors on the lane's device; copies are asynchronous on its stream."""
        tensors = [each.tensor() for each in inputs]
        if self._stream is None:
            return tensors
        return [tensor.to(self.device, non_blocking=True) for tensor in tensors]

    def fetch_output(self, num_bytes: int) -> None:
        """Wait until the first `num_bytes` of the output are in host memory."""
        if self._stream is not None and self._device_out is not None:
            import torch

            host_out = torch.from_numpy(self._host_out[:num_bytes])
            host_out.copy_(self._device_out[:num_bytes], non_blocking=True)
            self._stream.synchronize()

    def _host_memory(self, num_bytes: int) -> NDArray[np.uint8]:
        if self._stream is None:
            return np.empty(num_bytes, np.uint8)  # large arrays of numpy lie in huge pages
        import torch

        memory: NDArray[np.uint8] = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()
        return memory
