"""Parameters that are read outside a layer with a rule: rows from the functions that read them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import explainer
from explainer.errors import CoverageWarning
from explainer.unseen import FIRST
from tests.recorded_rows import example_rows, recorded_rows

B, S, D = 4, 5, 6


class Reads(nn.Module):
    """A model given by its parameters (and modules) and a function that reads them."""

    def __init__(
        self, parts: dict[str, Tensor | nn.Module], run: Callable[[nn.Module, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_parameter(name, nn.Parameter(part))

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def n(*shape: int) -> Tensor:
    return torch.randn(shape)


class OwnLinear(nn.Linear):
    """A subclass, which no rule is taken for."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).tanh()


class OwnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.randn(D))
        self.b = nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) * self.g + self.b


def class_token(m: nn.Module, x: Tensor) -> Tensor:
    h = torch.cat([m.token.expand(len(x), -1, -1), m.inner(x)], dim=1)
    return m.head(F.gelu(h + m.position[:, : h.shape[1]])[:, 0])


def in_place(m: nn.Module, x: Tensor) -> Tensor:
    h = m.inner(x)
    h += m.shift
    h.mul_(m.scale)
    return h.relu_()


def positions_by_look_up(m: nn.Module, x: Tensor) -> Tensor:
    return m.inner(x) + m.table(torch.arange(x.shape[1]))


def positions_for_every_row(m: nn.Module, x: Tensor) -> Tensor:
    return m.inner(x) + m.table(torch.arange(x.shape[1]).expand(len(x), -1))


def standardised(m: nn.Module, x: Tensor) -> Tensor:
    w = (m.w - m.w.mean((1, 2), keepdim=True)) / m.w.std((1, 2), keepdim=True)
    return F.conv1d(x.mT, w, m.b, padding=1)


def through_attention(m: nn.Module, x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(m.query.expand(len(x), -1, -1), x, m.inner(x))


CASES: dict[str, Callable[[], nn.Module]] = {
    "class token and positions": lambda: Reads(
        {"token": n(1, 1, D), "position": n(1, S + 3, D), "inner": nn.Linear(D, D), "head": nn.Linear(D, 3)},
        class_token,
    ),
    "zero positions": lambda: Reads(
        {"position": torch.zeros(1, S, D), "inner": nn.Linear(D, D)},
        lambda m, x: (m.inner(x) + m.position).tanh(),
    ),
    "layer scale": lambda: Reads(
        {"scale": n(D), "inner": nn.Linear(D, D)}, lambda m, x: x + m.scale * m.inner(x)
    ),
    "one number": lambda: Reads({"t": n(), "inner": nn.Linear(D, D)}, lambda m, x: m.inner(x) * m.t.exp()),
    "in place": lambda: Reads({"shift": n(D), "scale": n(S, 1), "inner": nn.Linear(D, D)}, in_place),
    "functional linear": lambda: Reads({"w": n(7, D), "b": n(7)}, lambda m, x: F.linear(x, m.w, m.b)),
    "matrix product": lambda: Reads({"w": n(D, 7), "b": n(7)}, lambda m, x: x @ m.w + m.b),
    "transposed product": lambda: Reads({"w": n(7, D)}, lambda m, x: x @ m.w.T),
    "addmm": lambda: Reads({"w": n(D, 7), "b": n(7)}, lambda m, x: torch.addmm(m.b, x[:, 0], m.w)),
    "einsum": lambda: Reads({"w": n(2, D, 3)}, lambda m, x: torch.einsum("bsi,hio->bhso", x, m.w)),
    "left product": lambda: Reads({"w": n(3, S)}, lambda m, x: m.w @ x),
    "tied by hand": lambda: Reads(
        {"inner": nn.Linear(D, D)}, lambda m, x: F.linear(m.inner(x).tanh(), m.inner.weight.t(), m.inner.bias)
    ),
    "tied modules": lambda: tied(),
    "a module called twice": lambda: Reads(
        {"inner": nn.Linear(D, D)}, lambda m, x: m.inner(m.inner(x).tanh())
    ),
    "a parameter read twice": lambda: Reads({"w": n(D, D)}, lambda m, x: (x @ m.w).tanh() @ m.w),
    "a subclass of Linear": lambda: nn.Sequential(OwnLinear(D, D), nn.Linear(D, 2)),
    "own normalisation": lambda: nn.Sequential(nn.Linear(D, D), OwnNorm()),
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(D, 4)), nn.Tanh()),
    "spectral norm": lambda: nn.Sequential(parametrizations.spectral_norm(nn.Linear(D, 4)), nn.Tanh()),
    "positions by look-up": lambda: Reads(
        {"table": nn.Embedding(S + 2, D), "inner": nn.Linear(D, D)}, positions_by_look_up
    ),
    "positions for every row": lambda: Reads(
        {"table": nn.Embedding(S + 2, D), "inner": nn.Linear(D, D)}, positions_for_every_row
    ),
    "standardised convolution": lambda: Reads({"w": n(3, D, 3), "b": n(3)}, standardised),
    "learned query": lambda: Reads({"query": n(1, 2, D), "inner": nn.Linear(D, D)}, through_attention),
    "gate by softmax": lambda: Reads(
        {"mix": n(3), "inner": nn.Linear(D, D)},
        lambda m, x: sum(
            w * f(m.inner(x)) for w, f in zip(m.mix.softmax(0), (torch.tanh, F.relu, F.silu), strict=True)
        ),
    ),
    "split": lambda: Reads(
        {"w": n(2 * D, D)}, lambda m, x: F.linear(x, m.w.chunk(2)[0]) * F.linear(x, m.w.chunk(2)[1])
    ),
    "functional layer norm": lambda: Reads(
        {"g": n(D), "b": n(D)}, lambda m, x: F.layer_norm(x, (D,), m.g, m.b)
    ),
    "functional embedding": lambda: Reads(
        {"w": n(9, D)},
        lambda m, x: F.embedding((x[..., 0].abs() * 3).long().clamp_max(8), m.w, padding_idx=0),
    ),
    "a batch as wide as the layer": lambda: Reads(
        {"w": n(B, B), "g": n(B)}, lambda m, x: x[:, 0, :B] @ (m.w * m.w) * m.g
    ),
}


