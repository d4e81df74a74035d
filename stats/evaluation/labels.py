"""Labels of the data as classes of a head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from raymerge.stats.evaluation.task_spec import TaskSpec


class LabelMap:
    """The classes of a head, and what the data call them."""

    def __init__(self, task: TaskSpec, config: Mapping[str, Any], renamed: Mapping[str, Any] | None) -> None:
        """Read the classes of a config.

        Args:
            task: for errors.
            config: config.json of the model that has the head.
            renamed: label of the data -> name or number of a class, where they differ.
        """
        self._task = task
        names = config.get("id2label") or {}
        self.names: tuple[str, ...] = tuple(str(names[key]) for key in sorted(names, key=int)) or tuple(
            f"LABEL_{i}" for i in range(int(config.get("num_labels") or 2))
        )
        """Of the classes, by number."""
        self._numbers: dict[Any, int] = {name: i for i, name in enumerate(self.names)}
        for label, given in (renamed or {}).items():
            number = self._numbers.get(given, given)
            if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < len(self.names):
                raise task.error(
                    f"labels.{label}", f"{given!r} is no class of the head; it has {self._known()}."
                )
            self._numbers[label] = number

    def number(self, label: Any, place: str) -> int:
        """Return the number of a label's class.

        Raises:
            RecipeError: the head has no such class.
        """
        label = int(label) if isinstance(label, bool) else label
        found = self._numbers.get(label)
        if found is None and isinstance(label, int | float):
            renamed = self._numbers.get(str(label))  # keys of a YAML mapping may have become texts
            found = renamed if renamed is not None else int(label) if int(label) == label else None
        if found is None and isinstance(label, str) and label.lstrip("-").isdigit():
            found = int(label)
        if found is None or not 0 <= found < len(self.names):
            raise self._task.error(
                "label_column",
                f"{place} has the label {label!r}; the head has {self._known()}: name the head that belongs to the "
                "data, or say which class is meant (labels: {LABEL: CLASS}).",
            )
        return found

    def _known(self) -> str:
        return (
            f"{len(self.names)} classes ({', '.join(self.names[:8])}{', ...' if len(self.names) > 8 else ''})"
        )


def is_regression(config: Mapping[str, Any]) -> bool:
    """Tell whether a head yields one number, not classes."""
    names: Sequence[Any] | Mapping[Any, Any] = config.get("id2label") or ()
    return config.get("problem_type") == "regression" or len(names) == 1
