"""Find the layers of a network from its tensors' names alone.

A *stack* is a list of layers: names "PREFIX.<n>.REST" with n = 0, 1, 2, ... The first number
in a name counts, so "model.layers.7.mlp.experts.3.w1.weight" is in layer 7 of "model.layers".
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_LAYER = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
_COUNT_KEYS = (
    "num_hidden_layers",
    "n_layer",
    "num_layers",
    "n_layers",
    "num_decoder_layers",
    "encoder_layers",
)
_SUB_CONFIGS = ("text_config", "language_config", "llm_config", "thinker_config")
#: Components of names that stand before the layers; what is in no stack and not here comes after.
_BEFORE = ("embed", "wte", "wpe", "shared", "patch", "position", "tok_")


class LayerName(NamedTuple):
    """A tensor's name, split at its layer number."""

    stack: str
    layer: int
    rest: str

    def at(self, layer: int) -> str:
        """Return the name in another layer."""
        return f"{self.stack}.{layer}.{self.rest}"


@functools.lru_cache(maxsize=1 << 18)
def split_layer(name: str) -> LayerName | None:
    """Split a tensor's name at its layer number, or return None if it is in no layer."""
    match = _LAYER.match(name)
    return LayerName(match[1], int(match[2]), match[3]) if match else None


def find_stacks(names: Iterable[str]) -> dict[str, int]:
    """Return the number of layers of every stack, by prefix."""
    indices: dict[str, set[int]] = defaultdict(set)
    for name in names:
        layer = split_layer(name)
        if layer:
            indices[layer.stack].add(layer.layer)
    return {stack: max(found) + 1 for stack, found in indices.items()}


def num_layers_of(config: Mapping[str, Any]) -> int | None:
    """Return the number of layers that a config.json states, or None."""
    for part in (config, *(config.get(key) or {} for key in _SUB_CONFIGS)):
        for key in _COUNT_KEYS:
            if isinstance(part.get(key), int):
                return int(part[key])
    return None


def main_stacks(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, int]:
    """Return the stacks that a recipe's `layer_range` counts: those as long as config.json says.

    Without a config the longest stacks are meant.
    """
    stacks = find_stacks(names)
    stated = num_layers_of(config)
    main = {stack: count for stack, count in stacks.items() if count == stated}
    if main or not stacks:
        return main
    longest = max(stacks.values())
    return {stack: count for stack, count in stacks.items() if count == longest}


def is_before_layers(name: str) -> bool:
    """Return whether a tensor outside the layers comes before them (an embedding) or after."""
    return any(part.startswith(_BEFORE) for part in name.lower().split("."))


def set_num_layers(config: dict[str, Any], count: int) -> None:
    """Write a new number of layers wherever the config states one (and trim per-layer lists)."""
    old = num_layers_of(config)
    for part in (config, *(config[key] for key in _SUB_CONFIGS if isinstance(config.get(key), dict))):
        for key in _COUNT_KEYS:
            if isinstance(part.get(key), int) and part[key] == old:
                part[key] = count
