"""Micro-batches of pairs and of rated completions against a sequence-by-sequence construction."""

import random

import numpy as np
import pytest
import torch

from burnish.config.errors import UserError
from burnish.data.batch import Batches, Examples
from burnish.data.preference import prepare_unpaired
from burnish.data.unpaired import rotated
from burnish.objectives.sequences import rated_and_mismatched


def store(sequences, **more):
    """Examples of (ids, prompt tokens)."""
    lengths = [len(ids) for ids, _ in sequences]
    return Examples(
        ids=np.array([i for ids, _ in sequences for i in ids], dtype=np.int32),
        trained=np.array([t >= start for ids, start in sequences for t in range(len(ids))]),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        prompt=np.array([start for _, start in sequences], dtype=np.int64),
        **more,
    )


def random_sequences(draw, count, longest=9):
    result = []
    for _ in range(count):
        start = draw.randint(1, longest)
        result.append(([draw.randint(0, 5) for _ in range(start + draw.randint(1, longest))], start))
    return result


def pairs(seed=0, count=13, margin=True):
    sequences = random_sequences(random.Random(seed), 2 * count)
    return store(
        sequences,
        rows=np.repeat(np.arange(count) * 10 + 3, 2).astype(np.int64),
        paired=True,
        margin=np.arange(count, dtype=np.float32) / 4 if margin else None,
    )


def rated(seed=0, count=26, questions=9):
    """Rows whose question is told by the first token of their prompt, and completions by their row."""
    draw = random.Random(seed)
    asked = [i % questions for i in range(count)]
    draw.shuffle(asked)
    sequences = []
    for row, question in enumerate(asked):
        prompt = [100 + question] * draw.randint(1, 6)
        sequences.append((prompt + [1000 + row] * draw.randint(1, 7), len(prompt)))
    return store(
        sequences,
        rows=np.arange(count, dtype=np.int64) * 10 + 3,
        desirable=np.array([draw.random() < 0.4 for _ in range(count)]),
        question=np.array(asked, dtype=np.int64),
    )


def sequences_of(batch):
    """(ids, labels, positions) of each sequence."""
    cu = batch.cu_seqlens.tolist()
    return [
        (batch.input_ids[a:b].tolist(), batch.labels[a:b].tolist(), batch.position_ids[a:b].tolist())
        for a, b in zip(cu[:-1], cu[1:], strict=True)
    ]


def row_of(examples, number):
    return examples.ids[examples.offsets[number] : examples.offsets[number + 1]].tolist()


def labels_of(ids, start):
    """Labels of a sequence whose completion starts at `start`."""
    return [ids[t + 1] if t + 1 >= start else -100 for t in range(len(ids) - 1)] + [-100]


SETTINGS = [
    dict(per_device_train_batch_size=4),
    dict(per_device_train_batch_size=1),
    dict(max_tokens_per_batch=80),
    dict(per_device_train_batch_size=4, train_sampling_strategy="sequential"),
    dict(per_device_train_batch_size=4, shuffle_dataset=True),
    dict(max_tokens_per_batch=80, train_sampling_strategy="sequential"),
]


@pytest.mark.parametrize("changes", SETTINGS)
def test_whole_pairs_once_an_epoch(changes, make_config):
    examples, config = pairs(), make_config(**changes)
    batches = Batches(examples, config)
    for epoch in (0, 1):
        made = list(batches.epoch(epoch))
        seen = []
        for batch in made:
            found = sequences_of(batch)
            assert len(found) == 2 * len(batch.chosen) == 2 * len(batch.rejected)
            for c, r, margin in zip(batch.chosen.tolist(), batch.rejected.tolist(), batch.margin.tolist(), strict=True):
                pair = batch.examples[c] // 2
                assert (batch.examples[c], batch.examples[r]) == (2 * pair, 2 * pair + 1)
                assert margin == pair / 4 and batch.rows[c] == batch.rows[r] == pair * 10 + 3
                seen.append(pair)
            for number, (ids, labels, positions) in zip(batch.examples, found, strict=True):
                assert ids == row_of(examples, number) and positions == list(range(len(ids)))
                assert labels == labels_of(ids, examples.prompt[number])
            if config.max_tokens_per_batch:
                assert len(batch.input_ids) <= config.max_tokens_per_batch
            else:
                assert len(batch.chosen) == config.per_device_train_batch_size or batch is made[-1]
            assert batch.rated is None and batch.completion is None and batch.reference is None
        assert sorted(seen) == list(range(13)) and len(made) == len(batches)


