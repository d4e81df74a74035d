"""See the inputs of experts whose matrices are slices of one parameter.

There is no module to hook: the experts' forward takes a slice and multiplies. While it runs,
torch's functions are watched for products with a slice of the parameter; the slice's place in the
parameter's memory tells the expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from raymerge.stats.linear_maps import LinearMap

#: see(map, expert, input_RI)
See = Callable[[LinearMap, int, torch.Tensor], None]
_PRODUCTS = (torch.nn.functional.linear, torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__)


class ExpertProducts:
    """Hooks that switch the watching on while an experts' module runs."""

    def __init__(self, module: Any, maps: Sequence[LinearMap], see: See) -> None:
        self._mode: _Watching | None = None
        self._parameters = {each.parameter.rsplit(".", 1)[1]: each for each in maps}
        self._see = see
        self.handles = [
            module.register_forward_pre_hook(self._begin),
            module.register_forward_hook(self._end, always_call=True),
        ]

    def _begin(self, module: Any, arguments: Any) -> None:
        places = {getattr(module, name).data_ptr(): each for name, each in self._parameters.items()}
        self._mode = _Watching(module, places, self._see)
        self._mode.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, module: Any, arguments: Any, output: Any) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode = None


class _Watching(TorchFunctionMode):
    def __init__(self, module: Any, places: dict[int, LinearMap], see: See) -> None:
        super().__init__()
        self._module, self._places, self._see = module, places, see

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], torch.Tensor) and args[1].ndim == 2:
            self._match(args[0], args[1])
        return func(*args, **(kwargs or {}))

    def _match(self, input_RI: torch.Tensor, weight: torch.Tensor) -> None:
        begin = weight.untyped_storage().data_ptr()
        for place, linear_map in self._places.items():
            parameter = getattr(self._module, linear_map.parameter.rsplit(".", 1)[1])
            if parameter.untyped_storage().data_ptr() != begin:
                continue
            offset_bytes = weight.data_ptr() - place
            expert_bytes = parameter.stride(0) * parameter.element_size()
            if 0 <= offset_bytes < parameter.shape[0] * expert_bytes and input_RI.shape[0]:
                self._see(linear_map, offset_bytes // expert_bytes, input_RI)
                return
