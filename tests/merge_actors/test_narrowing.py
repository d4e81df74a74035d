"""Values beyond the range of narrow output types are counted as the rounding treats them."""

from __future__ import annotations

import pytest
import torch

from raymerge.merge_actors.dtypes import NARROW, torch_dtype
from raymerge.merge_actors.narrowing import beyond_warning, count_beyond, saturates


@pytest.mark.parametrize("dtype", sorted(NARROW))
def test_what_is_counted_is_what_rounding_loses(dtype: str) -> None:
    largest = torch.finfo(torch_dtype(dtype)).max
    near = torch.linspace(0.9 * largest, 1.2 * largest, 4001, dtype=torch.float64)
    edges = torch.tensor([65520.0, 61440.0, 464.0, 448.0, 0.0, 1e30], dtype=torch.float64)
    values = torch.cat([near, -near, edges])
    for value in values.split(1):
        stored = value.to(torch_dtype(dtype)).double()
        if saturates(dtype):
            lost = float(value.abs()) > 464
        else:
            lost = not bool(stored.isfinite())
        assert count_beyond(value, dtype) == lost, value
    assert count_beyond(torch.tensor([float("nan"), float("inf")]), dtype) == 0  # not a matter of range


def test_wide_types_lose_nothing() -> None:
    for dtype in ("BF16", "F32", "F64"):
        assert count_beyond(torch.tensor([3e38]), dtype) == 0


def test_the_warning_says_what_became_of_them() -> None:
    assert beyond_warning(1200, "w", "F8_E4M3") == (
        "1,200 values of tensor w are beyond the range of F8_E4M3 and became 448, its largest value; choose another "
        "out_dtype, such as bfloat16"
    )
    assert "became infinite" in beyond_warning(1, "w", "F16")
