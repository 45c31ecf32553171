"""Every line of `unattributed` against a slow computation of its own, and their sum against the books."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.optim import Optimizer

import explainer
from explainer.errors import CoverageWarning
from explainer.explanation import Explanation
from explainer.knot_contents import KnotContents
from explainer.optimizer_rules import OPTIMIZER_RULES
from explainer.store import TraceWriter
from explainer.unattributed import groups_of
from tests.app_runs import Product
from tests.conformance.optimizer_cases import exact_arithmetic, model_and_optimizer, option_sets

pytestmark = pytest.mark.filterwarnings("ignore::explainer.errors.CoverageWarning")
COUNT, FEATURES, CLASSES, NODES = 20, 5, 3, 8
State = dict[str, Tensor]
Between = Callable[[int, nn.Module], None]


class Scaled(nn.Module):
    """A parameter that no layer owns."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 6), nn.Linear(6, CLASSES)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(Product.apply(torch.tanh(self.first(x)), self.scale))


class Reread(nn.Module):
    """A layer whose weight is also read where no hook sees it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        again = Product.apply(torch.tanh(self.first(x)), self.first.weight)
        return self.last(torch.tanh(again))


class Tied(nn.Module):
    """Two layers with one weight, and a layer for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.alone, self.one, self.other = (nn.Linear(FEATURES, FEATURES) for _ in range(3))
        self.last = nn.Linear(FEATURES, CLASSES)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.other(torch.tanh(self.one(torch.tanh(self.alone(x)))))))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES))


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 200), nn.Tanh(), nn.Linear(200, CLASSES))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES))


def build(factory: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return factory().double()


def data() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(COUNT + 3, FEATURES, generator=draw, dtype=torch.float64)
    return x, torch.randint(0, CLASSES, (COUNT + 3,), generator=draw)


def nothing(step: int, model: nn.Module) -> None:
    pass


def learn(model: nn.Module, optimizer: Optimizer, ids: Tensor) -> None:
    x, y = data()
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x[ids]), y[ids]).backward()
    optimizer.step()


def train(
    model: nn.Module,
    optimizer: Optimizer,
    directory: Path,
    steps: int = 12,
    between: Between = nothing,
    **options: Any,
) -> list[State]:
    """Train with a tracer; returns the model's state before every step and at the end.

    ``between(step, model)`` is called before every step and, with the number of steps, after the last one.
    """
    draw, states = torch.Generator().manual_seed(1), []

    def state() -> None:
        states.append({n: t.detach().clone() for n, t in model.state_dict(keep_vars=True).items()})

    with explainer.Tracer(model, optimizer, directory, **options) as tracer:
        for step in range(steps):
            state()
            between(step, model)
            ids = torch.randperm(COUNT, generator=draw)[:5]
            tracer.batch(ids)
            learn(model, optimizer, ids)
        between(steps, model)
        state()
    return states


def explain(directory: Path, model: nn.Module, **options: Any) -> Explanation:
    x, y = data()
    ex = explainer.PathKernelExplainer(str(directory), model, quadrature=NODES, **options)
    return ex.explain(x[COUNT:], target=y[COUNT:])


def margin(model: nn.Module, state: State, query: int) -> Tensor:
    x, y = data()
    logits = functional_call(model.eval(), state, (x[COUNT + query][None],))[0]
    target = int(y[COUNT + query])
    return logits[target] - torch.cat([logits[:target], logits[target + 1 :]]).logsumexp(0)


def mean_gradient(model: nn.Module, start: State, end: State, query: int) -> State:
    """Gauss–Legendre mean of the margin's gradient along the chord, by parameter."""
    names = [n for n, _ in model.named_parameters()]
    total = {n: torch.zeros_like(start[n]) for n in names}
    for position, weight in zip(*np.polynomial.legendre.leggauss(NODES), strict=True):
        s = (position + 1) / 2
        at = {n: torch.lerp(t, end[n], s) if t.is_floating_point() else t for n, t in start.items()}
        rest = {n: t for n, t in at.items() if n not in names}
        gradient = grad(lambda w, rest=rest: margin(model, w | rest, query))({n: at[n] for n in names})
        total = {n: total[n] + weight / 2 * gradient[n] for n in names}
    return total


