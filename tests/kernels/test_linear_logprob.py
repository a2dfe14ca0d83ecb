"""linear_logprob on every backend against all logits at once in float64, forward and every gradient."""

import pytest
import torch
from head_cases import BACKENDS, CHUNKED, MARKS, both_tokens, error, leaves, problem, token_oracle

from burnish.kernels import linear_logprob, use

pytestmark = MARKS


OPTIONS = [
    {},
    {"temperature": 0.1},
    {"temperature": 10.0},
    {"logit_scale": 0.3},
    {"softcap": 1.5},
    {"softcap": 30.0, "temperature": 0.7, "logit_scale": 2.0},
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_forward_and_gradients(backend, options, with_bias, small_chunks):
    x, weight, bias, labels = problem(7, 9, 37)
    labels[2] = -100
    got, want = both_tokens(backend, x, weight, bias if with_bias else None, labels, **options)
    assert torch.equal(got[2], want[2])
    # rounding of the float32 logits is 1e-7 of their size, and exp turns it into a relative error of the gradient
    limit = 2e-6 * max(1.0, options.get("logit_scale", 1.0) / options.get("temperature", 1.0))
    for g, w in zip(got, want, strict=True):
        assert error(g, w) < limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "tokens,hidden,vocab", [(1, 1, 1), (1, 1, 2), (3, 65, 7), (2, 5, 17), (17, 33, 300), (1, 8, 16)]
)
def test_ragged_shapes(backend, tokens, hidden, vocab):
    got, want = both_tokens(backend, *problem(tokens, hidden, vocab, scale=0.5))
    for g, w in zip(got, want, strict=True):
        assert error(g, w) < 4e-6 or (w.abs().max() == 0 and g.abs().max() == 0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(backend):
    for labels in (torch.zeros(0, dtype=torch.long), torch.full((3,), -100)):
        a, w = leaves(torch.randn(labels.numel(), 4), torch.randn(9, 4))
        with use(backend):
            logps, entropy, top = linear_logprob(a, w, labels, return_entropy=True, return_argmax=True)
        assert logps.shape == entropy.shape == top.shape == labels.shape
        assert (logps == 0).all() and (top == -1).all()
        (logps.sum() + entropy.sum()).backward()
        assert (a.grad == 0).all() and (w.grad == 0).all()


def test_more_rows_than_a_grid_axis():
    x, weight, _, labels = problem(70_001, 2, 3)
    *rows, weight_got = zip(*both_tokens("auto", x, weight, None, labels), strict=True)
    for g, w in rows:
        assert error(g, w) < 3e-6
    assert error(*weight_got) < 2e-5  # 70,001 terms of both signs


@pytest.mark.parametrize("backend", CHUNKED)
def test_confident_tokens_keep_relative_accuracy(backend):
    """Losses from 1e-8 to 10: log-probs to 1e-5 and each token's gradient to 1e-5, where lse - z_t has none left."""
    gen = torch.Generator().manual_seed(3)
    weight = torch.randn(29, 48, generator=gen)
    labels = torch.randint(0, 29, (40,), generator=gen)
    strength = torch.linspace(-4, 21, 40)[:, None]
    x = strength * weight[labels] / weight[labels].square().sum(1, keepdim=True)
    (a, w), (a64, w64) = leaves(x, weight), leaves(x, weight)
    with use(backend):
        logps = linear_logprob(a, w, labels)
    truth = token_oracle(a64, w64, labels)[0]
    exact = _exact_logps(x, weight, labels)
    assert exact.max() > -1e-6 and exact.min() < -5
    assert ((logps - exact) / exact).abs().max() < 1e-5
    logps.sum().backward()
    truth.sum().backward()
    assert ((a.grad - a64.grad).norm(dim=1) / a64.grad.norm(dim=1)).max() < 1e-5
    assert error(w.grad, w64.grad) < 2e-6


def _exact_logps(x, weight, labels):
    """-log1p(sum of the others relative to the target), in float64: log_softmax itself cancels at 1e-8."""
    z = x.double() @ weight.double().T
    ratio = (z - z.gather(1, labels[:, None])).exp()
    return -torch.log1p(ratio.scatter(1, labels[:, None], 0.0).sum(1))


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("outlier", [80.0, 300.0, -300.0, 3000.0])
@pytest.mark.parametrize("known", [False, True])
def test_outlier_logits_stay_finite(backend, outlier, known, small_chunks):
    """A logit far above the target (exp would overflow), in some rows only, on the target or on another column."""
    x, weight, bias, labels = problem(8, 6, 37)
    labels[3], labels[4] = 20, 5
    x[:, 0] = 0.0
    x[3:6, 0] = 1.0
    weight[20, 0] = outlier
    weight[9, 0] = outlier / 2
    entropy = not known  # the upstream is known in the forward where only the hidden states need gradients
    for b in (None, bias):
        a, w = leaves(x, weight)
        a64, w64 = leaves(x, weight)
        with use(backend):
            out = linear_logprob(a, w if entropy else w.detach(), labels, bias=b, return_entropy=True)
        want = token_oracle(a64, w64 if entropy else w64.detach(), labels, bias=b)
        assert torch.isfinite(out[0]).all() and error(out[0], want[0]) < 1e-6
        assert ((out[1] - want[1]).abs() <= 1e-5 + 1e-5 * want[1].abs()).all()
        (out[0].sum() + (out[1].sum() if entropy else 0)).backward()
        (want[0].sum() + (want[1].sum() if entropy else 0)).backward()
        assert error(a.grad, a64.grad) < 1e-5
        if entropy:
            assert error(w.grad, w64.grad) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_vocabulary(backend, small_chunks):
    """Columns at -inf (the first tile whole): probability 0, entropy finite, gradients those of the other columns."""
    x, weight, _, labels = problem(6, 5, 37)
    labels.clamp_(min=18)
    bias = torch.zeros(37)
    bias[:17] = -torch.inf
    a, w = leaves(x, weight)
    a64, w64 = leaves(x, weight[17:])
    with use(backend):
        logps, entropy, top = linear_logprob(a, w, labels, bias=bias, return_entropy=True, return_argmax=True)
    want = token_oracle(a64, w64, labels - 17)
    assert error(logps, want[0]) < 1e-6 and error(entropy, want[1]) < 1e-6 and torch.equal(top, want[2] + 17)
    (logps.sum() + entropy.sum()).backward()
    (want[0].sum() + want[1].sum()).backward()
    assert error(a.grad, a64.grad) < 2e-6
    assert error(w.grad[17:], w64.grad) < 2e-6 and (w.grad[:17] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_impossible_target(backend):
    x, weight, bias, labels = problem(4, 5, 11)
    labels[:] = torch.tensor([3, 4, 5, 6])
    bias[4] = -torch.inf
    with use(backend):
        logps = linear_logprob(x, weight, labels, bias=bias)
    want = token_oracle(x, weight, labels, bias=bias)[0]
    keep = torch.tensor([0, 2, 3])
    assert logps[1] == -torch.inf == want[1]
    assert error(logps[keep], want[keep]) < 1e-6


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_a_poisoned_row_harms_no_other(backend, poison):
    x, weight, _, labels = problem(6, 5, 19)
    clean = linear_logprob(x, weight, labels)
    x[2, 1] = poison
    a, w = leaves(x, weight)
    with use(backend):
        logps, entropy = linear_logprob(a, w.detach(), labels, return_entropy=True)
    others = torch.arange(6) != 2
    assert error(logps[others], clean[others]) < 1e-6
    assert not torch.isfinite(logps[2])
    logps.sum().backward()
    assert torch.isfinite(a.grad[others]).all() and torch.isfinite(entropy[others]).all()
    assert a.grad[2].isnan().any()
