"""varlen_attention on the CPU against its definition in float64: forward, every gradient, isolation, backends."""

import pytest
import torch

from burnish import kernels
from burnish.kernels import attention

CASES = {
    "plain": {},
    "scale": {"scale": 0.3},
    "window 3": {"window": 3},
    "window longer than any sequence": {"window": 100},
    "softcap": {"softcap": 2.0},
    "softcap and window": {"softcap": 2.0, "window": 4},
}


def packed(lengths, heads=(4, 2), dim=8, dtype=torch.float64):
    total = sum(lengths)
    torch.manual_seed(total)
    q = torch.randn(total, heads[0], dim, dtype=dtype, requires_grad=True)
    k, v = (torch.randn(total, heads[1], dim, dtype=dtype, requires_grad=True) for _ in range(2))
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return q, k, v, cu


def dense(q, k, v, cu, scale=None, window=None, softcap=None):
    """Every pair of tokens scored, pairs that may not meet masked out: the brute-force oracle."""
    scale = scale or q.shape[-1] ** -0.5
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    t = torch.arange(len(q))
    document = torch.bucketize(t, cu[1:].long(), right=True)
    meets = (document[:, None] == document[None]) & (t[:, None] >= t[None])
    if window:
        meets &= t[:, None] - t[None] < window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~meets, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@pytest.mark.parametrize("heads", [(4, 2), (3, 3), (4, 1)], ids=str)
def test_forward_and_gradients_equal_the_dense_oracle(options, heads, monkeypatch):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 3)  # several blocks, the last one ragged
    q, k, v, cu = packed([5, 1, 8], heads)
    weight = torch.randn_like(q)
    expected = dense(q, k, v, cu, **options)
    expected_grads = torch.autograd.grad((expected * weight).sum(), (q, k, v))
    for backend in ("sdpa", "reference"):
        out = kernels.varlen_attention(q, k, v, cu, 8, backend=backend, **options)
        grads = torch.autograd.grad((out * weight).sum(), (q, k, v))
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        for got, want in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)


def test_another_document_changes_no_bit():
    q, k, v, cu = packed([6, 9], dtype=torch.float32)
    before = kernels.varlen_attention(q, k, v, cu, 9)
    with torch.no_grad():
        for x in (q, k, v):
            x[:6] += 1.0
    after = kernels.varlen_attention(q, k, v, cu, 9)
    assert torch.equal(before[6:], after[6:]) and not torch.equal(before[:6], after[:6])


def test_strided_inputs_empty_sequences_and_no_tokens():
    q, k, v, _ = packed([7])
    fused = torch.cat([q, k, v], 1).transpose(0, 1).contiguous().transpose(0, 1)  # [T, H, D], heads outermost in memory
    cu = torch.tensor([0, 0, 3, 3, 7], dtype=torch.int32)
    out = kernels.varlen_attention(fused[:, :4], fused[:, 4:6], fused[:, 6:], cu, 4)
    torch.testing.assert_close(out, dense(q, k, v, torch.tensor([0, 3, 7])), rtol=1e-12, atol=1e-12)
    assert kernels.varlen_attention(q[:0], k[:0], v[:0], torch.zeros(1, dtype=torch.int32), 0).shape == (0, 4, 8)


def test_bad_arguments_are_named():
    q, k, v, cu = packed([4])
    with pytest.raises(ValueError, match="backend='flash'"):
        kernels.varlen_attention(q, k, v, cu, 4, backend="flash")
    with pytest.raises(ValueError, match="do not fit"):
        kernels.varlen_attention(q[:, :3], k, v, cu, 4)
    with pytest.raises(ValueError, match="cu_seqlens ends at 4"):
        kernels.varlen_attention(torch.cat([q, q]), torch.cat([k, k]), torch.cat([v, v]), cu, 4)


def test_the_choice_is_explained():
    q = torch.empty(1, 2, 8)
    assert attention.attention_backend(q) == ("sdpa", "no flash kernel runs on the CPU")
    with kernels.use("reference"):
        assert attention.attention_backend(q)[0] == "reference"


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"window": 300}, {"softcap": 20.0}], ids=str)
def test_cuda_backends_equal_the_definition(options):
    q, k, v, cu = packed([700, 3, 1024], (8, 2), 64, torch.float32)
    half = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in (q, k, v)]
    wide = [x.detach().double().requires_grad_() for x in half]
    weight = torch.randn(wide[0].shape, device="cuda", dtype=torch.float64)
    expected = kernels.varlen_attention(*wide, cu.cuda(), 1024, backend="reference", **options)
    out = kernels.varlen_attention(*half, cu.cuda(), 1024, **options)
    assert (out.double() - expected).norm() / expected.norm() < 5e-3
    got = torch.autograd.grad((out.double() * weight).sum(), half)
    want = torch.autograd.grad((expected * weight).sum(), wide)
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).norm() / b.norm() < 1e-2
