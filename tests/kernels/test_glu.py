"""swiglu and geglu on both paths (torch on the CPU, Triton in the interpreter) against the definitions in float64."""

import math
from functools import partial

import pytest
import torch

from burnish import kernels
from burnish.kernels import backend_for, geglu, glu, swiglu, use
from burnish.kernels.dispatch import interpreting

PATHS = {"torch": "auto", "triton": "triton"}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPS = {
    "swiglu": (swiglu, glu.swiglu_definition),
    "geglu tanh": (geglu, glu.geglu_definition),
    "geglu none": (partial(geglu, approximate="none"), partial(glu.geglu_definition, approximate="none")),
}
# relative to the largest value; Triton's interpreter cuts bfloat16 off where a GPU rounds
TOLERANCE = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
INTERPRETED = TOLERANCE | {torch.bfloat16: 2**-7}


pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's numpy


@pytest.fixture(params=PATHS)
def path(request):
    """Tensors made inside go where the path runs: Triton takes a GPU where there is one, or its interpreter."""
    with use(PATHS[request.param]), torch.device(DEVICE if request.param == "triton" else "cpu"):
        yield request.param


@pytest.fixture(params=OPS)
def op(request):
    return OPS[request.param]


def close(got, want):
    assert got.shape == want.shape
    error = (got.detach().double() - want).abs().max()
    table = INTERPRETED if interpreting() and backend_for(got) == "triton" else TOLERANCE
    bound = table[got.dtype] * want.abs().max()
    assert error <= bound, f"largest error {error:.2e}, allowed {bound:.2e}"


def reference(definition, gate, up, grad):
    gate, up = (x.detach().double().requires_grad_() for x in (gate, up))
    y = definition(gate, up)
    return y.detach(), *torch.autograd.grad(y, (gate, up), grad.double())


def check(op, gate, up, grad=None):
    run, definition = op
    gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
    y = run(gate, up)
    grad = torch.randn(y.shape).to(y.dtype) if grad is None else grad
    grads = torch.autograd.grad(y, (gate, up), grad)
    assert y.dtype == torch.promote_types(gate.dtype, up.dtype)
    assert (grads[0].dtype, grads[1].dtype) == (gate.dtype, up.dtype)
    for got, want in zip((y, *grads), reference(definition, gate, up, grad), strict=True):
        close(got, want)


def draw(shape, dtype=torch.float32):
    torch.manual_seed(0)
    return (torch.randn(shape) * 2).to(dtype), torch.randn(shape).to(dtype)


