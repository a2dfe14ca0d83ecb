"""Hard cases of the language-model head, on the CPU path, through the interpreter and on a pretended GPU in bfloat16.

A test's number is the case's in the project's list of adversarial cases. What every op must stand as well (shapes,
strides, types, repeated backwards) is in test_adversarial_every_op.py, with the head among the ops.
"""

import pytest
import torch
from head_cases import BACKENDS, CHUNKED, MARKS, error, leaves, loss_oracle, problem, token_oracle
from pretend_gpu import plain, pretended, to_gpu

from burnish.kernels import linear_cross_entropy, linear_logprob, use

pytestmark = MARKS
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)
on_chunked = pytest.mark.parametrize("backend", CHUNKED)


def exact_logps(x, weight, labels, bias=None):
    """-log1p(sum of the others relative to the target), in float64: log_softmax itself cancels at 1e-8."""
    z = x.double() @ weight.double().T
    z = z if bias is None else z + bias.double()
    ratio = (z - z.gather(1, labels[:, None])).exp()
    return -torch.log1p(ratio.scatter(1, labels[:, None], 0.0).sum(1))


def row_errors(got, want):
    """Relative error of each row; 0 where both are exactly 0."""
    want = want.double()
    return (got.double() - want).norm(dim=1) / want.norm(dim=1).clamp_min(1e-300)


@on_every_backend
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"num_items": 0},
        {"num_items": torch.tensor(0)},
        {"z_loss": 0.1},
    ],
    ids=str,
)
def test_case_01_all_tokens_ignored(backend, options):
    x, weight, bias = leaves(*problem(3, 4, 9)[:3])
    labels = torch.full((3,), -100)
    with use(backend):
        loss, logps, entropy, top = linear_cross_entropy(
            x, weight, labels, bias=bias, label_smoothing=0.1, token_weights=torch.ones(3),
            return_logprob=True, return_entropy=True, return_argmax=True, **options,
        )  # fmt: skip
        tokens = linear_logprob(x, weight, labels, bias=bias)
    assert (loss == 0).all() and (logps == 0).all() and (entropy == 0).all() and (top == -1).all()
    ((loss * 65536).sum() + tokens.sum()).backward()
    assert all((t.grad == 0).all() for t in (x, weight, bias))


@on_every_backend
@pytest.mark.parametrize("vocab", [1, 2, 3, 9, 17, 33])
def test_case_04_odd_vocabularies(backend, vocab, small_chunks):
    """A power of two and one more, and fewer columns than a block: the columns that pad a block count for nothing."""
    x, weight, bias, labels = problem(4, 5, vocab, scale=0.5)
    got, want = leaves(x, weight, bias), leaves(*(t.double() for t in (x, weight, bias)))
    with use(backend):
        loss, logps, entropy, top = linear_cross_entropy(
            got[0], got[1], labels, bias=got[2], return_logprob=True, return_entropy=True, return_argmax=True
        )
    truth = token_oracle(*want[:2], labels, bias=want[2])
    for ours, theirs in zip((logps, entropy), truth, strict=False):
        assert (ours - theirs).abs().max() < 2e-6
    assert torch.equal(top, truth[2])
    loss.backward()
    loss_oracle(*want[:2], labels, bias=want[2]).backward()
    for ours, theirs in zip(got, want, strict=True):
        assert (ours.grad - theirs.grad).abs().max() < 2e-6


@pytest.mark.parametrize("vocab", [4095, 4097])
def test_case_04_around_the_blocks_own_size(vocab):
    """The block as it is in use, 4096 columns."""
    x, weight, _, labels = problem(2, 3, vocab)
    labels[:] = torch.tensor([0, vocab - 1])
    got, want = leaves(x, weight), leaves(x.double(), weight.double())
    with use("triton"):
        loss = linear_cross_entropy(*got, labels)
    loss.backward()
    truth = loss_oracle(*want, labels)
    truth.backward()
    assert (
        error(loss, truth) < 1e-6
        and error(got[0].grad, want[0].grad) < 3e-6
        and error(got[1].grad, want[1].grad) < 3e-6
    )


@on_every_backend
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_case_07_label_outside_the_vocabulary(backend, dtype):
    """An error that names the place, from every way in; no value is made of it."""
    x, weight, _, labels = problem(5, 6, 13)
    with use(backend):
        for bad in (13, -1, -101, 2**31 - 1):
            y = labels.to(dtype)
            y[0], y[3] = -100, bad
            for run in (linear_logprob, linear_cross_entropy):
                with pytest.raises(ValueError, match=rf"labels\[3\] is {bad}, outside the vocabulary of 13"):
                    run(x, weight, y)
            with pytest.raises(ValueError, match=rf"labels\[3\] is {bad}"):
                linear_cross_entropy(x[1:], weight, torch.cat([y[1:3], y[2:4]]), reduction="none", ignore_index=-7)


