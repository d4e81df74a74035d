"""A session's workers serve one merge after the other, also after one that failed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import raymerge
from raymerge.cluster.worker_group import InProcessGroup
from raymerge.merge_actors.errors import NotFiniteError, OutputError
from raymerge.merge_actors.ray_worker import RayMergeWorker
from raymerge.merge_actors.task import MergeTask, RunContext


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    rng = np.random.default_rng(0)
    folders = []
    for name in ("base", "one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        save_file({"w": rng.standard_normal((300, 200)).astype(np.float32)}, folder / "model.safetensors")
        folders.append(str(folder))
    return folders


def ties(models: list[str]) -> dict[str, Any]:
    base, *others = models
    return {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": m, "parameters": {"weight": 0.5, "density": 0.3}} for m in others],
    }


@pytest.mark.parametrize("in_process", [True, pytest.param(False, marks=pytest.mark.ray)])
def test_merges_on_one_set_of_workers(
    in_process: bool, models: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not in_process:
        request.getfixturevalue("ray_session")
    alone = tmp_path / "alone"
    raymerge.merge(ties(models), alone, in_process=True)
    with raymerge.Session(in_process=in_process, workers=2) as session:
        for number in range(3):
            result = session.merge(ties(models), tmp_path / f"out{number}")
            assert result.num_workers == 2
        with pytest.raises(OutputError, match="exists"):
            session.merge(ties(models), tmp_path / "out0")
        several = session.merge(
            [{**ties(models), "name": "a"}, {**ties(models), "name": "b"}], tmp_path / "both"
        )
    expected = load_file(alone / "model.safetensors")["w"]
    for folder in (tmp_path / "out0", tmp_path / "out2", *several.outputs):
        assert np.array_equal(load_file(Path(folder) / "model.safetensors")["w"], expected)


@pytest.mark.parametrize("in_process", [True, pytest.param(False, marks=pytest.mark.ray)])
def test_a_failed_merge_leaves_the_session_usable(
    in_process: bool, models: list[str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not in_process:
        request.getfixturevalue("ray_session")
    bad = tmp_path / "bad"
    bad.mkdir()
    save_file({"w": np.full((300, 200), np.nan, np.float32)}, bad / "model.safetensors")
    with raymerge.Session(in_process=in_process, workers=1) as session:
        with pytest.raises(NotFiniteError, match="bad"):
            session.merge(ties([models[0], models[1], str(bad)]), tmp_path / "out")
        assert not (tmp_path / "out").exists()
        session.merge(ties(models), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_ended_after_a_failure_is_no_news_to_the_next_run() -> None:
    """A failed run leaves tasks behind that end while the group closes; their reports must not count later."""
    context = RunContext(run_id="run", settings=(), device="cpu", num_threads=1)
    group = InProcessGroup(2)
    group.start(context)
    for number in range(8):
        group.submit(number % 2, MergeTask(number=number, pieces=()), {})
    group.close()
    group.start(context)
    assert group.wait(0.05) == []
    group.close()


def test_actor_lets_go_of_the_files_of_an_earlier_run(tmp_path: Path, models: list[str]) -> None:
    """An open file of an output that was replaced would keep its space on the disk."""
    actor = RayMergeWorker.__ray_metadata__.modified_class()
    context = RunContext(run_id="run", settings=(), device="cpu", num_threads=1)
    actor.setup(context, 0)
    path = tmp_path / "base" / "model.safetensors"
    actor._worker._files.read_into(str(path), 0, memoryview(bytearray(8)))
    assert _num_open(path) == 1
    actor.setup(context, 1)
    assert _num_open(path) == 0


def _num_open(path: Path) -> int:
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    return sum(os.path.realpath(link) == str(path.resolve()) for link in links if os.path.lexists(link))


def test_options_of_the_workers_are_the_sessions(models: list[str], tmp_path: Path) -> None:
    with raymerge.Session(in_process=True, workers=1) as session:
        session.merge(ties(models), tmp_path / "out", slice_mib=1, seed=3)
    with pytest.raises(AttributeError, match="no attribute 'Sessions'"):
        raymerge.Sessions  # noqa: B018


def test_a_session_can_be_entered_again_and_keeps_its_workers(models: list[str], tmp_path: Path) -> None:
    session = raymerge.Session(in_process=True, workers=1)
    for number in range(2):
        with session:
            with pytest.raises(TypeError, match="workers is the session's"):
                session.merge(ties(models), tmp_path / "out", workers=2)
            assert session.merge(ties(models), tmp_path / f"out{number}").num_workers == 1
