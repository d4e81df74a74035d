"""Faults: bad input, full disks, kills and lost workers. Each ends in one sentence or in the same bytes."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from raymerge.cli.main import main
from raymerge.cluster import merge as merge_module
from raymerge.cluster.journal import Journal, read_journal
from raymerge.cluster.merge import merge
from raymerge.cluster.merge_result import MergeResult
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.run_folder import RunFolder
from raymerge.cluster.session import Session
from raymerge.cluster.worker_group import InProcessGroup
from raymerge.merge_actors.errors import CheckpointError, ClusterError, NotFiniteError, OutputError
from raymerge.merge_actors.task import PieceReport, TaskReport


def write_model(folder: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> str:
    folder.mkdir(exist_ok=True)
    save_file(dict(tensors), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def make_models(
    folder: Path, shapes: Mapping[str, Sequence[int]], names: Sequence[str] = ("base", "one", "two")
) -> list[str]:
    generator = torch.Generator().manual_seed(1)
    base = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    folders = []
    for i, name in enumerate(names):
        noise = {k: torch.randn(v.shape, generator=generator) * 0.05 * min(i, 1) for k, v in base.items()}
        folders.append(write_model(folder / name, {k: base[k] + noise[k] for k in base}))
    return folders


@pytest.fixture
def models(tmp_path: Path) -> list[str]:
    """Write a base and two models of one small matrix and a bias."""
    (tmp_path / "in").mkdir()
    return make_models(tmp_path / "in", {"w": (16, 8), "b": (8,)})


def recipe_of(models: Sequence[str], method: str = "ties", **more: Any) -> dict[str, Any]:
    entries = [{"model": model, "parameters": {"weight": 0.5}} for model in models[1:]]
    recipe = {"merge_method": method, "models": entries, **more}
    return recipe if method == "linear" else {"base_model": models[0], **recipe}


def run(recipe: Any, out: Path, **options: Any) -> MergeResult:
    return merge(
        [recipe], out, MergeOptions(**{"in_process": True, "workers": 1, "device": "cpu", **options})
    )


def refusal(tmp_path: Path, recipe: Any, *flags: str, code: int = 1) -> str:
    """Run the command on a bad recipe and return its one sentence; nothing may be left behind."""
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe))
    before = sorted(os.listdir(tmp_path))
    found = CliRunner().invoke(main, ["merge", str(path), str(tmp_path / "out"), "--in-process", *flags])
    assert found.exit_code == code, found.output
    assert found.stdout == ""
    lines = [line for line in found.stderr.splitlines() if not line.startswith(("warning:", "note:"))]
    assert len(lines) == 1 and lines[0].startswith("Error: "), found.stderr
    assert "Traceback" not in found.stderr
    assert sorted(os.listdir(tmp_path)) == before, "something was left behind"
    return lines[0].removeprefix("Error: ").replace(str(tmp_path), "TMP")


def weights_digest(folder: str | Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(Path(folder).rglob("*.safetensors")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


# Bad input


def test_absent_model_and_absent_recipe(tmp_path: Path, models: list[str]) -> None:
    said = refusal(tmp_path, recipe_of([models[0], models[1], str(tmp_path / "nowhere")]))
    assert "TMP/nowhere" in said
    found = CliRunner().invoke(main, ["merge", str(tmp_path / "none.yaml"), str(tmp_path / "out")])
    assert found.exit_code == 1 and "none.yaml" in found.stderr and "Traceback" not in found.stderr


def _replace_header(folder: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a model's file, its data as they are."""
    path = Path(folder) / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def test_corrupt_files(tmp_path: Path, models: list[str]) -> None:
    """Truncated, header too long, offsets that overlap or leave the file: the file is named."""
    path = Path(models[2]) / "model.safetensors"
    whole = path.read_bytes()
    file = "TMP/in/two/model.safetensors"
    path.write_bytes(whole[:-4])
    assert refusal(tmp_path, recipe_of(models)).startswith(f"{file} is truncated: 'w' ends at byte ")
    path.write_bytes((10**12).to_bytes(8, "little") + whole[8:])
    assert refusal(tmp_path, recipe_of(models)).startswith(
        f"{file} claims a header of 1,000,000,000,000 bytes"
    )
    path.write_bytes(whole[:20])
    assert refusal(tmp_path, recipe_of(models)).startswith(f"{file} is truncated: its header needs")
    path.write_bytes(whole)
    _replace_header(models[2], lambda header: header["w"].update(data_offsets=[16, 528]))
    assert "overlaps 'b'" in refusal(tmp_path, recipe_of(models))
    path.write_bytes(whole)
    _replace_header(models[2], lambda header: header["w"].update(data_offsets=[32, 10**6]))
    assert f"tensor 'w' in {file} has 999,968 bytes" in refusal(tmp_path, recipe_of(models))


def test_index_that_lies(tmp_path: Path, models: list[str]) -> None:
    """An index that points outside the folder, or at a shard that is not there."""
    folder = Path(models[2])
    os.rename(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "../one/model.safetensors", "b": "x.safetensors"}}))
    assert "../one/model.safetensors" in refusal(tmp_path, recipe_of(models))
    index.write_text(json.dumps({"weight_map": {"w": "model-00002-of-00002.safetensors"}}))
    assert "model-00002-of-00002.safetensors" in refusal(tmp_path, recipe_of(models))