@pytest.mark.parametrize("bad", [13, -1])
def test_case_07_on_a_gpu_it_is_a_device_side_assertion(bad, monkeypatch):
    """And nothing outside the weight is read or written even where assertions do not stop a kernel."""
    x, weight, _, labels = problem(5, 6, 13)
    labels[3] = bad
    guarded = torch.full((15, 6), float("nan"))
    guarded[1:14] = weight
    with pretended():
        inputs = [to_gpu(t.requires_grad_()) for t in (x, guarded[1:14])]
        with pytest.raises(RuntimeError, match="a label lies outside the vocabulary"):
            linear_logprob(*inputs, to_gpu(labels), all_valid=True)
        monkeypatch.setattr(torch, "_assert_async", lambda *_: None)
        out = linear_cross_entropy(*inputs, to_gpu(labels), all_valid=True, reduction="none")
        grads = torch.autograd.grad(out, inputs, to_gpu(torch.ones(5)))
    assert error(-plain(out), token_oracle(x, weight, labels.clamp(0, 12))[0]) < 1e-6
    assert all(torch.isfinite(plain(grad)).all() for grad in grads)


@on_every_backend
@pytest.mark.parametrize("ignore", [-1, 0, 5, 12])
def test_case_08_any_ignore_index(backend, ignore):
    """Also one that is a class: its rows count for nothing, its column stays in everybody's softmax."""
    x, weight, bias, labels = problem(8, 6, 13)
    labels[labels == ignore] = (ignore + 1) % 13
    labels[[1, 4]] = ignore
    keep = labels != ignore
    got, want = leaves(x, weight, bias), leaves(*(t.double() for t in (x, weight, bias)))
    with use(backend):
        loss, logps = linear_cross_entropy(
            *got[:2], labels, bias=got[2], ignore_index=ignore, return_logprob=True, label_smoothing=0.1
        )
    loss.backward()
    truth = loss_oracle(want[0][keep], want[1], labels[keep], bias=want[2], label_smoothing=0.1)
    truth.backward()
    assert error(loss, truth) < 1e-6 and (logps[~keep] == 0).all() and (logps[keep] < 0).all()
    for ours, theirs in zip(got, want, strict=True):
        assert error(ours.grad, theirs.grad) < 3e-6


OUTLIERS = {  # first coordinates of rows of the weight; hidden states 3 to 5 have a 1 there, the others 0
    "on the target": {20: 300.0},
    "on another column": {9: 300.0},
    "on both": {9: 300.0, 20: 299.0},
    "far below": {20: -1000.0},
}


