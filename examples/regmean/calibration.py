"""Write the texts that each of the demo's skills was trained on as a calibration set: a JSON object per line."""

import json
import sys
from pathlib import Path

WORK = Path(__file__).resolve().parents[2] / ".demo"


def write_calibration(work: Path) -> list[Path]:
    """Write `calibration/<skill>.jsonl` from the demo's training texts; labels are not needed and left out."""
    files = []
    (work / "calibration").mkdir(exist_ok=True)
    for skill, splits in json.loads((work / "texts.json").read_text()).items():
        file = work / "calibration" / f"{skill}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text, _ in splits["train"]))
        files.append(file)
    return files


if __name__ == "__main__":
    if not (WORK / "texts.json").exists():
        sys.exit(f"{WORK / 'texts.json'} does not exist; run `make demo` first")
    for written in write_calibration(WORK):
        print(written)
