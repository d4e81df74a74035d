"""What a merge method is: typed parameters, a rule for cutting tensors, and a formula.

A method file holds its formula as plain functions of a `Block` (a run of elements of one
tensor in every model, float32) and one `Method` value that declares the rest. The registry
in `methods/__init__.py` lists the values; nothing registers itself. A method of kind "solve" (RegMean)
merges the matrices that have a statistic as a whole; its formula serves the other tensors.

A formula that needs a quantity of the whole tensor (a norm, a threshold) gets it from
`prepare`: a generator that yields `Measure`s, is sent one summary per slice in the order
of the slices, and returns a small state. The same generator runs in the worker when the
tensor is one slice, and in the driver when it is many. Sums are reported per unit and added
with `math.fsum`, so a sum does not depend on how the tensor was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from raymerge.merge_actors.methods.block import Block
    from raymerge.merge_actors.methods.kernel_formula import KernelFormula, KernelStep

Value = float | int | bool | str | None
#: What one slice says about itself: small numpy arrays and numbers, picklable.
Summary = Any
#: What the formula gets to know about its tensor: picklable, small.
State = Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One setting of a method, with its rule."""

    name: str
    kind: type = float
    """float, int, bool or str."""
    default: Value = None
    required: bool = False
    """A value must stand in the recipe; there is no default."""
    per_model: bool = False
    """Given for each model (weight, density) rather than once."""
    minimum: float | None = None
    maximum: float | None = None
    exclusive_minimum: bool = False
    exclusive_maximum: bool = False
    choices: tuple[str, ...] = ()
    """The words allowed: all values of a str, the words beside a bool (true, false, l1)."""
    aliases: tuple[str, ...] = ()
    """Other spellings that recipes in the wild use."""
    doc: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """A method's parameters, resolved for one tensor."""

    shared: Mapping[str, Value] = field(default_factory=dict)
    """Parameters given once: lambda, normalize, t, ..."""
    models: tuple[Mapping[str, Value], ...] = ()
    """Per model, without the base, in the order of the block: weight, density, ..."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """A question that `prepare` asks of every slice of a tensor."""

    collect: Callable[..., Summary]
    """collect(blocks: Iterable[Block], **arguments) -> Summary, a module-level function."""
    arguments: Mapping[str, Any] = field(default_factory=dict)


#: How a tensor may be cut: anywhere, or between rows (vectors along the last axis) only.
Split = Literal["elementwise", "rowwise"]

#: yields a Measure, is sent the summaries of all slices in order, returns the state
Prepare = Generator[Measure, list[Summary], State]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sparsifier:
    """A step that thins one model's delta before the method combines the deltas.

    `apply(delta_P, parameters, key, block, state)` changes `delta_P` (compute dtype, in place)
    and returns it; `key` is that of the step's own random stream; scratch that it takes from
    the block is taken back when it returns. `prepare` may measure the tensor first (for a
    magnitude threshold).
    """

    name: str
    parameters: tuple[Parameter, ...]
    apply: Callable[[torch.Tensor, Mapping[str, Value], int, Block, State], torch.Tensor]
    prepare: Callable[[Mapping[str, Value], int, int, int], Prepare | None] | None = None
    """prepare(parameters of the model, index of the model, number of earlier steps, elements
    of what is measured): a generator, or None if these parameters need no measuring."""
    is_model_wide: Callable[[Mapping[str, Value]], bool] | None = None
    """Is the measure taken over all tensors of the model (the TIES paper's trim) and not per tensor?"""
    check: Callable[[Mapping[str, Value]], str | None] | None = None
    """A rule across a model's parameters: a sentence if it is broken, else None."""
    kernel: Callable[[Mapping[str, Value], State], tuple[KernelStep, ...] | None] | None = None
    """kernel(parameters of the model, state): the same step for the compiled kernels, or None if they do not
    have it for these parameters, whatever the state."""
    split: Split = "elementwise"
    source: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A merge method as the plan and the workers see it."""

    name: str
    merge: Callable[[Block], torch.Tensor]
    """The formula: a block in, float32 of the block's shape out. Of a method that solves: the formula for
    tensors that have no statistic."""
    kernel: Callable[[Settings], KernelFormula | None] | None = None
    """The same formula for the compiled kernels, or None if they do not have it for these settings."""
    kind: Literal["block", "solve"] = "block"
    """Is every tensor merged block by block, or are those with a statistic solved for as matrices?"""
    statistic: Literal["gram", "fisher"] | None = None
    """What each model's data must have been measured for: Gram matrices of the inputs of its linear maps, or
    a Fisher value per element, which a block then carries."""
    is_sequential: bool = False
    """Are the statistics of a layer taken while merging, from the merged layers before it?"""
    parameters: tuple[Parameter, ...] = ()
    prepare: Callable[[Settings], Prepare | None] | None = None
    sparsifier: Sparsifier | None = None
    """The method's own sparsifier; a recipe's `sparsify` comes before it."""
    split: Split | Callable[[Settings], Split] = "elementwise"
    """How a tensor may be cut; a function where a parameter decides. Ask `slices.split_of`, which also
    looks at the sparsifying steps."""
    base: Literal["required", "optional", "unused"] = "unused"
    num_models: tuple[int, int | None] = (1, None)
    """Least and greatest number of models beside the base."""
    is_symmetric: bool = True
    """Does the order of the models mean nothing? Then they are summed in a canonical order."""
    is_plain_sum: bool = False
    """Does a NaN in any input show in the result, as long as every weight differs from 0?"""
    check: Callable[[Settings], str | None] | None = None
    """A rule across parameters: a sentence if it is broken (weights summing to zero), else None."""
    default_mode: Mapping[str, Value] = field(default_factory=dict)
    """Defaults that differ from those of the shared `parameters` (normalize, rescale)."""
    source: str = ""
