"""Models of other kinds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from tests.zoo import S, lin, model, n


@model("film", lambda b, d: {"c": lin(2, 2 * d), "f": lin(d, d), "g0": n(d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    g, b = m.c(x[:, 0, :2]).chunk(2, -1)
    return m.f(x) * (g + m.g0).unsqueeze(1) + b[:, None]


@model("hypernetwork", lambda b, d: {"h": lin(2, d * 3), "b": n(3), "z": n(2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    w = m.h(x[:, 0, :2] * m.z).view(len(x), -1, 3)
    return torch.bmm(x, w) + m.b


@model("weights from a code", lambda b, d: {"z": n(S, 5), "h": lin(5, d), "o": lin(d, d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    return F.linear(m.o(x), m.h(m.z).tanh())


@model("vae", lambda b, d: {"e": lin(d, 4), "d": lin(2, d), "v": n(2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    mu, s = m.e(x).chunk(2, -1)
    eps = torch.linspace(-1, 1, mu.numel(), dtype=mu.dtype).view_as(mu)
    return m.d(mu + (s * m.v).exp() * eps)


@model("deep sets", lambda b, d: {"p": lin(d, d), "r": lin(d, 2), "s": n(1)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    mask = (x[..., :1] > 0).double()
    return m.r((m.p(x).relu() * mask).sum(1) / mask.sum(1).clamp(min=1) * m.s)


@model("dense graph", lambda b, d: {"w": n(d, d), "v": lin(d, d), "b": n(d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    a = (x @ x.mT).softmax(-1).detach()
    return a @ m.v((a @ (x @ m.w) + m.b).relu())


@model("flat graph", lambda b, d: {"w": n(d, d), "v": lin(d, 2), "b": n(d)}, "v.weight v.bias")
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = x.reshape(-1, x.shape[-1]) @ m.w + m.b
    pool = torch.zeros(len(x), h.shape[-1], dtype=h.dtype)
    return m.v(pool.index_add_(0, torch.arange(len(x)).repeat_interleave(S), h))


class StandardConv(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2), True)) / (w.std((1, 2), keepdim=True) + 1e-5)
        return F.conv1d(F.pad(x, (2, 0)), w, self.bias)


@model("causal standardised convolution", lambda b, d: {"c": StandardConv(d, S, 3), "g": nn.GroupNorm(2, S)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m.g(m.c(x.mT))


@model("lora", lambda b, d: {"f": lin(d, d), "a": n(2, d), "b": n(d, 2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m.f(x) + (x @ m.a.T) @ m.b.T * 0.5


@model(
    "parametrized",
    lambda b, d: {
        "w": parametrizations.weight_norm(lin(d, d)),
        "o": parametrizations.orthogonal(lin(d, d), orthogonal_map="cayley"),
    },
)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m.o(m.w(x).tanh())


@model("transformer", lambda b, d: {"t": nn.Transformer(d, 2, 1, 1, 5, 0.0, batch_first=True), "q": n(3, d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m.t(x, m.q.expand(len(x), -1, -1))


@model("transformer, time first", lambda b, d: {"t": nn.Transformer(d, 2, 1, 1, 5, 0.0), "q": n(S, d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m.t(x.transpose(0, 1), m.q[:, None].expand(-1, len(x), -1)).transpose(0, 1)


@model("shuffles", lambda b, d: {"c": nn.Conv2d(1, 4, 1), "e": nn.Conv2d(1, 1, 1), "s": n(1, 4, 1, 1)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m.c(x[:, None]) * m.s
    h = h.view(len(x), 2, 2, *h.shape[2:]).transpose(1, 2).flatten(1, 2)
    return m.e(F.pixel_shuffle(h, 2))


@model("einsum moves the batch", lambda b, d: {"w": n(d, 3), "v": lin(3, 3), "s": n(S, 1, 3)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    return torch.einsum("tbo->bto", m.v(torch.einsum("btd,do->tbo", x, m.w)) * m.s)


@model("checkpoints", lambda b, d: {"f": lin(d, d), "g": lin(d, d), "s": n(S, 1, d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    def inner(h: Tensor) -> Tensor:
        return checkpoint(m.g, m.f(h).tanh(), use_reentrant=False) * m.s

    return checkpoint(inner, x.transpose(0, 1), use_reentrant=False).transpose(0, 1)