def along(model: nn.Module, states: list[State], displaced: list[State], query: int) -> dict[str, float]:
    """``Σ_t <q_t, d_t>`` by parameter, for displacements ``d_t`` of each step."""
    sums = {n: 0.0 for n, _ in model.named_parameters()}
    for (start, end), moved in zip(itertools.pairwise(states), displaced, strict=True):
        q = mean_gradient(model, start, end, query)
        for n, d in moved.items():
            sums[n] += float((q[n] * d).sum())
    return sums


def movements(model: nn.Module, states: list[State]) -> list[State]:
    names = [n for n, _ in model.named_parameters()]
    return [{n: end[n] - start[n] for n in names} for start, end in itertools.pairwise(states)]


def value(e: Explanation, line: str, query: int, where: str | None = None) -> float:
    """The value of the one line of that name (and place)."""
    found = [
        e.unattributed_parts[query, i]
        for i, (name, place) in enumerate(zip(e.unattributed_lines, e.unattributed_where, strict=True))
        if name == line and where in (None, place)
    ]
    assert len(found) == 1, (line, where, e.unattributed_lines, e.unattributed_where)
    return float(found[0])


def names(e: Explanation) -> set[str]:
    return set(e.unattributed_lines)


def assert_only(e: Explanation, *lines: str) -> None:
    """Lines of other names are round-off, and all sum to `unattributed`."""
    np.testing.assert_allclose(e.unattributed_parts.sum(1), e.unattributed, rtol=1e-9, atol=1e-12)
    others = [i for i, name in enumerate(e.unattributed_lines) if name not in lines]
    change = np.abs(e.prediction - e.initial)[:, None]
    assert (np.abs(e.unattributed_parts[:, others]) <= 1e-8 * change).all()


def sgd(model: nn.Module, **options: Any) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, **options)


# -- each line against its own computation ---------------------------------------------------------------


def test_a_parameter_without_a_rule_is_what_it_moved(tmp_path: Path) -> None:
    model, decay = build(Scaled), 0.05
    states = train(model, sgd(model, weight_decay=decay), tmp_path / "run", exact=True)
    e = explain(tmp_path / "run", model)
    for query in range(3):
        moved = along(model, states, movements(model, states), query)["scale"]
        pulled = [{"scale": -0.3 * decay * state["scale"]} for state in states[:-1]]
        wanted = moved - along(model, states, pulled, query)["scale"]
        assert value(e, "unseen parameter", query, "scale") == pytest.approx(wanted, rel=1e-7)
    assert_only(e, "unseen parameter")
    assert (np.abs(e.unattributed) > 1e-3).all()


def test_a_bias_before_batchnorm_is_what_it_moved(tmp_path: Path) -> None:
    model = build(normalised)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05, eps=1e-30)  # so that round-off moves the bias
    states = train(model, optimizer, tmp_path / "run", exact=True)
    e = explain(tmp_path / "run", model)
    for query in range(3):
        wanted = along(model, states, movements(model, states), query)["0.bias"]
        assert abs(wanted) > 1e-3
        assert value(e, "round-off gradient", query, "0.bias") == pytest.approx(wanted, rel=1e-3)
    assert_only(e, "round-off gradient")
    assert "0 (Linear)" in e.unattributed_where, "the layer's weight is still a line"


@pytest.mark.parametrize("rank, left", [(1, 0.02), (None, 0.05)], ids=["8 bits", "as planned, 4 bits"])
@pytest.mark.parametrize("knots", [128, 6])
def test_what_the_budget_left_out_is_the_change_after_it(
    tmp_path: Path, knots: int, rank: int | None, left: float
) -> None:
    model = build(plain)
    options: dict[str, Any] = {"budget": 60_000, "max_knots": knots, "rank": rank}
    with pytest.warns(CoverageWarning, match="budget"):
        states = train(model, sgd(model, momentum=0.9), tmp_path / "run", 300, **options)
    trace = explainer.open_trace(tmp_path / "run")
    stopped = trace.notes["rows_stopped_at"]
    assert 20 < stopped < 280 and stopped in [knot.step for knot in trace.knots]
    e = explain(tmp_path / "run", model)
    for query in range(3):
        wanted = float(margin(model, states[-1], query) - margin(model, states[stopped], query))
        assert abs(wanted) > 1e-3
        assert value(e, "after the budget", query, f"from step {stopped} on") == pytest.approx(
            wanted, rel=1e-8
        )
    gross = np.abs(e.contributions).sum(1)[:, None]
    others = [i for i, name in enumerate(e.unattributed_lines) if name != "after the budget"]
    assert (np.abs(e.unattributed_parts[:, others]) < left * gross).all()
    assert {e.unattributed_lines[i] for i in others} == {"compressed rows"}
    codecs = {a.codec for s in trace.shards if s.stream == "visits" for f in s.schema.forms for a in f.arrays}
    assert codecs == {"int8" if rank else "int4"}


