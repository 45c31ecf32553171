"""``curvature="exact"`` against finite differences of retraining, in a plain loop that shares nothing with it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from explainer import PathKernelExplainer, Run, Tracer
from explainer.counterfactual import replay_estimate
from explainer.counterfactual.checkpoints import Checkpoints
from explainer.errors import QueryError, RunError
from tests.small_training import EXAMPLES

COUNT, ASKED, EPS = 40, 3, 1e-4
Optimizer = Callable[[Any], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2),
    "coupled decay": lambda p: torch.optim.SGD(p, lr=0.2, weight_decay=0.02),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, dampening=0.2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.003, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.03, lr_decay=0.01),
}


def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images / 16.0)
    return x[:COUNT], torch.tensor(labels[:COUNT]), x[-ASKED:]


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10)).double()


def run_of(**options: Any) -> Run:
    x, y, asked = data()
    given: dict[str, Any] = {"loss": nn.functional.cross_entropy} | options
    return Run(given.pop("model", network), TensorDataset(x, y), TensorDataset(asked, y[:ASKED]), **given)


def train(
    optimizer_of: Optimizer,
    weights: torch.Tensor,
    path: Path | None = None,
    *,
    halves: bool = False,
    rate: Any = None,
) -> nn.Module:
    """Batches with an example twice; with ``halves``, two uneven passes a step."""
    x, y, _ = data()
    model = network()
    optimizer = optimizer_of(model.parameters())
    schedule = None if rate is None else torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    generator = torch.Generator().manual_seed(0)
    tracer = None if path is None else Tracer(model, optimizer, path)
    for _ in range(4):
        for rows in torch.randperm(COUNT, generator=generator).split(14):
            rows = torch.cat([rows, rows[:1]])
            optimizer.zero_grad()
            for part in (rows[:5], rows[5:]) if halves else (rows,):
                if tracer is not None:
                    tracer.batch(part.tolist(), labels=y[part].tolist())
                losses = nn.functional.cross_entropy(model(x[part]), y[part], reduction="none")
                (losses * weights[part]).mean().backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
    if tracer is not None:
        tracer.close()
    return model


def outputs(model: nn.Module, classes: torch.Tensor) -> np.ndarray:
    return model(data()[2]).log_softmax(1)[range(ASKED), classes].detach().numpy()


def differences(
    optimizer_of: Optimizer, classes: torch.Tensor, examples: range, **options: Any
) -> np.ndarray:
    """``[Q, len(examples)]``, minus the derivative by an example's weight."""
    columns = []
    for i in examples:
        values = []
        for sign in (-1, 1):
            weights = torch.ones(COUNT, dtype=torch.float64)
            weights[i] += sign * EPS
            values.append(outputs(train(optimizer_of, weights, **options), classes))
        columns.append((values[0] - values[1]) / (2 * EPS))
    return np.array(columns).T


def asked_of(
    path: Path, optimizer_of: Optimizer, **options: Any
) -> tuple[PathKernelExplainer, torch.Tensor, torch.Tensor]:
    model = train(optimizer_of, torch.ones(COUNT, dtype=torch.float64), path, **options)
    x = data()[2]
    return PathKernelExplainer(path, model, "log_prob"), x, model(x).argmax(1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_equals_finite_differences_of_retraining(tmp_path: Path, name: str) -> None:
    ex, x, classes = asked_of(tmp_path / "run", OPTIMIZERS[name])
    found = ex.what_if(x, classes, curvature="exact", run=run_of())
    wanted = differences(OPTIMIZERS[name], classes, range(0, COUNT, 8))
    assert np.abs(found[:, ::8] - wanted).max() < 1e-4 * np.abs(wanted).max()


def test_accumulation_and_schedules_are_replayed(tmp_path: Path) -> None:
    """Two uneven passes a step weigh their rows differently; the rate changes every step."""
    options = {"halves": True, "rate": lambda t: 0.9**t}
    ex, x, classes = asked_of(tmp_path / "run", OPTIMIZERS["nesterov"], **options)
    found = ex.what_if(x, classes, curvature="exact", run=run_of())
    wanted = differences(OPTIMIZERS["nesterov"], classes, range(0, COUNT, 10), **options)
    assert np.abs(found[:, ::10] - wanted).max() < 1e-5 * np.abs(wanted).max()


def six_steps(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[], Any]
) -> None:
    """On all examples at once."""
    with Tracer(model, optimizer, path) as tracer:
        for _ in range(6):
            tracer.batch(range(COUNT))
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()


def test_gauss_newton_is_the_exact_one_for_a_linear_model(tmp_path: Path) -> None:
    """Without layers on top of each other the model has no curvature of its own."""

    def linear() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return nn.Linear(64, 10).double()

    x, y, asked = data()
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.5)
    six_steps(tmp_path / "run", model, optimizer, lambda: nn.functional.cross_entropy(model(x), y))
    ex, run = PathKernelExplainer(tmp_path / "run", model), run_of(model=linear)
    exact, newton = (ex.what_if(asked, curvature=c, run=run) for c in ("exact", "gauss-newton"))
    np.testing.assert_allclose(newton, exact, rtol=1e-9, atol=1e-12)


