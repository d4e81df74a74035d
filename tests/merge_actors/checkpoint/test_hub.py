"""A model's path becomes a local folder: as it stands, or out of the Hub's cache when offline."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from safetensors.torch import save_file

from raymerge.merge_actors.checkpoint.folder import open_checkpoint
from raymerge.merge_actors.checkpoint.hub import locate
from raymerge.merge_actors.errors import CheckpointError

COMMITS = {"main": "a" * 40, "v2": "b" * 40}


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Work in an empty folder, with an empty cache of ours."""
    folder = tmp_path / "place"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "ours"))
    yield folder


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Lay out org/name with two revisions as the Hub's cache does: refs, blobs, snapshots of links."""
    cache = tmp_path / "hub"
    repository = cache / "models--org--name"
    for name in ("refs", "blobs"):
        (repository / name).mkdir(parents=True)
    for number, (branch, commit) in enumerate(COMMITS.items()):
        (repository / "refs" / branch).write_text(commit)
        snapshot = repository / "snapshots" / commit
        snapshot.mkdir(parents=True)
        save_file({"a": torch.full((2,), float(number))}, repository / "blobs" / f"weights{number}")
        (repository / "blobs" / f"config{number}").write_text(f'{{"number": {number}}}')
        (snapshot / "model.safetensors").symlink_to(f"../../blobs/weights{number}")
        (snapshot / "config.json").symlink_to(f"../../blobs/config{number}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return cache


def refusal(path: str, revision: str | None = None, **options: Any) -> str:
    with pytest.raises(CheckpointError) as raised:
        locate(path, revision, **options)
    return str(raised.value)


def test_a_local_folder_wins_and_has_no_revisions(place: Path, hub_cache: Path) -> None:
    (place / "org" / "name").mkdir(parents=True)
    assert locate("org/name") == str(place / "org" / "name")
    assert locate("./org/name") == locate(str(place / "org" / "name")) == locate("org/name")
    assert refusal("org/name", "v2") == (
        f"model 'org/name' is the local path {place}/org/name, which has no revision 'v2'; "
        "remove the revision, or rename the local folder to mean the Hub's model."
    )


@pytest.mark.parametrize(
    ("revision", "number"), [(None, 0), ("main", 0), ("v2", 1), (COMMITS["main"], 0), (COMMITS["v2"], 1)]
)
def test_a_cached_model_is_found_offline_by_branch_tag_or_commit(
    hub_cache: Path, revision: str | None, number: int
) -> None:
    folder = locate("org/name", revision)
    commit = list(COMMITS.values())[number]
    assert folder == str(hub_cache / "models--org--name" / "snapshots" / commit)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.config == {"number": number} and list(checkpoint.tensors) == ["a"]
    assert locate("org/name", revision, weights=False) == folder


@pytest.mark.parametrize(("path", "revision"), [("org/other", None), ("org/name", "v3"), ("gpt2", None)])
def test_what_is_not_cached_is_refused_offline(hub_cache: Path, path: str, revision: str | None) -> None:
    named = path if revision is None else f"{path}@{revision}"
    place = Path.cwd()
    assert refusal(path, revision) == (
        f"model '{named}' is neither a local folder ({place} has no folders) nor in the Hub's cache "
        f"({hub_cache}), and HF_HUB_OFFLINE is set: download it on another machine or mend the path."
    )


def test_a_local_path_that_does_not_exist_names_its_neighbours(place: Path, hub_cache: Path) -> None:
    (place / "models" / "llama-base").mkdir(parents=True)
    assert refusal("./models/lama-base") == (
        f"model './models/lama-base' does not exist (did you mean {place}/models/llama-base?)."
    )
    for name in "uvwxyz":
        (place / "models" / name).mkdir()
    assert refusal(str(place / "models" / "other" / "deep")) == (
        f"model '{place}/models/other/deep' does not exist "
        f"({place}/models has the folders llama-base, u, v, w, x and 2 more)."
    )
    assert "(did you mean" in refusal("models/llama-bas")


def test_a_uri_stands_for_itself(hub_cache: Path) -> None:
    assert locate("s3://bucket/model/") == "s3://bucket/model"
    assert locate("hf://org/name", "v2") == "hf://org/name@v2"
    assert locate("hf://org/name/inner", "v2") == "hf://org/name@v2/inner"
    assert refusal("s3://bucket/model", "v2") == (
        "model 's3://bucket/model' has the revision 'v2', which only the Hub has; remove it, or name the folder of "
        "that revision"
    )


class FakeHub:
    """Stand for `snapshot_download`: note the patterns, give a folder or raise."""

    def __init__(self, folder: Path, files: list[str], error: Exception | None = None) -> None:
        self.folder, self.files, self.error = folder, files, error
        self.calls: list[dict[str, Any]] = []

    def __call__(self, repository: str, **options: Any) -> str:
        self.calls.append(options | {"repository": repository})
        if self.error is not None:
            raise self.error
        wanted = huggingface_hub.utils.filter_repo_objects(
            self.files, allow_patterns=options["allow_patterns"], ignore_patterns=options["ignore_patterns"]
        )
        self.folder.mkdir(exist_ok=True)
        for name in wanted:
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return str(self.folder)


FILES = [
    "config.json",
    "model.safetensors.index.json",
    "model-00001-of-00001.safetensors",
    "tokenizer.model",
    "tokenizer.json",
    "chat_template.jinja",
    "merges.txt",
    "consolidated.safetensors",
    "original/copy.safetensors",
    "pytorch_model.bin",
    "model.onnx",
    "training_args.bin",
]


def test_weights_and_tokenizer_are_downloaded_and_second_copies_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub(tmp_path / "got", FILES)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    assert locate("org/name", "v2", allow_pickle=True) == str(tmp_path / "got")
    assert sorted(path.name for path in (tmp_path / "got").iterdir()) == sorted(FILES[:7])
    assert [(call["repository"], call["revision"]) for call in hub.calls] == [("org/name", "v2")]


def test_without_weights_only_small_files_are_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", FakeHub(tmp_path / "got", FILES))
    locate("org/name", weights=False)
    got = {path.name for path in (tmp_path / "got").iterdir()}
    assert got == set(FILES[:7]) - {"model-00001-of-00001.safetensors"}


def test_pickles_are_downloaded_only_when_allowed_and_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = ["config.json", "pytorch_model.bin", "training_args.bin"]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", FakeHub(tmp_path / "got", files))
    assert refusal("org/name", "v2") == (
        "the Hub's model 'org/name@v2' has no safetensors files in its root folder; "
        "if its PyTorch pickles are to be trusted, pass --allow-pickle to convert them."
    )
    assert not (tmp_path / "got" / "pytorch_model.bin").exists()
    locate("org/name", "v2", allow_pickle=True)
    assert sorted(path.name for path in (tmp_path / "got").iterdir()) == ["config.json", "pytorch_model.bin"]


RESPONSE: Any = SimpleNamespace(headers={}, request=None)


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            errors.RepositoryNotFoundError("x", response=RESPONSE),
            "model 'org/name' is neither a local folder nor a model on the Hub that you may read "
            "({place} has no folders); if it is private, log in with `hf auth login`.",
        ),
        (
            errors.GatedRepoError("x", response=RESPONSE),
            "the Hub's model 'org/name@v9' is gated; accept its terms on its page "
            "and log in with `hf auth login`.",
        ),
        (
            errors.RevisionNotFoundError("x", response=RESPONSE),
            "the Hub's model 'org/name' has no revision 'v9'; give a branch, tag or commit of it.",
        ),
        (
            errors.HfHubHTTPError("503 busy\nmore", response=RESPONSE),
            "cannot download model 'org/name@v9' from the Hub: 503 busy; try again, or give a local folder.",
        ),
        (
            OSError(28, "No space left on device"),
            "cannot download model 'org/name@v9' from the Hub: [Errno 28] No space left on device; "
            "try again, or give a local folder.",
        ),
    ],
)
def test_the_hubs_errors_are_explained(
    place: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, sentence: str
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", FakeHub(place / "got", [], error))
    assert refusal("org/name", "v9") == sentence.format(place=place)


def test_an_unreachable_hub_is_not_called_offline(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    error = errors.LocalEntryNotFoundError("x")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", FakeHub(place / "got", [], error))
    assert "and the Hub cannot be reached: download it" in refusal("org/name")
