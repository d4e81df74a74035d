"""Make the points of a study one after another and keep what each one answers.

A point is merged, its answers on every probe are taken, and its checkpoint is removed. Answers are kept in the work
folder under a key of all that determines them, so a study that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from zoo_points import Point, Probe, ZooSetting

import raymerge

_BATCH = 16
#: Answers of one point: probe -> split -> whether each example was answered right.
Answers = dict[str, dict[str, list[bool]]]


class Examiner:
    """Models of a zoo that take merged weights and answer; each structure and data set is read once."""

    def __init__(self, zoo: Path, precision: str) -> None:
        """Examine with the data and the tokenizer of a zoo, in "fp32", or "bf16" under autocast."""
        self.zoo, self.precision = zoo, precision
        self._models: dict[str, Any] = {}
        self._data: dict[Path, list[tuple[list[int], int]]] = {}

    def answers(
        self, folder: Path, setting: ZooSetting, wanted: Iterable[tuple[str, Probe]]
    ) -> dict[str, list[bool]]:
        """Return which examples a checkpoint labels right.

        Args:
            folder: the checkpoint.
            setting: that it belongs to.
            wanted: splits of probes; those that do not exist are left out.

        Returns:
            by `answers_id`.
        """
        weights = {
            name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()
        }
        found = {}
        for split, probe in wanted:
            data = self.zoo / probe.data / f"{split}.parquet"
            if data.exists():
                model = self._model_with(weights, setting, probe)
                found[answers_id(split, probe)] = self._answer(model, data, setting.max_length)
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
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "bf16"):
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


class Examination:
    """The points of one setting, merged and asked when an answer is wanted that was not given before.

    The working folder must be the zoo: recipes name models relative to it.
    """

    def __init__(self, zoo: Path, work: Path, setting: ZooSetting, precision: str = "fp32") -> None:
        """Keep answers under `work`; those of earlier runs are found there."""
        names = [probe.name for probe in setting.probes]
        assert len(set(names)) == len(names), f"probes share a name: {names}"
        self.work, self.setting = work, setting
        self._examiner = Examiner(zoo, precision)
        self._said: set[str] = set()

    def ask(self, points: Sequence[Point], splits: Sequence[str]) -> dict[str, Answers]:
        """Return the answers of points on some splits of the probes' data, by the points' names."""
        names = [point.name for point in points]
        assert len(set(names)) == len(names), f"points share a name: {names}"
        with raymerge.Session(in_process=True) as session:
            return {point.name: self._ask(session, point, splits) for point in points}

    def _ask(self, session: raymerge.Session, point: Point, splits: Sequence[str]) -> Answers:
        file = self.work / "answers" / f"{self._key(point)}.json"
        kept: dict[str, list[bool]] = json.loads(file.read_text()) if file.exists() else {}
        wanted = [
            (split, probe)
            for split in splits
            for probe in self.setting.probes
            if (self._examiner.zoo / probe.data / f"{split}.parquet").exists()
        ]
        missing = [each for each in wanted if answers_id(*each) not in kept]
        if missing:
            kept |= self._examine(session, point, missing)
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(kept))
            part.rename(file)
        found: Answers = {}
        for split, probe in wanted:
            found.setdefault(probe.name, {})[split] = kept[answers_id(split, probe)]
        return found

    def _examine(
        self, session: raymerge.Session, point: Point, wanted: Sequence[tuple[str, Probe]]
    ) -> dict[str, list[bool]]:
        begin, folder = time.perf_counter(), self._examiner.zoo / point.folder
        merged = self.work / f"merged-{os.getpid()}"
        if point.recipe is not None:
            folder = merged
            for line in session.merge(point.recipe, merged, overwrite=True, strict=True).remarks:
                if line not in self._said:
                    print(f"  {line}", flush=True)
                self._said.add(line)
        merge_seconds = time.perf_counter() - begin
        found = self._examiner.answers(folder, self.setting, wanted)
        shutil.rmtree(merged, ignore_errors=True)
        seconds = time.perf_counter() - begin
        shares = ", ".join(
            f"{probe.name} {split} {100 * sum(each) / len(each):.1f}"
            for split, probe in wanted
            for each in [found[answers_id(split, probe)]]
        )
        print(f"{self.setting.name}/{point.name}: {shares}", flush=True)
        print(f"  merged in {merge_seconds:.1f} s, asked in {seconds - merge_seconds:.1f} s", flush=True)
        return found

    def _key(self, point: Point) -> str:
        """Return a hash of all that determines the answers; points of one recipe share them."""
        parts = [
            (self._examiner.zoo / "zoo.json").read_text(),
            point.recipe,
            point.folder,
            self.setting.max_length,
            self._examiner.precision,
            [importlib.metadata.version(name) for name in ("raymerge", "torch", "transformers")],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def answers_id(split: str, probe: Probe) -> str:
    """Return the key of a point's answers to one split of a probe."""
    return f"{probe.data}/{split} {probe.head or ''}".strip()


def joined(*answers: Mapping[str, Answers]) -> dict[str, Answers]:
    """Join answers on different splits, point by point."""
    found: dict[str, Answers] = {}
    for each in answers:
        for point, of_point in each.items():
            for probe, splits in of_point.items():
                found.setdefault(point, {}).setdefault(probe, {}).update(splits)
    return found
