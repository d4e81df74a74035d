"""Files written by our layout load in the safetensors library, byte for byte."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from raymerge.merge_actors.checkpoint.header import read_header
from raymerge.merge_actors.checkpoint.layout import (
    INDEX_NAME,
    Layout,
    OutputTensor,
    ShardLimit,
    lay_out,
    parse_size,
)
from raymerge.merge_actors.dtypes import element_bytes, torch_dtype
from raymerge.merge_actors.errors import RecipeError

DTYPES = st.sampled_from(
    ["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL"]
)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__"
)
TENSORS = st.dictionaries(NAMES, st.tuples(DTYPES, SHAPES), min_size=1, max_size=12)


def write(layout: Layout, folder: Path, data: dict[str, bytes]) -> None:
    for file in layout.files:
        content = bytearray(file.header) + bytes(file.num_bytes - len(file.header))
        for name, (begin, end) in file.tensors.items():
            content[begin:end] = data[name]
        assert len(content) == file.num_bytes
        (folder / file.name).write_bytes(content)


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@given(tensors=TENSORS, limit=st.integers(1, 400), seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_what_we_lay_out_the_library_loads(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[str, tuple[int, ...]]],
    limit: int,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("out")
    generator = torch.Generator().manual_seed(seed)
    outputs = [OutputTensor(name, dtype, shape) for name, (dtype, shape) in tensors.items()]
    data = {
        tensor.name: as_bytes(
            torch.randint(0, 2, (tensor.num_bytes,), generator=generator, dtype=torch.uint8)
        )
        for tensor in outputs
    }
    layout = lay_out(outputs, limit)
    write(layout, folder, data)
    loaded: dict[str, torch.Tensor] = {}
    for file in layout.files:
        of_file = load_file(folder / file.name)
        assert of_file.keys() == file.tensors.keys()
        loaded |= of_file
        ours, metadata = read_header(folder / file.name)
        assert metadata == {"format": "pt"}
        assert {name: (tensor.begin, tensor.end) for name, tensor in ours.items()} == file.tensors
        assert len(file.header) % 8 == 0
        assert all(begin % element_bytes(tensors[name][0]) == 0 for name, (begin, _) in file.tensors.items())
        assert len(file.tensors) == 1 or sum(tensor.num_bytes for tensor in ours.values()) <= limit
    assert loaded.keys() == tensors.keys()
    for name, (dtype, shape) in tensors.items():
        assert (loaded[name].dtype, tuple(loaded[name].shape)) == (torch_dtype(dtype), shape)
        assert as_bytes(loaded[name]) == data[name]


@given(tensors=TENSORS)
@settings(max_examples=50, deadline=None)
def test_what_the_library_writes_we_read(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "library.safetensors"
    saved = {name: torch.ones(shape).to(torch_dtype(dtype)) for name, (dtype, shape) in tensors.items()}
    save_file(saved, path)
    found, _ = read_header(path)
    content = path.read_bytes()
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.items()} == tensors
    for name, tensor in found.items():
        assert content[tensor.begin : tensor.end] == as_bytes(saved[name])


def test_one_file_has_no_index_and_these_bytes() -> None:
    layout = lay_out([OutputTensor("a", "U8", (3,)), OutputTensor("b", "BF16", (2,))], parse_size("5GB"))
    text = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},'
        b'"a":{"dtype":"U8","shape":[3],"data_offsets":[4,7]}}'
    )
    text += b" " * (-len(text) % 8)
    assert layout.index is None
    (file,) = layout.files
    assert file.name == "model.safetensors"
    assert file.header == len(text).to_bytes(8, "little") + text
    begin = len(file.header)
    assert file.tensors == {"b": (begin, begin + 4), "a": (begin + 4, begin + 7)}
    assert file.num_bytes == layout.num_bytes == begin + 7


def test_files_are_filled_in_order_and_a_giant_has_its_own() -> None:
    sizes = {"a": 40, "b": 50, "giant": 500, "c": 10, "d": 90, "e": 1}
    layout = lay_out([OutputTensor(name, "U8", (n,)) for name, n in sizes.items()], 100)
    assert [tuple(file.tensors) for file in layout.files] == [("a", "b"), ("giant",), ("c", "d"), ("e",)]
    assert [file.name for file in layout.files] == [
        f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)
    ]
    assert layout.index == {
        "metadata": {"total_parameters": 691, "total_size": 691},
        "weight_map": {
            "a": "model-00001-of-00004.safetensors",
            "b": "model-00001-of-00004.safetensors",
            "c": "model-00003-of-00004.safetensors",
            "d": "model-00003-of-00004.safetensors",
            "e": "model-00004-of-00004.safetensors",
            "giant": "model-00002-of-00004.safetensors",
        },
    }


def test_a_limit_in_parameters_does_not_depend_on_the_dtype() -> None:
    for dtype in ("F32", "BF16", "F8_E4M3"):
        tensors = [OutputTensor(name, dtype, (10, 10)) for name in "abcd"]
        layout = lay_out(tensors, ShardLimit("parameters", 250))
        assert [tuple(file.tensors) for file in layout.files] == [("a", "b"), ("c", "d")]
        assert layout.index is not None
        expected = {"total_parameters": 400, "total_size": 400 * element_bytes(dtype)}
        assert layout.index["metadata"] == expected


def test_our_sharded_output_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    state = model.state_dict()
    layout = lay_out([OutputTensor(name, "F32", tuple(tensor.shape)) for name, tensor in state.items()], 4000)
    assert len(layout.files) > 1
    write(layout, tmp_path, {name: as_bytes(tensor) for name, tensor in state.items()})
    (tmp_path / INDEX_NAME).write_text(json.dumps(layout.index))
    config.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(8).reshape(1, 8)
    assert torch.equal(loaded(tokens).logits, model.eval()(tokens).logits)


@pytest.mark.parametrize(
    ("text", "kind", "count"),
    [
        ("5GB", "bytes", 5 * 10**9),
        ("5 gb", "bytes", 5 * 10**9),
        ("500MiB", "bytes", 500 * 2**20),
        ("1.5GiB", "bytes", 3 * 2**29),
        ("0.7TB", "bytes", 7 * 10**11),
        ("64KB", "bytes", 64_000),
        ("123", "bytes", 123),
        (4096, "bytes", 4096),
        ("5B", "parameters", 5 * 10**9),
        ("500M", "parameters", 500 * 10**6),
        ("10k", "parameters", 10_000),
        ("1.1B", "parameters", 1_100_000_000),
    ],
)
def test_sizes(text: str | int, kind: str, count: int) -> None:
    limit = parse_size(text)
    assert (limit.kind, limit.count) == (kind, count)


@pytest.mark.parametrize("text", ["", "5G", "GB", "-5GB", "5GBB", "0", "0.1", "1e9", "5 5GB", 0, -1])
def test_what_is_no_size_is_refused(text: str | int) -> None:
    with pytest.raises(RecipeError) as raised:
        parse_size(text)
    assert str(raised.value) == (
        f"shard size {str(text)!r} is not a size; write bytes as 5GB, 500MiB or a whole number, "
        "or parameters as 5B, 500M."
    )
