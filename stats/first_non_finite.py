"""Find the first linear map, and the sample, whose input is NaN or infinite."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from raymerge.stats.batches import Batch
from raymerge.stats.linear_maps import LinearMap

if TYPE_CHECKING:
    import torch


class FirstNonFinite:
    """Hooks on the linear maps of a pass, for a run that is known to go wrong."""

    def __init__(self, model: Any, maps: Sequence[LinearMap]) -> None:
        """Set the hooks; the experts of a fused tensor are no modules and have none."""
        self.layer = ""
        """Name of the weight; empty as long as all is finite."""
        self.sample = ""
        """Which sample of the batch, in words."""
        self._batch: Batch | None = None
        self._handles = [
            model.get_submodule(each.module).register_forward_pre_hook(self._hook_of(each))
            for each in maps
            if each.kind != "experts"
        ]

    def __enter__(self) -> FirstNonFinite:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, batch: Batch) -> None:
        """Expect the inputs of a batch."""
        self._batch = batch

    def _hook_of(self, linear_map: LinearMap) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(module: Any, arguments: tuple[Any, ...]) -> None:
            if not self.layer and not bool(arguments[0].isfinite().all()):
                self.layer, self.sample = linear_map.label, self._name(arguments[0])

        return hook

    def _name(self, input_tensor: torch.Tensor) -> str:
        assert self._batch is not None
        examples = self._batch.examples
        if len(examples) > 1 and input_tensor.shape[0] != len(examples):
            return f"one of the samples {', '.join(str(each.number) for each in examples)}"
        is_finite = input_tensor.reshape(input_tensor.shape[0], -1).isfinite().all(dim=1)
        found = [
            each.number for each, is_good in zip(examples, is_finite.tolist(), strict=False) if not is_good
        ]
        return f"sample {min(found or [examples[0].number])}"
