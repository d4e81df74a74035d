"""Build the transformers model that a task runs, without weights."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymerge.merge_actors.checkpoint.files import read_json
from raymerge.merge_actors.checkpoint.folder import Checkpoint, open_checkpoint
from raymerge.merge_actors.checkpoint.hub import locate
from raymerge.merge_actors.errors import CheckpointError, RecipeError
from raymerge.stats.evaluation.fused import Part
from raymerge.stats.evaluation.task_spec import ModelKind, TaskSpec
from raymerge.stats.linear_maps import find_blocks
from raymerge.stats.model_loading import building_without_weights
from raymerge.stats.own_code import may_run, model_needs_code

#: Which of transformers' automatic classes makes a model of a kind.
AUTO_CLASSES: dict[ModelKind, str] = {
    "language_model": "AutoModelForCausalLM",
    "sequence_classifier": "AutoModelForSequenceClassification",
    "token_classifier": "AutoModelForTokenClassification",
    "encoder": "AutoModel",
}
_SEQ2SEQ = "AutoModelForSeq2SeqLM"
_ENCODER_ALONE = "AutoModelForTextEncoding"
_MASKED = ("ForMaskedLM", "ForPreTraining")


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """Where one parameter comes from."""

    key: int
    """Of the parameter in its structure."""
    full: str
    """Its name in the model."""
    parts: tuple[Part, ...]
    """Tensors that make it."""
    is_head: bool
    """The tensors are the head checkpoint's."""


class Structure:
    """A transformers model, and where its parameters stand."""

    def __init__(self, module: Any, head: Checkpoint | None, where: str) -> None:
        """Take a model whose parameters are on the meta device."""
        self.module = module
        self.head = head
        self.where = where
        """Key path of the first task that runs it, for errors."""
        self.matched: Sequence[Binding] = ()
        """What `resident` found for each parameter."""
        self.head_tensors: Mapping[str, Any] | None = None
        """Those of the head's checkpoint that are used, once they are read."""
        self._places: dict[int, list[tuple[Any, str, str]]] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._keep = list(module.parameters())  # so that an id is never that of another parameter
        for module_name, part in module.named_modules():
            for name, parameter in part.named_parameters(recurse=False):
                full = f"{module_name}.{name}" if module_name else name
                self._places.setdefault(id(parameter), []).append((part, name, full))
                self._shapes[id(parameter)] = tuple(parameter.shape)

    @functools.cached_property
    def all_blocks(self) -> tuple[str, ...]:
        """Names of the blocks, in the order in which they run."""
        return find_blocks(self.module) or _blocks_of_several_kinds(self.module)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks that can lie anywhere: they share no parameter with what is outside of them."""
        return tuple(block for block in self.all_blocks if block not in self._sharing)

    def block_of(self, key: int) -> str | None:
        """Return which of `blocks` a parameter belongs to; None if it is outside of them."""
        return self._block_of.get(key)

    @functools.cached_property
    def _sharing(self) -> frozenset[str]:
        owners = self._owners.values()
        return frozenset(block for each in owners if len(each) > 1 for block in each if block is not None)

    @functools.cached_property
    def _block_of(self) -> dict[int, str]:
        return {
            key: block
            for key, (block, *_) in self._owners.items()
            if block is not None and block not in self._sharing
        }

    @functools.cached_property
    def _owners(self) -> dict[int, tuple[str | None, ...]]:
        """The blocks that every parameter stands in, None for the place outside of all."""
        block_of: dict[str, str] = {}
        for block in self.all_blocks:
            for name, _ in self.module.get_submodule(block).named_parameters(remove_duplicate=False):
                block_of[f"{block}.{name}"] = block
        return {
            key: tuple(dict.fromkeys(block_of.get(full) for _, _, full in places))
            for key, places in self._places.items()
        }

    @property
    def head_folder(self) -> str | None:
        """As the task named it."""
        return self.head.path if self.head else None

    def parameters(self) -> Iterator[tuple[int, tuple[str, ...]]]:
        """Yield the key and the names of every parameter, a tied one once."""
        for key, places in self._places.items():
            yield key, tuple(full for _, _, full in places)

    @property
    def has_spare_pooler(self) -> bool:
        """Tell whether the model is a bare encoder with a pooler behind its last layer."""
        return self.head is None and getattr(self.module, "pooler", None) is not None

    def drop_pooler(self) -> None:
        """Go without the pooler; the encoder then returns its states alone."""
        self.module.pooler = None
        self._places = {
            key: places
            for key, places in self._places.items()
            if not any(full.startswith("pooler.") for _, _, full in places)
        }

    def shape(self, key: int) -> tuple[int, ...]:
        """Return the shape of a parameter."""
        return self._shapes[key]

    def place(self, key: int, tensor: Any) -> None:
        """Make a tensor the parameter."""
        import torch

        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        for part, name, _ in self._places[key]:
            part._parameters[name] = parameter

    def is_of_head(self, names: Sequence[str]) -> bool:
        """Tell whether a parameter belongs to the head of a named checkpoint, not to the merged encoder."""
        prefix = self.module.base_model_prefix + "."
        return self.head is not None and not any(name.startswith(prefix) for name in names)

    def head_shapes(self) -> Mapping[str, Sequence[int]]:
        """Return the shapes of the head checkpoint's tensors."""
        if self.head is None:
            return {}
        tensors = self.head.tensors
        return {name: tensors[self.head.tied.get(name, name)].shape for name in (*tensors, *self.head.tied)}


