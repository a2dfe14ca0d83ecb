"""linear_cross_entropy on every backend against all logits at once in float64, forward and every gradient."""

import sys

import pytest
import torch
import torch.nn.functional as F
from head_cases import BACKENDS, CHUNKED, MARKS, both_losses, error, leaves, loss_oracle, problem

from burnish.kernels import linear_cross_entropy, linear_logprob, use

pytestmark = MARKS


WEIGHTS = torch.tensor([1.0, 0.0, 2.0, -1.0, 0.5, 1e-6, 3.0, 1.0, 1.0])
EVERYTHING = {
    "softcap": 5.0,
    "temperature": 1.3,
    "logit_scale": 0.5,
    "label_smoothing": 0.1,
    "z_loss": 0.01,
    "token_weights": WEIGHTS,
}
OPTIONS = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"num_items": 17},
    {"num_items": torch.tensor(17)},
    {"token_weights": WEIGHTS},
    {"label_smoothing": 0.1},
    {"z_loss": 0.3},
    {"softcap": 2.0, "label_smoothing": 0.2},
    {"softcap": 2.0, "temperature": 0.7, "logit_scale": 1.5},
    EVERYTHING,
    {**EVERYTHING, "reduction": "none"},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_forward_and_gradients(backend, options, small_chunks):
    x, weight, bias, labels = problem(9, 7, 37)
    labels[3] = -100
    for b in (None, bias):
        for got, want in zip(*both_losses(backend, x, weight, b, labels, **options), strict=True):
            assert error(got, want) < 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "tokens,hidden,vocab", [(1, 1, 1), (1, 1, 2), (3, 65, 7), (2, 5, 17), (17, 33, 300), (1, 8, 16)]
)
def test_ragged_shapes(backend, tokens, hidden, vocab):
    for got, want in zip(*both_losses(backend, *problem(tokens, hidden, vocab, scale=0.5)), strict=True):
        assert error(got, want) < 3e-6 or (want.abs().max() == 0 and got.abs().max() == 0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options", [{}, {"reduction": "sum"}, {"num_items": 0}, {"num_items": torch.tensor(0)}], ids=str
)
@pytest.mark.parametrize("tokens", [0, 3])
def test_nothing_to_average(backend, options, tokens):
    a, w, b = leaves(torch.randn(tokens, 4), torch.randn(9, 4), torch.randn(9))
    with use(backend):
        loss, logps = linear_cross_entropy(
            a, w, torch.full((tokens,), -100), bias=b, return_logprob=True, label_smoothing=0.1, **options
        )
    assert loss == 0 and loss.shape == () and logps.shape == (tokens,) and (logps == 0).all()
    (loss * 65536).backward()
    assert (a.grad == 0).all() and (w.grad == 0).all() and (b.grad == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_other_outputs_are_those_of_linear_logprob(backend, reduction):
    x, weight, bias, labels = problem(9, 7, 37)
    labels[3] = -100
    flags = {"return_logprob": True, "return_entropy": True, "return_argmax": True}
    with use(backend):
        want = linear_logprob(x, weight, labels, bias=bias, return_entropy=True, return_argmax=True)
        for inputs in ((x, weight, bias), leaves(x, weight, bias)):
            loss, logps, entropy, top = linear_cross_entropy(
                inputs[0], inputs[1], labels, bias=inputs[2], reduction=reduction, z_loss=0.1, **flags
            )
            assert torch.equal(logps, want[0]) and torch.equal(entropy, want[1]) and torch.equal(top, want[2])
            assert not (logps.requires_grad or entropy.requires_grad or top.requires_grad)
            assert loss.requires_grad == inputs[0].requires_grad
            assert error(loss, loss_oracle(x, weight, labels, bias=bias, reduction=reduction, z_loss=0.1)) < 1e-6
        only = linear_cross_entropy(x, weight, labels, bias=bias, return_argmax=True)
    assert len(only) == 2 and torch.equal(only[1], want[2])


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (0, 0, 0)])
def test_only_the_gradients_that_are_needed_are_made(backend, needs, monkeypatch):
    """No work and no buffer for the others: the list of what the sweep returns is the evidence."""
    module = sys.modules["burnish.kernels.linear_cross_entropy"]
    made = []
    sweep = module.sweep

    def spy(*args, **kwargs):
        result = sweep(*args, **kwargs)
        made.append(result[1])
        return result

    monkeypatch.setattr(module, "sweep", spy)
    x, weight, bias, labels = problem(5, 6, 13)
    inputs = [t.clone().requires_grad_(bool(need)) for t, need in zip((x, weight, bias), needs, strict=True)]
    with use(backend):
        loss = linear_cross_entropy(inputs[0], inputs[1], labels, bias=inputs[2])
        with torch.no_grad():
            again = linear_cross_entropy(inputs[0], inputs[1], labels, bias=inputs[2])
    assert torch.equal(loss, again)
    assert [g is not None for g in made[0]] == [bool(n) for n in needs]
    assert all(g is None for g in made[1])
    if any(needs):
        loss.backward()
        want = leaves(x, weight, bias)
        loss_oracle(want[0], want[1], labels, bias=want[2]).backward()
        for got, full, need in zip(inputs, want, needs, strict=True):
            assert error(got.grad, full.grad) < 3e-6 if need else got.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [1.0, 3.0, 65536.0, 1e-8, -2.0, 0.0])
