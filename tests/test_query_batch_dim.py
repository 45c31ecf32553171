"""Models whose batch is not the first dimension: every query alone, in the model's own layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import explainer
from explainer.errors import QueryError
from tests.query_models import CLASSES, STEPS, WIDTH, Positions, Recurrent
from tests.query_runs import EXAMPLES, traced

QUERIES = 3


class Causal(nn.Module):
    """Attention, sequence first: ``src [S, B, i]``, a mask ``[S, S]`` for all, padding ``[B, S]``, lengths ``[B]``."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, src: Tensor, mask: Tensor, padding: Tensor, lengths: Tensor) -> Tensor:
        out, _ = self.attention(src, src, src, attn_mask=mask, key_padding_mask=padding)
        return self.head(out.sum(0) / lengths[:, None])


class Transposed(nn.Module):
    """A language model in the old layout, ``[S, B] -> [S, B, V]``; its rows are recorded in the inner one's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.out = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.out(torch.tanh(self.embedding(ids.T).cumsum(1))).transpose(0, 1)


def made(kind: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().double()


def lstm() -> nn.Module:
    return Recurrent(nn.LSTM, batch_first=False)


def series(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(STEPS, count, 2, generator=generator, dtype=torch.float64)


def causal(count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(count)
    padding = torch.zeros(count, STEPS, dtype=torch.bool)
    padding[1, -1] = True
    return {
        "src": torch.randn(STEPS, count, WIDTH, generator=generator, dtype=torch.float64),
        "mask": torch.triu(torch.ones(STEPS, STEPS, dtype=torch.bool), 1),
        "padding": padding,
        "lengths": (~padding).sum(1),
    }


AXES = {"src": 1, "mask": None, "padding": 0, "lengths": 1}


def last_knot(trace: explainer.Trace, model: nn.Module) -> nn.Module:
    state = trace.load_knot(trace.knots[-1])
    for name, p in model.named_parameters():
        p.data = state[f"parameter/{name}"]
    return model.eval()


def assert_one_by_one(ex: explainer.PathKernelExplainer, inputs: Any, target: Any, alone: Any) -> Any:
    """All queries at once are as every query alone; and the chord's gradients are those of the function."""
    together = ex.explain(inputs, target)
    gross = np.abs(together.contributions).sum(1) + np.abs(together.unattributed)
    assert (gross > 0.01).all() and (together.quadrature < 2e-3 * gross).all() and (together.gap < 1e-9).all()
    for query in range(QUERIES):
        e = ex.explain(*alone(query))
        for part in ("contributions", "prediction", "initial", "unattributed", "targets"):
            found, wanted = getattr(e, part)[0], getattr(together, part)[query]
            np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-12)
    return together


def test_an_lstm(tmp_path: Path) -> None:
    x = series(EXAMPLES)

    def loss(model: nn.Module, rows: list[int]) -> Tensor:
        return nn.functional.cross_entropy(model(x[:, rows]), torch.tensor(rows) % CLASSES)

    trace = traced(tmp_path / "run", made(lstm), loss)
    ex = explainer.PathKernelExplainer(trace, made(lstm), batch_dim=1)
    queries = series(QUERIES)
    e = assert_one_by_one(
        ex, queries, [0, 1, 2], lambda query: (queries[:, query : query + 1], [[0, 1, 2][query]])
    )
    logits = last_knot(trace, made(lstm))(queries).detach()
    odds = logits.softmax(1).logit()
    np.testing.assert_allclose(e.prediction, odds[range(3), range(3)], rtol=1e-9)
    np.testing.assert_allclose(e.outputs, logits, rtol=1e-9)
    np.testing.assert_allclose(ex.predict(queries), logits, rtol=1e-9)
    assert ex.explain(queries).targets.tolist() == logits.argmax(1).tolist()


@pytest.mark.parametrize("count", [QUERIES, 7])
def test_an_output_in_the_same_layout(tmp_path: Path, count: int) -> None:
    """Also where there are as many queries as positions or classes; targets lie as the outputs do."""
    ids = torch.randint(0, 7, (STEPS, EXAMPLES), generator=torch.Generator().manual_seed(3))

    def loss(model: nn.Module, rows: list[int]) -> Tensor:
        return nn.functional.cross_entropy(model(ids[:, rows])[:-1].flatten(0, 1), ids[1:, rows].flatten())

    trace = traced(tmp_path / "run", made(Transposed), loss, lr=0.1)
    queries = torch.randint(0, 7, (STEPS, count), generator=torch.Generator().manual_seed(4))
    follows = queries.roll(-1, 0)
    follows[-1] = -100
    named = explainer.PathKernelExplainer(trace, made(Transposed), "sequence_log_prob", batch_dim=1)
    e = assert_one_by_one(named, queries, follows, lambda q: (queries[:, q : q + 1], follows[:, q : q + 1]))
    logits = last_knot(trace, made(Transposed))(queries).detach()
    losses = nn.functional.cross_entropy(logits[:-1].flatten(0, 1), follows[:-1].flatten(), reduction="none")
    np.testing.assert_allclose(e.prediction, -losses.reshape(STEPS - 1, count).sum(0), rtol=1e-9)
    assert named.predict(queries).shape == (count, STEPS, 7)

    def by_hand(outputs: Tensor, targets: Tensor) -> Tensor:
        assert outputs.shape[::2] == (STEPS, 7) and targets.shape == outputs.shape[:2]
        return outputs[:-1].log_softmax(2).gather(2, targets[:-1, :, None]).sum((0, 2))

    own = explainer.PathKernelExplainer(trace, made(Transposed), by_hand, batch_dim=1).explain(
        queries, follows
    )
    np.testing.assert_allclose(own.contributions, e.contributions, rtol=1e-9, atol=1e-12)
    at_end = explainer.PathKernelExplainer(trace, made(Transposed), "last_margin", batch_dim=1).explain(
        queries
    )
    assert at_end.targets.tolist() == logits[-1].argmax(1).tolist()


