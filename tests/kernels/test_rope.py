"""rope on both paths (torch on the CPU, Triton in the interpreter) against its definition in float64."""

from importlib import import_module

import pytest
import torch
from transformers.models.cohere2 import modeling_cohere2
from transformers.models.llama import modeling_llama

from burnish.kernels import backend_for, rope, use
from burnish.kernels.dispatch import interpreting

home = import_module("burnish.kernels.rope")
PATHS = {"torch": "auto", "triton": "triton"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# relative to the largest value; Triton's interpreter cuts bfloat16 off where a GPU rounds
TOLERANCE = {torch.float32: 3e-7, torch.float16: 2**-11, torch.bfloat16: 2**-8}
INTERPRETED = TOLERANCE | {torch.bfloat16: 2**-7}


@pytest.fixture(params=PATHS)
def path(request):
    """Tensors made inside go where the path runs: Triton takes a GPU where there is one, or its interpreter."""
    with use(PATHS[request.param]), torch.device(DEVICE if request.param == "triton" else "cpu"):
        yield request.param


def close(got, want):
    assert got.shape == want.shape
    error = (got.detach().double() - want).abs().max()
    table = INTERPRETED if interpreting() and backend_for(got) == "triton" else TOLERANCE
    bound = table[got.dtype] * want.abs().max()
    assert error <= bound, f"largest error {error:.2e}, allowed {bound:.2e}"


def reference(q, k, cos, sin, dq, dk, interleaved=False):
    """The two results and the two gradients of the definition in float64."""
    q, k = (x.detach().double().requires_grad_() for x in (q, k))
    outs = home.rope_definition(q, k, cos.double(), sin.double(), interleaved=interleaved)
    return *(out.detach() for out in outs), *torch.autograd.grad(outs, (q, k), (dq.double(), dk.double()))


def check(q, k, cos, sin, interleaved=False):
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    dq, dk = torch.randn(q.shape).to(q.dtype), torch.randn(k.shape).to(k.dtype)
    outs = rope(q, k, cos, sin, interleaved=interleaved)
    grads = torch.autograd.grad(outs, (q, k), (dq, dk))
    for got, want, like in zip(
        (*outs, *grads), reference(q, k, cos, sin, dq, dk, interleaved), (q, k, q, k), strict=True
    ):
        assert got.dtype == like.dtype
        close(got, want)


def draw(lead, heads, dim, rotated, dtype=torch.float32):
    """cos and sin are random: their halves differ, and c^2 + s^2 is not 1, so only the true transpose passes."""
    torch.manual_seed(0)
    q, k = (torch.randn(*lead, n, dim).to(dtype) for n in heads)
    return q, k, torch.randn(*lead, rotated).to(dtype), torch.randn(*lead, rotated).to(dtype)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("lead", "heads", "dim", "rotated"),
    [
        ((5,), (4, 2), 8, 8),
        ((2, 3), (3, 1), 6, 6),
        ((1, 4), (9, 3), 80, 80),
        ((3,), (2, 2), 96, 24),
        ((2, 2), (5, 1), 10, 2),
        ((2, 1, 3), (2, 1), 8, 4),
        ((1,), (1, 1), 256, 256),
    ],
    ids=str,
)
def test_matches_float64(path, lead, heads, dim, rotated, interleaved):
    check(*draw(lead, heads, dim, rotated), interleaved)


def test_more_heads_than_a_block(path):
    heads = (70, 3)
    assert home.tiling(max(heads), 128, 128)["HEAD_BLOCK"] < 70
    check(*draw((2,), heads, 128, 128))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types(path, dtype, interleaved):
    check(*draw((2, 5), (3, 2), 16, 12, dtype), interleaved)


def test_float32_tables_on_narrow_heads(path):
    q, k, cos, sin = draw((5,), (3, 2), 16, 16)
    check(q.bfloat16(), k.bfloat16(), cos, sin)


