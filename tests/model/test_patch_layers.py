"""Whole decoder layers under burnish.patch: checkpointing, caches, masks, hooks and wrappers; what is reported."""

import functools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from burnish.model import attention, blocks
from burnish.model.patch import patch, unpatch

WHOLE = ["llama", "qwen3", "smollm3"]


@pytest.fixture(autouse=True)
def registered():
    attention.register()


def pair(tiny, name="llama", implementation=None, **settings):
    original, patched = tiny(name, **settings), tiny(name, **settings)
    patch(patched)
    for model in (original, patched):
        if implementation:
            model.set_attn_implementation(implementation)
    return original, patched


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("first", ["patch", "checkpointing"])
def test_gradient_checkpointing_recomputes_whole_layers(
    tiny, runs, first, reentrant, adapted, packed, gradients, assert_same
):
    plain, saving = adapted(tiny("llama")), adapted(tiny("llama"))
    steps = [
        lambda: saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant}),
        lambda: patch(saving),
    ]
    for step in steps if first == "checkpointing" else reversed(steps):
        step()
    saving.enable_input_require_grads()  # which reentrant checkpoints need
    kept = kept_bytes(lambda: saving(**packed(saving)).loss)
    loss = saving(**packed(saving)).loss
    runs.clear()
    got = gradients(saving, loss)
    assert len(runs) == 2  # each layer once more
    patch(plain)
    want = plain(**packed(plain)).loss
    assert torch.equal(loss, want)
    assert_same(got, gradients(plain, want), 0.0)
    assert kept < 0.5 * kept_bytes(lambda: plain(**packed(plain)).loss)
    saving.eval()
    runs.clear()
    saving(**packed(saving))
    assert len(runs) == 2


def kept_bytes(function):
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        loss = function()
    del loss
    return sum(kept.values())


