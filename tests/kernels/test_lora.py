"""lora_linear against its definition in float64 and against peft's own layer; what it keeps, skips and refuses."""

from importlib import import_module

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from burnish.kernels import lora_linear, lora_linears, use

home = import_module("burnish.kernels.lora")
NAMES = ("weight", "bias", "a", "b")
# of the largest value: sums of some dozens of products in the type that they are made and kept in
TOLERANCE = {torch.float64: 1e-14, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def draw(*shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def heads_of(outs, ranks, width, dtype, wide, biased=(True,)):
    """[(weight, bias, a, b, scale)] of projections of an input `width` wide."""
    made = []
    for i, (out, rank) in enumerate(zip(outs, ranks, strict=True)):
        bias = draw(out, seed=10 * i + 2, dtype=dtype) if biased[i % len(biased)] else None
        a, b = draw(rank, width, seed=10 * i + 3, dtype=wide), draw(out, rank, seed=10 * i + 4, dtype=wide)
        made.append((draw(out, width, seed=10 * i + 1, dtype=dtype), bias, a, b, 0.7 + i))
    return made


def tensors_of(heads):
    return {f"{name}{i}": t for i, head in enumerate(heads) for name, t in zip(NAMES, head, strict=False)}


def doubled(x, heads):
    """The same numbers as leaves in float64."""
    return x.detach().double().requires_grad_(), [
        (*(None if t is None else t.detach().double().requires_grad_() for t in head[:4]), head[4]) for head in heads
    ]


def assert_close(got, want, dtype, name):
    assert got.shape == want.shape, name
    error = (got.detach().double() - want).abs().max()
    assert error <= TOLERANCE[dtype] * want.abs().max(), f"{name}: {error:.1e} of {want.abs().max():.1e}"


def check(x, heads):
    """Outputs and every gradient against the definition in float64."""
    outs = lora_linears(x, *zip(*heads, strict=True))
    upstream = [draw(*y.shape, seed=90 + i, dtype=y.dtype).detach() for i, y in enumerate(outs)]
    torch.autograd.backward(outs, upstream)
    wide_x, wide_heads = doubled(x, heads)
    want = [home.lora_linear_definition(wide_x, *head) for head in wide_heads]
    torch.autograd.backward(want, [dy.double() for dy in upstream])
    for i, (y, expected) in enumerate(zip(outs, want, strict=True)):
        assert y.dtype == x.dtype
        assert_close(y, expected, x.dtype, f"y{i}")
    assert_close(x.grad, wide_x.grad, x.dtype, "dx")
    expected = tensors_of(wide_heads)
    for name, tensor in tensors_of(heads).items():
        if tensor is not None and tensor.requires_grad:
            assert tensor.grad.dtype == tensor.dtype
            # an adapter's gradient in float32 is made of x and dy as they are: no rounding to the base's type
            assert_close(tensor.grad, expected[name].grad, tensor.dtype, f"d{name}")


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize(
    ("outs", "ranks", "biased"),
    [((24, 8, 8), (4, 4, 4), (True, False)), ((7,), (3,), (False,)), ((5, 9), (1, 6), (True,))],
)
def test_forward_and_every_gradient_match_the_definition(dtype, wide, outs, ranks, biased, monkeypatch):
    monkeypatch.setattr(home, "CHUNK", 5)  # ragged pieces of 22 tokens
    check(draw(2, 11, 20, seed=0, dtype=dtype), heads_of(outs, ranks, 20, dtype, wide, biased))


def test_any_strides_and_no_leading_dimension():
    heads = heads_of((6, 4), (2, 2), 8, torch.float32, torch.float32)
    base = draw(8, 3, 5, seed=0)
    x = base.permute(2, 1, 0)
    x.retain_grad()
    check(x, heads)
    flat = draw(8, seed=5)
    y = lora_linear(flat, *heads[0])
    assert_close(
        y, home.lora_linear_definition(*(doubled(flat, heads[:1]))[:1], *doubled(flat, heads)[1][0]), y.dtype, "y"
    )


def test_no_tokens_at_all():
    heads = heads_of((6,), (2,), 8, torch.float32, torch.float32)
    x = draw(0, 8, seed=0)
    y = lora_linear(x, *heads[0])
    y.sum().backward()
    assert y.shape == (0, 6) and x.grad.shape == (0, 8)
    assert all(not t.grad.any() for t in heads[0][:4])


def frozen(heads, *names):
    for name, tensor in tensors_of(heads).items():
        if tensor is not None and name.rstrip("0123456789") in names:
            tensor.requires_grad_(False)
    return heads


def kept_by(function):
    """The tensors that a forward keeps for backward."""
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        outs = function()
    return outs, kept


def test_x_is_kept_once_in_its_own_type_and_nothing_else_of_its_size():
    heads = frozen(heads_of((24, 8, 8), (4, 4, 4), 20, torch.bfloat16, torch.float32), "weight", "bias")
    x = draw(64, 20, seed=0, dtype=torch.bfloat16)
    _, kept = kept_by(lambda: lora_linears(x, *zip(*heads, strict=True)))
    parameters = {t.data_ptr() for t in tensors_of(heads).values() if t is not None}
    others = [t for t in kept if t.data_ptr() not in parameters]
    assert sorted(tuple(t.shape) for t in others) == [(64, 12), (64, 20)]  # x A^T, and x
    assert [t.data_ptr() for t in others if t.shape[1] == 20] == [x.data_ptr()]


def test_x_is_not_kept_where_neither_a_nor_the_base_is_trained():
    heads = frozen(heads_of((24, 8), (4, 4), 20, torch.float32, torch.float32), "weight", "a")
    x = draw(64, 20, seed=0)
    _, kept = kept_by(lambda: lora_linears(x, *zip(*heads, strict=True)))
    assert x.data_ptr() not in {t.data_ptr() for t in kept}
    check(x, heads)


@pytest.mark.parametrize("names", [("weight", "bias"), ("weight", "bias", "a"), ("weight", "b"), ("a", "b"), ("bias",)])
def test_only_what_is_trained_gets_a_gradient(names):
    heads = frozen(heads_of((6, 10), (2, 3), 8, torch.float32, torch.float32), *names)
    check(draw(13, 8, seed=0), heads)
    for name, tensor in tensors_of(heads).items():
        assert (tensor.grad is None) == (name[:-1] in names), name


def test_the_input_may_need_no_gradient():
    heads = heads_of((6, 10), (2, 3), 8, torch.float32, torch.float32)
    x = draw(13, 8, seed=0)
    want = torch.autograd.grad([y.sum() for y in lora_linears(x, *zip(*heads, strict=True))], [heads[0][2]])
    got = torch.autograd.grad([y.sum() for y in lora_linears(x.detach(), *zip(*heads, strict=True))], [heads[0][2]])
    assert torch.equal(got[0], want[0])


def test_a_projection_that_nobody_uses_costs_and_changes_nothing():
    heads = heads_of((6, 10, 4), (2, 3, 2), 8, torch.float32, torch.float32)
    x = draw(13, 8, seed=0)
    lora_linears(x, *zip(*heads, strict=True))[1].square().sum().backward()
    (wide,), wide_heads = doubled(x, heads)[:1], doubled(x, heads)[1]
    home.lora_linear_definition(wide, *wide_heads[1]).square().sum().backward()
    assert_close(x.grad, wide.grad, torch.float32, "dx")
    assert_close(heads[1][2].grad, wide_heads[1][2].grad, torch.float32, "da")
    for index in (0, 2):
        assert all(t.grad is None or not t.grad.any() for t in heads[index][:4])


def test_the_incoming_gradient_and_what_was_saved_are_left_as_they_were():
    heads = heads_of((6, 10), (2, 3), 8, torch.float32, torch.float32)
    x = draw(13, 8, seed=0)
    outs = lora_linears(x, *zip(*heads, strict=True))
    upstream = [draw(*y.shape, seed=9).detach() for y in outs]
    before = [t.clone() for t in (*upstream, *tensors_of(heads).values(), x)]
    first = torch.autograd.grad(outs, x, upstream, retain_graph=True)[0]
    again = torch.autograd.grad(outs, x, upstream)[0]
    assert torch.equal(first, again)
    assert all(torch.equal(a, b) for a, b in zip(before, (*upstream, *tensors_of(heads).values(), x), strict=True))


def test_the_gradient_cannot_be_differentiated_again_but_under_the_definition_it_can():
    heads = heads_of((6,), (2,), 8, torch.float32, torch.float32)
    x = draw(13, 8, seed=0)
    with pytest.raises(RuntimeError, match="can't be differentiated again"):
        torch.autograd.grad(lora_linear(x, *heads[0]).sum(), x, create_graph=True)
    with use("reference"):
        (dx,) = torch.autograd.grad(lora_linear(x, *heads[0]).square().sum(), x, create_graph=True)
    dx.sum().backward()
    assert heads[0][2].grad.any()


def test_autocast_gives_what_torch_gives():
    heads = heads_of((6,), (2,), 8, torch.float32, torch.float32)
    x = draw(13, 8, seed=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, want = lora_linear(x, *heads[0]), home.lora_linear_definition(x, *heads[0])
    assert y.dtype == torch.bfloat16 and torch.equal(y, want)
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def peft_layer(dtype, wide, rank=4, alpha=8):
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    torch.manual_seed(0)
    base = nn.Linear(48, 40).to(dtype).requires_grad_(False)
    layer = Linear(base, "default", r=rank, lora_alpha=alpha, config=LoraConfig(r=rank, lora_alpha=alpha))
    adapters = layer.lora_A["default"].to(wide), layer.lora_B["default"].to(wide)
    nn.init.normal_(adapters[1].weight, std=0.1)
    return layer, *(adapter.weight for adapter in adapters)


def through(function, x, leaves):
    y = function(x)
    upstream = draw(*y.shape, seed=8, dtype=y.dtype).detach()
    return [y, *torch.autograd.grad(y, [x, *leaves], upstream)]


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_it_is_pefts_layer_to_the_last_place(dtype, wide):
    """Result, and the gradients of x and of both adapters. The base's part alone is large beside the adapter's, so
    leaving out a rounding or adding one would show: in bfloat16 all but a few values in a thousand are the same."""
    layer, a, b = peft_layer(dtype, wide)
    x = draw(96, 48, seed=1, dtype=dtype)
    theirs = through(layer, x, (a, b))
    base = layer.base_layer
    ours = through(lambda x: lora_linear(x, base.weight, base.bias, a, b, layer.scaling["default"]), x, (a, b))
    for name, got, want in zip(("y", "dx", "da", "db"), ours, theirs, strict=True):
        assert got.dtype == want.dtype, name
        place = torch.finfo(got.dtype).eps * want.abs().amax(-1, keepdim=True)  # of the row's largest value
        assert ((got - want).abs() <= place).all(), name
        if name == "y" and dtype == torch.bfloat16:
            assert (got != want).float().mean() < 2e-3


def test_shapes_and_types_that_do_not_fit():
    weight, bias, a, b, scale = heads_of((6,), (2,), 8, torch.float32, torch.float32)[0]
    x = draw(13, 8, seed=0)
    for broken in (
        (weight, bias, a.t(), b),
        (weight, bias, a, b.t()),
        (weight.t(), bias, a, b),
        (weight, bias[:3], a, b),
    ):
        with pytest.raises(ValueError, match=r"needs weight \[N, 8\], bias \[N\], a \[r, 8\] and b \[N, r\]"):
            lora_linear(x, *broken, scale)
    with pytest.raises(ValueError, match="must have one type"):
        lora_linear(x, weight, bias, a, b.double(), scale)
    with pytest.raises(ValueError, match="must not be narrower than x"):
        lora_linear(x, weight, bias, a.bfloat16(), b.bfloat16(), scale)
    with pytest.raises(ValueError, match="one or more projections"):
        lora_linears(x, [weight], [bias], [a], [b], [scale, 1.0])
