"""The head is read from the model and believed only if it gives the model's own logits."""

import dataclasses

import pytest
import torch
from torch import nn

from burnish.config.errors import UserError
from burnish.model.head import backbone, check_head, read_head


@pytest.mark.parametrize(
    ("name", "settings", "softcap", "scale"),
    [
        ("llama", {}, None, 1.0),
        ("llama", {"tie_word_embeddings": True}, None, 1.0),
        ("gemma2", {"final_logit_softcapping": 30.0}, 30.0, 1.0),
        ("gemma2", {"final_logit_softcapping": None}, None, 1.0),
        ("granite", {}, None, 0.125),
        ("hyperclovax", {"logits_scaling": 8.0}, None, 8.0),
        ("cohere2", {}, None, 0.25),
    ],
)
def test_softcap_and_scale_are_read_and_checked(tiny, name, settings, softcap, scale):
    model = tiny(name, **settings)
    head = read_head(model)
    assert (head.softcap, head.logit_scale) == (softcap, scale)
    assert head.weight is model.get_output_embeddings().weight and head.bias is None
    check_head(model, head)
    assert model.training and all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "wrong", [{"softcap": 60.0}, {"softcap": None}, {"logit_scale": 1.02}, {"bias": torch.full((97,), 0.7)}]
)
def test_a_head_that_is_slightly_wrong_is_refused(tiny, dtype, wrong):
    model = tiny("gemma2", final_logit_softcapping=50.0).to(dtype)
    head = read_head(model)
    check_head(model, head)
    wrong = {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in wrong.items()}
    with pytest.raises(UserError, match="can't be reproduced"):
        check_head(model, dataclasses.replace(head, **wrong))


def test_a_bias_is_found(tiny):
    model = tiny("llama")
    biased = nn.Linear(32, 97)
    model.set_output_embeddings(biased)
    head = read_head(model)
    assert head.bias is biased.bias
    check_head(model, head)


def test_a_model_that_does_something_else_with_its_logits_is_refused(tiny):
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + 1e-2 * logits.square())
    with pytest.raises(UserError, match="can't be reproduced"):
        check_head(model, read_head(model))
    model = tiny("llama")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * torch.nan)
    with pytest.raises(UserError, match="can't be reproduced"):
        check_head(model, read_head(model))


def test_quantised_and_missing_heads_are_refused(tiny):
    model = tiny("llama")
    model.lm_head.weight = nn.Parameter(torch.zeros(97, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(UserError, match="floating-point"):
        read_head(model)
    with pytest.raises(UserError, match="no output embeddings"):
        read_head(nn.Linear(2, 2))
    with pytest.raises(UserError, match="no backbone"):
        backbone(nn.Linear(2, 2))


def test_the_backbone_gives_hidden_states(tiny, batch):
    model = tiny("llama")
    assert backbone(model) is model.model
    hidden = backbone(model)(batch["input_ids"]).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), model(batch["input_ids"]).logits)
