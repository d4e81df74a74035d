"""An evaluator that spreads its model merges and scores as one that does not; Ray places it as one actor."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge.cluster.evaluate import evaluate as score_checkpoint
from raymerge.cluster.evaluator import Evaluator, EvaluatorJob, _devices
from raymerge.cluster.evaluator_gpus import Node
from raymerge.cluster.evaluator_place import connected_evaluators
from raymerge.cluster.evaluator_slot import ModelSlot, NoRoomError
from raymerge.cluster.grid_needs import needs_of_grid
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.grid_plan import plan_grid
from raymerge.cluster.grid_spec import read_grid
from raymerge.cluster.options import MergeOptions
from raymerge.merge_actors.errors import ClusterError
from raymerge.merge_actors.memory_files import MemoryFiles
from raymerge.stats.evaluation.parts import ModelNeeds
from raymerge.stats.evaluation.tasks import EvaluationSpec, parse_evaluation

WORDS = [f"word{i % 7} word{(3 * i) % 11} word{i % 5}" for i in range(24)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": text, "answer": text[:5]}) + "\n" for text in WORDS))
    return file


def language_tasks(texts: Path, **section: Any) -> EvaluationSpec:
    tasks = [
        {"name": "web", "kind": "loss", "validation": str(texts)},
        {"name": "say", "kind": "generation", "validation": str(texts), "max_new_tokens": 4},
    ]
    return parse_evaluation({"batch_tokens": 60, "tasks": tasks, **section})


def recipe(family: Any, method: str = "dare_ties", **parameters: Any) -> dict[str, Any]:
    return {
        "name": "point",
        "merge_method": method,
        "base_model": str(family.base),
        "models": [{"model": str(m), "parameters": {"weight": 2.0, "density": 0.5}} for m in family.models],
        "parameters": parameters,
    }


def evaluate(
    evaluation: EvaluationSpec, recipes: list[dict[str, Any]], num_devices: int
) -> tuple[list[Any], Mapping[str, torch.Tensor]]:
    """Merge recipes into two slots and score them; return digests and metrics, and the last one's tensors."""
    job = EvaluatorJob(
        evaluation=evaluation,
        merge=MergeOptions(),
        device="cpu",
        num_threads=2,
        num_slots=2,
        num_devices=num_devices,
    )
    evaluator = Evaluator(job)
    found = []
    for number, each in enumerate(recipes):
        digest = evaluator.merge(number % 2, each).digest
        found.append((digest, evaluator.score(number % 2, "validation").metrics))
    tensors = evaluator.tensors((len(recipes) - 1) % 2)
    evaluator.close()
    return found, tensors


@pytest.mark.parametrize(
    ("architecture", "tied", "dtype"),
    [("llama", True, None), ("llama", False, "bfloat16"), ("gpt2", True, None)],
)
def test_metrics_and_bits_are_those_of_one_device(
    architecture: str, tied: bool, dtype: str | None, tiny_checkpoints: Callable[..., Any], texts: Path
) -> None:
    family = tiny_checkpoints(architecture, tied=tied)
    evaluation = language_tasks(texts, dtype=dtype)
    recipes = [recipe(family, "ties"), recipe(family), recipe(family, **{"lambda": 0.7})]
    alone, tensors = evaluate(evaluation, recipes, 1)
    spread, parts = evaluate(evaluation, recipes, 3)
    assert spread == alone
    assert len({digest for digest, _ in alone}) == 3
    storages = {tensor.untyped_storage().data_ptr() for tensor in parts.values()}
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 1 < len(storages)
    assert all(torch.equal(parts[name], tensor) for name, tensor in tensors.items())


def grid_file(family: Any, evaluation: EvaluationSpec) -> dict[str, Any]:
    return {
        **recipe(family, "ties", **{"lambda": "$scale"}),
        "grid": {"scale": [0.5, 1.0]},
        "evaluate": {"batch_tokens": 60, "tasks": [each.to_mapping() for each in evaluation.tasks]},
        "select": {"metric": "web.loss"},
    }


