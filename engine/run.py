"""Assembles model, data, objective and kernels into a run. Nothing else assembles.

`assemble` does everything that can fail on a user's mistake (configuration, data, model, head) before any training and
before anything is written. `train(config)` assembles, trains and saves: the whole of `burnish sft run.yaml`.
"""

import ctypes
import importlib.metadata
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
from burnish.data.batch import Batches, Examples
from burnish.data.preference import prepare_pairs, prepare_unpaired
from burnish.data.prepare import prepare
from burnish.data.read import is_stream
from burnish.data.report import DataReport
from burnish.data.split import hold_out
from burnish.data.stream import StreamBatches
from burnish.kernels import use
from burnish.kernels.attention import attention_backend
from burnish.memory.forecast import memory_for
from burnish.memory.layers import install
from burnish.metrics import Log
from burnish.model.adapters import apply_adapter
from burnish.model.attention import register
from burnish.model.head import check_head, read_head
from burnish.model.isolation import check_isolation
from burnish.model.load import align, check_vocabulary, drop_dropout, load_config, load_model, load_tokenizer
from burnish.model.patch import PatchReport, patch
from burnish.objectives import Objective, odds, preference, reward, sft, unpaired
from burnish.optim.build import check_optimizer
from burnish.optim.footprint import ROUNDED
from burnish.optim.updater import cast_parameters
from burnish.reference import Reference, cache_sums, make_reference
from burnish.training import Run, RunResult, goes_on, refuse_overwriting

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
    log.keep(f"{'versions':<8} {_versions()}")
    if device.type == "cpu" and keep_freed_memory():
        log.say("memory", "freed memory stays with this process (malloc): page faults took a quarter of a CPU step")
    name = model if isinstance(model, str) else config.model_name_or_path
    if model is None and not name:
        raise UserError("no model", where="model_name_or_path", mend="Give a folder or a hub id")
    tokenizer = processing_class or _tokenizer(config, name or getattr(model, "name_or_path", ""))
    began = time.perf_counter()
    vocabulary = _vocabulary(model if isinstance(model, nn.Module) else name, config.trust_remote_code)
    batches, eval_batches = _data(config, tokenizer, vocabulary, (train_dataset, eval_dataset), formatting_func, log)
    data_seconds = time.perf_counter() - began
    began = time.perf_counter()
    source = model if isinstance(model, nn.Module) else name
    network, report = _network(config, source, device, peft_config, tokenizer)
    masters = _cast(config, network, device) if optimizers[0] is None else {}  # a caller's holds parameters as they are
    check_vocabulary(tokenizer, network)
    head = None if isinstance(config, RewardConfig) else read_head(network)
    reference = _reference(config, network, ref_model, device, [batches, eval_batches], log)
    objective = next(make for kind, make in OBJECTIVES.items() if isinstance(config, kind))
    log.say("kernels", _kernels_line(report, network, device))
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


def read_tokenizer(config: Any) -> Any:
    """The tokenizer that a configuration names, with the template and tokens it sets."""
    return _tokenizer(config, config.model_name_or_path)


def read_batches(config: Any) -> Batches:
    """The training batches of the data file that a configuration names, without its model: for a plan's lengths."""
    name = config.model_name_or_path
    vocabulary = _vocabulary(name, config.trust_remote_code)
    batches, _ = _data(config, read_tokenizer(config), vocabulary, (None, None), None, Log(None, quiet=True))
    if not isinstance(batches, Batches):
        raise UserError("no training data", where="dataset_name", mend="Give a file, a folder or a hub id")
    return batches


