"""Read a LoRA adapter in PEFT's format and find the base tensors that it changes.

Only headers are read. The worker adds `scale * B @ A` to the rows it reads (Hu et al. 2021,
arXiv:2106.09685, eq. 3; scale alpha / sqrt(r) with `use_rslora`, Kalajdzievski 2023,
arXiv:2312.03732). What would need more than that is refused: DoRA, trainable biases of
the low-rank part, initialisations that change the base.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from raymerge.merge_actors.checkpoint.adapter_names import BaseNames
from raymerge.merge_actors.checkpoint.files import DataFiles, read_json
from raymerge.merge_actors.checkpoint.folder import (
    Checkpoint,
    fingerprint,
    refuse_remote_pickle,
    resolve_folder,
)
from raymerge.merge_actors.checkpoint.header import TensorInfo, read_header
from raymerge.merge_actors.checkpoint.pickles import TIED_KEY, converted
from raymerge.merge_actors.checkpoint.ties import are_same
from raymerge.merge_actors.errors import CheckpointError, MismatchError
from raymerge.merge_actors.storage.folders import exists
from raymerge.merge_actors.wording import some_of

#: base_model.model.<module>.lora_A[.<adapter>].weight; embeddings have no ".weight".
_LOW_RANK = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(?:\.(?!weight$|bias$)[^.]+)?(?P<what>\.weight|\.bias)?"
)
#: Model types of transformers whose layers are Conv1D: weights stored (in, out).
_CONV1D_TYPES = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"})
_REFUSED = {
    "use_dora": "DoRA (use_dora)",
    "lora_bias": "a bias in the low-rank part (lora_bias)",
    "use_qalora": "QALoRA (use_qalora)",
    "layer_replication": "layer_replication",
    "trainable_token_indices": "trainable_token_indices",
    "target_parameters": "target_parameters",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "megatron_config": "Megatron layers (megatron_config)",
    "monteclora_config": "monteclora_config",
}
#: Initialisations that subtract from the base: B @ A belongs to another base than the one named.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_WAY_OUT = "merge the adapter into its base with PEFT (merge_and_unload) and give the merged model"


@dataclass(frozen=True, slots=True)
class LowRank:
    """An update of one base tensor: scale * B @ A."""

    a: TensorInfo
    """(rank, in)."""
    b: TensorInfo
    """(out, rank)."""
    scale: float
    is_transposed: bool
    """The base tensor is stored (in, out): its update is scale * (B @ A) transposed."""

    @property
    def rank(self) -> int:
        """Return the inner dimension of the product."""
        return self.a.shape[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """A LoRA adapter, resolved against a base."""

    path: str
    """As the user gave it."""
    folder: str
    """Absolute, symbolic links resolved."""
    config: dict[str, Any]
    """adapter_config.json."""
    pairs: dict[str, LowRank]
    """base tensor -> its update."""
    full: dict[str, TensorInfo]
    """Tensors that replace the base's or come on top: `modules_to_save`, trained biases, resized
    embeddings. An update in `pairs` for the same name is added to the tensor given here."""
    fingerprint: str
    """As a checkpoint's, and over the scales, which the config decides."""


def open_adapter(folder: str | os.PathLike[str], base: Checkpoint, *, allow_pickle: bool = False) -> Adapter:
    """Read an adapter's headers and match its modules with the base's tensors.

    Args:
        folder: a local folder with adapter_config.json and adapter_model.safetensors (or .bin).
        base: the checkpoint that the adapter is added to.
        allow_pickle: convert adapter_model.bin, through torch's restricted unpickler.

    Raises:
        CheckpointError: no adapter, of an unsupported kind, or with modules that the base lacks.
        MismatchError: an update has another shape than its base tensor.
    """
    path = os.fspath(folder)
    data_folder, small_files = resolve_folder(path, "adapter")
    config_path = os.path.join(small_files, "adapter_config.json")
    if not os.path.isfile(config_path):
        raise CheckpointError(
            f"adapter {path!r} has no adapter_config.json in {data_folder}; give the folder of a PEFT adapter."
        )
    config = read_json(config_path)
    _check_supported(config, path)
    file, tensors = _read_tensors(data_folder, path, allow_pickle=allow_pickle)
    names = BaseNames(base)
    low_rank, others = _sort_out(tensors, path)
    full = _full_tensors(others, names, config, path)
    pairs = _pairs(low_rank, full, names, config, path)
    return Adapter(
        path=path,
        folder=small_files,
        config=config,
        pairs=pairs,
        full=full,
        fingerprint=_fingerprint(fingerprint(tensors.values(), [file]), pairs),
    )


