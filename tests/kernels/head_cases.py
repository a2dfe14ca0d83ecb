"""Inputs for tests of the linear head, and what it should give: all logits at once in float64, by torch's autograd."""

import pytest
import torch
import torch.nn.functional as F

from burnish.kernels import linear_cross_entropy, linear_logprob, use

BACKENDS = ["reference", "auto", "triton"]
CHUNKED = ["auto", "triton"]
# numpy warns where inf meets the interpreter
MARKS = [
    pytest.mark.usefixtures("triton_on_the_cpu"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]


def problem(tokens, hidden, vocab, seed=0, scale=1.0):
    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, hidden, generator=gen)
    weight = torch.randn(vocab, hidden, generator=gen) * scale
    bias = torch.randn(vocab, generator=gen)
    labels = torch.randint(0, vocab, (tokens,), generator=gen)
    return x, weight, bias, labels


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def error(got, want):
    """Relative Frobenius error; exact agreement demanded where the truth is 0."""
    want = want.double()
    return ((got.double() - want).norm() / want.norm().clamp_min(1e-30)).item()


def effective(x, weight, bias, softcap, logit_scale, temperature):
    z = x.double() @ weight.double().T
    z = (z if bias is None else z + bias.double()) * logit_scale
    return (z if softcap is None else softcap * torch.tanh(z / softcap)) / temperature


def token_oracle(x, weight, labels, *, bias=None, softcap=None, logit_scale=1.0, temperature=1.0, ignore_index=-100):
    """(logps, entropy, argmax) by brute force in float64; the inputs' autograd graph is kept."""
    z = effective(x, weight, bias, softcap, logit_scale, temperature)
    logp = z.log_softmax(-1)
    valid = labels != ignore_index
    picked = logp.gather(-1, labels.long().clamp(0, weight.shape[0] - 1)[..., None])[..., 0]
    entropy = -(logp.exp() * logp.nan_to_num(neginf=0.0)).sum(-1)
    return picked.where(valid, 0.0), entropy.where(valid, 0.0), z.argmax(-1).where(valid, -1)


def loss_oracle(x, weight, labels, *, bias=None, softcap=None, logit_scale=1.0, temperature=1.0, ignore_index=-100,
                reduction="mean", num_items=None, token_weights=None, label_smoothing=0.0, z_loss=0.0):  # fmt: skip
    """The loss by torch's own cross-entropy over float64 logits."""
    z = effective(x, weight, bias, softcap, logit_scale, temperature)
    valid = labels != ignore_index
    loss = F.cross_entropy(
        z, labels.long(), ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    loss = loss + z_loss * z.logsumexp(-1).square()
    loss = (loss * (1.0 if token_weights is None else token_weights.double())).where(valid, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / (1 if reduction == "sum" else max(int(valid.sum()), 1) if num_items is None else num_items)


def both_tokens(backend, x, weight, bias, labels, seed=1, **options):
    """Outputs and gradients (of random upstreams with zeros and both signs) from a backend and from the oracle."""
    gen = torch.Generator().manual_seed(seed)
    g, e = torch.randn(2, *labels.shape, generator=gen)
    g.view(-1)[::3] = 0.0
    results = []
    for double in (False, True):
        a, w, b = leaves(*(t if t is None or not double else t.double() for t in (x, weight, bias)))
        if double:
            logps, entropy, top = token_oracle(a, w, labels, bias=b, **options)
        else:
            with use(backend):
                logps, entropy, top = linear_logprob(
                    a, w, labels, bias=b, return_entropy=True, return_argmax=True, **options
                )
        ((logps * g).sum() + (entropy * e).sum()).backward()
        results.append([logps, entropy, top, a.grad, w.grad, *([] if b is None else [b.grad])])
    return results


def both_losses(backend, x, weight, bias, labels, **options):
    """[loss, gradients...] of 3 * loss from a backend and from the oracle; random upstream for reduction "none"."""
    up = torch.randn(labels.shape, generator=torch.Generator().manual_seed(5))
    up = up if options.get("reduction") == "none" else torch.tensor(3.0)
    results = []
    for fn in (linear_cross_entropy, loss_oracle):
        exact = fn is loss_oracle
        inputs = leaves(*(t if t is None or not exact else t.double() for t in (x, weight, bias)))
        with use(backend):
            loss = fn(inputs[0], inputs[1], labels, bias=inputs[2], **options)
        loss.backward(up.to(loss.dtype))
        results.append([loss, *(t.grad for t in inputs if t is not None)])
    return results
