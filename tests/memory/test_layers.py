"""Checkpointing by hand: every bit as without it, whatever is kept, tiled, drawn, frozen or hooked."""

import pytest
import torch
from models import SETTINGS, TOKENS, build, checkpointed, close, equal, forward, step

from burnish import kernels
from burnish.memory import attended, tiles
from burnish.memory.layers import install, uninstall
from burnish.memory.settings import Memory
from burnish.model import blocks
from burnish.model.head import evaluating

MODELS = ["llama", "qwen3", "smollm3", "gemma2", "gpt_neox"]


@pytest.fixture(scope="module", params=[(name, lora) for name in MODELS for lora in (False, True)][:-1], ids=str)
def trained(request):
    """A model, and its loss and gradients without checkpointing."""
    model = build(*request.param)
    return model, step(model), request.param[0] in ("llama", "qwen3", "smollm3")


def test_every_setting_gives_every_bit(trained):
    model, expected, matches = trained
    for memory in SETTINGS:
        found, installed = checkpointed(model, memory)
        assert installed.by_hand == (5 if matches else 0)
        equal(found, expected)
    equal(step(model), expected)  # and nothing is left behind


def test_tiles_of_every_size_agree(trained):
    model, expected, matches = trained
    if not matches:
        pytest.skip("transformers' layers don't tile")
    whole, _ = checkpointed(model, Memory(True, tile=TOKENS))
    equal(whole, expected)
    for tile, (segment, keep, offload) in zip(
        (12, 8, 6, 5, 1), [(1, False, False), (2, True, True), (3, False, True), (1, True, False), (2, False, False)],
        strict=True,
    ):  # fmt: skip
        found, _ = checkpointed(model, Memory(True, segment, keep, tile, offload))
        close(found, expected)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(("kv_heads", "expected"), [(4, 4), (1, 1), (12, 6)])
def test_tiles_differentiate_attention_in_groups_of_heads_bit_for_bit(monkeypatch, kv_heads, expected, keep):
    model = build("qwen3", num_attention_heads=2 * kv_heads, num_key_value_heads=kv_heads)
    seen, attend = [], blocks.attend
    monkeypatch.setattr(
        blocks, "attend", lambda attn, q, *rest, **call: (seen.append(q), attend(attn, q, *rest, **call))[1]
    )
    memory = Memory(True, segment=2, keep_attention=keep, tile=6, offload=True)
    found, installed = checkpointed(model, memory)
    assert not installed.notes and {2 * kv_heads // expected} <= {q.shape[2] for q in seen}
    monkeypatch.setattr(attended, "GROUPS", 1)
    seen.clear()
    whole, _ = checkpointed(model, memory)
    assert {2 * kv_heads} == {q.shape[2] for q in seen}
    equal(found, whole)


def test_other_attentions_see_all_heads_at_once(monkeypatch):
    model = build("llama")
    model.config._attn_implementation = "sdpa"
    groups = []
    monkeypatch.setattr(tiles, "groups", lambda *call: groups.append(attended.groups(*call)) or groups[-1])
    step_of_two_rows = torch.randint(3, 97, (2, 9))
    install(model, Memory(True, tile=4))
    model.model(input_ids=step_of_two_rows, use_cache=False).last_hidden_state.square().sum().backward()
    assert groups == [1] * 5


def test_frozen_embeddings_get_no_gradient():
    """transformers gives their output one, for ways of checkpointing that need it: [T, H] that nobody reads."""
    model = build("llama", lora=True)
    outputs = []
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, out: outputs.append(out))
    expected = step(model)
    model.gradient_checkpointing_enable()
    for memory in (Memory(True), Memory(True, 2, True, 6, True), Memory(True)):
        found, _ = checkpointed(model, memory)
        (close if memory.tile else equal)(found, expected)
    equal(step(model), expected)
    assert len(outputs) == 5 and not any(out.requires_grad for out in outputs)
    handle.remove()


