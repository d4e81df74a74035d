"""The worker on random checkpoints: whatever shapes, dtypes and slices, it writes what the formulas say."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from raymerge.cluster.campaign import plan_wave
from raymerge.cluster.controller import Controller
from raymerge.cluster.journal import Journal
from raymerge.cluster.merge import merge
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.plan import make_plan
from raymerge.cluster.recipe import load_recipes
from raymerge.cluster.run_folder import RunFolder
from raymerge.cluster.settings import resolve
from raymerge.cluster.worker_group import InProcessGroup
from raymerge.merge_actors.checksum import add_checksums, checksum_chunk_bytes, piece_checksum
from raymerge.merge_actors.dtypes import from_torch_name
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.block import UNIT
from raymerge.merge_actors.methods.slices import merge_tensors
from raymerge.merge_actors.task import RunContext

PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5},
    "ties": {"weight": 0.7, "density": 0.4},
    "dare_ties": {"weight": 0.7, "density": 0.4},
    "della": {"weight": 0.7, "density": 0.5, "epsilon": 0.2},
    "breadcrumbs": {"weight": 0.7, "density": 0.5, "gamma": 0.1},
    "nuslerp": {"weight": 0.5},
    "sce": {"select_topk": 0.3},
    "model_stock": {},
}
_FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float64]
_DTYPES = st.sampled_from([*_FLOATS, torch.int64, torch.uint8, torch.bool])
#: Lengths around the unit, where cuts go wrong, and small ones.
_SHAPES = st.one_of(
    st.lists(st.integers(0, 9), max_size=3),
    st.tuples(st.integers(1, 5), st.integers(UNIT // 2 - 2, UNIT // 2 + 2)).map(list),
    st.integers(UNIT - 1, UNIT + 1).map(lambda n: [n]),
    st.tuples(st.integers(UNIT // 700, UNIT // 300), st.integers(400, 800)).map(list),
)


def _random(shape: list[int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 2, shape, generator=generator).to(dtype)


def _run_cut(recipe: dict[str, Any], folder: Path, slice_bytes: int, workers: int) -> dict[str, Any]:
    """Merge with slices smaller than the command allows; returns tensors and the checksums reported."""
    (read,), _ = load_recipes(recipe)
    run = RunFolder(str(folder / "out"))
    wave = plan_wave([read], {read.name: run.output(read.name)}, MergeOptions(), {})
    plan = make_plan(wave.plan.recipes, slice_bytes=slice_bytes)
    run.preallocate(plan.recipes[0].folder, plan.recipes[0].layout)
    group = InProcessGroup(workers)
    context = RunContext(run_id="r", settings=plan.settings, device="cpu", num_threads=1)
    journal = Journal.create(str(folder / "journal.jsonl"), "plan", {})
    try:
        group.start(context)
        Controller(plan, group, journal).run()
    finally:
        group.close()
        journal.close()
    sums: dict[str, int] = {}
    for report in journal.done.values():
        for piece in report.pieces:
            sums[piece.tensor] = add_checksums(sums.get(piece.tensor, 0), piece.checksum)
    return {"tensors": load_file(f"{plan.recipes[0].folder}/model.safetensors"), "sums": sums}


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(
    tensors=st.lists(st.tuples(_DTYPES, _SHAPES), min_size=1, max_size=5),
    method=st.sampled_from(sorted(PARAMETERS)),
    slice_bytes=st.sampled_from([1, UNIT, 3 * UNIT, 1 << 30]),
    workers=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
@example(tensors=[(torch.float64, [0])], method="breadcrumbs", slice_bytes=1, workers=1, seed=0)  # no kernel
@example(tensors=[(torch.bfloat16, [3, 0])], method="model_stock", slice_bytes=1, workers=1, seed=0)
def test_any_checkpoint_is_merged_as_its_whole_tensors(
    tensors: list[tuple[torch.dtype, list[int]]], method: str, slice_bytes: int, workers: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        models = []
        for model in ("base", "model1", "model2", "model3"):
            (root / model).mkdir()
            held = {f"t{i}": _random(shape, dtype, generator) for i, (dtype, shape) in enumerate(tensors)}
            save_file(held, root / model / "model.safetensors")
            models.append((str(root / model), held))
        (base, base_held), *others = models
        others = others[: METHODS[method].num_models[1] or 3]
        recipe = {"name": "r", "merge_method": method, "models": [{"model": each} for each, _ in others]}
        recipe |= {"parameters": PARAMETERS[method]} if PARAMETERS[method] else {}
        if METHODS[method].base != "unused":
            recipe["base_model"] = base
        found = _run_cut(recipe, root, slice_bytes, workers)
        (read,), _ = load_recipes(recipe)
        module, layers = read.slices()[0]
        donor = base_held if layers.base else others[0][1]
        for tensor, held in donor.items():
            wanted = held
            if held.is_floating_point():
                wanted = merge_tensors(
                    METHODS[method],
                    [own[tensor] for _, own in others],
                    base_held[tensor] if layers.base else None,
                    resolve(read, module, layers, METHODS[method], tensor, 0.0),
                    sparsifiers=SPARSIFIERS,
                    tensor_name=tensor,
                    model_names=[each for each, _ in others],
                ).to(held.dtype)
            got = found["tensors"][tensor]
            assert got.dtype == held.dtype and got.shape == held.shape
            assert torch.equal(got.flatten().view(torch.uint8), wanted.flatten().view(torch.uint8)), tensor
            data = memoryview(got.flatten().view(torch.uint8).numpy())
            chunk = checksum_chunk_bytes(tuple(got.shape), from_torch_name(str(got.dtype)) or "")
            assert found["sums"][tensor] == piece_checksum(data, 0, chunk)


def test_model_listed_twice_counts_twice_and_is_read_once(tmp_path: Path) -> None:
    """The second use has a random stream of its own, so the two masks differ."""
    generator = torch.Generator().manual_seed(0)
    for name in ("base", "one"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.randn(64, 64, generator=generator)}, tmp_path / name / "model.safetensors")
    base, one = str(tmp_path / "base"), str(tmp_path / "one")
    options = MergeOptions(in_process=True, workers=1, device="cpu")
    twice = [{"model": one, "parameters": {"weight": 0.5}}] * 2
    for method in ("linear", "dare_linear"):
        recipe = {"merge_method": method, "base_model": base, "models": twice}
        if method == "dare_linear":
            recipe["parameters"] = {"density": 0.5}
        result = merge([recipe], tmp_path / method, options)
        assert result.totals.read_bytes == (64 * 64 * 4) * (1 if method == "linear" else 2)
    tensors = {
        name: load_file(tmp_path / name / "model.safetensors")["w"] for name in ("base", "one", "linear")
    }
    assert torch.equal(tensors["linear"], tensors["one"])
    delta = load_file(tmp_path / "dare_linear" / "model.safetensors")["w"] - tensors["base"]
    times_kept = (delta / (tensors["one"] - tensors["base"])).round().int()
    # Each use keeps half the elements, doubled and weighted by a half: 0, 1 or 2 deltas remain.
    counts = torch.bincount(times_kept.flatten(), minlength=3)
    assert counts.sum() == 64 * 64 and (counts > 0.2 * 64 * 64).all()


_FEW_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from raymerge.cluster.merge import merge
from raymerge.cluster.options import MergeOptions
models = [{"model": model, "parameters": {"weight": 1.0}} for model in sys.argv[2:]]
options = MergeOptions(in_process=True, workers=2, device="cpu")
merge([{"merge_method": "linear", "models": models}], sys.argv[1], options)
"""


