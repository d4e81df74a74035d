"""An evaluator's model has the bits of a checkpoint that `raymerge merge` writes; nothing is read twice."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from raymerge.cluster.evaluator import Evaluator, EvaluatorJob
from raymerge.cluster.merge import merge
from raymerge.cluster.options import MergeOptions
from raymerge.merge_actors.checkpoint.folder import open_checkpoint
from raymerge.merge_actors.errors import RaymergeError
from raymerge.merge_actors.methods.gram_matrix import pack_upper
from raymerge.stats.evaluation.evaluate import evaluate_checkpoint
from raymerge.stats.evaluation.tasks import EvaluationSpec, parse_evaluation


def task_vectors(family: Any, method: str, **parameters: Any) -> dict[str, Any]:
    of_model = {name: parameters.pop(name) for name in ("weight", "density") if name in parameters}
    return {
        "name": "point",
        "merge_method": method,
        "base_model": str(family.base),
        "models": [{"model": str(m), "parameters": {"weight": 0.5, **of_model}} for m in family.models],
        "parameters": parameters,
    }


@pytest.fixture
def evaluator(evaluation: EvaluationSpec) -> Iterator[Evaluator]:
    made = make_evaluator(evaluation)
    yield made
    made.close()


def make_evaluator(evaluation: EvaluationSpec, *, num_threads: int = 2, num_slots: int = 1) -> Evaluator:
    return Evaluator(
        EvaluatorJob(
            evaluation=evaluation,
            merge=MergeOptions(),
            device="cpu",
            num_threads=num_threads,
            num_slots=num_slots,
        )
    )


def written(recipe: Mapping[str, Any], folder: Path) -> dict[str, torch.Tensor]:
    merge([recipe], folder, MergeOptions(in_process=True, workers=1))
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merges_to_the_bytes_of_a_checkpoint(
    dtype: str, tiny_checkpoints: Callable[..., Any], evaluator: Evaluator, tmp_path: Path
) -> None:
    family = tiny_checkpoints("bert", dtype=dtype, sharded=True)
    recipes = [
        task_vectors(family, "task_arithmetic", **{"lambda": 0.7}),
        task_vectors(family, "ties", density=0.4),
        task_vectors(family, "dare_ties", density=0.5, **{"lambda": 1.3}),
    ]
    for number, recipe in enumerate(recipes):
        evaluator.merge(0, recipe)
        expected = written(recipe, tmp_path / str(number))
        assert evaluator.tensors(0).keys() == expected.keys()
        for name, tensor in evaluator.tensors(0).items():
            assert tensor.dtype == expected[name].dtype
            assert torch.equal(tensor, expected[name]), name


def test_reads_each_source_once(tiny_checkpoints: Callable[..., Any], evaluator: Evaluator) -> None:
    family = tiny_checkpoints("bert")
    first = evaluator.merge(0, task_vectors(family, "task_arithmetic"))
    second = evaluator.merge(0, task_vectors(family, "ties", density=0.4))
    files = [file for model in (family.base, *family.models) for file in model.glob("*.safetensors")]
    assert first.bytes_read == sum(file.stat().st_size for file in files)
    assert second.bytes_read == 0
    assert first.digest != second.digest


def test_scores_what_a_checkpoint_on_disk_scores(
    tiny_checkpoints: Callable[..., Any], evaluation: EvaluationSpec, evaluator: Evaluator, tmp_path: Path
) -> None:
    family = tiny_checkpoints("bert", dtype="bfloat16")
    recipe = task_vectors(family, "task_arithmetic", weight=3.0)
    evaluator.merge(0, task_vectors(family, "ties", density=0.4))
    evaluator.score(0, "validation")
    evaluator.merge(0, recipe)
    first = evaluator.score(0, "validation", 0.3)
    rest = evaluator.score(0, "validation")
    written(recipe, tmp_path / "out")
    expected, _ = evaluate_checkpoint(open_checkpoint(tmp_path / "out"), evaluation)
    assert rest.metrics.keys() == expected.keys() == {"topic.pearson", "topic.spearman", "topic.mse"}
    for name, estimate in expected.items():
        assert rest.metrics[name] == pytest.approx(tuple(estimate), rel=1e-12)
    num_batches = first.num_forward_passes + rest.num_forward_passes
    assert first.num_forward_passes == -(-num_batches * 3 // 10)


def test_metrics_do_not_depend_on_the_threads(
    tiny_checkpoints: Callable[..., Any], evaluation: EvaluationSpec
) -> None:
    family = tiny_checkpoints("bert")
    found = []
    for num_threads in (1, 3):
        evaluator = make_evaluator(evaluation, num_threads=num_threads)
        report = evaluator.merge(0, task_vectors(family, "dare_linear", density=0.3, weight=2.0))
        found.append((report.digest, evaluator.score(0, "validation").metrics))
        evaluator.close()
    assert found[0] == found[1]


def test_slots_hold_models_of_their_own(
    tiny_checkpoints: Callable[..., Any], evaluation: EvaluationSpec
) -> None:
    family = tiny_checkpoints("bert")
    evaluator = make_evaluator(evaluation, num_slots=2)
    digests = [
        evaluator.merge(slot, task_vectors(family, "linear", weight=1.0 + slot)).digest for slot in (0, 1)
    ]
    name = "bert.embeddings.word_embeddings.weight"
    tensors = [evaluator.tensors(slot)[name] for slot in (0, 1)]
    assert tensors[0].data_ptr() != tensors[1].data_ptr()
    assert digests[0] == evaluator.merge(1, task_vectors(family, "linear", weight=1.0)).digest
    evaluator.close()


def test_goes_on_after_a_point_that_fails(tiny_checkpoints: Callable[..., Any], evaluator: Evaluator) -> None:
    family = tiny_checkpoints("bert")
    good = task_vectors(family, "task_arithmetic")
    digest = evaluator.merge(0, good).digest
    bad = task_vectors(family, "task_arithmetic")
    bad["models"][1]["model"] = "/nowhere"
    with pytest.raises(RaymergeError, match="/nowhere"):
        evaluator.merge(0, bad)
    assert evaluator.merge(0, good).digest == digest


@pytest.mark.parametrize("slice_bytes", [32 << 20, 4 << 10], ids=["whole tensors", "cut tensors"])
@pytest.mark.parametrize("trim", ["tensor", "model"])
def test_measures_a_tensor_once_for_all_weights_and_scales(
    trim: str,
    slice_bytes: int,
    tiny_checkpoints: Callable[..., Any],
    evaluator: Evaluator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from raymerge.cluster import campaign

    plain = campaign.make_plan
    monkeypatch.setattr(
        campaign, "make_plan", lambda plans, **given: plain(plans, **{**given, "slice_bytes": slice_bytes})
    )
    family = tiny_checkpoints("bert")
    first = evaluator.merge(0, task_vectors(family, "ties", density=0.4, trim=trim))
    assert first.counters["num_reused_states"] == 0
    others = [
        task_vectors(family, "ties", density=0.4, trim=trim, **{"lambda": 0.3}),
        task_vectors(family, "ties", density=0.4, trim=trim, weight=0.1),
    ]
    states = []
    for number, recipe in enumerate(others):
        states.append(evaluator.merge(0, recipe).counters["num_reused_states"])
        expected = written(recipe, tmp_path / str(number))
        for name, tensor in evaluator.tensors(0).items():
            assert torch.equal(tensor, expected[name]), name
    assert states[0] == states[1] > 0
    other = evaluator.merge(0, task_vectors(family, "ties", density=0.5, trim=trim))
    assert other.counters["num_reused_states"] == 0


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("ties", {"density": 0.4}),
        ("ties", {"density": 0.4, "normalize": False}),
        ("dare_linear", {"density": 0.5}),
        ("dare_ties", {"density": 0.5, "weight": -0.7}),
        ("breadcrumbs", {"density": 0.6}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_forms_a_task_vector_once_for_all_lambdas(
    dtype: str,
    method: str,
    settings: dict[str, Any],
    tiny_checkpoints: Callable[..., Any],
    evaluator: Evaluator,
    tmp_path: Path,
) -> None:
    family = tiny_checkpoints("bert", dtype=dtype)
    reused = []
    for number, scale in enumerate((1.0, 0.3, -2.0)):
        recipe = task_vectors(family, method, **{"lambda": scale}, **settings)
        reused.append(evaluator.merge(0, recipe, "these").counters["num_reused_directions"])
        expected = written(recipe, tmp_path / str(number))
        for name, tensor in evaluator.tensors(0).items():
            assert torch.equal(tensor, expected[name]), name
    assert reused[0] == 0 and reused[1] == reused[2] >= len(evaluator.tensors(0)) - 2
    other = task_vectors(family, method, **{"lambda": 0.3}, **{**settings, "weight": 0.9})
    assert evaluator.merge(0, other, "others").counters["num_reused_directions"] == 0
    expected = written(other, tmp_path / "other")
    for name, tensor in evaluator.tensors(0).items():
        assert torch.equal(tensor, expected[name]), name


def test_a_task_vector_under_one_threshold_for_the_model_depends_on_all_tensors(
    tiny_checkpoints: Callable[..., Any], evaluator: Evaluator, tmp_path: Path
) -> None:
    """The first layer's inputs are the same with and without the second; the threshold is not."""
    family = tiny_checkpoints("bert")
    for number, num_layers in enumerate((2, 1)):
        recipe = task_vectors(family, "ties", trim="model")
        sources = [{"model": str(family.base), "layer_range": [0, num_layers]}]
        for each, density in zip(recipe.pop("models"), (0.3, 0.4, 0.5), strict=True):
            parameters = {"weight": 1.0, "density": density}
            sources.append({**each, "layer_range": [0, num_layers], "parameters": parameters})
        recipe["slices"] = [{"sources": sources}]
        evaluator.merge(0, recipe, "these")
        expected = written(recipe, tmp_path / str(number))
        for name, tensor in evaluator.tensors(0).items():
            assert torch.equal(tensor, expected[name]), name


