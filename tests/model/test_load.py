"""Loading: what works loads as plain transformers would, and each mistake is one clear line."""

import json
import shutil
import subprocess
import sys

import pytest
import torch

from burnish.config.errors import UserError
from burnish.model.load import check_vocabulary, load_model, load_tokenizer


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "tiny-llama"
    tiny("llama").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def a_tokenizer(path, extra=0):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(30 + extra))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    fast.save_pretrained(path)
    return str(path)


def test_weights_dtype_and_attention(tiny, saved):
    model = load_model(str(saved))
    assert model.training and model.config._attn_implementation == "burnish"
    for a, b in zip(model.parameters(), tiny("llama").parameters(), strict=True):
        assert torch.equal(a, b)
    assert load_model(str(saved), dtype="bfloat16", attn="sdpa").dtype == torch.bfloat16
    chosen = load_model(str(saved), model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"})
    assert chosen.dtype == torch.bfloat16 and chosen.config._attn_implementation == "eager"


def test_a_saved_model_carries_no_trace_of_burnish(saved, tmp_path):
    load_model(str(saved)).save_pretrained(tmp_path / "again")
    assert "burnish" not in (tmp_path / "again" / "config.json").read_text()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./tiny-lama", "no such model folder.*(holds|has no folders)"),
        ("~/no/such/folder", "no such model folder"),
        ("organisation/not-there", "neither a folder here nor can it be had from the hub"),
    ],
)
def test_what_is_not_there(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (load_model, load_tokenizer):
        with pytest.raises(UserError, match=message) as caught:
            load(name)
        assert name.strip("./~") in caught.value.where and caught.value.mend


def test_a_misspelt_folder_shows_its_neighbours(folder):
    with pytest.raises(UserError, match="holds copy"):
        load_model(str(folder.parent / "cpoy"))
    with pytest.raises(UserError, match="this is a file"):
        load_model(str(folder / "config.json"))


def test_folders_that_hold_no_model(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(UserError, match="an adapter, not a model. Its base model is org/base"):
        load_model(str(folder))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="no config.json"):
        load_model(str(folder))


def test_pickled_weights_are_refused_unless_asked_for(tiny, folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights"):
        load_model(str(folder))
    torch.save(tiny("llama").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickle.*use_safetensors: false"):
        load_model(str(folder))
    model = load_model(str(folder), model_init_kwargs={"use_safetensors": False})
    assert torch.equal(model.lm_head.weight, tiny("llama").lm_head.weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"lacks 9 weights.*model\.layers\.2"),
        ({"model_type": "unheard-of"}, "can't be loaded.*unheard-of"),
        ({"vocab_size": 99}, "can't be loaded|another shape"),
    ],
)
def test_weights_that_do_not_belong_to_the_config(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(UserError, match=message):
        load_model(str(folder))


def test_damaged_files_and_wrong_options(folder):
    for options in ({"dtype": "int8"}, {"attn": "nonsense"}, {"model_init_kwargs": {"bogus": 1}}):
        with pytest.raises(UserError, match="int8|nonsense|bogus"):
            load_model(str(folder), **options)
    (folder / "model.safetensors").write_bytes(b"not a tensor")
    with pytest.raises(UserError, match="can't be loaded"):
        load_model(str(folder))


def test_tokenizers(folder, tmp_path):
    with pytest.raises(UserError, match="tokenizer can't be loaded"):
        load_tokenizer(str(folder))
    path = a_tokenizer(tmp_path / "tok")
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0].content }}")
    tokenizer = load_tokenizer(path, chat_template_path=str(template), eos_token="w3", pad_token="w4")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (6, 7)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "w5"}], tokenize=False) == "w5"
    with pytest.raises(UserError, match="eos_token: 'w99' is not in"):
        load_tokenizer(path, eos_token="w99")
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(path, chat_template_path=path)


def test_a_tokenizer_larger_than_the_models_vocabulary(tiny, tmp_path):
    model = tiny("llama")
    check_vocabulary(load_tokenizer(a_tokenizer(tmp_path / "fits", extra=64)), model)
    with pytest.raises(UserError, match="98 tokens, the model embeds 97"):
        check_vocabulary(load_tokenizer(a_tokenizer(tmp_path / "large", extra=65)), model)


def test_a_run_without_adapters_imports_neither_peft_nor_the_trainer(saved):
    """They cost more than all the rest of a start (7 s against 3.6 s for transformers' models, measured)."""
    code = f"""
import sys
import burnish.model.head, burnish.model.adapters, burnish.model.load, burnish.model.patch, burnish.model.probe
assert "transformers" not in sys.modules
model = burnish.model.load.load_model({str(saved)!r})
burnish.model.patch.patch(model)
print([name for name in ("peft", "transformers.trainer", "datasets") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=saved, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr[-2000:]
