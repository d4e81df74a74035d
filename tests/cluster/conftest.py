"""A small registry of methods, so that recipe tests do not move with the real one."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from raymerge.merge_actors.checkpoint.folder import open_checkpoint
from raymerge.merge_actors.methods.interface import Method, Parameter, Settings, Sparsifier
from raymerge.stats.statistics_file import FORMAT_VERSION, MANIFEST, write_json


def _never(*_: Any) -> Any:
    raise AssertionError("a recipe test never computes")


def _weights_do_not_cancel(settings: Settings) -> str | None:
    weights = [model["weight"] for model in settings.models]
    if settings.shared["normalize"] and sum(weights) == 0:  # type: ignore[arg-type]
        return f"the weights {weights} sum to 0, which normalize cannot divide by"
    return None


WEIGHT = Parameter(name="weight", per_model=True, required=True)
NORMALIZE = Parameter(name="normalize", kind=bool, default=False)
LAMBDA = Parameter(name="lambda", default=1.0, aliases=("scaling",))
DENSITY = Parameter(name="density", per_model=True, default=1.0, minimum=0, maximum=1)
TRIM = Parameter(name="trim", kind=str, default="tensor", choices=("tensor", "model"))

RANDOM = Sparsifier(
    name="random",
    parameters=(
        Parameter(name="density", per_model=True, required=True, minimum=0, maximum=1),
        Parameter(name="rescale", kind=bool, default=True, choices=("l1",)),
    ),
    apply=_never,
)
MAGNITUDE = Sparsifier(name="magnitude", parameters=(DENSITY,), apply=_never)

SMALL_REGISTRY = {
    method.name: method
    for method in (
        Method(
            name="linear",
            merge=_never,
            parameters=(WEIGHT, NORMALIZE),
            default_mode={"normalize": True},
            check=_weights_do_not_cancel,
        ),
        Method(
            name="passthrough",
            merge=_never,
            parameters=(Parameter(name="scale", per_model=True),),
            num_models=(1, 1),
        ),
        Method(
            name="slerp",
            merge=_never,
            parameters=(Parameter(name="t", required=True, minimum=0, maximum=1),),
            base="required",
            num_models=(1, 1),
        ),
        Method(
            name="ties",
            merge=_never,
            parameters=(WEIGHT, NORMALIZE, LAMBDA, DENSITY, TRIM),
            sparsifier=MAGNITUDE,
            default_mode={"normalize": True},
            base="required",
        ),
        Method(
            name="dare_ties",
            merge=_never,
            parameters=(WEIGHT, NORMALIZE, LAMBDA),
            sparsifier=RANDOM,
            base="required",
        ),
        Method(
            name="multislerp",
            merge=_never,
            parameters=(WEIGHT, Parameter(name="max_iter", kind=int, default=10, minimum=1)),
            base="optional",
            num_models=(2, None),
        ),
    )
}


@pytest.fixture
def small_registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, Method]:
    """Let recipes know the methods of `SMALL_REGISTRY` and two sparsifiers, and nothing else."""
    monkeypatch.setattr("raymerge.cluster.method_parameters.METHODS", SMALL_REGISTRY)
    sparsifiers = {"random": RANDOM, "magnitude": MAGNITUDE}
    monkeypatch.setattr("raymerge.cluster.method_parameters.SPARSIFIERS", sparsifiers)
    return SMALL_REGISTRY


_NUM_COLUMNS = 2


def _write_token_model(
    folder: Path,
    number: int,
    tokens: Sequence[str] | None,
    *,
    num_rows: int | None = None,
    added: Sequence[str] = (),
    dtype: str = "float32",
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a folder with an embedding, a head and its bias, and a word-level tokenizer.

    Row r of model number n holds 100 * n + r, so that rows say where they come from.

    Args:
        folder: where to.
        number: of the model.
        tokens: ids in this order; None for a model without tokenizer.
        num_rows: rows of the embedding, if more than there are tokens.
        added: tokens that come after those of the tokenizer's model.
        dtype: of the weights.
        config: more keys for config.json.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    num_rows = num_rows or len(tokens or ()) + len(added)
    values_R = torch.arange(num_rows, dtype=torch.float32) + 100 * number
    matrix_RD = values_R[:, None].repeat(1, _NUM_COLUMNS)
    tensors = {
        "model.embed_tokens.weight": matrix_RD,
        "lm_head.weight": matrix_RD + 0.5,
        "lm_head.bias": values_R,
        "model.norm.weight": torch.full((_NUM_COLUMNS,), float(number)),
    }
    save_file(
        {k: v.to(getattr(torch, dtype)).contiguous() for k, v in tensors.items()},
        folder / "model.safetensors",
    )
    (folder / "config.json").write_text(json.dumps({"vocab_size": num_rows, **(config or {})}))
    if tokens is not None:
        _write_tokenizer(folder, tokens, added)
    return folder


def _write_tokenizer(folder: Path, tokens: Sequence[str], added: Sequence[str] = ()) -> None:
    """Write a word-level tokenizer.json and its tokenizer_config.json."""
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[0]))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in added])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=tokens[0]).save_pretrained(folder)


@pytest.fixture
def write_token_model() -> Callable[..., Path]:
    """Return a writer of tiny model folders whose rows say where they come from."""
    return _write_token_model


def _write_statistics(
    folder: Path, model: Path, kind: str, tensors: Mapping[str, Any], modules: Mapping[str, Any]
) -> None:
    """Write a folder of statistics of a model: tensors, and the rows of the manifest's modules."""
    from safetensors.numpy import save_file

    folder.mkdir()
    save_file(dict(tensors), folder / "part.safetensors")
    checkpoint = open_checkpoint(model)
    manifest = {
        "format_version": FORMAT_VERSION,
        "kind": kind,
        "model": {"path": str(model), "fingerprint": checkpoint.fingerprint},
        "num_tokens": 100,
        "modules": modules,
        "coverage": {"linear_maps": list(modules), "uncovered": [], "tied": []},
        "files": ["part.safetensors"],
    }
    write_json(str(folder / MANIFEST), manifest)


