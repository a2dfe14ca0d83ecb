"""Both generations of TRL's constructors, brought to one configuration.

Until v0.11 a trainer took settings as arguments of its own (max_seq_length, packing, beta, ...) beside transformers'
TrainingArguments; today all of them are keys of the configuration.
"""

import copy
import dataclasses
from typing import Any

from burnish.config.aliases import today
from burnish.config.base import Keys
from burnish.config.errors import UserError
from burnish.config.fields import SFTConfig
from burnish.config.refused import explain
from burnish.config.unread import LORA, defaults
from burnish.data.completion import DataCollatorForCompletionOnlyLM

_NO_LOGITS = "there are no logits to compute anything from: the head makes log-probs in tiles and keeps sums"
_METRICS = "evaluate() gives eval_loss and the objective's metrics; a callback's on_evaluate may add its own"
REFUSED = {
    "compute_metrics": (_NO_LOGITS, _METRICS),
    "preprocess_logits_for_metrics": (_NO_LOGITS, _METRICS),
    "compute_loss_func": (_NO_LOGITS, "Use loss_type, or burnish.kernels in a loop of your own"),
    "optimizer_cls_and_kwargs": ("the optimizer is made from the keys", "Use optim, or optimizers=(optimizer, None)"),
}


def configuration(cls: type, args: Any, older: dict[str, Any], trainer: str) -> Any:
    """The configuration of a trainer: `args` itself, or a new one where transformers' TrainingArguments or arguments of
    older constructors go into it. Checked again, because scripts set keys on it.

    Raises UserError for args of another kind, and for what no key stands for.
    """
    if args is None:
        config = cls()
    elif isinstance(args, cls):
        config = args
        config.__post_init__()  # type: ignore[attr-defined]
    elif hasattr(args, "per_device_train_batch_size") and not isinstance(args, Keys):
        values, notes = _from_transformers(args, cls, trainer)
        config = cls(**values)
        rate = f"learning_rate {config.learning_rate:g}"
        note = f"args is a {type(args).__name__}: its values went into a {cls.__name__}, {rate}"
        config.notes = [note, *notes, *config.notes]
    else:
        raise UserError(f"args is a {type(args).__name__}", where=f"{trainer}(args=...)", mend=f"Use {cls.__name__}")
    given = {name: value for name, value in older.items() if value is not None}
    return _with(config, given, trainer) if given else config


def _with(config: Any, given: dict[str, Any], trainer: str) -> Any:
    """A copy of `config` with what an older constructor took as arguments."""
    config = copy.copy(config)
    config.origins, config.notes = dict(config.origins), list(config.notes)
    names = config.origins
    for name, value in given.items():
        key, note = today(name, value, names)
        if key is not None and key not in names:
            what, mend = explain(key, [*names, "train_dataset", "eval_dataset", "processing_class", "peft_config"])
            raise UserError(what, where=f"{trainer}({name}=...)", mend=mend)
        if key is None:
            config.notes += [note] if note else []
            continue
        config.notes.append(f"{trainer}({name}=...) is now {type(config).__name__}({key}=...)")
        config.origins[key] = f"{trainer}({name}=...)"
        setattr(config, key, value)
    config.__post_init__()
    return config


def _from_transformers(args: Any, cls: type, trainer: str) -> tuple[dict[str, Any], list[str]]:
    """(values, lines for the log) of TrainingArguments, or of TRL's own configurations.

    What is not their class's default, by today's names; and the learning rate, whose default differs, in any case.
    Defaults are read off a fresh object of the class, because transformers computes some of them.
    """
    usual = type(args)(output_dir=args.output_dir)
    known = [field.name for field in dataclasses.fields(cls)]
    found: dict[str, Any] = {}
    notes = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        set_here = value != getattr(usual, field.name)
        if not set_here and field.name not in ("output_dir", "learning_rate"):
            continue
        key, note = today(field.name, value, known)
        notes += [note] if note else []
        if key is not None and key not in known:
            what, mend = explain(key, known)
            raise UserError(what, where=f"{type(args).__name__}({field.name}=...) of {trainer}", mend=mend)
        if key is not None:
            found[key] = value
    return found, notes


def check_adapter(config: Any, peft_config: Any, trainer: str) -> None:
    """Raises UserError where keys and peft_config describe two adapters, or peft_config is not peft's."""
    if peft_config is None:
        return
    if not hasattr(peft_config, "peft_type"):
        kind = type(peft_config).__name__
        raise UserError(f"peft_config is a {kind}", where=f"{trainer}(peft_config=...)", mend="Use peft.LoraConfig")
    usual = defaults(config)
    for name in LORA:
        if getattr(config, name) != usual[name]:
            raise UserError(
                f"{name} and peft_config describe two adapters", where=f"{trainer}(peft_config=...)", mend="Keep one"
            )


def refuse(given: dict[str, Any], trainer: str) -> None:
    """Take transformers' arguments that can't be honoured out of `given`; UserError for one that is set."""
    for name, (why, mend) in REFUSED.items():
        if given.pop(name, None) is not None:
            raise UserError(f"{name} is not taken: {why}", where=f"{trainer}({name}=...)", mend=mend)


def one_of(trainer: str, **given: Any) -> Any:
    """The one of two arguments that is given, a function called; None for neither. UserError for both."""
    found = {name: value for name, value in given.items() if value is not None}
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} are both given", where=trainer, mend="Keep one")
    if "model_init" in found:
        return found["model_init"]()
    return next(iter(found.values()), None)


def one_set(rows: Any, trainer: str) -> Any:
    """An evaluation set, not several under names. (A DatasetDict's split is picked by dataset_test_split.)"""
    if type(rows) is dict:
        raise UserError(
            f"eval_dataset is a dict of {len(rows)} sets, one is evaluated",
            where=f"{trainer}(eval_dataset=...)",
            mend="Give one of them, and evaluate the others with trainers of their own",
        )
    return rows


_PADDING = {"DataCollatorForLanguageModeling", "DataCollatorForSeq2Seq", "DataCollatorWithPadding"}
_PADDING |= {"DefaultDataCollator", "DPODataCollatorWithPadding", "RewardDataCollatorWithPadding"}


def with_collator(collator: Any, config: Any, trainer: str) -> dict[str, Any]:
    """What `assemble` is given for a data_collator: the templates of the one that masks prompts. One that only pads has
    nothing to do here; others are refused."""
    skips = isinstance(config, SFTConfig) and bool((config.dataset_kwargs or {}).get("skip_prepare_dataset"))
    if collator is None:
        return {}
    kind = type(collator).__name__
    if isinstance(collator, DataCollatorForCompletionOnlyLM) and isinstance(config, SFTConfig):
        return {"templates": collator.templates}
    if kind in _PADDING and not getattr(collator, "mlm", False):
        config.notes.append(f"data_collator {kind} has nothing to do: rows are packed, never padded")
        return {}
    if skips:
        return {"data_collator": collator}
    raise UserError(
        f"the data_collator {kind} can't be honoured: burnish packs rows itself",
        where=f"{trainer}(data_collator=...)",
        mend="Give rows with input_ids and labels instead, or for images dataset_kwargs={'skip_prepare_dataset': True}",
    )
