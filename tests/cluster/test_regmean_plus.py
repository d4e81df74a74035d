"""RegMean++ against an implementation that keeps whole models in memory, and through workers, kills and resumes."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import raymerge
from raymerge.cluster.manifest import MANIFEST_NAME
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.plan_report import plan_report
from raymerge.cluster.regmean_plus_group import HostedGroup
from raymerge.cluster.verify import verify
from raymerge.merge_actors.errors import MismatchError, OutputError, RecipeError
from raymerge.stats.regmean_plus_worker import RegMeanPlusWorker

NUM_ROWS = 20
ALPHA = 0.8
WEIGHTS = (1.0, 2.0)
#: Beginnings of parameter names, stage by stage; what is left is the last stage.
STAGES = {
    "bert": ["bert.embeddings.", "bert.encoder.layer.0.", "bert.encoder.layer.1."],
    "llama": ["model.embed_tokens.", "model.layers.0.", "model.layers.1."],
    "gpt2": ["transformer.wte.|transformer.wpe.", "transformer.h.0.", "transformer.h.1."],
    # Its relative positions are read as a table by every layer, and are no part of any.
    "deberta": [
        "deberta.embeddings.|deberta.encoder.rel_embeddings.|deberta.encoder.LayerNorm.",
        "deberta.encoder.layer.0.",
        "deberta.encoder.layer.1.",
    ],
    "t5": [
        "shared.",
        "encoder.block.0.",
        "encoder.block.1.",
        "encoder.final_layer_norm.",
        "decoder.block.0.",
        "decoder.block.1.",
    ],
}


def _classes() -> dict[str, Any]:
    from transformers import (
        BertForMaskedLM,
        DebertaV2ForSequenceClassification,
        GPT2LMHeadModel,
        LlamaForCausalLM,
        T5ForConditionalGeneration,
    )

    return {
        "deberta": DebertaV2ForSequenceClassification,
        "bert": BertForMaskedLM,
        "llama": LlamaForCausalLM,
        "gpt2": GPT2LMHeadModel,
        "t5": T5ForConditionalGeneration,
    }


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Write the data of two candidates, of other words each."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(5)
    paths = []
    for number in range(2):
        words = [f"word{rng.randrange(46) + 46 * number}" for _ in range(500)]
        lines = [" ".join(rng.choices(words, k=rng.randrange(2, 16))) for _ in range(NUM_ROWS)]
        path = folder / f"{number}.jsonl"
        path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        paths.append(path)
    return paths


@pytest.fixture(scope="module")
def make_candidates(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoints: Callable[..., Any]
) -> Callable[[str], list[Path]]:
    """Return a maker of two models so far apart that what feeds a layer matters."""
    from transformers import AutoTokenizer

    made: dict[str, list[Path]] = {}

    def make(architecture: str) -> list[Path]:
        if architecture not in made:
            base = tiny_checkpoints("bert" if architecture == "deberta" else architecture).base
            folder = tmp_path_factory.mktemp(f"plus-{architecture}")
            made[architecture] = [folder / "first", folder / "second"]
            for seed, path in enumerate(made[architecture]):
                model = (
                    _deberta()
                    if architecture == "deberta"
                    else _classes()[architecture].from_pretrained(base)
                )
                generator = torch.Generator().manual_seed(seed)
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
                model.save_pretrained(path)
                AutoTokenizer.from_pretrained(base).save_pretrained(path)
        return made[architecture]

    return make


def _deberta() -> Any:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    config = DebertaV2Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        pos_att_type=["p2c", "c2p"],
    )
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return DebertaV2ForSequenceClassification(config)


def _recipe(models: Sequence[Path], texts: Sequence[Path], **more: Any) -> dict[str, Any]:
    return {
        "name": "plus",
        "merge_method": "regmean_plus",
        "models": [
            {
                "model": str(model),
                "data": {"path": str(path), "batch_tokens": 64},
                "parameters": {"weight": weight},
            }
            for model, path, weight in zip(models, texts, WEIGHTS, strict=True)
        ],
        "parameters": {"alpha": ALPHA},
        **more,
    }


def _merged(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


# The reference: whole models in float64, one example at a time, from the tokens through everything, hooks.


def _inputs(model: Any, tokenizer: Any, line: str) -> dict[str, torch.Tensor]:
    ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
    inputs = {"input_ids": ids}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], dim=1)
    return inputs


def _grams(model: Any, names: set[str], tokenizer: Any, path: Path) -> dict[str, torch.Tensor]:
    """Return G / rows of the linear maps among some parameters."""
    from transformers.pytorch_utils import Conv1D

    rows: dict[str, list[torch.Tensor]] = {}
    handles = []
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if weight in names and isinstance(module, torch.nn.Linear | Conv1D):
            handles.append(
                module.register_forward_pre_hook(
                    lambda _, arguments, weight=weight: rows.setdefault(weight, []).append(
                        arguments[0].reshape(-1, arguments[0].shape[-1])
                    )
                )
            )
    with torch.no_grad():
        for line in path.read_text().splitlines():
            model(**_inputs(model, tokenizer, line))
    for handle in handles:
        handle.remove()
    inputs = {name: torch.cat(each) for name, each in rows.items()}
    return {name: x.T @ x / len(x) for name, x in inputs.items()}


def _reference(architecture: str, folders: Sequence[Path], texts: Sequence[Path]) -> dict[str, torch.Tensor]:
    from transformers import AutoTokenizer
    from transformers.pytorch_utils import Conv1D

    tokenizer = AutoTokenizer.from_pretrained(folders[0])
    models = [_classes()[architecture].from_pretrained(folder).double().eval() for folder in folders]
    parameters = [dict(model.named_parameters()) for model in models]
    conv1d = {f"{n}.weight" for n, module in models[0].named_modules() if isinstance(module, Conv1D)}
    merged: dict[str, torch.Tensor] = {}
    for beginnings in [*STAGES[architecture], ""]:
        names = {
            name
            for name in parameters[0]
            if name not in merged and name.startswith(tuple(beginnings.split("|")))
        }
        grams = []
        for model, path in zip(models, texts, strict=True):
            hybrid = copy.deepcopy(model)  # merged so far, and from here on the candidate
            hybrid.load_state_dict(merged, strict=False)
            hybrid.tie_weights()
            grams.append(_grams(hybrid, names, tokenizer, path))
        for name in names:
            weights = [each[name].data for each in parameters]
            if name not in grams[0]:
                merged[name] = sum(
                    (w * x for w, x in zip(WEIGHTS, weights, strict=True)), torch.tensor(0.0)
                ) / sum(WEIGHTS)
                continue
            merged[name] = _solve(weights, [each[name] for each in grams], name in conv1d)
    return merged


def _solve(
    weights: Sequence[torch.Tensor], grams: Sequence[torch.Tensor], is_transposed: bool
) -> torch.Tensor:
    left: Any = 0
    right: Any = 0
    for weight, gram, factor in zip(weights, grams, WEIGHTS, strict=True):
        shrunk = factor * (ALPHA * gram + (1 - ALPHA) * gram.diagonal().diag())
        left, right = left + shrunk, right + shrunk @ (weight if is_transposed else weight.T)
    found = torch.linalg.solve(left, right)
    return found if is_transposed else found.T


def _assert_close(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    missing = [name for name in expected if name not in found]
    assert not [name for name in missing if "decoder.weight" not in name and "decoder.bias" not in name]
    for name, tensor in found.items():
        # Rounded once a layer to float32, whose errors the next layers carry on.
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize("architecture", ["bert", "deberta", "llama", "gpt2", "t5"])
def test_it_equals_an_implementation_that_keeps_everything_in_memory(
    architecture: str, make_candidates: Callable[[str], list[Path]], texts: list[Path], tmp_path: Path
) -> None:
    models = make_candidates(architecture)
    raymerge.merge(_recipe(models, texts), tmp_path / "plus", in_process=True, workers=1)
    found = _merged(tmp_path / "plus")
    _assert_close(found, _reference(architecture, models, texts))
    raymerge.merge(
        {**_recipe(models, texts), "merge_method": "regmean"}, tmp_path / "plain", in_process=True, workers=1
    )
    plain = _merged(tmp_path / "plain")
    solved = {
        name: row["rank"]
        for name, row in json.loads((tmp_path / "plus" / MANIFEST_NAME).read_text())["tensors"].items()
        if "rank" in row
    }
    assert len(solved) == {"bert": 13, "deberta": 14, "llama": 15, "gpt2": 8, "t5": 32}[architecture]
    # What feeds it differs from RegMean everywhere but in the first place.
    far = [
        name for name in solved if (found[name] - plain[name]).abs().max() > 1e-3 * plain[name].abs().max()
    ]
    assert len(far) > 0.8 * len(solved)
    assert verify(tmp_path / "plus")
    loaded = _classes()[architecture].from_pretrained(tmp_path / "plus")
    assert torch.equal(loaded.state_dict()[next(iter(solved))], found[next(iter(solved))])


def test_candidates_that_are_copies_give_that_model(
    make_candidates: Callable[[str], list[Path]], texts: list[Path], tmp_path: Path
) -> None:
    model = make_candidates("llama")[0]
    recipe = _recipe([model, model], texts)
    for each in recipe["models"]:
        each["parameters"]["weight"] = 1
    raymerge.merge(recipe, tmp_path / "out", in_process=True, workers=2)
    found, own = _merged(tmp_path / "out"), _merged(model)
    assert all(torch.equal(found[name], own[name]) for name in own)


@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_bytes_do_not_depend_on_the_number_of_workers(
    architecture: str, make_candidates: Callable[[str], list[Path]], texts: list[Path], tmp_path: Path
) -> None:
    models = make_candidates(architecture)
    for workers in (1, 2, 5):
        out = tmp_path / str(workers)
        raymerge.merge(_recipe(models, texts), out, in_process=True, workers=workers)
        assert (out / "model.safetensors").read_bytes() == (tmp_path / "1" / "model.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "5"]


def test_a_failed_run_goes_on_with_the_layer_that_was_under_way(
    make_candidates: Callable[[str], list[Path]],
    texts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = _recipe(make_candidates("llama"), texts)
    raymerge.merge(recipe, tmp_path / "expected", in_process=True, workers=2)
    measure = RegMeanPlusWorker.measure
    seen: list[int] = []

    def fail_in_last_layer(self: RegMeanPlusWorker, stage: Any, work: Any) -> Any:
        seen.append(stage.number)
        if stage.number == 2:
            raise OutputError("the disk is full")
        return measure(self, stage, work)

    def count(self: RegMeanPlusWorker, stage: Any, work: Any) -> Any:
        seen.append(stage.number)
        return measure(self, stage, work)

    monkeypatch.setattr(RegMeanPlusWorker, "measure", fail_in_last_layer)
    with pytest.raises(OutputError, match="the disk is full"):
        raymerge.merge(recipe, tmp_path / "out", in_process=True, workers=2)
    assert not (tmp_path / "out").exists() and set(seen) == {0, 1, 2}
    seen.clear()
    monkeypatch.setattr(RegMeanPlusWorker, "measure", count)
    with pytest.raises(OutputError, match=r"an unfinished run .* --resume"):
        raymerge.merge(recipe, tmp_path / "out", in_process=True, workers=2)
    result = raymerge.merge(recipe, tmp_path / "out", in_process=True, workers=1, resume=True)
    assert seen == [2, 2, 3, 3] and result.num_resumed > 0
    assert _same_bytes(tmp_path, "out", "expected")
    assert verify(tmp_path / "out")


def _same_bytes(folder: Path, *names: str) -> bool:
    one, other = ((folder / name / "model.safetensors").read_bytes() for name in names)
    return one == other


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_or_stopped_repeats_the_layer_that_was_under_way(
    ray_session: None,
    make_candidates: Callable[[str], list[Path]],
    texts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: signal.Signals,
) -> None:
    monkeypatch.setattr("raymerge.cluster.signs_of_life.SILENT_SECONDS", 3.0)
    recipe = _recipe(make_candidates("llama"), texts)
    raymerge.merge(recipe, tmp_path / "expected", in_process=True, workers=1)
    call = HostedGroup.call
    measured: list[int] = []

    def kill_in_second_layer(self: HostedGroup, method: str, arguments: Any, on_tokens: Any) -> Any:
        if method == "measure":
            measured.append(arguments[0][0].number)
            if measured.count(2) == 1 and measured[-1] == 2:
                os.kill(self.pids[1], how)
        return call(self, method, arguments, on_tokens)

    monkeypatch.setattr(HostedGroup, "call", kill_in_second_layer)
    result = raymerge.merge(recipe, tmp_path / "out", workers=2)
    assert measured == [0, 1, 2, 2, 3]
    assert any("layer 2 of 2 starts again" in line for line in result.remarks)
    assert _same_bytes(tmp_path, "out", "expected")


def test_other_batches_are_tried_when_a_mask_cannot_be_laid(
    make_candidates: Callable[[str], list[Path]],
    texts: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hidden states of earlier layers are then made anew, in the new batches."""
    from raymerge.stats.measure_job import GroupReport
    from raymerge.stats.regmean_plus_stages import StageReport

    recipe = _recipe(make_candidates("llama"), texts)
    raymerge.merge(recipe, tmp_path / "expected", in_process=True, workers=1)
    measure = RegMeanPlusWorker.measure
    replayed: list[int] = []

    def demand(self: RegMeanPlusWorker, stage: Any, work: Any) -> Any:
        if stage.number == 3 and work.settings.batching == "padded" and work.candidate == 1:
            return StageReport(grams=GroupReport(needs_batching="single"))
        if not work.measures:
            replayed.append(stage.number)
        return measure(self, stage, work)

    monkeypatch.setattr(RegMeanPlusWorker, "measure", demand)
    raymerge.merge(recipe, tmp_path / "out", in_process=True, workers=1)
    assert replayed == [2]
    _assert_close(
        _merged(tmp_path / "out"),
        {name: value.double() for name, value in _merged(tmp_path / "expected").items()},
    )


