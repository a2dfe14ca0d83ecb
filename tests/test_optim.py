"""Optimizers that leave room: their bytes, their arithmetic beside today's masters, and the step inside backward."""

import json
import sys
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from burnish import UserError
from burnish.config.fields import OPTIMIZERS, SFTConfig
from burnish.kernels.adamw import join_master, split_master
from burnish.optim import BYTES_PER_PARAMETER, bytes_per_parameter
from burnish.optim.bf16 import AdamWBF16
from burnish.optim.build import PACKAGES, check_optimizer
from burnish.optim.in_backward import InBackward
from burnish.optim.updater import Updater, cast_parameters

BF16, FLOAT = torch.bfloat16, torch.float32
HERE = sorted(set(OPTIMIZERS) - set(PACKAGES))


def settings(**given) -> SFTConfig:
    base = {"learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "cosine"}
    base |= {"adam_epsilon": 1e-6} if given.get("optim", "adamw").startswith("adamw") else {}
    inside = {"max_grad_norm": 0} if given.get("optimizer_in_bwd") else {}
    return SFTConfig("unused", **{**base, **inside, **given})


class Net(torch.nn.Module):
    """Tied matrices, vectors and a matrix of more than 4096 elements; the loss depends on every weight and the step."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.table = torch.nn.Embedding(80, 64)
        self.inner = torch.nn.Linear(64, 96)
        self.norm = torch.nn.LayerNorm(96)
        self.outer = torch.nn.Linear(96, 64, bias=False)
        self.head = torch.nn.Linear(64, 80, bias=False)
        self.head.weight = self.table.weight

    def loss(self, step: int) -> torch.Tensor:
        ids = torch.randint(0, 80, (40,), generator=torch.Generator().manual_seed(step))
        hidden = self.outer(torch.relu(self.norm(self.inner(self.table(ids)))))
        return torch.nn.functional.cross_entropy(self.head(hidden).float(), ids.roll(1))


def train(config, steps: int, *, bf16: bool = True, model: Net | None = None, start: int = 0, resumed=None, after=None):
    """(model, updater, norms) after updates start+1 .. steps; `resumed` is what `state` of another updater gave."""
    model = model or Net()
    masters = cast_parameters(model, BF16, config.optim) if bf16 else {}
    updater = Updater(model, masters, config, 12)
    if resumed is not None:
        updater.load(*resumed)
    norms = []
    for step in range(start, steps):
        for part in range(config.gradient_accumulation_steps):
            model.loss(step * config.gradient_accumulation_steps + part).backward()
        norms.append(updater.step())
        if after is not None:
            after(model, updater)
    return model, updater, norms


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def size(tensors) -> int:
    """Bytes of tensors of one element a parameter or more; step counters don't count."""
    return sum(t.numel() * t.element_size() for t in tensors if t.numel() > 1)


@pytest.mark.parametrize("inside", [False, True], ids=["after", "inside"])
@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "float32"])
@pytest.mark.parametrize("optim", [name for name in HERE if name != "adafactor"])
def test_bytes_a_parameter_are_as_documented(optim, bf16, inside):
    if not bf16 and optim in ("adamw_bf16", "adamw_bf16_sr"):
        with pytest.raises(UserError, match="takes bfloat16 parameters, the model has torch.float32"):
            train(settings(optim=optim), 1, bf16=False)
        return
    model, updater, _ = train(settings(optim=optim, optimizer_in_bwd=inside), 1, bf16=bf16)
    count, promised = sum(p.numel() for p in model.parameters()), bytes_per_parameter(optim, bf16=bf16)
    states = [t for entry in updater.optimizer.state.values() for name, t in entry.items() if torch.is_tensor(t)]
    low = [entry["low"] for entry in updater.optimizer.state.values() if "low" in entry]
    twins = [p for p in updater.updated if all(p is not own for own in model.parameters())]
    assert size([*model.parameters(), *twins, *low]) == promised.weights * count
    assert size(states) - size(low) == promised.states * count
    model.loss(5).backward()
    held = [p.grad for p in {*model.parameters(), *twins} if p.grad is not None]
    expected = bytes_per_parameter(optim, bf16=bf16, in_backward=inside).gradient
    assert size(held) == expected * count
    assert BYTES_PER_PARAMETER[optim][inside] == bytes_per_parameter(optim, in_backward=inside)


