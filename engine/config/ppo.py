"""The keys of PPO, with the names and defaults of TRL 0.8's PPOConfig. Each is honoured, or refused with its reason."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from burnish.config.errors import UserError
from burnish.config.values import coerce, key

# Values other than these of a key that burnish has no use for: why, and what to do instead.
_ONLY: dict[str, tuple[tuple, str, str]] = {
    "log_with": ((None,), "trackers are not called", "Hand the dict that step() returns to yours"),
    "tracker_kwargs": (({},), "trackers are not called", "Delete it"),
    "push_to_hub_if_best_kwargs": (({},), "burnish uploads nothing", "Upload what save_pretrained wrote"),
    "compare_steps": ((1,), "it belongs to push_to_hub_if_best_kwargs, which is not taken", "Delete it"),
    "accelerator_kwargs": (({}, {"cpu": True}), "burnish does not use accelerate", "Delete it, or use {'cpu': True}"),
    "optimize_cuda_cache": ((None, False), "rows are packed, so the allocator's cache is kept", "Delete it"),
    "optimize_device_cache": ((False,), "rows are packed, so the allocator's cache is kept", "Delete it"),
    "is_encoder_decoder": ((None, False), "burnish trains causal language models", "Delete it"),
    "forward_batch_size": ((None,), "it has another name today", "Use mini_batch_size"),
}
_COMPUTED = ("world_size", "backward_batch_size", "global_backward_batch_size", "global_batch_size")


@dataclass
class PPOConfig:
    """Keyword arguments only. Raises UserError, in one line, for a value or a pair of values that can't be honoured."""

    # labels, for the script that reads them
    exp_name: str = key("ppo", "name of the experiment")
    task_name: str | None = key(None, "name of the task")
    model_name: str | None = key("gpt2", "name of the model, for the script to load")
    query_dataset: str | None = key("imdb", "name of the data set, for the script to load")
    reward_model: str | None = key(
        "sentiment-analysis:lvwerra/distilbert-imdb", "name of the reward model, for the script to load"
    )
    tracker_project_name: str = key("trl", "name of the project")
    steps: int = key(20000, "number of samples to train on, for the script to count", low=1)
    log_with: str | None = key(None, "tracker; only none")
    tracker_kwargs: dict = key({}, "only empty")
    accelerator_kwargs: dict = key({}, "only {'cpu': True}: stay on the CPU where a GPU is at hand")
    project_kwargs: dict = key({}, "{'logging_dir': folder}: log_stats appends to its metrics.jsonl")
    push_to_hub_if_best_kwargs: dict = key({}, "only empty")
    remove_unused_columns: bool = key(True, "the data loader leaves out columns that nothing here reads")

    # rewards
    adap_kl_ctrl: bool = key(True, "steer the KL coefficient towards target; false: keep init_kl_coef")
    init_kl_coef: float = key(0.2, "first KL coefficient", low=0)
    kl_penalty: str = key("kl", "estimate of a token's KL divergence", choices=("kl", "abs", "mse", "full"))
    target: float = key(6.0, "KL divergence of a response, in nats, that the controller aims at", above=0)
    horizon: float = key(10000, "samples over which the controller answers", above=0)
    use_score_scaling: bool = key(False, "divide scores by their running standard deviation")
    use_score_norm: bool = key(False, "subtract their running mean too (with use_score_scaling)")
    score_clip: float | None = key(None, "scores are clipped to +- this", above=0)
    whiten_rewards: bool = key(False, "divide token rewards by their standard deviation before the advantages")
    gamma: float = key(1.0, "discount of later rewards", low=0, high=1)
    lam: float = key(0.95, "lambda of generalized advantage estimation", low=0, high=1)

    # losses
    cliprange: float = key(0.2, "clip of the policy's probability ratio around 1", above=0)
    cliprange_value: float = key(0.2, "clip of the value around the old value", above=0)
    vf_coef: float = key(0.1, "weight of the value loss", low=0)
    ratio_threshold: float = key(10.0, "a mini-batch whose mean ratio is above this is skipped", above=0)
    early_stopping: bool = key(False, "end a step's epochs when the policy moved further than 1.5 target_kl")
    target_kl: float = key(1.0, "see early_stopping", above=0)

    # updates
    learning_rate: float = key(1.41e-5, "of Adam", low=0)
    batch_size: int = key(128, "rows of a step", low=1)
    mini_batch_size: int = key(128, "rows of a forward and backward pass", low=1)
    forward_batch_size: int | None = key(None, "older name")
    gradient_accumulation_steps: int = key(1, "mini-batches of an update", low=1)
    ppo_epochs: int = key(4, "passes over a step's rows", low=1)
    max_grad_norm: float | None = key(None, "gradients are scaled down to this norm", above=0)
    seed: int = key(0, "seed of everything random", low=0)
    compare_steps: int = key(1, "only 1")
    optimize_cuda_cache: bool | None = key(None, "only false")
    optimize_device_cache: bool = key(False, "only false")
    is_encoder_decoder: bool | None = key(None, "only false")
    is_peft_model: bool | None = key(None, "set by the trainer from the model")

    def __new__(cls, **given: Any) -> "PPOConfig":
        """Refuse names that are no key before dataclass's bare TypeError would."""
        names = [field.name for field in dataclasses.fields(cls)]
        for name in given:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                mend = f"Did you mean {close[0]}?" if close else "The keys are those of TRL 0.8's PPOConfig"
                mend = "It follows from batch_size and mini_batch_size: delete it" if name in _COMPUTED else mend
                raise UserError(f"unknown key {name}", where=f"PPOConfig({name}=...)", mend=mend)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            place = f"PPOConfig({field.name}=...)"
            try:
                value = coerce(field, getattr(self, field.name))
            except ValueError as error:
                raise UserError(f"{field.name} {error}", where=place) from error
            setattr(self, field.name, value)
            if field.name in _ONLY and value not in _ONLY[field.name][0]:
                _, why, mend = _ONLY[field.name]
                raise UserError(f"{field.name} {value!r} is not taken: {why}", where=place, mend=mend)
        if not set(self.project_kwargs) <= {"logging_dir"}:
            raise UserError("project_kwargs takes logging_dir only", where="PPOConfig(project_kwargs=...)")
        if self.batch_size % self.backward_batch_size:
            raise UserError(
                f"batch_size {self.batch_size} is no multiple of mini_batch_size * gradient_accumulation_steps = "
                f"{self.mini_batch_size} * {self.gradient_accumulation_steps}",
                where="PPOConfig(batch_size=...)",
                mend="Every row of a step must belong to one update",
            )
        if self.use_score_norm and not self.use_score_scaling:
            raise UserError(
                "use_score_norm is only read with use_score_scaling",
                where="PPOConfig(use_score_norm=...)",
                mend="Set use_score_scaling=True",
            )

    @property
    def backward_batch_size(self) -> int:
        """Rows of one update."""
        return self.mini_batch_size * self.gradient_accumulation_steps
