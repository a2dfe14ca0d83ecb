"""Several processes in a plan: parts, gathered layers and exchanges, against counts by hand and a sharded model."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from metering import Saved, build, llama_8b, packed, place_of

from burnish.config.errors import UserError
from burnish.config.fields import SFTConfig
from burnish.config.preference import CPOConfig, DPOConfig
from burnish.logprobs import token_scores
from burnish.memory.bytes import Setup, head_work, phases, state
from burnish.memory.layers import install
from burnish.memory.plan import Machine, choose, longest, options, reference_of, settings, setup_for, weigh
from burnish.memory.saved import Place, ledger
from burnish.memory.settings import Memory
from burnish.memory.shape import describe, shape_of
from burnish.memory.spread import BETWEEN, NVLINK, Spread, communication, gathered, scattered
from burnish.memory.time import CARDS, GIB, Load, flops
from burnish.model.head import read_head
from burnish.parallel.shards import shard

H200 = Machine(CARDS["h200"], 1024 * GIB)
LAYER, ENDS, ALL = 218_112_000, 2 * 128256 * 4096, 8_030_261_248  # parameters of Llama-3.1-8B


@pytest.fixture(scope="module")
def eight_billion(tmp_path_factory):
    config = SFTConfig(model_name_or_path=llama_8b(tmp_path_factory.mktemp("llama")), max_length=1 << 15)
    return config, shape_of(config)


def spread_setup(eight_billion, *spread) -> Setup:
    config, shape = eight_billion
    return setup_for(config, shape, spread=Spread(*spread))


def test_parts_are_an_eighth_and_two_units_are_whole(eight_billion):
    setup = spread_setup(eight_billion, 8, "fsdp")
    shape, memory = setup.shape, Memory(True, segment=2)
    assert sum(state(setup).values()) == pytest.approx(16 * ALL / 8, rel=1e-6)
    assert sum(state(spread_setup(eight_billion, 8, "ddp")).values()) == 18 * ALL  # bfloat16 twins beside the masters
    assert gathered(shape, setup.spread, memory, 2) == 2 * (ENDS + 2 * 2 * LAYER)
    assert scattered(shape, setup.spread, memory, 2, accumulates=False) == pytest.approx((2 + 4) * 2 * LAYER, rel=1e-4)
    whole = scattered(shape, setup.spread, memory, 2, accumulates=True)
    assert whole - scattered(shape, setup.spread, memory, 2, accumulates=False) == 4 * ALL
    backward = phases(setup, Load((4096,)), memory)["backward"]
    assert backward["gathered parameters"] == 2 * (ENDS + 4 * LAYER) and backward["gradients to scatter"]


def test_a_sharded_model_holds_what_is_planned():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = build("llama", layers=4)
    setup = Setup(describe(model), Place(4, 0, cuda=False), bf16=False, spread=Spread(4, "fsdp"))
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        shard(model, 1, torch.float32, torch.device("cpu"))
        held = sum(p.to_local().nbytes for p in model.parameters())
    finally:
        dist.destroy_process_group()
    assert state(setup)["weights"] == pytest.approx(held, rel=0.01)  # parts are rows: some have one more


@pytest.mark.parametrize(("size", "link"), [(2, NVLINK), (8, NVLINK), (16, BETWEEN)])
def test_communication_by_hand(eight_billion, size, link):
    load, memory = Load((32768,)), Memory(True)
    shape, others = eight_billion[1], (size - 1) / size
    ask = {"itemsize": 2, "micro": 3, "compute": 1e9}
    summed = communication(shape, Spread(size, "ddp"), load, memory, **ask)
    assert summed == pytest.approx(2 * others * 4 * ALL / link)  # once an update, float32
    hidden = communication(shape, Spread(size, "fsdp"), load, memory, **ask)
    gather, scatter = others * 2 * ALL / link, others * 4 * ALL / link
    assert hidden == pytest.approx((3 * 2 * gather + scatter) / 32)  # a unit of each pass is waited for
    shown = communication(shape, Spread(size, "fsdp"), load, memory, **{**ask, "compute": 0.0})
    assert shown == pytest.approx(hidden + 3 * 2 * gather + scatter)
    assert communication(shape, Spread(), load, memory, **ask) == 0


def test_processes_that_share_a_document_do_what_one_does(eight_billion):
    whole, part = Load((1 << 17, 999)), Load((1 << 17, 999), shared=8)
    alone, shared = (flops(eight_billion[1], load, Memory(True)) for load in (whole, part))
    assert 8 * shared.model == pytest.approx(alone.model, rel=1e-4)
    ask = {"itemsize": 2, "micro": 1, "compute": 1e9}
    sliced, plain = (communication(eight_billion[1], Spread(8, "fsdp", p), part, Memory(True), **ask) for p in (8, 1))
    assert sliced - plain == pytest.approx(3 * 7 / 8 * part.tokens * 32 * (2 * 4096 + 2 * 1024) * 2 / NVLINK)
    assert not any(memory.keep_attention for memory in settings(spread_setup(eight_billion, 8, "fsdp", 8)))


def test_more_processes_reach_farther_and_share_the_host(eight_billion):
    memory = Memory(True, tile=16384, offload=True)
    reach = [longest(spread_setup(eight_billion, n, "fsdp", n), memory, H200) for n in (2, 4, 8)]
    assert reach[0] < reach[1] < reach[2]
    setup = spread_setup(eight_billion, 8, "fsdp")
    less = longest(setup, memory, dataclasses.replace(H200, cards=8))
    assert less < longest(setup, memory, H200)
    one, eight = (choose(options(spread_setup(eight_billion, n, "ddp"), Load((4096,)), H200)) for n in (1, 8))
    assert one is None and eight is None  # 18 bytes a parameter don't fit
    found = choose(options(setup, Load((4096,)), H200))
    assert found is not None and found.tokens_a_second == pytest.approx(8 * 4096 / found.seconds.total)


def test_which_way_to_spread(eight_billion):
    from burnish.verbs.plan import Request
    from burnish.verbs.planned import plan_for, spreads

    config = eight_billion[0]
    base = {"model_name_or_path": config.model_name_or_path, "max_length": 4096, "per_device_train_batch_size": 1}
    for keys, strategy in (({"use_peft": True}, "ddp"), ({}, "fsdp"), ({"parallel": "ddp"}, "ddp")):
        planned = plan_for(SFTConfig(**base, nproc=8, **keys), Request(), H200)
        assert planned.setup.spread == Spread(8, strategy) and planned.machine.cards == 8
        assert (planned.chosen is None) == ("parallel" in keys)
        assert any("simulated" in line for line in planned.head())
    assert spreads(config) == [Spread()]
    with pytest.raises(UserError, match="8 processes can't be divided into groups of 3"):
        spreads(SFTConfig(**base, nproc=8, sequence_parallel=3))


# ---- objectives on log-probs


@pytest.mark.parametrize("trained", ["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probs_keep_what_the_head_says(trained, dtype):
    """Between forward and backward of any objective but SFT's; rows' sums are counted generously."""
    model = build("llama", dtype, trained)
    shape, load = describe(model), Load((900, 300))
    place = place_of(model, shape)
    install(model, Memory(True))
    with Saved(model) as meter:
        token_scores(model, read_head(model), packed(load.lengths)).logps.sum()
    setup = Setup(shape, place, loss_known=False)
    planned = sum(ledger(shape, load, Memory(True), place).values()) + head_work(setup, load).kept_bytes
    assert 0 <= planned - meter.total <= 60 * load.valid


def test_whose_reference_it_is(eight_billion):
    name = eight_billion[0].model_name_or_path
    given = {"model_name_or_path": name, "max_length": 4096}
    copied = DPOConfig(**given)
    found = [reference_of(c) for c in (copied, DPOConfig(**given, use_peft=True), eight_billion[0], CPOConfig(**given))]
    assert found == ["copy", "policy", "", ""]
    assert [
        reference_of(DPOConfig(**given, **{key: True})) for key in ("precompute_ref_log_probs", "reference_free")
    ] == ["", ""]
    load = Load((4096, 4096))
    setup = setup_for(copied, shape_of(copied))
    alone = dataclasses.replace(setup, reference="")
    assert not setup.loss_known and state(setup)["reference"] == 2 * ALL
    assert sum(state(setup).values()) - sum(state(alone).values()) == 2 * ALL
    assert "reference" in phases(setup, load, Memory(True)) and "reference" not in phases(alone, load, Memory(True))
    more, less = (weigh(each, load, Memory(True), H200).seconds for each in (setup, alone))
    forward = flops(setup.shape, load, Memory(True))
    expected = forward.forward / 600e12 + forward.attention / 450e12 + forward.head / 3 / 600e12
    assert more.compute - less.compute == pytest.approx(expected, rel=0.1)  # what norms move comes on top
