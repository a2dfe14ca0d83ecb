"""Hard cases that every op must stand, on the CPU path and through Triton's interpreter, against float64.

A test's number is the case's in the project's list of adversarial cases; the cases of single ops are in the other
test_adversarial_*.py.
"""

import pytest
import torch
from all_ops import (
    IDS,
    OPS,
    PATHS,
    check,
    error,
    gradients,
    labels,
    leaves,
    outputs,
    randn,
    truth,
    upstream,
)
from pretend_gpu import HostSync, plain, pretended, to_gpu
from torch.utils.checkpoint import checkpoint

from burnish.kernels import linear_logprob, use
from burnish.kernels.dispatch import interpreting

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, where NaN meets the interpreter
    pytest.mark.skipif(not interpreting(), reason="the tensors lie on the CPU, and a GPU has its own tests"),
]
every_path = pytest.mark.parametrize(("name", "backend"), PATHS, ids=IDS)


@every_path
def test_case_02_one_token_and_none(name, backend):
    op = OPS[name]
    check(op, op.draw(1, 6), backend)
    tensors = leaves(op, op.draw(0, 6))
    outs = outputs(op, tensors, backend)
    grads = gradients(op, tensors, outs, [torch.ones_like(out) for out in outs])
    given = [t for i, t in enumerate(tensors) if i in op.trained]
    for grad, tensor in zip(grads, given, strict=True):
        assert grad.shape == tensor.shape and grad.dtype == tensor.dtype and (grad == 0).all()


@every_path
@pytest.mark.parametrize(("tokens", "width"), [(3, 1), (9, 65)], ids=str)
def test_case_03_sizes_that_are_no_powers_of_two(name, backend, tokens, width):
    op = OPS[name]
    tensors = op.draw(tokens, width)
    if width == 1 and "norm" in name and "qk" not in name:  # a norm of one column: dx is a difference of equal numbers
        outs, tensors = outputs(op, tensors, backend), leaves(op, tensors)
        assert all(error(got, want) < 3e-6 for got, want in zip(outs, truth(op, tensors)[0], strict=True))
    else:
        check(op, tensors, backend)


@every_path
def test_case_03_just_below_a_power_of_two(name, backend):
    check(OPS[name], OPS[name].draw(4, 4095), backend)


@every_path
def test_case_09_a_poisoned_row_harms_no_other(name, backend):
    """Of what there is for each token; sums over tokens (a weight's gradient, a mean) are spoilt, as they must be."""
    op = OPS[name]
    if name == "linear_cross_entropy":
        op = OPS["linear_cross_entropy none"]
    clean, dirty = leaves(op, op.draw(8, 6)), leaves(op, op.draw(8, 6))
    others = torch.arange(8) != 6
    if name == "varlen_attention":  # a token is seen by those behind it in its own sequence
        others = torch.arange(8) < 6
    with torch.no_grad():
        dirty[0][6].view(-1)[2] = float("nan" if backend == "triton" else "inf")
    runs = []
    for tensors in (clean, dirty):
        outs = outputs(op, tensors, backend)
        grads = gradients(op, tensors, outs, upstream(outs))
        places = [place for place, i in enumerate(op.trained) if i in op.rows]
        runs.append([*outs, *(grads[place] for place in places)])
    untouched = others
    for position, (want, got) in enumerate(zip(*runs, strict=True)):
        if name == "varlen_attention" and position:  # a poisoned score reaches the keys before it, in its sequence
            untouched = torch.arange(8) < 4
        assert torch.equal(got[untouched], want[untouched])
        assert torch.isfinite(want).all()
    if name != "varlen_attention":  # torch's CPU kernel gives a query that is not a number a row of zeros
        assert not torch.isfinite(runs[1][0][6]).all()


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "a slice of wider rows": lambda t: torch.cat([t, t, t], -1)[..., t.shape[-1] : 2 * t.shape[-1]],
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "every other column": lambda t: t.repeat_interleave(2, -1)[..., ::2],
}


