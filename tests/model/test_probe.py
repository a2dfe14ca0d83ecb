"""The trials that decide what a module computes: each near miss must be told from the real thing."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from burnish.model.probe import glu_roles, norm_parts, probe_glu, probe_norm, probe_rope


class Norm(nn.Module):
    """Llama's RMSNorm; subclasses change one thing."""

    def __init__(self, width=24, eps=1e-5):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def normed(self, x):
        x = x.float()
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    def forward(self, x):
        return self.weight * self.normed(x).to(x.dtype)


class OnePlus(Norm):
    def forward(self, x):
        return (self.normed(x) * (1.0 + self.weight.float())).type_as(x)


class WideProduct(Norm):
    def forward(self, x):
        return (self.weight * self.normed(x)).to(x.dtype)


class OnePlusNarrow(Norm):
    def forward(self, x):
        return (1 + self.weight) * self.normed(x).to(x.dtype)


class Weightless(Norm):
    def __init__(self):
        super().__init__()
        self.weight = None

    def forward(self, x):
        return self.normed(x).to(x.dtype)


class Centred(Norm):  # a LayerNorm under an RMSNorm's attributes, as Cohere has it
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


class OtherEps(Norm):  # matters only for small inputs
    def forward(self, x):
        x32 = x.float()
        return self.weight * (x32 / (x32.pow(2).mean(-1, keepdim=True).sqrt() + self.variance_epsilon)).to(x.dtype)


class Clamped(Norm):  # matters only for large inputs
    def normed(self, x):
        return super().normed(x.clamp(-100, 100))


class Unscaled(Norm):  # right forward, no gradient for the weight
    def forward(self, x):
        return self.weight.detach() * self.normed(x).to(x.dtype)


class Narrow(Norm):  # right in float32, sums squares in bfloat16
    def normed(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Norm, {"weight": "weight", "eps": "variance_epsilon", "cast": "llama", "offset": 0.0}),
        (OnePlus, {"weight": "weight", "eps": "variance_epsilon", "cast": "gemma", "offset": 1.0}),
        (WideProduct, {"weight": "weight", "eps": "variance_epsilon", "cast": "gemma", "offset": 0.0}),
        (OnePlusNarrow, {"weight": "weight", "eps": "variance_epsilon", "cast": "llama", "offset": 1.0}),
        (Weightless, {"weight": None, "eps": "variance_epsilon", "cast": "llama", "offset": 0.0}),
    ],
)
def test_each_kind_of_rms_norm_is_recognised(kind, settings):
    match = probe_norm(kind())
    assert match.op == "rms_norm" and match.settings == settings


@pytest.mark.parametrize("kind", [Centred, OtherEps, Clamped, Unscaled, Narrow])
def test_near_misses_of_a_norm_are_refused(kind):
    assert norm_parts(kind()) is not None
    assert "other than RMSNorm" in probe_norm(kind())


def test_torch_rms_norm_is_recognised():
    match = probe_norm(nn.RMSNorm(24, eps=1e-5))
    assert match.op == "rms_norm" and match.settings["offset"] == 0.0


def test_torch_layer_norms_are_refused_and_the_module_is_not_touched():
    layer = nn.LayerNorm(16, bias=False)
    assert "other than RMSNorm" in probe_norm(layer)
    assert norm_parts(nn.LayerNorm(16)) is None  # a weight and a bias: not built like an RMSNorm
    norm = Norm()
    state, random_state = dict(vars(norm)), torch.get_rng_state()
    probe_norm(norm)
    assert vars(norm) == state and norm.weight.grad is None and torch.equal(norm.weight, torch.ones(24))
    assert torch.equal(torch.get_rng_state(), random_state)


class MLP(nn.Module):
    def __init__(self, act=F.silu, hidden=12, inner=20, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias=bias)
        self.up_proj = nn.Linear(hidden, inner, bias=bias)
        self.down_proj = nn.Linear(inner, hidden, bias=bias)
        self.act_fn = act

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class SwappedRoles(MLP):
    def forward(self, x):
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Doubled(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(2 * self.gate_proj(x)) * self.up_proj(x))


class Dropping(MLP):
    p = 0.1

    def forward(self, x):
        return F.dropout(super().forward(x), self.p, self.training)


class NotDropping(Dropping):
    p = 0.0


class ReachingPast(MLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(F.linear(x, self.gate_proj.weight)) * self.up_proj(x))


class Fused(nn.Module):
    def __init__(self, gate_first=True):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(12, 40), nn.Linear(20, 12)
        self.activation_fn, self.gate_first = nn.GELU(), gate_first

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.activation_fn(gate) * up if self.gate_first else gate * self.activation_fn(up))


GELU_TANH = nn.GELU(approximate="tanh")
ROLES = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize(
    ("module", "op", "approximate", "roles"),
    [
        (MLP(), "swiglu", "", ROLES),
        (MLP(bias=True), "swiglu", "", ROLES),
        (MLP(hidden=12, inner=12), "swiglu", "", ROLES),  # shapes say nothing about the roles
        (MLP(GELU_TANH), "geglu", "tanh", ROLES),
        (MLP(nn.GELU()), "geglu", "none", ROLES),
        (SwappedRoles(), "swiglu", "", ("up_proj", "gate_proj", "down_proj")),
        (NotDropping(), "swiglu", "", ROLES),
        (Fused(), "geglu", "none", ("gate_up_proj", "down_proj")),
    ],
)
def test_each_kind_of_gated_mlp_is_recognised(module, op, approximate, roles):
    match = probe_glu(module)
    assert (match.op, match.settings) == (op, {"approximate": approximate, "roles": roles})


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (MLP(F.relu), "other than"),
        (MLP(lambda x: x * torch.sigmoid(1.702 * x)), "other than"),  # quick gelu: close, and not the same
        (Doubled(), "other than"),
        (Dropping(), "dropout"),
        (ReachingPast(), "weight"),
        (Fused(gate_first=False), "other than"),
    ],
)
def test_near_misses_of_a_gated_mlp_are_refused(module, reason):
    assert glu_roles(module)
    assert reason in probe_glu(module)


def test_what_is_not_built_like_a_gated_mlp_is_no_candidate():
    plain = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    assert not glu_roles(plain) and not glu_roles(nn.Linear(4, 4)) and not glu_roles(Norm())


def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), dim=-1)


def rotary(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin


def other_way(q, k, cos, sin, unsqueeze_dim=1):
    return rotary(q, k, cos, -sin, unsqueeze_dim)


def only_queries(q, k, cos, sin, unsqueeze_dim=1):
    return rotary(q, k, cos, sin, unsqueeze_dim)[0], k


def with_positions(q, k, cos, sin, position_ids, unsqueeze_dim=1):
    return rotary(q, k, cos, sin, unsqueeze_dim)


def test_rotary_functions():
    assert probe_rope(rotary, 16).settings == {"layout": "half"}
    assert "neither" in probe_rope(other_way, 16)
    assert "neither" in probe_rope(only_queries, 16)
    assert "position_ids" in probe_rope(with_positions, 16)
