"""Workers of a node that lacks a model of the Hub download it once, whoever comes first."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hub_server import running_hub

#: A worker as it begins on a node where the driver's folder is not.
_WORKER = """
import sys
from raymerge.merge_actors.node_check import check_node
from raymerge.merge_actors.storage.storage_files import StorageFiles
from raymerge.merge_actors.task import HubModel, RunContext
folder = sys.argv[1]
context = RunContext(run_id="x", settings=(), device="cpu", num_threads=1,
                     hub_models=(HubModel(path="org/model", revision=None, folder=folder),))
print("ready", flush=True)
sys.stdin.readline()
files = StorageFiles(None)
check_node(context, files)
buffer = bytearray(8)
files.read_into(f"{folder}/model.safetensors", 0, memoryview(buffer))
print(buffer.hex(), flush=True)
"""


def test_two_workers_of_a_node_download_a_model_once(
    tiny_checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    model = tiny_checkpoints("llama").models[0]
    with running_hub() as hub:
        hub.repos = {"org/model": model}
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HOME": str(tmp_path / "hf-home"),
            "NO_PROXY": "127.0.0.1",
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [sys.executable, "-c", _WORKER, "/a/folder/of/the/driver"]
        workers = [subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(2)]
        for worker in workers:
            assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write("go\n")
            worker.stdin.flush()
        said = [worker.communicate(timeout=100) for worker in workers]
    first = (model / "model.safetensors").read_bytes()[:8].hex()
    assert [output.strip() for output, _ in said] == [first, first], said
    sent = Counter(name for name, begin, end in hub.fetched if end > begin)
    assert sent["model.safetensors"] == 1 and set(sent.values()) == {1}
