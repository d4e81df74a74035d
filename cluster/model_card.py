"""Write the model card of an output: README.md with the front matter that the Hub reads.

Models are shown as the recipe names them, so a local path in the recipe stands in the card
too; nothing else of the machine does.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from raymerge.cluster.matched import MergedTensor
from raymerge.cluster.model_ref import ModelRef
from raymerge.cluster.recipe import Recipe
from raymerge.cluster.vocabulary import Vocabulary
from raymerge.merge_actors.checkpoint.layout import Layout
from raymerge.merge_actors.dtypes import torch_name
from raymerge.merge_actors.methods import METHODS

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def make_model_card(
    recipe: Recipe,
    tensors: Sequence[MergedTensor],
    layout: Layout,
    vocabulary: Vocabulary | None,
    recipe_text: str,
) -> str:
    """Return the model card as Markdown.

    Args:
        recipe: what was merged.
        tensors: the tensors of the output.
        layout: its files.
        vocabulary: its vocabulary, if one was planned.
        recipe_text: the recipe as YAML.
    """
    lines = [
        "---",
        yaml.safe_dump(_front_matter(recipe), sort_keys=False, allow_unicode=True).rstrip(),
        "---",
        "",
        f"# {recipe.name}",
        "",
        _method_sentence(recipe),
        "",
        "## Models",
        "",
        *_model_lines(recipe),
        "",
        "## Figures",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _figures(recipe, tensors, layout, vocabulary).items()),
        "",
        "What was done to each tensor, with checksums, is in `raymerge_manifest.json`.",
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe_text.rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def _front_matter(recipe: Recipe) -> dict[str, Any]:
    """Return what the Hub reads; it knows models by Hub id only."""
    parts = [part for ref in _all_models(recipe) for part in (ref, ref.adapter) if part is not None]
    ids = dict.fromkeys(part.path.removeprefix("hf://") for part in parts if _is_hub_id(part))
    matter: dict[str, Any] = {"base_model": list(ids)} if ids else {}
    return matter | {"library_name": "transformers", "tags": ["merge", "raymerge"]}


def _is_hub_id(ref: ModelRef) -> bool:
    path = ref.path.removeprefix("hf://")
    return _HUB_ID.fullmatch(path) is not None and not os.path.isdir(path)


def _all_models(recipe: Recipe) -> list[ModelRef]:
    return list(dict.fromkeys([recipe.donor, *recipe.all_models()]))


def _method_sentence(recipe: Recipe) -> str:
    source = METHODS[recipe.merge_method].source
    found = re.search(r"arXiv:(\d{4}\.\d{4,5})", source)
    if found:
        where = f" ([{found[0]}](https://arxiv.org/abs/{found[1]}))"
    else:
        where = f" ({source})" if source else ""
    return f"Merged with raymerge by `{recipe.merge_method}`{where}."


def _model_lines(recipe: Recipe) -> list[str]:
    lines = []
    for ref in _all_models(recipe):
        name = f"[{ref}](https://huggingface.co/{ref.path})" if _is_hub_id(ref) else f"`{ref}`"
        roles = ["base"] if ref == recipe.base_model else []
        roles += ["config"] if ref == recipe.donor and ref != recipe.base_model else []
        lines.append(f"- {name}" + (f" ({', '.join(roles)})" if roles else ""))
    return lines


def _figures(
    recipe: Recipe, tensors: Sequence[MergedTensor], layout: Layout, vocabulary: Vocabulary | None
) -> dict[str, str]:
    dtypes: dict[str, int] = {}
    for tensor in tensors:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + math.prod(tensor.shape)
    copied = sum(1 for tensor in tensors if tensor.note and len(tensor.models) == 1)
    figures = {
        "parameters": f"{sum(dtypes.values()):,}",
        "dtype": ", ".join(torch_name(dtype) for dtype in sorted(dtypes, key=lambda key: -dtypes[key])),
        "tensors": f"{len(tensors):,}" + (f", of which {copied:,} copied" if copied else ""),
        "files": f"{len(layout.files):,} with {layout.num_bytes:,} bytes",
        "seed": str(recipe.seed),
        "raymerge": _own_version(),
    }
    if vocabulary is not None:
        figures["vocabulary"] = f"{vocabulary.num_rows:,} rows"
    return figures


def _own_version() -> str:
    try:
        return version("raymerge")
    except PackageNotFoundError:
        return "not installed"
