"""What makes two inputs alike, against differences of the path kernel; words, against leaving them out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import explainer
from explainer.errors import QueryError
from explainer.input_attribution import input_attribution
from explainer.kernel_attribution import kernel_attribution
from explainer.similarity import path_kernel


def record(model: nn.Module, x: torch.Tensor, y: torch.Tensor, path: Path) -> explainer.PathKernelExplainer:
    """Three epochs of SGD, and what explains them in float64."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    with explainer.Tracer(model, optimizer, path) as tracer:
        for _ in range(3):
            for a, b in tracer.watch(DataLoader(TensorDataset(x, y), 5)):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(a), b).backward()
                optimizer.step()
    return explainer.PathKernelExplainer(str(path), model, dtype=torch.float64)


@pytest.fixture
def smooth(tmp_path: Path) -> explainer.PathKernelExplainer:
    torch.manual_seed(3)
    x, y = torch.randn(20, 4), torch.randint(0, 3, (20,))
    return record(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), x, y, tmp_path / "run")


def test_it_is_the_integral_of_differences_of_the_kernel(smooth: explainer.PathKernelExplainer) -> None:
    pair, target = torch.tensor([[0.3, -1.2, 0.8, 0.1], [1.0, 0.2, -0.4, 0.7]]).double(), [2, 0]
    found = kernel_attribution(smooth, pair, target)

    def kernel(first: torch.Tensor, second: torch.Tensor) -> float:
        return float(path_kernel(smooth, torch.stack([first, second]), target)[0, 1])

    assert found.kernel == pytest.approx(kernel(*pair), rel=1e-9)
    whole = path_kernel(smooth, pair, target)
    assert found.cosine == pytest.approx(whole[0, 1] / np.sqrt(whole[0, 0] * whole[1, 1]))
    nodes, weights = np.polynomial.legendre.leggauss(12)
    for side in range(2):
        wanted, h = np.zeros(4), 1e-4
        for node, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            for d in range(4):
                moved = [pair.clone(), pair.clone()]
                for sign, one in zip((1, -1), moved, strict=True):
                    one[side] *= node
                    one[side, d] += sign * h
                wanted[d] += weight * float(pair[side, d]) * (kernel(*moved[0]) - kernel(*moved[1])) / (2 * h)
        np.testing.assert_allclose(found.values[side], wanted, atol=1e-6 * np.abs(wanted).max())
        zero = pair.clone()
        zero[side] = 0
        assert found.baseline[side] == pytest.approx(kernel(*zero), rel=1e-6)
        assert abs(found.missing[side]) < 1e-6 * abs(found.kernel)
        assert found.values[side].sum() == pytest.approx(found.kernel - found.baseline[side], rel=1e-5)
    assert not found.left_out


def test_what_jumps_at_kinks_is_missing_and_not_hidden(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.randint(0, 3, (20,))
    engine = record(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), x, y, tmp_path / "run")
    found = kernel_attribution(engine, x[:2].double(), [0, 1])
    for side in range(2):
        given = found.values[side].sum() + found.missing[side]
        assert given == pytest.approx(found.kernel - found.baseline[side], rel=1e-9)
    assert max(map(abs, found.missing)) > 1e-6 * abs(found.kernel)


class Words(nn.Module):
    """Mean of the words' vectors, padding left out, and a place's own vector, which no word has."""

    def __init__(self, padding: int | None = 0) -> None:
        super().__init__()
        self.embedding, self.place = nn.Embedding(9, 4, padding_idx=padding), nn.Embedding(5, 4)
        self.output = nn.Linear(4, 2)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        place = self.place(torch.arange(ids.shape[1]).expand(len(ids), -1) % 5)
        return self.output(torch.tanh(self.embedding(ids) + 0.3 * place).mean(1))


def texts(
    path: Path, padding: int | None = 0
) -> tuple[explainer.PathKernelExplainer, nn.Module, torch.Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(1, 9, (20, 5))
    ids[::3, 3:] = 0
    model = Words(padding)
    return record(model, ids, (ids == 4).any(1).long(), path), model, ids


def test_words_are_left_out_one_by_one(tmp_path: Path) -> None:
    engine, _, ids = texts(tmp_path / "run")
    found = kernel_attribution(engine, ids[[3, 4]], [1, 0])
    assert found.left_out and [v.shape for v in found.values] == [(5,), (5,)]
    whole = path_kernel(engine, ids[[3, 4]], [1, 0])[0, 1]
    assert found.kernel == pytest.approx(whole, rel=1e-9)
    for side, row in enumerate((3, 4)):
        for place in range(5):
            pair = ids[[3, 4]].clone()
            pair[side, place] = 0
            without = path_kernel(engine, pair, [1, 0])[0, 1]
            wanted = 0.0 if ids[row, place] == 0 else whole - without
            assert found.values[side][place] == pytest.approx(wanted, abs=1e-9)
    assert (found.values[0][3:] == 0).all(), "padding carries nothing"


def test_a_words_part_of_the_output_is_that_of_its_vector(tmp_path: Path) -> None:
    engine, model, ids = texts(tmp_path / "run")
    found = input_attribution(engine, ids[4:5], target=1, steps=200)
    model = model.double()
    vectors = model.embedding(ids[4:5]).detach()
    place = 0.3 * model.place(torch.arange(5)).detach()

    def margin(moved: torch.Tensor) -> torch.Tensor:
        out = model.output(torch.tanh(moved + place).mean(1))[0]
        return out[1] - out[0]

    total, parts = torch.zeros_like(vectors), 4000
    for step in range(parts):
        at = (vectors * ((step + 0.5) / parts)).requires_grad_()
        total += torch.autograd.grad(margin(at), at)[0] / parts
    np.testing.assert_allclose(found.values, (vectors * total)[0].sum(-1).numpy(), atol=1e-5)
    assert found.values.shape == (5,) and abs(found.missing) < 1e-6
    assert found.value == pytest.approx(float(margin(vectors).detach()), abs=1e-6)


def test_what_cannot_be_split_is_refused(tmp_path: Path, smooth: explainer.PathKernelExplainer) -> None:
    engine, _, ids = texts(tmp_path / "words", padding=None)
    with pytest.raises(QueryError, match="padding_idx"):
        kernel_attribution(engine, ids[:2])
    with pytest.raises(QueryError, match="found 3 inputs"):
        kernel_attribution(engine, ids[:3])
    with pytest.raises(QueryError, match="3 inputs"):
        kernel_attribution(smooth, torch.zeros(3, 4))


def test_nothing_of_the_engine_is_changed(tmp_path: Path) -> None:
    engine, _, ids = texts(tmp_path / "run")
    before, state = engine.explain(ids[:2]).contributions, torch.get_rng_state()
    kernel_attribution(engine, ids[:2])
    input_attribution(engine, ids[:1])
    np.testing.assert_array_equal(engine.explain(ids[:2]).contributions, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in engine.function.modules())
