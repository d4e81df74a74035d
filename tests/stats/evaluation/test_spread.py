"""A model that is spread over devices scores as on one, and no operation sees tensors of two devices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from fake_devices import FakeDevices
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig

from raymerge.merge_actors.checkpoint.folder import open_checkpoint
from raymerge.stats.evaluation.evaluate import prepare_task
from raymerge.stats.evaluation.parts import ModelNeeds
from raymerge.stats.evaluation.resident import ResidentModel, load_resident
from raymerge.stats.evaluation.structures import Structure
from raymerge.stats.linear_maps import block_of

Maker = Callable[..., Any]

LOSS = {"kind": "loss"}
CHOICE = {"kind": "multiple_choice", "choices": ["LABEL_0", "LABEL_1", "LABEL_2"]}
GENERATION = {"kind": "generation", "answer_column": "other", "max_new_tokens": 6}
SIMILARITY = {"kind": "embedding_similarity", "text_pair_column": "other"}


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> FakeDevices:
    found = FakeDevices()
    monkeypatch.setattr("raymerge.stats.evaluation.block_hooks.hand_over", found.hand_over)
    return found


def label(model: ResidentModel, task: Any, devices: FakeDevices) -> list[int]:
    """Tell the double where weights and inputs lie; return the device of each block."""
    module = model.module(task)
    assert model._placement is not None
    (numbers,) = model._placement.of_blocks
    blocks = tuple(numbers)
    for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
        block = block_of(name, blocks)
        number = 0 if block is None else numbers[blocks[block]]
        assert devices.of(tensor) in (None, number), f"{name} stands on two devices"
        devices.put([tensor], number)

    def inputs(module: Any, arguments: Any, named: Any) -> None:
        values = [*arguments, *named.values()]
        devices.put((each for each in values if isinstance(each, torch.Tensor)), 0)

    module.register_forward_pre_hook(inputs, with_kwargs=True)
    return list(numbers.values())


@pytest.fixture(scope="module")
def deep_model(tiny_checkpoints: Maker, tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """Return a maker of models of five blocks, far heavier than what stands outside."""
    made: dict[tuple[str, bool], Path] = {}

    def make(architecture: str, *, tied: bool = True) -> Path:
        if (architecture, tied) not in made:
            base = tiny_checkpoints("llama" if architecture == "mixtral" else architecture).base
            sizes = {"num_hidden_layers": 5, "num_layers": 5, "num_decoder_layers": 5, "n_layer": 5}
            config = AutoConfig.from_pretrained(base, **sizes, tie_word_embeddings=tied)
            config.decoder_start_token_id = 0
            if architecture == "mixtral":
                config = MixtralConfig(**{**config.to_dict(), "num_local_experts": 3, "architectures": None})
                config.architectures = ["MixtralForCausalLM"]
            folder = tmp_path_factory.mktemp("deep")
            with torch.random.fork_rng():
                torch.manual_seed(1)
                model = getattr(transformers, config.architectures[0])(config)
                for parameter in model.parameters():  # away from a model that says the same whatever it reads
                    parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(base).save_pretrained(folder)
            made[architecture, tied] = folder
        return made[architecture, tied]

    return make


@pytest.mark.parametrize(
    ("architecture", "tied", "fields"),
    [
        ("llama", False, LOSS),
        ("llama", True, LOSS),
        ("llama", False, CHOICE),
        ("llama", True, GENERATION),
        ("mixtral", False, LOSS),
        ("gpt2", True, LOSS),
        ("gpt2", True, GENERATION),
        ("t5", True, GENERATION),
        ("t5", True, SIMILARITY),
        ("bert", True, SIMILARITY),
    ],
)
def test_scores_are_those_of_one_device(
    architecture: str,
    tied: bool,
    fields: dict[str, Any],
    deep_model: Maker,
    texts: Path,
    evaluation_of: Maker,
    devices: FakeDevices,
) -> None:
    folder = deep_model(architecture, tied=tied)
    (task,) = evaluation_of(validation=texts, batch_tokens=40, **fields).tasks
    prepared = prepare_task(task, "validation", str(folder))
    alone = prepared.score(load_resident(open_checkpoint(folder), [task]))
    model = load_resident(open_checkpoint(folder), [task], devices=("cpu",) * 3)
    of_blocks = label(model, task, devices)
    assert of_blocks == sorted(of_blocks) and set(of_blocks) == {0, 1, 2}
    with devices:
        spread = prepared.score(model)
    assert alone.keys() == spread.keys()
    for name, array in alone.items():
        np.testing.assert_array_equal(array, spread[name])
    assert sorted(devices.used) == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize("fields", [LOSS, GENERATION], ids=["loss", "generation"])
def test_real_devices(fields: dict[str, Any], deep_model: Maker, texts: Path, evaluation_of: Maker) -> None:
    """One GPU and the host are two devices: torch itself refuses an operation on tensors of both."""
    folder = deep_model("llama")
    (task,) = evaluation_of(validation=texts, batch_tokens=40, **fields).tasks
    prepared = prepare_task(task, "validation", str(folder))
    alone = prepared.score(load_resident(open_checkpoint(folder), [task]))
    model = load_resident(open_checkpoint(folder), [task], devices=("cuda:0", "cpu", "cuda:0"))
    devices = {parameter.device.type for parameter in model.module(task).parameters()}
    assert devices == {"cuda", "cpu"}
    spread = prepared.score(model)
    for name, array in alone.items():  # sums in another order on the GPU
        np.testing.assert_allclose(array, spread[name], rtol=1e-4)


def test_a_model_whose_hooks_are_gone_is_caught(
    deep_model: Maker, texts: Path, evaluation_of: Maker, devices: FakeDevices
) -> None:
    """The double tells: without handing over, the second device's first block fails."""
    folder = deep_model("llama")
    (task,) = evaluation_of(kind="loss", validation=texts).tasks
    prepared = prepare_task(task, "validation", str(folder))
    model = load_resident(open_checkpoint(folder), [task], devices=("cpu",) * 2)
    label(model, task, devices)
    for hooks in model._hooks:
        hooks.close()
    with devices, pytest.raises(AssertionError, match=r"is given tensors of the devices \[0, 1\]"):
        prepared.score(model, 0, 1)


