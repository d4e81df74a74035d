"""Runs of `raymerge stats`: workers, layer groups, faults and resumed runs change nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raymerge.cluster.statistics import StatisticsResult, collect_statistics
from raymerge.cluster.statistics_cache import cached_statistics
from raymerge.cluster.statistics_options import StatisticsOptions, StatisticsProgress
from raymerge.merge_actors.checkpoint.folder import open_checkpoint
from raymerge.merge_actors.errors import CheckpointError, OutputError, RecipeError
from raymerge.stats.activation_worker import ActivationWorker
from raymerge.stats.data_rows import DataSpec
from raymerge.stats.measure_job import MeasureJob
from raymerge.stats.statistics_file import MANIFEST, open_statistics

Values = dict[str, tuple[torch.Tensor, tuple[int, ...]]]
BATCH_TOKENS = 64


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = random.Random(3)
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    rows = [
        {"text": " ".join(f"word{rng.randrange(92)}" for _ in range(rng.randrange(2, 16))), "label": i % 2}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def classifier(tmp_path: Path, tiny_checkpoints: Callable[..., Any]) -> Path:
    """Write a tiny BERT with a head of two classes."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    base = tiny_checkpoints("bert").base
    torch.manual_seed(11)
    config = BertConfig.from_pretrained(base, num_labels=2)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "classifier")
    return tmp_path / "classifier"


def _collect(model: Path, out: Path, texts: Path, **changes: Any) -> StatisticsResult:
    fields = {name: changes.pop(name) for name in list(changes) if name in DataSpec.__slots__}
    data = DataSpec(source=str(texts), **{"batch_tokens": BATCH_TOKENS, **fields})
    callbacks = {name: changes.pop(name) for name in ("on_progress", "on_remark") if name in changes}
    options = {"kind": "gram", "in_process": True, "workers": 1, "data": data, **changes}
    return collect_statistics(str(model), out, StatisticsOptions(**options), **callbacks)


def _values(out: Path, samples: int | None = None) -> Values:
    statistics = open_statistics(out, samples)
    files = {file: load_file(out / file) for file in statistics.manifest["files"]}
    return {
        name: (files[os.path.basename(module.tensor.file)][module.key], module.num_rows)
        for name, module in statistics.modules.items()
    }


def _assert_same_bits(found: Values, expected: Values) -> None:
    assert found.keys() == expected.keys()
    for name, (tensor, num_rows) in found.items():
        assert num_rows == expected[name][1], name
        assert torch.equal(tensor, expected[name][0]), name


def _assert_close(found: Values, expected: Values) -> None:
    """Compare up to the rounding of float32: kernels round by the alignment of memory, which a file gives."""
    assert found.keys() == expected.keys()
    for name, (tensor, num_rows) in found.items():
        assert num_rows == expected[name][1], name
        scale = expected[name][0].abs().max().item()
        torch.testing.assert_close(tensor, expected[name][0], rtol=1e-6, atol=1e-6 * scale)


def _budget_gib(model: Path, texts: Path, tmp_path: Path, *, is_streamed: bool) -> float:
    """Return a budget for one layer at a time, the model whole or not."""
    job = MeasureJob(
        model=str(model),
        revision=None,
        allow_pickle=False,
        kind="gram",
        data=DataSpec(source=str(texts), batch_tokens=BATCH_TOKENS),
        estimator="expected",
        device="cpu",
        threads=1,
        work_folder=str(tmp_path),
    )
    needs = ActivationWorker(job).describe().needs
    num_bytes = needs.other_weights + needs.activations
    if is_streamed:
        layers = zip(needs.block_statistics, needs.block_weights, strict=True)
        num_bytes += needs.block_weights[0] + max(map(sum, layers))
    else:
        num_bytes += sum(needs.block_weights) + max(*needs.block_statistics, needs.other_statistics)
    return (num_bytes + 1) / 2**30


@pytest.mark.parametrize("architecture", ["bert", "llama", "gpt2", "t5"])
def test_workers_and_layer_groups_change_nothing(
    architecture: str, tiny_checkpoints: Callable[..., Any], texts: Path, tmp_path: Path
) -> None:
    model = tiny_checkpoints(architecture, sharded=True).models[0]
    one = _collect(model, tmp_path / "one", texts)
    expected = _values(tmp_path / "one")
    assert one.num_groups == 1
    for workers in (2, 4):
        _collect(model, tmp_path / f"workers{workers}", texts, workers=workers)
        _assert_same_bits(_values(tmp_path / f"workers{workers}"), expected)
    for is_streamed in (False, True):
        out = tmp_path / f"streamed{is_streamed}"
        budget = _budget_gib(model, texts, tmp_path, is_streamed=is_streamed)
        bounded = _collect(model, out, texts, workers=2, memory_gib=budget)
        assert bounded.num_groups >= 2
        _assert_close(_values(out), expected)
    left_over = sorted(path.name for path in tmp_path.iterdir())
    assert left_over == ["one", "streamedFalse", "streamedTrue", "workers2", "workers4"]


