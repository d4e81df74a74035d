"""Every input that fuzzing found worth keeping passes or is refused by an error of ours."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parent
_SPEC = importlib.util.spec_from_file_location("fuzz_targets", _FOLDER / "targets.py")
assert _SPEC and _SPEC.loader
targets = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(targets)


@pytest.mark.parametrize("name", sorted(targets.TARGETS))
def test_the_corpus_finds_nothing(name):
    files = sorted((_FOLDER / "corpus" / name).iterdir())
    assert len(files) > 10
    for file in files:
        targets.TARGETS[name](file.read_bytes())
