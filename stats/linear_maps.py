"""Find the linear maps of a transformers model and how its checkpoint names their weights.

A linear map is a `Linear`, a `Conv1D` of the GPT-2 kind, a router, or the matrices of the
experts of a mixture. Output layers tied to an embedding are treated as embeddings: they have
no statistics. Convolutions (a vision model's patches) are no linear maps here.

Blocks are the repeated layers: the children of a list of at least two modules of one class,
not inside another such list. They are numbered in the order in which they are run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from raymerge.stats.weight_names import expert_of, tensor_names

MapKind = Literal["linear", "conv1d", "experts"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearMap:
    """A weight that inputs are multiplied with."""

    module: str
    """Name of the module in the model."""
    parameter: str
    """Name of its weight in the model: `module` and ".weight", or an experts' parameter."""
    kind: MapKind
    """linear: (out, in); conv1d: (in, out); experts: a matrix for each expert."""
    tensors: tuple[str, ...]
    """Tensors of the checkpoint: one, or of experts kept apart as many as there are."""
    in_features: int
    out_features: int
    num_experts: int = 0
    """0 unless the kind is experts."""
    experts_shape: Literal["", "EOI", "EIO"] = ""
    """How an experts' parameter is laid out."""
    block: int | None = None
    """Number of its block; None outside of all blocks."""

    @property
    def label(self) -> str:
        """Return the name that reports use: that of its tensor, or of the experts' parameter."""
        return self.tensors[0] if len(self.tensors) == 1 else self.parameter


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelMaps:
    """The linear maps of a model, and what was left out."""

    maps: tuple[LinearMap, ...]
    blocks: tuple[str, ...]
    """Names of the modules of the blocks, in the order in which they run."""
    tied: tuple[str, ...]
    """Linear maps that share their weight with an embedding."""
    not_in_checkpoint: tuple[str, ...]
    """Linear maps whose weight the checkpoint does not hold: a new head."""

    @property
    def has_experts(self) -> bool:
        """Return whether rows are routed, so that no mask can be laid on them."""
        return any(each.kind == "experts" or expert_of(each.module + ".") is not None for each in self.maps)


def find_linear_maps(model: Any, checkpoint_names: Mapping[str, Any]) -> ModelMaps:
    """Find the linear maps of a model.

    Args:
        model: a transformers model; on the meta device will do.
        checkpoint_names: the names of the checkpoint's tensors, tied ones included.
    """
    import torch

    blocks = find_blocks(model)
    embedded = {id(each.weight) for each in model.modules() if isinstance(each, torch.nn.Embedding)}
    output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    maps: list[LinearMap] = []
    tied: list[str] = []
    absent: list[str] = []
    for module_name, module in model.named_modules():
        for kind, parameter in _weights(module):
            weight = getattr(module, parameter)
            name = f"{module_name}.{parameter}"
            if id(weight) in embedded or (module is output and _is_tied(model)):
                tied.append(name)
                continue
            tensors = tensor_names(model, name, checkpoint_names)
            if not tensors:
                absent.append(name)
                continue
            maps.append(_linear_map(module_name, name, kind, module, weight, tensors, block_of(name, blocks)))
    return ModelMaps(maps=tuple(maps), blocks=blocks, tied=tuple(tied), not_in_checkpoint=tuple(absent))


def find_blocks(model: Any) -> tuple[str, ...]:
    """Return the names of a model's blocks, an encoder's before its decoder's."""
    import torch

    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) > 1
        and len({type(each) for each in module}) == 1
    ]
    outer = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    stacks = [name for name in outer if any(True for _ in model.get_submodule(name)[0].parameters())]
    stacks.sort(key=lambda name: "decoder" in name.split("."))  # stable: only the decoder moves back
    return tuple(f"{name}.{i}" for name in stacks for i in range(len(model.get_submodule(name))))


def _weights(module: Any) -> list[tuple[MapKind, str]]:
    """Return which parameters of a module are matrices that inputs are multiplied with."""
    import torch
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, torch.nn.Linear):
        return [("linear", "weight")]
    if isinstance(module, Conv1D):
        return [("conv1d", "weight")]
    own = {name: parameter for name, parameter in module.named_parameters(recurse=False)}
    class_name = type(module).__name__
    if class_name.endswith("Experts"):
        return [("experts", name) for name, parameter in own.items() if parameter.ndim == 3]
    is_router = class_name.endswith(("Router", "Gate")) and "weight" in own and own["weight"].ndim == 2
    return [("linear", "weight")] if is_router else []


def _linear_map(
    module_name: str,
    name: str,
    kind: MapKind,
    module: Any,
    weight: Any,
    tensors: tuple[str, ...],
    block: int | None,
) -> LinearMap:
    if kind == "experts":
        layout = _experts_layout(name, module, weight)
        num_experts, first, second = weight.shape
        out_features, in_features = (first, second) if layout == "EOI" else (second, first)
        return LinearMap(
            module=module_name,
            parameter=name,
            kind=kind,
            tensors=tensors,
            in_features=in_features,
            out_features=out_features,
            num_experts=num_experts,
            experts_shape=layout,
            block=block,
        )
    out_features, in_features = weight.shape if kind == "linear" else reversed(weight.shape)
    return LinearMap(
        module=module_name,
        parameter=name,
        kind=kind,
        tensors=tensors,
        in_features=in_features,
        out_features=out_features,
        block=block,
    )


def _experts_layout(name: str, module: Any, weight: Any) -> Literal["EOI", "EIO"]:
    """Tell (expert, out, in) from (expert, in, out) by the hidden size, which gate_up reads and down writes."""
    if hasattr(module, "is_transposed"):
        return "EIO" if module.is_transposed else "EOI"
    hidden = next(
        (getattr(module, key) for key in ("hidden_dim", "hidden_size", "embed_dim") if hasattr(module, key)),
        None,
    )
    is_down = name.endswith(("down_proj", "down", "w2"))
    return "EOI" if (weight.shape[1] if is_down else weight.shape[2]) == hidden else "EIO"


def _is_tied(model: Any) -> bool:
    embedding = model.get_input_embeddings()
    output = model.get_output_embeddings()
    return embedding is not None and output is not None and output.weight is embedding.weight


def block_of(name: str, blocks: Sequence[str]) -> int | None:
    """Return the number of the block that a parameter belongs to; None if it stands outside of all."""
    return next((i for i, block in enumerate(blocks) if name.startswith(block + ".")), None)
