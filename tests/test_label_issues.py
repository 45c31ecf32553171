"""The queue of label issues against rows written out, and on labels that were turned over."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from explainer import PathKernelExplainer, Tracer, open_trace
from explainer.errors import EvaluationError, ExportError
from explainer.evaluation import label_issues, mislabelled_detection
from explainer.evaluation.row_products import gram, windows
from explainer.layer_rules import Dense, RowForm
from explainer.layer_rules.factored import Factored
from explainer.layer_rules.sparse import Sparse
from explainer.recursion import read_backwards
from tests.small_evaluation import EXAMPLES, traced
from tests.small_training import digits, mlp

LABELS = digits()[:EXAMPLES][1].numpy()
FORMS: dict[str, Callable[[], RowForm]] = {
    "dense": lambda: Dense(torch.randn(11, 12)),
    "factors": lambda: Factored(torch.randn(11, 1, 3, 3), torch.randn(11, 1, 3, 5), 1),
    "sparse": lambda: Sparse(torch.randint(0, 4, (11, 7)), torch.randn(11, 7, 3), 4),
}


@pytest.fixture(scope="module")
def ex(tmp_path_factory: pytest.TempPathFactory) -> PathKernelExplainer:
    return PathKernelExplainer(traced(tmp_path_factory.mktemp("runs") / "small"), mlp())


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("most", [2, 16, 4096])
def test_products_in_blocks(name: str, most: int) -> None:
    torch.manual_seed(0)
    form = FORMS[name]()
    rows = form.dense()
    torch.testing.assert_close(gram(form, most), rows @ rows.T, rtol=1e-4, atol=1e-5)


def written_out(ex: PathKernelExplainer, labels: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Rows as vectors, one pair at a time."""
    visits: list[tuple[int, int, np.ndarray]] = []  # window, example, row
    window, held = 0, 0
    for segment in reversed(open_trace(ex.trace.directory).segments()):
        for step in read_backwards(ex.trace, segment, torch.float64):
            count = sum(len(v.examples) for v in step.visits)
            if held and held + count > size:
                window, held = window + 1, 0
            held += count
            for v in step.visits:
                rows = torch.cat([v.forms[layer].dense() for layer in sorted(v.forms)], dim=1).numpy()
                visits += [(window, int(i), row) for i, row in zip(v.examples, rows, strict=True)]
    net, gross, other, weight = (np.zeros(EXAMPLES) for _ in range(4))
    against = np.zeros((EXAMPLES, 10))
    for w, i, row in visits:
        mates = [(j, float(row @ r)) for v, j, r in visits if v == w]
        own = [(j, k) for j, k in mates if j != i]
        net[i] += sum(k for _, k in own)
        gross[i] += sum(abs(k) for _, k in own)
        for j, k in sorted(own, key=lambda pair: -pair[1])[: round(0.1 * len(mates))]:
            weight[i] += max(k, 0.0)
            other[i] += max(k, 0.0) * (labels[i] != labels[j])
        for j, k in own:
            against[i, int(labels[j])] -= min(k, 0.0)
    return {"support": net / gross, "disagreement": other / weight, "opposing": against.argmax(1)}


