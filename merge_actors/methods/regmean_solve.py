"""Solve RegMean for the matrices that share an input: the mean of the models and a correction.

    A = sum_m c_m G~_m,    G~ = alpha G + (1 - alpha) diag G,    c_m = weight_m / rows_m, or weight_m
    W* = Wbar + (sum_m c_m (W_m - Wbar) G~_m) A^-1

which in exact arithmetic is RegMean, and in floating point much closer to it than the quotient of
the sums. A feature that is never active stays at the mean; directions that too few rows leave
open stay near it, as far as the rounding of float32 Grams allows.

    GramSums        A for any alpha, from one pass over the Grams; one per input
    .factor(alpha)  one factorisation, for all matrices that share the input (q, k, v) and all rows
    .merge(...)     the matrices, whole or cut between output rows

Output rows are independent. They are computed in blocks of `ROW_UNIT`; where every cut lies at
a multiple of it the result does not depend on the cuts, bit for bit, on one kind of device and
with one number of threads (BLAS picks its order of adding by both). Other cuts change the last
bits of the correction to the mean.

Memory beside the Grams as given: a triangle in float64, then a factor (I, I) and one unpacked
Gram (I, I) in the factor's dtype, and two tensors of the shape of the rows asked for.

Shape letters: M models, O out features, I in features, R rows of one block, T elements of a
packed triangle. A matrix is `Linear.weight`, (O, I), unless it is said to be transposed, (I, O),
as Conv1D stores it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymerge.merge_actors.errors import CheckpointError, MismatchError, NotFiniteError
from raymerge.merge_actors.methods.gram_matrix import (
    diagonal_places,
    pack_upper,
    packed_diagonal,
    triangle_elements,
    triangle_features,
    unpack_upper,
)
from raymerge.merge_actors.methods.positive_definite import Factor, FactorReport, factorise

if TYPE_CHECKING:
    import torch

#: Output rows that are computed together; cut matrices at multiples of it.
ROW_UNIT = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class InputGram:
    """What one model's data say about the input of a linear map."""

    gram: torch.Tensor
    """Sum of x x^T over the rows: a packed triangle (T,) or a full matrix (I, I), float32."""
    num_rows: int
    """How many inputs were summed."""
    name: str = "a model"
    """Model and module, for errors."""

    def packed(self) -> torch.Tensor:
        """Return the packed triangle (T,)."""
        return self.gram if self.gram.dim() == 1 else pack_upper(self.gram)


