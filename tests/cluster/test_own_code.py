"""Code of a checkpoint is refused where it would be needed, and run, said and recorded with the flag."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from custom_code import FILES, write_custom_model
from safetensors.torch import load_file

import raymerge
from raymerge.cli.main import main
from raymerge.cluster.manifest import MANIFEST_NAME
from raymerge.cluster.merge import merge
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.statistics import collect_statistics
from raymerge.cluster.statistics_options import StatisticsOptions
from raymerge.merge_actors.errors import CheckpointError
from raymerge.stats.data_rows import DataSpec
from raymerge.stats.own_code import FLAG
from raymerge.stats.statistics_file import MANIFEST, open_statistics


@pytest.fixture(scope="module", autouse=True)
def copied_code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Where transformers copies code to before it runs it: one place, for it is a package of this process."""
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    # Nobody is asked: an answer on the terminal would be no option.
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked on the terminal"))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": f"word{i} word{i * 7 % 90} word3"}) + "\n" for i in range(40))
    )
    return path


@pytest.fixture
def witness(tmp_path: Path) -> Path:
    return tmp_path / "witness"


@pytest.fixture
def models(tmp_path: Path, witness: Path, tiny_checkpoints: Callable[..., Any]) -> list[Path]:
    base = tiny_checkpoints("llama").base
    return [
        write_custom_model(tmp_path / f"custom{number}", base, seed=number, witness=witness)
        for number in range(2)
    ]


def refusal(output: Any, model: Path | None = None) -> None:
    """Check the sentence of a command that was not trusted."""
    assert output.exit_code == 1, output.output
    assert f"({FILES}, named by auto_map)" in output.stderr and f"give {FLAG}" in output.stderr
    if model is not None:
        assert str(model) in output.stderr


def test_stats_needs_the_flag_prints_what_it_runs_and_records_it(
    models: list[Path], texts: Path, witness: Path, tmp_path: Path
) -> None:
    command = ["stats", str(models[0]), "--data", str(texts), "--out", str(tmp_path / "s"), "--in-process"]
    refusal(CliRunner().invoke(main, command), models[0])
    assert not witness.exists() and not (tmp_path / "s").exists()
    result = CliRunner().invoke(main, [*command, FLAG])
    assert result.exit_code == 0, result.output
    assert f"code of the checkpoint {models[0]} is run ({FLAG}): {FILES}" in result.stderr
    assert witness.exists()
    manifest = json.loads((tmp_path / "s" / MANIFEST).read_text())
    assert sorted(manifest["code"]) == FILES.split(", ")
    assert manifest["coverage"]["uncovered"] == []
    _check_grams(models[0], texts, tmp_path / "s")


