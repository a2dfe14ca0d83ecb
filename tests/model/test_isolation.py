"""Packed sequences must not see each other; a model whose code lets them is refused before training."""

import pytest

from burnish.config.errors import UserError
from burnish.model.attention import register
from burnish.model.isolation import check_isolation
from burnish.model.patch import patch


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "cohere2", "smollm3", "phi3", "mixtral"])
def test_attention_interface_models_keep_sequences_apart(tiny, name):
    model = tiny(name)
    model.set_attn_implementation(register())
    check_isolation(model)
    patch(model)
    check_isolation(model)
    assert model.training


@pytest.mark.parametrize(
    ("name", "settings"), [("nemotron", {}), ("mpt", {"n_heads": 4, "d_model": 32, "n_layers": 2})]
)
def test_models_with_their_own_attention_are_refused(tiny, name, settings):
    model = tiny(name, **settings)
    model.set_attn_implementation(register())
    with pytest.raises(UserError, match="packed row"):
        check_isolation(model)
