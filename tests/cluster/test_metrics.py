"""The metrics that actors export, and the dashboard that draws them."""

from __future__ import annotations

import contextlib
import json
import re
import time
import urllib.request
from pathlib import Path

import raymerge
from raymerge.cluster.grid import grid
from raymerge.cluster.grid_options import GridOptions
from raymerge.cluster.grid_run import open_runner
from raymerge.cluster.statistics import collect_statistics
from raymerge.cluster.statistics_options import StatisticsOptions
from raymerge.merge_actors.ray_metrics import DriverMetrics
from raymerge.stats.data_rows import DataSpec

ROOT = Path(__file__).resolve().parents[2]


def _exported() -> str:
    import ray

    pages = []
    for node in ray.nodes():
        address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        with urllib.request.urlopen(address, timeout=30) as page:
            pages.append(page.read().decode())
    return "\n".join(pages)


def _total(name: str) -> float:
    """Sum a counter over all runs and actors."""
    return sum(
        float(each) for each in re.findall(rf"^ray_raymerge_{name}_total{{.*}} (\S+)$", _exported(), re.M)
    )


def test_bytes_tasks_and_losses_of_a_merge_are_exported(ray_session, tiny_checkpoints, tmp_path):
    family = tiny_checkpoints("llama")
    entries = [{"model": str(model), "parameters": {"weight": 1}} for model in family.models]
    with raymerge.Session(workers=1) as session:
        result = session.merge({"merge_method": "linear", "models": entries}, tmp_path / "out")
        lost = DriverMetrics()  # as the driver counts when workers die: one with three tasks, one with none
        before = _total("lost_workers"), _total("retries")
        lost.count_loss("0123456789abcdef", 3)
        lost.count_loss("0123456789abcdef", 0)
        deadline = time.monotonic() + 120
        while (
            _total("read_bytes") < result.totals.read_bytes  # Ray exports every few seconds
            or (_total("lost_workers"), _total("retries")) < (before[0] + 2, before[1] + 3)
        ):
            assert time.monotonic() < deadline
            time.sleep(0.5)
    page = _exported()
    assert re.search(r'^ray_raymerge_task_seconds_bucket\{.*phase="merge".*\}', page, re.M)


def test_the_dashboard_draws_metrics_that_exist():
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "raymerge.json").read_text())
    source = (ROOT / "merge_actors" / "ray_metrics.py").read_text()
    known = {
        f"raymerge_{name.removeprefix('raymerge_')}"
        for name in re.findall(r'(?:counter|Counter|Gauge|Histogram)\(\s*f?"(\w+)"', source)
    }
    assert len(known) >= 6
    drawn = set()
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            drawn |= set(re.findall(r"ray_(raymerge_\w+?)(?:_total|_bucket|_sum)?\{", target["expr"]))
    assert drawn and drawn <= known


def _wait_until_exported(*names: str) -> None:
    deadline = time.monotonic() + 120
    while not all(_total(name) for name in names):  # Ray exports every few seconds
        assert time.monotonic() < deadline
        time.sleep(0.5)


def test_points_passes_and_tokens_are_exported(ray_session, tiny_checkpoints, tmp_path):
    """Asked for while the actors are up: Ray forgets what an actor that ends has not exported."""
    family = tiny_checkpoints("llama")
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"word{i} word{i + 1}"}) + "\n" for i in range(8)))

    @contextlib.contextmanager
    def opener(*arguments):
        with open_runner(*arguments) as runner:
            yield runner
            _wait_until_exported("point_merges", "forward_passes")

    raw = {
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": {"weight": "$w"}} for model in family.models],
        "grid": {"w": [0.5, 1]},
        "evaluate": [{"name": "lm", "kind": "loss", "validation": str(data)}],
    }
    grid(raw, tmp_path / "grid", GridOptions(workers=1), open_runner=opener)
    options = StatisticsOptions(kind="gram", data=DataSpec(source=str(data)), workers=1)
    model = str(family.models[0])
    collect_statistics(
        model, tmp_path / "grams", options, on_progress=lambda progress: _wait_until_exported("tokens")
    )
    phases = set(re.findall(r'^ray_raymerge_task_seconds_bucket\{.*phase="(\w+)".*\}', _exported(), re.M))
    assert {"score", "accumulate"} <= phases