def test_workers_without_a_shard_of_their_own_do_no_harm(
    tiny_checkpoints: Callable[..., Any], texts: Path, tmp_path: Path
) -> None:
    model = tiny_checkpoints("llama").models[0]
    for workers in (1, 4):
        _collect(model, tmp_path / str(workers), texts, workers=workers, samples=3)
    _assert_same_bits(_values(tmp_path / "4"), _values(tmp_path / "1"))


def test_the_manifest_says_what_was_measured(
    tiny_checkpoints: Callable[..., Any], texts: Path, tmp_path: Path
) -> None:
    model = tiny_checkpoints("bert").models[0]
    remarks: list[str] = []
    result = _collect(model, tmp_path / "out", texts, on_remark=remarks.append)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    num_tokens = sum(len(json.loads(line)["text"].split()) for line in texts.read_text().splitlines())
    assert (manifest["num_tokens"], manifest["num_examples"]) == (num_tokens, 40)
    assert manifest["model"] == {"path": str(model), "fingerprint": open_checkpoint(model).fingerprint}
    assert manifest["data"]["source"] == str(texts) and len(manifest["data"]["fingerprint"]) == 32
    assert remarks == [
        "cls.predictions.decoder.weight is tied to the embedding and treated as one: it has no Gram matrix"
    ]
    remarks.clear()
    _collect(model, tmp_path / "short", texts, on_remark=remarks.append, samples=5, max_length=5)
    cut, deficient = remarks[1:]
    assert cut.endswith("texts are longer than 5 tokens and were cut there")
    assert deficient.startswith(
        "13 of 13 weights saw fewer inputs than they have input features, bert.encoder."
    )
    coverage = open_statistics(tmp_path / "out").check_against(open_checkpoint(model))
    assert len(coverage.covered) == 13 and not coverage.uncovered
    summary = result.to_mapping()
    assert (summary["covered"], summary["expected"], summary["tokens"]) == (13, 13, num_tokens)
    other = open_checkpoint(tiny_checkpoints("bert").models[1])
    with pytest.raises(CheckpointError, match="were measured on"):
        open_statistics(tmp_path / "out").check_against(other)


def test_a_failed_run_goes_on_where_it_was(
    tiny_checkpoints: Callable[..., Any], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_checkpoints("t5").models[0]
    _collect(model, tmp_path / "expected", texts)
    budget = _budget_gib(model, texts, tmp_path, is_streamed=True)
    write = ActivationWorker.write

    def fail_in_second_group(
        self: ActivationWorker, entries: Any, file: str, num_examples: int
    ) -> str | None:
        written = write(self, entries, file, num_examples)
        if "gram-00001" in file:
            raise OutputError("the disk is full")
        return written

    with monkeypatch.context() as patch:
        patch.setattr(ActivationWorker, "write", fail_in_second_group)
        with pytest.raises(OutputError, match="the disk is full"):
            _collect(model, tmp_path / "out", texts, workers=2, memory_gib=budget)
    assert not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match=r"an unfinished run .* --resume"):
        _collect(model, tmp_path / "out", texts, memory_gib=budget)
    with pytest.raises(OutputError, match="measured another model, data or settings"):
        _collect(model, tmp_path / "out", texts, samples=5, resume=True)
    result = _collect(model, tmp_path / "out", texts, workers=1, resume=True)  # another number of workers
    assert (result.num_groups, result.num_resumed) == (4, 1)
    files = {*open_statistics(tmp_path / "out").manifest["files"], MANIFEST}
    assert files == {path.name for path in (tmp_path / "out").iterdir()}
    _assert_close(_values(tmp_path / "out"), _values(tmp_path / "expected"))


