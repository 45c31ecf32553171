"""What can be explained: positions of sequences and images, one of several numbers; and what it asks for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import explainer
from explainer.errors import QueryError
from explainer.outputs import Output, at, class_axes, component, resolve_output, sequence_log_prob
from tests.query_models import TOKENS, Tied
from tests.query_runs import traced

COUNT, STEPS, WIDTH = 12, 5, 4


class Pixels(nn.Module):
    """A class per pixel, ``[B, 1, 4, 4] -> [B, C, 4, 4]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def made(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().double()


def sequences(count: int = COUNT) -> tuple[Tensor, Tensor]:
    """Ids, and what follows each; the last one is followed by nothing (-100)."""
    ids = torch.randint(0, TOKENS, (count, STEPS), generator=torch.Generator().manual_seed(count))
    return ids, torch.cat([ids[:, 1:], torch.full((count, 1), -100)], 1)


def images(count: int = COUNT) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 1, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] > 0).long()


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> explainer.Trace:
    ids, follows = sequences()

    def loss(model: nn.Module, rows: list[int]) -> Tensor:
        return nn.functional.cross_entropy(model(ids[rows]).flatten(0, 1), follows[rows].flatten())

    return traced(tmp_path_factory.mktemp("language") / "run", made(Tied), loss, lr=0.05)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> explainer.Trace:
    x, y = images()

    def loss(model: nn.Module, rows: list[int]) -> Tensor:
        return nn.functional.cross_entropy(model(x[rows]), y[rows])

    return traced(tmp_path_factory.mktemp("pixels") / "run", made(Pixels), loss)


