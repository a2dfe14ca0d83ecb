"""Streams give the batches that stored rows in their order would, window by window, for as long as the run asks."""

import datasets
import pytest

from burnish.config.errors import UserError
from burnish.data import stream
from burnish.data.batch import Batches
from burnish.data.prepare import prepare
from burnish.data.stream import StreamBatches

ROWS = [{"text": "the cat sat " * (1 + i % 5)} for i in range(25)]


def contents(batches):
    return [(b.rows, b.input_ids.tolist(), b.labels.tolist(), b.cu_seqlens.tolist()) for b in batches]


@pytest.fixture
def iterable():
    return datasets.Dataset.from_list(ROWS).to_iterable_dataset()


@pytest.mark.parametrize("changes", [{}, {"max_length": 7}, {"max_tokens_per_batch": 60}])
def test_unpacked_stream_equals_stored_rows(iterable, tokenizer, make_config, tmp_path, changes, monkeypatch):
    monkeypatch.setattr(stream, "_WINDOW", 10)
    sizes = dict(per_device_train_batch_size=4, per_device_eval_batch_size=4)
    config = make_config(
        train_sampling_strategy="sequential", max_steps=3, gradient_accumulation_steps=2, **sizes, **changes
    )
    examples, report = prepare(ROWS, tokenizer, config, cache_dir=tmp_path)
    streamed = StreamBatches(iterable, tokenizer, config)
    assert len(streamed) == 6
    expected = contents(Batches(examples, config).epoch(0))[:6]
    # the last stored micro-batch may be short; the stream fills it from its next pass
    assert contents(streamed.epoch(0))[: len(expected) - 1] == expected[:-1]
    evaluated = StreamBatches(iterable, tokenizer, config, train=False)
    assert contents(evaluated.epoch(0)) == contents(Batches(examples, config, train=False).epoch(0))
    assert evaluated.report.cut_rows == report.cut_rows
    assert (evaluated.report.rows, evaluated.report.tokens) == (report.rows, report.tokens)


def test_a_run_goes_over_the_stream_as_often_as_it_must_and_resumes(iterable, tokenizer, make_config):
    config = make_config(max_steps=9, per_device_train_batch_size=10)
    batches = StreamBatches(iterable, tokenizer, config)
    whole = contents(batches.epoch(0))
    assert len(whole) == 9
    assert [row for rows, *_ in whole for row in rows][:60] == [*range(25), *range(25), *range(10)]
    assert contents(batches.epoch(0, skip=4)) == whole[4:]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packed_stream_keeps_every_token_of_each_window(
    iterable, tokenizer, make_config, tmp_path, monkeypatch, strategy
):
    monkeypatch.setattr(stream, "_WINDOW", 10)
    config = make_config(packing=True, packing_strategy=strategy, max_length=30, per_device_eval_batch_size=1)
    examples, _ = prepare(ROWS, tokenizer, config, cache_dir=tmp_path)
    batches = list(StreamBatches(iterable, tokenizer, config, train=False).epoch(0))
    assert sum(len(b.input_ids) for b in batches) == len(examples.ids)
    assert max(len(b.input_ids) for b in batches) <= 30
    firsts = [min(b.rows) // 10 for b in batches]
    assert firsts == sorted(firsts), "windows are packed one after the other"
    assert contents(batches) == contents(StreamBatches(iterable, tokenizer, config, train=False).epoch(0))


def test_refusals(iterable, tokenizer, make_config):
    with pytest.raises(UserError, match="Set max_steps"):
        StreamBatches(iterable, tokenizer, make_config())
    with pytest.raises(UserError, match="row 2: .*max_tokens_per_batch=9"):
        list(StreamBatches(iterable, tokenizer, make_config(max_steps=9, max_tokens_per_batch=9)).epoch(0))
    once = StreamBatches(iter(ROWS), tokenizer, make_config(max_steps=9))
    with pytest.raises(UserError, match="ended after 25 rows"):
        list(once.epoch(0))
    empty = datasets.Dataset.from_list([{"text": ""}] * 3).to_iterable_dataset()
    with pytest.raises(UserError, match="no row of the stream trains"):
        list(StreamBatches(empty, tokenizer, make_config(max_steps=2)).epoch(0))
