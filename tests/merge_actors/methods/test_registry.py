"""The registry and its page: every method, step and parameter has its place in docs/methods.md."""

import pickle
import re
from pathlib import Path

import pytest

from raymerge.cluster.method_parameters import parameters_of
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS

PAGE = (Path(__file__).parents[3] / "docs" / "methods.md").read_text()


def rows(name: str) -> list[str]:
    return [line for line in PAGE.splitlines() if line.startswith(f"| `{name}`")]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_row_with_its_parameters(name: str) -> None:
    assert METHODS[name].name == name
    assert rows(name), f"docs/methods.md has no row for {name}"
    text = " ".join(rows(name))
    for other in re.findall(r"as `(\w+)`", text):
        text += " ".join(rows(other))
    common = {"weight", "density", "lambda", "normalize", "merge_func"}
    declared = parameters_of(METHODS[name])
    for each in (*declared.shared, *declared.per_model):
        assert f"`{each.name}`" in text or each.name in common, f"the row of {name} lacks {each.name}"


@pytest.mark.parametrize("name", SPARSIFIERS)
def test_a_step_has_a_row_with_its_parameters(name: str) -> None:
    assert SPARSIFIERS[name].name == name
    text = " ".join(rows(name))
    for each in SPARSIFIERS[name].parameters:
        assert f"`{each.name}` (" in text, f"the row of {name} lacks {each.name}"


@pytest.mark.parametrize("name", METHODS)
def test_methods_travel_to_workers(name: str) -> None:
    assert pickle.loads(pickle.dumps(METHODS[name])).merge is METHODS[name].merge
