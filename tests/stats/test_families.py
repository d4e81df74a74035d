"""Linear maps, blocks and Grams of model families beyond the four of the other tests, against hooks in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raymerge.cluster.statistics import collect_statistics
from raymerge.cluster.statistics_options import StatisticsOptions
from raymerge.merge_actors.methods.gram_matrix import unpack_upper
from raymerge.stats.data_rows import DataSpec
from raymerge.stats.statistics_file import open_statistics

_SHAPE = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
#: Query, key, value, output and what the family's MLP has, for two layers; then what stands outside of them.
NUM_MAPS = {
    "roberta": 12 + 1,
    "distilbert": 12 + 1,
    "qwen3": 14 + 1,
    "mistral": 14 + 1,
    "gemma": 14,
    "gemma3": 14,
}


def _make(family: str) -> tuple[Any, Any]:
    """Return a class and a configuration."""
    import transformers as t

    heads = {"num_key_value_heads": 2, "head_dim": 8}
    if family == "roberta":
        return t.RobertaForMaskedLM, t.RobertaConfig(**_SHAPE, max_position_embeddings=66, pad_token_id=0)
    if family == "distilbert":
        config = t.DistilBertConfig(vocab_size=96, dim=32, hidden_dim=48, n_layers=2, n_heads=4)
        return t.DistilBertForMaskedLM, config
    if family == "qwen3":
        return t.Qwen3ForCausalLM, t.Qwen3Config(**_SHAPE, **heads, tie_word_embeddings=False)
    if family == "mistral":
        return t.MistralForCausalLM, t.MistralConfig(**_SHAPE, **heads, sliding_window=8)
    if family == "gemma":
        return t.GemmaForCausalLM, t.GemmaConfig(**_SHAPE, **heads)
    assert family == "gemma3", family
    return t.Gemma3ForCausalLM, t.Gemma3TextConfig(**_SHAPE, **heads, sliding_window=8)


@pytest.mark.parametrize("family", NUM_MAPS)
def test_every_linear_map_is_found_and_measured(
    family: str,
    tiny_checkpoints: Callable[..., Any],
    texts_file: Path,
    reference_grams: Callable[..., Any],
    tmp_path: Path,
) -> None:
    from transformers import AutoTokenizer

    model_class, config = _make(family)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model_class(config).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_checkpoints("bert").base).save_pretrained(tmp_path / "model")
    data = DataSpec(source=str(texts_file), batch_tokens=64)
    options = StatisticsOptions(kind="gram", in_process=True, workers=2, data=data)
    result = collect_statistics(str(tmp_path / "model"), tmp_path / "out", options)
    statistics = open_statistics(tmp_path / "out")
    assert not result.statistics.coverage.uncovered
    expected = {
        name: gram
        for name, gram in reference_grams(tmp_path / "model", model_class).items()
        if name not in statistics.coverage.tied
    }
    assert statistics.modules.keys() == expected.keys() and len(expected) == NUM_MAPS[family]
    for name, module in statistics.modules.items():
        gram, num_rows = expected[name]
        assert module.num_rows == (num_rows,), name
        own = unpack_upper(load_file(module.tensor.file)[module.key], module.in_features).double()
        scale = gram.diagonal().max().item()
        torch.testing.assert_close(own, gram, rtol=3e-6, atol=3e-6 * scale)
