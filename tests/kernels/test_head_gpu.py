"""The head on a GPU: parity with float64 at real sizes, peak memory, no waiting for the device, large offsets."""

import pytest
import torch
import torch.nn.functional as F

from burnish.kernels import head_chunks, head_cost, linear_cross_entropy, linear_logprob, use

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def problem(tokens, hidden, vocab, dtype, confident=0.0):
    gen = torch.Generator("cuda").manual_seed(0)
    weight = torch.randn(vocab, hidden, generator=gen, device="cuda") / hidden**0.5
    labels = torch.randint(0, vocab, (tokens,), generator=gen, device="cuda")
    x = torch.randn(tokens, hidden, generator=gen, device="cuda") + confident * weight[labels]
    return x.to(dtype), weight.to(dtype), labels


def effective(x, weight, bias, options):
    z = x.double() @ weight.double().T
    z = (z if bias is None else z + bias.double()) * options.get("logit_scale", 1.0)
    cap = options.get("softcap")
    return (z if cap is None else cap * torch.tanh(z / cap)) / options.get("temperature", 1.0)


def oracle(x, weight, labels, bias=None, rows=512, **options):
    """Float64: per-token log-probs, and the gradients of their negative sum, some rows of logits at a time."""
    inputs = [None if t is None else t.double().requires_grad_() for t in (x, weight, bias)]
    logps = []
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        z = effective(inputs[0][part], inputs[1], inputs[2], options)
        target = z.gather(1, labels[part, None])
        others = (z - target).exp().scatter(1, labels[part, None], 0.0).sum(1)
        logps.append(-torch.log1p(others).detach())
        F.cross_entropy(z, labels[part], reduction="sum").backward()
    return torch.cat(logps), [t.grad for t in inputs if t is not None]


def error(got, want):
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("confident", [0.0, 14.0])
@pytest.mark.parametrize(
    "tokens,hidden,vocab", [(1000, 1024, 128256), (700, 576, 49152), (513, 1000, 50257), (9, 65, 7)]
)
def test_parity(dtype, confident, tokens, hidden, vocab):
    x, weight, labels = problem(tokens, hidden, vocab, dtype, confident)
    logps, (dx, dw) = oracle(x, weight, labels)
    a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, got = linear_cross_entropy(a, w, labels, reduction="sum", return_logprob=True)
    loss.backward()
    limit = 4e-3 if dtype == torch.bfloat16 else 1e-5
    assert ((got - logps).abs() <= 1e-5 * logps.abs() + 1e-7).all()
    assert error(a.grad, dx) < limit and error(w.grad, dw) < limit
    for frozen in (False, True):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        again = linear_logprob(a, w, labels)
        (-again.sum()).backward()
        assert torch.equal(again, got)
        assert error(a.grad, dx) < limit and (frozen or error(w.grad, dw) < limit)


