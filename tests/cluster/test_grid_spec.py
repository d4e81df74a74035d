"""Grid files: how they expand, and what is said of bad ones."""

# A table of whole sentences, which are easier to compare uncut:
# ruff: noqa: E501

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from raymerge.cluster.grid_spec import GridSpec, read_grid
from raymerge.merge_actors.errors import RecipeError

EVALUATE = """
evaluate:
  tasks:
    - {name: topic, kind: text_classification, validation: v.jsonl, test: t.jsonl, head: h}
"""
HEAD = "merge_method: ties\nbase_model: base\nmodels: [{model: a, parameters: {weight: $w}}]\n"
GOOD = HEAD + "grid: {w: [1, 2]}\n" + EVALUATE


def _spec(tmp_path: Path, text: str, **options: Any) -> GridSpec:
    file = tmp_path / "g.yaml"
    file.write_text(text)
    return read_grid(file, **options)


def _recipes(spec: GridSpec) -> list[dict[str, Any]]:
    return [spec.recipe(spec.combination(index)) for index in spec.kept]


def test_references_are_replaced_anywhere_and_keep_their_type(tmp_path: Path) -> None:
    spec = _spec(
        tmp_path,
        """
merge_method: $method
base_model: models/${size}/base
models:
  - general
  - $skills
  - {model: "m-$size@$rev", parameters: {weight: $w, density: [1, "$w"]}}
  - {model: "${skills[0]}", data: {path: calib.jsonl, samples: $n}, parameters: {weight: $rest}}
parameters: {normalize: $flag}
chat_template: "costs $$5"
grid:
  method: [ties, linear]
  size: [7b]
  rev: [v2]
  skills: {pairs: [s1, s2]}
  w: [0.1]
  n: [64]
  flag: [true]
let: {rest: 1 - w}
"""
        + EVALUATE,
    )
    assert _recipes(spec) == [
        {
            "merge_method": method,
            "base_model": "models/7b/base",
            "models": [
                "general",
                "s1",
                "s2",
                {"model": "m-7b@v2", "parameters": {"weight": 0.1, "density": [1, 0.1]}},
                {
                    "model": "s1",
                    "data": {"path": "calib.jsonl", "samples": 64},
                    "parameters": {"weight": 0.9},
                },
            ],
            "parameters": {"normalize": True},
            "chat_template": "costs $5",
        }
        for method in ("ties", "linear")
    ]


def test_the_last_axis_changes_fastest_and_where_drops_points(tmp_path: Path) -> None:
    text = (
        HEAD
        + "parameters: {lambda: $lambda}\ngrid: {w: [1, 2, 3], lambda: [3, 2, 1]}\nwhere: lambda < w\n"
        + EVALUATE
    )
    spec = _spec(tmp_path, text)
    points = [spec.combination(index) for index in spec.kept]
    assert points == [{"w": 2, "lambda": 1}, {"w": 3, "lambda": 2}, {"w": 3, "lambda": 1}]
    assert spec.num_combinations == 9
    both = _spec(tmp_path, text.replace("where: lambda < w", "where: [lambda < w, w != 3]"))
    assert [both.combination(index) for index in both.kept] == [{"w": 2, "lambda": 1}]


def test_models_of_a_subset_can_carry_references_of_their_own(tmp_path: Path) -> None:
    text = """
merge_method: task_arithmetic
base_model: base
models: $pair
grid:
  pair: {pairs: [{model: a, parameters: {weight: $w}}, {model: b, parameters: {weight: $w}}, c]}
  w: [0.5]
"""
    recipes = _recipes(_spec(tmp_path, text + EVALUATE))
    assert recipes[0]["models"] == [
        {"model": "a", "parameters": {"weight": 0.5}},
        {"model": "b", "parameters": {"weight": 0.5}},
    ]
    assert recipes[1]["models"] == [{"model": "a", "parameters": {"weight": 0.5}}, "c"]


def test_constants_stand_in_axes_as_numbers(tmp_path: Path) -> None:
    spec = _spec(
        tmp_path, GOOD.replace("{w: [1, 2]}", '{w: [0, "$rule", 1]}\nlet: {steps: 500, rule: steps / 2000}')
    )
    assert spec.axes[0].values == (0, 0.25, 1)
    assert [spec.combination(index)["w"] for index in spec.kept] == [0, 0.25, 1]


def test_seeds_become_the_seed_of_the_recipe(tmp_path: Path) -> None:
    spec = _spec(tmp_path, GOOD.replace("{w: [1, 2]}", "{w: [1], seeds: 2}"))
    assert [each["seed"] for each in _recipes(spec)] == [0, 1]
    assert _recipes(_spec(tmp_path, GOOD, seed=7))[0]["seed"] == 7


def test_a_million_combinations_are_read_at_once_and_made_one_by_one(tmp_path: Path) -> None:
    axes = "{w: {start: 1, stop: 1000, step: 1}, lambda: {start: 1, stop: 1000, step: 1}}"
    spec = _spec(tmp_path, HEAD + "parameters: {lambda: $lambda}\ngrid: " + axes + EVALUATE)
    assert spec.num_combinations == len(spec.kept) == 1_000_000
    assert spec.combination(spec.kept[999_999]) == {"w": 1000, "lambda": 1000}
    assert spec.combination(spec.kept[1234]) == {"w": 2, "lambda": 235}


