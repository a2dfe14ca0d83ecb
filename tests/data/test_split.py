"""What is held out for evaluation is never trained on: not in another copy, nor in another piece."""

import pytest

from burnish.config.errors import UserError
from burnish.config.fields import SFTConfig
from burnish.data.batch import Batches
from burnish.data.completion import ConstantLengthDataset
from burnish.data.prepare import prepare
from burnish.data.split import hold_out
from burnish.metrics import Log
from burnish.run.rows import read_data


def rows_of(texts, tokenizer, config, folder):
    return prepare([{"text": text} for text in texts], tokenizer, config, cache_dir=folder)[0]


def texts_of(examples):
    bounds = examples.offsets.tolist()
    return [tuple(examples.ids[a:b].tolist()) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [0.25, 10])
def test_copies_of_a_text_are_held_out_together(size, seed, tokenizer, make_config, tmp_path):
    texts = [f"the cat {i % 25}" for i in range(40)]  # 15 stand twice
    train, held = hold_out(rows_of(texts, tokenizer, make_config(), tmp_path), size, seed)
    assert not set(texts_of(train)) & set(texts_of(held))
    assert sorted(train.rows.tolist() + held.rows.tolist()) == list(range(40))
    assert len(held) == 10 and train.rows.tolist() == sorted(train.rows) and held.rows.tolist() == sorted(held.rows)


def test_texts_that_stand_once_are_held_out_in_the_number_asked_for(tokenizer, make_config, tmp_path):
    examples = rows_of([f"the cat {i}" for i in range(20)], tokenizer, make_config(), tmp_path)
    drawn = [hold_out(examples, 7, seed)[1].rows.tolist() for seed in range(4)]
    assert all(len(rows) == 7 for rows in drawn) and len(set(map(tuple, drawn))) == 4
    assert drawn[0] == hold_out(examples, 0.35, 0)[1].rows.tolist()


def test_one_text_alone_cannot_be_held_out(tokenizer, make_config, tmp_path):
    with pytest.raises(UserError, match="copies stay together"):
        hold_out(rows_of(["the cat"] * 5, tokenizer, make_config(), tmp_path), 2, 0)


@pytest.mark.parametrize("strategy", ["bfd_split", "wrapped"])
def test_pieces_of_a_long_row_stay_on_its_side(strategy, tokenizer, make_config, tmp_path):
    config = make_config(packing=True, packing_strategy=strategy, max_length=8)
    examples = rows_of([f"{i} the cat sat on the mat " * (i + 1) for i in range(9)], tokenizer, config, tmp_path)
    assert examples.lengths.max() > 8
    sides = []
    for part in hold_out(examples, 3, 1):
        batches = list(Batches(part, config).epoch(0))
        sides.append({row for batch in batches for row in batch.rows})
        assert sum(len(batch.input_ids) for batch in batches) == len(part.ids)
    assert len(sides[1]) == 3 and sides[0] | sides[1] == set(range(9)) and not sides[0] & sides[1]


def test_blocks_that_cut_texts_are_not_held_out(tokenizer, tmp_path):
    blocks = ConstantLengthDataset(tokenizer, [{"text": "the cat sat " * 9}] * 4, "text", seq_length=8)
    config = SFTConfig(output_dir=str(tmp_path), model_name_or_path="x", test_split_size=0.5)
    with pytest.raises(UserError, match="cut texts in two") as error:
        read_data(config, tokenizer, 1000, (blocks, None), None, Log(None, quiet=True))
    assert error.value.where == "test_split_size"
