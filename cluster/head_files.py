"""Keep each model's classification head beside an output: OUT/heads/NAME with its own config.

Heads are small; whoever evaluates a task loads the merged encoder and puts that task's head on it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from raymerge.cluster.heads import Heads, head_tensors
from raymerge.cluster.matched import LoadedModel
from raymerge.cluster.remarks import as_note
from raymerge.cluster.tokenizer_files import write_json
from raymerge.merge_actors.checkpoint.header import TensorInfo

HEADS_FOLDER = "heads"


def write_heads(folder: str, heads: Heads, models: Mapping[str, LoadedModel]) -> list[str]:
    """Copy every model's head into a folder of its own; returns a remark.

    Each holds `model.safetensors` with the tensors of the head, under their names in the model, and
    the model's config.json with its labels.
    """
    names = _folder_names(list(heads.labels))
    for key, name in names.items():
        place = os.path.join(folder, HEADS_FOLDER, name)
        os.makedirs(place, exist_ok=True)
        _copy_tensors(os.path.join(place, "model.safetensors"), head_tensors(models[key]))
        write_json(os.path.join(place, "config.json"), models[key].checkpoint.config)
    listed = ", ".join(f"{HEADS_FOLDER}/{name}" for name in names.values())
    return [as_note(f"the heads of all models are kept in {listed}")]


def _folder_names(keys: list[str]) -> dict[str, str]:
    """Name each model's folder after the end of its path; a number tells equal ones apart."""
    names: dict[str, str] = {}
    for key in keys:
        stem = os.path.basename(key.split("+")[0].split("@")[0].rstrip("/")) or "model"
        taken = set(names.values())
        names[key] = next(
            name for name in (stem, *(f"{stem}-{i}" for i in range(2, len(keys) + 2))) if name not in taken
        )
    return names


def _copy_tensors(path: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Write some tensors, byte for byte, into a safetensors file."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, info in tensors.items():
        end = begin + info.num_bytes
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for info in tensors.values():
            with open(info.file, "rb") as source:
                source.seek(info.begin)
                out.write(source.read(info.num_bytes))
