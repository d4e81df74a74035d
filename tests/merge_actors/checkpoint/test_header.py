"""Headers are read as the safetensors library reads them, and every attack has its sentence."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from raymerge.merge_actors.checkpoint.header import TensorInfo, read_header
from raymerge.merge_actors.dtypes import from_torch_name
from raymerge.merge_actors.errors import CheckpointError


def raw_file(
    path: Path, header: Any, num_data_bytes: int = 0, *, num_header_bytes: int | None = None
) -> Path:
    """Write a file with this header (bytes, or anything that JSON holds) and zeros as data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if num_header_bytes is None else num_header_bytes
    path.write_bytes(length.to_bytes(8, "little") + text + bytes(num_data_bytes))
    return path


def entry(dtype: Any = "F32", shape: Any = (1,), begin: Any = 0, end: Any = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


TENSORS = {
    "bf16": torch.randn(3, 5).to(torch.bfloat16),
    "fp16": torch.randn(7).to(torch.float16),
    "fp8": torch.randn(3, 3).to(torch.float8_e4m3fn),
    "fp8_wide": torch.randn(5).to(torch.float8_e5m2),
    "scalar": torch.tensor(2.5),
    "empty": torch.empty(0, 4),
    "integers": torch.arange(9),
    "mask": torch.tensor([True, False, True]),
    "unicode \u00e9": torch.ones(2, 1, 2, dtype=torch.float64),
}


def test_names_dtypes_shapes_and_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, {"format": "pt", "note": "x"})
    tensors, metadata = read_header(path)
    assert metadata == {"format": "pt", "note": "x"}
    assert tensors.keys() == TENSORS.keys()
    data = path.read_bytes()
    for name, expected in TENSORS.items():
        found = tensors[name]
        assert found.name == name and found.file == str(path)
        assert found.dtype == from_torch_name(str(expected.dtype))
        assert found.shape == tuple(expected.shape) and found.num_elements == expected.numel()
        assert data[found.begin : found.end] == expected.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert found.num_bytes == expected.nbytes
    begins = [tensor.begin for tensor in tensors.values()]
    assert begins == sorted(begins)


def test_a_file_without_tensors_or_metadata_is_valid(tmp_path: Path) -> None:
    assert read_header(raw_file(tmp_path / "x", {})) == ({}, {})
    tensors, _ = read_header(raw_file(tmp_path / "y", {"a": entry()}, 4))
    assert tensors == {"a": TensorInfo("a", "F32", (1,), str(tmp_path / "y"), 69, 73)}