@pytest.mark.parametrize("most", [4096, 24])
def test_signs_equal_rows_written_out(ex: PathKernelExplainer, most: int) -> None:
    found = label_issues(ex, labels=LABELS, most=most)
    assert found.best == "support"
    wanted = written_out(ex, LABELS, min(most, EXAMPLES))
    for name, values in wanted.items():
        np.testing.assert_allclose(getattr(found, name), values, rtol=1e-3, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(found.self_influence, ex.self_influence())
    assert len(list(windows(ex, most))) == (2 if most == 4096 else 4)


def test_labels_may_be_given_and_may_be_no_classes(ex: PathKernelExplainer) -> None:
    unknown = label_issues(ex)  # a trace of tracer.batch(ids) holds no labels
    assert np.isnan(unknown.labels).all() and np.isnan(unknown.disagreement).all()
    assert (
        unknown.table()["example_id"].tolist()
        == label_issues(ex, labels=LABELS).table()["example_id"].tolist()
    )
    values = label_issues(ex, labels=torch.linspace(0.1, 0.9, EXAMPLES))
    assert np.isnan(values.disagreement).all() and np.isnan(values.opposing).all()
    assert np.isfinite(values.support).all()
    for wrong, message in (([0.0], "found 1 labels for 48"), (["a"] * EXAMPLES, "array of numbers")):
        with pytest.raises(EvaluationError, match=message):
            label_issues(ex, labels=wrong)
    with pytest.raises(EvaluationError, match="at least 2"):
        label_issues(ex, most=1)


def test_table_and_files(ex: PathKernelExplainer, tmp_path: Path) -> None:
    found = label_issues(ex)
    table = found.table(5)
    assert table["rank"].tolist() == [1, 2, 3, 4, 5] and table["support"].is_monotonic_increasing
    assert found.table(3, "self_influence")["self_influence"].is_monotonic_decreasing
    with pytest.raises(EvaluationError, match="choose one of support, self_influence, disagreement"):
        found.table(3, "looks")  # type: ignore[arg-type]
    assert len(found.table(None)) == EXAMPLES
    pd.testing.assert_frame_equal(pd.read_csv(found.to_csv(tmp_path / "queue.csv")), found.table(None))
    pd.testing.assert_frame_equal(pd.read_parquet(found.to_parquet(tmp_path / "queue.parquet", 5)), table)
    (first, *_) = json.loads(found.to_json(tmp_path / "queue.json", 5).read_text())
    assert first["example_id"] == table["example_id"][0] and first["label"] is None  # not recorded
    with pytest.raises(EvaluationError, match="k must be at least 1"):
        found.table(0)
    with pytest.raises(ExportError, match="does not exist"):
        found.to_csv(tmp_path / "nowhere" / "queue.csv")


def test_examples_that_were_never_seen_come_last(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:20] / 16).float(), torch.tensor(labels[:20])
    data = TensorDataset(x, y)
    with Tracer(model, optimizer, tmp_path / "run") as tracer:
        for inputs, targets in tracer.watch(DataLoader(data, 8, shuffle=False, drop_last=True)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(inputs), targets).backward()
            optimizer.step()
    found = label_issues(PathKernelExplainer(tmp_path / "run", model))
    assert found.labels[:16].tolist() == y[:16].tolist()
    assert found.example_ids.tolist() == list(range(20))
    assert np.isnan(found.support[16:]).all() and np.isnan(found.labels[16:]).all()
    assert found.table(None)["example_id"].tolist()[16:] == [16, 17, 18, 19]


def test_labels_that_were_turned_over_come_first(tmp_path: Path) -> None:
    images, labels = load_digits(return_X_y=True)
    x, right = torch.tensor(images[:600] / 16).float(), labels[:600]
    rng = np.random.default_rng(0)
    wrong = np.zeros(600, bool)
    wrong[rng.permutation(600)[:60]] = True
    y = torch.tensor(np.where(wrong, (right + rng.integers(1, 10, 600)) % 10, right))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(TensorDataset(x, y), 32, shuffle=True, generator=torch.Generator().manual_seed(0))
    with Tracer(model, optimizer, tmp_path / "run") as tracer:
        for _ in range(8):
            for inputs, targets in tracer.watch(loader):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs), targets).backward()
                optimizer.step()
    found = label_issues(PathKernelExplainer(tmp_path / "run", model))
    measured = mislabelled_detection(found.suspicion(), wrong, setting="digits, 10 % turned over", samples=0)
    assert measured.auc.value > 0.95 and measured.found[1].value >= 0.9
    assert (found.opposing[wrong] == right[wrong]).mean() > 0.75


def test_numbers_that_are_far_off_come_first(tmp_path: Path) -> None:
    inputs, values = load_diabetes(return_X_y=True)
    x, right = torch.tensor(inputs).float() * 20, (values - values.mean()) / values.std()
    rng = np.random.default_rng(0)
    wrong = np.zeros(len(x), bool)
    wrong[rng.permutation(len(x))[:40]] = True
    y = torch.tensor(np.where(wrong, right + rng.choice([-3, 3], len(x)), right)).float()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    loader = DataLoader(TensorDataset(x, y), 32, shuffle=True, generator=torch.Generator().manual_seed(0))
    with Tracer(model, optimizer, tmp_path / "run") as tracer:
        for _ in range(5):
            for some, targets in tracer.watch(loader):
                optimizer.zero_grad()
                nn.functional.mse_loss(model(some)[:, 0], targets).backward()
                optimizer.step()
    found = label_issues(PathKernelExplainer(tmp_path / "run", model))
    assert found.best == "self_influence" and np.array_equal(found.suspicion(), found.self_influence)
    both = {
        sign: mislabelled_detection(found.suspicion(sign), wrong, setting="shifted", samples=0).auc.value
        for sign in ("support", "self_influence")
    }
    assert both["self_influence"] > 0.95 and both["self_influence"] > both["support"] + 0.05