def test_excluded_tensors_are_averaged_and_feed_what_follows(
    make_candidates: Callable[[str], list[Path]], texts: list[Path], tmp_path: Path
) -> None:
    models = make_candidates("llama")
    recipe = _recipe(models, texts, exclude=["self_attn"])
    raymerge.merge(recipe, tmp_path / "out", in_process=True, workers=2)
    rows = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())["tensors"]
    assert {name.split(".")[3] for name in rows if "rank" not in rows[name] and "_proj" in name} == {
        "self_attn"
    }
    own = [_merged(model) for model in models]
    name = "model.layers.1.self_attn.q_proj.weight"
    mean = (own[0][name] + 2 * own[1][name]) / 3
    torch.testing.assert_close(_merged(tmp_path / "out")[name], mean, rtol=1e-5, atol=1e-6)


def test_heads_of_different_tasks_are_left_out(
    make_candidates: Callable[[str], list[Path]], texts: list[Path], tmp_path: Path
) -> None:
    models = make_candidates("deberta")
    other = tmp_path / "other"
    shutil.copytree(models[1], other)
    weights = _merged(other)
    weights["classifier.weight"] = weights["classifier.weight"][[0, 1, 1]].contiguous()
    weights["classifier.bias"] = weights["classifier.bias"][[0, 1, 1]].contiguous()
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((other / "config.json").read_text())
    config["id2label"] = {str(number): f"label {number}" for number in range(3)}
    config["label2id"] = {name: int(number) for number, name in config["id2label"].items()}
    (other / "config.json").write_text(json.dumps(config))
    pairs = {"same": models, "different": [models[0], other]}
    for name, pair in pairs.items():
        raymerge.merge(_recipe(pair, texts, heads="exclude"), tmp_path / name, in_process=True, workers=1)
    same, different = _merged(tmp_path / "same"), _merged(tmp_path / "different")
    assert same.keys() == different.keys()
    assert not [name for name in same if name.startswith("classifier.")]
    assert all(torch.equal(same[name], different[name]) for name in same)