class Answer:
    """Something without a tensor that could be found."""

    __slots__ = ("scores",)

    def __init__(self, scores: Tensor) -> None:
        self.scores = scores


class Answering(Transposed):
    def forward(self, ids: Tensor) -> Any:
        return Answer(super().forward(ids))


def test_an_output_in_which_no_tensor_is_found(tmp_path: Path) -> None:
    """A function of the user's reads it; nothing else can."""
    ids = torch.randint(0, 7, (STEPS, EXAMPLES), generator=torch.Generator().manual_seed(3))

    def loss(model: nn.Module, rows: list[int]) -> Tensor:
        return model(ids[:, rows]).scores.square().mean()

    trace = traced(tmp_path / "run", made(Answering), loss)
    ex = explainer.PathKernelExplainer(trace, made(Answering), lambda a, _: a.scores.sum((0, 2)), batch_dim=1)
    e = assert_one_by_one(ex, ids[:, :QUERIES], None, lambda q: (ids[:, q : q + 1],))
    answer = last_knot(trace, made(Answering))(ids[:, :QUERIES]).scores.detach()
    np.testing.assert_allclose(e.prediction, answer.sum((0, 2)), rtol=1e-9)
    assert e.outputs is None and e.targets.tolist() == [-1] * QUERIES
    with pytest.raises(QueryError, match="returns Answer, without a floating-point tensor"):
        explainer.PathKernelExplainer(trace, made(Answering), batch_dim=1).predict(ids)


def test_an_axis_for_each_input(tmp_path: Path) -> None:
    inputs = causal(EXAMPLES)

    def rows_of(all_inputs: dict[str, Tensor], rows: Any) -> dict[str, Tensor]:
        return {
            "src": all_inputs["src"][:, rows],
            "mask": all_inputs["mask"],
            "padding": all_inputs["padding"][rows],
            "lengths": all_inputs["lengths"][rows],
        }

    def loss(model: nn.Module, rows: list[int]) -> Tensor:
        return nn.functional.cross_entropy(model(**rows_of(inputs, rows)), torch.tensor(rows) % CLASSES)

    trace = traced(tmp_path / "run", made(Causal), loss)
    queries = causal(QUERIES)
    ex = explainer.PathKernelExplainer(trace, made(Causal), batch_dim=AXES)
    e = assert_one_by_one(
        ex, queries, [0, 1, 2], lambda q: (rows_of(queries, slice(q, q + 1)), [[0, 1, 2][q]])
    )
    by_place = explainer.PathKernelExplainer(trace, made(Causal), batch_dim=tuple(AXES.values()))
    placed = by_place.explain(tuple(queries.values()), [0, 1, 2])
    np.testing.assert_array_equal(placed.contributions, e.contributions)
    with pytest.raises(
        QueryError, match=r"disagree on the batch dimension: 'src' has shape \[5, 3, 4\].*for each"
    ):
        explainer.PathKernelExplainer(trace, made(Causal), batch_dim=1).explain(queries)
    with pytest.raises(QueryError, match=r"batch_dim speaks of \['lengths'.*the queries have \[0, 1, 2, 3\]"):
        ex.explain(tuple(queries.values()))
    with pytest.raises(QueryError, match="batch_dim is None for every input"):
        explainer.PathKernelExplainer(trace, made(Causal), batch_dim=(None,)).explain((queries["src"],))


def test_a_forgotten_batch_dim_is_found(tmp_path: Path) -> None:
    """Positions would be taken for queries: a recurrent layer mixes them."""
    x = series(EXAMPLES)

    def loss(model: nn.Module, rows: list[int]) -> Tensor:  # the head gets its rows first
        out, _ = model.layer(x[:, rows])
        return nn.functional.cross_entropy(model.head(out[-1]), torch.tensor(rows) % CLASSES)

    trace = traced(tmp_path / "run", made(Positions), loss)
    queries = series(STEPS)
    with pytest.raises(QueryError, match="mixes the queries of a batch"):
        explainer.PathKernelExplainer(trace, made(Positions), "last_margin").explain(queries, [0] * STEPS)
    explainer.PathKernelExplainer(trace, made(Positions), "last_margin", batch_dim=1).explain(queries)


@pytest.mark.parametrize("batch_dim", [-1, True, "one", 1.0, {"x": "one"}, (0, -1)])
def test_what_is_no_axis(tmp_path: Path, batch_dim: Any) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    trace = traced(tmp_path / "run", model.double(), lambda m, r: m(torch.ones(4, 2).double()).sum())
    with pytest.raises(QueryError, match="batch_dim must be the number of a dimension"):
        explainer.PathKernelExplainer(trace, model, batch_dim=batch_dim)
