"""The soak runs: merges under faults come out right, the record is gone on with, and what is wrong is noticed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def soak(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    script = REPOSITORY / "benchmarks" / "soak.py"
    words = [sys.executable, script, "--record", folder / "record.jsonl", "--results", folder, *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY)


@pytest.mark.slow
@pytest.mark.ray
def test_soak_goes_on_with_its_record_and_counts(tmp_path: Path) -> None:
    assert soak(tmp_path, "--merges", "2").returncode == 0
    done = soak(tmp_path, "--merges", "4")
    assert done.returncode == 0, done.stderr
    (page,) = tmp_path.glob("soak_*.json")
    counts = json.loads(page.read_text())["results"]["counts"]
    assert counts["merges"] == 4
    assert counts["wrong outputs"] == counts["hangs"] == counts["other problems"] == 0
    rows = [json.loads(line) for line in (tmp_path / "record.jsonl").read_text().splitlines()]
    assert [row["number"] for row in rows if row["kind"] == "merge"] == [0, 1, 2, 3]
