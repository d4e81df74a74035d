"""A small registry of methods, so that recipe tests do not move with the real one."""

from __future__ import annotations

from typing import Any

import pytest

from raymerge.merge_actors.methods.interface import Method, Parameter, Settings, Sparsifier


def _never(*_: Any) -> Any:
    raise AssertionError("a recipe test never computes")


def _weights_do_not_cancel(settings: Settings) -> str | None:
    weights = [model["weight"] for model in settings.models]
    if settings.shared["normalize"] and sum(weights) == 0:  # type: ignore[arg-type]
        return f"the weights {weights} sum to 0, which normalize cannot divide by"
    return None


WEIGHT = Parameter(name="weight", per_model=True, required=True)
NORMALIZE = Parameter(name="normalize", kind=bool, default=False)
LAMBDA = Parameter(name="lambda", default=1.0, aliases=("scaling",))
DENSITY = Parameter(name="density", per_model=True, default=1.0, minimum=0, maximum=1)
TRIM = Parameter(name="trim", kind=str, default="tensor", choices=("tensor", "model"))

RANDOM = Sparsifier(
    name="random",
    parameters=(
        Parameter(name="density", per_model=True, required=True, minimum=0, maximum=1),
        Parameter(name="rescale", kind=bool, default=True, choices=("l1",)),
    ),
    apply=_never,
)
MAGNITUDE = Sparsifier(name="magnitude", parameters=(DENSITY,), apply=_never)

SMALL_REGISTRY = {
    method.name: method
    for method in (
        Method(
            name="linear",
            merge=_never,
            parameters=(WEIGHT, NORMALIZE),
            default_mode={"normalize": True},
            check=_weights_do_not_cancel,
        ),
        Method(
            name="passthrough",
            merge=_never,
            parameters=(Parameter(name="scale", per_model=True),),
            num_models=(1, 1),
        ),
        Method(
            name="slerp",
            merge=_never,
            parameters=(Parameter(name="t", required=True, minimum=0, maximum=1),),
            base="required",
            num_models=(1, 1),
        ),
        Method(
            name="ties",
            merge=_never,
            parameters=(WEIGHT, NORMALIZE, LAMBDA, DENSITY, TRIM),
            sparsifier=MAGNITUDE,
            default_mode={"normalize": True},
            base="required",
        ),
        Method(
            name="dare_ties",
            merge=_never,
            parameters=(WEIGHT, NORMALIZE, LAMBDA),
            sparsifier=RANDOM,
            base="required",
        ),
        Method(
            name="multislerp",
            merge=_never,
            parameters=(WEIGHT, Parameter(name="max_iter", kind=int, default=10, minimum=1)),
            base="optional",
            num_models=(2, None),
        ),
    )
}


@pytest.fixture
def small_registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Method]:
    """Let recipes know the methods of `SMALL_REGISTRY` and two sparsifiers, and nothing else."""
    monkeypatch.setattr("raymerge.cluster.method_parameters.METHODS", SMALL_REGISTRY)
    sparsifiers = {"random": RANDOM, "magnitude": MAGNITUDE}
    monkeypatch.setattr("raymerge.cluster.method_parameters.SPARSIFIERS", sparsifiers)
    return SMALL_REGISTRY
