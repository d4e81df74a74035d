"""Grids around their evaluators: rows, resuming, shared points, winners, planning before work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymerge.cluster.grid import GridResult, grid
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.grid_plan import plan_grid
from raymerge.cluster.grid_spec import read_grid
from raymerge.cluster.results import read_rows
from raymerge.merge_actors.errors import CheckpointError, OutputError, RecipeError

Family = Any
FakeRunner = Any


@pytest.fixture
def family(grid_family: Any) -> Any:
    return grid_family


def _grid(family: Any, **more: Any) -> dict[str, Any]:
    first, second, _ = map(str, family.models)
    return {
        "merge_method": "$method",
        "base_model": str(family.base),
        "models": [first, second],
        "parameters": {"weight": "$w", "density": "$p"},
        "grid": {"method": ["ties", "dare_linear"], "w": [0.5, 1], "p": [0.2, 0.5, 1]},
        "evaluate": [
            {
                "name": "topic",
                "kind": "text_classification",
                "validation": "v.jsonl",
                "test": "t.jsonl",
                "head": "h",
            }
        ],
        **more,
    }


def _score(axes: Mapping[str, Any]) -> float:
    return float(axes["w"] * axes["p"] + (0.01 if axes["method"] == "ties" else 0))


def _run(raw: Any, out: Path, runner: FakeRunner, **options: Any) -> GridResult:
    return grid(raw, out, GridOptions(in_process=True, **options), open_runner=runner.opener())


def test_every_point_is_a_row_and_the_best_is_scored_on_test_once(
    family: Family, fake_runner: Any, tmp_path: Path
) -> None:
    runner = fake_runner(_score)
    result = _run(_grid(family), tmp_path / "out", runner)
    rows = read_rows(str(tmp_path / "out"))
    assert [row["point"] for row in rows if row["split"] == "validation"] == list(range(12))
    assert [(row["point"], row["axis.method"]) for row in rows if row["split"] == "test"] == [(5, "ties")]
    assert runner.tested == [5]
    assert (
        rows[4] | {"axis.method": "ties", "axis.w": 1.0, "axis.p": 0.5, "metric.topic.accuracy": 0.51}
        == rows[4]
    )
    assert (result.num_points, result.num_run, result.outputs) == (12, 12, ())
    [best] = json.loads((tmp_path / "out/best.json").read_text())
    assert (best["point"], best["axes"]) == (5, {"method": "ties", "w": 1, "p": 1})
    assert best["test"] == {"topic.accuracy": {"value": 1.01, "error": 0.01}}
    assert best == {**result.best[0]}


def test_a_stopped_run_goes_on_where_it_was(family: Family, fake_runner: Any, tmp_path: Path) -> None:
    runner = fake_runner(_score)
    runner.interrupt_after = 5
    with pytest.raises(KeyboardInterrupt):
        _run(_grid(family), tmp_path / "out", runner)
    assert len(read_rows(str(tmp_path / "out"))) == 5
    with pytest.raises(OutputError, match="holds results; go on with --resume"):
        _run(_grid(family), tmp_path / "out", runner)
    runner.interrupt_after = None
    result = _run(_grid(family), tmp_path / "out", runner, resume=True)
    assert sorted(runner.ran) == list(range(12)), "no point ran twice"
    assert (result.num_run, result.num_resumed) == (7, 5)
    whole = fake_runner(_score)
    _run(_grid(family), tmp_path / "whole", whole)
    assert read_rows(str(tmp_path / "out")) == read_rows(str(tmp_path / "whole"))
    again = _run(_grid(family), tmp_path / "out", runner, resume=True)
    assert (again.num_run, again.num_resumed, runner.tested) == (0, 12, [5])


def test_a_run_that_planned_while_another_made_its_results_refuses_them(
    family: Family, fake_runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planning may take minutes; what has come meanwhile is neither mixed with nor written over."""
    out, raw = tmp_path / "out", _grid(family)

    def plan_late(*arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        monkeypatch.setattr("raymerge.cluster.grid_plan._check_tasks", lambda evaluation, folder: [])
        _run(raw, out, fake_runner(_score))
        return plan_grid(*arguments, **options)

    monkeypatch.setattr("raymerge.cluster.grid.plan_grid", plan_late)
    with pytest.raises(OutputError, match="holds results; go on with --resume"):
        _run(raw, out, fake_runner(lambda axes: 0.0))
    assert max(row["metric.topic.accuracy"] for row in read_rows(str(out))) > 1


def test_a_limit_runs_less_and_loses_nothing(family: Family, fake_runner: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    runner = fake_runner(_score)
    runner.interrupt_after = 4  # the last four: this runner goes backwards
    with pytest.raises(KeyboardInterrupt):
        _run(_grid(family), out, runner)
    runner.interrupt_after = None
    result = _run(_grid(family), out, runner, resume=True, limit=3)
    assert (result.num_run, result.num_resumed) == (3, 4)
    rows = [row["point"] for row in read_rows(str(out)) if row["split"] == "validation"]
    assert rows == [0, 1, 2, 8, 9, 10, 11]


def test_a_changed_file_keeps_the_rows_that_still_belong_to_it(
    family: Family, fake_runner: Any, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    _run(_grid(family), out, fake_runner(_score))
    runner = fake_runner(_score)
    axes = {"p": [1, 0.7], "method": ["ties"], "w": [1, 0.5]}  # other order, one value new, some gone
    result = grid(
        _grid(family, grid=axes), out, GridOptions(in_process=True, resume=True), open_runner=runner.opener()
    )
    assert (result.num_resumed, result.num_run, sorted(runner.ran)) == (2, 2, [2, 3])
    rows = [row for row in read_rows(str(out)) if row["split"] == "validation"]
    assert [(row["point"], row["axis.p"], row["axis.w"]) for row in rows] == [
        (0, 1.0, 1.0),
        (1, 1.0, 0.5),
        (2, 0.7, 1.0),
        (3, 0.7, 0.5),
    ]
    assert [row["metric.topic.accuracy"] for row in rows] == pytest.approx([1.01, 0.51, 0.71, 0.36])
    assert any("10 results of the earlier run belong to no point" in line for line in result.remarks)
    assert len(list(out.glob("results-*.parquet"))) == 1
    other_tasks = _grid(family)
    other_tasks["evaluate"][0]["samples"] = 3
    assert _run(other_tasks, out, fake_runner(_score), resume=True).num_resumed == 0


def test_points_that_are_one_merge_run_once(family: Family, fake_runner: Any, tmp_path: Path) -> None:
    raw = _grid(
        family, grid={"method": ["ties"], "w": [1], "p": [0.2], "dummy": [1, 2]}, let={"v": "w + 0 * dummy"}
    )
    raw["parameters"]["weight"] = "$v"
    raw["parameters"]["lambda"] = "$w"
    runner = fake_runner(lambda axes: float(axes["p"]))
    result = _run(raw, tmp_path / "out", runner)
    assert (runner.ran, result.num_shared) == ([0], 1)
    rows = [row for row in read_rows(str(tmp_path / "out")) if row["split"] == "validation"]
    assert [(row["axis.dummy"], row["same_as"], row["metric.topic.accuracy"]) for row in rows] == [
        (1, None, 0.2),
        (2, 0, 0.2),
    ]
    assert _run(raw, tmp_path / "out", runner, resume=True).num_run == 0


def test_a_failed_point_is_a_row_and_is_run_again(family: Family, fake_runner: Any, tmp_path: Path) -> None:
    def score(axes: Mapping[str, Any]) -> float:
        return 1 / (axes["p"] - 0.5)

    result = _run(_grid(family), tmp_path / "out", fake_runner(score))
    assert result.num_failed == 4
    failed = [row for row in read_rows(str(tmp_path / "out")) if row["status"] == "failed"]
    assert [row["axis.p"] for row in failed] == [0.5] * 4
    assert "ZeroDivisionError" in failed[0]["error"]
    runner = fake_runner(_score)
    assert _run(_grid(family), tmp_path / "out", runner, resume=True).num_failed == 0
    assert len(runner.ran) == 4


def test_winners_are_checkpoints_whose_recipes_give_the_same_bytes(
    family: Family, fake_runner: Any, tmp_path: Path
) -> None:
    from raymerge.cluster.merge import merge
    from raymerge.cluster.options import MergeOptions

    out = tmp_path / "out"
    raw = _grid(family, export={"top": 3}, seed=5)
    result = _run(raw, out, fake_runner(_score))
    assert list(result.outputs) == [str(out / f"best-{i}") for i in (1, 2, 3)]
    assert [each["point"] for each in result.best] == [5, 11, 2]
    for index, place in enumerate(result.outputs):
        recipe = Path(place) / "recipe.yaml"
        assert yaml.safe_load(recipe.read_text())["merge_method"] == ("ties", "dare_linear", "ties")[index]
        merge([recipe], tmp_path / f"again-{index}", MergeOptions(in_process=True, workers=1))
        again = (tmp_path / f"again-{index}" / "model.safetensors").read_bytes()
        assert again == (Path(place) / "model.safetensors").read_bytes()
    stamp = (out / "best-1" / "model.safetensors").stat().st_mtime_ns
    _run(raw, out, fake_runner(_score), resume=True)
    assert (out / "best-1" / "model.safetensors").stat().st_mtime_ns == stamp, (
        "the same winner was merged again"
    )
    one = _run(_grid(family, export={"top": 1}), tmp_path / "one", fake_runner(_score))
    assert Path(one.outputs[0], "model.safetensors").exists()


def test_a_grid_is_checked_before_its_first_point(family: Family, fake_runner: Any, tmp_path: Path) -> None:
    runner = fake_runner(_score)

    def fails(raw: Any, error: type[Exception], pattern: str) -> None:
        with pytest.raises(error, match=pattern):
            _run(raw, tmp_path / "out", runner)

    fails(
        _grid(family, grid={"method": ["ties", "tie"], "w": [1], "p": [1]}),
        RecipeError,
        "unknown merge_method 'tie'",
    )
    fails(_grid(family, grid={"method": ["ties"], "w": [1], "p": [1, 1.5]}), RecipeError, "density is 1.5")
    fails(_grid(family, models=[str(family.models[0]), "gone"]), CheckpointError, "gone")
    fails(
        _grid(family, parameters={"weight": "$w", "density": "$p", "lamda": 1}),
        RecipeError,
        "did you mean 'lambda'",
    )
    assert (runner.ran, (tmp_path / "out").exists()) == ([], False)


def test_a_large_grid_is_checked_by_few_recipes(
    family: Family, fake_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = {"start": 0.001, "stop": 1, "step": 0.001}
    raw = _grid(family, grid={"method": ["ties", "dare_linear"], "w": steps, "p": [0.2, 0.5, 0.7, 0.8, 1]})
    num_read = num_planned = 0
    from raymerge.cluster import grid_plan

    def count_read(*arguments: Any, **more: Any) -> Any:
        nonlocal num_read
        num_read += 1
        return real_read(*arguments, **more)

    def count_planned(*arguments: Any, **more: Any) -> Any:
        nonlocal num_planned
        num_planned += 1
        return real_plan(*arguments, **more)

    real_read, real_plan = grid_plan.read_document, grid_plan.plan_wave
    monkeypatch.setattr(grid_plan, "read_document", count_read)
    monkeypatch.setattr(grid_plan, "plan_wave", count_planned)
    plan = plan_grid(read_grid(raw), GridOptions())
    points = plan.points()
    assert (len(points), num_planned) == (10_000, 2)
    assert num_read <= 2 * (1000 + 5)
    assert points[9_999].axes == {"method": "dare_linear", "w": 1.0, "p": 1}
    assert len({point.key for point in points[:50]}) == 50


def test_keys_follow_the_inputs_and_not_the_name(
    family: Family, tmp_path: Path, tiny_checkpoints: Any
) -> None:
    plan = plan_grid(read_grid(_grid(family)), GridOptions())
    same = plan_grid(read_grid(_grid(family, name="other")), GridOptions())
    assert plan.point(3).key == same.point(3).key
    assert plan.point(3).key != plan.point(4).key
    seeded = plan_grid(read_grid(_grid(family), seed=1), GridOptions())
    assert plan.point(3).key != seeded.point(3).key


def test_keys_follow_the_files_of_the_tasks_and_no_folder_that_a_text_is_like(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows").mkdir()
    data = tmp_path / "rows" / "validation.jsonl"
    data.write_text("{}")
    task = {"name": "math", "kind": "generation", "validation": "rows", "stop": ["."]}

    def key() -> str:
        raw = _grid(family, evaluate=[task], select={"metric": "math.exact_match"})
        return plan_grid(read_grid(raw), GridOptions()).point(0).key

    first = key()
    (tmp_path / "results.parquet").write_text("what a run writes")
    assert key() == first
    data.write_text("[]")
    assert key() != first


def test_two_runs_do_not_write_one_folder(family: Family, fake_runner: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def score(axes: Mapping[str, Any]) -> float:
        with pytest.raises(OutputError, match="another run is writing"):
            _run(_grid(family), out, fake_runner(_score), resume=True)
        return _score(axes)

    _run(_grid(family), out, fake_runner(score), limit=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("!")
    with pytest.raises(OutputError, match="holds no results of a grid"):
        _run(_grid(family), tmp_path / "mine", fake_runner(_score), overwrite=True)


def test_results_that_cannot_be_read_are_not_thrown_away(
    family: Family, fake_runner: Any, tmp_path: Path
) -> None:
    runner = fake_runner(_score)
    _run(_grid(family), tmp_path / "out", runner)
    (tmp_path / "out/results.parquet").write_bytes(b"torn")
    with pytest.raises(OutputError, match=r"results\.parquet is no table of results"):
        _run(_grid(family), tmp_path / "out", runner, resume=True)
    assert (tmp_path / "out/results.parquet").read_bytes() == b"torn"
    assert len(runner.ran) == 12