class GramSums:
    """The matrix A for any alpha: sum_m c_m G_m, one pass over the Grams.

    Holds one packed triangle in float64 beside the Grams. `grams` may be a sequence that reads an
    element when it is asked for: each is asked for once here and once for every call of `merge`, and
    let go before the next. A model of weight 0 or without rows is not asked for again.
    """

    def __init__(self, grams: Sequence[InputGram], weights: Sequence[float], normalize: str) -> None:
        """Add the Grams.

        Args:
            grams: one per model, on one device.
            weights: one per model, none negative, not all 0.
            normalize: "tokens" divides each Gram by its number of rows, "sum" does not.

        Raises:
            MismatchError: the Grams are of different inputs.
            NotFiniteError: a Gram holds NaN or infinity.
            CheckpointError: a diagonal is negative.
        """
        import torch

        assert len(grams) == len(weights) and min(weights) >= 0 and sum(weights) > 0, weights
        assert normalize in ("tokens", "sum"), normalize
        self.grams = grams
        self.weights = list(weights)
        self.factors: list[float] = []
        self.names: list[str] = []
        triangle_T: torch.Tensor | None = None
        for gram, weight in zip(grams, weights, strict=True):
            packed_T = gram.packed()
            if triangle_T is None:
                self.in_features = triangle_features(packed_T.numel())
                triangle_T = torch.zeros_like(packed_T, dtype=torch.float64)
            _check(packed_T, gram.name, self.in_features, self.names)
            divisor = gram.num_rows if normalize == "tokens" else 1
            self.factors.append(weight / divisor if gram.num_rows else 0.0)
            self.names.append(gram.name)
            triangle_T.add_(packed_T, alpha=self.factors[-1])
        assert triangle_T is not None
        self.triangle_T = triangle_T

    @property
    def name(self) -> str:
        """What an error calls these statistics."""
        return " + ".join(self.names)

    def unpacked(self, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
        """Walk over the models that count: yields (model, c G as a full matrix that may be overwritten)."""
        for model, factor in enumerate(self.factors):
            if factor > 0:
                gram_II = unpack_upper(self.grams[model].packed(), self.in_features, dtype)
                yield model, gram_II.mul_(factor)

    def factor(self, alpha: float) -> RegMeanFactor:
        """Factorise A for one alpha.

        Args:
            alpha: in [0, 1]; the share of the off-diagonal that is kept.

        Raises:
            CheckpointError: the Grams are far from positive semidefinite.
        """
        assert 0 <= alpha <= 1, alpha
        places_I = diagonal_places(self.in_features, self.triangle_T.device)
        shrunk_T = self.triangle_T * alpha
        shrunk_T[places_I] = self.triangle_T[places_I]
        factor = factorise(shrunk_T, self.in_features, self.name)
        return RegMeanFactor(sums=self, alpha=alpha, factor=factor)


@dataclass(frozen=True, kw_only=True, slots=True)
class RegMeanFactor:
    """One factorised A; merges every matrix that has this input."""

    sums: GramSums
    alpha: float
    factor: Factor

    @property
    def report(self) -> FactorReport:
        """How well the data determine the result."""
        return self.factor.report

    def merge(
        self, matrices: Sequence[Sequence[torch.Tensor]], *, is_transposed: bool = False
    ) -> list[torch.Tensor]:
        """Merge matrices, or rows of them, that share the input; each Gram is unpacked once for all.

        Args:
            matrices: for each matrix one tensor (O, I) per model, any float dtype, any device; of a
                cut matrix rows that begin at a multiple of `ROW_UNIT`.
            is_transposed: the tensors are (I, O), and cut between columns.

        Returns:
            For each matrix the merged one in the layout of the inputs: float32, float64 for float64 inputs.
        """
        sets = [_Rows(models, self.sums, is_transposed, self.factor.dtype) for models in matrices]
        crosses = [rows.zeros(self.factor.dtype) for rows in sets]
        for model, gram_II in self.sums.unpacked(self.factor.dtype):
            _shrink(gram_II, self.alpha)
            for rows, cross_OI in zip(sets, crosses, strict=True):
                for begin, end in rows.blocks():
                    cross_OI[begin:end].addmm_(rows.about_mean(model, begin, end).to(gram_II.dtype), gram_II)
        return [rows.merged(cross_OI, self.factor) for rows, cross_OI in zip(sets, crosses, strict=True)]


class _Rows:
    """One matrix in every model, as rows (O, I), measured from the mean.

    All differences are taken from one model's weights before anything else, where they are exact
    or nearly so (fine-tuned weights are close); so copies of a model give that model.
    """

    def __init__(
        self, models: Sequence[torch.Tensor], sums: GramSums, is_transposed: bool, dtype: torch.dtype
    ) -> None:
        import torch

        first = models[0].T if is_transposed else models[0]
        assert len(models) == len(sums.weights) and all(each.shape == models[0].shape for each in models)
        if first.shape[1] != sums.in_features:
            raise MismatchError(
                f"{sums.name}: the Gram matrices are of {sums.in_features} input features, "
                f"the weights have {first.shape[1]}; these are statistics of another module."
            )
        self.num_rows = first.shape[0]
        self._models, self._sums, self._is_transposed = models, sums, is_transposed
        self._is_double = any(each.dtype == torch.float64 for each in models)
        self._dtype = torch.float64 if self._is_double else dtype
        self._anchor = next(i for i, weight in enumerate(sums.weights) if weight > 0)
        self._mean_OI = self.zeros(self._dtype)
        for begin, end in self.blocks():
            for model, weight in enumerate(sums.weights):
                if weight > 0:
                    self._mean_OI[begin:end].add_(self._from_anchor(model, begin, end), alpha=weight)
            self._mean_OI[begin:end].div_(sum(sums.weights))

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Walk over the rows: yields [begin, end)."""
        for begin in range(0, self.num_rows, ROW_UNIT):
            yield begin, min(begin + ROW_UNIT, self.num_rows)

    def zeros(self, dtype: torch.dtype) -> torch.Tensor:
        """Return zeros (O, I) where the Grams lie."""
        import torch

        return torch.zeros(
            self.num_rows, self._sums.in_features, dtype=dtype, device=self._sums.triangle_T.device
        )

    def about_mean(self, model: int, begin: int, end: int) -> torch.Tensor:
        """Return W_m - Wbar for some rows, in a tensor of its own."""
        return self._from_anchor(model, begin, end).sub_(self._mean_OI[begin:end])

    def merged(self, cross_OI: torch.Tensor, factor: Factor) -> torch.Tensor:
        """Return Wbar + cross A^-1 in the layout of the inputs, rounded once."""
        import torch

        dtype = torch.float64 if self._is_double else torch.float32
        out = torch.empty(self._models[0].shape, dtype=dtype, device=cross_OI.device)
        out_OI = out.T if self._is_transposed else out
        for begin, end in self.blocks():
            correction_RI = factor.solve_rows(cross_OI[begin:end].to(factor.dtype)).to(self._dtype)
            correction_RI += self._mean_OI[begin:end]
            out_OI[begin:end] = correction_RI.add_(self._read(self._anchor, begin, end))
        return out

    def _from_anchor(self, model: int, begin: int, end: int) -> torch.Tensor:
        rows_RI = self._read(model, begin, end)
        return rows_RI.sub_(rows_RI if model == self._anchor else self._read(self._anchor, begin, end))

    def _read(self, model: int, begin: int, end: int) -> torch.Tensor:
        """Return rows of a model in memory of their own: a BLAS may go by the alignment of its inputs."""
        import torch

        stored = self._models[model]
        rows_RI = stored[:, begin:end].T if self._is_transposed else stored[begin:end]
        copy_RI = torch.empty(rows_RI.shape, dtype=self._dtype, device=self._sums.triangle_T.device)
        return copy_RI.copy_(rows_RI)


def _shrink(gram_II: torch.Tensor, alpha: float) -> None:
    """Scale the off-diagonal by alpha."""
    diagonal_I = gram_II.diagonal().clone()
    gram_II.mul_(alpha).diagonal().copy_(diagonal_I)


def _check(packed_T: torch.Tensor, name: str, in_features: int, earlier: Sequence[str]) -> None:
    if packed_T.numel() != triangle_elements(in_features):
        raise MismatchError(
            f"the Gram matrices of {earlier[0]} and {name} are of {in_features} and "
            f"{triangle_features(packed_T.numel())} input features; all models must have the same."
        )
    if not bool(packed_T.isfinite().all()):
        raise NotFiniteError(
            f"the Gram matrix of {name} holds NaN or infinity; its statistics must be computed again."
        )
    if bool((packed_diagonal(packed_T, in_features) < 0).any()):
        raise CheckpointError(
            f"the Gram matrix of {name} has a negative diagonal, which no sum of squares has; its statistics "
            "must be computed again."
        )