def _fingerprint(of_files: str, pairs: Mapping[str, LowRank]) -> str:
    scales = [(name, pair.scale, pair.is_transposed) for name, pair in sorted(pairs.items())]
    return xxhash.xxh3_128_hexdigest(f"{of_files}{scales}".encode())


def _check_supported(config: Mapping[str, Any], path: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"adapter {path!r} is of the type {kind!r}; only LORA is supported: {_WAY_OUT}."
        )
    for key, words in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(f"adapter {path!r} uses {words}, which is not supported: {_WAY_OUT}.")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_CHANGED_BASE):
        raise CheckpointError(
            f"adapter {path!r} was started by {start!r}, which changes the base's weights: save it converted "
            f"to plain LoRA (path_initial_model_for_weight_conversion), or {_WAY_OUT}."
        )
    for key in ("r", "lora_alpha"):
        value = config.get(key)
        if not isinstance(value, (int, float)) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(f"adapter {path!r} has {key} {value!r}; it must be a positive number.")


def _read_tensors(folder: str, path: str, *, allow_pickle: bool) -> tuple[str, dict[str, TensorInfo]]:
    """Return the data file and its tensors; of a pickle the shared ones under all their names."""
    file = os.path.join(folder, "adapter_model.safetensors")
    if exists(file):
        return file, read_header(file)[0]
    pickle = os.path.join(folder, "adapter_model.bin")
    if not exists(pickle):
        raise CheckpointError(
            f"adapter {path!r} has no adapter_model.safetensors in {folder}: download it again."
        )
    refuse_remote_pickle(folder, path)
    files = converted(DataFiles(paths=(pickle,), is_pickle=True), path, allow_pickle=allow_pickle)
    tensors, metadata = read_header(files.paths[0])
    for alias, kept in json.loads(metadata.get(TIED_KEY, "{}")).items():
        tensors[alias] = tensors[kept]
    return files.paths[0], tensors


#: (module, is it an embedding) -> side -> tensor
_LowRankTensors = dict[tuple[str, bool], dict[str, TensorInfo]]


def _sort_out(tensors: dict[str, TensorInfo], path: str) -> tuple[_LowRankTensors, dict[str, TensorInfo]]:
    """Tell the halves of the low-rank updates from whole tensors."""
    low_rank: _LowRankTensors = {}
    others: dict[str, TensorInfo] = {}
    for name, tensor in tensors.items():
        short = name.removeprefix("base_model.model.")
        if "lora_magnitude_vector" in name:
            raise CheckpointError(f"adapter {path!r} holds {name!r}: DoRA is not supported: {_WAY_OUT}.")
        match = _LOW_RANK.fullmatch(short)
        if match is None:
            others[short] = tensor
        elif match["what"] == ".bias" or len(tensor.shape) != 2:
            raise CheckpointError(
                f"adapter {path!r} holds {name!r} of shape {list(tensor.shape)}; only matrices lora_A "
                f"(rank, in) and lora_B (out, rank) are supported: {_WAY_OUT}."
            )
        else:
            low_rank.setdefault((match["module"], match["embedding"] is not None), {})[match["side"]] = tensor
    for (module, _), sides in low_rank.items():
        if len(sides) == 1:
            has, lacks = ("A", "B") if "A" in sides else ("B", "A")
            raise CheckpointError(
                f"adapter {path!r} has lora_{has} of {module} without lora_{lacks}: save it again."
            )
    return low_rank, others


def _full_tensors(
    others: dict[str, TensorInfo], names: BaseNames, config: Mapping[str, Any], path: str
) -> dict[str, TensorInfo]:
    """Map whole tensors: modules_to_save (new ones too), biases, embeddings saved on the side."""
    saved = config.get("modules_to_save") or []
    full: dict[str, TensorInfo] = {}
    unknown = []
    for short, tensor in others.items():
        # Wrappers that PEFT puts around a module, with the adapter's name where an old version kept it.
        plain = re.sub(r"\.modules_to_save(\.default)?(?=\.)|\.base_layer(?=\.)", "", short)
        name = names.find(plain, path)
        if name is None and any(part in saved for part in plain.split(".")):
            name = plain
        if name is None:
            unknown.append(plain)
        else:
            full[name] = tensor
    _refuse_unknown(unknown, names, path)
    for alias, kept in names.base.tied.items():
        if alias not in full:
            continue
        if kept not in full or not are_same(full[alias], full[kept]):
            raise CheckpointError(
                f"adapter {path!r} replaces {alias!r}, which {names.base.path!r} ties to {kept!r}, "
                "and leaves the other as it was: set tie_word_embeddings to false in the base's "
                f"config.json, or {_WAY_OUT}."
            )
        del full[alias]
    return full