def test_a_plan_says_what_will_be_solved(
    make_candidates: Callable[[str], list[Path]], texts: list[Path], tmp_path: Path
) -> None:
    recipe = _recipe(make_candidates("bert"), texts)
    report = plan_report([recipe], MergeOptions())
    treatments = [row["treatment"] for row in report["recipes"][0]["tensors"]]
    assert treatments.count("regmean_plus of 2 models") == 13
    result = raymerge.merge(recipe, tmp_path / "out", in_process=True, workers=2)
    manifest = json.loads((tmp_path / "out" / MANIFEST_NAME).read_text())
    measured = manifest["run"]["measured"]
    rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in texts]
    num_tokens = [sum(len(row["text"].split()) for row in each) for each in rows]
    assert [row["num_tokens"] for row in measured] == num_tokens
    assert result.num_tasks == result.totals.num_tasks > 4


def test_a_campaign_runs_it_beside_other_recipes(
    make_candidates: Callable[[str], list[Path]], texts: list[Path], tmp_path: Path
) -> None:
    models = make_candidates("llama")
    mean = {
        "name": "mean",
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": {"weight": 1}} for model in models],
    }
    raymerge.merge([_recipe(models, texts), mean], tmp_path / "all", in_process=True, workers=2)
    raymerge.merge(_recipe(models, texts), tmp_path / "one", in_process=True, workers=2)
    assert (tmp_path / "all" / "mean" / MANIFEST_NAME).exists()
    one, other = (path / "model.safetensors" for path in (tmp_path / "all" / "plus", tmp_path / "one"))
    assert one.read_bytes() == other.read_bytes()