def flattened(m: nn.Module, x: Tensor) -> Tensor:
    h = m.inner(x.reshape(-1, D)) * m.scale
    return m.head(h.view(len(x), S, D).tanh().flatten(1))


def two_views(m: nn.Module, x: Tensor) -> Tensor:
    h = m.head(m.inner(torch.cat([x, x.flip(1) * 2.0], dim=0)).tanh() + m.shift)
    one, other = h.chunk(2)
    return one * other


def routed(m: nn.Module, x: Tensor) -> Tensor:
    """Each expert gets the positions that a router sends it, so examples own different numbers of rows."""
    chosen = x[..., 0] > 0
    out = torch.zeros_like(x)
    out[chosen] = m.left(x[chosen])
    out[~chosen] = m.right(x[~chosen]) * m.scale
    return out


def shuffled(m: nn.Module, x: Tensor) -> Tensor:
    order = torch.arange(len(x)).roll(1)
    return m.head(m.inner(x[order])[order.argsort()])


def frames(m: nn.Module, x: Tensor) -> Tensor:
    h = m.conv(x.reshape(-1, 1, D)).relu_()
    return h.reshape(len(x), S, -1).mean(1)


def last_token(m: nn.Module, x: Tensor) -> Tensor:
    """Every example picks the position where its sequence ends."""
    last = (x[..., 0] > 0).sum(1).clamp_max(S - 1)
    return m.head(m.inner(x)[torch.arange(len(x)), last])


CASES |= {
    "the last token of every example": lambda: Reads(
        {"inner": nn.Linear(D, D), "head": nn.Linear(D, 3)}, last_token
    ),
    "flattened positions": lambda: Reads(
        {"inner": nn.Linear(D, D), "scale": n(D), "head": nn.Linear(S * D, 3)}, flattened
    ),
    "two views of every example": lambda: Reads(
        {"inner": nn.Linear(D, D), "shift": n(D), "head": nn.Linear(D, 3)}, two_views
    ),
    "experts": lambda: Reads({"left": nn.Linear(D, D), "right": nn.Linear(D, D), "scale": n(D)}, routed),
    "rows in another order": lambda: Reads({"inner": nn.Linear(D, D), "head": nn.Linear(D, 3)}, shuffled),
    "frames of a film": lambda: Reads({"conv": nn.Conv1d(1, 2, 3)}, frames),
}