def fused(tokens=(2, 5), q_heads=4, k_heads=2, dim=8):
    """q and k cut from the output of one projection [..., (Hq + 2 Hk) D]."""
    whole = torch.randn(*tokens, (q_heads + 2 * k_heads) * dim).unflatten(-1, (-1, dim))
    return whole[..., :q_heads, :], whole[..., q_heads : q_heads + k_heads, :]


LAYOUTS = {
    "fused projection": fused,
    "transposed [B, heads, T, D]": lambda: (
        torch.randn(2, 4, 5, 8).transpose(1, 2),
        torch.randn(2, 2, 5, 8).transpose(1, 2),
    ),
    "expanded heads": lambda: (torch.randn(2, 5, 1, 8).expand(2, 5, 4, 8), torch.randn(2, 5, 1, 8).expand(2, 5, 2, 8)),
    "last dimension strided": lambda: (torch.randn(2, 5, 8, 4).transpose(-1, -2), torch.randn(2, 5, 2, 16)[..., ::2]),
    "every other token": lambda: (torch.randn(2, 10, 4, 8)[:, ::2], torch.randn(2, 10, 2, 8)[:, ::2]),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(path, layout, interleaved):
    """Of q and k and, laid out likewise, of their incoming gradients; nothing given is written to."""
    torch.manual_seed(1)
    given = (*LAYOUTS[layout](), torch.randn(2, 5, 6), torch.randn(2, 5, 6), *LAYOUTS[layout]())
    kept = [x.clone() for x in given]
    q, k, cos, sin, dq, dk = given
    q.requires_grad_(), k.requires_grad_()
    outs = rope(q, k, cos, sin, interleaved=interleaved)
    assert all(out.is_contiguous() for out in outs)
    grads = torch.autograd.grad(outs, (q, k), (dq, dk))
    for got, want in zip((*outs, *grads), reference(*given, interleaved), strict=True):
        close(got, want)
    assert all(torch.equal(x, before) for x, before in zip(given, kept, strict=True))


def test_projection_layouts_are_not_copied():
    for layout in ("fused projection", "transposed [B, heads, T, D]", "expanded heads", "every other token"):
        for x in LAYOUTS[layout]():
            assert home._four_dims(x).data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    ("lead", "table"), [((2, 5), (1, 5)), ((2, 5), (5,)), ((2, 3, 5), (1, 1, 5)), ((2, 5), (2, 1))], ids=str
)
def test_tables_broadcast(path, lead, table):
    q, k, _, _ = draw(lead, (3, 2), 8, 8)
    check(q, k, torch.randn(*table, 8), torch.randn(*table, 8))


def test_strided_tables(path):
    q, k, _, _ = draw((2, 5), (3, 2), 8, 8)
    check(q, k, torch.randn(2, 8, 5).transpose(1, 2), torch.randn(2, 5, 16)[..., 4:12])


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
def test_no_tokens(path, lead):
    q, k, cos, sin = draw(lead, (3, 2), 8, 8)
    q.requires_grad_()
    outs = rope(q, k, cos, sin)
    assert outs[0].shape == q.shape and outs[1].shape == k.shape
    (dq,) = torch.autograd.grad(outs[0], q, torch.randn(q.shape))
    assert dq.shape == q.shape


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_used_or_one_input_frozen(path, which, monkeypatch):
    """The other is neither rotated back nor filled with zeros."""
    q, k, cos, sin = draw((5,), (3, 2), 8, 8)
    want = reference(q, k, cos, sin, torch.ones(q.shape), torch.ones(k.shape))[2 + which]
    name = "rotate_triton" if path == "triton" else "rotate_torch"
    rotate, seen = getattr(home, name), []
    monkeypatch.setattr(home, name, lambda q, k, *rest: seen.append((q is None, k is None)) or rotate(q, k, *rest))
    pair = [q.requires_grad_(), k.requires_grad_()]
    grads = torch.autograd.grad(rope(q, k, cos, sin)[which].sum(), pair, allow_unused=True)
    close(grads[which], want)
    assert grads[1 - which] is None
    pair[1 - which] = pair[1 - which].detach()
    q_out, k_out = rope(*pair, cos, sin)
    (grad,) = torch.autograd.grad(q_out.sum() + k_out.sum(), pair[which])
    close(grad, want)
    assert seen == [(False, False), (which == 1, which == 0)] * 2


