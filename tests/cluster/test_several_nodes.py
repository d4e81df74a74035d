"""Several nodes give the bytes of one process, and each source byte leaves the object store once per campaign."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from object_store import BUCKET, ObjectStore

from raymerge.cluster.merge import merge
from raymerge.cluster.options import MergeOptions

#: As many nodes as told, a worker on each; says on which nodes tasks were done.
_SCRIPT = """
import json, sys
import ray
from ray.cluster_utils import Cluster
num_nodes = int(sys.argv[1])
small = dict(num_cpus=1, object_store_memory=80 << 20)
cluster = Cluster(initialize_head=True, head_node_args=dict(small, include_dashboard=False))
for _ in range(num_nodes - 1):
    cluster.add_node(**small)
ray.init(address=cluster.address, logging_level="ERROR")
from raymerge.cluster import merge as merge_module
from raymerge.cluster.merge import merge
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.ray_group import RayGroup
start, wait, nodes, group_of_run = RayGroup.start, RayGroup.wait, set(), []
def start_all(group, context):
    start(group, context)
    while len(group._actors) < num_nodes:
        wait(group, 1.0)
    where = lambda worker: ray.get_runtime_context().get_node_id()
    at = {n: ray.get(actor.__ray_call__.remote(where)) for n, actor in group._actors.items()}
    group_of_run.append(at)
def wait_and_note(group, timeout_seconds):
    events = wait(group, timeout_seconds)
    nodes.update(group_of_run[0][event.worker] for event in events if group_of_run)
    return events
RayGroup.start, RayGroup.wait = start_all, wait_and_note
# What planning reads, headers and samples, is not counted: the line comes before the first task.
merge_module.quick_check = lambda *arguments: print("PLANNED", flush=True) or sys.stdin.readline() and []
recipes, out = json.loads(sys.argv[2]), sys.argv[3]
result = merge(recipes, out, MergeOptions(workers=num_nodes, device="cpu", **json.loads(sys.argv[4])))
print("DONE", len(nodes), result.totals.fetched_bytes, flush=True)
ray.shutdown()
cluster.shutdown()
"""
_OPTIONS = {"slice_mib": 1, "out_shard_size": "15KB"}


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("num_nodes", [2, 4])
def test_same_bytes_on_several_nodes_and_each_source_byte_fetched_once(
    tiny_checkpoints: Callable[..., Any], object_store: ObjectStore, tmp_path: Path, num_nodes: int
) -> None:
    found = tiny_checkpoints("llama", sharded=True)
    folders = (found.base, *found.models[:2])
    uris = [object_store.put(path, f"nodes-{num_nodes}/{path.name}") for path in folders]
    recipes = [_recipe(method, uris) for method in ("task_arithmetic", "linear", "dare_ties")]
    merge(recipes, tmp_path / "alone", MergeOptions(in_process=True, workers=1, device="cpu", **_OPTIONS))
    prefix = f"nodes-{num_nodes}/out"
    words = [str(num_nodes), json.dumps(recipes), f"s3://{BUCKET}/{prefix}", json.dumps(_OPTIONS)]
    driver = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert driver.stdin is not None and driver.stdout is not None
    said = driver.stdout.readline()
    object_store.forget()
    output, errors = driver.communicate("go on\n", timeout=250)
    assert said == "PLANNED\n" and driver.returncode == 0, errors
    _, num_used, fetched_bytes = output.split()
    assert int(num_used) == num_nodes
    expected = _weights(tmp_path / "alone")
    assert len(expected) > 9
    assert {name: object_store.get(f"{prefix}/{name}") for name in expected} == expected
    fetched = object_store.fetched(rf"nodes-{num_nodes}/(base|first|second)/.*\.safetensors$")
    assert all(end <= begin for (a, _, end), (b, begin, _) in itertools.pairwise(fetched) if a == b)
    num_bytes = sum(end - begin for _, begin, end in fetched)
    sizes = [_data_bytes(file) for path in folders for file in path.glob("*.safetensors")]
    assert num_bytes == int(fetched_bytes) == sum(sizes)


def _recipe(method: str, uris: list[str]) -> dict[str, Any]:
    entries = [{"model": uri, "parameters": {"weight": 0.5}} for uri in uris[1:]]
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": entries,
        "name": method,
        "base_model": uris[0],
    }
    if method == "dare_ties":
        recipe["parameters"] = {"density": 0.5}
    return recipe


def _weights(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.name.endswith((".safetensors", ".index.json"))
    }


def _data_bytes(file: Path) -> int:
    """Return the bytes of a file behind its header."""
    data = file.read_bytes()
    return len(data) - 8 - int.from_bytes(data[:8], "little")