def test_shapes_and_vocabularies_that_differ(tmp_path: Path, models: list[str]) -> None:
    write_model(Path(models[2]), {"w": torch.zeros(16, 9), "b": torch.zeros(8)})
    assert refusal(tmp_path, recipe_of(models)) == (
        "tensor w has shape [16, 8] in model TMP/in/base but [16, 9] in TMP/in/two; models of different shape "
        "cannot be merged: check the base and sizes"
    )
    for i, rows in enumerate((32000, 32001)):
        tensors = {"embed_tokens.weight": torch.zeros(rows, 4)}
        write_model(Path(models[i + 1]), tensors, vocab_size=rows)
    recipe = recipe_of([models[0], *models[1:]], "linear")
    assert refusal(tmp_path, recipe) == (
        "tensor embed_tokens.weight has shape [32000, 4] in model TMP/in/one but [32001, 4] in TMP/in/two: the "
        "vocabularies differ (32,000 and 32,001 tokens); choose a policy in the recipe: vocabulary: union, base "
        "(the base's rows only), pad (fill with the mean) or truncate"
    )


def test_integers_where_floats_are_expected(tmp_path: Path, models: list[str]) -> None:
    write_model(Path(models[2]), {"w": torch.zeros(16, 8, dtype=torch.int64), "b": torch.zeros(8)})
    assert refusal(tmp_path, recipe_of(models)) == (
        "tensor w is F32 in model TMP/in/base but I64 in TMP/in/two; only float tensors can be merged"
    )


@pytest.mark.parametrize(
    ("method", "parameters", "said"),
    [
        ("ties", {"density": 1.5}, "density is 1.5; it must be"),
        ("ties", {"density": -0.1}, "density is -0.1; it must be"),
        ("ties", {"weight": "heavy"}, "weight is 'heavy'"),
        ("della", {"weight": 1.0, "density": 0.5, "epsilon": 0.7}, "epsilon"),
        ("slerp", {"t": 1.5}, "t is 1.5; it must be"),
        ("linear", {"weight": 0.0}, "sum to 0, which normalize cannot divide by"),
        ("tie", {}, "unknown merge_method 'tie'"),
    ],
)
def test_parameters_out_of_range(
    tmp_path: Path, models: list[str], method: str, parameters: dict[str, Any], said: str
) -> None:
    entries = [{"model": model} for model in models[1 : 2 if method == "slerp" else 3]]
    recipe = {"merge_method": method, "base_model": models[0], "models": entries, "parameters": parameters}
    found = refusal(tmp_path, recipe)
    assert said in found and "TMP/recipe.yaml" in found


def test_unknown_parameter_is_a_warning_and_with_strict_an_error(tmp_path: Path, models: list[str]) -> None:
    recipe = recipe_of(models, parameters={"lamda": 0.85})
    assert "did you mean 'lambda'?" in refusal(tmp_path, recipe, "--strict")
    path = tmp_path / "recipe.yaml"
    found = CliRunner().invoke(main, ["merge", str(path), str(tmp_path / "out"), "--in-process", "--quiet"])
    assert found.exit_code == 0
    assert re.search(
        r"^warning: .*recipe\.yaml:\d+: key parameters\.lamda .*did you mean", found.stderr, re.M
    )


@pytest.mark.parametrize(
    "method", ["linear", "ties", "dare_ties", "task_arithmetic", "nuslerp", "model_stock"]
)
@pytest.mark.parametrize("where", ["base", "one", "two"])
def test_nan_in_an_input_is_named(tmp_path: Path, models: list[str], method: str, where: str) -> None:
    """Reported by tensor and model by methods that would show it and by those that would hide it."""
    if method == "linear" and where == "base":
        pytest.skip("linear does not read the base")
    folder = tmp_path / "in" / where
    tensors = load_file(folder / "model.safetensors")
    tensors["w"][3, 5] = float("nan")
    tensors["w"][3, 6] = -float("inf")
    write_model(folder, tensors)
    recipe = recipe_of(models, method)
    assert refusal(tmp_path, recipe) == (
        f"tensor w of model TMP/in/{where} holds 2 NaN or infinite values in elements [0, 128); mend the model, or "
        "merge it as it is with --allow-nan"
    )
    result = run(recipe, tmp_path / "out", allow_nan=True)
    assert any(f"tensor w of model {folder} holds 2 NaN" in line for line in result.remarks)
    assert not any("though no input is" in line for line in result.remarks)


def test_nan_in_a_cut_tensor_is_named(tmp_path: Path) -> None:
    """The tensor is measured in slices by the driver before it is merged; the NaN must not get lost there."""
    (tmp_path / "in").mkdir()
    models = make_models(tmp_path / "in", {"w": (1400, 1024)})
    tensors = load_file(Path(models[2]) / "model.safetensors")
    tensors["w"][1300, 7] = float("nan")
    write_model(Path(models[2]), tensors)
    with pytest.raises(NotFiniteError, match=r"tensor w of model \S+two holds 1 NaN or infinite values in"):
        run(recipe_of(models, parameters={"density": 0.3}), tmp_path / "out", slice_mib=1)
    assert os.listdir(tmp_path) == ["in"]
    assert run(recipe_of(models), tmp_path / "out", slice_mib=1, allow_nan=True).outputs


def test_what_becomes_infinite_by_large_weights_is_told(tmp_path: Path, models: list[str]) -> None:
    for folder in models:
        write_model(Path(folder), {"w": torch.full((16, 8), 3e30)})
    entries = [{"model": model, "parameters": {"weight": 1e18}} for model in models]
    recipe = {"merge_method": "linear", "models": entries, "parameters": {"normalize": False}}
    told = "128 values of tensor w became NaN or infinite, though no input is"
    assert any(told in line for line in run(recipe, tmp_path / "out").remarks)


def test_overflow_of_a_sum_is_not_taken_for_nan(tmp_path: Path, models: list[str]) -> None:
    """Squares of large finite values overflow float32: no NaN is reported."""
    for folder in models:
        write_model(Path(folder), {"w": torch.full((16, 8), 3e30)})
    result = run(recipe_of(models, "linear"), tmp_path / "out")
    assert not [line for line in result.remarks if "NaN" in line]
    manifest = json.loads((tmp_path / "out" / "raymerge_manifest.json").read_text())
    assert manifest["tensors"]["w"]["num_nonfinite"] == 0
    assert manifest["tensors"]["w"]["norm"] == pytest.approx(3e30 * 128**0.5, rel=1e-5)


