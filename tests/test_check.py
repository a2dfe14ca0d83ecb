"""`burnish check`: planted mistakes are each found, good configurations give nothing, and what it says is what runs."""

import json
import random
import shutil

import pytest

from burnish import SFTConfig, UserError, cli
from burnish.run import train
from burnish.verbs import check as verb

WORDS = "the quick brown fox jumps over lazy dogs and counts to ten while seven small cats watch".split()


def sentence(rng, words):
    return " ".join(rng.choice(WORDS) for _ in range(words))


def turn(role, content):
    return {"role": role, "content": content}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def write(tmp_path):
    """Write rows into a file, return its name; bytes and text are written as they are."""

    def write(rows, name="rows.jsonl"):
        content = rows if isinstance(rows, (bytes, str)) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return name

    return write


@pytest.fixture
def model_with(tiny_model, tmp_path):
    """A copy of the tiny model, its files changed: {file name: function of its JSON}, None for a file deleted."""

    def copy(**changes):
        folder = tmp_path / "model"
        shutil.copytree(tiny_model, folder)
        for stem, change in changes.items():
            path = folder / f"{stem}.json"
            content = json.loads(path.read_text())
            change(content)
            path.write_text(json.dumps(content))
        return str(folder)

    return copy


@pytest.fixture
def checked(tiny_model, capsys):
    """Check a configuration given as YAML lines; returns (exit code, errors, warnings), and prints what was printed."""

    def run(text, *words, verb="sft", model=tiny_model):
        with open("run.yaml", "w", encoding="utf-8") as file:
            file.write(f"model_name_or_path: {model}\n" * bool(model) + text)
        capsys.readouterr()
        code = cli.main(["check", verb, "run.yaml", *words])
        out, err = capsys.readouterr()
        assert err == ""
        lines = out.splitlines()
        errors, warnings = (
            [line.removeprefix(kind).strip() for line in lines if line.startswith(kind)]
            for kind in ("error", "warning")
        )
        assert code == (2 if errors else 1 if warnings else 0), out
        return code, errors, warnings

    return run


def chats(count=12, seed=0):
    rng = random.Random(seed)
    return [
        {"messages": [turn("user", f"{i} {sentence(rng, 5)}"), turn("assistant", sentence(rng, 8))]}
        for i in range(count)
    ]


def pairs(count=8):
    rng = random.Random(1)
    return [
        {
            "prompt": f"{i} {sentence(rng, 4)}",
            "chosen": " yes, " + sentence(rng, 5),
            "rejected": " no " + sentence(rng, 6),
        }
        for i in range(count)
    ]


def rated(labels):
    rng = random.Random(2)
    return [
        {"prompt": f"{i} {sentence(rng, 4)}", "completion": " " + sentence(rng, 5), "label": label}
        for i, label in enumerate(labels)
    ]


ONE_KEY = {
    "typo": ("learning_rte: 1e-4", "run.yaml:3: unknown key learning_rte. Did you mean learning_rate?"),
    "refused key": ("torch_compile: true", "run.yaml:3: torch_compile is not taken: the hand-written kernels replace"),
    "wrong type": ("learning_rate: quick", "run.yaml:3: learning_rate must be number, got 'quick'"),
    "out of range": ("max_length: 1", "run.yaml:3: max_length must be at least 2, got 1"),
    "impossible pair": ("packing: true\nmax_length: null", "run.yaml:3 and run.yaml:4: packing needs max_length"),
    "nothing reads it": ("lora_r: 4", "run.yaml:3: lora_r is only read with use_peft: true. Delete lora_r"),
    "zero steps": ("max_steps: 0", "run.yaml:3: max_steps 0 would train nothing. Use -1 for no limit"),
    "no evaluation data": ("eval_strategy: epoch", "eval_strategy: eval_strategy without evaluation data."),
}


@pytest.mark.parametrize("name", ONE_KEY)
def test_a_key_that_is_wrong(name, checked, write):
    line, message = ONE_KEY[name]
    _, errors, _ = checked(f"dataset_name: {write(chats())}\n{line}\n")
    assert len(errors) == 1 and errors[0].startswith(message)


