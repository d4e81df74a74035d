"""Choose the chat template of an output: by name, as Jinja text, from a file, or by majority."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from raymerge.cluster.origin import did_you_mean
from raymerge.cluster.recipe import Recipe
from raymerge.cluster.tokenizer_files import write_json
from raymerge.cluster.tokenizer_tokens import TOKENIZER_CONFIG, tokenizer_folder
from raymerge.merge_actors.checkpoint.files import read_json

if TYPE_CHECKING:
    from raymerge.cluster.matched import LoadedModel

TEMPLATE_FILE = "chat_template.jinja"

#: Formats of conversations that have a common name.
TEMPLATES: dict[str, str] = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
        "+ '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] "
        "+ '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{{ ' ' + message['content'] + eos_token }}"
        "{% else %}{{ '[INST] ' + message['content'] + ' [/INST]' }}{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{% for message in messages %}{% if message['role'] == 'user' %}"
        "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}{% elif message['role'] == 'assistant' %}"
        "{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
        "{% else %}{{ message['content'] + '\\n\\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token "
        "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
    ),
}


def choose_template(recipe: Recipe, models: Mapping[str, LoadedModel]) -> tuple[str | None, list[str]]:
    """Return the template that a recipe asks for, and remarks; None to keep what the tokenizer has.

    "auto" is the template that most models have, of equals the first one's. A text with braces
    is the template itself, one that ends in .jinja its file.

    Raises:
        RecipeError: it is none of these.
    """
    wanted = recipe.chat_template
    if wanted is None:
        return None, []
    if wanted == "auto":
        found = _most_common([models[ref.key] for ref in recipe.all_models()])
        return found, [] if found else ["chat_template: auto finds none, as no model has one"]
    if wanted in TEMPLATES:
        return TEMPLATES[wanted], []
    if "{{" in wanted or "{%" in wanted:
        return wanted, []
    if wanted.endswith(".jinja") and os.path.isfile(wanted):
        with open(wanted, encoding="utf-8") as file:
            return file.read(), []
    names = sorted(TEMPLATES)
    raise recipe.origin.error(
        "chat_template",
        f"is {wanted!r}; it must be auto, one of {', '.join(names)}, Jinja text or the path of a .jinja file"
        f"{did_you_mean(wanted, ['auto', *names])}.",
    )


def write_template(folder: str, template: str) -> None:
    """Write a template beside the tokenizer, also where transformers before 4.50 looks for it."""
    with open(os.path.join(folder, TEMPLATE_FILE), "w", encoding="utf-8") as file:
        file.write(template)
    config_path = os.path.join(folder, TOKENIZER_CONFIG)
    if os.path.exists(config_path):
        write_json(config_path, {**read_json(config_path), "chat_template": template})
    processor_path = os.path.join(folder, "chat_template.json")
    if os.path.exists(processor_path):
        write_json(processor_path, {"chat_template": template})


def read_template(model: LoadedModel) -> str | None:
    """Return a model's chat template; of several the default one."""
    folder = tokenizer_folder(model)
    path = os.path.join(folder, TEMPLATE_FILE)
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            return file.read()
    config_path = os.path.join(folder, TOKENIZER_CONFIG)
    found = read_json(config_path).get("chat_template") if os.path.exists(config_path) else None
    if isinstance(found, list):
        found = next((each["template"] for each in found if each.get("name") == "default"), None)
    return found if isinstance(found, str) else None


def _most_common(models: Sequence[LoadedModel]) -> str | None:
    templates = [template for model in models if (template := read_template(model))]
    return Counter(templates).most_common(1)[0][0] if templates else None