@pytest.mark.parametrize(
    ("dtype", "largest", "num_infinite"),
    [("float16", 65504.0, 3), ("float8_e5m2", 57344.0, 3), ("float8_e4m3fn", 448.0, 0)],
)
def test_values_beyond_the_range_of_the_output_are_told(
    tmp_path: Path, models: list[str], dtype: str, largest: float, num_infinite: int
) -> None:
    """Three values that a narrow type cannot hold: said aloud, and counted where they become infinite."""
    tensors = {"w": torch.full((16, 8), largest), "b": torch.ones(8)}
    tensors["w"][0, :3] = 3 * largest
    for folder in models:
        write_model(Path(folder), tensors)
    result = run(recipe_of(models, "linear"), tmp_path / "out", dtype=dtype)
    (line,) = [line for line in result.remarks if "beyond the range" in line]
    assert line.startswith("3 values of tensor w are beyond the range of F")
    manifest = json.loads((tmp_path / "out" / "raymerge_manifest.json").read_text())
    assert manifest["tensors"]["w"]["num_nonfinite"] == num_infinite
    assert manifest["tensors"]["b"]["num_nonfinite"] == 0


def test_every_nan_of_an_output_has_one_bit_pattern(tmp_path: Path, models: list[str]) -> None:
    """Else a NaN's bits would tell where in a vector it stood, and so how the tensor was cut."""
    values = torch.ones(16, 9)
    values.view(torch.int32)[:, 3] = torch.arange(16, dtype=torch.int32) * 4099 + 0x7F900000
    values.view(torch.int32)[:, 7] = -1
    for folder in models:
        write_model(Path(folder), {"w": values})
    run(recipe_of(models, "linear"), tmp_path / "out", dtype="bfloat16", allow_nan=True)
    merged = load_file(tmp_path / "out" / "model.safetensors")["w"]
    assert set(merged.view(torch.int16)[:, [3, 7]].flatten().tolist()) == {0x7FC0}


