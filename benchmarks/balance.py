"""How evenly a step's work falls on 8 ranks: burnish's shares beside packs of equal tokens dealt out in order.

    python benchmarks/balance.py [--documents 40000] [--seed 0]

A simulation: no GPU, no weights, no tokens, only lengths. Documents have a median of about 900 tokens (log-normal); a
part of them is long instead, log-normal around 24k tokens or log-uniform from 8k to 128k; both are cut at 128k. They
are packed by best-fit decreasing into packs of 128k, the packs are shuffled, and a step is 8 ranks x 4 micro-batches
of one pack. The work of a document of n tokens is a*n + b*n^2, in FLOPs of Llama-3.1-8B, forward and backward, causal:
a = 6 * 7.50e9 (weights in matrix products, the head's among them), b = 6 * 32 layers * 32 heads * 128.

slowest/mean   work of the busiest rank over the mean, as the mean over the steps and the worst of them (ranks meet
               once a step)
in step        the same where ranks meet at every micro-batch: the sum of the slowest of each over the mean
full           tokens over the room of all micro-batches that hold any, the epoch's last, ragged step included
ms             to divide one step's documents, median and worst, on this machine

Writes benchmarks/results/balance.json.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np

from burnish.data.packing import Packs, pack
from burnish.data.share import Window, divided

CAP = 131072
RANKS, MICRO_BATCHES = 8, 4
COST = (6 * 7.50e9, 6.0 * 32 * 32 * 128)
MIXES = {
    "none long": (0.0, "lognormal"),
    "1 % long": (0.01, "lognormal"),
    "5 % long": (0.05, "lognormal"),
    "20 % long": (0.20, "lognormal"),
    "5 % long, log-uniform": (0.05, "uniform"),
    "20 % long, log-uniform": (0.20, "uniform"),
}


def lengths_of(mix: str, documents: int, seed: int) -> np.ndarray:
    """Tokens of each document.  [documents] int64"""
    share, kind = MIXES[mix]
    draw = np.random.default_rng(seed)
    lengths = draw.lognormal(np.log(900), 0.8, documents)
    if kind == "lognormal":
        long = draw.lognormal(np.log(24000), 1.0, documents)
    else:
        long = np.exp(draw.uniform(np.log(8000), np.log(CAP), documents))
    return np.clip(np.where(draw.random(documents) < share, long, lengths), 16, CAP).astype(np.int64)


def steps_of(packs: Packs, seed: int) -> list[Window]:
    """The epoch's steps: shuffled packs, each a micro-batch of its own."""
    order = np.random.default_rng([seed, 1]).permutation(len(packs))
    steps = []
    for at in range(0, len(order), RANKS * MICRO_BATCHES):
        tables = [packs.table(k) for k in order[at : at + RANKS * MICRO_BATCHES].tolist()]
        pieces = np.concatenate(tables)
        home = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
        steps.append(Window((pieces[:, 2] - pieces[:, 1])[:, None], pieces[:, :2], home))
    return steps


def in_order(window: Window) -> list[list[np.ndarray]]:
    """What packs of equal tokens get elsewhere: micro-batch i goes to rank i modulo ranks."""
    slots = -(-(int(window.home[-1]) + 1) // RANKS)
    return [[np.flatnonzero(window.home == rank + RANKS * slot) for slot in range(slots)] for rank in range(RANKS)]


def figures(steps: list[Window], divisions: list[list[list[np.ndarray]]]) -> dict[str, float]:
    """Of an epoch: see the top of this file. Steps with fewer packs than the others count in "full" alone."""
    slowest, in_step, tokens, used = [], [], 0, 0
    for window, parts in zip(steps, divisions, strict=True):
        lengths = window.lengths[:, 0].astype(np.float64)
        work = COST[0] * lengths + COST[1] * lengths**2
        loads = np.array([[work[slot].sum() for slot in part] for part in parts])  # [ranks, slots]
        tokens, used = tokens + int(lengths.sum()), used + int((loads > 0).sum())
        if window.home[-1] + 1 == RANKS * MICRO_BATCHES:
            slowest.append(loads.sum(axis=1).max() / loads.sum(axis=1).mean())
            in_step.append(loads.max(axis=0).sum() / loads.sum(axis=1).mean())
    return {
        "slowest_over_mean": float(np.mean(slowest)),
        "worst_step": float(np.max(slowest)),
        "in_step": float(np.mean(in_step)),
        "full": tokens / (CAP * used),
    }


def simulate(mix: str, documents: int, seed: int) -> dict[str, dict[str, float]]:
    """Figures of burnish's division of an epoch and of packs dealt out in order."""
    steps = steps_of(pack(lengths_of(mix, documents, seed), CAP), seed)
    divisions, seconds = [], []
    for window in steps:
        began = time.perf_counter()
        divisions.append(divided(window, CAP, RANKS, COST)[0])
        seconds.append(time.perf_counter() - began)
    ours = figures(steps, divisions)
    ours |= {"ms": 1e3 * float(np.median(seconds)), "worst_ms": 1e3 * max(seconds)}
    return {"burnish": ours, "in order": figures(steps, [in_order(window) for window in steps])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=40000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "balance.json")
    options = parser.parse_args()
    print("| documents | dealt | slowest/mean | worst step | in step | full | ms | worst ms |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    results = {}
    for mix in MIXES:
        results[mix] = simulate(mix, options.documents, options.seed)
        for name, found in results[mix].items():
            ms = f"{found['ms']:.1f} | {found['worst_ms']:.1f}" if "ms" in found else "|"
            print(
                f"| {mix} | {name} | {found['slowest_over_mean']:.3f} | {found['worst_step']:.3f} "
                f"| {found['in_step']:.3f} | {found['full']:.4f} | {ms} |",
                flush=True,
            )
    record = {
        "simulated": f"{RANKS} ranks x {MICRO_BATCHES} micro-batches of {CAP} tokens, Llama-3.1-8B's work",
        "documents": options.documents,
        "seed": options.seed,
        "timed_on": platform.processor() or platform.machine(),
        "mixes": results,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written {options.output}")


if __name__ == "__main__":
    main()
