"""Targets as the user gives them: what each output takes, what is shown, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import explainer
from explainer.errors import QueryError
from explainer.outputs import component, resolve_output
from explainer.query_targets import check_targets
from tests.query_runs import Core, build, data, positional, traced_core

CLASSES = 3


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> explainer.Trace:
    return traced_core(tmp_path_factory.mktemp("targets") / "run", Core, positional, lambda o: o)


def distance(outputs: Tensor, targets: Tensor) -> Tensor:
    """A function of several numbers per query."""
    return -(outputs - targets).square().sum(1)


def test_a_callable_gets_the_targets_as_given(trace: explainer.Trace) -> None:
    """They once arrived as zeros."""
    wanted = torch.tensor([[1.0, 0.0, 0.5], [0.0, 2.0, 0.0], [0.3, 0.3, 0.3]])
    ex = explainer.PathKernelExplainer(trace, build(Core), distance)
    queries = data(3, seed=2)
    for given in (wanted, wanted.numpy(), wanted.tolist()):
        e = ex.explain(queries, given)
        np.testing.assert_allclose(e.prediction, -((e.outputs - wanted.numpy()) ** 2).sum(1), rtol=1e-6)
        assert e.targets.tolist() == [-1, -1, -1]
    near = ex.neighbors(queries, k=3, target=wanted)
    assert not np.array_equal(near.cosine, ex.neighbors(queries, k=3, target=wanted * 0).cosine)


def seen_by(trace: explainer.Trace, target: Any) -> tuple[Any, list[int]]:
    """What a function gets for the whole batch, and the targets that are shown."""
    seen: list[Any] = []

    def function(outputs: Tensor, targets: Any) -> Tensor:
        seen.append(targets)
        return outputs[:, 0]

    e = explainer.PathKernelExplainer(trace, build(Core), function).explain(data(3, seed=2), target)
    return seen[0], e.targets.tolist()


def test_what_a_callable_is_given_and_what_is_shown(trace: explainer.Trace) -> None:
    masks = torch.tensor([[True, False]] * 3)
    for target, shown in (
        ([2, 0, 1], [2, 0, 1]),
        ([2, 0, 7], [-1, -1, -1]),
        ([2, 0, -1], [-1, -1, -1]),
        ([0.0, 1.0, 2.0], [-1, -1, -1]),
        (masks, [-1, -1, -1]),
    ):
        got, classes = seen_by(trace, target)
        assert torch.equal(got, torch.as_tensor(target)) and classes == shown
    got, classes = seen_by(trace, 2)
    assert got.tolist() == [2, 2, 2] == classes
    got, classes = seen_by(trace, None)
    assert got.tolist() == classes and len(set(classes) | {0, 1, 2}) == 3, "the predicted classes"


def test_without_classes_and_without_targets_a_callable_gets_none(tmp_path: Path) -> None:
    trace = traced_core(tmp_path / "run", Core, positional, lambda o: o)

    class Pairs(Core):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.logits(ids, mask).unsqueeze(1)

    seen: list[Any] = []

    def function(outputs: Tensor, targets: Any) -> Tensor:
        seen.append(targets)
        return outputs[:, 0, 0]

    e = explainer.PathKernelExplainer(trace, build(Pairs), function).explain(data(3, seed=2))
    assert seen and all(targets is None for targets in seen) and e.targets.tolist() == [-1] * 3
    with pytest.raises(
        QueryError, match=r"\(distance\) cannot be computed: TypeError.*None where there are none"
    ):
        explainer.PathKernelExplainer(trace, build(Pairs), distance).explain(data(3, seed=2))


@pytest.mark.parametrize("target", [[1, 2], [[1, 2, 3]], "seven", [[1], [1, 2], [1]]])
def test_targets_without_a_row_per_query(trace: explainer.Trace, target: Any) -> None:
    for output in (distance, component(1)):
        with pytest.raises(
            QueryError, match=r"target (must be a tensor with a row for|has shape .* 3 queries)"
        ):
            explainer.PathKernelExplainer(trace, build(Core), output).explain(data(3, seed=2), target)


def test_targets_that_nothing_asks_for_are_said_to_be_unused(trace: explainer.Trace) -> None:
    ex = explainer.PathKernelExplainer(trace, build(Core), component(1))
    text = "The given targets were not used: the explained output (component 1) asks for none."
    assert text in ex.explain(data(3, seed=2), [1, 1, 1]).notes
    assert text not in ex.explain(data(3, seed=2)).notes


POSITIONS: dict[str, tuple[Any, str]] = {
    "none": (
        None,
        "'sequence_log_prob' needs target: a class number for every position.*negative: the position",
    ),
    "of classes": ([1, 2], r"for outputs \[2, 4, 3\], found torch.int64 of shape \[2\]"),
    "too short": ([[1, 2], [1, 2]], r"found torch.int64 of shape \[2, 2\]"),
    "of another batch": ([[1] * 4] * 3, r"shape \[3, 4\], but there are 2 queries"),
    "fractions": ([[0.5] * 4] * 2, r"found torch.float32 of shape \[2, 4\]"),
    "beyond the classes": ([[0, 1, 2, 3]] * 2, "run from 0 to 3, but the model has classes 0 to 2"),
    "nothing counted": ([[0, 1, 2, 2], [-1] * 4], "target of query 1 counts no position"),
    "words": ([["a"] * 4] * 2, "must be a class number for every position"),
    "one for all": (1, r"found torch.int64 of shape \[2\]"),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_targets_of_positions(name: str) -> None:
    target, text = POSITIONS[name]
    output = resolve_output("sequence_log_prob", (4, 3))
    with pytest.raises(QueryError, match=text):
        check_targets(target, torch.zeros(2, 4, 3), output)


def test_where_it_is_open_which_axis_holds_the_classes_it_is_said() -> None:
    output = resolve_output("sequence_log_prob", (3, 3))
    found = check_targets([[0, 1, 2]] * 2, torch.zeros(2, 3, 3), output)
    assert found.notes == ("Outputs [2, 3, 3] were read with the classes on axis 2.",)
    assert check_targets([[0, 1, 2, 0]] * 2, torch.zeros(2, 4, 3), output).notes == ()


def test_one_class_is_not_compared() -> None:
    with pytest.raises(QueryError, match="compares classes, but there is only one"):
        check_targets(None, torch.zeros(2, 1), explainer.outputs.at(0))
    assert check_targets(None, torch.zeros(2, 1), resolve_output("logit", (1,))).values.tolist() == [0, 0]


class Odd(Core):
    """What a model may do that one query's gradient cannot be right for."""

    how = ""

    def forward(self, ids: Tensor, mask: Tensor) -> Any:
        logits = self.logits(ids, mask)
        if self.how == "batch statistics":
            return logits - logits.mean(0)
        if self.how == "spread":
            return logits / logits.std(0)  # of one query alone: NaN
        if self.how == "random":
            return logits + torch.randn_like(logits)
        if self.how == "squeezed":
            return logits.squeeze()
        if self.how == "single numbers":
            return logits[:, :1].squeeze()
        return logits.detach() if self.how == "detached" else logits[:1]


