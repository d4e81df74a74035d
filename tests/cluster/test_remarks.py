"""Every remark has one prefix, wherever it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from raymerge.cli.main import main, remark
from raymerge.cluster.grid import grid
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.remarks import as_note, of_recipe, without_recipe


def test_a_quiet_remark_stays_quiet_beside_a_name() -> None:
    assert as_note("a") == as_note("note: a") == "note: a"
    assert of_recipe("ties", "a") == "ties: a"
    assert of_recipe("ties", "note: a") == "note: ties: a"
    for line in ("a", "note: a"):
        assert without_recipe("ties", of_recipe("ties", line)) == line


@pytest.mark.parametrize("is_test_split", [False, True])
def test_a_grid_warns_with_one_prefix(
    is_test_split: bool,
    tiny_checkpoints: Any,
    fake_runner: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("raymerge.cluster.grid_plan._check_tasks", lambda evaluation, folder: [])
    family = tiny_checkpoints("llama")
    runner = fake_runner(lambda axes: 1.0, metric="lm.loss")

    def fail(axes: Mapping[str, Any]) -> float:
        if is_test_split and not runner.tested:
            return 1.0
        return 1.0 / 0.0

    runner.score = fail
    task = {"name": "lm", "kind": "loss", "validation": "v.jsonl", "test": "t.jsonl"}
    raw = {
        "merge_method": "linear",
        "models": list(map(str, family.models[:2])),
        "parameters": {"weight": "$w"},
        "grid": {"w": [1]},
        "evaluate": [task],
    }
    grid(raw, tmp_path / "out", GridOptions(), on_remark=remark, open_runner=runner.opener())
    said = "point 0 could not be scored" if is_test_split else "no point has a result"
    [line] = [line for line in capsys.readouterr().err.splitlines() if said in line]
    assert line.startswith(f"warning: {said}")


def test_a_plan_notes_with_one_prefix(
    tiny_checkpoints: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    family = tiny_checkpoints("llama")
    (tmp_path / "rows.txt").write_text("word1 word2 word3\n" * 4)
    models = "".join(f"- {{model: {model}}}\n" for model in family.models[:2])
    (tmp_path / "r.yaml").write_text(
        f"merge_method: regmean\nmodels:\n{models}parameters: {{alpha: 0.5}}\ndata: {tmp_path / 'rows.txt'}\n"
    )
    found = CliRunner().invoke(main, ["plan", str(tmp_path / "r.yaml")])
    assert found.exit_code == 0, found.output
    assert "note: r: planned as averages until its models are measured" in found.stderr.splitlines()
