"""Search: the same trials for any number of evaluators, resumed where it stopped, pruning, Pareto fronts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from raymerge.cluster.grid import GridResult
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.grid_spec import read_grid
from raymerge.cluster.results import read_rows
from raymerge.cluster.search import search
from raymerge.cluster.search_spec import PruningSpec, SearchSpec, read_search
from raymerge.cluster.search_study import Pruner
from raymerge.merge_actors.errors import RecipeError

pytest.importorskip("optuna")


@pytest.fixture
def family(tiny_checkpoints: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr("raymerge.cluster.grid_plan._check_tasks", lambda evaluation, folder: [])
    return tiny_checkpoints("llama")


def _space(family: Any, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "$method",
        "base_model": str(family.base),
        "models": [str(family.models[0]), str(family.models[1])],
        "parameters": {"weight": "$w", "density": "$p"},
        "grid": {
            "method": ["ties", "dare_linear"],
            "w": {"low": 0, "high": 2},
            "p": {"low": 0.01, "high": 1, "scale": "log"},
        },
        "evaluate": [{"name": "topic", "kind": "text_classification", "validation": "v.jsonl", "head": "h"}],
        "search": {"trials": 24, "batch": 4, "startup": 8, "seed": 3},
        **more,
    }


def _score(axes: Mapping[str, Any]) -> float:
    return float(
        -((axes["w"] - 0.8) ** 2) - (math.log10(axes["p"]) + 1) ** 2 - 0.5 * (axes["method"] == "ties")
    )


def _run(raw: Any, out: Path, runner: Any, **options: Any) -> GridResult:
    return search(raw, out, GridOptions(in_process=True, **options), open_runner=runner.opener())


def _trials(out: Path) -> list[tuple[Any, ...]]:
    return [
        (
            row["point"],
            row["status"],
            row["axis.method"],
            row["axis.w"],
            row["axis.p"],
            row["metric.topic.accuracy"],
        )
        for row in read_rows(str(out))
    ]


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "random"])
def test_a_search_repeats_itself_and_goes_on_after_a_stop(
    sampler: str, family: Any, fake_runner: Any, tmp_path: Path
) -> None:
    raw = _space(family, search={"trials": 20, "batch": 4, "startup": 4, "sampler": sampler})
    whole = fake_runner(_score)
    result = _run(raw, tmp_path / "whole", whole)
    assert (result.num_points, result.num_run) == (20, 20)
    stopped = fake_runner(_score)
    stopped.interrupt_after = 10  # in the middle of the third batch
    with pytest.raises(KeyboardInterrupt):
        _run(raw, tmp_path / "out", stopped)
    stopped.interrupt_after = None
    again = _run(raw, tmp_path / "out", stopped, resume=True)
    assert (again.num_run, again.num_resumed) == (10, 10)
    assert sorted(stopped.ran) == list(range(20))
    assert _trials(tmp_path / "out") == _trials(tmp_path / "whole")
    seeded = _run(raw, tmp_path / "seeded", fake_runner(_score), seed=1)
    assert seeded.num_run == 20
    assert _trials(tmp_path / "seeded") != _trials(tmp_path / "whole")


def test_tpe_finds_what_random_trials_do_not(family: Any, fake_runner: Any, tmp_path: Path) -> None:
    best = {}
    for sampler in ("tpe", "random"):
        search_section = {"trials": 60, "batch": 4, "startup": 10, "sampler": sampler}
        result = _run(_space(family, search=search_section), tmp_path / sampler, fake_runner(_score))
        [value] = result.best[0]["objectives"].values()
        best[sampler] = value
    assert best["tpe"] > best["random"]
    assert best["tpe"] > -0.02


def test_integers_lists_and_where(family: Any, fake_runner: Any, tmp_path: Path) -> None:
    raw = _space(
        family,
        merge_method="ties",
        grid={"w": {"low": 1, "high": 6, "kind": "int"}, "p": [0.1, 0.5]},
        where="w != 3",
        search={"trials": 30, "batch": 5},
    )
    runner = fake_runner(lambda axes: float(axes["w"]))
    result = _run(raw, tmp_path / "out", runner)
    rows = read_rows(str(tmp_path / "out"))
    assert {row["axis.w"] for row in rows} <= {1, 2, 4, 5, 6}
    assert len(rows) == 30
    assert len(runner.ran) == len(set(runner.ran)) <= 10, "a point that was seen is not run again"
    assert result.num_run == len(runner.ran)
    assert result.best[0]["axes"]["w"] == 6


def test_bad_trials_are_given_up_early(family: Any, fake_runner: Any, tmp_path: Path) -> None:
    raw = _space(family)
    raw["search"] |= {"pruning": {"rule": "median", "rungs": [0.25, 0.5], "warmup": 4}}
    runner = fake_runner(lambda axes: 5 + _score(axes))
    result = _run(raw, tmp_path / "out", runner)
    rows = read_rows(str(tmp_path / "out"))
    pruned = [row for row in rows if row["status"] == "pruned"]
    assert 0 < len(pruned) == result.num_pruned == len(runner.stopped) < 24
    assert all(row["point"] >= 4 for row in pruned), "the first batch has nothing to be compared with"
    for row in pruned:
        earlier = [r["rung.0.25"] for r in rows if r["point"] < row["point"] // 4 * 4]
        assert row["rung.0.25"] <= sorted(earlier)[(len(earlier) - 1) // 2 + 1]
    resumed = _run(raw, tmp_path / "out", fake_runner(_score), resume=True)
    assert resumed.num_run == 0


def test_the_rules_of_pruning() -> None:
    median = Pruner(PruningSpec(rule="median", warmup=3))
    assert not median.should_stop(0, 9.0)
    for cost in (1.0, 2.0, 3.0):
        median.learn({0: cost})
    assert [median.should_stop(0, cost) for cost in (1.5, 2.0, 2.5, math.nan)] == [False, False, True, True]
    assert not median.should_stop(1, 9.0)
    halving = Pruner(PruningSpec(rule="halving", warmup=3, factor=3))
    for cost in range(5):
        halving.learn({0: float(cost)})
    assert [halving.should_stop(0, cost) for cost in (-1.0, 0.5, 1.5)] == [False, False, True]


def test_a_pareto_front_is_shown(family: Any, fake_runner: Any, tmp_path: Path) -> None:
    raw = _space(
        family, select={"pareto": {"topic.accuracy": "max", "topic.f1_macro": "max"}}, export={"top": 0}
    )
    raw["search"] = {"trials": 20, "batch": 5, "startup": 5}

    class Two(fake_runner):  # type: ignore[misc]
        def run(self, points: Any, on_row: Any, **more: Any) -> None:
            by_number = {point.number: point for point in points}

            def both(row: dict[str, Any]) -> None:
                w = by_number[row["point"]].axes["w"]
                on_row(row | {"metric.topic.accuracy": w, "metric.topic.f1_macro": -w})

            super().run(points, both, **more)

    result = _run(raw, tmp_path / "out", Two(_score))
    assert result.num_run == 20
    assert set(result.best[0]["objectives"]) == {"topic.accuracy", "topic.f1_macro"}


@pytest.mark.parametrize(
    ("search_section", "sentence"),
    [
        ({"trial": 3}, "key search.trial is unknown; known: sampler, trials, batch, startup, seed, pruning "
                       "(did you mean 'trials'?)."),
        ({"sampler": "tpee"},
         "key search.sampler is 'tpee'; it must be one of tpe, cmaes, random (did you mean 'tpe'?)."),
        ({"trials": 0}, "key search.trials is 0; it must be a whole number in [1, 1,000,000]."),
        ({"pruning": {"rule": "median", "rungs": [0.5, 0.2]}},
         "key search.pruning.rungs is [0.5, 0.2]; it must be growing fractions of the batches, in (0, 1)."),
        ({"pruning": {"rule": "halfing"}},
         "key search.pruning.rule is 'halfing'; it must be one of median, halving (did you mean 'halving'?)."),
    ],
)  # fmt: skip
def test_what_is_refused(search_section: Any, sentence: str, family: Any) -> None:
    spec = read_grid(_space(family, search=search_section), is_search=True)
    with pytest.raises(RecipeError) as error:
        read_search(spec)
    assert str(error.value) == f"grid: {sentence}"


def test_samplers_have_to_fit(family: Any, fake_runner: Any, tmp_path: Path) -> None:
    front = {"pareto": ["topic.accuracy", "topic.f1_macro"]}
    spec = read_grid(_space(family, select=front, search={"sampler": "cmaes"}), is_search=True)
    with pytest.raises(RecipeError, match="which has one objective"):
        read_search(spec)
    lists = {"method": ["ties"], "w": [1], "p": [1]}
    spec = read_grid(_space(family, grid=lists, search={"sampler": "cmaes"}), is_search=True)
    with pytest.raises(RecipeError, match="needs at least one range"):
        read_search(spec)
    assert read_search(read_grid(_space(family, search=None), is_search=True)) == SearchSpec()
    with pytest.raises(RecipeError, match=r"where.*refuses 1,000 suggestions"):
        _run(_space(family, where="w == 0.123456789 or w == 1"), tmp_path / "out", fake_runner(_score))