def test_every_optimizer_has_its_bytes():
    assert set(BYTES_PER_PARAMETER) == set(OPTIMIZERS)
    totals = {name: (before.total, inside.total) for name, (before, inside) in BYTES_PER_PARAMETER.items()}
    assert totals["adamw_bf16"] == (10, 8) and totals["adamw_bf16_sr"] == (8, 6)
    assert totals["adamw_torch_fused"] == (18, 14)
    assert bytes_per_parameter("adamw_bf16", accumulates=True).total == 12


@pytest.mark.parametrize(
    ("given", "clip"),
    [
        ({}, 0.0),
        ({}, 0.3),
        ({"gradient_accumulation_steps": 3}, 0.0),
        ({"gradient_accumulation_steps": 3}, 0.3),
        ({"optimizer_in_bwd": True}, 0.0),
    ],
)
def test_adamw_bf16_is_the_masters_path_bit_for_bit_but_for_its_moments(given, clip, monkeypatch):
    """With float32 moments, and with the masters' parameters rounded as adamw_bf16 rounds (ties differ from torch)."""
    plain = AdamWBF16.__init__
    monkeypatch.setattr(AdamWBF16, "__init__", lambda *a, **k: plain(*a, **k, moments=FLOAT))
    given = {**given, "max_grad_norm": clip}

    def round_alike(model, updater):
        for parameter, master in zip(model.parameters(), updater.updated, strict=True):
            parameter.data.copy_(split_master(master.data)[0])

    masters = settings(optim="adamw_torch_fused", **given)
    model = Net()
    expected, updater, norms = train(masters, 12, model=model, after=round_alike)
    got, own, own_norms = train(settings(optim="adamw_bf16", **given), 12)
    assert same_weights(expected, got)
    for parameter, master in zip(got.parameters(), updater.updated, strict=True):
        assert torch.equal(join_master(parameter, own.optimizer.state[parameter]["low"]), master)
    assert torch.allclose(torch.stack(norms), torch.stack(own_norms), rtol=1e-6)
    if clip:
        assert min(norms) > clip, "clipping must have had something to do"


@pytest.mark.parametrize("optim", ["adamw_bf16", "adamw_bf16_sr"])
def test_gradients_of_micro_batches_add_up_in_float32(optim):
    """A thousand small gradients on a large one: bfloat16 would keep none of them."""
    model = torch.nn.Linear(4, 4, bias=False).to(BF16)
    updater = Updater(model, {}, settings(optim=optim, gradient_accumulation_steps=4), 3)
    for scale in (1.0, 2**-12, 2**-12, 2**-12):
        (model.weight * scale).sum().backward()
    assert model.weight.grad is None
    assert torch.equal(updater._sums[model.weight], torch.full((4, 4), 1 + 3 * 2**-12))
    norm = updater.step()
    assert norm == pytest.approx(4 * (1 + 3 * 2**-12), rel=1e-6) and not updater._sums


def test_another_seed_rounds_otherwise_and_the_same_seed_the_same():
    runs = [train(settings(optim="adamw_bf16_sr", seed=seed), 4)[0] for seed in (1, 1, 2)]
    assert same_weights(runs[0], runs[1]) and not same_weights(runs[0], runs[2])


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "float32"])
@pytest.mark.parametrize("optim", HERE)
def test_inside_backward_the_weights_are_the_same_bit_for_bit(optim, bf16):
    if not bf16 and optim in ("adamw_bf16", "adamw_bf16_sr"):
        return  # refused, see above
    given = {"optim": optim, "max_grad_norm": 0, "warmup_steps": 3}
    one, updater, norms = train(settings(**given), 8, bf16=bf16)
    other, inside, inner = train(settings(**given, optimizer_in_bwd=True), 8, bf16=bf16)
    assert same_weights(one, other)
    assert torch.equal(torch.stack(norms), torch.stack(inner))
    tensors, got = updater.state()[0], inside.state()[0]
    assert tensors.keys() == got.keys() and all(torch.equal(tensors[name], got[name]) for name in tensors)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_bf16"])
