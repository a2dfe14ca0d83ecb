"""Hard cases of what surrounds the ops: huge offsets and grids, torch.compile, several processes, distributed tensors.

A test's number is the case's in the project's list of adversarial cases.
"""

import os
import subprocess
import sys

import pytest
import torch
from all_ops import EPS, OPS, error, gradients, leaves, outputs, upstream
from far_apart import far_apart
from head_cases import leaves as copies
from head_cases import loss_oracle, problem
from pretend_gpu import pretended, to_gpu

from burnish import kernels
from burnish.kernels import linear_cross_entropy, linear_logprob, use
from burnish.kernels.dispatch import interpreting

pytestmark = pytest.mark.skipif(not interpreting(), reason="the tensors lie on the CPU, and a GPU has its own tests")
INTERPRETED = [name for name, op in OPS.items() if op.interpreted]


@pytest.mark.parametrize("name", INTERPRETED)
def test_case_05_rows_beyond_32_bits(name):
    """Of the inputs and of the incoming gradients: the third row begins at element 2^31. The same bits as side by side.

    Offsets of what the ops allocate themselves, and of every kernel at once, are looked at in the compiled code
    (test_aot.py).
    """
    op = OPS[name]
    near = leaves(op, op.draw(3, 8))
    far = [far_apart(t.detach(), 2**30 if i in op.rows else 2**28) if t.dim() > 1 else t for i, t in enumerate(near)]
    far = [t.detach().requires_grad_(i in op.trained) for i, t in enumerate(far)]
    runs = []
    for tensors in (near, far):
        outs = outputs(op, tensors, "triton")
        ups = upstream(outs)
        if tensors is far:
            ups = [far_apart(up, 2**30) if up.dim() > 1 else up for up in ups]
        runs.append([*outs, *gradients(op, tensors, outs, ups)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_case_05_more_than_2_31_logits_in_a_chunk(monkeypatch):
    """The kernels' buffer of exponentials, its rows 2^30 columns apart as if the vocabulary had so many."""
    from burnish.kernels import head_triton

    x, weight, bias, labels = problem(3, 5, 13)
    made = []

    def buffer(self, rows):
        made.append(far_apart(torch.zeros(rows, 13), 2**30))
        return made[-1]

    runs = []
    for patched in (False, True):
        if patched:
            monkeypatch.setattr(head_triton.Step, "buffer", buffer)
        a, w, b = copies(x, weight, bias)
        with use("triton"):
            loss = linear_cross_entropy(a, w, labels, bias=b, z_loss=0.1)
            logps, entropy = linear_logprob(a, w, labels, bias=b, return_entropy=True)
        (loss + logps.sum() + entropy.sum()).backward()
        runs.append((loss, logps, entropy, a.grad, w.grad, b.grad))
    assert made and all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


def meta(op, tokens, width):
    """The op's inputs as shapes only, in bfloat16, on the pretended GPU."""
    few = op.draw(3, width)
    tensors = []
    for i, t in enumerate(few):
        shape = (tokens, *t.shape[1:]) if i in op.rows else t.shape
        tensors.append(to_gpu(torch.empty(shape, dtype=torch.bfloat16, device="meta").requires_grad_(i in op.trained)))
    return tensors


@pytest.mark.parametrize("name", INTERPRETED)
def test_case_06_grids_of_millions_of_tokens(name):
    """2^21 tokens and one: only a grid's first axis may pass 65,535, and it ends at 2^31 - 1."""
    op = OPS[name]
    with pretended("meta", processors=132) as launches:
        tensors = meta(op, 2**21 + 1, 1024)
        outs = outputs(op, tensors)
        gradients(op, tensors, outs, [torch.empty_like(out) for out in outs])
    assert len(launches) >= 2
    for launch in launches:
        first, *others = launch.grid
        assert 0 < first < 2**31 and all(0 < axis <= 65535 for axis in others), launch.name


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocab"), [(16384, 1024, 151936), (131072, 3840, 262208), (70000, 64, 32)], ids=str
)
def test_case_06_grids_of_real_heads(tokens, hidden, vocab):
    with pretended("meta") as launches:
        x, weight = (torch.empty(n, hidden, dtype=torch.bfloat16, device="cuda") for n in (tokens, vocab))
        labels = torch.empty(tokens, dtype=torch.int64, device="cuda")
        x.requires_grad_(), weight.requires_grad_()
        loss = linear_cross_entropy(x, weight, labels, all_valid=True, num_items=tokens)
        logps, entropy = linear_logprob(x, weight, labels, all_valid=True, return_entropy=True)
        (loss + logps.sum() + entropy.sum()).backward()
        assert x.grad.shape == x.shape and weight.grad.shape == weight.shape
    assert launches
    for launch in launches:
        first, *others = launch.grid
        assert 0 < first < 2**31 and all(0 < axis <= 65535 for axis in others), launch.name


def block(x, residual, norm, gate, up, down, head, labels):
    """A little of a model: one op after the other, ending in the head's loss."""
    normed, residual = kernels.add_rms_norm(x, residual, norm, EPS)
    hidden = residual + kernels.swiglu(normed @ gate.T, normed @ up.T) @ down.T
    return linear_cross_entropy(hidden, head, labels, reduction="sum")


def block_inputs(tokens):
    gen = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, 8), (tokens, 8), (8,), (12, 8), (12, 8), (8, 12), (19, 8)]
    tensors = [torch.randn(shape, generator=gen).requires_grad_() for shape in shapes]
    return [*tensors, torch.randint(0, 19, (tokens,), generator=gen)]


