"""raymerge grid, search and report as a person types them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from raymerge.cli.main import main

GRID = """
merge_method: task_arithmetic
base_model: {base}
models: [{first}, {second}]
parameters: {{weight: $w}}
grid: {{w: {values}}}
evaluate:
  tasks:
    - {{name: lm, kind: loss, validation: v.jsonl, test: t.jsonl}}
export: {{top: 1}}
"""


@pytest.fixture
def grid_file(tiny_checkpoints: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    family = tiny_checkpoints("llama")
    for name in ("v", "t"):
        texts = [" ".join(f"word{(i * j + len(name)) % 50}" for j in range(10)) for i in range(1, 9)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    first, second = family.models[:2]
    Path("g.yaml").write_text(GRID.format(base=family.base, first=first, second=second, values="[0.5, 1]"))
    ranged = "{low: 0, high: 2}"
    Path("s.yaml").write_text(
        GRID.format(base=family.base, first=first, second=second, values=ranged) + "search: {trials: 3}\n"
    )
    return tmp_path / "g.yaml"


def _run(*words: str) -> Result:
    return CliRunner().invoke(main, list(words))


def test_a_grid_from_dry_run_to_report(grid_file: Path) -> None:
    dry = _run("grid", "g.yaml", "out", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert dry.stdout.startswith("2 points (w 2); 2 distinct merges\n")
    assert "a rough guess from rates of this machine" in dry.stdout
    assert not Path("out").exists()
    done = _run("grid", "g.yaml", "out", "--in-process", "--workers", "1")
    assert done.exit_code == 0, done.output
    assert "2 points run in" in done.stdout
    assert "best-1" in done.stdout and "test lm.loss" in done.stdout
    again = _run("grid", "g.yaml", "out", "--in-process", "--resume", "--json")
    result = json.loads(again.stdout)
    assert (result["num_run"], result["num_resumed"]) == (0, 2)
    planned = json.loads(_run("grid", "g.yaml", "out", "--dry-run", "--json").stdout)
    assert planned["basis"].startswith("measured on 2 points in ")
    assert (planned["num_done"], planned["seconds"]) == (2, 0)
    table = _run("report", "out", "--text")
    assert table.exit_code == 0 and "lm.loss along w" in table.stdout
    assert not Path("out/report.html").exists()
    assert json.loads(_run("report", "out", "--json").stdout)["best"][0]["rank"] == 1
    pytest.importorskip("matplotlib")
    assert "wrote out/report.html" in _run("report", "out").stdout
    assert Path("out/report.html").exists()


def test_a_search(grid_file: Path) -> None:
    pytest.importorskip("optuna")
    planned = json.loads(_run("search", "s.yaml", "out", "--dry-run", "--json").stdout)
    assert (planned["num_points"], planned["num_done"], planned["sampler"]) == (3, 0, "tpe")
    dry = _run("search", "s.yaml", "out", "--dry-run")
    assert dry.stdout.startswith("3 trials by tpe with seed 0 (w 0..2), none given up\n")
    assert not Path("out").exists()
    done = _run("search", "s.yaml", "out", "--in-process", "--workers", "1", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["num_run"] == 3
    again = json.loads(_run("search", "s.yaml", "out", "--dry-run", "--json", "--limit", "5").stdout)
    assert (again["num_done"], again["seconds"]) == (3, 0)


def test_errors_are_one_sentence(grid_file: Path) -> None:
    _run("grid", "g.yaml", "out", "--in-process", "--limit", "1")
    for words, sentence in (
        (("grid", "s.yaml", "new"), "s.yaml:11: key search has no effect on a grid"),
        (("grid", "g.yaml", "out"), "holds results; go on with --resume"),
        (("grid", "g.yaml", "out", "--resume", "--overwrite"), "--resume and --overwrite exclude each other"),
        (("grid", "g.yaml", "new", "--limit", "0"), "--limit is 0; it must be at least 1"),
        (("grid", "none.yaml", "new"), "none.yaml cannot be read"),
        (("report", "new"), "holds no results of a grid or a search"),
    ):
        failed = _run(*words)
        assert failed.exit_code == 1
        assert sentence in failed.stderr and len(failed.stderr.splitlines()) == 1, failed.stderr


def test_an_interrupt_says_how_to_go_on(grid_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*arguments: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("raymerge.cluster.grid.grid", interrupted)
    stopped = _run("grid", "g.yaml", "out")
    assert stopped.exit_code == 130
    assert "finished points are kept: go on with the same command and --resume (out)" in stopped.stderr
