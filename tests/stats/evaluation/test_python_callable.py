"""A user's callable: what it is given, what it may return, and that nothing it raises ends the run."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymerge.merge_actors.errors import RecipeError
from raymerge.stats.evaluation.task_spec import EvaluationError

Maker = Callable[..., Any]

CODE = """
import sys
import torch

def score(model, tokenizer, context):
    lengths = [len(tokenizer(row["text"])["input_ids"]) for row in context.rows]
    assert not model.training and not torch.is_grad_enabled()
    norm = model.get_input_embeddings().weight.norm()
    return {"length": lengths, "norm": norm * context.options["factor"]}

def one(model, tokenizer, context):
    return 7

def broken(model, tokenizer, context):
    model.train()
    raise KeyError(context.name)

def leaves(model, tokenizer, context):
    sys.exit(3)

def texts(model, tokenizer, context):
    return "good"

def unlike(model, tokenizer, context):
    return {"length": [1, 2], "norm": [1, 2, 3]}

number = 5
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "my.py"
    path.write_text(CODE)
    return path


def test_numbers_and_lists_become_metrics(
    tiny_checkpoints: Maker, texts: Path, code: Path, scored: Maker
) -> None:
    folder = tiny_checkpoints("llama").base
    prepared, model = scored(
        folder,
        kind="python",
        file=code,
        callable="my:score",
        validation=texts,
        samples=10,
        metrics=["length", "norm"],
        lower_is_better=["norm"],
        options={"factor": 2},
    )
    scores = prepared.score(model)
    found = prepared.summarise(scores)
    lengths = scores["length"]
    assert len(lengths) == 10
    assert found["length"].value == pytest.approx(lengths.mean())
    assert found["length"].standard_error == pytest.approx(lengths.std(ddof=1) / math.sqrt(10))
    weight = model.module(prepared.task).get_input_embeddings().weight
    assert found["norm"].value == pytest.approx(2 * weight.norm().item())
    assert math.isnan(found["norm"].standard_error)
    assert [prepared.task.higher_is_better(name) for name in prepared.metrics] == [True, False]


def test_a_module_on_the_path_and_one_number(tiny_checkpoints: Maker, scored: Maker, code: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.syspath_prepend(str(code.parent))
    prepared, model = scored(tiny_checkpoints("bert").base, kind="python", callable="my:one", model="encoder")
    assert prepared.summarise(prepared.score(model))["score"].value == 7


@pytest.mark.parametrize(
    ("function", "pattern"),
    [
        ("broken", r"(?s)mine: my:broken raised KeyError: 'mine'.*Traceback.*line 16, in broken"),
        ("leaves", r"(?s)raised SystemExit: 3.*in leaves"),
        ("texts", r"returned 'good' for length|returned the metrics length, but"),
        ("unlike", r"length \(2,\), norm \(3,\)"),
        ("one", "returned the metrics length, but the task names length, norm"),
    ],
)
def test_what_a_callable_raises_is_an_error_of_this_model(
    function: str, pattern: str, tiny_checkpoints: Maker, code: Path, scored: Maker
) -> None:
    prepared, model = scored(
        tiny_checkpoints("llama").base,
        kind="python",
        file=code,
        callable=f"my:{function}",
        metrics=["length", "norm"],
    )
    with pytest.raises(EvaluationError, match=pattern):
        prepared.score(model)
    assert not model.module(prepared.task).training


def test_bad_input(tiny_checkpoints: Maker, code: Path, evaluation_of: Maker, tmp_path: Path) -> None:
    def refuse(pattern: str, **task: Any) -> None:
        with pytest.raises(RecipeError, match=pattern):
            task = {"kind": "python", "file": code, "callable": "one", **task}
            evaluation_of(**task).tasks[0].prepare("validation", str(tiny_checkpoints("llama").base))

    refuse("callable: 'two' cannot be loaded: AttributeError", callable="two")
    refuse("callable: 'number' is a int; a function", callable="number")
    refuse(
        "callable: 'no_such_module:f' cannot be loaded: ModuleNotFoundError",
        file=None,
        callable="no_such_module:f",
    )
    refuse("names no module", file=None, callable="f")
    refuse("lower_is_better: 'x' is none of the metrics score", lower_is_better=["x"])
    broken = tmp_path / "broken.py"
    broken.write_text("def f(:")
    refuse("callable: 'f' cannot be loaded: SyntaxError", file=broken, callable="f")
