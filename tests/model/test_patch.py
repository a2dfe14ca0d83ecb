"""burnish.patch on one instance: what it promises about other models, hooks, copies, errors and going back."""

import copy
import inspect

import pytest
import torch
from torch import nn

import burnish
from burnish.config.errors import UserError
from burnish.model import blocks
from burnish.model.patch import patch, unpatch


def forwards_of(model):
    return {name: module.forward for name, module in model.named_modules() if "forward" in vars(module)}


def test_another_model_of_the_same_class_is_untouched(tiny, batch, monkeypatch):
    mine, other = tiny("llama"), tiny("llama")
    attention = type(mine.model.layers[0].self_attn)
    rotary, class_forward = attention.forward.__globals__["apply_rotary_pos_emb"], attention.forward
    before = other(**batch).logits
    attributes = {name: set(vars(module)) for name, module in other.named_modules()}
    patch(mine)
    assert attention.forward is class_forward
    assert attention.forward.__globals__["apply_rotary_pos_emb"] is rotary
    assert {name: set(vars(module)) for name, module in other.named_modules()} == attributes

    calls = []
    real = blocks.rope
    monkeypatch.setattr(blocks, "rope", lambda *a, **k: calls.append(1) or real(*a, **k))
    assert torch.equal(other(**batch).logits, before) and not calls
    mine(**batch)
    assert len(calls) == 2


def test_patching_twice_is_harmless_and_says_so(tiny):
    model = tiny("gemma2")
    first = patch(model)
    forwards = forwards_of(model)
    second = patch(model)
    assert forwards_of(model) == forwards
    assert second.patched == first.patched and (first.already, second.already) == (0, sum(first.patched.values()))
    assert "patched before" in str(second) and "patched before" not in str(first)


def test_unpatch_restores_every_instance(tiny, batch):
    model = tiny("qwen3")
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    keys, before = list(model.state_dict()), model(**batch)
    signature = inspect.signature(model.forward)
    report = patch(model)
    assert list(model.state_dict()) == keys and inspect.signature(model.forward) == signature
    assert unpatch(model) == sum(report.patched.values())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    after = model(**batch)
    assert torch.equal(after.loss, before.loss) and torch.equal(after.logits, before.logits)
    assert unpatch(model) == 0


def test_a_copy_of_a_patched_model_is_patched_and_independent(tiny, batch):
    model = tiny("llama")
    patch(model)
    twin = copy.deepcopy(model)
    for name, forward in forwards_of(twin).items():
        assert forward.__self__ is twin.get_submodule(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    fresh = tiny("llama")
    torch.testing.assert_close(twin(**batch).loss, fresh(**batch).loss, rtol=1e-6, atol=0)


def test_strict_raises_and_changes_nothing(tiny):
    model = tiny("cohere2")
    with pytest.raises(UserError, match="Cohere2LayerNorm x3.*other than RMSNorm"):
        patch(model, strict=True)
    assert forwards_of(model) == {}
    patch(tiny("llama"), strict=True)


def test_nothing_to_patch_always_raises():
    with pytest.raises(UserError, match="nothing to patch in Sequential"):
        burnish.patch(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    with pytest.raises(UserError, match="other than RMSNorm"):
        burnish.patch(nn.Sequential(nn.LayerNorm(8, bias=False)))


def test_a_bare_backbone_has_no_head_to_patch(tiny):
    report = patch(tiny("llama").model, strict=True)
    assert report.patched == {"decoder_layer": 2, "rms_norm": 5, "rope": 2, "swiglu": 2} and report.skipped == []


def test_norms_of_one_class_with_different_behaviour_are_told_apart(tiny):
    model = tiny("llama")
    inner = model.model.layers[1].input_layernorm
    inner.__class__ = type("Shifted", (type(inner),), {"forward": lambda self, x: x + self.weight})
    report = patch(model)
    assert report.patched["rms_norm"] == 4
    reason = "computes something other than RMSNorm"
    assert report.skipped == [
        ("model.layers.1.input_layernorm", reason),
        ("model.layers.1", f"its norm Shifted {reason}"),
    ]


def test_hooks_go_on_running_or_keep_their_module_out(tiny, batch):
    model, seen = tiny("llama"), []
    layer = model.model.layers[0]
    layer.input_layernorm.register_forward_hook(lambda *_: seen.append("norm"))
    layer.mlp.up_proj.register_forward_pre_hook(lambda *_: seen.append("up"))
    layer.mlp.register_full_backward_hook(lambda *_: seen.append("mlp backward"))
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda *_: seen.append("act"))
    report = patch(model)
    assert report.patched["swiglu"] == 1 and report.patched["rms_norm"] == 5
    assert report.skipped == [
        ("model.layers.1.mlp", "its activation has hooks, which would not run"),
        ("model.layers.0", "its LlamaMLP has hooks, which would not run"),
        ("model.layers.1", "its SiLUActivation has hooks, which would not run"),
    ]
    seen.clear()  # patch runs the model on a few tokens
    model(**batch).loss.backward()
    assert seen == ["norm", "up", "act", "mlp backward"]


def test_a_forward_that_someone_else_replaced_is_left_alone(tiny):
    model = tiny("llama")
    norm = model.model.norm
    norm.forward = lambda x: type(norm).forward(norm, x)
    theirs = norm.forward
    report = patch(model)
    assert report.patched["rms_norm"] == 4 and "replaced before" in report.skipped[0][1]
    unpatch(model)
    assert norm.forward is theirs


def test_unpatch_refuses_below_somebody_elses_wrapper(tiny):
    model = tiny("llama")
    patch(model)
    ours = model.forward

    import functools

    @functools.wraps(ours)
    def wrapper(*args, **kwargs):
        return ours(*args, **kwargs)

    model.forward = wrapper
    assert patch(model).already == 12
    with pytest.raises(UserError, match="wrapped after patching"):
        unpatch(model)
    model.forward = ours
    assert unpatch(model) == 12


def test_layers_that_cannot_be_copied_are_called_not_read(tiny, batch):
    """A quantised or adapted layer has in_features, out_features and a forward; burnish asks for no more."""

    class Opaque(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.inner, self.in_features, self.out_features = linear, linear.in_features, linear.out_features

        def forward(self, x):
            return 2 * self.inner(x)

        def __deepcopy__(self, memo):
            raise AssertionError("copied")

    models = tiny("llama"), tiny("llama")
    for model in models:
        for layer in model.model.layers:
            layer.mlp.gate_proj, layer.mlp.down_proj = Opaque(layer.mlp.gate_proj), Opaque(layer.mlp.down_proj)
    assert patch(models[1]).patched["swiglu"] == 2
    torch.testing.assert_close(models[1](**batch).loss, models[0](**batch).loss, rtol=1e-6, atol=0)


def test_a_model_on_the_meta_device_is_patched_except_for_the_head(tiny):
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_config(tiny("llama").config)
    report = patch(model)
    assert report.patched == {"decoder_layer": 2, "rms_norm": 5, "rope": 2, "swiglu": 2}
    assert "meta" in report.skipped[0][1]
