"""Fine-tune an encoder with a linear head on one skill, and measure encoders with such heads.

Encoder and head are kept apart: the encoders are what is merged, a head belongs to its skill. Each function runs
in a process of its own on one thread: results do not depend on the number of cores.

Shapes: B texts of a batch, T tokens, D hidden, L labels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from docstrings import Example
from safetensors.torch import load_model, save_model
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging

logging.disable_progress_bar()

SEED = 17
MAX_TOKENS = 48
BATCH = 32
NUM_EPOCHS = 3
LEARNING_RATE = 1.5e-4

#: Token ids (B, T), attention mask (B, T), labels (B,).
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def fine_tune(
    base: Path, examples: Sequence[Example], num_labels: int, encoder_out: Path, head_out: Path
) -> None:
    """Train encoder and head with AdamW, warm-up and linear decay, and save both.

    The products run in bfloat16 where the processor has them in hardware; weights and optimiser are float32.
    """
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoder = AutoModel.from_pretrained(base)
    head = torch.nn.Linear(encoder.config.hidden_size, num_labels)
    torch.nn.init.normal_(head.weight, std=0.02)
    steps = _training_batches(tokenizer, examples)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.01, fused=True)
    num_warmup = len(steps) // 10
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / num_warmup, (len(steps) - step) / (len(steps) - num_warmup)),
    )
    bfloat16 = _has_bfloat16()
    encoder.train()
    for tokens_BT, mask_BT, labels_B in steps:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            scores_BL = _scores(encoder, head, tokens_BT, mask_BT)
        functional.cross_entropy(scores_BL.float(), labels_B).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    encoder.save_pretrained(encoder_out)
    tokenizer.save_pretrained(encoder_out)
    save_model(head, str(head_out))


def accuracies(
    encoder_folder: Path, skills: Mapping[str, Sequence[Example]], num_labels: Mapping[str, int], heads: Path
) -> dict[str, float]:
    """Return, per skill, the share of examples whose label the encoder with that skill's head scores highest."""
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(encoder_folder)
    encoder = AutoModel.from_pretrained(encoder_folder, dtype=torch.float32).eval()
    result = {}
    for skill, examples in skills.items():
        head = torch.nn.Linear(encoder.config.hidden_size, num_labels[skill])
        load_model(head, str(heads / f"{skill}.safetensors"))
        num_right = 0
        with torch.inference_mode():
            for tokens_BT, mask_BT, labels_B in _batches(tokenizer, _by_length(examples)):
                predicted_B = _scores(encoder, head, tokens_BT, mask_BT).argmax(-1)
                num_right += int((predicted_B == labels_B).sum())
        result[skill] = num_right / len(examples)
    return result


def _scores(
    encoder: Any, head: torch.nn.Linear, tokens_BT: torch.Tensor, mask_BT: torch.Tensor
) -> torch.Tensor:
    """Return the head's scores (B, L) of the encoder's pooled output (B, D)."""
    pooled_BD = encoder(input_ids=tokens_BT, attention_mask=mask_BT).pooler_output
    scores_BL: torch.Tensor = head(functional.dropout(pooled_BD, 0.1, training=encoder.training))
    return scores_BL


def _training_batches(tokenizer: Any, examples: Sequence[Example]) -> list[Batch]:
    """Return the batches of all epochs; texts of like length go together, which halves the padding."""
    generator = torch.Generator().manual_seed(SEED)
    result: list[Batch] = []
    for _ in range(NUM_EPOCHS):
        order = torch.randperm(len(examples), generator=generator).tolist()
        pools = [order[begin : begin + 8 * BATCH] for begin in range(0, len(order), 8 * BATCH)]
        epoch = [
            batch for pool in pools for batch in _batches(tokenizer, _by_length([examples[i] for i in pool]))
        ]
        result += [epoch[i] for i in torch.randperm(len(epoch), generator=generator).tolist()]
    return result


def _by_length(examples: Sequence[Example]) -> list[Example]:
    return sorted(examples, key=lambda example: len(example.text))


def _batches(tokenizer: Any, examples: Sequence[Example]) -> list[Batch]:
    """Return padded batches of the examples in their order."""
    result = []
    for begin in range(0, len(examples), BATCH):
        chosen = examples[begin : begin + BATCH]
        tokens = tokenizer(
            [example.text for example in chosen],
            truncation=True,
            max_length=MAX_TOKENS,
            padding=True,
            return_tensors="pt",
        )
        labels_B = torch.tensor([example.label for example in chosen])
        result.append((tokens["input_ids"], tokens["attention_mask"], labels_B))
    return result


def _has_bfloat16() -> bool:
    information = Path("/proc/cpuinfo")
    return information.exists() and "avx512_bf16" in information.read_text()
