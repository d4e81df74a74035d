"""hf:// against a server that answers like the Hub: read by range through huggingface_hub's own client."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hub_server import SHA, Hub, running_hub
from safetensors.numpy import load_file

import raymerge

TOKEN = "hf_" + "a-token-of-the-tests"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with running_hub() as found:
        yield found


def run(words: list[str], hub: Hub, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run the command; the Hub's address is read once a process."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "hf-home"),
        "RAYMERGE_CACHE": str(tmp_path / "cache"),
        "NO_PROXY": "127.0.0.1",
    }
    command = [sys.executable, "-m", "raymerge", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)


def write_recipe(path: Path, models: list[str]) -> str:
    entries = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": entries, "dtype": "float32"}))
    return str(path)


def test_a_merge_reads_ranges_of_the_hub(
    hub: Hub, tmp_path: Path, tiny_checkpoints: Callable[..., Any]
) -> None:
    family = tiny_checkpoints("llama", sharded=True)
    local = list(family.models[:2])
    hub.repos = {f"org/m{number}": folder for number, folder in enumerate(local)}
    named = ["hf://org/m0", f"hf://org/m1@{SHA}"]
    out = tmp_path / "out"
    recipe = write_recipe(tmp_path / "recipe.yaml", named)
    result = run(["merge", recipe, str(out), "--in-process", "--workers", "1"], hub, tmp_path)
    assert result.returncode == 0, result.stderr
    raymerge.merge(
        write_recipe(tmp_path / "local.yaml", list(map(str, local))), tmp_path / "b", in_process=True
    )
    found, expected = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "b"))
    assert found.keys() == expected.keys()
    assert all((found[name] == tensor).all() for name, tensor in expected.items())
    assert any(name.endswith(".safetensors") and begin > 0 for name, begin, _ in hub.fetched)
    # Two models with files of the same names; a tensor is looked at before it is merged.
    assert max(Counter(hub.fetched).values()) <= 4
    assert set(hub.tokens) == {f"Bearer {TOKEN}"}
    said = result.stdout + result.stderr
    kept = "".join(
        path.read_text(errors="replace") for path in out.iterdir() if path.suffix != ".safetensors"
    )
    assert TOKEN not in said + kept


@pytest.mark.parametrize("model", ["hf://org/absent", "hf://org/m0@no-such-revision"])
def test_what_the_hub_does_not_have_is_one_sentence(
    model: str, hub: Hub, tmp_path: Path, tiny_checkpoints: Callable[..., Any]
) -> None:
    hub.repos = {"org/m0": tiny_checkpoints("llama").models[0]}
    recipe = write_recipe(tmp_path / "recipe.yaml", [model])
    result = run(["merge", recipe, str(tmp_path / "out"), "--in-process"], hub, tmp_path)
    assert result.returncode == 1
    [line] = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert model.partition("@")[0].removeprefix("hf://") in line and "Traceback" not in result.stderr
