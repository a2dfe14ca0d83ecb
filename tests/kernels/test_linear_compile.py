"""The head inside compiled functions: the same bits, one break, and graphs that serve any number of tokens."""

import pytest
import torch
from head_cases import problem
from torch._dynamo.testing import CompileCounter

from burnish.kernels import linear_cross_entropy, linear_logprob


@pytest.mark.parametrize("op", [linear_cross_entropy, linear_logprob])
def test_a_compiled_function_is_two_graphs_for_any_number_of_tokens(op):
    torch._dynamo.reset()
    graphs = CompileCounter()

    def step(h, w, y):
        return op(torch.tanh(h) * 2, w, y).square().sum() * 3

    compiled = torch.compile(step, backend=graphs)
    for tokens in (5, 9, 12, 33, 2):
        x, weight, _, labels = problem(tokens, 6, 37, seed=tokens)
        labels[0] = -100
        x.requires_grad_(), weight.requires_grad_()
        results = []
        for function in (compiled, step):
            loss = function(x, weight, labels)
            results.append([loss.detach(), *torch.autograd.grad(loss, (x, weight))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert graphs.frame_count <= 4  # before and after the head: for the first size, and for all others
