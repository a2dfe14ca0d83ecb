"""The head on the CPU at a size that hurts: seconds and peak memory beside plain logits and torch's own fused loss.

    python -m burnish.verbs.bench.cpu_head WAY N H V THREADS

Each way lives in a process of its own, because a process's peak memory can't be taken back; the parent lets them run
in turns. A worker says {} when its inputs are made, then answers every line on its stdin with one of JSON: {"seconds",
"extra_bytes", "loss"}. extra_bytes is how far the process grew above what it held before, both gradients included.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

SHAPE = {"N": 4096, "H": 576, "V": 49152}
OURS = "burnish"
WAYS = (OURS, "logits + cross_entropy", "torch linear_cross_entropy")
WARM_UP_TOKENS = 64


def study(seconds: float, rounds: int = 3, threads: int = 2, shape: dict[str, int] | None = None) -> dict[str, Any]:
    """Medians over the rounds of every way: {"case", "shape", "threads", "rounds", "ways": {way: figures}}.

    One round in any case, up to `rounds` as far as `seconds` allow.
    """
    shape = shape or SHAPE
    began = time.perf_counter()
    workers = {way: _start(way, shape, threads) for way in WAYS}
    taken: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    try:
        for way, worker in workers.items():
            _answer(way, worker)  # all are ready: nobody is timed beside one that starts
        for number in range(rounds):
            spent = time.perf_counter() - began
            if number and spent * (number + 1) / number > seconds:
                break
            for way, worker in workers.items():
                taken[way].append(_ask(way, worker))
    finally:
        for worker in workers.values():
            worker.kill()
            worker.communicate()
    ways = {
        way: {
            "seconds": statistics.median(run["seconds"] for run in runs),
            "extra_bytes": max(run["extra_bytes"] for run in runs),
            "loss": runs[0]["loss"],
        }
        for way, runs in taken.items()
    }
    case = f"{shape['N']} tokens, H {shape['H']}, V {shape['V']}, float32, {threads} threads"
    return {"case": case, "shape": shape, "threads": threads, "rounds": len(taken[OURS]), "ways": ways}


def _start(way: str, shape: dict[str, int], threads: int) -> subprocess.Popen:
    numbers = [str(number) for number in (*shape.values(), threads)]
    command = [sys.executable, "-m", "burnish.verbs.bench.cpu_head", way, *numbers]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _ask(way: str, worker: subprocess.Popen) -> dict[str, float]:
    assert worker.stdin is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    return _answer(way, worker)


def _answer(way: str, worker: subprocess.Popen) -> dict[str, float]:
    assert worker.stdout is not None and worker.stderr is not None
    line = worker.stdout.readline()
    if not line:
        raise RuntimeError(f"{way} failed: {worker.stderr.read()[-2000:]}")
    return json.loads(line)


def _function(way: str) -> Callable:
    import torch
    import torch.nn.functional as F

    from burnish import kernels

    if way == OURS:
        return lambda x, weight, labels: kernels.linear_cross_entropy(x, weight, labels)
    if way == "logits + cross_entropy":
        return lambda x, weight, labels: F.cross_entropy(F.linear(x, weight), labels)
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight, labels: F.linear_cross_entropy(x, weight, labels, options=options)


def peak_bytes() -> int:
    """The most this process has ever held in memory."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024


def held_bytes() -> int:
    """What this process holds in memory now."""
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) * 1024


def main() -> None:
    way, *numbers = sys.argv[1:]
    tokens, hidden, vocab, threads = map(int, numbers)
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden, requires_grad=True)
    weight = (torch.randn(vocab, hidden) * hidden**-0.5).requires_grad_()
    labels = torch.randint(0, vocab, (tokens,))
    function = _function(way)
    few = slice(0, min(WARM_UP_TOKENS, tokens))
    torch.autograd.grad(function(x[few], weight[:512], labels[few] % 512), [x, weight])
    before = held_bytes()
    print("{}", flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        loss = function(x, weight, labels)
        grads = torch.autograd.grad(loss, [x, weight])
        seconds = time.perf_counter() - began
        figures = {"seconds": seconds, "extra_bytes": peak_bytes() - before, "loss": loss.item()}
        del loss, grads
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