def test_older_transformers_checkpoint_outside_of_the_forward(tiny, runs, monkeypatch, packed):
    """There __call__ checkpoints what is below it, so the forward must not do so again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    def call(self, *args, **kwargs):
        if self.gradient_checkpointing and self.training:
            inner = functools.partial(nn.Module.__call__, self, **kwargs)
            return self._gradient_checkpointing_func(inner, *args)
        return nn.Module.__call__(self, *args, **kwargs)

    monkeypatch.setattr(GradientCheckpointingLayer, "__call__", call)
    original, patched = pair(tiny)
    patched.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    checkpoints = []
    for layer in patched.model.layers:
        layer._gradient_checkpointing_func = lambda *a: checkpoints.append(1) or checkpoint(*a, use_reentrant=False)
    runs.clear()
    loss = patched(**packed(patched)).loss
    loss.backward()
    assert len(runs) == 4 and len(checkpoints) == 2


@pytest.mark.parametrize("name", WHOLE)
def test_generation_and_caches_run_the_models_own_layers(tiny, batch, runs, name):
    original, patched = (model.eval() for model in pair(tiny, name))
    runs.clear()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    prompt = batch["input_ids"][:, :6]
    options["attention_mask"] = torch.ones_like(prompt)
    assert torch.equal(original.generate(prompt, **options), patched.generate(prompt, **options))
    with torch.no_grad():
        got, want = patched(prompt, use_cache=True), original(prompt, use_cache=True)
        assert got.past_key_values.get_seq_length() == want.past_key_values.get_seq_length() == 6
        assert torch.allclose(got.logits, want.logits, rtol=0, atol=1e-5)
    assert not runs


@pytest.mark.parametrize("implementation", ["sdpa", "burnish", "eager"])
def test_padded_rows_with_a_mask(tiny, batch, runs, implementation, gradients, assert_same):
    original, patched = pair(tiny, "llama", implementation)
    original.set_attn_implementation("sdpa" if implementation == "burnish" else implementation)
    runs.clear()
    got, want = patched(**batch).loss, original(**batch).loss
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert_same(gradients(patched, got), gradients(original, want), 5e-6)
    assert len(runs) == (0 if implementation == "eager" else 2)


def test_attention_weights_and_hidden_states_come_back(tiny, batch, runs):
    original, patched = (model.eval() for model in pair(tiny, "llama", "eager"))
    inputs = {"input_ids": batch["input_ids"], "use_cache": False}
    with torch.no_grad():
        got, want = (model(**inputs, output_attentions=True) for model in (patched, original))
        assert len(got.attentions) == 2 and all(
            torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(got.attentions, want.attentions, strict=True)
        )
    original, patched = pair(tiny, "llama", "sdpa")
    got, want = (model(**batch, output_hidden_states=True).hidden_states for model in (patched, original))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_hooks_and_wrappers_that_come_later_go_on_running(tiny, runs, packed):
    _, model = pair(tiny)
    inputs, seen, layer = packed(model), [], model.model.layers[0]
    want = model(**inputs).loss
    runs.clear()
    hook = layer.post_attention_layernorm.register_forward_hook(lambda *_: seen.append("norm"))
    assert torch.equal(model(**inputs).loss, want) and seen == ["norm"] and len(runs) == 1
    hook.remove()
    layer.self_attn.o_proj.register_forward_hook(lambda *_: seen.append("o"))
    layer.mlp.down_proj.register_full_backward_hook(lambda *_: seen.append("down"))
    layer.register_forward_pre_hook(lambda *_: seen.append("layer"))
    runs.clear(), seen.clear()
    loss = model(**inputs).loss
    loss.backward()
    assert seen == ["layer", "o", "down"] and len(runs) == 2  # these are called, so nothing forbids the whole layer

    ours = layer.mlp.forward
    layer.mlp.forward = functools.wraps(ours)(lambda *a, **k: seen.append("mlp") or ours(*a, **k))
    runs.clear(), seen.clear()
    assert torch.equal(model(**inputs).loss, want) and "mlp" in seen and len(runs) == 1


def test_wrappers_that_were_there_before_keep_the_layer_out(tiny):
    model = tiny("llama")
    gated = model.model.layers[0].mlp
    theirs = gated.forward
    gated.forward = lambda x: theirs(x)
    report = patch(model)
    assert report.patched["decoder_layer"] == 1
    assert ("model.layers.0", "the forward of its LlamaMLP was replaced before, not by burnish") in report.skipped


def test_autocast_over_float32_adapters(tiny, runs, adapted, packed, gradients):
    models = [adapted(tiny("qwen3")) for _ in range(2)]
    patch(models[1])
    runs.clear()
    found = []
    for model in models:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**packed(model)).loss
        found.append((loss, gradients(model, loss)))
    assert len(runs) == 2
    torch.testing.assert_close(found[1][0], found[0][0], rtol=3e-3, atol=0)
    for name, grad in found[0][1].items():
        assert found[1][1][name].dtype == torch.float32
        assert (found[1][1][name] - grad).norm() < 5e-2 * grad.norm(), name


def test_unpatch_gives_the_class_its_layers_back(tiny, runs, packed):
    model = tiny("qwen3")
    report = patch(model)
    assert unpatch(model) == sum(report.patched.values())
    assert all("forward" not in vars(layer) for layer in model.model.layers)
    runs.clear()
    model(**packed(model))
    assert not runs


REASONS = {
    "lora_dropout": ({"lora_dropout": 0.1}, "dropout"),
    "use_dora": ({"use_dora": True}, "DoraLinearVariant is more than a low-rank product"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
}


@pytest.mark.parametrize("setting", REASONS)
@pytest.mark.parametrize("training", [True, False])
def test_adapters_of_another_kind_are_called_and_reported(
    tiny, setting, training, monkeypatch, packed, gradients, assert_same
):
    from peft import LoraConfig, get_peft_model

    changes, reason = REASONS[setting]
    models = []
    for _ in range(2):
        base = tiny("llama", attention_bias=True)
        models.append(get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"], **changes)))
        generator = torch.Generator().manual_seed(1)
        for name, parameter in models[-1].named_parameters():
            if "lora" in name:
                nn.init.normal_(parameter, std=0.1, generator=generator)
    original, model = (each.train(training) for each in models)
    report = patch(model)
    assert "lora_linear" not in report.patched and report.patched["decoder_layer"] == 2
    [(names, why)] = report.skipped
    assert names.startswith("LoRA Linear x6 (") and names.endswith("layers.0.self_attn.q_proj, ...)") and reason in why
    unpatch(model)
    patch(model, strict=True)  # the parts are all patched
    fused = []
    real = blocks.lora_linears
    monkeypatch.setattr(blocks, "lora_linears", lambda *a: fused.append(1) or real(*a))
    losses = []
    for each in (original, model):
        torch.manual_seed(5)  # dropout
        inputs = packed(each)
        labels = inputs.pop("labels")
        hidden = each.get_base_model().model(**inputs).last_hidden_state
        losses.append(hidden[0, labels[0] >= 0].square().mean())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    assert_same(*(gradients(each, loss) for each, loss in zip((original, model), losses, strict=True)), 5e-6)
    assert bool(fused) == (setting == "lora_dropout" and not training)


def test_layers_of_one_class_with_other_settings_are_tried_apart(tiny):
    """A window that one layer keeps to itself: the trial of its twin must not answer for it."""
    model = tiny("llama")
    model.model.layers[1].self_attn.sliding_window = 3
    report = patch(model)
    assert report.patched["decoder_layer"] == 1 and report.skipped[0][0] == "model.layers.1"
    assert "asks for another attention" in report.skipped[0][1]


def test_a_trial_is_made_once_for_layers_alike(tiny, monkeypatch, adapted):
    tried, real = [], blocks.matches
    monkeypatch.setattr(blocks, "matches", lambda layer: tried.append(1) or real(layer))
    patch(adapted(tiny("llama", num_hidden_layers=4)))
    assert len(tried) == 1
    tried.clear()
    patch(tiny("smollm3", no_rope_layers=[1, 0]))
    assert len(tried) == 2  # with and without positions


def test_adapters_that_come_after_patching_are_found_by_the_layers(tiny, monkeypatch, adapted, packed):
    model = tiny("llama")
    patch(model)
    model = adapted(model)
    fused, real = [], blocks.lora_linears
    monkeypatch.setattr(blocks, "lora_linears", lambda *a: fused.append(len(a[1])) or real(*a))
    model(**packed(model))
    assert fused == [3, 1, 2, 1] * 2


def test_a_model_of_ones_own_with_the_same_names_is_left_alone(tiny):
    model = tiny("llama")
    layer = model.model.layers[0]

    class Attention(nn.Module):
        def __init__(self, like):
            super().__init__()
            for name, child in like.named_children():
                self.add_module(name, child)

    layer.self_attn = Attention(layer.self_attn)
    assert "could not be run alone (AttributeError" in blocks.matches(layer)
    patch(model.model)
    assert "forward" not in vars(layer) and "forward" in vars(model.model.layers[1])


def test_dropout_set_to_zero_is_no_dropout(tiny, adapted):
    """As preference runs do with disable_dropout: the fused projections run again, and the report says so."""
    from burnish.model.load import drop_dropout

    model = adapted(tiny("llama"), lora_dropout=0.5)
    assert "lora_linear" not in patch(model).patched
    unpatch(model)
    drop_dropout(model)
    assert patch(model).patched["lora_linear"] == 14
