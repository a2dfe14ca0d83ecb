"""Simulated: Llama-3.1-8B on 1 to 16 H200s by every strategy, memory of one GPU and speed. No GPU, no weights.

    python benchmarks/spread_plan.py

Prints two Markdown tables: what fits at 32k tokens a GPU and how fast it is, and the longest sequence of which every
GPU has a part. Compute rates are those of `benchmarks/long_context_plan.py`, links those of data sheets; no figure was
measured on several GPUs.
"""

import tempfile

from long_context_plan import LLAMA, RUNS

from burnish.config.fields import SFTConfig
from burnish.memory.plan import TILE, Machine, choose, in_words, longest, options, setup_for, weigh
from burnish.memory.settings import Memory
from burnish.memory.shape import shape_of
from burnish.memory.spread import BETWEEN, NVLINK, Spread
from burnish.memory.time import CARDS, GIB, Load

HOST, TOKENS = 1024 * GIB, 32768
SIZES = (1, 2, 4, 8, 16)
MODELS = {"LoRA, rank 16": RUNS["LoRA, rank 16"], "full, float32 masters (adamw_torch_fused)": {}}


def main() -> None:
    from transformers import LlamaConfig

    print(
        f"Simulated, not measured: H200s in machines of 8 with {HOST // GIB} GiB; {NVLINK / 1e9:.0f} GB/s each way "
        f"inside a machine, {BETWEEN / 1e9:.0f} GB/s a GPU between machines.\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        LlamaConfig(**LLAMA, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
        shapes = {}
        for name, keys in MODELS.items():
            config = SFTConfig(model_name_or_path=folder, max_length=TOKENS, **keys)
            shapes[name] = config, shape_of(config, loaded="bfloat16" if config.use_peft else None)
    print(f"| {TOKENS // 1024}k tokens a GPU | GPUs | strategy | GPU GiB | what saves memory | tok/s | waits |")
    print("|---|---:|---|---:|---|---:|---:|")
    for name, (config, shape) in shapes.items():
        for size in SIZES:
            for strategy in ("ddp", "fsdp") if size > 1 else ("none",):
                print(speed_row(name, config, shape, Spread(size, strategy)))
    print("\n| one document over all GPUs | GPUs | longest sequence | GPU GiB | host GiB | tok/s there |")
    print("|---|---:|---:|---:|---:|---:|")
    memory = Memory(True, 1, tile=TILE, offload=True)
    for name, (config, shape) in shapes.items():
        for size in SIZES[:-1]:
            spread = Spread(size, "fsdp" if size > 1 else "none", size)
            setup = setup_for(config, shape, spread=spread)
            machine = Machine(CARDS["h200"], HOST, spread.on_a_machine)
            most = longest(setup, memory, machine)
            if not most:
                print(f"| {name} | {size} | nothing fits | | | |")
                continue
            found = weigh(setup, Load((most,), shared=size), memory, machine)
            host = found.host * spread.on_a_machine / GIB
            print(
                f"| {name} | {size} | {most:,} | {found.peak / GIB:.0f} | {host:.0f} | {found.tokens_a_second:,.0f} |"
            )


def speed_row(name: str, config: SFTConfig, shape, spread: Spread) -> str:
    """The fastest setting that fits, or the least that it would need."""
    weighed = options(
        setup_for(config, shape, spread=spread), Load((TOKENS,)), Machine(CARDS["h200"], HOST, spread.on_a_machine)
    )
    found = choose(weighed)
    if found is None:
        least = min(weighed, key=lambda option: option.peak)
        return f"| {name} | {spread.size} | {spread.strategy} | {least.peak / GIB:.0f} | does not fit | | |"
    waits = found.seconds.talk / found.seconds.total
    return (
        f"| {name} | {spread.size} | {spread.strategy} | {found.peak / GIB:.0f} | {in_words(found.memory)} "
        f"| {found.tokens_a_second:,.0f} | {waits:.1%} |"
    )


if __name__ == "__main__":
    main()
