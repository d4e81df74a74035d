"""NearSwap: take over the other model where it is near the base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raymerge.merge_actors.methods.interface import Method, Parameter

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block

#: Differences below this count as this much.
SMALLEST_DIFFERENCE = 1e-6


def nearswap(block: Block) -> torch.Tensor:
    """Move each element towards the other model, by `t` at most.

    With delta = x - b, the method (alchemonaut, QuartetAnemoi-70B-t0.0001, 2024) is
    w x + (1 - w) b for w = clamp(t / max(|delta|, 1e-6), 0, 1). As w |delta| = min(|delta|, t)
    that is b + clamp(delta, -t, t); below t = 1e-6 delta is multiplied by t / 1e-6 first.

    Args:
        block: the base and one model.

    Returns:
        The merged block, in the block's compute dtype.
    """
    t = block.number("t")
    delta = block.delta(0)
    if t < SMALLEST_DIFFERENCE:
        delta.mul_(t / SMALLEST_DIFFERENCE)
    return delta.clamp_(-t, t).add_(block.base())


NEARSWAP = Method(
    name="nearswap",
    merge=nearswap,
    parameters=(Parameter(name="t", required=True, minimum=0, doc="greatest change of an element"),),
    base="required",
    num_models=(1, 1),
    source="https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001",
)
