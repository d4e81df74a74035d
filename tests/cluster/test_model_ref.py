"""Model references: texts, mappings, and the canonical key."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.cluster.model_ref import ModelRef, parse_model


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("org/name", ModelRef(path="org/name")),
        ("org/name@main", ModelRef(path="org/name", revision="main")),
        (
            "org/name@abc+you/lora@v2",
            ModelRef(path="org/name", revision="abc", adapter=ModelRef(path="you/lora", revision="v2")),
        ),
        ("./models/a.b-c", ModelRef(path="./models/a.b-c")),
        ("s3://user@bucket/model", ModelRef(path="s3://user@bucket/model")),
        ("s3://a@b+gs://c@d", ModelRef(path="s3://a@b", adapter=ModelRef(path="gs://c@d"))),
        ("hf://org/name@main", ModelRef(path="hf://org/name", revision="main")),
        ({"model": {"path": "a", "revision": "r"}, "lora": "l@2"}, parse_model("a@r+l@2")),
        ({"model": "a@r", "lora": {"path": "l", "revision": 2}}, parse_model("a@r+l@2")),
        ({"path": "a+b@c"}, ModelRef(path="a+b@c")),
    ],
)
def test_spellings(value: Any, expected: ModelRef) -> None:
    assert parse_model(value) == expected


def test_the_key_is_the_canonical_text() -> None:
    assert parse_model({"model": {"path": "a", "revision": "r"}, "lora": "l@2"}).key == "a@r+l@2"
    assert str(ModelRef(path="s3://a@b")) == "s3://a@b"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", r"is not a model: it must be path\[@revision\]"),
        ("a@", "is not a model"),
        ("a@b@c", "names more than one revision after '@'"),
        ("a+b+c", r"names more than one adapter after '\+'"),
        (3, "must be a model: a path, a Hub id, or a mapping"),
        ({"model": "a", "path": "b"}, "must name its model by exactly one of 'model' and 'path'"),
        ({"path": "a", "rev": "b"}, "holds the unknown key 'rev'"),
        ({"model": "a@1", "revision": "2"}, "names the revisions '1' and '2'; keep one"),
        ({"model": "a+l", "lora": "m"}, "names more than one adapter; a model takes one"),
        ({"model": "a", "lora": "l+m"}, "names more than one adapter; a model takes one"),
        ({"path": ""}, "has path ''; it must be a text"),
    ],
)
def test_bad_references(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_model(value)


TEXTS = st.text("ab/+@:. s3", min_size=1, max_size=12)
PARTS = st.builds(ModelRef, path=TEXTS, revision=st.none() | TEXTS)


@given(PARTS, st.none() | PARTS)
def test_what_is_written_reads_back(model: ModelRef, adapter: ModelRef | None) -> None:
    whole = ModelRef(path=model.path, revision=model.revision, adapter=adapter)
    assert parse_model(whole.to_value()) == whole
