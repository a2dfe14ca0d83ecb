"""Decoder layers made of burnish.model.blocks: which layers match, and that loss and gradients stay the model's own."""

import pytest
import torch
from torch import nn

from burnish.kernels import use
from burnish.model import blocks
from burnish.model.adapters import plain_lora
from burnish.model.patch import patch

FAMILIES = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {},
    "smollm3": {"no_rope_layers": [1, 0], "use_sliding_window": False},
    "granite": {},
}
ADAPTERS = {
    "all": {"lora_target_modules": "all-linear"},
    "q and v": {"lora_target_modules": ["q_proj", "v_proj"]},
    "k, o and up": {"lora_target_modules": ["k_proj", "o_proj", "up_proj"]},
    "gate and down, head saved whole": {
        "lora_target_modules": ["gate_proj", "down_proj"],
        "lora_modules_to_save": ["lm_head"],
    },
}


def named(tiny, family):
    return tiny(family.split()[0], **FAMILIES.get(family, {}))


def one_by_one(model, inputs):
    """The same sequences without packing, through transformers' own attention: the loss of all labels."""
    model.set_attn_implementation("eager")
    cu = inputs["cu_seq_lens_q"].tolist()
    losses = []
    for start, stop in zip(cu, cu[1:], strict=False):
        ids, labels = inputs["input_ids"][:, start:stop], inputs["labels"][:, start:stop]
        if stop - start > 1:
            losses.append(model(input_ids=ids, labels=labels, num_items_in_batch=21, use_cache=False).loss)
    return sum(losses)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_match(tiny, family):
    assert [blocks.matches(layer) for layer in named(tiny, family).model.layers] == [None, None]


def changed(layer, attribute, forward):
    """A layer of which one module's class has another forward."""
    inner = getattr(layer, attribute)
    inner.__class__ = type("Changed", (type(inner),), {"forward": forward})
    return layer


def test_layers_that_do_not_match_say_why(tiny):
    first = lambda name, **settings: tiny(name, **settings).model.layers[0]  # noqa: E731
    assert "not built of self_attn" in blocks.matches(first("gemma2"))
    assert "not built of self_attn" in blocks.matches(first("phi3"))
    assert "MLP is not built" in blocks.matches(first("qwen3_moe"))
    assert blocks.matches(first("gemma")) == "its norm GemmaRMSNorm is not Llama's"
    assert blocks.matches(first("granite", residual_multiplier=0.5)) == "computes something else"
    assert blocks.matches(first("llama", hidden_act="gelu")) == "computes something else"
    assert blocks.matches(first("granite", attention_dropout=0.1)) is None

    layer = first("qwen3")
    layer.self_attn.k_norm.variance_epsilon = 0.1  # unlike q_norm's: still the same functions
    assert blocks.matches(layer) is None

    layer = first("llama")
    layer.self_attn.sliding_window = 3  # which Llama's attention does not hand on
    assert blocks.matches(layer) == "asks for another attention (scale, window, dropout, softcap)"
    layer = first("qwen3")
    norm = type(layer.self_attn.q_norm).forward
    changed(layer.self_attn, "q_norm", lambda self, x: norm(self, x) * 1.01)
    assert blocks.matches(layer) == "its norm Changed computes something other than RMSNorm"
    gated = type(first("llama").mlp).forward
    layer = changed(first("llama"), "mlp", lambda self, x: gated(self, x) * 1.0001)
    assert blocks.matches(layer) == "computes something else"
    layer = changed(first("llama"), "self_attn", lambda self, **kwargs: (kwargs["missing"], None))
    assert "could not be run alone (KeyError" in blocks.matches(layer)


def test_the_trial_leaves_the_model_and_the_registered_attention_alone(tiny):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny("qwen3")
    before, names = {k: v.clone() for k, v in model.state_dict().items()}, set(ALL_ATTENTION_FUNCTIONS)
    seen, state = [], torch.get_rng_state()
    for module in model.model.layers[0].modules():
        module.register_forward_hook(lambda *_: seen.append(1))
    assert blocks.matches(model.model.layers[0]) is None
    assert not seen and torch.equal(torch.get_rng_state(), state)
    assert set(ALL_ATTENTION_FUNCTIONS) == names and model.config._attn_implementation != "burnish_trial"
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("dtype", "backend"), [(torch.float32, "auto"), (torch.bfloat16, "auto"), (torch.bfloat16, "reference")]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_layer_is_bit_for_bit_its_patched_parts(tiny, family, dtype, backend, runs, packed, gradients):
    """The same steps in the same order as the class's own forward over patched norms, MLP and rotation.

    But for one rounding less: add_rms_norm adds the residual's gradient before it rounds to bfloat16, not after.
    """
    model = named(tiny, family).to(dtype)
    assert patch(model).patched["decoder_layer"] == 2
    inputs = packed(model)
    runs.clear()
    with use(backend):
        whole = model(**inputs).loss
        whole_gradients = gradients(model, whole)
        for layer in model.model.layers:
            del layer.forward
        parts = model(**inputs).loss
        parts_gradients = gradients(model, parts)
    assert len(runs) == 2
    assert torch.equal(whole, parts)
    if (dtype, backend) != (torch.bfloat16, "auto"):
        assert all(torch.equal(whole_gradients[name], grad) for name, grad in parts_gradients.items())


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2", "gemma"])
def test_packed_loss_and_gradients_are_the_models_own_of_each_sequence(
    tiny, family, packed, gradients, assert_same, runs
):
    original, model = named(tiny, family), named(tiny, family)
    patch(model)
    inputs = packed(model)
    runs.clear()
    loss = model(**inputs).loss
    assert len(runs) == (0 if family.startswith("gemma") else 2)
    want = one_by_one(original, inputs)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    assert_same(gradients(model, loss), gradients(original, want))


