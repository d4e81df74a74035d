"""The order in which a tensor is measured before it is merged.

Sparsifying steps are measured level by level (a step sees the deltas that the earlier steps
leave), all models of a level together; the method itself comes last. `preparation` is a
generator over *rounds*: the worker answers its questions from the slice it holds, the driver
by sending tasks. Both run this same code.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from raymerge.merge_actors.methods.interface import (
    Measure,
    Method,
    Prepare,
    Settings,
    Sparsifier,
    State,
    Summary,
    Value,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorState:
    """What is known about a whole tensor; empty at first, complete before the formula runs."""

    stages: Mapping[tuple[int, int], State] = field(default_factory=dict)
    """(model, step) -> what the sparsifying step needs to know."""
    method: State = None


@dataclass(frozen=True, slots=True)
class Round:
    """Questions to ask of every slice at once, and the state they may rely on."""

    measures: tuple[Measure, ...]
    state: TensorState


#: yields a Round, is sent for each of its measures the summaries of all slices
Preparation = Generator[Round, list[list[Summary]], TensorState]


def steps_of(
    method: Method, settings: Settings, sparsifiers: Mapping[str, Sparsifier]
) -> list[list[tuple[Sparsifier, Mapping[str, Value]]]]:
    """Return per model its sparsifying steps: the recipe's own first, then the method's."""
    steps = []
    for model in settings.models:
        asked: Any = model.get("sparsify")
        own = [(sparsifiers[asked["method"]], asked)] if asked else []
        steps.append(own + ([(method.sparsifier, model)] if method.sparsifier else []))
    return steps


def model_wide_steps(
    method: Method, settings: Settings, sparsifiers: Mapping[str, Sparsifier]
) -> list[tuple[int, int]]:
    """Return the (model, step) pairs whose measure is taken over all tensors of the recipe."""
    return [
        (i, s)
        for i, steps in enumerate(steps_of(method, settings, sparsifiers))
        for s, (step, parameters) in enumerate(steps)
        if step.is_model_wide is not None and step.is_model_wide(parameters)
    ]


def model_wide_preparation(
    method: Method, settings: Settings, num_elements: int, sparsifiers: Mapping[str, Sparsifier]
) -> Preparation:
    """Measure the model-wide steps of a recipe; `num_elements` counts all merged tensors."""
    steps = steps_of(method, settings, sparsifiers)
    running: dict[Any, Prepare] = {}
    for model, number in model_wide_steps(method, settings, sparsifiers):
        step, parameters = steps[model][number]
        found = step.prepare(parameters, model, number, num_elements) if step.prepare else None
        if found is not None:
            running[model, number] = found
    stages = yield from _together(running, TensorState())
    return TensorState(stages=stages)


def needs_preparation(method: Method, settings: Settings, sparsifiers: Mapping[str, Sparsifier]) -> bool:
    """Return whether the tensor must be measured before it can be merged."""
    if method.prepare is not None and method.prepare(settings) is not None:
        return True
    return any(
        step.prepare is not None and step.prepare(parameters, i, s, 1) is not None
        for i, steps in enumerate(steps_of(method, settings, sparsifiers))
        for s, (step, parameters) in enumerate(steps)
    )


def preparation(
    method: Method,
    settings: Settings,
    num_elements: int,
    sparsifiers: Mapping[str, Sparsifier],
    known: TensorState | None = None,
) -> Preparation:
    """Measure one tensor for one method; `known` holds states that were found model-wide."""
    stages: dict[tuple[int, int], State] = dict(known.stages) if known else {}
    steps = steps_of(method, settings, sparsifiers)
    for level in range(max((len(s) for s in steps), default=0)):
        running: dict[Any, Prepare] = {}
        for model, of_model in enumerate(steps):
            if level < len(of_model) and (model, level) not in stages:
                step, parameters = of_model[level]
                found = step.prepare(parameters, model, level, num_elements) if step.prepare else None
                if found is not None:
                    running[model, level] = found
        stages |= yield from _together(running, TensorState(stages=dict(stages)))
    state = None
    own = method.prepare(settings) if method.prepare else None
    if own is not None:
        result = yield from _together({"method": own}, TensorState(stages=dict(stages)))
        state = result["method"]
    return TensorState(stages=stages, method=state)


def _together(
    running: dict[Any, Prepare], state: TensorState
) -> Generator[Round, list[list[Summary]], dict[Any, State]]:
    """Run several generators side by side, one round at a time, so slices are read once a round."""
    states: dict[Any, State] = {}
    questions: dict[Any, Measure] = {}
    for key, generator in running.items():
        try:
            questions[key] = next(generator)
        except StopIteration as stop:
            states[key] = stop.value
    while questions:
        answers = yield Round(tuple(questions.values()), state)
        asked, questions = questions, {}
        for key, answer in zip(asked, answers, strict=True):
            try:
                questions[key] = running[key].send(answer)
            except StopIteration as stop:
                states[key] = stop.value
    return states