@every_path
@pytest.mark.parametrize("layout", LAYOUTS)
def test_case_12_any_strides(name, backend, layout):
    """Of every input, weights too, and of the incoming gradients; nothing given is written to."""
    op = OPS[name]
    tensors = [LAYOUTS[layout](t) for t in op.draw(4, 8)]
    kept = [t.clone() for t in tensors]
    leafs = [t.requires_grad_(i in op.trained) for i, t in enumerate(tensors)]
    outs = outputs(op, leafs, backend)
    ups = [LAYOUTS[layout](up) if up.dim() else up for up in upstream(outs)]
    before = [up.clone() for up in ups]
    grads = gradients(op, leafs, outs, ups)
    want_outs, want_grads = truth(op, tensors, ups)
    for got, want in zip([*outs, *grads], [*want_outs, *want_grads], strict=True):
        assert error(got, want) < 3e-6
    assert all(torch.equal(now, was) for now, was in zip([*tensors, *ups], [*kept, *before], strict=True))


@every_path
def test_case_12_three_dimensions_and_an_expanded_input(name, backend):
    op = OPS[name]
    tensors = op.draw(4, 8)
    alike = (0,) if name == "varlen_attention" else op.rows  # over equal keys a query's gradient is 0
    same = [t[:1].expand(4, *t.shape[1:]) if i in alike else t for i, t in enumerate(tensors)]
    check(op, same, backend)
    if name == "varlen_attention" or "linear_c" in name or name == "linear_logprob":
        return  # one stream of tokens; [B, T, H] under the head is in test_linear_logprob_contract.py
    folded = [t.unflatten(0, (2, 2)) if i in op.rows else t for i, t in enumerate(tensors)]
    for whole, flat in zip(outputs(op, folded, backend), outputs(op, tensors, backend), strict=True):
        assert torch.equal(whole.flatten(0, 1), flat)


@every_path
def test_case_13_upstream_factors_are_exactly_linear(name, backend):
    """Powers of two, as a GradScaler's, commute with every rounding."""
    op = OPS[name]
    tensors = leaves(op, op.draw(3, 8))
    outs = outputs(op, tensors, backend)
    ups = upstream(outs)
    once = gradients(op, tensors, outs, ups, retain_graph=True)
    for factor in (65536.0, -(2.0**-20), 0.0):
        scaled = gradients(op, tensors, outs, [up * factor for up in ups], retain_graph=True)
        for one, many in zip(once, scaled, strict=True):
            assert torch.equal(many, one * factor)


@every_path
def test_case_14_a_second_backward_gives_the_same_bits(name, backend):
    op = OPS[name]
    tensors = leaves(op, op.draw(3, 8))
    outs = outputs(op, tensors, backend)
    ups = [1.7 * up for up in upstream(outs)]
    first = gradients(op, tensors, outs, ups, retain_graph=True)
    kept = [grad.clone() for grad in first]
    second = gradients(op, tensors, outs, ups, retain_graph=True)
    third = gradients(op, tensors, outs, ups)
    for a, b, c, d in zip(first, kept, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c) and torch.equal(c, d)
    for got, want in zip(first, truth(op, tensors, ups)[1], strict=True):
        assert error(got, want) < 3e-6


@every_path
def test_case_15_second_derivatives_are_refused(name, backend):
    """Also where the first gradient does not itself require one, as in a gradient penalty."""
    op = OPS[name]
    tensors = leaves(op, op.draw(3, 8))
    outs = outputs(op, tensors, backend)
    with pytest.raises(RuntimeError, match="differentiated again"):
        gradients(op, tensors, outs, upstream(outs), create_graph=True)


@every_path
def test_case_16_each_input_alone(name, backend):
    """The gradient is that of all together, and the others get none."""
    op = OPS[name]
    tensors = op.draw(3, 8)
    everything = leaves(op, tensors)
    outs = outputs(op, everything, backend)
    ups = upstream(outs)
    want = gradients(op, everything, outs, ups)
    frozen = outputs(op, [t.detach() for t in everything], backend)
    assert not any(out.requires_grad for out in frozen)
    for place, index in enumerate(op.trained):
        single = [t.detach().clone().requires_grad_(i == index) for i, t in enumerate(tensors)]
        outs = outputs(op, single, backend)
        reached = [(out, up) for out, up in zip(outs, ups, strict=True) if out.requires_grad]
        torch.autograd.backward(*zip(*reached, strict=True))
        assert error(single[index].grad, want[place].double()) < 1e-6
        assert all(t.grad is None for i, t in enumerate(single) if i != index)


NARROW = {torch.bfloat16: 2**-6, torch.float16: 2**-9}


