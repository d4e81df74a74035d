"""A merge that the kernels can do never imports torch; one that needs it gives torch's threads back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge.cluster.merge import merge
from raymerge.cluster.options import MergeOptions

_MERGE = """
import sys, json
import raymerge
recipe, out = json.loads(sys.argv[1]), sys.argv[2]
raymerge.merge(recipe, out, in_process=True, workers=2, device="cpu")
print("torch" in sys.modules)
"""


def _recipe(family: Any, method: str) -> dict[str, Any]:
    parameters = {"weight": 0.5} | ({} if method == "slerp" else {"density": 0.5})
    return {
        "merge_method": method,
        "base_model": str(family.base),
        "models": [{"model": str(model), "parameters": parameters} for model in family.models],
        "dtype": "bfloat16",
    }


@pytest.mark.parametrize("method", ["dare_linear", "ties"])
def test_a_merge_by_kernels_does_not_import_torch(
    method: str, tiny_checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = json.dumps(_recipe(tiny_checkpoints("llama", dtype="bfloat16"), method))
    command = [sys.executable, "-c", _MERGE, recipe, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


def test_the_callers_number_of_threads_is_restored(
    tiny_checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    recipe = _recipe(tiny_checkpoints("llama"), "della")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        merge([recipe], tmp_path / "out", MergeOptions(in_process=True, workers=2, device="cpu"))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
