"""Statistics: tokens/s with 1 and 2 workers, a worker's memory on a model four times its budget, 64 GPUs on paper.

    python benchmarks/statistics_passes.py

Models are random, in the shapes of MiniLM (encoder) and of a small Llama, texts are random words. `--only paper`
computes the table for 64 GPUs from shapes alone, in seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from kept_file import Report, Spread, add_folder_options

_WORDS = 4000
_CHILD = """
import json, resource, sys
from raymerge.cluster.statistics import collect_statistics
from raymerge.cluster.statistics_options import StatisticsOptions
from raymerge.stats.data_rows import DataSpec
model, warm, texts, out, gib, samples = sys.argv[1:]
def run(model, out, gib):
    data = DataSpec(source=texts, samples=int(samples), batch_tokens=1024)
    options = StatisticsOptions(kind="gram", data=data, workers=1, in_process=True, memory_gib=gib)
    return collect_statistics(model, out, options)
run(warm, out + "-warm", None)  # libraries are in memory from here on
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = run(model, out, float(gib))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"num_groups": result.num_groups, "peak_bytes": (peak - before) * 1024}))
"""
#: Bytes of an element: of weights and hidden states on a GPU, of a Gram that is reduced, of one on disk.
_BF16, _FLOAT64, _FLOAT32 = 2, 8, 4


def main() -> None:
    """Parse the options, measure, keep the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=600, help="texts of the data")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=24, help="of the model that does not fit")
    parser.add_argument("--only", choices=["speed", "memory", "paper"], nargs="+")
    add_folder_options(parser)
    options = parser.parse_args()
    wanted = options.only or ["speed", "memory", "paper"]
    report = Report(
        "statistics",
        "Statistics: speed, memory, and 64 GPUs on paper",
        {"texts": options.rows, "runs": options.runs, "parts": " ".join(wanted)},
    )
    work = options.work / "statistics"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    texts = _write_texts(work / "texts.jsonl", options.rows)
    if "speed" in wanted:
        _measure_speed(report, work, texts, options.runs)
    if "memory" in wanted:
        _measure_memory(report, work, texts, options.layers)
    if "paper" in wanted:
        _on_paper(report)
    shutil.rmtree(work)
    report.write(options.results)


def _measure_speed(report: Report, work: Path, texts: Path, num_runs: int) -> None:
    from raymerge.cluster.statistics import collect_statistics
    from raymerge.cluster.statistics_options import StatisticsOptions
    from raymerge.stats.data_rows import DataSpec

    model = _write_bert(work / "encoder")
    rows = []
    for workers in (1, 2):
        speeds, updates, forwards = [], [], []
        for run in range(num_runs):
            out = work / f"speed-{workers}-{run}"
            data = DataSpec(source=str(texts), batch_tokens=2048)
            result = collect_statistics(
                str(model), out, StatisticsOptions(kind="gram", data=data, workers=workers, device="cpu")
            )
            group_seconds = _pass_seconds(result.statistics.manifest)
            speeds.append(result.statistics.num_tokens / group_seconds)
            updates.append(1000 * result.statistics.manifest["timing"]["update_tflops"])
            forwards.append(1000 * result.statistics.manifest["timing"]["forward_tflops"])
        spread = Spread.of(speeds)
        rows.append((f"{workers}", spread, Spread.of(updates), Spread.of(forwards)))
        report.data[f"{workers} workers"] = {"tokens_per_second": speeds, "update_gflops": updates}
        print(f"{workers} workers: {spread.median:,.0f} tokens/s", file=sys.stderr, flush=True)
    report.text(
        "Encoder of MiniLM's shape (6 layers, 384 wide), one thread a worker, a Ray of its own. Tokens/s are of the "
        "pass over the data with all Gram updates, without the start of Ray and of the workers. Rates of each "
        "worker's first shard; `forward` counts the linear maps' operations over the time of the whole forward pass. "
        "Least / median / greatest."
    )
    report.table(("workers", "tokens/s", "Gram update, GFLOP/s", "forward, GFLOP/s"), rows)


def _pass_seconds(manifest: dict[str, Any]) -> float:
    return float(manifest["timing"]["pass_seconds"])


