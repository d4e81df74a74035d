"""Hand the inputs of linear maps to an accumulator, each distinct input once.

Modules that are called with one and the same tensor (query, key and value; gate and up) share
a Gram: the first of them to be called leads, the others follow. That is seen from the identity
of the tensor and its version in every call, never from names. A follower that is once called
with another tensor, or another number of times, is reported; the pass is then repeated with that
module on its own.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from raymerge.stats.batches import Batch
from raymerge.stats.linear_maps import LinearMap
from raymerge.stats.masked_rows import TokenMask, real_rows
from raymerge.stats.weight_names import expert_of

if TYPE_CHECKING:
    import torch

#: Names of attention modules that read the encoder's output in a decoder.
_CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "crossattention", "cross_attn", "cross_attention")
_READS_KEYS = ("k", "v", "key", "value", "k_proj", "v_proj")

#: A map, or one expert of it.
Key = tuple[str, int]
#: accumulate(key, rows_RI, weight)
Accumulate = Callable[[Key, "torch.Tensor", int], None]


class NeedsSeparation(Exception):
    """Maps were taken to share an input and do not."""

    def __init__(self, parameters: Collection[str]) -> None:
        super().__init__(sorted(parameters))
        self.parameters = frozenset(parameters)


class InputCapture:
    """Hooks on the linear maps of a layer group, for the batches of one worker."""

    def __init__(
        self, model: Any, maps: Sequence[LinearMap], accumulate: Accumulate, separate: Collection[str]
    ) -> None:
        """Set the hooks.

        Args:
            model: the transformers model.
            maps: whose inputs are wanted.
            accumulate: takes rows of real tokens.
            separate: parameters that must not follow another.
        """
        self.leaders: dict[str, str] = {}
        """Follower -> leader, names of parameters."""
        self.num_rows: Counter[Key] = Counter()
        self.num_calls: Counter[str] = Counter()
        self._accumulate, self._separate = accumulate, frozenset(separate)
        self._last: dict[str, tuple[weakref.ref[torch.Tensor], int, int]] = {}
        self._leader_by_id: dict[int, str] = {}
        self._broken: set[str] = set()
        self._batch: Batch | None = None
        self._encoder_output: weakref.ref[torch.Tensor] | None = None
        self._handles: list[Any] = []
        self._set_hooks(model, maps)

    def begin(self, batch: Batch) -> None:
        """Expect the inputs of a batch."""
        self._batch = batch
        self._encoder_output = None

    def end(self) -> None:
        """Check what modules shared in the batch.

        Raises:
            NeedsSeparation: some did not share what they seemed to.
        """
        uneven = {name for name, lead in self.leaders.items() if self.num_calls[name] != self.num_calls[lead]}
        if self._broken | uneven:
            raise NeedsSeparation(self._broken | uneven)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _set_hooks(self, model: Any, maps: Sequence[LinearMap]) -> None:
        if getattr(model.config, "is_encoder_decoder", False) and model.get_encoder() is not None:
            self._handles.append(model.get_encoder().register_forward_hook(self._remember_encoder))
        experts: dict[str, list[LinearMap]] = {}
        for each in maps:
            if each.kind == "experts":
                experts.setdefault(each.module, []).append(each)
                continue
            hook = self._hook_of(each)
            self._handles.append(model.get_submodule(each.module).register_forward_pre_hook(hook))
        for name, parameters in experts.items():
            self._watch_experts(model.get_submodule(name), parameters)

    def _hook_of(self, linear_map: LinearMap) -> Callable[[Any, tuple[Any, ...]], None]:
        def hook(module: Any, arguments: tuple[Any, ...]) -> None:
            self._see(linear_map, arguments[0])

        return hook

    def _see(self, linear_map: LinearMap, input_tensor: torch.Tensor) -> None:
        """Count a call of a map, and accumulate its input unless its leader has done so."""
        name = linear_map.parameter
        self.num_calls[name] += 1
        leader = self.leaders.get(name)
        if leader is None and name not in self._last and name not in self._separate:
            leader = self._leader_by_id.get(id(input_tensor))
            if leader is not None and self._is_last_of(leader, input_tensor):
                self.leaders[name] = leader
            else:
                leader = None
        if leader is not None:
            if self._is_last_of(leader, input_tensor):
                self.num_rows[name, 0] += self._last[leader][2]
            else:
                self._broken.add(name)
            return
        num_rows = self._add(linear_map, (name, 0), input_tensor)
        self._last[name] = (weakref.ref(input_tensor), input_tensor._version, num_rows)
        self._leader_by_id[id(input_tensor)] = name

    def _is_last_of(self, leader: str, input_tensor: torch.Tensor) -> bool:
        reference, version, _ = self._last[leader]
        return reference() is input_tensor and version == input_tensor._version

    def _add(self, linear_map: LinearMap, key: Key, input_tensor: torch.Tensor) -> int:
        assert self._batch is not None
        are_tokens = linear_map.kind == "experts" or expert_of(linear_map.module + ".") is not None
        found = real_rows(
            input_tensor.detach(),
            self._masks(linear_map, input_tensor, self._batch),
            num_examples=len(self._batch.examples),
            are_tokens=are_tokens,
        )
        num_rows = found.rows_RI.shape[0] * found.weight
        self.num_rows[key] += num_rows
        self._accumulate(key, found.rows_RI, found.weight)
        return num_rows

    def _masks(self, linear_map: LinearMap, input_tensor: torch.Tensor, batch: Batch) -> list[TokenMask]:
        """Return the mask of the tokens that a map sees first, and then the other one."""
        if batch.target_mask is None:
            return [batch.mask]
        parts = linear_map.module.split(".")
        is_encoders = "encoder" in parts
        reads_encoder = (self._encoder_output is not None and self._encoder_output() is input_tensor) or (
            parts[-1] in _READS_KEYS and any(part in _CROSS_ATTENTION for part in parts)
        )
        masks = [batch.target_mask, batch.mask]
        return masks[::-1] if is_encoders or reads_encoder else masks

    def _remember_encoder(self, module: Any, arguments: Any, output: Any) -> None:
        self._encoder_output = weakref.ref(output[0])

    def _watch_experts(self, module: Any, maps: Sequence[LinearMap]) -> None:
        """Watch the products inside an experts' module, whose matrices are slices of one parameter."""
        from raymerge.stats.expert_products import ExpertProducts

        def see(linear_map: LinearMap, expert: int, input_tensor: torch.Tensor) -> None:
            self.num_calls[linear_map.parameter] += 1
            self._add(linear_map, (linear_map.parameter, expert), input_tensor)

        watching = ExpertProducts(module, maps, see)
        self._handles += watching.handles
