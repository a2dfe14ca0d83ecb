"""PPOConfig: TRL 0.8's names and defaults, and one line for what is not taken."""

import pytest

from burnish import PPOConfig, UserError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lerning_rate": 1}, "unknown key lerning_rate. Did you mean learning_rate?"),
        ({"world_size": 1}, "unknown key world_size. It follows from batch_size and mini_batch_size: delete it"),
        ({"batch_size": 6, "mini_batch_size": 4}, "batch_size 6 is no multiple of mini_batch_size * gradient_accum"),
        ({"kl_penalty": "k3"}, "kl_penalty must be one of kl, abs, mse, full"),
        ({"log_with": "wandb"}, "log_with 'wandb' is not taken: trackers are not called"),
        ({"use_score_norm": True}, "use_score_norm is only read with use_score_scaling"),
        ({"forward_batch_size": 4}, "it has another name today. Use mini_batch_size"),
        ({"is_encoder_decoder": True}, "burnish trains causal language models"),
        ({"accelerator_kwargs": {"mixed_precision": "fp16"}}, "burnish does not use accelerate"),
        ({"project_kwargs": {"total_limit": 2}}, "project_kwargs takes logging_dir only"),
        ({"gamma": 1.5}, "gamma must be at most 1, got 1.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_keys_that_cannot_be_honoured(given, message):
    with pytest.raises(UserError) as caught:
        PPOConfig(**given)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_every_key_of_trl_0_8_is_known():
    """Names and defaults from TRL 0.8.6's documentation."""
    defaults = {
        "seed": 0, "log_with": None, "task_name": None, "model_name": "gpt2", "query_dataset": "imdb",
        "reward_model": "sentiment-analysis:lvwerra/distilbert-imdb", "remove_unused_columns": True,
        "tracker_project_name": "trl", "steps": 20000, "learning_rate": 1.41e-05, "adap_kl_ctrl": True,
        "init_kl_coef": 0.2, "kl_penalty": "kl", "target": 6, "horizon": 10000, "gamma": 1, "lam": 0.95,
        "cliprange": 0.2, "cliprange_value": 0.2, "vf_coef": 0.1, "batch_size": 128, "forward_batch_size": None,
        "mini_batch_size": 128, "gradient_accumulation_steps": 1, "ppo_epochs": 4, "max_grad_norm": None,
        "optimize_cuda_cache": None, "optimize_device_cache": False, "early_stopping": False, "target_kl": 1,
        "compare_steps": 1, "ratio_threshold": 10.0, "use_score_scaling": False, "use_score_norm": False,
        "score_clip": None, "whiten_rewards": False, "is_encoder_decoder": None, "is_peft_model": None,
        "tracker_kwargs": {}, "accelerator_kwargs": {}, "project_kwargs": {}, "push_to_hub_if_best_kwargs": {},
    }  # fmt: skip
    config = PPOConfig(**defaults)
    assert {name: getattr(PPOConfig(), name) for name in defaults} == defaults and config == PPOConfig()