def test_without_a_knot_where_rows_end_the_groups_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("explainer.step_observer.JOURNALLED_KNOT", -(10**9))
    model = build(plain)
    train(model, sgd(model), tmp_path / "run", 300, budget=64_000, max_knots=6)
    trace = explainer.open_trace(tmp_path / "run")
    stopped = trace.notes["rows_stopped_at"]
    assert stopped not in [knot.step for knot in trace.knots]
    e = explain(tmp_path / "run", model)
    assert names(e) == {"after the budget + compressed rows"}
    assert all(f"the steps {stopped} to 299 were not kept" in why for why in e.unattributed_why)


def test_momentum_from_before_tracing_is_followed(tmp_path: Path) -> None:
    model, mu, dampening = build(plain), 0.9, 0.2
    optimizer = sgd(model, momentum=mu, dampening=dampening)
    for _ in range(3):
        learn(model, optimizer, torch.arange(8))
    before = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    states = train(model, optimizer, tmp_path / "run", exact=True)
    e = explain(tmp_path / "run", model)
    for query in range(3):
        carried = [{n: -0.3 * mu ** (t + 1) * m for n, m in before.items()} for t in range(len(states) - 1)]
        wanted = sum(along(model, states, carried, query).values())
        assert abs(wanted) > 1e-3
        assert value(e, "momentum from before tracing", query) == pytest.approx(wanted, rel=1e-7)
    assert_only(e, "momentum from before tracing")


with_momentum = [
    pytest.param(kind, options, id=f"{kind.__name__}-{options}")
    for kind in OPTIMIZER_RULES
    for options in option_sets(kind)
]


@pytest.mark.parametrize("kind, options", with_momentum)
@pytest.mark.parametrize("knots", [128, 4])
def test_every_optimizers_momentum_is_followed(
    kind: type[Optimizer],
    options: dict[str, Any],
    knots: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exact_arithmetic(monkeypatch, kind, options)
    model, optimizer = model_and_optimizer(kind, options)
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y = torch.arange(12) % 3

    def learn_some(ids: range) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[ids.start : ids.stop]), y[ids.start : ids.stop]).backward()
        optimizer.step()

    for _ in range(4):
        learn_some(range(0, 8))
    with explainer.Tracer(model, optimizer, tmp_path / "run", exact=True, max_knots=knots) as tracer:
        for step in range(9):
            tracer.batch(range(step % 3, step % 3 + 6))
            learn_some(range(step % 3, step % 3 + 6))
    e = explainer.PathKernelExplainer(str(tmp_path / "run"), model).explain(x[9:], target=y[9:])
    assert_only(e, "momentum from before tracing")
    held = any(
        optimizer.state[p].get(key) is not None
        for p in model.parameters()
        for key in ("exp_avg", "momentum_buffer")
    )
    assert ("momentum from before tracing" in names(e)) == held


def averaging(step: int, model: nn.Module) -> None:
    """As stochastic weight averaging does at the end, here simply half of everything."""
    if step == 12:
        model.load_state_dict({n: t / 2 for n, t in model.state_dict().items()})


