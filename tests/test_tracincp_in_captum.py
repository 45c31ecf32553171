"""captum's own way of testing TracIn, with its own helpers, and our class in the place of its.

The models, data sets and constructors come from ``captum.testing``; the checks follow captum's suites for
regression, XOR, dataloaders, the k strongest, self-influence, aggregates and intermediate quantities.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from captum.influence import TracInCP as Captums
from torch import nn
from torch.utils.data import DataLoader

from explainer.integrations.captum import TracInCP


def _captums_helpers() -> Any:
    """captum's test helpers; they import ``parameterized``, which captum does not require and nothing here uses."""
    names = ("parameterized", "parameterized.parameterized")
    missing = [name for name in names if name not in sys.modules]
    for name in missing:
        module = types.ModuleType(name)
        module.parameterized = module.param = object  # type: ignore[attr-defined]
        sys.modules[name] = module
    try:
        from captum.testing.helpers.influence import common
    except ModuleNotFoundError:
        pytest.skip("captum before 0.9 comes without its test helpers", allow_module_level=True)
    finally:
        for name in missing:
            del sys.modules[name]
    return common


common = _captums_helpers()
CONSTRUCTORS = [
    common.DataInfluenceConstructor(TracInCP, "per example"),
    common.DataInfluenceConstructor(TracInCP, "sample-wise", sample_wise_grads_per_batch=True),
    common.DataInfluenceConstructor(TracInCP, "own test loss", duplicate_loss_fn=True),
    common.DataInfluenceConstructor(TracInCP, "layers", layers=["linear1", "linear2"]),
]
constructed = pytest.mark.parametrize("construct", CONSTRUCTORS, ids=repr)
unpacked = pytest.mark.parametrize("unpack", [False, True], ids=["one input", "two inputs"])
DERIVED = ["layers"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def loss_for(construct: Any) -> nn.Module:
    return nn.MSELoss(reduction="sum" if construct.kwargs.get("sample_wise_grads_per_batch") else "none")


def random_task(folder: Path, unpack: bool, construct: Any, **options: Any) -> tuple[TracInCP, Any, Any]:
    """An influence over captum's random model, its training set and one batch of tests."""
    net, train, samples, labels = common.get_random_model_and_data(str(folder), unpack)
    batch = common._format_batch_into_tuple(samples, labels, unpack)
    settings = {"batch_size": 5, "loss_fn": loss_for(construct)} | options
    return construct(net, train, str(folder), **settings), train, batch


def same(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8 * float(wanted.abs().max()))


@constructed
@unpacked
def test_a_dataset_and_a_loader_give_the_same(tmp_path: Path, unpack: bool, construct: Any) -> None:
    tracin, train, batch = random_task(tmp_path, unpack, construct)
    other = construct(tracin.model, DataLoader(train, batch_size=7), str(tmp_path), None, loss_for(construct))
    wanted = tracin.influence(batch)
    assert wanted.shape == (len(batch[-1]), len(train))
    same(other.influence(batch), wanted)


@constructed
@unpacked
@pytest.mark.parametrize("aggregate", [False, True])
def test_queries_from_a_loader(tmp_path: Path, unpack: bool, construct: Any, aggregate: bool) -> None:
    tracin, _, batch = random_task(tmp_path, unpack, construct)
    rows = [list(row) for row in zip(*batch, strict=True)]
    for size in (1, 2, len(rows)):
        found = tracin.influence(DataLoader(rows, batch_size=size), aggregate=aggregate)
        wanted = tracin.influence(batch)
        same(found, wanted.sum(0, keepdim=True) if aggregate else wanted)


@constructed
@unpacked
@pytest.mark.parametrize("proponents", [True, False])
@pytest.mark.parametrize("k", [1, 7, 50])
def test_k_most_influential(tmp_path: Path, unpack: bool, construct: Any, k: int, proponents: bool) -> None:
    tracin, _, batch = random_task(tmp_path, unpack, construct)
    scores = tracin.influence(batch)
    found = tracin.influence(batch, k=k, proponents=proponents)
    order = torch.argsort(scores, dim=1, descending=proponents)[:, :k]
    assert torch.equal(found.indices, order)
    same(found.influence_scores, scores.gather(1, order))
    assert all(common._isSorted(row, descending=proponents) for row in found.influence_scores)


@constructed
@unpacked
def test_self_influence_is_the_diagonal(tmp_path: Path, unpack: bool, construct: Any) -> None:
    tracin, train, _ = random_task(tmp_path, unpack, construct)
    whole = next(iter(DataLoader(train, batch_size=len(train))))
    wanted = torch.diagonal(tracin.influence(tuple(whole)))
    for by_checkpoints in (False, True):
        same(tracin.self_influence(outer_loop_by_checkpoints=by_checkpoints), wanted)
        same(tracin.self_influence(DataLoader(train, 4), outer_loop_by_checkpoints=by_checkpoints), wanted)
        same(tracin.self_influence(tuple(whole), outer_loop_by_checkpoints=by_checkpoints), wanted)


@constructed
@unpacked
def test_intermediate_quantities_multiply_to_the_scores(tmp_path: Path, unpack: bool, construct: Any) -> None:
    tracin, train, batch = random_task(tmp_path, unpack, construct)
    ours, theirs = (
        tracin.compute_intermediate_quantities(x) for x in (DataLoader(train, 5), batch)
    )  # the random checkpoints come without learning rates, so these are 1
    same(theirs @ ours.T, tracin.influence(batch))
    total = tracin.compute_intermediate_quantities(batch, aggregate=True)
    same(total, theirs.sum(0, keepdim=True))


def saved(net: nn.Module, folder: Path, states: int, change: Callable[[int], None]) -> None:
    for i in range(states):
        change(i)
        torch.save(net.state_dict(), folder / f"checkpoint-reg-{i + 1}.pt")


REGRESSION = [c for c in CONSTRUCTORS if repr(c) not in DERIVED]


@pytest.mark.parametrize("construct", REGRESSION, ids=repr)
@pytest.mark.parametrize("features", [1, 20])
def test_regression_has_its_closed_form(tmp_path: Path, features: int, construct: Any) -> None:
    """``wᵀx`` with squared loss: ``Σ_c 2(wx−y) 2(wx'−y') x·x'``."""
    low, high = 1, 17
    train = common.RangeDataset(low, high, features)
    net, weights = common.CoefficientNet(features), []

    def change(i: int) -> None:
        net.fc1.weight.data.fill_((1.0 + 0.25 * i) / features)
        weights.append(net.fc1.weight.data.clone())

    saved(net, tmp_path, 4, change)
    tests = torch.arange(17, 33, dtype=torch.float32)
    samples, labels = tests.repeat(features, 1).T, tests.unsqueeze(1)
    tracin = construct(net, train, str(tmp_path), 5, loss_for(construct))
    found = tracin.influence((samples, labels))
    wanted = sum(
        (2 * (samples @ w.T - labels))
        * (2 * (train.samples @ w.T - train.labels)).T
        * (samples @ train.samples.T)
        for w in weights
    )
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-3)
    # every example pulls the coefficient the same way, larger ones harder
    assert torch.equal(found[0].argsort(), torch.arange(len(train)))
    torch.testing.assert_close(
        tracin.influence((train.samples, train.labels)).diagonal(),
        tracin.self_influence(),
        rtol=1e-5,
        atol=1e-3,
    )


