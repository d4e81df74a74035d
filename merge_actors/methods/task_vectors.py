"""The task-vector methods: a sparsifying step, a sum with or without sign consensus, a scale.

Each is thin(delta_i) -> w_i delta_i -> (sign consensus) -> sum -> (normalize) -> lambda -> + base;
the steps stand in `dare`, `magnitude` and `della`, the sums in `consensus`.
"""

from __future__ import annotations

import functools

from raymerge.merge_actors.methods.consensus import (
    LAMBDA,
    MERGE_FUNC,
    NORMALIZE,
    WEIGHT,
    sum_agreeing,
    sum_agreeing_kernel,
    sum_task_vectors,
    sum_task_vectors_kernel,
)
from raymerge.merge_actors.methods.dare import RANDOM
from raymerge.merge_actors.methods.della import DELLA
from raymerge.merge_actors.methods.interface import Method, Settings, Sparsifier
from raymerge.merge_actors.methods.magnitude import BREADCRUMBS, MAGNITUDE


def steps_are_sound(sparsifier: Sparsifier, settings: Settings) -> str | None:
    """Say what is wrong with the parameters of the method's own step for some model."""
    found = (sparsifier.check(model) for model in settings.models) if sparsifier.check else ()
    return next((broken for broken in found if broken), None)


def _method(
    name: str, sparsifier: Sparsifier | None, source: str, *, has_consensus: bool, normalize: bool = False
) -> Method:
    return Method(
        name=name,
        merge=sum_agreeing if has_consensus else sum_task_vectors,
        kernel=sum_agreeing_kernel if has_consensus else sum_task_vectors_kernel,
        parameters=(WEIGHT, LAMBDA, NORMALIZE, *((MERGE_FUNC,) if has_consensus else ())),
        sparsifier=sparsifier,
        base="required",
        is_plain_sum=sparsifier is None and not has_consensus,
        check=None if sparsifier is None else functools.partial(steps_are_sound, sparsifier),
        default_mode={"normalize": normalize},
        source=source,
    )


TASK_ARITHMETIC = _method("task_arithmetic", None, "arXiv:2212.04089", has_consensus=False)
TIES = _method("ties", MAGNITUDE, "arXiv:2306.01708", has_consensus=True, normalize=True)
DARE_LINEAR = _method("dare_linear", RANDOM, "arXiv:2311.03099", has_consensus=False)
DARE_TIES = _method("dare_ties", RANDOM, "arXiv:2311.03099", has_consensus=True)
DELLA_LINEAR = _method("della_linear", DELLA, "arXiv:2406.11617", has_consensus=False)
DELLA_TIES = _method("della", DELLA, "arXiv:2406.11617", has_consensus=True, normalize=True)
BREADCRUMBS_LINEAR = _method("breadcrumbs", BREADCRUMBS, "arXiv:2312.06795", has_consensus=False)
BREADCRUMBS_TIES = _method("breadcrumbs_ties", BREADCRUMBS, "arXiv:2312.06795", has_consensus=True)
