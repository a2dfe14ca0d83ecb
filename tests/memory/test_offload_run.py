"""Whole runs under the memory keys: the same losses and weights to the last bit, and what the run says of it."""

import random

import pytest
import torch

import burnish
from burnish import SFTConfig, UserError
from burnish.memory.settings import from_config
from burnish.run import assemble

BASE = {
    "learning_rate": 3e-3, "per_device_train_batch_size": 3, "max_length": 64, "logging_steps": 1, "max_steps": 3,
    "save_strategy": "no", "use_cpu": True, "bf16": False,
}  # fmt: skip
WAYS = {
    "no checkpoints": {"gradient_checkpointing": False},
    "offloading alone": {"activation_offloading": True},
    "segments": {"checkpoint_segment": 2, "keep_attention": True},
    "all of it": {"activation_offloading": True, "checkpoint_segment": 3, "keep_attention": True, "tile_tokens": 0},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def deep_model(tmp_path_factory, tiny_model) -> str:
    """The tiny model with five layers: segments of two and of three leave a rest."""
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("deep_model")
    LlamaForCausalLM(AutoConfig.from_pretrained(tiny_model, num_hidden_layers=5)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def pairs() -> list[dict]:
    rng = random.Random(3)
    words = "the fox over and ten cats a quick brown jumps".split()

    def text(number: int) -> str:
        return " ".join(rng.choices(words, k=number))

    lengths = [(rng.randint(2, 9), rng.randint(2, 9)) for _ in range(12)]
    return [{"prompt": text(4), "chosen": text(chosen), "rejected": text(rejected)} for chosen, rejected in lengths]


def outcome(run):
    """Losses and trained weights of a run that has ended, and whether its checkpoints are gone."""
    run.train()
    assert run.memory.arena is None or (run.memory.arena.capacity and not run.memory.arena.live)
    losses = [record["loss"] for record in run.state.log_history if "loss" in record]
    return losses, {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def same(found, expected):
    assert found[0] == expected[0] and len(set(found[0])) == 3
    assert found[1].keys() == expected[1].keys()
    assert all(torch.equal(found[1][name], value) for name, value in expected[1].items())


@pytest.mark.parametrize(
    ("keys", "ways"),
    [
        ({"packing": True, "gradient_accumulation_steps": 2}, [*WAYS]),
        ({"use_peft": True, "lora_dropout": 0.2, "lora_target_modules": "all-linear"}, ["no checkpoints", "all of it"]),
        ({"optimizer_in_bwd": True, "max_grad_norm": 0, "bf16": True}, ["no checkpoints", "all of it"]),
    ],
    ids=["full", "lora with dropout", "bfloat16, optimizer in backward"],
)
def test_sft_ends_alike_whatever_is_kept_where(tmp_path, deep_model, chat_file, keys, ways):
    found = {}
    for name in ways:
        given = {**BASE, "learning_rate": 5e-3, **keys, **WAYS[name]}
        config = SFTConfig(str(tmp_path / name), model_name_or_path=deep_model, dataset_name=chat_file, **given)
        found[name] = outcome(assemble(config))
    for name in ways:
        same(found[name], found["no checkpoints"])


@pytest.mark.parametrize("kind", ["DPO", "KTO", "Reward"])
def test_preferences_end_alike_with_their_reference(tmp_path, deep_model, pairs, kind):
    found = {}
    for name in ("no checkpoints", "all of it"):
        config = getattr(burnish, f"{kind}Config")(str(tmp_path / name), **{**BASE, **WAYS[name]})
        trainer = getattr(burnish, f"{kind}Trainer")(deep_model, args=config, train_dataset=pairs)
        found[name] = outcome(trainer.run)
    same(found["all of it"], found["no checkpoints"])


def test_a_run_says_what_it_does_with_memory(tmp_path, deep_model, chat_file, capsys):
    given = {**BASE, "activation_offloading": True, "tile_tokens": 0}
    run = assemble(SFTConfig(str(tmp_path / "run"), model_name_or_path=deep_model, dataset_name=chat_file, **given))
    assert "memory   5 layers checkpointed  4 of 5 checkpoints on the host\n" in capsys.readouterr().out
    run.train()
    assert "GiB on the host for checkpoints, plain copies" in capsys.readouterr().out


def test_a_run_that_fails_in_the_middle_lets_go_of_its_checkpoints(tmp_path, deep_model, chat_file):
    config = SFTConfig(
        str(tmp_path / "run"), model_name_or_path=deep_model, dataset_name=chat_file, **BASE, activation_offloading=True
    )
    run = assemble(config)
    weight = run.model.model.layers[3].mlp.gate_proj.weight

    def fail(parameter):
        assert len(run.memory.arena.live) == 3  # of layers 0 to 2
        raise KeyboardInterrupt

    weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert not run.memory.arena.live


@pytest.mark.parametrize("name", ["activation_offloading", "keep_attention", "tile_tokens"])
def test_keys_about_checkpoints_need_checkpoints(name):
    with pytest.raises(UserError, match="gradient_checkpointing is off"):
        SFTConfig(gradient_checkpointing=False, **{name: 64 if name == "tile_tokens" else True})


def test_attention_is_kept_by_itself_only_where_there_is_a_host_to_move_it_to():
    config = SFTConfig("out", max_length=16384)
    assert from_config(config, cuda=True).keep_attention
    assert not from_config(config, cuda=False).keep_attention
    assert from_config(SFTConfig("out", max_length=16384, keep_attention=True), cuda=False).keep_attention
    assert not from_config(SFTConfig("out", max_length=8192), cuda=True).keep_attention
