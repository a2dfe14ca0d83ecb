"""Numbers on their way out: sums kept on the device until the log gate, metrics.jsonl, one line a step.

Model floating-point operations for MFU count what a training step must do: 6 per matrix weight and token, and
attention's 12 x width x (sum of squared lengths)/2 per layer; nothing for recomputation.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from burnish.config.errors import UserError

# Dense bf16 peaks in FLOP/s, from the makers' data sheets. A card that is not here gets no MFU rather than a guess.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12, "RTX 4090": 165e12}


class Accumulator:
    """Sums of (value, weight) by name. Both may be on a device and stay there; `take` reads all in one transfer."""

    def __init__(self) -> None:
        self._sums: dict[str, list] = {}

    def add(self, metrics: dict[str, tuple[Tensor | float, Tensor | float]]) -> None:
        for name, (value, weight) in metrics.items():
            entry = self._sums.setdefault(name, [0.0, 0.0])
            entry[0] = entry[0] + (value.detach() if isinstance(value, Tensor) else value)
            entry[1] = entry[1] + weight

    def take(self, across: Callable[[Tensor], Tensor] = lambda values: values) -> dict[str, float]:
        """{name: sum / weight} since the last call; empties the accumulator. Names with no weight are left out.

        across  makes of all these numbers their sums over several processes, which have the same names
        """
        sums, weights = ([entry[side] for entry in self._sums.values()] for side in (0, 1))
        read = _to_floats([*sums, *weights], across)
        pairs = zip(self._sums, read[: len(sums)], read[len(sums) :], strict=True)
        means = {name: value / weight for name, value, weight in pairs if weight}
        self._sums = {}
        if {"rewards/chosen", "rewards/rejected"} <= means.keys():  # of pairs, it is the mean of their margins
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        return means


def nothing(metrics: dict[str, tuple[Tensor | float, Tensor | float]]) -> dict:
    """The same names on the same devices with no value and no weight: of a batch that doesn't count."""
    zero = lambda x: torch.zeros_like(x.detach()) if isinstance(x, Tensor) else 0.0  # noqa: E731
    return {name: (zero(value), zero(weight)) for name, (value, weight) in metrics.items()}


def _to_floats(values: list[Tensor | float], across: Callable[[Tensor], Tensor]) -> list[float]:
    device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))
    plain = iter(torch.tensor([float(v) for v in values if not isinstance(v, Tensor)], dtype=torch.float64).to(device))
    stacked = [v.double().reshape(()).to(device) if isinstance(v, Tensor) else next(plain) for v in values]
    return across(torch.stack(stacked)).tolist() if stacked else []


def cost_of(model: nn.Module) -> tuple[float, float]:
    """(a, b): a sequence of n tokens costs a training step a*n + b*n^2 FLOPs."""
    return step_flops(model, 1, 0), step_flops(model, 0, 1)


def step_flops(model: nn.Module, num_tokens: int, sum_squared_lengths: int) -> float:
    """FLOPs of one forward and backward over num_tokens packed tokens (see the module's formula)."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None else None
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    matrices = sum(p.numel() for p in model.parameters() if p.ndim == 2)
    if embedding is not None and not getattr(text, "tie_word_embeddings", False):
        matrices -= embedding.weight.numel()  # a look-up; tied, the same matrix works once, at the head
    layers = getattr(text, "num_hidden_layers", 0)
    heads = getattr(text, "num_attention_heads", 0)
    width = heads * (getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // max(heads, 1))
    return 6.0 * matrices * num_tokens + 12.0 * layers * width * sum_squared_lengths / 2


def peak_flops() -> float | None:
    """bf16 FLOP/s of the first CUDA device as its maker states them, or None where it is not in the table."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(0)
    return next((peak for card, peak in PEAK_FLOPS.items() if card in name), None)


def memory_gib() -> float:
    """Peak memory of this process: allocated on the GPU where there is one, else resident. GiB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Log:
    """metrics.jsonl, the console, and log.txt, which has the console's lines again. Reads nothing back.

    What is said before the run's folder is known is held, and written when `open` names the folder; a resumed run
    appends.
    """

    def __init__(self, run_dir: Path | None, quiet: bool = False):
        self.path: Path | None = None
        self.quiet = quiet
        self.started = time.perf_counter()
        self.spent: dict[str, float] = {}  # seconds of the parts of the start, until they are said
        self._held: list[str] = []
        self._torn = False  # lines are missing in log.txt
        if run_dir is not None:
            self.open(run_dir)

    def open(self, run_dir: Path) -> None:
        """From now on write into `run_dir`, first the lines held so far."""
        self.path = run_dir / "metrics.jsonl"
        held, self._held = self._held, []
        for line in held:
            self.keep(line)

    def write(self, record: dict) -> None:
        """Append one record to metrics.jsonl. Raises UserError where that fails."""
        if self.path:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise UserError(
                    f"can't be written ({error.strerror or error})",
                    where=str(self.path),
                    mend="Make room, or the folder writable: the same command goes on from the last checkpoint",
                ) from error

    def say(self, topic: str, text: str) -> None:
        """One fact on one console line: the topic in the left column."""
        line = f"{topic:<8} {text}"
        if not self.quiet:
            print(line, flush=True)
        self.keep(line)

    def first_step(self, seconds: float) -> None:
        """Say, once, what the parts of the start took, and the first step after them."""
        spent, self.spent = self.spent, {}
        if spent:
            parts = "  ".join(f"{name} {took:.1f}" for name, took in {**spent, "first step": seconds}.items())
            self.say("start", f"{parts} s")

    def warn(self, text: str) -> None:
        if not self.quiet:
            print(f"burnish: {text}", file=sys.stderr, flush=True)
        self.keep(f"warning  {text}")

    def keep(self, line: str) -> None:
        """One line into log.txt only. Where that fails it is said once, and training goes on."""
        if self.path is None:
            self._held.append(line)
            return
        try:
            with self.path.with_name("log.txt").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        except OSError as error:
            if not self._torn:
                reason = error.strerror or error
                print(f"burnish: {self.path.with_name('log.txt')} misses lines ({reason})", file=sys.stderr, flush=True)
            self._torn = True


def step_line(step: int, max_steps: int, record: dict, seconds_left: float) -> str:
    """The console's line for one log record."""
    parts = [f"{step}/{max_steps}", f"loss {record['loss']:.4f}"]
    if "rewards/accuracies" in record:
        parts.append(f"acc {record['rewards/accuracies']:.3f}")
    parts += [f"lr {record['learning_rate']:.2e}", f"|g| {record['grad_norm']:.3f}"]
    trained = f" ({record['tok_s_trained']:,.0f} trained)" if record["tok_s_trained"] else ""  # a score trains no token
    parts.append(f"{record['tok_s']:,.0f} tok/s{trained}")
    if "mfu" in record:
        parts.append(f"MFU {record['mfu']:.0%}")
    if "imbalance" in record:
        parts.append(f"imbalance {record['imbalance']:.2f}")
    parts += [f"{record['mem_gib']:.1f} GiB", f"wait {record['data_wait']:.0%}", f"eta {clock(seconds_left)}"]
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as hh:mm:ss."""
    whole = int(seconds + 0.5)
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
