"""The ways to one gradient: exponentials kept, made again, or used at once; with closed forms for the extra terms."""

import pytest
import torch
from head_cases import BACKENDS, CHUNKED, MARKS, both_losses, error, leaves, loss_oracle, problem, token_oracle

from burnish.kernels import linear_cross_entropy, linear_logprob, use

pytestmark = MARKS
EVERYTHING, SOME, NOTHING = 1 << 40, 4 * 37 * 4, 0  # SOME is one chunk of 4 rows of a vocabulary of 37
OPTIONS = [({}, False), ({}, True), ({"temperature": 0.5, "logit_scale": 1.5}, True), ({"softcap": 2.0}, False)]


def logps_and_gradients(backend, x, weight, bias, labels, upstream, **options):
    inputs = leaves(x, weight, bias)
    with use(backend):
        logps = linear_logprob(inputs[0], inputs[1], labels, bias=inputs[2], **options)
        logps.backward(upstream, retain_graph=True)
    return [logps.detach(), *(t.grad for t in inputs if t is not None)]


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("options,with_bias", OPTIONS, ids=str)
def test_kept_or_made_again_is_the_same_to_the_bit_and_right(backend, options, with_bias, small_chunks):
    x, weight, bias, labels = problem(9, 7, 37)
    labels[3] = -100
    bias = bias if with_bias else None
    upstream = torch.tensor([1.0, -2.0, 0.0, 5.0, 1e-8, 65536.0, 0.5, -1.0, 3.0])
    runs = [
        logps_and_gradients(backend, x, weight, bias, labels, upstream, keep_bytes=keep, **options)
        for keep in (EVERYTHING, SOME, NOTHING)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    inputs = leaves(*(t if t is None else t.double() for t in (x, weight, bias)))
    logps = token_oracle(inputs[0], inputs[1], labels, bias=inputs[2], **options)[0]
    logps.backward(upstream.double())
    for got, want in zip(runs[0], [logps, *(t.grad for t in inputs if t is not None)], strict=True):
        assert error(got, want) < 3e-6
    rows = labels != -100  # row by row, so that the large ones do not hide the small
    wrong = (runs[0][1] - inputs[0].grad).norm(dim=1)[rows] > 3e-6 * inputs[0].grad.norm(dim=1)[rows]
    assert not wrong.any()


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("keep", [EVERYTHING, SOME, NOTHING])
def test_backward_again_and_entropies_after_all(backend, keep, small_chunks):
    """What is kept stays as it was: a second backward gives the first's gradients, one of the entropy is right too."""
    x, weight, _, labels = problem(9, 7, 37)
    a, w = leaves(x, weight)
    a64, w64 = leaves(x.double(), weight.double())
    with use(backend):
        logps, entropy = linear_logprob(a, w, labels, return_entropy=True, keep_bytes=keep)
    want = token_oracle(a64, w64, labels)
    for loss, exact in (
        (logps.square().sum(), want[0].square().sum()),
        ((logps * entropy).sum(), (want[0] * want[1]).sum()),
        (entropy.sum(), want[1].sum()),
    ):
        first = torch.autograd.grad(loss, (a, w), retain_graph=True)
        second = torch.autograd.grad(loss, (a, w), retain_graph=True)
        truth = torch.autograd.grad(exact, (a64, w64), retain_graph=True)
        assert all(torch.equal(f, s) for f, s in zip(first, second, strict=True))
        assert all(error(f, t) < 3e-6 for f, t in zip(first, truth, strict=True))


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("keep", [EVERYTHING, NOTHING])
def test_policy_equal_to_reference_has_ratio_zero_and_its_gradient(backend, keep, small_chunks):
    x, weight, bias, labels = problem(9, 7, 37)
    a, w = leaves(x, weight)
    with use(backend):
        policy = linear_logprob(a, w, labels, bias=bias, keep_bytes=keep)
        with torch.no_grad():
            reference = linear_logprob(a, w, labels, bias=bias)
    assert torch.equal(policy, reference)
    (-torch.nn.functional.logsigmoid((policy - reference)[:4].sum() - (policy - reference)[4:].sum())).backward()
    signs = torch.tensor([0.5] * 4 + [-0.5] * 5)
    a64, w64 = leaves(x.double(), weight.double())
    (-token_oracle(a64, w64, labels, bias=bias)[0] * signs).sum().backward()
    assert error(a.grad, a64.grad) < 3e-6 and error(w.grad, w64.grad) < 3e-6


# ---- label smoothing and z-loss in closed form

WEIGHTS = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 1e-6, 3.0, 1.0, 1.0])
SCALED = {"temperature": 1.3, "logit_scale": 0.5}
TERMS = [
    {"label_smoothing": 0.1, "z_loss": 0.3},
    {"label_smoothing": 0.1, "z_loss": 0.01, **SCALED, "token_weights": WEIGHTS},
    {"label_smoothing": 1.0},
    {"label_smoothing": 1.0, "z_loss": 2.0, **SCALED},
    {"z_loss": 5.0, "softcap": 3.0, "token_weights": WEIGHTS},
    {"label_smoothing": 0.3, "z_loss": 0.1, "softcap": 3.0, **SCALED},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("terms", TERMS, ids="-".join)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_terms(backend, terms, reduction, small_chunks):
    x, weight, bias, labels = problem(9, 7, 37)
    labels[4] = -100
    bias = bias if reduction == "mean" else None
    for got, want in zip(*both_losses(backend, x, weight, bias, labels, reduction=reduction, **terms), strict=True):
        assert error(got, want) < 3e-6


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_terms_with_one_gradient_alone(backend, needs, reduction, small_chunks):
    x, weight, bias, labels = problem(9, 7, 37)
    up = torch.randn(9) if reduction == "none" else torch.tensor(2.0)
    grads = []
    for fn in (linear_cross_entropy, loss_oracle):
        inputs = [t.clone().requires_grad_(bool(need)) for t, need in zip((x, weight, bias), needs, strict=True)]
        with use(backend):
            loss = fn(
                inputs[0], inputs[1], labels, bias=inputs[2], label_smoothing=0.2, z_loss=0.1, reduction=reduction
            )
        loss.backward(up.to(loss.dtype))
        grads.append(next(t.grad for t in inputs if t.grad is not None))
    assert error(*grads) < 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("distance", [0.0, 1e-8, -1e-5, 1e-3])
def test_z_loss_that_cancels_the_gradient_of_all_other_logits(backend, distance, small_chunks):
    """1 + 2 z_loss lse at and near 0: only the target's gradient is left, and nothing is divided away."""
    x, weight, bias, labels = problem(5, 6, 37)
    x = torch.zeros_like(x)
    bias = bias - 9
    lse = bias.double().logsumexp(0).item()
    assert lse < -1
    z_loss = -(1 + distance) / (2 * lse)
    for got, want in zip(*both_losses(backend, x, weight, bias, labels, z_loss=z_loss), strict=True):
        assert torch.isfinite(got).all() and error(got, want) < 3e-6


@pytest.mark.parametrize("backend", CHUNKED)
def test_terms_of_outliers_and_impossible_targets(backend, small_chunks):
    """Rows on a power of two of their own, and a target that bias forbids, beside ordinary rows."""
    x, weight, bias, labels = problem(8, 6, 37)
    labels[3], labels[4] = 20, 5
    x[:, 0] = 0.0
    x[3:6, 0] = 1.0
    weight[20, 0], weight[9, 0] = 300.0, 150.0
    terms = {"label_smoothing": 0.1, "z_loss": 0.001}
    for got, want in zip(*both_losses(backend, x, weight, bias, labels, **terms), strict=True):
        assert torch.isfinite(got).all() and error(got, want) < 3e-6
    bias[labels[0]] = -torch.inf
    losses = []
    for fn in (linear_cross_entropy, loss_oracle):
        a, w = leaves(x, weight)
        with use(backend):
            loss = fn(a, w, labels, bias=bias, z_loss=0.001, reduction="none")
        loss[1:].sum().backward()
        losses.append((loss.detach()[1:], a.grad[1:], w.grad))
    for got, want in zip(*losses, strict=True):
        assert error(got, want) < 3e-6
