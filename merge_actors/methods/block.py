"""A block: one run of elements of one tensor in every model, as a formula sees it.

Tensors are processed in units of about 262,144 elements: small enough for their float32
copies to stay in cache, large enough that Python's cost per operation does not count. A unit
is a fixed piece of the tensor (`unit_elements` counts from the tensor's first element), so
sums taken per unit never depend on how the tensor was cut into slices. On a CPU a block is one
unit; on a GPU it is many.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.methods.interface import Settings, Sparsifier, State, Value
from raymerge.merge_actors.randomness import step_key

if TYPE_CHECKING:
    import torch

#: Elements of a unit: 1 MiB of float32 scratch, some of which fit a cache at once.
UNIT = 1 << 18
#: A row longer than this is cut like a flat tensor by elementwise methods.
_LONGEST_ROW = 1 << 20


def unit_elements(shape: Sequence[int], split: str) -> int:
    """Return the number of elements of one unit of a tensor: whole rows where it has rows.

    Args:
        shape: the whole tensor's shape; a row is its last axis.
        split: how the method may cut it, "elementwise" or "rowwise".
    """
    columns = shape[-1] if shape else 1
    if split == "elementwise" and (len(shape) < 2 or columns > _LONGEST_ROW):
        return UNIT
    return max(1, UNIT // max(1, columns)) * max(1, columns)


class Pool:
    """Scratch tensors that are handed out block by block and used again for the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: dict[torch.dtype, list[torch.Tensor]] = {}
        self._used: dict[torch.dtype, int] = {}

    def take(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        """Return an uninitialised tensor of `num_elements`, valid until the next `reset`."""
        import torch

        buffers = self._free.setdefault(dtype, [])
        used = self._used.get(dtype, 0)
        if used == len(buffers):
            buffers.append(torch.empty(max(num_elements, UNIT), dtype=dtype, device=self.device))
        elif buffers[used].numel() < num_elements:
            buffers[used] = torch.empty(num_elements, dtype=dtype, device=self.device)
        self._used[dtype] = used + 1
        return buffers[used][:num_elements]

    def mark(self) -> dict[torch.dtype, int]:
        """Return a mark; `release` takes back what was handed out after it."""
        return dict(self._used)

    def release(self, mark: dict[torch.dtype, int]) -> None:
        """Take back every scratch tensor that was handed out after the mark."""
        self._used = mark

    def reset(self) -> None:
        """Take every scratch tensor back."""
        self._used.clear()


@dataclass(frozen=True, slots=True)
class Stage:
    """One sparsifying step of one model, ready to apply."""

    sparsifier: Sparsifier
    parameters: Mapping[str, Value]
    state: State = None


class Block:
    """Elements [begin, end) of one tensor in all models.

    A formula asks for what it needs: `base()`, `model(i)`, `delta(i)`. Each is converted to
    the compute dtype (float32; float64 if an input is float64) on demand, and the recipe's
    sparsifying steps are already in it: `delta(i)` is the thinned delta and `model(i)` is
    base + thinned delta. Tensors come back flat for an elementwise method, and of shape
    (rows, columns) for a rowwise one. What `base()` returns is shared: never write to it.
    """

    def __init__(
        self,
        *,
        raw_base_P: torch.Tensor | None,
        raw_models_P: Sequence[torch.Tensor],
        begin: int,
        shape: Sequence[int],
        unit: int,
        settings: Settings,
        stages: Sequence[Sequence[Stage]],
        keys: Sequence[int],
        state: State,
        pool: Pool,
        is_rowwise: bool,
        raw_statistics_P: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        import torch

        raws = [*raw_models_P, *([] if raw_base_P is None else [raw_base_P])]
        self.dtype = torch.float64 if any(r.dtype == torch.float64 for r in raws) else torch.float32
        self.begin = begin
        self.num_elements = raws[0].numel()
        self.tensor_shape = tuple(shape)
        self.unit = unit
        self.settings = settings
        self.keys = keys
        self.state = state
        self._raw_base_P = raw_base_P
        self._raw_models_P = raw_models_P
        self._raw_statistics_P = raw_statistics_P
        self._stages = stages
        self._pool = pool
        columns = max(1, shape[-1]) if len(shape) else 1
        self.block_shape = (self.num_elements // columns, columns) if is_rowwise else (self.num_elements,)
        self._base: torch.Tensor | None = None

    @property
    def num_models(self) -> int:
        """Number of models, without the base."""
        return len(self._raw_models_P)

    @property
    def has_base(self) -> bool:
        """Return whether there is a base model."""
        return self._raw_base_P is not None

    @property
    def shared(self) -> Mapping[str, Value]:
        """Return the parameters given once."""
        return self.settings.shared

    def number(self, name: str) -> float:
        """Return a shared parameter as a float."""
        value = self.settings.shared[name]
        assert value is not None and not isinstance(value, str), name
        return float(value)

    def numbers(self, name: str) -> list[float]:
        """Return a parameter of each model as floats, in the order of the models."""
        return [float(model[name]) for model in self.settings.models]  # type: ignore[arg-type]

    def scratch(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return an uninitialised tensor of the block's shape that lives as long as the block."""
        return self._pool.take(self.num_elements, dtype or self.dtype).view(self.block_shape)

    def zeros(self) -> torch.Tensor:
        """Return zeros of the block's shape."""
        return self.scratch().zero_()

    def base(self) -> torch.Tensor:
        """Return the base's elements; shared between callers, not to be written to."""
        if self._base is None:
            assert self._raw_base_P is not None
            self._base = self._convert(self._raw_base_P, None)
        return self._base

    def model(self, index: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return model `index`, in `out` or in fresh scratch that the caller may overwrite."""
        if self._stages[index]:
            return self.delta(index, out).add_(self.base())
        return self._convert(self._raw_models_P[index], self.scratch() if out is None else out)

    def delta(
        self, index: int, out: torch.Tensor | None = None, num_stages: int | None = None
    ) -> torch.Tensor:
        """Return model `index` minus the base, sparsified, in `out` or in fresh scratch.

        Args:
            index: which model.
            out: where to put it, of the block's shape; else fresh scratch.
            num_stages: apply only the first so many sparsifying steps (measuring needs it).
        """
        delta = self._convert(self._raw_models_P[index], self.scratch() if out is None else out)
        delta.sub_(self.base())
        for step, stage in enumerate(self._stages[index][:num_stages]):
            mark = self._pool.mark()
            delta = stage.sparsifier.apply(
                delta, stage.parameters, self.step_key(index, step), self, stage.state
            )
            self._pool.release(mark)
        return delta

    def statistic(self, index: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return what was measured for each element of model `index`, in `out` or in fresh scratch."""
        raw_P = self._raw_statistics_P[index] if self._raw_statistics_P else None
        assert raw_P is not None, index
        return self._convert(raw_P, self.scratch() if out is None else out)

    def step_key(self, index: int, step: int) -> int:
        """Return the key of the random stream of one sparsifying step of model `index`."""
        return step_key(self.keys[index], step)

    def strided(self, stride: int) -> Block:
        """Return every `stride`-th element as a flat block, before any sparsifying step: a cheap sample."""
        return Block(
            raw_base_P=None if self._raw_base_P is None else self._raw_base_P[::stride],
            raw_models_P=[raw[::stride] for raw in self._raw_models_P],
            begin=self.begin,
            shape=(),
            unit=self.unit,
            settings=self.settings,
            stages=[()] * self.num_models,
            keys=self.keys,
            state=self.state,
            pool=self._pool,
            is_rowwise=False,
        )

    def unit_sums(self, values: torch.Tensor) -> NDArray[np.float64]:
        """Sum `values` (of the block's shape) over each unit, in float64: shape (units,)."""
        import torch

        return self._sum_units(self._pool.take(self.num_elements, torch.float64).copy_(values.reshape(-1)))

    def _sum_units(self, flat_P: torch.Tensor) -> NDArray[np.float64]:
        """Sum a float64 vector over each unit; it is overwritten."""
        whole = self.num_elements // self.unit * self.unit
        parts = [flat_P[:whole].view(-1, self.unit)] if whole else []
        if whole < self.num_elements:
            parts.append(flat_P[whole:].view(1, -1))
        sums = [sum_rows(part).cpu().numpy() for part in parts]
        return np.concatenate(sums) if sums else np.zeros(0)

    def unit_dots(self, first: torch.Tensor, second: torch.Tensor) -> NDArray[np.float64]:
        """Dot two tensors over each unit, products and sums in float64: shape (units,)."""
        import torch

        product = self._pool.take(self.num_elements, torch.float64)
        if first.dtype == torch.float64 == second.dtype:
            torch.mul(first.reshape(-1), second.reshape(-1), out=product)
        else:
            product.copy_(first.reshape(-1))
            product.mul_(product if first is second else second.reshape(-1))
        return self._sum_units(product)

    def _convert(self, raw_P: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        if out is None:
            if raw_P.dtype == self.dtype:
                return raw_P.view(self.block_shape)
            out = self.scratch()
        return out.copy_(raw_P.view(self.block_shape))


def fsum_columns(summaries: Iterable[NDArray[np.float64]]) -> list[float]:
    """Add the per-unit sums of all slices exactly: arrays (units, K) -> K correctly rounded sums."""
    table = np.concatenate(list(summaries))
    columns = table.T if table.ndim == 2 else table[np.newaxis]
    return [math.fsum(column) for column in columns.tolist()]


def sum_rows(values_RC: torch.Tensor) -> torch.Tensor:
    """Sum each row of a float64 matrix, always in the same order; `values_RC` is overwritten.

    torch's own sum splits a lone row among its threads, and picks its order on a GPU by the
    number of rows, so a sum would depend on the machine's cores and on the slice.
    """
    import torch

    if values_RC.device.type == "cpu":
        return torch.from_numpy(np.add.reduce(values_RC.numpy(), axis=1))
    return halve_rows(values_RC)


def halve_rows(values_RC: torch.Tensor) -> torch.Tensor:
    """Sum each row by adding its second half to its first until one column is left."""
    columns = values_RC.shape[1]
    if columns == 0:
        return values_RC.sum(dim=1)
    while columns > 1:
        half = columns // 2
        values_RC[:, :half] += values_RC[:, columns - half : columns]
        columns -= half
    return values_RC[:, 0].clone()
