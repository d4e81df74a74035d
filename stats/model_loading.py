"""Load a transformers model for measuring: whole, or block by block from its checkpoint.

A model that fits is loaded by transformers. Of one that does not, the parameters outside its
blocks are read at once, those of a block when it is asked for, straight from the checkpoint's
byte ranges and by tensor name; between, they are on the meta device and take no memory.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from raymerge.merge_actors.checkpoint.folder import Checkpoint
from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.merge_actors.dtypes import torch_dtype
from raymerge.merge_actors.errors import CheckpointError, RecipeError
from raymerge.merge_actors.files import RangeRead
from raymerge.merge_actors.storage.storage_files import StorageFiles
from raymerge.merge_actors.storage.uris import is_remote
from raymerge.merge_actors.whole_tensors import read_tensor
from raymerge.stats.own_code import may_run
from raymerge.stats.weight_names import tensor_names

if TYPE_CHECKING:
    import torch

#: Building a model switches default devices and dtypes of the whole process.
_BUILDING = threading.Lock()


def model_class(config: Mapping[str, Any], folder: str, *, runs_code: bool) -> Any:
    """Return the class that a config names, or the bare model's.

    Args:
        config: config.json.
        folder: where it is, with the code of the checkpoint.
        runs_code: take the class from that code.
    """
    import transformers

    names = config.get("architectures") or ()
    if runs_code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        references = {key: each for key, each in config["auto_map"].items() if key.startswith("AutoModel")}
        chosen = [each for each in references.values() if each.rpartition(".")[2] in names]
        if chosen or references:
            reference = (chosen or list(references.values()))[0]
            return get_class_from_dynamic_module(reference, folder, local_files_only=True)
    for name in names:
        found = getattr(transformers, name, None)
        if found is not None:
            return found
    return transformers.AutoModel


def load_config(folder: str, *, runs_code: bool) -> Any:
    """Return transformers' config of a folder; it never asks whether to run code."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=runs_code)


def compute_dtype(checkpoint: Checkpoint, device: str) -> torch.dtype:
    """Return the type of the forward pass: the checkpoint's on a GPU, float32 on a CPU."""
    import torch

    if not device.startswith("cuda"):
        return torch.float32
    bytes_of: dict[str, int] = {}
    for tensor in checkpoint.tensors.values():
        bytes_of[tensor.dtype] = bytes_of.get(tensor.dtype, 0) + tensor.num_bytes
    widest = torch_dtype(max(bytes_of, key=lambda dtype: bytes_of[dtype]))
    return widest if widest in (torch.float16, torch.bfloat16) else torch.float32


def load_whole(checkpoint: Checkpoint, device: str, *, trust_code: bool = False) -> Any:
    """Load the whole model in eval mode.

    Args:
        checkpoint: where it is.
        device: where parameters go.
        trust_code: run the checkpoint's code where transformers has no class of its own.

    Raises:
        CheckpointError: transformers does not know or cannot load it.
    """
    dtype = compute_dtype(checkpoint, device)
    runs_code = may_run(checkpoint.folder, checkpoint.config, trust_code=trust_code)
    try:
        if checkpoint.is_adapted or any(is_remote(tensor.file) for tensor in checkpoint.tensors.values()):
            model = _load_values(checkpoint, dtype, runs_code=runs_code)
        else:
            with _BUILDING, _quiet():
                chosen = model_class(checkpoint.config, checkpoint.folder, runs_code=runs_code)
                model = chosen.from_pretrained(
                    checkpoint.folder, torch_dtype=dtype, local_files_only=True, trust_remote_code=runs_code
                )
    except (ValueError, OSError, KeyError, RuntimeError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"transformers cannot load the model {checkpoint.path}: {reason}") from error
    return prepared(model).to(device)


