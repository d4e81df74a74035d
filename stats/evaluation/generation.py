"""Generation: the model goes on from a prompt, greedily; the answer in its text must be the right one."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from raymerge.merge_actors.checkpoint.files import read_json
from raymerge.stats.evaluation import metrics
from raymerge.stats.evaluation.answers import Ignored, cut_at_stop, extract, is_exact_match
from raymerge.stats.evaluation.chat import render
from raymerge.stats.evaluation.language import LanguageEncoder
from raymerge.stats.evaluation.prepared import PreparedTask, cut_by_tokens
from raymerge.stats.evaluation.prompts import prompts_of
from raymerge.stats.evaluation.rows import Table, read_table_of, template_columns
from raymerge.stats.evaluation.scores import Estimate, Scores
from raymerge.stats.evaluation.structures import head_config
from raymerge.stats.evaluation.task_spec import ModelKind, Split, TaskSpec

if TYPE_CHECKING:
    from raymerge.stats.evaluation.resident import ResidentModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation(TaskSpec):
    """Generate greedily after a prompt and compare the answer with the right ones."""

    kind: ClassVar[str] = "generation"
    takes_encoder_decoder: ClassVar[bool] = True
    prompt: str = "{text}"
    """The prompt: text with columns in braces."""
    chat_template: bool = False
    """The prompt is what a user says; or, if it is one column, a conversation."""
    answer_column: str = "answer"
    """The right answer, or a list of right answers."""
    max_new_tokens: int = 64
    stop: tuple[str, ...] = ()
    """Generation ends before the first of these texts."""
    answer_pattern: str | None = None
    """Regular expression of the answer in the generated text: its first group, or all of it."""
    answer_match: Literal["first", "last"] = "first"
    """Which match is the answer."""
    gold_pattern: str | None = None
    """Regular expression of the right answer in its column."""
    ignore: tuple[Ignored, ...] = ()
    """What does not count when answers are compared; the number of spaces never does."""
    max_length: int | None = None
    """Longest prompt and answer in tokens [the model's limit, at most 2,048]; prompts lose their beginning."""

    def __post_init__(self) -> None:
        TaskSpec.__post_init__(self)
        if self.max_new_tokens < 1:
            raise self.error("max_new_tokens", f"{self.max_new_tokens} is too few; it must be at least 1.")
        if "" in self.stop:
            raise self.error("stop", "an empty text stops everything; leave it out.")
        template_columns(self, "prompt", self.prompt)
        for key in ("answer_pattern", "gold_pattern"):
            self._pattern(key)

    def _pattern(self, key: str) -> re.Pattern[str] | None:
        given = getattr(self, key)
        try:
            return None if given is None else re.compile(given)
        except re.error as error:
            raise self.error(key, f"{given!r} is no regular expression: {error}.") from error

    @property
    def model_kind(self) -> ModelKind:
        """Run the language model."""
        return "language_model"

    def metric_names(self) -> tuple[str, ...]:
        """Return the share of right answers."""
        return ("exact_match",)

    def prepare(self, split: Split, model_folder: str) -> PreparedGeneration:
        """Tokenise the prompts; see `TaskSpec.prepare`."""
        table = read_table_of(
            self, split, [*template_columns(self, "prompt", self.prompt), self.answer_column]
        )
        encoder = LanguageEncoder(self, model_folder, self.max_length)
        if encoder.max_length <= self.max_new_tokens:
            raise self.error(
                "max_new_tokens",
                f"{self.max_new_tokens:,} leaves no room for a prompt in {encoder.max_length:,} tokens.",
            )
        return PreparedGeneration(self, split, table, encoder, model_folder)

    def is_right(self, text: str, gold: Sequence[str]) -> bool:
        """Judge a generated text that is cut at its stop."""
        answer = extract(text, self._pattern("answer_pattern"), self.answer_match)
        return is_exact_match(answer, gold, self.ignore)

    def gold(self, table: Table, index: int) -> tuple[str, ...]:
        """Return the right answers of a row."""
        value = table.columns[self.answer_column][index]
        found = []
        for each in value if isinstance(value, list | tuple) else [value]:
            text = extract(str(each), self._pattern("gold_pattern"), self.answer_match)
            if text is None:
                raise self.error(
                    "gold_pattern", f"{table.place(index)}: it does not match the answer {each!r}."
                )
            found.append(text)
        if not found:
            raise self.error("answer_column", f"{table.place(index)} has no answer.")
        return tuple(found)


class PreparedGeneration(PreparedTask):
    """Prompts with their right answers."""

    task: Generation

    def __init__(
        self, task: Generation, split: Split, table: Table, encoder: LanguageEncoder, model_folder: str
    ) -> None:
        """Tokenise the prompts."""
        self._encoder = encoder
        settings = _settings(model_folder)
        self._end_ids = _end_ids(settings, encoder.tokenizer)
        self._is_encoder_decoder = bool(settings.get("is_encoder_decoder"))
        self._start_id = settings.get("decoder_start_token_id")
        if self._is_encoder_decoder and self._start_id is None:
            raise task.error("kind", f"the config.json of {model_folder} names no decoder_start_token_id.")
        self._gold = [task.gold(table, i) for i in range(len(table))]
        longest = encoder.max_length - task.max_new_tokens
        self._prompts: list[list[int]] = []
        for text in _prompts(task, table, encoder.tokenizer):
            ids = (
                encoder.plain_ids(text) if task.chat_template else list(encoder.tokenizer(text)["input_ids"])
            )
            encoder.num_cut += len(ids) > longest
            self._prompts.append(ids[-longest:])
        if empty := [i for i, ids in enumerate(self._prompts) if not ids]:
            raise task.error(
                "prompt", f"{table.place(empty[0])} makes an empty prompt; generation needs a token."
            )
        widths = [len(ids) + task.max_new_tokens for ids in self._prompts]
        batches = cut_by_tokens(widths, task.batch_tokens)
        super().__init__(task, split, batches, [*table.remarks, *encoder.remarks()])

    def _content(self) -> object:
        return [self._prompts, self._gold, sorted(self._end_ids)]

    def generate(self, model: ResidentModel, batch: Sequence[int]) -> list[str]:
        """Return the texts that the model gives to some prompts, cut at their stop."""
        import torch
        from transformers import GenerationConfig, StoppingCriteriaList

        side: Literal["left", "right"] = "right" if self._is_encoder_decoder else "left"
        prompts = [{"input_ids": self._prompts[i]} for i in batch]
        inputs = self._encoder.tensors(prompts, model.device, side)
        num_before = 1 if self._is_encoder_decoder else inputs["input_ids"].shape[1]
        config = GenerationConfig(
            max_new_tokens=self.task.max_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=self._encoder.pad_id,
            eos_token_id=sorted(self._end_ids) or None,
            decoder_start_token_id=self._start_id,
        )
        criteria = StoppingCriteriaList()
        if self.task.stop:
            criteria.append(_stop_on_text(self._encoder.tokenizer, self.task.stop, num_before))
        with torch.no_grad():
            found = model.module(self.task).generate(
                **inputs, generation_config=config, stopping_criteria=criteria
            )
        return [self._text(row) for row in found[:, num_before:].tolist()]

    def _text(self, ids: list[int]) -> str:
        """Decode what stands before the first end token, and cut it at the first stop string."""
        end = next((i for i, each in enumerate(ids) if each in self._end_ids), len(ids))
        text = self._encoder.tokenizer.decode(ids[:end], skip_special_tokens=True)
        return cut_at_stop(text, self.task.stop)

    def _score_batch(self, model: ResidentModel, batch: Sequence[int]) -> Scores:
        texts = self.generate(model, batch)
        right = [self.task.is_right(text, self._gold[i]) for i, text in zip(batch, texts, strict=True)]
        return {"correct": np.array(right, dtype=np.bool_)}

    def _summarise(self, scores: Scores) -> dict[str, Estimate]:
        return {"exact_match": metrics.mean(scores["correct"])}


def _prompts(task: Generation, table: Table, tokenizer: Any) -> list[str]:
    if not task.chat_template:
        return prompts_of(task, table, task.prompt)
    names = template_columns(task, "prompt", task.prompt)
    is_column = len(names) == 1 and task.prompt == f"{{{names[0]}}}"
    given = table.columns[names[0]] if is_column else prompts_of(task, table, task.prompt)
    return [render(task, tokenizer, each, table.place(i), for_answer=True) for i, each in enumerate(given)]


def _settings(model_folder: str) -> dict[str, Any]:
    """Return config.json with what generation_config.json says instead."""
    path = os.path.join(model_folder, "generation_config.json")
    return head_config(model_folder) | (read_json(path) if os.path.exists(path) else {})


def _end_ids(settings: Mapping[str, Any], tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end a text: the tokenizer's and the model's."""
    given = settings.get("eos_token_id")
    found = [tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])]
    return frozenset(each for each in found if each is not None)


def _stop_on_text(tokenizer: Any, stops: Sequence[str], num_before: int) -> Any:
    """Return a criterion that ends a row as soon as its new text holds a stop string."""
    import torch
    from transformers import StoppingCriteria

    # A token is at least one byte of UTF-8, so the newest stop string lies within so many tokens.
    tail = max(len(stop.encode()) for stop in stops) + 4

    class StopOnText(StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            new = input_ids[:, num_before:][:, -tail:].tolist()
            texts = tokenizer.batch_decode(new, skip_special_tokens=True)
            done = [any(stop in text for stop in stops) for text in texts]
            return torch.tensor(done, dtype=torch.bool, device=input_ids.device)

    return StopOnText()
