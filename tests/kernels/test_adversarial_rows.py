"""Hard cases of norms, rotation, packing and attention over packed sequences (26 to 32), against float64.

A test's number is the case's in the project's list of adversarial cases.
"""

from importlib import import_module

import pytest
import torch
from all_ops import EPS, OPS, check, error, gradients, leaves, outputs, randn, truth, upstream
from far_apart import far_apart
from pretend_gpu import plain, pretended, to_gpu

from burnish.kernels import add_rms_norm, qk_norm_rope, rms_norm, rope, use, varlen_attention
from burnish.kernels.dispatch import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="the tensors lie on the CPU, and a GPU has its own tests")
on_both = pytest.mark.parametrize("backend", ["auto", "triton"])
NORMS = ["rms_norm", "rms_norm gemma", "add_rms_norm", "qk_norm_rope"]


@on_both
@pytest.mark.parametrize("name", NORMS)
def test_case_26_a_row_of_zeros(name, backend):
    """1 / sqrt(mean square + eps) is eps^-1/2 there, and dx that times the scaled dy: finite, and not small."""
    op = OPS[name]
    tensors = op.draw(4, 8)
    tensors[0][2] = 0.0
    if name == "add_rms_norm":
        tensors[0][2] = -tensors[1][2]
    check(op, tensors, backend)
    given = leaves(op, tensors)
    outs = outputs(op, given, backend)
    ups = upstream(outs)
    dx = gradients(op, given, outs, ups)[0]
    assert (outs[0][2] == 0).all()
    if name == "rms_norm":
        want = EPS**-0.5 * given[1].detach().double() * ups[0][2].double()
        assert error(dx[2], want) < 1e-6


@on_both
@pytest.mark.parametrize("name", NORMS)
def test_case_27_weights_train_unless_they_are_frozen(name, backend):
    op = OPS[name]
    weights = [i for i in op.trained if i not in op.rows]
    tensors = leaves(op, op.draw(5, 8))
    outs = outputs(op, tensors, backend)
    torch.autograd.backward(outs, upstream(outs))
    want = truth(op, tensors)[1]
    assert weights
    for i in weights:
        assert error(tensors[i].grad, want[op.trained.index(i)]) < 3e-6 and tensors[i].grad.norm() > 0.1
    frozen = [t.detach().clone().requires_grad_(i in op.trained and i not in weights) for i, t in enumerate(tensors)]
    outs = outputs(op, frozen, backend)
    torch.autograd.backward(outs, upstream(outs))
    for i in op.trained:
        assert frozen[i].grad is None if i in weights else torch.equal(frozen[i].grad, tensors[i].grad)


def stack(add_and_norm, x, branches, weights):
    """Three prenorm layers: the residual stream goes on beside what is normed, and ends in the last norm."""
    residual = torch.zeros_like(x)
    for weight, branch in zip(weights, branches, strict=True):
        normed, residual = add_and_norm(x, residual, weight)
        x = torch.tanh(normed @ branch)
    return x + residual


@on_both
def test_case_28_gradients_of_a_prenorm_residual_stream(backend):
    """Both outputs are used, and the total is used twice; its gradient reaches x and the residual alike."""

    def by_the_book(x, residual, weight):
        total = x + residual
        return total * torch.rsqrt(total.square().mean(-1, keepdim=True) + EPS) * weight, total

    grads = []
    for function, dtype in ((lambda *t: add_rms_norm(*t, EPS), torch.float32), (by_the_book, torch.float64)):
        x = randn(5, 8, seed=0).to(dtype).requires_grad_()
        branches = [(0.5 * randn(8, 8, seed=i)).to(dtype).requires_grad_() for i in (1, 2, 3)]
        weights = [(1 + 0.3 * randn(8, seed=i)).to(dtype).requires_grad_() for i in (4, 5, 6)]
        with use(backend):
            out = stack(function, x, branches, weights)
        grads.append([out, *torch.autograd.grad(out, [x, *branches, *weights], randn(5, 8, seed=7).to(dtype))])
    for got, want in zip(*grads, strict=True):
        assert error(got, want) < 3e-6


@on_both
@pytest.mark.parametrize("used", [0, 1], ids=["normed only", "total only"])
def test_case_28_one_output_used(backend, used):
    op = OPS["add_rms_norm"]
    tensors, wide = leaves(op, op.draw(5, 8)), leaves(op, op.draw(5, 8), torch.float64)
    up = randn(5, 8, seed=9)
    out = outputs(op, tensors, backend)[used]
    got = torch.autograd.grad(out, tensors, up, allow_unused=True)
    want = torch.autograd.grad(outputs(op, wide, "reference")[used], wide, up.double(), allow_unused=True)
    for ours, theirs in zip(got, want, strict=True):
        if theirs is None:
            assert ours is None or (ours == 0).all()
        else:
            assert error(ours, theirs) < 3e-6