def _data(
    config: Any, tokenizer: Any, vocabulary: int, given: tuple, formatting_func: Callable | None, log: Log
) -> tuple[Batches | StreamBatches | None, Batches | StreamBatches | None]:
    """Training and evaluation batches, each reported; None where there is no such data."""
    train_dataset, eval_dataset = given
    sources = {}
    source = train_dataset if train_dataset is not None else config.dataset_name
    if source is not None:
        sources["train"] = (source, config.dataset_train_split)
    if eval_dataset is not None or config.eval_dataset_name:
        source = eval_dataset if eval_dataset is not None else config.eval_dataset_name
        sources["eval"] = (source, config.dataset_test_split or "test")
    elif config.dataset_test_split:
        sources["eval"] = (config.dataset_name, config.dataset_test_split)
    if not sources:
        raise UserError("no data", where="dataset_name", mend="Give a file, a folder or a hub id")
    examples: dict[str, Examples] = {}
    made: dict[str, Batches | StreamBatches] = {}
    for role, (rows, split) in sources.items():
        if isinstance(config, SFTConfig) and is_stream(rows):
            made[role] = StreamBatches(
                rows,
                tokenizer,
                config,
                train=role == "train",
                formatting_func=formatting_func,
                vocab_size=vocabulary,
            )
            log.say("data" if role == "train" else "eval", "a stream: rows are read, cut and packed as they come")
            continue
        examples[role], report = tokens(config, tokenizer, vocabulary, rows, split, role == "train", formatting_func)
        for line in report.lines():
            log.say("data" if role == "train" else "eval", line)
    if config.test_split_size is not None:
        if "train" not in examples:
            raise UserError("rows can't be held out of a stream", where="test_split_size", mend="Give eval_dataset")
        examples["train"], examples["eval"] = hold_out(examples["train"], config.test_split_size, config.seed)
    form = {
        "mismatch": isinstance(config, KTOConfig) and config.loss_type == "kto",
        "label_prompts": isinstance(config, ORPOConfig),
    }
    made |= {role: Batches(rows, config, train=role == "train", **form) for role, rows in examples.items()}
    for key in ("eval_strategy", "load_best_model_at_end", "eval_on_start"):
        if "eval" not in made and getattr(config, key) not in ("no", False):
            raise UserError(
                f"{key} without evaluation data", where=key, mend="Set eval_dataset_name or test_split_size"
            )
    return made.get("train"), made.get("eval")


def _tokenizer(config: Any, name: str) -> Any:
    return load_tokenizer(
        name,
        trust_remote_code=config.trust_remote_code,
        chat_template_path=config.chat_template_path,
        eos_token=config.eos_token,
        pad_token=config.pad_token,
    )


def tokens(
    config: Any, tokenizer: Any, vocabulary: int, rows: Any, split: str, train: bool, formatting_func: Callable | None
) -> tuple[Examples, DataReport]:
    """The tokens of one split, in the form that the objective trains on."""
    common = {"split": split, "config_name": config.dataset_config, "vocab_size": vocabulary}
    if isinstance(config, SFTConfig):
        return prepare(rows, tokenizer, config, train=train, formatting_func=formatting_func, **common)
    if formatting_func is not None:
        raise UserError("preference rows have no single text to format", where="formatting_func", mend="Leave it out")
    if isinstance(config, (KTOConfig, BCOConfig)):
        return prepare_unpaired(rows, tokenizer, config, **common)
    return prepare_pairs(rows, tokenizer, config, scored=isinstance(config, RewardConfig), **common)


def _vocabulary(source: str | nn.Module, trust_remote_code: bool) -> int:
    """How many token ids the model embeds, before it is loaded."""
    if isinstance(source, nn.Module):
        return source.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
    return load_config(source, trust_remote_code=trust_remote_code).get_text_config().vocab_size


def _network(
    config: Any, source: str | nn.Module, device: torch.device, peft_config: Any, tokenizer: Any
) -> tuple[nn.Module, PatchReport]:
    """The model that will train: loaded or adopted, adapted, patched and proved fit; and the report of the patch."""
    adapted = bool(peft_config) or config.use_peft
    if isinstance(source, nn.Module):
        model = _adopt(source, device)
    else:
        model = load_model(source, **_load_options(config, device, adapted))
    if isinstance(config, RewardConfig) and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id  # transformers' own forward looks for the last real token
    if adapted:
        model = apply_adapter(model, peft_config or config, scores=isinstance(config, RewardConfig))
    if getattr(config, "model_adapter_name", None):
        model.set_adapter(config.model_adapter_name)  # type: ignore[operator]
    if getattr(config, "disable_dropout", False):
        drop_dropout(model)
    return model, _prove(config, model)


def _memory(config: Any, model: nn.Module, batches: Any, device: torch.device, log: Log) -> tuple:
    """What saves memory, installed on the model as the keys or the plan say; and the plan (None without data)."""
    wanted, plan, line = memory_for(config, model, batches, device)
    memory = install(model, wanted)
    log.say("memory", memory.line())
    log.say("memory", line)
    return memory, plan


