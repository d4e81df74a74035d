"""One bad number among good ones is counted, whatever its sign, its type and its place."""

from __future__ import annotations

import math

import pytest
import torch

from raymerge.merge_actors.dtypes import element_bytes, from_torch_name
from raymerge.merge_actors.host_input import host_input
from raymerge.merge_actors.nonfinite import count_nonfinite, holds_only_finite, write_one_nan

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e5m2, torch.float8_e4m3fn]


def _bad(dtype: torch.dtype) -> list[torch.Tensor]:
    found = [torch.tensor([math.nan]).to(dtype)]
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        found.append(torch.tensor([math.inf]).to(dtype))
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[found[0].element_size()]
    sign = -(1 << (8 * found[0].element_size() - 1))
    return found + [(each.view(integers) | sign).view(dtype) for each in found]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", [0, 1000, -1])
def test_one_bad_number_is_found(dtype: torch.dtype, place: int) -> None:
    largest = torch.finfo(dtype).max
    for bad in _bad(dtype):
        values = torch.linspace(-1, 1, 2001).to(dtype)
        values[5], values[6] = largest, -largest
        name = from_torch_name(str(dtype)) or ""
        assert count_nonfinite(values) == 0
        values[place] = bad[0]
        assert count_nonfinite(values) == 1
        if element_bytes(name) > 1:
            assert not holds_only_finite(host_input(values, name))
            values[place] = 0
            assert holds_only_finite(host_input(values, name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_nan_is_written_alike(dtype: torch.dtype) -> None:
    values = torch.tensor([math.nan, 1.0, -math.nan, 2.0])
    values.view(torch.int32)[2] = -1  # negative, and another payload
    stored = values.to(dtype)
    write_one_nan(stored, values)
    patterns = [bytes(each.view(torch.uint8).tolist()) for each in stored.split(1)]
    assert patterns[0] == patterns[2] and stored.double()[0].isnan()
    assert stored.double()[[1, 3]].tolist() == [1.0, 2.0]
