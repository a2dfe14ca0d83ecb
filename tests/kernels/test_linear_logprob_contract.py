"""What linear_logprob promises besides its numbers: which gradients and how often, strides, dtypes, masking, errors."""

import pytest
import torch
from head_cases import BACKENDS, CHUNKED, MARKS, both_tokens, error, leaves, problem, token_oracle

from burnish.kernels import head_chunks, linear_logprob, use

pytestmark = MARKS


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1), (1, 0, 1)])
@pytest.mark.parametrize("entropy", [False, True])
def test_any_subset_of_gradients(backend, needs, entropy):
    x, weight, bias, labels = problem(5, 6, 13)
    g = torch.tensor([1.0, 0.0, -2.0, 1e-8, 65536.0])
    grads = []
    for double in (False, True):
        inputs = [t.clone().requires_grad_(bool(need)) for t, need in zip((x, weight, bias), needs, strict=True)]
        a, w, b = inputs
        with use(backend):
            if double:
                logps, ent, _ = token_oracle(a, w, labels, bias=b)
            else:
                logps, ent = linear_logprob(a, w, labels, bias=b, return_entropy=True)
        ((logps * g).sum() + (ent.sum() if entropy else 0)).backward()
        grads.append([t.grad for t in inputs])
    for got, want, need in zip(*grads, needs, strict=True):
        assert (got is None) == (not need)
        if need:
            assert error(got, want) < 3e-6
    if needs[0]:  # row by row, so that the large rows do not hide the small ones
        small = (grads[0][0] - grads[1][0]).norm(dim=1) <= 3e-6 * grads[1][0].norm(dim=1)
        assert small.all()


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("frozen", [False, True])
def test_backward_twice_and_no_double_backward(backend, frozen):
    x, weight, _, labels = problem(5, 6, 13)
    a, w = leaves(x, weight)
    w.requires_grad_(not frozen)
    with use(backend):
        loss = linear_logprob(a, w, labels).mean() * 3
    (first,) = torch.autograd.grad(loss, a, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, a, retain_graph=True)
    assert torch.equal(first, kept) and torch.equal(first, second)
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.autograd.grad(loss, a, create_graph=True)


@pytest.mark.parametrize("backend", CHUNKED)
def test_inputs_and_upstream_gradients_are_left_alone(backend):
    x, weight, bias, labels = problem(5, 6, 13)
    a, w, b = leaves(x, weight, bias)
    g = torch.randn(5)
    kept = g.clone()
    with use(backend):
        linear_logprob(a, w, labels, bias=b).backward(g)
    for now, before in ((a, x), (w, weight), (b, bias), (g, kept)):
        assert torch.equal(now.detach(), before)


@pytest.mark.parametrize("backend", CHUNKED)
def test_activation_checkpointing(backend):
    x, weight, _, labels = problem(5, 6, 13)
    grads = []
    for checkpointed in (False, True):
        a, w = leaves(x, weight)
        with use(backend):
            if checkpointed:
                out = torch.utils.checkpoint.checkpoint(linear_logprob, a, w, labels, use_reentrant=False)
            else:
                out = linear_logprob(a, w, labels)
            out.square().sum().backward()
        grads.append((a.grad, w.grad))
    assert torch.equal(grads[0][0], grads[1][0]) and torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_shapes(backend):
    x, weight, _, labels = problem(12, 6, 13)
    want = token_oracle(x, weight, labels)[0]
    shapes = {
        "transposed": (x.T.contiguous().T, weight.T.contiguous().T, labels),
        "sliced": (torch.cat([x, x], 1)[:, :6], torch.cat([weight, weight])[:13], labels.repeat_interleave(2)[::2]),
        "3-D": (x.view(3, 4, 6), weight, labels.view(3, 4)),
        "3-D of strides": (x.view(3, 4, 6).transpose(0, 1), weight, labels.view(3, 4).T),
    }
    for name, (a, w, y) in shapes.items():
        a, w = a.detach().requires_grad_(), w.detach().requires_grad_()
        with use(backend):
            got = linear_logprob(a, w, y)
        target = want.view(3, 4).T if name == "3-D of strides" else want.view(y.shape)
        assert got.shape == y.shape and got.dtype == torch.float32
        assert error(got, target) < 1e-6, name
        got.sum().backward()
        a64, w64 = leaves(a, w)
        token_oracle(a64, w64, y)[0].sum().backward()
        assert error(a.grad, a64.grad) < 2e-6 and error(w.grad, w64.grad) < 2e-6, name
    with use(backend):
        same = linear_logprob(x[:1].expand(4, 6), weight, labels[:1].expand(4))
    assert torch.equal(same, same[:1].expand(4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "x_dtype,w_dtype",
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
    ],
    ids=str,
)
def test_dtypes(backend, x_dtype, w_dtype, small_chunks):
    """The inputs are rounded once, by the caller; the log-probs are then as exact as in float32."""
    x, weight, bias, labels = problem(9, 7, 37)
    x, weight, bias = x.to(x_dtype), weight.to(w_dtype), bias.to(w_dtype)
    got, want = both_tokens(backend, x, weight, bias, labels.int())
    assert got[0].dtype == got[1].dtype == torch.float32
    assert error(got[0], want[0]) < 1e-6 and error(got[1], want[1]) < 2e-6
    for g, w, dtype in zip(got[3:], want[3:], (x_dtype, w_dtype, w_dtype), strict=True):
        assert g.dtype == dtype
        assert error(g, w) < (4e-3 if dtype == torch.bfloat16 else 6e-4 if dtype == torch.float16 else 2e-6)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_float64_runs_the_definition(backend):
    x, weight, bias, labels = problem(4, 3, 7)

    def run(a, w, b):
        with use(backend):
            return linear_logprob(a, w, labels, bias=b, softcap=2.0, temperature=0.5, return_entropy=True)

    assert torch.autograd.gradcheck(run, [t.double().requires_grad_() for t in (x, weight, bias)])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_rounds_the_inputs_as_a_linear_layer_does(backend):
    x, weight, _, labels = problem(5, 6, 13)
    a, w = leaves(x, weight)
    with use(backend), torch.autocast("cpu", torch.bfloat16):
        logps = linear_logprob(a, w, labels)
        logps.sum().backward()
    rounded = token_oracle(x.bfloat16(), weight.bfloat16(), labels)[0]
    assert error(logps, rounded) < 1e-6
    assert a.grad.dtype == w.grad.dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore", [-100, -1, 5])
