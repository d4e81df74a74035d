"""Embeddings one text at a time, with every pooling."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

Maker = Callable[..., Any]


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("architecture", ["bert", "t5"])
def test_cosines_are_those_of_single_texts(
    architecture: str, pooling: str, tiny_checkpoints: Maker, texts: Path, scored: Maker
) -> None:
    folder = tiny_checkpoints(architecture).base
    prepared, model = scored(
        folder,
        kind="embedding_similarity",
        validation=texts,
        text_pair_column="other",
        pooling=pooling,
        batch_tokens=100,
    )
    assert prepared.num_batches > 5
    scores = prepared.score(model)
    single, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    single = single.get_encoder() if architecture == "t5" else single
    rows = [json.loads(line) for line in texts.read_text().splitlines()]

    def embed(text: str) -> np.ndarray:
        with torch.no_grad():
            states = single(**tokenizer(text, return_tensors="pt", return_token_type_ids=False))
        states = states.last_hidden_state[0].double().numpy()
        return {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pooling]

    cosines = []
    for row in rows:
        first, second = embed(row["text"]), embed(row["other"])
        cosines.append(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
    np.testing.assert_allclose(scores["cosine"], cosines, atol=1e-5)
    found = prepared.summarise(scores)
    gold = [row["score"] for row in rows]
    assert found["pearson"].value == pytest.approx(np.corrcoef(cosines, gold)[0, 1], abs=1e-4)