OPTIONS = [
    {"softcap": 30.0},
    {"softcap": 2.0, "temperature": 0.7, "logit_scale": 1.5},
    {"temperature": 0.1},
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options_with_bias(dtype, options):
    x, weight, labels = problem(300, 256, 5003, dtype)
    bias = torch.randn(5003, device="cuda", dtype=dtype)
    logps, grads = oracle(x, weight, labels, bias, **options)
    inputs = [t.clone().requires_grad_() for t in (x, weight, bias)]
    loss, got = linear_cross_entropy(
        inputs[0], inputs[1], labels, bias=inputs[2], reduction="sum", return_logprob=True, **options
    )
    loss.backward()
    assert ((got - logps).abs() <= 2e-5 * logps.abs() + 1e-6).all()
    for have, want in zip(inputs, grads, strict=True):
        assert error(have.grad, want) < (2e-5 if dtype == torch.float32 else 4e-3)


TERMS = [
    {"label_smoothing": 0.1},
    {"z_loss": 1e-3},
    {"label_smoothing": 0.1, "z_loss": 1e-3, "temperature": 0.7},
    {"label_smoothing": 0.1, "softcap": 5.0},
]


@pytest.mark.parametrize("options", TERMS, ids=str)
def test_terms_against_the_definition(options):
    x, weight, labels = problem(300, 256, 5003, torch.float32)
    results = []
    for backend, dtype in (("auto", torch.float32), ("reference", torch.float64)):
        a, w = (t.to(dtype).requires_grad_() for t in (x, weight))
        with use(backend):
            loss, entropy = linear_cross_entropy(a, w, labels, return_entropy=True, **options)
            logps, differentiable = linear_logprob(a, w, labels, return_entropy=True)
        (loss + logps.sum() + differentiable.sum()).backward()
        results.append((loss.detach(), entropy, a.grad, w.grad))
    for got, want in zip(*results, strict=True):
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("outlier", [80.0, 300.0])
def test_outlier_logits(outlier):
    x, weight, labels = problem(256, 128, 20000, torch.bfloat16)
    x[:, 0] = 0.0
    x[100:110, 0] = 1.0
    weight[17000, 0], weight[5000, 0] = outlier, outlier - 1
    logps, (dx, dw) = oracle(x, weight, labels)
    a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss, got = linear_cross_entropy(a, w, labels, reduction="sum", return_logprob=True)
    loss.backward()
    assert ((got - logps).abs() <= 1e-5 * logps.abs()).all()
    assert error(a.grad, dx) < 4e-3 and error(w.grad, dw) < 4e-3


def test_weight_gradient_error_is_flat_in_chunks(monkeypatch):
    x, weight, labels = problem(2048, 512, 8192, torch.bfloat16)
    _, (_, dw) = oracle(x, weight, labels)
    errors = []
    for rows in (2048, 256, 32):
        monkeypatch.setattr(head_chunks, "rows_per_chunk", lambda n, hidden, vocab, device, rows=rows: rows)
        w = weight.clone().requires_grad_()
        linear_cross_entropy(x, w, labels, reduction="sum").backward()
        errors.append(error(w.grad, dw))
    assert errors[0] < 4e-3 and max(errors) < 1.2 * min(errors)


@pytest.mark.parametrize("tokens", [4096, 20000])
def test_peak_memory(tokens):
    hidden, vocab = 2048, 128256
    x, weight, labels = problem(tokens, hidden, vocab, torch.bfloat16)
    x.requires_grad_(), weight.requires_grad_()
    chunk = head_chunks.rows_per_chunk(tokens, hidden, vocab, x.device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(x, weight, labels).backward()
    extra = torch.cuda.max_memory_allocated() - before
    # one chunk of bf16 logits, dW in float32 and in bf16, dX twice, and a float32 tile
    assert extra <= chunk * vocab * 2 + vocab * hidden * 6 + tokens * hidden * 4 + chunk * 16384 * 4 + (100 << 20)


@pytest.mark.parametrize("tokens", [1000, 9000, 20000])
def test_kept_exponentials(tokens):
    """Log-probs with any upstream: E kept, kept in part or made again give the same gradients; peaks as predicted."""
    hidden, vocab, bf16 = 1024, 128256, torch.bfloat16
    x, weight, labels = problem(tokens, hidden, vocab, bf16)
    upstream = torch.randn(tokens, device="cuda", generator=torch.Generator("cuda").manual_seed(1))
    results = []
    for keep in (None, 2 << 30, 0):
        a, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_logprob(a, w, labels, keep_bytes=keep, all_valid=True).backward(upstream)
        extra = torch.cuda.max_memory_allocated() - before
        cost = head_cost.head_cost(tokens, hidden, vocab, device=x.device, dtype=bf16, known=False, keep_bytes=keep)
        assert extra <= cost.peak_bytes + (100 << 20)
        results.append((a.grad, w.grad))
    for other in results[1:]:
        assert error(other[0], results[0][0]) < 1e-3 and error(other[1], results[0][1]) < 1e-3


def test_no_wait_for_the_device():
    x, weight, labels = problem(512, 256, 5003, torch.bfloat16)
    x.requires_grad_(), weight.requires_grad_()
    items = torch.tensor(512, device="cuda")

    def step():
        loss = linear_cross_entropy(
            x, weight, labels, num_items=items, all_valid=True, label_smoothing=0.1, z_loss=1e-4
        )
        (loss * 3 + linear_logprob(x, weight, labels, all_valid=True).sum()).backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_offsets_beyond_32_bits(monkeypatch):
    """One chunk of 16384 x 151936 logits: the last rows lie behind 2^31 elements."""
    tokens, vocab = 16384, 151936
    monkeypatch.setattr(head_chunks, "rows_per_chunk", lambda n, hidden, vocab, device: n)
    from burnish.kernels import head_triton

    monkeypatch.setattr(head_triton, "COLUMNS", 4096)
    x, weight, labels = problem(tokens, 64, vocab, torch.bfloat16)
    a = x.clone().requires_grad_()
    loss, logps = linear_cross_entropy(a, weight, labels, reduction="sum", return_logprob=True)
    loss.backward()
    want, (dx, _) = oracle(x[-64:], weight, labels[-64:])
    assert ((logps[-64:] - want).abs() <= 1e-5 * want.abs()).all()
    assert error(a.grad[-64:], dx) < 4e-3
