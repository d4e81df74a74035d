"""What holds for every method of the registry, in every mode that changes how it computes.

A mode is a method with some parameters set; a method that is added to the registry is tested
in its defaults, and a test fails if it needs a value that stands in no mode.
"""

import math
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from raymerge.cluster.method_parameters import parameters_of
from raymerge.merge_actors.methods import METHODS as REGISTRY
from raymerge.merge_actors.methods import SPARSIFIERS, block
from raymerge.merge_actors.methods.block import Pool, unit_elements
from raymerge.merge_actors.methods.interface import Method, Parameter, Settings
from raymerge.merge_actors.methods.prepare import TensorState, preparation
from raymerge.merge_actors.methods.slices import TensorSlice, merge_tensors, split_of
from raymerge.merge_actors.randomness import stream_key

#: Methods that need statistics have tests of their own.
METHODS = {name: method for name, method in REGISTRY.items() if method.statistic is None}
WEIGHTS = (0.7, 0.4, 1.3)
NAMES = ("first", "second", "third")


@dataclass(frozen=True, kw_only=True)
class Mode:
    """A method and the parameters that differ from its defaults."""

    method: str
    values: Mapping[str, Any] = field(default_factory=dict)
    sparsify: Mapping[str, Any] | None = None
    """A sparsifying step before the method: its name as `method`, and its parameters."""
    keeps_copies: bool = True
    """Do N copies of a model, each with weight 1, give that model?"""

    @property
    def num_models(self) -> int:
        """Return how many models to merge."""
        return min(3, METHODS[self.method].num_models[1] or 3)

    @property
    def needs_base(self) -> bool:
        """Return whether there is a base."""
        return METHODS[self.method].base != "unused" or self.sparsify is not None

    def settings(self, weights: tuple[float, ...] = WEIGHTS) -> Settings:
        """Return the mode's settings, resolved as a recipe's are."""
        method = METHODS[self.method]
        declared = parameters_of(method)
        shared = {each.name: self._value(each) for each in declared.shared}
        models = []
        for weight in weights[: self.num_models]:
            own = {each.name: self._value(each) for each in declared.per_model}
            if "weight" in own:
                own["weight"] = weight
            if self.sparsify:
                step = SPARSIFIERS[self.sparsify["method"]]
                own["sparsify"] = {each.name: each.default for each in step.parameters} | self.sparsify
            models.append(own)
        return Settings(shared=shared, models=tuple(models))

    def _value(self, parameter: Parameter) -> Any:
        value = self.values.get(parameter.name, parameter.default)
        assert value is not None or not parameter.required or parameter.name == "weight", (
            f"{self.method} needs a value of {parameter.name}: add a mode"
        )
        return value


