"""TRL's IterativeSFTTrainer: the script hands over the rows of each update itself."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import nn

from burnish.config.errors import UserError
from burnish.data.batch import IGNORE
from burnish.trainers import Trainer
from burnish.training.stepwise import Stepwise, check_config

_HERE = "IterativeSFTTrainer.step"


class IterativeSFTTrainer(Trainer):
    """Supervised fine-tuning, one update a call of `step`, with whatever the script does in between.

    The constructor takes TRL's arguments in the order of v0.8 and today's names; args is an SFTConfig or transformers'
    TrainingArguments. max_length and truncation_mode say how long rows are cut; TRL's mode here is keep_end. Every
    step is logged, evaluation and checkpoints follow eval_steps and save_steps. The learning rate follows its schedule
    over max_steps, and is constant after warm-up without max_steps.
    """

    stepwise = True

    def __init__(
        self,
        model: str | nn.Module | None = None,
        args: Any = None,
        tokenizer: Any = None,
        optimizers: tuple = (None, None),
        data_collator: Callable | None = None,
        eval_dataset: Any = None,
        max_length: int | None = None,
        truncation_mode: str | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        compute_metrics: Callable | None = None,
        optimize_device_cache: bool | None = None,
        **given: Any,
    ):
        if optimize_device_cache:
            raise UserError(
                "optimize_device_cache empties the allocator's cache after each step, which makes the next one slow",
                where="IterativeSFTTrainer(optimize_device_cache=...)",
                mend="Delete it",
            )
        super().__init__(
            model,
            args,
            data_collator,
            None,
            eval_dataset,
            tokenizer=tokenizer,
            optimizers=optimizers,
            max_length=max_length,
            truncation_mode=truncation_mode,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            compute_metrics=compute_metrics,
            **given,
        )
        check_config(self.args)
        self._steps: Stepwise | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None) -> Any:
        """There is nothing to train on but what `step` gets: UserError."""
        raise UserError("the script brings the rows", where="IterativeSFTTrainer.train", mend="Call step(...)")

    def step(
        self,
        input_ids: Sequence[Any] | None = None,
        attention_mask: Sequence[Any] | None = None,
        labels: Sequence[Any] | None = None,
        texts: Sequence[str] | None = None,
        texts_labels: Sequence[str] | None = None,
    ) -> dict[str, float]:
        """One update on the given rows; returns its record (loss, grad_norm, learning_rate, ...), as in log_history.

        input_ids       token ids of each row, [n] int64 each
        attention_mask  1 where a row has a token, 0 where it is padding; default: everywhere
        labels          the token that each position is to be, -100 where nothing is trained; default: input_ids
        texts           instead of input_ids: tokenized as the tokenizer does by itself, without an EOS of ours
        texts_labels    instead of labels: as many tokens as the text has

        The loss is the mean over all trained tokens of the call, whatever its micro-batches of
        per_device_train_batch_size rows. Raises UserError for rows that don't fit together.
        """
        rows = self._rows(input_ids, attention_mask, labels, texts, texts_labels)
        if self._steps is None:
            self._steps = Stepwise(self.run)
        return self._steps.step(self._cut(rows))

    def _rows(self, input_ids, attention_mask, labels, texts, texts_labels) -> list[tuple[np.ndarray, np.ndarray]]:
        """(ids, labels) of each row, without padding."""
        if (input_ids is None) == (texts is None):
            both = "both given" if texts is not None else "both missing"
            raise UserError(f"input_ids and texts are {both}", where=_HERE, mend="Give one of them")
        if texts is not None:
            if attention_mask is not None or labels is not None:
                raise UserError("attention_mask and labels belong to input_ids", where=_HERE, mend="Use texts_labels")
            input_ids, labels = self._encoded(texts), None if texts_labels is None else self._encoded(texts_labels)
        elif texts_labels is not None:
            raise UserError("texts_labels belongs to texts", where=_HERE, mend="Use labels")
        name = "texts" if texts is not None else "input_ids"
        if not len(input_ids):
            raise UserError(f"{name} has no rows", where=_HERE)
        for other, values in (("attention_mask", attention_mask), (f"{name} labels", labels)):
            if values is not None and len(values) != len(input_ids):
                raise UserError(f"{len(input_ids)} {name}, but {len(values)} of {other}", where=_HERE)
        vocabulary = self.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator, union-attr]
        return [
            _row(
                ids,
                None if attention_mask is None else attention_mask[number],
                None if labels is None else labels[number],
                vocabulary,
                f"{_HERE} {name}[{number}]",
            )
            for number, ids in enumerate(input_ids)
        ]

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
            raise UserError("texts must be a list of text", where=_HERE)
        return self.processing_class(list(texts))["input_ids"] if len(texts) else []

    def _cut(self, rows: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Rows cut to max_length: their end is kept, unless truncation_mode says otherwise."""
        limit, mode = self.args.max_length, self.args.truncation_mode
        if self.args.origins["truncation_mode"] == "default":
            mode = "keep_end"
        long = sum(limit is not None and len(ids) > limit for ids, _ in rows)
        if not long:
            return rows
        self.run.log.say("data", f"cut {long} of {len(rows)} rows to max_length {limit} ({mode})")
        kept = slice(None, limit) if mode == "keep_start" else slice(-limit, None)
        return [(ids[kept], labels[kept]) for ids, labels in rows]


def _row(ids: Any, mask: Any, labels: Any, vocabulary: int, where: str) -> tuple[np.ndarray, np.ndarray]:
    """(ids, labels) [n] int64 of one row without its padding. Raises UserError for what is no row."""
    parts = {"ids": ids, "attention_mask": ids if mask is None else mask, "labels": ids if labels is None else labels}
    found: dict[str, np.ndarray] = {}
    for name, values in parts.items():
        array = np.asarray(values.tolist() if hasattr(values, "tolist") else values)
        if array.ndim != 1 or array.dtype.kind not in "iub" or not len(array):
            raise UserError(f"{name} must be one row of whole numbers, [n]", where=where)
        if len(array) != len(found.get("ids", array)):
            mend = "Each token has its label: give texts_labels of equal tokens, or input_ids with labels"
            raise UserError(f"{len(array)} {name} for {len(found['ids'])} tokens", where=where, mend=mend)
        found[name] = array.astype(np.int64)
    kept = np.ones(len(found["ids"]), dtype=bool) if mask is None else found["attention_mask"] != 0
    if not kept.any():
        raise UserError("the row has no tokens", where=where)
    row, wanted = found["ids"][kept], found["labels"][kept]
    for name, values in (("token id", row), ("label", wanted[wanted != IGNORE])):
        if len(values) and not (values.min() >= 0 and values.max() < vocabulary):
            bad = values.max() if values.min() >= 0 else values.min()
            raise UserError(f"{name} {int(bad)} is outside the vocabulary of {vocabulary}", where=where)
    return row, wanted
