"""Code that comes with a checkpoint: what it is, when transformers needs it, and that nothing runs it unasked.

`auto_map` in a config names classes in Python files beside it, or in a repository ("org/name--file.Class").
transformers asks on the terminal whether to run them unless it is told; here it always is told. With
--trust-remote-code they are run where transformers has no class of its own, and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import xxhash

from raymerge.merge_actors.checkpoint.files import read_json
from raymerge.merge_actors.errors import CheckpointError

T = TypeVar("T")

FLAG = "--trust-remote-code"
_CONFIGS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


def code_files(folder: str) -> tuple[str, ...]:
    """Return the files that the configs of a folder name: "modeling_x.py", "org/name--modeling_x.py"."""
    found: dict[str, None] = {}
    for name in _CONFIGS:
        path = os.path.join(folder, name)
        named = read_json(path).get("auto_map") if os.path.exists(path) else None
        for value in named.values() if isinstance(named, Mapping) else (named or ()):
            for reference in value if isinstance(value, list | tuple) else (value,):
                if isinstance(reference, str):
                    found[reference.rpartition(".")[0] + ".py"] = None
    return tuple(sorted(found))


def model_needs_code(config: Mapping[str, Any]) -> bool:
    """Return whether a config names code, and a type or class that transformers does not have."""
    if not config.get("auto_map"):
        return False
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    architectures = config.get("architectures") or ()
    has_class = not architectures or any(hasattr(transformers, name) for name in architectures)
    return not (config.get("model_type") in CONFIG_MAPPING and has_class)


def may_run(folder: str, config: Mapping[str, Any], *, trust_code: bool) -> bool:
    """Return whether a model's code is run: it is needed, and trusted.

    Args:
        folder: with the config.
        config: config.json.
        trust_code: the user has said so.

    Raises:
        CheckpointError: it is needed, but not trusted.
    """
    if not model_needs_code(config):
        return False
    if not trust_code:
        raise refused(folder)
    return True


def refused(folder: str) -> CheckpointError:
    """Return the error for a checkpoint that cannot be used without its code."""
    return CheckpointError(
        f"transformers needs code of the checkpoint {folder} itself ({_listed(folder)}, named by auto_map), and such "
        f"code is not run unasked: read it, then give {FLAG} if you trust it."
    )


def load_with_code(load: Callable[[bool], T], folder: str, *, trust_code: bool) -> T:
    """Load a tokenizer or a processor; with code of its folder only if transformers has no class for it.

    Args:
        load: told whether code may run.
        folder: where it is.
        trust_code: the user has said so.

    Raises:
        CheckpointError: code is needed, but not trusted.
    """
    try:
        return load(False)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        if not trust_code:
            raise refused(folder) from error
    return load(True)


def code_remark(folder: str) -> str | None:
    """Return what is said before a trusted checkpoint's code runs; None if it names none that may run."""
    path = os.path.join(folder, "config.json")
    config = read_json(path) if os.path.exists(path) else {}
    if not (model_needs_code(config) or _tokenizer_names_code(folder)):
        return None
    return f"code of the checkpoint {folder} is run ({FLAG}): {_listed(folder)}"


def code_digest(folder: str, config: Mapping[str, Any]) -> dict[str, str]:
    """Return 128 bits in hex over each file of code that decides what a model computes; {} if none does."""
    if not model_needs_code(config):
        return {}
    digests = {}
    for name in sorted({*os.listdir(folder), *code_files(folder)}):
        if name.endswith(".py"):
            path = os.path.join(folder, name)
            content = b""
            if os.path.isfile(path):
                with open(path, "rb") as stream:
                    content = stream.read()
            digests[name] = xxhash.xxh3_128_hexdigest(content)
    return digests


def _tokenizer_names_code(folder: str) -> bool:
    path = os.path.join(folder, "tokenizer_config.json")
    return os.path.exists(path) and bool(read_json(path).get("auto_map"))


def _listed(folder: str) -> str:
    return ", ".join(code_files(folder)) or "no file is named"
