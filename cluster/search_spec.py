"""The `search` section of a search file.

search:
sampler: tpe          tpe, cmaes or random
trials: 100
batch: 8              trials that are asked for together
startup: 10           random trials before the sampler learns
seed: 0
pruning: {rule: halving, rungs: [0.1, 0.3], factor: 3}     or {rule: median, ...}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from raymerge.cluster.grid_spec import GridSpec
from raymerge.cluster.origin import Origin, did_you_mean, join
from raymerge.cluster.setting import as_whole_number, shown

SAMPLERS = ("tpe", "cmaes", "random")
RULES = ("median", "halving")
_KEYS = ("sampler", "trials", "batch", "startup", "seed", "pruning")
_PRUNING_KEYS = ("rule", "rungs", "factor", "warmup")
_DEFAULT_RUNGS = (0.1, 0.3)
_MOST_TRIALS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class PruningSpec:
    """When a trial is given up before all batches were seen."""

    rule: Literal["median", "halving"]
    """median: worse than the median of earlier trials; halving: not among the best 1/factor of them."""
    rungs: tuple[float, ...] = _DEFAULT_RUNGS
    """Fractions of the batches after which a trial is looked at."""
    factor: float = 3.0
    """Of halving."""
    warmup: int = 5
    """So many trials have to have come to a rung before any is stopped there."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpec:
    """How a space is searched."""

    sampler: Literal["tpe", "cmaes", "random"] = "tpe"
    num_trials: int = 100
    batch: int = 8
    """Trials asked for together; the search is the same for any number of evaluators."""
    startup: int = 10
    """Random trials before the sampler learns."""
    seed: int = 0
    """Of the sampler."""
    pruning: PruningSpec | None = None


def read_search(spec: GridSpec, seed: int | None = None) -> SearchSpec:
    """Read the `search` section of a file; without one everything has its default.

    Args:
        spec: the file.
        seed: takes the place of the section's.

    Raises:
        RecipeError: an unknown key, a value that breaks a rule, or a sampler that does not fit the axes.
    """
    raw, origin = spec.search, spec.origin
    if raw is None:
        raw = {}
    if not isinstance(raw, Mapping):
        raise origin.error("search", f"is {shown(raw)}; it must be a mapping such as {{trials: 100}}.")
    _check_keys(raw, _KEYS, origin, "search")
    sampler = raw.get("sampler", "tpe")
    if sampler not in SAMPLERS:
        hint = did_you_mean(str(sampler), SAMPLERS)
        raise origin.error(
            "search.sampler", f"is {shown(sampler)}; it must be one of {', '.join(SAMPLERS)}{hint}."
        )
    defaults = SearchSpec()
    pruning = _read_pruning(raw.get("pruning"), origin)
    if spec.selection.is_pareto and sampler == "cmaes":
        raise origin.error(
            "search.sampler", "is 'cmaes', which has one objective; take tpe for a Pareto front."
        )
    if spec.selection.is_pareto and pruning:
        raise origin.error("search.pruning", "has no meaning for a Pareto front: leave it out.")
    if sampler == "cmaes" and not any(axis.range for axis in spec.axes):
        raise origin.error(
            "search.sampler", "is 'cmaes', which needs at least one range {low, high} to search."
        )
    if spec.selection.average_over:
        raise origin.error("select.average_over", "has no meaning in a search: every trial is judged alone.")
    return SearchSpec(
        sampler=sampler,
        num_trials=_whole(raw, "trials", defaults.num_trials, origin, most=_MOST_TRIALS),
        batch=_whole(raw, "batch", defaults.batch, origin, most=10_000),
        startup=_whole(raw, "startup", defaults.startup, origin, least=0),
        seed=seed
        if seed is not None
        else _whole(raw, "seed", defaults.seed, origin, least=0, most=2**32 - 1),
        pruning=pruning,
    )


def _read_pruning(raw: Any, origin: Origin) -> PruningSpec | None:
    if raw is None or raw is False:
        return None
    if isinstance(raw, str):
        raw = {"rule": raw}
    if not isinstance(raw, Mapping):
        raise origin.error(
            "search.pruning", f"is {shown(raw)}; it must be a mapping such as {{rule: median}}."
        )
    _check_keys(raw, _PRUNING_KEYS, origin, "search.pruning")
    rule = raw.get("rule")
    if rule not in RULES:
        hint = did_you_mean(str(rule), RULES)
        raise origin.error(
            "search.pruning.rule", f"is {shown(rule)}; it must be one of {', '.join(RULES)}{hint}."
        )
    rungs = raw.get("rungs", list(_DEFAULT_RUNGS))
    is_right = isinstance(rungs, list | tuple) and rungs and all(_is_fraction(each) for each in rungs)
    if not is_right or list(rungs) != sorted(set(rungs)):
        raise origin.error(
            "search.pruning.rungs",
            f"is {shown(rungs)}; it must be growing fractions of the batches, in (0, 1).",
        )
    factor = raw.get("factor", 3)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 < factor < math.inf:
        raise origin.error("search.pruning.factor", f"is {shown(factor)}; it must be a number above 1.")
    return PruningSpec(
        rule=rule,
        rungs=tuple(float(each) for each in rungs),
        factor=float(factor),
        warmup=_whole(raw, "warmup", 5, origin, where="search.pruning"),
    )


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1


def _whole(
    raw: Mapping[str, Any],
    name: str,
    default: int,
    origin: Origin,
    *,
    least: int = 1,
    most: int = 1_000_000,
    where: str = "search",
) -> int:
    value = raw.get(name, default)
    number = None if isinstance(value, bool) else as_whole_number(value)
    if number is None or not least <= number <= most:
        raise origin.error(
            join(where, name), f"is {shown(value)}; it must be a whole number in [{least}, {most:,}]."
        )
    return number


def _check_keys(raw: Mapping[str, Any], known: tuple[str, ...], origin: Origin, where: str) -> None:
    for name in raw:
        if name not in known:
            hint = did_you_mean(name, known)
            raise origin.error(join(where, name), f"is unknown; known: {', '.join(known)}{hint}.")
