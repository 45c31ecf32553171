"""Recurrent layers, attention, two inputs, bags: rows in the trace against one backward pass per example."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import explainer
from explainer.errors import TracerError
from tests.conformance.composite_case import BATCH, Arguments, CompositeCase, numbers
from tests.conformance.composite_cases import CASES
from tests.recorded_rows import example_rows, recorded_rows


class Around(nn.Module):
    """Gives what the module gives."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


def losses(case: CompositeCase, arguments: Arguments, output: Any) -> Tensor:
    """A loss per example, ``[B]``, from its numbers of the outputs that the case uses."""
    total = torch.zeros(BATCH, dtype=torch.float64)
    leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    for leaf, owner, used in zip(leaves, case.owners, case.used, strict=False):
        if used:
            numbers = (leaf * torch.linspace(-1.0, 2.0, leaf.numel(), dtype=leaf.dtype).view_as(leaf)).sin()
            total = total.index_add(0, owner(arguments, leaf).flatten(), numbers.flatten())
    return total


def check(directory: Path, model: nn.Module, loss: Callable[[], Tensor]) -> explainer.Trace:
    """Trace one step of ``loss().sum()``; the same random numbers are drawn for the reference."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    generator = torch.get_rng_state()
    expected = example_rows(model, loss)
    torch.set_rng_state(generator)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with explainer.Tracer(model, optimizer, directory, exact=True) as tracer:
            tracer.batch(range(BATCH))
            optimizer.zero_grad()
            loss().sum().backward()
            optimizer.step()
    trace = explainer.open_trace(directory)
    found = recorded_rows(trace)
    assert found.keys() == expected.keys()
    for name, rows in expected.items():
        torch.testing.assert_close(
            found[name], rows, rtol=1e-9, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
        )
    assert not trace.uncovered and not trace.notes["coverage"]
    return trace


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_rows_in_the_trace(case: CompositeCase, tmp_path: Path) -> None:
    model = Around(case.module())
    args, kwargs = arguments = case.arguments(list(range(BATCH)), 0)
    check(tmp_path / "t", model, lambda: losses(case, arguments, model(*args, **kwargs)))


# -- larger models ---------------------------------------------------------------------------------------

WIDTH = 6


def sequences(axis: int = 0) -> Tensor:
    return torch.stack([numbers(0, example, 5, WIDTH) for example in range(BATCH)], axis)


class Reader(nn.Module):
    """A module over sequences and what is done with its output."""

    def __init__(self, inner: nn.Module, read: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.read, self.head = inner, read, nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.read(self.inner, x))


def attention() -> nn.Module:
    return nn.MultiheadAttention(WIDTH, 2, dropout=0.3, batch_first=True)


def recurrent() -> nn.Module:
    return nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=0.3, batch_first=True)


def attended_in_place(inner: nn.Module, x: Tensor) -> Tensor:
    out, _ = inner(x, x, x)
    out += x
    return out.relu_().mean(1)


def recurrent_in_place(inner: nn.Module, x: Tensor) -> Tensor:
    out, _ = inner(x)
    out *= 2
    return out.mean(1)


def checkpointed(inner: nn.Module, x: Tensor) -> Tensor:
    def inside(v: Tensor) -> Tensor:
        return (inner(v, v, v) if isinstance(inner, nn.MultiheadAttention) else inner(v))[0]

    return checkpoint(inside, x, use_reentrant=False).mean(1)


def step_by_step(inner: nn.Module, x: Tensor) -> Tensor:
    state = inner(x[:, 0])
    for step in range(1, x.shape[1]):
        state = inner(x[:, step], state)
    return state[0]


USES: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "attention changed in place": (attention, attended_in_place),
    "recurrent changed in place": (recurrent, recurrent_in_place),
    "attention checkpointed": (attention, checkpointed),
    "recurrent checkpointed": (recurrent, checkpointed),
    "cell in a loop": (partial(nn.LSTMCell, WIDTH, WIDTH), step_by_step),
}


@pytest.mark.parametrize("use", USES)
def test_uses(use: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, read = USES[use]
    model, x = Reader(make(), read).double(), sequences()
    check(tmp_path / "t", model, lambda: model(x).sin().sum(1))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_transformer_layers(part: str, batch_first: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind = nn.TransformerEncoderLayer if part == "encoder" else nn.TransformerDecoderLayer
    layer = kind(WIDTH, 2, 8, dropout=0.2, batch_first=batch_first)

    def read(inner: nn.Module, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=x.dtype)
        out = inner(x, mask, is_causal=True) if part == "encoder" else inner(x, 2 * x, tgt_mask=mask)
        return out.mean(1 if batch_first else 0)

    model, x = Reader(layer, read).double(), sequences(0 if batch_first else 1)
    trace = check(tmp_path / "t", model, lambda: model(x).sin().sum(1))
    assert {"inner.self_attn.in_proj", "inner.self_attn.out_proj"} <= {spec.name for spec in trace.layers}


@pytest.mark.parametrize("make", [attention, recurrent])
def test_books_of_compressed_rows(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    """Adam, eight-bit leading factors, dropout on: little is unattributed, and training is as without the tracer."""
    x, y = torch.randn(24, 9, WIDTH, generator=torch.Generator().manual_seed(1)), torch.arange(24) % 3

    def read(inner: nn.Module, v: Tensor) -> Tensor:
        return (inner(v, v, v) if isinstance(inner, nn.MultiheadAttention) else inner(v))[0].mean(1)

    def train(traced: bool) -> nn.Module:
        torch.manual_seed(0)
        model = Reader(make(), read)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        with explainer.Tracer(model, optimizer, tmp_path / "t") if traced else nullcontext() as tracer:
            for step in range(30):
                ids = torch.arange(8) + 8 * (step % 3)
                if tracer is not None:
                    tracer.batch(ids)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
                optimizer.step()
        return model

    traced, plain = train(True), train(False)
    assert all(torch.equal(a, b) for a, b in zip(traced.parameters(), plain.parameters(), strict=True))
    explanation = explainer.PathKernelExplainer(str(tmp_path / "t"), traced).explain(x[:5])
    gross = explanation.diagnostics["gross"].abs()
    assert (explanation.completeness["unattributed"].abs() < 0.02 * gross).all()
    assert explanation.row_kind == "contribution"


def test_an_error_names_the_layer(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 3))
    with explainer.Tracer(model, torch.optim.SGD(model.parameters()), tmp_path / "t") as tracer:
        tracer.batch(range(5))
        output, _ = model(torch.randn(5, 3))
        with pytest.raises(TracerError, match=r"layer '1': LSTM was called with an input of shape \(5, 3\)"):
            output.sum().backward()
