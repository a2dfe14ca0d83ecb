"""Rows that a collator turns into padded tensors: images with text (the one place where burnish takes padding).

A collator is a function of a list of rows, the caller's own or `ImageCollator`, and returns what a vision-language
model is called with: input_ids, attention_mask, pixel_values, ... [B, L, ...] and labels [B, L]. Padding goes through
the backbone and no further: a `Batch` of the real tokens stands on it, so that the head, the loss, its count and every
metric are those of packed rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.config.errors import UserError
from burnish.data.batch import IGNORE, Batch, Batches
from burnish.data.formats import IMAGES
from burnish.data.share import Share
from burnish.data.stream import StreamBatches

Collator = Callable[[list[dict]], Mapping[str, Any]]


def padded_batch(given: Mapping[str, Any], rows: list[int]) -> Batch:
    """The `Batch` of the real tokens of a padded one.

    given  input_ids [B, L], labels [B, L] as transformers has them (labels[b, l] is token l's own, -100 where it is not
           trained), attention_mask [B, L] of 0 and 1 (none: all are real), and whatever else the model takes

    A token that no real token stands before is not trained. Raises UserError for what is missing or doesn't fit.
    """
    ids, labels = given.get("input_ids"), given.get("labels")
    for name, value in (("input_ids", ids), ("labels", labels)):
        if not isinstance(value, Tensor) or value.dim() != 2:
            raise UserError(
                f"the collator's batch has no {name} of shape [rows, length] (it has {', '.join(given)})",
                where="data_collator",
                mend="Return input_ids, attention_mask, labels and the image tensors, as tensors",
            )
    assert isinstance(ids, Tensor) and isinstance(labels, Tensor)
    mask = given.get("attention_mask")
    real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    if ids.shape != labels.shape or real.shape != ids.shape or len(ids) != len(rows):
        raise UserError(
            f"of {len(rows)} rows the collator made input_ids {tuple(ids.shape)}, labels {tuple(labels.shape)} and "
            f"attention_mask {tuple(real.shape)}",
            where="data_collator",
            mend="All three are [rows, length]",
        )
    lengths = real.sum(1)
    if not lengths.all():
        raise UserError("the collator made a row of padding only", where=f"row {rows[int(lengths.argmin())]}")
    targets = torch.cat([labels[:, 1:], labels.new_full((len(ids), 1), IGNORE)], dim=1)  # [B, L], shifted
    place = real.flatten().nonzero().flatten()  # [T]
    shifted = targets.flatten()[place].long()
    cu = torch.zeros(len(rows) + 1, dtype=torch.int32)
    torch.cumsum(lengths, 0, out=cu[1:])
    valid = (shifted != IGNORE).nonzero().flatten()
    return Batch(
        input_ids=ids.flatten()[place],
        position_ids=torch.arange(len(place)) - torch.repeat_interleave(cu[:-1].long(), lengths),
        cu_seqlens=cu,
        max_seqlen=int(lengths.max()),
        labels=shifted,
        num_valid=len(valid),
        valid=valid,
        rows=rows,
        examples=list(rows),
        inputs={name: value for name, value in given.items() if name != "labels"},
        place=place,
    )


class CollatedBatches:
    """What `Batches` is for packed rows: micro-batches of `per_device_train_batch_size` rows, in an order that the seed
    gives each epoch. Rows are read and collated when their micro-batch comes; the collator's random numbers are the
    process's own, which a checkpoint keeps.

    rows  has a length, and rows by number (a list of dicts, a datasets.Dataset)
    """

    def __init__(self, rows: Any, collate: Collator, config: Any, *, train: bool = True):
        if not len(rows):
            raise UserError("the data set has no rows to train on")
        self.rows, self.collate = rows, collate
        self._size = config.per_device_train_batch_size if train else config.per_device_eval_batch_size
        self._shuffle = train and config.train_sampling_strategy != "sequential"
        self._drop_last = train and config.dataloader_drop_last
        self._seed = config.seed if config.data_seed is None else config.data_seed
        if not len(self):
            raise UserError(
                f"{len(rows)} rows don't fill one batch, and dataloader_drop_last is on",
                where="dataloader_drop_last",
                mend="Turn it off or lower per_device_train_batch_size",
            )

    def __len__(self) -> int:
        """Micro-batches in an epoch."""
        full, rest = divmod(len(self.rows), self._size)
        return full + (rest > 0 and not self._drop_last)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The micro-batches of an epoch, from number `skip` on."""
        order = np.arange(len(self.rows))
        if self._shuffle:
            order = np.random.default_rng([self._seed, epoch]).permutation(order)
        for number in range(skip, len(self)):
            yield self.batch(order[number * self._size : (number + 1) * self._size].tolist())

    def shares(
        self, epoch: int, skip: int, size: int, *, ranks: int, rank: int, cost: tuple[float, float]
    ) -> Iterator[Share]:
        """Windows of `size` micro-batches, as `Batches.shares`; of one process only."""
        assert ranks == 1, "refused when the run was assembled"
        batches = self.epoch(epoch, skip)
        while window := list(islice(batches, size)):
            yield Share(window, len(window), sum(len(batch.input_ids) for batch in window), 1.0)

    def fingerprint(self) -> str:
        """What can be said of the rows without collating them all: how many they are."""
        return f"{len(self.rows)} rows through a collator"

    def batch(self, numbers: list[int]) -> Batch:
        """The collated batch of some rows, by their numbers. An error of the collator's names them."""
        rows = [self.rows[number] for number in numbers]
        try:
            given = self.collate(rows)
        except UserError:
            raise
        except Exception as error:  # the caller's code may raise anything
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"the collator failed ({type(error).__name__}: {reason})", where=f"rows {numbers}"
            ) from error
        if not isinstance(given, Mapping):
            raise UserError(f"the collator returned a {type(given).__name__}, not a dict", where="data_collator")
        return padded_batch(given, numbers)


