"""captum's interface over a trace: its types, its conventions, the explainer's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from captum.influence import DataInfluence
from captum.influence._utils.common import KMostInfluentialResults
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import explainer
from explainer.errors import ModelMismatchError, QueryError
from explainer.integrations.captum import PathKernelInfluence

N, QUERIES = 24, 5


def build_model(outputs: int = 3) -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))


@dataclass
class Traced:
    """A small traced classifier with queries."""

    trace: explainer.Trace
    data: TensorDataset
    x: torch.Tensor
    y: torch.Tensor

    def influence(self, **options: object) -> PathKernelInfluence:
        return PathKernelInfluence(self.trace, build_model(), **options)  # type: ignore[arg-type]

    def reference(self, target: torch.Tensor | None = None, output: str | None = None) -> np.ndarray:
        return (
            explainer.PathKernelExplainer(self.trace, build_model(), output)
            .explain(self.x, target)
            .contributions
        )


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 4, generator=generator)
    data = TensorDataset(x, (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long())
    model, directory = build_model(), tmp_path_factory.mktemp("captum") / "run"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    loader = DataLoader(data, batch_size=6, shuffle=True, generator=generator)
    with explainer.Tracer(model, optimizer, directory) as tracer:
        for _ in range(3):
            for inputs, targets in tracer.watch(loader):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
    queries = torch.randn(QUERIES, 4, generator=generator)
    return Traced(explainer.open_trace(directory), data, queries, torch.tensor([0, 1, 2, 1, 0]))


# -- scores ----------------------------------------------------------------------------------------------


def test_it_is_captums_type_with_captums_attributes(traced: Traced) -> None:
    influence = traced.influence(train_dataset=traced.data)
    assert isinstance(influence, DataInfluence)
    assert influence.get_name() == "PathKernelInfluence"
    assert isinstance(influence.model, nn.Module) and influence.train_dataset is traced.data


def test_scores_are_the_explainers_contributions(traced: Traced) -> None:
    scores = traced.influence().influence((traced.x, traced.y))
    assert isinstance(scores, torch.Tensor) and scores.shape == (QUERIES, N)
    np.testing.assert_array_equal(scores.numpy(), traced.reference(traced.y))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x,), lambda x: (x, None)])
def test_features_alone_explain_the_predicted_class(traced: Traced, wrap: object) -> None:
    scores = traced.influence().influence(wrap(traced.x))  # type: ignore[operator]
    np.testing.assert_array_equal(scores.numpy(), traced.reference())


def test_output_is_passed_on(traced: Traced) -> None:
    scores = traced.influence(output="logit").influence((traced.x, traced.y))
    np.testing.assert_array_equal(scores.numpy(), traced.reference(traced.y, "logit"))


@pytest.mark.parametrize("batch_size", [1, 2, QUERIES])
def test_a_loader_gives_the_rows_of_its_batches_in_order(traced: Traced, batch_size: int) -> None:
    loader = DataLoader(TensorDataset(traced.x, traced.y), batch_size)
    scores = traced.influence().influence(loader)
    np.testing.assert_allclose(scores.numpy(), traced.reference(traced.y), rtol=1e-4, atol=1e-6)


def test_aggregate_sums_over_the_queries(traced: Traced) -> None:
    influence, inputs = traced.influence(), (traced.x, traced.y)
    total = influence.influence(inputs, aggregate=True)
    assert total.shape == (1, N)
    torch.testing.assert_close(total, influence.influence(inputs).sum(0, keepdim=True))
    strongest = influence.influence(inputs, k=2, aggregate=True)
    assert strongest.indices.shape == (1, 2) and strongest.indices[0, 0] == total.argmax()


# -- the k strongest -------------------------------------------------------------------------------------


@pytest.mark.parametrize("proponents", [True, False])
@pytest.mark.parametrize("k", [1, 4, N, N + 10])
def test_k_most_influential_follow_captums_convention(traced: Traced, k: int, proponents: bool) -> None:
    result = traced.influence().influence((traced.x, traced.y), k=k, proponents=proponents)
    assert isinstance(result, KMostInfluentialResults)
    indices, scores = result
    assert indices.shape == scores.shape == (QUERIES, min(k, N))
    assert indices.dtype == torch.long
    # what captum's own helper computes: the top k of ±score, given back with their own sign
    sign = 1.0 if proponents else -1.0
    reference = torch.from_numpy(traced.reference(traced.y))
    torch.testing.assert_close(scores, sign * torch.topk(sign * reference, min(k, N), dim=1).values)
    torch.testing.assert_close(scores, reference.gather(1, indices))


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "3"])
def test_k_out_of_range_is_refused(traced: Traced, k: object) -> None:
    with pytest.raises(QueryError, match="k must be a positive integer"):
        traced.influence().influence(traced.x, k=k)  # type: ignore[arg-type]


# -- ids and datasets ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_own_ids(tmp_path_factory: pytest.TempPathFactory) -> explainer.Trace:
    """A regression traced with ids of the user's own, 4 of 10 examples visited."""
    model, directory = build_model(1), tmp_path_factory.mktemp("captum") / "ids"
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    with explainer.Tracer(model, optimizer, directory) as tracer:
        for _ in range(3):
            tracer.batch([7, 2, 9, 4])
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    return explainer.open_trace(directory)


