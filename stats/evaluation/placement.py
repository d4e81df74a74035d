"""Say which tensors and blocks of an evaluator's models lie on which of its devices. Pure: headers in, numbers out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from raymerge.merge_actors.dtypes import element_bytes, from_torch_name, is_float, torch_dtype
from raymerge.stats.evaluation.parts import ModelNeeds, cut_blocks, loads_of
from raymerge.stats.evaluation.structures import Structure

#: dtype (safetensors' name) and shape of merged tensors, by name.
Stored = Mapping[str, tuple[str, Sequence[int]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where a set of models over one set of merged tensors lies, device 0 being home."""

    of_tensor: Mapping[str, int]
    """Device of every merged tensor."""
    of_blocks: tuple[Mapping[str, int], ...]
    """Device of every block that need not be home, by name, for each model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightBytes:
    """Weights by what is placed together."""

    home: int
    blocks: tuple[int, ...]
    idle: Mapping[str, int]
    """Bytes of merged tensors that no model uses."""
    block_of: Mapping[str, int]
    """Block of every merged tensor that belongs to one."""


def weigh(structures: Sequence[Structure], stored: Stored, dtype: Any) -> WeightBytes:
    """Add up the bytes of every block and of what stands outside, copies in another dtype included.

    The blocks are those of the model that has the most; the others have some of the same.

    Args:
        structures: models whose parameters have been matched with the tensors.
        stored: the merged tensors.
        dtype: torch's, in which the models run.
    """
    main = max(structures, key=lambda each: len(each.blocks))
    numbers = {name: number for number, name in enumerate(main.blocks)}
    block_of = {
        part.name: numbers[block]
        for binding in main.matched
        if not binding.is_head and (block := main.block_of(binding.key)) is not None
        for part in binding.parts
    }
    bindings = [binding for structure in structures for binding in structure.matched if not binding.is_head]
    used = {part.name for binding in bindings for part in binding.parts}
    num_bytes = [0] * (len(main.blocks) + 1)  # the last: outside of all
    idle: dict[str, int] = {}
    for name, (stored_dtype, shape) in stored.items():
        own_bytes = math.prod(shape) * element_bytes(stored_dtype)
        if name in used:
            num_bytes[block_of.get(name, -1)] += own_bytes
        else:
            idle[name] = own_bytes
    copied: set[tuple[object, ...]] = set()
    for structure in structures:
        for binding in structure.matched:
            identity = (structure.head_folder if binding.is_head else None, *binding.parts)
            if identity in copied or (not binding.is_head and not _is_copied(binding, stored, dtype)):
                continue
            copied.add(identity)
            place = -1 if binding.is_head else block_of.get(binding.parts[0].name, -1)
            num_bytes[place] += math.prod(structure.shape(binding.key)) * dtype.itemsize
    return WeightBytes(home=num_bytes[-1], blocks=tuple(num_bytes[:-1]), idle=idle, block_of=block_of)


def place(
    structures: Sequence[Structure], stored: Stored, weights: WeightBytes, needs: ModelNeeds, num_devices: int
) -> Placement:
    """Spread models over devices.

    Args:
        structures: as for `weigh`.
        stored: the merged tensors.
        weights: of these.
        needs: what the models take, estimates of activations included.
        num_devices: at least 1.
    """
    with_cache = [each + needs.cache_of_block for each in weights.blocks]
    home = weights.home + needs.home_activations
    device_of = cut_blocks(home, with_cache, num_devices)
    of_tensor = {
        name: device_of[weights.block_of[name]] if name in weights.block_of else 0 for name in stored
    }
    loads = loads_of(home, with_cache, num_devices)
    for name, num_bytes in sorted(weights.idle.items(), key=lambda each: (-each[1], each[0])):
        of_tensor[name] = loads.index(min(loads))
        loads[of_tensor[name]] += num_bytes
    of_blocks = []
    for structure in structures:
        found = dict.fromkeys(structure.all_blocks, 0)
        for binding in structure.matched:
            block = structure.block_of(binding.key)
            if block is not None and not binding.is_head:
                found[block] = found[block] or of_tensor[binding.parts[0].name]
        of_blocks.append(found)
    return Placement(of_tensor=of_tensor, of_blocks=tuple(of_blocks))


def usual_dtype(stored: Stored) -> str | None:
    """Return the floating-point type of the most elements; None if there is none."""
    counts: dict[str, int] = {}
    for dtype, shape in stored.values():
        if is_float(dtype):
            counts[dtype] = counts.get(dtype, 0) + math.prod(shape)
    return max(counts, key=lambda dtype: counts[dtype]) if counts else None


def in_dtype(stored: Stored, dtype: Any) -> Stored:
    """Return the tensors as they are after those of floating-point numbers were cast to a torch dtype."""
    name = from_torch_name(str(dtype)) or "F32"
    return {key: (name if is_float(own) else own, shape) for key, (own, shape) in stored.items()}


def _is_copied(binding: Any, stored: Stored, dtype: Any) -> bool:
    """Tell whether a parameter cannot be the merged tensor itself."""
    first = torch_dtype(stored[binding.parts[0].name][0])
    return binding.parts[0].view is not None or (first.is_floating_point and first != dtype)
