"""Where and how a grid or a search runs: everything that does not stand in its file."""

from __future__ import annotations

from dataclasses import dataclass

from raymerge.cluster.connect import Device
from raymerge.merge_actors.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class GridOptions:
    """Options of a run; the defaults are those of the command line."""

    address: str | None = None
    """Of a Ray cluster; None means RAY_ADDRESS, and without that an embedded Ray."""
    in_process: bool = False
    """Merge and evaluate on threads of this process, without Ray."""
    workers: int | None = None
    """Number of evaluators; None: one for each share of a GPU, or one a machine."""
    gpus_per_evaluator: float | None = None
    """GPUs of an evaluator: 0.5 puts two on each, 2 spreads a model over two; None takes as few as hold it."""
    threads_per_evaluator: int | None = None
    """Threads of an evaluator on CPUs; None: all cores of its machine, shared by the evaluators there."""
    device: Device = "auto"
    slice_mib: int = 32
    """MiB of one input that a merge holds at a time."""
    seed: int | None = None
    """Seed of the random masks, or of a search's sampler; None leaves it to the file."""
    limit: int | None = None
    """Run the first so many points (of a search: trials) only."""
    resume: bool = False
    """Keep the results in OUT that still belong to the file, and run the rest."""
    overwrite: bool = False
    """Throw the results in OUT away."""
    allow_nan: bool = False
    """Merge inputs that hold NaN or infinity."""
    allow_pickle: bool = False
    """Read PyTorch .bin files (weights only) where a model has no safetensors."""
    trust_remote_code: bool = False
    """Run code of the checkpoints where transformers has no class of its own."""

    def __post_init__(self) -> None:
        if self.resume and self.overwrite:
            raise RecipeError("--resume and --overwrite exclude each other")
        gpus = self.gpus_per_evaluator
        if gpus is not None and not (0 < gpus <= 1 or (gpus > 1 and gpus == int(gpus))):
            raise RecipeError(
                f"--gpus-per-evaluator is {gpus:g}; it must be a share of a GPU, greater than 0 and at most 1, or a "
                "whole number of GPUs that a model is spread over"
            )
        for name, least in (("limit", 1), ("workers", 1), ("slice_mib", 1), ("threads_per_evaluator", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise RecipeError(f"--{name.replace('_', '-')} is {value}; it must be at least {least}")