def test_thresholds_of_deltas_in_float64_are_not_those_in_float32(
    tiny_checkpoints: Callable[..., Any], evaluator: Evaluator, tmp_path: Path
) -> None:
    family = tiny_checkpoints("bert")
    double = tmp_path / "double"
    shutil.copytree(family.models[2], double)
    weights = load_file(double / "model.safetensors")
    save_file({name: tensor.double() for name, tensor in weights.items()}, double / "model.safetensors")
    recipe = task_vectors(family, "ties", density=0.4) | {"dtype": "float32"}
    for number, path in enumerate((family.models[2], double)):
        recipe["models"][2]["model"] = str(path)
        evaluator.merge(0, recipe)
        expected = written(recipe, tmp_path / str(number))
        for name, tensor in evaluator.tensors(0).items():
            assert torch.equal(tensor, expected[name]), name


def test_keeps_no_task_vector_that_nobody_asks_for(
    tiny_checkpoints: Callable[..., Any], evaluator: Evaluator
) -> None:
    family = tiny_checkpoints("bert")
    for scale in (0.5, 1.0):
        report = evaluator.merge(0, task_vectors(family, "dare_linear", density=0.4, **{"lambda": scale}))
        assert report.counters["num_reused_directions"] == 0


@pytest.mark.parametrize(
    "method", ["slerp", "nuslerp", "karcher", "model_stock", "sce", "arcee_fusion", "dare_linear"]
)
def test_eager_formulas_on_mapped_sources(
    method: str, tiny_checkpoints: Callable[..., Any], evaluator: Evaluator, tmp_path: Path
) -> None:
    family = tiny_checkpoints("bert", dtype="bfloat16")
    base, first, second = str(family.base), *map(str, family.models[:2])
    recipe: dict[str, Any] = {"name": "point", "merge_method": method, "base_model": base}
    if method == "slerp":
        recipe |= {"models": [{"model": base}, {"model": first}], "parameters": {"t": 0.3}}
    elif method == "arcee_fusion":
        recipe["models"] = [{"model": first}]
    else:
        settings: dict[str, Any] = {"weight": 0.4}
        if method == "dare_linear":
            settings |= {"density": 0.5, "rescale": "l1"}
        recipe["models"] = [{"model": each, "parameters": settings} for each in (first, second)]
    evaluator.merge(0, recipe)
    expected = written(recipe, tmp_path / "out")
    for name, tensor in evaluator.tensors(0).items():
        assert torch.equal(tensor, expected[name]), name


