"""How task vectors are combined: their weighted sum, or the sum of those that agree in sign.

v_i = w_i delta_i, where delta_i = x_i - b has been through the sparsifying steps. Both
formulas end alike: out = b + lambda * sum / divisor. Masks are written on the bits of the
floats, which eager mode does several times faster than boolean masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from raymerge.merge_actors.methods.interface import Parameter, Settings
from raymerge.merge_actors.methods.kernel_formula import KernelFormula

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block

#: Weights whose sum is this small against the sum of their sizes have cancelled.
_CANCELLED = 1e-6

WEIGHT = Parameter(name="weight", per_model=True, required=True, doc="factor on the model's task vector")
LAMBDA = Parameter(name="lambda", default=1.0, doc="factor on the merged task vector")
NORMALIZE = Parameter(
    name="normalize", kind=bool, default=False, doc="divide by the sum of the weights that count"
)
MERGE_FUNC = Parameter(
    name="merge_func",
    kind=str,
    default=None,
    choices=("mean", "sum", "max"),
    doc="what becomes of the agreeing entries: mean (normalize: true), sum (normalize: false) or the largest",
)


def sum_task_vectors(block: Block) -> torch.Tensor:
    """Add weighted task vectors to the base: b + lambda sum_i w_i delta_i.

    Ilharco et al. 2022, arXiv:2212.04089, section 2. `normalize` divides by sum_i w_i; where
    the weights cancel (a filter sets them all to 0) the divisor is 1 and not an error.

    Args:
        block: a base and any models, sparsifying steps already in their deltas.

    Returns:
        The merged elements, in the block's compute dtype.
    """
    import torch

    weights = block.numbers("weight")
    total = block.delta(0)
    if weights[0] != 1:
        total.mul_(weights[0])
    delta = block.scratch() if len(weights) > 1 else None
    for i, weight in enumerate(weights[1:], start=1):
        total.add_(block.delta(i, out=delta), alpha=weight)
    return torch.add(block.base(), total, alpha=_scale_of_sum(block.settings, weights), out=total)


def sum_task_vectors_kernel(settings: Settings) -> KernelFormula:
    """Return `sum_task_vectors` for the compiled kernels."""
    weights = _weights(settings)
    return KernelFormula(kind="sum", weights=weights, scale=_scale_of_sum(settings, weights))


def sum_agreeing(block: Block) -> torch.Tensor:
    """Add the task vectors that agree with the elected sign: b + lambda merge{v_i : sign v_i = e}.

    Yadav et al. 2023 (TIES), arXiv:2306.01708, section 3.2: e is + where sum_i v_i >= 0, else -.
    An entry of 0 never counts. `merge_func` mean (or `normalize`) divides by the sum of the
    w_i that count (1 where none does or where they cancel), sum does not divide, max takes the
    entry of largest size. We elect by weighted entries; the paper has no weights.

    Args:
        block: a base and any models, sparsifying steps already in their deltas.

    Returns:
        The merged elements, in the block's compute dtype.
    """
    import torch

    weights = block.numbers("weight")
    function = _merge_function(block.settings)
    vectors = [block.delta(i) for i in range(block.num_models)]
    for vector, weight in zip(vectors, weights, strict=True):
        if weight != 1:
            vector.mul_(weight)
    signs = elected_signs(block, vectors)
    for vector in vectors:
        # Flip signs so that the elected one is +; what disagrees is then negative.
        bits(vector).bitwise_xor_(signs)
        vector.clamp_min_(0)
    divisor = _counting_weights(block, vectors, weights) if function == "mean" else None
    total = vectors[0]
    for vector in vectors[1:]:
        torch.maximum(total, vector, out=total) if function == "max" else total.add_(vector)
    if divisor is not None:
        total.div_(divisor)
    bits(total).bitwise_xor_(signs)
    return torch.add(block.base(), total, alpha=block.number("lambda"), out=total)


def sum_agreeing_kernel(settings: Settings) -> KernelFormula | None:
    """Return `sum_agreeing` for the compiled kernels, which do not have `max`."""
    weights, function = _weights(settings), _merge_function(settings)
    if function == "max":
        return None
    return KernelFormula(
        kind="sum agreeing",
        weights=weights,
        scale=_number(settings, "lambda"),
        is_mean=function == "mean",
        least_divisor=_least_divisor(weights) if min(weights) >= 0 else 0.0,
        cancelled=_CANCELLED * sum(map(abs, weights)),
    )


def elected_signs(block: Block, vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return integers whose sign bit alone is set, and only where sum_i v_i < 0."""
    import torch

    # Adding +0 first turns a sum of -0 into +0, which elects +.
    total = torch.add(vectors[0], 0.0, out=block.scratch())
    for vector in vectors[1:]:
        total.add_(vector)
    return bits(total).bitwise_and_(_sign_bit(total))


def bits(values: torch.Tensor) -> torch.Tensor:
    """View floats as the integers of the same width."""
    import torch

    return values.view(torch.int64 if values.dtype == torch.float64 else torch.int32)


def _sign_bit(values: torch.Tensor) -> int:
    return -(1 << (8 * values.element_size() - 1))


def _counting_weights(
    block: Block, vectors: Sequence[torch.Tensor], weights: Sequence[float]
) -> torch.Tensor:
    """Return sum_i w_i [v_i > 0], but 1 where none counts or the weights cancel; every v_i >= 0."""
    import torch

    divisor, counts = block.scratch(), block.scratch()
    torch.sign(vectors[0], out=divisor)
    divisor.mul_(weights[0])
    for vector, weight in zip(vectors[1:], weights[1:], strict=True):
        divisor.add_(torch.sign(vector, out=counts), alpha=weight)
    if min(weights) >= 0:
        # Where none counts the sum is 0, and any positive divisor leaves it so.
        return divisor.clamp_min_(_least_divisor(weights))
    return divisor.masked_fill_(divisor.abs() <= _CANCELLED * sum(map(abs, weights)), 1.0)


def _least_divisor(weights: Sequence[float]) -> float:
    return min([w for w in weights if w > 0], default=1.0)


def _merge_function(settings: Settings) -> str:
    return str(settings.shared["merge_func"] or ("mean" if settings.shared["normalize"] else "sum"))


def _scale_of_sum(settings: Settings, weights: Sequence[float]) -> float:
    divisor = sum(weights) if settings.shared["normalize"] and not _cancel(weights) else 1.0
    return _number(settings, "lambda") / divisor


def _number(settings: Settings, name: str) -> float:
    return float(settings.shared[name])  # type: ignore[arg-type]


def _weights(settings: Settings) -> tuple[float, ...]:
    return tuple(float(model["weight"]) for model in settings.models)  # type: ignore[arg-type]


def _cancel(weights: Sequence[float]) -> bool:
    return abs(sum(weights)) <= _CANCELLED * sum(map(abs, weights))
