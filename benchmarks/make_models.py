"""Make a Llama-shaped base and its fine-tunes in bf16, the size of real ones, from a seed.

    python benchmarks/make_models.py .bench/models/1.1b --shape 1.1b

The base's matrices are normal with standard deviation 0.02. A fine-tune adds a normal delta of
1e-3 and rounds to bf16, so its deltas are as small and as coarse as those of real supervised
fine-tuning: many are exactly zero, many are equal. Tensors are made a chunk at a time; memory
does not grow with the model. The same options give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from model_shapes import LLAMA_SHAPES, LlamaShape
from numpy.typing import NDArray

from raymerge.merge_actors.checkpoint.layout import INDEX_NAME, Layout, OutputTensor, lay_out, parse_size

_CHUNK = 1 << 20
_BASE_STD = 0.02
#: Written last: a folder without it was cut short and is made again.
_DONE = "made_by_benchmark.json"


def make_models(
    folder: Path,
    shape: LlamaShape,
    *,
    num_fine_tunes: int = 3,
    seed: int = 0,
    delta_std: float = 1e-3,
    shard_size: str = "5GB",
) -> tuple[Path, list[Path]]:
    """Make what is missing under `folder`: `base` and `fine_tune_1`, `fine_tune_2`, ...

    Returns:
        the base's folder and the fine-tunes' folders.
    """
    layout = lay_out(shape.tensors(), parse_size(shard_size))
    recipe = {"shape": shape.config(), "seed": seed, "delta_std": delta_std, "shard_size": shard_size}
    base = folder / "base"
    fine_tunes = [folder / f"fine_tune_{i + 1}" for i in range(num_fine_tunes)]
    for number, model in enumerate([base, *fine_tunes]):
        if _is_made(model, recipe):
            continue
        shutil.rmtree(model, ignore_errors=True)
        model.mkdir(parents=True)
        print(f"making {model.name}: {layout.num_bytes / 1e9:,.2f} GB", file=sys.stderr)
        _write_weights(model, layout, shape, number, seed, delta_std, None if number == 0 else base)
        write_small_files(model, shape.config(), layout)
        (model / _DONE).write_text(json.dumps(recipe))
    return base, fine_tunes


def write_small_files(model: Path, config: dict[str, Any], layout: Layout) -> None:
    """Write config, generation config, tokenizer and, for several shards, the index."""
    documents: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 1},
        "tokenizer.json": _byte_tokenizer(),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "model_max_length": 2048,
        },
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": "</s>"},
    }
    if layout.index is not None:
        documents[INDEX_NAME] = layout.index
    for name, document in documents.items():
        (model / name).write_text(json.dumps(document, indent=1))


def _is_made(model: Path, recipe: dict[str, Any]) -> bool:
    try:
        return bool(json.loads((model / _DONE).read_text()) == recipe)
    except FileNotFoundError:
        return False


def _write_weights(
    model: Path,
    layout: Layout,
    shape: LlamaShape,
    number: int,
    seed: int,
    delta_std: float,
    base: Path | None,
) -> None:
    tensors = {tensor.name: tensor for tensor in shape.tensors()}
    for file in layout.files:
        source = open(base / file.name, "rb") if base else None
        with open(model / file.name, "wb") as out:
            out.write(file.header)
            for name, (begin, _) in file.tensors.items():
                if source:
                    source.seek(begin)
                generator = np.random.Generator(np.random.SFC64([seed, number, zlib.crc32(name.encode())]))
                for chunk in _chunks(tensors[name], generator, delta_std, source):
                    out.write(chunk.tobytes())
        if source:
            source.close()


def _chunks(
    tensor: OutputTensor, generator: np.random.Generator, delta_std: float, source: BinaryIO | None
) -> Iterator[NDArray[np.uint16]]:
    """Yield a tensor's elements as bf16 bits: fresh ones, or the base's plus a delta."""
    mean, std = (1.0, 0.1) if len(tensor.shape) == 1 else (0.0, _BASE_STD)
    for at in range(0, tensor.num_elements, _CHUNK):
        count = min(_CHUNK, tensor.num_elements - at)
        values = generator.standard_normal(count, dtype=np.float32)
        if source is None:
            values *= np.float32(std)
            values += np.float32(mean)
        else:
            values *= np.float32(delta_std)
            values += _from_bf16(np.frombuffer(source.read(2 * count), np.uint16))
        yield _to_bf16(values)


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even, as the hardware does."""
    bits = values.view(np.uint32)
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded: NDArray[np.uint16] = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    return rounded


def _from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    values: NDArray[np.float32] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def _byte_tokenizer() -> dict[str, Any]:
    """Return a byte-level tokenizer.json: two special tokens and one token per byte."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    # The byte-level alphabet: bytes without a glyph of their own take the code points from 256 on.
    alphabet = sorted(chr(byte) for byte in visible) + [chr(256 + i) for i in range(len(hidden))]
    vocabulary = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **special} for i, token in enumerate(["<s>", "</s>"])],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def main() -> None:
    """Parse the options and make the models."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=LLAMA_SHAPES, default="1.1b")
    parser.add_argument("--fine-tunes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--delta-std", type=float, default=1e-3)
    parser.add_argument("--shard-size", default="5GB", help="5GB, 500MiB, 1B (parameters)")
    options = parser.parse_args()
    base, fine_tunes = make_models(
        options.folder,
        LLAMA_SHAPES[options.shape],
        num_fine_tunes=options.fine_tunes,
        seed=options.seed,
        delta_std=options.delta_std,
        shard_size=options.shard_size,
    )
    print("\n".join(os.fspath(model) for model in [base, *fine_tunes]))


if __name__ == "__main__":
    main()