def test_what_a_grid_needs_follows_from_headers(tiny_checkpoints: Callable[..., Any], texts: Path) -> None:
    raw = grid_file(tiny_checkpoints("llama", tied=True), language_tasks(texts))
    plan = plan_grid(read_grid(raw), GridOptions())
    needs = needs_of_grid(plan)
    assert needs.weights == plan.output_bytes and needs.dtype == "float32"
    assert len(needs.block_weights) == 2 and needs.home_weights == (96 * 32 + 32) * 4
    raw["evaluate"]["dtype"] = "bfloat16"
    narrow = needs_of_grid(plan_grid(read_grid(raw), GridOptions()))
    assert narrow.weights == needs.weights * 3 // 2 and narrow.dtype == "bfloat16"


LARGE = ModelNeeds(home_weights=10 << 30, block_weights=(10 << 30,) * 10, dtype="bfloat16")


def connect(
    nodes: list[Node], monkeypatch: pytest.MonkeyPatch, texts: Path, **options: Any
) -> tuple[Any, list[str]]:
    """Connect to the GPUs of a machine that is not there; return the job and what was remarked."""
    module = "raymerge.cluster.evaluator_place"
    monkeypatch.setattr(f"{module}._local_node", lambda with_memory: nodes)
    remarks: list[str] = []
    evaluation = language_tasks(texts)
    with connected_evaluators(
        evaluation, GridOptions(in_process=True, **options), lambda: LARGE, remarks.append
    ) as group:
        return group, remarks


def test_a_run_spreads_its_models_when_they_need_it(monkeypatch: pytest.MonkeyPatch, texts: Path) -> None:
    node = Node(16, 4, 80 << 30)
    group, remarks = connect([node], monkeypatch, texts)
    assert (group._num_evaluators, group._job.num_devices, group._job.share) == (2, 2, 1.0)
    assert remarks == ["note: the merged model takes 110.0 GiB: every evaluator spreads it over 2 GPUs"]
    group, remarks = connect([node], monkeypatch, texts, gpus_per_evaluator=4)
    assert (group._num_evaluators, group._job.num_devices) == (1, 4) and not remarks
    with pytest.raises(ClusterError, match=r"needs 111\.0 GiB and has 80\.0 GiB on 1 GPU"):
        connect([node], monkeypatch, texts, gpus_per_evaluator=1)
    group, _ = connect([node], monkeypatch, texts, device="cpu")  # whose memory nobody asks for
    assert group._job.device == "cpu" and group._job.num_devices == 1
    _, remarks = connect([node], monkeypatch, texts, device="cpu", gpus_per_evaluator=2)
    assert remarks == ["note: --gpus-per-evaluator 2 has no effect: points run on CPUs"]


def test_evaluators_that_see_the_same_gpus_take_their_own(
    monkeypatch: pytest.MonkeyPatch, texts: Path
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)

    def devices(num_devices: int, share: float, device: str = "cuda") -> list[tuple[str, ...]]:
        job = EvaluatorJob(
            evaluation=language_tasks(texts),
            merge=MergeOptions(),
            device=device,
            num_threads=1,
            num_devices=num_devices,
            share=share,
        )
        return [_devices(job, number) for number in range(3)]

    assert devices(1, 1.0) == [("cuda:0",), ("cuda:1",), ("cuda:2",)]
    assert devices(1, 0.5) == [("cuda:0",), ("cuda:0",), ("cuda:1",)]
    assert devices(2, 1.0) == [("cuda:0", "cuda:1"), ("cuda:2", "cuda:3"), ("cuda:0", "cuda:1")]
    assert devices(2, 1.0, "cpu") == [("cpu", "cpu")] * 3


def test_a_slot_looks_at_every_device_before_it_takes_memory(
    monkeypatch: pytest.MonkeyPatch, texts: Path
) -> None:
    free = {"cuda:0": 30 << 30, "cuda:1": 5 << 30}
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (free[device], 40 << 30))
    shapes = {"a": ("BF16", (1 << 30, 10)), "b": ("BF16", (1 << 30, 4))}  # 20 and 8 GiB

    def expect_room(number: int, device_of: Mapping[str, int]) -> None:
        ModelSlot(number, language_tasks(texts), MemoryFiles(), ("cuda:0", "cuda:1"))._expect_room(
            shapes, device_of
        )

    expect_room(0, {"a": 0, "b": 0})
    with pytest.raises(
        NoRoomError, match=r"8\.0 GiB of the merged model do not fit the 5\.0 GiB .* free on cuda:1"
    ):
        expect_room(0, {"a": 0, "b": 1})
    free["cuda:1"] = 17 << 30
    expect_room(1, {"a": 0, "b": 1})  # a second model leaves a fifth of each
    free["cuda:1"] = 15 << 30
    with pytest.raises(NoRoomError, match="cuda:1"):
        expect_room(1, {"a": 0, "b": 1})


