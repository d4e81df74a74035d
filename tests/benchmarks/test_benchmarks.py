"""The benchmarks run: every script to its end on tiny models, and their parts compute what they say."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

REPOSITORY = Path(__file__).resolve().parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
NAMES = ["base", "fine_tune_1", "fine_tune_2", "fine_tune_3"]
TUNED = NAMES[1:]
TINY_PARAMETERS = 151_872
Part = Callable[[str], ModuleType]


def run(script: str, *arguments: str | os.PathLike[str]) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, BENCHMARKS / script, *arguments]
    return subprocess.run(words, capture_output=True, text=True, cwd=REPOSITORY)


def kept(folder: Path, what: str) -> tuple[str, dict]:
    (page,) = folder.glob(f"{what}_*.md")
    return page.read_text(), json.loads(page.with_suffix(".json").read_text())["results"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    done = run("make_models.py", folder, "--shape", "tiny", "--shard-size", "100KB")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / name) for name in NAMES]
    return folder


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Iterator[Part]:
    """Import modules of benchmarks/ as its scripts do."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield importlib.import_module
    for file in BENCHMARKS.glob("*.py"):
        sys.modules.pop(file.stem, None)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_models_are_sharded_bf16_with_small_coarse_deltas(models: Path) -> None:
    base, tuned = tensors(models / "base"), tensors(models / "fine_tune_1")
    assert len(list((models / "base").glob("*.safetensors"))) == 4
    assert base.keys() == tuned.keys()
    assert sum(value.numel() for value in base.values()) == TINY_PARAMETERS
    assert {value.dtype for value in base.values()} == {torch.bfloat16}
    name = "model.layers.0.mlp.up_proj.weight"
    delta = tuned[name].float() - base[name].float()
    # 10,240 samples of a normal: the estimate of the deviation is within 5 % by 7 sigma.
    assert delta.std().item() == pytest.approx(1e-3, rel=0.05)
    assert base[name].float().std().item() == pytest.approx(0.02, rel=0.05)
    assert 0 < (delta == 0).float().mean() < 0.2  # rounded away by bf16


def test_models_are_the_same_bytes_again_and_differ_by_seed(models: Path, tmp_path: Path) -> None:
    options = ("--shape", "tiny", "--shard-size", "100KB", "--seed")
    for seed in ("0", "1"):
        assert run("make_models.py", tmp_path / seed, *options, seed).returncode == 0
    name = "fine_tune_2/model-00001-of-00004.safetensors"
    original = (models / name).read_bytes()
    assert (tmp_path / "0" / name).read_bytes() == original
    assert (tmp_path / "1" / name).read_bytes() != original


def test_an_unfinished_model_is_made_again(models: Path, tmp_path: Path) -> None:
    run("make_models.py", tmp_path, "--shape", "tiny", "--fine-tunes", "1")
    weights = tmp_path / "fine_tune_1" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:1000])
    (tmp_path / "fine_tune_1" / "made_by_benchmark.json").unlink()
    assert run("make_models.py", tmp_path, "--shape", "tiny", "--fine-tunes", "1").returncode == 0
    assert weights.read_bytes() == whole


