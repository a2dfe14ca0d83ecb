"""burnish against TRL, step by step: the same rows in the same order, float32, their figures side by side.

    python benchmarks/parity_trl.py --model DIR [--data sft_train.jsonl] [--preference preference.jsonl]
        [--unpaired unpaired.jsonl] [--steps 10] [--only NAME]

SFT trains the model of --model for --steps, the preference objectives a small random one with its tokenizer for 8.
Needs trl==1.16.* installed beside burnish. Exits 1 when a step differs by more than 1e-4 relative.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from parity_preference import paired_cases, unpaired_cases
from workers import Job, run_jobs

LIMIT = 1e-4
# Nothing is timed here: freed memory is kept, which makes TRL 1.7 times faster, and waiting threads leave their core.
QUICK = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34), "OMP_WAIT_POLICY": "PASSIVE"}
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
REWARDS = ["rewards/chosen", "rewards/rejected"]
FIGURES = {
    "SFT": [],
    "DPO": REWARDS,
    "CPO": REWARDS,
    "ORPO": [*REWARDS, "nll_loss", "log_odds_ratio"],
    "KTO": [*REWARDS, "kl"],
    "Reward": ["mean_reward", "margin"],
}


def prompt_completion(path: Path, target: Path) -> None:
    """messages rows as prompt + completion rows."""
    with target.open("w", encoding="utf-8") as out:
        for line in path.read_text(encoding="utf-8").splitlines():
            messages = json.loads(line)["messages"]
            out.write(json.dumps({"prompt": messages[:-1], "completion": messages[-1:]}) + "\n")


def first_rows(path: Path, target: Path, count: int) -> None:
    target.write_text("\n".join(path.read_text(encoding="utf-8").splitlines()[:count]) + "\n", encoding="utf-8")


def sft_cases(data: Path, folder: Path, model: str, steps: int) -> dict[str, Job]:
    whole, split = folder / "messages.jsonl", folder / "prompt_completion.jsonl"
    first_rows(data, whole, 8 * steps)
    prompt_completion(whole, split)
    return {
        f"SFT, {form}, accumulation {accumulation}": Job(
            "SFT", {"max_steps": steps, "gradient_accumulation_steps": accumulation}, model, str(rows)
        )
        for form, rows in (("full sequence", whole), ("completion only", split))
        for accumulation in (1, 4)
    }


def difference(key: str, ours: list[dict], theirs: list[dict], number: int) -> float:
    """Of a step's figure, relative to TRL's, or to a tenth of the run's largest where that is more.

    Of rewards and the like to the run's largest: they start at 0, and are differences of sums of log-probs near 1000,
    where float32 has steps of 6e-5.
    """
    a, b = ours[number][key], theirs[number][key]
    largest = max(abs(step[key]) for step in theirs)
    scale = max(abs(b), largest / 10) if key in ("loss", "grad_norm") else largest
    return abs(a - b) / scale if scale else abs(a)


def compare(name: str, trainer: str, ours: list[dict], theirs: list[dict]) -> float:
    """Print each step's figures, return the largest difference."""
    assert len(ours) == len(theirs)
    worst = 0.0
    print(f"\n{name}")
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        cells = []
        for key in ("loss", "grad_norm", *FIGURES[trainer]):
            found = difference(key, ours, theirs, number)
            worst = max(worst, found) if found == found else float("inf")
            cells.append(f"{key} {a[key]:.6f} {b[key]:.6f} ({found:.1e})")
        print(f"  step {number + 1:2d}  " + "   ".join(cells))
    print(f"  largest relative difference {worst:.2e}  {'ok' if worst <= LIMIT else 'TOO LARGE'}", flush=True)
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, help="rows of messages")
    parser.add_argument("--preference", type=Path, help="rows of prompt, chosen and rejected messages")
    parser.add_argument("--unpaired", type=Path, help="rows of prompt and completion messages and label")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="run the cases whose name holds this text")
    options = parser.parse_args()
    if not (options.data or options.preference or options.unpaired):
        parser.error("give --data, --preference or --unpaired")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        cases: dict[str, Job] = {}
        if options.data:
            cases |= sft_cases(options.data, folder, options.model, options.steps)
        if options.preference:
            cases |= paired_cases(options.preference, folder, options.model)
        if options.unpaired:
            cases |= unpaired_cases(options.unpaired, folder, options.model)
        cases = {name: job for name, job in cases.items() if options.only in name}
        jobs = [Job(job.trainer, {**BASE, **job.config}, job.model, job.rows) for job in cases.values()]
        runs = [
            list(run_jobs(engine, jobs, threads=options.threads, environment=QUICK)) for engine in ("burnish", "trl")
        ]
        worst = {
            name: compare(name, job.trainer, ours["steps"], theirs["steps"])
            for (name, job), ours, theirs in zip(cases.items(), *runs, strict=True)
        }
    print(f"\n{'largest relative difference':>{max(map(len, worst), default=0) + 10}}")
    for name, value in worst.items():
        print(f"{name:{max(map(len, worst))}}  {value:.1e}{'' if value <= LIMIT else '  TOO LARGE'}")
    return 0 if worst and max(worst.values()) <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
