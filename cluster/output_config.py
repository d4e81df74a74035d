"""Make an output's config.json and generation_config.json from those of the donor.

Changed is only what the merge changed: dtype, number of layers and what is listed per layer,
vocabulary and the ids of special tokens, whether the head is tied.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from raymerge.cluster.layers import num_layers_of, set_num_layers
from raymerge.cluster.matched import LoadedModel, MergedTensor
from raymerge.cluster.recipe import LayerSlice, Recipe
from raymerge.cluster.tokenizer_tokens import read_token_ids
from raymerge.cluster.vocabulary import Vocabulary
from raymerge.cluster.vocabulary_rows import is_head, stated_vocab_size
from raymerge.merge_actors.dtypes import is_float, torch_name

#: Lists of layer numbers, as opposed to lists with one entry per layer.
_LAYER_NUMBER_LISTS = frozenset(
    "mlp_only_layers moe_layers cross_attention_layers attn_layer_indices full_attn_idxs "
    "global_attention_layers".split()
)
#: Lists with one entry per layer that do not say "layer" or "block" in their name.
_PER_LAYER_LISTS = frozenset({"num_query_heads", "num_kv_heads", "ffn_multipliers", "hybrid_override"})
#: Keys that are wrong in an output: paths of others, and how the donor's numbers were packed.
_DROPPED = ("_name_or_path", "quantization_config", "compression_config")


def make_config(
    recipe: Recipe,
    models: Mapping[str, LoadedModel],
    tensors: Sequence[MergedTensor],
    vocabulary: Vocabulary | None,
) -> tuple[dict[str, Any], list[str]]:
    """Return the output's config.json and remarks for the user."""
    config = copy.deepcopy(models[recipe.donor.key].checkpoint.config)
    remarks: list[str] = []
    if not config:
        return {}, [f"no config.json written: {recipe.donor.key} has none"]
    for key in _DROPPED:
        config.pop(key, None)
    _set_dtype(config, tensors)
    _set_layers(config, recipe, models)
    if vocabulary is not None:
        _set_vocab_size(config, vocabulary.num_rows)
        remap = token_remap(recipe, models, vocabulary)
        for part in _parts(config):
            remap_tokens(part, remap)
    heads = [tensor.name for tensor in tensors if is_head(tensor.name) and len(tensor.shape) == 2]
    if heads and any(part.get("tie_word_embeddings") is True for part in _parts(config)):
        remarks.append(f"tie_word_embeddings is false in the output, which has a {heads[0]} of its own")
        for part in _parts(config):
            if "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
    return config, remarks


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a config and those of its sub-models (text_config, vision_config, decoder, ...)."""
    yield config
    for key, value in config.items():
        if isinstance(value, dict) and (key.endswith("_config") or key in ("encoder", "decoder")):
            yield from _parts(value)


def _set_dtype(config: dict[str, Any], tensors: Sequence[MergedTensor]) -> None:
    """Write the dtype that most of the output's numbers have."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if is_float(tensor.dtype):
            elements = 1
            for length in tensor.shape:
                elements *= length
            counts[tensor.dtype] += elements
    if not counts:
        return
    name = torch_name(counts.most_common(1)[0][0])
    for part in _parts(config):
        for key in ("dtype", "torch_dtype"):
            if isinstance(part.get(key), str):
                part[key] = name
    config["dtype"] = name


def _set_layers(config: dict[str, Any], recipe: Recipe, models: Mapping[str, LoadedModel]) -> None:
    for module in recipe.modules:
        if all(layers.num_layers is None for layers in module.slices):
            continue
        part = _config_of_module(config, module.name)
        old = num_layers_of(part)
        origins = [origin for layers in module.slices for origin in _origins(layers, recipe)]
        for holder, key, value in list(_layer_lists(part, old)):
            if key in _LAYER_NUMBER_LISTS:
                chosen: list[Any] = [new for new, (_, layer) in enumerate(origins) if layer in value]
            else:
                chosen = [_entry(models[model], module.name, key, layer, value) for model, layer in origins]
            holder[key] = chosen
        set_num_layers(part, len(origins))


def _config_of_module(config: dict[str, Any], module: str) -> dict[str, Any]:
    """Return the sub-config of a tower such as "vision_tower", or the whole config for the text."""
    stem = module.split("_")[0]
    found = config.get(f"{stem}_config")
    return found if isinstance(found, dict) else config


def _origins(layers: LayerSlice, recipe: Recipe) -> list[tuple[str, int]]:
    """Return per layer of a slice the model, the donor if it takes part, and its layer."""
    uses = layers.uses()
    use = next((each for each in uses if each.model == recipe.donor), uses[0])
    assert use.layer_range is not None
    return [(use.model.key, layer) for layer in range(*use.layer_range)]


def _layer_lists(
    config: dict[str, Any], count: int | None
) -> Iterator[tuple[dict[str, Any], str, list[Any]]]:
    """Yield the lists that speak of layers, with the part of the config that holds them."""
    for part in _text_parts(config):
        for key, value in part.items():
            if not isinstance(value, list):
                continue
            says_layer = "layer" in key or "block" in key or key in _PER_LAYER_LISTS
            if key in _LAYER_NUMBER_LISTS or (says_layer and len(value) == count):
                yield part, key, value


def _text_parts(config: dict[str, Any]) -> list[dict[str, Any]]:
    found = (config.get(key) for key in ("text_config", "language_config", "llm_config"))
    return [config, *(part for part in found if isinstance(part, dict))]


def _entry(model: LoadedModel, module: str, key: str, layer: int, default: list[Any]) -> Any:
    """Return what a model's config says of a layer; another model may have more layers than the donor."""
    parts = _text_parts(_config_of_module(model.checkpoint.config, module))
    listed: list[Any] = next((part[key] for part in parts if isinstance(part.get(key), list)), default)
    return listed[layer] if layer < len(listed) else listed[-1]


def _set_vocab_size(config: dict[str, Any], num_rows: int) -> None:
    old = stated_vocab_size(config)
    for part in _parts(config):
        if part.get("vocab_size") == old and old is not None:
            part["vocab_size"] = num_rows
    if old is None:
        config["vocab_size"] = num_rows


#: (key, id in the donor) -> id in the output, or None.
Remap = Callable[[str, int], int | None]


def token_remap(recipe: Recipe, models: Mapping[str, LoadedModel], vocabulary: Vocabulary) -> Remap:
    """Return how ids of special tokens change; they do when the tokenizer is not the donor's."""
    donor, chosen = models[recipe.donor.key], models[vocabulary.tokenizer_model]
    if donor is chosen:
        return lambda key, number: number if number < vocabulary.num_rows else None
    by_row = recipe.vocabulary in ("pad", "truncate")
    tokens = {number: token for token, number in (read_token_ids(donor) or {}).items()}
    ids = dict(vocabulary.token_ids or read_token_ids(chosen) or {})

    def remap(key: str, number: int) -> int | None:
        if by_row and number < vocabulary.num_rows:
            return number
        found = ids.get(tokens.get(number, ""))
        stated = chosen.checkpoint.config.get(key)
        return found if found is not None or not isinstance(stated, int) else stated

    return remap


def remap_tokens(config: dict[str, Any], remap: Remap) -> None:
    """Change the ids of special tokens in a config in place; a token that is gone has none."""
    for key, value in config.items():
        if not key.endswith(("_token_id", "_token_index")):
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            config[key] = remap(key, value)
        elif isinstance(value, list) and value and all(isinstance(each, int) for each in value):
            mapped = [remap(key, each) for each in value]
            config[key] = [each for each in mapped if each is not None] or None
