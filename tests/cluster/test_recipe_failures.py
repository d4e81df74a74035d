"""A recipe of a campaign that fails is left out; the others come out as if it had never been there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

import raymerge
from raymerge.cli.main import main
from raymerge.cluster import merge as merging
from raymerge.cluster.recipe_failures import recipes_of, recipes_to_blame, without
from raymerge.merge_actors.errors import CheckpointError, NotFiniteError, OutputError
from raymerge.merge_actors.task import Job, MergeTask, Piece, Read

SHAPES = {"a": (300, 200), "b": (64, 32), "c": (500,)}


@pytest.fixture
def models(tmp_path: Path) -> dict[str, str]:
    """Write a base, three good models and one with NaN."""
    rng = np.random.default_rng(0)
    folders = {}
    for name in ("base", "one", "two", "three", "nan"):
        folder = tmp_path / name
        folder.mkdir()
        tensors = {key: rng.standard_normal(shape).astype(np.float32) for key, shape in SHAPES.items()}
        if name == "nan":
            tensors["b"][3, 4] = np.nan
        save_file(tensors, folder / "model.safetensors")
        folders[name] = str(folder)
    return folders


def recipe(models: dict[str, str], name: str, used: Sequence[str], method: str = "ties") -> dict[str, Any]:
    return {
        "name": name,
        "merge_method": method,
        "base_model": models["base"],
        "models": [
            {"model": models.get(each, each), "parameters": {"weight": 0.5, "density": 0.4}} for each in used
        ],
    }


def expect_as_alone(recipes: Sequence[dict[str, Any]], out: Path, tmp_path: Path) -> None:
    for each in recipes:
        alone = tmp_path / f"alone-{each['name']}"
        raymerge.merge(each, alone, in_process=True)
        expected, found = (load_file(folder / "model.safetensors") for folder in (alone, out / each["name"]))
        for name in expected:
            assert np.array_equal(found[name], expected[name]), name
        raymerge.verify(out / each["name"])


@pytest.mark.parametrize("slice_mib", [1, 32])
@pytest.mark.parametrize("in_process", [True, pytest.param(False, marks=pytest.mark.ray)])
def test_nan_in_one_recipe(
    in_process: bool, slice_mib: int, models: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if not in_process:
        request.getfixturevalue("ray_session")
    good = [recipe(models, "x", ["one", "two"]), recipe(models, "y", ["two", "three"], "dare_linear")]
    bad = recipe(models, "bad", ["one", "nan"])
    out = tmp_path / "out"
    result = raymerge.merge(
        [good[0], bad, good[1]], out, in_process=in_process, workers=2, slice_mib=slice_mib
    )
    assert result.outputs == (str(out / "x"), str(out / "y"))
    assert list(result.failed) == ["bad"]
    assert "tensor b of model" in result.failed["bad"] and "NaN" in result.failed["bad"]
    assert sorted(each.name for each in out.iterdir()) == ["x", "y"]
    assert not (tmp_path / ".out.raymerge").exists()
    expect_as_alone(good, out, tmp_path)


def test_a_model_that_is_not_there_and_what_depends_on_it(models: dict[str, str], tmp_path: Path) -> None:
    good = recipe(models, "good", ["one", "two"])
    bad = recipe(models, "bad", ["one", "/nowhere/at/all"])
    later = recipe(models, "later", ["one", "bad"])
    fine = recipe(models, "fine", ["one", "good"])
    text = "---\n".join(_yaml(each) for each in (good, bad, later, fine))
    out = tmp_path / "out"
    result = raymerge.merge(text, out, in_process=True)
    assert [Path(each).name for each in result.outputs] == ["good", "fine"]
    assert "/nowhere/at/all" in result.failed["bad"]
    assert result.failed["later"] == "it uses bad, which was not merged"


def test_the_command_says_which_and_exits_with_1(models: dict[str, str], tmp_path: Path) -> None:
    files = []
    for each in (recipe(models, "good", ["one"]), recipe(models, "bad", ["nan"])):
        files.append(tmp_path / f"{each['name']}.yaml")
        files[-1].write_text(_yaml(each))
    done = CliRunner().invoke(
        main, ["merge", *map(str, files), str(tmp_path / "out"), "--in-process"], catch_exceptions=False
    )
    assert done.exit_code == 1
    assert "recipe bad was not merged: tensor b of model" in done.output
    assert "merged into" in done.output
    assert (tmp_path / "out" / "good" / "model.safetensors").exists()


def test_all_fail(models: dict[str, str], tmp_path: Path) -> None:
    recipes = [recipe(models, "p", ["nan"]), recipe(models, "q", ["nan", "one"])]
    with pytest.raises(NotFiniteError, match="tensor b"):
        raymerge.merge(recipes, tmp_path / "out", in_process=True)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.raymerge").exists()


def test_a_resumed_run_leaves_it_out_too(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = [recipe(models, "x", ["one", "two"]), recipe(models, "bad", ["one", "nan"])]
    out = tmp_path / "out"

    def fail(*_: Any) -> None:
        raise OutputError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(merging, "write_manifest", fail)
        with pytest.raises(OutputError, match="disk is full"):
            raymerge.merge(recipes, out, in_process=True, workers=1)
    result = raymerge.merge(recipes, out, in_process=True, workers=1, resume=True)
    assert result.num_resumed == result.num_tasks
    assert list(result.failed) == ["bad"] and "resumes" in result.failed["bad"]
    expect_as_alone(recipes[:1], out, tmp_path)


def _yaml(mapping: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(mapping)


def read(name: str) -> Read:
    return Read(model=name, tensor="w", file=f"/{name}", offset=0, dtype="F32")


def job(number: int, models: tuple[int, ...], base: int | None = None, state: int | None = None) -> Job:
    return Job(
        recipe=number,
        tensor="w",
        settings=number,
        base=base,
        models=models,
        keys=(1,) * len(models),
        file=f"/out{number}",
        offset=0,
        dtype="F32",
        state=state,
    )


def task(*jobs: Job, reads: Sequence[str] = ("base", "a", "b", "c")) -> MergeTask:
    piece = Piece(shape=(4,), begin=0, end=4, reads=tuple(map(read, reads)), jobs=jobs)
    states = sorted({each.state for each in jobs if each.state is not None})
    return MergeTask(number=7, pieces=(piece,), states=tuple(states))


def test_a_task_without_a_recipe_reads_nothing_for_it() -> None:
    both = task(job(0, (1, 2), base=0, state=3), job(1, (3,), base=0, state=4))
    assert recipes_of(both) == {0, 1}
    assert without(both, {1}) == task(job(0, (1, 2), base=0, state=3), reads=("base", "a", "b"))
    assert without(both, {0}) == task(job(1, (1,), base=0, state=4), reads=("base", "c"))
    assert without(both, {0, 1}) is None
    assert without(both, {2}) is both


def test_who_is_to_blame() -> None:
    both = task(job(0, (1, 2), base=0), job(1, (3,), base=0))
    nobody = CheckpointError("something")
    assert recipes_to_blame(both, nobody) == frozenset()
    assert recipes_to_blame(without(both, {0}), nobody) == {1}  # type: ignore[arg-type]
    of_one, of_a_file, of_all = NotFiniteError("NaN"), CheckpointError("short"), CheckpointError("short")
    of_one.recipe, of_a_file.path, of_all.path = 1, "/b", "/base"
    assert recipes_to_blame(both, of_one) == {1}
    assert recipes_to_blame(both, of_a_file) == {0}
    assert recipes_to_blame(both, of_all) == {0, 1}
    assert recipes_to_blame(both, OutputError("the disk is full")) == frozenset()