def test_masks_are_handed_over_once_for_all_blocks_of_a_device(
    deep_model: Maker, texts: Path, evaluation_of: Maker, devices: FakeDevices
) -> None:
    folder = deep_model("llama")
    (task,) = evaluation_of(kind="loss", validation=texts).tasks
    prepared = prepare_task(task, "validation", str(folder))
    model = load_resident(open_checkpoint(folder), [task], devices=("cpu",) * 2)
    of_blocks = label(model, task, devices)
    assert of_blocks.count(1) > 1
    with devices:
        prepared.score(model, 0, 1)
    assert devices.num_copies <= 6  # hidden states there and back, mask, positions, cosines, sines


def test_merged_tensors_are_parameters_where_place_wants_them(
    deep_model: Maker, texts: Path, evaluation_of: Maker
) -> None:
    folder = deep_model("llama", tied=False)
    tasks = evaluation_of(kind="loss", validation=texts, batch_tokens=40).tasks
    tensors = load_file(folder / "model.safetensors")
    stored = {name: ("F32", tuple(tensor.shape)) for name, tensor in tensors.items()}
    model = ResidentModel(tasks, str(folder), devices=("cpu",) * 3)
    numbers = model.place(stored)
    assert (
        numbers["model.embed_tokens.weight"] == numbers["lm_head.weight"] == numbers["model.norm.weight"] == 0
    )
    of_layer = [numbers[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(5)]
    assert of_layer == sorted(of_layer) and set(of_layer) == {0, 1, 2}
    for i, number in enumerate(of_layer):
        own = {numbers[name] for name in tensors if name.startswith(f"model.layers.{i}.")}
        assert own == {number}
    model.bind(tensors)
    assert model.num_copied_bytes == 0
    module = model.module(tasks[0])
    for name, parameter in module.named_parameters():
        assert parameter.data_ptr() == tensors[name].data_ptr()


def test_a_block_that_shares_a_parameter_with_the_outside_stays_home() -> None:
    module = LlamaForCausalLM(_llama(num_hidden_layers=4))
    layers = module.model.layers
    layers[1].mlp.down_proj.weight = layers[3].mlp.down_proj.weight
    layers[2].input_layernorm.weight = module.model.norm.weight
    structure = Structure(module, None, "here")
    assert structure.all_blocks == tuple(f"model.layers.{i}" for i in range(4))
    assert structure.blocks == ("model.layers.0",)


def test_blocks_of_several_kinds_are_blocks_too() -> None:
    class AttentionLayer(torch.nn.Linear):
        pass

    class StateSpaceLayer(torch.nn.Linear):
        pass

    module = torch.nn.Module()
    module.layers = torch.nn.ModuleList([AttentionLayer(2, 2), StateSpaceLayer(2, 2)])
    module.heads = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.LayerNorm(2)])
    assert Structure(module, None, "here").blocks == ("layers.0", "layers.1")


def test_needs_are_weights_logits_and_caches(deep_model: Maker, texts: Path, evaluation_of: Maker) -> None:
    folder = deep_model("llama", tied=False)
    stored = {
        name: ("F32", tensor.shape) for name, tensor in open_checkpoint(folder).tensors.items()
    }  # hidden 32, intermediate 80, keys of 2 heads of 8, vocabulary 96
    block = (32 * 32 * 2 + 2 * 16 * 32 + 3 * 80 * 32 + 2 * 32) * 4
    loss = ResidentModel(evaluation_of(kind="loss", validation=texts, batch_tokens=50).tasks, str(folder))
    assert loss.needs(stored) == ModelNeeds(
        home_weights=(2 * 96 * 32 + 32) * 4,
        block_weights=(block,) * 5,
        home_activations=50 * 96 * (4 + 4),
        block_activations=4 * 80 * 50 * 4,
        dtype="float32",
    )
    tasks = evaluation_of(validation=texts, batch_tokens=50, **GENERATION).tasks
    found = ResidentModel(tasks, str(folder), dtype=torch.bfloat16).needs(stored)
    assert found.block_weights == (block + block // 2,) * 5  # merged in float32, and a copy in bfloat16
    assert found.cache_of_block == 50 * 2 * 16 * 2 and found.home_activations == 0


def _llama(**sizes: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=20,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        **sizes,
    )
