"""What the tests of statistics share: text, jobs, and an independent implementation of Grams.

The reference keeps everything in memory, runs one example at a time without padding, and knows nothing of
shards, groups or shared inputs: hooks, float64 sums, nothing else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from raymerge.stats.data_rows import DataSpec
from raymerge.stats.measure_job import MeasureJob

NUM_ROWS = 24


@pytest.fixture(scope="session")
def texts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows of 2 to 17 words of the tiny tokenizer, with a label."""
    rng = random.Random(7)
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [
        {
            "text": " ".join(f"word{rng.randrange(92)}" for _ in range(rng.randrange(2, 18))),
            "other": " ".join(f"word{rng.randrange(92)}" for _ in range(rng.randrange(1, 9))),
            "label": i % 2,
        }
        for i in range(NUM_ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_job(texts_file: Path, tmp_path: Path) -> Callable[..., MeasureJob]:
    """Return a maker of jobs on the texts: `make_job(folder, batch_tokens=64, kind="fisher")`."""

    def make(model: Path, **changes: Any) -> MeasureJob:
        fields = {name: changes.pop(name) for name in list(changes) if name in DataSpec.__slots__}
        job = MeasureJob(
            model=str(model),
            revision=None,
            allow_pickle=False,
            kind="gram",
            data=DataSpec(source=str(texts_file), **{"batch_tokens": 64, **fields}),
            estimator="expected",
            device="cpu",
            threads=1,
            work_folder=str(tmp_path),
        )
        return replace(job, **changes)

    return make


@pytest.fixture(scope="session")
def reference_grams(texts_file: Path) -> Callable[[Path, Any], dict[str, tuple[Any, int]]]:
    """Return the reference: (folder, model class) -> weight name -> (float64 Gram, rows)."""
    import torch
    from transformers import AutoTokenizer
    from transformers.pytorch_utils import Conv1D

    def collect(folder: Path, model_class: Any) -> dict[str, tuple[torch.Tensor, int]]:
        model = model_class.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        found: dict[str, tuple[torch.Tensor, int]] = {}

        def hook_of(name: str) -> Any:
            def hook(module: Any, arguments: Any) -> None:
                rows = arguments[0].reshape(-1, arguments[0].shape[-1]).double()
                gram, num_rows = found.get(name, (torch.zeros(rows.shape[1], rows.shape[1]).double(), 0))
                found[name] = (gram + rows.T @ rows, num_rows + rows.shape[0])

            return hook

        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear | Conv1D):
                module.register_forward_pre_hook(hook_of(f"{name}.weight"))
        for line in texts_file.read_text().splitlines():
            ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
            inputs = {"input_ids": ids}
            if model.config.is_encoder_decoder:
                inputs["decoder_input_ids"] = torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], dim=1)
            with torch.no_grad():
                model(**inputs)
        return found

    return collect


@pytest.fixture
def run_together() -> Callable[[list[Callable[[], Any]]], list[Any]]:
    """Return a caller of functions that wait for each other, each on a thread of its own."""
    from concurrent.futures import ThreadPoolExecutor

    def run(functions: list[Callable[[], Any]]) -> list[Any]:
        with ThreadPoolExecutor(len(functions)) as pool:
            return [each.result(timeout=120) for each in [pool.submit(function) for function in functions]]

    return run
