"""What checkpoints keep, to the byte, for how long, and what happens when a step breaks off."""

import copy
import gc
import itertools

import pytest
import torch
from metering import Live
from models import DOCUMENTS, TOKENS, build, checkpointed, equal, forward, step
from simulated import EagerDevice
from torch.autograd.graph import saved_tensors_hooks

from burnish.config.errors import UserError
from burnish.memory.arena import Arena
from burnish.memory.layers import Installed, _Segment, install, uninstall
from burnish.memory.settings import Memory

# ---- what is kept


def saved_bytes(model) -> int:
    """What autograd holds between forward and backward: storages, parameters not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            held[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward(model)
    return sum(size for size, _ in held.values())


STATE = TOKENS * 32 * 4  # a hidden state
KEPT = TOKENS * 4 * 16 * 4 + TOKENS * 4 * 4  # attention output and log-sum-exp


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("tile", [None, 6])
def test_exactly_what_was_promised_is_kept(name, tile):
    model = build(name)
    base = None
    for segment, keep, (offload, stays) in itertools.product(
        (1, 2, 3), (False, True), ((False, 9), (True, 1), (True, 2))
    ):
        install(model, Memory(True, segment, keep, tile, offload, keep_on_device=stays))
        found = saved_bytes(model)
        starts = range(0, 5, segment)
        on_device = [(start, min(start + segment, 5)) for start in starts][-stays:]
        promised = sum(STATE + (stop - start) * KEPT * keep for start, stop in on_device)
        base = found - promised if base is None else base  # embedding, final norm and the loss: the same for all
        assert found == base + promised, (segment, keep, offload, stays)
    uninstall(model)


def alive_after_forward(model) -> int:
    """Bytes of everything made in a forward that is still there behind it, saved through autograd or not."""
    with Live(model) as live:
        loss = forward(model)
        found = live.now
    del loss
    return found


def test_nothing_else_stays_alive():
    """What autograd doesn't know of, graphs and hooks that hold on to a tensor, is promised as well."""
    model = build("llama")
    install(model, Memory(True))
    base = alive_after_forward(model) - 5 * STATE
    for segment, keep in itertools.product((1, 2, 3), (False, True)):
        install(model, Memory(True, segment, keep))
        assert alive_after_forward(model) == base + -(-5 // segment) * STATE + 5 * KEPT * keep, (segment, keep)


def test_the_arena_is_as_large_as_what_it_holds():
    model = build("llama")
    for segment, keep in itertools.product((1, 2), (False, True)):
        _, installed = checkpointed(model, Memory(True, segment, keep, offload=True))
        away = len(installed.segments) - 1
        assert installed.arena.capacity == away * (STATE + segment * keep * KEPT)


def test_two_hundred_steps_leak_nothing():
    model = build("llama", num_hidden_layers=3)
    installed = install(model, Memory(True, 1, True, 11, True))

    def alive() -> tuple[int, int]:
        gc.collect()
        tensors = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
        return len(tensors), sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()
        )

    for number in range(200):
        documents = [(5, 3), (9, 2, 1), (4, 4, 4)][number % 3]
        with installed.step():
            step(model, documents)
        if number == 3:
            before = alive()
    assert alive() == before and not installed.arena.live and installed.arena.stayed == 0


# ---- when things go wrong


def test_an_exception_in_backward_leaves_no_slot_and_the_next_step_is_right():
    model = build("llama")
    expected = step(model)
    installed = install(model, Memory(True, offload=True, keep_attention=True))
    weight = model.model.layers[2].mlp.up_proj.weight

    def fail(parameter):
        raise KeyError("in the middle of backward")

    handle = weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(KeyError, match="in the middle of backward"), installed.step():
        step(model)
    handle.remove()
    assert not installed.arena.live
    with installed.step():
        equal(step(model), expected)


