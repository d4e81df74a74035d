"""Actors whose process is stopped while they work are replaced, those that are merely slow are left alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
from torch import linalg, randn

import raymerge
from raymerge.cluster import signs_of_life
from raymerge.cluster.ray_group import RayGroup

pytestmark = pytest.mark.ray
SILENT_SECONDS = 3.0


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signs_of_life, "QUIET_SECONDS", 0.5)
    monkeypatch.setattr(signs_of_life, "SILENT_SECONDS", SILENT_SECONDS)


@pytest.fixture
def recipe(tiny_checkpoints: Callable[..., Any]) -> dict[str, Any]:
    family = tiny_checkpoints("llama")
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in family.models]
    return {"merge_method": "dare_ties", "base_model": str(family.base), "models": models}


def before_first_task(monkeypatch: pytest.MonkeyPatch, do: Callable[[Any], Any]) -> None:
    """Do something with the first actor before it gets any work."""
    submit, done = RayGroup.submit, list[int]()

    def submit_then(group: Any, worker: int, instruction: Any, states: Any) -> None:
        if not done:
            done.append(worker)
            do(group._actors[worker])
        submit(group, worker, instruction, states)

    monkeypatch.setattr(RayGroup, "submit", submit_then)


def _same_bytes(tmp_path: Path) -> bool:
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "expected"))
    return one == other


def test_the_only_worker_is_stopped(
    ray_session: None, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No other worker is there to take its task over, and nothing says that it is gone."""
    raymerge.merge(recipe, tmp_path / "expected", in_process=True)
    stopped = []

    def stop(actor: Any) -> None:
        stopped.append(ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=60))
        os.kill(stopped[0], signal.SIGSTOP)

    before_first_task(monkeypatch, stop)
    result = raymerge.merge(recipe, tmp_path / "out", workers=1, device="cpu")
    assert result.totals.num_retries > 0 and result.totals.num_speculated == 0
    assert any("hangs: no answer in 3 s; another takes its place" in line for line in result.remarks)
    assert _same_bytes(tmp_path)
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{stopped[0]}"):
        assert time.monotonic() < deadline, "the stopped process stays"
        time.sleep(0.1)


def _slow_down(actor: Any) -> None:
    """Let an actor's lanes wait, as for storage, and compute for longer than a worker may be silent."""
    merge = actor._worker.merge

    def merge_slowly(*arguments: Any) -> Any:
        time.sleep(SILENT_SECONDS)
        end = time.monotonic() + 3.0
        while time.monotonic() < end:
            linalg.svd(randn(600, 600))
        return merge(*arguments)

    actor._worker.merge = merge_slowly


def test_a_slow_worker_is_left_alone(
    ray_session: None, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raymerge.merge(recipe, tmp_path / "expected", in_process=True)
    before_first_task(monkeypatch, lambda actor: ray.get(actor.__ray_call__.remote(_slow_down), timeout=60))
    result = raymerge.merge(recipe, tmp_path / "out", workers=1, device="cpu")
    assert result.totals.num_retries == 0 and result.seconds > SILENT_SECONDS + 3
    assert _same_bytes(tmp_path)


def _begin_slowly(actor: Any) -> None:
    """Let an actor take long to begin its next run: it downloads a model, or the store is slow."""
    begin = actor._begin

    def wait_and_begin(context: Any) -> None:
        time.sleep(SILENT_SECONDS + 1.5)
        begin(context)

    actor._begin = wait_and_begin


def test_a_worker_that_takes_long_to_begin_its_next_run_is_left_alone(
    ray_session: None, recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []
    lose = RayGroup._lose

    def note(group: RayGroup, worker: int, reason: str) -> Any:
        lost.append(reason)
        return lose(group, worker, reason)

    monkeypatch.setattr(RayGroup, "_lose", note)
    before_first_task(
        monkeypatch, lambda actor: ray.get(actor.__ray_call__.remote(_begin_slowly), timeout=60)
    )
    with raymerge.Session(workers=1, device="cpu") as session:
        session.merge(recipe, tmp_path / "expected")
        session.merge(recipe, tmp_path / "out")
    assert not lost
    assert _same_bytes(tmp_path)