ERRORS = {
    "grid: 3": "g.yaml:4: key grid is 3; it must name at least one axis: {lambda: [0.5, 1]}.",
    "grid: {w: [1], p: [2]}": "g.yaml:4: key grid.p is never used: write $p in the recipe, or leave the axis out.",
    "grid: {ww: [1]}": (
        "g.yaml:3: key models[0].parameters.weight refers to $w, which is neither axis nor `let`; known: ww "
        "(did you mean 'ww'?); $$ is a dollar sign."
    ),
    "gird: {w: [1]}": "g.yaml:4: key gird is unknown (did you mean 'grid'?).",
    "grid: {w: [1]}\nwhere: w > 1": (
        "g.yaml:5: key where lets none of 1 combinations through; the grid would be empty."
    ),
    "grid: {w: [1]}\nlet: {b: a + 1, a: w}": (
        "g.yaml:5: key let.b uses 'a', which is not known yet; write it below that name."
    ),
    "grid: {w: [1]}\nwhere: v > 1": (
        "g.yaml:5: key where uses 'v', which is neither axis nor `let`; known: w."
    ),
    "grid: {w: [1]}\nwhere: w.real > 1": (
        "g.yaml:5: key where is 'w.real > 1'; it may hold axes, numbers, texts, lists, + - * / // % **, comparisons, "
        "`in`, and, or, not, if-else."
    ),
    "grid: {w: [a]}\nwhere: w > 1": (
        "g.yaml:5: key where is 'w > 1', which fails for w = 'a': '>' not supported between instances of 'str' and 'int'."
    ),
    "grid: {w: [1]}\nlet: {w: 2}": "g.yaml:5: key let.w is an axis already; choose another name.",
    "grid: {w: [1]}\nselect: {metric: topic.acuracy}": (
        "g.yaml:5: key select.metric names 'topic.acuracy', which no task yields; known: METRICS "
        "(did you mean 'topic.accuracy'?)."
    ),
    "grid: {w: [1]}\nselect: {metric: topic.accuracy, split: test}": (
        "g.yaml:5: key select.split is 'test'; points are chosen on validation data, and test data are scored once, for "
        "what was chosen."
    ),
    "grid: {w: [1]}\nselect: {metrik: topic.accuracy}": (
        "g.yaml:5: key select.metrik is unknown; known: metric, mean, pareto, mode, average_over, split (did you mean "
        "'metric'?)."
    ),
    "grid: {w: [1]}\nselect: {mean: {topic.accuracy: -1, topic.f1_macro: 1}}": (
        "g.yaml:5: key select.mean.topic.accuracy is -1, but higher is better for topic.accuracy and the mean is made "
        "large; give it a positive weight."
    ),
    "grid: {w: [1]}\nselect: {mean: {topic.accuracy: 1, topic.f1_macro: 1}, mode: min}": (
        "g.yaml:5: key select.mean.topic.accuracy is 1, but higher is better for topic.accuracy and the mean is made "
        "small; give it a negative weight."
    ),
    "grid: {w: [1]}\nselect: {metric: topic.accuracy, average_over: sed}": (
        "g.yaml:5: key select.average_over names 'sed', which is no axis; known: w."
    ),
    "grid: {w: [1]}\nexport: {tops: 3}": (
        "g.yaml:5: key export is {'tops': 3}; it must be {top: 3}, the number of checkpoints to write."
    ),
    "grid: {w: [1], seeds: 2}\nseed: 3": (
        "g.yaml:4: key grid.seeds gives seeds, but the recipe (or --seed) has one seed already; leave that out, or write "
        "seed: $seed."
    ),
    "grid: {w: [1]}\nsearch: {trials: 3}": (
        "g.yaml:5: key search has no effect on a grid; run the file with raymerge search, or leave it out."
    ),
}


@pytest.mark.parametrize("section", ERRORS)
def test_what_is_said_of_bad_files(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("g.yaml").write_text(HEAD + section + "\n" + EVALUATE)
    with pytest.raises(RecipeError) as error:
        read_grid("g.yaml").kept  # noqa: B018
    from raymerge.stats.evaluation.tasks import parse_evaluation

    section_metrics = parse_evaluation(
        [{"name": "topic", "kind": "text_classification", "validation": "v.jsonl", "head": "h"}]
    ).metrics
    assert str(error.value) == ERRORS[section].replace("METRICS", ", ".join(section_metrics))


def test_errors_of_tasks_name_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("g.yaml").write_text(GOOD.replace("text_classification", "text_clasification"))
    with pytest.raises(RecipeError, match=r"^g\.yaml:8: key evaluate\.tasks\[0\]\.kind: unknown kind"):
        read_grid("g.yaml")
    Path("g.yaml").write_text(GOOD.split("evaluate:")[0])
    with pytest.raises(RecipeError, match=r"^g\.yaml:1: key evaluate is missing; it holds the tasks"):
        read_grid("g.yaml")
    Path("g.yaml").write_text(GOOD.replace("t.jsonl", "v.jsonl"))
    Path("v.jsonl").write_text("")
    with pytest.raises(
        RecipeError, match=r"key evaluate\.tasks\[0\]\.test(:| is .*,) the(se are the)? data of `validation`"
    ):
        read_grid("g.yaml")
