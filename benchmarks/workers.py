"""One training run in a process of its own, by burnish or by TRL: what the comparisons start and read.

    python benchmarks/workers.py '{"engine": "burnish", "config": {...}, "model": DIR, "rows": FILE}'

Prints one JSON line: {"steps": [{loss, grad_norm, ...}], "seconds": [...], "first_step": s, "peak_gib": x, ...}.
"seconds" are the wall times of the steps after the first; "first_step" counts from the process's start.
"""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path


def run_apart(engine: str, config: dict, model: str, rows: str, *, threads: int, trainer: str = "SFT") -> dict:
    """Start a worker on `threads` cores and return what it printed. Raises RuntimeError with its stderr if it fails."""
    spec = {"engine": engine, "config": config, "model": model, "rows": rows, "threads": threads, "trainer": trainer}
    cores = ",".join(map(str, range(threads)))
    command = ["taskset", "-c", cores, sys.executable, str(Path(__file__).resolve()), json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/")
    if done.returncode:
        raise RuntimeError(f"{engine} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


class Clock:
    """A callback, for either engine, that notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.time())


def _trainer_of(engine: str, name: str):
    if engine == "burnish":
        import burnish

        return getattr(burnish, f"{name}Config"), getattr(burnish, f"{name}Trainer"), Clock()
    import trl
    from transformers import TrainerCallback

    home = trl if hasattr(trl, f"{name}Trainer") else __import__(f"trl.experimental.{name.lower()}", fromlist=["x"])

    class TransformersClock(Clock, TrainerCallback):
        pass

    return getattr(home, f"{name}Config"), getattr(home, f"{name}Trainer"), TransformersClock()


def work(spec: dict) -> dict:
    began = _process_start()
    import torch

    torch.set_num_threads(spec["threads"])
    config_class, trainer_class, clock = _trainer_of(spec["engine"], spec["trainer"])
    arguments = {**spec["config"], "report_to": "none"}
    if spec["engine"] == "burnish":
        arguments["overwrite_output_dir"] = True
        data, model = spec["rows"], spec["model"]
    else:
        from datasets import Dataset

        arguments["disable_tqdm"] = True
        rows = [json.loads(line) for line in Path(spec["rows"]).read_text(encoding="utf-8").splitlines()]
        data, model = Dataset.from_list(rows), spec["model"]
    trainer = trainer_class(model=model, args=config_class(**arguments), train_dataset=data, callbacks=[clock])
    trainer.train()
    history = [record for record in trainer.state.log_history if "loss" in record]
    return {
        "steps": [{key: float(value) for key, value in record.items()} for record in history],
        "first_step": clock.ends[0] - began,
        "seconds": [b - a for a, b in zip(clock.ends, clock.ends[1:], strict=False)],
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def _process_start() -> float:
    """When this process began, in seconds of time.time()."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    boot = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    import os

    started = int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    return min(started, time.time())


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]))))