def test_file_truncated_between_planning_and_reading(
    tmp_path: Path, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = InProcessGroup.start

    def truncate_and_start(group: InProcessGroup, context: Any) -> None:
        with open(Path(models[2]) / "model.safetensors", "r+b") as file:
            file.truncate(200)
        start(group, context)

    monkeypatch.setattr(InProcessGroup, "start", truncate_and_start)
    with pytest.raises(
        CheckpointError, match=r"two/model.safetensors ends at byte 200, .* it was truncated or"
    ):
        run(recipe_of(models), tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


# OUT and the disk


def test_existing_out_is_refused_and_untouched(tmp_path: Path, models: list[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    for flags in ((), ("--overwrite",)):
        assert refusal(tmp_path, recipe_of(models), *flags) == (
            "TMP/out holds precious.txt and no manifest of raymerge: what raymerge did not write it does not replace; "
            "choose another folder, or delete it yourself"
        )
    assert (out / "precious.txt").read_text() == "mine"
    (out / "precious.txt").rename(tmp_path / "in" / "file")
    run(recipe_of(models), out)  # empty
    (out / "more.txt").write_text("beside")
    assert refusal(tmp_path, recipe_of(models)) == (
        "TMP/out exists; choose another folder or replace it with --overwrite"
    )
    run(recipe_of(models), out, overwrite=True)
    assert not (out / "more.txt").exists() and (out / "model.safetensors").exists()
    with pytest.raises(OutputError, match="in/file is a file; choose another folder, or delete it yourself"):
        run(recipe_of(models), tmp_path / "in" / "file", overwrite=True)


def test_campaign_replaces_only_its_own_folders_in_out(tmp_path: Path, models: list[str]) -> None:
    recipes = [{**recipe_of(models, "linear"), "name": name} for name in ("a", "b")]
    options = MergeOptions(in_process=True, workers=1, overwrite=True)
    out = tmp_path / "out"
    (out / "notes").mkdir(parents=True)
    (out / "b").mkdir()
    (out / "b" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"out/b holds thesis\.tex and no manifest of raymerge"):
        merge(recipes, out, options)
    assert sorted(os.listdir(out)) == ["b", "notes"] and os.listdir(tmp_path / "out" / "b") == ["thesis.tex"]
    (out / "b" / "thesis.tex").unlink()
    for _ in range(2):
        merge(recipes, out, options)
    assert sorted(os.listdir(out)) == ["a", "b", "notes"]
    with pytest.raises(OutputError, match=r"out holds a, b, notes and no manifest of raymerge"):
        merge(recipes[:1], out, options)  # one merge is OUT itself, and would replace all of it
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match=r"file is a file; choose another folder"):
        merge(recipes, tmp_path / "file", options)


def test_what_took_the_place_of_out_during_a_run_stays(
    tmp_path: Path, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def occupy(*args: Any) -> None:
        out.mkdir(exist_ok=True)
        (out / "precious.txt").write_text("mine")

    monkeypatch.setattr(merge_module, "write_index", occupy)
    with pytest.raises(OutputError, match=r"out holds precious\.txt and no manifest of raymerge"):
        run(recipe_of(models), out)
    assert (out / "precious.txt").read_text() == "mine"
    monkeypatch.undo()
    shutil.rmtree(out)
    assert run(recipe_of(models), out, resume=True).num_resumed > 0


def test_previous_output_survives_a_failed_overwrite(tmp_path: Path, models: list[str]) -> None:
    run(recipe_of(models), tmp_path / "out")
    before = weights_digest(tmp_path / "out")
    tensors = load_file(Path(models[1]) / "model.safetensors")
    tensors["w"][0, 0] = float("nan")
    write_model(Path(models[1]), tensors)
    with pytest.raises(NotFiniteError):
        run(recipe_of(models), tmp_path / "out", overwrite=True)
    assert weights_digest(tmp_path / "out") == before
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]


def test_out_that_cannot_be_written(tmp_path: Path, models: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write next to \S+file/sub/out: Not a directory"):
        run(recipe_of(models), tmp_path / "file" / "sub" / "out")
    with pytest.raises(OutputError, match=r"cannot write next to /proc/out: "):
        run(recipe_of(models), Path("/proc/out"))


def test_an_output_does_not_take_the_place_of_its_inputs(tmp_path: Path, models: list[str]) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "in")
    for folder in (tmp_path / "in", Path(models[1])):
        (folder / "raymerge_manifest.json").write_text("{}")  # else refused for being no output of ours
    for out in (Path(models[1]), tmp_path / "in", link):
        with pytest.raises(OutputError, match="which is read, lies there"):
            run(recipe_of(models), out, overwrite=True)
        several = [{**recipe_of(models), "name": "a"}, {**recipe_of(models, "linear"), "name": "b"}]
        with pytest.raises(OutputError, match="which is read, lies there"):
            merge(several, out, MergeOptions(in_process=True, workers=1, overwrite=True))
    assert all((Path(model) / "model.safetensors").exists() for model in models)
    assert sorted(os.listdir(tmp_path)) == ["in", "link"]
    assert run(recipe_of(models), tmp_path / "in" / "out", overwrite=True).outputs  # beside them


def test_two_runs_on_one_out_exclude_each_other(tmp_path: Path, models: list[str]) -> None:
    with RunFolder(str(tmp_path / "out")).locked():
        with pytest.raises(OutputError, match=rf"another run is writing \S+out \(process {os.getpid()} on"):
            run(recipe_of(models), tmp_path / "out")
        with pytest.raises(OutputError, match="another run is writing"):
            run(recipe_of(models), tmp_path / "out", overwrite=True)
        run(recipe_of(models), tmp_path / "other")
    run(recipe_of(models), tmp_path / "out")


def test_lock_that_its_owner_removes_meanwhile_is_no_lock(
    tmp_path: Path, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the lock and taking it the other run ends and removes it: nobody else would see it."""
    real_flock = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        shutil.rmtree(tmp_path / ".out.raymerge")
        real_flock(descriptor, operation)

    with monkeypatch.context() as patch, pytest.raises(OutputError, match="another run is writing"):
        patch.setattr(fcntl, "flock", flock)
        run(recipe_of(models), tmp_path / "out")
    run(recipe_of(models), tmp_path / "out")


def test_lock_of_a_dead_process_does_not_count(tmp_path: Path, models: list[str]) -> None:
    folder = tmp_path / ".out.raymerge"
    folder.mkdir()
    (folder / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere", "since": "yesterday"}))
    run(recipe_of(models), tmp_path / "out")
    assert not folder.exists()


def test_too_little_space_is_said_before_anything_is_written(
    tmp_path: Path, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr("raymerge.cluster.run_folder.shutil.disk_usage", lambda path: usage)
    said = refusal(tmp_path, recipe_of(models))
    assert re.fullmatch(
        r"the output needs \S+ (B|KiB) but only 100\S* B are free on the file system of TMP/out", said
    )


class _FullDisk:
    """Let `os.pwrite` fail like a full disk from a chosen call on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, first_failure: int) -> None:
        self.calls = 0
        write = os.pwrite

        def pwrite(descriptor: int, data: Any, offset: int) -> int:
            self.calls += 1
            if self.calls > first_failure:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(descriptor, data, offset)

        monkeypatch.setattr("raymerge.merge_actors.files.os.pwrite", pwrite)


def test_full_disk_can_be_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up in the middle: one sentence, no OUT, and --resume does only the rest."""
    (tmp_path / "in").mkdir()
    models = make_models(tmp_path / "in", {f"t{i}": (512, 512) for i in range(8)})  # a task of 1 MiB each
    recipe = recipe_of(models, "linear")
    run(recipe, tmp_path / "reference", slice_mib=1)
    with monkeypatch.context() as patch:
        _FullDisk(patch, 3 + 2)  # the lock and the header are written with pwrite as well
        with pytest.raises(
            OutputError, match=r"the disk is full while writing \S+; free some space .* --resume"
        ):
            run(recipe, tmp_path / "out", slice_mib=1)
    assert sorted(os.listdir(tmp_path)) == [".out.raymerge", "in", "reference"]
    with pytest.raises(
        OutputError, match=r"an unfinished run for .* go on with --resume, or start anew with"
    ):
        run(recipe, tmp_path / "out", slice_mib=1)
    result = run(recipe, tmp_path / "out", slice_mib=1, resume=True)
    assert 0 < result.num_resumed < result.num_tasks
    assert result.totals.num_tasks == result.num_tasks - result.num_resumed
    assert weights_digest(tmp_path / "out") == weights_digest(tmp_path / "reference")
    assert sorted(os.listdir(tmp_path)) == ["in", "out", "reference"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 4 MiB; skip where that is not allowed."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a file system is not allowed here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_output_larger_than_the_disk(tmp_path: Path, small_disk: Path) -> None:
    (tmp_path / "in").mkdir()
    models = make_models(tmp_path / "in", {"w": (1500, 1024)})
    with pytest.raises(OutputError, match=r"the output needs .* free on the file system of"):
        run(recipe_of(models), small_disk / "out")
    assert os.listdir(small_disk) == []


@pytest.mark.parametrize("spare_pages", range(6))
def test_disk_that_is_full_to_the_brim(tmp_path: Path, small_disk: Path, spare_pages: int) -> None:
    """The weights fit to the page and not all else: whatever does not fit is told in one sentence."""
    (tmp_path / "in").mkdir()
    models = make_models(tmp_path / "in", {"w": (512, 1024)})
    spare = 512 * 4096 + 4096 * spare_pages
    (small_disk / "filler").write_bytes(b"x" * (shutil.disk_usage(small_disk).free - spare))
    with pytest.raises(OutputError, match=r"the disk is full while writing|the output needs"):
        run(recipe_of(models), small_disk / "out")
    os.remove(small_disk / "filler")
    is_resumable = os.path.exists(small_disk / ".out.raymerge")  # the one task was done
    assert is_resumable == (spare_pages == 5)
    assert run(recipe_of(models), small_disk / "out", resume=is_resumable).num_resumed == is_resumable
    assert os.listdir(small_disk) == ["out"]


# Kills and signals

#: Runs the command with a pause after every task, a long one after the fifth, so that a signal comes in the middle
#: however slow the machine is.
_SLOW_DRIVER = """
import sys, time
from raymerge.cluster.journal import Journal
add = Journal.add
def add_slowly(self, report):
    add(self, report)
    time.sleep(0.02 if len(self.done) < 5 else 1.0)
Journal.add = add_slowly
from raymerge.cli.main import main
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def many_tasks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Write a recipe of sixty tasks and merge it undisturbed: the recipe's file and the reference."""
    root = tmp_path_factory.mktemp("many")
    models = make_models(root, {f"t{i}": (512, 512) for i in range(60)})
    recipe = root / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of(models, "dare_ties", parameters={"density": 0.5})))
    run(str(recipe), root / "reference", slice_mib=1)
    return recipe, root / "reference"


def start_driver(recipe: Path, out: Path, *flags: str) -> subprocess.Popen[str]:
    arguments = ["merge", str(recipe), str(out), "--workers", "1", "--slice-mib", "1", *flags]
    return subprocess.Popen(
        [sys.executable, "-c", _SLOW_DRIVER, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for_tasks(out: Path, count: int) -> None:
    """Wait until the journal of a run holds some finished tasks."""
    journal = RunFolder(str(out)).journal_path
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if len(read_journal(journal)[1]) >= count:
                return
        time.sleep(0.02)
    raise AssertionError("the run did not come so far")


_SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        *((kind, ("--in-process",)) for kind in _SIGNALS),
        *(pytest.param(kind, (), marks=[pytest.mark.slow, pytest.mark.ray]) for kind in _SIGNALS),
    ],
)
def test_killed_driver_is_resumed(
    tmp_path: Path, many_tasks: tuple[Path, Path], kind: signal.Signals, flags: tuple[str, ...]
) -> None:
    """Finished tasks are in the journal and are not repeated; the bytes are those of an undisturbed run."""
    recipe, reference = many_tasks
    driver = start_driver(recipe, tmp_path / "out", *flags)
    wait_for_tasks(tmp_path / "out", 5)
    started = time.monotonic()
    driver.send_signal(kind)
    _, stderr = driver.communicate(timeout=120)
    if kind is not signal.SIGKILL:
        assert time.monotonic() - started < 25  # to the end of its tasks it would take twice as long
        assert driver.returncode == 128 + kind
        assert "interrupted; finished tasks are kept" in stderr and "--resume" in stderr
        assert "Traceback" not in stderr
    else:
        assert driver.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    finished = {report.number for report in read_journal(RunFolder(str(tmp_path / "out")).journal_path)[1]}
    assert 5 <= len(finished) < 60
    done: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        add = Journal.add
        patch.setattr(Journal, "add", lambda self, report: (done.append(report.number), add(self, report)))
        result = run(str(recipe), tmp_path / "out", slice_mib=1, resume=True)
    assert result.num_resumed == len(finished)
    assert set(done) == set(range(result.num_tasks)) - finished
    assert weights_digest(tmp_path / "out") == weights_digest(reference)
    manifests = [
        json.loads((folder / "raymerge_manifest.json").read_text())
        for folder in (tmp_path / "out", reference)
    ]
    assert manifests[0]["tensors"] == manifests[1]["tensors"]
    assert os.listdir(tmp_path) == ["out"]


_HANGING_DRIVER = """
import os, sys, time
import raymerge.cli.main
from raymerge.merge_actors.worker import MergeWorker
def hang(self, task, states):
    os.write(1, b"HANGS\\n")  # at once: several threads come here
    time.sleep(1000)
MergeWorker.merge = hang
raymerge.cli.main.SECONDS_TO_END = 0.5
raymerge.cli.main.main(sys.argv[1:])
"""


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_driver_ends_whatever_hangs(
    tmp_path: Path, many_tasks: tuple[Path, Path], kind: signal.Signals
) -> None:
    """A thread waits for a store or a disk that does not answer; the driver waits for its threads, but not for ever."""
    arguments = ["merge", str(many_tasks[0]), str(tmp_path / "out"), "--in-process", "--workers", "1"]
    with subprocess.Popen(
        [sys.executable, "-c", _HANGING_DRIVER, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as driver:
        try:
            assert driver.stdout is not None and driver.stdout.readline() == "HANGS\n"
            driver.send_signal(kind)
            _, stderr = driver.communicate(timeout=200)
        finally:
            driver.kill()
    assert driver.returncode == 128 + kind
    assert "ended in the middle: something did not stop in 0.5 s" in stderr
    assert not (tmp_path / "out").exists()
    run(str(many_tasks[0]), tmp_path / "out", resume=True)
    assert weights_digest(tmp_path / "out") == weights_digest(many_tasks[1])


def interrupt_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let the driver be interrupted once so many tasks are in the journal."""
    add = Journal.add

    def add_and_stop(journal: Journal, report: TaskReport) -> None:
        add(journal, report)
        if len(journal.done) >= count:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", add_and_stop)


def test_resume_refuses_another_plan(
    tmp_path: Path, many_tasks: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, reference = many_tasks
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 4)
        run(str(recipe), tmp_path / "out", slice_mib=1)
    for changed in ({"seed": 7}, {"dtype": "bfloat16"}, {"slice_mib": 2}):
        with pytest.raises(OutputError, match="was planned from other inputs or options"):
            run(str(recipe), tmp_path / "out", **{"slice_mib": 1, **changed}, resume=True)
    result = run(str(recipe), tmp_path / "out", slice_mib=1, resume=True)
    assert result.num_resumed == 4
    assert weights_digest(tmp_path / "out") == weights_digest(reference)


def test_overwriting_run_can_be_resumed(
    tmp_path: Path, many_tasks: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The previous output stands until the new one is whole, also over a kill and a resumption."""
    recipe, reference = many_tasks
    (tmp_path / "out").mkdir()
    for name in ("old.txt", "raymerge_manifest.json"):
        (tmp_path / "out" / name).write_text("old")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 4)
        run(str(recipe), tmp_path / "out", slice_mib=1, overwrite=True)
    assert sorted(os.listdir(tmp_path / "out")) == ["old.txt", "raymerge_manifest.json"]
    result = run(str(recipe), tmp_path / "out", slice_mib=1, resume=True)
    assert result.num_resumed == 4
    assert weights_digest(tmp_path / "out") == weights_digest(reference)
    assert not (tmp_path / "out" / "old.txt").exists()


def test_resuming_never_replaces_an_out_that_came_up_meanwhile(
    tmp_path: Path, many_tasks: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 4)
        run(str(many_tasks[0]), tmp_path / "out", slice_mib=1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds mine\.txt and no manifest of raymerge"):
        run(str(many_tasks[0]), tmp_path / "out", slice_mib=1, resume=True)


def test_resume_without_an_unfinished_run_starts_one(tmp_path: Path, models: list[str]) -> None:
    assert run(recipe_of(models), tmp_path / "out", resume=True).num_resumed == 0


def test_campaign_of_two_waves_is_resumed_in_the_second(
    tmp_path: Path, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {**recipe_of(models), "name": "step1"}
    second = {**recipe_of([models[0], "step1", models[2]], "task_arithmetic"), "name": "step2"}
    path = tmp_path / "chain.yaml"
    path.write_text(yaml.safe_dump_all([first, second]))
    run(str(path), tmp_path / "reference")
    finish = merge_module._Run._finish_outputs

    def stop_in_the_second(self: Any, wave: Any, journal: Any, figures: Any) -> None:
        if wave.plan.recipes[0].recipe.name == "step2":
            raise KeyboardInterrupt
        finish(self, wave, journal, figures)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(merge_module._Run, "_finish_outputs", stop_in_the_second)
        run(str(path), tmp_path / "out")
    result = run(str(path), tmp_path / "out", resume=True)
    assert result.num_resumed == result.num_tasks == 2
    assert weights_digest(tmp_path / "out") == weights_digest(tmp_path / "reference")


def test_recipe_named_like_a_model_is_resumed_with_the_model(
    tmp_path: Path, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The half-written output of recipe "one" is not taken for the model in folder "one"."""
    monkeypatch.chdir(tmp_path / "in")
    recipe = {**recipe_of(["base", "one", "two"]), "name": "one"}
    run(recipe, tmp_path / "reference")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt_after(patch, 1)
        run(recipe, tmp_path / "out")
    run(recipe, tmp_path / "out", resume=True)
    assert weights_digest(tmp_path / "out") == weights_digest(tmp_path / "reference")


# The journal


def _report(number: int) -> TaskReport:
    piece = PieceReport(recipe=0, tensor="w", checksum=2**64 - 1, sum_squares=0.1, num_nonfinite=3)
    return TaskReport(
        number=number,
        pieces=(piece,),
        read_bytes=10,
        write_bytes=5,
        read_seconds=0.25,
        merge_seconds=0.5,
        write_seconds=0.125,
        warnings=("a warning",),
    )


def test_a_journal_of_another_device_or_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal.create(str(path), "plan", {"made_by": {"device": "cuda", "torch": "2.1"}}).close()
    with pytest.raises(OutputError, match="was made with device cuda, this one has cpu, which may round"):
        Journal.resume(str(path), "plan", {"device": "cpu", "torch": "2.1"})
    with pytest.raises(OutputError, match=r"torch 2\.1, this one has 2\.2"):
        Journal.resume(str(path), "plan", {"device": "cuda", "torch": "2.2"})
    resumed = Journal.resume(str(path), "plan", {"device": "cuda", "torch": "2.1"})
    resumed.close()
    assert not resumed.done


@pytest.mark.parametrize("cut", [2, 5, 40, 100])
def test_journal_cut_short_keeps_its_whole_lines(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal.create(str(path), "plan", {"num_tasks": 3})
    for number in range(3):
        journal.add(_report(number))
    journal.close()
    path.write_bytes(path.read_bytes()[:-cut])
    resumed = Journal.resume(str(path), "plan")
    assert resumed.done == {0: _report(0), 1: _report(1)}
    resumed.add(_report(2))
    resumed.close()
    header, reports = read_journal(str(path))
    assert (header["num_tasks"], reports) == (3, [_report(0), _report(1), _report(2)])


def test_journal_of_another_boot_starts_over(tmp_path: Path) -> None:
    """After a loss of power the pages of finished tasks may not be on the disk."""
    path = tmp_path / "journal.jsonl"
    journal = Journal.create(str(path), "plan", {})
    journal.add(_report(0))
    journal.close()
    lines = path.read_text().splitlines()
    lines[0] = json.dumps({**json.loads(lines[0]), "boot": "another"})
    path.write_text("\n".join(lines) + "\n")
    resumed = Journal.resume(str(path), "plan")
    assert resumed.done == {}
    resumed.close()


# Ray


def _spy_on_workers(monkeypatch: pytest.MonkeyPatch, on_event: Callable[[Any, int], None]) -> None:
    """Call `on_event(group, number of events so far)` after each wait that brought something."""
    from raymerge.cluster.ray_group import RayGroup

    wait = RayGroup.wait
    count = 0

    def wait_and_tell(group: RayGroup, timeout_seconds: float) -> list[Any]:
        nonlocal count
        events = wait(group, timeout_seconds)
        count += len(events)
        if events:
            on_event(group, count)
        return events

    monkeypatch.setattr(RayGroup, "wait", wait_and_tell)


def _pid_of(actor: Any) -> int:
    import ray

    pid = ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=60)
    assert isinstance(pid, int)
    return pid


@pytest.mark.ray
def test_killed_actor_changes_no_byte(
    ray_session: None, tmp_path: Path, many_tasks: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor's process dies with instructions in flight: a new one does them again."""
    killed: list[int] = []

    def kill_one(group: Any, count: int) -> None:
        if count >= 5 and not killed:
            actor = next(iter(group._actors.values()))
            killed.append(_pid_of(actor))
            os.kill(killed[0], signal.SIGKILL)

    _spy_on_workers(monkeypatch, kill_one)
    result = run(str(many_tasks[0]), tmp_path / "out", in_process=False, workers=2, slice_mib=1)
    assert killed and result.totals.num_retries > 0
    assert result.totals.num_tasks == result.num_tasks
    assert weights_digest(tmp_path / "out") == weights_digest(many_tasks[1])


@pytest.mark.ray
def test_actor_without_memory_is_replaced_by_a_thrifty_one(
    ray_session: None, tmp_path: Path, many_tasks: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An allocation fails in an actor: its successor holds less of the inputs, and the bytes are the same."""
    import ray

    limited: list[int] = []
    thrift: list[int] = []

    def limit_once(group: Any, count: int) -> None:
        number, actor = next(iter(group._actors.items()), (-1, None))
        if actor is None:
            return
        if count >= 3 and not limited:
            limited.append(number)
            ray.get(actor.__ray_call__.remote(_leave_no_memory), timeout=60)
        elif limited and number not in limited and not thrift:
            thrift.append(
                ray.get(actor.__ray_call__.remote(lambda self: self._worker.context.thrift), timeout=60)
            )

    _spy_on_workers(monkeypatch, limit_once)
    result = run(str(many_tasks[0]), tmp_path / "out", in_process=False, workers=1, slice_mib=1)
    assert result.totals.num_retries > 0
    assert thrift == [1]
    assert any("ran out of memory" in line for line in result.remarks)
    assert weights_digest(tmp_path / "out") == weights_digest(many_tasks[1])


def _leave_no_memory(actor: Any) -> None:
    """Let the actor's next larger allocation fail, as on a machine whose memory is used up."""
    lane = actor._worker._lanes.get()
    actor._worker._lanes.put(_NoMemoryLane(lane))


class _NoMemoryLane:
    """A lane whose buffers cannot be allocated."""

    def __init__(self, lane: Any) -> None:
        self._lane = lane

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lane, name)

    def host_arena(self, num_bytes: int) -> Any:
        raise MemoryError(f"Unable to allocate {num_bytes} bytes")


@pytest.mark.parametrize("thrift", [0, 1, 9])
def test_thrift_changes_no_byte(tmp_path: Path, many_tasks: tuple[Path, Path], thrift: int) -> None:
    start = InProcessGroup.start
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            InProcessGroup,
            "start",
            lambda self, context: start(self, dataclasses.replace(context, thrift=thrift)),
        )
        run(str(many_tasks[0]), tmp_path / "out", slice_mib=1)
    assert weights_digest(tmp_path / "out") == weights_digest(many_tasks[1])


@pytest.mark.ray
def test_error_of_an_actor_is_the_users_sentence(
    ray_session: None, tmp_path: Path, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user error crosses Ray as itself and is not retried."""
    tensors = load_file(Path(models[1]) / "model.safetensors")
    tensors["w"][0, 0] = float("nan")
    write_model(Path(models[1]), tensors)
    with pytest.raises(NotFiniteError, match=r"^tensor w of model \S+one holds 1 NaN .* --allow-nan$"):
        run(recipe_of(models), tmp_path / "out", in_process=False, workers=1)
    assert os.listdir(tmp_path) == ["in"]


def test_path_that_a_node_does_not_see(
    tmp_path: Path, models: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = InProcessGroup.start

    def start_elsewhere(group: InProcessGroup, context: Any) -> None:
        os.rename(models[2], tmp_path / "in" / "away")
        start(group, context)

    monkeypatch.setattr(InProcessGroup, "start", start_elsewhere)
    with pytest.raises(ClusterError, match=r"node \S+ does not see \S+two; inputs and output must lie on"):
        run(recipe_of(models), tmp_path / "out")
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.ray
def test_session_replaces_an_actor_that_froze_between_merges(
    ray_session: None, tmp_path: Path, many_tasks: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only actor is frozen while it has nothing to do: the next merge would wait for it without end."""
    monkeypatch.setattr("raymerge.cluster.signs_of_life.QUIET_SECONDS", 0.5)
    monkeypatch.setattr("raymerge.cluster.signs_of_life.SILENT_SECONDS", 2.0)
    with Session(workers=1, device="cpu") as session:
        session.merge(many_tasks[0], tmp_path / "first", slice_mib=1)
        assert session._workers is not None
        group: Any = session._workers[0]
        pid = _pid_of(group._actors[0])
        os.kill(pid, signal.SIGSTOP)
        session.merge(many_tasks[0], tmp_path / "second", slice_mib=1)
    assert weights_digest(tmp_path / "second") == weights_digest(many_tasks[1])
    deadline = time.monotonic() + 60
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not os.path.exists(f"/proc/{pid}")


_NODE_LOSS_SCRIPT = """
import os, signal, sys, time
import ray
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
node = cluster.add_node(num_cpus=2)
ray.init(address=cluster.address, logging_level="ERROR")
from raymerge.cluster.merge import merge
from raymerge.cluster.options import MergeOptions
from raymerge.cluster.ray_group import RayGroup
start, wait, seen, removed, found, lost = RayGroup.start, RayGroup.wait, 0, 0.0, 0.0, []
def start_all(group, context):
    start(group, context)
    while len(group._actors) < 3:
        wait(group, 1.0)
    where = lambda worker: (ray.get_runtime_context().get_node_id(), os.getpid())
    places = ray.get([actor.__ray_call__.remote(where) for actor in group._actors.values()])
    lost.extend(pid for at, pid in places if at == node.node_id)
def wait_and_remove(group, timeout_seconds):
    global seen, removed, found
    events = wait(group, timeout_seconds)
    seen += len(events)
    if seen >= 5 and not removed:
        removed = time.monotonic()
        for pid in lost:  # else they live on for two seconds and answer
            os.kill(pid, signal.SIGKILL)
        cluster.remove_node(node, allow_graceful=False)
    if removed and not found and sum(each["Alive"] for each in ray.nodes()) == 1:
        found = time.monotonic()
    return events
RayGroup.start, RayGroup.wait = start_all, wait_and_remove
result = merge([sys.argv[1]], sys.argv[2], MergeOptions(workers=3, slice_mib=1, device="cpu"))
while not found and time.monotonic() - removed < 60:
    time.sleep(0.1)
    found = time.monotonic() if sum(each["Alive"] for each in ray.nodes()) == 1 else 0.0
print("REMOVED", found - removed, result.totals.num_retries + result.totals.num_speculated)
ray.shutdown()
cluster.shutdown()
"""


_NODE_JOINS_SCRIPT = """
import os, sys, time
import ray
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
ray.init(address=cluster.address, logging_level="ERROR")
from raymerge.cluster import ray_group
from raymerge.cluster.merge import merge
from raymerge.cluster.options import MergeOptions
ray_group._GROW_SECONDS = 0.5
wait, begun, nodes = ray_group.RayGroup.wait, time.monotonic(), set()
def wait_and_add(group, timeout_seconds):
    events = wait(group, timeout_seconds)
    for event in events:
        if len(cluster.list_all_nodes()) == 1:
            cluster.add_node(num_cpus=1)
        nodes.add(event.worker)
        if len(nodes) < 2 and time.monotonic() - begun < 120:
            time.sleep(0.3)  # there is work left when the new node's worker is ready
    return events
ray_group.RayGroup.wait = wait_and_add
result = merge([sys.argv[1]], sys.argv[2], MergeOptions(slice_mib=1, device="cpu"))
print("WORKERS", len(nodes))
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.ray
def test_a_node_that_joins_takes_work(tmp_path: Path, many_tasks: tuple[Path, Path]) -> None:
    command = [sys.executable, "-c", _NODE_JOINS_SCRIPT, str(many_tasks[0]), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "WORKERS 2" in done.stdout
    assert weights_digest(tmp_path / "out") == weights_digest(many_tasks[1])


@pytest.mark.ray
def test_tasks_of_a_stopped_actor_are_done_by_another(
    ray_session: None, tmp_path: Path, many_tasks: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An actor's process is frozen with tasks in flight, so that nothing says that it is gone."""
    from raymerge.cluster import in_flight

    monkeypatch.setattr(in_flight, "LEAST_SECONDS", 0.5)
    frozen: list[int] = []

    def freeze_one(group: Any, count: int) -> None:
        if count >= 5 and len(group._actors) == 2 and not frozen:
            frozen.append(_pid_of(next(iter(group._actors.values()))))
            os.kill(frozen[0], signal.SIGSTOP)

    from raymerge.cluster.ray_group import RayGroup

    start = RayGroup.start

    def start_both(group: Any, context: Any) -> None:
        start(group, context)
        group.hosts()  # waits until all are ready

    monkeypatch.setattr(RayGroup, "start", start_both)
    _spy_on_workers(monkeypatch, freeze_one)
    try:
        result = run(str(many_tasks[0]), tmp_path / "out", in_process=False, workers=2, slice_mib=1)
    finally:
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert frozen and result.totals.num_speculated > 0
    assert result.totals.num_retries == 0
    assert weights_digest(tmp_path / "out") == weights_digest(many_tasks[1])


@pytest.mark.slow
@pytest.mark.ray
def test_lost_node_changes_no_byte_and_is_found_in_seconds(
    tmp_path: Path, many_tasks: tuple[Path, Path]
) -> None:
    head = (Path(__file__).parents[2] / "ray_cluster.yaml").read_text()
    shipped = dict(re.findall(r"(RAY_health_check_\w+)=(\d+)", head))
    command = [sys.executable, "-c", _NODE_LOSS_SCRIPT, str(many_tasks[0]), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env={**os.environ, **shipped})
    assert done.returncode == 0, done.stderr
    found = re.search(r"^REMOVED (\S+) (\d+)$", done.stdout, re.MULTILINE)
    assert found and 0 < float(found[1]) < 12 and int(found[2]) > 0, done.stdout  # Ray's own settings: 15 s
    assert weights_digest(tmp_path / "out") == weights_digest(many_tasks[1])
