"""SFT on the CPU: burnish beside TRL in one run, padded rows and packed rows, in turn.

    python benchmarks/train_cpu.py --model DIR --data sft_train.jsonl [--steps 5] [--rounds 3]

Batch 4, 512 tokens, float32, no gradient checkpointing, 2 threads. Prints medians over the rounds and the ratios round
by round, and writes benchmarks/results/train_cpu.json. Tokens are real ones (prompt and reply), never padding.
Needs trl==1.16.* installed beside burnish.
"""

import argparse
import json
import platform
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path

from parity_trl import first_rows
from workers import run_apart

BASE = {
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 4,
    "max_length": 512,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",
    "bf16": False,
}


def measure(engine: str, packing: bool, options: argparse.Namespace, rows: Path) -> dict[str, float]:
    config = {**BASE, "packing": packing, "max_steps": options.steps, "output_dir": tempfile.mkdtemp()}
    done = run_apart(engine, config, options.model, str(rows), threads=options.threads)
    tokens = [step["num_tokens"] for step in done["steps"]]
    return {
        "tok_s": (tokens[-1] - tokens[0]) / sum(done["seconds"]),
        "peak_gib": done["peak_gib"],
        "first_step_s": done["first_step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    rows = Path(tempfile.mkdtemp()) / "rows.jsonl"
    first_rows(options.data, rows, 1000)
    results: dict[str, list[dict]] = {}
    for number in range(options.rounds):
        for packing in (False, True):
            for engine in ("burnish", "trl"):
                name = f"{engine}, {'packed' if packing else 'rows'}"
                results.setdefault(name, []).append(measure(engine, packing, options, rows))
                print(f"round {number + 1}  {name:16s} " + json.dumps(results[name][-1]), flush=True)
    report(results, options)


def report(results: dict[str, list[dict]], options: argparse.Namespace) -> None:
    medians = {name: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for name, runs in results.items()}
    print(f"\n{'':18s}{'tok/s':>9s}{'peak GiB':>10s}{'first step s':>14s}")
    for name, values in medians.items():
        print(f"{name:18s}{values['tok_s']:9.1f}{values['peak_gib']:10.2f}{values['first_step_s']:14.1f}")
    ratios = {}
    for form in ("rows", "packed"):
        pairs = list(zip(results[f"burnish, {form}"], results[f"trl, {form}"], strict=True))
        ratios[form] = {k: statistics.median(a[k] / b[k] for a, b in pairs) for k in pairs[0][0]}
        shown = "  ".join(f"{k} {v:.2f}" for k, v in ratios[form].items())
        print(f"burnish / TRL, {form}: {shown}")
    packages = {name: version(name) for name in ("torch", "transformers", "trl", "burnish")}
    record = {
        "machine": f"{platform.processor() or platform.machine()}, {options.threads} threads",
        "versions": packages,
        "settings": {**BASE, "steps": options.steps, "rounds": options.rounds},
        "medians": medians,
        "ratios": ratios,
    }
    target = Path(__file__).parent / "results" / "train_cpu.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written {target}")


if __name__ == "__main__":
    main()
