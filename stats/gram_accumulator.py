"""Sum X^T X over the rows of linear maps' inputs.

A shard is summed in float32 on the device, whatever type the rows have; finished shards are
added up in float64 as packed triangles, so that the grouping of shards over workers is lost when
the sum is cast to float32. Only block columns of the upper triangle are computed: with k
blocks (k + 1) / 2k of the operations of the full product.

Shapes: R rows, I in features, T elements of a packed triangle.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from raymerge.merge_actors.methods.gram_matrix import pack_upper, triangle_elements

if TYPE_CHECKING:
    import torch

    from raymerge.stats.input_capture import Key

#: Block columns of a Gram, and the least width of one that keeps a matrix unit busy.
_NUM_BLOCKS = 8
_LEAST_BLOCK_COLUMNS = 256


def gram_bytes(in_features: int, num_tiers: int = 1) -> int:
    """Return what a Gram takes while it is summed: a float32 square, and a float64 triangle for each tier."""
    return 4 * in_features**2 + 8 * triangle_elements(in_features) * (num_tiers + (num_tiers > 1))


class GramAccumulator:
    """The Grams of one worker, by key."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._shard_II: dict[Key, torch.Tensor] = {}
        self._totals_T: dict[Key, dict[int, torch.Tensor]] = {}
        self.is_timed = False
        """Wait for the device before and after each update, and count operations and seconds?"""
        self.num_operations = 0
        """Floating-point operations of the timed updates."""
        self.seconds = 0.0
        """Spent in the timed updates."""

    def add(self, key: Key, rows_RI: torch.Tensor, weight: int = 1) -> None:
        """Add weight * X^T X to the running shard."""
        import torch

        in_features = rows_RI.shape[1]
        if key not in self._shard_II:
            self._shard_II[key] = torch.zeros((in_features, in_features), device=self._device)
        if not self.is_timed:
            add_gram(self._shard_II[key], rows_RI, weight)
            return
        synchronize(self._device)
        begin = time.perf_counter()
        self.num_operations += add_gram(self._shard_II[key], rows_RI, weight)
        synchronize(self._device)
        self.seconds += time.perf_counter() - begin

    def end_shard(self, tier: int = 0) -> None:
        """Add the running shard to the totals of its tier and begin another."""
        for key, shard_II in self._shard_II.items():
            packed_T = pack_upper(shard_II).double()
            by_tier = self._totals_T.setdefault(key, {})
            if tier in by_tier:
                by_tier[tier].add_(packed_T)
            else:
                by_tier[tier] = packed_T
            shard_II.zero_()

    def non_finite(self) -> Iterator[Key]:
        """Yield the keys whose running shard has seen NaN or infinity."""
        for key, shard_II in self._shard_II.items():
            if not bool(shard_II.diagonal().isfinite().all()):
                yield key

    def total(self, key: Key, in_features: int, tier: int | None = None) -> torch.Tensor:
        """Return the sum of all shards up to a tier (None: of all), float64 (T,); zeros for a key never seen."""
        import torch

        by_tier = self._totals_T.get(key, {})
        parts = [part_T for number, part_T in by_tier.items() if tier is None or number <= tier]
        if len(by_tier) == len(parts) == 1:
            return parts[0]
        total_T = torch.zeros(triangle_elements(in_features), dtype=torch.float64, device=self._device)
        for part_T in parts:
            total_T.add_(part_T)
        return total_T

    def forget(self, key: Key) -> None:
        """Free a key's memory."""
        self._shard_II.pop(key, None)
        self._totals_T.pop(key, None)


def add_gram(gram_II: torch.Tensor, rows_RI: torch.Tensor, weight: int = 1) -> int:
    """Add weight * X^T X to the upper triangle of a float32 matrix.

    Below the diagonal blocks nothing is written. Rows of float16 and bfloat16 are multiplied as they
    are and summed in float32 where the device can do that, and else cast first.

    Returns:
        the number of floating-point operations.
    """
    import torch

    in_features = rows_RI.shape[1]
    is_half = rows_RI.dtype in (torch.float16, torch.bfloat16)
    if not (is_half and rows_RI.is_cuda and hasattr(torch.ops.aten.mm, "dtype")):  # torch 2.8 and newer
        rows_RI = rows_RI.float()
        is_half = False
    width = max(_LEAST_BLOCK_COLUMNS, -(-in_features // _NUM_BLOCKS))
    num_operations = 0
    for begin in range(0, in_features, width):
        end = min(begin + width, in_features)
        above, columns = rows_RI[:, :end], rows_RI[:, begin:end]
        target = gram_II[:end, begin:end]
        if is_half:
            target.add_(torch.mm(above.T, columns, out_dtype=torch.float32), alpha=weight)
        else:
            target.addmm_(above.T, columns, alpha=weight)
        num_operations += 2 * rows_RI.shape[0] * end * (end - begin)
    return num_operations


def synchronize(device: str) -> None:
    """Wait until the device has done all that it was given."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()