def test_backward_twice(path):
    q, k, cos, sin = draw((5,), (3, 2), 8, 6)
    q.requires_grad_(), k.requires_grad_()
    grads = torch.randn(q.shape), torch.randn(k.shape)
    kept = [grad.clone() for grad in grads]
    outs = rope(q, k, cos, sin)
    first = torch.autograd.grad(outs, (q, k), grads, retain_graph=True)
    second = torch.autograd.grad(outs, (q, k), grads)
    assert all(torch.equal(a, b) for a, b in zip((*first, *kept), (*second, *grads), strict=True))


@pytest.mark.parametrize("scale", [1e3, 1e-3])
def test_magnitudes(path, scale):
    q, k, cos, sin = draw((4,), (2, 1), 8, 8)
    check(q * scale, k * scale, cos, sin)


def test_saves_the_tables_only(path):
    q, k, cos, sin = draw((5,), (3, 2), 8, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        rope(q.requires_grad_(), k, cos, sin)
    assert saved == [cos.data_ptr(), sin.data_ptr()]


def test_second_derivative_is_refused(path):
    q, k, cos, sin = draw((2,), (1, 1), 4, 4)
    outs = rope(q.requires_grad_(), k, cos, sin)
    with pytest.raises(RuntimeError, match="can't be differentiated again"):
        torch.autograd.grad(outs[0].sum(), q, create_graph=True)


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved):
    """Of the definition, and of the hand-written backward of the CPU path."""
    q, k, cos, sin = (x.double() for x in draw((2,), (2, 1), 6, 4))
    q.requires_grad_(), k.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: home.rope_definition(q, k, cos, sin, interleaved=interleaved), (q, k))
    assert torch.autograd.gradcheck(lambda q, k: rope(q, k, cos, sin, interleaved=interleaved), (q, k))


@pytest.mark.parametrize(
    "module", [modeling_llama, modeling_cohere2], ids=lambda module: module.__name__.split(".")[-1]
)
def test_equals_transformers(path, module):
    """In transformers' layout, [B, heads, T, D], with tables of real angles whose positions restart in the row."""
    torch.manual_seed(2)
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 0, 1, 2]).float()
    angles = positions[:, None] * 10000.0 ** (-torch.arange(8) / 8)
    interleaved = module is modeling_cohere2
    angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
    cos, sin = angles.cos()[None], angles.sin()[None]
    want = module.apply_rotary_pos_emb(q, k, cos, sin)
    got = rope(q.transpose(1, 2), k.transpose(1, 2), cos, sin, interleaved=interleaved)
    for ours, theirs in zip(got, want, strict=True):
        close(ours.transpose(1, 2), theirs.double())


def test_token_offsets_beyond_32_bits(path):
    """Tokens 2^30 elements apart, in memory that is reserved and not touched."""
    gap = 2**30
    q = torch.empty(2 * gap + 8, dtype=torch.bfloat16).as_strided((3, 1, 8), (gap, 8, 1))
    q.copy_(torch.randn(3, 1, 8))
    _, k, cos, sin = draw((3,), (1, 1), 8, 8, torch.bfloat16)
    for got, want in zip(
        rope(q, k, cos, sin), home.rope_definition(*(x.double() for x in (q, k, cos, sin))), strict=True
    ):
        close(got, want)


def test_mistakes():
    q, k, cos, sin = draw((2, 5), (3, 2), 8, 8)
    with pytest.raises(ValueError, match="q and k must be"):
        rope(q, k[:1], cos, sin)
    with pytest.raises(ValueError, match="even R of at most 8"):
        rope(q, k, cos[..., :3], sin[..., :3])
    with pytest.raises(ValueError, match="even R of at most 8"):
        rope(q, k, torch.zeros(2, 5, 10), torch.zeros(2, 5, 10))
    with pytest.raises(ValueError, match=r"cos \(2, 4, 8\) does not broadcast"):
        rope(q, k, cos[:, :4], sin[:, :4])
