"""What a submitted command takes with it."""

from __future__ import annotations

import os
import site
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from raymerge.cluster.job_bundle import (
    JobBundle,
    absolute_document,
    absolute_model,
    bundle_words,
    copy_package,
)
from raymerge.merge_actors.errors import RecipeError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("base", "math", "linear", "adapter"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_paths_that_exist_become_absolute_and_others_stay(here):
    assert absolute_model("math") == str(here / "math")
    assert absolute_model("math@main+adapter") == f"{here}/math@main+{here}/adapter"
    assert absolute_model("org/model@v1") == "org/model@v1"
    assert absolute_model("s3://bucket/math") == "s3://bucket/math"


def test_a_home_folder_is_the_submitters(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    assert absolute_model("~/math+~/adapter") == f"{here}/math+{here}/adapter"
    assert bundle_words([("~/out", True), ("~/math", False)], files={}) == [f"{here}/out", f"{here}/math"]


def test_a_recipe_named_like_an_option_stays_a_file(here):
    (here / "-x.yaml").write_text("merge_method: linear\n")
    files = {}
    assert bundle_words([("./-x.yaml", False)], files=files) == ["./-x.yaml"]
    assert set(files) == {"-x.yaml"}


def test_a_folder_called_like_a_method_changes_no_method(here):
    document = {
        "name": "first",
        "merge_method": "linear",
        "models": [{"model": "math", "parameters": {"weight": 1}}, {"model": "./base"}],
    }
    made = absolute_document(document)
    assert made["merge_method"] == "linear"
    assert [each["model"] for each in made["models"]] == [str(here / "math"), str(here / "base")]


def test_the_name_of_an_earlier_recipe_is_no_path(here):
    text = "name: math\nmerge_method: linear\nmodels: [{model: base}]\n---\nmodels: [{model: math}]\n"
    (here / "two.yaml").write_text(text)
    files = {}
    assert bundle_words([("two.yaml", False)], files=files) == ["two.yaml"]
    first, second = yaml.safe_load_all(files["two.yaml"])
    assert first["models"][0]["model"] == str(here / "base")
    assert second["models"][0]["model"] == "math"


def test_recipes_travel_and_outputs_do_not(here):
    (here / "recipes").mkdir()
    for folder in (here, here / "recipes"):
        (folder / "a.yaml").write_text(
            f"merge_method: linear\nmodels: [{{model: math}}]\nseed: {len(str(folder))}\n"
        )
    files = {}
    words = bundle_words(
        [("a.yaml", False), ("recipes", False), ("out", True), ("s3://b/o", True)], files=files
    )
    assert words == ["a.yaml", "a-2.yaml", str(here / "out"), "s3://b/o"]
    assert set(files) == {"a.yaml", "a-2.yaml"}


def test_a_file_that_is_no_yaml_is_refused(here):
    for text, said in (
        ("a: [1,", r"bad\.yaml:1: not valid YAML"),
        ("seed: 1\nseed: 2\n", r"bad\.yaml:2: .*seed"),  # the job would see one of them and say nothing
    ):
        (here / "bad.yaml").write_text(text)
        with pytest.raises(RecipeError, match=said):
            bundle_words([("bad.yaml", False)], files={})


def test_the_same_command_has_the_same_name():
    def identity(command, files, name=None):
        return JobBundle(command=command, files=files).submission_id(name)

    first = identity(["merge", "ties.yaml", "/out"], {"ties.yaml": "a: 1"})
    assert first.startswith("raymerge-merge-ties-")
    assert first == identity(["merge", "ties.yaml", "/out"], {"ties.yaml": "a: 1"})
    assert first != identity(["merge", "ties.yaml", "/out"], {"ties.yaml": "a: 2"})
    assert first != identity(["merge", "ties.yaml", "/other"], {"ties.yaml": "a: 1"})
    assert first != JobBundle(
        command=["merge", "ties.yaml", "/out"], files={"ties.yaml": "a: 1"}, num_gpus=2
    ).submission_id(None)
    plain = JobBundle(command=["verify", "/out"]).submission_id(None)
    for other in ({"environment": {"AWS_ENDPOINT_URL": "http://store"}}, {"way": "installed"}):
        assert plain != JobBundle(command=["verify", "/out"], **other).submission_id(None)
    assert identity(["merge"], {}, "my job/1").startswith("my-job-1-")


def test_the_package_travels_whole(tmp_path):
    copy_package(str(tmp_path))
    code = "import raymerge, raymerge.cli.merge, raymerge.merge_actors.methods; print(raymerge.__file__)"
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str(tmp_path / "raymerge" / "__init__.py")


def test_the_package_merges_where_raymerge_is_not_installed(tmp_path, tiny_checkpoints):
    """A node may have Ray, torch and the rest, but no raymerge and no metadata of it."""
    there = tmp_path / "site"
    there.mkdir()
    for entry in map(Path, site.getsitepackages()):
        for each in entry.iterdir():
            if not each.name.startswith(("raymerge", "__editable__")) and each.suffix != ".pth":
                (there / each.name).symlink_to(each)
    job = tmp_path / "job"
    job.mkdir()
    copy_package(str(job))
    models = [{"model": str(model)} for model in tiny_checkpoints("llama").models]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    (job / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    # -S: what the interpreter has installed is not seen.
    command = [sys.executable, "-S", "-m", "raymerge", "merge", "recipe.yaml", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(there)}
    done = subprocess.run(
        [*command, "--in-process", "--workers", "1"],
        cwd=job,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()