def test_a_budget_takes_as_many_pairs_as_fit(make_config):
    examples = pairs()
    config = make_config(max_tokens_per_batch=80, train_sampling_strategy="sequential")
    sizes = examples.lengths.reshape(-1, 2).sum(1).tolist()
    expected, held = [], 81
    for pair, size in enumerate(sizes):
        if held + size > 80:
            expected.append([])
            held = 0
        expected[-1].append(pair)
        held += size
    made = [[number // 2 for number in batch.examples[::2]] for batch in Batches(examples, config).epoch(0)]
    assert made == expected and max(map(len, expected)) > 1
    longest = int(np.argmax(sizes))
    with pytest.raises(UserError, match=f"row {10 * longest + 3}: {max(sizes)} tokens in one pair are more than"):
        Batches(examples, make_config(max_tokens_per_batch=max(sizes) - 1))


def contents(batches, epoch, skip=0):
    return [(batch.examples, batch.input_ids.tolist()) for batch in batches.epoch(epoch, skip)]


@pytest.mark.parametrize("changes", [*SETTINGS, dict(precompute_ref_log_probs=True, per_device_train_batch_size=4)])
@pytest.mark.parametrize(("examples", "mismatch"), [(pairs(1), False), (rated(1), True)])
def test_order_depends_on_seed_and_epoch_alone_and_skipping_resumes_it(changes, examples, mismatch, make_config):
    config = make_config(**changes)
    first, again = (Batches(examples, config, seed=7, mismatch=mismatch) for _ in range(2))
    assert contents(first, 3) == contents(again, 3)
    assert contents(first, 3, skip=2) == contents(first, 3)[2:]
    other = Batches(examples, config, seed=8, mismatch=mismatch)
    if config.train_sampling_strategy == "random":
        assert contents(first, 3) != contents(first, 4) and contents(first, 3) != contents(other, 3)
    else:
        assert contents(first, 3) == contents(first, 4)


def test_prompts_of_chosen_sequences_with_labels(make_config):
    examples = pairs(2)
    batches = Batches(examples, make_config(per_device_train_batch_size=3), label_prompts=True)
    for batch in batches.epoch(0):
        cu, completion = batch.cu_seqlens.tolist(), batch.completion.tolist()
        for s, (ids, labels, _) in enumerate(sequences_of(batch)):
            start = examples.prompt[batch.examples[s]]
            chosen = s in batch.chosen.tolist()
            assert labels == labels_of(ids, 0 if chosen else start)
            assert completion[cu[s] : cu[s + 1]] == [label != -100 for label in labels_of(ids, start)]


def check_mismatched(examples, batch, limit=None, mode="keep_start"):
    """Every mismatched sequence is its row's prompt and the completion of a row with another; returns those rows."""
    count = len(batch.rated)
    assert batch.rated.tolist() == list(range(count)) and batch.mismatched.tolist() == list(range(count, 2 * count))
    first = int(batch.cu_seqlens[count])  # where the mismatched ones begin, known without the device
    assert batch.edge == (first, sum(place < first for place in batch.valid.tolist()))
    assert all(type(number) is int for number in batch.edge)
    found, taken = sequences_of(batch), []
    for row, s in zip(batch.rated.tolist(), batch.mismatched.tolist(), strict=True):
        number = batch.examples[row]
        assert found[row][0] == row_of(examples, number) and batch.examples[s] == number
        assert batch.desirable[row].item() == examples.desirable[number]
        ids, labels, positions = found[s]
        other = ids[-1] - 1000  # the fixture's completions tell their rows
        assert examples.question[other] != examples.question[number]
        prompt = row_of(examples, number)[: examples.prompt[number]]
        whole = prompt + row_of(examples, other)[examples.prompt[other] :]
        if limit is not None and len(whole) > limit:
            drop = len(whole) - limit
            whole, prompt = (whole[:limit], prompt) if mode == "keep_start" else (whole[-limit:], prompt[drop:])
        assert ids == whole and labels == labels_of(whole, len(prompt)) and positions == list(range(len(ids)))
        taken.append(other)
    return taken


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_mismatched_completions(seed, size, make_config):
    examples = rated(seed)
    batches = Batches(examples, make_config(per_device_train_batch_size=size), mismatch=True)
    rows = []
    for epoch in (0, 1):
        made = list(batches.epoch(epoch))
        for batch in made:
            taken, here = check_mismatched(examples, batch), batch.examples[: len(batch.rated)]
            asked = examples.question[here].tolist()
            if 2 * max(map(asked.count, asked)) <= len(here):  # then the micro-batch has partners for all
                assert sorted(taken) == sorted(here)
            rows += here
    assert sorted(rows) == sorted([*range(26)] * 2)


def test_a_lone_row_takes_the_completion_of_the_next_one_with_another_prompt(make_config):
    examples = rated(3, questions=2)
    config = make_config(per_device_train_batch_size=1, train_sampling_strategy="sequential")
    for number, batch in enumerate(Batches(examples, config, mismatch=True).epoch(0)):
        after = [(number + 1 + step) % 26 for step in range(26)]
        expected = next(i for i in after if examples.question[i] != examples.question[number])
        assert check_mismatched(examples, batch) == [expected]


def test_rows_left_over_take_the_next_rows_one_after_the_other(make_config):
    examples = rated(3, count=12)
    examples.question[:] = [0] * 5 + [1, 0, 2, 3, 0, 4, 5]
    config = make_config(per_device_train_batch_size=5, train_sampling_strategy="sequential")
    first = next(Batches(examples, config, mismatch=True).epoch(0))
    assert check_mismatched(examples, first) == [5, 7, 8, 10, 11]


@pytest.mark.parametrize(("mode", "limit"), [("keep_start", 7), ("keep_end", 7), ("keep_end", 3)])
def test_mismatched_sequences_are_cut_to_max_length(mode, limit, make_config):
    examples = rated(4)
    assert examples.prompt.max() < 7 < examples.lengths.max()
    batches = Batches(examples, make_config(max_length=limit, truncation_mode=mode), mismatch=True)
    made = list(batches.epoch(0))
    for batch in made:
        check_mismatched(examples, batch, limit, mode)
    assert sum(int((batch.cu_seqlens.diff()[len(batch.rated) :] == limit).sum()) for batch in made) > 5


@pytest.mark.parametrize("seed", range(6))
def test_the_budget_holds_with_mismatched_sequences(seed, make_config):
    examples = rated(seed, questions=3)
    budget = 2 * int(examples.lengths.max())
    batches = Batches(examples, make_config(max_tokens_per_batch=budget), mismatch=True)
    for epoch in (0, 1):
        made = list(batches.epoch(epoch))
        assert max(len(batch.input_ids) for batch in made) <= budget and len(made) == len(batches)
        assert all(len(batch.mismatched) == len(batch.rated) for batch in made)
    with pytest.raises(UserError, match="in one sequence and its mismatched one are more than max_tokens_per_batch"):
        Batches(examples, make_config(max_tokens_per_batch=budget - 1), mismatch=True)


def test_rotation():
    assert rotated(np.array([7, 3, 9, 0, 5])).tolist() == [4, 0, 1, 2, 3]
    for seed in range(50):
        draw = np.random.default_rng(seed)
        question = draw.integers(0, 4, draw.integers(1, 9))
        taken = rotated(question)
        assert sorted(taken) == list(range(len(question)))
        most = np.bincount(question).max()
        assert (question[taken] == question).sum() == max(2 * most - len(question), 0)


def test_one_prompt_alone_has_no_mismatch(make_config):
    examples = rated(5, questions=1)
    with pytest.raises(UserError, match="all rows have the same prompt"):
        Batches(examples, make_config(), mismatch=True)
    assert all(batch.mismatched is None for batch in Batches(examples, make_config()).epoch(0))
    last = rated(5, count=9, questions=1)
    last.question[8] = 1  # the only other prompt lies in the micro-batch that is dropped
    config = make_config(per_device_train_batch_size=4, dataloader_drop_last=True, train_sampling_strategy="sequential")
    for batch in Batches(last, config, mismatch=True).epoch(0):
        assert check_mismatched(last, batch) == [8] * 4


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_pairs_taken_apart_give_mixed_batches(strategy, tokenizer, make_config, tmp_path):
    rows = [dict(prompt=f"a{i}", chosen=f"b{i}", rejected=f"c{i}") for i in range(26)]
    config = make_config(train_sampling_strategy=strategy, per_device_train_batch_size=8)
    examples, _ = prepare_unpaired(rows, tokenizer, config, cache_dir=tmp_path)
    batches = Batches(examples, config, mismatch=True)
    for epoch in range(5):
        shares = [batch.desirable.float().mean().item() for batch in batches.epoch(epoch)]
        assert shares == [0.5] * 7
    assert strategy == "sequential" or contents(batches, 0) != contents(batches, 1)


def test_rare_labels_are_spread(make_config):
    examples = rated(6, count=60)
    examples.desirable = np.arange(60) < 12
    for budget in (None, 120):
        batches = Batches(examples, make_config(per_device_train_batch_size=10, max_tokens_per_batch=budget))
        for batch in batches.epoch(0):
            assert abs(int(batch.desirable.sum()) - len(batch.rated) / 5) <= 1


@pytest.mark.parametrize("changes", SETTINGS)
def test_cached_references_are_looked_up_by_row(changes, make_config):
    examples = pairs(3)
    batches = Batches(examples, make_config(**changes))
    batches.reference = np.random.default_rng(0).normal(size=26)
    for batch in batches.epoch(1):
        assert batch.reference.dtype == torch.float32
        assert batch.reference.tolist() == batches.reference[batch.examples].astype(np.float32).tolist()
    batches.reference = np.where(np.arange(26) == 4, np.nan, 0.0)
    with pytest.raises(AssertionError, match="no cached log-prob"):
        list(batches.epoch(0))


@pytest.mark.parametrize("changes", [dict(per_device_train_batch_size=4), dict(per_device_train_batch_size=1),
                                     dict(max_tokens_per_batch=60)])  # fmt: skip
def test_cached_references_of_mismatched_sequences(changes, make_config):
    """A sequence's sum of ids stands for its log-prob: what one epoch keeps must be right for all the others."""
    examples = rated(7)
    batches = Batches(examples, make_config(precompute_ref_log_probs=True, **changes), mismatch=True)
    known = np.full((26, 2), np.nan)
    for batch in batches.epoch(0):
        sums = [sum(ids) for ids, _, _ in sequences_of(batch)]
        count = len(batch.rated)
        known[batch.examples[:count], 0], known[batch.examples[count:], 1] = sums[:count], sums[count:]
    batches.reference = known
    seen = [contents(batches, 0)]
    for epoch in (1, 2):
        for batch in batches.epoch(epoch):
            assert batch.reference.tolist() == [sum(ids) for ids, _, _ in sequences_of(batch)]
        seen.append(contents(batches, epoch))
    assert seen[0] != seen[1] != seen[2]
    batches.reference = known[:, 0]
    with pytest.raises(AssertionError, match="sums of their own"):
        list(batches.epoch(0))


def test_the_fingerprint_tells_sums_apart(make_config):
    def of(examples, mismatch=False, **changes):
        return Batches(examples, make_config(precompute_ref_log_probs=True, **changes), mismatch=mismatch).fingerprint()

    assert of(pairs(0)) == of(pairs(0), per_device_train_batch_size=3, seed=5) != of(pairs(1))
    other = pairs(0)
    other.trained[3] ^= True
    assert of(pairs(0)) != of(other)
    known = of(rated(0), True, per_device_train_batch_size=4)
    assert known == of(rated(0), True, per_device_train_batch_size=4)
    for changes in (dict(per_device_train_batch_size=5), dict(per_device_train_batch_size=4, seed=5),
                    dict(per_device_train_batch_size=4, max_length=9), dict(max_tokens_per_batch=60)):  # fmt: skip
        assert known != of(rated(0), True, **changes)


def test_to_moves_the_fields_of_preferences(make_config):
    config = make_config()
    of_pairs, of_rated = Batches(pairs(), config, label_prompts=True), Batches(rated(), config, mismatch=True)
    of_pairs.reference, of_rated.reference = np.zeros(26), np.zeros((26, 2))
    for batches, own in ((of_pairs, "chosen rejected margin completion"), (of_rated, "rated desirable mismatched")):
        batch = next(batches.epoch(0))
        moved = batch.to("meta")
        assert all(getattr(moved, name).is_meta for name in (*own.split(), "reference", "input_ids"))
        assert (moved.rows, moved.examples) == (batch.rows, batch.examples)


def test_the_halves_are_cut_without_asking_the_device(make_config):
    batch = next(Batches(rated(5), make_config(), mismatch=True).epoch(0))
    parts = rated_and_mismatched(batch)
    meta = rated_and_mismatched(batch.to("meta"))  # a device that has no values to give
    for part, bare in zip(parts, meta, strict=True):
        assert (part.num_valid, part.rows, part.examples) == (bare.num_valid, bare.rows, bare.examples)
        for name in ("input_ids", "position_ids", "cu_seqlens", "labels", "valid"):
            assert getattr(part, name).shape == getattr(bare, name).shape and getattr(bare, name).is_meta
        ids, labels = part.input_ids.tolist(), part.labels.tolist()
        assert [labels[t] for t in part.valid.tolist()] == [ids[t + 1] for t in part.valid.tolist()]
