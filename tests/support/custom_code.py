"""A tiny language model that transformers does not know: its code lies beside its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

CONFIGURATION = """
from transformers import PretrainedConfig


class TwoLayersConfig(PretrainedConfig):
    model_type = "two_layers"

    def __init__(self, vocab_size=96, hidden_size=16, num_hidden_layers=2, **options):
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**options)
"""
MODELING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_two_layers import TwoLayersConfig


class Layer(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.up, self.down = nn.Linear(size, 2 * size), nn.Linear(2 * size, size)

    def forward(self, hidden_states):
        return hidden_states + self.down(torch.relu(self.up(hidden_states)))


class TwoLayersForCausalLM(PreTrainedModel):
    config_class = TwoLayersConfig
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config.hidden_size) for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, attention_mask=None, labels=None, **unused):
        hidden_states = self.embed(input_ids)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return CausalLMOutput(logits=self.head(hidden_states))
"""
FILES = "configuration_two_layers.py, modeling_two_layers.py"
#: Appended to the code: a file that says that it was run.
WITNESS = "\nimport pathlib\npathlib.Path({!r}).write_text('ran')\n"


def write_custom_model(folder: Path, tokenizer_of: Path, *, seed: int, witness: Path | None = None) -> Path:
    """Write a checkpoint with code of its own.

    Args:
        folder: to make.
        tokenizer_of: whose tokenizer it takes.
        seed: of its weights.
        witness: a file that the code appends to when it runs.
    """
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    said = WITNESS.format(str(witness)) if witness else ""
    (folder / "configuration_two_layers.py").write_text(CONFIGURATION + said)
    (folder / "modeling_two_layers.py").write_text(MODELING + said)
    config = {
        "model_type": "two_layers",
        "architectures": ["TwoLayersForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_two_layers.TwoLayersConfig",
            "AutoModelForCausalLM": "modeling_two_layers.TwoLayersForCausalLM",
        },
        "vocab_size": 96,
        "hidden_size": 16,
        "num_hidden_layers": 2,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(seed)
    shapes = {"embed.weight": (96, 16), "head.weight": (96, 16)}
    for layer in range(2):
        shapes |= {f"layers.{layer}.up.weight": (32, 16), f"layers.{layer}.up.bias": (32,)}
        shapes |= {f"layers.{layer}.down.weight": (16, 32), f"layers.{layer}.down.bias": (16,)}
    tensors = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in tokenizer_of.iterdir():
        if "token" in path.name:
            shutil.copyfile(path, folder / path.name)
    return folder
