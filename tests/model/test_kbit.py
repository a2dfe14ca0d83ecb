"""Bases in 8 and 4 bits: adapters learn what they learn on the same weights expanded, and nothing is silent."""

import importlib.util

import pytest
import torch
from torch import nn

from burnish.config.errors import UserError
from burnish.config.fields import SFTConfig
from burnish.model import kbit
from burnish.run import assemble

ROWS = [{"text": f"{a} quick {b} foxes jump over {a * b} lazy dogs"} for a in range(2, 6) for b in range(3, 7)]
needs_bitsandbytes = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("bitsandbytes", "accelerate")),
    reason="bitsandbytes and accelerate are not installed",
)


def settings(folder, **given) -> SFTConfig:
    defaults = {
        "use_peft": True, "lora_dropout": 0.0, "lora_target_modules": "all-linear", "max_steps": 4, "logging_steps": 1,
        "learning_rate": 1e-2, "per_device_train_batch_size": 4, "use_cpu": True, "save_steps": 2, "bf16": False,
    }  # fmt: skip
    return SFTConfig(str(folder), **defaults | given)


def losses(run) -> list[float]:
    return [record["loss"] for record in run.state.log_history if "loss" in record]


def expanded(folder, network) -> str:
    """A model folder that holds the float32 values which a 4-bit model's weights stand for."""
    from bitsandbytes.functional import dequantize_4bit
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inner = network.get_base_model()
    for name, module in plain.named_modules():
        other = inner.get_submodule(name)
        if isinstance(module, nn.Linear) and hasattr(other, "base_layer"):
            packed = other.base_layer.weight
            module.weight.data = dequantize_4bit(packed.data, packed.quant_state).float().view_as(module.weight)
    return plain


@needs_bitsandbytes
@pytest.mark.parametrize("nested", [False, True])
def test_adapters_on_four_bits_learn_what_they_learn_on_the_expanded_weights(tmp_path, tiny_model, nested):
    given = {"model_name_or_path": tiny_model, "load_in_4bit": True, "use_bnb_nested_quant": nested}
    run = assemble(settings(tmp_path / "packed", **given), train_dataset=ROWS)
    kinds = {type(m.base_layer).__name__ for m in run.model.modules() if hasattr(m, "base_layer")}
    assert kinds == {"Linear4bit"} and kbit.kbit(run.model) == 4
    plain = expanded(tiny_model, run.model)
    with torch.random.fork_rng():
        other = assemble(settings(tmp_path / "plain"), model=plain, processing_class=run.tokenizer, train_dataset=ROWS)
    for name, parameter in other.model.named_parameters():
        if "lora_" in name:
            parameter.data = run.model.get_parameter(name).data.clone()
    run.train()
    other.train()
    assert losses(run) == pytest.approx(losses(other), rel=2e-4)
    assert losses(run)[-1] < losses(run)[0] - 0.05
    frozen = [p for name, p in run.model.named_parameters() if "lora_" not in name]
    assert not any(p.requires_grad for p in frozen)