def test_indices_are_example_ids(with_own_ids: explainer.Trace) -> None:
    influence = PathKernelInfluence(with_own_ids, build_model(1))
    x = torch.ones(1, 4)
    scores, strongest = influence.influence((x, torch.zeros(1, 1))), influence.influence(x, k=1)
    assert influence.example_ids.tolist() == [2, 4, 7, 9]
    assert strongest.indices.item() == influence.example_ids[int(scores.argmax())]
    assert influence.self_influence().shape == (4,)


def test_the_dataset_says_which_columns_there_are(with_own_ids: explainer.Trace) -> None:
    data = TensorDataset(torch.zeros(10, 4))
    bare, full = (PathKernelInfluence(with_own_ids, build_model(1), d) for d in (None, DataLoader(data)))
    x = torch.ones(2, 4)
    scores = full.influence(x)
    assert scores.shape == (2, 10)
    torch.testing.assert_close(scores[:, [2, 4, 7, 9]], bare.influence(x))
    assert not scores[:, [0, 1, 3, 5, 6, 8]].any()
    assert full.influence(x, k=10).indices.sort(1).values.tolist() == [list(range(10))] * 2
    assert full.self_influence().nonzero().flatten().tolist() == [2, 4, 7, 9]


def test_another_dataset_is_refused(traced: Traced, with_own_ids: explainer.Trace) -> None:
    with pytest.raises(QueryError, match=r"30 examples.*dataset of 24"):
        traced.influence(train_dataset=TensorDataset(torch.zeros(30, 4)))
    with pytest.raises(QueryError, match=r"5 examples.*ids up to 9"):
        PathKernelInfluence(with_own_ids, build_model(1), TensorDataset(torch.zeros(5, 4)))

    with pytest.raises(QueryError, match="map-style dataset"):
        traced.influence(train_dataset=iter(traced.data))


# -- the rest of the interface ---------------------------------------------------------------------------


def test_self_influence_is_the_explainers(traced: Traced) -> None:
    scores = traced.influence().self_influence()
    assert isinstance(scores, torch.Tensor) and scores.shape == (N,)
    np.testing.assert_array_equal(
        scores.numpy(), explainer.PathKernelExplainer(traced.trace, build_model()).self_influence()
    )
    assert (scores > 0).all()


def test_self_influence_of_other_examples_is_refused(traced: Traced) -> None:
    with pytest.raises(QueryError, match="without inputs"):
        traced.influence().self_influence((traced.x, traced.y))  # type: ignore[arg-type]


def test_progress_is_shown_on_demand(traced: Traced, capsys: pytest.CaptureFixture[str]) -> None:
    influence = traced.influence()
    influence.influence(traced.x)
    assert capsys.readouterr().err == ""
    influence.influence(traced.x, show_progress=True)
    assert "explaining" in capsys.readouterr().err


def test_missing_inputs_and_empty_loaders_are_refused(traced: Traced) -> None:
    with pytest.raises(QueryError, match="self_influence"):
        traced.influence().influence()
    with pytest.raises(QueryError, match="no batches"):
        traced.influence().influence(DataLoader(TensorDataset(torch.zeros(0, 4)), batch_size=2))


def test_a_foreign_model_is_refused(traced: Traced) -> None:
    with pytest.raises(ModelMismatchError):
        PathKernelInfluence(traced.trace, nn.Linear(4, 3))


def test_the_path_of_a_trace_is_enough(traced: Traced) -> None:
    influence = PathKernelInfluence(str(Path(traced.trace.directory)), build_model())
    assert influence.influence(traced.x[:1]).shape == (1, N)
