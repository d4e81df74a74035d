"""Statistics of a model with an adapter are those of the merged model, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import raymerge
from raymerge.cluster.statistics import collect_statistics
from raymerge.cluster.statistics_options import StatisticsOptions
from raymerge.merge_actors.checkpoint.adapted import open_model
from raymerge.merge_actors.errors import MismatchError
from raymerge.stats.data_rows import DataSpec
from raymerge.stats.measure_job import MeasureJob
from raymerge.stats.measured_model import MeasuredModel
from raymerge.stats.statistics_file import open_statistics

RANK = 3
#: Modules of each tiny architecture that the adapter changes, and those that it replaces.
MODULES = {
    "llama": (["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"], ["model.norm"]),
    "gpt2": (["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"], ["transformer.ln_f"]),
}


def write_adapter(folder: Path, base: Path, low_rank: list[str], replaced: list[str], seed: int = 0) -> Path:
    """Write an adapter as PEFT saves it."""
    checkpoint = open_model(str(base))
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    is_conv1d = checkpoint.config["model_type"] == "gpt2"
    for module in low_rank:
        shape = checkpoint.tensors[_own_name(checkpoint, f"{module}.weight")].shape
        num_out, num_in = reversed(shape) if is_conv1d else shape
        prefix = f"base_model.model.{module}"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, num_in, generator=generator)
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(num_out, RANK, generator=generator) * 0.1
    for module in replaced:
        shape = checkpoint.tensors[_own_name(checkpoint, f"{module}.weight")].shape
        tensors[f"base_model.model.{module}.weight"] = 1 + torch.rand(shape, generator=generator)
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 6, "fan_in_fan_out": is_conv1d}
    (folder / "adapter_config.json").write_text(json.dumps(config | {"modules_to_save": replaced}))
    return folder


def _own_name(checkpoint: Any, name: str) -> str:
    return name if name in checkpoint.tensors else name.partition(".")[2]


@pytest.fixture(params=MODULES)
def pair(
    request: pytest.FixtureRequest, tmp_path: Path, tiny_checkpoints: Callable[..., Any]
) -> tuple[Path, Path]:
    base = tiny_checkpoints(request.param).models[0]
    return base, write_adapter(tmp_path / "lora", base, *MODULES[request.param])


def merged_by_us(base: Path, adapter: Path, out: Path) -> Path:
    """Write the model that a merge makes of the pair."""
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{base}+{adapter}"}], "dtype": "float32"}
    raymerge.merge(recipe, out, in_process=True)
    return out


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_model_that_runs_has_the_bits_of_the_merge(
    pair: tuple[Path, Path], is_streamed: bool, make_job: Callable[..., MeasureJob], tmp_path: Path
) -> None:
    base, adapter = pair
    merged = load_file(merged_by_us(base, adapter, tmp_path / "merged") / "model.safetensors")
    measured = MeasuredModel(make_job(base, adapter=str(adapter)), lambda count: None)
    measured.load(is_streamed=is_streamed)
    num_changed = 0
    for block in ("", *measured.maps.blocks):
        if measured.loader is not None:
            measured.loader.load(block)
        for name, parameter in measured.model.named_parameters():
            if parameter.is_meta or (block and not name.startswith(block + ".")):
                continue
            key = name if name in merged else name.partition(".")[2]
            if key in merged:
                assert torch.equal(parameter, merged[key]), name
                num_changed += key in measured.checkpoint.updates
        if measured.loader is not None and block:
            measured.loader.release(block)
    assert num_changed >= 2


@pytest.mark.parametrize("kind", ["gram", "fisher"])
def test_statistics_are_those_of_the_merged_model(
    kind: str, pair: tuple[Path, Path], texts_file: Path, tmp_path: Path
) -> None:
    base, adapter = pair
    merged = merged_by_us(base, adapter, tmp_path / "merged")
    _copy_tokenizer(base, merged)
    of_pair = _measure(f"{base}+{adapter}", tmp_path / "pair", texts_file, kind)
    of_merged = _measure(str(merged), tmp_path / "one", texts_file, kind)
    of_base = _measure(str(base), tmp_path / "base", texts_file, kind)
    assert of_pair.keys() == of_merged.keys()
    for name, tensor in of_merged.items():
        assert torch.allclose(of_pair[name], tensor, rtol=1e-5, atol=1e-6 * tensor.abs().max().item()), name
    assert any(not torch.allclose(of_pair[name], of_base[name], rtol=1e-2) for name in of_base)


def test_statistics_belong_to_base_and_adapter_together(
    pair: tuple[Path, Path], texts_file: Path, tmp_path: Path
) -> None:
    base, adapter = pair
    _measure(f"{base}+{adapter}", tmp_path / "pair", texts_file, "gram")
    statistics = open_statistics(tmp_path / "pair")
    assert statistics.manifest["model"]["path"] == f"{base}+{adapter}"
    own = open_model(str(base), adapter=str(adapter))
    statistics.check_against(own)
    with pytest.raises(MismatchError, match="were measured on"):
        statistics.check_against(open_model(str(base)))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 7}))
    rescaled = open_model(str(base), adapter=str(adapter))
    assert rescaled.fingerprint != own.fingerprint
    with pytest.raises(MismatchError, match="were measured on"):
        statistics.check_against(rescaled)


@pytest.mark.parametrize("method", ["regmean", "regmean_plus", "fisher"])
def test_a_recipe_measures_adapters_and_merges_as_with_merged_models(
    method: str, pair: tuple[Path, Path], texts_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    base, adapter = pair
    architecture = (
        "gpt2" if json.loads((base / "config.json").read_text())["model_type"] == "gpt2" else "llama"
    )
    second = write_adapter(tmp_path / "lora2", base, *MODULES[architecture], seed=1)
    data = {"path": str(texts_file), "batch_tokens": 64}
    data |= {"estimator": "empirical"} if method == "fisher" else {}
    parameters = {} if method == "fisher" else {"alpha": 0.5}
    results = []
    for number, models in enumerate(
        (
            [f"{base}+{adapter}", f"{base}+{second}"],
            [
                str(merged_by_us(base, each, tmp_path / each.name.replace("lora", "m")))
                for each in (adapter, second)
            ],
        )
    ):
        for model in models if number else ():
            _copy_tokenizer(base, Path(model))
        recipe = {
            "merge_method": method,
            "models": [{"model": model, "data": data} for model in models],
            "parameters": parameters,
            "dtype": "float32",
        }
        raymerge.merge(recipe, tmp_path / f"out{number}", in_process=True)
        results.append(load_file(tmp_path / f"out{number}" / "model.safetensors"))
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[1].items():
        scale = tensor.abs().max().item()
        torch.testing.assert_close(results[0][name], tensor, rtol=0, atol=2e-4 * scale, msg=name)


def test_an_adapter_that_resizes_the_embedding_is_refused(
    tmp_path: Path, tiny_checkpoints: Callable[..., Any]
) -> None:
    base = tiny_checkpoints("llama").models[0]
    rows, columns = open_model(str(base)).tensors["model.embed_tokens.weight"].shape
    adapter = write_adapter(tmp_path / "lora", base, *MODULES["llama"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.model.embed_tokens.weight"] = torch.zeros(rows + 1, columns)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(MismatchError, match=r"resizes 'model.embed_tokens.weight' .* merge the adapter"):
        open_model(str(base), adapter=str(adapter))


def _copy_tokenizer(base: Path, folder: Path) -> None:
    for path in base.iterdir():
        if "token" in path.name and not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())


def _measure(model: str, out: Path, texts: Path, kind: Any) -> dict[str, torch.Tensor]:
    data = DataSpec(source=str(texts), batch_tokens=64)
    options = StatisticsOptions(kind=kind, data=data, estimator="empirical", in_process=True, workers=1)
    collect_statistics(model, out, options)
    statistics = open_statistics(out)
    files = {file: load_file(out / file) for file in statistics.manifest["files"]}
    joined = {key: tensor for file in files.values() for key, tensor in file.items()}
    return {name: joined[module.key] for name, module in statistics.modules.items()}
