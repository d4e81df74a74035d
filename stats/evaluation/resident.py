"""A model whose structure stays and whose parameters change: what an evaluator holds.

Tasks with different heads share one set of merged parameters. For each head there is a transformers
model (Python objects only, built without weights); its parameters are the tensors that `bind` is
given, where type, device and shape allow it, else copies that `refresh` brings up to date after a merge.
The heads of named checkpoints are read once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raymerge.merge_actors.checkpoint.folder import Checkpoint
from raymerge.merge_actors.dtypes import torch_dtype
from raymerge.merge_actors.errors import MismatchError, RecipeError
from raymerge.merge_actors.files import LocalFiles
from raymerge.stats.evaluation.fused import Part, find_parts
from raymerge.stats.evaluation.structures import Structure, build_structure
from raymerge.stats.evaluation.task_spec import TaskSpec

if TYPE_CHECKING:
    import torch


#: A pooler that an encoder can do without: checkpoints trained on masked tokens have none.
_POOLER = "pooler.dense.weight"


@dataclass(frozen=True, kw_only=True, slots=True)
class _Binding:
    """Where one parameter comes from."""

    key: int
    """Of the parameter in its structure."""
    full: str
    """Its name in the model."""
    parts: tuple[Part, ...]
    """Tensors that make it."""
    is_head: bool
    """The tensors are the head checkpoint's."""


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
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the structures; no weights are read but those of the heads.

        Args:
            tasks: whose models are needed; those that run the same model share it.
            folder: config.json and tokenizer of the models to score.
            device: where the model runs.
            dtype: of parameters and activations; None takes the merged tensors' (the most frequent).

        Raises:
            RecipeError: a head does not fit the model.
            CheckpointError: a head cannot be read.
        """
        self.folder, self.device, self.dtype = folder, device, dtype
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

    def bind(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make merged tensors the parameters of every model; they may be rewritten in place afterwards.

        Args:
            tensors: by their names in a checkpoint; tied ones under all names or under one.

        Raises:
            RecipeError: as `check`.
            MismatchError: as `check`.
        """
        self.dtype = self.dtype or _usual_dtype(tensors)
        self._copies = _Copies()
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for structure in self._structures.values():
            for binding in _match(structure, shapes):
                sources = _head_tensors(structure) if binding.is_head else tensors
                structure.place(binding.key, self._parameter(structure, binding, sources))
            self._place_buffers(structure, tensors)
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

    def _parameter(self, structure: Structure, binding: _Binding, sources: Mapping[str, Any]) -> Any:
        """Return the tensor that a parameter is to be: a bound one, or a copy that `refresh` fills."""
        import torch

        first = sources[binding.parts[0].name]
        is_float = first.is_floating_point()
        dtype = self.dtype if is_float else first.dtype
        device = torch.device(self.device)
        is_there = first.device.type == device.type and device.index in (None, first.device.index)
        if binding.parts[0].view is None and first.dtype == dtype and is_there:
            return first
        owner = structure.head_folder if binding.is_head else None
        identity = (owner, *((part.name, part.view) for part in binding.parts))
        if identity not in self._copies.made:
            shape = structure.shape(binding.key)
            copy = self._copies.made[identity] = torch.empty(shape, dtype=dtype, device=self.device)
            for part in binding.parts:
                target = copy if part.view is None else part.view.of(copy)
                if binding.is_head:
                    target.copy_(sources[part.name])
                else:
                    self._copies.pairs.append((target, sources[part.name]))
        return self._copies.made[identity]

    def _place_buffers(self, structure: Structure, tensors: Mapping[str, Any]) -> None:
        """Move computed buffers to the device; those that checkpoints hold become copies of the merged ones."""
        for name, buffer in list(structure.module.named_buffers()):
            moved = buffer.to(self.device)
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
    device: str = "cpu",
    dtype: torch.dtype | None = None,
) -> ResidentModel:
    """Read a checkpoint and bind it: a model that is scored once."""
    import torch

    resident = ResidentModel(tasks, checkpoint.folder, device=device, dtype=dtype)
    resident.check({name: tensor.shape for name, tensor in checkpoint.tensors.items()})
    tensors = read_tensors(checkpoint, checkpoint.tensors)
    wanted = dtype or _usual_dtype(tensors)
    for name, tensor in tensors.items():  # one by one, so that two of a tensor are never there together
        tensors[name] = tensor.to(device, wanted if torch.is_floating_point(tensor) else None)
    resident.bind(tensors | {alias: tensors[name] for alias, name in checkpoint.tied.items()})
    return resident


def read_tensors(checkpoint: Checkpoint, names: Any) -> dict[str, Any]:
    """Read whole tensors into memory of their own."""
    import torch

    files = LocalFiles()
    found = {}
    for name in names:
        tensor = checkpoint.tensors[checkpoint.tied.get(name, name)]
        raw = torch.empty(tensor.num_bytes, dtype=torch.uint8)
        if tensor.num_bytes:
            files.read_into(tensor.file, tensor.begin, raw.numpy().data)
        found[name] = raw.view(torch_dtype(tensor.dtype)).reshape(tensor.shape)
    return found


def _match(structure: Structure, shapes: Mapping[str, Sequence[int]]) -> list[_Binding]:
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
        found.append(_Binding(key=key, full=names[0], parts=parts, is_head=from_head))
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
        structure.head_tensors = read_tensors(structure.head, names)
    return structure.head_tensors


def _usual_dtype(tensors: Mapping[str, Any]) -> Any:
    import torch

    counts: dict[Any, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=lambda dtype: counts[dtype]) if counts else torch.float32
