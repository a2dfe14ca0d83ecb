"""Tiny models with several documents in a row, their losses and gradients, with and without checkpointing."""

import itertools

import torch

from burnish.memory.layers import install, uninstall
from burnish.memory.settings import Memory
from burnish.model.attention import packed_arguments, register
from burnish.model.head import backbone
from burnish.model.patch import patch

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DOCUMENTS = (7, 1, 12, 3)
TOKENS = sum(DOCUMENTS)
LORA = ["q_proj", "v_proj", "gate_proj", "down_proj"]


def build(name, lora=False, dropout=0.0, dtype=torch.float32, patched=True, **settings):
    """A random five-layer model in training mode, with burnish's attention and kernels."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    register()
    config = AutoConfig.for_model(name, **{**SIZES, **settings})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="burnish")
    with torch.no_grad():
        for parameter in model.parameters():  # norms must not be all ones, biases not all zeros
            parameter.add_(0.1 * torch.randn_like(parameter))
    model = model.to(dtype)
    if lora:
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=4, lora_alpha=8, lora_dropout=dropout, target_modules=LORA, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, settings).to(dtype)
    model.train()
    if patched:
        patch(model)
    return model


def forward(model, documents=DOCUMENTS, seed=5):
    """A loss over every hidden state of one packed row."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 97, (sum(documents),), generator=generator)
    positions = torch.cat([torch.arange(n) for n in documents])
    cu = torch.tensor([0, *torch.tensor(documents).cumsum(0)], dtype=torch.int32)
    hidden = backbone(model)(**packed_arguments(ids, positions, cu, max(documents))).last_hidden_state
    return (hidden - torch.randn(hidden.shape, generator=generator).to(hidden.dtype)).square().sum()


def step(model, documents=DOCUMENTS):
    """[loss, gradient of every trained parameter], by name."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(9)  # for dropout
    loss = forward(model, documents)
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def equal(found, expected):
    """Bit for bit, what has no gradient included."""
    different = [
        name
        for name, want in expected.items()
        if (want is None) != (found[name] is None) or (want is not None and not torch.equal(found[name], want))
    ]
    assert not different and found.keys() == expected.keys(), different


def close(found, expected):
    """1e-6 of all gradients together, and of the loss; a single tensor may be off by as much as float32 is here (2e-6
    from float64, whole or tiled)."""
    assert abs(found["loss"] - expected["loss"]) <= 1e-6 * abs(expected["loss"]) if "loss" in expected else True
    pairs = {name: (found[name], want) for name, want in expected.items() if want is not None and name != "loss"}
    off = {name: (got - want).norm() for name, (got, want) in pairs.items()}
    size = {name: want.norm() for name, (_, want) in pairs.items()}
    assert torch.stack([*off.values()]).norm() < 1e-6 * torch.stack([*size.values()]).norm()
    assert all(off[name] <= 3e-6 * size[name] for name in pairs), max(off, key=lambda name: off[name] / size[name])


def checkpointed(model, memory, documents=DOCUMENTS, **options):
    installed = install(model, memory, **options)
    try:
        with installed.step():
            return step(model, documents), installed
    finally:
        uninstall(model)


SETTINGS = [Memory(True, *rest) for rest in itertools.product((1, 2, 3), (False, True), (None,), (False, True))]