SFT_ROWS = {
    "wrong columns": ([{"question": "a", "answer": "b"}], "rows.jsonl row 0: unrecognised columns: answer, question."),
    "not UTF-8": (b'{"text": "caf\xe9"}\n', "rows.jsonl: not UTF-8"),
    "not JSON": ('{"text": "a"}\n{"text": "b"\n', "rows.jsonl:2: not JSON"),
    "ids outside the vocabulary": (
        [{"input_ids": [5, 400]}],
        "rows.jsonl row 0: token id 400 is outside the vocabulary",
    ),
    "no row trains": ([{"text": ""}], "rows.jsonl: no row trains on anything"),
    "two kinds of rows": (
        [{"text": "a b"}, {"prompt": "a", "completion": "b"}],
        "rows.jsonl row 1: this row is prompt",
    ),
    "no content": ([{"messages": [{"role": "user"}]}], "rows.jsonl row 0: message 0 (user) has no content"),
}


@pytest.mark.parametrize("name", SFT_ROWS)
def test_rows_that_stop_a_run(name, checked, write):
    rows, message = SFT_ROWS[name]
    _, errors, _ = checked(f"dataset_name: {write(rows)}\n")
    assert len(errors) == 1 and errors[0].startswith(message)


def test_rows_that_train_on_nothing_are_named(checked, write):
    rows = [*chats(6), {"messages": [turn("user", "nobody answers")]}]
    code, _, warnings = checked(f"dataset_name: {write(rows)}\nassistant_only_loss: true\n")
    assert code == 1 and warnings[0].startswith("rows.jsonl row 6: 1 of 7 rows are left out (no trained tokens)")
    code, _, warnings = checked(f"dataset_name: {write([{'text': 'a b c'}, {'text': ''}])}\n")
    assert code == 1 and warnings[0].startswith("rows.jsonl row 1: 1 of 2 rows are left out (no tokens)")


def test_turns_that_do_not_alternate(checked, write):
    rows = chats(5)
    rows[3]["messages"].insert(1, turn("user", "and more"))
    rows[4]["messages"].append(turn("user", "thanks"))
    _, _, warnings = checked(f"dataset_name: {write(rows)}\n")
    assert warnings[0].startswith("rows.jsonl rows 3, 4: 2 conversations don't go from question to reply")


def test_truncation_above_a_twentieth_is_an_error_unless_allowed(checked, write):
    name = write([*chats(20), {"messages": [turn("user", "a"), turn("assistant", " ".join(WORDS * 10))]}])
    text = f"dataset_name: {name}\nassistant_only_loss: true\nmax_length: 100\n"
    _, errors, _ = checked(text)
    (error,) = errors
    longest = int(error.split("max_length: ")[1].split()[0])
    assert error.startswith("rows.jsonl row 20: cutting to max_length 100 takes ") and "allow_truncation" in error
    assert checked(text, "allow_truncation=true")[0] == 1
    assert checked(text.replace("100", str(longest)))[0] == 0, "the length it names keeps all"
    assert checked(text.replace("100", str(longest - 5)))[0] == 1, "a little is a warning"


def test_what_rows_lost_whole_counts_as_lost(checked, write):
    long = {"messages": [turn("user", " ".join(WORDS * 10)), turn("assistant", " ".join(WORDS * 2))]}
    _, errors, _ = checked(f"dataset_name: {write([*chats(10), long])}\nassistant_only_loss: true\nmax_length: 100\n")
    assert "of the trained tokens" in errors[0]


def test_replies_without_an_end(checked, write, model_with):
    model = model_with()
    with open(f"{model}/chat_template.jinja", "w", encoding="utf-8") as file:
        file.write("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    _, _, warnings = checked(f"dataset_name: {write(chats())}\n", model=model)
    assert warnings[0].startswith("rows.jsonl: 12 of 12 sequences don't end in a token that ends a reply")


def test_a_template_whose_replies_cannot_be_told_apart(checked, write, model_with):
    model = model_with()
    with open(f"{model}/chat_template.jinja", "w", encoding="utf-8") as file:
        file.write("{% for m in messages | reverse %}{{ m['content'] }};{{ m['content'] }};{% endfor %}")
    _, errors, _ = checked(f"dataset_name: {write(chats())}\nassistant_only_loss: true\n", model=model)
    assert "assistant_only_loss: the chat template has no {% generation %} marks" in errors[0]


def test_a_doubled_bos(checked, write, model_with):
    def bos_first(content):
        number = content["model"]["vocab"]["<|im_start|>"]
        one = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [one, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [one, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [number], "tokens": ["<|im_start|>"]}},
        }

    model = model_with(tokenizer=bos_first, tokenizer_config=lambda c: c.update(bos_token="<|im_start|>"))
    _, _, warnings = checked(f"dataset_name: {write([{'text': '<|im_start|>the cat'}] * 3)}\n", model=model)
    assert warnings[0].startswith("rows.jsonl: 3 rows begin with BOS, which the tokenizer writes too")