@needs_bitsandbytes
def test_an_evaluation_does_not_end_the_training(tmp_path, tiny_model):
    """bitsandbytes repacks 4-bit weights for inference on some CPUs: without gradients from then on."""
    config = settings(tmp_path, model_name_or_path=tiny_model, load_in_4bit=True, eval_on_start=True)
    run = assemble(config, train_dataset=ROWS, eval_dataset=ROWS[:4])
    layers = [m for m in run.model.modules() if isinstance(m, importlib.import_module("bitsandbytes").nn.Linear4bit)]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)
    run.train()
    assert all(record["grad_norm"] > 0.01 for record in run.state.log_history if "grad_norm" in record)


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_a_resumed_run_is_the_run(tmp_path, tiny_model, bits):
    whole = assemble(settings(tmp_path / "a", model_name_or_path=tiny_model, **bits), train_dataset=ROWS)
    whole.train()
    again = assemble(settings(tmp_path / "b", model_name_or_path=tiny_model, **bits), train_dataset=ROWS)
    again.train(str(tmp_path / "a" / "checkpoint-2"))
    ours, theirs = (dict(run.model.named_parameters()) for run in (again, whole))
    assert losses(again) == losses(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@needs_bitsandbytes
def test_eight_bits_train_and_keep_their_threshold(tmp_path, tiny_model):
    run = assemble(settings(tmp_path, model_name_or_path=tiny_model, load_in_8bit=True), train_dataset=ROWS)
    layers = [m for m in run.model.modules() if isinstance(m, importlib.import_module("bitsandbytes").nn.Linear8bitLt)]
    assert layers and {layer.state.threshold for layer in layers} == {6.0}
    run.train()
    assert losses(run)[-1] < losses(run)[0] - 0.05


@needs_bitsandbytes
@pytest.mark.parametrize("bits", [{"load_in_4bit": True}, {"load_in_8bit": True}])
def test_a_script_brings_a_quantised_model(tmp_path, tiny_model, tiny_tokenizer, bits):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=BitsAndBytesConfig(**bits))
    given = {"model": model, "processing_class": tiny_tokenizer, "train_dataset": ROWS}
    config = SFTConfig(str(tmp_path), max_steps=4, logging_steps=1, learning_rate=1e-2, use_cpu=True)
    with pytest.raises(UserError, match="can't be trained themselves. Use use_peft: true"):
        assemble(config, **given)
    run = assemble(config, peft_config=LoraConfig(target_modules=["q_proj"]), **given)
    run.train()
    assert losses(run)[-1] < losses(run)[0]


@needs_bitsandbytes
def test_weights_repacked_for_inference_are_refused(tiny_model):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    wanted = BitsAndBytesConfig(load_in_4bit=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=wanted)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(UserError, match="up_proj: 4-bit weights were repacked for inference"):
        kbit.prepare_kbit(model, adapted=True, upcast=True)


def test_a_missing_package_is_one_line(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else find(name))
    with pytest.raises(UserError) as error:
        kbit.kbit_options(SFTConfig("out", load_in_4bit=True, use_peft=True), torch.float32)
    assert "bitsandbytes, which is not installed. pip install bitsandbytes" in str(error.value)
    assert kbit.kbit_options(SFTConfig("out"), torch.float32) == {}


@needs_bitsandbytes
def test_the_keys_reach_bitsandbytes():
    config = SFTConfig("o", load_in_4bit=True, bnb_4bit_quant_type="fp4", use_bnb_nested_quant=True)
    wanted = kbit.kbit_options(config, torch.bfloat16)["quantization_config"]
    assert (wanted.bnb_4bit_quant_type, wanted.bnb_4bit_use_double_quant) == ("fp4", True)
    assert wanted.bnb_4bit_compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"load_in_8bit": True, "load_in_4bit": True}, "load_in_8bit and load_in_4bit are both set"),
        ({"load_in_4bit": True, "parallel": "fsdp"}, "packed weights can't be cut up"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type is about 4-bit bases"),
        ({"load_in_8bit": True, "use_bnb_nested_quant": True}, "use_bnb_nested_quant is about 4-bit bases"),
    ],
)
def test_keys_that_can_not_go_together(given, message):
    with pytest.raises(UserError, match=message):
        SFTConfig("out", **given)


@needs_bitsandbytes
def test_trls_way_through_model_init_kwargs(tmp_path, tiny_model):
    """A BitsAndBytesConfig among the keys loads the base, and doesn't stand in a checkpoint's way."""
    from transformers import BitsAndBytesConfig

    given = {"model_init_kwargs": {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}}
    run = assemble(settings(tmp_path, model_name_or_path=tiny_model, **given), train_dataset=ROWS)
    run.train()
    assert kbit.kbit(run.model) == 4
    again = assemble(settings(tmp_path / "b", model_name_or_path=tiny_model, **given), train_dataset=ROWS)
    again.train(str(tmp_path / "checkpoint-2"))
    assert losses(again) == losses(run)
