"""The table of cases, on a GPU (bfloat16, most important first) and small (float32, for a CPU)."""

from burnish.verbs.bench import elementwise, heads, layers
from burnish.verbs.bench.ops import BACKWARD, BOTH, FORWARD, Case, Op, Shape

HEADS = {  # hidden size, vocabulary
    "Llama-3-8B": (4096, 128256),
    "Qwen3-0.6B": (1024, 151936),
    "Qwen3-8B": (4096, 151936),
    "Gemma-3-12B": (3840, 262208),
}
TWICE = (FORWARD, BACKWARD)


def _head(op: Op, model: str, tokens: int, valid: float = 1.0, compiled: bool = False) -> Case:
    hidden, vocab = HEADS[model]
    shape = {"N": tokens, "H": hidden, "V": vocab} | ({"valid": valid} if valid < 1 else {})
    labelled = "" if valid == 1 else f", {valid:.0%} of the labels valid"
    return Case(op, f"{model} head, {tokens} tokens{labelled}", shape, heads.phases(op), compiled)


def _moved(op: Op, title: str, shape: Shape, compiled: bool = False) -> Case:
    return Case(op, title, shape, TWICE, compiled)


def gpu_cases() -> list[Case]:
    rows = {"N": 16384, "H": 4096}
    turned = {"N": 16384, "Hq": 32, "Hk": 8, "D": 128}
    loss, masked, llama, qwen = heads.CROSS_ENTROPY, heads.MASKED, "Llama-3-8B", "Qwen3-0.6B"
    return [
        _head(loss, "Qwen3-8B", 8192, compiled=True),  # the shape that TRL has published figures of
        _head(loss, llama, 4096),
        _head(masked, llama, 16384, 0.25),
        _head(heads.FROZEN, llama, 8192, compiled=True),
        _head(heads.FORWARD_ONLY, llama, 8192, compiled=True),
        _moved(elementwise.RMS_NORM, "16k x 4096", rows, compiled=True),
        _moved(elementwise.ADD_RMS_NORM, "16k x 4096", rows, compiled=True),
        _moved(elementwise.ROPE, "16k tokens, 32 + 8 heads of 128", turned, compiled=True),
        _moved(elementwise.QK_NORM_ROPE, "16k tokens, 32 + 8 heads of 128", turned, compiled=True),
        _moved(elementwise.SWIGLU, "16k x 4096", {"N": 16384, "I": 4096}, compiled=True),
        _moved(elementwise.GEGLU, "16k x 4096", {"N": 16384, "I": 4096}, compiled=True),
        _head(heads.DPO, llama, 16384),
        _head(loss, llama, 8192),
        _head(loss, llama, 16384),
        _head(loss, qwen, 8192),
        _head(loss, "Gemma-3-12B", 8192),
        Case(layers.LORA_QKV, "16k x 4096, 4096 + 1024 + 1024", {"N": 16384, "K": 4096, "outs": (4096, 1024, 1024)},
             TWICE, compiled=True),
        Case(layers.ATTENTION, "8 x 2048 tokens, 32 / 8 heads of 128", turned | {"length": 2048}, TWICE),
        _head(masked, llama, 16384, 0.5),
        _head(heads.LOGPROB, llama, 8192),
        _head(loss, llama, 1024),
        _head(loss, llama, 32768),
        _head(heads.FROZEN, llama, 32768),
        _head(heads.DPO, qwen, 16384),
        _moved(elementwise.RMS_NORM, "512k rows of a head, 128 wide", {"N": 524288, "H": 128}),
        _moved(elementwise.RMS_NORM, "16k x 1024", {"N": 16384, "H": 1024}),
        _moved(elementwise.SWIGLU, "16k x 14336", {"N": 16384, "I": 14336}),
        Case(layers.LORA_GATE_UP, "16k x 4096, 14336 + 14336", {"N": 16384, "K": 4096, "outs": (14336, 14336)}, TWICE),
        Case(layers.ATTENTION, "1 x 16384 tokens, 32 / 8 heads of 128", turned | {"length": 16384}, TWICE),
        _head(loss, qwen, 1024),
        _head(loss, "Qwen3-8B", 32768),
        _head(loss, "Gemma-3-12B", 32768),
        _head(heads.FORWARD_ONLY, qwen, 8192),
        _head(loss, qwen, 131072),
        _head(loss, llama, 131072),
    ]  # fmt: skip


def small_cases() -> list[Case]:
    """The same ops and ways, at shapes that a CPU does in seconds."""
    head: Shape = {"N": 512, "H": 128, "V": 4096}
    rows, turned = {"N": 1024, "H": 512}, {"N": 512, "Hq": 4, "Hk": 2, "D": 64}
    small = "small head, 512 tokens"
    return [
        Case(heads.CROSS_ENTROPY, small, head, (BOTH,)),
        Case(heads.MASKED, f"{small}, 25% of the labels valid", head | {"valid": 0.25}, (BOTH,)),
        Case(heads.MASKED, f"{small}, 50% of the labels valid", head | {"valid": 0.5}, (BOTH,)),
        Case(heads.FROZEN, small, head, (BOTH,)),
        Case(heads.LOGPROB, small, head, (BOTH,)),
        Case(heads.FORWARD_ONLY, small, head, heads.phases(heads.FORWARD_ONLY)),
        Case(heads.DPO, small, head, (BOTH,)),
        _moved(elementwise.RMS_NORM, "1k x 512", rows),
        _moved(elementwise.RMS_NORM, "8k rows of a head, 64 wide", {"N": 8192, "H": 64}),
        _moved(elementwise.ADD_RMS_NORM, "1k x 512", rows),
        _moved(elementwise.ROPE, "512 tokens, 4 + 2 heads of 64", turned),
        _moved(elementwise.QK_NORM_ROPE, "512 tokens, 4 + 2 heads of 64", turned),
        _moved(elementwise.SWIGLU, "1k x 512", {"N": 1024, "I": 512}),
        _moved(elementwise.GEGLU, "1k x 512", {"N": 1024, "I": 512}),
        Case(layers.ATTENTION, "4 x 128 tokens, 4 / 2 heads of 64", turned | {"length": 128}, TWICE),
        Case(layers.LORA_QKV, "512 x 256", {"N": 512, "K": 256, "outs": (256, 128, 128)}, TWICE),
        Case(layers.LORA_GATE_UP, "512 x 256", {"N": 512, "K": 256, "outs": (512, 512)}, TWICE),
    ]
