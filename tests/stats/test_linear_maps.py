"""Finding linear maps, blocks and the names of their tensors; experts and other architectures end to end."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raymerge.cluster.statistics_entries import combine, gram_entries
from raymerge.merge_actors.checkpoint.folder import open_checkpoint
from raymerge.merge_actors.methods.gram_matrix import unpack_upper
from raymerge.stats.activation_worker import ActivationWorker
from raymerge.stats.layer_groups import LayerGroup
from raymerge.stats.linear_maps import ModelMaps, find_linear_maps
from raymerge.stats.measure_job import GroupReport, MeasureJob, PassSettings
from raymerge.stats.model_loading import load_whole, skeleton

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def _maps(folder: Path) -> ModelMaps:
    checkpoint = open_checkpoint(folder)
    found = find_linear_maps(skeleton(checkpoint), {**checkpoint.tensors, **checkpoint.tied})
    assert found == find_linear_maps(load_whole(checkpoint, "cpu"), {**checkpoint.tensors, **checkpoint.tied})
    return found


def test_a_tied_head_is_an_embedding_and_an_untied_one_a_linear_map(
    tiny_checkpoints: Callable[..., Any],
) -> None:
    tied = _maps(tiny_checkpoints("llama", tied=True).base)
    untied = _maps(tiny_checkpoints("llama").base)
    assert tied.tied == ("lm_head.weight",) and not untied.tied
    assert {each.parameter for each in untied.maps} - {each.parameter for each in tied.maps} == {
        "lm_head.weight"
    }
    assert untied.maps[-1].block is None
    assert [each.block for each in untied.maps[:7]] == [0] * 7


def test_conv1d_is_in_by_out(tiny_checkpoints: Callable[..., Any]) -> None:
    found = {each.parameter: each for each in _maps(tiny_checkpoints("gpt2").base).maps}
    up = found["transformer.h.0.mlp.c_fc.weight"]
    assert (up.kind, up.in_features, up.out_features) == ("conv1d", 32, 128)


def test_an_encoders_blocks_come_before_its_decoders(tiny_checkpoints: Callable[..., Any]) -> None:
    blocks = _maps(tiny_checkpoints("t5").base).blocks
    assert blocks == ("encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1")


def test_a_checkpoint_without_the_models_prefix_is_matched(
    tmp_path: Path, tiny_checkpoints: Callable[..., Any]
) -> None:
    from transformers import BertForMaskedLM

    model = BertForMaskedLM.from_pretrained(tiny_checkpoints("bert").base)
    model.bert.save_pretrained(tmp_path / "bare")
    checkpoint = open_checkpoint(tmp_path / "bare")
    found = find_linear_maps(model, checkpoint.tensors)
    assert found.maps[0].parameter == "bert.encoder.layer.0.attention.self.query.weight"
    assert found.maps[0].tensors == ("encoder.layer.0.attention.self.query.weight",)
    assert found.not_in_checkpoint == ("cls.predictions.transform.dense.weight",)


def _measure(
    job: MeasureJob, batching: Any = None
) -> tuple[dict[str, tuple[torch.Tensor, Any]], GroupReport]:
    worker = ActivationWorker(job)
    description = worker.describe()
    group = LayerGroup(number=0, begin=0, end=len(description.maps.blocks), is_last=True)
    separate: frozenset[str] = frozenset()
    batching = batching or description.batching
    for _ in range(5):
        settings = PassSettings(batching=batching, separate=separate)
        report = worker.accumulate(group, range(description.num_shards), settings)
        if not report.needs_batching and not report.needs_separate:
            break
        batching, separate = report.needs_batching or batching, separate | report.needs_separate
    entries, modules = gram_entries(description, group, combine([report]), 1)
    worker.write(entries, "grams.safetensors", report.num_examples)
    tensors = load_file(Path(job.work_folder) / "grams.safetensors")
    grams = {}
    for name, row in modules.items():
        found = tensors[row["gram"]].reshape(-1, tensors[row["gram"]].shape[-1])
        grams[name] = (
            torch.stack([unpack_upper(each, row["in_features"]) for each in found]),
            row["num_rows"],
        )
    return grams, report


@pytest.fixture
def save_model(tmp_path: Path, tiny_checkpoints: Callable[..., Any]) -> Callable[[Any], Path]:
    """Return a saver of random models with the tiny tokenizer."""

    def save(model: Any) -> Path:
        folder = tmp_path / "random"
        model.eval().save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_checkpoints("bert").base / name, folder)
        return folder

    return save


def _qwen3_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SIZES,
            num_key_value_heads=2,
            head_dim=8,
            moe_intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=2,
        )
    )


def _gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**SIZES, num_key_value_heads=2, head_dim=8, num_local_experts=4))


def _deberta() -> Any:
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    return DebertaV2ForSequenceClassification(
        DebertaV2Config(
            **SIZES,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            max_relative_positions=16,
            position_biased_input=False,
        )
    )


def _albert() -> Any:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    return AlbertForSequenceClassification(
        AlbertConfig(**SIZES, embedding_size=16, max_position_embeddings=64)
    )


@pytest.mark.parametrize("make_model", [_qwen3_moe, _gpt_oss, _deberta, _albert])
def test_batches_do_not_matter_where_rows_are_routed_or_shared(
    make_model: Callable[[], Any], save_model: Callable[[Any], Path], make_job: Callable[..., MeasureJob]
) -> None:
    torch.manual_seed(5)
    folder = save_model(make_model())
    batched, report = _measure(make_job(folder, batch_tokens=100))
    single, _ = _measure(make_job(folder), "single")
    assert batched.keys() == single.keys()
    for name, (gram, num_rows) in batched.items():
        assert num_rows == single[name][1], name
        scale = gram.abs().max().item()
        torch.testing.assert_close(gram, single[name][0], rtol=2e-6, atol=2e-6 * scale)
    assert report.num_examples == 24


def test_experts_kept_apart_have_a_gram_each_that_gate_and_up_share(
    save_model: Callable[[Any], Path], make_job: Callable[..., MeasureJob]
) -> None:
    torch.manual_seed(5)
    grams, report = _measure(make_job(save_model(_qwen3_moe())))
    prefix = "model.layers.0.mlp.experts."
    rows = [grams[f"{prefix}{expert}.gate_proj.weight"][1] for expert in range(4)]
    assert sum(rows) == 2 * report.num_tokens  # each token is sent to two experts
    for expert in range(4):
        gate, up, down = (grams[f"{prefix}{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        assert torch.equal(gate[0], up[0]) and gate[1] == up[1] == down[1]
        assert gate[0].shape == (1, 32, 32) and down[0].shape == (1, 24, 24)


def test_fused_experts_have_a_gram_for_each_in_one_tensor(
    save_model: Callable[[Any], Path], make_job: Callable[..., MeasureJob]
) -> None:
    torch.manual_seed(5)
    folder = save_model(_gpt_oss())
    [gate_up] = [
        each for each in _maps(folder).maps if each.parameter == "model.layers.1.mlp.experts.gate_up_proj"
    ]
    assert (gate_up.kind, gate_up.experts_shape, gate_up.in_features, gate_up.out_features) == (
        "experts",
        "EIO",
        32,
        96,
    )
    grams, report = _measure(make_job(folder))
    gram, rows = grams["model.layers.1.mlp.experts.down_proj"]
    assert gram.shape == (4, 48, 48)
    assert sum(rows) == 4 * report.num_tokens  # its default sends each token to four experts
    assert torch.linalg.matrix_rank(gram[0]) > 1


def test_an_experts_gram_equals_one_from_its_own_rows(
    save_model: Callable[[Any], Path], make_job: Callable[..., MeasureJob], texts_file: Path
) -> None:
    import json

    from transformers import AutoTokenizer

    torch.manual_seed(5)
    folder = save_model(_qwen3_moe())
    grams, _ = _measure(make_job(folder))
    model = load_whole(open_checkpoint(folder), "cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = torch.zeros(4, 32, 32, dtype=torch.float64)

    def hook(module: Any, arguments: Any) -> None:
        hidden, chosen = arguments[0].double(), arguments[1]
        for expert in range(4):
            rows = hidden[(chosen == expert).any(dim=1)]
            expected[expert] += rows.T @ rows

    model.model.layers[1].mlp.experts.register_forward_pre_hook(hook)
    with torch.no_grad():
        for line in texts_file.read_text().splitlines():
            model(torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]]))
    for expert in range(4):
        found = grams[f"model.layers.1.mlp.experts.{expert}.up_proj.weight"][0][0].double()
        scale = expected[expert].diagonal().max().item()
        torch.testing.assert_close(found, expected[expert], rtol=2e-6, atol=2e-6 * scale)
