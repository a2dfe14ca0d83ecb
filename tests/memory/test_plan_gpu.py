"""On a GPU the predicted peak of a step is within 5 % of the measured one, and the probe ends in time.

Run with: pytest -m gpu tests/memory
"""

import time

import pytest
import torch
from metering import LORA, build, packed

from burnish.config.fields import SFTConfig
from burnish.logprobs import token_nll
from burnish.memory.bytes import phases, total
from burnish.memory.layers import install
from burnish.memory.plan import setup_for
from burnish.memory.probe import probe
from burnish.memory.settings import Memory
from burnish.memory.shape import describe
from burnish.memory.time import Load
from burnish.model.head import read_head
from burnish.optim.updater import Updater

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
SIZES = {"hidden_size": 2048, "intermediate_size": 7168, "num_attention_heads": 16, "num_key_value_heads": 4,
         "head_dim": 128, "vocab_size": 32000}  # fmt: skip
LENGTHS = (40000, 9000, 5000)
MODES = [
    Memory(False),
    Memory(True),
    Memory(True, keep_attention=True),
    Memory(True, 2, tile=16384),
    Memory(True, offload=True),
    Memory(True, 2, keep_attention=True, tile=16384, offload=True),
]


@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_peak_of_a_step(name, trained):
    assert "lora" in LORA
    model = build(name, torch.bfloat16, trained, layers=8, **SIZES).cuda()
    config = SFTConfig(dtype="bfloat16", max_grad_norm=0)
    setup = setup_for(config, describe(model))
    updater = Updater(model, {}, config, 1)
    batch = packed(LENGTHS).to("cuda")
    for memory in MODES:
        installed = install(model, memory)
        for _ in range(2):  # the second finds its buffers made
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            with installed.step(), updater.rehearsing():
                token_nll(model, read_head(model), batch)[0].backward()
        measured = torch.cuda.max_memory_allocated()
        planned = phases(setup, Load(LENGTHS), memory)
        predicted = max(total(ledger) for phase, ledger in planned.items() if phase != "update")
        assert predicted == pytest.approx(measured, rel=0.05), (memory, {k: total(v) for k, v in planned.items()})


def test_the_probe_ends_within_twenty_seconds():
    began = time.perf_counter()
    rates = probe(torch.device("cuda"))
    assert time.perf_counter() - began < 20
    assert rates.linear > rates.attention > 1e13 and rates.memory > rates.to_host > 1e9
