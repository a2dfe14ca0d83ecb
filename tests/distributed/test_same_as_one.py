"""Several processes train as one does: the same losses, gradient norms and weights, whatever is divided among them."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from burnish import BCOConfig, CPOConfig, DPOConfig, KTOConfig, ORPOConfig, RewardConfig, SFTConfig
from burnish.parallel.sequence import _divisible
from burnish.run import train

pytestmark = pytest.mark.distributed
STEPS = 5
COMMON = {
    "optim": "sgd",  # weights are then the sum of all gradients
    "learning_rate": 0.005,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.5,
    "per_device_train_batch_size": 3,
    "max_length": 96,
    "allow_truncation": True,
    "max_steps": STEPS,
    "logging_steps": 1,
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
}
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0, "lora_target_modules": "all-linear"}
# name: (processes, keys)
DIVIDED = {
    "ddp 2": (2, {}),  # as the plan says
    "ddp 4": (4, {"parallel": "ddp"}),
    "fsdp 2": (2, {"parallel": "fsdp"}),
    "fsdp 4": (4, {"parallel": "fsdp", "gradient_checkpointing": True}),
    "slices 2": (2, {"parallel": "ddp", "sequence_parallel": 2}),
    "fsdp 2 x slices 2": (4, {"parallel": "fsdp", "sequence_parallel": 2, "gradient_checkpointing": True}),
    "lora ddp 2": (2, {"parallel": "ddp", **LORA}),
    "lora fsdp 2": (2, {"parallel": "fsdp", **LORA}),
}


def configurations(folder: Path, model: str, files: dict[str, str], **keys) -> list:
    """SFT, DPO and KTO on rows of uneven lengths whose number no window divides."""
    kinds = [("sft", SFTConfig, {}), ("dpo", DPOConfig, {"beta": 0.1}), ("kto", KTOConfig, {"beta": 0.1})]
    return [
        kind(
            str(folder / name),
            model_name_or_path=model,
            dataset_name=files[name],
            **{**COMMON, **own, **keys},
        )
        for name, kind, own in kinds
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """59 rows of each kind, of uneven lengths: no number of processes divides them."""
    rng, folder = random.Random(5), tmp_path_factory.mktemp("rows")
    words = "one two three four five six seven eight nine ten".split()

    def say(most: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(1, most)))

    rows: dict[str, list[dict]] = {"sft": [], "dpo": [], "kto": []}
    for number in range(59):
        prompt, good, bad = say(12), say(40 if number % 7 == 0 else 9), say(15)
        rows["sft"].append({"prompt": prompt, "completion": f" {good}"})
        rows["dpo"].append({"prompt": prompt, "chosen": f" {good}", "rejected": f" {bad}"})
        rows["kto"].append({"prompt": prompt, "completion": f" {good}", "label": number % 3 > 0})
    for kind, lines in rows.items():
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return {kind: str(folder / f"{kind}.jsonl") for kind in rows}


@pytest.mark.parametrize("name", DIVIDED)
def test_losses_gradients_and_weights_are_those_of_one_process(name, ranks, records, files, tiny_model, tmp_path):
    size, keys = DIVIDED[name]
    shares = size // keys.get("sequence_parallel", 1)
    alone = {key: value for key, value in keys.items() if key not in ("parallel", "sequence_parallel")}
    for config in configurations(tmp_path / "one", tiny_model, files, gradient_accumulation_steps=2 * shares, **alone):
        train(config)
    divided = configurations(tmp_path / "many", tiny_model, files, gradient_accumulation_steps=2, **keys)
    ranks(size, lambda: [train(config) for config in divided]).finish()
    for kind in ("sft", "dpo", "kto"):
        one, many = tmp_path / "one" / kind, tmp_path / "many" / kind
        assert len(records(many)) == STEPS
        for ours, theirs in zip(records(many), records(one), strict=True):
            assert ours["num_tokens"] == theirs["num_tokens"]
            for number in ("loss", "grad_norm"):
                assert ours[number] == pytest.approx(theirs[number], rel=1e-6), (kind, number, ours["step"])
            for number in (key for key in theirs if key.startswith(("rewards", "logps", "kl", "entropy", "mean_"))):
                # differences of sums of some hundred float32 log-probs
                assert ours[number] == pytest.approx(theirs[number], rel=1e-5, abs=1e-5), (kind, number, ours["step"])
        (file,) = one.glob("*model.safetensors")
        ours, theirs = load_file(many / file.name), load_file(file)
        assert ours.keys() == theirs.keys()
        for weight, value in theirs.items():
            torch.testing.assert_close(ours[weight], value, rtol=0, atol=1e-6)


OTHERS = {
    "orpo": (ORPOConfig, "dpo", {}),
    "simpo": (CPOConfig, "dpo", {"loss_type": "simpo", "cpo_alpha": 0.5}),
    "aot": (DPOConfig, "dpo", {"loss_type": ["aot", "aot_unpaired", "sft"], "loss_weights": [1.0, 0.5, 0.1]}),
    "cached": (DPOConfig, "dpo", {"precompute_ref_log_probs": True, "beta": 0.1}),
    "bco": (BCOConfig, "kto", {}),
    "reward": (RewardConfig, "dpo", {"center_rewards_coefficient": 0.01}),
    "packed": (SFTConfig, "sft", {"packing": True, "per_device_train_batch_size": 1}),
    "dft": (SFTConfig, "sft", {"loss_type": "dft", "eval_strategy": "steps", "eval_steps": 2, "test_split_size": 7}),
}


@pytest.mark.parametrize(
    "keys", [{"parallel": "ddp"}, {"parallel": "fsdp", "sequence_parallel": 2}], ids=["2", "2 x 2"]
)
def test_what_looks_across_a_window_sees_all_of_it(keys, ranks, records, files, tiny_model, tmp_path):
    def configs(folder: str, **more) -> list:
        return [
            kind(
                str(tmp_path / folder / name),
                model_name_or_path=tiny_model,
                dataset_name=files[rows],
                **{**COMMON, "max_steps": 3, **own, **more},
            )
            for name, (kind, rows, own) in OTHERS.items()
        ]

    for config in configs("one", gradient_accumulation_steps=2):
        train(config)
    divided = configs("many", **keys)
    ranks(2 * keys.get("sequence_parallel", 1), lambda: [train(config) for config in divided]).finish()
    for name in OTHERS:
        one, many = records(tmp_path / "one" / name), records(tmp_path / "many" / name)
        for ours, theirs in zip(many, one, strict=True):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-6), (name, ours["step"])
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=5e-6), (name, ours["step"])
    one, many = (evaluated(tmp_path / folder / "dft") for folder in ("one", "many"))
    assert len(one) == len(many) == 1
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert many[0][name] == pytest.approx(one[0][name], rel=2e-6), name


def evaluated(folder: Path) -> list[dict]:
    """The evaluations of a run, whose 7 rows no number of processes divides."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if "eval_loss" in record and "train_runtime" not in record]


