"""The merges of `soak.py`: what is drawn for each, how it runs, and how its output is judged."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from make_models import make_models
from model_shapes import LlamaShape
from soak_faults import BadCluster, HostileGroup, Strike, actor_processes, wait_until

from raymerge.cluster.connect import Placement
from raymerge.cluster.merge import merge
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.status import RunStatus, run_status
from raymerge.merge_actors.errors import OutputError, RaymergeError

#: 22 MB in bf16: with slices of 1 MiB some thirty tasks, the embedding and the head cut.
_SHAPE = LlamaShape(hidden=384, intermediate=1024, num_layers=4, num_heads=6, num_kv_heads=2, vocabulary=6000)
_OPTIONS: dict[str, Any] = {"slice_mib": 1, "out_shard_size": "4MB", "device": "cpu"}
_RECIPES = {
    "task_arithmetic": ["task_arithmetic"],
    "dare_ties": ["dare_ties"],
    "ties": ["ties"],
    "slerp": ["slerp"],
    "campaign of 3": ["task_arithmetic", "linear", "dare_linear"],
}
_PLACES = ("disk to disk", "store to disk", "disk to store", "store to store")
_STORAGE = ("503", "500", "cut", "drop")
_COMMAND_SECONDS = 100.0


class Soak:
    """Models, references, and one merge after another."""

    def __init__(
        self,
        work: Path,
        store: Any,
        cluster: BadCluster,
        group: HostileGroup,
        placement: Placement,
        seed: int,
    ) -> None:
        """Make the models, on the disk and in the store, and what every recipe ought to give."""
        self._work, self._store, self._cluster, self._group = work, store, cluster, group
        self._placement, self._seed = placement, seed
        self.driver_faults: list[str] = []
        self.row: dict[str, Any] = {}
        self._is_command = False
        base, tuned = make_models(work / "models", _SHAPE, num_fine_tunes=2, shard_size="8MB")
        self._models = {
            "disk": [str(base), *map(str, tuned)],
            "store": [store.put(model, f"models/{model.name}") for model in (base, *tuned)],
        }
        self._expected = {
            (name, place): self._reference(name, place) for name in _RECIPES for place in self._models
        }

    def prepare(self, number: int) -> None:
        """Draw how to run, and whether lost nodes come back; Ray starts nodes from the main thread alone."""
        rng = random.Random(f"{self._seed}/{number}/nodes")
        self._is_command = rng.random() < 0.15
        # A command's workers want room beside those that are here already: on one node it would wait for long.
        if self._is_command or rng.random() < 0.4:
            self._cluster.mend()

    def merge(self, number: int) -> dict[str, Any]:
        """Draw a merge with its faults, run it, and judge it."""
        rng = random.Random(f"{self._seed}/{number}")
        name, places = rng.choice(list(_RECIPES)), rng.choices(_PLACES, (5, 2, 2, 1))[0]
        self.row = {
            "kind": "merge", "number": number, "recipe": name, "places": places, "faults": {},
            "problems": [], "is_wrong": False, "hung": False, "num_retries": 0, "num_speculated": 0,
        }  # fmt: skip
        source, target = places.split(" to ")
        out = self._out(number, target)
        started = time.monotonic()
        faults: Counter[str] = Counter()
        try:
            self._run(rng, name, source, out, faults)
            self._judge(name, source, out)
        except RaymergeError as error:
            self.row["problems"].append(f"failed: {error}")
        except subprocess.TimeoutExpired as error:
            self.row |= {"hung": True, "problems": [f"a command hung: {error}"]}
        self.row |= {"faults": dict(faults), "seconds": round(time.monotonic() - started, 2)}
        self._store.faults.clear()
        self._clean(out)
        if not wait_until(lambda: len(actor_processes()) <= self._group.num_actors, 30):
            self.row["problems"].append(
                f"{len(actor_processes())} actors live, {self._group.num_actors} are known"
            )
        return self.row

    def _run(self, rng: random.Random, name: str, source: str, out: str, faults: Counter[str]) -> None:
        uses_store = "s3://" in out or source == "store"
        if uses_store and rng.random() < 0.6:
            planned = self._break_storage(rng, out)
        else:
            planned = []
        if self._is_command:
            self._run_command(rng, name, source, out, faults)
        else:
            self._run_here(rng, name, source, out, faults)
        for fault in planned:
            if fault.num_done:
                faults[f"storage: {_WORDS[fault.kind]}"] += fault.num_done

    def _break_storage(self, rng: random.Random, out: str) -> list[Any]:
        """Plan faults of the store for this merge: of reads, and of writes if it writes there."""
        methods = ["GET", *(["PUT", "POST"] if out.startswith("s3://") else [])]
        return [
            self._store.fail(
                rng.choice(_STORAGE) if rng.random() < 0.95 else "stall",
                r"safetensors|journal|json",
                method=rng.choice(methods),
                times=rng.randint(1, 3),
            )
            for _ in range(rng.randint(1, 3))
        ]

    def _run_here(self, rng: random.Random, name: str, source: str, out: str, faults: Counter[str]) -> None:
        """Merge from this process, with workers that are struck; an outage ends it, and it is resumed."""
        kinds = rng.choices(
            ("actor killed", "actor frozen", "node lost"), (6, 2, 2), k=rng.choice((0, 1, 1, 2))
        )
        self._group.plan([Strike(kind, rng.randint(1, 25)) for kind in kinds], rng)
        options = MergeOptions(**_OPTIONS)
        outage = None
        if rng.random() < 0.03 and source == "store":
            outage = self._store.fail("503", "safetensors", times=10**6)
        workers = contextlib.nullcontext((self._group, self._placement))
        recipes = self._recipes(name, source)
        try:
            result = merge(recipes, out, options, workers=workers)
            if outage is not None:
                self.row["problems"].append("an outage was not noticed")
        except RaymergeError as error:
            if outage is None or not outage.num_done:
                raise
            faults["storage: away"] += 1
            if "attempts" not in str(error):
                self.row["problems"].append(f"an outage ended in: {error}")
            self._store.faults.remove(outage)
            options = MergeOptions(**_OPTIONS, resume=True)
            result = merge(recipes, out, options, workers=workers)
        self.row["num_retries"] = result.totals.num_retries
        self.row["num_speculated"] = result.totals.num_speculated
        faults.update(self._group.struck)

    def _run_command(
        self, rng: random.Random, name: str, source: str, out: str, faults: Counter[str]
    ) -> None:
        """Merge by the command, end it in its middle, and resume it."""
        kind = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT))
        num_tasks = rng.randint(1, 20)
        driver = self._start(name, source, out)
        num_done = _wait_for_tasks(driver, out, num_tasks)
        if num_done is not None:
            driver.send_signal(kind)
        output, said = driver.communicate(timeout=_COMMAND_SECONDS)
        if driver.returncode == 0:
            return  # it was faster
        if num_done is None:
            self.row["problems"].append(f"the command failed by itself: {said[-500:]}")
            return
        faults[f"driver ended by {kind.name}"] += 1
        self.driver_faults.append(kind.name)
        if _status(out) is None or _status(out).state == "finished":
            self.row["problems"].append("an unfinished run looks finished")
        driver = self._start(name, source, out, "--resume")
        output, said = driver.communicate(timeout=_COMMAND_SECONDS)
        if driver.returncode:
            self.row["problems"].append(f"--resume failed: {said[-500:]}")
            return
        found = json.loads(output)
        if found["num_resumed"] < num_done:
            self.row["problems"].append(
                f"{num_done} tasks were finished, {found['num_resumed']} were taken over"
            )

    def _start(self, name: str, source: str, out: str, *flags: str) -> subprocess.Popen[str]:
        recipes = []
        for i, recipe in enumerate(self._recipes(name, source)):
            recipes.append(self._work / f"recipe-{i}.yaml")
            recipes[-1].write_text(yaml.safe_dump(recipe))
        words = ["merge", *map(str, recipes), out, "--address", self._cluster.address, "--json", "--quiet"]
        words += ["--workers", "2", "--slice-mib", "1", "--out-shard-size", "4MB", "--device", "cpu"]
        return subprocess.Popen(
            [sys.executable, "-m", "raymerge", *words, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    def _recipes(self, name: str, source: str) -> list[dict[str, Any]]:
        base, *tuned = self._models[source]
        return [_recipe(method, base, tuned) for method in _RECIPES[name]]

    def _reference(self, name: str, place: str) -> dict[str, str]:
        """Merge in this process, where nothing breaks; references of models enter random masks."""
        out = self._work / "reference"
        merge(self._recipes(name, place), out, MergeOptions(**_OPTIONS, in_process=True, workers=1))
        digests = _digests({str(path.relative_to(out)): path.read_bytes() for path in _weight_files(out)})
        shutil.rmtree(out)
        return digests

    def _judge(self, name: str, source: str, out: str) -> None:
        """Compare the output with the reference, ask for its status, and look for what was left."""
        wanted = (
            ("finished", ()) if len(_RECIPES[name]) == 1 else ("outputs below", tuple(sorted(_RECIPES[name])))
        )
        if (found := _status(out)) is None or (found.state, found.outputs) != wanted:
            self.row["problems"].append(f"status says {found}")
        if out.startswith("s3://"):
            prefix = out.removeprefix("s3://models/")
            keys = [key for key in self._store.keys(f"{prefix}/") if _is_weights(key)]
            weights = {key.removeprefix(f"{prefix}/"): self._store.get(key) for key in keys}
            parent, _, last = prefix.rpartition("/")
            left = self._store.keys(f"{parent}/.{last}.raymerge/")
        else:
            weights = {str(path.relative_to(out)): path.read_bytes() for path in _weight_files(Path(out))}
            left = [each for each in os.listdir(Path(out).parent) if each != Path(out).name]
        if _digests(weights) != self._expected[name, source]:
            self.row["is_wrong"] = True
            self.row["problems"].append("the weights are wrong")
        if left:
            self.row["problems"].append(f"left behind: {left}")

    def _out(self, number: int, target: str) -> str:
        if target == "store":
            return f"s3://models/out/{number}/merged"
        folder = self._work / "out" / str(number)
        folder.mkdir(parents=True)
        return str(folder / "merged")

    def _clean(self, out: str) -> None:
        if not out.startswith("s3://"):
            shutil.rmtree(Path(out).parent)
            return
        prefix = out.removeprefix("s3://models/").rpartition("/")[0]
        for key in self._store.keys(f"{prefix}/"):
            self._store._call("DELETE", f"/models/{key}")


_WORDS = {
    "503": "503 SlowDown",
    "500": "500 InternalError",
    "cut": "body cut in its middle",
    "drop": "connection dropped",
    "stall": "no answer for 60 s",
}


def _recipe(method: str, base: str, tuned: list[str]) -> dict[str, Any]:
    if method == "slerp":
        return {
            "merge_method": "slerp", "base_model": base, "models": [{"model": tuned[0]}],
            "parameters": {"t": 0.4}, "dtype": "bfloat16", "name": method,
        }  # fmt: skip
    entries = [
        {"model": model, "parameters": {"weight": weight}}
        for model, weight in zip(tuned, (0.6, 0.3), strict=True)
    ]
    recipe: dict[str, Any] = {"merge_method": method, "models": entries, "dtype": "bfloat16", "name": method}
    if method != "linear":
        recipe["base_model"] = base
    if method in ("ties", "dare_ties", "dare_linear"):
        recipe["parameters"] = {"density": 0.4}
    return recipe


def _wait_for_tasks(driver: subprocess.Popen[str], out: str, count: int) -> int | None:
    """Wait until a run has finished some tasks and return how many; None if the command ends before."""
    deadline = time.monotonic() + _COMMAND_SECONDS
    while driver.poll() is None and time.monotonic() < deadline:
        found = _status(out)
        if found is not None and found.state == "running" and found.num_done >= count:
            return found.num_done
        time.sleep(0.02)
    return None


def _status(out: str) -> RunStatus | None:
    try:
        return run_status(out)
    except OutputError:
        return None


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".index.json"))


def _weight_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if _is_weights(path.name))


def _digests(weights: dict[str, bytes]) -> dict[str, str]:
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(weights.items())}
