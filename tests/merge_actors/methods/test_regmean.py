"""RegMean: its identities, a float64 reference written apart, and what bad statistics do."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.merge_actors.errors import CheckpointError, MismatchError, NotFiniteError, RecipeError
from raymerge.merge_actors.methods import positive_definite, regmean_solve
from raymerge.merge_actors.methods.gram_matrix import pack_upper
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.methods.positive_definite import FactorReport
from raymerge.merge_actors.methods.regmean import REGMEAN, check_rows
from raymerge.merge_actors.methods.regmean_solve import GramSums, InputGram
from raymerge.merge_actors.methods.slices import merge_tensors


@dataclass
class Case:
    """Models of one linear map, and the inputs that each of them sees."""

    inputs: list[torch.Tensor]
    """(rows, I) per model, float64."""
    models: list[torch.Tensor]
    """(O, I) per model, float32."""

    @property
    def grams(self) -> list[InputGram]:
        return [
            InputGram(gram=pack_upper((x.T @ x).float()), num_rows=len(x), name=f"model {i}")
            for i, x in enumerate(self.inputs)
        ]

    @property
    def mean(self) -> torch.Tensor:
        return torch.stack([w.double() for w in self.models]).mean(0)


def case(
    seed: int = 0,
    num_models: int = 3,
    out_features: int = 7,
    in_features: int = 12,
    rows: Sequence[int] = (40, 90, 60, 50),
    spread: float = 0.1,
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base = normal(out_features, in_features)
    inputs = [
        normal(rows[m], in_features) @ normal(in_features, in_features) + normal(in_features)
        for m in range(num_models)
    ]
    models = [
        (base + spread * normal(out_features, in_features)).float().contiguous() for _ in range(num_models)
    ]
    return Case(inputs, models)


def full_grams(grams: Sequence[InputGram]) -> list[torch.Tensor]:
    """Unpack by index, in float64: not with the code under test."""
    squares = []
    for gram in grams:
        size = int((2 * gram.gram.numel()) ** 0.5)
        rows, columns = torch.triu_indices(size, size)
        square = torch.zeros(size, size, dtype=torch.float64)
        square[rows, columns] = square[columns, rows] = gram.gram.double()
        squares.append(square)
    return squares


def reference(
    models: Sequence[torch.Tensor],
    grams: Sequence[InputGram],
    weights: Sequence[float],
    alpha: float,
    normalize: str,
) -> torch.Tensor:
    """Follow the paper: (sum c G~)^-1 sum c G~ W, float64."""
    left, right = torch.zeros(()).double(), torch.zeros(()).double()
    for model, gram, square, weight in zip(models, grams, full_grams(grams), weights, strict=True):
        factor = weight / gram.num_rows if normalize == "tokens" else weight
        shrunk = factor * (alpha * square + (1 - alpha) * torch.diag(square.diagonal()))
        left, right = left + shrunk, right + shrunk @ model.double().T
    return torch.linalg.solve(left, right).T


def loss(
    merged: torch.Tensor,
    models: Sequence[torch.Tensor],
    grams: Sequence[InputGram],
    alpha: float,
    normalize: str = "tokens",
) -> float:
    """Return what RegMean minimises: sum_m c_m tr((W - W_m) G~_m (W - W_m)^T), float64."""
    total = 0.0
    for model, gram, square in zip(models, grams, full_grams(grams), strict=True):
        shrunk = alpha * square + (1 - alpha) * torch.diag(square.diagonal())
        distance = merged.double() - model.double()
        rows = gram.num_rows if normalize == "tokens" else 1
        total += float(((distance @ shrunk) * distance).sum()) / rows
    return total


def solve_regmean(
    models: Sequence[torch.Tensor],
    grams: Sequence[InputGram],
    *,
    weights: Sequence[float],
    alpha: float,
    normalize: str = "tokens",
    is_transposed: bool = False,
) -> tuple[torch.Tensor, FactorReport]:
    """Merge one matrix, and return what was found on the way."""
    factor = GramSums(grams, weights, normalize).factor(alpha)
    return factor.merge([models], is_transposed=is_transposed)[0], factor.report


def merge(
    given_case: Case,
    alpha: float = 0.9,
    weights: Sequence[float] | None = None,
    normalize: str = "tokens",
    grams: Sequence[InputGram] | None = None,
) -> torch.Tensor:
    merged, _ = solve_regmean(
        given_case.models,
        grams or given_case.grams,
        weights=weights or [1.0] * len(given_case.models),
        alpha=alpha,
        normalize=normalize,
    )
    return merged


def relative(found: torch.Tensor, expected: torch.Tensor, origin: torch.Tensor) -> float:
    """Relative error of a delta from `origin`."""
    return float((found.double() - expected).norm() / (expected - origin.double()).norm())


def test_two_features_by_hand() -> None:
    # G1 = [[2, 1], [1, 2]], G2 = [[1, 0], [0, 3]], one row each, so G1 + G2 = [[3, 1], [1, 5]].
    # W1 = [1, 0], W2 = [0, 1]: G1 W1^T + G2 W2^T = [2, 1] + [0, 3] = [2, 4]; the solution is [3/7, 5/7].
    grams = [
        InputGram(gram=torch.tensor([2.0, 1.0, 2.0]), num_rows=1),
        InputGram(gram=torch.tensor([[1.0, 0.0], [0.0, 3.0]]), num_rows=1),
    ]
    models = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    merged, report = solve_regmean(models, grams, weights=[1, 1], alpha=1)
    torch.testing.assert_close(merged, torch.tensor([[3 / 7, 5 / 7]]), rtol=0, atol=1e-6)
    assert (report.in_features, report.num_dead, report.rank, report.jitter) == (2, 0, 2, 0.0)
    # alpha 0: each feature weighted by its diagonal, 2 : 1 and 2 : 3.
    merged, _ = solve_regmean(models, grams, weights=[1, 1], alpha=0)
    torch.testing.assert_close(merged, torch.tensor([[2 / 3, 3 / 5]]), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    num_models=st.integers(1, 4),
    out_features=st.integers(1, 9),
    in_features=st.integers(1, 20),
    alpha=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    normalize=st.sampled_from(["tokens", "sum"]),
    data=st.data(),
)
def test_equals_the_reference(
    seed: int,
    num_models: int,
    out_features: int,
    in_features: int,
    alpha: float,
    normalize: str,
    data: st.DataObject,
) -> None:
    found = case(seed, num_models, out_features, in_features)
    weights = data.draw(st.lists(st.floats(0.1, 5), min_size=num_models, max_size=num_models))
    merged = merge(found, alpha, weights, normalize)
    expected = reference(found.models, found.grams, weights, alpha, normalize)
    # The correction is right to 1e-4 of its size (which is 0.1), the result is rounded to float32.
    torch.testing.assert_close(merged.double(), expected, rtol=2e-6, atol=5e-5)
    assert merged.dtype == torch.float32


def test_equal_grams_give_the_mean() -> None:
    found = case()
    grams = [found.grams[0]] * 3
    for alpha in (0.0, 0.3, 1.0):
        # What is left of the differences after rounding (1e-9), times the condition number (300 at alpha 1).
        torch.testing.assert_close(merge(found, alpha, grams=grams).double(), found.mean, rtol=0, atol=3e-6)


@pytest.mark.parametrize("num_copies", [1, 2, 3, 7, 49])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_copies_of_a_model_give_that_model_bit_for_bit(num_copies: int, dtype: torch.dtype) -> None:
    found = case(num_models=4)
    grams = [found.grams[i % 4] for i in range(num_copies)]
    model = found.models[0].to(dtype)
    merged, _ = solve_regmean([model] * num_copies, grams, weights=[0.3] * num_copies, alpha=1.0)
    assert torch.equal(merged, model.to(torch.promote_types(dtype, torch.float32)))


def test_one_model_of_several_that_counts() -> None:
    found = case()
    for weights in ([1, 0, 0], [0, 2, 0], [0, 0, 3]):
        chosen = found.models[max(range(3), key=weights.__getitem__)]
        assert torch.equal(merge(found, 1.0, weights), chosen)


def test_alpha_0_is_the_mean_weighted_by_the_diagonals() -> None:
    found = case()
    shares = torch.stack([(x * x).mean(0) for x in found.inputs])
    weighted = torch.stack(found.models).double() * shares.unsqueeze(1)
    torch.testing.assert_close(merge(found, 0.0).double(), weighted.sum(0) / shares.sum(0), rtol=0, atol=1e-6)


def test_alpha_1_with_sums_is_least_squares_on_the_stacked_inputs() -> None:
    found = case()
    inputs = torch.cat(found.inputs)
    targets = torch.cat([x @ w.double().T for x, w in zip(found.inputs, found.models, strict=True)])
    expected = torch.linalg.lstsq(inputs, targets).solution.T
    assert relative(merge(found, 1.0, normalize="sum"), expected, found.mean) < 1e-4


@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 1000),
    in_features=st.integers(1, 20),
    alpha=st.sampled_from([0.0, 0.5, 1.0]),
    rows=st.lists(st.integers(1, 40), min_size=3, max_size=3),
)
def test_minimises_the_loss(seed: int, in_features: int, alpha: float, rows: list[int]) -> None:
    # With few rows too, where the minimum is no single point.
    found = case(seed, 3, 5, in_features, rows)
    merged = merge(found, alpha)
    least = loss(merged, found.models, found.grams, alpha)
    largest = max(loss(other, found.models, found.grams, alpha) for other in found.models)
    for other in (found.mean, *found.models):
        # Rounding the result to float32 costs about 1e-7 of its size, squared.
        assert least <= loss(other, found.models, found.grams, alpha) + 1e-9 * largest


def test_the_gradient_vanishes() -> None:
    found = case()
    merged = merge(found, 0.7).double()
    gradients = [
        (merged - w.double()) @ (0.7 * g + 0.3 * torch.diag(g.diagonal())) / len(x)
        for w, g, x in zip(found.models, full_grams(found.grams), found.inputs, strict=True)
    ]
    assert float(sum(gradients).norm()) < 1e-4 * max(float(each.norm()) for each in gradients)  # type: ignore[union-attr]


@pytest.mark.parametrize("scale", [1e-12, 1 / 3, 1e9])
def test_a_common_scale_changes_nothing(scale: float) -> None:
    found = case()
    scaled = [InputGram(gram=g.gram * scale, num_rows=g.num_rows) for g in found.grams]
    torch.testing.assert_close(merge(found, grams=scaled), merge(found), rtol=0, atol=1e-6)
    torch.testing.assert_close(merge(found, weights=[scale] * 3), merge(found), rtol=0, atol=1e-6)


def test_adding_to_every_model_adds_to_the_result() -> None:
    found = case()
    added = torch.randn(7, 12, generator=torch.Generator().manual_seed(9))
    moved = Case(found.inputs, [model + added for model in found.models])
    torch.testing.assert_close(merge(moved), merge(found) + added, rtol=0, atol=2e-6)


def test_the_order_of_models_means_nothing() -> None:
    found = case()
    merged = merge(found, weights=[1, 2, 3])
    turned = Case(found.inputs[::-1], found.models[::-1])
    torch.testing.assert_close(merge(turned, weights=[3, 2, 1]), merged, rtol=0, atol=2e-6)


def test_tokens_and_sum_differ_by_the_number_of_rows() -> None:
    # Ten times the same data: one tenth of the weight makes the sums equal; the mean per token is the same.
    found = case()
    more = [InputGram(gram=found.grams[0].gram * 10, num_rows=400), *found.grams[1:]]
    torch.testing.assert_close(merge(found, grams=more), merge(found), rtol=0, atol=1e-6)
    summed = merge(found, normalize="sum", grams=more)
    torch.testing.assert_close(summed, merge(found, normalize="sum", weights=[10, 1, 1]), rtol=0, atol=1e-6)
    assert not torch.allclose(summed, merge(found, normalize="sum"), atol=1e-3)


def test_packed_and_full_grams_give_the_same() -> None:
    found = case()
    full = [
        InputGram(gram=square.float(), num_rows=g.num_rows)
        for square, g in zip(full_grams(found.grams), found.grams, strict=True)
    ]
    assert torch.equal(merge(found, grams=full), merge(found))


def test_heterogeneous_grams_are_not_averaged_silently() -> None:
    found = case()
    assert relative(merge(found).double(), found.mean, found.models[0]) > 0.1


def test_conv1d_and_linear_merge_to_one_function() -> None:
    found = case()
    sums = GramSums(found.grams, [1, 1, 1], "tokens")
    turned = [model.T.contiguous() for model in found.models]
    (merged,) = sums.factor(0.6).merge([turned], is_transposed=True)
    assert merged.shape == (12, 7)
    assert torch.equal(merged.T, merge(found, 0.6))


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("alpha", [0.9, 1.0])
def test_cuts_between_row_units_do_not_change_a_bit(
    is_transposed: bool, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regmean_solve, "ROW_UNIT", 16)
    found = case(out_features=77, in_features=50, rows=(100, 60, 70))
    models = [model.T.contiguous() for model in found.models] if is_transposed else found.models
    factor = GramSums(found.grams, [1, 2, 3], "tokens").factor(alpha)
    axis = 1 if is_transposed else 0
    (whole,) = factor.merge([models], is_transposed=is_transposed)
    for edges in ([0, 16, 48, 77], [0, 64, 77], [0, 16, 32, 48, 64, 77]):
        parts = [
            factor.merge(
                [[model.narrow(axis, begin, end - begin) for model in models]], is_transposed=is_transposed
            )[0]
            for begin, end in itertools.pairwise(edges)
        ]
        assert torch.equal(torch.cat(parts, dim=axis), whole)
    # Anywhere else the last bits may differ.
    odd = [
        factor.merge([[m.narrow(axis, b, 11) for m in models]], is_transposed=is_transposed)[0]
        for b in range(0, 77, 11)
    ]
    torch.testing.assert_close(torch.cat(odd, dim=axis), whole, rtol=0, atol=1e-5)


def test_one_factor_serves_several_matrices() -> None:
    query, key = case(), case(seed=1, out_features=3)
    factor = GramSums(query.grams, [1, 1, 1], "tokens").factor(0.9)
    together = factor.merge([query.models, key.models])
    assert torch.equal(together[0], merge(query))
    assert torch.equal(together[1], merge(Case(query.inputs, key.models)))


class CountingGrams(Sequence[InputGram]):  # type: ignore[type-arg, unused-ignore]
    """Grams that are read when they are asked for."""

    def __init__(self, grams: Sequence[InputGram]) -> None:
        self.grams = grams
        self.reads: list[int] = []

    def __len__(self) -> int:
        return len(self.grams)

    def __getitem__(self, index: int) -> InputGram:  # type: ignore[override]
        if not 0 <= index < len(self.grams):
            raise IndexError(index)
        self.reads.append(index)
        return self.grams[index]


def test_one_sum_of_grams_serves_every_alpha_and_matrix() -> None:
    found = case()
    grams = CountingGrams(found.grams)
    sums = GramSums(grams, [1, 1, 2], "tokens")
    assert grams.reads == [0, 1, 2]
    for tenths in range(11):
        first, second = sums.factor(tenths / 10).merge([found.models, found.models])
        assert torch.equal(first, second)
        assert torch.equal(first, merge(found, tenths / 10, [1, 1, 2]))
    assert grams.reads == [0, 1, 2] * 12  # once for the sums, once for the right-hand sides of each alpha


def test_a_dead_feature_keeps_the_mean() -> None:
    found = case()
    for x in found.inputs:
        x[:, [2, 5]] = 0
    merged, report = solve_regmean(found.models, found.grams, weights=[1, 1, 1], alpha=1.0)
    assert (report.num_dead, report.rank, report.jitter) == (2, 10, 0.0)
    torch.testing.assert_close(merged[:, [2, 5]].double(), found.mean[:, [2, 5]], rtol=0, atol=1e-6)
    live = [i for i in range(12) if i not in (2, 5)]
    rest = Case([x[:, live] for x in found.inputs], [w[:, live] for w in found.models])
    torch.testing.assert_close(merged[:, live], merge(rest, 1.0), rtol=0, atol=2e-5)


def test_a_feature_dead_in_one_model_follows_the_others() -> None:
    found = case(num_models=2)
    found.inputs[0][:, 4] = 0
    assert torch.equal(merge(found, 0.0)[:, 4], found.models[1][:, 4])


def test_a_module_that_saw_no_token_is_averaged() -> None:
    found = case()
    empty = [InputGram(gram=torch.zeros(78), num_rows=0) for _ in range(3)]
    merged, report = solve_regmean(found.models, empty, weights=[1, 1, 1], alpha=0.9)
    assert (report.num_dead, report.rank) == (12, 0)
    torch.testing.assert_close(merged.double(), found.mean, rtol=0, atol=1e-6)
    # In one model only: that model does not count.
    grams = [empty[0], *found.grams[1:]]
    rest = Case(found.inputs[1:], found.models[1:])
    torch.testing.assert_close(merge(found, grams=grams), merge(rest), rtol=0, atol=1e-6)


def test_fewer_rows_than_features_is_finite_and_said() -> None:
    found = case(in_features=60, rows=(9, 6, 5))
    merged, report = solve_regmean(found.models, found.grams, weights=[1, 1, 1], alpha=1.0)
    assert report.jitter > 0 and report.is_float64
    # 20 rows; the rounding of float32 Grams may look like a direction or two.
    assert abs(report.rank - 20) <= 2
    assert merged.isfinite().all()
    # Directions that no row has stay near the mean (those of features scaled to equal size): float32
    # rounds the Grams to 2e-7 there, and the jitter against which this counts is 2e-6.
    size = sum((x * x).mean(0) for x in found.inputs)
    assert isinstance(size, torch.Tensor)
    correction = (merged.double() - found.mean) * size.sqrt()
    _, _, right = torch.linalg.svd(torch.cat(found.inputs) * size.rsqrt())
    assert float((correction @ right[20:].T).norm()) < 0.1 * float(correction.norm())
    # And the rows are fitted: the merged map is the least-squares one there.
    assert loss(merged, found.models, found.grams, 1.0) < 0.5 * loss(
        found.mean, found.models, found.grams, 1.0
    )
    report = GramSums(found.grams, [1, 1, 1], "tokens").factor(0.99).report
    assert report.jitter == 0 and report.rank == 60


def ill_conditioned(condition: float, rotated: bool, seed: int = 0) -> Case:
    """Make inputs whose singular values span `condition` (squared, as the Grams have it)."""
    generator = torch.Generator().manual_seed(seed)
    found = case(seed, 3, 20, 64, (300, 200, 400), spread=0.01)
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q
    sizes = torch.logspace(0, -0.5 * torch.log10(torch.tensor(condition)).item(), 64, dtype=torch.float64)
    for i, x in enumerate(found.inputs):
        noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        found.inputs[i] = noise * sizes @ rotation if rotated else noise * sizes
    return found


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
def test_ill_conditioned_grams_are_solved_to_1e4(condition: float, rotated: bool) -> None:
    found = ill_conditioned(condition, rotated)
    merged, report = solve_regmean(found.models, found.grams, weights=[1, 1, 1], alpha=1.0)
    expected = reference(found.models, found.grams, [1, 1, 1], 1.0, "tokens")
    assert relative(merged, expected, found.mean) < 1e-4
    least = loss(merged, found.models, found.grams, 1.0)
    assert all(least < loss(other, found.models, found.grams, 1.0) for other in (found.mean, *found.models))
    # A scale per feature costs nothing; only what is left after it counts.
    sums = GramSums(found.grams, [1, 1, 1], "tokens")
    scaled = sum(g / n.num_rows for g, n in zip(full_grams(found.grams), sums.grams, strict=True))
    assert isinstance(scaled, torch.Tensor)
    scale = scaled.diagonal().rsqrt()
    truth = float(torch.linalg.cond(scaled * scale * scale.unsqueeze(1)))
    assert 0.5 * truth < report.condition < 1.01 * truth
    assert report.is_float64 == (report.condition > positive_definite.GREATEST_FLOAT32_CONDITION)
    assert (report.condition < 100) == (not rotated)
    assert report.jitter == 0


def test_tf32_or_bfloat16_products_are_not_trusted() -> None:
    found = case()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        _, report = solve_regmean(found.models, found.grams, weights=[1, 1, 1], alpha=0.5)
    finally:
        torch.set_float32_matmul_precision(before)
    assert report.is_float64
    assert not solve_regmean(found.models, found.grams, weights=[1, 1, 1], alpha=0.5)[1].is_float64


def test_bfloat16_weights_are_merged_like_the_same_numbers_in_float32() -> None:
    found = case()
    narrow = [model.bfloat16() for model in found.models]
    assert torch.equal(
        merge(Case(found.inputs, narrow)), merge(Case(found.inputs, [model.float() for model in narrow]))
    )


def test_float64_weights_stay_float64() -> None:
    found = case()
    wide = Case(found.inputs, [model.double() for model in found.models])
    merged = merge(wide, 0.5)
    assert merged.dtype == torch.float64
    torch.testing.assert_close(merged.float(), merge(found, 0.5), rtol=0, atol=1e-6)


def test_inputs_are_left_alone() -> None:
    found = case()
    grams = found.grams
    before = [tensor.clone() for tensor in (*found.models, *(g.gram for g in grams))]
    merge(found, grams=grams)
    GramSums(grams, [1, 1, 1], "sum").factor(0.5).merge([found.models])
    after = [*found.models, *(g.gram for g in grams)]
    assert all(torch.equal(new, old) for new, old in zip(after, before, strict=True))


def test_grams_of_different_inputs_are_refused() -> None:
    found = case()
    other = [*found.grams[:2], InputGram(gram=torch.ones(10), num_rows=1, name="model 2")]
    with pytest.raises(
        MismatchError, match=r"of model 0 and model 2 are of 12 and 4 input features; all models must"
    ):
        merge(found, grams=other)
    with pytest.raises(MismatchError, match=r"are of 12 input features, the weights have 11; these are"):
        merge(Case(found.inputs, [model[:, :11] for model in found.models]), grams=found.grams)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_grams_that_are_not_finite_are_refused(value: float) -> None:
    found = case()
    grams = found.grams
    grams[1].gram[5] = value
    with pytest.raises(NotFiniteError, match=r"the Gram matrix of model 1 holds NaN or infinity"):
        merge(found, grams=grams)


def test_what_is_no_gram_matrix_is_refused() -> None:
    negative = [InputGram(gram=torch.tensor([-1.0, 0.0, 1.0]), num_rows=1, name="model 0")]
    with pytest.raises(CheckpointError, match=r"model 0 has a negative diagonal"):
        GramSums(negative, [1], "sum")
    indefinite = [InputGram(gram=torch.tensor([1.0, 2.0, 1.0]), num_rows=1, name="model 0")]
    with pytest.raises(
        CheckpointError, match=r"model 0: the sum of the Gram matrices is not positive semidef"
    ):
        GramSums(indefinite, [1], "sum").factor(1.0)


def test_too_few_rows_are_warned_of_or_refused() -> None:
    assert check_rows("q.weight", [700, 100], 768, 1.0, False) is None
    warned = check_rows("q.weight", [700, 67], 768, 0.9, False)
    assert warned == (
        "q.weight: the statistics have 767 tokens in all for 768 input features, which leaves some directions "
        "open; alpha 0.9 keeps them near the mean, more samples would be better."
    )
    with pytest.raises(RecipeError, match=r"q\.weight: .* set alpha below 1 \(0\.9\), take more samples, or"):
        check_rows("q.weight", [767], 768, 1.0, False)
    forced = check_rows("q.weight", [767], 768, 1.0, True)
    assert forced is not None and forced.endswith("they stay near the mean (force: true).")


def test_tensors_without_a_gram_are_averaged() -> None:
    bias = [torch.tensor([1.0, 2.0]), torch.tensor([5.0, -2.0])]
    values = Settings(shared={"alpha": 0.9}, models=({"weight": 1.0}, {"weight": 3.0}))
    merged = merge_tensors(REGMEAN, bias, None, values, sparsifiers={})
    assert merged.tolist() == [4.0, -1.0]


def test_the_method_as_a_recipe_sees_it() -> None:
    assert (REGMEAN.kind, REGMEAN.statistic) == ("solve", "gram")
    defaults = {parameter.name: parameter.default for parameter in REGMEAN.parameters}
    assert defaults == {"weight": 1.0, "alpha": 0.9, "normalize": "tokens", "force": False}
    assert REGMEAN.check is not None
    assert REGMEAN.check(Settings(models=({"weight": 0.0}, {"weight": 0.5}))) is None
    broken = REGMEAN.check(Settings(models=({"weight": 0.0}, {"weight": 0.0})))
    assert broken == "the weights [0.0, 0.0] sum to 0; at least one model must have a weight above 0"


@pytest.mark.parametrize(
    ("gap", "is_float64", "has_jitter"),
    [(2.0**-8, False, False), (2.0**-18, True, False), (2.0**-28, True, True)],
)
def test_a_factor_is_as_wide_as_its_condition_asks(gap: float, is_float64: bool, has_jitter: bool) -> None:
    """Two features that agree but for `gap` have the condition 2 / gap; what float32 Grams leave open gets a ridge."""
    triangle = torch.tensor([1.0, 1.0 - gap, 1.0], dtype=torch.float64)
    report = positive_definite.factorise(triangle, 2).report
    assert (report.is_float64, report.jitter > 0, report.rank) == (
        is_float64,
        has_jitter,
        1 if has_jitter else 2,
    )
    if not has_jitter:
        assert report.condition == pytest.approx(2 / gap, rel=0.02)
