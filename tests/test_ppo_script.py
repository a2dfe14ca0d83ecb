"""A script's side of PPO: the loop that TRL 0.8's users write, and what does not fit, in one line each."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from burnish import AutoModelForCausalLMWithValueHead, LengthSampler, PPOConfig, PPOTrainer, UserError


def llama() -> LlamaForCausalLM:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **shape))


def with_head(**given) -> AutoModelForCausalLMWithValueHead:
    return AutoModelForCausalLMWithValueHead.from_pretrained(llama(), **given)


def lora():
    import peft

    return peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")


def test_the_script_of_the_documentation(tmp_path, tiny_model):
    """A PPO script as TRL 0.8's users have it: a data set, a loader, generate, score, step, log, save."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    config = PPOConfig(model_name=tiny_model, learning_rate=1.41e-5, batch_size=4, mini_batch_size=2,
                       project_kwargs={"logging_dir": str(tmp_path / "logs")})  # fmt: skip
    model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
    ref_model = AutoModelForCausalLMWithValueHead.from_pretrained(config.model_name)
    tokenizer = AutoTokenizer.from_pretrained(config.model_name)
    tokenizer.pad_token = tokenizer.eos_token

    def tokenize(sample):
        sample["input_ids"] = tokenizer.encode(sample["review"])[:6]
        sample["query"] = tokenizer.decode(sample["input_ids"])
        return sample

    texts = ["the quick brown fox", "seven small cats watch", "a green hill", "dogs and fox", "ten lazy dogs"] * 2
    dataset = Dataset.from_dict({"review": texts}).map(tokenize, batched=False)
    dataset.set_format(type="torch")

    def collator(data):
        return {key: [d[key] for d in data] for key in data[0]}

    ppo_trainer = PPOTrainer(config, model, ref_model, tokenizer, dataset=dataset, data_collator=collator)
    assert ppo_trainer.accelerator.device.type in ("cpu", "cuda")
    generation_kwargs = {"min_length": -1, "top_k": 0.0, "top_p": 1.0, "do_sample": True,
                         "pad_token_id": tokenizer.eos_token_id}  # fmt: skip
    output_length_sampler = LengthSampler(3, 6)
    steps = 0
    for batch in ppo_trainer.dataloader:
        assert set(batch) == {"input_ids", "query"}
        query_tensors = batch["input_ids"]
        response_tensors = []
        for query in query_tensors:
            generation_kwargs["max_new_tokens"] = output_length_sampler()
            response = ppo_trainer.generate(query, **generation_kwargs)
            response_tensors.append(response.squeeze()[len(query) :])
        batch["response"] = [tokenizer.decode(r.squeeze()) for r in response_tensors]
        rewards = [torch.tensor(float(len(text))) for text in batch["response"]]
        stats = ppo_trainer.step(query_tensors, response_tensors, rewards)
        ppo_trainer.log_stats(stats, batch, rewards)
        steps += 1
    assert steps == 2, "10 rows are two batches of 4; the last is not full"
    ppo_trainer.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLMWithValueHead.from_pretrained(str(tmp_path / "saved"))
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    AutoTokenizer.from_pretrained(tmp_path / "saved")
    records = [json.loads(line) for line in (tmp_path / "logs" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert records[1]["ppo/loss/policy"] == stats["ppo/loss/policy"] and records[1]["response"] == batch["response"]
    assert records[1]["env/reward_mean"] == pytest.approx(np.mean([float(r) for r in rewards]))
    with pytest.raises(UserError, match=r"the batch has no column answer"):
        ppo_trainer.log_stats(stats, batch, rewards, columns_to_log=["answer"])


@pytest.fixture(scope="module")
def small():
    return PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=4), with_head())


ROWS = [[torch.arange(3, 3 + n) for n in sizes] for sizes in ((2, 5, 3, 4), (3, 2, 6, 2))]
SCORES = [1.0, 0.0, 0.5, 2.0]
NO_TOKEN = torch.zeros(0, dtype=torch.long)
BAD = {
    "3 queries, and batch_size is 4": (ROWS[0][:3], ROWS[1], SCORES),
    "5 responses, and batch_size is 4": (ROWS[0], [*ROWS[1], ROWS[1][0]], SCORES),
    "3 scores, and batch_size is 4": (*ROWS, SCORES[:3]),
    "responses[2]: is empty": (ROWS[0], [*ROWS[1][:2], NO_TOKEN, ROWS[1][3]], SCORES),
    "queries[0]: is empty": ([NO_TOKEN, *ROWS[0][1:]], ROWS[1], SCORES),
    "queries[1]: a Tensor of torch.float32": ([ROWS[0][0], torch.ones(3), *ROWS[0][2:]], ROWS[1], SCORES),
    "responses[0]: a list. Give a 1-D tensor": (ROWS[0], [[5, 6], *ROWS[1][1:]], SCORES),
    "responses[3]: holds token ids from 64 to 64, the model has 64": (
        ROWS[0],
        [*ROWS[1][:3], torch.tensor([64])],
        SCORES,
    ),
    "queries is a Tensor. Give a list": (torch.ones(4, 3, dtype=torch.long), ROWS[1], SCORES),
    "scores[1]: [nan] is no finite number": (*ROWS, [1.0, math.nan, 0.0, 0.0]),
    "scores[0]: [1.0, 2.0] is no finite number": (*ROWS, [torch.tensor([1.0, 2.0]), *SCORES[1:]]),
    "response_masks[0]: no mask for a response": (*ROWS, SCORES, [torch.zeros(len(r)) for r in ROWS[1]]),
    "response_masks[1]: no mask for a response": (*ROWS, SCORES, [torch.ones(len(ROWS[1][0]))] * 4),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_rows_are_one_line_each_and_change_nothing(small, message):
    before = copy.deepcopy(small.model.state_dict())
    with pytest.raises(UserError) as caught:
        small.step(*BAD[message])
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in small.model.state_dict().items())


def test_a_single_token_in_all_is_refused():
    trainer = PPOTrainer(PPOConfig(batch_size=1, mini_batch_size=1), with_head())
    with pytest.raises(UserError, match=r"one token in all has no advantage"):
        trainer.step([torch.tensor([5])], [torch.tensor([6])], [1.0])


def test_bad_constructors():
    model = with_head()
    for given, message in (
        ({"model": llama()}, "LlamaForCausalLM has no value head. Load it with AutoModelForCausalLMWithValueHead"),
        ({"model": None}, "NoneType has no value head"),
        ({"model": model, "config": {"batch_size": 4}}, "config is a dict. Use PPOConfig"),
        ({"model": model, "ref_model": model}, "the reference model is the model that is trained"),
        (
            {"model": with_head(peft_config=lora()), "num_shared_layers": 1},
            "num_shared_layers: the reference is the model",
        ),
    ):
        with pytest.raises(UserError) as caught:
            PPOTrainer(**{"config": PPOConfig(batch_size=4, mini_batch_size=4), **given})
        assert message in str(caught.value) and "\n" not in str(caught.value)


def test_generation_without_a_padding_token():
    model = with_head()
    model.pretrained_model.generation_config.eos_token_id = model.pretrained_model.generation_config.pad_token_id = None
    trainer = PPOTrainer(PPOConfig(batch_size=4, mini_batch_size=4), model)
    with pytest.raises(UserError, match=r"generate\(pad_token_id=...\): no padding token. Give one"):
        trainer.generate(ROWS[0], max_new_tokens=2)
    assert len(trainer.generate(ROWS[0], max_new_tokens=2, pad_token_id=0, return_prompt=False)[3]) == 2