def _measure_memory(report: Report, work: Path, texts: Path, num_layers: int) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=_WORDS + 4,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    model = work / "decoder"
    LlamaForCausalLM(config).save_pretrained(model, max_shard_size="500MB")
    _write_tokenizer(model)
    warm = _write_bert(work / "warm", num_layers=2)
    num_bytes = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    budget_gib = num_bytes / 4 / 2**30
    arguments = [model, warm, texts, work / "bounded", budget_gib, 64]
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    found = json.loads(done.stdout)
    report.data["memory"] = {**found, "model_bytes": num_bytes, "budget_gib": budget_gib}
    report.text(
        f"A decoder of {num_bytes / 2**30:.2f} GiB (float32, {num_layers} layers) measured with --memory-gib "
        f"{budget_gib:.2f}, a quarter of it: {found['num_groups']} layer groups, and the process grew by "
        f"{found['peak_bytes'] / 2**30:.2f} GiB at most (greatest resident set, after a run of a small model)."
    )


def _on_paper(report: Report) -> None:
    rows = []
    for name, shape in _LLAMAS.items():
        for num_workers in (8, 64):
            figures = paper_plan(shape, num_workers=num_workers)
            report.data[f"{name} on {num_workers}"] = figures
            gb = [f"{figures[key] / 1e9:,.1f}" for key in _COLUMNS]
            rows.append((f"{name}, {num_workers} GPUs", f"{figures['num_groups']}", *gb))
    report.text(
        "On paper: Gram statistics of 1,024 samples of 2,048 tokens in bf16, 60 GiB of a GPU for weights, sums and "
        "hidden states (the plan of `raymerge stats`; it takes inputs for unshared, so real groups are fewer). GB for "
        "each GPU: weights read, hidden states written to and read from the run folder between groups, Grams sent "
        "(float64 triangles, each once), Grams written (float32 triangles)."
    )
    report.table(("model", "groups", "weights read", "hidden states", "Grams sent", "Grams written"), rows)


#: hidden, intermediate, layers, heads, key-value heads, vocabulary
_LLAMAS = {
    "Llama-3.1-8B": (4096, 14336, 32, 32, 8, 128256),
    "Llama-3.1-70B": (8192, 28672, 80, 64, 8, 128256),
    "Llama-3.1-405B": (16384, 53248, 126, 128, 8, 128256),
}
_COLUMNS = ("weight_bytes", "hidden_bytes", "sent_bytes", "written_bytes")


def paper_plan(
    shape: tuple[int, ...],
    *,
    num_workers: int,
    num_tokens: int = 1024 * 2048,
    budget_bytes: int = 60 << 30,
    batch_tokens: int = 4096,
) -> dict[str, float]:
    """Return groups and bytes per GPU, from the shapes of a Llama alone."""
    from raymerge.merge_actors.methods.gram_matrix import triangle_elements
    from raymerge.stats.gram_accumulator import gram_bytes
    from raymerge.stats.layer_groups import Needs, plan_groups

    hidden, intermediate, num_layers, heads, kv_heads, vocabulary = shape
    kv = hidden // heads * kv_heads
    block = _BF16 * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * intermediate)
    inputs = [hidden] * 6 + [intermediate]  # q, k, v, o, gate, up; down
    distinct = [hidden] * 3 + [intermediate]
    needs = Needs(
        block_weights=[block] * num_layers,
        other_weights=2 * _BF16 * vocabulary * hidden,
        block_statistics=[sum(map(gram_bytes, inputs))] * num_layers,
        other_statistics=gram_bytes(hidden),
        activations=4 * intermediate * batch_tokens * _BF16,
    )
    plan = plan_groups(needs, budget_bytes, "60 GiB")
    num_groups = len(plan.groups)
    elements = num_layers * sum(map(triangle_elements, distinct)) + triangle_elements(hidden)
    # A model that is loaded layer by layer is read once in all, and so is one that is kept.
    kept_bytes = (num_groups - 1) * num_tokens / num_workers * hidden * _BF16
    return {
        "num_groups": num_groups,
        "weight_bytes": needs.other_weights + sum(needs.block_weights),
        "hidden_bytes": 2 * kept_bytes,
        "sent_bytes": _FLOAT64 * elements * (num_workers - 1) / num_workers,
        "written_bytes": _FLOAT32 * elements / num_workers,
    }


def _write_texts(path: Path, num_rows: int) -> Path:
    rng = random.Random(0)
    lines = [
        " ".join(f"word{rng.randrange(_WORDS)}" for _ in range(rng.randrange(16, 200)))
        for _ in range(num_rows)
    ]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def _write_bert(folder: Path, num_layers: int = 6) -> Path:
    import torch
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=_WORDS + 4,
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=num_layers,
        num_attention_heads=12,
    )
    BertForMaskedLM(config).save_pretrained(folder)
    _write_tokenizer(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", "<s>", "</s>", *(f"word{i}" for i in range(_WORDS))]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>").save_pretrained(
        folder
    )


if __name__ == "__main__":
    main()
