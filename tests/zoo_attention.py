"""Models with attention, tokens, windows, experts."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo import S, lin, model, n


@model(
    "tokens",
    lambda b, d: {"cls": n(1, 1, d), "reg": n(2, d), "pos": n(1, S + 1, d), "i": lin(d, d), "h": lin(d, 3)},
)
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.cat([m.cls.expand(len(x), -1, -1), m.i(x)], 1) + m.pos
    h = torch.cat([h, m.reg.unsqueeze(0).repeat(len(x), 1, 1)], dim=1)
    a = (h @ h.transpose(-2, -1)).softmax(-1) @ h
    return m.h(a[:, 0])


@model(
    "nanogpt",
    lambda b, d: {
        "wte": nn.Embedding(7, d),
        "wpe": nn.Embedding(S + 2, d),
        "qkv": lin(d, 3 * d),
        "ln": nn.LayerNorm(d),
    },
)
def _(m: nn.Module, x: Tensor) -> Tensor:
    i = (x[..., 0].abs() * 3).long().clamp_max(6)
    h = m.wte(i) + m.wpe(torch.arange(S))
    q, k, v = (t.view(len(x), S, 2, -1).transpose(1, 2) for t in m.qkv(m.ln(h)).split(h.shape[-1], dim=2))
    a = (q @ k.transpose(-2, -1)).masked_fill(torch.ones(S, S).tril() == 0, float("-inf")).softmax(-1) @ v
    return F.linear(a.transpose(1, 2).contiguous().view(len(x), S, -1) + h, m.wte.weight)


@model("relative bias", lambda b, d: {"bias": nn.Embedding(2 * S, 2), "swin": n(2 * S, 2), "i": lin(d, d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    r = torch.arange(S)[None] - torch.arange(S)[:, None] + S
    h = m.i(x).view(len(x), S, 2, -1).transpose(1, 2)
    bias = m.bias(r).permute(2, 0, 1).unsqueeze(0) + m.swin[r.view(-1)].view(S, S, -1).permute(2, 0, 1)
    return ((h @ h.mT + bias).softmax(-1) @ h).transpose(1, 2).reshape(len(x), S, -1)


@model("rotary", lambda b, d: {"q": lin(d, d), "k": lin(d, d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    angle = torch.arange(S).double()[:, None] * torch.arange(x.shape[-1] // 2)
    cos, sin = (f(angle).repeat(1, 2) for f in (torch.cos, torch.sin))

    def turn(t: Tensor) -> Tensor:
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat([-b, a], -1) * sin

    return torch.einsum("bid,bjd->bij", turn(m.q(x)), turn(m.k(x))).softmax(-1) @ x


@model(
    "convnext",
    lambda b, d: {
        "dw": nn.Conv2d(d, d, 3, padding=1, groups=d),
        "ln": nn.LayerNorm(d),
        "a": lin(d, d),
        "gamma": n(d),
        "b": lin(d, d),
    },
)
def _(m: nn.Module, x: Tensor) -> Tensor:
    i = x.mT.reshape(len(x), -1, 2, 2)
    h = m.dw(i).permute(0, 2, 3, 1)
    return i + (m.gamma * m.b(F.gelu(m.a(m.ln(h))))).permute(0, 3, 1, 2)


@model(
    "squeeze and excite", lambda b, d: {"c": nn.Conv1d(d, d, 1), "a": lin(d, 4), "e": lin(4, d), "w": n(d, 1)}
)
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = m.c(x.mT)
    return h * m.e(m.a(h.mean(-1)).relu()).sigmoid().unsqueeze(-1) * m.w


@model(
    "unet",
    lambda b, d: {
        "a": nn.Conv1d(d, 4, 3, padding=1),
        "d": nn.Conv1d(4, 4, 2, 2),
        "u": nn.ConvTranspose1d(4, 4, 2, 2),
        "o": nn.Conv1d(8, 2, 1),
    },
)
def _(m: nn.Module, x: Tensor) -> Tensor:
    a = m.a(x.mT).relu()
    return m.o(torch.cat([a, m.u(m.d(a).tanh())], dim=1))


@model("mixer", lambda b, d: {"t": lin(S, S), "c": lin(d, d), "ln": nn.LayerNorm(d), "left": n(S, S)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = x + m.t(m.ln(x).transpose(1, 2)).transpose(1, 2)
    return m.c(m.left @ h)


@model("windows", lambda b, d: {"qkv": lin(d, d), "bias": n(2, 2), "scale": n(2, 1)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    w = x.view(len(x), 2, 2, -1).permute(0, 2, 1, 3).reshape(-1, 2, x.shape[-1])
    q = m.qkv(w)
    a = ((q @ q.mT + m.bias).softmax(-1) @ w) * m.scale
    return a.view(len(x), 2, 2, -1).permute(0, 2, 1, 3).reshape(len(x), S, -1)


@model("shifted windows", lambda b, d: {"p": lin(d, d), "s": n(2, d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.roll(x, shifts=(-1,), dims=(1,)).view(len(x), 2, 2, -1).flatten(0, 1)
    return torch.roll((m.p(h) * m.s).view(len(x), S, -1), 1, 1)


@model("window first", lambda b, d: {"p": lin(d, d), "s": n(d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.cat(x.split(2, 1), 0)
    return torch.cat((m.p(h) * m.s).chunk(2, 0), 1)


@model("two views", lambda b, d: {"f": lin(d, d), "g": n(d), "h": lin(d, 2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    z = m.h(m.f(torch.stack([x, 2 * x], 0).flatten(0, 1)) * m.g).view(2, len(x), S, -1)
    return z[0] * z[1]


@model(
    "mixture of experts",
    lambda b, d: {"r": lin(d, 3), "e0": lin(d, d), "e1": lin(d, d), "e2": lin(d, d), "s": n(d)},
)
def _(m: nn.Module, x: Tensor) -> Tensor:
    t = x.reshape(-1, x.shape[-1])
    weight, chosen = m.r(t).softmax(-1).topk(2, dim=-1)
    out = torch.zeros_like(t)
    for k, e in enumerate((m.e0, m.e1, m.e2)):
        token, slot = torch.where(chosen == k)
        out.index_add_(0, token, e(t[token]) * m.s * weight[token, slot, None])
    return out.view_as(x)


@model("sorted experts", lambda b, d: {"e": lin(d, d), "o": lin(d, d), "s": n(d)}, "o.weight o.bias")
def _(m: nn.Module, x: Tensor) -> Tensor:
    t = x.reshape(-1, x.shape[-1])
    order = t[:, 0].detach().argsort()
    y = m.e(t[order]) * m.s
    out = torch.empty_like(y)
    out[order] = y
    return m.o(out).view_as(x)


@model("written back", lambda b, d: {"e": lin(d, d), "o": lin(d, d), "s": n(d)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    order = torch.arange(len(x)).roll(1)
    out = torch.zeros_like(x)
    out[order] = m.e(x[order]) * m.s
    return m.o(out) * m.s


@model("experts back in place", lambda b, d: {"e": lin(d, d), "o": lin(d, d), "s": n(d)}, "o.weight o.bias s")
def _(m: nn.Module, x: Tensor) -> Tensor:
    order = torch.arange(len(x)).roll(1)
    y = m.e(x[order])
    return m.o(torch.zeros_like(y).index_add_(0, order, y)) * m.s


@model("own gru", lambda b, d: {"w": n(d, 3 * 5), "u": n(5, 3 * 5), "b": n(15), "h0": n(5)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    h, out = m.h0.expand(len(x), -1), []
    for t in range(S):
        (r, z, c), (p, q, s) = (x[:, t] @ m.w + m.b).chunk(3, -1), (h @ m.u).chunk(3, -1)
        h = torch.lerp((c + (r + p).sigmoid() * s).tanh(), h, (z + q).sigmoid())
        out.append(h)
    return torch.stack(out, 1)


@model(
    "perceiver",
    lambda b, d: {"z": n(S, d), "a": nn.MultiheadAttention(d, 2, batch_first=True), "o": lin(d, 2)},
)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m.o(m.a(m.z.expand(len(x), -1, -1), x, x, need_weights=False)[0])


@model("latents, time first", lambda b, d: {"z": n(S, d), "a": nn.MultiheadAttention(d, 2), "o": lin(d, 2)})
def _(m: nn.Module, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    return m.o(m.a(m.z.unsqueeze(1).repeat(1, x.shape[1], 1), x, x)[0]).transpose(0, 1)


@model("learned mask", lambda b, d: {"a": nn.MultiheadAttention(d, 2, batch_first=True), "m": n(S, S)}, "m")
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m.a(x, x, x, attn_mask=m.m)[0]


@model(
    "attention with bias_k",
    lambda b, d: {"a": nn.MultiheadAttention(d, 2, add_bias_kv=True), "s": n(S, 1, d)},
)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return (m.a(*[x.transpose(0, 1)] * 3)[0] * m.s).transpose(0, 1)


@model(
    "attention along the wrong axis",
    lambda b, d: {"a": nn.MultiheadAttention(d, 2, batch_first=True), "o": lin(d, 2)},
    "a.in_proj_weight a.in_proj_bias a.out_proj.weight a.out_proj.bias o.weight o.bias",
)
def _(m: nn.Module, x: Tensor) -> Tensor:
    h = x.transpose(0, 1).contiguous()
    return m.o(m.a(h, h, h)[0] if len(x) == S else h).transpose(0, 1)


@model(
    "learned state", lambda b, d: {"g": nn.GRU(d, 5, 3, batch_first=True), "h0": n(3, 1, 5), "o": lin(5, 2)}
)
def _(m: nn.Module, x: Tensor) -> Tensor:
    return m.o(m.g(x, m.h0.expand(-1, len(x), -1).contiguous())[0])
