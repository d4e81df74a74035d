"""A resident model gives the logits of the checkpoint loaded by transformers, whatever the architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from raymerge.merge_actors.checkpoint.folder import open_checkpoint
from raymerge.merge_actors.errors import MismatchError, RecipeError
from raymerge.stats.evaluation.evaluate import evaluate_checkpoint
from raymerge.stats.evaluation.resident import ResidentModel, load_resident
from raymerge.stats.evaluation.tasks import parse_evaluation

Maker = Callable[..., Any]
IDS = torch.arange(4, 20).reshape(2, 8)


def _logits(module: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module(input_ids=IDS).logits
    return found


@pytest.fixture(scope="module")
def mixtral(tiny_checkpoints: Maker, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two mixtures of experts, whose checkpoints hold a matrix per expert."""
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = MixtralConfig(
            vocab_size=96,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            num_local_experts=3,
        )
        folder = tmp_path_factory.mktemp("mixtral")
        MixtralForCausalLM(config).save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes((tiny_checkpoints("llama").base / name).read_bytes())
        folders.append(folder)
    return folders[0], folders[1]


def test_experts_are_gathered_from_their_matrices(
    mixtral: tuple[Path, Path], texts: Path, evaluation_of: Maker
) -> None:
    evaluation = evaluation_of(kind="loss", validation=texts)
    first, second = (load_file(folder / "model.safetensors") for folder in mixtral)
    assert any(".experts.2." in name for name in first)
    model = ResidentModel(evaluation.tasks, str(mixtral[0]))
    model.bind(first)
    module = model.module(evaluation.tasks[0])
    torch.testing.assert_close(
        _logits(module), _logits(AutoModelForCausalLM.from_pretrained(mixtral[0]).eval())
    )
    experts = sum(tensor.nbytes for name, tensor in first.items() if ".experts." in name)
    assert model.num_copied_bytes == experts  # all others are the parameters themselves
    for name, tensor in first.items():
        tensor.copy_(second[name])
    model.refresh()
    torch.testing.assert_close(
        _logits(module), _logits(AutoModelForCausalLM.from_pretrained(mixtral[1]).eval())
    )


@pytest.mark.parametrize(("architecture", "tied"), [("llama", False), ("llama", True), ("gpt2", True)])
def test_logits_are_those_of_transformers(
    architecture: str, tied: bool, tiny_checkpoints: Maker, texts: Path, evaluation_of: Maker
) -> None:
    family = tiny_checkpoints(architecture, tied=tied)
    evaluation = evaluation_of(kind="loss", validation=texts)
    model = load_resident(open_checkpoint(family.base), evaluation.tasks)
    expected = AutoModelForCausalLM.from_pretrained(family.base).eval()
    assert torch.equal(_logits(model.module(evaluation.tasks[0])), _logits(expected))
    assert model.num_copied_bytes == 0


def test_tasks_with_different_heads_share_the_encoder(
    make_head: Maker, tiny_checkpoints: Maker, texts: Path
) -> None:
    merged = tiny_checkpoints("bert").models[0]
    heads = make_head("BertForSequenceClassification", 3), make_head("BertForSequenceClassification", 5)
    evaluation = parse_evaluation(
        [
            {"name": str(i), "kind": "text_classification", "validation": str(texts), "head": str(head)}
            for i, head in enumerate(heads)
        ]
    )
    tensors = load_file(merged / "model.safetensors")
    model = ResidentModel(evaluation.tasks, str(merged))
    model.bind(tensors)
    name = "bert.encoder.layer.1.output.dense.weight"
    modules = [model.module(task) for task in evaluation.tasks]
    assert {module.get_parameter(name).data_ptr() for module in modules} == {tensors[name].data_ptr()}
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith("bert.")}
    for module, head in zip(modules, heads, strict=True):
        expected = AutoModelForSequenceClassification.from_pretrained(head).eval()
        expected.load_state_dict(encoder, strict=False)
        assert torch.equal(_logits(module), _logits(expected))
    assert modules[1].config.num_labels == 5


def test_a_larger_vocabulary_of_the_merge_fits_a_head(make_head: Maker, tiny_checkpoints: Maker, texts: Path,
                                                      evaluation_of: Maker, tmp_path: Path) -> None:  # fmt: skip
    merged = tmp_path / "merged"
    base = tiny_checkpoints("bert").base
    grown = AutoModelForSequenceClassification.from_pretrained(base)
    grown.resize_token_embeddings(100)
    grown.save_pretrained(merged)
    head = make_head("BertForSequenceClassification")
    evaluation = evaluation_of(kind="text_classification", validation=texts, head=head)
    model = load_resident(open_checkpoint(merged), evaluation.tasks)
    assert model.module(evaluation.tasks[0]).get_input_embeddings().weight.shape == (100, 32)


def test_evaluation_dtype_and_default(tiny_checkpoints: Maker, texts: Path, evaluation_of: Maker) -> None:
    folder = tiny_checkpoints("llama", dtype="bfloat16").base
    evaluation = evaluation_of(kind="loss", validation=texts)
    checkpoint = open_checkpoint(folder)
    model = load_resident(checkpoint, evaluation.tasks)
    module = model.module(evaluation.tasks[0])
    assert model.dtype == torch.bfloat16 == module.get_input_embeddings().weight.dtype
    rotary = next(buffer for name, buffer in module.named_buffers() if "inv_freq" in name)
    assert rotary.dtype == torch.float32  # computed, not stored: as transformers keeps it
    wide = parse_evaluation({"dtype": "float32", "tasks": [{"kind": "loss", "validation": str(texts)}]})
    metrics, scores = evaluate_checkpoint(checkpoint, wide)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model = load_resident(checkpoint, wide.tasks, dtype=torch.float32)
    assert torch.equal(_logits(model.module(wide.tasks[0])), _logits(expected))
    assert set(metrics) == {"loss.loss", "loss.perplexity"}
    assert len(scores["loss"]["nll"]) > 20


def test_tensors_that_do_not_fit_are_told_before_there_are_any(
    tiny_checkpoints: Maker, texts: Path, evaluation_of: Maker
) -> None:
    folder = tiny_checkpoints("llama").base
    model = ResidentModel(evaluation_of(kind="loss", validation=texts).tasks, str(folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    model.check(shapes)
    with pytest.raises(
        RecipeError, match=r"no tensor for the parameter 'model\.norm\.weight' of LlamaForCausalLM"
    ):
        model.check({name: shape for name, shape in shapes.items() if name != "model.norm.weight"})
    with pytest.raises(
        MismatchError, match=r"'model.norm.weight' .* the shape \(33,\), but .* wants \(32,\)"
    ):
        model.check(shapes | {"model.norm.weight": (33,)})
