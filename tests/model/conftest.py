"""Tiny random models of many architectures, one template per kind; a test gets its own copy."""

import copy
import types

import pytest
import torch

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXTRA = {
    "gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
    "granite": {"logits_scaling": 8.0},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 8},
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "qwen3_moe": {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 4},
}


def build(name: str, **settings):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SIZES, **EXTRA.get(name, {}), **settings}))
    with torch.no_grad():
        for parameter in model.parameters():  # norms must not be all ones, biases not all zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.float().train()


@pytest.fixture(scope="session")
def tiny():
    """tiny("llama", **config settings) -> a random two-layer model in float32 and training mode."""
    templates = {}

    def make(name: str, **settings):
        key = (name, repr(sorted(settings.items())))
        if key not in templates:
            templates[key] = build(name, **settings)
        return copy.deepcopy(templates[key])

    return make


@pytest.fixture
def batch():
    """Two rows of eleven tokens: labels with -100 in front, the second row padded at the end."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 97, (2, 11), generator=generator)
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :4] = -100
    mask[1, -3:] = 0
    labels[1, -3:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def runs(monkeypatch):
    """A list that grows by one whenever a whole decoder layer runs as burnish.model.blocks."""
    from burnish.model import blocks

    calls, real = [], blocks.forward
    monkeypatch.setattr(blocks, "forward", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


@pytest.fixture
def packed():
    """packed(model) -> inputs: three sequences in one row, as burnish trains; labels are of each sequence alone."""
    from burnish.model import attention

    attention.register()

    def inputs(model):
        model.set_attn_implementation("burnish")
        ids = torch.randint(3, 97, (24,), generator=torch.Generator().manual_seed(5))
        cu = torch.tensor([0, 9, 10, 24], dtype=torch.int32)
        places = torch.cat([torch.arange(n) for n in (9, 1, 14)])
        labels = ids.clone()
        labels[cu[:-1].long()] = -100
        return {**attention.packed_arguments(ids, places, cu, 14), "labels": labels[None]}

    return inputs


@pytest.fixture
def adapted():
    """adapted(model, **fields of burnish's config) -> inside a PeftModel whose B matrices are away from zero."""
    from burnish.model.adapters import apply_adapter

    def inside(model, **changes):
        plain = {
            "lora_modules_to_save": None,
            "use_rslora": False,
            "use_dora": False,
            "lora_target_modules": "all-linear",
        }
        torch.manual_seed(3)
        fields = {"lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **plain, **changes}
        model = apply_adapter(model, types.SimpleNamespace(**fields))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
        return model.train()

    return inside


@pytest.fixture
def gradients():
    """gradients(model, loss) -> {name: gradient} of a backward; the model's own are cleared."""

    def of(model, loss):
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return found

    return of


@pytest.fixture
def assert_same():
    """assert_same(got, want, limit): gradients alike, up to `limit` of the largest value of each tensor."""

    def check(got, want, limit=2e-6):
        assert got.keys() == want.keys()
        for name, grad in want.items():
            error = (got[name] - grad).abs().max() / grad.abs().max().clamp_min(1e-20)
            assert error <= limit, f"{name}: {error:.1e}"

    return check