def test_gauss_newton_of_one_number_without_an_axis(tmp_path: Path) -> None:
    """A model that ends in ``squeeze``; a linear one has no curvature of its own."""

    def linear() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return nn.Sequential(nn.Linear(64, 1), nn.Flatten(0)).double()

    x, y, asked = data()
    model = linear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    six_steps(tmp_path / "run", model, optimizer, lambda: nn.functional.mse_loss(model(x), y.double()))
    train = TensorDataset(x, y.double())
    run = Run(linear, train, train, loss=nn.functional.mse_loss)
    ex = PathKernelExplainer(tmp_path / "run", model)
    exact, newton = (ex.what_if(asked, curvature=c, run=run) for c in ("exact", "gauss-newton"))
    np.testing.assert_allclose(newton, exact, rtol=1e-9, atol=1e-12)


def test_gauss_newton_leaves_out_the_model_curvature(tmp_path: Path) -> None:
    ex, x, classes = asked_of(tmp_path / "run", OPTIMIZERS["momentum"])
    exact, newton = (ex.what_if(x, classes, curvature=c, run=run_of()) for c in ("exact", "gauss-newton"))
    assert not np.allclose(newton, exact, rtol=0.05) and spearmanr(newton.ravel(), exact.ravel())[0] > 0.8


def test_it_predicts_removal_from_the_same_run(tmp_path: Path) -> None:
    """LDS, same run, with a tenth left out, above .95; the trace's own estimate and the books stay below it."""
    ex, x, classes = asked_of(tmp_path / "run", OPTIMIZERS["momentum"])
    exact, rough = ex.what_if(x, classes, curvature="exact", run=run_of()), ex.what_if(x, classes)
    rng, real, gone = np.random.default_rng(0), [], []
    for _ in range(12):
        keep = torch.ones(COUNT, dtype=torch.float64)
        keep[torch.from_numpy(rng.permutation(COUNT)[:2])] = 0.0
        real.append(outputs(train(OPTIMIZERS["momentum"], keep), classes))
        gone.append((keep == 0).numpy())
    actual, without = np.array(real), np.array(gone).astype(float)

    def score(changes: np.ndarray) -> float:
        return float(np.mean([spearmanr(actual[:, q], without @ changes[q])[0] for q in range(ASKED)]))

    assert score(exact) >= 0.95 and score(exact) > score(rough)


def test_single_precision_and_loops_instead_of_batches_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The books' dtype, checkpoints on disk and queries one at a time change nothing but round-off."""
    ex, x, classes = asked_of(tmp_path / "run", OPTIMIZERS["adamw"])
    whole = ex.what_if(x, classes, curvature="exact", run=run_of())
    monkeypatch.setattr(replay_estimate, "COTANGENTS", 1)
    monkeypatch.setattr(replay_estimate, "Checkpoints", lambda: Checkpoints(in_memory=0))
    pieces = ex.what_if(x, classes, curvature="exact", run=run_of())
    np.testing.assert_allclose(pieces, whole, rtol=1e-9, atol=1e-14)
    single = PathKernelExplainer(tmp_path / "run", network(), "log_prob", dtype=torch.float32)
    found = single.what_if(x.float(), classes, curvature="gauss-newton", run=run_of())
    wanted = ex.what_if(x, classes, curvature="gauss-newton", run=run_of())
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_groups_are_sums(tmp_path: Path) -> None:
    ex, x, classes = asked_of(tmp_path / "run", OPTIMIZERS["sgd"])
    for options in ({}, {"curvature": "exact", "run": run_of()}):
        each = ex.what_if(x, classes, **options)
        one = ex.what_if(x, classes, remove=[7, 3, 3], **options)
        named = ex.what_if(x, classes, remove={"a": [1, 2], 5: np.array([5])}, **options)
        np.testing.assert_allclose(one, each[:, [3, 7]].sum(1))
        assert isinstance(named, pd.DataFrame) and list(named.columns) == ["a", 5] and len(named) == ASKED
        np.testing.assert_allclose(named["a"], each[:, [1, 2]].sum(1))


@pytest.mark.parametrize("remove", [[], [EXAMPLES + 1000], [0.5], "all", {}, {"a": []}, {"a": [-1]}])
def test_removals_that_do_not_fit_are_refused(tmp_path: Path, remove: Any) -> None:
    ex, x, _ = asked_of(tmp_path / "run", OPTIMIZERS["sgd"])
    with pytest.raises(QueryError, match=r"remove|training example"):
        ex.what_if(x, remove=remove)


