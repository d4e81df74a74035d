"""The timeline of a run."""

from __future__ import annotations

import itertools
import json

import pytest

import raymerge
from raymerge.merge_actors.errors import OutputError


def test_every_task_has_a_bar_with_its_phases(tiny_checkpoints, tmp_path):
    family = tiny_checkpoints("llama")
    entries = [{"model": str(model), "parameters": {"weight": 1}} for model in family.models]
    file = tmp_path / "trace.json"
    result = raymerge.merge(
        {"merge_method": "linear", "models": entries},
        tmp_path / "out",
        in_process=True,
        workers=2,
        trace=str(file),
    )
    events = json.loads(file.read_text())["traceEvents"]
    bars = [event for event in events if event["ph"] == "X"]
    tasks = [bar for bar in bars if bar["name"].startswith("task ")]
    assert len(tasks) == result.num_tasks
    assert sum(bar["args"]["read_bytes"] for bar in tasks) == result.totals.read_bytes
    assert {bar["name"] for bar in bars} - {bar["name"] for bar in tasks} == {"read", "merge", "write"}
    for task in tasks:
        inner = [
            b
            for b in bars
            if b["name"] in ("read", "merge", "write") and (b["pid"], b["tid"]) == (task["pid"], task["tid"])
        ]
        inside = [b for b in inner if task["ts"] <= b["ts"] <= task["ts"] + task["dur"]]
        assert len(inside) >= 3
    for pid, tid in {(bar["pid"], bar["tid"]) for bar in tasks}:  # what overlaps is drawn on rows of its own
        row = sorted((bar["ts"], bar["dur"]) for bar in tasks if (bar["pid"], bar["tid"]) == (pid, tid))
        assert all(ts + dur <= after + 1 for (ts, dur), (after, _) in itertools.pairwise(row))


def test_a_trace_that_cannot_be_written_is_refused_before_anything_is_merged(tiny_checkpoints, tmp_path):
    entries = [
        {"model": str(model), "parameters": {"weight": 1}} for model in tiny_checkpoints("llama").models
    ]
    with pytest.raises(OutputError, match=r"cannot write .*nowhere"):
        raymerge.merge(
            {"merge_method": "linear", "models": entries},
            tmp_path / "out",
            in_process=True,
            trace=str(tmp_path / "nowhere" / "trace.json"),
        )
    assert not list(tmp_path.iterdir())
