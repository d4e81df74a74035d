"""Classification against transformers one text at a time; heads, labels, regression, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from raymerge.merge_actors.errors import MismatchError, RecipeError
from raymerge.stats.evaluation.evaluate import expect_fit, prepare_task
from raymerge.stats.evaluation.resident import ResidentModel
from raymerge.stats.evaluation.scores import concatenate

LABELS = ("LABEL_0", "LABEL_1", "LABEL_2")


def _naive_logits(model: Any, folder: Path, rows: list[dict[str, Any]], pair: bool = False) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return np.stack(
            [
                model(**tokenizer(row["text"], row["other"] if pair else None, return_tensors="pt"))
                .logits[0]
                .numpy()
                for row in rows
            ]
        )


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2"])
def test_predictions_are_those_of_single_texts(
    architecture: str, make_head: Any, texts: Path, scored: Callable[..., Any]
) -> None:
    name = {"bert": "Bert", "llama": "Llama", "gpt2": "GPT2"}[architecture] + "ForSequenceClassification"
    folder = make_head(name, 3, architecture, pad_token_id=0)
    prepared, model = scored(
        folder, kind="text_classification", validation=texts, text_pair_column="other", batch_tokens=100
    )
    assert prepared.num_batches > 4
    scores = prepared.score(model)
    single = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = _rows(texts)
    expected = _naive_logits(single, folder, rows, pair=True).argmax(1)
    assert len(set(expected.tolist())) > 1
    gold = np.array([LABELS.index(row["label"]) for row in rows])
    np.testing.assert_array_equal(scores["predicted"], expected)
    assert prepared.summarise(scores)["accuracy"].value == pytest.approx((expected == gold).mean())


def test_results_do_not_depend_on_how_batches_are_cut(
    make_head: Any, texts: Path, scored: Callable[..., Any]
) -> None:
    folder = make_head("BertForSequenceClassification")
    prepared, model = scored(folder, kind="text_classification", validation=texts, batch_tokens=60)
    whole = prepared.summarise(prepared.score(model))
    last = prepared.num_batches
    parts = [prepared.score(model, begin, end) for begin, end in [(3, last), (0, 1), (1, 3)]]
    assert prepared.summarise(concatenate(parts)) == whole
    other, _ = scored(folder, kind="text_classification", validation=texts, batch_tokens=4096)
    assert other.num_batches == 1
    for metric, estimate in other.summarise(other.score(model)).items():
        assert estimate == pytest.approx(whole[metric])


def test_a_named_head_sits_on_the_merged_encoder(
    tiny_checkpoints: Callable[..., Any], make_head: Any, texts: Path, scored: Callable[..., Any]
) -> None:
    merged = tiny_checkpoints("bert").models[1]  # a language model: no classifier, no pooler
    head = make_head("BertForSequenceClassification")
    prepared, model = scored(merged, kind="text_classification", validation=texts, head=head)
    expected = AutoModelForSequenceClassification.from_pretrained(head).eval()
    weights = {
        name: tensor for name, tensor in load_file(merged / "model.safetensors").items() if "bert." in name
    }
    assert not expected.load_state_dict(weights, strict=False).unexpected_keys
    logits = _naive_logits(expected, head, _rows(texts))
    np.testing.assert_array_equal(prepared.score(model)["predicted"], logits.argmax(1))


def test_bound_tensors_are_the_parameters_and_can_be_rewritten(
    make_head: Any, texts: Path, evaluation_of: Callable[..., Any]
) -> None:
    folders = (
        make_head("BertForSequenceClassification"),
        make_head("BertForSequenceClassification", 3, hidden_act="relu"),
    )
    evaluation = evaluation_of(kind="text_classification", validation=texts)
    task = evaluation.tasks[0]
    tensors = load_file(folders[0] / "model.safetensors")
    model = ResidentModel(evaluation.tasks, str(folders[0]))
    model.bind(tensors)
    assert model.num_copied_bytes == 0
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert model.module(task).get_parameter(name).data_ptr() == tensors[name].data_ptr()
    prepared = prepare_task(task, "validation", str(folders[0]))
    before = prepared.score(model)["predicted"]
    with torch.no_grad():
        tensors["classifier.bias"].copy_(torch.tensor([0.0, 1e4, 0.0]))
    assert prepared.score(model)["predicted"].tolist() == [1] * 30 != before.tolist()


def test_another_type_is_a_copy_that_refresh_updates(
    make_head: Any, texts: Path, evaluation_of: Callable[..., Any]
) -> None:
    folder = make_head("BertForSequenceClassification")
    evaluation = evaluation_of(kind="text_classification", validation=texts)
    tensors = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    model = ResidentModel(evaluation.tasks, str(folder), dtype=torch.float32)
    model.bind(tensors)
    assert model.num_copied_bytes == 2 * sum(tensor.nbytes for tensor in tensors.values())
    prepared = prepare_task(evaluation.tasks[0], "validation", str(folder))
    tensors["classifier.bias"].copy_(torch.tensor([0.0, 0.0, 1e4]))
    stale = prepared.score(model)["predicted"].tolist()
    model.refresh()
    assert prepared.score(model)["predicted"].tolist() == [2] * 30 != stale


def test_regression_against_numpy(make_head: Any, texts: Path, scored: Callable[..., Any]) -> None:
    folder = make_head("BertForSequenceClassification", 1)
    prepared, model = scored(
        folder, kind="text_classification", validation=texts, label_column="score", regression=True
    )
    found = prepared.summarise(prepared.score(model))
    rows = _rows(texts)
    single = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    predicted = _naive_logits(single, folder, rows)[:, 0].astype(np.float64)
    gold = np.array([row["score"] for row in rows])
    assert found["mse"].value == pytest.approx(((predicted - gold) ** 2).mean(), rel=1e-5)
    assert found["pearson"].value == pytest.approx(np.corrcoef(predicted, gold)[0, 1], rel=1e-4)
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, gold)]
    assert found["spearman"].value == pytest.approx(np.corrcoef(*ranks)[0, 1])


def test_bad_input(
    tiny_checkpoints: Callable[..., Any], make_head: Any, texts: Path, evaluation_of: Callable[..., Any]
) -> None:
    merged = str(tiny_checkpoints("bert").base)
    head = make_head("BertForSequenceClassification")

    def refuse(pattern: str, error: type[Exception] = RecipeError, **task: Any) -> None:
        fields = {"kind": "text_classification", "validation": texts, "head": head, **task}
        with pytest.raises(error, match=pattern):
            expect_fit(evaluation_of(**fields), merged, shapes)

    shapes = {name: tensor.shape for name, tensor in load_file(Path(merged) / "model.safetensors").items()}
    refuse(r"no column 'labels'.*did you mean 'label'", label_column="labels")
    refuse(
        r"has the label 'LABEL_\d'; the head has 2 classes",
        head=make_head("BertForSequenceClassification", 2),
    )
    refuse(r"is a llama, the merged models are bert",
           head=make_head("LlamaForSequenceClassification", 3, "llama"))  # fmt: skip
    refuse(r"needs the head of a model SequenceClassification", head=make_head("BertForTokenClassification"))
    refuse(r"no tensor for the parameter 'bert.pooler.dense.weight' of Bert.*head: PATH", head=None)
    refuse(r"regression: True, but the head .* yields classes", regression=True, label_column="score")
    refuse(r"max_length: 1,000, but the model takes at most 64", max_length=1000)
    refuse(r"labels.yes: 'LABEL_9' is no class", labels={"yes": "LABEL_9"})
    wide = make_head("BertForSequenceClassification", 3, hidden_size=48)
    refuse(r"has the shape .* wants .*different sizes", MismatchError, head=wide)
    with pytest.raises(RecipeError, match=r"test: .* holds the data of `validation` too"):
        expect_fit(
            evaluation_of(kind="text_classification", validation=texts, test=str(texts), head=head), merged
        )


def test_batches_can_be_scored_by_threads_side_by_side(
    make_head: Any, texts: Path, scored: Callable[..., Any]
) -> None:
    folder = make_head("BertForSequenceClassification", 1)
    prepared, model = scored(
        folder,
        kind="text_classification",
        validation=texts,
        label_column="score",
        regression=True,
        batch_tokens=40,
    )
    alone = prepared.score(model)
    with ThreadPoolExecutor(4) as threads:
        parts = list(threads.map(lambda i: prepared.score(model, i, i + 1), range(prepared.num_batches)))
    assert len(parts) > 4
    np.testing.assert_array_equal(concatenate(parts)["predicted"], alone["predicted"])
