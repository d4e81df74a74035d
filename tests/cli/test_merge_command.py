"""raymerge merge: what goes to stdout, what to stderr, and with which exit code."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from safetensors import safe_open

from raymerge.cli.main import main


@pytest.fixture
def recipe(tiny_checkpoints: Callable[..., Any], tmp_path: Path) -> Path:
    """Write a TIES recipe over tiny models."""
    family = tiny_checkpoints("llama", dtype="bfloat16")
    models = [{"model": str(model), "parameters": {"weight": 0.5}} for model in family.models[:2]]
    path = tmp_path / "ties.yaml"
    path.write_text(
        yaml.safe_dump({"merge_method": "ties", "base_model": str(family.base), "models": models})
    )
    return path


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def merge(*arguments: str | Path) -> Result:
    return invoke("merge", *arguments, "--in-process", "--workers", "1", "--device", "cpu")


def test_summary_is_one_line_on_stdout(recipe: Path, tmp_path: Path) -> None:
    found = merge(recipe, tmp_path / "out")
    assert found.exit_code == 0, found.output
    pattern = (
        r"merged into \S+/out in [\d.]+ s: [\d.]+ [KMG]iB read, [\d.]+ [KMG]iB written, [\d.]+ GB/s over all, "
        r"1 worker on cpu\n"
    )
    assert re.fullmatch(pattern, found.stdout), found.stdout
    assert found.stderr == ""


def test_json_is_one_document_on_stdout(recipe: Path, tmp_path: Path) -> None:
    found = merge(recipe, tmp_path / "out", "--json")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    assert result["outputs"] == [str(tmp_path / "out")]
    assert result["num_tasks"] == result["totals"]["num_tasks"] == 1
    assert result["totals"]["read_bytes"] == 3 * result["totals"]["write_bytes"]
    assert (result["device"], result["num_workers"], result["num_resumed"]) == ("cpu", 1, 0)


def test_quiet_says_nothing(recipe: Path, tmp_path: Path) -> None:
    found = merge(recipe, tmp_path / "out", "--quiet")
    assert (found.exit_code, found.stdout, found.stderr) == (0, "", "")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_dry_run_prints_the_plan_and_writes_nothing(recipe: Path, tmp_path: Path) -> None:
    found = merge(recipe, tmp_path / "out", "--dry-run")
    assert found.exit_code == 0, found.output
    assert found.stdout == invoke("plan", recipe).stdout
    assert [path.name for path in tmp_path.iterdir()] == ["ties.yaml"]
    as_json = json.loads(merge(recipe, tmp_path / "out", "--dry-run", "--json").stdout)
    assert as_json["num_tasks"] == 1


def test_warnings_go_to_stderr_and_strict_refuses_them(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text() + "parameters: {lamda: 0.85}\n")
    strict = merge(recipe, tmp_path / "out", "--strict")
    assert strict.exit_code == 1 and strict.stdout == ""
    assert strict.stderr.startswith("Error: ") and "did you mean 'lambda'?" in strict.stderr
    assert not (tmp_path / "out").exists()
    found = merge(recipe, tmp_path / "out", "--json")
    assert found.exit_code == 0
    assert found.stderr.startswith("warning: ") and "did you mean 'lambda'?" in found.stderr
    assert any("lamda" in line for line in json.loads(found.stdout)["remarks"])


def test_several_recipes_have_a_folder_each(recipe: Path, tmp_path: Path) -> None:
    dare = tmp_path / "dare.yaml"
    dare.write_text(recipe.read_text().replace("ties", "dare_linear"))
    found = merge(recipe, dare, tmp_path / "out", "--json")
    assert found.exit_code == 0, found.output
    assert json.loads(found.stdout)["outputs"] == [str(tmp_path / "out" / name) for name in ("ties", "dare")]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["dare", "ties"]


def test_folder_of_recipes_is_a_campaign(recipe: Path, tmp_path: Path) -> None:
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name in ("b.yaml", "a.yml"):
        (folder / name).write_text(recipe.read_text())
    (folder / "notes.txt").write_text("not a recipe")
    found = merge(folder, tmp_path / "out", "--json")
    assert json.loads(found.stdout)["outputs"] == [str(tmp_path / "out" / name) for name in ("a", "b")]
    again = merge(folder, recipe, tmp_path / "ties.yaml", tmp_path / "out2")
    assert again.exit_code == 1 and "two recipes of the campaign are named 'ties'" in again.stderr


def test_options_change_type_shards_and_seed(recipe: Path, tmp_path: Path) -> None:
    flags = ["--dtype", "float16", "--out-shard-size", "20KB", "--seed", "5"]
    found = merge(recipe, tmp_path / "out", *flags)
    assert found.exit_code == 0, found.output
    manifest = json.loads((tmp_path / "out" / "raymerge_manifest.json").read_text())
    assert {row["dtype"] for row in manifest["tensors"].values()} == {"F16"} and manifest["seed"] == 5
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dtype", config.get("torch_dtype")) == "float16"
    with safe_open(files[0], "pt") as file:
        assert all(file.get_slice(name).get_dtype() == "F16" for name in file.keys())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--slice-mib", "0"], "--slice-mib is 0; it must be at least 1"),
        (["--resume", "--overwrite"], "--resume and --overwrite exclude each other"),
        (["--dtype", "int8"], "--dtype is 'int8'; it must be one of bfloat16,"),
        (["--workers", "0"], "--workers is 0; it must be at least 1"),
        (["--out-shard-size", "5 apples"], "shard size '5 apples' is not a size"),
    ],
)
def test_options_out_of_range(recipe: Path, tmp_path: Path, flags: list[str], said: str) -> None:
    found = invoke("merge", recipe, tmp_path / "out", "--in-process", *flags)
    assert found.exit_code == 1 and found.stderr.startswith(f"Error: {said}"), found.output
    assert [path.name for path in tmp_path.iterdir()] == ["ties.yaml"]


def test_cuda_that_is_not_there(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    found = invoke("merge", recipe, tmp_path / "out", "--in-process", "--device", "cuda")
    assert found.exit_code == 1 and "--device cuda: no GPU" in found.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ties.yaml"]


def test_misuse_is_exit_code_2(recipe: Path) -> None:
    for arguments in (["merge"], ["merge", str(recipe)], ["merge", "--no-such-flag"], ["frobnicate"]):
        found = invoke(*arguments)
        assert found.exit_code == 2 and found.stdout == "", arguments


def test_debug_shows_where_an_error_comes_from(tmp_path: Path) -> None:
    found = invoke("--debug", "merge", tmp_path / "none.yaml", tmp_path / "out")
    assert found.exit_code == 1 and type(found.exception).__name__ == "RecipeError"


def test_summary_of_a_resumed_run_says_so(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(
            "raymerge.cluster.merge.write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        found = merge(recipe, tmp_path / "out")
    assert found.exit_code == 130
    assert "go on with the same command and --resume" in found.stderr
    found = merge(recipe, tmp_path / "out", "--resume")
    assert found.exit_code == 0 and "1 of 1 tasks resumed" in found.stdout


def test_example_of_the_help_works(recipe: Path, tmp_path: Path) -> None:
    """The example under `raymerge merge --help`, with its file names put where they exist."""
    text = " ".join(invoke("merge", "--help").stdout.split())
    example = re.search(r"Example: raymerge (merge ties\.yaml dare\.yaml merged/)", text)
    assert example
    (tmp_path / "dare.yaml").write_text(recipe.read_text().replace("ties", "dare_linear"))
    words = example[1].split()
    found = merge(*(tmp_path / word for word in words[1:]))
    assert found.exit_code == 0, found.output
    assert (tmp_path / "merged" / "ties").is_dir() and (tmp_path / "merged" / "dare").is_dir()


def test_help_is_quick_and_loads_neither_torch_nor_ray() -> None:
    code = (
        "import sys, time; started = time.process_time()\n"
        "from raymerge.cli.main import main\n"
        "try: main(['merge', '--help'])\n"
        "except SystemExit: pass\n"
        "loaded = [name for name in ('torch', 'ray', 'transformers', 'numpy') if name in sys.modules]\n"
        "print('LOADED', loaded, time.process_time() - started)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = re.search(r"LOADED (\[.*\]) ([\d.]+)", done.stdout)
    assert found and found[1] == "[]"
    assert float(found[2]) < 0.5


@pytest.mark.ray
def test_merge_through_ray_by_default(ray_session: None, recipe: Path, tmp_path: Path) -> None:
    found = invoke("merge", recipe, tmp_path / "out", "--workers", "1")
    assert found.exit_code == 0, found.output
    assert "1 worker" in found.stdout