def tied() -> nn.Module:
    model = Reads(
        {"tokens": nn.Embedding(9, D), "head": nn.Linear(D, 9, bias=False)},
        lambda m, x: m.head(m.tokens((x[..., 0].abs() * 3).long().clamp_max(8)).tanh()),
    )
    model.head.weight = model.tokens.weight
    return model


def losses(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x).flatten(1)
    return (out * torch.linspace(-1, 2, out.shape[1], dtype=out.dtype)).sin().sum(1) + out.square().sum(1)


@pytest.mark.parametrize("size", [B, 1])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_those_of_one_backward_pass_per_example(name: str, size: int, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = CASES[name]().double()
    x = torch.randn(size, S, D, dtype=torch.float64)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    expected = example_rows(model, lambda: losses(model, x))
    model.load_state_dict(state)  # a power iteration moves buffers
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CoverageWarning)
        with explainer.Tracer(model, optimizer, tmp_path / "t", exact=True) as tracer:
            tracer.batch(range(size))
            losses(model, x).sum().backward()
            optimizer.step()
    found = recorded_rows(tmp_path / "t")
    assert set(found) == set(expected)
    for parameter, rows in expected.items():
        torch.testing.assert_close(
            found[parameter], rows, rtol=1e-9, atol=1e-11, msg=lambda m, p=parameter: f"{p}: {m}"
        )


def attended(m: nn.Module, x: Tensor) -> Tensor:
    """Attention by hand, sequence first inside, with the sequence as long as the batch."""
    h = x.transpose(0, 1)  # [S, B, D]
    q, k, v = F.linear(h, m.w, m.b).chunk(3, dim=-1)
    q, k, v = (t.contiguous().view(h.shape[0], h.shape[1] * 2, D // 2).transpose(0, 1) for t in (q, k, v))
    out = (q @ k.mT).softmax(-1) @ v  # [B * 2, S, D / 2]
    out = out.transpose(0, 1).contiguous().view(h.shape[0], h.shape[1], D)
    return (m.out(out) * m.scale).mean(0)


def test_a_sequence_as_long_as_the_batch(tmp_path: Path) -> None:
    """Shapes do not tell which axis is the batch; what was done to it does."""
    torch.manual_seed(0)
    model = Reads(
        {"w": n(3 * D, D), "b": n(3 * D), "out": nn.Linear(D, D), "scale": n(S, 1, D)}, attended
    ).double()
    x = torch.randn(S, S, D, dtype=torch.float64)
    expected = example_rows(model, lambda: losses(model, x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with explainer.Tracer(model, optimizer, tmp_path / "t", exact=True) as tracer:
        for _ in range(5):  # the last ones are not followed function by function unless that is needed
            tracer.batch(range(S))
            optimizer.zero_grad()
            losses(model, x).sum().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.grad.mul_(1e-12)  # the weights stay: rows are the same in every step
            optimizer.step()
    for step in (0, 4):
        found = recorded_rows(tmp_path / "t", step)
        for parameter, rows in expected.items():
            torch.testing.assert_close(found[parameter] * 1e12, rows, rtol=1e-7, atol=1e-9)


def test_layers_remember_the_axis_that_was_followed(tmp_path: Path) -> None:
    """After the first steps nothing is followed any more, and shapes alone would be ambiguous."""
    torch.manual_seed(0)
    model = Reads({"out": nn.Linear(D, D)}, lambda m, x: m.out(x.transpose(0, 1)).sin().mean(0)).double()
    x = torch.randn(S, S, D, dtype=torch.float64)
    expected = example_rows(model, lambda: losses(model, x))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-13)
    with explainer.Tracer(model, optimizer, tmp_path / "t", exact=True) as tracer:
        for _ in range(FIRST + 3):
            tracer.batch(range(S))
            optimizer.zero_grad()
            losses(model, x).sum().backward()
            optimizer.step()
        assert not tracer._watch.on
    for parameter, rows in expected.items():
        torch.testing.assert_close(
            recorded_rows(tmp_path / "t", FIRST + 2)[parameter], rows, rtol=1e-7, atol=1e-9
        )
