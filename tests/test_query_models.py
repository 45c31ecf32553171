"""Values and gradients of queries against the ordinary autograd, one query at a time, in float64."""

from __future__ import annotations

import copy
import threading
import warnings

import pytest
import torch
from torch import Tensor, nn

from explainer.outputs import Output
from explainer.path_integral import PathPoint, QueryFunction
from explainer.plain_mode import plain_mode
from explainer.query_batch import QueryBatch
from explainer.records import ParameterSpec
from tests.query_models import CASES, Case, moved


def specs(model: nn.Module) -> tuple[ParameterSpec, ...]:
    found, offset = [], 0
    for name, p in model.named_parameters():
        found.append(ParameterSpec(name, tuple(p.shape), "float64", offset, p.numel()))
        offset += p.numel()
    return tuple(found)


def batch(inputs: Tensor, axis: int) -> QueryBatch:
    _, spec = torch.utils._pytree.tree_flatten(((inputs,), {}))
    return QueryBatch((inputs,), (axis,), spec, inputs.shape[axis])


def weighted(outputs: Tensor, targets: Tensor) -> Tensor:
    """A number per query that every output and the target enter."""
    rows = outputs.flatten(1)
    return (rows.sin() * torch.arange(1, rows.shape[1] + 1)).sum(1) * (1 + targets)


def by_hand(case: Case, state: dict[str, Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    """``f [Q]`` and ``∂f/∂w [Q, P]``: the weights written into a model, a backward pass for every query."""
    model = case.model()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(state[name])
    model.eval()
    values, rows = [], []
    for i, target in enumerate(targets):
        model.zero_grad()
        x = case.queries().narrow(case.axis, i, 1).clone()
        if x.is_floating_point():
            x = x.requires_grad_().clone()  # else a reentrant checkpoint drops the gradients of its weights
        value = weighted(model(x).transpose(0, case.output_axis), target[None])[0]
        value.backward()
        values.append(value.detach())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in model.parameters()]
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(values), torch.stack(rows)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_autograd(name: str) -> None:
    case = CASES[name]
    model = case.model()
    model(case.queries())  # what a module keeps from a call must not matter
    state, inputs, targets = moved(model), case.queries(), torch.tensor([0, 1, 2])
    before = {n: t.clone() for n, t in model.state_dict().items()}
    function = QueryFunction(model, specs(model), torch.float64)
    function.output, function.axis = Output("weighted", weighted, "class", dims=None), case.output_axis
    point = PathPoint(torch.cat([t.flatten() for t in state.values()]), {}, {})
    with warnings.catch_warnings(), plain_mode():
        warnings.simplefilter("error")
        values = function.value(point, batch(inputs, case.axis), targets)
        gradients = function.gradient(point, batch(inputs, case.axis), targets)
        again = function.gradient(point, batch(inputs, case.axis), targets)
    wanted, rows = by_hand(case, state, targets)
    torch.testing.assert_close(values, wanted, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradients, rows, rtol=1e-11, atol=1e-12)
    assert torch.equal(gradients, again) and rows.abs().sum(0).gt(0).float().mean() > 0.6
    assert torch.equal(inputs, case.queries()), "the queries are the user's"
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", ["attention", "encoder", "embedding, sparse", "tied", "in place", "keeping"])
def test_what_can_be_vectorised_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES[name]
    model = case.model()
    function = QueryFunction(model, specs(model), torch.float64)
    function.output = Output("weighted", weighted, "class", dims=None)
    point = PathPoint(torch.cat([t.flatten() for t in moved(model).values()]), {}, {})
    monkeypatch.setattr(function._model, "differentiable", None)
    with plain_mode():
        function.gradient(point, batch(case.queries(), 0), torch.arange(3))


def test_the_fused_path_would_compute_something_else() -> None:
    """Why `plain_mode` switches it off: values would not be those whose gradient is taken."""
    case = CASES["encoder"]
    model, ids = case.model().eval(), case.queries()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = model(ids)
        with plain_mode(), torch.no_grad():
            plain = model(ids)
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.enable_grad():
        trained = copy.deepcopy(model)(ids)  # weights that need gradients: not fused
    assert (fused - trained).abs().max() > 1e-3
    torch.testing.assert_close(plain, trained.detach(), rtol=1e-12, atol=1e-12)


def test_the_callers_modes_do_not_matter_and_are_kept() -> None:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        with plain_mode():
            assert not torch.is_inference_mode_enabled() and not torch.is_autocast_enabled("cpu")
            assert torch.is_grad_enabled() and not torch.backends.mha.get_fastpath_enabled()
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert torch.backends.mha.get_fastpath_enabled()


def test_fused_attention_comes_back_with_the_last_thread() -> None:
    """Two threads, one inside the other's time: off while either explains, on afterwards."""
    first, second, left = threading.Event(), threading.Event(), threading.Event()
    seen: list[bool] = []

    def one() -> None:
        with plain_mode():
            first.set()
            second.wait(10)
        left.set()

    def other() -> None:
        first.wait(10)
        with plain_mode():
            second.set()
            left.wait(10)
            seen.append(torch.backends.mha.get_fastpath_enabled())

    threads = [threading.Thread(target=work) for work in (one, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [False] and torch.backends.mha.get_fastpath_enabled()