@on_chunked
@pytest.mark.parametrize("where", OUTLIERS)
def test_case_10_outlier_logits(backend, where, small_chunks):
    """A logit hundreds above or below the target's, in some rows only: exp of the difference has no float32."""
    x, weight, bias, labels = problem(6, 6, 21)
    labels[3], labels[4] = 20, 5
    x[:, 0] = 0.0
    x[3:, 0] = 1.0
    for column, value in OUTLIERS[where].items():
        weight[column, 0] = value
    got, want = leaves(x, weight, bias), leaves(*(t.double() for t in (x, weight, bias)))
    up = torch.linspace(-1, 2, 6)
    with use(backend):
        logps = linear_logprob(*got[:2], labels, bias=got[2])
        loss = linear_cross_entropy(*got[:2], labels, bias=got[2], reduction="sum", z_loss=1e-4)
    truth = token_oracle(*want[:2], labels, bias=want[2])[0]
    assert torch.isfinite(logps).all()
    exact = exact_logps(x, weight, labels, bias)
    last_place = torch.where(torch.arange(6) // 3 == 1, 2.0**-14, 1e-6)  # of float32 logits of 300, twice
    assert ((logps - exact).abs() <= 1e-5 * exact.abs() + last_place).all()
    ((logps * up).sum() + loss).backward()
    ((truth * up).sum() + loss_oracle(*want[:2], labels, bias=want[2], reduction="sum", z_loss=1e-4)).backward()
    for ours, theirs in zip(got, want, strict=True):
        assert torch.isfinite(ours.grad).all() and error(ours.grad, theirs.grad) < 5e-6


def confident(tokens=24, hidden=48, vocab=29, least=-4.0, most=26.0):
    """Losses from 10 down to 1e-8, row by row, in numbers that bfloat16 holds exactly."""
    gen = torch.Generator().manual_seed(3)
    weight = torch.randn(vocab, hidden, generator=gen).bfloat16().float()
    labels = torch.randint(0, vocab, (tokens,), generator=gen)
    pull = weight[labels] / weight[labels].square().sum(1, keepdim=True)
    return (torch.linspace(least, most, tokens)[:, None] * pull).bfloat16().float(), weight, labels


def truth_of_nll(x, weight, labels):
    """Exact losses and, with the target's p - 1 made of them, the gradients of their sum, in float64."""
    z = x.double() @ weight.double().T
    nll = -exact_logps(x, weight, labels)
    p = (z - z.gather(1, labels[:, None]) - nll[:, None]).exp()
    d = p.scatter(1, labels[:, None], torch.expm1(-nll)[:, None])
    return nll, d @ weight.double(), d.T @ x.double()


@on_chunked
@pytest.mark.parametrize("op", ["linear_logprob", "linear_cross_entropy"])
def test_case_11_confident_tokens(backend, op, small_chunks):
    """Each loss to 1e-5 of itself, down to 1e-8, and each row's gradient likewise: nothing has cancelled."""
    x, weight, labels = confident()
    nll, dx, dw = truth_of_nll(x, weight, labels)
    assert nll.min() < 1e-8 and nll.max() > 5
    a, w = leaves(x, weight)
    with use(backend):
        if op == "linear_logprob":
            logps = linear_logprob(a, w, labels)
            loss = -logps.sum()
        else:
            loss, logps = linear_cross_entropy(a, w, labels, reduction="sum", return_logprob=True)
    loss.backward()
    assert ((-logps - nll).abs() <= 1e-5 * nll).all()
    assert row_errors(a.grad, dx).max() < 1e-5 and error(w.grad, dw) < 2e-6


def test_case_11_confident_tokens_in_bfloat16_as_a_gpu_keeps_them(small_chunks):
    """E in bfloat16 costs its relative precision and no more, however small the loss is."""
    x, weight, labels = confident()
    nll, dx, dw = truth_of_nll(x, weight, labels)
    with pretended():
        a, w = (to_gpu(t.bfloat16().requires_grad_()) for t in (x, weight))
        loss, logps = linear_cross_entropy(a, w, to_gpu(labels), reduction="sum", return_logprob=True, all_valid=True)
        loss.backward()
    assert ((-plain(logps) - nll).abs() <= 1e-5 * nll).all()
    assert row_errors(plain(a.grad), dx).max() < 1e-2
    assert error(plain(a.grad), dx) < 4e-3 and error(plain(w.grad), dw) < 4e-3


COMBINED = {
    "moderate": {"softcap": 3.0, "logit_scale": 0.7, "temperature": 1.3},
    "near saturation": {"softcap": 1.0, "logit_scale": 2.0, "temperature": 0.5},
    "hot": {"softcap": 30.0, "logit_scale": 0.1, "temperature": 10.0},
    "cold": {"softcap": 5.0, "logit_scale": 1.0, "temperature": 0.2},
}


@on_every_backend
@pytest.mark.parametrize("terms", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}], ids=["plain", "smoothed"])
@pytest.mark.parametrize("options", COMBINED.values(), ids=COMBINED)
def test_case_20_bias_softcap_scale_and_temperature_together(backend, options, terms, small_chunks):
    """Logits of +-3 and biases; near saturation most slopes are below 1e-3 and the gradient is made of what is left."""
    x, weight, bias, labels = problem(5, 9, 19)
    got, want = leaves(x, weight, bias), leaves(*(t.double() for t in (x, weight, bias)))
    with use(backend):
        loss, logps = linear_cross_entropy(
            *got[:2], labels, bias=got[2], reduction="none", return_logprob=True, **options, **terms
        )
    up = torch.linspace(-1, 2, 5)
    loss.backward(up)
    loss_oracle(*want[:2], labels, bias=want[2], reduction="none", **options, **terms).backward(up.double())
    assert error(logps, token_oracle(*want[:2], labels, bias=want[2], **options)[0]) < 2e-6
    for ours, theirs in zip(got, want, strict=True):
        assert error(ours.grad, theirs.grad) < 1e-5
    assert row_errors(got[0].grad, want[0].grad).max() < 2e-5


@on_every_backend
@pytest.mark.parametrize("op", ["linear_logprob", "linear_cross_entropy"])
def test_case_21_upstream_gradients_of_every_size(backend, op, small_chunks):
    """0, negative, 1e-8 and 65536 beside each other: each row's gradient is right on its own scale."""
    x, weight, _, labels = problem(9, 6, 37)
    up = torch.tensor([1.0, 0.0, -2.0, 1e-8, 65536.0, -1e-8, 0.5, 1e-30, 3.0])
    got, want = leaves(x, weight), leaves(x.double(), weight.double())
    with use(backend):
        if op == "linear_logprob":
            out = -linear_logprob(*got, labels)
        else:
            out = linear_cross_entropy(*got, labels, reduction="none")
    out.backward(up)
    loss_oracle(*want, labels, reduction="none").backward(up.double())
    assert row_errors(got[0].grad, want[0].grad).max() < 3e-6 and (got[0].grad[1] == 0).all()
    assert error(got[1].grad, want[1].grad) < 3e-6
