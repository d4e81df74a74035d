"""Sum of squares of a unit, in an order that the eager formulas and the kernels share.

Element i of the unit is squared in float64, which is exact for a float32, and added to lane
i mod 256; then the second half of the lanes is added to the first until one is left.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

_LANES = 256


def sum_squares(values_P: torch.Tensor) -> float:
    """Sum the squares of a flat float32 or float64 tensor, of one unit on a CPU.

    On a GPU a block spans many units, and the device's own order serves.
    """
    if values_P.device.type != "cpu":
        return float(values_P.double().square_().sum())
    squares = values_P.numpy().astype(np.float64)
    np.multiply(squares, squares, out=squares)
    whole = len(squares) // _LANES * _LANES
    lanes = np.add.reduce(squares[:whole].reshape(-1, _LANES), axis=0)
    lanes[: len(squares) - whole] += squares[whole:]
    half = _LANES // 2
    while half:
        lanes[:half] += lanes[half : 2 * half]
        half //= 2
    return float(lanes[0])