@pytest.fixture
def write_statistics() -> Callable[..., None]:
    """Return a writer of statistics: (folder, model, kind, tensors, modules)."""
    return _write_statistics


@pytest.fixture(scope="session")
def fake_runner() -> Any:
    """Return the class `FakeRunner` of fake_runner.py: evaluators that make scores up."""
    spec = importlib.util.spec_from_file_location("fake_runner", Path(__file__).with_name("fake_runner.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_runner"] = module
    spec.loader.exec_module(module)
    return module.FakeRunner


@pytest.fixture(scope="session")
def tiny_head(tiny_checkpoints: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a head for the tiny encoder that yields one number."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

    base = tiny_checkpoints("bert").base
    folder = tmp_path_factory.mktemp("head")
    config = AutoConfig.from_pretrained(base, num_labels=1)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def evaluation(tiny_head: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a task that tells merges of the tiny encoders apart."""
    from raymerge.stats.evaluation.tasks import parse_evaluation

    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [
        {"text": f"word{i % 7} word{(3 * i) % 11} word{i % 5}", "label": (i * 37 % 11) / 10}
        for i in range(24)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return parse_evaluation(
        {
            "dtype": "float32",
            "batch_tokens": 30,
            "tasks": [
                {
                    "name": "topic",
                    "kind": "text_classification",
                    "regression": True,
                    "head": str(tiny_head),
                    "validation": str(file),
                }
            ],
        }
    )


@pytest.fixture
def grid_family(tiny_checkpoints: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return models for grids whose tasks are not looked at: their scores are made up."""
    monkeypatch.setattr("raymerge.cluster.grid_plan._check_tasks", lambda evaluation, folder: [])
    return tiny_checkpoints("llama")
