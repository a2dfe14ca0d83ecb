"""burnish: fine-tune Hugging Face causal language models on hand-written kernels and a hand-written loop.

Importing this package imports no torch; each public name loads its room on first use.
"""

import importlib

if __name__ != "burnish":
    raise ImportError("import burnish: under another name every module would exist twice")

__version__ = "0.1.0"
_HOME = {
    "SFTConfig": "burnish.config.fields",
    **{f"{name}Config": "burnish.config.preference" for name in ("DPO", "CPO", "ORPO", "KTO", "BCO", "Reward")},
    **{f"{name}Trainer": "burnish.trainers" for name in ("SFT", "DPO", "CPO", "ORPO", "KTO", "BCO", "Reward")},
    "PPOConfig": "burnish.config.ppo",
    "PPOTrainer": "burnish.ppo.trainer",
    "AutoModelForCausalLMWithValueHead": "burnish.model.value_head",
    "create_reference_model": "burnish.model.value_head",
    "LengthSampler": "burnish.model.sampling",
    "IterativeSFTTrainer": "burnish.trainers.iterative",
    "DataCollatorForCompletionOnlyLM": "burnish.data.completion",
    "ConstantLengthDataset": "burnish.data.completion",
    **dict.fromkeys(("ModelConfig", "setup_chat_format", "clone_chat_template", "set_seed"), "burnish.doors"),
    **dict.fromkeys(("get_peft_config", "get_quantization_config", "get_kbit_device_map"), "burnish.doors"),
    "patch": "burnish.model.patch",
    "unpatch": "burnish.model.patch",
    "PatchReport": "burnish.model.patch",
    "UserError": "burnish.config.errors",
}
__all__ = [*_HOME, "kernels"]


def __getattr__(name: str):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name == "kernels":
        return importlib.import_module("burnish.kernels")
    raise AttributeError(f"module 'burnish' has no attribute {name!r}")
