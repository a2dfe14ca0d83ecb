"""Keys that nothing would read in a setup: an error, because whoever wrote them expects them to do something.

Only a value other than the default is one: files written by tools hold every key.
"""

import dataclasses
from typing import Any

LORA = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)


def defaults(config: Any) -> dict[str, Any]:
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(config)
    }


def check_read(config: Any) -> None:
    """Raises UserError through the configuration for the first key that is set and would not be read."""
    usual = defaults(config)
    for names, read, reader in _readers(config):
        for name in names:
            if not read and name in usual and getattr(config, name) != usual[name]:
                config._fail(f"{name} is only read with {reader}", name, mend=f"Delete {name}")


def _readers(config: Any) -> list[tuple[tuple[str, ...], bool, str]]:
    """(keys, whether something reads them, what would)."""
    adam = config.optim.startswith("adamw")
    packs = getattr(config, "packing", False) or getattr(config, "eval_packing", None)
    saves = config.save_strategy != "no"
    warms = config.lr_scheduler_type != "constant"
    tracks = config.load_best_model_at_end or config.eval_strategy != "no"
    return [
        (LORA, config.use_peft, "use_peft: true"),
        (("adam_beta1", "adam_beta2", "adam_epsilon"), adam, "an optim of the adamw family"),
        (("warmup_steps", "warmup_ratio"), warms, "a schedule that warms up, such as constant_with_warmup"),
        (("packing_strategy",), bool(packs), "packing: true"),
        (("eval_steps",), config.eval_strategy == "steps", "eval_strategy: steps"),
        (("save_steps",), config.save_strategy == "steps", "save_strategy: steps"),
        (("save_total_limit", "save_only_model"), saves, "a save_strategy other than no"),
        (("metric_for_best_model", "greater_is_better"), tracks, "evaluations (eval_strategy: steps or epoch)"),
        (("checkpoint_segment",), config.gradient_checkpointing or config.memory == "auto", "gradient_checkpointing"),
        (("dataset_config",), bool(config.dataset_name or config.eval_dataset_name), "dataset_name"),
    ]