def _prove(config: Any, model: nn.Module) -> PatchReport:
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
    check_isolation(model)
    return report


def _reference(
    config: Any, policy: nn.Module, given: str | nn.Module | None, device: torch.device, batches: list, log: Log
) -> Reference | None:
    """The reference policy, if the objective has one, its log-probs cached where the configuration says so."""
    other = load_model(given, **_load_options(config, device, frozen=True)) if isinstance(given, str) else given
    if isinstance(other, nn.Module):
        other = _adopt(other, device).requires_grad_(False)
        cast_parameters(other, next(policy.parameters()).dtype)
        _prove(config, other)
    reference = make_reference(config, policy, other)
    if reference is None:
        return None
    log.say("reference", reference.name)
    if config.precompute_ref_log_probs:
        with use(config.kernels):
            for part in batches:
                if part is not None:
                    log.say("reference", cache_sums(reference, part, config))
    return reference


def _cast(config: Any, network: nn.Module, device: torch.device) -> dict:
    """Make the model compute in its dtype; returns the masters of `cast_parameters`."""
    if config.dtype != "bfloat16":
        return cast_parameters(network, compute_dtype(config, device), config.optim)
    # adapters on a bfloat16 base are float32, which these optimizers don't step
    return cast_parameters(network, torch.bfloat16, config.optim) if config.optim in ROUNDED else {}


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def keep_freed_memory() -> bool:
    """Tell glibc to reuse freed blocks instead of handing them back to the kernel; False where that isn't possible.

    A training step frees and takes gigabytes. Page by page from the kernel that cost 1.3 times the whole step
    (SmolLM2-135M, batch 4, 2 cores); the peak of memory stayed the same.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    never_mmap, keep_top = set_option(-4, 0), set_option(-1, 2**31 - 1)  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    return bool(never_mmap and keep_top)


def device_for(config: Any) -> torch.device:
    """CUDA where there is one and use_cpu doesn't forbid it."""
    return torch.device("cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu")


def _versions() -> str:
    """What the figures of this run depend on, for log.txt."""
    names = ("burnish", "torch", "triton", "transformers", "datasets", "peft", "safetensors")
    found = {name: _version(name) for name in names}
    return "  ".join(f"{name} {version}" for name, version in found.items() if version)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name} {properties.total_memory / 2**30:.0f} GiB"
    return f"CPU, {torch.get_num_threads()} threads"


def compute_dtype(config: Any, device: torch.device) -> torch.dtype:
    """What a float32 model computes in: bfloat16 when asked for (on CUDA by default), else float32."""
    bf16 = config.bf16 if config.bf16 is not None else device.type == "cuda"
    return torch.bfloat16 if bf16 else torch.float32


def _load_options(config: Any, device: torch.device, frozen: bool) -> dict:
    """How a model named by the configuration is loaded: a frozen base needs no float32 twin."""
    dtype = config.dtype
    if dtype == "float32" and frozen and compute_dtype(config, device) == torch.bfloat16:
        dtype = "bfloat16"
    return {
        "dtype": dtype,
        "device": device,
        "trust_remote_code": config.trust_remote_code,
        "model_init_kwargs": config.model_init_kwargs,
        "attn": register(),
        "scores": isinstance(config, RewardConfig),
    }


def _adopt(model: nn.Module, device: torch.device) -> nn.Module:
    """A model that a script brings: on the device, and with burnish's attention."""
    model.set_attn_implementation(register())  # type: ignore[operator]
    model = model.to(device)
    align(model)
    return model


def _kernels_line(report: PatchReport, model: nn.Module, device: torch.device) -> str:
    parameter = next(model.parameters())
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    probe = torch.empty(1, 1, head_dim, dtype=parameter.dtype, device=device)
    name, reason = attention_backend(probe, window=None, softcap=getattr(text, "attn_logit_softcapping", None))
    ops = "  ".join(f"{op} {count}" for op, count in report.patched.items())
    skipped = f"  skipped {len(report.skipped)}" if report.skipped else ""
    return f"{ops}  attention {name} ({reason}){skipped}"