def _load_values(checkpoint: Checkpoint, dtype: torch.dtype, *, runs_code: bool) -> Any:
    """Load a model whose weights transformers cannot open itself: they are read by range and handed over.

    Those of an adapter's model are made as they are read.
    """
    values = _read_values(checkpoint, dtype)
    chosen = model_class(checkpoint.config, checkpoint.folder, runs_code=runs_code)
    with _quiet():
        config = load_config(checkpoint.folder, runs_code=runs_code)
    if hasattr(chosen, "from_config"):  # an Auto class takes a folder only
        with _quiet(), building_without_weights():
            chosen = type(chosen.from_config(config))
    with _BUILDING, _quiet():
        return chosen.from_pretrained(None, config=config, state_dict=values, torch_dtype=dtype)


def _read_values(checkpoint: Checkpoint, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    import torch

    plain = {name: info for name, info in checkpoint.tensors.items() if name not in checkpoint.updates}
    raw = {name: torch.empty(info.num_bytes, dtype=torch.uint8) for name, info in plain.items()}
    files = StorageFiles()
    try:
        files.read_many(
            [RangeRead(info.file, info.begin, raw[name].numpy().data) for name, info in plain.items()]
        )
        updated = {
            name: read_tensor(files, checkpoint.tensors[name], update).to(dtype)
            for name, update in checkpoint.updates.items()
        }
    finally:
        files.close()
    return updated | {
        name: raw[name].view(torch_dtype(info.dtype)).view(info.shape) for name, info in plain.items()
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bar and its report of tied weights off the screen."""
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def skeleton(checkpoint: Checkpoint, *, trust_code: bool = False) -> Any:
    """Build the model without weights: parameters on the meta device, buffers as they are.

    Raises:
        CheckpointError: transformers does not know it, or would need code that is not trusted.
    """
    runs_code = may_run(checkpoint.folder, checkpoint.config, trust_code=trust_code)
    try:
        with _quiet():
            config = load_config(checkpoint.folder, runs_code=runs_code)
            chosen = model_class(checkpoint.config, checkpoint.folder, runs_code=runs_code)
    except (ValueError, OSError, KeyError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"transformers cannot read the config of {checkpoint.path}: {reason}"
        ) from error
    with _quiet(), building_without_weights():
        model = chosen.from_config(config) if hasattr(chosen, "from_config") else chosen(config)
    model.tie_weights()
    return prepared(model)


def prepared(model: Any) -> Any:
    """Switch a model to measuring: no dropout, no cache, experts one by one."""
    model.eval()
    model.requires_grad_(False)
    model.config.use_cache = False
    if hasattr(model, "set_experts_implementation") and model.get_experts_implementation().get(""):
        model.set_experts_implementation("eager")
    return model


@contextlib.contextmanager
def building_without_weights() -> Iterator[None]:
    """Build models of parameters without memory and of buffers as they are; one thread at a time."""
    with _BUILDING, _parameters_on_meta():
        yield


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move every parameter that this thread makes to the meta device as soon as its module has it."""
    import torch

    original = torch.nn.Module.register_parameter
    thread = threading.get_ident()

    def register(module: Any, name: str, parameter: Any) -> None:
        original(module, name, parameter)
        if parameter is not None and threading.get_ident() == thread:
            meta = parameter.data.to("meta")
            module._parameters[name] = torch.nn.Parameter(meta, requires_grad=False)

    torch.nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = original  # type: ignore[method-assign]


class BlockLoader:
    """Reads and frees the parameters of parts of a skeleton."""

    def __init__(
        self, model: Any, checkpoint: Checkpoint, blocks: Sequence[str], device: str, *, way_out: str
    ) -> None:
        """Read everything outside the blocks.

        Args:
            model: a skeleton.
            checkpoint: where its parameters are.
            blocks: names of the blocks.
            device: where parameters go.
            way_out: what a user can do whose model cannot be loaded like this.

        Raises:
            RecipeError: the checkpoint keeps a parameter in another form than transformers does.
        """
        self._checkpoint, self._device, self._way_out = checkpoint, device, way_out
        self._dtype = compute_dtype(checkpoint, device)
        self._files = StorageFiles()
        self._places: dict[int, list[tuple[Any, str]]] = {}
        self._names: dict[str, list[tuple[str, int]]] = {}
        self._keep: list[Any] = []  # so that an id is never that of another parameter
        for module_name, module in model.named_modules():
            owner = next((each for each in blocks if (module_name + ".").startswith(each + ".")), "")
            for name, parameter in module.named_parameters(recurse=False):
                places = self._places.setdefault(id(parameter), [])
                if not places:
                    self._keep.append(parameter)
                    full = f"{module_name}.{name}" if module_name else name
                    self._names.setdefault(owner, []).append((full, id(parameter)))
                places.append((module, name))
        self._own_sources = {
            full: self._source(model, full) for entries in self._names.values() for full, _ in entries
        }
        self._sources = dict(self._own_sources)
        for buffer_name, buffer in list(model.named_buffers()):
            module_name, _, name = buffer_name.rpartition(".")
            model.get_submodule(module_name)._buffers[name] = buffer.to(device)
        self.load("")

    def load(self, block: str) -> None:
        """Read the parameters of a block ("" for those outside of all) if they are not there."""
        import torch

        for full, key in self._names.get(block, ()):
            module, name = self._places[key][0]
            if not module._parameters[name].is_meta:
                continue
            source = self._sources[full]
            # What stands elsewhere is merged already, updates included.
            update = self._checkpoint.updates.get(source.name) if source == self._own_sources[full] else None
            value = read_tensor(self._files, source, update).to(self._device, self._dtype)
            parameter = torch.nn.Parameter(value, requires_grad=False)
            for module, name in self._places[key]:
                module._parameters[name] = parameter

    def release(self, block: str) -> None:
        """Free the parameters of a block."""
        self._release(block, {full for full, _ in self._names.get(block, ())})

    def _release(self, block: str, parameters: Collection[str]) -> None:
        import torch

        for full, key in self._names.get(block, ()):
            for module, name in self._places[key] if full in parameters else ():
                meta = module._parameters[name].data.to("meta")
                module._parameters[name] = torch.nn.Parameter(meta, requires_grad=False)

    def use(self, replacements: Mapping[str, TensorInfo]) -> None:
        """Read some of the checkpoint's tensors from elsewhere from now on, by name; the others as before.

        Blocks must not be loaded; what stands outside of them is read again where its place has changed.
        """
        self._files.close()  # somebody else has written to what may be open
        before = self._sources
        self._sources = {full: replacements.get(own.name, own) for full, own in self._own_sources.items()}
        moved = {full for full, _ in self._names.get("", ()) if self._sources[full] != before[full]}
        self._release("", moved)
        self.load("")

    def outside(self) -> dict[int, str]:
        """Return the tensors of the parameters outside the blocks, by the identity of the parameter."""
        found = {}
        for full, key in self._names.get("", ()):
            module, name = self._places[key][0]
            found[id(module._parameters[name])] = self._own_sources[full].name
        return found

    def tensors_of(self, block: str) -> list[str]:
        """Return the names of the tensors of a block ("" for those outside of all)."""
        return [self._own_sources[full].name for full, _ in self._names.get(block, ())]

    def _source(self, model: Any, full: str) -> TensorInfo:
        known = {**self._checkpoint.tensors, **self._checkpoint.tied}
        names = tensor_names(model, full, known)
        if len(names) != 1:
            kept = "does not hold" if not names else f"keeps in {len(names)} tensors"
            raise RecipeError(
                f"{self._checkpoint.path} {kept} the parameter {full}, so its layers cannot be loaded one by one; "
                f"{self._way_out}."
            )
        return self._checkpoint.tensors[self._checkpoint.tied.get(names[0], names[0])]
