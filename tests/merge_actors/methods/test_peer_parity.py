"""Parity with mergekit 0.1.5 on recorded outputs, and each difference that is intended.

`tests/data/record_peer.py` made the recordings; the methods that draw masks are recorded where
no element is dropped (density 1).
"""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from raymerge.cluster.method_parameters import parameters_of
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.methods.slices import merge_tensors

DATA = Path(__file__).parents[2] / "data"
RECORDED = json.loads((DATA / "peer.json").read_text())
CASES: dict[str, dict[str, Any]] = {case["name"]: case for case in RECORDED["cases"]}
TENSORS = load_file(DATA / "peer.safetensors")

#: Cases whose outputs differ on purpose; each has a test of its own below.
DIFFERENT = {
    # A cosine whose product of norms is below 1e-6 is scaled down by the peer; ours is the cosine.
    "model_stock-False/tiny",
    # Deltas that oppose each other send the peer past the base; ours stays at the base.
    "model_stock-False/opposed",
    "model_stock-True/unrelated",
    # Deltas of zeros are refused by the peer; ours gives the base.
    "multislerp-True-deltas/frozen",
    # The peer keeps one element at least; ours keeps floor(density n), here none.
    "ties-one/matrix",
}


def merge(case: dict[str, Any]) -> torch.Tensor:
    """Run our method on a case's inputs."""
    method = METHODS[case["method"]]
    count = case["num_models"]
    declared = parameters_of(method)
    shared = {each.name: each.default for each in declared.shared} | case["shared"]
    models = []
    for i in range(count):
        own = {each.name: case["shared"].get(each.name, each.default) for each in declared.per_model}
        models.append(own | {key: values[i] for key, values in case["per_model"].items()})
    inputs = [TENSORS[f"inputs/{case['family']}/{key}"] for key in ("base", "0", "1", "2")]
    return merge_tensors(
        method,
        inputs[1 : 1 + count],
        inputs[0] if case["has_base"] else None,
        Settings(shared=shared, models=tuple(models)),
        sparsifiers=SPARSIFIERS,
    )


@pytest.mark.parametrize("name", sorted(set(CASES) - DIFFERENT))
def test_equals_the_recording(name: str) -> None:
    merged, recorded = merge(CASES[name]), TENSORS[f"outputs/{name}"]
    # Both compute in the inputs' float32 or float64, and the peer takes norms and angles in it too:
    # about ten rounding errors of elements of order 1 (the worst seen is five). The peer divides
    # ramplus_tl's counts in float32 whatever the inputs.
    is_double = recorded.dtype == torch.float64 and CASES[name]["method"] != "ramplus_tl"
    tolerance = 2e-15 if is_double else 1e-6
    torch.testing.assert_close(merged, recorded, rtol=tolerance, atol=tolerance)


def test_every_method_of_the_peer_is_here_and_recorded() -> None:
    assert set(RECORDED["methods"]) == {case["method"] for case in CASES.values()}
    assert set(RECORDED["methods"]) <= set(METHODS)


def test_model_stock_of_tiny_deltas_uses_their_true_angle() -> None:
    base, first, second = (TENSORS[f"inputs/tiny/{key}"].double() for key in ("base", "0", "1"))
    cosine = torch.cosine_similarity((first - base).flatten(), (second - base).flatten(), dim=0)
    t = 2 * cosine / (1 + cosine)
    merged = merge(CASES["model_stock-False/tiny"])
    # Deltas are of 1e-5 and rounded to float32 of elements of order 1: 1e-7 is what can be asked.
    torch.testing.assert_close(merged.double(), base + t * ((first + second) / 2 - base), rtol=0, atol=2e-7)
    assert (merged - TENSORS["outputs/model_stock-False/tiny"]).abs().max() > 1e-6


def test_model_stock_of_opposed_deltas_gives_the_base() -> None:
    base = TENSORS["inputs/opposed/base"]
    assert torch.equal(merge(CASES["model_stock-False/opposed"]), base)
    assert (TENSORS["outputs/model_stock-False/opposed"] - base).abs().max() > 0.1


def test_model_stock_of_opposed_rows_gives_the_rows_of_the_base() -> None:
    base, *models = (TENSORS[f"inputs/unrelated/{key}"].double() for key in ("base", "0", "1", "2"))
    deltas = [model - base for model in models]
    cosines = [
        torch.cosine_similarity(deltas[i], deltas[j], dim=1) for i, j in itertools.combinations(range(3), 2)
    ]
    is_opposed = torch.stack(cosines).mean(dim=0) < 0
    assert 0 < is_opposed.sum() < len(base)
    merged, recorded = (
        merge(CASES["model_stock-True/unrelated"]),
        TENSORS["outputs/model_stock-True/unrelated"],
    )
    assert torch.equal(merged[is_opposed], base[is_opposed].float())
    # The tolerance of the other recordings.
    torch.testing.assert_close(merged[~is_opposed], recorded[~is_opposed], rtol=1e-6, atol=1e-6)


def test_multislerp_of_frozen_deltas_gives_the_base() -> None:
    case = CASES["multislerp-True-deltas/frozen"]
    assert case["error"] == "The weighted sum of the input tensors is zero."
    assert torch.equal(merge(case), TENSORS["inputs/frozen/base"])


def test_ties_rounds_the_number_of_kept_elements_down() -> None:
    base = TENSORS["inputs/matrix/base"]
    assert torch.equal(merge(CASES["ties-one/matrix"]), base)
    assert (TENSORS["outputs/ties-one/matrix"] != base).any()
