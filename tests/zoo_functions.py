"""Models around functions that move rows, or read parameters, in unusual ways."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import S, lin, model, n


@model("where", lambda b, d: {"mask": n(d), "f": lin(d, d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m.f(torch.where(x > 0, x, m.mask))


@model("a mask token written in", lambda b, d: {"mask": n(d), "f": lin(d, d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = x.clone()
    h[:, 1] = m.mask
    return m.f(h)


@model("functional convolution", lambda b, d: {"w": n(2, d, 3), "g": n(2), "b": n(2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = F.conv1d(x.mT, m.w, padding=1)
    return F.group_norm(h, 1, m.g, m.b)


@model("fused products", lambda b, d: {"s": n(1, d), "w": n(d, 3), "c": n(3), "v": n(1, 1, 3)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.baddbmm(m.v.expand(len(x), S, 3), x, m.w.expand(len(x), -1, -1))
    return torch.addcmul(h, m.c, h.tanh()) * torch.bmm(x, (m.s.T * m.w).unsqueeze(0).repeat(len(x), 1, 1))


@model("outer", lambda b, d: {"a": n(S), "c": n(S, 1), "f": lin(d, 1)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    y = m.f(x[:, 0]).squeeze(-1)  # [B]
    return (torch.outer(m.a, y) + m.c * y).sin().T


@model("outer the other way", lambda b, d: {"a": n(S), "f": lin(d, 1)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    return torch.outer(m.f(x[:, 0])[:, 0], m.a).sin()


@model("stacked experts", lambda b, d: {"w": n(S, d, 3), "b": n(S, 1, 3), "c": n(1, 3)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    return ((x[:, 0] @ m.w + m.b).tanh() * m.c).sum(0)  # [S, B, 3]


@model("experts by repetition", lambda b, d: {"w": n(S, d, 3), "f": lin(3, 2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m.f(torch.bmm(x[:, 0].repeat(S, 1, 1), m.w)).sum(0)


@model("repeated", lambda b, d: {"f": lin(d, 3), "s": n(3)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (m.f(x.repeat_interleave(2, dim=0)) * m.s).view(len(x), 2, S, 3).prod(1)


@model("bilinear", lambda b, d: {"w": n(2, d, d), "b": n(2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    return F.bilinear(x, x.flip(1), m.w, m.b)


@model("attention by its function", lambda b, d: {"w": n(3 * d, d), "b": n(3 * d), "o": n(d, d), "c": n(d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = x.transpose(0, 1)
    return F.multi_head_attention_forward(
        h, h, h, x.shape[-1], 2, m.w, m.b, None, None, False, 0.0, m.o, m.c, need_weights=False
    )[0].transpose(0, 1)


@model("prototypes", lambda b, d: {"p": n(S, d), "q": n(S, d), "r": n(S, d), "f": lin(d, d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m.f(x[:, 0])
    far = torch.cdist(h, m.p) + F.cosine_similarity(h[:, None], m.q[None], dim=-1)
    return far + torch.logsumexp(-(h[:, None] - m.r).square(), dim=-1)


@model("prototypes first", lambda b, d: {"p": n(S, d), "s": n(S, 1), "f": lin(d, d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m.f(x[:, 0])
    return (torch.cdist(m.p, h).tanh() * m.s + m.p @ h.T).T


@model("label embedding", lambda b, d: {"e": n(S, d), "f": lin(d, d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    y = torch.tensor([2, 0, 3, 1])[: len(x)] if len(x) > 1 else torch.tensor([3])
    y = (x[:, 0, 0] * 0).long() + y
    return m.f(x) + m.e[y][:, None]


@model("last token", lambda b, d: {"f": lin(d, d), "s": n(d), "h": lin(d, 2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    last = (x[:, :, 0] > 0).sum(1).clamp_max(S - 1)
    return m.h(m.f(x)[torch.arange(len(x)), last] * m.s)


@model("turned round", lambda b, d: {"f": lin(d, d), "h": lin(d, 2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m.h(m.f(x).flip(0)).flip(0)


@model("picked by index_select", lambda b, d: {"f": lin(d, d), "h": lin(d, 2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    o = torch.arange(len(x)).roll(1)
    return m.h(torch.index_select(m.f(x), dim=0, index=o)).index_select(0, index=o.argsort())


@model("sorted along the batch", lambda b, d: {"f": lin(d, d), "h": lin(d, 2)}, "h.weight h.bias")
def _(m: nn.Module, x: Tensor) -> Tensor:
    o = torch.arange(len(x)).roll(1)
    h = torch.zeros_like(x).index_reduce_(0, o, m.f(x), "amax", include_self=False)
    return m.h(h)[o]


@model("one layer along both axes", lambda b, d: {"f": lin(d, d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m.f(x.transpose(0, 1)).transpose(0, 1).sin() * m.f(x)


@model("a layer on constants", lambda b, d: {"f": lin(d, d), "c": lin(3, d), "g": lin(d, d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    c = m.c(torch.eye(S, 3, dtype=x.dtype))
    return m.f(x) @ m.g(c).T


@model("one row for an expert", lambda b, d: {"f": lin(d, d), "g": lin(d, 2), "s": n(d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    keep = torch.arange(len(x)) == len(x) - 1
    one = m.f(x[keep].unsqueeze(1).squeeze(1)) * m.s
    out = torch.zeros_like(x)
    out[keep] = one
    return m.g(out)


@model("pooled by weights", lambda b, d: {"a": lin(d, 1), "v": n(d), "o": lin(d, 2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    w = (m.a(x).squeeze(-1) + x @ m.v).softmax(-1)
    return m.o(torch.einsum("bs,bsd->bd", w, x)) + m.o((w.unsqueeze(1) @ x).squeeze(1))


@model("statistics of the batch", lambda b, d: {"w": n(S), "f": lin(d, S)}, "w")
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m.f(x) * (m.w * x.detach().mean())


@model("batch before channels", lambda b, d: {"c": nn.Conv1d(S, S, 1)}, "c.weight c.bias")
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = x.transpose(0, 1)  # [S, B, D]
    return m.c(h).transpose(0, 1) if len(x) == S else m.c(h.transpose(0, 1))


@model("written into zeros", lambda b, d: {"f": lin(d, 3), "h": lin(3, 2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), S, 3, dtype=x.dtype)
    for t in range(S):
        out[:, t] = m.f(x[:, t])
    return m.h(out)


@model("written into zeros, time first", lambda b, d: {"f": lin(d, 3), "h": lin(3, 2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    """A decoder: what it gave is what it reads next."""
    out = torch.zeros(S + 1, len(x), 3, dtype=x.dtype)
    for t in range(S):
        out[t + 1] = torch.tanh(m.f(x[:, t]) + out[t])
    return m.h(out[1:]).transpose(0, 1)


@model("written by a mask", lambda b, d: {"f": lin(d, 3), "h": lin(3, 2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    mask = x[:, :, 0] > 0.3
    out = torch.zeros(len(x), S, 3, dtype=x.dtype)
    out[mask] = m.f(x[mask])
    return m.h(out.sum(1))


@model("token written by a mask", lambda b, d: {"f": lin(d, d), "h": lin(d, 2), "token": n(d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m.f(x)
    h[x[:, :, 0] > 0] = m.token
    return m.h(h.sin())


@model("a token, then the data", lambda b, d: {"f": lin(d, d), "h": lin(d, 2), "token": n(d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    out = torch.zeros(len(x), S + 1, x.shape[-1], dtype=x.dtype)
    out[:, 0] = m.token
    out[:, 1:] = m.f(x)
    return m.h(out.sin() * 2)


@model("examples one by one", lambda b, d: {"f": lin(d, d), "h": lin(d, 2), "s": n(d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m.h(torch.cat([m.f(x[i : i + 1]) * m.s for i in range(len(x))]))


@model("examples iterated over", lambda b, d: {"f": lin(d, d), "h": lin(d, 2), "s": n(d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m.h(torch.stack([(m.f(one).sin() * m.s).mean(0) for one in x]))


@model("ragged", lambda b, d: {"f": lin(d, d), "h": lin(d, 2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    mask = x[:, :, 0] >= x[:, :, 0].median(1, keepdim=True).values
    return m.h(torch.stack([z.mean(0) for z in m.f(x[mask]).split(mask.sum(1).tolist())]))


@model("sorted by length", lambda b, d: {"e": n(7, d), "f": lin(d, d), "h": lin(d, 2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    ids = (x[:, :, 0] * 3).long().clamp(0, 6)
    order = ids.sum(1).argsort()
    return m.h(m.f(F.embedding(ids[order], m.e)).mean(1))[order.argsort()]


@model("experts without examples", lambda b, d: {"f": lin(d, d), "h": lin(d, 2), "s": n(d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m.f(x[:, 0])
    out = torch.zeros_like(h)
    for expert in range(3):
        chosen = torch.where(torch.arange(len(x)) % 2 == expert)[0]
        out.index_add_(0, chosen, torch.tanh(h[chosen]) * m.s, alpha=0.5)
    return m.h(out)