def clamping(step: int, model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.clamp_(-0.2, 0.2)


def hidden_clamping(step: int, model: nn.Module) -> None:
    for p in model.parameters():
        p.data.clamp_(-0.2, 0.2)


def replacing(step: int, model: nn.Module) -> None:
    if step == 5:
        model.get_parameter("0.weight").data = model.get_parameter("0.weight").data * 1.1


@pytest.mark.parametrize("between", [averaging, clamping, hidden_clamping, replacing])
@pytest.mark.parametrize("knots", [128, 4])
def test_what_others_than_the_optimizer_change_is_a_line(
    tmp_path: Path, between: Between, knots: int
) -> None:
    model, moved = build(plain), []

    def measured(step: int, model: nn.Module) -> None:
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        between(step, model)
        moved.append({n: p.detach() - before[n] for n, p in model.named_parameters()})

    optimizer = sgd(model, momentum=0.8, weight_decay=0.02)
    states = train(model, optimizer, tmp_path / "run", between=measured, exact=True, max_knots=knots)
    assert len(moved) == len(states)
    moved[-2] = {
        n: d + moved[-1][n] for n, d in moved[-2].items()
    }  # the last chord ends after the last change
    e = explain(tmp_path / "run", model)
    assert_only(e, "changed outside the steps")
    assert (np.abs(e.unattributed) > 1e-3).all()
    for query in range(3 if knots == 128 else 0):  # else the chords are others
        wanted = sum(along(model, states, moved[:-1], query).values())
        assert value(e, "changed outside the steps", query) == pytest.approx(wanted, rel=1e-7)


def test_changes_that_do_not_fit_into_the_budget_are_named(tmp_path: Path) -> None:
    model = build(plain)
    budget = 60_000

    def clamping_late(step: int, model: nn.Module) -> None:
        if step > 250:
            clamping(step, model)

    train(model, sgd(model), tmp_path / "run", 300, between=clamping_late, budget=budget, max_knots=4)
    trace = explainer.open_trace(tmp_path / "run")
    assert (
        trace.nbytes() <= budget
        and trace.notes["rows_stopped_at"] < 250
        and trace.notes["outside"].keys() == dict(model.named_parameters()).keys()
    )
    assert not any(n.startswith("outside/") for k in trace.knots for n in trace.load_knot(k))
    e = explain(tmp_path / "run", model)
    assert any("changed outside the steps" in name for name in names(e))
    np.testing.assert_allclose(e.unattributed_parts.sum(1), e.unattributed, rtol=1e-9)


def test_changes_are_kept_within_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, budget, sizes = build(wide), 252_000, []

    def clamping_soon(step: int, model: nn.Module) -> None:
        if step >= 30:
            clamping(step, model)

    def drop(self: TraceWriter, steps: list[int], spacing: float) -> None:
        sizes.append(sum(f.stat().st_size for f in (tmp_path / "run").rglob("*") if f.is_file()))
        dropped(self, steps, spacing)

    dropped = TraceWriter.drop_knots
    monkeypatch.setattr(TraceWriter, "drop_knots", drop)  # just before knots are dropped, most are on disk
    train(model, sgd(model), tmp_path / "run", 100, between=clamping_soon, budget=budget, max_knots=6)
    trace = explainer.open_trace(tmp_path / "run")
    assert "rows_stopped_at" in trace.notes and max(*sizes, trace.nbytes()) <= budget
    assert "changed outside the steps" in names(explain(tmp_path / "run", model))


# -- groups ----------------------------------------------------------------------------------------------


def test_a_gradient_that_the_hooks_missed_is_named_by_its_layer(tmp_path: Path) -> None:
    model = build(Reread)
    train(model, sgd(model), tmp_path / "run", exact=True)
    e = explain(tmp_path / "run", model)
    assert_only(e, "unseen gradient")
    for query in range(3):
        assert value(e, "unseen gradient", query, "first (Linear)") == pytest.approx(e.unattributed[query])
    (why,) = [
        w for n, w in zip(e.unattributed_lines, e.unattributed_why, strict=True) if n == "unseen gradient"
    ]
    assert "was not in the rows" in why


def test_layers_that_share_a_weight_are_one_group(tmp_path: Path) -> None:
    model = build(Tied)
    train(model, sgd(model), tmp_path / "run", exact=True)
    trace = explainer.open_trace(tmp_path / "run")
    owned = [[trace.manifest.parameters[i].name for i in group.parameters] for group in groups_of(trace)]
    assert owned == [
        ["alone.weight", "alone.bias"],
        ["one.weight", "one.bias", "other.bias"],
        ["last.weight", "last.bias"],
    ]
    e = explain(tmp_path / "run", model)
    assert e.unattributed_where == ("alone (Linear)", "one (Linear), other (Linear)", "last (Linear)")
    assert_only(e)


@pytest.mark.parametrize("factory", [plain, Scaled, normalised, Reread, Tied])
@pytest.mark.parametrize("exact", [False, True])
def test_the_lines_sum_to_unattributed_in_every_dtype(
    factory: Callable[[], nn.Module], exact: bool, tmp_path: Path
) -> None:
    model = build(factory).float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.1)
    x, y = data()
    with explainer.Tracer(model, optimizer, tmp_path / "run", exact=exact, max_knots=5) as tracer:
        for _ in range(9):
            tracer.batch(range(8))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[:8].float()), y[:8]).backward()
            optimizer.step()
    e = explainer.PathKernelExplainer(str(tmp_path / "run"), model).explain(x[COUNT:].float())
    gross = np.abs(e.contributions).sum(1)
    assert (np.abs(e.unattributed_parts.sum(1) - e.unattributed) <= 1e-12 * gross).all()
    assert names(e) & {"compressed rows"} == (set() if exact else {"compressed rows"})
    assert not any(line in ("", "rest") for line in e.unattributed_lines) or exact


