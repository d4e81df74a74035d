"""Generation: answers found and compared, the same text alone and in a batch, stops, end tokens."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from raymerge.merge_actors.errors import RecipeError
from raymerge.stats.evaluation.answers import cut_at_stop, extract, is_exact_match

Maker = Callable[..., Any]
CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}word9{% endif %}"


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(11)
    rows = [
        {"text": " ".join(f"word{rng.randrange(92)}" for _ in range(rng.randint(1, 12))), "answer": "word0"}
        for _ in range(12)
    ]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _naive(folder: Path, text: str, num_tokens: int) -> str:
    """Generate one token at a time by argmax, without cache or padding."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    ids = tokenizer(text)["input_ids"]
    new: list[int] = []
    for _ in range(num_tokens):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(new, skip_special_tokens=True))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_texts_are_those_of_one_prompt_at_a_time(
    architecture: str, tiny_checkpoints: Maker, prompts: Path, scored: Maker
) -> None:
    folder = tiny_checkpoints(architecture).base
    fields = {"kind": "generation", "validation": prompts, "max_new_tokens": 6}
    batched, model = scored(folder, **fields, batch_tokens=60)
    assert 1 < batched.num_batches < 12
    texts: dict[int, str] = {}
    for batch in batched.batches:
        texts |= dict(zip(batch, batched.generate(model, batch), strict=True))
    alone, _ = scored(folder, **fields, batch_tokens=1)
    assert alone.num_batches == 12
    for i, row in enumerate(_rows(prompts)):
        expected = _naive(folder, row["text"], 6)
        assert texts[i] == expected
        assert alone.generate(model, [i]) == [expected]


def test_right_answers_count(tiny_checkpoints: Maker, prompts: Path, scored: Maker, tmp_path: Path) -> None:
    folder = tiny_checkpoints("llama").base
    prepared, model = scored(folder, kind="generation", validation=prompts, max_new_tokens=3)
    texts = prepared.generate(model, range(12))
    rows = [
        {"text": row["text"], "answer": [texts[i], "x"] if i % 3 else ["word0 word0 word0 word0"]}
        for i, row in enumerate(_rows(prompts))
    ]
    path = tmp_path / "answered.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepared, model = scored(folder, kind="generation", validation=path, max_new_tokens=3, batch_tokens=40)
    scores = prepared.score(model)
    assert scores["correct"].tolist() == [i % 3 != 0 for i in range(12)]
    assert prepared.summarise(scores)["exact_match"].value == pytest.approx(8 / 12)


def test_a_stop_string_ends_a_text_whatever_the_batch(
    tiny_checkpoints: Maker, prompts: Path, scored: Maker
) -> None:
    folder = tiny_checkpoints("llama").base
    prepared, model = scored(folder, kind="generation", validation=prompts, max_new_tokens=8)
    texts = prepared.generate(model, range(12))
    stop = next(text.split()[2] for text in texts if len(set(text.split())) > 2)
    stopped, model = scored(folder, kind="generation", validation=prompts, max_new_tokens=8, stop=[stop])
    assert stopped.generate(model, range(12)) == [text.split(stop)[0] for text in texts]
    assert any(stop in text for text in texts)
    lengths = []
    module = model.module(stopped.task)
    handle = module.register_forward_hook(lambda *_: lengths.append(1))
    with_stop = next(i for i, text in enumerate(texts) if stop in text)
    stopped.generate(model, [with_stop])
    handle.remove()
    assert len(lengths) < 8  # nothing is generated after the stop


def test_encoder_decoders_generate(
    tiny_checkpoints: Maker, prompts: Path, scored: Maker, tmp_path: Path
) -> None:
    base = tiny_checkpoints("t5").base
    folder = tmp_path / "t5"
    shutil.copytree(base, folder)
    config = json.loads((base / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"decoder_start_token_id": 0}))
    prepared, model = scored(folder, kind="generation", validation=prompts, max_new_tokens=5, batch_tokens=60)
    own, tokenizer = (
        AutoModelForSeq2SeqLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    texts: dict[int, str] = {}
    for batch in prepared.batches:
        texts |= dict(zip(batch, prepared.generate(model, batch), strict=True))
    for i, row in enumerate(_rows(prompts)):
        ids = tokenizer(row["text"], return_tensors="pt")["input_ids"]
        found = own.generate(
            ids,
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            decoder_start_token_id=0,
        )
        assert texts[i] == tokenizer.decode(found[0], skip_special_tokens=True)


def test_chat_templates_lay_the_prompt_out(
    tiny_checkpoints: Maker, prompts: Path, evaluation_of: Maker, tmp_path: Path
) -> None:
    folder = tmp_path / "chat"
    base = tiny_checkpoints("llama").base
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = CHAT.replace("m.role", "'word8'")
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    task = evaluation_of(
        kind="generation", validation=prompts, chat_template=True, prompt="word7 {text}"
    ).tasks[0]
    prepared = task.prepare("validation", str(folder))
    for ids, row in zip(prepared._prompts, _rows(prompts), strict=True):
        assert tokenizer.decode(ids) == f"word8 word7 {row['text']} word9"
    with pytest.raises(RecipeError, match="chat_template: the models' tokenizer has none"):
        task.prepare("validation", str(base))


def test_answers_are_found_and_compared() -> None:
    number = re.compile(r"(-?\d[\d,]*)")
    assert cut_at_stop("a\n\nb. c", ["c", "\n\n"]) == "a"
    assert extract("it is 1,200 or 7", number, "first") == "1,200"
    assert extract("it is 1,200 or 7", number, "last") == "7"
    assert extract("none", number, "last") is None
    assert extract("x = 5", re.compile(r"x = \d|y"), "first") == "x = 5"
    assert is_exact_match(" The  Answer ", ["the answer"], ("case",))
    assert not is_exact_match("The Answer", ["the answer"], ())
    assert is_exact_match("1,200", ["1200"], ("commas",))
    assert is_exact_match("the cat!", ["cat"], ("articles", "punctuation"))
    assert not is_exact_match(None, [""], ("case",))


def test_bad_input(tiny_checkpoints: Maker, prompts: Path, evaluation_of: Maker) -> None:
    def refuse(pattern: str, architecture: str = "llama", **task: Any) -> None:
        with pytest.raises(RecipeError, match=pattern):
            evaluation_of(**{"kind": "generation", "validation": prompts, **task}).tasks[0].prepare(
                "validation", str(tiny_checkpoints(architecture).base)
            )

    refuse(r"answer_pattern: '\(' is no regular expression", answer_pattern="(")
    refuse(r"gold_pattern: row 0 of .* does not match the answer 'word0'", gold_pattern="#### (.*)")
    refuse("max_new_tokens: 64 leaves no room for a prompt in 64 tokens", "gpt2", max_new_tokens=64)
    refuse("ignore: .* is no list of", ignore=["capitals"])
    refuse("stop: an empty text", stop=[""])
    refuse("names no decoder_start_token_id", "t5")
