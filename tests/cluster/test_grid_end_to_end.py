"""Grids and searches end to end on tiny models: real merges, real scores, a killed driver, a chosen checkpoint."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from object_store import ObjectStore

from raymerge.cluster.grid import grid
from raymerge.cluster.grid_estimate import estimate
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.results import read_rows
from raymerge.merge_actors.errors import RecipeError

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning")

IN_PROCESS = {"in_process": True, "workers": 2}
#: A task of the user's, slow enough to be killed in the middle, that does not like one model.
TASK = """
import os
import time

def score(model, tokenizer, context):
    time.sleep(float(os.environ.get("SECONDS_OF_A_SCORE", 0)))
    norm = float(sum(parameter.double().square().sum() for parameter in model.parameters()) ** 0.5)
    if context.options.get("most") and norm > context.options["most"]:
        raise ArithmeticError("too large a model")
    return {"score": norm}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, first in (("validation", 0), ("test", 40)):
        texts = [" ".join(f"word{(first + i * j) % 60}" for j in range(12)) for i in range(1, 17)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Path("task.py").write_text(TASK)
    return tmp_path


def _grid(family: Any, *, most: float = 0.0) -> dict[str, Any]:
    first, second, _ = map(str, family.models)
    return {
        "merge_method": "$method",
        "base_model": str(family.base),
        "models": [first, second],
        "parameters": {"weight": "$w", "density": "$p"},
        "grid": {"method": ["dare_linear", "ties"], "w": [0, 1, 8], "p": [0.3, 1]},
        "evaluate": [
            {"name": "lm", "kind": "loss", "validation": "validation.jsonl", "test": "test.jsonl"},
            {
                **{"name": "mine", "kind": "python", "file": "task.py", "callable": "score"},
                "options": {"most": most},
            },
        ],
        "select": {"metric": "lm.loss"},
        "export": {"top": 1},
    }


def _table(out: Path | str) -> list[dict[str, Any]]:
    """Return what must not depend on how a grid was run."""
    wanted = ("point", "status", "split", "axis.method", "axis.w", "axis.p", "key")
    return [
        {
            name: None if value != value else value  # NaN is no figure that could be compared
            for name, value in row.items()
            if name in wanted or name.startswith(("metric.", "stderr."))
        }
        for row in read_rows(str(out))
    ]


def test_scores_are_those_of_the_merged_checkpoints(
    folder: Path, tiny_checkpoints: Callable[..., Any]
) -> None:
    from raymerge.cluster.merge import merge
    from raymerge.cluster.options import MergeOptions
    from raymerge.merge_actors.checkpoint.folder import open_checkpoint
    from raymerge.stats.evaluation.evaluate import evaluate_checkpoint
    from raymerge.stats.evaluation.tasks import parse_evaluation

    raw = _grid(tiny_checkpoints("llama"))
    result = grid(raw, "out", GridOptions(**IN_PROCESS))
    rows = {(row["split"], row["point"]): row for row in read_rows("out")}
    assert len(rows) == 13
    best = result.best[0]
    losses = {row["point"]: row["metric.lm.loss"] for row in rows.values() if row["split"] == "validation"}
    assert best["objectives"]["lm.loss"] == min(losses.values())
    checkpoint = open_checkpoint(result.outputs[0])
    evaluation = parse_evaluation(raw["evaluate"][:1])
    for split in ("validation", "test"):
        scored, _ = evaluate_checkpoint(checkpoint, evaluation, split)  # type: ignore[arg-type]
        assert rows[split, best["point"]]["metric.lm.loss"] == pytest.approx(
            scored["lm.loss"].value, rel=1e-6
        )
        assert best[split]["lm.loss"]["value"] == rows[split, best["point"]]["metric.lm.loss"]
    merge([f"{result.outputs[0]}/recipe.yaml"], "again", MergeOptions(in_process=True, workers=1))
    assert (
        Path("again/model.safetensors").read_bytes()
        == Path(result.outputs[0], "model.safetensors").read_bytes()
    )
    # Weight 0 is the base whatever the method and the density: merged each time, scored once.
    assert result.num_shared >= 3
    assert len({losses[point] for point in losses if rows["validation", point]["axis.w"] == 0}) == 1


def test_a_task_without_test_data_is_left_out_of_the_test(
    folder: Path, tiny_checkpoints: Callable[..., Any]
) -> None:
    """The task `mine` has neither; the winner is scored on the other one."""
    raw = _grid(tiny_checkpoints("llama")) | {"export": {"top": 0}}
    raw["grid"] = {"method": ["ties"], "w": [1], "p": [0.3]}
    raw["evaluate"][1]["validation"] = "validation.jsonl"
    (best,) = grid(raw, "out", GridOptions(**IN_PROCESS)).best
    assert {name.partition(".")[0] for name in best["validation"]} == {"lm", "mine"}
    assert {name.partition(".")[0] for name in best["test"]} == {"lm"}


def test_a_killed_driver_goes_on_and_gives_the_same_table(
    folder: Path, tiny_checkpoints: Callable[..., Any], ray_session: None
) -> None:
    """The driver is killed while it works in its own process; Ray's evaluators finish what it had begun."""
    raw = _grid(tiny_checkpoints("llama"))
    Path("grid.json").write_text(json.dumps(raw))  # JSON is YAML
    code = "from raymerge.cli.main import main; main(['grid', 'grid.json', 'out', '--in-process', '--workers', '1'])"
    command = [sys.executable, "-c", code]
    slow = {**os.environ, "SECONDS_OF_A_SCORE": "1.0"}
    driver = subprocess.Popen(command, env=slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        journal = Path("out/journal.jsonl")
        deadline = time.monotonic() + 200
        while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    num_done = len(read_rows("out"))
    assert 3 <= num_done < 12
    result = grid("grid.json", "out", GridOptions(resume=True, workers=2))
    assert result.num_resumed == num_done
    assert result.num_run + result.num_resumed == 12
    grid(raw, "whole", GridOptions(**IN_PROCESS))
    assert _table("out") == _table("whole")


def test_a_killed_driver_leaves_results_in_a_store(
    folder: Path, tiny_checkpoints: Callable[..., Any], object_store: ObjectStore
) -> None:
    """What had reached the store is kept; the lock of a dead process of this machine holds nobody up."""
    raw = _grid(tiny_checkpoints("llama")) | {"export": {"top": 0}}
    Path("grid.json").write_text(json.dumps(raw))
    out = "s3://models/killed-grid"
    code = (
        "from raymerge.cluster import remote_grid_folder; remote_grid_folder.SYNC_SECONDS = 0.1\n"
        f"from raymerge.cli.main import main; main(['grid', 'grid.json', '{out}', '--in-process', '--workers', '1'])"
    )
    command = [sys.executable, "-c", code]
    slow = {**os.environ, "SECONDS_OF_A_SCORE": "1.0"}
    driver = subprocess.Popen(command, env=slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 200
        while sum(json.loads(line)["split"] == "validation" for line in _journal(object_store)) < 3:
            assert driver.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    options = GridOptions(resume=True, **IN_PROCESS)
    num_done = estimate("grid.json", out, options)["num_done"]
    assert 3 <= num_done < 12
    result = grid("grid.json", out, options)
    assert (result.num_resumed, result.num_run) == (num_done, 12 - num_done)
    grid(raw, "whole", GridOptions(**IN_PROCESS))
    Path("copy").mkdir()
    Path("copy/results.parquet").write_bytes(object_store.get("killed-grid/results.parquet"))
    assert object_store.get("killed-grid/journal.jsonl") == b""
    assert _table("copy") == _table("whole")


def _journal(store: ObjectStore) -> list[bytes]:
    there = "killed-grid/journal.jsonl" in store.keys("killed-grid/")
    return store.get("killed-grid/journal.jsonl").splitlines() if there else []


def test_a_task_that_raises_fails_its_points_only(folder: Path, tiny_checkpoints: Callable[..., Any]) -> None:
    family = tiny_checkpoints("llama")
    grid(_grid(family), "out", GridOptions(**IN_PROCESS))
    norms = sorted(row["metric.mine.score"] for row in read_rows("out") if row["split"] == "validation")
    assert norms[0] < norms[-1]
    result = grid(_grid(family, most=(norms[0] + norms[-1]) / 2), "limited", GridOptions(**IN_PROCESS))
    rows = read_rows("limited")
    failed = [row for row in rows if row["status"] == "failed"]
    assert 0 < len(failed) == result.num_failed < 12
    assert all("ArithmeticError: too large a model" in row["error"] for row in failed)
    assert all("task.py" in row["error"] for row in failed), "the traceback leads to the user's line"


def test_statistics_are_measured_once_for_each_model_and_data(
    folder: Path, tiny_checkpoints: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYMERGE_CACHE", str(folder / "cache"))
    first, second, _ = map(str, tiny_checkpoints("llama").models)
    data = {"path": "validation.jsonl", "samples": "$samples"}
    raw = {
        "merge_method": "regmean",
        "models": [{"model": first, "data": data}, {"model": second, "data": data}],
        "parameters": {"alpha": "$alpha"},
        "grid": {"alpha": [0, 0.5, 1], "samples": [4, 16]},
        "evaluate": [{"name": "lm", "kind": "loss", "validation": "validation.jsonl"}],
        "export": {"top": 1},
    }
    result = grid(raw, "out", GridOptions(**IN_PROCESS))
    assert len(list((folder / "cache" / "statistics").glob("*/*.json"))) == 4, "two models, two sets of rows"
    assert len({row["metric.lm.loss"] for row in read_rows("out")}) == 6
    assert Path(result.outputs[0], "recipe.yaml").exists()
    assert sum("measuring" in line for line in result.remarks) == 4


def test_a_search_prunes_on_a_part_of_the_batches(folder: Path, tiny_checkpoints: Callable[..., Any]) -> None:
    pytest.importorskip("optuna")
    from raymerge.cluster.search import search

    first, second, _ = map(str, tiny_checkpoints("llama").models)
    raw = {
        "merge_method": "task_arithmetic",
        "base_model": str(tiny_checkpoints("llama").base),
        "models": [first, second],
        "parameters": {"weight": "$w"},
        "grid": {"w": {"low": -20, "high": 20}},
        "evaluate": {
            "batch_tokens": 26,
            "tasks": [{"name": "lm", "kind": "loss", "validation": "validation.jsonl"}],
        },
        "search": {
            "trials": 12,
            "batch": 4,
            "startup": 4,
            "pruning": {"rule": "median", "rungs": [0.25], "warmup": 4},
        },
    }
    result = search(raw, "out", GridOptions(**IN_PROCESS))
    rows = read_rows("out")
    assert result.num_run == 12
    pruned = [row for row in rows if row["status"] == "pruned"]
    assert result.num_pruned == len(pruned) > 0
    whole = [row["num_forward_passes"] for row in rows if row["status"] == "ok"]
    assert all(row["num_forward_passes"] < min(whole) for row in pruned)
    search(raw, "one", GridOptions(in_process=True, workers=1))
    assert [(r["axis.w"], r["status"]) for r in read_rows("one")] == [
        (r["axis.w"], r["status"]) for r in rows
    ]


def test_what_does_not_fit_is_said_before_any_merge(
    folder: Path, tiny_checkpoints: Callable[..., Any]
) -> None:
    raw = _grid(tiny_checkpoints("llama"))
    raw["evaluate"][0]["text_column"] = "txt"
    with pytest.raises(RecipeError, match="txt"):
        grid(raw, "out", GridOptions(**IN_PROCESS))
    assert not Path("out").exists()
