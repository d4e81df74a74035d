"""Plan the matrices that are solved for: one task for those that share their inputs' Gram matrices.

Of experts that are fused in one tensor every expert is a matrix of its own, with a Gram of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from raymerge.cluster.matched import MergedTensor, Operand
from raymerge.cluster.plan_reads import is_solved_for, read_of
from raymerge.merge_actors.checksum import checksum_chunk_bytes
from raymerge.merge_actors.dtypes import element_bytes
from raymerge.merge_actors.errors import RecipeError
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.gram_matrix import triangle_elements
from raymerge.merge_actors.methods.prepare import model_wide_steps, steps_of
from raymerge.merge_actors.randomness import stream_key
from raymerge.merge_actors.task import GramRead, SolveJob, SolveSet, SolveTask

_GRAM_BYTES = element_bytes("F32")


def plan_solves(
    recipes: Sequence[Sequence[MergedTensor]],
    places: Sequence[Mapping[str, tuple[str, int]]],
    seeds: Sequence[int],
    settings_of: Callable[[MergedTensor], int],
) -> list[SolveTask]:
    """Return one task for the matrices that share one input, of all recipes and settings.

    Of a grid over alpha that is one task an input: its Grams and weights are read once for all points.

    Args:
        recipes: the tensors of each recipe.
        places: of each recipe, by tensor: output file, and first byte in it.
        seeds: of each recipe.
        settings_of: gives the index of a tensor's settings.

    Raises:
        RecipeError: a recipe sparsifies matrices that are solved for by a threshold over the whole model.
    """
    groups: dict[tuple[GramRead, ...], dict[tuple[int, int], list[SolveJob]]] = {}
    for number, tensors in enumerate(recipes):
        for tensor in tensors:
            if is_solved_for(tensor):
                for grams, job in _jobs(tensor, *places[number][tensor.name], seeds[number]):
                    sets = groups.setdefault(grams, {})
                    sets.setdefault((number, settings_of(tensor)), []).append(job)
    return [
        SolveTask(
            number=0,
            grams=grams,
            sets=tuple(SolveSet(number, setting, tuple(jobs)) for (number, setting), jobs in sets.items()),
        )
        for grams, sets in groups.items()
    ]


def chunk_bytes_of(tensor: MergedTensor) -> int:
    """Return the chunk length of an output tensor's checksum: pieces of it are whole chunks."""
    if is_solved_for(tensor) and len(tensor.shape) > 2:
        return math.prod(tensor.shape[1:]) * element_bytes(tensor.dtype)
    return checksum_chunk_bytes(tensor.shape, tensor.dtype)


def _jobs(
    tensor: MergedTensor, file: str, offset: int, seed: int
) -> Iterator[tuple[tuple[GramRead, ...], SolveJob]]:
    """Yield every matrix of a tensor with its Grams: one, or one per expert."""
    base = _base_of_steps(tensor)
    first, second = tensor.shape[-2:]
    reads = [read_of(operand) for operand in tensor.models]
    is_transposed = any(each.statistic is not None and each.statistic.is_transposed for each in tensor.models)
    for expert in range(math.prod(tensor.shape[:-2])):
        begin = expert * first * second
        name = tensor.name if len(tensor.shape) == 2 else f"{tensor.name}[{expert}]"
        job = SolveJob(
            tensor=tensor.name,
            shape=(first, second),
            reads=tuple(read.shifted(begin) for read in reads),
            base=None if base is None else read_of(base).shifted(begin),
            keys=() if base is None else tuple(stream_key(seed, each, name) for each in tensor.stream_names),
            is_transposed=is_transposed,
            file=file,
            offset=offset + begin * element_bytes(tensor.dtype),
            dtype=tensor.dtype,
            first_byte=begin * element_bytes(tensor.dtype),
            chunk_bytes=chunk_bytes_of(tensor),
        )
        yield tuple(_gram_read(operand, expert) for operand in tensor.models), job


def _base_of_steps(tensor: MergedTensor) -> Operand | None:
    """Return the base if some model is sparsified, else None."""
    method = METHODS[tensor.method]
    if not any(steps_of(method, tensor.settings, SPARSIFIERS)):
        return None
    if model_wide_steps(method, tensor.settings, SPARSIFIERS):
        raise RecipeError(
            f"sparsify with trim: model cannot come before {tensor.method}, which solves for {tensor.name} and other "
            "matrices one by one; set trim: tensor"
        )
    return tensor.base


def _gram_read(operand: Operand, expert: int) -> GramRead:
    statistic = operand.statistic
    assert statistic is not None
    skipped_bytes = expert * triangle_elements(statistic.in_features) * _GRAM_BYTES
    return GramRead(
        model=operand.model,
        tensor=statistic.info.name if len(statistic.num_rows) == 1 else f"{statistic.info.name}[{expert}]",
        file=statistic.info.file,
        offset=statistic.info.begin + skipped_bytes,
        in_features=statistic.in_features,
        num_rows=statistic.num_rows[expert],
    )
