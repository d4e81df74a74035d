"""Expressions over axes: their values, and that nothing else can be written."""

from __future__ import annotations

from typing import Any

import pytest

from raymerge.cluster.grid_expressions import Expression

VALUES = {"lambda": 0.5, "k": 4, "method": "ties", "pair": ["a", "b"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lambda <= 0.5 and $k > 3", True),
        ("0 < lambda < 0.5", False),
        ("method == 'ties' or lambda", True),
        ("method in ['dare', 'ties'] and not k == 5", True),
        ("'a' in pair and len(pair) == 2", True),
        ("pair[1]", "b"),
        ("1 - lambda", 0.5),
        ("1 - 0.9", 0.1),
        ("0.1 * 3 == 0.3", True),
        ("-k ** 2 // 3 % 5", 4),
        ("max(lambda, 1, ${k}) if k > 1 else false", 4),
        ("round(1 / 3, 2)", 0.33),
        ("'lambda' == 'lambda'", True),
        ("null == none_ish", False),
    ],
)
def test_values(text: str, expected: Any) -> None:
    names = {**VALUES, "none_ish": 1}
    assert Expression(text, names).evaluate(names) == expected


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "().__class__",
        "pair.append(1)",
        "[x for x in pair]",
        "lambda_ := 3",
        "f'{k}'",
        "open('x')",
        "(lambda: 1)()",
        "{k: 1}",
        "k & 1",
        "*pair",
        "b'a'",
        "1j",
        "len(obj=pair)",
        "max(*pair)",
        "k +",
        "",
    ],
)
def test_nothing_else_is_an_expression(text: str) -> None:
    with pytest.raises((ValueError, LookupError)):
        Expression(text, VALUES)


@pytest.mark.parametrize(
    "text", ["k ** 1000", "'a' * 1000000000", "1 / (k - 4)", "pair[7]", "k < 'a'", "9**64**64"]
)
def test_values_that_do_not_go_together(text: str) -> None:
    with pytest.raises(ValueError, match="which fails for"):
        Expression(text, VALUES).evaluate(VALUES)


def test_an_unknown_name_is_named() -> None:
    with pytest.raises(LookupError) as error:
        Expression("lamda < 1", VALUES)
    assert error.value.args == ("lamda",)
    assert Expression("lambda < k", VALUES).names == {"lambda", "k"}


def test_deep_nesting_does_not_kill_the_process() -> None:
    with pytest.raises(ValueError):
        Expression("(" * 900 + "k" + ")" * 900, VALUES)
