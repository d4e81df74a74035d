"""Shapes of the benchmarks' models: names, shapes and dtypes of all tensors, in checkpoint order.

Llama-shaped ones are written with weights by `make_models.py`; the mixture-of-experts one has
671 billion parameters and is written as headers over sparse files by `plan_scale.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from raymerge.merge_actors.checkpoint.layout import OutputTensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaShape:
    """Sizes of a Llama-like decoder, embeddings untied."""

    hidden: int
    intermediate: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocabulary: int

    def tensors(self) -> list[OutputTensor]:
        """Return every tensor, bf16, in the order of the network."""
        return [OutputTensor(name, "BF16", shape) for name, shape in self._shapes()]

    def config(self) -> dict[str, Any]:
        """Return what goes into config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "bfloat16",
        }

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        kv = self.hidden // self.num_heads * self.num_kv_heads
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.self_attn.q_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.self_attn.k_proj.weight", (kv, self.hidden)
            yield f"{prefix}.self_attn.v_proj.weight", (kv, self.hidden)
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, self.hidden)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            yield f"{prefix}.mlp.gate_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.intermediate, self.hidden)
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.intermediate)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)


#: `--shape` of the benchmarks. 1.1b is TinyLlama's shape, 3.4b (three times the size) OpenLLaMA-3B's.
LLAMA_SHAPES = {
    "tiny": LlamaShape(
        hidden=64, intermediate=160, num_layers=2, num_heads=4, num_kv_heads=2, vocabulary=512
    ),
    "small": LlamaShape(
        hidden=512, intermediate=1408, num_layers=8, num_heads=8, num_kv_heads=4, vocabulary=32000
    ),
    "1.1b": LlamaShape(
        hidden=2048, intermediate=5632, num_layers=22, num_heads=32, num_kv_heads=4, vocabulary=32000
    ),
    "3.4b": LlamaShape(
        hidden=3200, intermediate=8640, num_layers=26, num_heads=32, num_kv_heads=32, vocabulary=32000
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeShape:
    """Sizes of a DeepSeek-V3-like mixture of experts with latent attention, all bf16."""

    num_layers: int = 61
    num_dense_layers: int = 3
    num_experts: int = 256
    hidden: int = 7168
    expert_intermediate: int = 2048
    dense_intermediate: int = 18432
    num_heads: int = 128
    query_rank: int = 1536
    latent_rank: int = 512
    vocabulary: int = 129280

    def tensors(self) -> list[OutputTensor]:
        """Return every tensor in the order of the network."""
        return [OutputTensor(name, "BF16", shape) for name, shape in self._shapes()]

    def config(self) -> dict[str, Any]:
        """Return what goes into config.json: as much as a merge reads."""
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.num_layers,
            "n_routed_experts": self.num_experts,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.num_layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            for name, shape in self._attention().items():
                yield f"{prefix}.self_attn.{name}.weight", shape
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
            if layer < self.num_dense_layers:
                yield from self._feed_forward(f"{prefix}.mlp", self.dense_intermediate)
                continue
            yield f"{prefix}.mlp.gate.weight", (self.num_experts, self.hidden)
            yield f"{prefix}.mlp.gate.e_score_correction_bias", (self.num_experts,)
            yield from self._feed_forward(f"{prefix}.mlp.shared_experts", self.expert_intermediate)
            for expert in range(self.num_experts):
                yield from self._feed_forward(f"{prefix}.mlp.experts.{expert}", self.expert_intermediate)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def _attention(self) -> dict[str, tuple[int, ...]]:
        nope, rope, value = 128, 64, 128
        return {
            "q_a_proj": (self.query_rank, self.hidden),
            "q_a_layernorm": (self.query_rank,),
            "q_b_proj": (self.num_heads * (nope + rope), self.query_rank),
            "kv_a_proj_with_mqa": (self.latent_rank + rope, self.hidden),
            "kv_a_layernorm": (self.latent_rank,),
            "kv_b_proj": (self.num_heads * (nope + value), self.latent_rank),
            "o_proj": (self.hidden, self.num_heads * value),
        }

    def _feed_forward(self, prefix: str, intermediate: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{prefix}.gate_proj.weight", (intermediate, self.hidden)
        yield f"{prefix}.up_proj.weight", (intermediate, self.hidden)
        yield f"{prefix}.down_proj.weight", (self.hidden, intermediate)
