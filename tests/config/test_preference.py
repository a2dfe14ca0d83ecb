"""The preference configurations: TRL's defaults, what can't go together, and files that come back as they were."""

import dataclasses

import pytest

from burnish.config.aliases import HINTS, OLDER
from burnish.config.errors import UserError
from burnish.config.load import dump, load
from burnish.config.preference import (
    DPO_LOSSES,
    BCOConfig,
    CPOConfig,
    DPOConfig,
    KTOConfig,
    ORPOConfig,
    RewardConfig,
)
from burnish.config.refused import REFUSED

CONFIGS = [DPOConfig, CPOConfig, ORPOConfig, KTOConfig, BCOConfig, RewardConfig]
REFERENCE = {
    "precompute_ref_log_probs": False, "precompute_ref_batch_size": None, "sync_ref_model": False,
    "ref_model_mixup_alpha": 0.6, "ref_model_sync_steps": 512,
}  # fmt: skip
SHARED = {
    "max_length": 1024, "model_init_kwargs": None, "trust_remote_code": False, "disable_dropout": True,
    "dataset_num_proc": None,
}  # fmt: skip
# TRL 1.16's own fields with their defaults, written down because TRL is not installed here. BCO: TRL 1.9's.
TRL = {
    DPOConfig: REFERENCE | SHARED | {
        "learning_rate": 1e-6, "loss_type": ["sigmoid"], "loss_weights": None, "ld_alpha": None,
        "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5, "label_smoothing": 0.0, "beta": 0.1,
        "use_weighting": False, "discopop_tau": 0.05, "truncation_mode": "keep_start", "pad_token": None,
        "pad_to_multiple_of": "auto", "activation_offloading": False, "router_aux_loss_coef": None,
    },
    CPOConfig: SHARED | {
        "learning_rate": 1e-6, "max_completion_length": None, "beta": 0.1, "label_smoothing": 0.0,
        "loss_type": "sigmoid", "cpo_alpha": 1.0, "simpo_gamma": 0.5, "alpha": 0.0, "generate_during_eval": False,
        "is_encoder_decoder": None,
    },
    ORPOConfig: SHARED | {
        "learning_rate": 1e-6, "max_completion_length": None, "beta": 0.1, "padding_value": None,
        "generate_during_eval": False, "is_encoder_decoder": None,
    },
    KTOConfig: REFERENCE | SHARED | {
        "learning_rate": 1e-6, "loss_type": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0,
        "pad_to_multiple_of": "auto", "activation_offloading": False,
    },
    BCOConfig: SHARED | {
        "beta": 0.1, "precompute_ref_log_probs": False, "prompt_sample_size": 1024, "min_density_ratio": 0.5,
        "max_density_ratio": 10.0, "generate_during_eval": False, "label_pad_token_id": -100, "padding_value": None,
    },
    RewardConfig: SHARED | {
        "learning_rate": 1e-4, "center_rewards_coefficient": None, "chat_template_path": None, "eos_token": None,
        "pad_token": None, "pad_to_multiple_of": "auto", "activation_offloading": False,
    },
}  # fmt: skip


DENSITIES = ("min_density_ratio", "max_density_ratio")


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_field_of_trl_is_honoured_with_its_default_or_refused(cls):
    config = cls()
    for name, default in TRL[cls].items():
        if name not in {*REFUSED, *HINTS}:
            assert getattr(config, name) == default, name
    assert not {field.name for field in dataclasses.fields(cls)} & {*REFUSED, *HINTS, *OLDER}
    off = {name: value for name, value in TRL[cls].items() if name not in ("prompt_sample_size", *DENSITIES)}
    assert cls(**off) == config, "files that TRL's tools wrote hold every key"


@pytest.mark.parametrize("cls", CONFIGS)
def test_every_key_has_one_line_of_help(cls):
    for field in dataclasses.fields(cls):
        doc = field.metadata["doc"]
        assert 5 < len(doc) < 200 and not doc.endswith("."), field.name


@pytest.mark.parametrize("cls", CONFIGS)
def test_a_file_written_by_dump_gives_the_same_configuration(tmp_path, cls):
    given = {
        DPOConfig: {"loss_type": ["sigmoid", "aot_pair"], "loss_weights": [1, 0.5], "ld_alpha": 0.5},
        CPOConfig: {"loss_type": "alphapo", "alpha": 0.25},
        KTOConfig: {"desirable_weight": 1.33, "sync_ref_model": True},
    }.get(cls, {})
    config = cls(**given)
    (tmp_path / "run.yaml").write_text(dump(config))
    assert load(cls, tmp_path / "run.yaml") == config


def test_loss_types_are_a_list_of_todays_names(tmp_path):
    assert DPOConfig(loss_type="aot_pair").loss_type == ["aot_unpaired"]
    assert load(DPOConfig, None, ["loss_type=[sigmoid,sft]", "loss_weights=[1,0.2]"]).loss_weights == [1, 0.2]
    assert load(DPOConfig, None, ["loss_type=hinge"]).loss_type == ["hinge"]
    for loss in DPO_LOSSES:
        assert DPOConfig(loss_type=loss, label_smoothing=0.1 if loss == "exo_pair" else 0.0).loss_type == [loss]


