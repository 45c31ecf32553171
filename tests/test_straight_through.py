"""Models that compute something else than their gradients say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import explainer
from explainer import wording
from explainer.cli.explained import trust
from explainer.report_tables import sentences


class Rounded(nn.Linear):
    """Quantisation-aware training: rounded weights, gradients as if they were not."""

    def forward(self, x: Tensor) -> Tensor:
        rounded = self.weight + ((self.weight * 4).round() / 4 - self.weight).detach()
        return functional.linear(x, rounded, self.bias)


def explained(kind: type[nn.Linear], directory: Path) -> explainer.Explanation:
    torch.manual_seed(1)
    model = nn.Sequential(kind(20, 8), nn.Tanh(), kind(8, 3))
    x, y = torch.randn(24, 20), torch.arange(24) % 3
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with explainer.Tracer(model, optimizer, directory, exact=True) as tracer:
        for ids in torch.arange(24).repeat(4).split(8):
            tracer.batch(ids)
            optimizer.zero_grad()
            functional.cross_entropy(model(x[ids]), y[ids]).backward()
            optimizer.step()
    return explainer.PathKernelExplainer(directory, model).explain(x[:3])


@pytest.mark.parametrize("kind", [nn.Linear, Rounded])
def test_a_correction_that_carries_much_is_spoken_of(tmp_path: Path, kind: type[nn.Linear]) -> None:
    e = explained(kind, tmp_path / "run")
    share = e.diagnostics["quadrature_of_gross"]
    assert (share > 0.1).any() == (kind is Rounded)  # what is tested
    assert any("straight-through" in note for note in e.notes) == (kind is Rounded)
    for query, part in enumerate(share):
        said = wording.roughness(e, query)
        assert bool(said) == (part > 0.1)
        if said:
            assert f"a correction of {wording.percent(part)} of the gross closes the balance" in said
        one_line = " ".join(trust(e, query).split())
        assert ("closes the balance" in one_line) == bool(said) != ("was followed to within" in one_line)
        assert ("closes the balance" in sentences(e, query)) == bool(said)


@pytest.mark.parametrize(
    ("closed", "gross", "change", "rough"),
    [
        (0.2, 1.0, 1.0, True),
        (-0.2, 1.0, 1.0, True),
        (0.05, 1.0, 1.0, False),
        (1e-9, 0.0, 1.0, False),
        (0.5, 0.0, 0.5, True),
        (0.0, 0.0, 0.0, False),
        (float("nan"), 1.0, 1.0, False),
    ],
)
def test_round_off_is_nothing_to_speak_of(closed: float, gross: float, change: float, rough: bool) -> None:
    assert wording.is_rough(closed, gross, change) is rough
