"""Entities by hand, predictions one text at a time, words that are cut off."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer

from raymerge.merge_actors.errors import RecipeError
from raymerge.stats.evaluation.entities import count_entities, find_entities

Maker = Callable[..., Any]
NAMES = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(2)
    rows = []
    for _ in range(16):
        num = rng.randint(1, 14)
        rows.append(
            {
                "tokens": [f"word{rng.randrange(92)}" for _ in range(num)],
                "labels": [rng.choice(NAMES) for _ in range(num)],
            }
        )
    path = tmp_path_factory.mktemp("sentences") / "sentences.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("labels", "entities"),
    [
        ("O B-PER I-PER O", [("PER", 1, 3)]),
        ("B-PER B-PER I-PER", [("PER", 0, 1), ("PER", 1, 3)]),
        ("I-PER I-PER O", [("PER", 0, 2)]),  # as conlleval: an I without a B begins an entity
        ("B-PER I-LOC", [("PER", 0, 1), ("LOC", 1, 2)]),
        ("O I-LOC O I-LOC", [("LOC", 1, 2), ("LOC", 3, 4)]),
        ("B-A I-A E-A I-A S-B", [("A", 0, 3), ("A", 3, 4), ("B", 4, 5)]),
        ("B-PER", [("PER", 0, 1)]),
        ("O O", []),
    ],
)
def test_entities_by_hand(labels: str, entities: list[tuple[str, int, int]]) -> None:
    assert find_entities(labels.split()) == entities


def test_an_entity_counts_if_type_and_both_ends_agree() -> None:
    gold = "B-PER I-PER O B-LOC O B-PER".split()
    predicted = "B-PER I-PER O B-PER O B-PER".split()
    assert count_entities(predicted, gold) == (2, 3, 3)
    assert count_entities("B-PER O O O O O".split(), gold) == (0, 1, 3)


@pytest.mark.parametrize("architecture", ["bert", "llama"])
def test_predictions_are_those_of_single_texts(
    architecture: str, make_head: Maker, sentences: Path, scored: Maker
) -> None:
    class_name = {"bert": "Bert", "llama": "Llama"}[architecture] + "ForTokenClassification"
    folder = make_head(class_name, 5, architecture, **LABELS)
    prepared, model = scored(folder, kind="token_classification", validation=sentences, batch_tokens=40)
    assert prepared.num_batches > 2
    scores = prepared.score(model)
    single, tokenizer = (
        AutoModelForTokenClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    hits = found = wanted = right = num = 0
    for row in _rows(sentences):
        inputs = tokenizer(row["tokens"], is_split_into_words=True, return_tensors="pt")  # one token a word
        with torch.no_grad():
            predicted = [NAMES[i] for i in single(**inputs).logits[0].argmax(-1).tolist()]
        assert len(predicted) == len(row["tokens"])
        counts = count_entities(predicted, row["labels"])
        hits, found, wanted = hits + counts[0], found + counts[1], wanted + counts[2]
        right += sum(map(str.__eq__, predicted, row["labels"]))
        num += len(predicted)
    assert hits > 0
    assert [int(scores[name].sum()) for name in ("found", "predicted", "gold")] == [hits, found, wanted]
    metrics = prepared.summarise(scores)
    assert metrics["f1"].value == pytest.approx(2 * hits / (found + wanted))
    assert metrics["precision"].value == pytest.approx(hits / found)
    assert metrics["recall"].value == pytest.approx(hits / wanted)
    assert metrics["accuracy"].value == pytest.approx(right / num)


def test_words_that_are_cut_off_count(make_head: Maker, sentences: Path, scored: Maker) -> None:
    folder = make_head("BertForTokenClassification", 5, **LABELS)
    prepared, model = scored(
        folder, kind="token_classification", validation=sentences, max_length=4, entities=False
    )
    scores = prepared.score(model)
    assert scores["words"].tolist() == [len(row["tokens"]) for row in _rows(sentences)]
    assert (scores["correct"] <= np.minimum(scores["words"], 4)).all()
    assert any("longer than 4 tokens" in remark for remark in prepared.remarks)


def test_bad_input(make_head: Maker, sentences: Path, evaluation_of: Maker) -> None:
    plain = make_head("BertForTokenClassification", 5)
    named = make_head("BertForTokenClassification", 5, **LABELS)

    def refuse(pattern: str, folder: Path, **task: Any) -> None:
        fields = {"kind": "token_classification", "validation": sentences, **task}
        with pytest.raises(RecipeError, match=pattern):
            evaluation_of(**fields).tasks[0].prepare("validation", str(folder))

    refuse("entities: the head's labels .* do not mark entities", plain)
    refuse("has the label '[BI]?.*'; the head has 5 classes", plain, entities=False)
    refuse("no column 'ner_tags'", named, label_column="ner_tags")