def _refuse_unknown(modules: list[str], names: BaseNames, path: str) -> None:
    if modules:
        raise CheckpointError(
            f"adapter {path!r} changes {some_of(modules)}, which the base {names.base.path!r} "
            f"does not have{names.nearest(modules[0])}; give the base that the adapter was trained on."
        )


def _pairs(
    low_rank: _LowRankTensors,
    full: Mapping[str, TensorInfo],
    names: BaseNames,
    config: Mapping[str, Any],
    path: str,
) -> dict[str, LowRank]:
    found: dict[str, tuple[str, bool]] = {}
    unknown = []
    for key in low_rank:
        name = names.find(key[0] + ".weight", path)
        if name is None:
            unknown.append(key[0])
        elif name in names.base.tied:
            raise CheckpointError(
                f"adapter {path!r} changes {name!r}, which {names.base.path!r} ties to "
                f"{names.base.tied[name]!r}: set tie_word_embeddings to false in the base's config.json, "
                f"or {_WAY_OUT}."
            )
        elif name in found:
            raise CheckpointError(
                f"adapter {path!r} changes {name!r} twice, as {found[name][0]} and {key[0]}."
            )
        else:
            found[name] = key
    _refuse_unknown(unknown, names, path)
    bases = {name: full.get(name) or names.base.tensors[name] for name in found}
    is_conv1d = _are_square_transposed(found, low_rank, bases, config, names.base)
    return {
        name: _pair(bases[name], module, low_rank[module, embedding], embedding or is_conv1d, config, path)
        for name, (module, embedding) in found.items()
    }


def _are_square_transposed(
    found: Mapping[str, tuple[str, bool]],
    low_rank: _LowRankTensors,
    bases: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    base: Checkpoint,
) -> bool:
    """Decide how square weights are stored, which their shape does not show.

    `fan_in_fan_out` alone will not do: PEFT corrects it when it loads, for Conv1D as for Linear.
    """
    shown = set()
    for name, key in found.items():
        num_out, num_in = low_rank[key]["B"].shape[0], low_rank[key]["A"].shape[1]
        if not key[1] and num_out != num_in:
            shown.add(bases[name].shape == (num_in, num_out))
    if len(shown) == 1:
        return shown.pop()
    return base.config.get("model_type") in _CONV1D_TYPES or bool(config.get("fan_in_fan_out"))


def _pair(
    base: TensorInfo,
    module: str,
    sides: Mapping[str, TensorInfo],
    is_square_transposed: bool,
    config: Mapping[str, Any],
    path: str,
) -> LowRank:
    a, b = sides["A"], sides["B"]
    num_out, num_in, rank = b.shape[0], a.shape[1], a.shape[0]
    if b.shape[1] != rank or a.dtype != b.dtype:
        raise MismatchError(
            f"adapter {path!r} has lora_A {a.dtype} {list(a.shape)} and lora_B {b.dtype} {list(b.shape)} "
            f"for {module}; the rank (first of A, second of B) and the dtype must agree: save it again."
        )
    if base.shape not in ((num_out, num_in), (num_in, num_out)):
        raise MismatchError(
            f"adapter {path!r} updates {base.name!r} of shape {list(base.shape)} by a product of shape "
            f"{[num_out, num_in]}; give the base that the adapter was trained on."
        )
    expected = _pattern(config, "rank_pattern", module, config["r"], path)
    if expected != rank:
        raise MismatchError(
            f"adapter {path!r} has rank {rank} for {module}, its adapter_config.json says {expected:g}; "
            "config and weights must come from one training run."
        )
    alpha = _pattern(config, "alpha_pattern", module, config["lora_alpha"], path)
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    is_transposed = is_square_transposed if num_in == num_out else base.shape == (num_in, num_out)
    return LowRank(a, b, scale, is_transposed)


def _pattern(config: Mapping[str, Any], key: str, module: str, default: float, path: str) -> float:
    """Return the value of the first pattern that matches the end of the module's name."""
    for pattern, value in (config.get(key) or {}).items():
        try:
            match = re.fullmatch(rf"(.*\.)?({pattern})", module)
        except re.error as error:
            raise CheckpointError(f"adapter {path!r} has the {key} {pattern!r}: {error}.") from error
        if match:
            return float(value)
    return float(default)
