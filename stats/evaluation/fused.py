"""Which merged tensors make a parameter: one, or one per expert where transformers keeps them in one.

Transformers 5 joins the experts of a layer in a parameter where checkpoints hold a matrix each. Its
own conversion, run backwards over a tensor without memory, says which part of the parameter is which matrix.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raymerge.stats.weight_names import tensor_names

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class View:
    """A part of a parameter, in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the part of a tensor that is contiguous."""
        return tensor.as_strided(self.shape, self.strides, self.offset)


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of a checkpoint as it stands in a parameter."""

    name: str
    """Of the tensor."""
    view: View | None
    """Which part of the parameter it is; None for all of it."""


def find_parts(model: Any, names: Sequence[str], known: Container[str]) -> tuple[Part, ...]:
    """Return the tensors that make a parameter; () if some are missing.

    Args:
        model: the transformers model, its parameters on the meta device or not.
        names: of the parameter in the model; several where it is tied.
        known: names of the tensors there are.
    """
    for name in names:
        found = tensor_names(model, name, known)
        if len(found) == 1:
            return (Part(found[0], None),)
        if found:
            parts = _parts(model, name)
            return parts if all(part.name in known for part in parts) else ()
    return ()


def _parts(model: Any, name: str) -> tuple[Part, ...]:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers.core_model_loading import revert_weight_conversion

    class KeepViews(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Leaves a tensor where `contiguous()` would copy it, so that its place remains visible."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return args[0] if func is torch.ops.aten.clone.default else func(*args, **(kwargs or {}))

    whole = torch.empty_like(model.get_parameter(name), device="meta")
    with KeepViews():  # type: ignore[no-untyped-call]
        found = revert_weight_conversion(model, {name: whole})
    storage = whole.untyped_storage()._cdata
    if any(tensor.untyped_storage()._cdata != storage for tensor in found.values()):
        return ()
    return tuple(
        Part(key, View(tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset()))
        for key, tensor in found.items()
    )