def test_an_output_that_exists_is_kept_unless_it_may_be_replaced(
    tiny_checkpoints: Callable[..., Any], texts: Path, tmp_path: Path
) -> None:
    model = tiny_checkpoints("llama").models[0]
    _collect(model, tmp_path / "out", texts, samples=3)
    before = _values(tmp_path / "out")
    with pytest.raises(OutputError, match="exists; choose another folder"):
        _collect(model, tmp_path / "out", texts)
    with pytest.raises(RecipeError, match="no column 'words'"):
        _collect(model, tmp_path / "out", texts, overwrite=True, text_column="words")
    _assert_same_bits(_values(tmp_path / "out"), before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(OutputError, match=r"holds \S+ and no manifest of raymerge"):
        _collect(model, texts.parent, texts, overwrite=True)
    _collect(model, tmp_path / "out", texts, overwrite=True)
    assert open_statistics(tmp_path / "out").manifest["num_examples"] == 40


def test_a_budget_that_no_layer_fits_is_refused(
    tiny_checkpoints: Callable[..., Any], texts: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"--memory-gib is 9\.54e-07 GiB"):
        _collect(tiny_checkpoints("llama").base, tmp_path / "out", texts, memory_gib=2**-20)


def test_statistics_that_data_ask_for_are_measured_once(
    tiny_checkpoints: Callable[..., Any],
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    models = tiny_checkpoints("llama").models
    data = DataSpec(source=str(texts), samples=4)
    options = StatisticsOptions(kind="gram", data=data, in_process=True, workers=1)
    first = cached_statistics(str(models[0]), options)
    seen: list[StatisticsProgress] = []
    copy = tmp_path / "copy.jsonl"
    copy.write_text(texts.read_text())
    moved = dataclasses.replace(options, data=dataclasses.replace(data, source=str(copy)), workers=2)
    assert cached_statistics(str(models[0]), moved, on_progress=seen.append) == first
    assert not seen
    others = [
        cached_statistics(str(models[1]), options),
        cached_statistics(
            str(models[0]), dataclasses.replace(options, data=dataclasses.replace(data, samples=5))
        ),
    ]
    assert len({first, *others}) == 3
    open_statistics(others[0]).check_against(open_checkpoint(models[1]))


@pytest.mark.parametrize("estimator", ["expected", "sampled", "empirical"])
def test_fisher_does_not_depend_on_workers_or_batches(
    estimator: str, classifier: Path, texts: Path, tmp_path: Path
) -> None:
    options = {"kind": "fisher", "estimator": estimator, "label_column": "label"}
    _collect(classifier, tmp_path / "one", texts, **options)
    _collect(classifier, tmp_path / "two", texts, workers=2, batch_tokens=7, **options)
    found = _values(tmp_path / "one")
    _assert_same_bits(_values(tmp_path / "two"), found)
    checkpoint = open_checkpoint(classifier)
    assert found.keys() == checkpoint.tensors.keys()
    assert all(tensor.shape == checkpoint.tensors[name].shape for name, (tensor, _) in found.items())
    coverage = open_statistics(tmp_path / "one").check_against(checkpoint)
    assert not coverage.uncovered


def test_expected_fisher_of_a_head_bias_is_its_analytic_value(
    classifier: Path, texts: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, BertForSequenceClassification

    _collect(classifier, tmp_path / "out", texts, kind="fisher")
    model = BertForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    values = []
    with torch.no_grad():
        for line in texts.read_text().splitlines():
            ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"]])
            p_C = model(ids).logits[0].double().softmax(-1)
            values.append(p_C * (1 - p_C))
    found, num_examples = _values(tmp_path / "out")["classifier.bias"]
    assert num_examples == (40,)
    torch.testing.assert_close(found.double(), torch.stack(values).mean(dim=0), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_worker_that_is_killed_or_stopped_makes_the_layer_group_start_again(
    ray_session: None,
    tiny_checkpoints: Callable[..., Any],
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: signal.Signals,
) -> None:
    monkeypatch.setattr("raymerge.cluster.signs_of_life.SILENT_SECONDS", 3.0)
    model = tiny_checkpoints("llama").models[0]
    _collect(model, tmp_path / "expected", texts)
    budget = _budget_gib(model, texts, tmp_path, is_streamed=True)
    killed: list[int] = []
    remarks: list[str] = []

    def kill_one(progress: StatisticsProgress) -> None:
        if not killed:
            killed.append(progress.pids[1])
            os.kill(progress.pids[1], how)

    result = _collect(
        model,
        tmp_path / "out",
        texts,
        in_process=False,
        workers=2,
        memory_gib=budget,
        on_progress=kill_one,
        on_remark=remarks.append,
    )
    assert len(killed) == 1
    assert any("starts again" in line for line in remarks)
    assert result.num_groups == 3
    _assert_close(_values(tmp_path / "out"), _values(tmp_path / "expected"))


def test_a_busy_cluster_is_shared_and_not_waited_for(
    ray_session: None,
    tiny_checkpoints: Callable[..., Any],
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another run holds three of the four CPUs: of two workers asked for, one measures everything."""
    import ray

    from raymerge.cluster import activation_group

    class Other:
        def ping(self) -> None: ...

    other: Any = ray.remote(Other).options(num_cpus=3).remote()
    ray.get(other.ping.remote(), timeout=60)
    monkeypatch.setattr(activation_group, "GATHER_SECONDS", 6.0)
    model = tiny_checkpoints("llama").models[0]
    try:
        _collect(model, tmp_path / "out", texts, in_process=False, workers=2)
    finally:
        ray.kill(other)
    _collect(model, tmp_path / "expected", texts)
    _assert_close(_values(tmp_path / "out"), _values(tmp_path / "expected"))


_MEASURE_PEAK = """
import resource, sys
from raymerge.cluster.statistics import collect_statistics
from raymerge.cluster.statistics_options import StatisticsOptions
from raymerge.stats.data_rows import DataSpec
model, tiny, texts, out, gib = sys.argv[1:]
def run(model, out, gib):
    data = DataSpec(source=texts, batch_tokens=64)
    options = StatisticsOptions(kind="gram", data=data, workers=1, in_process=True, memory_gib=gib)
    return collect_statistics(model, out, options)
run(tiny, out + "-warm", None)  # libraries are in memory from here on
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = run(model, out, float(gib))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(result.num_groups, (peak - before) / 2**20)
"""


@pytest.mark.slow
def test_peak_memory_stays_within_a_quarter_of_the_model(
    tiny_checkpoints: Callable[..., Any], texts: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=24,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="200MB")
    tiny = tiny_checkpoints("llama").base
    AutoTokenizer.from_pretrained(tiny).save_pretrained(tmp_path / "model")
    model_gib = open_checkpoint(tmp_path / "model").num_bytes / 2**30
    arguments = [tmp_path / "model", tiny, texts, tmp_path / "out", model_gib / 4]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE_PEAK, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
    )
    num_groups, peak_gib = done.stdout.split()
    assert int(num_groups) > 1
    assert float(peak_gib) < model_gib / 4


def test_a_curve_over_samples_is_one_pass(
    tiny_checkpoints: Callable[..., Any], texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raymerge.stats.measured_model import MeasuredModel

    model = tiny_checkpoints("llama").models[0]
    passed: list[int] = []
    forward = MeasuredModel.forward
    monkeypatch.setattr(
        MeasuredModel,
        "forward",
        lambda self, batch: (passed.append(len(batch.examples)), forward(self, batch))[1],
    )
    _collect(model, tmp_path / "curve", texts, workers=2, samples_at=(5, 20, 40))
    assert sum(passed) == 40
    for samples in (5, 20, 40):
        _collect(model, tmp_path / str(samples), texts, samples=samples)
        expected = open_statistics(tmp_path / str(samples))
        found = open_statistics(tmp_path / "curve", samples)
        assert found.manifest["num_tokens"] == expected.manifest["num_tokens"]
        assert found.manifest["num_examples"] == samples and found.modules.keys() == expected.modules.keys()
        _assert_close(_values(tmp_path / "curve", samples), _values(tmp_path / str(samples)))
    _collect(
        model,
        tmp_path / "grouped",
        texts,
        samples_at=(5, 20, 40),
        memory_gib=_budget_gib(model, texts, tmp_path, is_streamed=True) * 2,
    )
    for samples in (5, 20, 40):
        _assert_close(_values(tmp_path / "grouped", samples), _values(tmp_path / "curve", samples))
    with pytest.raises(CheckpointError, match="kept at 5, 20, 40 samples, not at 7"):
        open_statistics(tmp_path / "curve", 7)
    with pytest.raises(RecipeError, match=r"asks for 41 rows, but .* has 40"):
        _collect(model, tmp_path / "more", texts, samples_at=(5, 41))
    with pytest.raises(RecipeError, match="must be ascending"):
        _collect(model, tmp_path / "more", texts, samples_at=(5, 5))
    with pytest.raises(RecipeError, match="--samples-at keeps Gram"):
        _collect(model, tmp_path / "more", texts, samples_at=(5, 6), kind="fisher")


def test_a_recipe_takes_the_statistics_of_fewer_samples(
    tiny_checkpoints: Callable[..., Any], texts: Path, tmp_path: Path
) -> None:
    import raymerge

    models = tiny_checkpoints("llama").models[:2]
    for number, model in enumerate(models):
        _collect(model, tmp_path / f"curve{number}", texts, samples_at=(5, 20))
        _collect(model, tmp_path / f"five{number}", texts, samples=5)

    def merged(name: str, statistics: list[Any]) -> dict[str, torch.Tensor]:
        entries = [{"model": str(m), "statistics": s} for m, s in zip(models, statistics, strict=True)]
        recipe = {"merge_method": "regmean", "models": entries}
        raymerge.merge(recipe, tmp_path / name, in_process=True, workers=1)
        return load_file(tmp_path / name / "model.safetensors")

    prefix = [{"path": str(tmp_path / f"curve{i}"), "samples": 5} for i in range(2)]
    found = merged("prefix", prefix)
    expected = merged("five", [str(tmp_path / f"five{i}") for i in range(2)])
    whole = merged("whole", [str(tmp_path / f"curve{i}") for i in range(2)])
    name = "model.layers.1.mlp.down_proj.weight"
    torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)
    assert not torch.allclose(found[name], whole[name], rtol=1e-5, atol=1e-7)
