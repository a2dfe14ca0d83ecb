"""AdamW on bfloat16 parameters: the halves of a master, its arithmetic against float64 and torch, and its noise."""

import gc
import weakref

import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.kernels import adamw, use
from burnish.kernels.adamw import Hyper, adamw_definition, adamw_step_, join_master, noise, noise_key, split_master

PATHS = {"torch": "auto", "triton": "triton", "reference": "reference"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HYPER = Hyper(lr=3e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=7)
SIZES = (1, 5, 2047, 2048, 5001)

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value):RuntimeWarning")  # the interpreter's numpy


@pytest.fixture(params=PATHS)
def path(request):
    """Tensors made inside go where the path runs: Triton takes a GPU where there is one, or its interpreter."""
    with use(PATHS[request.param]), torch.device(DEVICE if request.param == "triton" else "cpu"):
        yield request.param


def some_state(n: int, *, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """(master float32, gradient, mean and square bfloat16) as in the middle of a run; the gradient far from uniform."""
    torch.manual_seed(seed)
    master = torch.randn(n) * 0.02
    grad = torch.randn(n) * torch.exp(torch.randn(n) * 3)
    return master, grad, (grad * torch.rand(n)).bfloat16(), (grad * grad * torch.rand(n)).bfloat16()


def every_kind() -> torch.Tensor:
    """float32 values of every sign, exponent and upper mantissa, with the lower halves where rounding turns."""
    low = torch.tensor([0, 1, 2, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0x8002, 0xFFFE, 0xFFFF, 0x1234, 0xABCD])
    return ((torch.arange(2**16)[:, None] << 16) + low - 2**31).to(torch.int32).view(torch.float32).flatten()


def test_the_halves_of_a_master_give_it_back_bit_for_bit():
    values = every_kind()
    parameter, low = split_master(values)
    back, number = join_master(parameter, low), ~values.isnan()
    assert torch.equal(back.view(torch.int32)[number], values.view(torch.int32)[number])
    assert parameter[~number].isnan().all() and back[~number].isnan().all()
    assert parameter.dtype == torch.bfloat16 and low.dtype == torch.int16


def test_the_upper_half_is_the_nearest_bfloat16():
    """Brute force: no neighbour lies nearer, and of two at the same distance it is the one away from zero."""
    values = every_kind()
    values = values[values.isfinite() & (values.abs() < 3.38e38)]
    parameter, _ = split_master(values)
    bits = parameter.view(torch.int16)
    exact, own = values.double(), (parameter.double() - values.double()).abs()
    for step in (-1, 1):
        other = (bits + step).view(torch.bfloat16).double()
        real = other.isfinite() & ~((bits == 0) & (step == -1)) & ~((bits == -0x8000) & (step == -1))
        assert (own <= (other - exact).abs())[real].all()
        tied = real & (own == (other - exact).abs())
        assert (parameter.double().abs() >= other.abs())[tied].all()
    tie = (values.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(parameter[~tie], values.bfloat16()[~tie]), "as torch rounds, but for ties"
    top = torch.tensor([3.3961775e38, 3.4028235e38, -3.4028235e38])  # beyond the last bfloat16's reach
    assert torch.equal(split_master(top)[0], torch.tensor([torch.inf, torch.inf, -torch.inf]).bfloat16())


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("grad_dtype", [torch.bfloat16, torch.float32])
def test_a_step_is_the_definition_in_float64(path, n, grad_dtype):
    master, grad, mean, square = some_state(n)
    grad, scale = grad.to(grad_dtype), torch.tensor(0.37)
    parameter, low = split_master(master)
    wide = [x.double() for x in (master, grad.float() * scale, mean, square)]
    expected = adamw_definition(*wide, HYPER)
    adamw_step_(parameter, low, grad, mean, square, HYPER, scale=scale, key=noise_key(1, 7, 0))
    inner = 2e-7 * (wide[1].abs() + wide[2].abs())  # a few float32 roundings of what the mean is made of
    rate = HYPER.lr / (1 - HYPER.beta1**7) / (expected[2].sqrt() / (1 - HYPER.beta2**7) ** 0.5 + HYPER.eps)
    assert ((join_master(parameter, low).double() - expected[0]).abs() <= 2 * rate * inner + 2e-7 * wide[0].abs()).all()
    assert ((mean.double() - expected[1]).abs() <= expected[1].abs() * 2**-8 + inner).all(), "the nearest bfloat16"
    assert ((square.double() - expected[2]).abs() <= expected[2].abs() * (2**-7 + 1e-6)).all(), "one of the two beside"


@pytest.mark.parametrize("exact", [True, False])
def test_a_scale_that_is_no_number_calls_the_step_off(path, exact):
    master, grad, mean, square = some_state(SIZES[-1])
    parameter, low = split_master(master) if exact else (master.bfloat16(), None)
    grad[::3] = torch.inf
    own = [x for x in (parameter, low, mean, square) if x is not None]
    before = [x.clone() for x in own]
    adamw_step_(parameter, low, grad, mean, square, HYPER, scale=torch.tensor(torch.nan), key=noise_key(1, 7, 0))
    assert all(torch.equal(x, y) for x, y in zip(own, before, strict=True))


@pytest.mark.parametrize("n", SIZES)
def test_a_step_without_master_lands_beside_the_definition(path, n):
    master, grad, mean, square = some_state(n)
    parameter = master.bfloat16()
    expected = adamw_definition(*(x.double() for x in (parameter, grad, mean, square)), HYPER)[0]
    adamw_step_(parameter, None, grad, mean, square, HYPER, key=noise_key(1, 7, 0))
    assert ((parameter.double() - expected).abs() <= expected.abs() * (2**-7 + 1e-6)).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_with_float32_moments_a_run_is_torchs_adamw_on_masters_bit_for_bit(threads, monkeypatch):
    """n is beyond a piece and no multiple of one. The twin's parameter is made by the same rounding (ties differ from
    torch's), and its float32 gradient is the one that the bfloat16 parameter would have had."""
    monkeypatch.setattr(adamw, "CPU_BLOCK", 4096)
    n, before = 20011, torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        master, grad, _, _ = some_state(n)
        twin = torch.nn.Parameter(master.clone())
        optimizer = torch.optim.AdamW([twin], lr=3e-3, weight_decay=0.1, fused=True)
        parameter, low = split_master(master)
        mean, square = torch.zeros(n), torch.zeros(n)
        for step in range(1, 21):
            grad = (torch.sin(step * grad) + parameter.float()).bfloat16()  # depends on the weights, as in training
            twin.grad = grad.float()
            optimizer.step()
            adamw_step_(parameter, low, grad, mean, square, HYPER._replace(step=step))
        assert torch.equal(join_master(parameter, low), twin)
        assert torch.equal(mean, optimizer.state[twin]["exp_avg"])
        assert torch.equal(square, optimizer.state[twin]["exp_avg_sq"])
    finally:
        torch.set_num_threads(before)


def roundings(n: int, key: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """A parameter and a square after a step whose float32 results are exact on every path, but no bfloat16."""
    torch.manual_seed(3)
    parameter, square = torch.randn(n).bfloat16(), torch.rand(n).bfloat16()
    zeros = torch.zeros(n).bfloat16()
    hyper = Hyper(lr=0.5, beta1=0.9, beta2=0.999, eps=1.0, weight_decay=0.5, step=1)
    adamw_step_(parameter, None, zeros, zeros.clone(), square, hyper, key=key)
    return parameter, square


def test_every_path_draws_the_same_noise(path):
    got = roundings(5000, noise_key(5, 6, 7))
    with use("reference"), torch.device("cpu"):
        expected = roundings(5000, noise_key(5, 6, 7))
        other = roundings(5000, noise_key(5, 6, 8))
    for one, two, third in zip(got, expected, other, strict=True):
        assert torch.equal(one.cpu(), two) and not torch.equal(two, third)


def test_pieces_draw_what_the_whole_draws(monkeypatch):
    whole = roundings(5000, (11, 13))
    monkeypatch.setattr(adamw, "CPU_BLOCK", 1024)
    assert all(torch.equal(a, b) for a, b in zip(whole, roundings(5000, (11, 13)), strict=True))


@triton.jit
def _noise_kernel(OUT, START, key, factor, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    tl.store(OUT + cols, adamw._uniform(tl.load(START), cols, key, factor))


@pytest.mark.parametrize("start", [0, 2**31 - 64, 2**31, 2**32, 5 * 2**32 + 128])
def test_noise_goes_on_beyond_32_bits_of_offsets(start):
    out, key = torch.empty(64, dtype=torch.int32, device=DEVICE), noise_key(1, 2, 3)
    _noise_kernel[(1,)](out, torch.tensor(start, device=DEVICE), *key, BLOCK=64)
    expected = noise(start, 64, key, torch.device("cpu"))
    assert torch.equal(out.cpu(), expected)
    assert start < 2**32 or not torch.equal(expected, noise(start % 2**32, 64, key, torch.device("cpu")))


def test_noise_is_uniform_and_unrelated():
    """Bits set half the time; no correlation between neighbours, the two halves, seeds, steps or parameters."""
    n = 2**18
    keys = [noise_key(0, 1, 0), noise_key(1, 1, 0), noise_key(0, 2, 0), noise_key(0, 1, 1)]
    draws = [noise(0, n, key, torch.device("cpu")) for key in keys]
    for draw in draws:
        ones = torch.stack([(draw >> bit & 1).double().mean() for bit in range(32)])
        assert (ones - 0.5).abs().max() < 5 * 0.5 / n**0.5
    halves = [part.double() for d in draws for part in (d & 0xFFFF, d >> 16 & 0xFFFF)]
    series = torch.stack([*halves, *(half.roll(shift) for half in halves[:2] for shift in (1, 2, 64, 1024))])
    correlation = torch.corrcoef(series) - torch.eye(len(series), dtype=torch.float64)
    assert correlation.abs().max() < 5.5 / n**0.5


def test_stochastic_rounding_is_right_on_average(path):
    """7/8 x has a remainder of a quarter, a half or three quarters of a last place: as often it must be rounded up."""
    n = 2**16
    zeros = torch.zeros(n).bfloat16()
    hyper = Hyper(lr=0.5, beta1=0.9, beta2=0.999, eps=1.0, weight_decay=0.25, step=1)
    for value in (1 + 2**-7, 1 + 2**-6, 1 + 3 * 2**-7, -1 - 2**-7):
        parameter = torch.full((n,), value).bfloat16()
        adamw_step_(parameter, None, zeros, zeros.clone(), zeros.clone(), hyper, key=noise_key(4, 1, 0))
        found = parameter.double()
        spread = found.std(correction=0)
        assert len(found.unique()) <= 2 and spread > 0
        assert (found.mean() - 0.875 * value).abs() < 5 * spread / n**0.5, value


def test_small_changes_add_up_where_rounding_to_the_nearest_would_lose_them():
    """A fall of 1e-4 from 1, and squares that decay by 0.001: both below half of a last place of a bfloat16."""
    n, steps = 4096, 100
    parameter, square = torch.ones(n).bfloat16(), torch.ones(n).bfloat16()
    zeros = torch.zeros(n).bfloat16()
    for step in range(1, steps + 1):
        hyper = Hyper(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, step=step)
        adamw_step_(parameter, None, zeros, zeros.clone(), square, hyper, key=noise_key(0, step, 0))
    assert (parameter.double().mean() - (1 - 1e-4) ** steps).abs() < 5 * 2**-8 * steps**0.5 / n**0.5
    assert (square.double().mean() - 0.999**steps).abs() < 5 * 2**-8 * steps**0.5 / n**0.5


def test_what_is_not_a_number_stays_so(path):
    """The NaN of a GPU has all bits set: one more, and it would be a zero."""
    master, grad, mean, square = some_state(2000)
    grad[[3, 700, 1500]] = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0x7F800000], dtype=torch.int32).view(torch.float32)
    for low in (split_master(master)[1], None):
        parameter, own = split_master(master)[0], [mean.clone(), square.clone()]
        adamw_step_(parameter, low, grad, *own, HYPER)
        assert parameter.isnan().nonzero().flatten().tolist() == [3, 700, 1500], "inf / inf"


class Held(TorchDispatchMode):
    """The most bytes of new storages alive at once while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: weakref.WeakValueDictionary = weakref.WeakValueDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage._cdata not in self._seen and not self._old(storage):
                self._seen[storage._cdata] = storage
                self.now += storage.nbytes()
                self.most = max(self.most, self.now)
                weakref.finalize(storage, self._drop, storage.nbytes())
        return result

    def _old(self, storage) -> bool:
        return storage.data_ptr() in self.before

    def _drop(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("exact", [True, False])
def test_a_step_needs_no_more_than_it_says(exact):
    n = 6 * adamw.CPU_BLOCK + 17
    master, grad, mean, square = some_state(n)
    parameter, low = split_master(master)
    gc.collect()
    with Held() as held:
        held.before = {x.untyped_storage().data_ptr() for x in (parameter, low, grad, mean, square)}
        adamw_step_(parameter, low if exact else None, grad, mean, square, HYPER)
    assert 20 * adamw.CPU_BLOCK < held.most <= adamw.TEMPORARY_BYTES * torch.get_num_threads()


def test_other_types_and_layouts_are_errors():
    half, rest = torch.zeros(4, 4).bfloat16(), torch.zeros(4, 4, dtype=torch.int16)
    good = (half, rest, half, half, half)
    adamw_step_(*(x.clone() for x in good), HYPER)
    for place, wrong in ((0, half.float()), (1, half), (2, half.t()), (3, half.float()), (4, half[:2])):
        with pytest.raises(ValueError, match="adamw_step_"):
            adamw_step_(*(*good[:place], wrong, *good[place + 1 :]), HYPER)
