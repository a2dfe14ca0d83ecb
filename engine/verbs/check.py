"""`burnish check run.yaml`: everything that can be wrong with a run and be known without its weights.

Configuration, rows, masks, lengths, memory, kernels, time: each a line as the run itself will say it, and below them
what to mend. The rows are prepared as the run prepares them and stay in its cache, so nothing is done twice. A training
makes the checks of rows and configuration by itself (`burnish.run.checks`).
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from burnish.config.errors import UserError
from burnish.config.load import examine
from burnish.data.batch import Batches
from burnish.kernels import use
from burnish.kernels.attention import attention_backend
from burnish.loop import total_steps
from burnish.memory.forecast import Forecast, forecast
from burnish.memory.shape import skeleton
from burnish.memory.time import GIB
from burnish.metrics import Log, clock
from burnish.model.adapters import apply_adapter
from burnish.model.load import load_config
from burnish.run.aside import aside
from burnish.run.checks import Finding, as_finding
from burnish.run.device import compute_dtype, describe_device, device_for
from burnish.run.rows import make_tokenizer, read_data, vocabulary_of
from burnish.training.folder import goes_on, refuse_overwriting

Result = TypeVar("Result")
FINE, WARNED, WRONG = 0, 1, 2


class Check:
    """The checks of one configuration: facts go to the log as they come, findings are gathered."""

    def __init__(self, log: Log):
        self.log = log
        self.found: list[Finding] = []

    def tried(self, part: Callable[..., Result], *given: Any, **named: Any) -> Result | None:
        """What a part of the run makes, or None and a finding where the user has something to mend."""
        try:
            return part(*given, **named)
        except UserError as error:
            self.found.append(as_finding(error))
            return None


def check(cls: type, path: str | None, words: list[str]) -> int:
    """Check the run of a file and `key=value` words. Returns 0 where all is well, 1 with warnings only, 2 with errors.

    Loads no weights, writes nothing but the token cache, and asks no network for files that are here.
    """
    log = Log(None)
    own = Check(log)
    config, mistakes = examine(cls, path, words)
    own.found += [as_finding(error) for error in mistakes]
    if config is not None:
        log.say("burnish", f"check of {path or 'the command line'}  {describe_device(device_for(config))}")
        given = sum(place != "default" for place in config.origins.values())
        log.say("config", f"{given} keys set, {len(config.origins) - given} defaults")
        for note in dict.fromkeys(config.notes):
            log.say("config", note)
        with aside():
            _run(own, config)
    for finding in sorted(own.found, key=lambda finding: not finding.error):
        log.say("error" if finding.error else "warning", str(finding))
    errors = sum(finding.error for finding in own.found)
    warnings = len(own.found) - errors
    counted = [_counted(errors, "error")] * bool(errors) + [_counted(warnings, "warning")] * bool(warnings)
    log.say("checked", f"{', '.join(counted) or 'nothing to mend'}; nothing was run")
    return WRONG if errors else WARNED if warnings else FINE


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _run(own: Check, config: Any) -> None:
    """The parts of a run in its order, as far as each can go without the ones that failed."""
    if not goes_on(config) and not config.resume_from_checkpoint:
        own.tried(refuse_overwriting, config)
    name = config.model_name_or_path
    if not name:
        own.found.append(Finding("model_name_or_path", "no model", "", "Give a folder or a hub id", error=True))
        return
    vocabulary = own.tried(vocabulary_of, name, config.trust_remote_code)
    tokenizer = own.tried(make_tokenizer, config, name)
    batches = None
    if tokenizer is not None and vocabulary is not None:
        form: tuple = ((None, None), None, own.log)
        made = own.tried(read_data, config, tokenizer, vocabulary, *form, found=own.found)
        batches = made[0] if made else None
    if vocabulary is not None:
        own.tried(_weights, name)
        own.tried(_kernels, own, config)
    if isinstance(batches, Batches):
        plan = own.tried(_memory, own, config, batches)
        _time(own, config, batches, plan)


def _weights(name: str) -> None:
    """Raises UserError where a folder's weights are missing or torn. A hub id's are not looked at."""
    folder = Path(os.path.expanduser(name))
    if not folder.is_dir():
        return
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        missing = sorted(part for part in wanted if not (folder / part).is_file())
        if missing:
            what = f"{len(missing)} of {len(wanted)} files of weights are missing ({missing[0]})"
            raise UserError(what, where=name, mend="Copy or download the folder again")


def _kernels(own: Check, config: Any) -> None:
    """Which backend the ops and the attention get on this device."""
    device = device_for(config)
    text = load_config(config.model_name_or_path, trust_remote_code=config.trust_remote_code).get_text_config()
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    probe = torch.empty(1, 1, width, dtype=compute_dtype(config, device), device=device)
    with use(config.kernels):
        name, reason = attention_backend(probe, softcap=getattr(text, "attn_logit_softcapping", None))
    ops = "torch (no GPU)" if device.type == "cpu" else "triton"
    if config.kernels == "reference":
        ops = "torch (kernels: reference)"
    own.log.say("kernels", f"norms, rotary, gated MLP, head: {ops}   attention: {name} ({reason})")


def _memory(own: Check, config: Any, batches: Batches) -> Forecast | None:
    """The plan of the run, from the shapes of its model on the meta device."""
    device = device_for(config)
    half = config.use_peft and config.dtype == "float32" and compute_dtype(config, device) == torch.bfloat16
    settings = load_config(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    try:
        model = skeleton(settings, "bfloat16" if half else config.dtype, where=config.model_name_or_path)
        plan = forecast(config, apply_adapter(model, config) if config.use_peft else model, batches, device)
    except UserError as error:
        if config.memory == "auto":
            raise
        own.log.say("memory", f"not planned: {error.what}")
        return None
    own.log.say("memory", plan.line())
    if not plan.fits:
        ways = plan.lengths_that_fit()
        what = f"{plan.option.peak / GIB:.1f} GiB predicted, {plan.machine.usable / GIB:.1f} can be used"
        mend = "; ".join(f"{setting}: up to {length:,} tokens" for length, setting in ways)
        fits = f"Fits {mend}" if ways else "Use a smaller model, or use_peft: true"
        weight = f"{plan.option.largest()[0]} weighs most"
        own.found.append(Finding(describe_device(device), what, weight, fits, error=True))
    return plan


def _time(own: Check, config: Any, batches: Batches, plan: Forecast | None) -> None:
    """Steps, tokens and, from the plan's rates, about how long they take."""
    steps = total_steps(batches, config)
    per_epoch = math.ceil(len(batches) / config.gradient_accumulation_steps)
    tokens = int(batches.examples.offsets[-1]) * steps / max(1, per_epoch)
    line = f"{steps:,} steps, {steps / max(1, per_epoch):.2f} epochs, {tokens:,.0f} tokens"
    if plan is not None:
        rate = plan.option.tokens_a_second
        line += f"   about {rate:,.0f} tok/s, {clock(tokens / rate)} ({plan.machine.card.rates.source})"
    own.log.say("time", line)
    warmup = config.warmup_steps if config.warmup_steps >= 1 else 0
    if warmup >= steps:
        place, what = config.origins["warmup_steps"], f"warm-up of {warmup:g} steps in a run of {steps}"
        own.found.append(Finding(place, what, "learning_rate is never reached", "Set warmup_steps: 0.1"))
