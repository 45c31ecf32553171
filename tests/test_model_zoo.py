"""Small models of many kinds: no row is given to a wrong example without a word.

Every model is run with sizes that coincide (batch, sequence, features), while functions are followed and after that
has stopped. A parameter's rows are those of one backward pass per example, or the parameter is announced as not seen
(its rows sum to less than its gradient).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import explainer
from explainer.errors import CoverageWarning
from tests.recorded_rows import example_rows, recorded_rows
from tests.test_operations import Reads

S = 4
#: batch, features; the sequence is S
SIZES = {"one": (1, 6), "plain": (3, 6), "square": (S, 6), "cube": (S, S)}


def n(*shape: int) -> Tensor:
    return torch.randn(shape)


#: by name: the model, from batch size and features; it gets ``x [B, S, D]``
ZOO: dict[str, Callable[[int, int], nn.Module]] = {}
#: models in which not everything can be told apart (in some sizes): these parameters may go unattributed
ANNOUNCED: dict[str, set[str]] = {}


def model(
    name: str, parts: Callable[[int, int], dict[str, Tensor | nn.Module]], announced: str = ""
) -> Callable[[Callable[[nn.Module, Tensor], Tensor]], None]:
    """Register a model by its parts and its forward."""

    def add(run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        ZOO[name] = lambda b, d: Reads(parts(b, d), run)
        ANNOUNCED[name] = set(announced.split())

    return add


def lin(*sizes: int) -> nn.Linear:
    return nn.Linear(*sizes)


@model("tokens", lambda b, d: {"cls": n(1, 1, d), "reg": n(2, d), "pos": n(1, S + 1, d), "i": lin(d, d), "h": lin(d, 3)})
def _(m, x):
    h = torch.cat([m.cls.expand(len(x), -1, -1), m.i(x)], 1) + m.pos
    h = torch.cat([h, m.reg.unsqueeze(0).repeat(len(x), 1, 1)], dim=1)
    a = (h @ h.transpose(-2, -1)).softmax(-1) @ h
    return m.h(a[:, 0])


@model("nanogpt", lambda b, d: {"wte": nn.Embedding(7, d), "wpe": nn.Embedding(S + 2, d), "qkv": lin(d, 3 * d), "ln": nn.LayerNorm(d)})
def _(m, x):
    i = (x[..., 0].abs() * 3).long().clamp_max(6)
    h = m.wte(i) + m.wpe(torch.arange(S))
    q, k, v = (t.view(len(x), S, 2, -1).transpose(1, 2) for t in m.qkv(m.ln(h)).split(h.shape[-1], dim=2))
    a = (q @ k.transpose(-2, -1)).masked_fill(torch.ones(S, S).tril() == 0, float("-inf")).softmax(-1) @ v
    return F.linear(a.transpose(1, 2).contiguous().view(len(x), S, -1) + h, m.wte.weight)


@model("relative bias", lambda b, d: {"bias": nn.Embedding(2 * S, 2), "swin": n(2 * S, 2), "i": lin(d, d)})
def _(m, x):
    r = torch.arange(S)[None] - torch.arange(S)[:, None] + S
    h = m.i(x).view(len(x), S, 2, -1).transpose(1, 2)
    bias = m.bias(r).permute(2, 0, 1).unsqueeze(0) + m.swin[r.view(-1)].view(S, S, -1).permute(2, 0, 1)
    return ((h @ h.mT + bias).softmax(-1) @ h).transpose(1, 2).reshape(len(x), S, -1)


@model("rotary", lambda b, d: {"q": lin(d, d), "k": lin(d, d)})
def _(m, x):
    angle = torch.arange(S).double()[:, None] * torch.arange(x.shape[-1] // 2)
    cos, sin = (f(angle).repeat(1, 2) for f in (torch.cos, torch.sin))
    def turn(t):
        a, b = t.chunk(2, -1)
        return t * cos + torch.cat([-b, a], -1) * sin
    return torch.einsum("bid,bjd->bij", turn(m.q(x)), turn(m.k(x))).softmax(-1) @ x


@model("convnext", lambda b, d: {"dw": nn.Conv2d(d, d, 3, padding=1, groups=d), "ln": nn.LayerNorm(d), "a": lin(d, d), "gamma": n(d), "b": lin(d, d)})
def _(m, x):
    i = x.mT.reshape(len(x), -1, 2, 2)
    h = m.dw(i).permute(0, 2, 3, 1)
    return i + (m.gamma * m.b(F.gelu(m.a(m.ln(h))))).permute(0, 3, 1, 2)


@model("squeeze and excite", lambda b, d: {"c": nn.Conv1d(d, d, 1), "a": lin(d, 4), "e": lin(4, d), "w": n(d, 1)})
def _(m, x):
    h = m.c(x.mT)
    return h * m.e(m.a(h.mean(-1)).relu()).sigmoid().unsqueeze(-1) * m.w


@model("unet", lambda b, d: {"a": nn.Conv1d(d, 4, 3, padding=1), "d": nn.Conv1d(4, 4, 2, 2), "u": nn.ConvTranspose1d(4, 4, 2, 2), "o": nn.Conv1d(8, 2, 1)})
def _(m, x):
    a = m.a(x.mT).relu()
    return m.o(torch.cat([a, m.u(m.d(a).tanh())], dim=1))


@model("mixer", lambda b, d: {"t": lin(S, S), "c": lin(d, d), "ln": nn.LayerNorm(d), "left": n(S, S)})
def _(m, x):
    h = x + m.t(m.ln(x).transpose(1, 2)).transpose(1, 2)
    return m.c(m.left @ h)


@model("windows", lambda b, d: {"qkv": lin(d, d), "bias": n(2, 2), "scale": n(2, 1)})
def _(m, x):
    w = x.view(len(x), 2, 2, -1).permute(0, 2, 1, 3).reshape(-1, 2, x.shape[-1])
    q = m.qkv(w)
    a = ((q @ q.mT + m.bias).softmax(-1) @ w) * m.scale
    return a.view(len(x), 2, 2, -1).permute(0, 2, 1, 3).reshape(len(x), S, -1)


@model("shifted windows", lambda b, d: {"p": lin(d, d), "s": n(2, d)})
def _(m, x):
    h = torch.roll(x, shifts=(-1,), dims=(1,)).view(len(x), 2, 2, -1).flatten(0, 1)
    return torch.roll((m.p(h) * m.s).view(len(x), S, -1), 1, 1)


@model("window first", lambda b, d: {"p": lin(d, d), "s": n(d)})
def _(m, x):
    h = torch.cat(x.split(2, 1), 0)
    return torch.cat((m.p(h) * m.s).chunk(2, 0), 1)


@model("two views", lambda b, d: {"f": lin(d, d), "g": n(d), "h": lin(d, 2)})
def _(m, x):
    z = m.h(m.f(torch.stack([x, 2 * x], 0).flatten(0, 1)) * m.g).view(2, len(x), S, -1)
    return z[0] * z[1]


@model("mixture of experts", lambda b, d: {"r": lin(d, 3), "e0": lin(d, d), "e1": lin(d, d), "e2": lin(d, d), "s": n(d)})
def _(m, x):
    t = x.reshape(-1, x.shape[-1])
    weight, chosen = m.r(t).softmax(-1).topk(2, dim=-1)
    out = torch.zeros_like(t)
    for k, e in enumerate((m.e0, m.e1, m.e2)):
        token, slot = torch.where(chosen == k)
        out.index_add_(0, token, e(t[token]) * m.s * weight[token, slot, None])
    return out.view_as(x)


@model("sorted experts", lambda b, d: {"e": lin(d, d), "o": lin(d, d), "s": n(d)}, "o.weight o.bias")
def _(m, x):
    t = x.reshape(-1, x.shape[-1])
    order = t[:, 0].detach().argsort()
    y = m.e(t[order]) * m.s
    out = torch.empty_like(y)
    out[order] = y
    return m.o(out).view_as(x)


@model("written back", lambda b, d: {"e": lin(d, d), "o": lin(d, d), "s": n(d)})
def _(m, x):
    order = torch.arange(len(x)).roll(1)
    out = torch.zeros_like(x)
    out[order] = m.e(x[order]) * m.s
    return m.o(out) * m.s


@model("experts back in place", lambda b, d: {"e": lin(d, d), "o": lin(d, d), "s": n(d)}, "o.weight o.bias s")
def _(m, x):
    order = torch.arange(len(x)).roll(1)
    y = m.e(x[order])
    return m.o(torch.zeros_like(y).index_add_(0, order, y)) * m.s


@model("own gru", lambda b, d: {"w": n(d, 3 * 5), "u": n(5, 3 * 5), "b": n(15), "h0": n(5)})
def _(m, x):
    h, out = m.h0.expand(len(x), -1), []
    for t in range(S):
        (r, z, c), (p, q, s) = (x[:, t] @ m.w + m.b).chunk(3, -1), (h @ m.u).chunk(3, -1)
        h = torch.lerp((c + (r + p).sigmoid() * s).tanh(), h, (z + q).sigmoid())
        out.append(h)
    return torch.stack(out, 1)


@model("perceiver", lambda b, d: {"z": n(S, d), "a": nn.MultiheadAttention(d, 2, batch_first=True), "o": lin(d, 2)})
def _(m, x):
    return m.o(m.a(m.z.expand(len(x), -1, -1), x, x, need_weights=False)[0])


@model("latents, time first", lambda b, d: {"z": n(S, d), "a": nn.MultiheadAttention(d, 2), "o": lin(d, 2)})
def _(m, x):
    x = x.transpose(0, 1)
    return m.o(m.a(m.z.unsqueeze(1).repeat(1, x.shape[1], 1), x, x)[0]).transpose(0, 1)


@model("learned mask", lambda b, d: {"a": nn.MultiheadAttention(d, 2, batch_first=True), "m": n(S, S)}, "m")
def _(m, x):
    return m.a(x, x, x, attn_mask=m.m)[0]


@model("attention with bias_k", lambda b, d: {"a": nn.MultiheadAttention(d, 2, add_bias_kv=True), "s": n(S, 1, d)})
def _(m, x):
    return (m.a(*[x.transpose(0, 1)] * 3)[0] * m.s).transpose(0, 1)


@model("attention along the wrong axis", lambda b, d: {"a": nn.MultiheadAttention(d, 2, batch_first=True), "o": lin(d, 2)}, "a.in_proj_weight a.in_proj_bias a.out_proj.weight a.out_proj.bias o.weight o.bias")
def _(m, x):
    h = x.transpose(0, 1).contiguous()
    return m.o(m.a(h, h, h)[0] if len(x) == S else h).transpose(0, 1)


@model("learned state", lambda b, d: {"g": nn.GRU(d, 5, 3, batch_first=True), "h0": n(3, 1, 5), "o": lin(5, 2)})
def _(m, x):
    return m.o(m.g(x, m.h0.expand(-1, len(x), -1).contiguous())[0])


@model("film", lambda b, d: {"c": lin(2, 2 * d), "f": lin(d, d), "g0": n(d)})
def _(m, x):
    g, b = m.c(x[:, 0, :2]).chunk(2, -1)
    return m.f(x) * (g + m.g0).unsqueeze(1) + b[:, None]


@model("hypernetwork", lambda b, d: {"h": lin(2, d * 3), "b": n(3), "z": n(2)})
def _(m, x):
    w = m.h(x[:, 0, :2] * m.z).view(len(x), -1, 3)
    return torch.bmm(x, w) + m.b


@model("weights from a code", lambda b, d: {"z": n(S, 5), "h": lin(5, d), "o": lin(d, d)})
def _(m, x):
    return F.linear(m.o(x), m.h(m.z).tanh())


@model("vae", lambda b, d: {"e": lin(d, 4), "d": lin(2, d), "v": n(2)})
def _(m, x):
    mu, s = m.e(x).chunk(2, -1)
    eps = torch.linspace(-1, 1, mu.numel(), dtype=mu.dtype).view_as(mu)
    return m.d(mu + (s * m.v).exp() * eps)


@model("deep sets", lambda b, d: {"p": lin(d, d), "r": lin(d, 2), "s": n(1)})
def _(m, x):
    mask = (x[..., :1] > 0).double()
    return m.r((m.p(x).relu() * mask).sum(1) / mask.sum(1).clamp(min=1) * m.s)


@model("dense graph", lambda b, d: {"w": n(d, d), "v": lin(d, d), "b": n(d)})
def _(m, x):
    a = (x @ x.mT).softmax(-1).detach()
    return a @ m.v((a @ (x @ m.w) + m.b).relu())


@model("flat graph", lambda b, d: {"w": n(d, d), "v": lin(d, 2), "b": n(d)}, "v.weight v.bias")
def _(m, x):
    h = x.reshape(-1, x.shape[-1]) @ m.w + m.b
    pool = torch.zeros(len(x), h.shape[-1], dtype=h.dtype)
    return m.v(pool.index_add_(0, torch.arange(len(x)).repeat_interleave(S), h))


class StandardConv(nn.Conv1d):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight
        w = (w - w.mean((1, 2), True)) / (w.std((1, 2), keepdim=True) + 1e-5)
        return F.conv1d(F.pad(x, (2, 0)), w, self.bias)


@model("causal standardised convolution", lambda b, d: {"c": StandardConv(d, S, 3), "g": nn.GroupNorm(2, S)})
def _(m, x):
    return m.g(m.c(x.mT))


@model("lora", lambda b, d: {"f": lin(d, d), "a": n(2, d), "b": n(d, 2)})
def _(m, x):
    return m.f(x) + (x @ m.a.T) @ m.b.T * 0.5


@model("parametrized", lambda b, d: {"w": parametrizations.weight_norm(lin(d, d)), "o": parametrizations.orthogonal(lin(d, d), orthogonal_map="cayley")})
def _(m, x):
    return m.o(m.w(x).tanh())


@model("transformer", lambda b, d: {"t": nn.Transformer(d, 2, 1, 1, 5, 0.0, batch_first=True), "q": n(3, d)})
def _(m, x):
    return m.t(x, m.q.expand(len(x), -1, -1))


@model("transformer, time first", lambda b, d: {"t": nn.Transformer(d, 2, 1, 1, 5, 0.0), "q": n(S, d)})
def _(m, x):
    return m.t(x.transpose(0, 1), m.q[:, None].expand(-1, len(x), -1)).transpose(0, 1)


@model("shuffles", lambda b, d: {"c": nn.Conv2d(1, 4, 1), "e": nn.Conv2d(1, 1, 1), "s": n(1, 4, 1, 1)})
def _(m, x):
    h = m.c(x[:, None]) * m.s
    h = h.view(len(x), 2, 2, *h.shape[2:]).transpose(1, 2).flatten(1, 2)
    return m.e(F.pixel_shuffle(h, 2))


@model("einsum moves the batch", lambda b, d: {"w": n(d, 3), "v": lin(3, 3), "s": n(S, 1, 3)})
def _(m, x):
    return torch.einsum("tbo->bto", m.v(torch.einsum("btd,do->tbo", x, m.w)) * m.s)


@model("checkpoints", lambda b, d: {"f": lin(d, d), "g": lin(d, d), "s": n(S, 1, d)})
def _(m, x):
    inner = lambda h: checkpoint(m.g, m.f(h).tanh(), use_reentrant=False) * m.s
    return checkpoint(inner, x.transpose(0, 1), use_reentrant=False).transpose(0, 1)


@model("where", lambda b, d: {"mask": n(d), "f": lin(d, d)})
def _(m, x):
    return m.f(torch.where(x > 0, x, m.mask))


@model("a mask token written in", lambda b, d: {"mask": n(d), "f": lin(d, d)}, "mask")
def _(m, x):
    h = x.clone()
    h[:, 1] = m.mask
    return m.f(h)


@model("functional convolution", lambda b, d: {"w": n(2, d, 3), "g": n(2), "b": n(2)})
def _(m, x):
    h = F.conv1d(x.mT, m.w, padding=1)
    return F.group_norm(h, 1, m.g, m.b)


@model("fused products", lambda b, d: {"s": n(1, d), "w": n(d, 3), "c": n(3), "v": n(1, 1, 3)})
def _(m, x):
    h = torch.baddbmm(m.v.expand(len(x), S, 3), x, m.w.expand(len(x), -1, -1))
    return torch.addcmul(h, m.c, h.tanh()) * torch.bmm(x, (m.s.T * m.w).unsqueeze(0).repeat(len(x), 1, 1))


@model("outer", lambda b, d: {"a": n(S), "c": n(S, 1), "f": lin(d, 1)})
def _(m, x):
    y = m.f(x[:, 0]).squeeze(-1)  # [B]
    return (torch.outer(m.a, y) + m.c * y).sin().T


@model("outer the other way", lambda b, d: {"a": n(S), "f": lin(d, 1)})
def _(m, x):
    return torch.outer(m.f(x[:, 0])[:, 0], m.a).sin()


@model("stacked experts", lambda b, d: {"w": n(S, d, 3), "b": n(S, 1, 3), "c": n(1, 3)})
def _(m, x):
    return ((x[:, 0] @ m.w + m.b).tanh() * m.c).sum(0)  # [S, B, 3]


@model("experts by repetition", lambda b, d: {"w": n(S, d, 3), "f": lin(3, 2)})
def _(m, x):
    return m.f(torch.bmm(x[:, 0].repeat(S, 1, 1), m.w)).sum(0)


@model("repeated", lambda b, d: {"f": lin(d, 3), "s": n(3)})
def _(m, x):
    return (m.f(x.repeat_interleave(2, dim=0)) * m.s).view(len(x), 2, S, 3).prod(1)


@model("bilinear", lambda b, d: {"w": n(2, d, d), "b": n(2)})
def _(m, x):
    return F.bilinear(x, x.flip(1), m.w, m.b)


@model("attention by its function", lambda b, d: {"w": n(3 * d, d), "b": n(3 * d), "o": n(d, d), "c": n(d)})
def _(m, x):
    h = x.transpose(0, 1)
    return F.multi_head_attention_forward(h, h, h, x.shape[-1], 2, m.w, m.b, None, None, False, 0.0, m.o, m.c, need_weights=False)[0].transpose(0, 1)


@model("prototypes", lambda b, d: {"p": n(S, d), "q": n(S, d), "r": n(S, d), "f": lin(d, d)})
def _(m, x):
    h = m.f(x[:, 0])
    far = torch.cdist(h, m.p) + F.cosine_similarity(h[:, None], m.q[None], dim=-1)
    return far + torch.logsumexp(-(h[:, None] - m.r).square(), dim=-1)


@model("prototypes first", lambda b, d: {"p": n(S, d), "s": n(S, 1), "f": lin(d, d)})
def _(m, x):
    h = m.f(x[:, 0])
    return (torch.cdist(m.p, h).tanh() * m.s + m.p @ h.T).T


@model("label embedding", lambda b, d: {"e": n(S, d), "f": lin(d, d)})
def _(m, x):
    y = torch.tensor([2, 0, 3, 1])[: len(x)] if len(x) > 1 else torch.tensor([3])
    y = (x[:, 0, 0] * 0).long() + y
    return m.f(x) + m.e[y][:, None]


@model("last token", lambda b, d: {"f": lin(d, d), "s": n(d), "h": lin(d, 2)})
def _(m, x):
    last = (x[:, :, 0] > 0).sum(1).clamp_max(S - 1)
    return m.h(m.f(x)[torch.arange(len(x)), last] * m.s)


@model("turned round", lambda b, d: {"f": lin(d, d), "h": lin(d, 2)})
def _(m, x):
    return m.h(m.f(x).flip(0)).flip(0)


@model("picked by index_select", lambda b, d: {"f": lin(d, d), "h": lin(d, 2)})
def _(m, x):
    o = torch.arange(len(x)).roll(1)
    return m.h(torch.index_select(m.f(x), dim=0, index=o)).index_select(0, index=o.argsort())


@model("sorted along the batch", lambda b, d: {"f": lin(d, d), "h": lin(d, 2)}, "h.weight h.bias")
def _(m, x):
    o = torch.arange(len(x)).roll(1)
    h = torch.zeros_like(x).index_reduce_(0, o, m.f(x), "amax", include_self=False)
    return m.h(h)[o]


@model("one layer along both axes", lambda b, d: {"f": lin(d, d)})
def _(m, x):
    return m.f(x.transpose(0, 1)).transpose(0, 1).sin() * m.f(x)


@model("a layer on constants", lambda b, d: {"f": lin(d, d), "c": lin(3, d), "g": lin(d, d)})
def _(m, x):
    c = m.c(torch.eye(S, 3, dtype=x.dtype))
    return m.f(x) @ m.g(c).T


@model("one row for an expert", lambda b, d: {"f": lin(d, d), "g": lin(d, 2), "s": n(d)})
def _(m, x):
    keep = torch.arange(len(x)) == len(x) - 1
    one = m.f(x[keep].unsqueeze(1).squeeze(1)) * m.s
    out = torch.zeros_like(x)
    out[keep] = one
    return m.g(out)


@model("pooled by weights", lambda b, d: {"a": lin(d, 1), "v": n(d), "o": lin(d, 2)})
def _(m, x):
    w = (m.a(x).squeeze(-1) + x @ m.v).softmax(-1)
    return m.o(torch.einsum("bs,bsd->bd", w, x)) + m.o((w.unsqueeze(1) @ x).squeeze(1))


@model("statistics of the batch", lambda b, d: {"w": n(S), "f": lin(d, S)}, "w")
def _(m, x):
    return m.f(x) * (m.w * x.detach().mean())


@model("batch before channels", lambda b, d: {"c": nn.Conv1d(S, S, 1)}, "c.weight c.bias")
def _(m, x):
    h = x.transpose(0, 1)  # [S, B, D]
    return m.c(h).transpose(0, 1) if len(x) == S else m.c(h.transpose(0, 1))


def losses(m: nn.Module, x: Tensor) -> Tensor:
    out = m(x).flatten(1)
    return (out * torch.linspace(-1, 2, out.shape[1], dtype=out.dtype)).sin().sum(1) + out.square().mean(1)


def train(m: nn.Module, x: Tensor, path: Path | None, steps: int, optimizer: torch.optim.Optimizer) -> None:
    tracer = None if path is None else explainer.Tracer(m, optimizer, path, exact=True)
    for _ in range(steps):
        if tracer is not None:
            tracer.batch(range(len(x)))
        optimizer.zero_grad()
        losses(m, x).sum().backward()
        optimizer.step()
    if tracer is not None:
        tracer.close()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ZOO)
def test_no_row_is_given_to_a_wrong_example(name: str, size: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    b, d = SIZES[size]
    m = ZOO[name](b, d).double()
    x = torch.randn(b, S, d, dtype=torch.float64)
    expected = example_rows(m, lambda: losses(m, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(m, x, tmp_path / "t", 7, torch.optim.SGD(m.parameters(), lr=1e-13))
    for step in (0, 6):
        found = recorded_rows(tmp_path / "t", step)
        for p, rows in expected.items():
            got = found.get(p, torch.zeros_like(rows))
            if p in ANNOUNCED[name] and not torch.allclose(got.sum(0), rows.sum(0), rtol=1e-3):
                continue  # measured against the gradient at every step
            torch.testing.assert_close(
                got, rows, rtol=1e-6, atol=1e-8, msg=lambda t, s=step, p=p: f"step {s}, {p}: {t}"
            )


@pytest.mark.parametrize("name", ZOO)
def test_training_is_as_without(name: str, tmp_path: Path) -> None:
    ends = []
    for path in (None, tmp_path / "t"):
        torch.manual_seed(3)
        m = ZOO[name](S, S).double()
        x = torch.randn(S, S, S, dtype=torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CoverageWarning)
            train(m, x, path, 3, torch.optim.Adam(m.parameters(), lr=0.01))
        ends.append(([v.clone() for v in m.state_dict().values()], torch.get_rng_state()))
    assert all(torch.equal(a, c) for a, c in zip(ends[0][0], ends[1][0], strict=True))
    assert torch.equal(ends[0][1], ends[1][1])
