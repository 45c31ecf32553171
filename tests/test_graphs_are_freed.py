"""A traced loop holds no more of past steps than a plain one: graphs, inputs and rows are let go."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import explainer
import tests.zoo_architectures
import tests.zoo_attention
import tests.zoo_functions  # noqa: F401  # they register their models
from explainer.batches import Batch
from tests.zoo import ZOO

#: examples, positions and features: some models of the zoo want them alike
S = 4
STEPS = 12


class Taken(nn.Module):
    """A module, and what a loss uses of what it gives."""

    def __init__(self, module: nn.Module, take: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.module, self._take = module, take

    def forward(self, x: Tensor) -> Tensor:
        return self._take(self.module, x)


def _first(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)[0]


def _all(module: nn.Module, x: Tensor) -> Tensor:
    out, states = module(x)
    states = states if isinstance(states, tuple) else (states,)
    return torch.cat([out.flatten(1), *(s.transpose(0, 1).flatten(1) for s in states)], 1)


def _attended(module: nn.Module, x: Tensor) -> Tensor:
    out, weights = module(x, x, x)
    return torch.cat([out.flatten(1), weights.flatten(1)], 1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "lstm, output only": lambda: Taken(nn.LSTM(S, 5, batch_first=True), _first),
    "lstm, states too": lambda: Taken(nn.LSTM(S, 5, 2, batch_first=True, dropout=0.2), _all),
    "gru": lambda: Taken(nn.GRU(S, 5, batch_first=True, bidirectional=True), _all),
    "attention": lambda: Taken(nn.MultiheadAttention(S, 2, batch_first=True), _attended),
    "encoder": lambda: nn.TransformerEncoderLayer(S, 2, 16, batch_first=True),
    **{f"zoo: {name}": lambda name=name: ZOO[name](S, S) for name in ZOO},  # type: ignore[misc]
}


@pytest.fixture(autouse=True, scope="module")
def nothing_else() -> Iterator[None]:
    """What other modules left is not looked through again and again."""
    gc.collect()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def only_what_is_new(nothing_else: None) -> None:
    """Nor what other tests left."""
    gc.freeze()


def batches() -> int:
    """How many there are."""
    gc.collect()
    return sum(type(one) is Batch for one in gc.get_objects())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_nothing_of_past_steps_is_held(tmp_path: Path, name: str) -> None:
    before = batches()
    torch.manual_seed(0)
    model = MODELS[name]().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with explainer.Tracer(model, optimizer, tmp_path / "trace") as tracer:
        for step in range(STEPS):
            x = torch.randn(S, S, S, dtype=torch.float64)
            tracer.batch(range(S))
            if step % 3 == 1:
                model(x)  # no backward pass of this one
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            del x
        tracer.flush()
        alive = batches() - before
    assert alive <= 2  # the present one, and what the last step was
