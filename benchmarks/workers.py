"""Training runs in a process of their own, by burnish or by TRL: what the comparisons start and read.

    python benchmarks/workers.py '{"engine": "burnish", "threads": 2, "jobs": [{"trainer": "SFT", ...}]}'

Prints one JSON line a job: {"steps": [{loss, grad_norm, ...}], "seconds": [...], "first_step": s, "peak_gib": x}.
"seconds" are the wall times of the steps after the first; "first_step" counts from the process's start and "peak_gib"
is the process's, so that a job to be timed must be its only one.
"""

import gc
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """A run: the name of a trainer ("SFT"), its configuration without output_dir, a model's folder, a file of rows."""

    trainer: str
    config: dict[str, Any]
    model: str
    rows: str


def run_jobs(engine: str, jobs: list[Job], *, threads: int, environment: dict | None = None) -> Iterator[dict]:
    """What each job printed, in turn, from one worker on `threads` of the cores that this process may use.

    The worker has an empty cache, and `environment` on top of this process's. Raises RuntimeError with its stderr if
    it fails.
    """
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    spec = {"engine": engine, "threads": threads, "jobs": [asdict(job) for job in jobs]}
    command = ["taskset", "-c", cores, sys.executable, str(Path(__file__).resolve()), json.dumps(spec)]
    with tempfile.TemporaryDirectory() as folder, Path(folder, "stderr").open("w+", encoding="utf-8") as errors:
        scene = {**os.environ, "BURNISH_CACHE": f"{folder}/cache", "BENCHMARK_OUT": folder, "HF_HUB_OFFLINE": "1"}
        scene |= environment or {}
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd="/", env=scene)
        assert worker.stdout is not None
        yield from (json.loads(line) for line in worker.stdout if line.startswith('{"steps"'))
        if worker.wait():
            errors.seek(0)
            raise RuntimeError(f"{engine} failed:\n{errors.read()[-3000:]}")


def run_apart(engine: str, config: dict, model: str, rows: str, *, threads: int, trainer: str = "SFT") -> dict:
    """One job in a worker of its own."""
    (done,) = run_jobs(engine, [Job(trainer, config, model, rows)], threads=threads)
    return done


class Clock:
    """A callback, for either engine, that notes when each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args, **kwargs):
        self.ends.append(time.time())


def trainer_of(engine: str, name: str):
    if engine == "burnish":
        import burnish

        return getattr(burnish, f"{name}Config"), getattr(burnish, f"{name}Trainer"), Clock()
    import trl
    from transformers import TrainerCallback

    home = trl if hasattr(trl, f"{name}Trainer") else __import__(f"trl.experimental.{name.lower()}", fromlist=["x"])

    class TransformersClock(Clock, TrainerCallback):
        pass

    return getattr(home, f"{name}Config"), getattr(home, f"{name}Trainer"), TransformersClock()


def work(engine: str, job: Job) -> dict:
    began = _process_start()
    config_class, trainer_class, clock = trainer_of(engine, job.trainer)
    arguments = {"output_dir": f"{os.environ['BENCHMARK_OUT']}/run", **job.config, "report_to": "none"}
    if engine == "burnish":
        arguments["overwrite_output_dir"] = True
        data: Any = job.rows
    else:
        from datasets import Dataset

        arguments["disable_tqdm"] = True
        data = Dataset.from_list([json.loads(line) for line in Path(job.rows).read_text("utf-8").splitlines()])
    trainer = trainer_class(model=job.model, args=config_class(**arguments), train_dataset=data, callbacks=[clock])
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
    return min(int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK"), time.time())


def main() -> None:
    spec = json.loads(sys.argv[1])
    import torch

    torch.set_num_threads(spec["threads"])
    for job in spec["jobs"]:
        print(json.dumps(work(spec["engine"], Job(**job))), flush=True)
        gc.collect()


if __name__ == "__main__":
    main()
