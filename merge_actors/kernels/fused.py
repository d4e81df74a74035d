"""A slice of one tensor, measured and merged by the compiled kernels.

It does what `methods.slices.TensorSlice` does, on bytes in host memory, without torch: so a
worker whose methods all have kernels never waits for torch to be imported.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from raymerge.merge_actors.dtypes import element_bytes
from raymerge.merge_actors.host_input import HostInput
from raymerge.merge_actors.methods.block import unit_elements
from raymerge.merge_actors.methods.interface import Measure, Method, Settings, Sparsifier, Summary
from raymerge.merge_actors.methods.kernel_formula import KernelFormula, KernelStep
from raymerge.merge_actors.methods.prepare import TensorState, steps_of
from raymerge.merge_actors.methods.selection import Answer, Question, collect_answers, collect_sample
from raymerge.merge_actors.methods.thinning import magnitude
from raymerge.merge_actors.randomness import step_key

_TILE = 1024
_MOST_STEPS = 4
#: Elements that are stored at once, and so perhaps behind what was found.
_SPARE = 16
_DTYPES = {"F32": 0, "BF16": 1, "F16": 2}
_STEPS = {"zero": 0, "random": 1, "largest": 2, "not largest": 3}
_FORMULAS = {"sum": 0, "sum agreeing": 1, "average": 2}


class NotFinite(Exception):
    """An input or a result holds NaN or infinity: the eager formulas deal with it."""


class _Input(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("dtype", ctypes.c_int64))


class _Step(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int64),
        ("key", ctypes.c_uint64),
        ("limit", ctypes.c_int64),
        ("pattern", ctypes.c_int64),
        ("cut_begin", ctypes.c_int64),
        ("cut_end", ctypes.c_int64),
        ("quota", ctypes.c_int64),
        ("num_taken", ctypes.c_int64),
        ("factor", ctypes.c_double),
    )


class _Model(ctypes.Structure):
    _fields_ = (
        ("input", _Input),
        ("weight", ctypes.c_double),
        ("num_steps", ctypes.c_int64),
        ("steps", _Step * _MOST_STEPS),
    )


class _Slice(ctypes.Structure):
    _fields_ = (
        ("base", _Input),
        ("models", ctypes.POINTER(_Model)),
        ("num_models", ctypes.c_int64),
        ("num_elements", ctypes.c_int64),
        ("begin", ctypes.c_int64),
        ("unit", ctypes.c_int64),
        ("scratch", ctypes.c_void_p),
    )


class _Formula(ctypes.Structure):
    _fields_ = (
        ("formula", ctypes.c_int64),
        ("scale", ctypes.c_double),
        ("divisor", ctypes.c_double),
        ("is_mean", ctypes.c_int64),
        ("least_divisor", ctypes.c_double),
        ("cancelled", ctypes.c_double),
        ("out", ctypes.c_void_p),
        ("out_dtype", ctypes.c_int64),
        ("unit_squares", ctypes.c_void_p),
        ("direction", ctypes.c_void_p),
        ("is_known", ctypes.c_int64),
    )


class _Question(ctypes.Structure):
    _fields_ = (
        ("low", ctypes.c_int64),
        ("high", ctypes.c_int64),
        ("above", ctypes.c_int64),
        ("lumps", ctypes.c_int64 * 2),
        ("num_lumps", ctypes.c_int64),
        ("shift", ctypes.c_int64),
        ("num_above", ctypes.c_void_p),
        ("lump_counts", ctypes.c_void_p),
        ("num_inside", ctypes.c_void_p),
        ("inside", ctypes.c_void_p),
        ("histogram", ctypes.c_void_p),
    )


@dataclass(frozen=True, kw_only=True)
class FusedSlice:
    """One slice of one tensor whose method and steps all have kernels; see `fused_slice`."""

    library: ctypes.CDLL
    method: Method
    settings: Settings
    sparsifiers: Mapping[str, Sparsifier]
    formula: KernelFormula
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    begin: int
    """Index in the tensor of the slice's first element; a multiple of the unit."""
    base: HostInput | None
    models: Sequence[HostInput]
    keys: Sequence[int]
    """Key of each model's random stream for this tensor."""

    @property
    def num_elements(self) -> int:
        """Elements of the slice."""
        first = self.models[0]
        return len(first.data) // element_bytes(first.dtype)

    @property
    def unit(self) -> int:
        """Elements of a unit of the tensor."""
        return unit_elements(self.shape, "elementwise")

    def measure(self, measure: Measure, state: TensorState) -> Summary:
        """Answer one question of a preparation for this slice.

        Raises:
            NotFinite: an input holds NaN or infinity.
        """
        of = measure.arguments
        assert of["values"] is magnitude, "a step with a kernel orders magnitudes of deltas"
        index, step = of["arguments"]["index"], of["arguments"]["step"]
        given = self._slice([index], state, step)
        if measure.collect is collect_sample:
            return self._sample(given, of["stride"])
        assert measure.collect is collect_answers, measure.collect
        return [self._answer(given, question) for question in of["questions"]]

    def merge(
        self,
        state: TensorState,
        out: NDArray[np.uint8],
        dtype: str,
        direction: NDArray[np.float32] | None = None,
        *,
        is_known: bool = False,
    ) -> NDArray[np.float64]:
        """Merge the slice into `out`, rounded to `dtype`; return the sum of squares of each unit before that.

        Args:
            state: what was measured.
            out: as long as the slice in `dtype`.
            dtype: safetensors name.
            direction: keeps what the formula's scale multiplies; None does not.
            is_known: it is in `direction` already: neither state nor models are looked at.

        Raises:
            NotFinite: an input or the result holds NaN or infinity.
        """
        squares = np.empty(self._num_units)
        asked = self.formula
        formula = _Formula(
            formula=_FORMULAS[asked.kind],
            scale=asked.scale,
            divisor=asked.divisor,
            is_mean=asked.is_mean,
            least_divisor=asked.least_divisor,
            cancelled=asked.cancelled,
            out=out.ctypes.data,
            out_dtype=_DTYPES[dtype],
            unit_squares=squares.ctypes.data,
            direction=None if direction is None else direction.ctypes.data,
            is_known=is_known,
        )
        given = self._slice([] if is_known else range(len(self.models)), state, None)
        is_finite = self.library.raymerge_merge(ctypes.byref(given.struct), ctypes.byref(formula))
        if not is_finite or not np.isfinite(squares).all():
            raise NotFinite
        return squares

    @property
    def _num_units(self) -> int:
        return -(-self.num_elements // self.unit)

    def _sample(self, given: _Given, stride: int) -> NDArray[np.int32]:
        sampled = np.empty(self._num_units * -(-self.unit // stride), np.int32)
        count = self.library.raymerge_sample(
            ctypes.byref(given.struct), ctypes.c_int64(stride), ctypes.c_void_p(sampled.ctypes.data)
        )
        if count < 0:
            raise NotFinite
        return sampled[:count]

    def _answer(self, given: _Given, asked: Question) -> Answer:
        low, high = asked.range_without_lumps()
        num_units, num_lumps = self._num_units, len(asked.lumps)
        num_above = np.zeros(1, np.int64)
        lump_counts, num_inside = np.zeros((num_units, num_lumps), np.int64), np.zeros(num_units, np.int64)
        is_histogram = asked.shift is not None
        num_buckets = ((asked.high - asked.low) >> asked.shift) + 1 if asked.shift is not None else 0
        histogram = np.zeros(num_buckets, np.int64)
        # Untouched pages of it cost nothing.
        inside = np.empty(0 if is_histogram else self.num_elements + _SPARE, np.int32)
        question = _Question(
            low=low,
            high=high,
            above=asked.high,
            lumps=(ctypes.c_int64 * 2)(*asked.lumps),
            num_lumps=num_lumps,
            shift=-1 if asked.shift is None else asked.shift,
            num_above=num_above.ctypes.data,
            lump_counts=lump_counts.ctypes.data,
            num_inside=num_inside.ctypes.data,
            inside=inside.ctypes.data,
            histogram=histogram.ctypes.data,
        )
        if not self.library.raymerge_answer(ctypes.byref(given.struct), ctypes.byref(question)):
            raise NotFinite
        found = inside[: int(num_inside.sum())].copy()
        return Answer(int(num_above[0]), lump_counts, num_inside, found, histogram if is_histogram else None)

    def _slice(self, indices: Sequence[int], state: TensorState, num_stages: int | None) -> _Given:
        """Describe the slice with some models and their first stages to the kernels."""
        steps = steps_of(self.method, self.settings, self.sparsifiers)
        models = (_Model * len(indices))()
        for model, index in zip(models, indices, strict=True):
            model.input = _input(self.models[index])
            model.weight = self.formula.weights[index]
            for number, (sparsifier, parameters) in enumerate(steps[index][:num_stages]):
                assert sparsifier.kernel is not None
                asked = sparsifier.kernel(parameters, state.stages.get((index, number)))
                assert asked is not None
                for step in asked:
                    model.steps[model.num_steps] = self._step(step, step_key(self.keys[index], number))
                    model.num_steps += 1
        scratch = np.empty((len(indices) + 4) * _TILE, np.float32)
        struct = _Slice(
            base=_Input(None, 0) if self.base is None else _input(self.base),
            models=models,
            num_models=len(indices),
            num_elements=self.num_elements,
            begin=self.begin,
            unit=self.unit,
            scratch=scratch.ctypes.data,
        )
        return _Given(struct, models, scratch)

    def _step(self, step: KernelStep, key: int) -> _Step:
        made = _Step(kind=_STEPS[step.kind], key=key, limit=step.limit, factor=step.factor)
        cut = step.cut
        if cut is not None:
            made.pattern = int(np.float32(cut.value).view(np.uint32))
            begin = self.num_elements if cut.unit is None else cut.unit * self.unit - self.begin
            made.cut_begin, made.cut_end, made.quota = begin, begin + self.unit, cut.quota
        return made


class _Given(NamedTuple):
    """A slice for the kernels, and what must live as long."""

    struct: _Slice
    models: Any
    scratch: NDArray[np.float32]


def fused_slice(
    *,
    library: ctypes.CDLL,
    method: Method,
    settings: Settings,
    sparsifiers: Mapping[str, Sparsifier],
    shape: tuple[int, ...],
    begin: int,
    base: HostInput | None,
    models: Sequence[HostInput],
    keys: Sequence[int],
    out_dtype: str,
) -> FusedSlice | None:
    """Return the slice if the kernels have its method, all steps and all element types, else None."""
    inputs = [*models, *(() if base is None else (base,))]
    if out_dtype not in _DTYPES or any(each.dtype not in _DTYPES for each in inputs):
        return None
    formula = method.kernel(settings) if method.kernel else None
    steps = steps_of(method, settings, sparsifiers)
    if formula is None or (formula.kind == "average" and any(steps)):
        return None
    for of_model in steps:
        asked = [step.kernel(parameters, None) if step.kernel else None for step, parameters in of_model]
        # Two kernel steps at most come of one sparsifier.
        if None in asked or 2 * len(asked) > _MOST_STEPS:
            return None
    return FusedSlice(
        library=library,
        method=method,
        settings=settings,
        sparsifiers=sparsifiers,
        formula=formula,
        shape=shape,
        begin=begin,
        base=base,
        models=models,
        keys=keys,
    )


def _input(given: HostInput) -> _Input:
    return _Input(given.data.ctypes.data, _DTYPES[given.dtype])