def test_a_checkpoint_is_scored_on_as_few_gpus_as_hold_it(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoints: Callable[..., Any], texts: Path
) -> None:
    module = "raymerge.cluster.evaluate"
    used: list[Any] = []

    def score(*arguments: Any, devices: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        used.append(devices)
        return {}, {}

    monkeypatch.setattr(f"{module}.evaluate_checkpoint", score)
    monkeypatch.setattr(f"{module}.local_resources", lambda: (8, 4))
    monkeypatch.setattr(f"{module}.needs_of_checkpoint", lambda checkpoint, spec: LARGE)
    model = str(tiny_checkpoints("llama", tied=True).base)
    for num_gib, device in ((192, "auto"), (80, "auto"), (80, "cpu"), (48, "cuda")):
        monkeypatch.setattr(f"{module}.visible_gpu_bytes", lambda num_gib=num_gib: num_gib << 30)
        score_checkpoint(model, language_tasks(texts), device=device)  # type: ignore[arg-type]
    assert used == [("cuda:0",), ("cuda:0", "cuda:1"), ("cpu",), ("cuda:0", "cuda:1", "cuda:2")]
    monkeypatch.setattr(f"{module}.visible_gpu_bytes", lambda: 24 << 30)
    with pytest.raises(
        ClusterError, match=r"has 24\.0 GiB on each of 4 GPUs: .*no node has more than 4 GPUs"
    ):
        score_checkpoint(model, language_tasks(texts))


#: Four GPUs that Ray believes in; two evaluators of two, whose models lie in two parts of the host's memory.
_SCRIPT = """
import dataclasses, json, sys
import ray
ray.init(address="local", num_cpus=2, num_gpus=4, include_dashboard=False, object_store_memory=80 << 20)
from raymerge.cluster import evaluator_place, evaluator_ray
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.grid_points import Point
from raymerge.cluster.grid_run import Runner
from raymerge.stats.evaluation.tasks import parse_evaluation
tasks, recipes = json.loads(sys.argv[1])
options = GridOptions(gpus_per_evaluator=2)
placement = evaluator_place.place_evaluators(evaluator_ray.nodes(with_memory=True), options)
job = evaluator_place._job(parse_evaluation(tasks), options, placement)
job = dataclasses.replace(job, device="cpu")
group = evaluator_ray.RayEvaluators(
    placement.num_evaluators, job, num_cpus=placement.num_cpus, num_gpus=placement.num_gpus
)
group.start()
while len(group.evaluators()) < placement.num_evaluators:
    group.wait(1.0)
where = lambda actor: ray.get_runtime_context().get_accelerator_ids()["GPU"]
gpus = [ray.get(actor.__ray_call__.remote(where)) for actor in group._actors.values()]
free = ray.available_resources().get("GPU", 0)
rows = []
points = [Point(number=i, axes={}, recipe=each, key=str(i)) for i, each in enumerate(recipes)]
Runner(group).run(points, rows.append)
group.close()
print("DONE", json.dumps([placement.num_evaluators, gpus, free, rows], default=str), flush=True)
ray.shutdown()
"""


@pytest.mark.slow
@pytest.mark.ray
def test_ray_gives_an_evaluator_gpus_of_one_node(tiny_checkpoints: Callable[..., Any], texts: Path) -> None:
    family = tiny_checkpoints("llama", tied=True)
    evaluation = language_tasks(texts)
    recipes = [recipe(family, **{"lambda": number / 4}) for number in range(1, 7)]
    words = json.dumps([evaluation.to_mapping(), recipes])
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, words], capture_output=True, text=True, timeout=250, check=False
    )
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("DONE "))
    num_evaluators, gpus, free, rows = json.loads(line.removeprefix("DONE "))
    assert num_evaluators == 2 and [len(each) for each in gpus] == [2, 2] and free == 0
    assert sorted(each for own in gpus for each in own) == ["0", "1", "2", "3"]
    alone, _ = evaluate(evaluation, recipes, 1)
    assert {row["status"] for row in rows} == {"ok"} and len(rows) == len(recipes)
    for row in rows:
        metrics = alone[row["point"]][1]
        assert {name: row[f"metric.{name}"] for name in metrics} == {n: v for n, (v, _) in metrics.items()}
