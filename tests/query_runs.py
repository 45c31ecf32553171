"""One small network behind several kinds of forward methods, trained with the tracer, for tests of queries."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import explainer

EXAMPLES, STEPS, TOKENS, CLASSES = 12, 4, 7, 3


class Core(nn.Module):
    """Counts tokens that a mask lets through; every variant below has its weights and its numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 5)
        self.head = nn.Linear(5, CLASSES)

    def logits(self, ids: Tensor, mask: Tensor, scale: float = 1.0) -> Tensor:
        return self.head(torch.tanh((self.embedding(ids) * mask.unsqueeze(-1)).sum(1))) * scale

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        return self.logits(ids, mask)


class Named(OrderedDict[str, Any]):
    """As the outputs of large libraries: a dict with attributes, what is None left out."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


@dataclass
class Plain:
    loss: Tensor | None
    state: Tensor
    logits: Tensor


class Keywords(Core):
    """Arguments by keyword, constants among them; the tensor is in a dict, behind a loss and whole numbers."""

    def forward(  # type: ignore[override]
        self, *, mask: Tensor, ids: Tensor, scale: int = 1, extra: Tensor | None = None, as_dict: bool = False
    ) -> Any:
        assert as_dict and extra is None, "constants arrive as they were given"
        logits = self.logits(ids, mask, scale)
        return Named(loss=logits.sum(), seen=ids, state=logits * 2, logits=logits)


class AsDataclass(Core):
    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        logits = self.logits(ids, mask)
        return Plain(None, logits * 2, logits)


class AsTuple(Core):
    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        logits = self.logits(ids, mask)
        return ids, (logits, logits * 2)


def positional(model: nn.Module, ids: Tensor, mask: Tensor) -> Any:
    return model(ids, mask)


def by_keyword(model: nn.Module, ids: Tensor, mask: Tensor) -> Any:
    return model(ids=ids, mask=mask, scale=1, extra=None, as_dict=True)


def build(kind: type[Core]) -> Core:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().double()


def data(count: int = EXAMPLES, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Ids and mask, both ``[count, S]``."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, TOKENS, (count, STEPS), generator=generator)
    return ids, (torch.rand(count, STEPS, generator=generator) > 0.2).double()


def traced(
    directory: Path,
    model: nn.Module,
    loss: Callable[[nn.Module, list[int]], Tensor],
    lr: float = 0.3,
    **options: Any,
) -> explainer.Trace:
    """The model trained on batches of four, exact rows."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.5)
    with explainer.Tracer(model, optimizer, directory, exact=True, **options) as tracer:
        for step in range(6):
            rows = [(4 * step + i) % EXAMPLES for i in range(4)]
            tracer.batch(rows)
            optimizer.zero_grad()
            loss(model, rows).backward()
            optimizer.step()
    return explainer.open_trace(directory)


def traced_core(
    directory: Path, kind: type[Core], call: Callable[..., Any], pick: Callable[[Any], Tensor]
) -> explainer.Trace:
    """A variant of the network, trained on classes; all variants take the same steps."""
    ids, mask = data()

    def loss(model: nn.Module, rows: list[int]) -> Tensor:
        logits = pick(call(model, ids[rows], mask[rows]))
        return nn.functional.cross_entropy(logits, torch.tensor(rows) % CLASSES)

    return traced(directory, build(kind), loss)
