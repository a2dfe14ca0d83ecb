"""Assembles model, data, objective and kernels into a run. Nothing else assembles.

`assemble` does everything that can fail on a user's mistake (configuration, data, model, head) before any training and
before anything is written. `train(config)` assembles, trains and saves: the whole of `burnish sft run.yaml`.
"""

import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from burnish.config.errors import UserError
from burnish.config.fields import SFTConfig
from burnish.config.preference import BCOConfig, CPOConfig, DPOConfig, KTOConfig, ORPOConfig, RewardConfig
from burnish.data.completion import Templates
from burnish.data.vision import CollatedBatches
from burnish.hub import check_hub
from burnish.memory.forecast import memory_for
from burnish.memory.layers import install
from burnish.metrics import Log
from burnish.model.head import read_head
from burnish.model.load import check_vocabulary, end_replies
from burnish.objectives import Objective, odds, preference, reward, sft, unpaired
from burnish.optim.build import check_optimizer
from burnish.parallel.world import World, join, main_first, started
from burnish.run.aside import aside
from burnish.run.device import compute_dtype, describe_device, device_for, keep_freed_memory, versions
from burnish.run.network import cast, kernels_line, make_frozen, make_network, remember_sums
from burnish.run.processes import check_parallel, settle_parallel, spread
from burnish.run.rows import make_tokenizer, read_data, vocabulary_of
from burnish.run.vision import check_collated, with_processor
from burnish.trackers import trackers
from burnish.training import Run, RunResult
from burnish.training.folder import goes_on, refuse_overwriting

OBJECTIVES: dict[type, Callable[..., Objective]] = {
    SFTConfig: sft.objective,
    DPOConfig: preference.objective,
    CPOConfig: odds.objective,
    ORPOConfig: odds.objective,
    KTOConfig: unpaired.objective,
    BCOConfig: unpaired.objective,
    RewardConfig: reward.objective,
}


def assemble(
    config: Any,
    *,
    model: str | nn.Module | None = None,
    ref_model: str | nn.Module | None = None,
    processing_class: Any = None,
    train_dataset: Any = None,
    eval_dataset: Any = None,
    peft_config: Any = None,
    formatting_func: Callable | None = None,
    templates: Templates | None = None,
    data_collator: Callable | None = None,
    stepwise: bool = False,
    callbacks: Iterable | None = None,
    optimizers: tuple = (None, None),
) -> Run:
    """A run from a configuration, and from objects where a script has them already (TRL's constructor arguments).

    What is not given is loaded from the names in `config`; with stepwise no training data: the script brings each
    update's rows. templates: what comes before the tokens to train on. Raises UserError for all a user can mend.
    """
    device, own, log = _begin(config, optimizers)
    told = trackers(config, log) if own.main else []
    name = _named(config, model)
    origin = str(name or getattr(model, "name_or_path", ""))
    began = time.perf_counter()
    tokenizer = make_tokenizer(config, origin, with_processor(config, origin, processing_class, train_dataset))
    vocabulary = vocabulary_of(model if isinstance(model, nn.Module) else name, config.trust_remote_code)
    with main_first():  # the others read its cache
        batches, eval_batches = None, None
        if not stepwise or eval_dataset is not None:
            how = formatting_func, log, templates, data_collator
            batches, eval_batches = read_data(config, tokenizer, vocabulary, (train_dataset, eval_dataset), *how)
    data_seconds, began = time.perf_counter() - began, time.perf_counter()
    source = model if isinstance(model, nn.Module) else name
    settle_parallel(config, batches, device, optimizers)
    whole = torch.device("cpu") if config.parallel == "fsdp" and own.size > 1 else device  # before it is divided
    packed = not isinstance(eval_batches if batches is None else batches, CollatedBatches)
    network, report = make_network(config, source, whole, peft_config, tokenizer, packed)
    held = optimizers[0] is not None or (config.parallel == "fsdp" and own.size > 1)  # as they are, or in parts
    masters = {} if held else cast(config, network, device)
    _fit_tokens(config, network, tokenizer, log)
    head = None if isinstance(config, RewardConfig) else read_head(network)
    check_collated(network, head, eval_batches if batches is None else batches)
    reference = make_frozen(config, network, ref_model, whole, log)
    objective = next(make for kind, make in OBJECTIVES.items() if isinstance(config, kind))
    log.say("kernels", kernels_line(report, network, device))
    wanted, plan, line = memory_for(config, network, batches, device)
    across = spread(config, network, reference, masters, wanted, device, log)
    memory = install(network, wanted)
    remember_sums(config, reference, [batches, eval_batches], log)
    for fact in (memory.line(), line):
        log.say("memory", fact)
    log.spent = {"data": data_seconds, "model": time.perf_counter() - began}
    made = objective(network, head, config, reference)
    about = {"hardware": f"{own.size} x {describe_device(device)}", "versions": versions()}
    return Run(
        config, network, tokenizer, batches, eval_batches, made, reference, masters, log, [*(callbacks or ()), *told],
        tuple(optimizers), memory=memory, plan=plan, about=about, across=across,
    )  # fmt: skip


def train(config: Any, spent: dict[str, float] | None = None, **objects: Any) -> RunResult:
    """Assemble, train and save the model into config.output_dir: what the command line's training verbs do.

    spent  seconds of what came before, by name, for the line that says what the start took

    A run that was stopped early has saved a checkpoint, and no model. What libraries say goes to log.txt.
    """
    if not started() and not config.resume_from_checkpoint and not goes_on(config):
        refuse_overwriting(config)  # before the minutes that loading and preparing may take
    with aside() as libraries:
        run = assemble(config, **objects)
        libraries.to(run.log)
        run.log.spent = {**(spent or {}), **run.log.spent}
        with run.interrupt:
            result = run.train()
            if result.interrupted is None:
                run.log.say("model", str(run.save_model()))
    return result


def _named(config: Any, model: str | nn.Module | None) -> str | None:
    """The folder or hub id of the model; None for one that a script brings."""
    name = model if isinstance(model, str) else config.model_name_or_path
    if model is None and not name:
        raise UserError("no model", where="model_name_or_path", mend="Give a folder or a hub id")
    return name


def _fit_tokens(config: Any, network: nn.Module, tokenizer: Any, log: Log) -> None:
    """The model embeds every token, and ends its replies as the tokenizer does where the configuration changed that."""
    check_vocabulary(tokenizer, network)
    if config.eos_token or config.chat_template_path:
        log.say("tokens", end_replies(network, tokenizer))


def _begin(config: Any, optimizers: tuple) -> tuple[torch.device, World, Log]:
    """The device, this process among the others, and the log with the run's first lines. What can't go is refused."""
    device = device_for(config)
    own = join(device, sequence=config.sequence_parallel, timeout=config.ddp_timeout)
    log = Log(None, quiet=not own.main)
    _seed(config.seed)
    log.say("burnish", f"{config.output_dir}  {describe_device(device)}, torch {torch.__version__}")
    check_optimizer(config, compute_dtype(config, device), optimizers[0])
    check_parallel(config, own, optimizers)
    check_hub(config)
    for note in dict.fromkeys(config.notes):
        log.say("config", note)
    log.keep(f"{'verb':<8} {type(config).__name__.removesuffix('Config').lower()}")
    log.keep(f"{'versions':<8} {versions()}")
    if device.type == "cpu" and keep_freed_memory():
        log.say("memory", "freed memory stays with this process (malloc): page faults took a quarter of a CPU step")
    return device, own, log


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
