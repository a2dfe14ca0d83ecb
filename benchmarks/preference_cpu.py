"""DPO and ORPO on the CPU: burnish beside TRL in one run, and what the reference costs burnish's DPO.

    python benchmarks/preference_cpu.py --model DIR --data preference.jsonl [--steps 5] [--rounds 2]

Two pairs a batch, 512 tokens, float32, no gradient checkpointing, 2 threads. Prints medians over the rounds and the
ratios round by round, and writes benchmarks/results/preference_cpu.json. burnish's DPO also runs with the reference's
log-probs computed beforehand, two epochs, of which the second is timed, and without a reference: had the cached
log-probs a cost, the two would differ. Needs trl==1.16.* installed beside burnish.
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

PAIRS = 2  # a batch
BASE = {
    "learning_rate": 1e-6,
    "per_device_train_batch_size": PAIRS,
    "max_length": 512,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",
    "bf16": False,
}
# Name: engine, trainer, settings, epochs (the last one is timed).
RUNS: dict[str, tuple[str, str, dict, int]] = {
    "burnish, DPO": ("burnish", "DPO", {}, 1),
    "trl, DPO": ("trl", "DPO", {}, 1),
    "burnish, ORPO": ("burnish", "ORPO", {}, 1),
    "trl, ORPO": ("trl", "ORPO", {}, 1),
    "burnish, DPO, cached reference": ("burnish", "DPO", {"precompute_ref_log_probs": True}, 2),
    "burnish, DPO, no reference": ("burnish", "DPO", {"reference_free": True}, 2),
}
RATIOS = {
    "DPO": ("burnish, DPO", "trl, DPO"),
    "ORPO": ("burnish, ORPO", "trl, ORPO"),
    "cached reference / TRL's DPO": ("burnish, DPO, cached reference", "trl, DPO"),
    "cached reference / no reference": ("burnish, DPO, cached reference", "burnish, DPO, no reference"),
}


def measure(name: str, options: argparse.Namespace, rows: Path) -> dict[str, float]:
    """One run's figures. Every epoch is the same rows; the last one is timed, but for its first step."""
    engine, trainer, given, epochs = RUNS[name]
    config = {**BASE, **given, "max_steps": epochs * options.steps}
    done = run_apart(engine, config, options.model, str(rows), threads=options.threads, trainer=trainer)
    seconds = done["seconds"][-(options.steps - 1) :]
    return {
        "pairs_s": PAIRS * len(seconds) / sum(seconds),
        "peak_gib": done["peak_gib"],
        "first_step_s": done["first_step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="run the variants whose name holds this text; nothing is written")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("the first step is not timed: --steps 2 or more")
    results: dict[str, list[dict]] = {name: [] for name in RUNS if options.only in name}
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.jsonl"
        first_rows(options.data, rows, PAIRS * options.steps)
        for number in range(options.rounds):
            for name in results:
                results[name].append(measure(name, options, rows))
                print(f"round {number + 1}  {name:31s} " + json.dumps(results[name][-1]), flush=True)
    record = report(results, options)
    if not options.only:
        target = Path(__file__).parent / "results" / "preference_cpu.json"
        target.parent.mkdir(exist_ok=True)
        target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"written {target}")


def report(results: dict[str, list[dict]], options: argparse.Namespace) -> dict:
    """Print medians and ratios; return them with the settings."""
    medians = {name: {k: statistics.median(r[k] for r in runs) for k in runs[0]} for name, runs in results.items()}
    print(f"\n{'':31s}{'pairs/s':>9s}{'peak GiB':>10s}{'first step s':>14s}")
    for name, values in medians.items():
        print(f"{name:31s}{values['pairs_s']:9.3f}{values['peak_gib']:10.2f}{values['first_step_s']:14.1f}")
    ratios = {}
    for name, (one, other) in RATIOS.items():
        if {one, other} <= results.keys():
            both = list(zip(results[one], results[other], strict=True))
            ratios[name] = {k: statistics.median(a[k] / b[k] for a, b in both) for k in both[0][0]}
            shown = "  ".join(f"{k} {v:.2f}" for k, v in ratios[name].items())
            print(f"{name if '/' in name else f'burnish / TRL, {name}'}: {shown}")
    return {
        "machine": f"{platform.processor() or platform.machine()}, {options.threads} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "burnish")},
        "settings": {**BASE, "steps": options.steps, "rounds": options.rounds},
        "medians": medians,
        "ratios": ratios,
    }


if __name__ == "__main__":
    main()
