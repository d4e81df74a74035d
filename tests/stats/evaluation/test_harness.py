"""Tasks of lm-evaluation-harness: the same figures as the harness' own run, splits kept apart, errors."""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymerge.merge_actors.errors import RecipeError
from raymerge.stats.evaluation.scores import concatenate

Maker = Callable[..., Any]
needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed"
)

_CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {folder}/validation.jsonl, test: {folder}/test.jsonl}}}}
validation_split: validation
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
_ROLLING = """
task: tiny_perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
"""


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    rng = random.Random(8)

    def words(num: int) -> str:
        return " ".join(f"word{rng.randrange(92)}" for _ in range(num))

    for split, num in (("validation", 20), ("test", 14)):
        rows = [
            {
                "question": words(rng.randint(2, 9)),
                "options": [words(rng.randint(1, 3)) for _ in range(3)],
                "answer": rng.randrange(3),
            }
            for _ in range(num)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "choice.yaml").write_text(_CHOICE.format(folder=folder))
    (folder / "rolling.yaml").write_text(_ROLLING.format(folder=folder))
    return folder


def _own_run(folder: Path, tasks_folder: Path, name: str) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = HFLM(
        pretrained=AutoModelForCausalLM.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
    )
    manager = TaskManager(include_path=str(tasks_folder))
    found: dict[str, Any] = simple_evaluate(model, tasks=[name], task_manager=manager, bootstrap_iters=0)
    return found["results"][name]  # type: ignore[no-any-return]


@needs_harness
@pytest.mark.filterwarnings("default")
def test_figures_are_those_of_the_harness(
    tiny_checkpoints: Maker, tasks_folder: Path, evaluation_of: Maker
) -> None:
    from raymerge.merge_actors.checkpoint.folder import open_checkpoint
    from raymerge.stats.evaluation.resident import load_resident

    folder = tiny_checkpoints("llama").base
    evaluation = evaluation_of(
        kind="harness",
        task="tiny_choice",
        include=tasks_folder,
        metrics=["acc", "acc_norm"],
        batch_documents=5,
    )
    model = load_resident(open_checkpoint(folder), evaluation.tasks)
    test = evaluation.tasks[0].prepare("test", str(folder))
    assert (test.num_examples, test.num_batches) == (14, 3)
    found = test.summarise(concatenate([test.score(model, i, i + 1) for i in (2, 0, 1)]))
    own = _own_run(folder, tasks_folder, "tiny_choice")  # the harness takes the test split where there is one
    for metric in ("acc", "acc_norm"):
        assert found[metric].value == pytest.approx(own[f"{metric},none"])
    assert found == test.summarise(test.score(model))
    validation = evaluation.tasks[0].prepare("validation", str(folder))
    assert validation.num_examples == 20
    assert validation.fingerprint != test.fingerprint
    rows = [json.loads(line) for line in (tasks_folder / "validation.jsonl").read_text().splitlines()]
    native = evaluation_of(
        kind="multiple_choice",
        validation=tasks_folder / "validation.jsonl",
        prompt="{question}",
        choices_column="options",
        label_column="answer",
    ).tasks[0]
    prepared = native.prepare("validation", str(folder))
    ours = prepared.score(load_resident(open_checkpoint(folder), [native]))
    scores = validation.score(model)
    assert len(rows) == 20
    assert scores["acc"].tolist() == ours["correct"].tolist()
    assert scores["acc_norm"].tolist() == ours["correct_norm"].tolist()


@needs_harness
@pytest.mark.filterwarnings("default")
def test_metrics_that_are_no_means_are_aggregated_by_the_harness(
    tiny_checkpoints: Maker, tasks_folder: Path, evaluation_of: Maker
) -> None:
    from raymerge.merge_actors.checkpoint.folder import open_checkpoint
    from raymerge.stats.evaluation.resident import load_resident

    folder = tiny_checkpoints("llama").base
    fields = {
        "kind": "harness",
        "task": "tiny_perplexity",
        "include": tasks_folder,
        "metrics": ["word_perplexity"],
    }
    evaluation = evaluation_of(**fields)
    model = load_resident(open_checkpoint(folder), evaluation.tasks)
    prepared = evaluation.tasks[0].prepare("test", str(folder))
    found = prepared.summarise(prepared.score(model))["word_perplexity"]
    own = _own_run(folder, tasks_folder, "tiny_perplexity")
    assert found.value == pytest.approx(own["word_perplexity,none"])
    assert found.standard_error > 0
    assert not evaluation.higher_is_better("mine.word_perplexity")
    with pytest.raises(RecipeError, match="validation: the task 'tiny_perplexity' has no validation split"):
        evaluation.tasks[0].prepare("validation", str(folder))
    named = evaluation_of(**fields, validation="test").tasks[0]
    assert named.prepare("validation", str(folder)).num_examples == 14


@needs_harness
@pytest.mark.filterwarnings("default")
def test_bad_input(tiny_checkpoints: Maker, tasks_folder: Path, evaluation_of: Maker) -> None:
    folder = str(tiny_checkpoints("llama").base)

    def refuse(pattern: str, **task: Any) -> None:
        fields = {"kind": "harness", "task": "tiny_choice", "include": tasks_folder, **task}
        with pytest.raises(RecipeError, match=pattern):
            evaluation_of(**fields).tasks[0].prepare("validation", folder)

    refuse("has no task, group or tag 'tiny_chioce'", task="tiny_chioce")
    refuse("has no metric 'accuracy'; it has acc, acc_norm", metrics=["accuracy"])
    refuse("have no split 'dev'; they have validation, test", validation="dev")
    refuse("lower_is_better: of the task 'tiny_choice' a higher acc is better", lower_is_better=["acc"])


@pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed"
)
def test_without_the_harness_the_extra_is_named(tiny_checkpoints: Maker, evaluation_of: Maker) -> None:
    task = evaluation_of(kind="harness", task="arc_easy").tasks[0]
    assert task.metric_names() == ("acc",)
    with pytest.raises(RecipeError, match=r"tasks\[0\].kind: .*pip install 'raymerge\[harness\]'"):
        task.prepare("validation", str(tiny_checkpoints("llama").base))


def test_splits_are_named_and_differ(evaluation_of: Maker) -> None:
    with pytest.raises(RecipeError, match="test: 'train' is the split of `validation`"):
        evaluation_of(kind="harness", task="arc_easy", validation="train", test="train")
