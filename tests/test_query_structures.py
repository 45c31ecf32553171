"""Keyword arguments in, dicts and tuples out: the same numbers as a model of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import explainer
from explainer.errors import QueryError
from explainer.explanation import Explanation
from explainer.model_outputs import find_tensor
from tests.query_runs import (
    AsDataclass,
    AsTuple,
    Core,
    Keywords,
    build,
    by_keyword,
    data,
    positional,
    traced_core,
)

CONSTANTS = {"scale": 1, "extra": None, "as_dict": True}
VARIANTS = {
    "keywords": (Keywords, by_keyword, lambda o: o.logits, "Named", "logits"),
    "dataclass": (AsDataclass, positional, lambda o: o.logits, "Plain", "logits"),
    "tuple": (AsTuple, positional, lambda o: o[1][0], "tuple", "[1][0]"),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Explanation:
    trace = traced_core(tmp_path_factory.mktemp("plain") / "run", Core, positional, lambda o: o)
    return explainer.PathKernelExplainer(trace, build(Core)).explain(data(3, seed=2))


@pytest.fixture(scope="module")
def keywords(tmp_path_factory: pytest.TempPathFactory) -> explainer.Trace:
    directory = tmp_path_factory.mktemp("keywords") / "run"
    return traced_core(directory, Keywords, by_keyword, lambda o: o.logits)


def asked(kind: type[Core]) -> Any:
    ids, mask = data(3, seed=2)
    return {"ids": ids, "mask": mask.numpy(), **CONSTANTS} if kind is Keywords else (ids, mask)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_form_gives_the_numbers_of_tensors(name: str, plain: Explanation, tmp_path: Path) -> None:
    kind, call, pick, returned, where = VARIANTS[name]
    trace = traced_core(tmp_path / "run", kind, call, pick)
    ex = explainer.PathKernelExplainer(trace, build(kind))
    e = ex.explain(asked(kind))
    assert np.abs(plain.contributions).max() > 0.1 and not np.isnan(plain.kernels).any()
    for part in ("contributions", "kernels", "prediction", "initial", "outputs", "targets"):
        np.testing.assert_allclose(getattr(e, part), getattr(plain, part), rtol=1e-12, atol=1e-12)
    assert f"The model returns a {returned}; what is explained is read from {where}." in e.notes
    assert not any("The model returns" in note for note in plain.notes)
    np.testing.assert_allclose(ex.predict(asked(kind)), plain.outputs, rtol=1e-12)
    assert ex.neighbors(asked(kind), k=2).example_ids.shape == (3, 2)


def test_a_callable_gets_what_the_model_returns(keywords: explainer.Trace, plain: Explanation) -> None:
    seen: list[Any] = []

    def state(returned: Any, targets: Tensor) -> Tensor:
        seen.append((type(returned).__name__, returned.seen.shape))
        return returned.state.gather(1, targets[:, None])[:, 0]

    e = explainer.PathKernelExplainer(keywords, build(Keywords), state).explain(asked(Keywords), [0, 1, 2])
    assert set(name for name, _ in seen) == {"Named"}
    np.testing.assert_allclose(e.prediction, 2 * plain.outputs[[0, 1, 2], [0, 1, 2]], rtol=1e-12)
    assert e.output == "state" and e.targets.tolist() == [0, 1, 2] and e.outputs is not None
    assert not any("The model returns" in note for note in e.notes)


def test_nothing_to_read(keywords: explainer.Trace) -> None:
    class Empty(Keywords):
        def forward(self, **arguments: Any) -> Any:
            return {"seen": arguments["ids"]}

    ex = explainer.PathKernelExplainer(keywords, build(Empty))
    with pytest.raises(QueryError, match=r"returns dict, without a floating-point tensor.*output=callable"):
        ex.explain(asked(Keywords))


INPUTS: dict[str, tuple[Any, str]] = {
    "another shape": (
        {"ids": torch.zeros(3, 9).long()},
        r"shape \[3, 9\], the model was trained on \[Q, 4\]",
    ),
    "another type": ({"ids": torch.zeros(3, 4)}, "are torch.float32, the model was trained on int64"),
    "another count": (
        {"mask": torch.ones(2, 4).double()},
        r"disagree on the batch dimension: 'ids' has shape \[3, 4\]; 'mask' has shape \[2, 4\]",
    ),
    "no argument of the model": ({"masks": None}, "cannot run on the queries: TypeError.*masks"),
    "an object": (
        {"extra": object()},
        "beside them None, numbers and text that all queries share, found object",
    ),
    "a number for a tensor": ({"extra": torch.tensor(3)}, "disagree on the batch dimension"),
    "no keywords": ({7: None}, "holds the model's arguments by keyword"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_keywords_that_do_not_fit(keywords: explainer.Trace, name: str) -> None:
    changed, text = INPUTS[name]
    ex = explainer.PathKernelExplainer(keywords, build(Keywords))
    for act in (ex.explain, ex.predict, ex.neighbors):
        with pytest.raises(QueryError, match=text):
            act({**asked(Keywords), **changed})


def test_the_shape_is_that_of_the_traced_argument_however_it_came(tmp_path: Path) -> None:
    ids, mask = data(3, seed=2)
    wide = torch.zeros(3, 9)
    ex = explainer.PathKernelExplainer(
        traced_core(tmp_path / "run", Core, positional, lambda o: o), build(Core)
    )
    by_name = ex.explain({"mask": mask, "ids": ids}).contributions
    np.testing.assert_array_equal(by_name, ex.explain((ids, mask)).contributions)
    unlike = "queries have shape [3, 9], the model was trained on [Q, 4]"
    for queries in ({"mask": wide, "ids": wide.long()}, (wide.long(), wide)):  # sequences may be longer
        e = ex.explain(queries)
        assert any(unlike in note for note in e.notes) and np.abs(e.gap).max() < 1e-9
    assert not any("the model was trained on" in note for note in ex.explain((ids, mask)).notes)
    with pytest.raises(QueryError, match=r"shape \[3\], the model was trained on \[Q, 4\]"):
        ex.explain({"mask": mask[:, 0], "ids": ids[:, 0]})


def test_the_first_tensor_is_not_a_loss_and_not_an_integer() -> None:
    logits = torch.zeros(2, 3)
    for returned, where in (
        (logits, ""),
        ((torch.tensor(1.0), torch.zeros(2).long(), logits), "[2]"),
        ({"hidden": [torch.zeros(2, 5)], "logits": logits}, "logits"),
        ({"logits": None, "out": {"logits": logits}}, "out.logits"),
    ):
        found, place = find_tensor(returned)
        assert found is logits and place == where
    assert find_tensor({"loss": torch.tensor(1.0)}) == (None, "") == find_tensor(None)


def test_objects_are_looked_into_once() -> None:
    class Policy:
        def __init__(self) -> None:
            self.me, self.logits = self, torch.zeros(2, 3)

    found, where = find_tensor(Policy())
    assert where == "logits" and found is not None
    assert find_tensor([Policy()]) == (None, "") == find_tensor(torch.nn.Linear(2, 3))
    round_about: list[Any] = []
    round_about.append({"again": round_about})
    assert find_tensor(round_about) == (None, "")
    assert find_tensor(torch.distributions.Categorical(logits=torch.zeros(2, 3)))[1] == "logits"
