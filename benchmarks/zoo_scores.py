"""Make the points of a study one after another and keep what each one answers.

A point is merged, its answers on every probe are taken, and its checkpoint is removed. Answers are kept in the work
folder under a key of all that determines them, so a study that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from zoo_points import Point, Probe, ZooSetting

import raymerge

_BATCH = 64
#: Answers of one point: probe -> split -> whether each example was answered right.
Answers = dict[str, dict[str, list[bool]]]


class Examiner:
    """Models of a zoo that take merged weights and answer; each structure and data set is read once."""

    def __init__(self, zoo: Path) -> None:
        """Examine with the data and the tokenizer of a zoo."""
        self.zoo = zoo
        self._models: dict[str, Any] = {}
        self._data: dict[Path, list[tuple[list[int], int]]] = {}

    def answers(self, folder: Path, setting: ZooSetting, splits: Sequence[str]) -> Answers:
        """Return, for every probe and split of it that exists, which examples a checkpoint labels right."""
        weights = {
            name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()
        }
        found: Answers = {}
        for probe in setting.probes:
            model = self._model_with(weights, setting, probe)
            found[probe.name] = {
                split: self._answer(model, data, setting.max_length)
                for split in splits
                if (data := self.zoo / probe.data / f"{split}.parquet").exists()
            }
        return found

    def _model_with(self, weights: dict[str, torch.Tensor], setting: ZooSetting, probe: Probe) -> Any:
        structure = probe.head or setting.models[0]
        if structure not in self._models:
            self._models[structure] = AutoModelForSequenceClassification.from_pretrained(
                self.zoo / structure, dtype=torch.float32
            ).eval()
        model = self._models[structure]
        if probe.head:
            weights = {name: value for name, value in weights.items() if not name.startswith("classifier.")}
        missing, unexpected = model.load_state_dict(weights, strict=False)
        allowed = {"classifier.weight", "classifier.bias"} if probe.head else set()
        assert not unexpected and set(missing) <= allowed, (missing, unexpected)
        return model

    def _answer(self, model: Any, data: Path, max_length: int) -> list[bool]:
        examples = self._read(data, max_length)
        order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]))
        right = [False] * len(examples)
        with torch.inference_mode():
            for begin in range(0, len(order), _BATCH):
                chosen = order[begin : begin + _BATCH]
                width = max(len(examples[i][0]) for i in chosen)
                tokens_BT = torch.zeros(len(chosen), width, dtype=torch.long)
                mask_BT = torch.zeros_like(tokens_BT)
                for row, i in enumerate(chosen):
                    tokens_BT[row, : len(examples[i][0])] = torch.tensor(examples[i][0])
                    mask_BT[row, : len(examples[i][0])] = 1
                labels_B = model(input_ids=tokens_BT, attention_mask=mask_BT).logits.argmax(-1).tolist()
                for i, label in zip(chosen, labels_B, strict=True):
                    right[i] = label == examples[i][1]
        return right

    def _read(self, data: Path, max_length: int) -> list[tuple[list[int], int]]:
        if data not in self._data:
            rows = pyarrow.parquet.read_table(data).to_pydict()
            tokenizer = AutoTokenizer.from_pretrained(self.zoo / "pretrained")
            tokens = tokenizer(rows["text"], truncation=True, max_length=max_length)["input_ids"]
            self._data[data] = list(zip(tokens, rows["label"], strict=True))
        return self._data[data]


def examine(
    zoo: Path,
    work: Path,
    setting: ZooSetting,
    points: Iterable[Point],
    splits: Sequence[str] = ("validation", "test"),
    folder: str | None = None,
) -> dict[str, Answers]:
    """Return the answers of every point, merging and asking those that were not asked before.

    The working folder must be the zoo: recipes name models relative to it.

    Args:
        zoo: the zoo.
        work: keeps the answers.
        setting: whose probes are asked.
        points: with names of their own.
        splits: of the probes' data.
        folder: of the answers, in `work` [the setting's name].
    """
    examiner, found = Examiner(zoo), {}
    names: set[str] = set()
    assert len({probe.name for probe in setting.probes}) == len(setting.probes), "probes share a name"
    with raymerge.Session(in_process=True) as session:
        for point in points:
            assert point.name not in names, point.name
            names.add(point.name)
            file = work / "answers" / (folder or setting.name) / f"{point.name.replace(' ', '_')}.json"
            key = _key(zoo, point, splits)
            kept = json.loads(file.read_text()) if file.exists() else {}
            if kept.get("key") != key:
                kept = _examine(session, examiner, work, setting, point, splits) | {"key": key}
                file.parent.mkdir(parents=True, exist_ok=True)
                file.with_suffix(".part").write_text(json.dumps(kept))
                file.with_suffix(".part").rename(file)
            found[point.name] = kept["answers"]
    return found


def _examine(
    session: raymerge.Session,
    examiner: Examiner,
    work: Path,
    setting: ZooSetting,
    point: Point,
    splits: Sequence[str],
) -> dict[str, Any]:
    begin, merged = time.perf_counter(), work / "merged"
    if point.recipe is None:
        folder = examiner.zoo / point.folder
    else:
        folder = merged
        result = session.merge(point.recipe, merged, overwrite=True, strict=True)
        for line in result.remarks:
            print(f"  {line}", flush=True)
    merge_seconds = time.perf_counter() - begin
    answers = examiner.answers(folder, setting, splits)
    shutil.rmtree(merged, ignore_errors=True)
    seconds = time.perf_counter() - begin
    shares = [
        f"{name} {100 * sum(of['test']) / len(of['test']):.1f}"
        for name, of in answers.items()
        if "test" in of
    ]
    print(
        f"{setting.name}/{point.name}: {', '.join(shares)} ({merge_seconds:.1f} of {seconds:.1f} s)",
        flush=True,
    )
    return {"answers": answers, "merge_seconds": merge_seconds, "seconds": seconds}


def _key(zoo: Path, point: Point, splits: Sequence[str]) -> str:
    parts = [
        (zoo / "zoo.json").read_text(),
        json.dumps(point.recipe, sort_keys=True),
        point.folder,
        list(splits),
        [importlib.metadata.version(name) for name in ("raymerge", "torch", "transformers")],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
