"""What the tests of evaluation share: data files, classifiers, and a resident model of a folder."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from raymerge.merge_actors.checkpoint.folder import open_checkpoint
from raymerge.stats.evaluation.evaluate import prepare_task
from raymerge.stats.evaluation.prepared import PreparedTask
from raymerge.stats.evaluation.resident import ResidentModel, load_resident
from raymerge.stats.evaluation.tasks import EvaluationSpec, parse_evaluation

LABELS = ("LABEL_0", "LABEL_1", "LABEL_2")


def words(rng: random.Random, fewest: int, most: int) -> str:
    """Return a text of the tiny tokenizer's words."""
    return " ".join(f"word{rng.randrange(92)}" for _ in range(rng.randint(fewest, most)))


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 rows: a text, a second one, a class of three, a number, a split by name of the file."""
    rng = random.Random(3)
    rows = [
        {
            "text": words(rng, 1, 20),
            "other": words(rng, 1, 9),
            "label": LABELS[rng.randrange(3)],
            "score": rng.random(),
        }
        for _ in range(30)
    ]
    return write_rows(tmp_path_factory.mktemp("texts") / "validation.jsonl", rows)


@pytest.fixture(scope="session")
def make_head(tiny_checkpoints: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a maker of checkpoints with a head: (class name, number of labels, architecture) -> folder."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(class_name: str, num_labels: int = 3, architecture: str = "bert", **config: Any) -> Path:
        import torch
        import transformers

        key = (class_name, num_labels, architecture, str(config))
        if key not in made:
            base = tiny_checkpoints(architecture).base
            folder = tmp_path_factory.mktemp("head")
            with torch.random.fork_rng():
                torch.manual_seed(num_labels)
                settings = transformers.AutoConfig.from_pretrained(base, num_labels=num_labels, **config)
                model = getattr(transformers, class_name)(settings)
                for parameter in model.parameters():  # away from zero, so that classes differ
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
            model.save_pretrained(folder)
            transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def evaluation_of() -> Callable[..., EvaluationSpec]:
    """Return a parser of one task, given as keywords."""

    def make(**task: Any) -> EvaluationSpec:
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in task.items()}
        return parse_evaluation({"tasks": [{"name": "mine", **plain}]})

    return make


@pytest.fixture
def scored(evaluation_of: Callable[..., EvaluationSpec]) -> Callable[..., tuple[PreparedTask, ResidentModel]]:
    """Return a maker: (model folder, fields of a task) -> the prepared task and the model bound to the folder."""

    def make(folder: Path, **task: Any) -> tuple[PreparedTask, ResidentModel]:
        evaluation = evaluation_of(**task)
        prepared = prepare_task(evaluation.tasks[0], "validation", str(folder))
        return prepared, load_resident(open_checkpoint(folder), evaluation.tasks)

    return make
