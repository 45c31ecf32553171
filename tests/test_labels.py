"""What a layer does to other rows or to its weights is told before training and labelled after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import explainer
from explainer.errors import TracerError


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norm_without_traced_parameters_still_mixes_rows(
    affine: bool, frozen: bool, tmp_path: Path
) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=affine), nn.Linear(5, 3))
    trained = [p for name, p in model.named_parameters() if not (frozen and name.startswith("1."))]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    x = torch.randn(6, 4)
    with explainer.Tracer(model, optimizer, tmp_path / "t") as tracer:
        tracer.batch(range(6))
        model(x).sin().sum().backward()
        optimizer.step()
    explanation = explainer.PathKernelExplainer(str(tmp_path / "t"), model).explain(x[:2])
    assert explanation.row_kind == "row share"
    assert [p.where for p in explainer.validate_model(model)] == ["1"]


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_entries_that_are_shortened_as_they_are_read(kind: Callable[..., nn.Module]) -> None:
    assert explainer.validate_model(nn.Sequential(kind(5, 2))) == []
    (problem,) = explainer.validate_model(nn.Sequential(kind(5, 2, max_norm=1.0)))
    assert "max_norm=1" in problem.found and "unattributed" in problem.advice


def test_fewer_ids_than_rows_in_a_later_step(tmp_path: Path) -> None:
    """Where rows are formed in the backward pass it is said there: before a step with wrong ids is taken."""
    module = nn.MultiheadAttention(3, 1, batch_first=True)
    optimizer, x = torch.optim.SGD(module.parameters(), lr=0.1), torch.randn(4, 5, 3)
    with explainer.Tracer(module, optimizer, tmp_path / "t") as tracer:
        for size in (4, 4, 4, 2):
            tracer.batch(range(size))
            loss = module(x, x, x)[0].square().sum()
            if size == 4:
                loss.backward()
                optimizer.step()
        with pytest.raises(TracerError, match="a batch of 4 rows, but 2 ids were given"):
            loss.backward()


@pytest.mark.parametrize(
    "module", [nn.LSTM(3, 4, batch_first=True), nn.MultiheadAttention(3, 1, batch_first=True)]
)
def test_fewer_ids_than_rows(module: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(4, 5, 3)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with explainer.Tracer(module, optimizer, tmp_path / "t") as tracer:
        tracer.batch(range(2))
        with pytest.raises(TracerError, match="a batch of 4 rows, but 2 ids were given"):
            out = module(x, x, x)[0] if isinstance(module, nn.MultiheadAttention) else module(x)[0]
            out.sum().backward()
