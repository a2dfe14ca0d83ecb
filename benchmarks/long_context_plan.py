"""Planned: the longest context and the speed of Llama-3.1-8B on one H200, beside published runs. No GPU, no weights.

    python benchmarks/long_context_plan.py

Prints a Markdown table, marked as planned, with the rates that it assumes, and a second one of speed at given lengths.
"""

import tempfile
from dataclasses import replace

from burnish.config.fields import SFTConfig
from burnish.memory.anchors import H200
from burnish.memory.plan import TILE, Machine, Option, choose, in_words, longest, options, setup_for, weigh
from burnish.memory.settings import Memory
from burnish.memory.shape import shape_of
from burnish.memory.time import CARDS, GIB, Load

MACHINE = Machine(CARDS["h200"], 128 * GIB)
LLAMA = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
}  # fmt: skip
RUNS = {
    "LoRA, rank 16": {"use_peft": True, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"]},
    "full, exact masters (adamw_bf16, optimizer_in_bwd)": {
        "optim": "adamw_bf16", "optimizer_in_bwd": True, "max_grad_norm": 0,
    },
    "full, 8-bit states (adamw_torch_8bit, optimizer_in_bwd)": {
        "dtype": "bfloat16", "optim": "adamw_torch_8bit", "optimizer_in_bwd": True, "max_grad_norm": 0,
    },
}  # fmt: skip
REACH = (Memory(True, 1, tile=TILE, offload=True), Memory(True, 2, tile=TILE, offload=True))
LENGTHS = (32768, 131072, 262144, 524288)


def main() -> None:
    from transformers import LlamaConfig

    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        setups = {}
        for name, keys in RUNS.items():
            config = SFTConfig(model_name_or_path=folder, max_length=1 << 20, **keys)
            loaded = "bfloat16" if config.use_peft else None
            setups[name] = setup_for(config, shape_of(config, loaded=loaded))
    rates = MACHINE.card.rates
    print(f"Planned, not measured: one H200, {MACHINE.usable / GIB:.0f} of 139 GiB for tensors, a host of 128 GiB.")
    print(
        f"Assumed: {rates.linear / 1e12:.0f} TFLOP/s in linear layers, {rates.attention / 1e12:.0f} in attention, "
        f"{rates.to_host / 1e9:.0f} GB/s to the host. Measured: 139 GiB, {rates.memory / 1e12:.1f} TB/s.\n"
    )
    print("| Llama-3.1-8B | what saves memory | longest sequence | GPU GiB | host GiB | tok/s there | |")
    print("|---|---|---:|---:|---:|---:|---|")
    for name, setup in setups.items():
        for memory in REACH:
            most = longest(setup, memory, MACHINE)
            print(_row(name, weigh(setup, Load((most,)), memory, MACHINE)))
    for run in H200:
        what = (
            ", ".join(word for word, on in (("offload", run.offload), ("tiled MLP", run.tiled)) if on) or "checkpoints"
        )
        print(f"| full, state on the host | {what} | {run.tokens:,} | {run.gib:.0f} | | | published: ALST |")
    print("\n| Llama-3.1-8B | " + " | ".join(f"{n // 1024}k tok/s" for n in LENGTHS) + " | offload at 128k costs |")
    print("|---|" + "---:|" * (len(LENGTHS) + 1))
    for name, setup in setups.items():
        chosen = [choose(options(setup, Load((n,)), MACHINE)) for n in LENGTHS]
        cells = ["-" if o is None else f"{o.tokens_a_second:,.0f}" for o in chosen]
        print(f"| {name}, planned | " + " | ".join(cells) + f" | {_offload_cost(setup):.1%} |")


def _row(name: str, option: Option) -> str:
    memory = replace(option.memory, keep_on_device=1)
    return (
        f"| {name} | {in_words(memory)} | {option.load.tokens:,} | {option.peak / GIB:.0f} | {option.host / GIB:.0f} "
        f"| {option.tokens_a_second:,.0f} | planned |"
    )


def _offload_cost(setup) -> float:
    """How much longer a step of 128k tokens takes with its checkpoints on the host."""
    plain, away = (weigh(setup, Load((131072,)), Memory(True, tile=TILE, offload=o), MACHINE) for o in (False, True))
    return away.seconds.total / plain.seconds.total - 1


if __name__ == "__main__":
    main()
