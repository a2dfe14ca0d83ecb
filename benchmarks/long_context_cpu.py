"""Peak memory of a training step against the length of its one document, by burnish and by TRL, on the CPU.

    python benchmarks/long_context_cpu.py --model DIR --data sft_train.jsonl [--lengths 1024 2048 4096 8192]
        [--only NAME ...] [--cap 10]

float32, gradient checkpointing in both, two steps of one document each, every point in a process of its own; the peak
is that process's resident memory (VmHWM). A point whose memory would exceed --cap GiB, going by the two before it, is
left out and named. Prints the bytes a token (least squares) and the ratios to TRL's, and writes
benchmarks/results/long_context_cpu.json. The documents are the texts of --data one after the other.
Needs trl==1.16.* installed beside burnish.
"""

import argparse
import json
import platform
import resource
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from workers import run_apart

BASE = {
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 1,
    "max_steps": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": True,
    "train_sampling_strategy": "sequential",
    "bf16": False,
}
# name: (engine, what its configuration adds)
RUNS: dict[str, tuple[str, dict]] = {
    "trl": ("trl", {}),
    "burnish": ("burnish", {}),
    "burnish, segments of 2": ("burnish", {"checkpoint_segment": 2}),
    "burnish, untiled": ("burnish", {"tile_tokens": 0}),
}
CHARACTERS = 8  # a token of the longest document stands for fewer: rows are cut to max_length by both


def documents(data: Path, target: Path, tokens: int, count: int) -> None:
    """`count` rows of more than `tokens` tokens of real text each."""
    texts = []
    for line in data.read_text(encoding="utf-8").rstrip("\n").split("\n"):  # rows may hold U+2028
        row = json.loads(line)
        texts.append(row["text"] if "text" in row else "\n".join(m["content"] for m in row["messages"]))
    size = tokens * CHARACTERS
    whole = "\n\n".join(texts)
    if len(whole) < size * count:
        raise SystemExit(f"{data} holds {len(whole)} characters, {size * count} are needed")
    rows = (json.dumps({"text": whole[i * size : (i + 1) * size]}) + "\n" for i in range(count))
    target.write_text("".join(rows), encoding="utf-8")


def slope(points: dict[int, dict]) -> float:
    """Bytes a token of the straight line through (length, peak), by least squares."""
    lengths, peaks = list(points), [point["peak_gib"] * 2**30 for point in points.values()]
    mean, level = sum(lengths) / len(lengths), sum(peaks) / len(peaks)
    rise = sum((t - mean) * (y - level) for t, y in zip(lengths, peaks, strict=True))
    return rise / sum((t - mean) ** 2 for t in lengths)


def measure(name: str, options: argparse.Namespace) -> Iterator[tuple[int, dict]]:
    """(length, figures) of every point that stays under the cap."""
    engine, extra = RUNS[name]
    points: dict[int, dict] = {}
    for length in options.lengths:
        if len(points) >= 2:
            (before, low), (last, high) = list(points.items())[-2:]
            expected = high["peak_gib"] + (high["peak_gib"] - low["peak_gib"]) / (last - before) * (length - last)
            if expected > options.cap:
                print(f"{name}, {length}: left out, about {expected:.1f} GiB expected", flush=True)
                yield length, {"left_out_at_gib": expected}
                continue
        rows = Path(tempfile.mkdtemp()) / "rows.jsonl"
        documents(options.data, rows, length, BASE["max_steps"])
        config = {**BASE, **extra, "max_length": length, "output_dir": tempfile.mkdtemp()}
        done = run_apart(engine, config, options.model, str(rows), threads=options.threads)
        tokens = [int(step["num_tokens"]) for step in done["steps"]]
        if tokens != [length, 2 * length]:
            raise SystemExit(f"{name}, {length}: {tokens} tokens were seen")
        points[length] = {
            "peak_gib": done["peak_gib"],
            "step_s": done["seconds"][0],
            "loss": done["steps"][-1]["loss"],
            "grad_norm": done["steps"][-1]["grad_norm"],
        }
        yield length, points[length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--only", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--cap", type=float, default=10.0, help="GiB that no process may exceed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "long_context_cpu.json")
    options = parser.parse_args()
    bytes_allowed = int(options.cap * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (bytes_allowed, bytes_allowed))  # inherited: a wrong guess ends there
    results: dict[str, dict[int, dict]] = {}
    for name in options.only:
        results[name] = {}
        for length, figures in measure(name, options):
            results[name][length] = figures
            print(f"{name:24s} {length:6d}  {json.dumps(figures)}", flush=True)
    report(results, options)


def report(results: dict[str, dict[int, dict]], options: argparse.Namespace) -> None:
    slopes = {}
    for name, points in results.items():
        found = {length: point for length, point in points.items() if "peak_gib" in point}
        if len(found) > 1:
            slopes[name] = slope(found)
    ratios = {name: value / slopes["trl"] for name, value in slopes.items()} if "trl" in slopes else {}
    print(f"\n{'':24s}{'KiB a token':>12s}{'of TRL':>8s}")
    for name, value in slopes.items():
        print(f"{name:24s}{value / 2**10:12.1f}{ratios.get(name, float('nan')):8.2f}")
    record = {
        "machine": f"{platform.processor() or platform.machine()}, {options.threads} threads",
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "burnish")},
        "model": Path(options.model).name,
        "settings": BASE,
        "points": results,
        "bytes_a_token": slopes,
        "of_trl": ratios,
    }
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written {options.output}")


if __name__ == "__main__":
    main()
