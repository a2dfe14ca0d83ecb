"""The models of a run: loaded or adopted, adapted, patched and proved fit; and the reference beside the policy."""

from typing import Any

import torch
from torch import nn

from burnish.config.errors import UserError
from burnish.config.preference import RewardConfig
from burnish.kernels import use
from burnish.kernels.attention import attention_backend
from burnish.metrics import Log
from burnish.model.adapters import apply_adapter
from burnish.model.attention import register
from burnish.model.head import check_head, read_head
from burnish.model.isolation import check_isolation
from burnish.model.kbit import kbit, kbit_options, prepare_kbit, row_by_row
from burnish.model.load import align, drop_dropout, load_model
from burnish.model.patch import PatchReport, patch
from burnish.optim.footprint import ROUNDED
from burnish.optim.updater import cast_parameters
from burnish.reference import Reference, cache_sums, make_reference
from burnish.run.device import compute_dtype


def make_network(
    config: Any, source: str | nn.Module, device: torch.device, peft_config: Any, tokenizer: Any, packed: bool = True
) -> tuple[nn.Module, PatchReport]:
    """The model that will train: loaded or adopted, adapted, patched and proved fit; and the report of the patch."""
    own = hasattr(source, "peft_config")  # an adapter that the script brings goes on training
    adapted = bool(peft_config) or (config.use_peft and not own)
    if isinstance(source, nn.Module):
        model = _adopt(source, device)
    else:
        model = load_model(source, **load_options(config, device, adapted))
    exact = config.dtype != "bfloat16" and compute_dtype(config, device) == torch.float32
    model = prepare_kbit(model, adapted=adapted or hasattr(model, "peft_config"), upcast=exact)
    if isinstance(config, RewardConfig) and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # transformers' own forward looks for the last real token
    if adapted:
        model = apply_adapter(model, peft_config or config, scores=isinstance(config, RewardConfig))
    if getattr(config, "model_adapter_name", None):
        model.set_adapter(config.model_adapter_name)  # type: ignore[operator]
    if getattr(config, "disable_dropout", False):
        drop_dropout(model)
    return model, _prove(config, model, packed)


def _prove(config: Any, model: nn.Module, packed: bool = True) -> PatchReport:
    """Patch the model; raise UserError if its head can't be reproduced or packed sequences see each other in it."""
    dropout = max((getattr(module, "attention_dropout", 0.0) or 0.0 for module in model.modules()), default=0.0)
    if dropout:
        raise UserError(
            f"attention dropout {dropout}: packed attention has none",
            where="model",
            mend="Set model_init_kwargs: {attention_dropout: 0.0}",
        )
    report = patch(model, strict=config.strict_patch)
    if "linear_cross_entropy" not in report.patched and not isinstance(config, RewardConfig):
        check_head(model, read_head(model))  # else patch has tried it
    if packed:
        with row_by_row(model):
            check_isolation(model)
    return report


def make_frozen(
    config: Any, policy: nn.Module, given: str | nn.Module | None, device: torch.device, log: Log
) -> Reference | None:
    """The reference policy, if the objective has one."""
    other = load_model(given, **load_options(config, device, frozen=True)) if isinstance(given, str) else given
    if isinstance(other, nn.Module):
        other = _adopt(other, device).requires_grad_(False)
        cast_parameters(other, next(policy.parameters()).dtype)
        _prove(config, other)
    reference = make_reference(config, policy, other)
    if reference is not None:
        log.say("reference", reference.name)
    return reference


def remember_sums(config: Any, reference: Reference | None, batches: list, log: Log) -> None:
    """The reference's log-probs of all rows, once for the whole run, where the configuration says so."""
    if reference is None or not config.precompute_ref_log_probs:
        return
    with use(config.kernels):
        for part in batches:
            if part is not None:
                log.say("reference", cache_sums(reference, part, config))


def cast(config: Any, network: nn.Module, device: torch.device) -> dict:
    """Make the model compute in its dtype; returns the masters of `cast_parameters`."""
    if config.dtype != "bfloat16":
        return cast_parameters(network, compute_dtype(config, device), config.optim)
    # adapters on a bfloat16 base are float32, which these optimizers don't step
    return cast_parameters(network, torch.bfloat16, config.optim) if config.optim in ROUNDED else {}


def load_options(config: Any, device: torch.device, frozen: bool) -> dict:
    """How a model named by the configuration is loaded: a frozen base needs no float32 twin."""
    dtype = config.dtype
    if dtype == "float32" and frozen and compute_dtype(config, device) == torch.bfloat16:
        dtype = "bfloat16"
    packed = kbit_options(config, torch.bfloat16 if dtype == "bfloat16" else torch.float32)
    given = {**packed, **(config.model_init_kwargs or {})}
    if given.get("quantization_config") is not None:
        given.setdefault("device_map", {"": str(device)})  # packed weights can't be moved once they are loaded
    return {
        "dtype": dtype,
        "device": device,
        "trust_remote_code": config.trust_remote_code,
        "model_init_kwargs": given,
        "attn": register(),
        "scores": isinstance(config, RewardConfig),
    }


def _adopt(model: nn.Module, device: torch.device) -> nn.Module:
    """A model that a script brings: on the device, and with burnish's attention."""
    model.set_attn_implementation(register())  # type: ignore[operator]
    if not kbit(model):  # quantised weights stay where they were loaded
        model = model.to(device)
    align(model)
    return model


def kernels_line(report: PatchReport, model: nn.Module, device: torch.device) -> str:
    parameter = next(model.parameters())
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    probe = torch.empty(1, 1, head_dim, dtype=parameter.dtype, device=device)
    name, reason = attention_backend(probe, window=None, softcap=getattr(text, "attn_logit_softcapping", None))
    ops = "  ".join(f"{op} {count}" for op, count in report.patched.items())
    skipped = f"  skipped {len(report.skipped)}" if report.skipped else ""
    return f"{ops}  attention {name} ({reason}){skipped}"
