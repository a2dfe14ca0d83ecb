"""LoRA through peft: built from the config's fields, alive under a patched model, refused on the head."""

import types

import pytest
import torch

from burnish.config.errors import UserError
from burnish.model.adapters import apply_adapter
from burnish.model.head import backbone, check_head, read_head
from burnish.model.patch import patch, unpatch

FIELDS = {
    "lora_r": 4,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "lora_target_modules": None,
    "lora_modules_to_save": None,
    "use_rslora": False,
    "use_dora": False,
}


def fields(**changes):
    return types.SimpleNamespace(**{**FIELDS, **changes})


def adapted(model, **changes):
    """With the B matrices away from zero, so that adapters matter and A has a gradient."""
    model = apply_adapter(model, fields(**changes))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    return model.train()


def test_fields_become_peft_settings(tiny):
    model = apply_adapter(tiny("llama"), fields(lora_target_modules=["q_proj", "up_proj"], use_rslora=True))
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora, config.task_type) == (4, 8, True, "CAUSAL_LM")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all("q_proj" in name or "up_proj" in name for name in trained)
    everything = apply_adapter(tiny("llama"), fields(lora_target_modules=["all-linear"]))
    assert sum(p.requires_grad for p in everything.parameters()) == 2 * 7 * 2


def test_a_peft_config_is_taken_as_it_is(tiny):
    from peft import LoraConfig

    model = apply_adapter(tiny("llama"), LoraConfig(r=2, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    assert model.peft_config["default"].r == 2
    with pytest.raises(UserError, match="already"):
        apply_adapter(model, fields())


@pytest.mark.parametrize("first", ["adapter", "patch"])
@pytest.mark.parametrize(
    ("changes", "fused"),
    [
        ({"lora_target_modules": "all-linear"}, 14),
        ({"lora_modules_to_save": ["lm_head"]}, 4),
        ({"use_dora": True, "lora_target_modules": ["gate_proj", "down_proj"]}, 0),
    ],
    ids=["all-linear", "lm_head saved whole", "dora"],
)
def test_adapters_train_alike_under_a_patched_model(tiny, batch, first, changes, fused):
    torch.manual_seed(3)
    original = adapted(tiny("llama"), **changes)
    base = tiny("llama")
    if first == "patch":
        patch(base)
    torch.manual_seed(3)
    patched = adapted(base, **changes)
    report = patch(patched)
    assert report.patched.pop("lora_linear", 0) == fused
    assert report.patched == {"decoder_layer": 2, "linear_cross_entropy": 1, "rms_norm": 5, "rope": 2, "swiglu": 2}
    check_head(patched, read_head(patched))
    assert backbone(patched) is patched.get_base_model().model
    expected, got = original(**batch).loss, patched(**batch)
    assert got.logits is None
    torch.testing.assert_close(got.loss, expected, rtol=1e-6, atol=0)
    expected.backward()
    got.loss.backward()
    for (name, a), b in zip(original.named_parameters(), patched.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert (a.grad - b.grad).abs().max() < 5e-6 * a.grad.abs().max(), name
    with patched.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(patched(**batch).loss, tiny("llama")(**batch).loss, rtol=1e-6, atol=0)
    assert unpatch(patched) == 12


def test_the_head_that_is_read_is_the_one_that_trains(tiny):
    model = adapted(tiny("llama"), lora_modules_to_save=["lm_head"])
    wrapper = model.get_base_model().lm_head
    assert read_head(model).weight is wrapper.modules_to_save["default"].weight
    with model.disable_adapter():
        assert read_head(model).weight is wrapper.original_module.weight


def test_lora_on_the_head_is_refused(tiny, batch):
    for changes in ({}, {"use_dora": True}):
        with pytest.raises(UserError, match="lm_head out of lora_target_modules"):
            apply_adapter(tiny("llama"), fields(lora_target_modules=["q_proj", "lm_head"], **changes))
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    model = tiny("llama")
    patch(model)
    with pytest.raises(UserError, match="can't be trained through the fused head"):
        get_peft_model(model, config).train()(**batch)
    report = patch(get_peft_model(tiny("llama"), config))
    assert "linear_cross_entropy" not in report.patched and "fused head" in report.skipped[0][1]


def test_unknown_target_modules_are_named(tiny):
    with pytest.raises(UserError, match="nope"):
        apply_adapter(tiny("llama"), fields(lora_target_modules=["nope"]))


def test_gradient_checkpointing_with_a_frozen_base(tiny, batch):
    torch.manual_seed(3)
    plain = adapted(tiny("llama"))
    torch.manual_seed(3)
    saving = adapted(tiny("llama"))
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    patch(saving)
    calls = []
    saving.get_base_model().model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    plain(**batch).loss.backward()
    saving(**batch).loss.backward()
    assert len(calls) == 2  # once forward, once again for backward
    for (name, a), b in zip(plain.named_parameters(), saving.parameters(), strict=True):
        if a.requires_grad:
            assert (a.grad - b.grad).abs().max() < 5e-6 * a.grad.abs().max(), name