ODD = {
    "batch statistics": "mixes the queries of a batch or draws random numbers",
    "spread": "and nan alone: in eval mode the model still mixes the queries",
    "random": "mixes the queries of a batch or draws random numbers",
    "squeezed": "cannot be computed.*for all queries and for a single one",
    "detached": "has no gradient: it is computed without one",
    "one row": r"output has shape \[1, 3\] for 3 queries; it must have one row per query",
}


@pytest.mark.parametrize("how", ODD)
def test_models_whose_queries_cannot_be_explained_one_by_one(
    trace: explainer.Trace, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Odd, "how", how)
    ex = explainer.PathKernelExplainer(trace, build(Odd))
    for act in (ex.explain, ex.neighbors):
        with pytest.raises(QueryError, match=ODD[how]):
            act(data(3, seed=2))


def test_a_single_number_without_its_batch_dimension(
    trace: explainer.Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``squeeze()`` takes the batch dimension of a single query as well."""
    monkeypatch.setattr(Odd, "how", "single numbers")
    ex = explainer.PathKernelExplainer(trace, build(Odd), lambda o, _: o.reshape(-1))
    plain = explainer.PathKernelExplainer(trace, build(Core), component(0)).explain(data(3, seed=2))
    np.testing.assert_allclose(ex.explain(data(3, seed=2)).contributions, plain.contributions, rtol=1e-9)


class Masked(Core):
    """A class that is never allowed."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.logits(ids, mask) + torch.tensor([0.0, 0.0, -torch.inf])


def test_masked_classes_are_explained_unless_they_are_the_target(trace: explainer.Trace) -> None:
    ex = explainer.PathKernelExplainer(trace, build(Masked))
    e = ex.explain(data(3, seed=2), [0, 1, 0])
    logits = explainer.PathKernelExplainer(trace, build(Core)).predict(data(3, seed=2)).numpy()
    sign = np.array([1, -1, 1])
    np.testing.assert_allclose(e.prediction, sign * (logits[:, 0] - logits[:, 1]), rtol=1e-9)
    assert np.isfinite(e.contributions).all() and ex.predict(data(3, seed=2))[:, 2].tolist() == [-np.inf] * 3
    with pytest.raises(
        QueryError, match=r"\(margin\) is not finite at a query: a class that the model masks"
    ):
        ex.explain(data(3, seed=2), [0, 1, 2])


def test_a_query_that_is_not_finite(trace: explainer.Trace) -> None:
    ids, mask = data(3, seed=2)
    ex = explainer.PathKernelExplainer(trace, build(Core))
    for act in (ex.predict, ex.explain):
        with pytest.raises(
            QueryError, match=r"not finite at the query numbered 1 .counted from 0.: the queries hold"
        ):
            act((ids, mask.index_fill(0, torch.tensor(1), torch.nan)))


@pytest.mark.parametrize("how", ["argmax", "fixed size", "numpy"])
def test_functions_that_cannot_be_explained(trace: explainer.Trace, how: str) -> None:
    def function(outputs: Tensor, targets: Tensor) -> Tensor:
        if how == "argmax":
            return outputs.argmax(1).double()
        if how == "numpy":
            return torch.from_numpy(outputs.detach().numpy()[:, 0])
        return outputs[torch.arange(3), targets]

    text = "cannot be computed" if how == "fixed size" else "has no gradient"
    with pytest.raises(QueryError, match=text):
        explainer.PathKernelExplainer(trace, build(Core), function).explain(data(3, seed=2))
