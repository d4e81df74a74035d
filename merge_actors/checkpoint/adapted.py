"""See a model and its adapter as one checkpoint: that of the model with the adapter merged into it.

Headers only. Whoever reads a tensor adds its update in `Checkpoint.updates` (see `whole_tensors.py`).
"""

from __future__ import annotations

import dataclasses
import os

import xxhash

from raymerge.merge_actors.checkpoint.adapter import Adapter, open_adapter
from raymerge.merge_actors.checkpoint.folder import Checkpoint, open_checkpoint
from raymerge.merge_actors.checkpoint.hub import locate
from raymerge.merge_actors.errors import MismatchError


def open_model(
    model: str,
    revision: str | None = None,
    *,
    adapter: str | None = None,
    adapter_revision: str | None = None,
    allow_pickle: bool = False,
) -> Checkpoint:
    """Open a model, with an adapter if one is named.

    Args:
        model: local folder, URI or Hub id.
        revision: of the model on the Hub.
        adapter: local folder, URI or Hub id.
        adapter_revision: of the adapter on the Hub.
        allow_pickle: read PyTorch `.bin` files, weights only.

    Raises:
        CheckpointError: there is no such model or adapter, or it cannot be read.
        MismatchError: they do not fit each other.
    """
    base = open_checkpoint(locate(model, revision, allow_pickle=allow_pickle), allow_pickle=allow_pickle)
    if adapter is None:
        return base
    folder = locate(adapter, adapter_revision, allow_pickle=allow_pickle)
    return adapted(base, open_adapter(folder, base, allow_pickle=allow_pickle))


def adapted(base: Checkpoint, adapter: Adapter) -> Checkpoint:
    """Return the checkpoint that merging an adapter into its base would give.

    Raises:
        MismatchError: the adapter resizes a tensor, which the base's config does not know of.
    """
    full = {name: dataclasses.replace(tensor, name=name) for name, tensor in adapter.full.items()}
    for name, tensor in full.items():
        own = base.tensors.get(name)
        if own is not None and own.shape != tensor.shape:
            raise MismatchError(
                f"adapter {adapter.path!r} resizes {name!r} of {base.path!r} from {list(own.shape)} to "
                f"{list(tensor.shape)}, so {base.path!r} cannot be run with it as it is; merge the adapter into "
                "its base with PEFT (merge_and_unload), save the result, and name that."
            )
    digest = xxhash.xxh3_128_hexdigest(f"{base.fingerprint}+{adapter.fingerprint}".encode())
    return dataclasses.replace(
        base,
        path=f"{base.path}+{adapter.path}",
        tensors={**base.tensors, **full},
        fingerprint=digest,
        updates=adapter.pairs,
        is_adapted=True,
        adapter_folder=adapter.folder if _brings_tokenizer(base, adapter) else None,
    )


def _brings_tokenizer(base: Checkpoint, adapter: Adapter) -> bool:
    """Return whether the adapter has a tokenizer, and embeddings of its own for it."""
    config = base.config.get("text_config") or base.config
    num_tokens = config.get("vocab_size")
    return os.path.exists(os.path.join(adapter.folder, "tokenizer_config.json")) and any(
        len(tensor.shape) == 2 and tensor.shape[0] == num_tokens for tensor in adapter.full.values()
    )