AnyBatches = Batches | StreamBatches | CollatedBatches


class ImageCollator:
    """Conversations with images through a model's processor: every token is trained but the images' and the padding.

    Rows have messages, whose content may be a list of {"type": "image"} and {"type": "text", "text": ...}, and images
    (a list) or image (one) in the order in which the messages name them.
    """

    def __init__(self, processor: Any, max_length: int | None):
        self._processor, self._limit = processor, max_length
        tokenizer = processor.tokenizer
        found = [getattr(processor, name, None) for name in ("image_token_id", "video_token_id", "audio_token_id")]
        found += [getattr(tokenizer, name, None) for name in ("image_token_id", "boi_token_id", "eoi_token_id")]
        if not any(value is not None for value in found):
            token = getattr(processor, "image_token", None)
            found = [] if token is None else [tokenizer.convert_tokens_to_ids(str(token))]
        self._image_ids = torch.tensor(sorted({int(value) for value in found if value is not None}))
        if not len(self._image_ids):
            raise UserError(
                f"{type(processor).__name__} doesn't say which tokens stand for an image",
                where="processing_class",
                mend="Give a data_collator of your own, with dataset_kwargs={'skip_prepare_dataset': True}",
            )

    def __call__(self, rows: list[dict]) -> dict[str, Any]:
        texts = [self._processor.apply_chat_template(_messages(row), tokenize=False) for row in rows]
        images = [_images(row) for row in rows]
        pictures = {"images": images} if any(images) else {}
        made = dict(self._processor(text=texts, padding=True, return_tensors="pt", **pictures))
        ids, mask = made["input_ids"], made["attention_mask"]
        if self._limit is not None and ids.shape[1] > self._limit:
            raise UserError(
                f"a row with images has {ids.shape[1]} tokens, more than max_length {self._limit}: images can't be cut",
                where=repr(texts[int(mask.sum(1).argmax())])[:80],
                mend="Raise max_length, or set it to null",
            )
        unseen = (mask == 0) | torch.isin(ids, self._image_ids)
        return {**made, "labels": ids.masked_fill(unseen, IGNORE)}


def has_images(row: Mapping[str, Any]) -> bool:
    """Whether a row is a conversation with pictures beside it."""
    return bool(row.get("messages")) and any(row.get(name) is not None for name in IMAGES)


def _images(row: dict) -> list:
    found: Any = next((row[name] for name in IMAGES if row.get(name) is not None), [])
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _messages(row: dict) -> list[dict]:
    """The row's messages, without the keys that Arrow filled with None; text content as a list of one part."""
    messages = row.get("messages")
    if not messages:
        raise UserError("a row with images has no messages", where=", ".join(row), mend="Give messages and images")
    chat = []
    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
        parts = [{key: value for key, value in part.items() if value is not None} for part in content]
        chat.append({"role": message["role"], "content": [_named(part) for part in parts]})
    return chat


def _named(part: dict) -> dict:
    """A part without the number that some data sets give images: their order says it."""
    return {"type": "image"} if part.get("type") == "image" else part