def test_case_22_torch_compile():
    """The same numbers, and no new graph for every number of tokens: what is compiled for two sizes serves the rest."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter)
    graphs = []
    for tokens in (5, 9, 12, 7, 31):
        given = block_inputs(tokens)
        runs = []
        for function in (block, compiled):
            loss = function(*given)
            runs.append([loss, *torch.autograd.grad(loss, given[:-1])])
        for got, want in zip(runs[1], runs[0], strict=True):
            assert error(got, want.double()) < 1e-6
        graphs.append(counter.frame_count)
    torch._dynamo.reset()
    assert graphs[-1] == graphs[1], f"graphs compiled so far, size by size: {graphs}"


class Tied(torch.nn.Module):
    """The weight is both ends of the model."""

    def __init__(self):
        super().__init__()
        gen = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(19, 8, generator=gen))
        self.norm = torch.nn.Parameter(1 + 0.3 * torch.randn(8, generator=gen))

    def forward(self, ids, labels, items):
        x = torch.nn.functional.embedding(ids, self.weight)
        x = kernels.rms_norm(x + kernels.swiglu(x, x), self.norm, EPS)
        return linear_cross_entropy(x, self.weight, labels, num_items=items)


def tokens_with_labels():
    ids = torch.randint(0, 19, (14,), generator=torch.Generator().manual_seed(1))
    labels = (ids * 5 + 2) % 19
    labels[[3, 9, 10]] = -100
    return ids, labels


def one_of_two(rank, store):
    """This process's part of the batch; returns the gradients, of which DDP has made the mean over both processes."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        model = torch.nn.parallel.DistributedDataParallel(Tied())
        ids, labels = (t[:5] if rank == 0 else t[5:] for t in tokens_with_labels())
        with model.no_sync():  # accumulation: half of the loss without communication
            (0.5 * model(ids, labels, 11)).backward()
        (0.5 * model(ids, labels, 11)).backward()
        return {name: p.grad * 2 for name, p in model.module.named_parameters()}
    finally:
        dist.destroy_process_group()


OTHER = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
importlib.import_module("test_adversarial_machine").one_of_two(1, sys.argv[2])
"""


def test_case_23_ddp_gives_the_gradient_of_the_whole_batch(tmp_path):
    """Two processes with unequal parts and one count for both, a tied weight, gradients accumulated over two passes."""
    command = [sys.executable, "-c", OTHER, os.path.dirname(__file__), str(tmp_path / "store")]
    other = subprocess.Popen(command, cwd=tmp_path, env=dict(os.environ), stderr=subprocess.PIPE, text=True)
    got = one_of_two(0, tmp_path / "store")
    _, errors = other.communicate(timeout=120)
    assert other.returncode == 0, errors
    model, (ids, labels) = Tied(), tokens_with_labels()
    with use("reference"):
        model.double()(ids, labels, 11).backward()
    for name, parameter in model.named_parameters():
        assert error(got[name], parameter.grad) < 1e-6


@pytest.fixture
def mesh(tmp_path):
    """A device mesh of this one process."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("op", [linear_cross_entropy, linear_logprob], ids=lambda op: op.__name__)
def test_case_23_a_distributed_weight_is_right_or_refused(mesh, op, backend):
    """A sharded weight (FSDP2 outside of its forward, tensor parallelism): never numbers made of one shard."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    x, weight, _, labels = problem(5, 6, 13)
    for placement in (Shard(0), Replicate()):
        sharded = distribute_tensor(weight, mesh, [placement]).requires_grad_()
        a, w = copies(x, weight)
        loss_oracle(a.double(), w.double(), labels, reduction="sum").backward()
        try:
            with use(backend):
                out = op(x, sharded, labels)
            out = -out if op is linear_logprob else out * 5
            out.sum().backward()
            got = sharded.grad.full_tensor()
        except Exception as refused:
            assert "DTensor" in str(refused) or "distributed" in str(refused), refused
        else:
            assert error(got, w.grad.double()) < 1e-5