@pytest.mark.slow
def test_model_and_tokenizer_load_in_transformers(models: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(models / "fine_tune_1")
    tokenizer = AutoTokenizer.from_pretrained(models / "fine_tune_1")
    text = "def f(x): return 'gr\u00fc\u00df dich'"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert model(**tokenizer(text, return_tensors="pt")).logits.isfinite().all()


@pytest.mark.parametrize("cache", [[], ["--cold"]])
def test_floor_counts_every_byte(models: Path, cache: list[str]) -> None:
    done = run("floor.py", *(models / name for name in NAMES), "--workers", "2", "--runs", "2", *cache)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    sizes = [sum(f.stat().st_size for f in (models / name).glob("*.safetensors")) for name in NAMES]
    assert (result["bytes_read"], result["bytes_written"]) == (sum(sizes), sizes[0])
    assert 0 < result["min_seconds"] <= result["median_seconds"] <= result["max_seconds"]


def test_comparison_counts_differences_and_knows_formulas(part: Part, models: Path, tmp_path: Path) -> None:
    base, *tuned = (tensors(models / name) for name in NAMES)
    weights = part("recipes").WEIGHTS
    exact = {
        name: (
            base[name].double()
            + sum(w * (t[name].double() - base[name].double()) for w, t in zip(weights, tuned, strict=True))
        ).bfloat16()
        for name in base
    }
    changed = {name: value.clone() for name, value in exact.items()}
    changed["model.norm.weight"].view(torch.int16)[:3] += 1
    changed["lm_head.weight"].view(torch.int16)[5, :2] += 2
    for name, content in (("ours", exact), ("theirs", changed | {"extra": torch.zeros(1)})):
        (tmp_path / name).mkdir()
        save_file(content, tmp_path / name / "model.safetensors")
    folders = (tmp_path / "ours", tmp_path / "theirs")
    found = part("comparison").compare(
        *folders, "task_arithmetic", models / "base", [models / name for name in TUNED]
    )
    assert found.only_in_one == ["extra"]
    assert found.num_elements == TINY_PARAMETERS
    assert found.num_elements - found.num_equal == 5
    assert found.num_elements - found.num_within_one_ulp == 2
    assert (found.num_ours_exact, found.num_theirs_exact) == (TINY_PARAMETERS, TINY_PARAMETERS - 5)


@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_dare_statistics_find_rate_and_scale(part: Part, models: Path, tmp_path: Path, keep: float) -> None:
    base, *tuned = (tensors(models / name) for name in NAMES)
    generator = torch.Generator().manual_seed(0)
    merged = {}
    for name, origin in base.items():
        total = origin.double()
        for weight, model in zip(part("recipes").WEIGHTS, tuned, strict=True):
            kept_mask = torch.rand(origin.shape, generator=generator, dtype=torch.float64) < keep
            total = total + weight * (model[name].double() - origin.double()) * kept_mask / keep
        merged[name] = total.bfloat16()
    save_file(merged, tmp_path / "model.safetensors")
    folders = [models / name for name in TUNED]
    found = part("comparison").dare_statistics(tmp_path, models / "base", folders, keep)
    assert found["expected_dropped_by_all"] == pytest.approx((1 - keep) ** 3)
    # 150,000 elements: a binomial deviation below 0.3 %; the scale of the model with the smallest weight
    # deviates by 2.4 % at a keep rate of 0.1.
    assert found["dropped_by_all"] == pytest.approx(found["expected_dropped_by_all"], abs=0.015)
    assert found["scale"] == pytest.approx([1, 1, 1], abs=0.1)


def test_ulps_count_across_zero(part: Part) -> None:
    a = torch.tensor([1.0, 0.0, -0.0, 2**-133, 1.0, -1.0]).bfloat16()
    b = torch.tensor([1.0078125, -0.0, 0.0, -(2**-133), -1.0, -1.0078125]).bfloat16()
    assert part("comparison").ulps(a, b).tolist() == [1, 0, 0, 2, 2 * 0x3F80, 1]


def test_peak_memory_is_seen_of_a_command_and_its_child(part: Part) -> None:
    child = "import time; block = b'x' * (64 << 20); time.sleep(1.6)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    done = part("processes").run([sys.executable, "-c", parent])
    peaks = {peak.role == "driver": peak.peak_bytes for peak in done.peaks}
    assert peaks[True] < 64 << 20 < peaks[False] < 128 << 20
    assert 1.6 <= done.seconds < 120


def test_a_failing_command_is_an_error_with_its_output(part: Part) -> None:
    processes = part("processes")
    with pytest.raises(processes.CommandError, match=r"exited with 3:\nno luck"):
        processes.run([sys.executable, "-c", "import sys; print('no luck'); sys.exit(3)"])


def test_sparse_model_has_true_headers_and_no_data(part: Part, tmp_path: Path) -> None:
    shapes, plan_scale = part("model_shapes"), part("plan_scale")
    whole = shapes.MoeShape().tensors()
    assert len(whole) == 45_395
    assert sum(tensor.num_elements for tensor in whole) == 671_026_419_200
    small = shapes.MoeShape(num_layers=4, num_experts=2)
    assert plan_scale.make_sparse_model(tmp_path / "m", small, 4_000_000_000) > 1
    from raymerge.merge_actors.checkpoint.header import read_header

    files = sorted((tmp_path / "m").glob("*.safetensors"))
    names = [name for file in files for name in read_header(file)[0]]
    assert names == [tensor.name for tensor in small.tensors()]
    assert sum(file.stat().st_size for file in files) > 2e9
    assert sum(file.stat().st_blocks * 512 for file in files) < 1e6


def test_gpu_refuses_a_machine_without_cuda() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    done = run("gpu.py")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gpu.py needs a CUDA device, and torch sees none.\n"


@pytest.mark.slow
def test_methods_are_all_timed(tmp_path: Path) -> None:
    from raymerge.merge_actors.methods import METHODS

    done = run("methods.py", "--rows", "64", "--runs", "2", "--results", tmp_path)
    assert done.returncode == 0, done.stderr
    page, results = kept(tmp_path, "methods")
    assert results.keys() == {"copy", *METHODS}
    assert all(result["min"] > 0 for result in results.values())
    assert all(f"| {name} |" in page for name in METHODS)


@pytest.mark.slow
@pytest.mark.ray
def test_versus_peer_measures_all_ways_to_run(tmp_path: Path) -> None:
    options = ("--shape", "tiny", "--runs", "1", "--no-peer", "--methods", "ties", "slerp")
    done = run("versus_peer.py", *options, "--results", tmp_path, "--work", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    page, results = kept(tmp_path, "versus_peer")
    assert list(results) == ["ties", "slerp"]
    for result in results.values():
        assert result["peer"] is None
        for way in ("whole_process", "on_cluster", "in_session"):
            (measured,) = result[way]
            roles = [peak["role"] for peak in measured["peaks"]]
            assert measured["seconds"] > 0
            assert roles.count("driver") == 1
            assert "actor" in roles
    assert str(tmp_path) not in page
    assert not (tmp_path / "work" / "out").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_memory_is_kept_per_shape_and_method(tmp_path: Path) -> None:
    options = ("--shapes", "tiny", "small", "--methods", "linear", "--workers", "1")
    done = run("memory.py", *options, "--results", tmp_path, "--work", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    _, results = kept(tmp_path, "memory")
    assert list(results) == ["tiny linear", "small linear"]
    for result in results.values():
        (actor,) = result["actor_bytes"]
        assert 100 << 20 < actor < 1.5 * 2**30


@pytest.mark.slow
@pytest.mark.ray
def test_a_grid_is_kept_with_what_it_read_and_reused(tmp_path: Path) -> None:
    options = ("--shape", "tiny", "--no-peer", "--texts", "2")
    done = run("grid_versus_peer.py", *options, "--results", tmp_path, "--work", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    page, results = kept(tmp_path, "grid_versus_peer")
    assert results["ours"]["bytes_read"] == results["source_bytes"]
    assert results["ours"]["reused_directions"] + results["ours"]["reused_states"] > 0
    assert str(tmp_path) not in page
    assert not (tmp_path / "work" / "grid_versus_peer").exists()


@pytest.mark.slow
@pytest.mark.ray
def test_a_campaign_reads_its_inputs_once(tmp_path: Path) -> None:
    options = ("--shape", "tiny", "--recipes", "3", "--runs", "1", "--workers", "1")
    done = run("campaign_floor.py", *options, "--results", tmp_path, "--work", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    _, results = kept(tmp_path, "campaign_floor")
    ((seconds, read_bytes, write_bytes),) = results["runs"]
    assert seconds > 0
    assert read_bytes == 4 * 2 * TINY_PARAMETERS and write_bytes == 3 * 2 * TINY_PARAMETERS
    assert results["floor"]["bytes_written"] > write_bytes


@pytest.mark.slow
@pytest.mark.ray
def test_overhead_of_points(tmp_path: Path) -> None:
    done = run("grid_overhead.py", "--points", "100", "--results", tmp_path, "--work", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    _, results = kept(tmp_path, "grid_overhead")
    assert 0 < results["ms_a_point"] < 1_000


@pytest.mark.slow
def test_planning_is_kept_with_peak_and_without_torch(tmp_path: Path) -> None:
    options = ("--experts", "2", "--runs", "1", "--results", tmp_path, "--work", tmp_path / "work")
    done = run("plan_scale.py", *options)
    assert done.returncode == 0, done.stderr
    _, results = kept(tmp_path, "plan_scale")
    assert list(results) == ["task_arithmetic", "ties"]
    for result in results.values():
        (plan,) = result["runs"]
        assert 0 < plan["seconds"] < result["process"]["max"]
        assert not plan["imports_torch"]
        assert not plan["imports_ray"]


def test_bytes_of_statistics_on_paper_add_up(part: Part, tmp_path: Path) -> None:
    done = run("statistics_passes.py", "--only", "paper", "--results", tmp_path, "--work", tmp_path / "work")
    assert done.returncode == 0, done.stderr
    page, results = kept(tmp_path, "statistics")
    assert "| Llama-3.1-70B, 64 GPUs | " in page
    found = results["Llama-3.1-8B on 64"]
    # The published size of Llama-3.1-8B's Grams, 15.3 GiB: float32 triangles of distinct inputs.
    assert 64 * found["written_bytes"] / 2**30 == pytest.approx(15.3, abs=0.6)
    assert found["weight_bytes"] == pytest.approx(16.06e9, rel=0.01)
    paper = part("statistics_passes").paper_plan
    whole = paper((4096, 14336, 32, 32, 8, 128256), num_workers=1, budget_bytes=1 << 40)
    assert (whole["num_groups"], whole["hidden_bytes"], whole["sent_bytes"]) == (1, 0, 0)
