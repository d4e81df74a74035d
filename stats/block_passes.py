"""Run some blocks of a model, from cached inputs, and stop after them.

The blocks before the wanted ones are replaced by passthroughs, the last of them giving the hidden
states that an earlier pass has kept; embeddings, masks and whatever else stands outside the
blocks run as ever. Blocks that hand more than hidden states to each other (the position
bias of T5) get it from the first block of their stack, which then does run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Form:
    """What the blocks of a stack return."""

    num_values: int
    """0 for a bare tensor, else the length of the tuple."""
    has_more: bool
    """Does the first block hand on more than hidden states?"""

    def encode(self) -> str:
        """Write as text."""
        return f"{self.num_values} {int(self.has_more)}"

    @classmethod
    def decode(cls, text: str) -> Form:
        """Read what `encode` wrote."""
        num_values, has_more = text.split()
        return cls(int(num_values), has_more == "1")


class StopHere(Exception):
    """All that a pass wants has been computed."""


def stack_of(block: str) -> str:
    """Return the name of a block's stack: "encoder.layer.3" -> "encoder.layer"."""
    return block.rpartition(".")[0]


def kept_outputs(blocks: Sequence[str], begin: int, end: int) -> list[int]:
    """Return the blocks in [begin, end) whose output a later pass may begin from.

    The last one, and the last of every stack: a decoder's passes need the encoder's output.
    """
    is_last = [
        i + 1 == len(blocks) or stack_of(blocks[i]) != stack_of(blocks[i + 1]) for i in range(len(blocks))
    ]
    return [i for i in range(begin, end) if is_last[i] or i == end - 1]


def needed_outputs(blocks: Sequence[str], begin: int) -> list[int]:
    """Return the blocks whose kept outputs the pass over [begin, ...) begins from."""
    return kept_outputs(blocks, 0, begin)


class BlockPass:
    """A model set up for passes over blocks [begin, end); undone by `close`."""

    def __init__(
        self,
        model: Any,
        blocks: Sequence[str],
        begin: int,
        end: int | None,
        *,
        from_cache: bool,
        forms: Mapping[str, Form],
        keep: Collection[int],
        stops_before: bool = False,
    ) -> None:
        """Set the model up.

        Args:
            model: the transformers model.
            blocks: names of all blocks, in the order in which they run.
            begin: first wanted block.
            end: stop after block end - 1; None to run to the end.
            from_cache: replace the blocks before `begin`.
            forms: of the stacks whose blocks are replaced.
            keep: blocks whose outputs are wanted in `outputs`.
            stops_before: stop when block `end` is called, not as soon as the one before it is done.
        """
        self.outputs: dict[int, torch.Tensor] = {}
        """Hidden states after the kept blocks, of the last batch."""
        self.forms: dict[str, Form] = dict(forms)
        """Of the stacks whose first block ran."""
        self._cached: Mapping[int, torch.Tensor] = {}
        self._more: dict[str, tuple[Any, ...]] = {}
        self._handles: list[Any] = []
        self._replaced: list[Any] = []
        needed = set(needed_outputs(blocks, begin)) if from_cache else set()
        for i, name in enumerate(blocks):
            module = model.get_submodule(name)
            is_first = i == 0 or stack_of(blocks[i - 1]) != stack_of(name)
            if from_cache and i < begin:
                self._replace(module, i, stack_of(name), is_first=is_first, is_needed=i in needed)
                continue
            is_end = i + 1 == end and not stops_before
            if is_first or i in keep or is_end:
                self._handles.append(
                    module.register_forward_hook(self._after(i, name, is_first, i in keep, is_end))
                )
            if stops_before and i == end:
                self._handles.append(module.register_forward_pre_hook(_stop))
        if end is None and hasattr(model, "get_output_embeddings"):
            output = model.get_output_embeddings()
            if output is not None:  # its own input has been seen; logits are large and not wanted
                self._handles.append(output.register_forward_pre_hook(_stop))

    def begin(self, cached: Mapping[int, torch.Tensor]) -> None:
        """Expect a batch, whose cached hidden states are these."""
        self._cached = cached
        self.outputs = {}

    def close(self) -> None:
        """Give the model its blocks back."""
        for handle in self._handles:
            handle.remove()
        for module in self._replaced:
            del module.forward
        self._handles, self._replaced = [], []

    def _after(self, i: int, name: str, is_first: bool, is_kept: bool, is_end: bool) -> Any:
        def hook(module: Any, arguments: Any, output: Any) -> None:
            if is_first:
                self.forms[stack_of(name)] = _form(output)
            if is_kept:
                self.outputs[i] = output[0] if isinstance(output, tuple) else output
            if is_end:
                raise StopHere

        return hook

    def _replace(self, module: Any, i: int, stack: str, *, is_first: bool, is_needed: bool) -> None:
        form = self.forms[stack]
        original = module.forward

        def forward(*arguments: Any, **named: Any) -> Any:
            """Hand the cached or the given hidden states on."""
            hidden = arguments[0] if arguments else named["hidden_states"]
            if is_first and form.has_more:
                self._more[stack] = original(*arguments, **named)[1:]
            if is_needed:
                hidden = self._cached[i]
            if not form.num_values:
                return hidden
            more = self._more[stack] if form.has_more else (None,) * (form.num_values - 1)
            return (hidden, *more)

        module.forward = forward
        self._replaced.append(module)


def _form(output: Any) -> Form:
    import torch

    if isinstance(output, torch.Tensor):
        return Form(0, False)
    return Form(len(output), any(each is not None for each in output[1:]))


def _stop(module: Any, arguments: Any) -> None:
    raise StopHere