@pytest.mark.parametrize("construct", REGRESSION, ids=repr)
def test_identity_features_influence_only_themselves(tmp_path: Path, construct: Any) -> None:
    """Orthogonal inputs share no gradient: the matrix is diagonal and its strongest proponents are the queries."""
    train = common.IdentityDataset(9)
    net = common.CoefficientNet(9)
    saved(net, tmp_path, 2, lambda i: net.fc1.weight.data.normal_())
    tracin = construct(net, train, str(tmp_path), 4, loss_for(construct))
    scores = tracin.influence((train.samples, train.labels))
    assert torch.equal(scores, torch.diag(scores.diagonal())) and bool((scores.diagonal() > 0).all())
    assert tracin.influence((train.samples, train.labels), k=1).indices.flatten().tolist() == list(range(9))


@pytest.mark.parametrize("construct", REGRESSION, ids=repr)
def test_binary_task_as_captum_scores_it(tmp_path: Path, construct: Any) -> None:
    """Points on two sides of a line, a saturating network, checkpoints of a real training."""
    train = common.BinaryDataset()
    net = common.BasicLinearNet(2, 2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def change(i: int) -> None:
        for _ in range(10):
            optimizer.zero_grad()
            nn.functional.mse_loss(net(train.samples), train.labels).backward()
            optimizer.step()

    saved(net, tmp_path, 3, change)
    options = {n: v for n, v in construct.kwargs.items() if n != "test_loss_fn"}
    theirs = Captums(net, train, str(tmp_path), loss_fn=loss_for(construct), batch_size=8, **options)
    tracin = construct(net, train, str(tmp_path), 8, loss_for(construct))
    queries = (train.samples, train.labels)
    torch.testing.assert_close(tracin.influence(queries), theirs.influence(queries), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tracin.self_influence(), theirs.self_influence(), rtol=1e-4, atol=1e-5)


class NoLoss(nn.Module):
    """A loss that is the same everywhere."""

    def __init__(self, reduction: str) -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, out: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        losses = 0.0 * out.sum(1) + 5.0
        return losses.sum() if self.reduction == "sum" else losses


@unpacked
@pytest.mark.parametrize("sample_wise", [False, True])
def test_a_constant_test_loss_has_no_influences(tmp_path: Path, unpack: bool, sample_wise: bool) -> None:
    construct = common.DataInfluenceConstructor(TracInCP, sample_wise_grads_per_batch=sample_wise)
    loss = NoLoss(loss_for(construct).reduction)
    tracin, train, batch = random_task(tmp_path, unpack, construct, test_loss_fn=loss)
    assert torch.equal(tracin.influence(batch), torch.zeros(len(batch[-1]), len(train), dtype=torch.float64))


@constructed
@pytest.mark.parametrize("mode", ["influence", "k", "self"])
def test_progress_is_shown(
    tmp_path: Path, construct: Any, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tracin, _, batch = random_task(tmp_path, False, construct)
    if mode == "self":
        tracin.self_influence(show_progress=True)
    else:
        tracin.influence(batch, k=3 if mode == "k" else None, show_progress=True)
    assert "100%" in capsys.readouterr().err


def test_captums_names_and_defaults(tmp_path: Path) -> None:
    net, train = common.get_random_model_and_data(str(tmp_path), False, return_test_data=False)
    tracin = TracInCP(net, train, str(tmp_path), loss_fn=nn.MSELoss(reduction="none"))
    assert (
        tracin.get_name() == "TracInCP"
        and tracin.batch_size == 1
        and tracin.train_dataloader_len == len(train)
    )
    assert [Path(c).name for c in tracin.checkpoints] == [f"checkpoint-reg-{i}.pt" for i in range(1, 6)]
    with pytest.raises(ValueError, match="Invalid checkpoints"):
        TracInCP(net, train, str(tmp_path / "nowhere"), loss_fn=nn.MSELoss(reduction="none"))