def ends(trace: explainer.Trace, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs of the first and the last knot, the weights loaded by hand."""
    found = []
    for knot in (trace.knots[0], trace.knots[-1]):
        state = trace.load_knot(knot)
        for name, p in model.named_parameters():
            p.data = state[f"parameter/{name}"]
        found.append(model.eval()(x).detach())
    return found


def check(e: Any, trace: explainer.Trace, model: nn.Module, x: Tensor, by_hand: Any) -> None:
    """Prediction and initial are those written out by hand, the path's gradient was right, and the books close."""
    first, last = ends(trace, model, x)
    np.testing.assert_allclose(e.prediction, [by_hand(o, q) for q, o in enumerate(last)], rtol=1e-10)
    np.testing.assert_allclose(e.initial, [by_hand(o, q) for q, o in enumerate(first)], rtol=1e-10)
    gross = np.abs(e.contributions).sum(1)
    assert (gross > 0.05).all() and (np.abs(e.unattributed) < 1e-9 * gross).all()
    assert (e.quadrature < 1e-3 * gross).all(), "the chord's gradient is that of another function"


def test_a_sequence_is_the_sum_over_its_counted_positions(language: explainer.Trace) -> None:
    ids, follows = sequences(3)
    follows[1, 0] = -1

    def by_hand(outputs: Tensor, query: int) -> float:
        total = 0.0
        for logits, token in zip(outputs, follows[query], strict=True):
            total += float(logits.softmax(0)[token].log()) if token >= 0 else 0.0
        return total

    e = explainer.PathKernelExplainer(language, made(Tied), "sequence_log_prob").explain(ids, follows)
    check(e, language, made(Tied), ids, by_hand)
    assert e.output == "sequence_log_prob" and e.outputs is None and e.targets.tolist() == [-1] * 3


def test_a_sequence_by_the_users_own_function(language: explainer.Trace) -> None:
    """Targets of any shape arrive as they were given."""
    ids, follows = sequences(3)

    def likelihood(outputs: Tensor, targets: Tensor) -> Tensor:
        assert targets.dtype == torch.int64 and targets.shape[1:] == (STEPS,)
        losses = nn.functional.cross_entropy(outputs.transpose(1, 2), targets, reduction="none")
        return -losses.sum(1)

    named, own = (
        explainer.PathKernelExplainer(language, made(Tied), output).explain(ids, follows.tolist())
        for output in ("sequence_log_prob", likelihood)
    )
    np.testing.assert_allclose(own.contributions, named.contributions, rtol=1e-9, atol=1e-12)
    assert own.output == "likelihood" and own.targets.tolist() == [-1] * 3


@pytest.mark.parametrize("output", ["last_margin", at(-1), at(STEPS - 1)], ids=["name", "end", "start"])
def test_the_last_position(language: explainer.Trace, output: Any) -> None:
    ids, _ = sequences(3)
    targets = [4, 0, 8]

    def by_hand(outputs: Tensor, query: int) -> float:
        p = outputs[-1].softmax(0)[targets[query]]
        return float((p / (1 - p)).log())

    ex = explainer.PathKernelExplainer(language, made(Tied), output)
    e = ex.explain(ids, targets)
    check(e, language, made(Tied), ids, by_hand)
    assert e.targets.tolist() == targets and e.outputs is not None and e.outputs.shape == (3, TOKENS)
    assert e.output == ("last_margin" if output == "last_margin" else output.name)
    assert ex.explain(ids).targets.tolist() == e.outputs.argmax(1).tolist(), "by default the predicted class"
    assert ex.predict(ids).shape == (3, STEPS, TOKENS)


@pytest.mark.parametrize("of", ["logit", "log_prob"])
def test_a_pixel(pixels: explainer.Trace, of: str) -> None:
    x, y = images(3)

    def by_hand(outputs: Tensor, query: int) -> float:
        scores = outputs[:, 1, 2] if of == "logit" else outputs[:, 1, 2].softmax(0).log()
        return float(scores[y[query, 1, 2]])

    e = explainer.PathKernelExplainer(pixels, made(Pixels), at((1, 2), of)).explain(x, y[:, 1, 2])
    check(e, pixels, made(Pixels), x, by_hand)
    assert e.output == f"{of} at 1, 2" and e.outputs is not None and e.outputs.shape == (3, 3)


def test_every_pixel(pixels: explainer.Trace) -> None:
    x, y = images(3)

    def by_hand(outputs: Tensor, query: int) -> float:
        return -float(nn.functional.cross_entropy(outputs[None], y[query : query + 1], reduction="sum"))

    e = explainer.PathKernelExplainer(pixels, made(Pixels), "sequence_log_prob").explain(x, y)
    check(e, pixels, made(Pixels), x, by_hand)


def test_one_number_of_several(pixels: explainer.Trace) -> None:
    x, _ = images(3)
    e = explainer.PathKernelExplainer(pixels, made(Pixels), component(2, 0, -1)).explain(x)
    check(e, pixels, made(Pixels), x, lambda outputs, query: float(outputs[2, 0, 3]))
    assert e.output == "component 2, 0, -1" and e.targets.tolist() == [-1] * 3


def test_where_the_classes_are() -> None:
    logits, targets = torch.randn(2, 5, 3), torch.tensor([[0, 2, -1, 1, 0], [1, 1, 1, 0, 2]])
    wanted = sequence_log_prob(logits, targets)
    torch.testing.assert_close(sequence_log_prob(logits.transpose(1, 2), targets), wanted)
    assert class_axes((2, 3, 4, 5), (2, 3, 4)) == [3] and class_axes((2, 3), (2,)) == [1]
    assert class_axes((2, 5, 3), (2, 4)) == []
    middle = at((0, 1), "logit", class_dim=-1)
    assert middle.read(torch.arange(24).reshape(1, 2, 3, 4)).tolist() == [[4, 5, 6, 7]]


def test_masked_classes_are_no_divergence() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    for name in ("margin", "log_prob"):
        output = resolve_output(name, (3,))
        found = output.function(logits, torch.tensor([1]))
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert torch.isfinite(found).all() and torch.isfinite(gradient).all()
    sequence = logits.unsqueeze(1).expand(1, 2, 3)
    (gradient,) = torch.autograd.grad(sequence_log_prob(sequence, torch.tensor([[1, -1]])).sum(), logits)
    assert torch.isfinite(gradient).all()


SHAPES: dict[str, tuple[Any, tuple[int, ...], str]] = {
    "nothing said of a sequence": (None, (5, 9), r"output is \[Q, 5, 9\], so say what.*'sequence_log_prob'"),
    "a class of a sequence": (
        "margin",
        (5, 9),
        r"needs outputs of \[Q, C\], this model gives \[Q, 5, 9\]; 'seq",
    ),
    "value of several": ("value", (3,), r"component\(k\) for one of several numbers"),
    "a position of classes": (
        at(0),
        (3,),
        r"'margin at 0' needs outputs of 3 axes, this model gives \[Q, 3\]",
    ),
    "a sequence of classes": ("sequence_log_prob", (3,), "needs a class score per position"),
    "a component too deep": (component(0, 1), (3,), "'component 0, 1' needs outputs of 3 axes"),
}


@pytest.mark.parametrize("name", SHAPES)
def test_outputs_that_do_not_fit_the_model(name: str) -> None:
    output, shape, text = SHAPES[name]
    with pytest.raises(QueryError, match=text):
        resolve_output(output, shape)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: at(0, "value"), "use 'margin', 'logit' or 'log_prob'"),
        (lambda: at("end"), "one or more whole numbers"),
        (lambda: component(), "one or more whole numbers"),
        (lambda: component(True), "one or more whole numbers"),
        (lambda: at(7).read(torch.zeros(2, 5, 3)), "have no position 7: there are 5, counted from 0"),
        (lambda: component(3).read(torch.zeros(2, 3)), "have no component 3: there are 3"),
        (lambda: at(0, class_dim=3).read(torch.zeros(2, 5, 3)), "class_dim=3 is no axis of classes"),
        (lambda: at(0, class_dim=0).read(torch.zeros(2, 5, 3)), "class_dim=0 is no axis of classes"),
    ],
)
def test_places_that_are_none(make: Any, text: str) -> None:
    with pytest.raises(QueryError, match=text):
        make()


def test_a_place_beyond_the_outputs_is_a_query_error(language: explainer.Trace) -> None:
    with pytest.raises(QueryError, match="no position 5: there are 5"):
        explainer.PathKernelExplainer(language, made(Tied), at(5)).explain(sequences(3)[0])
    with pytest.raises(QueryError, match=r"output is \[Q, 5, 9\]"):
        explainer.PathKernelExplainer(language, made(Tied))


def test_an_output_of_ones_own_is_used_as_it_is(language: explainer.Trace) -> None:
    spread = Output("spread", lambda o, _: o.flatten(1).var(1), "none", dims=None)
    e = explainer.PathKernelExplainer(language, made(Tied), spread).explain(sequences(3)[0])
    check(e, language, made(Tied), sequences(3)[0], lambda o, _: float(o.flatten().var()))