@every_path
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_case_19_narrow_types(name, backend, dtype):
    """Types of results and gradients are the definition's, values off by a few roundings to that type at most."""
    op = OPS[name]
    tensors = leaves(op, op.draw(4, 16), dtype)
    outs = outputs(op, tensors, backend)
    assert [out.dtype for out in outs] == [out.dtype for out in outputs(op, tensors, "reference")]
    ups = upstream(outs)
    grads = gradients(op, tensors, outs, ups)
    want_outs, want_grads = truth(op, tensors, ups)
    for got, want in zip([*outs, *grads], [*want_outs, *want_grads], strict=True):
        assert error(got, want) < (3e-6 if got.dtype == torch.float32 else NARROW[dtype])
    given = [t for i, t in enumerate(tensors) if i in op.trained]
    assert all(grad.dtype == tensor.dtype for grad, tensor in zip(grads, given, strict=True))


@every_path
@pytest.mark.parametrize("leave", [False, True], ids=["backward inside", "backward outside"])
def test_case_19_float32_under_autocast(name, backend, leave):
    """As the definition does under autocast, whether the backward runs inside the region (a Trainer's does not)."""
    op = OPS[name]
    runs = []
    for which in (backend, "reference"):
        tensors = leaves(op, op.draw(4, 16))
        with torch.autocast("cpu", torch.bfloat16):
            outs = outputs(op, tensors, which)
            ups = upstream(outs)
            grads = None if leave else gradients(op, tensors, outs, ups)
        grads = gradients(op, tensors, outs, ups) if grads is None else grads
        assert all(grad.dtype == torch.float32 for grad in grads)
        runs.append([*outs, *grads])
    assert [a.dtype for a in runs[0]] == [b.dtype for b in runs[1]]
    for got, want in zip(*runs, strict=True):
        assert error(got, want.double()) < 2**-6


@every_path
def test_case_24_a_gradient_shared_with_a_residual(name, backend):
    """The upstream of a sum reaches both branches as one tensor; inputs and upstreams stay as they are."""
    op = OPS[name]
    tensors = leaves(op, op.draw(3, 8))
    outs = outputs(op, tensors, backend)
    ups = upstream(outs)
    kept = [t.detach().clone() for t in [*tensors, *ups]]
    versions = [t._version for t in [*tensors, *ups]]
    gradients(op, tensors, outs, ups)
    assert all(torch.equal(now, was) for now, was in zip([*tensors, *ups], kept, strict=True))
    assert [t._version for t in [*tensors, *ups]] == versions


@every_path
def test_case_24_checkpointing_recomputes_the_same_bits(name, backend):
    op = OPS[name]
    runs = []
    for wrapped in (False, True):
        tensors = leaves(op, op.draw(3, 8))

        def run(*tensors):
            return tuple(outputs(op, tensors, backend))

        with use(backend):  # in force during the recompute too
            outs = checkpoint(run, *tensors, use_reentrant=False) if wrapped else run(*tensors)
            runs.append([*outs, *gradients(op, tensors, outs, upstream(outs))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.interpreted])
def test_case_24_nothing_waits_for_the_device(name, dtype):
    """On tensors that say they lie on a GPU and refuse to be asked for a value, the ops run through and are right."""
    op = OPS[name]
    with pretended() as launches:
        tensors = [to_gpu(t) for t in leaves(op, op.draw(4, 16), dtype)]
        outs = outputs(op, tensors)
        ups = [to_gpu(plain(up)) for up in upstream([plain(out) for out in outs])]
        grads = gradients(op, tensors, outs, ups)
    assert launches
    want_outs, want_grads = truth(op, [plain(t) for t in tensors], [plain(up) for up in ups])
    for got, want in zip([*outs, *grads], [*want_outs, *want_grads], strict=True):
        assert error(plain(got), want) < (3e-6 if dtype == torch.float32 else 2**-7)


def test_case_24_the_pretended_gpu_does_refuse():
    """Counting labels waits, and is documented to; all_valid spares it (the test above)."""
    x, weight = (to_gpu(randn(*shape, seed=0)) for shape in ((5, 4), (11, 4)))
    with pretended(), pytest.raises(HostSync, match="nonzero"):
        linear_logprob(x, weight, to_gpu(labels(5)))