MODES = {
    "slerp": Mode(method="slerp", values={"t": 0.4}),
    "nuslerp": Mode(method="nuslerp"),
    "nuslerp last axis": Mode(method="nuslerp", values={"nuslerp_flatten": False}),
    "nuslerp first axis": Mode(method="nuslerp", values={"nuslerp_flatten": False, "nuslerp_row_wise": True}),
    "model_stock rows": Mode(method="model_stock", values={"filter_wise": True}),
    "nearswap": Mode(method="nearswap", values={"t": 0.05}, keeps_copies=False),
    "nearswap far": Mode(method="nearswap", values={"t": 1e3}),
    "task_arithmetic": Mode(method="task_arithmetic", keeps_copies=False),
    "task_arithmetic mean": Mode(method="task_arithmetic", values={"normalize": True}),
    "ties": Mode(method="ties", values={"density": 0.3}, keeps_copies=False),
    "ties whole": Mode(method="ties"),
    "ties max": Mode(method="ties", values={"merge_func": "max"}),
    "ties rescaled": Mode(method="ties", values={"density": 0.3, "rescale": True}, keeps_copies=False),
    "dare_linear": Mode(method="dare_linear", values={"density": 0.3}, keeps_copies=False),
    "dare_linear l1": Mode(
        method="dare_linear", values={"density": 0.3, "rescale": "l1"}, keeps_copies=False
    ),
    "dare_linear weights": Mode(
        method="dare_linear", values={"density": 0.3, "mask_target": "weights"}, keeps_copies=False
    ),
    "dare_linear magnitude": Mode(
        method="dare_linear", values={"density": 0.3, "mask_strategy": "magnitude"}, keeps_copies=False
    ),
    "dare_ties": Mode(method="dare_ties", values={"density": 0.3}, keeps_copies=False),
    "della_linear": Mode(method="della_linear", values={"density": 0.4}, keeps_copies=False),
    "della": Mode(method="della", values={"density": 0.4}, keeps_copies=False),
    "breadcrumbs": Mode(method="breadcrumbs", values={"density": 0.4, "gamma": 0.1}, keeps_copies=False),
    "breadcrumbs_ties": Mode(
        method="breadcrumbs_ties", values={"density": 0.4, "gamma": 0.1}, keeps_copies=False
    ),
    "sce selected": Mode(method="sce", values={"select_topk": 0.3}, keeps_copies=False),
    "ramplus_tl": Mode(method="ramplus_tl", values={"r": 0.5, "epsilon": 0.01}, keeps_copies=False),
    "ram": Mode(method="ram", values={"epsilon": 0.01}, keeps_copies=False),
    "arcee_fusion": Mode(method="arcee_fusion", keeps_copies=False),
    "linear of thinned": Mode(
        method="linear", sparsify={"method": "random", "density": 0.5}, keeps_copies=False
    ),
    "slerp of thinned by rows": Mode(
        method="slerp", values={"t": 0.4}, sparsify={"method": "della", "density": 0.5}, keeps_copies=False
    ),
    "karcher of trimmed": Mode(
        method="karcher", sparsify={"method": "magnitude", "density": 0.5}, keeps_copies=False
    ),
    "nuslerp first axis of thinned by rows": Mode(
        method="nuslerp",
        values={"nuslerp_flatten": False, "nuslerp_row_wise": True},
        sparsify={"method": "della", "density": 0.5},
        keeps_copies=False,
    ),
    "ties of thinned": Mode(
        method="ties",
        values={"density": 0.3},
        sparsify={"method": "random", "density": 0.8, "rescale": "l1"},
        keeps_copies=False,
    ),
}
MODES |= {
    name: Mode(method=name)
    for name in sorted(set(METHODS) - {mode.method for mode in MODES.values() if not mode.sparsify})
}

every_mode = pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
every_method = pytest.mark.parametrize("name", METHODS)