@pytest.mark.parametrize("shape", [(5, 7), (4, 64), (2, 3, 33), (1, 1), (3, 2050), (9,)], ids=str)
def test_matches_float64(path, op, shape):
    check(op, *draw(shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_types(path, op, dtype):
    check(op, *draw((6, 40), dtype))


def test_mixed_types(path, op):
    gate, up = draw((4, 24))
    check(op, gate.bfloat16(), up)


LAYOUTS = {
    "halves of a fused projection": lambda: torch.randn(2, 3, 48).chunk(2, -1),
    "one half contiguous": lambda: (torch.randn(2, 3, 48)[..., :24], torch.randn(2, 3, 24)),
    "interleaved": lambda: (torch.randn(5, 20)[:, ::2], torch.randn(5, 20)[:, 1::2]),
    "transposed": lambda: (torch.randn(20, 5).t(), torch.randn(20, 5).t()),
    "three levels": lambda: (torch.randn(2, 3, 4, 8).transpose(0, 2), torch.randn(4, 3, 2, 8)),
    "two levels": lambda: (torch.randn(2, 3, 4, 8)[:, :, 1], torch.randn(3, 2, 8).transpose(0, 1)),
    "expanded": lambda: (torch.randn(1, 20).expand(4, 20), torch.randn(4, 1).expand(4, 20)),
    "long strided rows": lambda: torch.randn(2, 4200).chunk(2, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(path, op, layout):
    torch.manual_seed(1)
    gate, up = LAYOUTS[layout]()
    kept = gate.clone(), up.clone()
    check(op, gate, up)
    check(op, gate, up, grad=LAYOUTS[layout]()[0])
    assert torch.equal(gate, kept[0]) and torch.equal(up, kept[1])


def test_halves_are_not_copied():
    for half in LAYOUTS["halves of a fused projection"]():
        (rows,), _, width, _ = glu._as_rows(half)
        assert rows.data_ptr() == half.data_ptr() and width == 24


@pytest.mark.parametrize("scale", [1e3, 1e-3, 0.0])
def test_magnitudes(path, op, scale):
    gate, up = draw((4, 32))
    check(op, gate * scale, up)
    check(op, gate, up * scale)


def test_saturated_gates(path, op):
    """Where exponentials and cubes overflow float32, the limits are g and 1 on the right, 0 and 0 on the left."""
    far = 1e10 if path == "torch" else 1e30  # torch's own gelu gives NaN where its cube is infinite
    gate = torch.tensor([far, 200.0, -200.0, -far], requires_grad=True)
    up = torch.ones(4, requires_grad=True)
    y = op[0](gate, up)
    dgate, dup = torch.autograd.grad(y, (gate, up), torch.ones(4))
    assert torch.equal(y, gate.detach().clamp_min(0)) and torch.equal(dup, y)
    assert torch.equal(dgate, torch.tensor([1.0, 1.0, 0.0, 0.0]))


def test_small_tails_keep_their_digits(path):
    """Left of zero the activation is small, not rounded to nothing: the relative error stays small too."""
    gate = torch.linspace(-60, -3, 20)
    want = gate.double() * torch.sigmoid(gate.double())
    assert ((swiglu(gate, torch.ones(20)).double() - want).abs() <= 1e-6 * want.abs()).all()
    if path == "triton":  # torch's own gelu computes 1 + tanh(u), whose digits cancel
        gate = torch.linspace(-8, -3, 20)
        wide = gate.double()
        want = wide * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))
        assert ((geglu(gate, torch.ones(20)).double() - want).abs() <= 1e-5 * want.abs()).all()


@pytest.mark.parametrize("shape", [(0, 16), (3, 0), (0,)], ids=str)
def test_nothing(path, op, shape):
    gate, up = draw(shape)
    y = op[0](gate.requires_grad_(), up.requires_grad_())
    y.backward(torch.zeros(shape))
    assert y.shape == gate.grad.shape == up.grad.shape == shape


@pytest.mark.parametrize("which", [0, 1])
def test_only_what_needs_a_gradient_gets_one(path, op, which):
    pair = list(draw((3, 20)))
    grad = torch.randn(3, 20)
    want = reference(op[1], *pair, grad)[1 + which]
    pair[which].requires_grad_()
    op[0](*pair).backward(grad)
    close(pair[which].grad, want)
    assert pair[1 - which].grad is None


def test_backward_twice(path, op):
    gate, up = (x.requires_grad_() for x in draw((5, 24)))
    grad = torch.randn(5, 24)
    kept = grad.clone(), gate.detach().clone(), up.detach().clone()
    y = op[0](gate, up)
    first = torch.autograd.grad(y, (gate, up), grad, retain_graph=True)
    second = torch.autograd.grad(y, (gate, up), grad)
    assert all(torch.equal(a, b) for a, b in zip((*first, *kept), (*second, grad, gate, up), strict=True))


def test_grad_shared_with_a_residual(path, op):
    gate, up = (x.requires_grad_() for x in draw((5, 24)))
    grad = torch.randn(5, 24)
    (op[0](gate, up) + gate + up).backward(grad)
    _, dgate, dup = reference(op[1], gate, up, grad)
    close(gate.grad, dgate + grad.double())
    close(up.grad, dup + grad.double())


def test_saves_gate_and_up_only(path, op):
    gate, up = draw((4, 24))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        op[0](gate.requires_grad_(), up)
    assert saved == [gate.data_ptr(), up.data_ptr()]


def test_second_derivative_is_refused(path, op):
    gate, up = draw((2, 8))
    y = op[0](gate.requires_grad_(), up)
    with pytest.raises(RuntimeError, match="can't be differentiated again"):
        torch.autograd.grad(y.sum(), gate, create_graph=True)


def test_gradcheck(op):
    """Of the definition, and of the hand-written backward of the CPU path."""
    gate, up = (x.double().requires_grad_() for x in draw((3, 4)))
    for function in op:
        assert torch.autograd.gradcheck(function, (gate, up))


def test_offsets_beyond_32_bits(path):
    """Rows 2^30 elements apart, in memory that is reserved and not touched."""
    gap = 2**30
    gate = torch.empty(2 * gap + 8, dtype=torch.bfloat16).as_strided((3, 8), (gap, 1))
    gate.copy_(torch.randn(3, 8))
    up = torch.randn(3, 8).bfloat16()
    close(swiglu(gate, up), glu.swiglu_definition(gate.double(), up.double()))


def test_mistakes():
    with pytest.raises(ValueError, match=r"one shape \[..., I\], got \(2, 3\) and \(3,\)"):
        swiglu(torch.zeros(2, 3), torch.zeros(3))
    with pytest.raises(ValueError, match="approximate must be 'tanh' or 'none', got 'erf'"):
        geglu(torch.zeros(2, 3), torch.zeros(2, 3), approximate="erf")


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "gelu"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_glu_linear_is_the_two_steps_to_the_bit(backend, activation, bias):
    torch.manual_seed(0)
    gate, up = torch.randn(3, 5, 14, requires_grad=True).chunk(2, -1)
    leaves = [x.detach().requires_grad_() for x in (gate, up, torch.randn(6, 7))]
    leaves += [torch.randn(6, requires_grad=True)] if bias else []
    unit = {
        "silu": kernels.swiglu,
        "gelu_tanh": kernels.geglu,
        "gelu": lambda g, u: kernels.geglu(g, u, approximate="none"),
    }[activation]
    upstream = torch.randn(3, 5, 6)
    with kernels.use(backend):
        two = torch.nn.functional.linear(unit(*leaves[:2]), *leaves[2:])
        one = kernels.glu_linear(*leaves, activation=activation)
        kept = [t for t in one.grad_fn.saved_tensors if t.shape == leaves[0].shape]
        assert len(kept) == 2, "gate and up are kept, their product is not"
        expected = torch.autograd.grad(two, leaves, upstream)
        got = torch.autograd.grad(one, leaves, upstream)
    assert torch.equal(one, two)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_glu_linear_makes_its_product_in_the_pass_of_the_gradients(monkeypatch):
    """In Triton; into a tensor of its own, so that nothing given changes."""
    given = [t.requires_grad_() for t in (*draw((4, 20)), torch.randn(6, 20))] + [torch.randn(4, 6)]
    kept = [t.detach().clone() for t in given]
    truth = [t.detach().double().requires_grad_() for t in given]
    linear = torch.nn.functional.linear(glu.swiglu_definition(*truth[:2]), truth[2])
    want = torch.autograd.grad(linear, truth[:3], truth[3])
    with kernels.use("triton"):
        y = kernels.glu_linear(*given[:3], activation="silu")
        monkeypatch.setattr(glu, "_forward_triton", lambda *_: pytest.fail("a second pass"))
        found = torch.autograd.grad(y, given[:3], given[3])
    for got, true in zip(found, want, strict=True):
        assert (got - true).abs().max() <= 1e-6 * true.abs().max()
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))


def test_glu_linear_gives_only_the_gradients_that_are_wanted():
    gate, up, weight = torch.randn(4, 6, requires_grad=True), torch.randn(4, 6), torch.randn(3, 6)
    kernels.glu_linear(gate, up, weight, activation="silu").sum().backward()
    assert gate.grad is not None and up.grad is None and weight.grad is None
    with pytest.raises(ValueError, match="activation must be one of silu"):
        kernels.glu_linear(gate, up, weight, activation="relu")
    with pytest.raises(ValueError, match="one shape"):
        kernels.glu_linear(gate, up[:, :3], weight, activation="silu")
