"""qk_norm_rope on both paths (torch on the CPU, Triton in the interpreter) against its definition in float64."""

from importlib import import_module

import pytest
import torch
from transformers.models.cohere2.modeling_cohere2 import apply_rotary_pos_emb as interleaved_rotation
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from burnish.kernels import backend_for, qk_norm_rope, rms_norm, rope, use
from burnish.kernels.dispatch import interpreting
from burnish.kernels.rows import heads_of

home = import_module("burnish.kernels.qk_norm_rope")
device_code = import_module("burnish.kernels.qk_norm_rope_triton")
PATHS = {"torch": "auto", "triton": "triton"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# relative to the largest value: three roundings forward, one backward. Triton's interpreter cuts bfloat16 off where a
# GPU rounds.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}
INTERPRETED = TOLERANCE | {torch.bfloat16: 2**-6}


@pytest.fixture(params=PATHS)
def path(request):
    """Tensors made inside go where the path runs: Triton takes a GPU where there is one, or its interpreter."""
    with use(PATHS[request.param]), torch.device(DEVICE if request.param == "triton" else "cpu"):
        yield request.param


def close(got, want, dtype=None):
    assert got.shape == want.shape
    table = INTERPRETED if interpreting() and backend_for(got) == "triton" else TOLERANCE
    error, bound = (got.detach().double() - want).abs().max(), table[dtype or got.dtype] * want.abs().max()
    assert error <= bound, f"largest error {error:.2e}, allowed {bound:.2e}"


def reference(leaves, tables, grads, **options):
    """q, k and the gradients of the four leaves, of the definition in float64; grads may be None."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in leaves]
    outs = home.qk_norm_rope_definition(*leaves, *(t.double() for t in tables), EPS, **options)
    used = [(out, grad.double()) for out, grad in zip(outs, grads, strict=True) if grad is not None]
    there = [t for t in leaves if t is not None]
    found = iter(torch.autograd.grad([o for o, _ in used], there, [g for _, g in used], allow_unused=True))
    return *(out.detach() for out in outs), *(None if t is None else next(found) for t in leaves)


def draw(lead, heads, dim, rotated, dtype=torch.float32, weight_dtype=None):
    """[q, k, q_weight, k_weight], [cos, sin], [dq, dk]. cos and sin are random: their halves differ, and c^2 + s^2 is
    not 1, so only the true transpose passes."""
    torch.manual_seed(0)
    pair = [torch.randn(*lead, n, dim).to(dtype) for n in heads]
    weights = [(torch.randn(dim) * 0.3 + 1).to(weight_dtype or dtype) for _ in range(2)]
    tables = [torch.randn(*lead, rotated).to(dtype) for _ in range(2)]
    return [t.requires_grad_() for t in (*pair, *weights)], tables, [torch.randn_like(t) for t in pair]


def check(leaves, tables, grads, **options):
    outs = qk_norm_rope(*leaves, *tables, EPS, **options)
    there = [t for t in leaves if t is not None]
    found = torch.autograd.grad(outs, there, [grad.to(out.dtype) for grad, out in zip(grads, outs, strict=True)])
    want = [t for t in reference(leaves, tables, grads, **options) if t is not None]
    for got, true in zip((*outs, *found), want, strict=True):
        close(got, true, leaves[0].dtype)
    assert [t.dtype for t in found] == [t.dtype for t in there]
    assert all(out.is_contiguous() for out in outs)


SHAPES = [
    ((5,), (4, 2), 8, 8),
    ((2, 3), (3, 1), 6, 6),
    ((1, 4), (9, 3), 80, 80),
    ((3,), (2, 2), 96, 24),
    ((2, 2), (5, 1), 10, 2),
    ((2, 1, 3), (2, 1), 8, 4),
    ((1,), (1, 1), 256, 256),
    ((3,), (7, 5), 64, 64),
    ((3,), (4, 2), 128, 96),
]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("lead", "heads", "dim", "rotated"), SHAPES, ids=str)
def test_matches_float64(path, lead, heads, dim, rotated, interleaved):
    check(*draw(lead, heads, dim, rotated), interleaved=interleaved)


@pytest.mark.parametrize("options", [{"cast": "llama"}, {"cast": "gemma"}, {"cast": "gemma", "offset": 1.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types_and_casts(path, dtype, options):
    check(*draw((2, 5), (3, 2), 16, 12, dtype), **options)


def test_llama_offset(path):
    check(*draw((5,), (3, 2), 16, 16, torch.float16), offset=1.0)


@pytest.mark.parametrize("cast", ["llama", "gemma"])
def test_float32_weights_on_narrow_heads(path, cast):
    leaves, tables, grads = draw((5,), (3, 2), 16, 16, torch.bfloat16, torch.float32)
    out, _ = qk_norm_rope(*leaves, *tables, EPS, cast=cast)
    assert out.dtype == (torch.float32 if cast == "llama" else torch.bfloat16)
    check(leaves, tables, grads, cast=cast)


def test_float32_tables_on_narrow_heads(path):
    leaves, tables, grads = draw((5,), (3, 2), 16, 16)
    leaves = [t.detach().half().requires_grad_() for t in leaves]
    check(leaves, tables, [grad.half() for grad in grads])


@pytest.mark.parametrize("missing", [(2,), (3,), (2, 3)], ids=str)
def test_without_weights(path, missing):
    leaves, tables, grads = draw((5,), (3, 2), 16, 12)
    check([None if i in missing else t for i, t in enumerate(leaves)], tables, grads)


@pytest.mark.parametrize("heads", [(3, 1), (1, 40)], ids=str)
def test_tiles_that_end_inside_a_token(path, heads):
    """Several tiles a program backward, and a last one that is not full."""
    leaves, tables, grads = draw((61,), heads, 32, 32)
    rows = device_code.constants(*leaves[:2], 32, device_code.Settings(EPS, 0.0, "llama", False))["ROWS"]
    assert 61 * max(heads) > 2 * rows and rows % max(heads)
    check(leaves, tables, grads)


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
    "tokens last but one": lambda: (
        torch.randn(5, 2, 4, 8).transpose(0, 1),
        torch.randn(5, 2, 2, 8).transpose(0, 1),
    ),
}


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(path, layout, interleaved):
    """Of q and k and, laid out likewise, of their incoming gradients; nothing given is written to."""
    torch.manual_seed(1)
    pair, grads = LAYOUTS[layout](), LAYOUTS[layout]()
    leaves = [*pair, torch.randn(8) + 1, torch.randn(16)[::2] + 1]
    tables = [torch.randn(2, 5, 6), torch.randn(2, 5, 6)]
    kept = [t.clone() for t in (*leaves, *tables, *grads)]
    for leaf in leaves:
        leaf.requires_grad_()
    outs = qk_norm_rope(*leaves, *tables, EPS, interleaved=interleaved)
    assert all(out.is_contiguous() for out in outs)
    found = torch.autograd.grad(outs, leaves, grads)
    for got, want in zip((*outs, *found), reference(leaves, tables, grads, interleaved=interleaved), strict=True):
        close(got, want)
    assert all(torch.equal(a, b) for a, b in zip((*leaves, *tables, *grads), kept, strict=True))


def test_projection_layouts_are_not_copied():
    for layout in set(LAYOUTS) - {"last dimension strided"}:
        for x in LAYOUTS[layout]():
            assert heads_of(x)[0].data_ptr() == x.data_ptr(), layout


@pytest.mark.parametrize(
    ("lead", "table"), [((2, 5), (1, 5)), ((2, 5), (5,)), ((2, 3, 5), (1, 1, 5)), ((2, 5), (2, 1))], ids=str
)
def test_tables_broadcast(path, lead, table):
    leaves, _, grads = draw(lead, (3, 2), 8, 8)
    check(leaves, [torch.randn(*table, 8), torch.randn(*table, 8)], grads)


@pytest.mark.parametrize("kind", ["sin strided", "both strided", "R strided", "expanded"])
def test_strided_tables(path, kind):
    """The kernels address both tables alike."""
    leaves, (cos, sin), grads = draw((2, 5), (3, 2), 8, 8)
    if kind == "sin strided":
        sin = torch.randn(2, 5, 16)[..., 4:12]
    elif kind == "both strided":
        cos, sin = torch.randn(2, 5, 16).chunk(2, -1)
    elif kind == "R strided":
        cos = torch.randn(2, 8, 5).transpose(1, 2)
    else:
        cos, sin = cos[:1].expand(2, 5, 8), sin[:, :1].expand(2, 5, 8)
    check(leaves, [cos, sin], grads)


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_used(path, which):
    leaves, tables, grads = draw((5,), (3, 2), 8, 6)
    wanted = [grad if i == which else None for i, grad in enumerate(grads)]
    want = reference(leaves, tables, wanted)[2:]
    out = qk_norm_rope(*leaves, *tables, EPS)[which]
    found = torch.autograd.grad(out, leaves, grads[which], allow_unused=True)
    assert [grad is not None for grad in found] == [which == 0, which == 1] * 2
    for got, true in zip(found, want, strict=True):
        if got is not None:
            close(got, true)


@pytest.mark.parametrize("trained", [(0,), (1,), (0, 1), (2,), (3,), (2, 3), (0, 3), (0, 1, 3)], ids=str)
def test_only_what_needs_a_gradient_gets_one(path, trained, monkeypatch):
    leaves, tables, grads = draw((5,), (3, 2), 8, 6)
    want = reference(leaves, tables, grads)[2:]
    leaves = [t.detach().requires_grad_(i in trained) for i, t in enumerate(leaves)]
    if not {2, 3} & set(trained):
        refuse = lambda *_: pytest.fail("frozen weights cost a reduction")  # noqa: E731
        monkeypatch.setattr(device_code, "processors", refuse)  # sizes the partial rows of dW
        monkeypatch.setattr(torch, "mm", refuse)
    torch.autograd.backward(qk_norm_rope(*leaves, *tables, EPS), grads)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in trained)
        if leaf.grad is not None:
            close(leaf.grad, want[i])


class Launches:
    """A kernel that notes the sizes of its grids."""

    def __init__(self, kernel):
        self.kernel, self.grids = kernel, []

    def __getitem__(self, grid):
        self.grids.append(grid[0])
        return self.kernel[grid]


def test_partial_rows_are_bounded_and_an_idle_side_gets_no_program(monkeypatch):
    """Kernels for a machine of two processors: one launch each way, few programs where each holds a row of dW."""
    backward = Launches(device_code._backward_kernel)
    monkeypatch.setattr(device_code, "_backward_kernel", backward)
    monkeypatch.setattr(device_code, "processors", lambda device: 2)
    monkeypatch.setattr(device_code, "TILE_BYTES", 1024)  # four rows of 64
    with use("triton"), torch.device(DEVICE):
        leaves, tables, grads = draw((12,), (3, 2), 64, 64)
        outs = qk_norm_rope(*leaves, *tables, EPS)
        found = torch.autograd.grad(outs, leaves, grads, retain_graph=True)
        torch.autograd.grad(outs[1], leaves[1], grads[1])
        frozen = [t.detach().requires_grad_(i < 2) for i, t in enumerate(leaves)]
        torch.autograd.grad(qk_norm_rope(*frozen, *tables, EPS), frozen[:2], grads)
    most = 2 * device_code.PROGRAMS + 1
    assert backward.grids[0] <= most and backward.grids[1] <= 6 and backward.grids[2:] == [9 + 6]
    for got, want in zip(found, reference(leaves, tables, grads)[2:], strict=True):
        close(got, want)


def test_backward_twice(path):
    leaves, tables, grads = draw((5,), (3, 2), 8, 6)
    kept = [t.detach().clone() for t in (*leaves, *grads)]
    outs = qk_norm_rope(*leaves, *tables, EPS)
    first = torch.autograd.grad(outs, leaves, grads, retain_graph=True)
    second = torch.autograd.grad(outs, leaves, grads)
    assert all(torch.equal(a, b) for a, b in zip((*first, *kept), (*second, *leaves, *grads), strict=True))


def test_two_runs_give_the_same_bits(path):
    leaves, tables, grads = draw((90,), (3, 2), 32, 32)
    runs = []
    for _ in range(2):
        outs = qk_norm_rope(*leaves, *tables, EPS)
        runs.append((*outs, *torch.autograd.grad(outs, leaves, grads)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("scale", [1e3, 1e-3, 1e15, 0.0])
def test_magnitudes(path, scale):
    leaves, tables, grads = draw((4,), (2, 1), 8, 6)
    leaves = [(t.detach() * scale if i < 2 else t.detach()).requires_grad_() for i, t in enumerate(leaves)]
    check(leaves, tables, grads)


def test_an_all_zero_row(path):
    leaves, tables, grads = draw((4,), (2, 1), 8, 8)
    with torch.no_grad():
        leaves[0][1, 1] = 0
    check(leaves, tables, grads)


def test_nan_stays_in_its_head(path):
    leaves, tables, grads = draw((4,), (2, 1), 8, 6)
    with torch.no_grad():
        leaves[0][1, 1, 7] = float("nan")
    outs = qk_norm_rope(*leaves, *tables, EPS)
    dq, dk = torch.autograd.grad(outs, leaves[:2], grads)
    for got in (outs[0], dq):
        assert torch.isnan(got[1, 1]).all() and int(torch.isnan(got).sum()) == 8
    assert torch.isfinite(outs[1]).all() and torch.isfinite(dk).all()


@pytest.mark.parametrize(
    ("lead", "heads"), [((0,), (3, 2)), ((2, 0), (3, 2)), ((0, 3), (3, 2)), ((4,), (3, 0))], ids=str
)
def test_nothing_to_do(path, lead, heads):
    leaves, tables, grads = draw(lead, heads, 8, 8)
    outs = qk_norm_rope(*leaves, *tables, EPS)
    found = torch.autograd.grad(outs, leaves, grads)
    assert [t.shape for t in outs] == [t.shape for t in leaves[:2]]
    for got, want in zip(found, reference(leaves, tables, grads)[2:], strict=True):
        assert got.shape == want.shape
        assert got.numel() == 0 or (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_saves_q_and_k_and_at_most_one_number_a_row(path):
    leaves, tables, _ = draw((5,), (3, 2), 8, 6)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        qk_norm_rope(*leaves, *tables, EPS)
    given = {t.data_ptr() for t in (*leaves, *tables)}
    own = [t.numel() for t in saved if t.data_ptr() not in given]
    assert own == ([] if path == "triton" else [15, 10])


def test_second_derivative_is_refused(path):
    leaves, tables, grads = draw((2,), (1, 1), 4, 4)
    with pytest.raises(RuntimeError, match="can't be differentiated again"):
        torch.autograd.grad(qk_norm_rope(*leaves, *tables, EPS), leaves, grads, create_graph=True)


@pytest.mark.parametrize("options", [{}, {"cast": "gemma", "offset": 1.0, "interleaved": True}], ids=str)
def test_gradcheck(options):
    """Of the definition, and of the hand-written backward of the CPU path."""
    leaves, tables, _ = draw((2,), (2, 1), 6, 4)
    leaves, tables = [t.detach().double().requires_grad_() for t in leaves], [t.double() for t in tables]
    for function in (home.qk_norm_rope_definition, qk_norm_rope):
        assert torch.autograd.gradcheck(lambda *t, function=function: function(*t, *tables, EPS, **options), leaves)


@pytest.mark.parametrize("options", [{}, {"cast": "gemma", "offset": 1.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_is_rms_norm_then_rope_to_the_bit(dtype, options):
    """Of the CPU path; gradients too in float32. In narrower types one rounding, between the two steps, is spared."""
    leaves, tables, grads = draw((2, 7), (4, 2), 80, 64, dtype)
    two = rope(
        *(rms_norm(x, weight, EPS, **options) for x, weight in zip(leaves[:2], leaves[2:], strict=True)), *tables
    )
    one = qk_norm_rope(*leaves, *tables, EPS, **options)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    got, want = (torch.autograd.grad(outs, leaves, grads) for outs in (one, two))
    if dtype == torch.float32:
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        return
    truth = reference(leaves, tables, grads, **options)[2:]
    ours, theirs = (
        sum(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))
        for found in (got, want)
    )
    assert ours < theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_kernels_round_where_rms_norm_and_rope_round(dtype):
    """The fused kernel against the two kernels: only the sum of squares may be taken in another order."""
    with use("triton"), torch.device(DEVICE):
        leaves, tables, _ = draw((9,), (4, 2), 64, 64, dtype)
        two = rope(*(rms_norm(x, weight, EPS) for x, weight in zip(leaves[:2], leaves[2:], strict=True)), *tables)
        one = qk_norm_rope(*leaves, *tables, EPS)
    for a, b in zip(one, two, strict=True):
        assert (a != b).double().mean() < (0.5 if dtype == torch.float32 else 0.01)


@pytest.mark.parametrize("kind", ["qwen3", "gemma3", "interleaved"])
def test_equals_transformers(path, kind):
    """Its norms on [B, T, heads, D], its rotation in [B, heads, T, D], real angles; positions restart in the row."""
    leaves, _, _ = draw((1, 9), (4, 2), 16, 16)
    norms = [(Gemma3RMSNorm if kind == "gemma3" else Qwen3RMSNorm)(16, eps=EPS) for _ in range(2)]
    for norm, weight in zip(norms, leaves[2:], strict=True):
        norm.weight = torch.nn.Parameter(weight.detach())
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 0, 1, 2]).float()
    angles = positions[:, None] * 10000.0 ** (-torch.arange(8) / 8)
    angles = angles.repeat_interleave(2, -1) if kind == "interleaved" else torch.cat((angles, angles), -1)
    cos, sin = angles.cos()[None], angles.sin()[None]
    rotate = interleaved_rotation if kind == "interleaved" else apply_rotary_pos_emb
    want = rotate(*(norm(x).transpose(1, 2) for norm, x in zip(norms, leaves[:2], strict=True)), cos, sin)
    options = {"cast": "gemma", "offset": 1.0} if kind == "gemma3" else {"interleaved": kind == "interleaved"}
    got = qk_norm_rope(*leaves, cos, sin, EPS, **options)
    for ours, theirs in zip(got, want, strict=True):
        close(ours.transpose(1, 2), theirs.double())


@pytest.mark.parametrize("strided", ["tokens", "heads"])
def test_offsets_beyond_32_bits(path, strided):
    """Tokens, or heads, 2^30 elements apart, in memory that is reserved and not touched."""
    gap = 2**30
    shape, strides = ((3, 1, 8), (gap, 8, 1)) if strided == "tokens" else ((1, 3, 8), (8, gap, 1))
    leaves, tables, grads = draw(shape[:1], (shape[1], 1), 8, 8, torch.bfloat16)
    want = reference(leaves, tables, grads)
    far = [torch.empty(2 * gap + 8, dtype=torch.bfloat16).as_strided(shape, strides) for _ in range(2)]
    leaves[0] = far[0].copy_(leaves[0].detach()).requires_grad_()
    grads[0] = far[1].copy_(grads[0])
    outs = qk_norm_rope(*leaves, *tables, EPS)
    found = torch.autograd.grad(outs, leaves, grads)
    for got, true in zip((*outs, *found), want, strict=True):
        close(got, true)


def test_mistakes():
    leaves, tables, _ = draw((2, 5), (3, 2), 8, 8)
    q, k, *weights = leaves
    with pytest.raises(ValueError, match="qk_norm_rope: q and k must be"):
        qk_norm_rope(q, k[:1], *weights, *tables, EPS)
    with pytest.raises(ValueError, match="qk_norm_rope: cos and sin must be .* even R of at most 8"):
        qk_norm_rope(*leaves, tables[0][..., :3], tables[1][..., :3], EPS)
    with pytest.raises(ValueError, match=r"qk_norm_rope: cos \(2, 4, 8\) does not broadcast"):
        qk_norm_rope(*leaves, tables[0][:, :4], tables[1][:, :4], EPS)
    with pytest.raises(ValueError, match=r"qk_norm_rope: weight must have shape \(8,\), got \(7,\)"):
        qk_norm_rope(q, k, weights[0], weights[1][:7], *tables, EPS)
    with pytest.raises(ValueError, match="qk_norm_rope: unknown cast 'lama'"):
        qk_norm_rope(*leaves, *tables, EPS, cast="lama")
