"""SECURITY.md names a test for every attack, and each of these tests exists."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = [
    line
    for line in (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("| ") and not line.startswith("| attack")
]


def test_there_are_rows():
    assert len(ROWS) >= 12


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_a_row_names_tests_that_exist(row):
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row.split("|")[3])
    assert named
    for file, test in named:
        found = list((ROOT / "tests").rglob(file))
        assert found, file
        assert any(f"def {test}(" in path.read_text(encoding="utf-8") for path in found), test
