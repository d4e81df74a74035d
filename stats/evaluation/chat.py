"""Render conversations with the model's chat template."""

from __future__ import annotations

from typing import Any

from raymerge.stats.evaluation.task_spec import TaskSpec


def render(task: TaskSpec, tokenizer: Any, messages: Any, place: str, *, for_answer: bool = False) -> str:
    """Return a conversation as text.

    Args:
        task: for errors.
        tokenizer: has the template.
        messages: a list of {role, content}; a text is what a user says.
        place: the row, for errors.
        for_answer: end where the model's answer begins.

    Raises:
        RecipeError: there is no template, or it cannot render the row.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise task.error(
            "chat_template", "the models' tokenizer has none; leave it out, or add one to the models."
        )
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_answer)
    except Exception as error:  # the template is code of the checkpoint and raises what it likes
        raise task.error("chat_template", f"it cannot render {place}: {error}") from error
    assert isinstance(text, str)
    return text