def test_a_tokenizer_larger_than_the_model_and_sequences_beyond_its_positions(
    checked, write, model_with, tiny_tokenizer
):
    size = len(tiny_tokenizer) - 1
    model = model_with(config=lambda c: c.update(vocab_size=size, max_position_embeddings=16))
    _, errors, warnings = checked(f"dataset_name: {write([{'text': ' '.join(WORDS)}])}\nmax_length: 64\n", model=model)
    assert f"the tokenizer has {size + 1} tokens, the model embeds {size}" in errors[0]
    assert warnings[0].startswith("run.yaml:3: sequences have up to 18 tokens, and the model was made for 16")


def test_evaluation_rows_that_are_trained_on(checked, write):
    train_rows, others = chats(10), chats(4, seed=9)
    name = write(train_rows)
    held = write([*others[:2], train_rows[4], train_rows[7]], "held.jsonl")
    _, _, warnings = checked(f"dataset_name: {name}\neval_dataset_name: {held}\n")
    assert warnings[0].startswith("held.jsonl rows 2, 3: 2 of 4 sequences to evaluate on are trained on as well")
    assert checked(f"dataset_name: {name}\neval_dataset_name: {write(others, 'held.jsonl')}\n")[0] == 0


def test_a_split_that_is_not_there(checked, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([{"text": "a b c"}])
    datasets.DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    _, errors, _ = checked("dataset_name: ./saved\ndataset_train_split: training\n")
    assert errors[0].startswith("./saved: no split 'training'") or errors[0].startswith("saved: no split 'training'")


def test_preferences_without_a_preference(checked, write):
    same = [{**row, "rejected": row["chosen"]} for row in pairs(4)]
    code, errors, _ = checked(f"dataset_name: {write(same)}\n", verb="dpo")
    assert errors[0].startswith("rows.jsonl rows 0, 1, 2, 3: chosen and rejected are the same in 4 of 4 pairs")
    _, errors, warnings = checked(f"dataset_name: {write([*pairs(4), same[0]])}\n", verb="dpo")
    assert not errors and "the same in 1 of 5 pairs" in warnings[0]
    for kind in ("kto", "bco"):
        _, errors, _ = checked(f"dataset_name: {write(rated([True] * 4))}\n", verb=kind)
        assert errors[0].startswith("rows.jsonl: all 4 completions are desirable")


def test_folders(checked, write, tiny_model, model_with):
    name = write(chats())
    model = model_with()
    _, errors, _ = checked(f"dataset_name: {name}\noutput_dir: {model}\n", model=model)
    assert errors[0].startswith(f"{model}: output_dir is the folder of the model that is trained")
    _, errors, _ = checked(f"dataset_name: {name}\n", model="./nowhere")
    assert errors[0].startswith("./nowhere: no such model folder")
    _, errors, _ = checked(f"dataset_name: {name}\n", model="")
    assert errors[0].startswith("model_name_or_path: no model")
    with open(f"{model}/model.safetensors.index.json", "w", encoding="utf-8") as file:
        json.dump({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, file)
    _, errors, _ = checked(f"dataset_name: {name}\n", model=model)
    assert "1 of 1 files of weights are missing (model-00001-of-00002.safetensors)" in errors[0]


RATES = [
    ("learning_rate: 1e4", "learning_rate 10000 is above 0.01"),
    ("learning_rate: 0", "learning_rate is 0: no weight changes"),
    ("warmup_steps: 50\nmax_steps: 9", "warm-up of 50 steps in a run of 9"),
]


@pytest.mark.parametrize(("key", "message"), RATES)
def test_rates_and_steps(key, message, checked, write):
    _, _, warnings = checked(f"dataset_name: {write(chats())}\n{key}\n")
    assert warnings[0].startswith(f"run.yaml:3: {message}")


def test_a_run_that_does_not_fit(checked, write, monkeypatch):
    from burnish.memory import forecast
    from burnish.memory.plan import Machine
    from burnish.memory.time import GIB, Card

    card = Card("a small one", 1.04 * GIB, forecast.CPU_RATES)
    monkeypatch.setattr(forecast, "machine_of", lambda device: Machine(card, 64 * GIB))
    _, errors, _ = checked(f"dataset_name: {write(chats(400))}\nper_device_train_batch_size: 400\n")
    assert "GiB predicted, " in errors[0] and "Fits as set: up to " in errors[0]


def test_all_mistakes_of_a_file_at_once(checked, write):
    text = f"dataset_name: {write(chats())}\nlearning_rte: 1\nmax_steps: 0\nseed: x\npacking: true\nmax_length: null\n"
    _, errors, _ = checked(text + "fp16: true\n", "lora_r=3")
    assert [error.split(": ")[0] for error in errors] == [
        "run.yaml:3", "run.yaml:8", "run.yaml:5", "run.yaml:4", "command line", "run.yaml:6 and run.yaml:7",
    ]  # fmt: skip


GOOD = {
    "chat": ("sft", chats(), "assistant_only_loss: true"),
    "chat, packed": ("sft", chats(), "packing: true\nmax_length: 128"),
    "chat, held out": ("sft", chats(), "test_split_size: 3\neval_strategy: epoch"),
    "lora": ("sft", chats(), "use_peft: true\nlora_dropout: 0\nlearning_rate: 2e-4"),
    "text": ("sft", [{"text": " ".join(WORDS)}, {"text": "the fox"}], ""),
    "prompt and completion": (
        "sft",
        [{"prompt": "the", "completion": " fox"}, {"prompt": "a", "completion": " b"}],
        "",
    ),
    "pairs": ("dpo", pairs(), "beta: 0.2"),
    "orpo": ("orpo", pairs(), "max_length: 256"),
    "rewards": ("reward", pairs(), ""),
    "rated": ("kto", rated([True, False] * 4), "precompute_ref_log_probs: true"),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_configurations_give_nothing(name, checked, write):
    kind, rows, keys = GOOD[name]
    assert checked(f"dataset_name: {write(rows)}\n{keys}\n", verb=kind) == (0, [], [])


def test_the_same_errors_stop_a_training_before_its_model_is_loaded(write, tiny_model, monkeypatch, capsys):
    import burnish.run

    monkeypatch.setattr(burnish.run, "make_network", lambda *given: pytest.fail("the model was loaded"))
    long = {"messages": [turn("user", "a"), turn("assistant", " ".join(WORDS * 10))]}
    config = SFTConfig("out", model_name_or_path=tiny_model, dataset_name=write([long, long]), max_length=32)
    with pytest.raises(UserError, match=r"rows 0, 1: cutting to max_length 32 takes .* max_length: \d+ keeps all"):
        train(config)
    config = SFTConfig("out", model_name_or_path=tiny_model, dataset_name=write(chats()), learning_rate=3.0)
    with pytest.raises(pytest.fail.Exception, match="the model was loaded"):
        train(config)
    assert "burnish: SFTConfig(learning_rate=...): learning_rate 3 is above 0.01" in capsys.readouterr().err


def test_check_loads_no_weights_and_writes_nothing(checked, write, tmp_path, monkeypatch):
    import safetensors.torch
    import transformers

    for name in ("AutoModelForCausalLM",):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *a, **k: pytest.fail("weights"))
    monkeypatch.setattr(safetensors.torch, "load_file", lambda *given: pytest.fail("weights"))
    checked(f"dataset_name: {write(chats())}\noutput_dir: out\n")
    assert {path.name for path in tmp_path.iterdir()} == {"run.yaml", "rows.jsonl", "cache"}


def test_what_it_tells_of_data_and_memory_is_what_the_run_says(checked, write, tiny_model, capsys):
    name = write(chats(40))
    text = f"dataset_name: {name}\noutput_dir: out\nmax_steps: 1\nper_device_train_batch_size: 4\n"
    with open("run.yaml", "w", encoding="utf-8") as file:
        file.write(f"model_name_or_path: {tiny_model}\n{text}")

    def facts():
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.startswith("data ") or line.startswith("memory   planned")]

    assert cli.main(["check", "run.yaml"]) == verb.FINE
    said = facts()
    assert cli.main(["sft", "run.yaml"]) == 0
    assert facts() == said and len(said) == 3


def test_replay_is_handed_the_file(monkeypatch):
    import burnish.verbs.replay

    seen = []
    monkeypatch.setattr(burnish.verbs.replay, "replay", lambda path: seen.append(path) or 7)
    assert cli.main(["check", "--replay", "out/broken"]) == 7 and cli.main(["check", "--replay=a=b"]) == 7
    assert seen == ["out/broken", "a=b"]
