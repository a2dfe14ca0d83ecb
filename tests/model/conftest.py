"""Tiny random models of many architectures, one template per kind; a test gets its own copy."""

import copy

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
