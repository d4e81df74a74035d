"""Loss against transformers' own, multiple choice one continuation at a time, tokens as the harness cuts them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from raymerge.merge_actors.errors import RecipeError
from raymerge.stats.evaluation.evaluate import expect_fit
from raymerge.stats.evaluation.language import LanguageEncoder, TokenSequence, log_likelihoods
from raymerge.stats.evaluation.scores import concatenate

Maker = Callable[..., Any]


def _words(rng: random.Random, num: int) -> str:
    return " ".join(f"word{rng.randrange(92)}" for _ in range(num))


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(5)
    path = tmp_path_factory.mktemp("documents") / "documents.jsonl"
    rows = [
        {
            "text": _words(rng, rng.randint(2, 25)),
            "question": _words(rng, rng.randint(1, 9)),
            "options": [_words(rng, rng.randint(1, 4)) for _ in range(4)],
            "answer": rng.randrange(4),
        }
        for _ in range(24)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _naive(folder: Path) -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_loss_is_that_of_transformers(
    architecture: str, tiny_checkpoints: Maker, documents: Path, scored: Maker
) -> None:
    folder = tiny_checkpoints(architecture).base
    prepared, model = scored(folder, kind="loss", validation=documents, batch_tokens=80)
    assert prepared.num_batches > 3
    scores = prepared.score(model)
    single, tokenizer = _naive(folder)
    total, num = 0.0, 0
    for i, row in enumerate(_rows(documents)):
        ids = torch.tensor([tokenizer(row["text"])["input_ids"]])
        with torch.no_grad():
            loss = single(input_ids=ids, labels=ids).loss.item()
        assert scores["tokens"][i] == ids.shape[1] - 1
        assert scores["nll"][i] / scores["tokens"][i] == pytest.approx(loss, rel=1e-5)
        total, num = total + loss * (ids.shape[1] - 1), num + ids.shape[1] - 1
    found = prepared.summarise(scores)
    assert found["loss"].value == pytest.approx(total / num, rel=1e-6)
    assert found["perplexity"].value == pytest.approx(math.exp(total / num), rel=1e-5)


def test_loss_after_a_prompt_counts_the_text_alone(
    tiny_checkpoints: Maker, documents: Path, scored: Maker, tmp_path: Path
) -> None:
    folder = tiny_checkpoints("llama").base
    rows = [{"prompt": row["question"], "text": " " + row["text"]} for row in _rows(documents)]
    path = tmp_path / "prompted.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared, model = scored(folder, kind="loss", validation=path, prompt_column="prompt", batch_tokens=100)
    single, tokenizer = _naive(folder)
    scores = prepared.score(model)
    for i, row in enumerate(rows):
        prompt, text = (tokenizer(row[key])["input_ids"] for key in ("prompt", "text"))
        ids = torch.tensor([prompt + text])
        labels = torch.tensor([[-100] * len(prompt) + text])
        with torch.no_grad():
            loss = single(input_ids=ids, labels=labels).loss.item()
        assert scores["tokens"][i] == len(text)
        assert scores["nll"][i] / len(text) == pytest.approx(loss, rel=1e-5)


def test_packed_texts_are_joined_and_cut_evenly(
    tiny_checkpoints: Maker, documents: Path, scored: Maker
) -> None:
    folder = tiny_checkpoints("llama").base
    prepared, model = scored(folder, kind="loss", validation=documents, packed=True, max_length=16)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    joined = [
        token
        for row in _rows(documents)
        for token in [*tokenizer(row["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    ]
    assert [list(each.ids) for each in prepared.sequences] == [
        joined[i : i + 16] for i in range(0, len(joined), 16) if len(joined[i : i + 16]) > 1
    ]
    single, _ = _naive(folder)
    whole = torch.tensor([each.ids for each in prepared.sequences if len(each.ids) == 16])
    with torch.no_grad():
        expected = single(input_ids=whole, labels=whole).loss.item()
    scores = prepared.score(model)
    full = scores["tokens"] == 15
    assert scores["nll"][full].sum() / scores["tokens"][full].sum() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_likelihoods_do_not_depend_on_padding(
    architecture: str, tiny_checkpoints: Maker, scored: Maker, documents: Path
) -> None:
    folder = tiny_checkpoints(architecture).base
    prepared, model = scored(folder, kind="loss", validation=documents)
    module = model.module(prepared.task)
    rng = random.Random(0)
    sequences = [
        TokenSequence(ids, rng.randrange(1, len(ids)))
        for ids in (tuple(rng.randrange(4, 96) for _ in range(rng.randint(2, 20))) for _ in range(12))
    ]
    sequences.append(TokenSequence((*sequences[0].ids[:-1], 7), 1))  # shares the forward pass of the first

    def of(batch: list[TokenSequence], side: Any) -> np.ndarray:
        with torch.no_grad():
            return log_likelihoods(module, batch, pad_id=0, device="cpu", side=side).numpy()

    alone = np.concatenate([of([each], "right") for each in sequences])
    assert np.ptp(alone) > 1
    # float32 sums in another order
    np.testing.assert_allclose(of(sequences, "right"), alone, rtol=1e-5)
    np.testing.assert_allclose(of(sequences, "left"), alone, rtol=1e-5)
    np.testing.assert_allclose(of(sequences[::-1], "right")[::-1], alone, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_choices_are_those_of_one_continuation_at_a_time(
    architecture: str, tiny_checkpoints: Maker, documents: Path, scored: Maker
) -> None:
    folder = tiny_checkpoints(architecture).base
    prepared, model = scored(
        folder,
        kind="multiple_choice",
        validation=documents,
        prompt="{question} word1",
        choices_column="options",
        label_column="answer",
        batch_tokens=200,
    )
    assert prepared.num_batches > 3
    single, tokenizer = _naive(folder)
    chosen, right, right_norm = [], [], []
    for row in _rows(documents):
        sums = []
        for option in row["options"]:
            context = tokenizer(row["question"] + " word1")["input_ids"]
            ids = tokenizer(row["question"] + " word1 " + option)["input_ids"]
            with torch.no_grad():
                log_p = single(torch.tensor([ids])).logits[0].log_softmax(-1)
            sums.append(sum(log_p[i - 1, ids[i]].item() for i in range(len(context), len(ids))))
        by_length = [each / len(option) for each, option in zip(sums, row["options"], strict=True)]
        chosen.append(int(np.argmax(sums)))
        right.append(chosen[-1] == row["answer"])
        right_norm.append(int(np.argmax(by_length)) == row["answer"])
    parts = [prepared.score(model, i, i + 1) for i in range(prepared.num_batches)]
    scores = concatenate(parts)
    assert scores["chosen"].tolist() == chosen
    assert right != right_norm
    found = prepared.summarise(scores)
    assert found["accuracy"].value == pytest.approx(np.mean(right))
    assert found["accuracy_norm"].value == pytest.approx(np.mean(right_norm))


def test_choices_of_one_token_share_a_forward_pass(
    tiny_checkpoints: Maker, documents: Path, scored: Maker
) -> None:
    folder = tiny_checkpoints("llama").base
    prepared, model = scored(
        folder,
        kind="multiple_choice",
        validation=documents,
        prompt="{question}",
        choices=["word1", "word2", "word3", "word4"],
        label_column="answer",
    )
    rows = []
    module = model.module(prepared.task)
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    prepared.score(model)
    handle.remove()
    assert sum(rows) == 24


@pytest.mark.parametrize(
    ("choices", "label", "index"),
    [
        (["x", "y"], 1, 1),
        (["x", "y"], "1", 1),
        (["x", "y"], "B", 1),
        (["x", "y"], "y", 1),
        ({"text": ["x", "y"], "label": ["1", "2"]}, "2", 1),
        ({"text": ["x", "y"], "label": ["A", "B"]}, "B", 1),
    ],
)
def test_right_answers_may_be_numbers_letters_labels_or_texts(
    choices: Any, label: Any, index: int, tiny_checkpoints: Maker, tmp_path: Path, evaluation_of: Maker
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "word1", "options": choices, "label": label}) + "\n")
    task = evaluation_of(kind="multiple_choice", validation=path, choices_column="options").tasks[0]
    assert task.prepare("validation", str(tiny_checkpoints("llama").base))._gold == [index]


def test_contexts_and_continuations_are_cut_as_the_harness_does(
    tiny_checkpoints: Maker, documents: Path, evaluation_of: Maker
) -> None:
    folder = str(tiny_checkpoints("llama").base)
    task = evaluation_of(kind="loss", validation=documents).tasks[0]
    encoder = LanguageEncoder(task, folder, 6)
    ids = {f"word{i}": i + 4 for i in range(92)}
    one, two, three = ids["word1"], ids["word2"], ids["word3"]
    assert encoder.pair("word1 word2", " word3") == TokenSequence((one, two, three), 1)
    assert encoder.pair("word1 word2 ", "word3") == TokenSequence((one, two, three), 1)  # spaces go over
    assert encoder.pair("", "word3") == TokenSequence((2, three), 1)  # <s> stands for nothing
    long = encoder.pair(" ".join(["word1"] * 9), " word2 word3")
    assert long == TokenSequence((one,) * 5 + (two, three), 2)  # max_length + 1, the last is only predicted
    assert encoder.num_cut == 1


def test_bad_input(tiny_checkpoints: Maker, documents: Path, evaluation_of: Maker, tmp_path: Path) -> None:
    llama, bert, t5 = (tiny_checkpoints(name).base for name in ("llama", "bert", "t5"))

    def refuse(pattern: str, folder: Path = llama, **task: Any) -> None:
        with pytest.raises(RecipeError, match=pattern):
            expect_fit(evaluation_of(**{"validation": documents, **task}), str(folder))

    choice = {"kind": "multiple_choice", "choices_column": "options", "label_column": "answer"}
    refuse("loss needs a causal language model; the models are BertForMaskedLM", bert, kind="loss")
    refuse("needs a causal language model; the models are T5", t5, kind="loss")
    refuse(
        "packed: goes with texts that have no prompt_column",
        kind="loss",
        packed=True,
        prompt_column="question",
    )
    refuse(r"prompt: '\{question' is no template", **choice, prompt="{question")
    refuse(r"no column 'quest'", **choice, prompt="{quest}")
    refuse(r"has the answer 'word\d.*; it has 4 choices", **choice | {"label_column": "text"})
    refuse(r"choices_column: give either", kind="multiple_choice")
    refuse(r"holds 'word.*two texts or more", **choice | {"choices_column": "text"})
    refuse(r"chat_template: .*has none|holds a str", kind="loss", chat_template=True)
    single = tmp_path / "single.jsonl"
    single.write_text(json.dumps({"text": "word1"}) + "\n")
    refuse("no text has two tokens", kind="loss", validation=single)