@pytest.mark.parametrize("heads", [(9, 3, 2), (4, 1, 2), (6, 2, 4), (8, 2, 4), (3, 3, 2)])
def test_heads_that_the_processes_can_t_share_out_give_the_same_attention(heads):
    queries, keys, p = heads
    torch.manual_seed(0)
    q, k, v = (torch.randn(5, n, 8, dtype=torch.float64) for n in (queries, keys, keys))
    more_q, more_k, more_v = _divisible(q, k, v, p)
    assert more_q.shape[1] % p == more_k.shape[1] % p == 0 and more_q.shape[1] % more_k.shape[1] == 0

    def attended(q, k, v):
        repeated = (x.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*repeated, is_causal=True).transpose(0, 1)

    assert torch.equal(attended(more_q, more_k, more_v)[:, :queries], attended(q, k, v))
    share = more_q.shape[1] // p  # each process's heads read only its own keys
    for number in range(p):
        mine = slice(number * share, (number + 1) * share)
        own = slice(number * (more_k.shape[1] // p), (number + 1) * (more_k.shape[1] // p))
        part = attended(more_q[:, mine], more_k[:, own], more_v[:, own])
        assert torch.equal(part, attended(more_q, more_k, more_v)[:, mine])


def test_the_plan_divides_a_model_that_does_not_fit(monkeypatch, files, tiny_model, tmp_path):
    from burnish.memory import forecast
    from burnish.parallel.world import World
    from burnish.run.rows import read_batches

    config = SFTConfig(str(tmp_path), model_name_or_path=tiny_model, dataset_name=files["sft"], max_length=512)
    batches, cpu = read_batches(config), torch.device("cpu")
    monkeypatch.setattr(forecast, "world", lambda: World(size=2))
    assert forecast.strategy(config, batches, cpu) == "ddp"
    own = forecast.machine_of(cpu)
    whole = forecast.Machine(dataclasses.replace(own.card, memory=1.0), 1.0)
    monkeypatch.setattr(forecast, "machine_of", lambda device: whole)
    assert forecast.strategy(config, batches, cpu) == "fsdp"
    config.model_name_or_path = str(tmp_path / "absent")
    assert forecast.strategy(config, batches, cpu) == "ddp"  # loading it will say what is wrong