AGAIN = "download or copy the file again."
FIELDS = "['data_offsets', 'dtype', 'shape']"
NOT_U64 = "is not an unsigned 64-bit integer; " + AGAIN
# name -> (header, bytes of data, what is said, {file} standing for the path)
ATTACKS: dict[str, tuple[Any, int, str]] = {
    "hole": (
        {"a": entry(), "b": entry(begin=8, end=12)},
        12,
        "tensor 'b' in {file} begins at byte 139 and leaves a hole after 'a', which ends at byte 135; "
        f"the header is corrupt: {AGAIN}",
    ),
    "hole at the start": (
        {"a": entry(begin=4, end=8)},
        8,
        "tensor 'a' in {file} begins at byte 73 and leaves a hole after the header, which ends at byte 69; "
        f"the header is corrupt: {AGAIN}",
    ),
    "overlap": (
        {"a": entry(), "b": entry(begin=2, end=6)},
        6,
        "tensor 'b' in {file} begins at byte 132 and overlaps 'a', which ends at byte 134; "
        f"the header is corrupt: {AGAIN}",
    ),
    "truncated data": (
        {"a": entry(shape=[100], end=400)},
        399,
        f"{{file}} is truncated: 'a' ends at byte 473, the file has 472 bytes; {AGAIN}",
    ),
    "bytes at the end": (
        {"a": entry()},
        5,
        "{file} has 74 bytes, but its last tensor, 'a', ends at byte 73; the file is corrupt: " + AGAIN,
    ),
    "shape does not fit the bytes": (
        {"a": entry(shape=[2])},
        4,
        "tensor 'a' in {file} has 4 bytes at offsets [0, 4], but F32 of shape [2] needs 8; "
        f"the header is corrupt: {AGAIN}",
    ),
    "shape overflows": (
        {"a": entry(shape=[2**33, 2**33])},
        4,
        f"tensor 'a' in {{file}} has the shape [{2**33}, {2**33}], whose bytes exceed 2**63 - 1; "
        "the header is corrupt: write the file again.",
    ),
    "shape overflows before it is zero": (
        {"a": entry(shape=[2**40, 2**40, 0], end=0)},
        0,
        f"tensor 'a' in {{file}} has the shape [{2**40}, {2**40}, 0], whose bytes exceed 2**63 - 1; "
        "the header is corrupt: write the file again.",
    ),
    "negative length": (
        {"a": entry(shape=[-1])},
        4,
        f"the header of {{file}} is not valid JSON: the number -1 {NOT_U64}",
    ),
    "fraction": (
        {"a": entry(end=4.0)},
        4,
        f"the header of {{file}} is not valid JSON: the number 4.0 {NOT_U64}",
    ),
    "NaN": (
        b'{"a":NaN}',
        0,
        f"the header of {{file}} is not valid JSON: the number NaN {NOT_U64}",
    ),
    "thousands of digits": (
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}',
        1,
        f"the header of {{file}} is not valid JSON: the number {'9' * 24} {NOT_U64}",
    ),
    "true as a length": (
        {"a": entry(shape=[True])},
        4,
        "tensor 'a' in {file} has the shape [True]; it must be a list of integers: write the file again.",
    ),
    "offsets turned round": (
        {"a": entry(begin=4, end=0)},
        4,
        "tensor 'a' in {file} has the data_offsets [4, 0]; they must be [begin, end) with begin <= end: "
        "write the file again.",
    ),
    "three offsets": (
        {"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1, 2]}},
        1,
        "tensor 'a' in {file} has the data_offsets [0, 1, 2]; they must be [begin, end) with begin <= end: "
        "write the file again.",
    ),
    "unknown dtype": (
        {"a": entry(dtype="F13")},
        4,
        "tensor 'a' in {file} has the dtype 'F13', which raymerge does not read; "
        "convert the checkpoint to a common dtype (BF16, F16, F32, F8_E4M3, I64, ...).",
    ),
    "dtype is a list": (
        {"a": entry(dtype=[])},
        4,
        "tensor 'a' in {file} has the dtype [], which raymerge does not read; "
        "convert the checkpoint to a common dtype (BF16, F16, F32, F8_E4M3, I64, ...).",
    ),
    "entry without shape": (
        {"a": {"dtype": "U8", "data_offsets": [0, 1]}},
        1,
        f"tensor 'a' in {{file}} has the fields ['data_offsets', 'dtype']; it must have {FIELDS}: "
        "write the file again.",
    ),
    "entry is a number": (
        {"a": 7},
        0,
        f"tensor 'a' in {{file}} has 7; it must have {FIELDS}: write the file again.",
    ),
    "name twice": (
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        1,
        f"the header of {{file}} is not valid JSON: the key 'a' occurs twice; {AGAIN}",
    ),
    "field twice": (
        b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        1,
        f"the header of {{file}} is not valid JSON: the key 'dtype' occurs twice; {AGAIN}",
    ),
    "not UTF-8": (
        b'{"\xff":1}',
        0,
        f"the header of {{file}} is not UTF-8 (byte 2 is 0xff); {AGAIN}",
    ),
    "lone surrogate": (
        b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        1,
        "the name '\\ud800' in {file} holds a lone surrogate, which is not UTF-8: rename the tensor.",
    ),
    "not JSON": (
        b"{not json}",
        0,
        "the header of {file} is not valid JSON: Expecting property name enclosed in double quotes: "
        f"line 1 column 2 (char 1); {AGAIN}",
    ),
    "text after the object": (
        b"{} {}",
        0,
        f"the header of {{file}} is not valid JSON: Extra data: line 1 column 4 (char 3); {AGAIN}",
    ),
    "a list": (
        b"[1]",
        0,
        "the header of {file} begins with b'['; it must begin with b'{{': "
        f"it is corrupt or no safetensors file; {AGAIN}",
    ),
    "no header": (
        b"",
        0,
        "the header of {file} begins with b''; it must begin with b'{{': "
        f"it is corrupt or no safetensors file; {AGAIN}",
    ),
    "nested without end": (
        b'{"a":' + b"[" * 200_000,
        0,
        f"the header of {{file}} is nested too deeply; it holds one object per tensor: {AGAIN}",
    ),
    "metadata is a number": (
        {"__metadata__": {"format": 3}},
        0,
        "__metadata__ in {file} must map strings to strings; write the file again without it.",
    ),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_an_attack_is_refused_with_its_sentence(tmp_path: Path, attack: str) -> None:
    header, num_data_bytes, sentence = ATTACKS[attack]
    path = raw_file(tmp_path / "model.safetensors", header, num_data_bytes)
    with pytest.raises(CheckpointError) as raised:
        read_header(path)
    assert str(raised.value) == sentence.format(file=path)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", f"{{file}} has 0 bytes; a safetensors file has at least 8; {AGAIN}"),
        (b"1234567", f"{{file}} has 7 bytes; a safetensors file has at least 8; {AGAIN}"),
        (
            (100_000_001).to_bytes(8, "little") + b"{}",
            "{file} claims a header of 100,000,001 bytes; the limit is 100,000,000: "
            f"it is corrupt or no safetensors file; {AGAIN}",
        ),
        (
            (3).to_bytes(8, "little") + b"{}",
            f"{{file}} is truncated: its header needs 11 bytes, the file has 10; {AGAIN}",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "{file} is a Git LFS pointer, not the weights: run `git lfs pull` in its folder.",
        ),
    ],
)
def test_a_file_that_is_too_short_or_something_else_is_refused(
    tmp_path: Path, content: bytes, sentence: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as raised:
        read_header(path)
    assert str(raised.value) == sentence.format(file=path)


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"cannot read .*/none: No such file or directory; check the path"
    ):
        read_header(tmp_path / "none")


