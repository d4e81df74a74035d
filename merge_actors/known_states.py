"""What was found out about whole tensors, kept from merge to merge: thresholds and norms.

A sparsifying step of one model depends on that model's delta, the parameters of the step and of those before
it, and the random stream; not on weights, lambda or the other models. So points of a grid that differ in those
are measured once. The key is all of that, so a state is taken over where it would come out the same; a digest of it,
since what a threshold over the whole model depends on are all tensors of the model.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import xxhash

from raymerge.merge_actors.methods.interface import Method, Settings, Sparsifier, State
from raymerge.merge_actors.methods.prepare import TensorState, model_wide_steps, steps_of
from raymerge.merge_actors.task import Job, Piece

#: States that are kept; about three hundred bytes each.
_MOST_STATES = 200_000

#: A piece of a tensor and the job that asks.
Measured = tuple[Piece, Job]


class KnownStates:
    """States of sparsifying steps, by everything that they depend on."""

    def __init__(self, sparsifiers: Mapping[str, Sparsifier], most_states: int = _MOST_STATES) -> None:
        """Take the registry of steps and the number of states to keep; the oldest go first."""
        self._sparsifiers, self._most_states = sparsifiers, most_states
        self._states: OrderedDict[bytes, State] = OrderedDict()
        self._lock = threading.Lock()
        self.num_reused = 0
        """Times that a state was taken over."""

    def recall(
        self, tensors: Sequence[Measured], method: Method, settings: Settings, known: TensorState
    ) -> TensorState:
        """Return `known` with the states of steps that were measured before.

        Args:
            tensors: what would be measured: one tensor, or all tensors of a recipe; pieces of one may repeat.
            method: the method.
            settings: its settings for these tensors.
            known: what is known already.
        """
        keys = self._keys(tensors, method, settings, known)
        with self._lock:
            found = {
                place: self._states[key]
                for place, key in keys.items()
                if key in self._states and place not in known.stages
            }
            self.num_reused += len(found)
        return TensorState(stages={**known.stages, **found}, method=known.method) if found else known

    def keep(
        self,
        tensors: Sequence[Measured],
        method: Method,
        settings: Settings,
        state: TensorState,
        known: TensorState,
    ) -> None:
        """Keep the states of steps that were measured on these tensors.

        Args:
            tensors: as for `recall`.
            method: the method.
            settings: its settings for these tensors.
            state: what is known now.
            known: what was known before, from wherever.
        """
        if state.stages.keys() <= known.stages.keys():
            return
        keys = self._keys(tensors, method, settings, known)
        with self._lock:
            for place, found in state.stages.items():
                if place not in known.stages:
                    self._states[keys[place]] = found
            while len(self._states) > self._most_states:
                self._states.popitem(last=False)

    def _keys(
        self, tensors: Sequence[Measured], method: Method, settings: Settings, known: TensorState
    ) -> dict[tuple[int, int], bytes]:
        """Return the key of every (model, step): 128 bits over what its state depends on."""
        steps_by_model = steps_of(method, settings, self._sparsifiers)
        model_wide = frozenset(model_wide_steps(method, settings, self._sparsifiers))
        deltas = [_deltas(piece, job) for piece, job in tensors] if any(steps_by_model) else []
        keys: dict[tuple[int, int], bytes] = {}
        for model, steps in enumerate(steps_by_model):
            digest = xxhash.xxh3_128()
            for text in dict.fromkeys(of_piece[model] for of_piece in deltas):
                digest.update(text.encode())
            for number, (step, parameters) in enumerate(steps):
                values = [parameters[each.name] for each in step.parameters]
                digest.update(repr((step.name, values)).encode())
                keys[model, number] = digest.digest()
                if (model, number) in model_wide:  # later steps depend on other tensors too, through this one
                    digest.update(repr(known.stages.get((model, number))).encode())
        return keys


def _deltas(piece: Piece, job: Job) -> list[str]:
    """Return per model what its delta in a tensor depends on, and its random stream."""
    reads = list(map(repr, piece.reads))
    base = None if job.base is None else reads[job.base]
    # Rows that a model lacks are filled from the others.
    others = reads if any(each.row_runs is not None for each in piece.reads) else ()
    # One float64 input has all deltas formed in float64.
    inputs = (*job.models, *(() if job.base is None else (job.base,)))
    is_double = any(piece.reads[i].dtype == "F64" for i in inputs)
    common = f"{piece.shape} {is_double} {base} {others}"
    return [f"{common} {reads[i]} {key}" for i, key in zip(job.models, job.keys, strict=True)]
