"""Parameters to run every registered method with, and tensors of a real model's scale to run it on."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from raymerge.merge_actors.host_input import HostInput, host_input
from raymerge.merge_actors.kernels.fused import fused_slice
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.block import Pool
from raymerge.merge_actors.methods.interface import Method, Parameter, Settings, Value
from raymerge.merge_actors.methods.slices import TensorSlice, prepare_slices
from raymerge.merge_actors.randomness import stream_key

#: Values for parameters that have no default, or whose default does nothing.
_EXAMPLES: Mapping[str, Value] = {"weight": 0.3, "density": 0.2, "t": 0.4, "select_topk": 0.2}
#: Exceptions by method: a nearswap moves single elements, DARE drops nine of ten.
_BY_METHOD: Mapping[str, Mapping[str, Value]] = {
    "nearswap": {"t": 1e-3},
    "dare_linear": {"density": 0.1},
    "dare_ties": {"density": 0.1},
    "della": {"density": 0.5},
    "della_linear": {"density": 0.5},
}


@dataclass(frozen=True, slots=True)
class Example:
    """One method on one tensor, in storage dtype on one device."""

    method: Method
    settings: Settings
    base: torch.Tensor | None
    models: tuple[torch.Tensor, ...]
    pool: Pool

    @property
    def moved_bytes(self) -> int:
        """Count the bytes that must be read and written: inputs once, the output once."""
        num_tensors = len(self.models) + (self.base is not None) + 1
        return num_tensors * self.models[0].numel() * self.models[0].element_size()

    def merge_into(self, out_P: torch.Tensor) -> None:
        """Measure, merge and round into `out_P` (flat), as a merge worker does with a slice."""
        piece = TensorSlice(
            method=self.method,
            settings=self.settings,
            sparsifiers=SPARSIFIERS,
            shape=tuple(self.models[0].shape),
            begin=0,
            base_P=None if self.base is None else self.base.reshape(-1),
            models_P=[model.reshape(-1) for model in self.models],
            keys=[stream_key(0, str(i), "tensor") for i in range(len(self.models))],
            pool=self.pool,
        )
        state = prepare_slices([piece])
        for at, merged_P in piece.merged_blocks(state):
            out_P[at : at + merged_P.numel()].copy_(merged_P)

    def merge_by_kernels_into(self, out_P: torch.Tensor, library: ctypes.CDLL) -> bool:
        """Do the same by the compiled kernels; False if they do not have the method."""
        piece = fused_slice(
            library=library,
            method=self.method,
            settings=self.settings,
            sparsifiers=SPARSIFIERS,
            shape=tuple(self.models[0].shape),
            begin=0,
            base=None if self.base is None else _host(self.base),
            models=[_host(model) for model in self.models],
            keys=[stream_key(0, str(i), "tensor") for i in range(len(self.models))],
            out_dtype="BF16",
        )
        if piece is None:
            return False
        piece.merge(prepare_slices([piece]), out_P.view(torch.uint8).numpy(), "BF16")
        return True


def example(name: str, tensors: Sequence[torch.Tensor]) -> Example:
    """Set a method up on tensors.

    Args:
        name: key of the registry.
        tensors: a base and at least one fine-tune, on the device to run on.
    """
    method = METHODS[name]
    most = method.num_models[1]
    base, models = (None, tensors[1:]) if method.base == "unused" else (tensors[0], tensors[1:])
    models = tuple(models[:most])
    shared = {p.name: _value(method, p) for p in _parameters(method) if not p.per_model}
    own = {p.name: _value(method, p) for p in _parameters(method)}
    settings = Settings(shared=shared, models=(own,) * len(models))
    return Example(method, settings, base, models, Pool(models[0].device))


def make_tensors(
    shape: tuple[int, ...], device: torch.device, *, num_fine_tunes: int = 3
) -> list[torch.Tensor]:
    """Return a base and fine-tunes in bf16, made on the CPU so that every device gets the same."""
    generator = torch.Generator().manual_seed(0)
    base = (torch.randn(shape, generator=generator) * 0.02).bfloat16()
    deltas = (torch.randn(shape, generator=generator) * 1e-3 for _ in range(num_fine_tunes))
    return [base.to(device), *((base + delta).bfloat16().to(device) for delta in deltas)]


def _host(tensor: torch.Tensor) -> HostInput:
    return host_input(tensor.reshape(-1), "BF16")


def _parameters(method: Method) -> tuple[Parameter, ...]:
    return method.parameters + (method.sparsifier.parameters if method.sparsifier else ())


def _value(method: Method, parameter: Parameter) -> Value:
    own = _BY_METHOD.get(method.name, {})
    if parameter.name in own:
        return own[parameter.name]
    if parameter.name in method.default_mode:
        return method.default_mode[parameter.name]
    return _EXAMPLES.get(parameter.name, parameter.default)
