"""What the head costs: operations counted and bytes measured, in every regime, against `head_cost`."""

import pytest
import torch
from head_cases import CHUNKED, MARKS, leaves, problem
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.kernels import head_chunks, head_cost, linear_cross_entropy, linear_logprob, use

pytestmark = MARKS
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Products(TorchDispatchMode):
    """Operations of the matrix products [a, b] x [b, c] with b or c the vocabulary or hidden size."""

    NAMES = ("mm", "addmm", "addmm_")

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        if name in self.NAMES:
            a, b = [arg for arg in args if isinstance(arg, torch.Tensor)][-2:]
            self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def peak_bytes(step):
    """The most bytes that `step` had allocated at once above what was there when it began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        kept = step()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del kept
    return most


def loss_of(x, weight, labels, known, keep_bytes, **options):
    if known:
        return linear_cross_entropy(x, weight, labels, **options)
    return linear_logprob(x, weight, labels, keep_bytes=keep_bytes, **options).square().sum()


REGIMES = {  # (needs of hidden states and weight), known, rows of 40 kept, NHV
    "forward only": ((False, False), False, 40, 2),
    "frozen head": ((True, False), False, 40, 4),
    "frozen head, known": ((True, False), True, 0, 4),
    "known": ((True, True), True, 0, 6),
    "known, weight only": ((False, True), True, 0, 4),
    "any upstream, kept": ((True, True), False, 40, 6),
    "any upstream, weight only": ((False, True), False, 40, 4),
    "any upstream, nothing kept": ((True, True), False, 0, 8),
    "any upstream, half kept": ((True, True), False, 20, 7),
}


@pytest.mark.parametrize("backend", CHUNKED)
@pytest.mark.parametrize("terms", [{}, {"label_smoothing": 0.1, "z_loss": 0.01}], ids=["plain", "terms"])
@pytest.mark.parametrize("regime", REGIMES)
def test_operations(backend, regime, terms, monkeypatch):
    """Counted over forward and backward, as many as promised and as head_cost says, to the last one."""
    monkeypatch.setattr(head_chunks, "rows_per_chunk", lambda n, hidden, vocab, device: min(n, 10))
    monkeypatch.setattr(head_cost, "rows_per_chunk", head_chunks.rows_per_chunk)
    needs, known, rows, nhv = REGIMES[regime]
    terms = terms if known else {}
    n, hidden, vocab = 40, 7, 50
    x, weight, _, labels = problem(n, hidden, vocab)
    x, weight = x.requires_grad_(needs[0]), weight.requires_grad_(needs[1])
    with use(backend), Products() as count:
        loss = loss_of(x, weight, labels, known, rows * vocab * 4, **terms)
        if any(needs):
            loss.backward()
    assert count.flops == nhv * n * hidden * vocab
    expected = head_cost.head_cost(
        n, hidden, vocab, device=CPU, dtype=torch.float32, needs=needs, known=known, keep_bytes=rows * vocab * 4
    )
    assert expected.flops == count.flops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [100, 600])
@pytest.mark.parametrize("regime", REGIMES)
def test_peak_on_the_cpu(regime, n, dtype, monkeypatch):
    """Measured peaks lie under the formula, and not far: one chunk and many, kept E and none."""
    hidden, vocab = 48, 9001
    monkeypatch.setattr(head_chunks, "CPU_TILE_BYTES", 4 * vocab * 150)
    monkeypatch.setattr(head_chunks, "CAST_TILE", 1024)
    monkeypatch.setattr(head_cost, "CAST_TILE", 1024)
    needs, known, rows, _ = REGIMES[regime]
    keep = rows * n // 40 * vocab * 4
    x, weight, _, labels = problem(n, hidden, vocab, scale=0.1)
    x, weight = x.to(dtype).requires_grad_(needs[0]), weight.to(dtype).requires_grad_(needs[1])

    def step():
        loss = loss_of(x, weight, labels, known, keep)
        if any(needs):
            loss.backward()
        x.grad = weight.grad = None

    step()
    limit = head_cost.head_cost(
        n, hidden, vocab, device=CPU, dtype=dtype, needs=needs, known=known, keep_bytes=keep
    ).peak_bytes
    assert 0.85 * limit <= peak_bytes(step) <= limit


def test_kept_exponentials_have_a_fixed_limit_and_go_with_the_first_backward(monkeypatch):
    n, hidden, vocab = 1000, 16, 2003
    monkeypatch.setattr(head_chunks, "CPU_TILE_BYTES", 4 * vocab * 130)
    monkeypatch.setattr(head_chunks, "CPU_KEEP_BYTES", 4 * vocab * 500)
    x, weight, _, labels = problem(n, hidden, vocab, scale=0.1)
    a, w = leaves(x, weight)
    logps = linear_logprob(a, w, labels)
    node = logps.grad_fn
    while not hasattr(node, "saved_tensors"):
        node = node.next_functions[0][0]
    saved = [t for t in node.saved_tensors if t is not None and t.shape[-1:] == (vocab,) and t.dim() == 2]
    assert len(saved) == 4 and sum(t.nbytes for t in saved) <= 4 * vocab * 500
    expected = head_cost.head_cost(n, hidden, vocab, device=CPU, dtype=torch.float32, known=False, keep_bytes=None)
    assert expected.kept_bytes == sum(t.nbytes for t in saved) + n * head_cost.ROW_BYTES
    logps.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        node.saved_tensors  # noqa: B018


@pytest.mark.parametrize(
    "hidden,vocab", [(4096, 128256), (4096, 151936), (3840, 262208), (2304, 256000), (2048, 248320), (4096, 32000)]
)
@pytest.mark.parametrize("n", [1024, 8192, 131072])
def test_extra_memory_on_cuda_is_within_the_aim(n, hidden, vocab):
    """C V 2 + V H 6 + N H 4 + 300 MB for the loss in bfloat16; log-probs have what they keep besides."""
    chunk = min(n, max(4096, 2 * hidden))
    aim = chunk * vocab * 2 + vocab * hidden * 6 + n * hidden * 4 + 300 * 10**6
    sizes = (n, hidden, vocab)
    loss = head_cost.head_cost(*sizes, device=CUDA, dtype=torch.bfloat16)
    assert loss.peak_bytes <= aim and loss.flops == 6 * n * hidden * vocab
    logps = head_cost.head_cost(*sizes, device=CUDA, dtype=torch.bfloat16, known=False)
    one = chunk * (vocab + 64) * 2
    assert logps.kept_bytes <= max(head_chunks.CUDA_KEEP_BYTES, one) * 1.001 + n * head_cost.ROW_BYTES
    assert logps.peak_bytes <= aim + logps.kept_bytes


def test_the_gpus_products_are_the_overloads_that_write_float32_in_place():
    """What mm_f32 and addmm_f32 call on a GPU: torch takes the arguments and finds no CPU kernel for the overload."""
    a, b, out = torch.ones(4, 8).bfloat16(), torch.ones(8, 3).bfloat16(), torch.zeros(4, 3)
    with pytest.raises(NotImplementedError, match=r"aten::mm\.dtype_out"):
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    with pytest.raises(NotImplementedError, match=r"aten::addmm\.dtype_out"):
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
