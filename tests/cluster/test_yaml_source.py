"""YAML of strangers: values, lines, and what is refused."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from raymerge.cluster.yaml_source import MAX_TEXT_BYTES, parse_documents, read_documents
from raymerge.merge_actors.errors import RecipeError


def test_values_and_lines_of_nested_keys() -> None:
    (document,) = parse_documents("a: 1\nb:\n  - c: x\n  - d: [1.5, yes, null]\n", "f.yaml")
    assert document.value == {"a": 1, "b": [{"c": "x"}, {"d": [1.5, True, None]}]}
    lines = document.origin.lines
    assert (lines["a"], lines["b"], lines["b[0]"], lines["b[0].c"], lines["b[1].d[2]"]) == (1, 2, 3, 3, 4)
    assert document.origin.at("b[1].d") == "f.yaml:4"
    assert document.origin.at("b[1].nothing.here") == "f.yaml:4"
    assert document.origin.at("elsewhere") == "f.yaml:1"


def test_documents_are_separate_and_empty_ones_are_left_out() -> None:
    documents = parse_documents("---\n# nothing\n---\na: 1\n---\nb: 2\n", "f.yaml")
    assert [document.value for document in documents] == [{"a": 1}, {"b": 2}]
    assert [document.origin.lines for document in documents] == [{"a": 4}, {"b": 6}]


def test_anchors_and_merge_keys() -> None:
    text = "x-a: &a {p: 1, q: 2}\nx-b: &b {q: 3, r: 4}\nm:\n  q: 5\n  <<: [*a, *b]\nn:\n  <<: *b\n"
    (document,) = parse_documents(text, "f.yaml")
    assert document.value["m"] == {"p": 1, "q": 5, "r": 4}
    assert document.value["n"] == {"q": 3, "r": 4}
    assert (document.origin.lines["m.p"], document.origin.lines["m.q"], document.origin.lines["m.r"]) == (
        1,
        4,
        2,
    )


def test_dates_and_versions_stay_texts() -> None:
    (document,) = parse_documents("a: 2024-01-31\nb: 1e-10\n", "f.yaml")
    assert document.value == {"a": "2024-01-31", "b": "1e-10"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3: key a stands twice, first in line 1; keep one."),
        ("m:\n  k: 1\n  k: 1\n", "f.yaml:3: key m.k stands twice, first in line 2; keep one."),
        (
            "a: !!python/object/apply:os.system [ls]\n",
            "f.yaml:1: the tag 'tag:yaml.org,2002:python/object/apply:os.system' is not allowed in a recipe.",
        ),
        ("a: !secret x\n", "f.yaml:1: the tag '!secret' is not allowed in a recipe."),
        ("a:\n  b: &x [*x]\n", "f.yaml:2: an anchor refers to itself."),
        ("a: &x\n  <<: *x\n", "f.yaml:1: an anchor refers to itself."),
        ("a:\n  <<: 3\n", "f.yaml:2: '<<' takes a mapping or a list of mappings."),
        ("? [1, 2]\n: 3\n", "f.yaml:1: a key must be a text."),
        ("a: *nowhere\n", "f.yaml:1: not valid YAML: found undefined alias 'nowhere'."),
        ("a: [1, 2\nb: 3\n", "f.yaml:2: not valid YAML: while parsing a flow sequence expected ',' or ']'"),
        ("a: \x00\n", "f.yaml: not valid YAML: unacceptable character #x0000"),
        ("[" * 5000, "f.yaml: values are nested too deeply to be a recipe."),
    ],
)
def test_what_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_documents(text, "f.yaml")
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "reference", ["[*a{0}, *a{0}, *a{0}, *a{0}]", "{{<<: [*a{0}, *a{0}, *a{0}, *a{0}]}}"]
)
def test_an_alias_bomb_is_refused_quickly(reference: str) -> None:
    start = "a0: &a0 " + ("[1]" if reference[0] == "[" else "{k: 1}") + "\n"
    bomb = start + "".join(f"a{i + 1}: &a{i + 1} {reference.format(i)}\n" for i in range(20))
    begin = time.monotonic()
    with pytest.raises(RecipeError, match="aliases unfold to more than 500,000 values"):
        parse_documents(bomb, "f.yaml")
    assert time.monotonic() - begin < 20


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    absent, large, binary = tmp_path / "no.yaml", tmp_path / "large.yaml", tmp_path / "binary.yaml"
    large.write_bytes(b"#" * (MAX_TEXT_BYTES + 1))
    binary.write_bytes(b"a: \xff\xfe")
    for path, message in [
        (absent, f"{absent} cannot be read: No such file or directory."),
        (tmp_path, f"{tmp_path} cannot be read: Is a directory."),
        (large, f"{large} is larger than 4 MiB; a recipe is a small text."),
        (binary, f"{binary} is not a text in UTF-8 (byte 3)."),
    ]:
        with pytest.raises(RecipeError) as caught:
            read_documents(path)
        assert str(caught.value) == message