def test_masking_is_removing(backend, ignore):
    """Also where the ignored index is a class of the vocabulary, and with rows of rubbish behind the mask."""
    x, weight, _, labels = problem(8, 6, 13)
    labels[labels == 5] = 6
    labels[[1, 4]] = ignore
    keep = labels != ignore
    a, w = leaves(x, weight)
    with torch.no_grad():
        a[1] = float("nan")
    b, v = leaves(x[keep], weight)
    with use(backend):
        masked, top = linear_logprob(a, w, labels, ignore_index=ignore, return_argmax=True)
        removed = linear_logprob(b, v, labels[keep], all_valid=True)
    assert torch.equal(masked[keep], removed) and (masked[~keep] == 0).all() and (top[~keep] == -1).all()
    masked.square().sum().backward()
    removed.square().sum().backward()
    assert torch.equal(a.grad[keep], b.grad) and (a.grad[~keep] == 0).all() and torch.equal(w.grad, v.grad)


@pytest.mark.parametrize("backend", CHUNKED)
def test_order_and_packing_do_not_matter(backend):
    x, weight, _, labels = problem(11, 6, 40)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    with use(backend):
        whole = linear_logprob(x, weight, labels)
        permuted = linear_logprob(x[order], weight, labels[order])
        apart = torch.cat([linear_logprob(x[part], weight, labels[part]) for part in (slice(0, 3), slice(3, 11))])
    assert error(permuted, whole[order]) < 3e-7
    assert error(apart, whole) < 3e-7


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("softcap", [None, 4.0])
def test_policy_equal_to_reference_gives_ratio_zero(backend, softcap):
    """With and without gradients, and for a frozen head, the log-probs are the same bits, run after run."""
    x, weight, _, labels = problem(9, 6, 40)
    a, w = leaves(x, weight)
    with use(backend):
        policy = linear_logprob(a, w, labels, softcap=softcap)
        lora = linear_logprob(a, weight, labels, softcap=softcap)
        with torch.no_grad():
            reference = linear_logprob(a, w, labels, softcap=softcap)
    assert torch.equal(policy, reference) and torch.equal(lora, reference)
    runs = []
    for _ in range(2):
        a, w = leaves(x, weight)
        with use(backend):
            linear_logprob(a, w, labels, softcap=softcap).square().sum().backward()
        runs.append((a.grad, w.grad))
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


@pytest.mark.parametrize("backend", CHUNKED)
def test_adding_a_constant_to_all_logits_changes_nothing(backend):
    x, weight, _, labels = problem(9, 6, 40)
    with use(backend):
        plain = linear_logprob(x, weight, labels, bias=torch.zeros(40))
        shifted = linear_logprob(x, weight, labels, bias=torch.full((40,), 64.0))
        equal = linear_logprob(torch.zeros(2, 6), weight, labels[:2])
    assert (plain - shifted).abs().max() < 3e-5  # half a unit of the last place at 64 is 4e-6
    assert error(equal, torch.full((2,), -torch.log(torch.tensor(40.0)))) < 3e-7


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_input_is_named(backend):
    x, weight, bias, labels = problem(5, 6, 13)
    with use(backend):
        for bad in (13, -1, 10**12):
            y = labels.clone()
            y[0], y[3] = -100, bad
            with pytest.raises(ValueError, match=rf"labels\[3\] is {bad}, outside the vocabulary of 13"):
                linear_logprob(x, weight, y)
        with pytest.raises(ValueError, match="do not fit"):
            linear_logprob(x, weight[:, :5], labels)
        with pytest.raises(ValueError, match="do not fit"):
            linear_logprob(x, weight, labels[:4])
        with pytest.raises(ValueError, match="bias has shape"):
            linear_logprob(x, weight, labels, bias=bias[:4])
        with pytest.raises(ValueError, match="want integers"):
            linear_logprob(x, weight, labels.float())
        with pytest.raises(ValueError, match="temperature must be positive"):
            linear_logprob(x, weight, labels, temperature=0.0)
        with pytest.raises(ValueError, match="softcap must be None or positive"):
            linear_logprob(x, weight, labels, softcap=0.0)


def test_chunk_rule():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for n in (0, 1, 100, 720, 4096, 9000, 131072):
        for hidden, vocab in ((576, 49152), (4096, 128256), (3840, 262208), (64, 2)):
            rows = head_chunks.rows_per_chunk(n, hidden, vocab, cpu)
            assert rows >= 1 and rows * vocab * 4 <= max(head_chunks.CPU_TILE_BYTES, 128 * vocab * 4)
            rows = head_chunks.rows_per_chunk(n, hidden, vocab, gpu)
            assert 1 <= rows <= max(4096, 2 * hidden)
    assert head_chunks.rows_per_chunk(9000, 4096, 128256, gpu) == 4608  # two equal chunks, not 8192 and 808