@pytest.mark.parametrize(("tokens", "tile", "sizes"), [(23, 12, [12, 11]), (23, 8, [8, 8, 7]), (23, 6, [6, 6, 6, 5]),
                                                       (23, 5, [5, 5, 5, 5, 3]), (23, 99, [23]), (23, None, [23]),
                                                       (4, 1, [1, 1, 1, 1])])  # fmt: skip
def test_tiles_cover_all_tokens_and_none_is_longer(tokens, tile, sizes):
    assert [stop - start for start, stop in tiles.spans(tokens, tile)] == sizes


def test_layers_that_nobody_patched_run_by_hand_too():
    model = build("llama", patched=False)
    expected = step(model)
    found, installed = checkpointed(model, Memory(True, keep_attention=True))
    assert installed.by_hand == 5
    close(found, expected)  # transformers' own code rounds in other places


def test_windows_attend_again_and_say_so():
    model = build("mistral", sliding_window=4)
    expected = step(model)
    found, installed = checkpointed(model, Memory(True, segment=2, keep_attention=True, offload=True))
    equal(found, expected)
    assert any("attention runs again in backward" in line for line in installed.news())
    assert not installed.news()  # once is enough


@pytest.mark.parametrize("settings", [{"segment": 2}, {"keep_attention": True}, {"segment": 3, "keep_attention": True}])
def test_dropout_draws_the_same_numbers_again(settings):
    model = build("llama", lora=True, dropout=0.5)
    expected = step(model)
    after = torch.rand(1)
    found, _ = checkpointed(model, Memory(True, **settings))
    equal(found, expected)
    assert torch.equal(torch.rand(1), after)  # backward leaves the generator where it found it


def test_dropout_in_tiles_is_differentiated_as_it_was_drawn():
    """Tiles draw in another order than whole rows, so the gradient is held against differences of the loss itself."""
    model = build("llama", lora=True, dropout=0.5, dtype=torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    direction = [0.01 * torch.randn_like(p) for p in parameters]

    def loss_at(distance):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=distance)
        torch.manual_seed(9)
        value = forward(model).item()
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=-distance)
        return value

    for memory in (Memory(True, tile=6), Memory(True, segment=2, keep_attention=True, tile=9)):
        found, _ = checkpointed(model, memory)
        slope = sum((p.grad * d).sum() for p, d in zip(parameters, direction, strict=True)).item()
        install(model, memory)
        measured = (loss_at(1e-4) - loss_at(-1e-4)) / 2e-4
        uninstall(model)
        assert abs(slope - measured) < 1e-6 * abs(measured)


def test_frozen_lower_layers_and_a_frozen_model():
    model = build("llama")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("layers.3.mlp" in name or "layers.4.self_attn.q_proj" in name)
    expected = step(model)
    assert sum(gradient is not None for gradient in expected.values()) == 1 + 3 + 1
    for memory in (*SETTINGS, Memory(True, segment=2, tile=6)):
        found, _ = checkpointed(model, memory)
        (equal if memory.tile is None else close)(found, expected)


def test_parameters_get_their_gradient_once():
    """One call of each post-accumulate hook, where an optimizer in backward or a reducer waits for it."""
    model = build("llama")
    calls = []
    handles = [
        p.register_post_accumulate_grad_hook(lambda p, name=name: calls.append(name))
        for name, p in model.named_parameters()
    ]
    checkpointed(model, Memory(True, segment=2, tile=6))
    for handle in handles:
        handle.remove()
    assert sorted(calls) == sorted(name for name, _ in model.named_parameters() if not name.startswith("lm_head"))


def test_a_gradient_hook_on_a_parameter_runs_once():
    model = build("llama")
    weight = model.model.layers[2].mlp.up_proj.weight
    handle = weight.register_hook(lambda grad: 2 * grad)
    expected = step(model)
    found, installed = checkpointed(model, Memory(True))
    handle.remove()
    equal(found, expected)
    assert any("only transformers' checkpointing answers" in line for line in installed.news())


