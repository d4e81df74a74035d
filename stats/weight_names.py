"""Which tensors of a checkpoint a parameter of the transformers model was made from.

Most parameters have the name of their tensor. A head model may have been saved without its
prefix, or a bare model loaded with it; and transformers 5 joins the experts of a layer in
one parameter where checkpoints hold a matrix each, which its own conversion can tell us.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

_EXPERT = re.compile(r"\.experts?\.(\d+)\.")


def tensor_names(model: Any, parameter: str, checkpoint_names: Container[str]) -> tuple[str, ...]:
    """Return the names of a parameter's tensors in the checkpoint; () if it has none there.

    Args:
        model: the transformers model.
        parameter: its name in the model.
        checkpoint_names: of all tensors, tied ones included.
    """
    prefix = model.base_model_prefix + "."
    for name in (parameter, parameter.removeprefix(prefix), prefix + parameter):
        if name in checkpoint_names:
            return (name,)
    converted = [name for name in _converted(model, parameter) if name in checkpoint_names]
    return tuple(converted)


def expert_of(name: str) -> int | None:
    """Return the number of the expert in a tensor's name: "...experts.3.w1.weight" -> 3."""
    found = _EXPERT.search(name)
    return int(found.group(1)) if found else None


def _converted(model: Any, parameter: str) -> list[str]:
    """Ask transformers under which names it would save the parameter."""
    import torch

    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # before version 5 nothing is converted
        return []
    like = torch.empty_like(model.get_parameter(parameter), device="meta")
    return list(revert_weight_conversion(model, {parameter: like}))
