"""Where and how a merge runs: everything that does not stand in the recipe."""

from __future__ import annotations

from dataclasses import dataclass

from raymerge.cluster.connect import Device
from raymerge.merge_actors.dtypes import FLOATS, from_torch_name
from raymerge.merge_actors.errors import RecipeError


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """Options of a run; the defaults are those of the command line."""

    address: str | None = None
    """Of a Ray cluster; None means RAY_ADDRESS, and without that an embedded Ray."""
    in_process: bool = False
    """Merge on threads of this process, without Ray."""
    workers: int | None = None
    """Number of merge workers; None: one a GPU, or one a core up to 16."""
    device: Device = "auto"
    slice_mib: int = 32
    """MiB of one input that a task holds at a time; memory grows with it, speed hardly."""
    dtype: str | None = None
    """Type of the output ("bfloat16"); None leaves it to the recipe."""
    out_shard_size: str = "5GB"
    """The most that one output file holds: bytes ("5GB") or parameters ("5B")."""
    seed: int | None = None
    """Of the random masks; None leaves it to the recipe."""
    resume: bool = False
    """Go on with an unfinished run for the same OUT."""
    overwrite: bool = False
    """Replace OUT, and drop an unfinished run."""
    fsync: bool = False
    """Flush the output to the disk before it gets its name: safe against a loss of power too."""
    allow_nan: bool = False
    """Merge inputs that hold NaN or infinity."""
    allow_pickle: bool = False
    """Read PyTorch .bin files (weights only) where a model has no safetensors."""
    trust_remote_code: bool = False
    """Run code of a checkpoint that is measured where transformers has no class of its own; merging never does."""
    trace: str | None = None
    """File for a timeline of the run, for chrome://tracing or ui.perfetto.dev."""
    stage: str | None = None
    """Folder on each node's own disk: remote inputs are fetched into it once per node, and outputs for an object
    store are made there; None fetches where it is needed, and makes outputs in the temporary folder."""

    def __post_init__(self) -> None:
        if self.slice_mib < 1:
            raise RecipeError(f"--slice-mib is {self.slice_mib}; it must be at least 1")
        if self.resume and self.overwrite:
            raise RecipeError("--resume and --overwrite exclude each other")
        self.output_dtype()

    def output_dtype(self) -> str | None:
        """Return `dtype` in safetensors' spelling."""
        if self.dtype is None:
            return None
        found = self.dtype.upper() if self.dtype.upper() in FLOATS else from_torch_name(self.dtype)
        if found not in FLOATS:
            raise RecipeError(
                f"--dtype is {self.dtype!r}; it must be one of bfloat16, float16, float32, float64, float8_e4m3fn, "
                "float8_e5m2"
            )
        return found
