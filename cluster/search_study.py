"""What to try next: Optuna by ask and tell, and when to give a trial up.

A study is a pure function of the seed and of what it was told, in this order. So it keeps no
files: a resumed search asks the same questions again and is told the answers that stand in the
results. For the same reason a trial is only ever compared with trials of earlier batches, never
with one that happened to finish first.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raymerge.cluster.grid_axes import Dimension
from raymerge.cluster.grid_points import Value
from raymerge.cluster.grid_spec import GridSpec
from raymerge.cluster.search_spec import PruningSpec, SearchSpec
from raymerge.merge_actors.errors import RecipeError

if TYPE_CHECKING:
    import optuna

#: Points that `where` refuses one after the other before the search gives up.
_MOST_REFUSED = 1000


class Study:
    """Asks for axis values and learns from what came of them."""

    def __init__(self, spec: GridSpec, search: SearchSpec) -> None:
        """Set the sampler up.

        Raises:
            RecipeError: Optuna, or what its CMA-ES needs, is not installed.
        """
        self._optuna = _import_optuna(search)
        self._spec = spec
        self._distributions = {_name(each): self._distribution(each) for each in spec.dimensions}
        directions = ["maximize" if each.mode == "max" else "minimize" for each in spec.selection.objectives]
        with _quiet():
            self._study = self._optuna.create_study(directions=directions, sampler=self._sampler(search))

    def ask(self) -> tuple[optuna.Trial, dict[str, Value]]:
        """Return a trial and its axis values; `where` lets them through.

        Raises:
            RecipeError: `where` lets hardly anything through.
        """
        for _ in range(_MOST_REFUSED):
            with _quiet():
                trial = self._study.ask(self._distributions)
            axes: dict[str, Value] = {}
            for dimension in self._spec.dimensions:
                value = trial.params[_name(dimension)]
                is_range = dimension.axes[0].range is not None
                axes |= {dimension.axes[0].name: value} if is_range else dimension.at(value)
            if self._spec.holds(axes):
                return trial, axes
            self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        raise self._spec.origin.error(
            "where", f"refuses {_MOST_REFUSED:,} suggestions one after the other; search a smaller space."
        )

    def tell(
        self,
        trial: optuna.Trial,
        values: Sequence[float] | None,
        rungs: Mapping[int, float],
        *,
        is_pruned: bool,
    ) -> None:
        """Say what came of a trial.

        Args:
            trial: from `ask`.
            values: of the objectives; None, or NaN among them, if it failed.
            rungs: value at each rung that it came to, by the rung's number.
            is_pruned: was it given up?
        """
        states = self._optuna.trial.TrialState
        with _quiet():
            if not self._spec.selection.is_pareto:
                for rung, value in rungs.items():
                    if not math.isnan(value):
                        trial.report(value, rung)
            if is_pruned:
                self._study.tell(trial, state=states.PRUNED)
            elif values is None or any(map(math.isnan, values)):
                self._study.tell(trial, state=states.FAIL)
            else:
                self._study.tell(trial, list(values))

    def _distribution(self, dimension: Dimension) -> Any:
        distributions = self._optuna.distributions
        span = dimension.axes[0].range
        if span is None:  # of a list the position is chosen: any value will do
            return distributions.CategoricalDistribution(tuple(range(len(dimension))))
        if span.is_int:
            return distributions.IntDistribution(
                int(span.low), int(span.high), log=span.is_log, step=int(span.step or 1)
            )
        return distributions.FloatDistribution(span.low, span.high, log=span.is_log, step=span.step)

    def _sampler(self, search: SearchSpec) -> Any:
        samplers = self._optuna.samplers
        if search.sampler == "random":
            return samplers.RandomSampler(seed=search.seed)
        if search.sampler == "tpe":
            return samplers.TPESampler(seed=search.seed, n_startup_trials=search.startup)
        return samplers.CmaEsSampler(
            seed=search.seed,
            n_startup_trials=max(1, search.startup),
            warn_independent_sampling=False,
            independent_sampler=samplers.RandomSampler(seed=search.seed),
        )


@dataclass(slots=True)
class Pruner:
    """Gives up trials that look bad on a part of the batches."""

    spec: PruningSpec
    history: dict[int, list[float]] = field(default_factory=dict)
    """Rung -> what trials of earlier batches cost there."""

    def should_stop(self, rung: int, cost: float) -> bool:
        """Return whether a trial that costs so much at a rung is given up; NaN always is."""
        earlier = self.history.get(rung, [])
        if math.isnan(cost):
            return True
        if len(earlier) < self.spec.warmup:
            return False
        if self.spec.rule == "median":
            return cost > statistics.median(earlier)
        num_better = sum(other < cost for other in earlier)
        return num_better >= (len(earlier) + 1) / self.spec.factor

    def learn(self, costs: Mapping[int, float]) -> None:
        """Take down what a trial cost at the rungs that it came to."""
        for rung, cost in costs.items():
            if not math.isnan(cost):
                self.history.setdefault(rung, []).append(cost)


def _name(dimension: Dimension) -> str:
    return "+".join(axis.name for axis in dimension.axes)


def _import_optuna(search: SearchSpec) -> Any:
    try:
        import optuna

        if search.sampler == "cmaes":
            import cmaes  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"raymerge search with sampler: {search.sampler} needs {error.name}; install it with "
            "pip install 'raymerge[search]'"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence remarks about features that are experimental in Optuna: there is nothing to be done about them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
