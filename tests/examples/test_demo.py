"""The parts of the demo that need no training: labels, recipes, the table, and which phases run again."""

import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest

from raymerge.cluster.recipe_reader import read_recipes

DEMO = Path(__file__).parents[2] / "examples" / "demo"

NUMPY_STYLE = """Sort the rows.

Parameters
----------
axis : int, optional
    The axis to sort along.
keys, names : array_like
    What to sort by.
where : int or float
    Two types give no label.

Returns
-------
out : ndarray
    The sorted rows.

Notes
-----
Stable.

A second paragraph.
"""
GOOGLE_STYLE = """Load the weights.

Args:
    strict (`bool`, *optional*): whether names must
        match.
    path: where the file is.

Raises:
    ValueError: if a name is missing.
"""


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(DEMO)
    return importlib.import_module("demo")


def _passages(demo: ModuleType, docstring: str, library: str) -> list[tuple[str, str, str]]:
    docstrings = demo.docstrings
    return [
        (skill, label, docstrings._plain(text))
        for skill, label, text in docstrings._passages(docstring, library)
    ]


def test_labels_of_a_numpy_style_docstring(demo: ModuleType) -> None:
    assert _passages(demo, NUMPY_STYLE, "numpy") == [
        ("library", "numpy", "Sort the rows."),
        ("section", "summary", "Sort the rows."),
        ("section", "parameter", "The axis to sort along."),
        ("type", "int", "The axis to sort along."),
        ("section", "parameter", "What to sort by."),
        ("type", "array", "What to sort by."),
        ("section", "parameter", "Two types give no label."),
        ("section", "returns", "The sorted rows."),
        ("section", "notes", "Stable."),
    ]


def test_labels_of_a_google_style_docstring(demo: ModuleType) -> None:
    assert _passages(demo, GOOGLE_STYLE, "torch") == [
        ("library", "torch", "Load the weights."),
        ("section", "summary", "Load the weights."),
        ("section", "parameter", "whether names must match."),
        ("type", "bool", "whether names must match."),
        ("section", "parameter", "where the file is."),
        ("section", "raises", "if a name is missing."),
    ]


def test_a_summary_does_not_name_its_library(demo: ModuleType) -> None:
    [(_, _, text), _] = _passages(demo, "Return a PyTorch tensor, as torch.add and NumPy do.", "torch")
    assert text == "Return a it tensor, as it.add and it do."


def test_labels_are_balanced_and_ambiguous_texts_left_out(demo: ModuleType) -> None:
    labels = {f"text {i}": {"a" if i < 1000 else "b"} for i in range(3000)} | {"unclear": {"a", "b"}}
    splits = demo.docstrings._balance(("a", "b"), labels, dict.fromkeys(labels, "test"))
    assert [sum(e.label == label for e in splits["test"]) for label in (0, 1)] == [250, 250]
    assert splits["train"] == []
    assert "unclear" not in {e.text for e in splits["test"]}


def test_recipes_read_without_remarks(demo: ModuleType) -> None:
    for path in sorted(demo.RECIPES.glob("*.yaml")):
        recipes, remarks = read_recipes(path, strict=True)
        assert (len(recipes), remarks) == (1, [])


def test_the_table_shows_standard_errors_and_means(demo: ModuleType) -> None:
    results = {
        "num_test_texts": {"one": 100, "two": 400},
        "num_labels": {"one": 2, "two": 4},
        "accuracy": {"base": {"one": 0.5, "two": 0.25}, "ties": {"one": 0.9, "two": 0.8}},
        "recipes": {"ties": ""},
    }
    lines = [line.split() for line in demo.report.table(results).splitlines()]
    assert lines[2] == ["chance", "50.0", "25.0"]
    assert lines[3] == ["base", "50.0", "+-5.0", "25.0", "+-2.2", "37.5", "+-2.7"]
    assert lines[5] == ["ties", "90.0", "+-3.0", "80.0", "+-2.0", "85.0", "+-1.8"]


def test_a_phase_runs_again_when_its_inputs_change_or_it_failed(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "WORK", tmp_path)
    runs: list[str] = []

    def fail() -> None:
        raise OSError("disk full")

    first = demo.phase("merging", lambda: runs.append("first"), "recipe")
    assert demo.phase("merging", lambda: runs.append("kept"), "recipe") == first
    assert demo.phase("merging", lambda: runs.append("changed"), "another recipe") != first
    with pytest.raises(OSError, match="disk full"):
        demo.phase("merging", fail, "third recipe")
    demo.phase("merging", lambda: runs.append("after failure"), "another recipe")
    assert runs == ["first", "changed", "after failure"]
    assert os.listdir(tmp_path) == ["merging.done"]
