"""Runs on rows that a collator makes tensors of (burnish.data.vision): what they can't have, and what is proved first.

Nothing is packed there, so what must be proved of the model is another thing: that its own loss on the collator's batch
is what the backbone's hidden states and the head give.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset

from burnish.config.errors import UserError
from burnish.config.fields import SFTConfig
from burnish.data.batch import IGNORE
from burnish.data.completion import ConstantLengthDataset
from burnish.data.vision import CollatedBatches, Collator, ImageCollator, has_images
from burnish.logprobs import token_nll
from burnish.metrics import Log
from burnish.model.head import Head, causal_lm, evaluating
from burnish.model.load import load_processor
from burnish.parallel.world import world

# Keys that are about rows which burnish tokenizes and packs itself, with their values that ask for nothing.
_PACKED: dict[str, tuple] = {
    "packing": (False,),
    "eval_packing": (None, False),
    "max_tokens_per_batch": (None,),
    "assistant_only_loss": (False,),
    "completion_only_loss": (None, False),
    "test_split_size": (None,),
    "dataset_test_split": (None,),
    "neftune_noise_alpha": (None,),
    "shuffle_dataset": (False,),
}


def with_processor(config: Any, name: str, given: Any, rows: Any) -> Any:
    """`given` itself, or for rows with images and nothing given the model's own processor."""
    if given is None and isinstance(config, SFTConfig) and _pictures(rows):
        return load_processor(name, trust_remote_code=config.trust_remote_code)
    return given


def collator_for(config: Any, processor: Any, rows: Any, given: Collator | None) -> Collator | None:
    """What makes batches of these rows: the script's collator, ours for rows with images; None: they are packed."""
    if given is not None or not isinstance(config, SFTConfig) or not _pictures(rows):
        return given
    if not hasattr(processor, "tokenizer"):
        raise UserError(
            f"rows with images take the model's processor, processing_class is a {type(processor).__name__}",
            where="processing_class",
            mend="Give AutoProcessor.from_pretrained(model)",
        )
    return ImageCollator(processor, config.max_length)


def collated(
    config: Any, collate: Collator, given: tuple, formatting_func: Any, log: Log
) -> dict[str, CollatedBatches]:
    """The batches by role. Raises UserError for keys that only packed rows can honour, and for rows without numbers."""
    for name, usual in _PACKED.items():
        if getattr(config, name, usual[0]) not in usual:
            what = f"{name} is about rows that burnish packs itself, a collator makes padded batches"
            config._fail(what, name, mend="Delete it")
    if formatting_func is not None:
        raise UserError("a collator formats its rows itself", where="formatting_func", mend="Keep one of the two")
    if world().size > 1:
        raise UserError("a collator's batches are trained by one process", where="data_collator", mend="Use nproc: 1")
    made = {}
    for role, rows in zip(("train", "eval"), given, strict=True):
        if rows is None:
            continue
        if not _numbered(rows):
            raise UserError(
                f"a collator takes rows by their number, {role}_dataset is a {type(rows).__name__}",
                where=f"{role}_dataset",
                mend="Give a list of dicts or a datasets.Dataset",
            )
        made[role] = CollatedBatches(rows, collate, config, train=role == "train")
        name = getattr(collate, "__name__", type(collate).__name__)
        log.say("data" if role == "train" else "eval", f"{len(rows):,} rows, padded by {name}, which also cuts them")
    if not made:
        raise UserError("no data", where="train_dataset", mend="Give a list of dicts or a datasets.Dataset")
    return made


@torch.no_grad()
def check_collated(model: nn.Module, head: Head, batches: Any) -> None:
    """Compare the model's own loss on the first row with ours; raises UserError where they differ."""
    if not isinstance(batches, CollatedBatches):
        return
    inner = causal_lm(model)
    batch = batches.batch([0]).to(next(model.parameters()).device)
    if not batch.num_valid:
        return
    assert batch.inputs is not None and batch.place is not None
    ids = batch.inputs["input_ids"]
    labels = torch.full_like(ids, IGNORE).flatten()
    labels[batch.place[batch.valid] + 1] = batch.labels[batch.valid]
    with evaluating(inner):
        try:
            theirs = inner(**batch.inputs, labels=labels.view_as(ids), use_cache=False).loss.item()
            ours = token_nll(model, head, batch)[0].item() / batch.num_valid
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError, AttributeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{type(inner).__name__} can't run the collator's batch ({type(error).__name__}: {reason})",
                where="data_collator",
                mend="Return what the model's forward takes",
            ) from error
    limit = 1e-4 if head.weight.dtype == torch.float32 else 2e-2
    if not abs(ours - theirs) <= limit * abs(theirs):  # a NaN must fail
        raise UserError(
            f"{type(inner).__name__}'s own loss on the first row is {theirs:.6g}, its hidden states and head give "
            f"{ours:.6g}",
            where="model",
            mend="burnish trains models whose loss is the mean of -log p over the labels",
        )


def _pictures(rows: Any) -> bool:
    """Whether rows that can be looked at have images."""
    if not _numbered(rows) or not len(rows):
        return False
    names = getattr(rows, "column_names", None)
    return has_images({name: name for name in names} if isinstance(names, list) else rows[0])


def _numbered(rows: Any) -> bool:
    """Whether rows have a length and come by number; datasets of torch's that only iterate inherit a __getitem__."""
    iterates = isinstance(rows, (str, dict, ConstantLengthDataset, IterableDataset))
    return not iterates and hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
