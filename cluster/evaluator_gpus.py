"""How many GPUs an evaluator takes: a pure rule over what a model needs and what nodes have, and asking them."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from raymerge.cluster.progress import gib
from raymerge.merge_actors.errors import ClusterError
from raymerge.stats.evaluation.parts import RUNTIME_BYTES, ModelNeeds

_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=memory.total,mig.mode.current", "--format=csv,noheader,nounits")
_SMI_SECONDS = 20


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster."""

    num_cpus: int
    num_gpus: int
    gpu_bytes: int | None = None
    """Memory of its smallest GPU, where it is known."""


def choose_gpus(nodes: Sequence[Node], asked: float | None, needs: ModelNeeds | None) -> float:
    """Return how many GPUs an evaluator gets: those it is asked to, else as few as hold the model.

    As few as leave room to spare on every node that an evaluator may come to; if no number does, the most that a
    node has, if they hold the model at all.

    Args:
        nodes: of the cluster.
        asked: what the user said; a fraction shares a GPU.
        needs: of the largest model; None if it is not known.

    Raises:
        ClusterError: no node has so many GPUs, or they do not hold the model.
    """
    most = max(node.num_gpus for node in nodes)
    if asked is not None and asked > most:
        raise ClusterError(
            f"--gpus-per-evaluator is {asked:g}, but no node has more than {most} GPUs; a model is spread over the "
            "GPUs of one node"
        )
    chosen = asked or next((k for k in range(1, most + 1) if _holds(nodes, k, needs, well=True)), None)
    if chosen is None:
        chosen = next((k for k in range(most, 0, -1) if _holds(nodes, k, needs, well=False)), most)
    if needs is not None and not _holds(nodes, chosen, needs, well=False):
        raise ClusterError(_too_large(nodes, chosen, needs))
    return chosen


def _holds(nodes: Sequence[Node], num_gpus: float, needs: ModelNeeds | None, *, well: bool) -> bool:
    """Tell whether so many GPUs hold a model on every node that has them, as far as is known."""
    sizes = [node.gpu_bytes for node in nodes if node.num_gpus >= num_gpus and node.gpu_bytes is not None]
    if needs is None or not sizes:
        return True
    num_parts, share = max(1, int(num_gpus)), min(1.0, num_gpus)
    fits = needs.fits_well if well else needs.fits
    return fits(num_parts, min(sizes) * share)


def _too_large(nodes: Sequence[Node], num_gpus: float, needs: ModelNeeds) -> str:
    num_parts = max(1, int(num_gpus))
    sizes = [node.gpu_bytes for node in nodes if node.num_gpus >= num_gpus and node.gpu_bytes is not None]
    fullest = needs.fullest(num_parts) + RUNTIME_BYTES
    own_bytes = int(min(sizes) * min(1.0, num_gpus))
    has = f"{gib(own_bytes)} on " + (f"each of {num_gpus:g} GPUs" if num_gpus > 1 else f"{num_gpus:g} GPU")
    most = max(node.num_gpus for node in nodes)
    enough = next((k for k in range(1, most + 1) if _holds(nodes, k, needs, well=False)), None)
    way_out = (
        f"use --gpus-per-evaluator {enough}"
        if enough is not None
        else f"no node has more than {most} GPUs: use nodes with more, a narrower evaluate.dtype or smaller batches "
        "(evaluate.batch_tokens)"
    )
    return (
        f"an evaluator needs {gib(fullest)} and has {has}: the merged model takes {gib(needs.weights)} for weights "
        f"(it runs in {needs.dtype}), besides room for activations; {way_out}"
    )


def visible_gpu_bytes() -> int | None:
    """Return the memory of the smallest GPU of this machine; None if that cannot be found out.

    The driver's own tool is asked first: it takes no GPU memory and no seconds to import.
    """
    try:
        text = subprocess.run(
            _NVIDIA_SMI, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True
        ).stdout
        found = parse_gpu_bytes(text)
    except (OSError, subprocess.SubprocessError):
        found = None
    if found is not None:
        return found
    import torch

    sizes = [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]
    return min(sizes, default=None)


def parse_gpu_bytes(text: str) -> int | None:
    """Return the smallest memory that nvidia-smi tells; None if a GPU is cut into several, or the text is another."""
    rows = [[each.strip() for each in line.split(",")] for line in text.splitlines() if line.strip()]
    if not rows or any(len(row) != 2 or not row[0].isdigit() or row[1] == "Enabled" for row in rows):
        return None
    return min(int(row[0]) for row in rows) << 20
