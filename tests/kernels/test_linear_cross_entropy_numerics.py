"""linear_cross_entropy where numbers are hard: outliers, bfloat16, many chunks, memory, a training run."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from head_cases import CHUNKED, MARKS, both_losses, error, leaves, loss_oracle, problem

from burnish.kernels import head_chunks, linear_cross_entropy, use
from burnish.kernels.dispatch import interpreting

pytestmark = MARKS


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("outlier", [80.0, 300.0])
@pytest.mark.parametrize("softcap", [None, 400.0])
def test_outlier_logits(backend, outlier, softcap, small_chunks):
    """exp of the others' distance to the target would overflow in some rows and some blocks only."""
    x, weight, bias, labels = problem(8, 6, 37)
    labels[3], labels[4] = 20, 5
    x[:, 0] = 0.0
    x[3:6, 0] = 1.0
    weight[20, 0], weight[9, 0] = outlier, outlier / 2
    for options in ({}, {"z_loss": 0.001}):
        for got, want in zip(*both_losses(backend, x, weight, bias, labels, softcap=softcap, **options), strict=True):
            assert torch.isfinite(got).all() and error(got, want) < 2e-6


@pytest.mark.parametrize("backend", CHUNKED)
def test_two_extremes_in_one_row(backend, small_chunks):
    """Blocks of one row on different powers of two, all of which matter: they are brought to one level exactly."""
    x = torch.ones(3, 1)
    weight = torch.zeros(37, 1)
    weight[4], weight[11], weight[19], weight[30] = 98.0, 97.5, 99.0, 45.0
    labels = torch.tensor([0, 4, 30])
    for got, want in zip(*both_losses(backend, x, weight, torch.zeros(37), labels, reduction="sum"), strict=True):
        assert error(got, want) < 2e-6


@pytest.fixture
def bf16_between_the_gemms(monkeypatch):
    """What a GPU does with bfloat16 inputs: E and the scaled rows in bfloat16, products added up in float32.

    The interpreter cuts bfloat16 off where a GPU rounds to nearest; here it rounds.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    if not interpreting():
        pytest.skip("TRITON_INTERPRET is not set")
    convert = interpreter._convert_float

    def nearest(data, source, target, mode):
        if (source, target) != (tl.float32, tl.bfloat16):
            return convert(data, source, target, mode)
        values = torch.from_numpy(np.ascontiguousarray(data).view(np.float32).copy())
        return values.bfloat16().view(torch.int16).numpy().view(np.uint16).reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", nearest)
    monkeypatch.setattr(head_chunks, "work_dtype", lambda x, weight: torch.bfloat16)


@pytest.mark.parametrize("regime", ["random", "confident", "extreme", "terms"])
def test_bf16_gradients(bf16_between_the_gemms, small_chunks, regime):
    """bfloat16 inputs through the kernels: losses exact as ever, dX and dW within 4e-3, the worst row within 1e-2."""
    x, weight, _, labels = problem(32, 24, 64, seed=2)
    terms = {"label_smoothing": 0.1, "z_loss": 0.01} if regime == "terms" else {}
    if regime in ("confident", "extreme"):
        pull = 14.0 if regime == "confident" else 24.0
        x = 0.3 * x + pull * weight[labels] / weight[labels].square().sum(1, keepdim=True)
    x, weight = x.bfloat16(), weight.bfloat16()
    for got, want in zip(*both_losses("triton", x, weight, None, labels, reduction="sum", **terms), strict=True):
        limit = 2e-6 if got.shape == () else 4e-3
        assert error(got, want) < limit
        if got.shape == x.shape:
            rows = want.double().norm(dim=1)
            worst = ((got.double() - want.double()).norm(dim=1) / rows)[rows > 0].max()
            assert worst < 1e-2


def test_bf16_weight_gradient_does_not_lose_with_chunks(bf16_between_the_gemms, monkeypatch):
    """dW is added up in float32: its error at 64 chunks is that of one."""
    x, weight, _, labels = problem(64, 16, 32, seed=4)
    x, weight = x.bfloat16(), weight.bfloat16()
    w64 = weight.double().requires_grad_()
    loss_oracle(x, w64, labels).backward()
    errors = []
    for rows in (64, 8, 1):
        monkeypatch.setattr(head_chunks, "rows_per_chunk", lambda n, hidden, vocab, device, rows=rows: rows)
        (w,) = leaves(weight)
        with use("triton"):
            linear_cross_entropy(x, w, labels).backward()
        errors.append(error(w.grad, w64.grad))
    assert errors[0] < 4e-3
    assert max(errors) < 1.2 * min(errors)


@pytest.mark.parametrize("backend", CHUNKED)
def test_chunk_size_does_not_matter(backend, monkeypatch):
    x, weight, _, labels = problem(12, 6, 40)
    results = []
    for rows in (12, 5, 1):
        monkeypatch.setattr(head_chunks, "rows_per_chunk", lambda n, hidden, vocab, device, rows=rows: rows)
        a, w = leaves(x, weight)
        with use(backend):
            loss = linear_cross_entropy(a, w, labels)
        loss.backward()
        results.append((loss, a.grad, w.grad))
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert error(got, want) < 5e-7


@pytest.mark.parametrize("backend", CHUNKED)
def test_runs_are_bitwise_equal(backend, small_chunks):
    x, weight, bias, labels = problem(9, 7, 37)
    first = both_losses(backend, x, weight, bias, labels, softcap=4.0)[0]
    second = both_losses(backend, x, weight, bias, labels, softcap=4.0)[0]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", CHUNKED)
def test_logits_of_one_chunk_at_most(backend, monkeypatch):
    """The largest tensor alive is a chunk of logits or the weight's gradient, never [T, V]."""
    monkeypatch.setattr(head_chunks, "rows_per_chunk", lambda n, hidden, vocab, device: 8)
    x, weight, _, labels = problem(64, 2, 300)
    a, w = leaves(x, weight)
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.untyped_storage().nbytes() for t in torch.utils._pytree.tree_leaves(out) if hasattr(t, "dim")
            )
            return out

    with use(backend), Watch():
        linear_cross_entropy(a, w, labels).backward()
    assert 8 * 300 * 4 <= max(sizes) <= 8 * 320 * 4


def test_a_small_model_learns_as_with_torch():
    """200 steps of a bag-of-two-tokens model under bfloat16 autocast: the loss curves stay within 2e-3."""
    gen = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (256,), generator=gen)
    labels = (ids * 7 + 3) % 50
    curves = []
    for fn in (
        lambda h, w: linear_cross_entropy(h, w, labels),
        lambda h, w: F.cross_entropy((h @ w.T).float(), labels),
    ):
        gen.manual_seed(1)
        embed, head = (torch.randn(50, 16, generator=gen).mul_(0.3).requires_grad_() for _ in range(2))
        optimizer = torch.optim.SGD([embed, head], lr=2.0)
        curve = []
        for _ in range(200):
            with torch.autocast("cpu", torch.bfloat16):
                loss = fn(embed[ids].tanh(), head)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < 0.3 * curves[0][0]
    assert (curves[0] - curves[1]).abs().mean() < 2e-3
