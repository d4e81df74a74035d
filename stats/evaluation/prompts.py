"""Fill the columns of rows into a task's prompt."""

from __future__ import annotations

from raymerge.stats.evaluation.rows import Table, template_columns
from raymerge.stats.evaluation.task_spec import TaskSpec


def prompts_of(task: TaskSpec, table: Table, template: str) -> list[str]:
    """Return the prompt of every row.

    Raises:
        RecipeError: the template asks for a format that a value does not have.
    """
    names = template_columns(task, "prompt", template)
    found = []
    for i in range(len(table)):
        try:
            found.append(template.format_map({name: table.columns[name][i] for name in names}))
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise task.error("prompt", f"it cannot be filled from {table.place(i)}: {error}") from error
    return found
