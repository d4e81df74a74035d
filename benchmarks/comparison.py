"""Compare two merged checkpoints tensor by tensor, and both with the formula in float64.

The two need not be equal: under `dtype: bfloat16` the peer adds in bf16, raymerge in float32 with
one rounding at the end. So elements are compared exactly, in units in the last place of bf16,
and, where the method is a plain sum, with the exact result. DARE's masks are random: there the
share of elements that every mask dropped and the expectation of the kept deltas are compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from floor import weight_files
from recipes import WEIGHTS
from safetensors import safe_open

_CHUNK = 1 << 22


@dataclass(slots=True)
class Differences:
    """What separates two checkpoints, over all elements of all tensors."""

    num_tensors: int = 0
    num_elements: int = 0
    num_equal: int = 0
    num_within_one_ulp: int = 0
    num_ours_exact: int = 0
    num_theirs_exact: int = 0
    max_difference: float = 0.0
    only_in_one: list[str] = field(default_factory=list)
    """Tensors that one of the two lacks, or has in another shape."""

    def row(self, method: str, *, has_exact: bool) -> list[str]:
        """Return the cells of the report's table."""
        share = [f"{n / self.num_elements:.4%}" for n in (self.num_equal, self.num_within_one_ulp)]
        exact = [f"{n / self.num_elements:.4%}" for n in (self.num_ours_exact, self.num_theirs_exact)]
        return [
            method,
            f"{self.num_tensors}",
            f"{len(self.only_in_one)}",
            f"{self.max_difference:.3g}",
            *share,
            *(exact if has_exact else ("-", "-")),
        ]


HEADER = (
    "method",
    "tensors",
    "only in one",
    "max abs difference",
    "equal",
    "within 1 ulp",
    "raymerge exact",
    "mergekit exact",
)


def has_exact_result(method: str) -> bool:
    """Say whether `compare` can compute the method's exact result."""
    return method in ("linear", "task_arithmetic")


def compare(ours: Path, theirs: Path, method: str, base: Path, fine_tunes: Sequence[Path]) -> Differences:
    """Compare two outputs of one recipe."""
    found = Differences()
    with ExitStack() as stack:
        left, right, root, *models = (
            _Checkpoint(stack, folder) for folder in (ours, theirs, base, *fine_tunes)
        )
        for name in sorted({*left.files, *right.files}):
            if name not in left.files or name not in right.files or left.shape(name) != right.shape(name):
                found.only_in_one.append(name)
                continue
            found.num_tensors += 1
            for begin, end in _chunks(left.shape(name)):
                a, b = left.read(name, begin, end), right.read(name, begin, end)
                _count(found, a, b)
                if has_exact_result(method):
                    exact = _exact(method, root, models, name, begin, end).to(a.dtype)
                    found.num_ours_exact += int((a == exact).sum())
                    found.num_theirs_exact += int((b == exact).sum())
    return found


def dare_statistics(merged: Path, base: Path, fine_tunes: Sequence[Path], density: float) -> dict[str, Any]:
    """Estimate from a DARE merge what its masks did.

    Returns:
        `dropped_by_all`: share of elements equal to the base among those where every delta is
        large enough to be seen (expected: (1 - density)^models), and `scale`: per model the
        least-squares factor of its weighted delta in the merged delta (expected: 1).
    """
    num_seen = num_unmoved = 0
    size = len(fine_tunes)
    normal, right_side = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    with ExitStack() as stack:
        out, root, *models = (_Checkpoint(stack, folder) for folder in (merged, base, *fine_tunes))
        for name in sorted(out.files):
            if len(out.shape(name)) < 2:  # deltas of the norms vanish in bf16
                continue
            for begin, end in _chunks(out.shape(name)):
                origin = root.read(name, begin, end).double()
                moved = out.read(name, begin, end).double() - origin
                deltas_MP = torch.stack([model.read(name, begin, end).double() - origin for model in models])
                # Half a bf16 step of the base is the least move that rounding lets through.
                weighted_MP = deltas_MP * torch.tensor(WEIGHTS, dtype=torch.float64).unsqueeze(1)
                is_seen = (weighted_MP.abs() > origin.abs() * 2**-8).all(dim=0)
                num_seen += int(is_seen.sum())
                num_unmoved += int((is_seen & (moved == 0)).sum())
                normal += weighted_MP @ weighted_MP.T
                right_side += weighted_MP @ moved
    scale = torch.linalg.solve(normal, right_side).tolist()
    return {
        "dropped_by_all": num_unmoved / max(1, num_seen),
        "expected_dropped_by_all": (1 - density) ** size,
        "elements_seen": num_seen,
        "scale": [round(value, 4) for value in scale],
    }


class _Checkpoint:
    """Rows of named tensors from a folder's safetensors files."""

    def __init__(self, stack: ExitStack, folder: Path) -> None:
        self.files: dict[str, Any] = {}
        for path in weight_files(folder):
            handle = stack.enter_context(safe_open(path, "pt"))
            self.files |= dict.fromkeys(handle.keys(), handle)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.files[name].get_slice(name).get_shape())

    def read(self, name: str, begin: int, end: int) -> torch.Tensor:
        if not self.shape(name):
            return self.files[name].get_tensor(name).reshape(1)  # type: ignore[no-any-return]
        return self.files[name].get_slice(name)[begin:end].reshape(-1)  # type: ignore[no-any-return]


def _chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    rows = shape[0] if shape else 1
    step = max(1, _CHUNK // max(1, math.prod(shape[1:])))
    return ((begin, min(rows, begin + step)) for begin in range(0, rows, step))


def _count(found: Differences, a: torch.Tensor, b: torch.Tensor) -> None:
    found.num_elements += a.numel()
    found.num_equal += int((a == b).sum())
    found.num_within_one_ulp += int((ulps(a, b.to(a.dtype)) <= 1).sum())
    found.max_difference = max(found.max_difference, float((a.double() - b.double()).abs().max()))


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Count the representable numbers between two tensors of one 16- or 32-bit float dtype."""
    bits = torch.int16 if a.element_size() == 2 else torch.int32
    return (_ordered(a.contiguous().view(bits)) - _ordered(b.contiguous().view(bits))).abs()


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    # Sign and magnitude to an integer that grows with the float; +0 and -0 coincide.
    low = torch.iinfo(bits.dtype).min
    wide = bits.to(torch.int64)
    return torch.where(wide < 0, low - wide, wide)


def _exact(
    method: str, base: _Checkpoint, models: Sequence[_Checkpoint], name: str, begin: int, end: int
) -> torch.Tensor:
    values = [model.read(name, begin, end).double() for model in models]
    if method == "linear":
        return sum((w * x for w, x in zip(WEIGHTS, values, strict=True)), torch.zeros(())) / sum(WEIGHTS)
    origin = base.read(name, begin, end).double()
    return origin + sum((w * (x - origin) for w, x in zip(WEIGHTS, values, strict=True)), torch.zeros(()))


def summary_of(differences: Mapping[str, Differences]) -> dict[str, dict[str, Any]]:
    """Return the counts as plain data."""
    return {
        method: {name: getattr(found, name) for name in Differences.__slots__}
        for method, found in differences.items()
    }
