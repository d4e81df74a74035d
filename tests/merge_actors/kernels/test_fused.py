"""The kernels give the bits of the eager formulas, whatever the values, shapes, slices and settings."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymerge.cluster.method_parameters import parameters_of
from raymerge.merge_actors.dtypes import from_torch_name
from raymerge.merge_actors.host_input import HostInput, host_input
from raymerge.merge_actors.kernels.build import load_kernels
from raymerge.merge_actors.kernels.fused import FusedSlice, NotFinite, fused_slice
from raymerge.merge_actors.methods import METHODS, SPARSIFIERS
from raymerge.merge_actors.methods.block import Pool, unit_elements
from raymerge.merge_actors.methods.interface import Settings
from raymerge.merge_actors.methods.prepare import TensorState
from raymerge.merge_actors.methods.slices import TensorSlice, prepare_slices
from raymerge.merge_actors.squares import sum_squares

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
#: Methods with kernels, and values for what has no default or whose default does nothing.
MODES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("linear", {}),
    ("linear", {"normalize": False}),
    ("task_arithmetic", {}),
    ("task_arithmetic", {"normalize": True, "lambda": 0.7}),
    ("dare_linear", {"density": 0.3}),
    ("dare_linear", {"density": 0.3, "rescale": False}),
    ("dare_linear", {"density": 0.0}),
    ("dare_ties", {"density": 0.6, "lambda": 1.3}),
    ("ties", {"density": 0.3}),
    ("ties", {"density": 0.0}),
    ("ties", {"density": 1.0, "normalize": False}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.1}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.0}),
    ("breadcrumbs_ties", {"density": 0.3, "gamma": 0.05}),
)
#: Steps that a recipe puts before the method's own.
SPARSIFY: tuple[Mapping[str, Any] | None, ...] = (
    None,
    None,
    {"method": "random", "density": 0.5},
    {"method": "magnitude", "density": 0.5},
)
#: Around the ends of tiles, units and runs of random words.
SHAPES = st.one_of(
    st.lists(st.integers(1, 9), max_size=3).map(tuple),
    st.sampled_from([(1023,), (1025,), (3, 65_537), (262_143,), (262_145,), (5, 90_000), (70, 5_632)]),
)
WEIGHTS = st.sampled_from([1.0, 0.5, 0.3, -0.4, 0.0, 1e-30])
_SPECIAL = (0.0, -0.0, 1e-40, -1e-40, 6e-8, 3e38, -3e38, 65_504.0, 1.0, -1.0)


def _library() -> ctypes.CDLL:
    found = load_kernels()
    assert found.library is not None, found.remark
    return found.library


def _settings(
    method: str, values: Mapping[str, Any], sparsify: Mapping[str, Any] | None, weights: Sequence[float]
) -> Settings:
    declared = parameters_of(METHODS[method])
    shared = {each.name: values.get(each.name, each.default) for each in declared.shared}
    shared |= {k: v for k, v in METHODS[method].default_mode.items() if k not in values}
    models = []
    for weight in weights:
        own = {each.name: values.get(each.name, each.default) for each in declared.per_model}
        own["weight"] = weight
        if sparsify:
            step = SPARSIFIERS[sparsify["method"]]
            own["sparsify"] = {each.name: each.default for each in step.parameters} | sparsify
        models.append(own)
    return Settings(shared=shared, models=tuple(models))


def _values(
    shape: tuple[int, ...], dtype: str, generator: torch.Generator, near: torch.Tensor | None, *, lumpy: bool
) -> torch.Tensor:
    """Return random values, near others if there are any, some of them special, many equal if lumpy."""
    values = torch.randn(shape, generator=generator)
    if lumpy:
        values = (values * 2).round()
    if near is not None:
        values = near.float() + values / 64
    flat = values.view(-1)
    places = torch.randint(0, flat.numel(), (max(1, flat.numel() // 50),), generator=generator)
    limits = torch.finfo(DTYPES[dtype])
    for number, place in enumerate(places.tolist()):
        flat[place] = max(limits.min, min(limits.max, _SPECIAL[number % len(_SPECIAL)]))
    return values.clamp(limits.min, limits.max).to(DTYPES[dtype])


def _slices(
    method: str,
    chosen: Settings,
    base: torch.Tensor | None,
    models: Sequence[torch.Tensor],
    units: int | None,
) -> tuple[list[TensorSlice], list[FusedSlice]]:
    """Return the eager and the fused slices of a tensor."""
    shape, total = tuple(models[0].shape), models[0].numel()
    step = unit_elements(shape, "elementwise") * units if units else total
    pool, keys = Pool(torch.device("cpu")), [11, 2**63 + 5, 7][: len(models)]

    def host(tensor: torch.Tensor) -> HostInput:
        return host_input(tensor, str(from_torch_name(str(tensor.dtype))))

    eager, fused = [], []
    for at in range(0, total, step):
        base_P = None if base is None else base.reshape(-1)[at : at + step]
        models_P = [model.reshape(-1)[at : at + step] for model in models]
        shared: dict[str, Any] = {
            "method": METHODS[method],
            "settings": chosen,
            "sparsifiers": SPARSIFIERS,
            "shape": shape,
            "begin": at,
            "keys": keys,
        }
        eager.append(TensorSlice(**shared, base_P=base_P, models_P=models_P, pool=pool))
        made = fused_slice(
            **shared,
            library=_library(),
            base=None if base_P is None else host(base_P),
            models=[host(model) for model in models_P],
            out_dtype="F32",
        )
        assert made is not None
        fused.append(made)
    return eager, fused


def test_each_question_is_a_pass_of_its_own() -> None:
    # Two ranks are two questions about what a step with a quota leaves.
    base = torch.zeros(10)
    model = torch.tensor([-3.0, 6.0, -2.0, -9.0, 2.0, 0.0, 0.5, 1.0, -5.0, 1.5])
    sparsify = {"method": "magnitude", "density": 0.5}
    chosen = _settings("breadcrumbs", {"density": 0.5, "gamma": 0.1}, sparsify, [1.0])
    (eager,), (fused,) = _slices("breadcrumbs", chosen, base, [model], None)
    assert prepare_slices([fused]) == prepare_slices([eager])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    mode=st.sampled_from(MODES),
    sparsify=st.sampled_from(SPARSIFY),
    shape=SHAPES,
    dtypes=st.lists(st.sampled_from(sorted(DTYPES)), min_size=5, max_size=5),
    weights=st.lists(WEIGHTS, min_size=1, max_size=3),
    units=st.sampled_from([None, 1]),
    lumpy=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_kernels_give_the_bits_of_the_eager_formulas(
    mode: tuple[str, Mapping[str, Any]],
    sparsify: Mapping[str, Any] | None,
    shape: tuple[int, ...],
    dtypes: list[str],
    weights: list[float],
    units: int | None,
    lumpy: bool,
    seed: int,
) -> None:
    method, values = mode
    generator = torch.Generator().manual_seed(seed)
    base_dtype, out_dtype, *model_dtypes = dtypes
    base = _values(shape, base_dtype, generator, None, lumpy=lumpy)
    models = [_values(shape, d, generator, base, lumpy=lumpy) for d in model_dtypes[: len(weights)]]
    is_average = METHODS[method].base == "unused"
    if is_average and sum(weights) == 0:
        weights = [1.0] * len(weights)
    chosen = _settings(method, values, None if is_average else sparsify, weights)
    eager, fused = _slices(method, chosen, None if is_average else base, models, units)
    with torch.inference_mode():
        state = prepare_slices(eager)
        wanted = [block.clone() for each in eager for _, block in each.merged_blocks(state)]
    if not all(bool(torch.isfinite(block).all()) for block in wanted):
        with pytest.raises(NotFinite):
            _merge_all(fused, out_dtype)
        return
    assert prepare_slices(fused) == state
    found, squares = _merge_all(fused, out_dtype)
    expected = torch.cat(wanted).to(DTYPES[out_dtype])
    assert found.tobytes() == host_input(expected, out_dtype).data.tobytes()
    assert squares == [sum_squares(block) for block in wanted]


def _merge_all(slices: Sequence[FusedSlice], dtype: str) -> tuple[np.ndarray[Any, Any], list[float]]:
    state = prepare_slices(slices)
    width = DTYPES[dtype].itemsize
    parts = [np.empty(each.num_elements * width, np.uint8) for each in slices]
    squares = [each.merge(state, part, dtype) for each, part in zip(slices, parts, strict=True)]
    return np.concatenate(parts), np.concatenate(squares).tolist()


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("special", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("in_base", [True, False])
def test_an_input_that_is_not_finite_goes_to_the_eager_formulas(
    dtype: str, special: float, in_base: bool
) -> None:
    base = torch.ones(3000, dtype=DTYPES[dtype])
    model = base + 1
    (base if in_base else model)[2047] = special
    # Most of all where the mask would hide it.
    chosen = _settings("ties", {"density": 0.4}, None, [1.0])
    _, (fused,) = _slices("ties", chosen, base, [model], None)
    with pytest.raises(NotFinite):
        prepare_slices([fused])
    with pytest.raises(NotFinite):
        fused.merge(TensorState(), np.empty(6000, np.uint8), "BF16")


@pytest.mark.parametrize("bits", range(0, 1 << 16, 1 << 12))
def test_every_half_precision_value_is_rounded_like_torch(bits: int) -> None:
    # 4,096 patterns of each 16-bit type, and sums that lie between two of them.
    patterns = torch.arange(bits, bits + (1 << 12), dtype=torch.int32).to(torch.int16)
    for dtype in ("BF16", "F16"):
        values = patterns.view(DTYPES[dtype])
        values = torch.where(values.abs() < torch.finfo(DTYPES[dtype]).max / 4, values, 0)
        between = values.float() * (1 + 2.0**-9)
        chosen = _settings("linear", {"normalize": False}, None, [1.0, 1.0])
        _, (fused,) = _slices("linear", chosen, None, [values, between], None)
        wanted = values.float() + between
        out = np.empty(2 * len(values), np.uint8)
        fused.merge(TensorState(), out, dtype)
        assert out.tobytes() == host_input(wanted.to(DTYPES[dtype]), dtype).data.tobytes()


@pytest.mark.parametrize(
    ("method", "values", "sparsify"),
    [
        ("slerp", {"t": 0.5}, None),
        ("ties", {"merge_func": "max"}, None),
        ("ties", {"density": 0.5, "rescale": True}, None),
        ("dare_linear", {"density": 0.5, "rescale": "l1"}, None),
        ("dare_linear", {"density": 0.5, "mask_target": "weights"}, None),
        ("dare_linear", {"density": 0.5, "mask_strategy": "magnitude"}, None),
        ("della", {"density": 0.5}, None),
        ("task_arithmetic", {}, {"method": "della", "density": 0.5}),
        ("linear", {}, {"method": "random", "density": 0.5}),
    ],
)
def test_what_the_kernels_lack_is_left_to_the_eager_formulas(
    method: str, values: Mapping[str, Any], sparsify: Mapping[str, Any] | None
) -> None:
    ones = host_input(torch.ones(8), "F32")
    found = fused_slice(
        library=_library(),
        method=METHODS[method],
        settings=_settings(method, values, sparsify, [1.0]),
        sparsifiers=SPARSIFIERS,
        shape=(8,),
        begin=0,
        base=ones,
        models=[ones],
        keys=[1],
        out_dtype="F32",
    )
    assert found is None