def test_what_it_cannot_do_is_refused(
    make_candidates: Callable[[str], list[Path]],
    tiny_checkpoints: Callable[..., Any],
    texts: list[Path],
    tmp_path: Path,
) -> None:
    models = make_candidates("llama")

    def refusal(kind: type[Exception], recipe: dict[str, Any]) -> str:
        with pytest.raises(kind) as caught:
            raymerge.merge(recipe, tmp_path / "out", in_process=True, workers=1)
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    measured = _recipe(models, texts)
    del measured["models"][0]["data"]
    assert "regmean_plus needs data of" in refusal(RecipeError, measured)
    measured["models"][0]["statistics"] = str(tmp_path)
    assert "none can be measured beforehand" in refusal(RecipeError, measured)
    unlike = _recipe([models[0], tiny_checkpoints("gpt2").base], texts)
    unlike["missing"] = "present"
    assert "must be built alike" in refusal(MismatchError, unlike)
    few = _recipe(models, texts, parameters={"alpha": 1})
    few["data"] = {"samples": 2}
    assert "set alpha below 1" in refusal(RecipeError, few)
    sliced = _recipe(models, texts)
    sources = [{**each, "layer_range": [0, 1]} for each in sliced.pop("models")]
    sliced["slices"] = [{"sources": sources}]
    assert "leave out layer_range" in refusal(RecipeError, sliced)


def test_experts_that_cannot_be_loaded_layer_by_layer_are_refused(
    tiny_checkpoints: Callable[..., Any], texts: list[Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    AutoTokenizer.from_pretrained(tiny_checkpoints("llama").base).save_pretrained(tmp_path / "moe")
    with pytest.raises(RecipeError, match=r"cannot be loaded one by one; merge by regmean"):
        raymerge.merge(_recipe([tmp_path / "moe"] * 2, texts), tmp_path / "out", in_process=True, workers=1)