def test_alphapo_has_no_likelihood_term():
    assert CPOConfig(loss_type="alphapo").cpo_alpha == 0.0
    assert CPOConfig(loss_type="simpo").cpo_alpha == 1.0
    assert CPOConfig(loss_type="alphapo", cpo_alpha=0).cpo_alpha == 0.0


@pytest.mark.parametrize(
    ("cls", "given", "message"),
    [
        (DPOConfig, {"loss_type": "sigmoyd"}, "unknown loss_type sigmoyd. Did you mean sigmoid?"),
        (DPOConfig, {"loss_type": ["sft", "zzz"]}, "unknown loss_type zzz. Use one of sigmoid, sigmoid_norm"),
        (DPOConfig, {"loss_type": []}, "loss_type is empty"),
        (DPOConfig, {"loss_type": ["sft", "ipo"], "loss_weights": [1]}, "1 loss_weights for 2 loss types"),
        (DPOConfig, {"loss_weights": [-1]}, "loss_weights must not be negative"),
        (DPOConfig, {"loss_weights": ["a"]}, "loss_weights must be list of numbers | null, got ['a']"),
        (DPOConfig, {"loss_weights": [float("nan")]}, "loss_weights must be list of numbers | null"),
        (DPOConfig, {"beta": 0}, "beta must be above 0"),
        (DPOConfig, {"label_smoothing": 0.5}, "label_smoothing must be below 0.5"),
        (DPOConfig, {"label_smoothing": -0.1}, "label_smoothing must be at least 0"),
        (DPOConfig, {"loss_type": "robust", "label_smoothing": 0.6}, "label_smoothing must be below 0.5"),
        (DPOConfig, {"loss_type": "exo_pair"}, "exo_pair needs a label_smoothing above 0. Set label_smoothing: 0.001"),
        (DPOConfig, {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing is only read with loss_type aot"),
        (DPOConfig, {"loss_type": "bco_pair", "f_divergence_type": "js_divergence"}, "bco_pair is not a loss of the"),
        (DPOConfig, {"f_divergence_type": "js"}, "f_divergence_type must be one of reverse_kl"),
        (DPOConfig, {"f_alpha_divergence_coef": 2.0}, "only read with f_divergence_type: alpha_divergence"),
        (DPOConfig, {"ld_alpha": 1.5}, "ld_alpha must be at most 1"),
        (DPOConfig, {"use_weighting": True, "loss_type": "aot"}, "aot sorts the pairs apart"),
        (DPOConfig, {"reference_free": True, "precompute_ref_log_probs": True}, "reference_free has no reference"),
        (DPOConfig, {"discopop_tau": 0.1}, "discopop_tau is only read with loss_type: discopop"),
        (DPOConfig, {"sync_ref_model": True, "use_peft": True}, "sync_ref_model needs a reference model of its own"),
        (DPOConfig, {"sync_ref_model": True, "precompute_ref_log_probs": True}, "which precompute_ref_log_probs does"),
        (DPOConfig, {"ref_model_mixup_alpha": 0.5}, "only read with sync_ref_model: true"),
        (DPOConfig, {"precompute_ref_batch_size": 4}, "only read with precompute_ref_log_probs: true"),
        (DPOConfig, {"model_adapter_name": "a", "ref_adapter_name": "a"}, "policy and reference are both the adapter"),
        (DPOConfig, {"force_use_ref_model": True, "ref_adapter_name": "a"}, "name two references"),
        (DPOConfig, {"max_prompt_length": 1024}, "leaves no room for a completion in max_length 1024"),
        (DPOConfig, {"generate_during_eval": True}, "generate_during_eval is not taken"),
        (DPOConfig, {"max_target_length": 64, "max_completion_length": 32}, "is an older name of max_comp"),
        (DPOConfig, {"rpo_alhpa": 1.0}, "Did you mean rpo_alpha?"),
        (CPOConfig, {"loss_type": "simp0"}, "loss_type must be one of sigmoid, hinge, ipo, simpo, alphapo"),
        (CPOConfig, {"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing is only read with loss_type"),
        (CPOConfig, {"simpo_gamma": 1.4}, "simpo_gamma is only read with loss_type simpo or alphapo"),
        (CPOConfig, {"loss_type": "alphapo", "cpo_alpha": 1.0}, "alphapo has no likelihood term"),
        (ORPOConfig, {"beta": -1}, "beta must be above 0"),
        (KTOConfig, {"desirable_weight": 0, "undesirable_weight": 0}, "nothing would be trained"),
        (KTOConfig, {"loss_type": "bco"}, "loss_type must be one of kto, apo_zero_unpaired"),
        (BCOConfig, {"min_density_ratio": 0.5}, "matching of prompt distributions is not offered"),
        (RewardConfig, {"center_rewards_coefficient": -1}, "center_rewards_coefficient must be at least 0"),
        (RewardConfig, {"beta": 0.1}, "unknown key beta"),
    ],
)
def test_what_can_not_be_meant_is_an_error_that_names_the_key(cls, given, message):
    with pytest.raises(UserError) as error:
        cls(**given)
    assert message in str(error.value)
    assert any(f"{cls.__name__}({name}=...)" in error.value.where for name in given)
