"""Training steps at 8k packed tokens: burnish beside TRL on models of real shapes with random weights.

    python benchmarks/train_gpu.py [--tiny] [--steps 6] [--only TEXT]

SFT on 4 documents of 2048 tokens a step, packed; DPO on 4 pairs of four lengths, 8192 tokens a step. Parameters and
moments are bfloat16, gradient checkpointing is on, both engines use their defaults otherwise. The 8B model is trained
whole (needs 100 GB; "out of memory" is then a result) and with LoRA. Prints tokens a second, MFU and peak memory
(medians over the steps after the first two) and writes benchmarks/results/train-CARD.json. On a CPU, and with --tiny,
tiny models of the same families in float32. Without trl==1.16.* burnish runs alone, and the results say so.

MFU counts what a step must do: 2 operations a weight, token and pass (forward, inputs' gradients, weights' gradients
where trained, the reference's forward), causal attention by the sum of squared lengths; nothing for checkpointing.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from workers import Clock, trainer_of

WORDS = 1000
WARM_UP = 2  # steps that are not timed: kernels compile, the optimizer makes its state
# hidden, MLP, layers, query heads, key heads, head size, vocabulary, tied
SHAPES = {
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 128, 128256, False),
    "Qwen3-0.6B": (1024, 3072, 28, 16, 8, 128, 151936, True),
    "tiny Llama": (64, 96, 2, 4, 2, 16, 1024, False),
    "tiny Qwen3": (64, 96, 2, 4, 2, 16, 1024, True),
}
# Name: model, trainer, LoRA.
CASES = {
    "Qwen3-0.6B, SFT": ("Qwen3-0.6B", "SFT", False),
    "Qwen3-0.6B, DPO": ("Qwen3-0.6B", "DPO", False),
    "Llama-3-8B, SFT with LoRA": ("Llama-3-8B", "SFT", True),
    "Llama-3-8B, DPO with LoRA": ("Llama-3-8B", "DPO", True),
    "Llama-3-8B, SFT": ("Llama-3-8B", "SFT", False),
}
TINY_CASES = {
    "tiny Qwen3, SFT": ("tiny Qwen3", "SFT", False),
    "tiny Qwen3, DPO": ("tiny Qwen3", "DPO", False),
    "tiny Llama, SFT with LoRA": ("tiny Llama", "SFT", True),
    "tiny Llama, DPO with LoRA": ("tiny Llama", "DPO", True),
}
PACKAGES = ("burnish", "torch", "triton", "transformers", "trl", "flash-attn")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model(name: str, device: str) -> Any:
    """The shape with random weights, bfloat16 on a GPU."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    hidden, mlp, layers, heads, key_heads, head_dim, vocab, tied = SHAPES[name]
    config = (Qwen3Config if "Qwen3" in name else LlamaConfig)(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    attention = "flash_attention_2" if device == "cuda" and find_spec("flash_attn") else "sdpa"
    with torch.device(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)


def make_tokenizer() -> Any:
    """A word, a token: rows have the lengths that they are written with."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<eos>": 0, "<pad>": 1, "<unk>": 2} | {f"w{number}": number + 3 for number in range(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>", padding_side="right"
    )


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(count))


def make_rows(trainer: str, tokens: int, steps: int) -> tuple[list[dict], list[int]]:
    """(rows for `steps` steps, the lengths of one step's sequences, EOS included: `tokens` together)."""
    rng = random.Random(0)
    if trainer == "SFT":
        length = tokens // 4
        return [{"text": words(rng, length - 1)} for _ in range(4 * steps)], [length] * 4
    prompt, rows, lengths = tokens // 32, [], []
    replies = [tokens * part // 64 for part in (2, 4, 8, 10)]  # 4 prompts twice and 2 x these: tokens
    for step in range(steps):
        for reply in replies:
            row = {"prompt": words(rng, prompt)}
            rows.append(row | {side: " " + words(rng, reply - 1) for side in ("chosen", "rejected")})
            lengths += [prompt + reply] * 2 if step == 0 else []
    return rows, lengths


def step_operations(model: Any, lengths: list[int], lora: bool, reference: bool) -> float:
    """Floating-point operations of one step; see the module. `model` before any adapter."""
    from burnish.metrics import step_flops

    tokens, squared = sum(lengths), sum(length**2 for length in lengths)
    products = step_flops(model, tokens, 0) / 3  # one pass over the weights
    attention = step_flops(model, 0, squared) / 3  # 4 operations forward, 8 backward
    return products * (2 if lora else 3) + attention * 3 + (products + attention) * reference


def work(engine: str, case: str, steps: int) -> dict[str, Any]:
    """One run in this process: its figures."""
    import torch

    from burnish.metrics import peak_flops

    shape, trainer, lora = (CASES | TINY_CASES)[case]
    device = "cuda" if torch.cuda.is_available() and case in CASES else "cpu"
    tokens = 8192 if case in CASES else 256
    config_class, trainer_class, clock = trainer_of(engine, trainer)
    rows, lengths = make_rows(trainer, tokens, steps)
    config = {
        "output_dir": f"{os.environ['BENCHMARK_OUT']}/run",
        "max_steps": steps,
        "max_length": tokens if trainer == "SFT" else max(lengths),
        "per_device_train_batch_size": 1 if trainer == "SFT" else 4,
        "learning_rate": 1e-6,
        "train_sampling_strategy": "sequential",  # every step has the same lengths
        "logging_steps": 1,
        "save_strategy": "no",
        "gradient_checkpointing": True,
        "bf16": device == "cuda",
        "report_to": "none",
    }
    config |= {"packing": True} if trainer == "SFT" else {}
    model, data = make_model(shape, device), rows
    operations = step_operations(model, lengths, lora, trainer == "DPO")
    if engine == "burnish":
        config |= {"dtype": "bfloat16" if device == "cuda" else "float32", "overwrite_output_dir": True}
    else:
        from datasets import Dataset

        config |= {"disable_tqdm": True, "use_cpu": device == "cpu"}
        data = Dataset.from_list(rows)
    extra = {"peft_config": adapter()} if lora else {"ref_model": make_model(shape, device)} if trainer == "DPO" else {}
    run = trainer_class(
        model=model,
        args=config_class(**config),
        train_dataset=data,
        processing_class=make_tokenizer(),
        callbacks=[clock],
        **extra,
    )
    run.train()
    return figures(clock, device, sum(lengths), operations, peak_flops() if device == "cuda" else None)


def adapter() -> Any:
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")


def figures(clock: Clock, device: str, tokens: int, operations: float, peak: float | None) -> dict[str, Any]:
    import torch

    ends = clock.ends[WARM_UP - 1 :]
    seconds = statistics.median(b - a for a, b in zip(ends, ends[1:], strict=False))
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "tok_s": tokens / seconds,
        "mfu": None if peak is None else operations / seconds / peak,
        "tflop_s": operations / seconds / 1e12,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else resident,
        "step_s": seconds,
        "tokens_a_step": tokens,
        "steps_timed": len(ends) - 1,
    }


def run_worker(engine: str, case: str, steps: int) -> dict[str, Any]:
    """Figures from a process of its own, or {"failed": why}."""
    spec = json.dumps({"engine": engine, "case": case, "steps": steps})
    command = [sys.executable, str(Path(__file__).resolve()), "--work", spec]
    with tempfile.TemporaryDirectory() as folder:
        scene = {**os.environ, "BURNISH_CACHE": f"{folder}/cache", "BENCHMARK_OUT": folder, "HF_HUB_OFFLINE": "1"}
        scene.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=scene)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"tok_s"')]
    if done.returncode == 0 and lines:
        return json.loads(lines[-1])
    last = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"
    return {"failed": "out of memory" if "OutOfMemoryError" in done.stderr else last[:300]}


def show(case: str, engine: str, found: dict[str, Any]) -> None:
    if "failed" in found:
        print(f"{case:28s}{engine:9s}failed: {found['failed']}", flush=True)
        return
    mfu = "" if found["mfu"] is None else f"  MFU {found['mfu']:.1%}"
    print(f"{case:28s}{engine:9s}{found['tok_s']:12,.0f} tok/s{mfu}  {found['peak_gib']:.2f} GiB", flush=True)


def measure(tiny: bool, steps: int, only: str) -> dict[str, dict[str, dict]]:
    """{case: {engine: figures}}, printed as they come."""
    engines = ["burnish"] + (["trl"] if find_spec("trl") else [])
    results: dict[str, dict[str, dict]] = {}
    for case in (name for name in (TINY_CASES if tiny else CASES) if only in name):
        results[case] = {}
        for engine in engines:
            results[case][engine] = run_worker(engine, case, steps)
            show(case, engine, results[case][engine])
    if len(engines) == 1:
        print("trl          left out: not installed")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", default="", help="run the cases whose name holds this text; nothing is written")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(work(**json.loads(options.work))), flush=True)
        return 0
    if options.steps < WARM_UP + 1:
        parser.error(f"the first {WARM_UP} steps are not timed: --steps {WARM_UP + 1} or more")
    import torch

    tiny = options.tiny or not torch.cuda.is_available()
    results = measure(tiny, options.steps, options.only)
    if not (tiny or options.only):
        write(results, options.steps, torch.cuda.get_device_name(0))
    return 1 if any("failed" in engines["burnish"] for engines in results.values()) else 0


def write(results: dict, steps: int, card: str) -> None:
    record = {
        "card": card,
        "versions": {name: _version(name) for name in PACKAGES},
        "steps": steps,
        "results": results,
        "left_out": {} if find_spec("trl") else {"trl": "not installed"},
    }
    slug = "".join(letter if letter.isalnum() else "-" for letter in card.lower())
    target = Path(__file__).parent / "results" / f"train-{slug}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written {target}")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
