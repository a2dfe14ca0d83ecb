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
from burnish.memory.forecast import memory_for
from burnish.memory.layers import install
from burnish.metrics import Log
from burnish.model.head import read_head
from burnish.model.load import check_vocabulary
from burnish.objectives import Objective, odds, preference, reward, sft, unpaired
from burnish.optim.build import check_optimizer
from burnish.run.device import compute_dtype, describe_device, device_for, keep_freed_memory, versions
from burnish.run.network import cast, kernels_line, make_frozen, make_network
from burnish.run.rows import make_tokenizer, read_data, vocabulary_of
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
    callbacks: Iterable | None = None,
    optimizers: tuple = (None, None),
) -> Run:
    """A run from a configuration, and from objects where a script has them already (TRL's constructor arguments).

    What is not given is loaded from the names in `config`. Raises UserError for everything a user can mend.
    """
    log = Log(None)
    _seed(config.seed)
    device = device_for(config)
    log.say("burnish", f"{config.output_dir}  {describe_device(device)}, torch {torch.__version__}")
    check_optimizer(config, compute_dtype(config, device), optimizers[0])
    log.keep(f"{'verb':<8} {type(config).__name__.removesuffix('Config').lower()}")
    log.keep(f"{'versions':<8} {versions()}")
    if device.type == "cpu" and keep_freed_memory():
        log.say("memory", "freed memory stays with this process (malloc): page faults took a quarter of a CPU step")
    name = model if isinstance(model, str) else config.model_name_or_path
    if model is None and not name:
        raise UserError("no model", where="model_name_or_path", mend="Give a folder or a hub id")
    tokenizer = processing_class or make_tokenizer(config, name or getattr(model, "name_or_path", ""))
    began = time.perf_counter()
    vocabulary = vocabulary_of(model if isinstance(model, nn.Module) else name, config.trust_remote_code)
    batches, eval_batches = read_data(
        config, tokenizer, vocabulary, (train_dataset, eval_dataset), formatting_func, log
    )
    data_seconds = time.perf_counter() - began
    began = time.perf_counter()
    source = model if isinstance(model, nn.Module) else name
    network, report = make_network(config, source, device, peft_config, tokenizer)
    masters = cast(config, network, device) if optimizers[0] is None else {}  # a caller's holds parameters as they are
    check_vocabulary(tokenizer, network)
    head = None if isinstance(config, RewardConfig) else read_head(network)
    reference = make_frozen(config, network, ref_model, device, [batches, eval_batches], log)
    objective = next(make for kind, make in OBJECTIVES.items() if isinstance(config, kind))
    log.say("kernels", kernels_line(report, network, device))
    memory, plan = _memory(config, network, batches, device, log)
    log.say("start", f"data {data_seconds:.1f} s  model {time.perf_counter() - began:.1f} s")
    return Run(
        config,
        network,
        tokenizer,
        batches,
        eval_batches,
        objective(network, head, config, reference),
        reference,
        masters,
        log,
        list(callbacks or ()),
        tuple(optimizers),
        memory=memory,
        plan=plan,
    )


def train(config: Any, **objects: Any) -> RunResult:
    """Assemble, train and save the model into config.output_dir: what the command line's training verbs do.

    A run that was stopped early has saved a checkpoint, and no model.
    """
    if not config.resume_from_checkpoint and not goes_on(config):
        refuse_overwriting(config)  # before the minutes that loading and preparing may take
    run = assemble(config, **objects)
    with run.interrupt:
        result = run.train()
        if result.interrupted is None:
            run.log.say("model", str(run.save_model()))
    return result


def _memory(config: Any, model: nn.Module, batches: Any, device: torch.device, log: Log) -> tuple:
    """What saves memory, installed on the model as the keys or the plan say; and the plan (None without data)."""
    wanted, plan, line = memory_for(config, model, batches, device)
    memory = install(model, wanted)
    log.say("memory", memory.line())
    log.say("memory", line)
    return memory, plan


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
