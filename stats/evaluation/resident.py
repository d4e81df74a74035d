"""A model whose structure stays and whose parameters change: what an evaluator holds.

Tasks with different heads share one set of merged parameters. For each head there is a transformers
model (Python objects only, built without weights); its parameters are the tensors that `bind` is
given, where type, device and shape allow it, else copies that `refresh` brings up to date after a merge.
The heads of named checkpoints are read once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raymerge.merge_actors.checkpoint.folder import Checkpoint
from raymerge.merge_actors.dtypes import from_torch_name, torch_dtype
from raymerge.merge_actors.errors import MismatchError, RecipeError
from raymerge.merge_actors.storage.storage_files import StorageFiles
from raymerge.stats.evaluation.block_hooks import SpreadBlocks
from raymerge.stats.evaluation.fused import find_parts
from raymerge.stats.evaluation.needs import needs_of
from raymerge.stats.evaluation.parts import ModelNeeds
from raymerge.stats.evaluation.placement import (
    Placement,
    Stored,
    WeightBytes,
    in_dtype,
    place,
    usual_dtype,
    weigh,
)
from raymerge.stats.evaluation.structures import Binding, Structure, build_structure
from raymerge.stats.evaluation.task_spec import TaskSpec
from raymerge.stats.linear_maps import block_of

if TYPE_CHECKING:
    import torch


#: A pooler that an encoder can do without: checkpoints trained on masked tokens have none.
_POOLER = "pooler.dense.weight"


@dataclass(slots=True)
class _Copies:
    """Copies of merged tensors, shared by all structures."""

    made: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    """What is copied -> tensor of the evaluation's type."""
    pairs: list[tuple[Any, Any]] = field(default_factory=list)
    """(view of a copy, merged tensor)."""