def _blocks_of_several_kinds(model: Any) -> tuple[str, ...]:
    """Return the names of blocks that are not all of one class, as where attention and state-space layers alternate."""
    import torch

    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) > 1
        and all(type(each).__name__.endswith(("Layer", "Block")) for each in module)
    ]
    outer = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    return tuple(f"{name}.{i}" for name in outer for i in range(len(model.get_submodule(name))))


def build_structure(task: TaskSpec, folder: str) -> Structure:
    """Build the model of a task.

    Raises:
        RecipeError: the head is of another architecture, or the model cannot run the task.
        CheckpointError: a config is missing or unknown to transformers.
    """
    trust_code = task.trust_remote_code
    own = load_config(folder, trust_code=trust_code)
    if task.head_folder is None:
        config, head = own, None
        maker = model_class_for(task, own)
    else:
        head = open_checkpoint(locate(task.head_folder))
        config = load_config(head.folder, trust_code=trust_code)
        maker = _head_class(task, head, config)
        if config.model_type != own.model_type:
            raise task.error(
                "head",
                f"{task.head_folder} is a {config.model_type}, the merged models are {own.model_type}; "
                "a head fits the architecture that it was trained on.",
            )
        config.vocab_size = own.vocab_size
    try:
        with building_without_weights():
            if hasattr(maker, "from_config"):
                # An automatic class asks on the terminal unless it is told.
                module = maker.from_config(config, trust_remote_code=model_needs_code(config.to_dict()))
            else:
                module = maker(config)
    except (ValueError, ImportError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise task.error(
            "kind", f"transformers cannot build the model of {folder} for this task: {reason}"
        ) from error
    module.tie_weights()
    module.eval()
    module.requires_grad_(False)
    return Structure(module, head, task.where or task.name)


def model_class_for(task: TaskSpec, config: Any) -> Any:
    """Return the transformers class that makes the model of a task without a head of its own.

    Args:
        task: the task.
        config: transformers' config of the models to score.
    """
    import transformers

    if task.model_kind == "language_model":
        if config.is_encoder_decoder and task.takes_encoder_decoder:
            return getattr(transformers, _SEQ2SEQ)
        named = config.architectures or [f"a {config.model_type}"]
        if config.is_encoder_decoder or any(name.endswith(_MASKED) for name in named):
            raise task.error(
                "kind", f"{task.kind} needs a causal language model; the models are {', '.join(named)}."
            )
    if task.model_kind == "encoder" and config.is_encoder_decoder:
        return getattr(transformers, _ENCODER_ALONE)
    return getattr(transformers, AUTO_CLASSES[task.model_kind])


def load_config(folder: str, *, trust_code: bool = False) -> Any:
    """Load transformers' config of a folder.

    Args:
        folder: where it is.
        trust_code: run code of the folder where transformers has no class of its own.

    Raises:
        CheckpointError: there is none, or transformers does not know the architecture.
    """
    from transformers import AutoConfig

    runs_code = may_run(folder, head_config(folder), trust_code=trust_code)
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=runs_code)
    except (ValueError, OSError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers cannot read the config of {folder}: {reason}") from error


def head_config(folder: str) -> dict[str, Any]:
    """Return config.json of a checkpoint, local or of the Hub.

    Raises:
        CheckpointError: the folder has none.
    """
    path = os.path.join(locate(folder, weights=False), "config.json")
    if not os.path.exists(path):
        raise CheckpointError(f"the head {folder} has no config.json; name the folder of a checkpoint.")
    return read_json(path)


def _head_class(task: TaskSpec, head: Checkpoint, config: Any) -> Any:
    """Return the class that the head's config names, which has to be of the task's kind."""
    import transformers

    suffix = AUTO_CLASSES[task.model_kind].removeprefix("AutoModel")
    named = [name for name in head.config.get("architectures") or () if name.endswith(suffix)]
    if not named:
        raise RecipeError(
            f"{task.where or task.name}.head: {task.head_folder} is a "
            f"{', '.join(head.config.get('architectures') or ['model without architectures'])}; "
            f"a task of the kind {task.kind} needs the head of a model {suffix.removeprefix('For')} ({suffix})."
        )
    return getattr(transformers, named[0], None) or model_class_for(task, config)
