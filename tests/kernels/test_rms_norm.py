"""rms_norm on both paths (torch on the CPU, Triton in the interpreter) against its definition in float64."""

from importlib import import_module

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from burnish.kernels import backend_for, rms_norm, use
from burnish.kernels.dispatch import interpreting

home = import_module("burnish.kernels.rms_norm")
device_code = import_module("burnish.kernels.rms_norm_triton")
PATHS = {"torch": "auto", "triton": "triton"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# relative to the largest value: float32 rounding of a sum, and up to two roundings to a narrow type. Triton's
# interpreter cuts bfloat16 off where a GPU rounds: a whole unit in the last place (2^-7) instead of half of one.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
INTERPRETED = TOLERANCE | {torch.bfloat16: 2**-6}


@pytest.fixture(params=PATHS)
def path(request):
    """Tensors made inside go where the path runs: Triton takes a GPU where there is one, or its interpreter."""
    with use(PATHS[request.param]), torch.device(DEVICE if request.param == "triton" else "cpu"):
        yield request.param


def close(got, want, dtype):
    assert got.shape == want.shape
    error = (got.detach().double() - want).abs().max()
    bound = (INTERPRETED if interpreting() and backend_for(got) == "triton" else TOLERANCE)[dtype] * want.abs().max()
    assert error <= bound, f"largest error {error:.2e}, allowed {bound:.2e}"


def reference(x, weight, grad, **options):
    """y, dx, dw of the definition in float64."""
    x = x.detach().double().requires_grad_()
    weight = weight.detach().double().requires_grad_() if weight is not None else None
    y = home.rms_norm_definition(x, weight, EPS, **options)
    y.backward(grad.double())
    return y.detach(), x.grad, weight.grad if weight is not None else None


def draw(shape, dtype=torch.float32, weight_dtype=None, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(shape).to(dtype)
    weight = (torch.randn(shape[-1]) * 0.3 + 1).to(weight_dtype or dtype)
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(shape).to(dtype)


def check(x, weight, grad, **options):
    y = rms_norm(x, weight, EPS, **options)
    y.backward(grad.to(y.dtype))
    want_y, want_dx, want_dw = reference(x, weight, grad, **options)
    close(y, want_y, x.dtype)
    close(x.grad, want_dx, x.dtype)
    assert x.grad.dtype == x.dtype
    if weight is not None:
        close(weight.grad, want_dw, weight.dtype)
        assert weight.grad.dtype == weight.dtype


@pytest.mark.parametrize("shape", [(5, 7), (64, 64), (2, 3, 130), (300, 16), (1, 20), (3, 8200)], ids=str)
def test_matches_float64(path, shape):
    check(*draw(shape))


def test_one_column(path):
    """y is the sign of x times the weight; dx is what is left of dy - n * n * dy, next to nothing."""
    x, weight, grad = draw((4, 1))
    y = rms_norm(x, weight, EPS)
    y.backward(grad)
    want_y, want_dx, want_dw = reference(x, weight, grad)
    close(y, want_y, torch.float32)
    close(weight.grad, want_dw, torch.float32)
    rstd = (x.detach().double().pow(2) + EPS).rsqrt()
    assert ((x.grad - want_dx).abs() <= 1e-6 * (rstd * weight * grad).abs()).all()


@pytest.mark.parametrize("options", [{"cast": "llama"}, {"cast": "gemma"}, {"cast": "gemma", "offset": 1.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types_and_casts(path, dtype, options):
    check(*draw((9, 48), dtype), **options)


def test_narrow_long_rows(path):
    check(*draw((2, 8300), torch.bfloat16), cast="gemma", offset=1.0)


def test_llama_offset(path):
    check(*draw((4, 33)), offset=1.0)


@pytest.mark.parametrize("cast", ["llama", "gemma"])
def test_float32_weight_on_narrow_x(path, cast):
    x, weight, grad = draw((6, 40), torch.bfloat16, torch.float32)
    y = rms_norm(x, weight, EPS, cast=cast)
    assert y.dtype == (torch.float32 if cast == "llama" else torch.bfloat16)
    assert y.dtype == home.rms_norm_definition(x, weight, EPS, cast=cast).dtype
    y.backward(grad.to(y.dtype))
    want_y, want_dx, want_dw = reference(x, weight, grad, cast=cast)
    close(y, want_y, torch.bfloat16)
    close(x.grad, want_dx, torch.bfloat16)
    close(weight.grad, want_dw, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_without_weight(path, dtype):
    x, _, grad = draw((5, 24), dtype)
    check(x, None, grad)


LAYOUTS = {
    "rows of a wider tensor": lambda: torch.randn(6, 40)[:, 8:32],
    "heads of a fused projection": lambda: torch.randn(2, 3, 5 * 16)[..., 16:64].unflatten(-1, (3, 16)),
    "transposed heads": lambda: torch.randn(2, 3, 5, 16).transpose(1, 2),
    "last dimension strided": lambda: torch.randn(16, 6).t(),
    "every other row": lambda: torch.randn(8, 20)[::2],
    "expanded rows": lambda: torch.randn(1, 20).expand(4, 20),
    "expanded columns": lambda: torch.randn(4, 1).expand(4, 20),
    "one dimension": lambda: torch.randn(20),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(path, layout):
    """Of x and, laid out likewise, of the incoming gradient."""
    torch.manual_seed(1)
    x, grad = LAYOUTS[layout](), LAYOUTS[layout]()
    before = x.clone(), grad.clone()
    weight = (torch.randn(x.shape[-1]) + 1).requires_grad_()
    x.requires_grad_()
    y = rms_norm(x, weight, EPS)
    dx, dw = torch.autograd.grad(y, (x, weight), grad)
    for got, want in zip((y, dx, dw), reference(x, weight, grad), strict=True):
        close(got, want, torch.float32)
    assert torch.equal(x, before[0]) and torch.equal(grad, before[1])


def test_strided_weight(path):
    x, _, grad = draw((4, 12))
    wide = torch.randn(12, 2, requires_grad=True)
    y = rms_norm(x, wide[:, 0], EPS)
    y.backward(grad)
    want_y, want_dx, want_dw = reference(x, wide[:, 0], grad)
    close(y, want_y, torch.float32)
    close(x.grad, want_dx, torch.float32)
    close(wide.grad[:, 0], want_dw, torch.float32)


@pytest.mark.parametrize("scale", [1e3, 1e-3, 1e15, 0.0])
def test_magnitudes(path, scale):
    x, weight, grad = draw((4, 32))
    check((x.detach() * scale).requires_grad_(), weight, grad)


def test_all_zero_row(path):
    x, weight, grad = draw((3, 32))
    with torch.no_grad():
        x[1] = 0
    check(x, weight, grad)
    assert torch.isfinite(x.grad).all()


def test_nan_stays_in_its_row(path):
    x, weight, grad = draw((3, 32))
    with torch.no_grad():
        x[1, 5] = float("nan")
    y = rms_norm(x, weight, EPS)
    (dx,) = torch.autograd.grad(y, x, grad)
    assert torch.isnan(y[1]).all() and torch.isnan(dx[1]).all()
    want_y, want_dx, _ = reference(x[::2], weight, grad[::2])
    close(y[::2], want_y, torch.float32)
    close(dx[::2], want_dx, torch.float32)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_no_rows(path, shape):
    x, weight, grad = draw(shape)
    rms_norm(x, weight, EPS).backward(grad)
    assert x.grad.shape == shape
    assert torch.equal(weight.grad, torch.zeros(16))


@pytest.mark.parametrize("width", [16, 8200])
def test_only_what_needs_a_gradient_gets_one(path, width, monkeypatch):
    x, weight, grad = draw((3, width))
    want = reference(x, weight, grad)
    y = rms_norm(x.detach(), weight, EPS)
    y.backward(grad)
    close(weight.grad, want[2], torch.float32)
    assert x.grad is None

    def refuse(*_):
        raise AssertionError("a frozen weight costs a reduction")

    monkeypatch.setattr(device_code, "processors", refuse)  # sizes the partial rows of dW
    monkeypatch.setattr(torch, "mm", refuse)
    y = rms_norm(x, weight.detach(), EPS)
    y.backward(grad)
    close(x.grad, want[1], torch.float32)


def test_backward_twice(path):
    x, weight, grad = draw((5, 24))
    y = rms_norm(x, weight, EPS)
    kept = grad.clone(), x.detach().clone(), weight.detach().clone()
    first = torch.autograd.grad(y, (x, weight), grad, retain_graph=True)
    second = torch.autograd.grad(y, (x, weight), grad)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, (grad, x, weight), strict=True))


def test_grad_shared_with_a_residual(path):
    """The gradient of a sum reaches both branches as one tensor: whoever writes into it spoils the other."""
    x, weight, grad = draw((5, 24))
    (rms_norm(x, weight, EPS) + x).backward(grad)
    close(x.grad, reference(x, weight, grad)[1] + grad.double(), torch.float32)


def test_two_runs_give_the_same_bits(path):
    """With more blocks of rows than programs, so that programs walk several."""
    x, weight, grad = draw((700, 24))
    runs = []
    for _ in range(2):
        y = rms_norm(x, weight, EPS)
        runs.append((y, *torch.autograd.grad(y, (x, weight), grad)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    for got, want in zip(runs[0], reference(x, weight, grad), strict=True):
        close(got, want, torch.float32)


def test_saves_x_and_one_number_a_row(path):
    x, weight, _ = draw((6, 32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rms_norm(x, weight, EPS)
    own = [t for t in saved if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert [t.numel() for t in own] == [6]


def test_second_derivative_is_refused(path):
    x, weight, grad = draw((3, 8))
    for incoming in (grad, grad.clone().requires_grad_()):
        with pytest.raises(RuntimeError, match="can't be differentiated again"):
            torch.autograd.grad(rms_norm(x, weight, EPS), x, incoming, create_graph=True)


@pytest.mark.parametrize("options", [{}, {"cast": "gemma", "offset": 1.0}], ids=str)
def test_gradcheck(options):
    """Of the definition, and of the hand-written backward of the CPU path."""
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: home.rms_norm_definition(x, w, EPS, **options), (x, weight))
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, EPS, **options), (x, weight))
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, None, EPS), (x,))


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("module", "options"),
    [(LlamaRMSNorm, {}), (Gemma2RMSNorm, {"cast": "gemma", "offset": 1.0}), (Olmo2RMSNorm, {"cast": "gemma"})],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_equals_transformers_bit_for_bit(module, options, dtype, weight_dtype):
    for shape in [(4, 33), (2, 3, 64), (70, 576)]:
        x, weight, _ = draw(shape, dtype, weight_dtype)
        norm = module(shape[-1], EPS)
        norm.weight = torch.nn.Parameter(weight.detach())
        want = norm(x)
        for backend in ("auto", "reference"):
            with use(backend):
                got = rms_norm(x, weight, EPS, **options)
            assert got.dtype == want.dtype and torch.equal(got, want)


def test_row_offsets_beyond_32_bits(path):
    """Rows 2^30 elements apart, in memory that is reserved and not touched."""
    gap = 2**30
    x = torch.empty(2 * gap + 16, dtype=torch.bfloat16).as_strided((3, 16), (gap, 1))
    x.copy_(torch.randn(3, 16))
    y = rms_norm(x, None, EPS)
    close(y, home.rms_norm_definition(x.double(), None, EPS), torch.bfloat16)


def test_mistakes():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="unknown cast 'lama'"):
        rms_norm(x, None, EPS, cast="lama")
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\), got \(7,\)"):
        rms_norm(x, torch.ones(7), EPS)
    with pytest.raises(ValueError, match="last dimension that is not empty"):
        rms_norm(x[:, :0], None, EPS)
