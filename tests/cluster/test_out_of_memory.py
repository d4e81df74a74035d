"""Ray's own memory monitor kills workers: a message, a sentence at last, and nothing that stands still."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

#: Above this share of the machine's memory Ray kills workers; there is always more in use.
_MONITOR = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}


@pytest.mark.slow
@pytest.mark.ray
def test_workers_that_ray_kills_for_their_memory_end_a_run_with_one_sentence(
    tiny_checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    family = tiny_checkpoints("llama")
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in family.models]
    recipe = {"merge_method": "linear", "models": models}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    command = [
        "merge",
        str(tmp_path / "recipe.yaml"),
        str(tmp_path / "out"),
        "--workers",
        "1",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "raymerge", *command],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, **_MONITOR},
    )
    assert done.returncode == 1 and done.stdout == ""
    assert "a worker ran out of memory: its successor holds less of the inputs at once" in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("Error: workers died too often, the last one with: worker ")
    assert "low on memory" in last and last.endswith("use a smaller --slice-mib if memory ran out")
    assert sorted(os.listdir(tmp_path)) == ["recipe.yaml"]
