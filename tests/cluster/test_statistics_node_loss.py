"""A node that is lost while Gram matrices are summed costs the layer group that was under way, and changes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raymerge.cluster.statistics import collect_statistics
from raymerge.cluster.statistics_options import StatisticsOptions
from raymerge.merge_actors.errors import RecipeError
from raymerge.stats.data_rows import DataSpec
from raymerge.stats.statistics_file import open_statistics

#: Two workers on three nodes; in the second layer group one's node goes, raylet and worker together.
_SCRIPT = """
import os, signal, sys
import ray
from ray.cluster_utils import Cluster
small = dict(num_cpus=1, object_store_memory=80 << 20)
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=0, object_store_memory=80 << 20,
                                                             include_dashboard=False))
for _ in range(3):
    cluster.add_node(**small)
ray.init(address=cluster.address, logging_level="ERROR")
from raymerge.cluster.statistics import collect_statistics
from raymerge.cluster.statistics_options import StatisticsOptions
from raymerge.stats.data_rows import DataSpec
lost, groups, remarks = [], [], []
def lose_a_node(progress):
    groups.append(progress.group)
    if progress.group == 1 and not lost:
        worker = progress.pids[1]
        raylet = int(open(f"/proc/{worker}/stat").read().rpartition(")")[2].split()[1])
        assert raylet in [node.all_processes["raylet"][0].process.pid for node in cluster.list_all_nodes()]
        lost.append(raylet)
        os.kill(raylet, signal.SIGKILL)
        os.kill(worker, signal.SIGKILL)
data = DataSpec(source=sys.argv[3], batch_tokens=64)
options = StatisticsOptions(kind="gram", workers=2, device="cpu", memory_gib=float(sys.argv[4]), data=data)
result = collect_statistics(sys.argv[1], sys.argv[2], options, on_progress=lose_a_node, on_remark=remarks.append)
again = [line for line in remarks if "starts again" in line]
print("LOST", len(lost), len(again), "layer group 1 starts again" in again[0], groups == sorted(groups), flush=True)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_lost_node_repeats_the_layer_group_under_way_alone(
    tiny_checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    model = str(tiny_checkpoints("llama").models[0])
    texts = tmp_path / "texts.jsonl"
    texts.write_text(
        "".join(json.dumps({"text": f"word{i % 90} word{7 * i % 90}"}) + "\n" for i in range(200))
    )
    data = DataSpec(source=str(texts), batch_tokens=64)
    least = StatisticsOptions(kind="gram", in_process=True, workers=1, memory_gib=1e-9, data=data)
    with pytest.raises(RecipeError, match="a worker needs") as refused:
        collect_statistics(model, tmp_path / "expected", least)
    [needed] = re.findall(r"a worker needs (\S+) GiB", str(refused.value))
    budget = 1.01 * float(needed)
    one = dataclasses.replace(least, memory_gib=budget)
    assert collect_statistics(model, tmp_path / "expected", one).num_groups >= 2
    head = (Path(__file__).parents[2] / "ray_cluster.yaml").read_text()
    shipped = dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", head))
    command = [sys.executable, "-c", _SCRIPT, model, str(tmp_path / "out"), str(texts), str(budget)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, **shipped})
    assert done.returncode == 0, done.stderr
    assert "LOST 1 1 True True" in done.stdout
    found, expected = (open_statistics(tmp_path / name) for name in ("out", "expected"))
    assert found.manifest["num_tokens"] == expected.manifest["num_tokens"]
    sums, others = (
        {
            key: tensor
            for name in each.manifest["files"]
            for key, tensor in load_file(f"{each.path}/{name}").items()
        }
        for each in (found, expected)
    )
    assert sums.keys() == others.keys() and len(sums) > 3
    for key, tensor in others.items():  # kernels round by the alignment of memory
        torch.testing.assert_close(sums[key], tensor, rtol=1e-6, atol=1e-6 * tensor.abs().max().item())