@pytest.mark.parametrize("stays", [1, 2])
def test_layers_by_transformers_may_take_several_tensors(stays):
    """Each is saved and asked for by itself; only the hidden states are on the host, and are read once."""
    installed = Installed(Memory(True, offload=True, keep_on_device=stays), [[torch.nn.Identity()]] * 2)
    installed.arena = Arena(torch.device("cpu"))
    found = []
    for run in (lambda layer, *args: layer(*args), None):
        x, y, z = (torch.full((4,), value, requires_grad=True) for value in (0.3, 0.5, 0.7))
        hidden = x
        with installed.step():
            for index in range(2):
                segment = _Segment(installed, index, [torch.nn.Identity()], False)
                run_layer = run or segment._by_transformers
                hidden = run_layer(lambda x, y, z: (x * y).sin() * z, hidden, y, z)
            hidden.sum().backward()
        found.append([x.grad, y.grad, z.grad])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    assert bool(installed.arena.capacity) == (stays == 1)


def test_a_forward_without_backward_is_an_error_of_the_step():
    model = build("llama")
    installed = install(model, Memory(True, offload=True))
    with pytest.raises(AssertionError, match="4 checkpoints were never read"), installed.step():
        loss = forward(model)
    del loss
    assert not installed.arena.live


def test_a_second_backward_is_right_or_refused():
    model = build("llama")
    expected = step(model)
    install(model, Memory(True, segment=2))
    model.zero_grad(set_to_none=True)
    loss = forward(model)
    loss.backward(retain_graph=True)
    model.zero_grad(set_to_none=True)
    loss.backward()
    equal({name: p.grad for name, p in model.named_parameters()}, {k: v for k, v in expected.items() if k != "loss"})
    install(model, Memory(True, offload=True))
    loss = forward(model)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="no retain_graph"):
        loss.backward()
    install(model, Memory(True, keep_attention=True))
    loss = forward(model)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_weights_that_change_before_backward_are_noticed():
    model = build("llama")
    install(model, Memory(True))
    loss = forward(model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_hidden_states_that_change_inside_a_segment_are_refused():
    model = build("llama")
    install(model, Memory(True, segment=2))
    model.model.layers[1].register_forward_pre_hook(lambda layer, args: (args[0] * 2,))
    with pytest.raises(UserError, match="Set checkpoint_segment: 1"):
        forward(model)


# ---- micro-batches, copies, other numbers


def test_two_forwards_before_their_backwards():
    model = build("llama")
    losses = [forward(model, seed=seed) for seed in (1, 2)]
    sum(losses).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    for offload in (False, True):
        installed = install(model, Memory(True, 2, True, offload=offload))
        for _ in range(2):  # the first time the arena is too small for both
            model.zero_grad(set_to_none=True)
            with installed.step():
                losses = [forward(model, seed=seed) for seed in (1, 2)]
                sum(losses).backward()
            equal({name: p.grad for name, p in model.named_parameters()}, expected)
    assert installed.arena.stayed == 2 * (1 + 2 * 2) and installed.arena.capacity == 4 * (STATE + 2 * KEPT)


def test_a_batch_that_is_larger_makes_the_arena_grow():
    model = build("llama")
    expected = [step(model, documents) for documents in ((4, 4), DOCUMENTS)]
    installed = install(model, Memory(True, offload=True))
    for documents, want in zip(((4, 4), DOCUMENTS, (4, 4)), [*expected, expected[0]], strict=True):
        with installed.step():
            equal(step(model, documents), want)
    assert installed.arena.capacity == 4 * STATE and installed.arena.stayed == 0


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_with_copies_that_come_late(name, seed):
    model = build(name)
    expected = step(model)
    device = EagerDevice(seed)
    installed = install(model, Memory(True, 1, True, None, True, keep_on_device=seed % 3), copies=device)
    for _ in range(2):
        with installed.step():
            equal(step(model), expected)


def test_a_copied_model_has_its_own_checkpoints():
    model = build("llama")
    expected = step(model)
    installed = install(model, Memory(True, 2, offload=True))
    with installed.step():
        step(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    equal(step(other), expected)
    assert not installed.arena.live


def test_settings_that_install_nothing():
    model = build("llama")
    expected = step(model)
    installed = install(model, Memory(False))
    assert installed.line() == "no checkpointing: all activations are kept"
    with installed.step():
        equal(step(model), expected)
