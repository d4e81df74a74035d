"""Cut a model into parts, one for each of the devices that hold it together, and say how many it takes. Pure.

What stands outside the blocks (embeddings, last norm, heads) is *home*, on the first device: tied weights are together
there, inputs go in and logits come out there. The blocks follow in the order in which they run, so that hidden
states cross from device to device once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

#: Share of a device that a second model and sources leave free.
COMFORTABLE_SHARE = 0.2
#: Share of a device that estimates leave free where devices are to be had: for what they miss.
MARGIN = 1 / 12
#: What a process takes of a device before its first tensor, and merging for its buffers.
RUNTIME_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelNeeds:
    """Bytes that a model takes on the devices that hold it."""

    home_weights: int
    """Parameters outside the blocks."""
    block_weights: tuple[int, ...]
    """Parameters of each block, in the order in which they run."""
    idle_weights: int = 0
    """Merged tensors that no task runs, which may lie anywhere."""
    home_activations: int = 0
    """Logits of a batch, an estimate."""
    block_activations: int = 0
    """What a forward pass through any block holds at a time, an estimate."""
    cache_of_block: int = 0
    """Keys and values that a block keeps while a batch is generated, an estimate."""
    dtype: str = ""
    """In which the model runs, for messages."""

    @property
    def weights(self) -> int:
        """Bytes of all parameters."""
        return self.home_weights + sum(self.block_weights) + self.idle_weights

    def fullest(self, num_parts: int) -> int:
        """Return what the fullest of so many devices has to hold, estimates included."""
        blocks = [each + self.cache_of_block for each in self.block_weights]
        home = self.home_weights + self.home_activations
        loads = loads_of(home, blocks, num_parts)
        level = -(-(sum(loads) + self.idle_weights) // num_parts)
        return max(*loads, level) + self.block_activations

    def fits(self, num_parts: int, device_bytes: float) -> bool:
        """Tell whether so many devices of a size, or shares of one, hold the model at all."""
        return self.fullest(num_parts) + RUNTIME_BYTES <= device_bytes

    def fits_well(self, num_parts: int, device_bytes: float) -> bool:
        """Tell whether they also leave a margin."""
        return self.fits(num_parts, device_bytes * (1 - MARGIN))


def cut_blocks(home_bytes: int, block_bytes: Sequence[int], num_parts: int) -> tuple[int, ...]:
    """Cut blocks into runs, one for each part, so that the fullest part is as empty as can be.

    Args:
        home_bytes: what the first part holds besides its blocks.
        block_bytes: of each block, in the order in which they run.
        num_parts: at least 1; some may stay without blocks.

    Returns:
        the part of every block, ascending.
    """
    low, high = max(home_bytes, *block_bytes, 0), home_bytes + sum(block_bytes)
    while low < high:
        bound = (low + high) // 2
        if _fill(home_bytes, block_bytes, bound)[1] < num_parts:
            high = bound
        else:
            low = bound + 1
    return _fill(home_bytes, block_bytes, low)[0]


def loads_of(home_bytes: int, block_bytes: Sequence[int], num_parts: int) -> list[int]:
    """Return the bytes of every part as `cut_blocks` cuts."""
    parts = cut_blocks(home_bytes, block_bytes, num_parts)
    loads = [home_bytes, *[0] * (num_parts - 1)]
    for part, num_bytes in zip(parts, block_bytes, strict=True):
        loads[part] += num_bytes
    return loads


def _fill(home_bytes: int, block_bytes: Sequence[int], bound: int) -> tuple[tuple[int, ...], int]:
    """Fill one part after the other up to a bound; return the part of every block and the last part."""
    parts, part, used = [], 0, home_bytes
    for num_bytes in block_bytes:
        if used + num_bytes > bound:
            part, used = part + 1, 0
        parts.append(part)
        used += num_bytes
    return tuple(parts), part