def test_nothing_happens_in_eval_mode_without_gradients_or_with_a_cache():
    model = build("llama")
    plain = model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False)
    expected = step(model)
    installed = install(model, Memory(True, segment=2, offload=True))
    with torch.no_grad():
        assert torch.equal(forward(model), expected["loss"])
    with evaluating(model):
        equal({"loss": forward(model).detach()}, {"loss": expected["loss"]})
        assert torch.equal(model.generate(torch.tensor([[3, 4, 5]]), max_new_tokens=5, do_sample=False), plain)
    assert installed.arena.capacity == 0  # no checkpoint was ever made
    equal(step(model), expected)
    assert installed.arena.capacity > 0


def test_gradients_flow_to_inputs_embeds():
    model = build("llama")
    embeds = torch.randn(1, TOKENS, 32)
    grads = []
    for memory in (None, *SETTINGS):
        if memory is not None:
            install(model, memory)
        source = embeds.clone().requires_grad_()
        model.model(inputs_embeds=source, use_cache=False).last_hidden_state.square().sum().backward()
        grads.append(source.grad)
    assert all(torch.equal(grad, grads[0]) for grad in grads)


def test_rows_side_by_side():
    """A padded batch, as other trainers make it: no packing, a mask, B > 1."""
    model = build("llama")
    ids = torch.randint(3, 97, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0

    def run():
        model.zero_grad()
        out = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        out[mask.bool()].square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters()}

    expected = run()
    for memory, check in ((Memory(True, 2, True), equal), (Memory(True, 1, True, 4), close)):
        install(model, memory)
        check(run(), expected)


def test_tiles_of_bfloat16_gradients_are_summed_in_float32_and_rounded_once():
    layer = build("llama", dtype=torch.bfloat16).model.layers[0]
    scratch: list[torch.Tensor] = []
    for seed in range(2):  # the second layer uses the first one's buffer
        sums = tiles.Sums(layer, True, scratch)
        generator = torch.Generator().manual_seed(seed)
        expected = [torch.zeros(p.shape) for p in sums.parameters]
        for _ in range(64):
            grads = [torch.randn(p.shape, generator=generator).bfloat16() for p in sums.parameters]
            for total, grad in zip(expected, grads, strict=True):
                total.add_(grad)
            sums.add(sums.before, [grads[number] for number in sums.before])
            sums.add(sums.after, [grads[number] for number in sums.after])
        assert sorted(sums.before + sums.after) == [*range(9)] and sums.after == [3, 4, 5, 6, 8]
        assert all(torch.equal(got, want.bfloat16()) for got, want in zip(sums.results(), expected, strict=True))
    assert len(scratch) == 1 and scratch[0].numel() == sum(p.numel() for p in layer.parameters())


def test_bfloat16_layers_tile():
    model = build("llama", dtype=torch.bfloat16)
    whole = step(model)
    found, _ = checkpointed(model, Memory(True, tile=6))
    for name, want in whole.items():
        if want is not None:
            assert found[name].dtype == torch.bfloat16 and (found[name] - want).norm() < 0.03 * want.norm(), name


def test_backward_uses_the_kernels_of_its_forward():
    """Autograd's threads don't inherit kernels.use: it is as if backward came behind the block."""
    model = build("llama")
    with kernels.use("reference"):
        expected = step(model)
    for memory in (Memory(True), Memory(True, 2, True)):
        with kernels.use("reference"):
            inside, _ = checkpointed(model, memory)
            close(inside, expected)
            install(model, memory)
            model.zero_grad(set_to_none=True)
            loss = forward(model)
        loss.backward()
        equal({name: p.grad for name, p in model.named_parameters()}, {k: v for k, v in inside.items() if k != "loss"})
        uninstall(model)


def test_the_down_projection_is_not_multiplied_again(monkeypatch):
    """Neither plain nor adapted: backward gets by without blocks.mlp."""
    for lora in (False, True):
        model = build("llama", lora=lora)
        install(model, Memory(True))
        loss = forward(model)
        monkeypatch.setattr(blocks, "mlp", None)
        loss.backward()
        monkeypatch.undo()
