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
    from raymerge.cluster.evaluate import Evaluation, EvaluationResult
    from raymerge.cluster.grid import GridResult
    from raymerge.cluster.inspect import Inspection
    from raymerge.cluster.merge_result import MergeResult
    from raymerge.cluster.session import Session as Session
    from raymerge.cluster.verify import Verification

__all__ = ["Session", "evaluate", "grid", "inspect", "merge", "plan", "report", "search", "verify"]

Recipe = str | os.PathLike[str] | Mapping[str, Any]


def merge(
    recipe: Recipe | Sequence[Recipe], out: str | os.PathLike[str], *, strict: bool = False, **options: Any
) -> MergeResult:
    """Merge models as one or several recipes say.

    Args:
        recipe: a YAML file, a folder of them, YAML text or a mapping; or a list of these.
        out: the output folder; with several recipes, one folder each in it.
        strict: refuse recipe keys that have no effect, and heads that may not mean the same.
        options: fields of `raymerge.cluster.options.MergeOptions`: address, in_process, workers,
            device, slice_mib, dtype, out_shard_size, seed, resume, overwrite, fsync,
            allow_nan, allow_pickle, trust_remote_code, stage, trace.

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
        options: as for `merge`; slice_mib, dtype, out_shard_size, seed, allow_pickle and
            trust_remote_code matter here.

    Raises:
        RaymergeError: whatever `merge` would refuse before it reads a weight.
    """
    from raymerge.cluster.options import MergeOptions
    from raymerge.cluster.plan_report import plan_report

    return plan_report(_as_list(recipe), MergeOptions(**options), strict=strict)


def inspect(models: str | Sequence[str], base: str | None = None, **options: Any) -> Inspection:
    """Say what checkpoints hold and whether they belong together.

    Args:
        models: folders, Hub ids or URIs.
        base: their common ancestor, if it is known.
        options: of `raymerge.cluster.inspect.inspect`: sample, allow_pickle.
    """
    from raymerge.cluster.inspect import inspect as run

    return run([models] if isinstance(models, str) else list(models), base, **options)


def verify(out: str | os.PathLike[str], **options: Any) -> Verification:
    """Read an output again and compare it with its manifest.

    Args:
        out: folder of a merge.
        options: of `raymerge.cluster.verify.verify`: load, trust_remote_code.

    Raises:
        VerifyError: naming the file or tensor that differs.
    """
    from raymerge.cluster.verify import verify as run

    return run(os.fspath(out), **options)


def grid(source: Recipe, out: str | os.PathLike[str], *, strict: bool = False, **options: Any) -> GridResult:
    """Merge and evaluate every point of a grid; winners become checkpoints.

    Args:
        source: a grid file, YAML text or a mapping (docs/grids.md).
        out: folder for results.parquet, best.json and the checkpoints best-1, best-2 ...
        strict: refuse recipe keys that have no effect.
        options: fields of `raymerge.cluster.grid_options.GridOptions`: address, in_process, workers,
            gpus_per_evaluator, threads_per_evaluator, device, slice_mib, seed, limit, resume, overwrite,
            allow_nan, allow_pickle, trust_remote_code.

    Raises:
        RaymergeError: with one sentence for the user; finished points are kept in `out`.
    """
    from raymerge.cluster.grid import grid as run
    from raymerge.cluster.grid_options import GridOptions

    return run(source, out, GridOptions(**options), strict=strict)


def search(
    source: Recipe, out: str | os.PathLike[str], *, strict: bool = False, **options: Any
) -> GridResult:
    """Search for the best point of a space; needs Optuna.

    Args:
        source: a search file, YAML text or a mapping (docs/grids.md).
        out: as for `grid`.
        strict: as for `grid`.
        options: as for `grid`; `seed` is the sampler's, `limit` a number of trials.

    Raises:
        RaymergeError: with one sentence for the user; finished trials are kept in `out`.
    """
    from raymerge.cluster.grid_options import GridOptions
    from raymerge.cluster.search import search as run

    return run(source, out, GridOptions(**options), strict=strict)


def report(out: str | os.PathLike[str], *, top: int = 10) -> list[str]:
    """Draw the results of a grid or a search as one HTML page and pictures; needs matplotlib.

    Args:
        out: folder of the grid or search, which may still be running.
        top: rows of the table of the best points.

    Returns:
        the files that were written, the page first.

    Raises:
        RaymergeError: the folder holds no results.
    """
    from raymerge.cluster.report import write_report
    from raymerge.cluster.report_data import read_report

    return write_report(read_report(os.fspath(out), top), os.fspath(out))


def evaluate(model: str | os.PathLike[str], evaluation: Evaluation, **options: Any) -> EvaluationResult:
    """Score a checkpoint on the tasks of a grid (docs/evaluation.md).

    Args:
        model: folder or Hub id, path[@revision].
        evaluation: a YAML file with an `evaluate:` section, or the section as a mapping.
        options: of `raymerge.cluster.evaluate.evaluate`: split, device, allow_pickle,
            trust_remote_code, on_remark.

    Raises:
        RaymergeError: with one sentence for the user.
    """
    from raymerge.cluster.evaluate import evaluate as run

    return run(os.fspath(model), evaluation, **options)


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