def test_adds_grams_once_for_all_alphas(
    tiny_checkpoints: Callable[..., Any],
    evaluator: Evaluator,
    write_statistics: Callable[..., None],
    tmp_path: Path,
) -> None:
    family = tiny_checkpoints("bert")
    models = []
    for number, model in enumerate(family.models):
        rng = np.random.default_rng(number)
        grams, modules = {}, {}
        for name, info in open_checkpoint(model).tensors.items():
            if len(info.shape) == 2 and ("attention" in name or "dense" in name):
                width = info.shape[1]
                rows_RI = torch.from_numpy(
                    rng.standard_normal(((3 + number) * width, width)).astype(np.float32)
                )
                grams[name] = pack_upper(rows_RI.T @ rows_RI).numpy()
                modules[name] = {
                    "gram": name,
                    "kind": "linear",
                    "in_features": width,
                    "num_rows": len(rows_RI),
                }
        write_statistics(tmp_path / f"s{number}", model, "gram", grams, modules)
        models.append({"model": str(model), "statistics": str(tmp_path / f"s{number}")})
    reused = []
    other_weights = [{**models[0], "parameters": {"weight": 3.0}}, *models[1:]]
    points = [(alpha, "tokens", models) for alpha in (0.9, 0.3, 1.0)]
    points += [(1.0, "sum", models), (1.0, "tokens", other_weights)]
    for number, (alpha, normalize, of_point) in enumerate(points):
        recipe = {
            "name": "point",
            "merge_method": "regmean",
            "models": of_point,
            "parameters": {"alpha": alpha, "normalize": normalize},
            "fallback": "mean",
        }
        reused.append(evaluator.merge(0, recipe).counters["num_reused_sums"])
        expected = written(recipe, tmp_path / f"out{number}")
        for name, tensor in evaluator.tensors(0).items():
            assert torch.equal(tensor, expected[name]), name
    assert reused == [0, len(grams), len(grams), 0, 0], "of other weights they are other sums"


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "tied llama"])
def test_tied_and_transposed_weights_score_as_on_disk(
    architecture: str, tiny_checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    tied, _, name = architecture.rpartition(" ")
    family = tiny_checkpoints(name, dtype="bfloat16", tied=bool(tied))
    rows = tmp_path / "texts.jsonl"
    rows.write_text(
        "".join(json.dumps({"text": f"word{i} word{i + 1} word{i + 2}"}) + "\n" for i in range(6))
    )
    evaluation = parse_evaluation(
        {
            "dtype": "float32",
            "batch_tokens": 16,
            "tasks": [{"name": "lm", "kind": "loss", "validation": str(rows)}],
        }
    )
    evaluator = make_evaluator(evaluation)
    for number, scale in enumerate((0.5, 3.0)):
        recipe = task_vectors(family, "dare_ties", density=0.5, **{"lambda": scale})
        evaluator.merge(0, recipe)
        found = evaluator.score(0, "validation").metrics
        out = tmp_path / f"out{number}"
        written(recipe, out)
        expected, _ = evaluate_checkpoint(open_checkpoint(out), evaluation)
        for metric, estimate in expected.items():
            assert found[metric] == pytest.approx(tuple(estimate), rel=1e-6), metric
    evaluator.close()


def test_a_point_with_another_vocabulary_has_a_structure_of_its_own(
    tiny_checkpoints: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    family = tiny_checkpoints("llama")
    larger = tmp_path / "larger"
    shutil.copytree(family.models[0], larger)
    tokenizer = AutoTokenizer.from_pretrained(larger)
    tokenizer.add_tokens(["extra1", "extra2", "extra3"])
    tokenizer.save_pretrained(larger)
    state = load_file(larger / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name] = torch.cat([state[name], state[name][:3] * 2])
    save_file(state, larger / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((larger / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps({**config, "vocab_size": len(tokenizer)}))

    rows = tmp_path / "texts.jsonl"
    rows.write_text(json.dumps({"text": "word1 word2 extra1 word3 extra2"}) + "\n")
    evaluation = parse_evaluation({"tasks": [{"name": "lm", "kind": "loss", "validation": str(rows)}]})
    evaluator = make_evaluator(evaluation)
    recipes = [
        {
            "name": "point",
            "merge_method": "linear",
            "models": [
                {"model": str(each), "parameters": {"weight": 1}} for each in (first, family.models[1])
            ],
            "tokenizer": {"source": "union"},
        }
        for first in (larger, family.models[0])
    ]
    sizes = []
    for number, recipe in enumerate([*recipes, recipes[0]]):
        evaluator.merge(0, recipe)
        found = evaluator.score(0, "validation").metrics
        written(recipe, tmp_path / f"out{number}")
        expected, _ = evaluate_checkpoint(open_checkpoint(tmp_path / f"out{number}"), evaluation)
        for metric, estimate in expected.items():
            assert found[metric] == pytest.approx(tuple(estimate), rel=1e-6, nan_ok=True), metric
        sizes.append(len(evaluator.tensors(0)["model.embed_tokens.weight"]))
    assert sizes[0] == sizes[2] == sizes[1] + 3
    evaluator.close()