def test_inside_backward_one_gradient_lives_at_a_time(optim, monkeypatch):
    live, plain = [], InBackward.step

    def watch(self, parameter):
        own = [*self._groups, *self._masters]
        live.append(sum(p.grad is not None for p in own))
        plain(self, parameter)
        assert all(p.grad is None for p in own)

    monkeypatch.setattr(InBackward, "step", watch)
    model, _, _ = train(settings(optim=optim, optimizer_in_bwd=True), 2)
    assert live == [1] * (2 * len(list(model.parameters())))


@pytest.mark.parametrize("optim", ["sgd", "adamw_bf16", "adamw_torch_fused"])
def test_inside_backward_nothing_infinite_is_applied(optim):
    config = settings(optim=optim, optimizer_in_bwd=True, weight_decay=0.0)
    model = Net()
    updater = Updater(model, cast_parameters(model, BF16, optim), config, 12)
    model.loss(0).backward()
    assert updater.step().isfinite()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    poison = model.norm.weight.register_hook(lambda gradient: torch.full_like(gradient, torch.inf))
    model.loss(1).backward()
    assert updater.step().isnan(), "what the loop stops at"
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert all(p.isfinite().all() for p in model.parameters())
    assert "outer.weight" in changed, "its gradient came first, and was sound"
    if optim == "sgd":  # no momentum: a gradient of zeros moves nothing
        assert changed <= {"outer.weight", "norm.bias"}  # of the bias and the weight either may come first
    poison.remove()
    model.loss(2).backward()
    assert updater.step().isnan(), "one later sound step must not hide it from a log gate that looks rarely"


@pytest.mark.parametrize(
    ("given", "what", "mend"),
    [
        ({"gradient_accumulation_steps": 2}, "updates after every micro-batch", "gradient_accumulation_steps: 1"),
        ({"max_grad_norm": 1.0}, "can't clip to max_grad_norm 1", "max_grad_norm: 0"),
    ],
)
def test_what_cannot_be_done_inside_backward_is_refused(given, what, mend):
    with pytest.raises(UserError, match=what) as error:
        settings(optimizer_in_bwd=True, **given)
    assert str(error.value).endswith(f"Set {mend}") or f"Set {mend}," in str(error.value)
    assert "optimizer_in_bwd=" in str(error.value)


def test_optimizers_that_cannot_be_had_are_refused_before_anything_is_loaded(monkeypatch):
    own = torch.optim.SGD(Net().parameters())
    with pytest.raises(UserError, match="a caller's optimizer steps all parameters at once"):
        check_optimizer(settings(optimizer_in_bwd=True), FLOAT, own)
    for optim in ("adamw_bf16", "adamw_bf16_sr"):
        with pytest.raises(UserError, match=f"{optim} keeps parameters in bfloat16. Set bf16: true"):
            check_optimizer(settings(optim=optim), FLOAT, None)
        check_optimizer(settings(optim=optim, dtype="bfloat16"), FLOAT, None)
        check_optimizer(settings(optim=optim), BF16, None)
    for optim, (module, package) in PACKAGES.items():
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=f"{optim} is {package}'s.*pip install {package}; or use adamw_bf16_sr"):
            check_optimizer(settings(optim=optim), BF16, None)


class Codes(torch.Tensor):
    """What torchao's states are to a checkpoint: a tensor that consists of tensors and says it is a float one."""

    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=FLOAT)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


TABLE = torch.linspace(-1, 1, 256)  # bitsandbytes' states share one table


class Fake8bit(torch.optim.Optimizer):
    """Momentum in 8 bits, in the form of bitsandbytes (plain tensors, a shared table) or of torchao (Codes, and a
    tensor for the rate)."""

    form = "bitsandbytes"

    def __init__(self, params, lr, betas, eps):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        if self.form == "torchao":
            for group in self.param_groups:
                group["lr"] = torch.tensor(group["lr"])

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                entry = self.state[p]
                if not entry:
                    codes, scale = torch.full(p.shape, 128, dtype=torch.uint8), torch.ones(1)
                    parts = {"state1": codes, "absmax1": scale, "qmap1": TABLE}
                    entry |= parts if self.form == "bitsandbytes" else {"exp_avg": Codes(codes, scale)}
                    entry["step"] = 0
                entry["step"] += 1
                codes, scale = (
                    (entry["state1"], entry["absmax1"])
                    if self.form == "bitsandbytes"
                    else (entry["exp_avg"].codes, entry["exp_avg"].scale)
                )
                mean = TABLE[codes.int()] * scale * 0.9 + 0.1 * p.grad.float()
                scale.copy_(mean.abs().max().clamp(min=1e-9))
                codes.copy_(((mean / scale + 1) * 127.5).round())
                p -= float(group["lr"]) * mean.to(p.dtype) + entry["step"] * 1e-5


