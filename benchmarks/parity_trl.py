"""burnish against TRL, step by step: the same rows in the same order, float32, loss and gradient norm side by side.

    python benchmarks/parity_trl.py --model DIR --data sft_train.jsonl [--steps 10] [--only NAME]

Needs trl==1.16.* installed beside burnish. Exits 1 when a step differs by more than 1e-4 relative.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from workers import run_apart

LIMIT = 1e-4
BASE = {
    "learning_rate": 1e-4,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "max_length": 512,
    "train_sampling_strategy": "sequential",
    "bf16": False,
    "seed": 42,
}


def prompt_completion(path: Path, target: Path) -> None:
    """messages rows as prompt + completion rows."""
    with target.open("w", encoding="utf-8") as out:
        for line in path.read_text(encoding="utf-8").splitlines():
            messages = json.loads(line)["messages"]
            out.write(json.dumps({"prompt": messages[:-1], "completion": messages[-1:]}) + "\n")


def first_rows(path: Path, target: Path, count: int) -> None:
    target.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[:count]) + "\n", encoding="utf-8")


def compare(name: str, config: dict, model: str, rows: Path, trainer: str, keys: list[str], threads: int) -> float:
    """Run both, print each step's figures, return the largest relative difference."""
    folder = tempfile.mkdtemp()
    ours, theirs = (
        run_apart(
            engine, {**config, "output_dir": f"{folder}/{engine}"}, model, str(rows), threads=threads, trainer=trainer
        )
        for engine in ("burnish", "trl")
    )
    worst = 0.0
    print(f"\n{name}")
    for number, (a, b) in enumerate(zip(ours["steps"], theirs["steps"], strict=True), 1):
        cells = []
        for key in keys:
            difference = abs(a[key] - b[key]) / max(abs(b[key]), 1e-3)
            worst = max(worst, difference)
            cells.append(f"{key} {a[key]:.6f} {b[key]:.6f} ({difference:.1e})")
        print(f"  step {number:2d}  " + "   ".join(cells))
    print(f"  largest relative difference {worst:.2e}  {'ok' if worst <= LIMIT else 'TOO LARGE'}")
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", help="run the cases whose name holds this text")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    whole, split = folder / "messages.jsonl", folder / "prompt_completion.jsonl"
    first_rows(options.data, whole, 8 * options.steps)
    prompt_completion(whole, split)
    worst = 0.0
    for form, rows in (("full sequence", whole), ("completion only", split)):
        for accumulation in (1, 4):
            name = f"SFT, {form}, accumulation {accumulation}"
            if options.only and options.only not in name:
                continue
            config = {**BASE, "max_steps": options.steps, "gradient_accumulation_steps": accumulation}
            worst = max(
                worst, compare(name, config, options.model, rows, "SFT", ["loss", "grad_norm"], options.threads)
            )
    return 0 if worst <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
