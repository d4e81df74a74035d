"""Diagonal Fisher information: analytic cases, a slow reference, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge.merge_actors.errors import NotFiniteError, RecipeError
from raymerge.stats.batches import Batch, batch_tensors, shards_of
from raymerge.stats.calibration_data import Example
from raymerge.stats.fisher_accumulator import FisherAccumulator, check_estimator, fisher_bytes

NUM_FEATURES = 5


class _Logits:
    def __init__(self, logits: torch.Tensor) -> None:
        self.logits = logits


class _Logistic(torch.nn.Module):
    """p(1 | x) = sigmoid(w x): logits (0, w x), where x is the embedding of the one token."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.inputs = torch.nn.Embedding(8, NUM_FEATURES)
        self.inputs.weight.data = torch.randn(8, NUM_FEATURES, generator=generator)
        self.head = torch.nn.Linear(NUM_FEATURES, 1, bias=False)
        self.head.weight.data = torch.randn(1, NUM_FEATURES, generator=generator)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> _Logits:
        score = self.head(self.inputs(input_ids[:, 0]))
        return _Logits(torch.cat([torch.zeros_like(score), score], dim=1))


def _batch(number: int, token: int, label: int | None = None) -> Batch:
    example = Example(number=number, input_ids=(token,), label=label)
    return batch_tensors([example], pad_id=0, start_id=None, device="cpu")


def _logistic_fisher(model: _Logistic, tokens: list[int]) -> torch.Tensor:
    """Sum p (1 - p) x x^T over the tokens and return the diagonal."""
    x = model.inputs.weight[tokens].double()
    p = torch.sigmoid(x @ model.head.weight[0].double())
    return (p * (1 - p)) @ x.square()


def test_expected_fisher_of_logistic_regression_is_p_times_1_minus_p() -> None:
    model = _Logistic()
    tokens = [1, 5, 2, 2, 7]
    fisher = FisherAccumulator(model, ["head.weight"], "expected")
    for number, token in enumerate(tokens):
        fisher.add(_batch(number, token))
    fisher.end_shard()
    torch.testing.assert_close(
        fisher.total("head.weight"), _logistic_fisher(model, tokens).detach(), rtol=1e-5, atol=1e-7
    )
    assert model.head.weight.requires_grad and not model.inputs.weight.requires_grad


