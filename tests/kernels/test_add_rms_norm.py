"""add_rms_norm on both paths (torch on the CPU, Triton in the interpreter) against its definition in float64."""

from importlib import import_module

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from burnish.kernels import add_rms_norm, backend_for, rms_norm, use
from burnish.kernels.dispatch import interpreting

home = import_module("burnish.kernels.add_rms_norm")
device_code = import_module("burnish.kernels.rms_norm_triton")
PATHS = {"torch": "auto", "triton": "triton"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# relative to the largest value: roundings of the sum, of the norm and of the product. Triton's interpreter cuts
# bfloat16 off where a GPU rounds.
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


def reference(x, residual, weight, grads, **options):
    """normed, total, dx, dresidual, dweight of the definition in float64; a grad of an output may be None."""
    leaves = [t.detach().double().requires_grad_() for t in (x, residual, weight)]
    outs = home.add_rms_norm_definition(*leaves, EPS, **options)
    used = [(out, grad.double()) for out, grad in zip(outs, grads, strict=True) if grad is not None]
    found = torch.autograd.grad([out for out, _ in used], leaves, [grad for _, grad in used], allow_unused=True)
    return *(out.detach() for out in outs), *found


def draw(shape, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = (torch.randn(shape[-1]) * 0.3 + 1).to(dtype)
    return [t.requires_grad_() for t in (x, residual, weight)], [torch.randn(shape).to(dtype) for _ in range(2)]


def check(leaves, grads, **options):
    outs = add_rms_norm(*leaves, EPS, **options)
    found = torch.autograd.grad(outs, leaves, grads)
    for got, want in zip((*outs, *found), reference(*leaves, grads, **options), strict=True):
        close(got, want)
    assert [t.dtype for t in found] == [t.dtype for t in leaves]


@pytest.mark.parametrize("shape", [(5, 7), (64, 64), (2, 3, 130), (300, 16), (1, 20), (3, 8200), (20,)], ids=str)
def test_matches_float64(path, shape):
    check(*draw(shape))


@pytest.mark.parametrize("options", [{"cast": "llama"}, {"cast": "gemma"}, {"cast": "gemma", "offset": 1.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types_and_casts(path, dtype, options):
    check(*draw((9, 48), dtype), **options)


def test_llama_offset(path):
    check(*draw((4, 33)), offset=1.0)


def test_narrow_long_rows(path):
    check(*draw((2, 8300), torch.bfloat16), cast="gemma", offset=1.0)


@pytest.mark.parametrize("width", [48, 8300])
def test_the_sum_is_rounded_once_and_normed_as_rounded(path, width):
    """On both paths total is torch's own sum to the bit, and normed what rms_norm makes of that total."""
    (x, residual, weight), _ = draw((5, width), torch.float16)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(total, weight, EPS))


@pytest.mark.parametrize("which", [0, 1])
def test_a_wider_partner(path, which):
    """As under autocast: one of the two is float32, so is the sum, and each gets its gradient in its own type."""
    leaves, grads = draw((6, 40))
    leaves[which] = leaves[which].detach().bfloat16().requires_grad_()
    normed, total = add_rms_norm(*leaves, EPS)
    assert normed.dtype == total.dtype == torch.float32
    found = torch.autograd.grad((normed, total), leaves, grads)
    assert [t.dtype for t in found] == [t.dtype for t in leaves]
    for got, want in zip((normed, total, *found), reference(*leaves, grads), strict=True):
        close(got, want)


def test_without_weight(path):
    (x, residual, _), grads = draw((5, 24))
    ones = torch.ones(24)
    outs = add_rms_norm(x, residual, None, EPS)
    found = torch.autograd.grad(outs, (x, residual), grads)
    for got, want in zip((*outs, *found), reference(x, residual, ones, grads)[:4], strict=True):
        close(got, want)


LAYOUTS = {
    "rows of a wider tensor": lambda: torch.randn(6, 40)[:, 8:32],
    "heads of a fused projection": lambda: torch.randn(2, 3, 5 * 16)[..., 16:64].unflatten(-1, (3, 16)),
    "transposed heads": lambda: torch.randn(2, 3, 5, 16).transpose(1, 2),
    "last dimension strided": lambda: torch.randn(16, 6).t(),
    "every other row": lambda: torch.randn(8, 20)[::2],
    "expanded rows": lambda: torch.randn(1, 20).expand(4, 20),
    "expanded columns": lambda: torch.randn(4, 1).expand(4, 20),
    "long rows of a wider tensor": lambda: torch.randn(2, 8400)[:, 50:8350],
}


@pytest.mark.parametrize("odd", range(4), ids=["x", "residual", "d_normed", "d_total"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(path, layout, odd):
    """Of one tensor beside three contiguous ones; nothing given is written to."""
    torch.manual_seed(1)
    given = [LAYOUTS[layout]() for _ in range(4)]
    given = [t if i == odd else t.contiguous() for i, t in enumerate(given)]
    kept = [t.clone() for t in given]
    x, residual, *grads = given
    leaves = [x.requires_grad_(), residual.requires_grad_(), (torch.randn(x.shape[-1]) + 1).requires_grad_()]
    outs = add_rms_norm(*leaves, EPS)
    found = torch.autograd.grad(outs, leaves, grads)
    for got, want in zip((*outs, *found), reference(*leaves, grads), strict=True):
        close(got, want)
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))


@pytest.mark.parametrize("width", [24, 8200])
@pytest.mark.parametrize("which", [0, 1], ids=["normed", "total"])
def test_one_output_used(path, which, width, monkeypatch):
    """normed alone: no pass over zeros for the other. total alone: its gradient is the inputs', and no kernel runs."""
    leaves, grads = draw((3, width))
    kept = [t.clone() for t in grads]
    wanted = [grad if i == which else None for i, grad in enumerate(grads)]
    want = reference(*leaves, wanted)[2:]
    out = add_rms_norm(*leaves, EPS)[which]
    if which == 1:
        for name in ("backward_torch", "backward_triton"):
            monkeypatch.setattr(home, name, lambda *_: pytest.fail("a backward pass for a gradient that is known"))
    found = torch.autograd.grad(out, leaves, grads[which], allow_unused=True)
    assert (found[2] is None) == (which == 1)
    for got, true in zip(found, want, strict=True):
        if got is not None:
            close(got, true)
    assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_only_what_needs_a_gradient_gets_one(path, trained, monkeypatch):
    leaves, grads = draw((4, 32))
    want = reference(*leaves, grads)[2:]
    leaves = [t.detach().requires_grad_(i in trained) for i, t in enumerate(leaves)]
    if 2 not in trained:
        refuse = lambda *_: pytest.fail("a frozen weight costs a reduction")  # noqa: E731
        monkeypatch.setattr(device_code, "processors", refuse)  # sizes the partial rows of dW
        monkeypatch.setattr(torch, "mm", refuse)
    torch.autograd.backward(add_rms_norm(*leaves, EPS), grads)
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in trained)
        if leaf.grad is not None:
            close(leaf.grad, want[i])


def test_gradients_are_added_up_before_they_are_rounded(path):
    """The residual stream's gradient is large beside the norm's; rounding the norm's share first would show."""
    leaves, (d_normed, d_total) = draw((64, 64), torch.float16)
    leaves[1] = torch.zeros_like(leaves[1])  # so that the sum is exact
    d_total = (d_total.float() * 8).half()
    want = reference(*leaves, (d_normed, d_total))[2]
    found = torch.autograd.grad(add_rms_norm(*leaves, EPS), leaves[0], (d_normed, d_total))[0]
    off = (found != want.half()).double().mean()
    assert off < 0.001, f"{off:.1%} of the gradient is not the float16 nearest to the truth"


def test_an_all_zero_row(path):
    leaves, grads = draw((3, 32))
    with torch.no_grad():
        leaves[0][1] = -leaves[1][1]
    check(leaves, grads)
    leaves[0].grad = None
    (dx,) = torch.autograd.grad(add_rms_norm(*leaves, EPS), leaves[0], grads)
    assert torch.isfinite(dx).all()


def test_nan_stays_in_its_row(path):
    leaves, grads = draw((3, 32))
    with torch.no_grad():
        leaves[1][1, 5] = float("nan")
    outs = add_rms_norm(*leaves, EPS)
    dx, _ = torch.autograd.grad(outs, leaves[:2], grads)
    assert torch.isnan(outs[0][1]).all() and torch.isnan(dx[1]).all()
    want = reference(leaves[0][::2], leaves[1][::2], leaves[2], [grad[::2] for grad in grads])
    for got, true in zip((*outs, dx), want, strict=False):
        close(got[::2], true)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_no_rows(path, shape):
    leaves, grads = draw(shape)
    normed, total = add_rms_norm(*leaves, EPS)
    assert normed.shape == total.shape == shape
    dx, dresidual, dweight = torch.autograd.grad((normed, total), leaves, grads)
    assert dx.shape == dresidual.shape == shape and torch.equal(dweight, torch.zeros(16))


def test_backward_twice(path):
    leaves, grads = draw((5, 24))
    kept = [t.detach().clone() for t in (*leaves, *grads)]
    outs = add_rms_norm(*leaves, EPS)
    first = torch.autograd.grad(outs, leaves, grads, retain_graph=True)
    second = torch.autograd.grad(outs, leaves, grads)
    assert all(torch.equal(a, b) for a, b in zip((*first, *kept), (*second, *leaves, *grads), strict=True))


def test_gradients_of_both_inputs_add_up_where_they_meet(path):
    """x and residual are made from one leaf, used again afterwards: no gradient may be written into on the way."""
    leaves, (d_normed, d_total) = draw((5, 24))
    source, weight = leaves[0].detach().double(), leaves[2].detach().double()

    def run(add, source, weight):
        source = source.detach().requires_grad_()
        x = source * 2
        normed, total = add(x, source, weight, EPS)
        again, last = add(normed, total, weight, EPS)
        loss = (again * d_normed).sum() + (last * d_total).sum() + (total * d_normed).sum() + x.sum()
        return torch.autograd.grad(loss, source)[0]

    close(run(add_rms_norm, leaves[0], leaves[2]), run(home.add_rms_norm_definition, source, weight))


def test_two_runs_give_the_same_bits(path):
    """With more blocks of rows than programs, so that programs walk several."""
    leaves, grads = draw((700, 24))
    runs = []
    for _ in range(2):
        outs = add_rms_norm(*leaves, EPS)
        runs.append((*outs, *torch.autograd.grad(outs, leaves, grads)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    for got, want in zip(runs[0], reference(*leaves, grads), strict=True):
        close(got, want)


def test_saves_the_sum_and_one_number_a_row(path):
    (x, residual, weight), _ = draw((6, 32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        _, total = add_rms_norm(x, residual, weight, EPS)
    places = [t.data_ptr() for t in saved]
    assert total.data_ptr() in places and not {x.data_ptr(), residual.data_ptr()} & set(places)
    assert sorted(t.numel() for t in saved) == [6, 32, 6 * 32]


def test_second_derivative_is_refused(path):
    leaves, grads = draw((3, 8))
    with pytest.raises(RuntimeError, match="can't be differentiated again"):
        torch.autograd.grad(add_rms_norm(*leaves, EPS), leaves, grads, create_graph=True)


@pytest.mark.parametrize("options", [{}, {"cast": "gemma", "offset": 1.0}], ids=str)
def test_gradcheck(options):
    """Of the definition, and of the hand-written backward of the CPU path."""
    leaves = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (3, 5), (5,))]
    for function in (home.add_rms_norm_definition, add_rms_norm):
        assert torch.autograd.gradcheck(lambda *t, function=function: function(*t, EPS, **options), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("module", "options"),
    [(LlamaRMSNorm, {}), (Gemma2RMSNorm, {"cast": "gemma", "offset": 1.0})],
    ids=["llama", "gemma"],
)
def test_equals_transformers_bit_for_bit(module, options, dtype):
    for shape in [(4, 33), (2, 3, 64), (70, 576)]:
        (x, residual, weight), _ = draw(shape, dtype)
        norm = module(shape[-1], EPS)
        norm.weight = torch.nn.Parameter(weight.detach())
        total = residual + x
        for backend in ("auto", "reference"):
            with use(backend):
                got = add_rms_norm(x, residual, weight, EPS, **options)
            assert torch.equal(got[0], norm(total)) and torch.equal(got[1], total)


@pytest.mark.parametrize("odd", [0, 1], ids=["x", "residual"])
def test_row_offsets_beyond_32_bits(path, odd):
    """Rows 2^30 elements apart, in memory that is reserved and not touched."""
    gap = 2**30
    pair = [torch.randn(3, 16).bfloat16() for _ in range(2)]
    far = torch.empty(2 * gap + 16, dtype=torch.bfloat16).as_strided((3, 16), (gap, 1))
    pair[odd] = far.copy_(pair[odd])
    _, total = add_rms_norm(*pair, None, EPS)
    close(total, pair[0].double() + pair[1].double())


def test_gradient_offsets_beyond_32_bits(path):
    leaves, grads = draw((3, 16), torch.bfloat16)
    want = reference(*leaves, grads)[2]
    gap = 2**30
    far = [torch.empty(2 * gap + 16, dtype=torch.bfloat16).as_strided((3, 16), (gap, 1)).copy_(g) for g in grads]
    (dx,) = torch.autograd.grad(add_rms_norm(*leaves, EPS), leaves[0], far)
    close(dx, want)


def test_mistakes():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="add_rms_norm: unknown cast 'lama'"):
        add_rms_norm(x, x, None, EPS, cast="lama")
    with pytest.raises(ValueError, match=r"add_rms_norm: weight must have shape \(8,\), got \(7,\)"):
        add_rms_norm(x, x, torch.ones(7), EPS)
    with pytest.raises(ValueError, match=r"one shape, got \(2, 8\) and \(8,\)"):
        add_rms_norm(x, x[0], None, EPS)