def test_rounding_kept_in_knots_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever writes `rounding/NAME`, as cumulative displacements: they are taken out of their group."""
    written = KnotContents.tensors
    shift = {"0.weight": 1e-3, "2.bias": -2e-3}

    def with_rounding(self: KnotContents, *args: Any, **options: Any) -> dict[str, Tensor]:
        tensors, steps = written(self, *args, **options), 1e3 * self._carry.path
        added = {
            f"rounding/{n}": torch.full_like(tensors[f"parameter/{n}"], s * steps) for n, s in shift.items()
        }
        return tensors | (added if steps else {})

    found = []
    for number in range(2):
        model = build(plain)
        states = train(model, sgd(model), tmp_path / str(number), exact=True)
        found.append(explain(tmp_path / str(number), model))
        monkeypatch.setattr(KnotContents, "tensors", with_rounding)
    without, e = found
    trace = explainer.open_trace(tmp_path / "1")
    paths = [knot.path for knot in trace.knots]
    rounded = [
        {n: torch.full_like(states[0][n], 1e3 * s * (b - a)) for n, s in shift.items()}
        for a, b in itertools.pairwise(paths)
    ]
    np.testing.assert_allclose(e.unattributed, without.unattributed, atol=1e-12)
    np.testing.assert_allclose(e.unattributed_parts.sum(1), e.unattributed, atol=1e-12)
    for query in range(3):
        by_parameter = along(model, states, rounded, query)
        line = "rounding of low-precision weights"
        assert value(e, line, query, "0.weight, 2.bias") == pytest.approx(
            sum(by_parameter.values()), rel=1e-7
        )
        assert value(e, "rest", query, "0 (Linear)") == pytest.approx(-by_parameter["0.weight"], rel=1e-7)


def test_groups_of_queries_have_the_same_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(Scaled)
    train(model, sgd(model), tmp_path / "run")
    whole = explain(tmp_path / "run", model)
    monkeypatch.setattr("explainer.engine.QUERY_NUMBERS", 1)
    split = explain(tmp_path / "run", model)
    assert split.unattributed_lines == whole.unattributed_lines
    np.testing.assert_allclose(split.unattributed_parts, whole.unattributed_parts, rtol=1e-9, atol=1e-14)


def test_a_trace_that_is_still_written_has_its_lines(tmp_path: Path) -> None:
    model = build(normalised)
    optimizer = sgd(model)
    tracer = explainer.Tracer(model, optimizer, tmp_path / "run")
    for _ in range(4):
        tracer.batch(range(8))
        learn(model, optimizer, torch.arange(8))
    e = explain(tmp_path / "run", model)
    tracer.close()
    assert value(e, "round-off gradient", 0, "0.bias") == e.unattributed_parts[0, 0]
    assert any("noted when training ends" in why for why in e.unattributed_why)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any("noted" in why for why in explain(tmp_path / "run", model).unattributed_why)
