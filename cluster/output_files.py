"""Write everything of an output checkpoint but its weights, their index and the manifest.

Nothing here needs a result: it can run before the first weight is read, so that a tokenizer
that cannot be built is found early. All of it comes from the donor (the base, or the first
model); no model's code is run.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from raymerge.cluster.chat_template import choose_template, write_template
from raymerge.cluster.head_files import write_heads
from raymerge.cluster.heads import Heads, set_labels
from raymerge.cluster.matched import LoadedModel, MergedTensor
from raymerge.cluster.model_card import make_model_card
from raymerge.cluster.output_config import make_config, remap_tokens, token_remap
from raymerge.cluster.recipe import Recipe
from raymerge.cluster.tokenizer_files import write_json, write_tokenizer
from raymerge.cluster.tokenizer_tokens import has_tokenizer, tokenizer_folder
from raymerge.cluster.vocabulary import Vocabulary
from raymerge.merge_actors.checkpoint.files import read_json
from raymerge.merge_actors.checkpoint.layout import Layout
from raymerge.merge_actors.files import write_error

RECIPE_NAME = "raymerge_recipe.yaml"
#: How images and sounds become inputs; what sentence-transformers keeps beside the model.
_COPIED = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "feature_extractor_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)


def write_metadata_files(
    folder: str,
    recipe: Recipe,
    models: Mapping[str, LoadedModel],
    tensors: Sequence[MergedTensor],
    layout: Layout,
    vocabulary: Vocabulary | None,
    heads: Heads | None = None,
) -> list[str]:
    """Write config, tokenizer, processors, recipe and model card of an output.

    Args:
        folder: an existing folder.
        recipe: what is merged.
        models: by `ModelRef.key`; all that the recipe names.
        tensors: the tensors of the output.
        layout: its files.
        vocabulary: its vocabulary, if that differs from the donor's.
        heads: what becomes of classification heads, if they are not merged like other tensors.

    Returns:
        remarks for the user.

    Raises:
        RecipeError: the chat template is not to be had.
        CheckpointError: a file of the donor cannot be read.
        OutputError: the disk is full, or the tokenizer cannot be built as planned.
    """
    try:
        template, remarks = choose_template(recipe, models)
        remarks += _write_configs(folder, recipe, models, tensors, vocabulary, heads)
        if heads is not None and heads.is_beside:
            remarks += write_heads(folder, heads, models)
        donor = models[recipe.donor.key]
        source = models[vocabulary.tokenizer_model] if vocabulary else donor
        remarks += write_tokenizer(folder, source, vocabulary, models)
        if template is not None and has_tokenizer(tokenizer_folder(source)):
            write_template(folder, template)
        remarks += _copy_others(folder, donor)
        text = recipe.to_yaml()
        with open(os.path.join(folder, RECIPE_NAME), "w", encoding="utf-8") as file:
            file.write(text)
        with open(os.path.join(folder, "README.md"), "w", encoding="utf-8") as file:
            file.write(make_model_card(recipe, tensors, layout, vocabulary, text))
    except OSError as error:
        raise write_error(folder, error) from error
    return remarks


def _write_configs(
    folder: str,
    recipe: Recipe,
    models: Mapping[str, LoadedModel],
    tensors: Sequence[MergedTensor],
    vocabulary: Vocabulary | None,
    heads: Heads | None,
) -> list[str]:
    config, remarks = make_config(recipe, models, tensors, vocabulary)
    if config and heads is not None:
        remarks += set_labels(config, heads, models)
    if config:
        write_json(os.path.join(folder, "config.json"), config)
    path = os.path.join(models[recipe.donor.key].checkpoint.folder, "generation_config.json")
    if os.path.exists(path):
        generation = read_json(path)
        generation.pop("_name_or_path", None)
        if vocabulary is not None:
            remap_tokens(generation, token_remap(recipe, models, vocabulary))
        write_json(os.path.join(folder, "generation_config.json"), generation)
    return remarks


def _copy_others(folder: str, donor: LoadedModel) -> list[str]:
    """Copy files that are taken as they are: processors, modules of sentence-transformers, code."""
    origin = donor.checkpoint.folder
    for name in _COPIED:
        if os.path.isfile(os.path.join(origin, name)):
            shutil.copyfile(os.path.join(origin, name), os.path.join(folder, name))
    _copy_modules(origin, folder)
    if not _names_code(donor.checkpoint.config):
        return []
    # Without its code the output could not be opened; whoever opens it decides whether to run it.
    code = sorted(name for name in os.listdir(origin) if name.endswith(".py"))
    for name in code:
        shutil.copyfile(os.path.join(origin, name), os.path.join(folder, name))
    return [f"code of {donor.key} copied, not run: {', '.join(code)}"] if code else []


def _names_code(config: Mapping[str, Any]) -> bool:
    return bool(config.get("auto_map"))


def _copy_modules(origin: str, folder: str) -> None:
    """Copy modules.json and the folders of the modules after the network (pooling, normalising)."""
    path = os.path.join(origin, "modules.json")
    if not os.path.isfile(path):
        return
    shutil.copyfile(path, os.path.join(folder, "modules.json"))
    for name in sorted(os.listdir(origin)):
        module = os.path.join(origin, name)
        if re.fullmatch(r"\d+_[A-Za-z0-9_]+", name) and os.path.isdir(module):
            os.makedirs(os.path.join(folder, name), exist_ok=True)
            for file in sorted(os.listdir(module)):
                if os.path.isfile(os.path.join(module, file)):
                    shutil.copyfile(os.path.join(module, file), os.path.join(folder, name, file))
