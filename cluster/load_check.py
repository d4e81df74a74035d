"""Ask transformers whether it can load an output: config, tokenizer, weights.

Code that comes with a checkpoint is not run unasked. An output that does not fit into half of the
free memory is not loaded; its tensors are then compared with those of the class.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.merge_actors.errors import VerifyError
from raymerge.merge_actors.host_memory import available_bytes
from raymerge.stats.model_loading import load_config
from raymerge.stats.model_loading import model_class as model_class_of
from raymerge.stats.own_code import FLAG, code_files, code_remark, load_with_code, model_needs_code

if TYPE_CHECKING:
    from torch import nn

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
#: Of the available memory, what a load may take.
_MEMORY_FRACTION = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadCheck:
    """What transformers said of an output."""

    how: Literal["loaded", "compared", "skipped"]
    """With from_pretrained; by tensor names and shapes of the class, without values; not at all."""
    architecture: str | None = None
    missing_keys: tuple[str, ...] = ()
    """Parameters of the class that the output lacks: they would begin at random."""
    unexpected_keys: tuple[str, ...] = ()
    """Tensors of the output that the class has no place for."""
    num_tokens: int | None = None
    """Length of the tokenizer; None if there is none."""
    remarks: tuple[str, ...] = ()


def check_load(
    folder: str,
    tensors: Mapping[str, TensorInfo],
    config: Mapping[str, Any] | None,
    *,
    trust_code: bool = False,
) -> LoadCheck:
    """Load an output with transformers, as a user would.

    Args:
        folder: the output.
        tensors: its tensors.
        config: its config.json; None if it has none.
        trust_code: run code of the output where transformers has no class of its own.

    Raises:
        VerifyError: transformers refuses the output, or finds none of its parameters in it.
    """
    if config is None:
        return LoadCheck(how="skipped", remarks=("it has no config.json, so transformers cannot load it",))
    how: Literal["loaded", "compared"]
    with _quiet():
        runs_code = model_needs_code(config)
        if runs_code and not trust_code:
            remark = (
                f"it needs code of its own ({', '.join(code_files(folder))}), which is not run unasked, so it was not "
                f"loaded; {FLAG} loads it"
            )
            return LoadCheck(how="skipped", remarks=(remark,))
        loaded_config = _ask(folder, "config.json", lambda: load_config(folder, runs_code=runs_code))
        num_tokens, remarks = _check_tokenizer(folder, tensors, trust_code=trust_code)
        if trust_code and (line := code_remark(folder)):
            remarks.insert(0, line)
        architecture = next(iter(config.get("architectures") or []), None)
        model_class = _model_class(folder, config, architecture, runs_code=runs_code)
        if model_class is None:
            remarks.append(
                f"its config names the architecture {architecture!r}, which transformers does not have"
            )
            said = tuple(remarks)
            return LoadCheck(how="skipped", architecture=architecture, num_tokens=num_tokens, remarks=said)
        if sum(info.num_bytes for info in tensors.values()) <= _MEMORY_FRACTION * available_bytes():
            how, (missing, unexpected) = "loaded", _load(folder, model_class)
        else:
            how, (missing, unexpected) = "compared", _compare(folder, model_class, loaded_config, tensors)
            remarks.append(
                "it is larger than half of the free memory, so its tensors were compared with the class's"
            )
    if len(unexpected) == len(tensors):
        raise _nothing_fits(folder, architecture, missing, unexpected)
    return LoadCheck(
        how=how,
        architecture=architecture,
        missing_keys=missing,
        unexpected_keys=unexpected,
        num_tokens=num_tokens,
        remarks=tuple(remarks),
    )


def _nothing_fits(
    folder: str, architecture: str | None, missing: Sequence[str], unexpected: Sequence[str]
) -> VerifyError:
    return VerifyError(
        f"no tensor of {folder} is a parameter of {architecture}, such as {unexpected[0]}; the class "
        f"wants {missing[0] if missing else 'nothing'}: the architecture in config.json is not that "
        "of the weights"
    )


def _model_class(folder: str, config: Mapping[str, Any], architecture: str | None, *, runs_code: bool) -> Any:
    """Return the class of the output's model; None if transformers has none of that name."""
    import transformers

    if runs_code:
        return _ask(folder, "code", lambda: model_class_of(config, folder, runs_code=True))
    return getattr(transformers, architecture or "", None)


def _load(folder: str, model_class: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    _, info = _ask(
        folder,
        "weights",
        lambda: model_class.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, dtype="auto", output_loading_info=True
        ),
    )
    return tuple(sorted(info["missing_keys"])), tuple(sorted(info["unexpected_keys"]))


def _compare(
    folder: str, model_class: Any, config: Any, tensors: Mapping[str, TensorInfo]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Compare names and shapes with those of the class, built without memory."""
    import torch

    def build() -> nn.Module:
        with torch.device("meta"):
            model: nn.Module = model_class(config)
        return model

    model = _ask(folder, "config.json", build)
    expected = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    # A checkpoint of the inner model lacks the prefix, one of a model with a head may have it too many.
    found = {_placed(name, prefix, expected): info for name, info in tensors.items()}
    wrong = [
        name for name, info in found.items() if name in expected and tuple(expected[name].shape) != info.shape
    ]
    if wrong:
        name = wrong[0]
        raise VerifyError(
            f"tensor {found[name].name} in {found[name].file} has the shape {list(found[name].shape)}, but "
            f"{model_class.__name__} with this config.json wants {list(expected[name].shape)}"
        )
    present = {id(expected[name]) for name in found if name in expected}  # tied parameters are one object
    missing = [name for name, tensor in expected.items() if name not in found and id(tensor) not in present]
    return tuple(sorted(missing)), tuple(
        sorted(info.name for name, info in found.items() if name not in expected)
    )


def _placed(name: str, prefix: str, expected: Mapping[str, object]) -> str:
    if name not in expected and prefix + name in expected:
        return prefix + name
    if name not in expected and name.startswith(prefix) and name.removeprefix(prefix) in expected:
        return name.removeprefix(prefix)
    return name


def _check_tokenizer(
    folder: str, tensors: Mapping[str, TensorInfo], *, trust_code: bool
) -> tuple[int | None, list[str]]:
    """Load the tokenizer, and hold its length against the longest matrix that has a row per token."""
    import transformers

    if not any(os.path.exists(os.path.join(folder, name)) for name in _TOKENIZER_FILES):
        return None, ["it has no tokenizer"]

    def load(runs_code: bool) -> Any:
        return transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=runs_code
        )

    tokenizer = _ask(folder, "tokenizer", lambda: load_with_code(load, folder, trust_code=trust_code))
    num_tokens = len(tokenizer)
    rows = [info.shape[0] for info in tensors.values() if len(info.shape) == 2 and "emb" in info.name.lower()]
    if rows and max(rows) < num_tokens:
        return num_tokens, [
            f"its tokenizer has {num_tokens:,} tokens, but its embeddings only {max(rows):,} rows"
        ]
    return num_tokens, []


def _ask(folder: str, what: str, question: Any) -> Any:
    try:
        return question()
    # transformers raises whatever its parsers and torch raise; any of it is the finding.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise VerifyError(
            f"transformers cannot load the {what} of {folder}: {type(error).__name__}: {reason}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' own log and progress bars off the terminal: `LoadCheck` says what matters."""
    from transformers.utils import logging

    level, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if has_bars:
            logging.enable_progress_bar()