@pytest.fixture(params=PACKAGES)
def foreign(request, monkeypatch):
    """A name of PACKAGES whose package is a stand-in."""
    module, package = PACKAGES[request.param]
    stand_in = ModuleType(module)
    stand_in.AdamW8bit = type("AdamW8bit", (Fake8bit,), {"form": package})
    monkeypatch.setitem(sys.modules, package, ModuleType(package))
    monkeypatch.setitem(sys.modules, module, stand_in)
    return request.param


def through_a_file(state, folder):
    """(tensors, scalars) as a checkpoint stores them: safetensors refuses shared memory, JSON refuses tensors."""
    tensors, scalars = state
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "o.safetensors")
    return load_file(folder / "o.safetensors"), json.loads(json.dumps(scalars))


def resumes(config, folder, *, bf16: bool = True) -> None:
    whole, _, _ = train(config, 9, bf16=bf16)
    half, updater, _ = train(config, 4, bf16=bf16)
    stored, kept = through_a_file(updater.state(), folder), {k: v.clone() for k, v in half.state_dict().items()}
    model = Net(seed=9)
    masters = cast_parameters(model, BF16, config.optim) if bf16 else {}
    model.load_state_dict(kept)
    again = Updater(model, masters, config, 12)
    again.load(*stored)
    assert again.learning_rate == updater.learning_rate
    for step in range(4, 9):
        for part in range(config.gradient_accumulation_steps):
            model.loss(step * config.gradient_accumulation_steps + part).backward()
        again.step()
    assert same_weights(whole, model)
    whole.loss(0).backward()


@pytest.mark.parametrize("given", [{}, {"optimizer_in_bwd": True}, {"dtype": "bfloat16"}], ids=str)
def test_states_of_other_packages_survive_a_checkpoint(foreign, given, tmp_path):
    resumes(settings(optim=foreign, **given), tmp_path)


@pytest.mark.parametrize("optim", PACKAGES)
@pytest.mark.parametrize("bf16", [True, False])
def test_the_packages_themselves_where_installed(optim, bf16, tmp_path):
    pytest.importorskip(PACKAGES[optim][1])
    resumes(settings(optim=optim), tmp_path, bf16=bf16)
    model, updater, _ = train(settings(optim=optim), 1, bf16=bf16)
    states = [t for name, t in updater.state()[0].items() if name.startswith("optimizer.") and "qmap" not in name]
    large = sum(p.numel() for p in model.parameters() if p.numel() >= 4096)
    small = sum(p.numel() for p in model.parameters()) - large
    assert size(states) <= bytes_per_parameter(optim).states * large + 8 * small + 4 * 256


@pytest.mark.parametrize("optim", HERE)
@pytest.mark.parametrize("given", [{}, {"optimizer_in_bwd": True}, {"gradient_accumulation_steps": 2}], ids=str)
def test_every_optimizer_goes_on_as_if_nothing_had_been(optim, given, tmp_path):
    resumes(settings(optim=optim, **given), tmp_path)


def test_low_bits_come_from_float32_weights_and_are_zero_for_bfloat16_ones():
    model, exact = Net(), [p.detach().clone() for p in Net().parameters()]
    low = cast_parameters(model, BF16, "adamw_bf16")
    assert all(torch.equal(join_master(p, low[p]), e) for p, e in zip(model.parameters(), exact, strict=True))
    updater = Updater(model, {}, settings(optim="adamw_bf16"), 3)
    assert all(not entry["low"].any() for entry in updater.optimizer.state.values())
    assert cast_parameters(Net(), BF16, "adamw_bf16_sr") == {}


def test_a_second_updater_on_the_model_steps_once():
    config = settings(optim="sgd", optimizer_in_bwd=True, weight_decay=0.0)
    expected, _, _ = train(config, 2)
    model = Net()
    masters = cast_parameters(model, BF16, "sgd")
    first = Updater(model, masters, config, 12)
    first.close()
    second = Updater(model, masters, config, 12)
    for step in range(2):
        model.loss(step).backward()
        second.step()
    assert same_weights(expected, model)
