"""See which parameters are used while a part of a model runs.

Modules need not be called for their parameters to be used (an embedding of relative positions is read as a
table), so it is torch's functions that are watched, not modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode


class ParameterUse(TorchFunctionMode):
    """While active, notes which of some parameters any function of torch is called with."""

    def __init__(self, names: Mapping[int, str]) -> None:
        """Watch parameters.

        Args:
            names: by the identity of the parameter.
        """
        super().__init__()
        self.used: set[str] = set()
        self._names = names

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note(args)
        self._note((kwargs or {}).values())
        return func(*args, **(kwargs or {}))

    def _note(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, list | tuple):
                self._note(value)
            elif (name := self._names.get(id(value))) is not None:
                self.used.add(name)
