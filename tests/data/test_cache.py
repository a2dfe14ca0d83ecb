"""The token cache: hit by the same content only, rebuilt when damaged, never left half written."""

import json

import numpy as np
import pytest

from burnish.config.errors import UserError
from burnish.data import cache
from burnish.data.prepare import prepare

ROWS = [{"text": f"the cat sat on mat {i}"} for i in range(20)]


def entries(folder):
    return sorted(path for path in (folder / "tokens").iterdir())


def same(one, two):
    return all(np.array_equal(getattr(one, name), getattr(two, name)) for name in ("ids", "trained", "offsets", "rows"))


def test_second_run_maps_the_first_one_s_tokens(tokenizer, make_config, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    built, first = prepare(path, tokenizer, make_config(max_length=5), cache_dir=tmp_path)
    mapped, second = prepare(path, tokenizer, make_config(max_length=5), cache_dir=tmp_path)
    assert (first.from_cache, second.from_cache) == (False, True)
    assert same(built, mapped) and isinstance(mapped.ids.base, np.memmap)
    assert first.lines() == second.lines()
    path.rename(tmp_path / "b.jsonl")  # content decides, not the name
    assert prepare(tmp_path / "b.jsonl", tokenizer, make_config(max_length=5), cache_dir=tmp_path)[1].from_cache


def test_anything_that_matters_makes_another_entry(tokenizer, make_tokenizer, make_config, tmp_path):
    def cached(rows=ROWS, tok=tokenizer, **changes):
        return prepare(rows, tok, make_config(**changes), cache_dir=tmp_path)[1].from_cache

    assert not cached()
    assert cached(seed=7, per_device_train_batch_size=2)  # these do not matter
    assert not cached(rows=ROWS[1:])
    assert not cached(max_length=6)
    assert not cached(max_length=6, truncation_mode="keep_end")
    assert not cached(completion_only_loss=False)
    changed = make_tokenizer()
    changed.eos_token = "<eos>"
    assert not cached(tok=changed)
    assert not cached(tok=make_tokenizer(template="{{ messages }}"))
    assert not cached(tok=make_tokenizer(bos=True))
    assert cached()


@pytest.mark.parametrize("harm", ["flip", "cut", "missing", "manifest"])
def test_a_damaged_entry_is_built_again(tokenizer, make_config, tmp_path, harm):
    built, _ = prepare(ROWS, tokenizer, make_config(), cache_dir=tmp_path)
    built = cache.Examples(*(np.array(getattr(built, name)) for name in ("ids", "trained", "offsets", "rows")))
    (entry,) = entries(tmp_path)
    file = entry / ("report.json" if harm == "manifest" else "ids.npy")
    data = bytearray(file.read_bytes())
    if harm == "flip":
        data[-3] ^= 1
    file.write_bytes(bytes(data) if harm == "flip" else bytes(data[:-5]))
    if harm == "missing":
        file.unlink()
    again, report = prepare(ROWS, tokenizer, make_config(), cache_dir=tmp_path)
    assert not report.from_cache and same(again, built)
    assert prepare(ROWS, tokenizer, make_config(), cache_dir=tmp_path)[1].from_cache


def test_nothing_half_written_stays(tokenizer, make_config, tmp_path, monkeypatch):
    calls = []

    def failing(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return save(*arguments, **options)

    save = np.save
    monkeypatch.setattr(np, "save", failing)
    with pytest.raises(UserError, match="cannot write the token cache .No space left"):
        prepare(ROWS, tokenizer, make_config(), cache_dir=tmp_path)
    assert entries(tmp_path) == []


def test_a_second_writer_does_no_harm(tokenizer, make_config, tmp_path):
    examples, report = prepare(ROWS, tokenizer, make_config(), cache_dir=tmp_path)
    (entry,) = entries(tmp_path)
    cache.save(entry, examples, report)
    assert entries(tmp_path) == [entry]
    found = cache.load(entry)
    assert found is not None and same(found[0], examples)


def test_where_it_lies(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("BURNISH_CACHE", raising=False)
    assert cache.default_dir() == tmp_path / "burnish"
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "own"))
    assert cache.default_dir() == tmp_path / "own"
