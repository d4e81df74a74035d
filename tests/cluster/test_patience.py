"""A cluster that has not what is asked for, or has other versions: what the user hears; the log of an actor."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import raymerge
from raymerge.cluster import activation_group, patience
from raymerge.cluster.activation_group import RayActivationGroup
from raymerge.merge_actors.errors import ClusterError
from raymerge.merge_actors.versions import installed_versions

HAS = r"the cluster has \S+ of 4 CPU free, 0 of 0 GPU free"


@pytest.fixture
def hurried(monkeypatch, ray_session):
    monkeypatch.setattr(patience, "START_SECONDS", 1.5)
    monkeypatch.setattr(patience, "REMARK_SECONDS", 0.3)
    monkeypatch.setattr(activation_group, "GATHER_SECONDS", 0.1)
    remarks: list[str] = []
    return remarks


def test_a_first_worker_is_waited_for_longer_where_it_fits(hurried):
    assert patience.seconds_to_wait(num_cpus=1, num_gpus=0) == patience.BUSY_SECONDS
    assert patience.seconds_to_wait(num_cpus=1, num_gpus=1) == patience.START_SECONDS


def test_activation_workers_that_the_cluster_has_no_room_for(hurried):
    group = RayActivationGroup(2, num_gpus=1, on_remark=hurried.append)
    job: Any = None
    asked = "asked for 2 workers of 1 CPU and 1 GPU each, "
    with pytest.raises(ClusterError, match=f"^no worker could be started in time: {asked}{HAS}$"):
        group.start(job)
    assert len(hurried) >= 2 and all(line.startswith(f"waiting for workers: {asked}") for line in hurried)


def test_evaluators_that_the_cluster_has_no_room_for(hurried):
    from raymerge.cluster.evaluator_ray import RayEvaluators

    job: Any = SimpleNamespace(num_slots=1)
    group = RayEvaluators(3, job, num_cpus=1, num_gpus=0.5, on_remark=hurried.append)
    asked = "asked for 3 of 1 CPU and 0.5 GPU each, "
    try:
        with pytest.raises(ClusterError, match=rf"^no evaluator could be started in \d+ s: {asked}{HAS}$"):
            group.start()
    finally:
        group.close()
    assert hurried and all(line.startswith(f"waiting for evaluators: {asked}") for line in hurried)


def test_evaluators_on_gpus_wait_for_a_machine_that_has_some(hurried, tmp_path):
    """A cluster in a cloud starts with none: whoever asks for a number of them has to be the reason for one."""
    from raymerge.cluster.evaluator_place import connected_evaluators
    from raymerge.cluster.grid_options import GridOptions

    evaluation: Any = None
    options = GridOptions(workers=2, device="cuda")
    with (
        pytest.raises(ClusterError, match=rf"^no GPU came in \d+ s: {HAS}$"),
        connected_evaluators(evaluation, options, on_remark=hurried.append),
    ):
        pass
    assert hurried[0].startswith("waiting for a machine with a GPU: the cluster has ")
    with (
        pytest.raises(ClusterError, match="no GPU is to be seen here"),
        connected_evaluators(evaluation, GridOptions(device="cuda")),
    ):
        pass


def test_a_run_on_gpus_bears_that_all_of_them_are_gone_for_a_while(ray_session, monkeypatch):
    """Nodes that may be taken away at any time: what replaces the last one is waited for, not the end of the run."""
    import ray

    from raymerge.cluster import ray_group
    from raymerge.cluster.connect import connected

    groups: list[Any] = []

    def record(num_workers, *, how_many, **options):
        groups.append(how_many)
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(ray_group, "RayGroup", record)
    resources = {"CPU": 8.0, "GPU": 2.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    with connected(address=None, in_process=False, workers=None, device="auto") as (_, placement):
        assert (placement.device, placement.num_workers, groups[0]()) == ("cuda", 2, 2)
        resources["GPU"] = 4.0
        assert groups[0]() == 4
        del resources["GPU"]
        assert groups[0]() == 0


@pytest.mark.parametrize(
    ("device", "versions", "said"),
    [
        ("cpu", {"torch": "1.0"}, "the driver has torch 1.0, node .* has torch"),
        ("cuda", {}, "torch .* cannot use it: .*; its driver must be as new as"),
    ],
)
def test_actors_of_all_kinds_refuse_other_versions_and_a_gpu_that_torch_cannot_use(
    device, versions, said, ray_session, monkeypatch, tmp_path
):
    import torch

    from raymerge.cluster import evaluator_ray
    from raymerge.cluster.ray_group import RayGroup
    from raymerge.merge_actors.task import RunContext

    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("torch can use the GPU here")
    versions = {**installed_versions(), **versions}
    for module in (evaluator_ray, activation_group):
        monkeypatch.setattr(module, "installed_versions", lambda: versions)
    job: Any = SimpleNamespace(num_slots=1, device=device, work_folder=str(tmp_path))
    context = RunContext(run_id="0", settings=(), device=device, num_threads=1, versions=versions)
    evaluators = evaluator_ray.RayEvaluators(1, job, num_cpus=1, num_gpus=0)
    for group, start in (
        (evaluators, evaluators.start),
        (group := RayActivationGroup(1, num_gpus=0), lambda group=group: group.start(job)),
        (group := RayGroup(1, num_cpus=1, num_gpus=0), lambda group=group: group.start(context)),
    ):
        try:
            with pytest.raises(ClusterError, match=said) as caught:
                start()
            assert len(str(caught.value).splitlines()) == 1  # a sentence, not the actor's traceback
        finally:
            group.close()


def test_an_actors_log_names_its_run(ray_session, tiny_checkpoints, tmp_path):
    import ray

    models = [{"model": str(model)} for model in tiny_checkpoints("llama").models]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}, "seed": 52}
    raymerge.merge(recipe, tmp_path / "out", workers=1)
    run = json.loads((tmp_path / "out" / "raymerge_manifest.json").read_text())["run"]["id"]
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())
    deadline = time.monotonic() + 30
    while not any(f"merge worker, run {run}: " in file.read_text() for file in logs.glob("worker-*.err")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
