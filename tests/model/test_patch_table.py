"""What burnish.patch does to each architecture, and that nothing else changes: loss, gradients, logits, generation.

The table is the documentation of what is patched. Two layers each; norms counted with the final one and with q/k norms.
"""

import copy

import pytest
import torch

from burnish.model.patch import patch
from burnish.model.probe import glu_roles, norm_parts, probe_glu, probe_norm, probe_rope

# architecture: (norms, their kind, MLPs, their op, rotary layout)
PLAIN, ONE_PLUS, WIDE = ("llama", 0.0), ("gemma", 1.0), ("gemma", 0.0)
TABLE = {
    "llama": (5, PLAIN, 2, "swiglu", "half"),
    "mistral": (5, PLAIN, 2, "swiglu", "half"),
    "qwen2": (5, PLAIN, 2, "swiglu", "half"),
    "qwen3": (9, PLAIN, 2, "swiglu", "half"),
    "gemma2": (9, ONE_PLUS, 2, "geglu", "half"),
    "gemma3_text": (13, ONE_PLUS, 2, "geglu", "half"),
    "olmo2": (9, WIDE, 2, "swiglu", "half"),  # multiplied by the weight before rounding
    "phi3": (5, PLAIN, 2, "swiglu", "half"),  # fused gate and up, half of each head rotated
    "granite": (5, PLAIN, 2, "swiglu", "half"),  # logits divided
    "cohere2": (0, None, 2, "swiglu", "interleaved"),  # LayerNorms with an RMSNorm's attributes; logits multiplied
    "smollm3": (5, PLAIN, 2, "swiglu", "half"),
    "glm": (5, PLAIN, 2, "swiglu", "interleaved from half"),
    "mixtral": (5, PLAIN, 0, None, "half"),
    "qwen3_moe": (9, PLAIN, 0, None, "half"),
}
WHOLE_LAYERS = {"llama", "mistral", "qwen2", "qwen3", "granite", "smollm3"}  # the rest has its parts patched
LEFT_ALONE = {
    "cohere2": ("Cohere2LayerNorm x3", "other than RMSNorm"),
    "mixtral": ("MixtralExperts x2", "three-dimensional"),
    "qwen3_moe": ("Qwen3MoeExperts x2", "three-dimensional"),
}
DESCRIBED = [
    pytest.param(name, id=f"{name}: {norms} norms {kind or ''}, {mlps} {op or 'MLPs'}, rope {layout}")
    for name, (norms, kind, mlps, op, layout) in TABLE.items()
]


@pytest.mark.parametrize("name", DESCRIBED)
def test_what_is_patched_and_what_is_left_alone(tiny, name):
    norms, kind, mlps, op, layout = TABLE[name]
    model = tiny(name)
    for module in model.modules():
        if norm_parts(module) and norms:
            settings = probe_norm(module).settings
            assert (settings["cast"], settings["offset"]) == kind
        if glu_roles(module):
            assert probe_glu(module).op == op
        if type(module).__name__.endswith("Attention"):
            rotary = type(module).forward.__globals__["apply_rotary_pos_emb"]
            assert probe_rope(rotary, module.head_dim).settings["layout"] == layout
    layers = 2 if name in WHOLE_LAYERS else 0
    expected = {"rms_norm": norms, op: mlps, "rope": 2, "linear_cross_entropy": 1, "decoder_layer": layers}
    report = patch(model)
    assert report.patched == {key: count for key, count in expected.items() if count}
    if name not in LEFT_ALONE:
        assert report.skipped == []
    else:
        [(who, why)] = report.skipped
        assert LEFT_ALONE[name][0] in who and LEFT_ALONE[name][1] in why
        assert who in str(report) and why in str(report)


@pytest.mark.parametrize("name", TABLE)
def test_loss_and_every_gradient_are_the_models_own(tiny, batch, name):
    original, patched = tiny(name), tiny(name)
    patch(patched)
    expected, got = original(**batch), patched(**batch)
    assert got.logits is None
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-6, atol=0)
    expected.loss.backward()
    got.loss.backward()
    for (key, a), b in zip(original.named_parameters(), patched.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), key
        if a.grad is not None:
            difference = (a.grad - b.grad).abs().max() / a.grad.abs().max().clamp_min(1e-20)
            assert difference < 5e-6, f"{key}: {difference:.1e}"


@pytest.mark.parametrize("name", TABLE)
def test_logits_and_generation_are_the_models_own(tiny, batch, name):
    original, patched = tiny(name).eval(), tiny(name).eval()
    patch(patched)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected, got = original(**inputs).logits, patched(**inputs).logits
        assert (got - expected).abs().max() < 3e-6 * expected.abs().max()
        prompt = batch["input_ids"][:, :6]
        options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "attention_mask": prompt > 0}
        assert torch.equal(original.generate(prompt, **options), patched.generate(prompt, **options))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "olmo2", "cohere2", "phi3"])
def test_bfloat16_is_no_further_from_float32_than_the_models_own(tiny, batch, name):
    exact = tiny(name)
    original, patched = copy.deepcopy(exact).bfloat16(), copy.deepcopy(exact).bfloat16()
    exact.load_state_dict(original.state_dict())  # the same rounded weights
    patch(patched)
    for model in (exact, original, patched):
        model(**batch).loss.backward()
    errors = [0.0, 0.0]
    for truth, a, b in zip(exact.parameters(), original.parameters(), patched.parameters(), strict=True):
        if truth.grad is not None:
            for index, grad in enumerate((a.grad, b.grad)):
                errors[index] += ((grad.float() - truth.grad).norm() / truth.grad.norm()).item()
    assert errors[1] < 1.1 * errors[0], f"patched {errors[1]:.4f}, original {errors[0]:.4f}"


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere2", "phi3"])
def test_on_a_gpu(tiny, batch, name):
    original, patched = tiny(name).cuda(), tiny(name).cuda()
    patch(patched)
    batch = {key: value.cuda() for key, value in batch.items()}
    expected, got = original(**batch).loss, patched(**batch).loss
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=0)
    expected.backward()
    got.backward()
    for (key, a), b in zip(original.named_parameters(), patched.parameters(), strict=True):
        if a.grad is not None:
            assert (a.grad - b.grad).abs().max() < 1e-4 * a.grad.abs().max(), key
