"""The planner's bytes of what autograd keeps, against what saved_tensors_hooks meters: integers, no tolerance."""

import itertools

import pytest
import torch
from metering import Saved, build, packed, place_of

from burnish.logprobs import token_nll
from burnish.memory.bytes import Setup, host_bytes
from burnish.memory.layers import install, uninstall
from burnish.memory.saved import Place, ledger
from burnish.memory.settings import Memory
from burnish.memory.shape import describe
from burnish.memory.time import Load
from burnish.model.head import read_head

SEGMENTS = [
    Memory(True, segment, keep, None, offload)
    for segment, keep, offload in itertools.product((1, 2), (False, True), (False, True))
]
MODES = [Memory(False), *SEGMENTS, Memory(True, 3, True, 5), Memory(True, 1, True, 5, True, 2), Memory(True, tile=7)]
PACKED, ALONE = (7, 12, 1, 9), (23,)
# Without checkpoints first: transformers' way of turning them on leaves a LoRA model's embeddings with a gradient.
CASES = [(Memory(False), ALONE), *((memory, PACKED) for memory in MODES), (Memory(True, 2, True), ALONE)]


def metered(model, lengths):
    """Bytes between the forward and the backward of the training loss."""
    with Saved(model) as meter:
        loss, _ = token_nll(model, read_head(model), packed(lengths))
    total = meter.total
    loss.backward()
    return total


@pytest.mark.parametrize(
    ("trained", "dtype"),
    [
        ("full", torch.float32),
        ("full", torch.bfloat16),
        ("lora", torch.float32),
        ("lora", torch.bfloat16),  # float32 adapters beside a bfloat16 base
        ("few", torch.bfloat16),
        ("dropout", torch.float32),
    ],
)
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_every_mode_keeps_what_is_planned_to_the_byte(name, trained, dtype):
    model = build(name, dtype, trained)
    shape = describe(model)
    place = place_of(model, shape)
    assert shape.by_hand
    for memory, lengths in CASES:
        installed = install(model, memory)
        assert installed.by_hand == (3 if memory.checkpointing else 0)
        planned = ledger(shape, Load(lengths), memory, place)
        assert metered(model, lengths) == sum(planned.values()), (memory, lengths)
        assert not installed.notes
        arena = installed.arena.capacity if installed.arena is not None else 0
        assert arena == host_bytes(Setup(shape, place), Load(lengths), memory), (memory, lengths)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_checkpointing_of_transformers_keeps_the_same(name):
    model = build(name, torch.bfloat16)
    uninstall(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    planned = ledger(describe(model), Load(PACKED), Memory(True), place_of(model))
    assert metered(model, PACKED) == sum(planned.values())


@pytest.mark.parametrize(
    ("trained", "dtype"), [("full", torch.bfloat16), ("lora", torch.bfloat16), ("few", torch.float32)]
)
@pytest.mark.parametrize("name", ["gemma2", "gemma3_text"])
def test_families_without_a_layer_by_hand(name, trained, dtype):
    """More norms, windows, softcaps: transformers' own forward with patched modules, and its checkpoints."""
    model = build(name, dtype, trained)
    shape = describe(model)
    assert not shape.by_hand
    place = place_of(model, shape)
    for memory in (Memory(False), Memory(True), Memory(True, 2, True, 5), Memory(True, offload=True)):
        install(model, memory)
        planned = ledger(shape, Load(PACKED), memory, place)
        if memory.offload:  # its own hooks are innermost: what they leave on the device, the meter can't see
            planned["checkpoints"] = 0
        assert metered(model, PACKED) == sum(planned.values()), memory


def test_tokens_that_train_nothing_cost_the_head_nothing():
    """The head keeps rows of trained positions only: half of them is half of its input, labels and scales."""
    shape = describe(build("llama", layers=1))
    place = Place(4, 0, cuda=False)
    whole, half = (ledger(shape, Load((40,), trained), Memory(True), place) for trained in (40, 20))
    assert sum(whole.values()) - sum(half.values()) == 20 * (48 * 4 + 8 + 8 + 4)
