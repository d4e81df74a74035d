"""One input of a piece in host memory: bytes and the name of their element type.

Not a tensor, since a worker whose methods all have kernels never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.dtypes import torch_dtype

if TYPE_CHECKING:
    import torch


class HostInput(NamedTuple):
    """Elements in host memory, flat."""

    data: NDArray[np.uint8]
    """Their bytes; none where they are on the device already."""
    dtype: str
    """safetensors name."""
    on_device: torch.Tensor | None = None
    """Their bytes on the device, where an evaluator keeps its sources there."""

    def tensor(self) -> torch.Tensor:
        """Return the same memory as a flat tensor."""
        import torch

        if self.on_device is not None:
            return self.on_device.view(torch_dtype(self.dtype))
        if not len(self.data):  # the stride of an empty array may be 0, and torch then takes no wider view
            return torch.empty(0, dtype=torch_dtype(self.dtype))
        return torch.from_numpy(self.data).view(torch_dtype(self.dtype))


def host_input(tensor_P: torch.Tensor, dtype: str) -> HostInput:
    """Return a flat tensor in host memory as an input."""
    import torch

    return HostInput(tensor_P.view(torch.uint8).numpy(), dtype)
