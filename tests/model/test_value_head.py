"""A model with a value head, on its way to files and back: plain transformers, plain peft, and TRL's layout."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from burnish import AutoModelForCausalLMWithValueHead, UserError


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, initializer_range=0.2, **shape))


def lora():
    import peft

    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")


def test_a_saved_model_is_plain_transformers_and_a_value_head(tmp_path):
    model = AutoModelForCausalLMWithValueHead.from_pretrained(
        llama(), v_head_init_strategy="normal", v_head_initializer_range=0.7
    )
    assert 0.3 < model.v_head.summary.weight.std() < 1.2 and not model.v_head.summary.bias.any()
    model.save_pretrained(tmp_path)
    plain, ids = AutoModelForCausalLM.from_pretrained(tmp_path), torch.tensor([[5, 6, 7]])
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path)).eval()
    with torch.no_grad():
        logits, nothing, values = again(ids)
        torch.testing.assert_close(logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
        states = plain(ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(values, model.v_head.summary(states)[..., 0], rtol=1e-5, atol=1e-5)
    assert nothing is None and torch.equal(again.v_head.summary.weight, model.v_head.summary.weight)


def test_a_saved_adapter_is_plain_peft_and_a_value_head(tmp_path):
    import peft

    llama().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "base"), peft_config=lora())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert name.startswith("v_head.") or ".lora_" in name, name
            torch.nn.init.normal_(parameter, std=0.3)
    model.eval().save_pretrained(tmp_path / "adapter")
    plain = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "adapter")).eval()
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        torch.testing.assert_close(again(ids)[0], plain(ids).logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again(ids)[2], model(ids)[2], rtol=1e-5, atol=1e-5)
    assert again.is_peft_model and any(p.requires_grad for p in again.pretrained_model.parameters())
    (tmp_path / "adapter" / "value_head.safetensors").rename(tmp_path / "adapter" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"its value head is a pickle"):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "adapter"))


def test_a_value_head_among_the_models_weights_is_found(tmp_path):
    """TRL's layout: one file, the value head's names beside the model's."""
    from safetensors.torch import load_file, save_file

    llama().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head = {"v_head.summary.weight": torch.randn(1, 32), "v_head.summary.bias": torch.randn(1)}
    save_file(weights | head, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))
    for name, value in head.items():
        assert torch.equal(model.state_dict()[name], value)
    save_file({name: value[..., :1] for name, value in head.items()}, tmp_path / "value_head.safetensors")
    with pytest.raises(UserError, match=r"its value head is not of this model's size"):
        AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path))


def test_from_pretrained_says_what_it_cannot_do(tmp_path):
    llama().save_pretrained(tmp_path)
    make = AutoModelForCausalLMWithValueHead.from_pretrained
    assert make(str(tmp_path), torch_dtype=torch.bfloat16).pretrained_model.dtype == torch.bfloat16
    for given, message in (
        ((llama(), {"dtype": "bfloat16"}), "dtype is for loading, and the model is loaded already"),
        ((llama(), {"v_head_init_strategy": "zeros"}), "unknown v_head_init_strategy 'zeros'"),
        ((str(tmp_path / "none"), {}), "no such model folder"),
    ):
        with pytest.raises(UserError) as caught:
            make(given[0], **given[1])
        assert message in str(caught.value) and "\n" not in str(caught.value)
