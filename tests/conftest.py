"""What all tests share: a hermetic environment, one local Ray per session, tiny checkpoints made on the spot.

Nothing is downloaded. The environment is set when this file is imported, before any test can import ray,
torch or transformers.
"""

import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from object_store import ObjectStore, running_object_store

os.environ["RAY_AUTH_MODE"] = "disabled"  # no token of the user's is read or left behind
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("RAY_ADDRESS", None)  # never attach to somebody's cluster
os.environ["RAYMERGE_CACHE"] = tempfile.mkdtemp(prefix="raymerge-cache-")
# The object store that tests know, whether or not it gets started: workers inherit where it is.
_STORE_SOCKET = socket.create_server(("127.0.0.1", 0))
os.environ["AWS_ENDPOINT_URL"] = "http://{}:{}".format(*_STORE_SOCKET.getsockname())
os.environ["AWS_ACCESS_KEY_ID"] = "test-key-id"
os.environ["AWS_SECRET_ACCESS_KEY"] = "a-secret-of-the-tests"
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"

VOCABULARY_ROWS = 96
SPECIAL_TOKENS = ["<pad>", "<unk>", "<s>", "</s>"]


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["RAYMERGE_CACHE"], ignore_errors=True)
    _STORE_SOCKET.close()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what uses Ray, run it last, and skip what needs a GPU where there is none."""
    for item in items:
        if "ray_session" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
    items.sort(key=lambda item: item.get_closest_marker("ray") is not None)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One embedded Ray for all tests that ask for it; starting one takes about five seconds."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,  # logical: more actors than cores is fine for tests
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        namespace="tests",
        logging_level="ERROR",
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def object_store_server() -> Iterator[ObjectStore]:
    """One S3 server for all tests that ask for it."""
    yield from running_object_store(_STORE_SOCKET)


@pytest.fixture
def object_store(object_store_server: ObjectStore) -> Iterator[ObjectStore]:
    """Return the S3 server, with nothing counted and no fault planned."""
    object_store_server.forget()
    object_store_server.faults.clear()
    yield object_store_server
    object_store_server.faults.clear()


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyFamily:
    """A random base and three models that differ from it by small deltas, as Hugging Face folders."""

    base: Path
    models: tuple[Path, ...]


def _configs() -> dict[str, Any]:
    """Return the architectures: encoder, decoder, decoder with Conv1D and tied head, encoder-decoder."""
    from transformers import BertConfig, GPT2Config, LlamaConfig, T5Config

    rows = VOCABULARY_ROWS
    heads = {"num_attention_heads": 4, "num_hidden_layers": 2}
    return {
        "bert": BertConfig(
            vocab_size=rows, hidden_size=32, intermediate_size=64, max_position_embeddings=64, **heads
        ),
        "llama": LlamaConfig(
            vocab_size=rows,
            hidden_size=32,
            intermediate_size=80,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            **heads,
        ),
        "gpt2": GPT2Config(vocab_size=rows, n_embd=32, n_layer=2, n_head=4, n_positions=64),
        "t5": T5Config(vocab_size=rows, d_model=32, d_ff=64, d_kv=8, num_layers=2, num_heads=4),
    }


def _random_model(architecture: str, *, tied: bool) -> Any:
    """Return the architecture's model with seeded random weights."""
    import torch
    from transformers import BertForMaskedLM, GPT2LMHeadModel, LlamaForCausalLM, T5ForConditionalGeneration

    classes = {
        "bert": BertForMaskedLM,
        "llama": LlamaForCausalLM,
        "gpt2": GPT2LMHeadModel,
        "t5": T5ForConditionalGeneration,
    }
    config = _configs()[architecture]
    if architecture == "llama":
        config.tie_word_embeddings = tied
    with torch.random.fork_rng():
        torch.manual_seed(20)
        return classes[architecture](config).eval()


def _tiny_tokenizer() -> Any:
    """Return a word-level tokenizer as large as the vocabulary of the tiny models."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = [f"word{i}" for i in range(VOCABULARY_ROWS - len(SPECIAL_TOKENS))]
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS + words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def _write_family(root: Path, architecture: str, *, dtype: str, sharded: bool, tied: bool) -> TinyFamily:
    """Write base and three models; the same weights for every dtype and sharding, up to rounding."""
    import torch

    tokenizer = _tiny_tokenizer()
    folders = [root / name for name in ("base", "first", "second", "third")]
    for seed, folder in enumerate(folders):
        model = _random_model(architecture, tied=tied)
        if folder.name != "base":
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=2e-3)
        shard_size = "20KB" if sharded else "1GB"
        model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=shard_size)
        tokenizer.save_pretrained(folder)
    return TinyFamily(base=folders[0], models=tuple(folders[1:]))


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TinyFamily]:
    """Return a maker of tiny families, each written once per session: treat the folders as read-only.

    `tiny_checkpoints("llama", dtype="bfloat16", sharded=True)`; architectures: bert, llama, gpt2, t5.
    `tied` ties the head of llama to its embedding (gpt2, t5 and bert always are).
    """
    made: dict[tuple[str, str, bool, bool], TinyFamily] = {}

    def make(
        architecture: str, *, dtype: str = "float32", sharded: bool = False, tied: bool = False
    ) -> TinyFamily:
        key = (architecture, dtype, sharded, tied)
        if key not in made:
            root = tmp_path_factory.mktemp(architecture)
            made[key] = _write_family(root, architecture, dtype=dtype, sharded=sharded, tied=tied)
        return made[key]

    return make
