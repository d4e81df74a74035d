"""Find output layers that the config ties to the input embedding but the file holds twice.

`save_pretrained` writes a tied tensor once; other writers write both copies. Merging both apart
would cost twice and, with random methods, untie them.
"""

from __future__ import annotations

from typing import Any

from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.merge_actors.storage.folders import reading

#: Output layers: the last parts of their names, in the architectures of transformers.
_HEADS = (
    "lm_head.weight",
    "lm_head.decoder.weight",
    "lm_head.out_proj.weight",
    "embed_out.weight",
    "cls.predictions.decoder.weight",
    "predictions.decoder.weight",
    "output_projection.weight",
    "proj_out.weight",
    "vocab_projector.weight",
    "generator_lm_head.weight",
)
#: Input embeddings, the one that is kept first: encoders and decoders share `shared`.
_EMBEDDINGS = (
    "shared.weight",
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
    "embeddings.weight",
    "tokens_embed.weight",
    "word_embedding.weight",
)
_SAMPLE_BYTES = 4096


def find_tied(tensors: dict[str, TensorInfo], config: dict[str, Any]) -> dict[str, str]:
    """Return alias -> kept name for duplicates that `tie_word_embeddings` declares.

    Two tensors count as tied when the config says so, dtype and shape are equal, and samples
    of 4 KiB at both ends and in the middle are. A config that ties what the file holds
    with different values is wrong, and transformers does not tie it either.
    """
    text_config = config.get("text_config")
    declared = config.get("tie_word_embeddings") is True or (
        isinstance(text_config, dict) and text_config.get("tie_word_embeddings") is True
    )
    if not declared:
        return {}
    embeddings = [name for ending in _EMBEDDINGS for name in tensors if _ends(name, ending)]
    shared = [name for name in embeddings if _ends(name, "shared.weight")]
    aliases = [name for name in tensors if any(_ends(name, ending) for ending in _HEADS)]
    if shared:
        aliases += [name for name in embeddings if _ends(name, "embed_tokens.weight")]
    tied = {}
    for alias in aliases:
        candidates = (name for name in embeddings if name not in tied and name != alias)
        kept = next((name for name in candidates if are_same(tensors[alias], tensors[name])), None)
        if kept is not None:
            tied[alias] = kept
    return tied


def _ends(name: str, ending: str) -> bool:
    return name == ending or name.endswith("." + ending)


def are_same(one: TensorInfo, other: TensorInfo) -> bool:
    """Compare two tensors by dtype, shape and samples of their bytes."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    last = max(one.num_bytes - _SAMPLE_BYTES, 0)
    return all(_sample(one, offset) == _sample(other, offset) for offset in (0, last // 2, last))


def _sample(tensor: TensorInfo, offset: int) -> bytes:
    with reading(tensor.file) as reader:
        return reader.read(tensor.begin + offset, min(_SAMPLE_BYTES, tensor.num_bytes - offset))
