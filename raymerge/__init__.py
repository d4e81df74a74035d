"""Merge language-model checkpoints: sharded over Ray actors, out of core, resumable.

    import raymerge
    raymerge.merge("recipe.yaml", "merged/")

Importing this package loads neither ray nor torch; the functions do when they are called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raymerge.cluster.inspect import Inspection
    from raymerge.cluster.merge import MergeResult
    from raymerge.cluster.session import Session as Session
    from raymerge.cluster.verify import Verification

__all__ = ["Session", "inspect", "merge", "plan", "verify"]

Recipe = str | os.PathLike[str] | Mapping[str, Any]


def merge(
    recipe: Recipe | Sequence[Recipe], out: str | os.PathLike[str], *, strict: bool = False, **options: Any
) -> MergeResult:
    """Merge models as one or several recipes say.

    Args:
        recipe: a YAML file, a folder of them, YAML text or a mapping; or a list of these.
        out: the output folder; with several recipes, one folder each in it.
        strict: refuse recipe keys that have no effect.
        options: fields of `raymerge.cluster.options.MergeOptions`: address, in_process, workers,
            device, slice_mib, dtype, out_shard_size, seed, resume, overwrite, fsync,
            allow_nan, allow_pickle.

    Raises:
        RaymergeError: with one sentence for the user; `out` is then as it was before.
    """
    from raymerge.cluster.merge import merge as run
    from raymerge.cluster.options import MergeOptions

    return run(_as_list(recipe), out, MergeOptions(**options), strict=strict)


def plan(recipe: Recipe | Sequence[Recipe], *, strict: bool = False, **options: Any) -> dict[str, Any]:
    """Return what a merge would read, write and need, and how it treats each tensor.

    Args:
        recipe: as for `merge`.
        strict: as for `merge`.
        options: as for `merge`; slice_mib, dtype, out_shard_size and seed matter here.

    Raises:
        RaymergeError: whatever `merge` would refuse before it reads a weight.
    """
    from raymerge.cluster.options import MergeOptions
    from raymerge.cluster.plan_report import plan_report

    return plan_report(_as_list(recipe), MergeOptions(**options), strict=strict)


def inspect(models: str | Sequence[str], base: str | None = None, **options: Any) -> Inspection:
    """Say what checkpoints hold and whether they belong together.

    Args:
        models: folders or Hub ids.
        base: their common ancestor, if it is known.
        options: of `raymerge.cluster.inspect.inspect`.
    """
    from raymerge.cluster.inspect import inspect as run

    return run([models] if isinstance(models, str) else list(models), base, **options)


def verify(out: str | os.PathLike[str], **options: Any) -> Verification:
    """Read an output again and compare it with its manifest.

    Args:
        out: folder of a merge.
        options: of `raymerge.cluster.verify.verify`.

    Raises:
        VerifyError: naming the file or tensor that differs.
    """
    from raymerge.cluster.verify import verify as run

    return run(os.fspath(out), **options)


def __getattr__(name: str) -> Any:
    """Import `Session` when it is asked for."""
    if name == "Session":
        from raymerge.cluster.session import Session

        return Session
    raise AttributeError(f"module 'raymerge' has no attribute {name!r}")


def _as_list(recipe: Recipe | Sequence[Recipe]) -> list[Recipe]:
    if isinstance(recipe, str | os.PathLike | Mapping):
        return [recipe]
    return list(recipe)