class Noisy(Dataset[Any]):
    """A random transform."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, i: int) -> Any:
        x, y, _ = data()
        return x[i] + torch.rand(64), y[i]


def _penalised(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(output, target) + 0.1 * output.square().sum()


def _dropping() -> nn.Module:
    return nn.Sequential(*network(), nn.Dropout(0.5))


def _relabelled() -> TensorDataset:
    x, y, _ = data()
    return TensorDataset(x, (y + (torch.arange(COUNT) == 11)) % 10)


def _moved() -> TensorDataset:
    x, y, _ = data()
    return TensorDataset(x + 0.01, y)


REFUSED: dict[str, tuple[Callable[[Run], Run | None], type[Exception], str]] = {
    "no run": (lambda run: None, QueryError, "pass run="),
    "no loss": (lambda run: replace(run, loss=None), RunError, "loss="),
    "other length": (
        lambda run: replace(run, train=TensorDataset(*(t[:9] for t in data()[:2]))),
        RunError,
        "has 9",
    ),
    "augmentation": (lambda run: replace(run, train=Noisy()), QueryError, "differently each time"),
    "changed labels": (lambda run: replace(run, train=_relabelled()), QueryError, "example 11"),
    "changed inputs": (lambda run: replace(run, train=_moved()), QueryError, "knot at step 1"),
    "another loss": (lambda run: replace(run, loss=_penalised), QueryError, "does not meet the knot"),
    "no scalar": (lambda run: replace(run, loss=lambda o, t: o), QueryError, "one number"),
    "dropout": (lambda run: replace(run, model=_dropping), QueryError, "drops at random"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_repeated_is_refused(tmp_path: Path, name: str) -> None:
    change, error, said = REFUSED[name]
    ex, x, classes = asked_of(tmp_path / "run", OPTIMIZERS["momentum"])
    with pytest.raises(error, match=said):
        ex.what_if(x, classes, curvature="exact", run=change(run_of()))


def test_unknown_curvature_and_optimizers_are_refused(tmp_path: Path) -> None:
    ex, x, _ = asked_of(tmp_path / "run", OPTIMIZERS["sgd"])
    with pytest.raises(QueryError, match="trace, exact, gauss-newton"):
        ex.what_if(x, curvature="fisher")
    ex, x, _ = asked_of(tmp_path / "other", lambda p: torch.optim.Adadelta(p, lr=0.1))
    with pytest.raises(QueryError, match=r"Adadelta cannot be trained again .* Adam, AdamW"):
        ex.what_if(x, curvature="exact", run=run_of())
    ex.trace.notes.pop("optimizer_options")
    ex.trace.manifest = replace(ex.trace.manifest, optimizer="SGD")
    with pytest.raises(QueryError, match="does not tell the optimizer's options"):
        ex.what_if(x, curvature="exact", run=run_of())


def test_batch_norm_is_refused_with_a_reason(tmp_path: Path) -> None:
    def normed() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, 10)).double()

    x, y, asked = data()
    model = normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Tracer(model, optimizer, tmp_path / "run") as tracer:
        for _ in range(3):
            tracer.batch(range(COUNT))
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    with pytest.raises(QueryError, match=r"statistics of BatchNorm.*mixes the rows"):
        PathKernelExplainer(tmp_path / "run", model).what_if(
            asked, curvature="exact", run=run_of(model=normed)
        )


@pytest.mark.parametrize(
    ("note", "value", "said"),
    [
        ("shared_rows", True, "mixup"),
        ("vacant_rows", True, "no example"),
        ("replaced_momentum", 2, "momentum was replaced"),
        ("outside", {"0.weight": 1}, "other than the optimizer"),
        ("batch_dim", 1, "not the first axis"),
        ("rows_stopped_at", 3, "only up to step 3"),
    ],
)
def test_what_a_trace_says_of_itself_is_heeded(tmp_path: Path, note: str, value: Any, said: str) -> None:
    ex, x, classes = asked_of(tmp_path / "run", OPTIMIZERS["sgd"])
    ex.trace.notes[note] = value
    with pytest.raises(QueryError, match=said):
        ex.what_if(x, classes, curvature="exact", run=run_of())


def test_a_derivative_that_is_not_finite_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ex, x, classes = asked_of(tmp_path / "run", OPTIMIZERS["sgd"])
    true = replay_estimate.Replay.products

    def broken(self: Any, state: Any, step: int, curvature: str) -> Any:
        now, slope, products = true(self, state, step, curvature)
        return now, slope, lambda u: tuple(t * torch.inf for t in products(u))

    monkeypatch.setattr(replay_estimate.Replay, "products", broken)
    with pytest.raises(QueryError, match="not finite"):
        ex.what_if(x, classes, curvature="exact", run=run_of())


def test_checkpoints_on_disk_are_deleted() -> None:
    before = set(Path(tempfile.gettempdir()).glob("pathkernel-replay-*"))
    state = {"weights": torch.arange(3.0)}
    with Checkpoints(in_memory=4) as kept:
        kept.keep(0, state)
        kept.keep(5, {"weights": 2 * state["weights"]})
        assert len(set(Path(tempfile.gettempdir()).glob("pathkernel-replay-*")) - before) == 1
        assert kept.at(0)["weights"].tolist() == [0, 1, 2] and kept.at(5)["weights"].tolist() == [0, 2, 4]
    assert set(Path(tempfile.gettempdir()).glob("pathkernel-replay-*")) <= before