def test_upstream_factor_is_exactly_linear_and_backward_repeats(backend, factor, small_chunks):
    x, weight, _, labels = problem(9, 7, 37)
    a, w = leaves(x, weight)
    with use(backend):
        loss = linear_cross_entropy(a, w, labels)
        base = torch.autograd.grad(loss, (a, w), retain_graph=True)
        first = torch.autograd.grad(loss * factor, (a, w), retain_graph=True)
        second = torch.autograd.grad(loss * factor, (a, w))
    for one, f, s in zip(base, first, second, strict=True):
        assert torch.equal(f, s)
        assert error(f, one.double() * factor) < 4e-7 if factor else (f == 0).all()


@pytest.mark.parametrize("backend", CHUNKED)
def test_no_double_backward(backend):
    x, weight, _, labels = problem(5, 6, 13)
    a, w = leaves(x, weight)
    with use(backend):
        loss = linear_cross_entropy(a, w, labels)
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.autograd.grad(loss, a, create_graph=True)


def test_tied_embedding_gets_both_gradients():
    x, weight, _, labels = problem(5, 6, 13)
    ids = torch.tensor([1, 1, 4, 7, 12])
    grads = []
    for fn in (linear_cross_entropy, loss_oracle):
        (w,) = leaves(weight)
        fn(x + F.embedding(ids, w), w, labels).backward()
        grads.append(w.grad)
    assert error(*grads) < 2e-6


@pytest.mark.parametrize("backend", CHUNKED)
def test_accumulated_parts_equal_the_whole(backend):
    """Micro-batches with the same num_items add up to the one big batch; so do the sequences of a pack."""
    x, weight, _, labels = problem(12, 6, 40)
    labels[[0, 7]] = -100
    a, w = leaves(x, weight)
    b, v = leaves(x, weight)
    with use(backend):
        whole = linear_cross_entropy(a, w, labels)
        whole.backward()
        parts = 0.0
        for part in (slice(0, 1), slice(1, 4), slice(4, 12)):
            loss = linear_cross_entropy(b[part], v, labels[part], num_items=torch.tensor(10))
            loss.backward()
            parts += loss.item()
    assert abs(parts - whole.item()) < 1e-6 * whole.item()
    assert error(b.grad, a.grad) < 1e-6 and error(v.grad, w.grad) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_arguments_are_named(backend):
    x, weight, _, labels = problem(5, 6, 13)
    with use(backend):
        with pytest.raises(ValueError, match="use one of mean, sum, none"):
            linear_cross_entropy(x, weight, labels, reduction="avg")
        with pytest.raises(ValueError, match="num_items divides a mean"):
            linear_cross_entropy(x, weight, labels, reduction="sum", num_items=3)
        with pytest.raises(ValueError, match="must have the shape of labels"):
            linear_cross_entropy(x, weight, labels, token_weights=torch.ones(4))
        with pytest.raises(ValueError, match="label_smoothing must lie in"):
            linear_cross_entropy(x, weight, labels, label_smoothing=1.5)
        with pytest.raises(ValueError, match=r"labels\[2\] is 13"):
            linear_cross_entropy(x, weight, torch.tensor([0, -100, 13, 1, 2]))