def _check_grams(model: Path, texts: Path, out: Path) -> None:
    """Compare the Gram of the first layer with inputs computed by hand."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    weights = load_file(model / "model.safetensors")
    rows = [tokenizer(json.loads(line)["text"])["input_ids"] for line in texts.read_text().splitlines()]
    inputs = weights["embed.weight"][torch.tensor([token for row in rows for token in row])].double()
    module = open_statistics(out).modules["layers.0.up.weight"]
    packed = load_file(module.tensor.file)[module.key]
    gram = inputs.T @ inputs
    upper = gram[tuple(torch.triu_indices(16, 16))]
    torch.testing.assert_close(packed.double(), upper, rtol=1e-5, atol=1e-4)


def test_other_code_means_other_statistics(models: list[Path], texts: Path, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "regmean",
        "models": [{"model": str(model), "data": str(texts)} for model in models],
        "parameters": {"alpha": 0.5},
    }
    raymerge.merge(recipe, tmp_path / "a", in_process=True, trust_remote_code=True)
    code = json.loads((tmp_path / "a" / MANIFEST_NAME).read_text())["statistics"][0]["code"]
    path = models[0] / "modeling_two_layers.py"
    path.write_text(path.read_text().replace("relu", "tanh"))
    raymerge.merge(recipe, tmp_path / "b", in_process=True, trust_remote_code=True)
    manifest = json.loads((tmp_path / "b" / MANIFEST_NAME).read_text())
    assert manifest["statistics"][0]["code"] != code
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert not torch.equal(one["layers.0.down.weight"], other["layers.0.down.weight"])


@pytest.mark.parametrize("method", ["regmean", "regmean_plus", "fisher"])
def test_a_merge_needs_the_flag_to_measure_and_not_to_merge(
    method: str, models: list[Path], texts: Path, witness: Path, tmp_path: Path
) -> None:
    data = {"path": str(texts)} | ({"estimator": "empirical"} if method == "fisher" else {})
    recipe = {
        "merge_method": method,
        "models": [{"model": str(model), "data": data} for model in models],
        "parameters": {} if method == "fisher" else {"alpha": 0.5},
    }
    plain = {
        "merge_method": "linear",
        "models": [{"model": str(m), "parameters": {"weight": 1}} for m in models],
    }
    raymerge.merge(plain, tmp_path / "plain", in_process=True)
    with pytest.raises(CheckpointError, match=f"give {FLAG}"):
        raymerge.merge(recipe, tmp_path / "out", in_process=True)
    assert not witness.exists()
    said: list[str] = []
    options = MergeOptions(in_process=True, trust_remote_code=True)
    merge([recipe], tmp_path / "out", options, on_remark=said.append)
    assert witness.exists()
    for model in models:
        assert sum(f"code of the checkpoint {model} is run" in line for line in said) == 1
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    rows = manifest["statistics"] if method != "regmean_plus" else manifest["run"]["measured"]
    assert [sorted(row["code"]) for row in rows] == [FILES.split(", ")] * 2


def test_a_recipe_cannot_give_the_leave(
    models: list[Path], texts: Path, witness: Path, tmp_path: Path
) -> None:
    recipe = {
        "merge_method": "regmean",
        "models": [{"model": str(model), "data": str(texts)} for model in models],
        "parameters": {"alpha": 0.5},
        "trust_remote_code": True,
    }
    with pytest.raises(CheckpointError, match=f"give {FLAG}"):
        raymerge.merge(recipe, tmp_path / "out", in_process=True)
    assert not witness.exists()


def test_evaluate_and_grid_need_the_flag(
    models: list[Path], texts: Path, witness: Path, tmp_path: Path
) -> None:
    tasks = tmp_path / "grid.yaml"
    tasks.write_text(
        json.dumps(
            {
                "merge_method": "linear",
                "models": [
                    {"model": str(m), "parameters": {"weight": f"$w{i}"}} for i, m in enumerate(models)
                ],
                "grid": {"w0": [0.25, 1.0], "w1": [1.0]},
                "evaluate": {"tasks": [{"name": "loss", "kind": "loss", "validation": str(texts)}]},
            }
        )
    )
    command = ["evaluate", str(models[0]), "--tasks", str(tasks)]
    refusal(CliRunner().invoke(main, command), models[0])
    grid = ["grid", str(tasks), str(tmp_path / "out"), "--in-process"]
    refusal(CliRunner().invoke(main, grid))
    assert not witness.exists()
    trusted = CliRunner().invoke(main, [*command, FLAG])
    assert trusted.exit_code == 0, trusted.output
    assert f"code of the checkpoint {models[0]} is run" in trusted.stderr
    result = CliRunner().invoke(main, [*grid, FLAG])
    assert result.exit_code == 0, result.output
    assert "is run (--trust-remote-code)" in result.stderr
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["evaluate"]["tasks"][0]["trust_remote_code"] is True
    task = {"name": "loss", "kind": "loss", "validation": str(texts), "trust_remote_code": True}
    tasks.write_text(json.dumps({"tasks": [task]}))
    refused = CliRunner().invoke(main, command)
    assert refused.exit_code == 1 and "trust_remote_code: unknown key" in refused.stderr


def test_verify_loads_with_the_flag_only(models: list[Path], witness: Path, tmp_path: Path) -> None:
    plain = {
        "merge_method": "linear",
        "models": [{"model": str(m), "parameters": {"weight": 1}} for m in models],
    }
    raymerge.merge(plain, tmp_path / "out", in_process=True)
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out")])
    assert result.exit_code == 0 and f"{FLAG} loads it" in result.stderr and not witness.exists()
    result = CliRunner().invoke(main, ["verify", str(tmp_path / "out"), FLAG])
    assert result.exit_code == 0, result.output
    assert "loaded as TwoLayersForCausalLM" in result.stdout and witness.exists()
    assert f"code of the checkpoint {tmp_path / 'out'} is run ({FLAG}): {FILES}" in result.stderr


def test_code_that_is_not_needed_is_not_run(
    texts: Path, witness: Path, tmp_path: Path, tiny_checkpoints: Callable[..., Any]
) -> None:
    """A Llama that names code too is a Llama, trusted or not."""
    folder = Path(shutil.copytree(tiny_checkpoints("llama").models[0], tmp_path / "llama"))
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": named}))
    (folder / "evil.py").write_text(f"open({str(witness)!r}, 'w')")
    for trusts in (False, True):
        options = StatisticsOptions(
            kind="gram",
            data=DataSpec(source=str(texts)),
            in_process=True,
            workers=1,
            trust_remote_code=trusts,
        )
        collect_statistics(str(folder), tmp_path / f"s{trusts}", options)
    assert not witness.exists()


def test_submit_passes_the_flag_on() -> None:
    from raymerge.cli.submit import _given, _words

    command = main.get_command(None, "merge")  # type: ignore[attr-defined]
    with command.make_context("merge", ["r.yaml", "out", FLAG], resilient_parsing=True) as checked:
        given = _given(checked, ["r.yaml", "out", FLAG])
        assert (FLAG, False) in list(_words(command, given))