@pytest.mark.parametrize("targets", ADAPTERS)
@pytest.mark.parametrize("family", ["llama with biases", "mistral", "qwen2", "qwen3", "smollm3"])
def test_adapters_get_pefts_gradients(tiny, family, targets, monkeypatch, adapted, packed, gradients, assert_same):
    original, model = (adapted(named(tiny, family), **ADAPTERS[targets]) for _ in range(2))
    report = patch(model)
    count = sum(1 for name, _ in model.named_parameters() if "lora_A" in name)
    assert report.patched["lora_linear"] == count and report.skipped == []
    inputs = packed(model)
    fused, real = [], blocks.lora_linears
    monkeypatch.setattr(blocks, "lora_linears", lambda x, *a: fused.append(len(a[0])) or real(x, *a))
    loss = model(**inputs).loss
    assert sum(fused) == count and len(fused) == {"all": 8, "q and v": 2, "k, o and up": 6}.get(targets, 4)
    want = one_by_one(original, inputs)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    got, expected = gradients(model, loss), gradients(original, want)
    assert any("lora_A" in name for name in got) and all("lora" in name or "lm_head" in name for name in got)
    assert_same(got, expected)


def test_float32_adapters_beside_a_bfloat16_base_are_as_exact_as_pefts(tiny, adapted, packed, gradients):
    theirs, ours = (adapted(tiny("llama").bfloat16(), **ADAPTERS["all"]) for _ in range(2))
    exact = adapted(tiny("llama"), **ADAPTERS["all"])
    exact.load_state_dict(theirs.state_dict())  # the same rounded weights
    patch(ours)
    models = exact, theirs, ours
    truth, *found = (gradients(model, model(**packed(model)).loss) for model in models)
    errors = [0.0, 0.0]
    for name, grad in truth.items():
        for index, each in enumerate(found):
            assert each[name].dtype == torch.float32
            errors[index] += ((each[name] - grad).norm() / grad.norm()).item()
    assert errors[1] < 1.1 * errors[0], errors


def module_run(model, inputs):
    """The model's own layers over peft's own modules."""
    kept = [vars(layer).pop("forward") for layer in backbone_layers(model)]
    try:
        with torch.no_grad():
            return model(**inputs).loss
    finally:
        for layer, forward in zip(backbone_layers(model), kept, strict=True):
            layer.forward = forward


def backbone_layers(model):
    return model.get_base_model().model.layers


def test_the_adapters_state_is_read_at_every_call(tiny, adapted, packed):
    from peft import LoraConfig

    model = adapted(tiny("llama"), **ADAPTERS["all"])
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=16, target_modules=["q_proj", "down_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B.other" in name:
            nn.init.normal_(parameter, std=0.1)
    patch(model)
    inputs = packed(model)
    layer = backbone_layers(model)[0].self_attn.q_proj
    seen = []

    def loss(reason=None):
        found = plain_lora(layer)
        assert (reason in found) if reason else not isinstance(found, str)
        got = model(**inputs).loss.detach()
        torch.testing.assert_close(got, module_run(model, inputs), rtol=1e-6, atol=0)
        assert all(abs(got - earlier) > 1e-4 for earlier in seen)
        seen.append(got)
        return got

    first = loss()
    with model.disable_adapter():
        base = loss("disabled or merged")
    bare = tiny("llama")
    patch(bare)
    assert torch.equal(base, bare(**packed(bare)).loss.detach())
    model.set_adapter("other")
    loss()
    layers = [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "set_adapter")]
    for each in layers:
        each.set_adapter(["default", "other"])
    loss("2 adapters are active")
    model.set_adapter("default")
    seen.clear()
    torch.testing.assert_close(loss(), first, rtol=0, atol=0)
    layer.merge()
    seen.clear()
    torch.testing.assert_close(loss("disabled or merged"), first, rtol=1e-5, atol=0)
