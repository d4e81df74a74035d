"""An encoder saved bare and under a head: the refusal says that the names differ, not that tensors are missing."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from raymerge.cluster.merge import merge
from raymerge.cluster.name_prefix import prefix_between
from raymerge.cluster.options import MergeOptions
from raymerge.merge_actors.errors import MismatchError

BARE = ("embeddings.weight", "layer.0.weight", "layer.1.weight")


def test_a_prefix_is_found_for_most_names_only() -> None:
    headed = [f"bert.{name}" for name in BARE]
    assert prefix_between(BARE, [*headed, "classifier.weight"]) == "bert."
    assert prefix_between([*BARE, "pooler.weight"], headed) == "bert."  # a bare model may have more
    assert prefix_between(headed, BARE) is None
    assert prefix_between(BARE, BARE) is None
    assert prefix_between(BARE, ["bert.layer.0.weight", "x.y"]) is None
    assert prefix_between(BARE, [f"model.bert.{name}" for name in BARE]) == "model.bert."
    assert prefix_between([], BARE) is None


@pytest.mark.parametrize("base_prefix, model_prefix", [("", "bert."), ("bert.", "")])
def test_a_merge_across_a_prefix_is_refused_with_the_way_out(
    tmp_path: Path, base_prefix: str, model_prefix: str
) -> None:
    for folder, prefix in (("base", base_prefix), ("skill", model_prefix)):
        (tmp_path / folder).mkdir()
        tensors = {prefix + name: torch.ones(2, 2) for name in BARE}
        save_file(tensors | {f"{folder}.head": torch.ones(2)}, tmp_path / folder / "model.safetensors")
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "skill"), "parameters": {"weight": 1}}],
    }
    long, short = ("skill", "base") if model_prefix else ("base", "skill")
    with pytest.raises(
        MismatchError,
        match=rf"/{long} has the tensors of \S+/{short} under names that begin with 'bert\.'; load both",
    ):
        merge([recipe], tmp_path / "out", MergeOptions(in_process=True, workers=1))
    assert not (tmp_path / "out").exists()
