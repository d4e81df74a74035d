"""An adapter in PEFT's format is resolved against its base, or refused with the reason.

Names, scale and orientation follow PEFT 0.21: what it saves for each kind of layer, and what
`merge_and_unload` makes of it, is restated here by hand.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from raymerge.merge_actors.checkpoint.adapter import Adapter, open_adapter
from raymerge.merge_actors.checkpoint.folder import Checkpoint, open_checkpoint
from raymerge.merge_actors.checkpoint.header import TensorInfo
from raymerge.merge_actors.errors import CheckpointError, MismatchError

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.0.mlp.down_proj"
BASE = {
    "model.embed_tokens.weight": torch.randn(10, 4),
    f"{Q}.weight": torch.randn(4, 4),
    f"{Q}.bias": torch.randn(4),
    f"{DOWN}.weight": torch.randn(4, 6),
    "lm_head.weight": torch.randn(10, 4),
}
PREFIX = "base_model.model."


@pytest.fixture
def base(tmp_path: Path) -> Checkpoint:
    return write_base(tmp_path / "base", BASE)


def write_base(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Checkpoint:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def low_rank(module: str, num_out: int, num_in: int, rank: int = 2) -> dict[str, torch.Tensor]:
    return {
        f"{PREFIX}{module}.lora_A.weight": torch.randn(rank, num_in),
        f"{PREFIX}{module}.lora_B.weight": torch.randn(num_out, rank),
    }


def write_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors"
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6} | config
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def refusal(folder: Path, base: Checkpoint, error: type[Exception] = CheckpointError) -> str:
    with pytest.raises(error) as raised:
        open_adapter(folder, base)
    return str(raised.value)


def read(tensor: TensorInfo) -> torch.Tensor:
    assert tensor.dtype == "F32"
    data = Path(tensor.file).read_bytes()[tensor.begin : tensor.end]
    return torch.frombuffer(bytearray(data), dtype=torch.float32).reshape(tensor.shape)


def update(adapter: Adapter, name: str) -> torch.Tensor:
    pair = adapter.pairs[name]
    product = pair.scale * (read(pair.b) @ read(pair.a))
    return product.T if pair.is_transposed else product


def test_a_pair_becomes_the_update_of_its_base_tensor(tmp_path: Path, base: Checkpoint) -> None:
    tensors = low_rank(Q, 4, 4) | low_rank(DOWN, 4, 6)
    adapter = open_adapter(write_adapter(tmp_path / "lora", tensors), base)
    assert adapter.pairs.keys() == {f"{Q}.weight", f"{DOWN}.weight"} and adapter.full == {}
    assert adapter.path == adapter.folder == str(tmp_path / "lora") and len(adapter.fingerprint) == 32
    for module in (Q, DOWN):
        pair = adapter.pairs[f"{module}.weight"]
        assert (pair.rank, pair.scale, pair.is_transposed) == (2, 3.0, False)
        a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"] for side in "AB")
        assert torch.equal(update(adapter, f"{module}.weight"), 3.0 * (b @ a))


@pytest.mark.parametrize(
    ("config", "rank", "scale"),
    [
        ({}, 2, 6 / 2),
        ({"lora_alpha": 5.0}, 2, 5 / 2),
        ({"use_rslora": True}, 2, 6 / math.sqrt(2)),
        ({"rank_pattern": {"q_proj": 3}}, 3, 6 / 3),
        ({"rank_pattern": {"k_proj": 9, "layers.0.self_attn.q_proj": 3}}, 3, 6 / 3),
        ({"rank_pattern": {"proj": 9, "mlp": 9}}, 2, 6 / 2),
        ({"rank_pattern": {r".*\.layers\.\d\..*q_proj": 3, "q_proj": 2}}, 3, 6 / 3),
        ({"alpha_pattern": {"self_attn.q_proj": 7}}, 2, 7 / 2),
        ({"alpha_pattern": {"q_proj": 7}, "rank_pattern": {"q_proj": 4}, "use_rslora": True}, 4, 7 / 2),
    ],
)
def test_rank_and_alpha_follow_the_first_pattern_that_matches(
    tmp_path: Path, base: Checkpoint, config: dict[str, Any], rank: int, scale: float
) -> None:
    folder = write_adapter(tmp_path / "lora", low_rank(Q, 4, 4, rank), **config)
    pair = open_adapter(folder, base).pairs[f"{Q}.weight"]
    assert (pair.rank, pair.scale) == (rank, scale)


def test_weights_stored_in_out_are_updated_transposed(tmp_path: Path) -> None:
    wide, square = "transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"
    tensors = {f"{wide}.weight": torch.randn(4, 12), f"{square}.weight": torch.randn(4, 4)}
    pairs = low_rank(wide, 12, 4) | low_rank(square, 4, 4)
    for number, (config, flag, modules) in enumerate(
        [
            ({}, True, [wide, square]),
            ({}, False, [wide, square]),  # the shape of the wide one tells
            ({"model_type": "gpt2"}, False, [square]),
            ({}, True, [square]),
        ]
    ):
        base = write_base(tmp_path / f"base{number}", tensors, **config)
        used = {
            name: tensor for name, tensor in pairs.items() if any(f".{module}." in name for module in modules)
        }
        folder = write_adapter(tmp_path / f"lora{number}", used, fan_in_fan_out=flag)
        adapter = open_adapter(folder, base)
        assert [adapter.pairs[f"{module}.weight"].is_transposed for module in modules] == [True] * len(
            modules
        )
        for module in modules:
            assert update(adapter, f"{module}.weight").shape == tensors[f"{module}.weight"].shape


def test_fan_in_fan_out_is_not_believed_of_linear_layers(tmp_path: Path, base: Checkpoint) -> None:
    tensors = low_rank(Q, 4, 4) | low_rank(DOWN, 4, 6)
    adapter = open_adapter(write_adapter(tmp_path / "lora", tensors, fan_in_fan_out=True), base)
    assert not any(pair.is_transposed for pair in adapter.pairs.values())


def test_an_embedding_is_updated_transposed(tmp_path: Path, base: Checkpoint) -> None:
    a, b = torch.randn(2, 10), torch.randn(4, 2)
    name = f"{PREFIX}model.embed_tokens.lora_embedding_"
    adapter = open_adapter(write_adapter(tmp_path / "lora", {f"{name}A": a, f"{name}B": b}), base)
    assert torch.equal(update(adapter, "model.embed_tokens.weight"), (3.0 * (b @ a)).T)


def test_whole_tensors_replace_or_join_the_bases(tmp_path: Path, base: Checkpoint) -> None:
    whole = {
        f"{PREFIX}lm_head.weight": torch.randn(12, 4),
        f"{PREFIX}score.modules_to_save.weight": torch.randn(3, 4),
        f"{PREFIX}{Q}.base_layer.bias": torch.randn(4),
    }
    folder = write_adapter(
        tmp_path / "lora", low_rank(Q, 4, 4) | whole, modules_to_save=["lm_head", "score"], bias="lora_only"
    )
    adapter = open_adapter(folder, base)
    assert adapter.full.keys() == {"lm_head.weight", "score.weight", f"{Q}.bias"}
    for found, expected in zip(
        [adapter.full["lm_head.weight"], adapter.full["score.weight"], adapter.full[f"{Q}.bias"]],
        whole.values(),
        strict=True,
    ):
        assert torch.equal(read(found), expected)


def test_an_update_of_a_resized_embedding_fits_the_resized_one(tmp_path: Path, base: Checkpoint) -> None:
    module = f"{PREFIX}model.embed_tokens"
    tensors = {
        f"{module}.base_layer.weight": torch.randn(12, 4),
        f"{module}.lora_embedding_A": torch.randn(2, 12),
        f"{module}.lora_embedding_B": torch.randn(4, 2),
    }
    adapter = open_adapter(write_adapter(tmp_path / "lora", tensors), base)
    assert adapter.full["model.embed_tokens.weight"].shape == (12, 4)
    assert update(adapter, "model.embed_tokens.weight").shape == (12, 4)


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model."])
def test_the_prefix_of_the_base_may_differ(tmp_path: Path, prefix: str) -> None:
    names = {f"{prefix}{name.removeprefix('model.')}": tensor for name, tensor in BASE.items()}
    base = write_base(tmp_path / "other", names)
    adapter = open_adapter(write_adapter(tmp_path / "lora", low_rank(Q, 4, 4)), base)
    assert list(adapter.pairs) == [f"{prefix}{Q.removeprefix('model.')}.weight"]


def test_a_name_with_two_meanings_is_refused(tmp_path: Path) -> None:
    names = [f"{tower}.layers.0.self_attn.q_proj.weight" for tower in ("text", "vision")]
    base = write_base(tmp_path / "other", {name: torch.randn(4, 4) for name in names})
    assert refusal(write_adapter(tmp_path / "lora", low_rank(Q, 4, 4)), base) == (
        f"adapter '{tmp_path}/lora' changes '{Q}.weight', which may mean '{names[0]}' or '{names[1]}' "
        f"in '{tmp_path}/other'; give the base that it was trained on."
    )


def test_modules_that_the_base_lacks_are_named(tmp_path: Path, base: Checkpoint) -> None:
    tensors = low_rank("model.layers.1.self_attn.q_proj", 4, 4)
    assert refusal(write_adapter(tmp_path / "lora", tensors), base) == (
        f"adapter '{tmp_path}/lora' changes model.layers.1.self_attn.q_proj, which the base "
        f"'{tmp_path}/base' does not have (the closest is {Q}.weight); "
        "give the base that the adapter was trained on."
    )
    tensors = {key: tensor for i in range(5) for key, tensor in low_rank(f"x{i}.y", 4, 4).items()}
    assert "changes x0.y, x1.y, x2.y and 2 more, which" in refusal(
        write_adapter(tmp_path / "lora", tensors), base
    )
    tensors = {f"{PREFIX}score.weight": torch.ones(1)}
    assert "changes score.weight, which" in refusal(write_adapter(tmp_path / "lora", tensors), base)


WAY_OUT = "merge the adapter into its base with PEFT (merge_and_unload) and give the merged model."


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"peft_type": "IA3"}, f"is of the type 'IA3'; only LORA is supported: {WAY_OUT}"),
        ({"use_dora": True}, f"uses DoRA (use_dora), which is not supported: {WAY_OUT}"),
        (
            {"lora_bias": True},
            f"uses a bias in the low-rank part (lora_bias), which is not supported: {WAY_OUT}",
        ),
        ({"layer_replication": [[0, 1]]}, f"uses layer_replication, which is not supported: {WAY_OUT}"),
        (
            {"trainable_token_indices": [1]},
            f"uses trainable_token_indices, which is not supported: {WAY_OUT}",
        ),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "was started by 'pissa_niter_4', which changes the base's weights: save it converted "
            f"to plain LoRA (path_initial_model_for_weight_conversion), or {WAY_OUT}",
        ),
        ({"r": 0}, "has r 0; it must be a positive number."),
        ({"lora_alpha": "16"}, "has lora_alpha '16'; it must be a positive number."),
    ],
)
def test_an_unsupported_adapter_is_refused(
    tmp_path: Path, base: Checkpoint, config: dict[str, Any], sentence: str
) -> None:
    folder = write_adapter(tmp_path / "lora", low_rank(Q, 4, 4), **config)
    assert refusal(folder, base) == f"adapter '{folder}' {sentence}"


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        (
            f"{Q}.lora_magnitude_vector",
            (4,),
            f"holds '{PREFIX}{Q}.lora_magnitude_vector': DoRA is not",
        ),
        (f"{Q}.lora_B.bias", (4,), f"holds '{PREFIX}{Q}.lora_B.bias' of shape [4]; only matrices lora_A"),
        (
            "conv.lora_A.weight",
            (2, 4, 1, 1),
            "of shape [2, 4, 1, 1]; only matrices lora_A (rank, in) and lora_B",
        ),
        (f"{DOWN}.lora_A.weight", (2, 6), f"has lora_A of {DOWN} without lora_B: save it again."),
        (f"{DOWN}.lora_B.weight", (2, 6), f"has lora_B of {DOWN} without lora_A: save it again."),
    ],
)
def test_an_unsupported_tensor_is_refused(
    tmp_path: Path, base: Checkpoint, name: str, shape: tuple[int, ...], sentence: str
) -> None:
    tensors = low_rank(Q, 4, 4) | {PREFIX + name: torch.ones(shape)}
    assert sentence in refusal(write_adapter(tmp_path / "lora", tensors), base)


def test_shapes_and_ranks_must_agree(tmp_path: Path, base: Checkpoint) -> None:
    folder = tmp_path / "lora"
    write_adapter(folder, low_rank(DOWN, 4, 7))
    assert refusal(folder, base, MismatchError) == (
        f"adapter '{folder}' updates '{DOWN}.weight' of shape [4, 6] by a product of shape [4, 7]; "
        "give the base that the adapter was trained on."
    )
    write_adapter(folder, low_rank(DOWN, 4, 6, rank=3))
    assert refusal(folder, base, MismatchError) == (
        f"adapter '{folder}' has rank 3 for {DOWN}, its adapter_config.json says 2; "
        "config and weights must come from one training run."
    )
    write_adapter(folder, low_rank(DOWN, 4, 6) | {f"{PREFIX}{DOWN}.lora_B.weight": torch.ones(4, 3)})
    assert "has lora_A F32 [2, 6] and lora_B F32 [4, 3] for" in refusal(folder, base, MismatchError)
    write_adapter(folder, low_rank(DOWN, 4, 6), rank_pattern={"(": 3})
    assert "has the rank_pattern '(': " in refusal(folder, base)


def test_a_tied_head_cannot_be_changed_alone(tmp_path: Path) -> None:
    embedding = torch.randn(10, 4)
    tied = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone()}
    base = write_base(tmp_path / "tied", BASE | tied, tie_word_embeddings=True)
    assert base.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    folder = tmp_path / "lora"
    write_adapter(folder, low_rank("lm_head", 10, 4))
    assert "changes 'lm_head.weight', which" in refusal(folder, base)
    both = {f"{PREFIX}{name}": embedding + 1 for name in tied}
    adapter = open_adapter(write_adapter(folder, both, modules_to_save=["embed_tokens", "lm_head"]), base)
    assert list(adapter.full) == ["model.embed_tokens.weight"]
    different = both | {f"{PREFIX}lm_head.weight": embedding + 2}
    write_adapter(folder, different, modules_to_save=["embed_tokens", "lm_head"])
    assert "replaces 'lm_head.weight', which" in refusal(folder, base)


def test_a_pickled_adapter_needs_the_flag(
    tmp_path: Path, base: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAYMERGE_CACHE", str(tmp_path / "cache"))
    tensors = low_rank(Q, 4, 4)
    folder = write_adapter(tmp_path / "lora", tensors)
    (folder / "adapter_model.safetensors").unlink()
    assert refusal(folder, base) == (
        f"adapter '{folder}' has no adapter_model.safetensors in {folder}: download it again."
    )
    torch.save(tensors, folder / "adapter_model.bin")
    assert "pass --allow-pickle" in refusal(folder, base)
    adapter = open_adapter(folder, base, allow_pickle=True)
    a, b = tensors.values()
    assert torch.equal(update(adapter, f"{Q}.weight"), 3.0 * (b @ a))


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path, base: Checkpoint) -> None:
    assert refusal(tmp_path, base) == (
        f"adapter '{tmp_path}' has no adapter_config.json in {tmp_path}; give the folder of a PEFT adapter."
    )