def test_more_shards_than_a_process_may_open_by_default(tmp_path: Path) -> None:
    """Two workers over two models of sixty shards: the soft limit of open files is raised to the hard one."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for i in range(60):
            file = tmp_path / name / f"model-{i + 1:05d}-of-00060.safetensors"
            save_file({f"layers.{i}.w": torch.ones(4)}, file)
    command = [sys.executable, "-c", _FEW_FILES, *(str(tmp_path / name) for name in ("out", "one", "two"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == 60


@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 7), (UNIT + 3,), (3, UNIT // 2 + 1)])
def test_checksum_adds_up_over_any_cut(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    data = memoryview(tensor.flatten().view(torch.uint8).numpy())
    chunk = checksum_chunk_bytes(shape, "F32")
    whole = piece_checksum(data, 0, chunk)
    parts = [piece_checksum(data[at : at + chunk], at, chunk) for at in range(0, len(data), chunk)]
    assert add_checksums(*reversed(parts)) == whole
    if len(data):
        changed = bytearray(data)
        changed[-1] ^= 1
        assert piece_checksum(memoryview(changed), 0, chunk) != whole


def test_checksum_tells_swapped_chunks() -> None:
    chunk = 64
    data = bytes(range(128))
    swapped = data[64:] + data[:64]
    assert piece_checksum(memoryview(data), 0, chunk) != piece_checksum(memoryview(swapped), 0, chunk)
