"""Measure the encoders of .demo/regmean on every skill's test texts, beside the demo's own, and print the table."""

import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "demo"))

import demo  # noqa: E402 - of examples/demo
import report  # noqa: E402


def main() -> None:
    """Measure one encoder per process, as the demo does."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    merged = sorted(path for path in (demo.WORK / "regmean").glob("*") if path.is_dir())
    if not merged:
        sys.exit(f"{demo.WORK / 'regmean'} holds no merges; see examples/regmean/README.md")
    import finetune

    results = json.loads((demo.WORK / "results.json").read_text())
    texts = demo.read_texts("test")
    with demo.one_process_per_core() as pool:
        futures = {
            folder.name: pool.submit(
                finetune.accuracies, folder, texts, results["num_labels"], demo.WORK / "heads"
            )
            for folder in merged
        }
        results["accuracy"] |= {name: future.result() for name, future in futures.items()}
    results["recipes"] |= dict.fromkeys(futures, "")
    print(report.table(results))


if __name__ == "__main__":
    main()
