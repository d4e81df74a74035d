"""Say what measuring a model takes, from its skeleton: linear maps, parameters, bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from raymerge.merge_actors.checkpoint.folder import Checkpoint
from raymerge.merge_actors.errors import CheckpointError
from raymerge.stats.calibration_data import CalibrationData
from raymerge.stats.fisher_accumulator import fisher_bytes
from raymerge.stats.gram_accumulator import gram_bytes
from raymerge.stats.image_data import ImageData, inputs_fingerprint
from raymerge.stats.layer_groups import Needs
from raymerge.stats.linear_maps import LinearMap, ModelMaps, block_of, find_linear_maps
from raymerge.stats.measure_job import Description, MeasureJob
from raymerge.stats.model_loading import compute_dtype, skeleton
from raymerge.stats.own_code import code_digest
from raymerge.stats.weight_names import tensor_names

#: Hidden states that a forward pass holds at a time, counted in widths of its widest linear map.
_LIVE_ACTIVATIONS = 4


def describe(job: MeasureJob, checkpoint: Checkpoint, data: CalibrationData | ImageData) -> Description:
    """Describe a model and its data.

    Raises:
        CheckpointError: the checkpoint lacks weights of the model's layers.
    """
    model = skeleton(checkpoint, trust_code=job.trust_remote_code)
    names = {**checkpoint.tensors, **checkpoint.tied}
    maps = find_linear_maps(model, names)
    blocks = {name: block_of(name, maps.blocks) for name, _ in model.named_parameters()}
    if lost := [name for name in maps.not_in_checkpoint if block_of(name, maps.blocks) is not None]:
        raise CheckpointError(
            f"{checkpoint.path} does not hold {lost[0]!r} (and {len(lost) - 1} more) of its architecture "
            f"{type(model).__name__}; config.json and weights do not belong together."
        )
    parameters = {
        name: _tensors(checkpoint, tensor_names(model, name, names))
        for name, _ in model.named_parameters()
        if job.kind == "fisher"
    }
    return Description(
        maps=maps,
        parameters={name: tensors for name, tensors in parameters.items() if tensors},
        parameter_blocks=blocks,
        needs=_needs(job, model, maps, blocks, compute_dtype(checkpoint, job.device).itemsize),
        memory_bytes=_memory_bytes(job.device),
        num_shards=data.num_shards,
        num_rows=len(data.rows.texts),
        max_length=data.max_length,
        data_fingerprint=data.data_fingerprint(),
        tokenizer_fingerprint=inputs_fingerprint(data, checkpoint.inputs_folder),
        compute_dtype=str(compute_dtype(checkpoint, job.device)).removeprefix("torch."),
        batching="equal_length" if maps.has_experts or _feeds_itself(model) else "padded",
        code=code_digest(checkpoint.folder, checkpoint.config),
        remarks=(*data.rows.remarks, *_remarks(maps)),
    )


def _feeds_itself(model: Any) -> bool:
    """Return whether the decoder makes its own input, whose padding nothing marks."""
    is_encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    return is_encoder_decoder and type(model).__name__.endswith("Classification")


def _needs(
    job: MeasureJob, model: Any, maps: ModelMaps, blocks: dict[str, int | None], element_bytes: int
) -> Needs:
    num_blocks = len(maps.blocks)
    weights, statistics = [0] * (num_blocks + 1), [0] * (num_blocks + 1)  # the last: outside the blocks
    for name, parameter in model.named_parameters():
        block = blocks[name]
        place = num_blocks if block is None else block
        weights[place] += parameter.numel() * element_bytes
        if job.kind == "fisher":
            statistics[place] += fisher_bytes(parameter.numel())
    if job.kind == "gram":
        for each in maps.maps:
            place = num_blocks if each.block is None else each.block
            statistics[place] += _map_bytes(each, max(1, len(job.data.samples_at)))
    widest = max(
        (max(each.in_features, each.out_features) for each in maps.maps if each.block is not None), default=0
    )
    return Needs(
        block_weights=weights[:-1],
        other_weights=weights[-1],
        block_statistics=statistics[:-1],
        other_statistics=statistics[-1],
        activations=_LIVE_ACTIVATIONS * widest * job.data.batch_tokens * element_bytes,
    )


def _map_bytes(each: LinearMap, num_tiers: int) -> int:
    # As if nothing were shared: what is shared shows only in a forward pass.
    return gram_bytes(each.in_features, num_tiers) * max(1, each.num_experts)


def _tensors(checkpoint: Checkpoint, names: Sequence[str]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    kept = [checkpoint.tied.get(name, name) for name in names]
    return tuple((name, checkpoint.tensors[name].shape) for name in kept)


def _remarks(maps: ModelMaps) -> list[str]:
    remarks = []
    if maps.tied:
        remarks.append(
            f"{', '.join(maps.tied)} is tied to the embedding and treated as one: it has no Gram matrix"
        )
    if maps.not_in_checkpoint:
        remarks.append(
            f"the checkpoint does not hold {', '.join(maps.not_in_checkpoint[:3])}, so it is not measured"
        )
    return remarks


def _memory_bytes(device: str) -> int:
    """Return what a worker may use: most of a free GPU, or half of the machine's free memory."""
    import torch

    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] * 0.85)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
