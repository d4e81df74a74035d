"""Grams of whole models against an implementation that keeps everything in memory, and what must not matter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge.cluster.statistics_entries import combine, gram_entries
from raymerge.merge_actors.errors import CheckpointError, ClusterError, MismatchError, NotFiniteError
from raymerge.merge_actors.methods.gram_matrix import unpack_upper
from raymerge.stats.activation_worker import ActivationWorker
from raymerge.stats.layer_groups import LayerGroup, plan_groups
from raymerge.stats.measure_job import GroupReport, MeasureJob, PassSettings

Grams = dict[str, tuple[torch.Tensor, int]]
ARCHITECTURES = ("bert", "llama", "gpt2", "t5")


def _classes() -> dict[str, Any]:
    from transformers import BertForMaskedLM, GPT2LMHeadModel, LlamaForCausalLM, T5ForConditionalGeneration

    return {
        "bert": BertForMaskedLM,
        "llama": LlamaForCausalLM,
        "gpt2": GPT2LMHeadModel,
        "t5": T5ForConditionalGeneration,
    }


def _measure(job: MeasureJob, settings: PassSettings | None = None) -> tuple[Grams, GroupReport]:
    """Measure in one group with one worker; repeat as the driver would."""
    from safetensors.torch import load_file

    worker = ActivationWorker(job)
    description = worker.describe()
    group = LayerGroup(number=0, begin=0, end=len(description.maps.blocks), is_last=True)
    settings = settings or PassSettings(batching=description.batching)
    for _ in range(4):
        report = worker.accumulate(group, range(description.num_shards), settings)
        if report.needs_batching:
            settings = replace(settings, batching=report.needs_batching)
        elif report.needs_separate:
            settings = replace(settings, separate=settings.separate | report.needs_separate)
        else:
            break
    entries, modules = gram_entries(description, group, combine([report]), 1)
    worker.write(entries, "grams.safetensors", report.num_examples)
    tensors = load_file(Path(job.work_folder) / "grams.safetensors")
    return {
        name: (unpack_upper(tensors[row["gram"]], row["in_features"]), row["num_rows"])
        for name, row in modules.items()
    }, report


def _assert_equal(found: Grams, expected: Grams) -> None:
    for name, (gram, num_rows) in found.items():
        expected_gram, expected_rows = expected[name]
        assert num_rows == expected_rows, name
        # Forward passes of other shapes differ in the last bits of float32, and so do their sums.
        scale = expected_gram.diagonal().max().item()
        torch.testing.assert_close(gram.double(), expected_gram.double(), rtol=2e-6, atol=2e-6 * scale)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_grams_equal_an_implementation_that_keeps_everything_in_memory(
    architecture: str,
    tiny_checkpoints: Callable[..., Any],
    make_job: Callable[..., MeasureJob],
    reference_grams: Callable[..., Grams],
) -> None:
    folder = tiny_checkpoints(architecture).models[0]
    found, _ = _measure(make_job(folder))
    expected = reference_grams(folder, _classes()[architecture])
    tied = {name for name in expected if name.endswith(("lm_head.weight", "decoder.weight"))}
    assert found.keys() == (expected.keys() if architecture == "llama" else expected.keys() - tied)
    _assert_equal(found, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("batching", ["equal_length", "single"])
def test_batching_does_not_matter(
    architecture: str,
    batching: Any,
    tiny_checkpoints: Callable[..., Any],
    make_job: Callable[..., MeasureJob],
) -> None:
    folder = tiny_checkpoints(architecture).models[0]
    padded, report = _measure(make_job(folder, batch_tokens=100))
    other, other_report = _measure(make_job(folder, batch_tokens=37), PassSettings(batching=batching))
    _assert_equal(other, padded)
    assert (report.num_tokens, report.num_examples) == (other_report.num_tokens, other_report.num_examples)


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
def test_the_padding_side_does_not_matter(
    architecture: str, tiny_checkpoints: Callable[..., Any], make_job: Callable[..., MeasureJob]
) -> None:
    folder = tiny_checkpoints(architecture).models[0]
    right, _ = _measure(make_job(folder, batch_tokens=200))
    left, _ = _measure(make_job(folder, batch_tokens=200, padding_side="left"))
    _assert_equal(left, right)


def test_two_passes_give_the_same_bits(
    tiny_checkpoints: Callable[..., Any], make_job: Callable[..., MeasureJob]
) -> None:
    folder = tiny_checkpoints("bert").models[0]  # its config asks for dropout in training
    first, _ = _measure(make_job(folder))
    second, _ = _measure(make_job(folder))
    assert all(torch.equal(first[name][0], second[name][0]) for name in first)


def test_shared_inputs_are_stored_once_and_equal_those_measured_apart(
    tiny_checkpoints: Callable[..., Any], make_job: Callable[..., MeasureJob]
) -> None:
    folder = tiny_checkpoints("llama").models[0]
    shared, report = _measure(make_job(folder))
    layer = "model.layers.0."
    assert {name: leader for name, leader in report.leaders.items() if name.startswith(layer)} == {
        layer + "self_attn.k_proj.weight": layer + "self_attn.q_proj.weight",
        layer + "self_attn.v_proj.weight": layer + "self_attn.q_proj.weight",
        layer + "mlp.up_proj.weight": layer + "mlp.gate_proj.weight",
    }
    apart, apart_report = _measure(
        make_job(folder), PassSettings(batching="padded", separate=frozenset(report.leaders))
    )
    assert not apart_report.leaders
    assert all(torch.equal(shared[name][0], apart[name][0]) for name in shared)


def test_every_decoder_layer_reads_the_same_encoder_output(
    tiny_checkpoints: Callable[..., Any], make_job: Callable[..., MeasureJob]
) -> None:
    folder = tiny_checkpoints("t5").models[0]
    found, report = _measure(make_job(folder, text_pair_column="other"))
    leader = "decoder.block.0.layer.1.EncDecAttention.k.weight"
    assert report.leaders["decoder.block.1.layer.1.EncDecAttention.v.weight"] == leader
    encoder_rows = found["encoder.block.0.layer.0.SelfAttention.q.weight"][1]
    decoder_rows = found["decoder.block.0.layer.0.SelfAttention.q.weight"][1]
    assert found[leader][1] == encoder_rows != decoder_rows
    assert found["decoder.block.0.layer.1.EncDecAttention.q.weight"][1] == decoder_rows
    assert report.num_tokens == encoder_rows + decoder_rows


def test_the_first_shard_is_timed(
    tiny_checkpoints: Callable[..., Any], make_job: Callable[..., MeasureJob]
) -> None:
    _, report = _measure(make_job(tiny_checkpoints("llama").models[0]))
    assert report.update_seconds > 0 and report.forward_seconds > 0
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 80  # query and output, key and value, the three of the MLP
    tokens, rest = divmod(report.forward_operations, 2 * (2 * layer + 32 * 96))
    assert rest == 0 and 0 < tokens < report.num_tokens


def test_nan_weights_name_the_layer_and_the_sample(
    tiny_checkpoints: Callable[..., Any], make_job: Callable[..., MeasureJob], tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoints("llama").models[0], folder)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight"
    weights[name][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NotFiniteError, match=r"model\.layers\.0\.mlp\.gate_proj\.weight .* for sample 0"):
        _measure(make_job(folder))


def test_a_model_that_lacks_a_layer_is_refused(
    tiny_checkpoints: Callable[..., Any], make_job: Callable[..., MeasureJob], tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    folder = tmp_path / "partial"
    shutil.copytree(tiny_checkpoints("gpt2").models[0], folder)
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"transformer\.h\.1\.mlp\.c_fc\.weight"):
        ActivationWorker(make_job(folder)).describe()


def test_a_worker_that_does_not_see_the_work_folder_says_so(
    tiny_checkpoints: Callable[..., Any], make_job: Callable[..., MeasureJob]
) -> None:
    job = make_job(tiny_checkpoints("bert").base, work_folder="/nowhere/at/all")
    with pytest.raises(ClusterError, match="does not see /nowhere/at/all"):
        ActivationWorker(job).describe()


def test_tokens_without_an_embedding_name_the_samples(
    tiny_checkpoints: Callable[..., Any], make_job: Callable[..., MeasureJob], tmp_path: Path
) -> None:
    import json
    import shutil

    folder = tmp_path / "foreign"
    shutil.copytree(tiny_checkpoints("llama").base, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {token: i + (50 if i > 3 else 0) for token, i in vocabulary.items()}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(MismatchError, match=r"sample 0 has the token 137, but .* has 96 embeddings"):
        _measure(make_job(folder))


def test_a_budget_gives_groups_with_the_needs_of_a_real_model(
    tiny_checkpoints: Callable[..., Any], make_job: Callable[..., MeasureJob]
) -> None:
    needs = ActivationWorker(make_job(tiny_checkpoints("llama").base)).describe().needs
    assert len(needs.block_weights) == 2 and needs.block_weights[0] == needs.block_weights[1]
    plan = plan_groups(needs, None, "the budget")
    assert [(group.begin, group.end, group.is_last) for group in plan.groups] == [(0, 2, True)]


def test_the_sample_is_named_where_layers_are_loaded_one_by_one(
    tiny_checkpoints: Callable[..., Any], make_job: Callable[..., MeasureJob], tmp_path: Path
) -> None:
    """A token whose embedding overflows comes in some samples only."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    folder = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoints("llama").models[0], folder)
    weights = load_file(folder / "model.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    [token] = tokenizer("word7")["input_ids"][-1:]
    weights["model.embed_tokens.weight"][token] = float("inf")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    texts = tmp_path / "texts.jsonl"
    lines = ["word1 word2", "word3", "word4 word5", "word6 word7 word1", "word8 word2 word3"]
    texts.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    job = make_job(folder)
    job = replace(job, data=replace(job.data, source=str(texts)))
    for is_streamed in (False, True):
        worker = ActivationWorker(job)
        description = worker.describe()
        group = LayerGroup(number=0, begin=0, end=1, is_last=False)
        settings = PassSettings(batching=description.batching, is_streamed=is_streamed)
        with pytest.raises(NotFiniteError, match=r"layers\.0\.self_attn\.q_proj\.weight .* for sample 3;"):
            worker.accumulate(group, range(description.num_shards), settings)