def tables(positions, rotated, sections=None):
    """cos and sin [T, R] of angles at `positions` [T], or [3, T] where the frequencies fall into three sections."""
    frequencies = 10000.0 ** (-torch.arange(rotated // 2) / (rotated // 2))
    angles = positions[..., None].float() * frequencies
    if sections is not None:
        angles = torch.cat([part[i] for i, part in enumerate(angles.split(sections, -1))], -1)
    angles = torch.cat((angles, angles), -1)
    return angles.cos(), angles.sin()


def alone(lengths, q, k, rotated):
    """Each sequence's q and k with tables of its own positions, from 0."""
    for qs, ks in zip(q.split(lengths), k.split(lengths), strict=True):
        yield qs, ks, *tables(torch.arange(len(qs)), rotated)


@on_both
@pytest.mark.parametrize("fused", [False, True], ids=["rope", "qk_norm_rope"])
@pytest.mark.parametrize(("dim", "rotated"), [(80, 80), (96, 24), (256, 256)], ids=str)
def test_case_29_positions_that_restart_and_every_head_size(backend, fused, dim, rotated):
    """A pack is its sequences one by one, bit for bit; and all of it is the definition."""
    lengths = (3, 1, 2)
    cos, sin = tables(torch.cat([torch.arange(n) for n in lengths]), rotated)
    q, k = randn(6, 3, dim, seed=0), randn(6, 1, dim, seed=1)
    scales = (1 + 0.3 * randn(dim, seed=2), 1 + 0.3 * randn(dim, seed=3)) if fused else ()

    def run(q, k, cos, sin):
        return qk_norm_rope(q, k, *scales, cos, sin, EPS) if fused else rope(q, k, cos, sin)

    with use(backend):
        whole = run(q, k, cos, sin)
        parts = [run(*pieces) for pieces in alone(lengths, q, k, rotated)]
    for output, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(output, torch.cat(pieces))
    op = OPS["qk_norm_rope" if fused else "rope"]
    check(op, [q, k, *scales, cos, sin], backend)


@on_both
def test_case_29_three_dimensional_positions(backend):
    """Multimodal rotation: frequencies in three sections, each turning by positions of its own. Every pair by hand."""
    positions = torch.tensor([[0, 1, 1, 1, 2], [0, 1, 1, 2, 3], [0, 1, 2, 1, 4]])
    q, k = randn(5, 3, 16, seed=0), randn(5, 1, 16, seed=1)
    with use(backend):
        got = rope(q, k, *tables(positions, 16, sections=[2, 3, 3]))
    for x, turned in zip((q, k), got, strict=True):
        for pair in range(8):
            angles = positions[0 if pair < 2 else 1 if pair < 5 else 2].double() * 10000.0 ** (-pair / 8)
            turn = torch.polar(torch.ones(5, dtype=torch.float64), angles)
            want = torch.complex(x[..., pair].double(), x[..., pair + 8].double()) * turn[:, None]
            assert error(turned[..., pair], want.real) < 1e-6 and error(turned[..., pair + 8], want.imag) < 1e-6


def dense(q, k, v, lengths, window, softcap):
    """Every pair of tokens scored, pairs that may not meet masked out."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    t, document = torch.arange(len(q)), torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    meets = (document[:, None] == document[None]) & (t[:, None] >= t[None])
    if window:
        meets &= t[:, None] - t[None] < window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~meets, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("options", [{}, {"window": 2}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("lengths", [[0, 3, 0, 0, 1, 1, 4, 0], [1, 1, 1], [0, 0, 5]], ids=str)
@pytest.mark.parametrize("slack", [0, 50])
def test_case_30_empty_and_one_token_sequences(lengths, options, slack):
    """Also with a max_seqlen beyond the longest: it is an upper bound."""
    op = OPS["varlen_attention"]
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    tensors = leaves(op, op.draw(sum(lengths), 8))
    out = varlen_attention(*tensors, cu, max(lengths) + slack, **options)
    wide = leaves(op, tensors, torch.float64)
    want = dense(*wide, lengths, options.get("window"), options.get("softcap"))
    up = randn(*out.shape, seed=3)
    got_grads, want_grads = torch.autograd.grad(out, tensors, up), torch.autograd.grad(want, wide, up.double())
    assert error(out, want) < 1e-6
    for got, truth_ in zip(got_grads, want_grads, strict=True):
        assert (got.double() - truth_).norm() < 3e-6 * max(1.0, truth_.norm())


@pytest.mark.parametrize("cu", [[0], [0, 0], [0, 0, 0, 0]], ids=str)
def test_case_30_no_tokens_at_all(cu):
    tensors = leaves(OPS["varlen_attention"], OPS["varlen_attention"].draw(0, 8))
    for longest in (0, 7):
        out = varlen_attention(*tensors, torch.tensor(cu, dtype=torch.int32), longest)
        grads = torch.autograd.grad(out, tensors, torch.ones_like(out))
        assert out.shape == (0, 4, 8) and [g.shape for g in grads] == [t.shape for t in tensors]


def test_case_30_sums_over_sequences():
    """Sums of log-probs over a stream with empty sequences: 0 there, and right next to them."""
    from burnish.logprobs import sequence_sums

    values = randn(6, seed=0).requires_grad_()
    cu = torch.tensor([0, 0, 2, 3, 3, 3, 6, 6], dtype=torch.int32)
    sums = sequence_sums(values, cu)
    want = torch.stack([values.double()[a:b].sum() for a, b in zip(cu, cu[1:], strict=False)])
    assert error(sums, want) < 1e-6 and (sums[[0, 3, 4, 6]] == 0).all()
    (grad,) = torch.autograd.grad(sums, values, torch.arange(7.0))
    assert torch.equal(grad, torch.tensor([1.0, 1, 2, 5, 5, 5]))
    assert torch.equal(sequence_sums(values[:0], torch.zeros(3, dtype=torch.int32)), torch.zeros(2))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"cast": "gemma", "offset": 1.0}, {"cast": "gemma"}], ids=str)
def test_case_31_where_narrow_results_are_rounded(options, weight_dtype):
    """bfloat16 activations: the kernel's roundings are the definition's, but for sums that end on the other side of a
    half. The two casting modes differ in every tenth number or so, so this tells them apart."""
    home = import_module("burnish.kernels.rms_norm")
    x, weight = randn(16, 64, seed=0).bfloat16(), (1 + 0.3 * randn(64, seed=1)).to(weight_dtype)
    want = home.rms_norm_definition(x, weight, EPS, **options)
    assert torch.equal(rms_norm(x, weight, EPS, **options), want)
    with pretended():
        got = rms_norm(to_gpu(x), to_gpu(weight), EPS, **options)
    assert got.dtype == want.dtype
    assert (plain(got) == want).float().mean() > 0.998
    assert (plain(got).double() - want.double()).abs().max() <= 2**-7 * want.abs().max()
    other = "gemma" if options.get("cast", "llama") == "llama" else "llama"
    if want.dtype == torch.bfloat16:
        swapped = home.rms_norm_definition(x, weight, EPS, **{**options, "cast": other}).to(want.dtype)
        assert (swapped == want).float().mean() < 0.95


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_case_31_fused_ops_round_as_their_parts(weight_dtype):
    """On the CPU bit for bit."""
    x, residual = randn(6, 3, 16, seed=0).bfloat16(), randn(6, 3, 16, seed=1).bfloat16()
    weight = (1 + 0.3 * randn(16, seed=2)).to(weight_dtype)
    for options in ({}, {"cast": "gemma", "offset": 1.0}):
        normed, total = add_rms_norm(x, residual, weight, EPS, **options)
        assert torch.equal(total, x + residual) and torch.equal(normed, rms_norm(x + residual, weight, EPS, **options))
        cos, sin = tables(torch.arange(6), 16)
        got = qk_norm_rope(x, residual, weight, weight, cos, sin, EPS, **options)
        want = rope(*(rms_norm(t, weight, EPS, **options) for t in (x, residual)), cos, sin)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))


@on_both
@pytest.mark.parametrize("name", ["rope", "qk_norm_rope"])
def test_case_32_tokens_beyond_32_bits(name, backend):
    """Tokens 2^30 elements apart in memory that is reserved and not touched; what leaves the op is compact, and its
    offsets are looked at in the compiled code (case 5)."""
    op = OPS[name]
    tensors = op.draw(3, 8)
    far = [far_apart(t, 2**30) if i < 2 else t for i, t in enumerate(tensors)]
    outs = outputs(op, leaves(op, tensors), backend)
    for got, want in zip(outputs(op, far, backend), outs, strict=True):
        assert torch.equal(got, want)