VALID = json.dumps(
    {
        "__metadata__": {"format": "pt"},
        "a": entry("F32", [2, 3], 0, 24),
        "b": entry("BF16", [], 24, 26),
        "c": entry("U8", [0, 9], 26, 26),
    }
).encode()
WORDS = (
    '0 -1 -0 24 1e2 2.0 [ ] { } , : " \\ "a" "dtype" "F64" "\\ud800" null true NaN 18446744073709551616 \x00 '
    + "9" * 30
)
PIECES = st.sampled_from([*(word.encode() for word in WORDS.split(" ")), b" ", b"\xff"])
EDIT = st.tuples(st.integers(0, len(VALID)), st.integers(0, 12), st.one_of(PIECES, st.binary(max_size=3)))


@given(
    edits=st.lists(EDIT, max_size=3),
    num_data_bytes=st.sampled_from([26, 26, 25, 27, 0]),
    longer=st.integers(-2, 2),
)
@settings(max_examples=400, deadline=None)
def test_a_mutated_header_is_either_refused_or_read_by_the_library_too(
    tmp_path_factory: pytest.TempPathFactory,
    edits: list[tuple[int, int, bytes]],
    num_data_bytes: int,
    longer: int,
) -> None:
    header = VALID
    for at, num_removed, inserted in edits:
        header = header[:at] + inserted + header[at + num_removed :]
    num_header_bytes = max(len(header) + longer, 0)
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    raw_file(path, header, num_data_bytes, num_header_bytes=num_header_bytes)
    try:
        tensors, _ = read_header(path)
    except CheckpointError:
        return
    with safetensors.safe_open(path, "pt") as library:
        assert set(library.keys()) == tensors.keys()
        for name, tensor in tensors.items():
            assert tuple(library.get_slice(name).get_shape()) == tensor.shape
            assert library.get_slice(name).get_dtype() == tensor.dtype


def test_45_000_tensors_are_read_in_seconds_from_a_sparse_file(tmp_path: Path) -> None:
    num_bytes = 2048 * 7168 * 2
    header = {
        f"model.layers.{i // 768}.mlp.experts.{i % 768}.gate_proj.weight": entry(
            "BF16", [2048, 7168], i * num_bytes, (i + 1) * num_bytes
        )
        for i in range(45_000)
    }
    path = raw_file(tmp_path / "large.safetensors", header)
    with open(path, "r+b") as stream:
        stream.truncate(path.stat().st_size + 45_000 * num_bytes)
    begin = time.thread_time()
    tensors, _ = read_header(path)
    # About 0.3 s on an idle core; the bound allows for a slow one.
    assert time.thread_time() - begin < 5
    assert len(tensors) == 45_000
