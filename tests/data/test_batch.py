"""Batches against a token-by-token construction; what each epoch holds; what is never asked of a device."""

import random

import numpy as np
import pytest
import torch

from burnish.config.errors import UserError
from burnish.data.batch import Batches, Examples, collate


def random_examples(seed, rows=23, longest=9):
    draw = random.Random(seed)
    lengths = [draw.randint(1, longest) for _ in range(rows)]
    total = sum(lengths)
    return Examples(
        ids=np.array([draw.randint(0, 3) for _ in range(total)], dtype=np.int32),  # few ids: identity tells nothing
        trained=np.array([draw.random() < 0.5 for _ in range(total)]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        rows=np.arange(rows, dtype=np.int64) * 10 + 3,
    )


def naive(examples, pieces):
    """The batch, one token at a time."""
    ids, positions, labels, cu, rows = [], [], [], [0], []
    for example, start, stop in pieces:
        row = examples.ids[examples.offsets[example] : examples.offsets[example + 1]].tolist()
        flags = examples.trained[examples.offsets[example] : examples.offsets[example + 1]].tolist()
        for t in range(start, stop):
            ids.append(row[t])
            positions.append(t - start)
            labels.append(row[t + 1] if t + 1 < stop and flags[t + 1] else -100)
        cu.append(len(ids))
        rows.append(int(examples.rows[example]))
    return ids, positions, labels, cu, rows


@pytest.mark.parametrize("seed", range(10))
def test_collate_equals_the_naive_construction(seed):
    examples = random_examples(seed)
    draw = random.Random(seed)
    pieces = []
    for example in draw.sample(range(len(examples)), 6):
        length = int(examples.lengths[example])
        start = draw.randrange(length)
        pieces.append((example, start, draw.randint(start + 1, length)))
    batch = collate(examples, pieces)
    ids, positions, labels, cu, rows = naive(examples, pieces)
    assert batch.input_ids.tolist() == ids
    assert batch.position_ids.tolist() == positions
    assert batch.labels.tolist() == labels
    assert batch.cu_seqlens.tolist() == cu
    assert batch.rows == rows
    assert batch.max_seqlen == max(b - a for _, a, b in pieces)
    assert batch.valid.tolist() == [t for t, label in enumerate(labels) if label != -100]
    assert batch.num_valid == len(batch.valid)
    kinds = (batch.input_ids, batch.position_ids, batch.cu_seqlens, batch.labels, batch.valid)
    assert [t.dtype for t in kinds] == [torch.int64, torch.int64, torch.int32, torch.int64, torch.int64]


def test_to_moves_every_tensor():
    batch = collate(random_examples(0), [(0, 0, 1), (3, 0, 1)]).to("meta")
    tensors = [value for value in vars(batch).values() if isinstance(value, torch.Tensor)]
    assert len(tensors) == 5 and all(tensor.is_meta for tensor in tensors)


SETTINGS = [
    dict(),
    dict(per_device_train_batch_size=1),
    dict(packing=True, max_length=12),
    dict(packing=True, max_length=5, packing_strategy="bfd_split"),
    dict(packing=True, max_length=7, packing_strategy="wrapped", per_device_train_batch_size=2),
    dict(max_tokens_per_batch=20),
    dict(max_tokens_per_batch=20, packing=True, max_length=9),
    dict(max_tokens_per_batch=20, packing=True, max_length=7, packing_strategy="wrapped"),
    dict(train_sampling_strategy="sequential"),
    dict(shuffle_dataset=True, train_sampling_strategy="sequential"),
    dict(max_tokens_per_batch=20, train_sampling_strategy="sequential"),
]


@pytest.mark.parametrize("changes", SETTINGS)
def test_every_epoch_holds_every_token_once(changes, make_config):
    examples = random_examples(1)
    config = make_config(**{"per_device_train_batch_size": 4, **changes})
    batches = Batches(examples, config)
    for epoch in (0, 1):
        made = list(batches.epoch(epoch))
        assert len(made) == len(batches)
        assert sum(len(batch.input_ids) for batch in made) == len(examples.ids)
        assert sorted(torch.cat([b.input_ids for b in made]).tolist()) == sorted(examples.ids.tolist())
        assert {row for batch in made for row in batch.rows} == set(examples.rows.tolist())
        if config.max_tokens_per_batch:
            assert max(len(batch.input_ids) for batch in made) <= config.max_tokens_per_batch


def contents(batches, epoch, skip=0):
    return [(batch.rows, batch.input_ids.tolist()) for batch in batches.epoch(epoch, skip)]


@pytest.mark.parametrize("changes", SETTINGS)
def test_order_depends_on_seed_and_epoch_alone_and_skipping_resumes_it(changes, make_config):
    examples = random_examples(2)
    config = make_config(**{"per_device_train_batch_size": 4, **changes})
    first, again = Batches(examples, config, seed=7), Batches(examples, config, seed=7)
    assert contents(first, 3) == contents(again, 3)
    assert contents(first, 3, skip=2) == contents(first, 3)[2:]
    if config.train_sampling_strategy == "random":
        assert contents(first, 3) != contents(first, 4)
        assert contents(first, 3) != contents(Batches(examples, config, seed=8), 3)
    else:
        assert contents(first, 3) == contents(first, 4)


def test_sequential_rows_come_as_they_are(make_config):
    examples = random_examples(3, rows=10)
    config = make_config(per_device_train_batch_size=4, train_sampling_strategy="sequential")
    rows = examples.rows.tolist()
    assert [batch.rows for batch in Batches(examples, config).epoch(5)] == [rows[:4], rows[4:8], rows[8:]]
    config.dataloader_drop_last = True
    assert [batch.rows for batch in Batches(examples, config).epoch(5)] == [rows[:4], rows[4:8]]


def test_evaluation_is_sequential_with_its_own_size_and_packing(make_config):
    examples = random_examples(4, rows=10)
    config = make_config(per_device_eval_batch_size=3, packing=True, max_length=9, eval_packing=False)
    config.dataloader_drop_last = config.shuffle_dataset = True
    batches = Batches(examples, config, train=False)
    rows = examples.rows.tolist()
    assert [batch.rows for batch in batches.epoch(0)] == [rows[:3], rows[3:6], rows[6:9], rows[9:]]
    config.eval_packing = None
    assert len(Batches(examples, config, train=False)) < len(batches)


def test_data_seed_goes_before_seed(make_config):
    examples = random_examples(5)
    by_data_seed = Batches(examples, make_config(seed=1, data_seed=9))
    assert contents(by_data_seed, 0) == contents(Batches(examples, make_config(seed=9)), 0)


def test_a_row_over_the_token_budget_is_named(make_config):
    examples = random_examples(6, longest=30)
    longest = int(examples.rows[int(np.argmax(examples.lengths))])
    budget = int(examples.lengths.max()) - 1
    with pytest.raises(UserError, match=f"row {longest}: .*max_tokens_per_batch={budget}"):
        Batches(examples, make_config(max_tokens_per_batch=budget))


def test_packing_needs_a_length(make_config):
    with pytest.raises(UserError, match="packing needs a max_length"):
        Batches(random_examples(7), make_config(packing=True, max_length=None))