class _BagOfWords(_Logistic):
    """As `_Logistic`, x being the sum over the tokens, so a token that occurs twice has the sum of two gradients."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> _Logits:
        score = self.head(self.inputs(input_ids).sum(1))
        return _Logits(torch.cat([torch.zeros_like(score), score], dim=1))


def test_an_embeddings_fisher_is_the_square_of_the_sum_over_its_occurrences() -> None:
    model, token_ids = _BagOfWords(), (1, 5, 1)
    fisher = FisherAccumulator(model, ["inputs.weight"], "expected")
    example = Example(number=0, input_ids=token_ids, label=None)
    fisher.add(batch_tensors([example], pad_id=0, start_id=None, device="cpu"))
    fisher.end_shard()
    weights = model.head.weight[0].double()
    p = torch.sigmoid(model.inputs.weight[list(token_ids)].double().sum(0) @ weights)
    expected = torch.zeros(8, NUM_FEATURES, dtype=torch.float64)
    expected[1], expected[5] = 4 * p * (1 - p) * weights.square(), p * (1 - p) * weights.square()
    # Gradients are float32.
    torch.testing.assert_close(fisher.total("inputs.weight").reshape(8, -1), expected, rtol=1e-5, atol=0)


def test_the_grouping_of_shards_over_workers_does_not_change_a_bit() -> None:
    """Sums of float32 in float64 are exact while the shards of an element lie within 2**24 of each other."""
    num_shards = 32
    exponents_SP = torch.randint(-12, 12, (num_shards, 4096), generator=torch.Generator().manual_seed(1))
    shards_SP = torch.rand(num_shards, 4096, generator=torch.Generator().manual_seed(2)) * 2.0**exponents_SP

    def total(num_workers: int) -> torch.Tensor:
        totals = []
        for worker in range(num_workers):
            fisher = FisherAccumulator(torch.nn.Linear(4096, 1, bias=False), ["weight"], "empirical")
            for shard in shards_of(worker, num_workers, num_shards):
                fisher._shard["weight"].copy_(shards_SP[shard])
                fisher.end_shard()
            totals.append(fisher.total("weight"))
        for other in totals[1:]:
            totals[0].add_(other)
        return totals[0]

    assert all(torch.equal(total(num_workers), total(1)) for num_workers in (2, 3, 4, 7))


def test_sampled_fisher_has_the_expected_fisher_as_its_mean() -> None:
    model = _Logistic()
    fisher = FisherAccumulator(model, ["head.weight"], "sampled")
    num_draws = 3000
    for number in range(num_draws):
        fisher.add(_batch(number, 4))
    fisher.end_shard()
    expected = _logistic_fisher(model, [4]).detach()
    # The square is one of two values, so its standard deviation is at most its largest: 5 sigma here.
    torch.testing.assert_close(fisher.total("head.weight") / num_draws, expected, rtol=0.15, atol=1e-6)


def test_sampled_labels_depend_on_the_sample_alone() -> None:
    model = _Logistic()
    totals = []
    for order in ([1, 2, 3, 4, 5, 6], [6, 3, 1, 2, 5, 4]):
        fisher = FisherAccumulator(model, ["head.weight"], "sampled")
        for number in order:
            fisher.add(_batch(number, number))
            fisher.end_shard()
        totals.append(fisher.total("head.weight"))
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-12, atol=0)


def test_empirical_fisher_is_the_squared_gradient_at_the_true_label() -> None:
    model = _Logistic()
    fisher = FisherAccumulator(model, ["head.weight"], "empirical")
    fisher.add(_batch(0, 3, label=1))
    fisher.end_shard()
    x = model.inputs.weight[3].double()
    p = torch.sigmoid(x @ model.head.weight[0].double())
    expected = ((1 - p) * x).square().detach()
    torch.testing.assert_close(fisher.total("head.weight"), expected, rtol=1e-5, atol=1e-8)


def test_a_language_models_fisher_is_that_of_the_whole_sequence(tiny_checkpoints: Callable[..., Any]) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_checkpoints("llama").base).eval()
    name = "model.layers.0.mlp.down_proj.weight"
    ids = (5, 9, 7, 30)
    batch = batch_tensors([Example(number=0, input_ids=ids)], pad_id=0, start_id=None, device="cpu")
    fisher = FisherAccumulator(model, [name], "empirical")
    with torch.no_grad():  # as a worker calls it
        fisher.add(batch)
    fisher.end_shard()
    model.requires_grad_(True)
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    log_likelihood = sum(log_p[t, ids[t + 1]] for t in range(3))
    assert isinstance(log_likelihood, torch.Tensor)
    [gradient] = torch.autograd.grad(log_likelihood, [model.get_parameter(name)])
    torch.testing.assert_close(
        fisher.total(name), gradient.double().square().reshape(-1), rtol=1e-5, atol=1e-12
    )


def test_damaged_weights_are_refused() -> None:
    model = _Logistic()
    model.inputs.weight.data[3] = float("nan")
    fisher = FisherAccumulator(model, ["head.weight"], "expected")
    with pytest.raises(NotFiniteError, match="logits are NaN or infinite for sample 8"):
        fisher.add(_batch(8, 3))


@pytest.mark.parametrize(
    ("architecture", "estimator", "has_labels", "message"),
    [
        (
            "BertModel",
            "expected",
            True,
            "needs a classification or language-modelling head; the model is BertModel",
        ),
        ("LlamaForCausalLM", "expected", False, "use the estimator sampled"),
        ("BertForSequenceClassification", "empirical", False, "needs true labels"),
        ("BertForSequenceClassification", "exact", False, "must be one of expected, sampled, empirical"),
    ],
)
def test_what_cannot_be_estimated_is_refused(
    architecture: str, estimator: str, has_labels: bool, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        check_estimator(estimator, {"architectures": [architecture]}, has_labels=has_labels)


def test_memory_is_gradient_square_and_total() -> None:
    assert fisher_bytes(10) == 200


def test_forgetting_frees_a_parameter(tmp_path: Path) -> None:
    model = _Logistic()
    fisher = FisherAccumulator(model, ["head.weight"], "expected")
    assert fisher.total("head.weight").tolist() == [0.0] * NUM_FEATURES
    fisher.forget("head.weight")
    with pytest.raises(KeyError):
        fisher.total("head.weight")