def family(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, num_models: int = 3
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Return a base and models whose deltas share a direction."""
    generator = torch.Generator().manual_seed(seed)
    base, common = (torch.randn(shape, generator=generator) for _ in range(2))
    models = [base + 0.2 * (common + torch.randn(shape, generator=generator)) for _ in range(num_models)]
    return base.to(dtype), [model.to(dtype) for model in models]


def merge(
    mode: Mode, base: torch.Tensor, models: list[torch.Tensor], slice_units: int | None = None, **more: Any
) -> torch.Tensor:
    return merge_tensors(
        METHODS[mode.method],
        models[: mode.num_models],
        base if mode.needs_base else None,
        more.pop("values", mode.settings()),
        sparsifiers=SPARSIFIERS,
        model_names=more.pop("names", NAMES[: mode.num_models]),
        slice_units=slice_units,
        **more,
    )


@every_method
def test_declarations_are_sound(name: str) -> None:
    method = METHODS[name]
    assert method.name == name
    assert method.num_models[0] >= 1
    declared = [*method.parameters, *(method.sparsifier.parameters if method.sparsifier else ())]
    names = [spelling for each in declared for spelling in (each.name, *each.aliases)]
    assert len(names) == len(set(names))
    assert set(method.default_mode) <= set(names)
    for parameter in declared:
        _check_declaration(parameter)
        _check_value(parameter, method.default_mode.get(parameter.name, parameter.default))


@pytest.mark.parametrize("name", SPARSIFIERS)
def test_declarations_of_sparsifiers_are_sound(name: str) -> None:
    assert SPARSIFIERS[name].name == name
    for parameter in SPARSIFIERS[name].parameters:
        _check_declaration(parameter)
        _check_value(parameter, parameter.default)


def _check_declaration(parameter: Parameter) -> None:
    assert parameter.doc, parameter.name
    assert parameter.kind in (float, int, bool, str)
    assert not (parameter.required and parameter.default is not None)
    assert parameter.choices or parameter.kind is not str
    if parameter.minimum is not None and parameter.maximum is not None:
        assert parameter.minimum < parameter.maximum


def _check_value(parameter: Parameter, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, str):
        assert value in parameter.choices
        return
    assert isinstance(value, (int, float) if parameter.kind is float else parameter.kind)
    if parameter.minimum is not None:
        assert value > parameter.minimum or (value == parameter.minimum and not parameter.exclusive_minimum)
    if parameter.maximum is not None:
        assert value < parameter.maximum or (value == parameter.maximum and not parameter.exclusive_maximum)


@every_mode
def test_tensors_that_did_not_move_stay(mode: Mode) -> None:
    if mode.values.get("mask_target") == "weights":
        pytest.skip("drops elements of the weights themselves")
    base, _ = family((6, 9), torch.float32)
    weights = (1.0, 1.0, 1.0)
    merged = merge(mode, base, [base.clone() for _ in range(3)], values=mode.settings(weights))
    # Bit-equal with a base; a mean of three copies is rounded when summed and when divided.
    tolerance = 0.0 if METHODS[mode.method].base == "required" else 1e-6
    torch.testing.assert_close(merged, base, rtol=tolerance, atol=0)


@pytest.mark.parametrize(
    "mode", [mode for mode in MODES.values() if mode.keeps_copies], ids=lambda mode: mode.method
)
def test_copies_of_one_model_give_that_model(mode: Mode) -> None:
    base, (model, *_) = family((6, 9), torch.float64)
    weights = (1.0, 1.0, 1.0)
    if METHODS[mode.method].num_models == (1, 1) and mode.method == "slerp":
        base = model.clone()
    merged = merge(mode, base, [model.clone() for _ in range(3)], values=mode.settings(weights))
    # Float64 elements of order 1; ram leaves moves below its epsilon of 1e-5 out.
    torch.testing.assert_close(merged, model, rtol=0, atol=1e-14)


@every_mode
@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from([(), (1,), (63,), (64,), (300,), (1, 200), (40, 7), (9, 64), (3, 70), (4, 5, 17)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    slice_units=st.integers(1, 6),
    seed=st.integers(0, 99),
)
def test_slices_do_not_change_a_bit(
    mode: Mode,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    slice_units: int,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Units of 64 elements, so that small tensors have many.
    monkeypatch.setattr(block, "UNIT", 64)
    base, models = family(shape, dtype, seed)
    whole = merge(mode, base, models)
    assert whole.shape == shape
    assert whole.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert whole.isfinite().all()
    assert torch.equal(whole, merge(mode, base, models, slice_units))


@every_mode
@pytest.mark.parametrize("shape", [(150, 1000), (140_000,)])
def test_slices_of_whole_units_do_not_change_a_bit(mode: Mode, shape: tuple[int, ...]) -> None:
    base, models = family(shape, torch.bfloat16)
    assert torch.equal(merge(mode, base, models), merge(mode, base, models, slice_units=1))


@every_mode
def test_empty_tensors(mode: Mode) -> None:
    for shape in ((0,), (0, 4), (3, 0)):
        base, models = family(shape, torch.bfloat16)
        merged = merge(mode, base, models)
        assert merged.shape == shape
        assert merged.dtype == torch.float32


@every_mode
def test_inputs_are_left_alone(mode: Mode) -> None:
    for dtype in (torch.float32, torch.float64):
        base, models = family((5, 8), dtype)
        before = [tensor.clone() for tensor in (base, *models)]
        merge(mode, base, models)
        assert all(torch.equal(new, old) for new, old in zip((base, *models), before, strict=True))


@every_mode
def test_dtypes_may_differ(mode: Mode) -> None:
    base, models = family((5, 8), torch.bfloat16)
    wide = [models[0].float(), models[1].bfloat16(), models[2].float()]
    # The same numbers, so the same result.
    assert torch.equal(merge(mode, base.float(), wide), merge(mode, base, models))
    assert merge(mode, base, [models[0].double(), *models[1:]]).dtype == torch.float64


@every_mode
def test_order_of_models_does_not_matter_where_the_method_says_so(mode: Mode) -> None:
    method = METHODS[mode.method]
    if not method.is_symmetric or mode.num_models == 1:
        pytest.skip("one model, or an order that matters")
    base, models = family((7, 12), torch.float64)
    values = mode.settings()
    turned = Settings(shared=values.shared, models=values.models[::-1])
    count = mode.num_models
    merged = merge(mode, base, models)
    backwards = merge(mode, base, models[:count][::-1], values=turned, names=NAMES[:count][::-1])
    # Sums in another order, in float64; only the planner's sorting makes them bit-equal.
    torch.testing.assert_close(backwards, merged, rtol=0, atol=1e-13)


@every_mode
def test_what_travels_between_driver_and_workers_can_be_pickled(mode: Mode) -> None:
    base, models = family((200, 1000), torch.float32)
    method, values = METHODS[mode.method], mode.settings()
    unit = unit_elements((200, 1000), split_of(method, values, SPARSIFIERS))
    slices = [
        _slice(method, values, base if mode.needs_base else None, models[: mode.num_models], at, unit)
        for at in range(0, base.numel(), unit)
    ]
    questions = preparation(method, _through_pickle(values), base.numel(), SPARSIFIERS)
    state = TensorState()
    try:
        asked = _through_pickle(next(questions))
        while True:
            answers = [[_through_pickle(s.measure(m, asked.state)) for s in slices] for m in asked.measures]
            asked = _through_pickle(questions.send(answers))
    except StopIteration as stop:
        state = _through_pickle(stop.value)
    parts = [merged.clone() for piece in slices for _, merged in piece.merged_blocks(state)]
    assert torch.equal(torch.cat(parts).view(200, 1000), merge(mode, base, models))


def _slice(
    method: Method,
    values: Settings,
    base: torch.Tensor | None,
    models: list[torch.Tensor],
    at: int,
    unit: int,
) -> TensorSlice:
    return TensorSlice(
        method=method,
        settings=values,
        sparsifiers=SPARSIFIERS,
        shape=tuple(models[0].shape),
        begin=at,
        base_P=None if base is None else base.view(-1)[at : at + unit],
        models_P=[model.view(-1)[at : at + unit] for model in models],
        keys=[stream_key(0, name, "tensor") for name in NAMES[: len(models)]],
        pool=Pool(torch.device("cpu")),
    )


def _through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def _ends() -> list[Any]:
    """Return a case for each end of each parameter's range, and for each word or switch."""
    cases = []
    for name, method in METHODS.items():
        declared = parameters_of(method)
        for parameter in {each.name: each for each in (*declared.shared, *declared.per_model)}.values():
            values: list[Any] = list(parameter.choices)
            if parameter.kind is bool:
                values += [False, True]
            if parameter.minimum is not None and not parameter.exclusive_minimum:
                values.append(parameter.kind(parameter.minimum))
            if parameter.maximum is not None and not parameter.exclusive_maximum:
                values.append(parameter.kind(parameter.maximum))
            cases += [
                pytest.param(name, parameter.name, v, id=f"{name}-{parameter.name}-{v}") for v in values
            ]
    return cases


@pytest.mark.parametrize(("name", "parameter", "value"), _ends())
def test_ends_of_every_range_are_finite(name: str, parameter: str, value: Any) -> None:
    usual = next(mode for mode in MODES.values() if mode.method == name and not mode.sparsify)
    mode = Mode(method=name, values={**usual.values, parameter: value})
    check, values = METHODS[name].check, mode.settings()
    broken = check(values) if check else None
    if broken is not None:
        assert broken.count(" ") > 3  # a sentence
        return
    base, models = family((6, 9), torch.float32)
    assert merge(mode, base, models).isfinite().all()
    frozen = merge(mode, base, [base.clone() for _ in models])
    assert frozen.isfinite().all()


@every_mode
def test_elements_of_any_size_are_merged(mode: Mode) -> None:
    # Subnormal in float32 when squared, and near the end of float16 and beyond: norms are in float64.
    for scale in (1e-30, 1e4, 1e15):
        base, models = family((6, 9), torch.float32)
        merged = merge(mode, base * scale, [model * scale for model in models])
        assert merged.isfinite().all()
        assert not math.isclose(float(merged.abs().max()), 0.0, abs_tol=scale * 1e-3)
