"""Keys about what is not burnish's own: quantised bases, trackers, the hub. Which values go together."""

from typing import Any

TRACKERS = ("tensorboard", "wandb", "trackio")
DATASET_KWARGS = ("add_special_tokens", "append_concat_token", "skip_prepare_dataset")


def check_quantized(config: Any) -> None:
    """Raises UserError through the configuration for quantisation keys that can't go together."""
    if config.load_in_8bit and config.load_in_4bit:
        config._fail("load_in_8bit and load_in_4bit are both set", "load_in_8bit", "load_in_4bit", mend="Keep one")
    if (config.load_in_8bit or config.load_in_4bit) and config.parallel == "fsdp":
        name = "load_in_8bit" if config.load_in_8bit else "load_in_4bit"
        config._fail(f"{name} with parallel fsdp: packed weights can't be cut up", name, "parallel", mend="Use ddp")
    defaults = {"bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": False}
    for name, default in defaults.items():
        if getattr(config, name) != default and not config.load_in_4bit:
            config._fail(f"{name} is about 4-bit bases", name, mend="Set load_in_4bit: true, or delete it")


def tracker_names(report_to: str | list[str] | None) -> list[str]:
    """The trackers that report_to names, without repeats; [] for none."""
    names = [report_to] if isinstance(report_to, str) else list(report_to or [])
    return [name for name in dict.fromkeys(names) if name != "none"]


def check_trackers(config: Any) -> None:
    """Raises UserError through the configuration for a tracker that burnish can't feed."""
    for name in tracker_names(config.report_to):
        if name not in TRACKERS:
            mend = f"Use {', '.join(TRACKERS)}" if name != "all" else f"Name them: {', '.join(TRACKERS)}"
            config._fail(
                f"report_to {name!r} is not taken",
                "report_to",
                mend=f"{mend}, or none: every metric is in output_dir/metrics.jsonl",
            )


def check_dataset_kwargs(config: Any) -> None:
    """Raises UserError through the configuration for what dataset_kwargs can't ask for."""
    for name, value in (config.dataset_kwargs or {}).items():
        if name not in DATASET_KWARGS and value is not None:
            mend = f"Use {', '.join(DATASET_KWARGS)}, or keys of the configuration"
            config._fail(f"dataset_kwargs {name} is not taken", "dataset_kwargs", mend=mend)
        if value not in (True, False, None):
            config._fail(f"dataset_kwargs {name} is true or false, not {value!r}", "dataset_kwargs")