class ResidentModel:
    """The models of some tasks over one set of parameters."""

    def __init__(
        self,
        tasks: Sequence[TaskSpec],
        folder: str,
        *,
        devices: Sequence[str] = ("cpu",),
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the structures; no weights are read but those of the heads.

        Args:
            tasks: whose models are needed; those that run the same model share it.
            folder: config.json and tokenizer of the models to score.
            devices: where the models run: on one, or spread over several, block after block.
            dtype: of parameters and activations; None takes the merged tensors' (the most frequent).

        Raises:
            RecipeError: a head does not fit the model.
            CheckpointError: a head cannot be read.
        """
        self.folder, self.dtype = folder, dtype
        self.device = devices[0]
        """Where inputs go in and outputs come out."""
        self._tasks, self._devices = tuple(tasks), tuple(devices)
        self._placement: Placement | None = None
        self._hooks: list[SpreadBlocks] = []
        self._trusts_code = any(task.trust_remote_code for task in tasks)
        self._tokenizer: Any = None
        self._structures: dict[tuple[str | None, ...], Structure] = {}
        self.companions: dict[str, Any] = {}
        """What a task made around this model and keeps with it, by the task's name."""
        self._copies = _Copies()
        for task in tasks:
            if _key(task) not in self._structures:
                self._structures[_key(task)] = build_structure(task, folder)

    @property
    def tokenizer(self) -> Any:
        """The models' tokenizer."""
        if self._tokenizer is None:
            from raymerge.stats.calibration_data import load_tokenizer

            self._tokenizer = load_tokenizer(self.folder, trust_code=self._trusts_code)
        return self._tokenizer

    def module(self, task: TaskSpec) -> Any:
        """Return the transformers model that a task runs, in eval mode."""
        return self._structures[_key(task)].module

    def check(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Check that tensors of these names and shapes make every model, before there are any.

        Raises:
            RecipeError: a parameter has no tensor, neither among these nor in its head's checkpoint.
            MismatchError: a tensor has another shape than the model's parameter.
        """
        for structure in self._structures.values():
            _match(structure, shapes)

    def needs(self, stored: Stored) -> ModelNeeds:
        """Say what the models take of devices' memory.

        Args:
            stored: dtype and shape of the merged tensors.

        Raises:
            RecipeError: as `check`.
            MismatchError: as `check`.
        """
        return self._weigh(stored)[1]

    def place(self, stored: Stored) -> Mapping[str, int]:
        """Choose the device, by number, of every merged tensor; `bind` wants them there.

        Args:
            stored: their dtypes and shapes.

        Raises:
            RecipeError: as `check`.
            MismatchError: as `check`.
        """
        weights, needs = self._weigh(stored)
        structures = list(self._structures.values())
        self._placement = place(structures, stored, weights, needs, len(self._devices))
        return self._placement.of_tensor

    def _weigh(self, stored: Stored) -> tuple[WeightBytes, ModelNeeds]:
        self.check({name: shape for name, (_, shape) in stored.items()})
        structures = list(self._structures.values())
        dtype = self.dtype or torch_dtype(usual_dtype(stored) or "F32")
        weights = weigh(structures, stored, dtype)
        return weights, needs_of(structures, self._tasks, weights, dtype)

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make merged tensors the parameters of every model; they may be rewritten in place afterwards.

        Args:
            tensors: by their names in a checkpoint; tied ones under all names or under one. Those that are
                not where `place` wants them are copied there.

        Raises:
            RecipeError: as `check`.
            MismatchError: as `check`.
        """
        stored = _stored(tensors)
        self.dtype = self.dtype or torch_dtype(usual_dtype(stored) or "F32")
        self._copies = _Copies()
        if self._placement is None:
            self.place(stored)
        assert self._placement is not None
        for hooks in self._hooks:
            hooks.close()
        self._hooks = []
        for structure, device_of in zip(self._structures.values(), self._placement.of_blocks, strict=True):
            for binding in _match(structure, {name: shape for name, (_, shape) in stored.items()}):
                sources = _head_tensors(structure) if binding.is_head else tensors
                number = device_of.get(structure.block_of(binding.key) or "", 0)
                structure.place(binding.key, self._parameter(structure, binding, sources, number))
            self._place_buffers(structure, tensors, device_of)
            self._hooks.append(SpreadBlocks(structure.module, device_of, self._devices))
        self.refresh()

    def refresh(self) -> None:
        """Bring the copies up to date after the bound tensors were rewritten; does nothing where there are none."""
        import torch

        with torch.no_grad():
            for copy, merged in self._copies.pairs:
                copy.copy_(merged, non_blocking=True)

    @property
    def num_copied_bytes(self) -> int:
        """Count the bytes that `refresh` writes: 0 where the bound tensors are the parameters themselves."""
        return sum(copy.numel() * copy.element_size() for copy, _ in self._copies.pairs)

    def _parameter(
        self, structure: Structure, binding: Binding, sources: Mapping[str, Any], number: int
    ) -> Any:
        """Return the tensor that a parameter is to be: a bound one, or a copy that `refresh` fills."""
        import torch

        first = sources[binding.parts[0].name]
        is_float = first.is_floating_point()
        dtype = self.dtype if is_float else first.dtype
        device = torch.device(self._devices[number])
        is_there = first.device.type == device.type and device.index in (None, first.device.index)
        if binding.parts[0].view is None and first.dtype == dtype and is_there:
            return first
        owner = structure.head_folder if binding.is_head else None
        identity = (owner, number, *((part.name, part.view) for part in binding.parts))
        if identity not in self._copies.made:
            shape = structure.shape(binding.key)
            copy = self._copies.made[identity] = torch.empty(shape, dtype=dtype, device=device)
            for part in binding.parts:
                target = copy if part.view is None else part.view.of(copy)
                if binding.is_head:
                    target.copy_(sources[part.name])
                else:
                    self._copies.pairs.append((target, sources[part.name]))
        return self._copies.made[identity]

    def _place_buffers(
        self, structure: Structure, tensors: Mapping[str, Any], device_of: Mapping[str, int]
    ) -> None:
        """Move computed buffers to their devices; those that checkpoints hold become copies of the merged ones."""
        blocks = tuple(device_of)
        for name, buffer in list(structure.module.named_buffers()):
            block = block_of(name, blocks)
            moved = buffer.to(self._devices[0 if block is None else device_of[blocks[block]]])
            module_name, _, last = name.rpartition(".")
            structure.module.get_submodule(module_name)._buffers[last] = moved
            if name in tensors and tensors[name].shape == moved.shape:
                self._copies.pairs.append((moved, tensors[name]))


def _key(task: TaskSpec) -> tuple[str | None, ...]:
    """Tell models apart: tasks with one key run the same modules."""
    return (task.model_kind, task.head_folder, None if task.shares_model else task.name)


def load_resident(
    checkpoint: Checkpoint,
    tasks: Sequence[TaskSpec],
    *,
    devices: Sequence[str] = ("cpu",),
    dtype: torch.dtype | None = None,
) -> ResidentModel:
    """Read a checkpoint and bind it: a model that is scored once, on one device or spread over several."""
    import torch

    resident, stored = resident_of(checkpoint, tasks, devices=devices, dtype=dtype)
    number_of = resident.place(stored)
    tensors = {}
    for name, tensor in read_tensors(checkpoint, checkpoint.tensors):  # the host never holds the model
        device = devices[number_of[name]]
        tensors[name] = tensor.to(device, resident.dtype if torch.is_floating_point(tensor) else None)
    resident.bind(tensors | {alias: tensors[name] for alias, name in checkpoint.tied.items()})
    return resident


def resident_of(
    checkpoint: Checkpoint,
    tasks: Sequence[TaskSpec],
    *,
    devices: Sequence[str] = ("cpu",),
    dtype: torch.dtype | None = None,
) -> tuple[ResidentModel, Stored]:
    """Build the models of a checkpoint without its weights; return them, and the tensors as they will be bound."""
    stored: Stored = {name: (tensor.dtype, tensor.shape) for name, tensor in checkpoint.tensors.items()}
    wanted = dtype or torch_dtype(usual_dtype(stored) or "F32")
    resident = ResidentModel(tasks, checkpoint.folder, devices=devices, dtype=wanted)
    return resident, in_dtype(stored, wanted)


def read_tensors(checkpoint: Checkpoint, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """Read whole tensors one after the other, each into memory of its own."""
    import torch

    with contextlib.closing(StorageFiles()) as files:
        for name in names:
            tensor = checkpoint.tensors[checkpoint.tied.get(name, name)]
            raw = torch.empty(tensor.num_bytes, dtype=torch.uint8)
            if tensor.num_bytes:
                files.read_into(tensor.file, tensor.begin, raw.numpy().data)
            yield name, raw.view(torch_dtype(tensor.dtype)).reshape(tensor.shape)


def _match(structure: Structure, shapes: Mapping[str, Sequence[int]]) -> list[Binding]:
    """Find the tensors of every parameter: the head's in its checkpoint, all others among the merged ones."""
    found = []
    head_shapes = structure.head_shapes()
    if structure.has_spare_pooler and not find_parts(structure.module, [_POOLER], shapes):
        structure.drop_pooler()
    for key, names in structure.parameters():
        is_head = structure.is_of_head(names)
        parts = () if is_head else find_parts(structure.module, names, shapes)
        from_head = not parts
        if from_head:  # the head itself, or a pooler that the merge lacks
            parts = find_parts(structure.module, names, head_shapes)
        if not parts:
            raise _missing(structure, names[0], is_head)
        given, wanted = (head_shapes if from_head else shapes)[parts[0].name], structure.shape(key)
        if parts[0].view is None and tuple(given) != wanted:
            whose = f"the head {structure.head_folder}" if from_head else "the merged models"
            raise MismatchError(
                f"{structure.where}: tensor {parts[0].name!r} of {whose} has the shape {tuple(given)}, but "
                f"{type(structure.module).__name__} wants {wanted}: head and merged models are of different sizes."
            )
        found.append(Binding(key=key, full=names[0], parts=parts, is_head=from_head))
    structure.matched = found
    return found


def _missing(structure: Structure, name: str, is_head: bool) -> RecipeError:
    if structure.head_folder is not None:
        whose = f"its head {structure.head_folder}" if is_head else "the merged models"
        return RecipeError(f"{structure.where}: {whose} has no tensor for the parameter {name!r}.")
    return RecipeError(
        f"{structure.where}: the merged models have no tensor for the parameter {name!r} of "
        f"{type(structure.module).__name__}; name a checkpoint that has the head (head: PATH), or another kind of task."
    )


def _head_tensors(structure: Structure) -> Mapping[str, Any]:
    """Read the tensors of a head that its structure uses, once."""
    if structure.head_tensors is None:
        assert structure.head is not None
        bindings = [binding for binding in structure.matched if binding.is_head]
        names = {part.name: None for binding in bindings for part in binding.parts}
        structure.head_tensors = dict(read_tensors(structure.head, names))
    return structure.head_tensors


def _stored(tensors: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {
        name: (from_torch_name(str(tensor.dtype)) or "U8", tuple(tensor.shape))
        for name, tensor in tensors.items()
    }
